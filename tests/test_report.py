"""A study's report from real small clips: every file, a page that asks nobody for anything, nothing of this machine."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import os
import re
import shlex
import threading
from collections.abc import Sequence
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import app
from nodes.engine import video, votes
from nodes.engine.checkpoints import DEMO
from nodes.engine.errors import Cancelled, StudyError, UsageError
from nodes.engine.heldout import LOSS
from nodes.engine.lora_stack import Entry, LoraStack
from nodes.engine.measures import Metric
from nodes.engine.pipeline import Base
from nodes.engine.study import Arm, Cell, Plan, Study, items, latents_file
from nodes.host import LocalHost
from nodes.model import choose_base
from nodes.render import Shot
from nodes.report import clean, command_of, grids_of, report
from nodes.study import begin, plan_study, run
from nodes.sweep import Sweep, arms_of, stack_from
from nodes.workflow import api_of

FPS, FRAMES, SIDE = 8.0, 9, 32
QUALITY = Metric("quality.<b>", True, "", "how <i>good</i> it is", False)
HOSTILE = "a <script>alert('p')</script> \"quoted\" \u202eprompt\u202c, with\na second line & more"
TITLE = "</title><script>alert('t')</script>"
SECRET = b"sixteen bytes or more"
HOME = "/home/somebody/private"


def entry(name: str, weight: float) -> Entry:
    return Entry(f"{HOME}/loras/{name}.safetensors", name, weight)


def swept(names: Sequence[str] = ("neon", "glow"), weights: Sequence[float] = (0.5, 1.0)) -> tuple[Arm, ...]:
    stacks = tuple(("", LoraStack((entry(name, 1.0),))) for name in names)
    return tuple(
        replace(one, hashes=tuple(e.name * 8 for e in one.stack)) for one in arms_of(Sweep(stacks, tuple(weights)))
    )


def plan(
    arms: Sequence[Arm],
    prompts: Sequence[str] = (HOSTILE, "a circle"),
    seeds: Sequence[int] = (0,),
    title: str = TITLE,
) -> Plan:
    settings = items({
        "steps": 5, "guidance": 2.0, "dynamic_guidance": False, "scheduler": "ddim", "frames": FRAMES, "width": SIDE,
        "height": SIDE, "strength": 0.8, "negative": "",
    })  # fmt: skip
    base = Base("cogloom-demo", f"{HOME}/models/cogloom-demo")
    return Plan(base, tuple(arms), tuple(prompts), tuple(seeds), settings, title=title)


def frames_of(cell: Cell, number: int) -> torch.Tensor:
    """A bright square that moves, the faster the later its arm."""
    frames = torch.full((FRAMES, SIDE, SIDE, 3), 0.1)
    for n in range(FRAMES):
        at = (n * (1 + number)) % (SIDE - 8)
        frames[n, 12:20, at : at + 8, number % 3] = 0.9
    return frames


def render(study: Study, cells: Sequence[Cell] | None = None) -> Study:
    """The files of finished cells, as rendering leaves them; the measured numbers are made up."""
    labels = [arm.label for arm in study.plan.arms]
    for cell in study.plan.cells if cells is None else cells:
        number = labels.index(cell.arm)
        path = study.path(cell, ".mkv")
        path.parent.mkdir(parents=True, exist_ok=True)
        video.write_video(frames_of(cell, number), path, FPS)
        study.path(cell, ".mp4").write_bytes(path.read_bytes())
        latents = torch.zeros(1, 4, 3, 8, 8)
        latents[..., : number + 1] = number
        study.path(cell, ".safetensors").write_bytes(latents_file(latents))
        held = [[e.name, e.weight] for e in study.plan.arm(cell.arm).stack]
        study.finish(cell, {"record": {"weights": [[0, held]]}})
        values = {"quality.<b>": number + len(cell.prompt) / 100 + cell.seed / 50, "motion": 0.1 * number}
        if cell.arm != study.plan.reference:
            values["departure"] = 0.05 * number
        study.keep_measured(cell, {"metrics": sorted(values), "values": values, "notes": []})
    study.keep_metrics({QUALITY.name: asdict(QUALITY), LOSS.name: asdict(LOSS)})
    return study


def more(study: Study) -> Study:
    """Held-out losses and votes."""
    for number, one in enumerate(study.plan.arms):
        losses = [
            [f"<item {i}>", d, 0.5 - number / 50 + i / 100 + (i * d % 3) / 1000] for i in range(8) for d in (0, 1)
        ]
        study.keep_heldout(one, {"dataset": f"{HOME}/clips/held out", "losses": losses})
    labels = [arm.label for arm in study.plan.arms]
    for number in range(30):
        a, b = labels[number % 4], labels[number % 4 + 1]
        pair = votes.blind(SECRET, a, b, (study.plan.prompts[number % 2], study.plan.seeds[0]), number // 8)
        better = "left" if (pair.left == b) != (number % 5 == 0) else "right"
        votes.append(study.votes, pair.vote("<judge>", better if number % 7 else "tie"))
    return study


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    """(study, report)."""
    folder = tmp_path_factory.mktemp("study")
    study = more(render(Study.begin(folder / "somebody" / "study", plan(swept()), {"cogloom": "1"})))
    return study, report(LocalHost(), study)


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text.append(data)


def test_every_file_is_there_and_is_what_it_says(made):
    study, told = made
    assert told.folder == study.folder / "report"
    assert [path.name for path in told.grids] == ["grid-01.mp4", "grid-02.mp4"]
    assert len(told.differences) == 4
    for path in (*told.grids, *told.differences):
        frames, fps = video.read_video(path)
        assert (len(frames), fps) == (FRAMES, FPS)
    assert video.read_image(told.sheet).shape[2] == 3
    for path in told.plots:
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
    names = {path.stem for path in told.plots}
    assert {"quality-b-differences", "held-out-loss-along-weight", "departure-means", "pareto", "votes"} <= names
    data = json.loads(told.data.read_text("utf-8"))
    written = {path.relative_to(told.folder).as_posix() for path in told.folder.rglob("*") if path.is_file()}
    assert set(data["files"]) == written


def test_the_grid_has_stacks_down_weights_across_and_the_base_beside_them(made):
    study, told = made
    first, second = grids_of(study.plan)
    assert (first.rows, first.columns) == (("neon", "glow"), ("base", "weight 0.5", "weight 1"))
    key = (HOSTILE, 0)
    assert first.cells == (
        (("base", key), ("neon 0.5", key), ("neon 1", key)),
        (("base", key), ("glow 0.5", key), ("glow 1", key)),
    )
    assert (second.caption, second.left_out) == ("a circle", "")
    frames, _ = video.read_video(told.grids[0])
    side = 192  # enlarged by a whole factor
    left, top = frames.shape[2] - 3 * side - 8, frames.shape[1] - 2 * side - 4
    for i, row in enumerate(first.cells):
        for j, (label, _) in enumerate(row):
            number = [arm.label for arm in study.plan.arms].index(label)
            y, x = top + i * (side + 4), left + j * (side + 4)
            tile = frames[:, y : y + side : 6, x : x + side : 6]
            assert (tile - frames_of(study.plan.cells[0], number)).abs().mean() < 0.02


def arms(count: int) -> list[Arm]:
    return [Arm(f"arm {n}", LoraStack((entry("x", n + 1.0),)), hashes=("x",)) for n in range(count)]


def test_without_axes_arms_are_across_and_prompts_and_seeds_down():
    (one,) = grids_of(plan(arms(3), ("a", "b"), (0, 1)))
    assert one.columns == ("arm 0", "arm 1", "arm 2")
    assert one.rows == ("a, seed 0", "b, seed 0", "a, seed 1", "b, seed 1")
    assert one.cells[1] == tuple((f"arm {n}", ("b", 0)) for n in range(3))
    (one,) = grids_of(plan(arms(2), ("a",)))
    assert (one.rows, one.caption) == (("",), "a")


def test_what_a_grid_has_no_room_for_is_said():
    (one,) = grids_of(plan(arms(20), tuple(f"p{n}" for n in range(9))))
    assert (len(one.columns), len(one.rows)) == (16, 4)
    assert one.left_out == "There is room for 16 of 20 arms, 4 of 9 prompts and seeds."


def test_the_page_asks_nobody_for_anything(made):
    text = made[1].page.read_text("utf-8")
    page = Tags(text)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "form", "base")
        for name in ("src", "href", "poster", "srcset", "data", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, name)
        assert not any(name.startswith("on") for name in attributes)
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    (script,) = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; ")
    assert f"script-src 'sha256-{digest}'" in policy
    assert not re.findall(r"(?:@import|url\()", text)
    outside = set(re.findall(r"https?://[\w./]+", text.replace("http://www.w3.org/2000/svg", "")))
    assert outside == set()


def test_strangers_text_is_shown_and_does_nothing(made):
    page = Tags(made[1].page.read_text("utf-8"))
    assert not any("alert(" in script for script in page.scripts)
    shown = " ".join(page.text)
    assert "a <script>alert('p')</script> \"quoted\" \ufffdprompt\ufffd, with a second line & more" in shown
    assert TITLE in shown
    assert "<judge>" in shown
    assert "<item 3>" in shown
    assert not re.search("[\u202a-\u202e\u2066-\u2069]", made[1].page.read_text("utf-8"))


def test_every_clip_is_in_the_page_without_its_record(made):
    study, told = made
    page = Tags(told.page.read_text("utf-8"))
    clips = [a["src"] for tag, a in page.tags if tag == "video" and a.get("src")]
    assert len(clips) == len(study.plan.cells) + len(told.grids) + len(told.differences)
    for number, source in enumerate(clips):
        data = base64.b64decode(source.removeprefix("data:video/mp4;base64,"))
        assert data[4:8] == b"ftyp"
        assert b"cogloom" not in data
        if number == len(told.grids):
            path = told.folder.parent / "first.mp4"
            path.write_bytes(data)
            frames, _ = video.read_video(path)
            assert (frames - frames_of(study.plan.cells[0], 0)).abs().mean() < 0.02


def test_what_merely_differs_is_told_after_what_is_better(tmp_path):
    study = render(Study.begin(tmp_path, plan(swept(("neon",), (1.0,)), tuple("abcdef")), {}))
    told = report(LocalHost(), study)
    text = told.page.read_text("utf-8")
    cards = text[text.index('class="verdicts"') : text.index('id="grid"')]
    better, differs = (
        cards.index("Better than <bdi>base</bdi>: <bdi>neon 1</bdi> 1.00"),
        cards.index("motion, higher than"),
    )
    assert better < differs
    assert "motion, higher than <bdi>base</bdi>: <bdi>neon 1</bdi> 0.10" in cards
    assert "departure" not in cards  # against the reference already: there is nothing to subtract it from
    assert told.conclusions.verdicts()[-1].startswith("motion: neon 1 − base = 0.10")


def test_both_languages_are_there(made):
    text = made[1].page.read_text("utf-8")
    assert "结论" in text
    assert "优于 <bdi>base</bdi>" in text
    english = re.findall(r'<span class="en">.*?</span><span class="zh" lang="zh">', text)
    assert len(english) == text.count('class="en"') > 40


def test_no_file_names_a_folder_of_this_machine(made):
    study, told = made
    secrets = {"somebody", "private", str(study.folder), str(Path.home()), os.sep + "tmp" + os.sep}
    for path in told.folder.rglob("*"):
        if path.suffix in (".html", ".json", ".csv", ".svg"):
            text = path.read_text("utf-8")
            texts = [
                text,
                *(base64.b64decode(b).decode() for b in re.findall(r"data:[\w/]+(?:json|csv);base64,([\w+/=]+)", text)),
            ]
            texts = [re.sub(r"base64,[\w+/=]+", "", one) for one in texts]
            assert len(texts) == (5 if path.suffix == ".html" else 1)
            for secret in secrets:
                assert not any(secret in one for one in texts), (path.name, secret)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        (f"cannot read {HOME}/a.mkv: broken", "cannot read a.mkv: broken"),
        (r"cannot read C:\Users\me\clips\a.mkv", "cannot read a.mkv"),
        ("~/models/CogVideo/2b", "2b"),
        ("THUDM/CogVideoX-2b", "THUDM/CogVideoX-2b"),
        ("red and/or blue, 1/2", "red and/or blue, 1/2"),
    ],
)
def test_folders_are_taken_out_of_texts(text, cleaned):
    assert clean(text) == cleaned


def test_the_table_has_a_row_per_clip_and_no_formulas(made):
    study, told = made
    rows = list(csv.DictReader(io.StringIO(told.table.read_text("utf-8"))))
    assert [(row["id"], row["arm"], row["prompt"], int(row["seed"])) for row in rows] == [
        (cell.id, cell.arm, cell.prompt, cell.seed) for cell in study.plan.cells
    ]
    neon = next(row for row in rows if row["arm"] == "neon 0.5")
    assert (neon["stack"], neon["weight"], neon["rendered"], neon["motion"]) == ("neon", "0.5", "yes", "0.1")
    assert (
        float(neon["quality.<b>"])
        == study.measured(next(c for c in study.plan.cells if c.id == neon["id"]))["values"]["quality.<b>"]
    )
    reference = next(row for row in rows if row["arm"] == "base")
    assert reference["departure"] == ""


def test_a_text_that_is_a_formula_is_tamed(tmp_path):
    two = [Arm("=cmd|' /C calc'!A0"), Arm("-1", LoraStack((entry("x", 1.0),)), hashes=("x",))]
    study = render(Study.begin(tmp_path, plan(two, ("@sum(1)",)), {}))
    rows = list(csv.reader(io.StringIO(report(LocalHost(), study).table.read_text("utf-8"))))
    assert [row[1] for row in rows[1:]] == ["'=cmd|' /C calc'!A0", "-1"]
    assert rows[1][2] == "'@sum(1)"


def test_the_data_says_all_of_it(made):
    study, told = made
    data = json.loads(told.data.read_text("utf-8"))
    assert len(data["cells"]) == len(study.plan.cells)
    assert data["conclusions"]["heldout"]["dataset"] == "held out"
    assert data["conclusions"]["weights_checked"] == len(study.plan.cells)
    assert data["plan"]["arms"][1]["stack"] == ["neon:0.5"]
    assert data["heldout"]["base"]["losses"][0][0] == "<item 0>"
    assert json.loads((told.folder / "plan.json").read_text("utf-8")) == data["plan"]


def test_the_workflow_opens_and_has_the_first_four_arms(made):
    graph = api_of(json.loads(made[1].workflow.read_text("utf-8")))
    (compare,) = [node for node in graph.values() if node["class_type"] == "CogLoomCompare"]
    assert compare["inputs"]["labels"] == "base,neon 0.5,neon 1,glow 0.5"
    assert compare["inputs"]["steps"] == 5
    stacks = [json.loads(n["inputs"]["rows"]) for n in graph.values() if n["class_type"] == "CogLoomLoraStack"]
    assert [[(row["adapter"], row["weight"]) for row in rows] for rows in stacks] == [
        [], [("neon.safetensors", 0.5)], [("neon.safetensors", 1.0)], [("glow.safetensors", 0.5)],
    ]  # fmt: skip


def test_the_command_says_the_sweep_and_only_where_it_would_make_the_same_plan(made):
    said, by_file = command_of(made[0].plan).split("\n\n")
    words = shlex.split(said.replace("\\\n", " "))
    assert words[:7] == ["python", "app.py", "compare", "neon:1", "glow:1", "--weights", "0.5,1"]
    assert words[words.index("--prompt") + 1] == HOSTILE
    assert "--size 32x32" in said
    assert by_file.endswith("python app.py compare --plan plan.json")
    own = [Arm("base"), Arm("mine", LoraStack((entry("neon", 0.8),)), at=(("odd", "1"),), hashes=("x",))]
    assert command_of(plan(own)) == "python app.py compare --plan plan.json"


def test_the_same_study_gives_the_same_bytes_and_an_older_reports_files_go(made, tmp_path):
    study, told = made
    (tmp_path / "mine.txt").write_text("stays")
    (tmp_path / "plots").mkdir()
    for name in ("grid-09.mp4", "plots/gone.svg", "grid-08.mp4"):
        (tmp_path / name).write_bytes(b"old")
    (tmp_path / "results.json").write_text(
        json.dumps({"files": ["grid-09.mp4", "plots/gone.svg", "mine.txt", "../up.mp4"]})
    )
    again = report(LocalHost(), Study.open(study.folder), tmp_path)
    for path in told.folder.rglob("*"):
        if path.is_file():
            assert (again.folder / path.relative_to(told.folder)).read_bytes() == path.read_bytes(), path.name
    left = {path.name for path in tmp_path.rglob("*")} - {path.name for path in told.folder.rglob("*")}
    assert left == {"mine.txt", "grid-08.mp4"}  # what an earlier report did not name is not ours to remove


def test_a_study_in_part_is_reported_in_part(tmp_path):
    study = Study.begin(tmp_path, plan(swept(), ("a", "b")), {})
    with pytest.raises(StudyError, match="nothing to report yet"):
        report(LocalHost(), study)
    render(study, study.plan.cells[:3])
    told = report(LocalHost(), study)
    text = told.page.read_text("utf-8")
    assert "3 of 10 clips are rendered" in text
    assert text.count("not rendered yet") == 2
    assert len(told.grids) == 1
    rows = list(csv.DictReader(io.StringIO(told.table.read_text("utf-8"))))
    assert [row["rendered"] for row in rows].count("yes") == 3


def test_a_weight_that_was_ignored_is_the_loudest_thing_in_the_page(tmp_path):
    study = render(Study.begin(tmp_path, plan(swept(("neon",)), ("a",)), {}))
    cell = next(cell for cell in study.plan.cells if cell.arm == "neon 1")
    study.finish(cell, {"record": {"weights": [[0, []]]}})
    text = report(LocalHost(), study).page.read_text("utf-8")
    alert = text.index('role="alert"')
    assert alert < text.index('class="verdicts"') if 'class="verdicts"' in text else alert > 0
    assert "neon was asked at 1 and the transformer held 0" in text[alert : alert + 400]
    assert "not as asked" in text


@pytest.mark.heavy
def test_a_budget_makes_clips_smaller_and_then_leaves_them_out(tmp_path):
    study = Study.begin(tmp_path, plan(swept(("neon",)), ("a", "b")), {})
    torch.manual_seed(0)
    for cell in render(study).plan.cells:  # noise, which no encoder makes small
        video.write_video(torch.rand(FRAMES, 64, 64, 3), study.path(cell, ".mkv"), FPS)
    sizes = []
    for budget in (60_000_000, 10_000):
        told = report(LocalHost(), study, tmp_path / str(budget), budget=budget)
        page = Tags(told.page.read_text("utf-8"))
        sizes.append(sum(len(a["src"] or "") for tag, a in page.tags if tag == "video" and "src" in a))
        little = budget == 10_000
        assert sizes[-1] <= budget
        assert any("encoded smaller" in note for note in told.notes) == little
        assert any("grid-01.mp4 is beside the page" in note for note in told.notes) == little
        assert any("clips are not in the page" in note for note in told.notes) == little
        assert ("left out, for the page would be too large" in told.page.read_text("utf-8")) == little
        assert told.grids[0].exists()
    assert sizes[0] > 2 * sizes[1] > 0
    with pytest.raises(UsageError, match="at least 10,000"):
        report(LocalHost(), study, budget=10)


def test_a_stop_leaves_the_last_report_whole(made):
    study, told = made
    before = told.page.read_bytes()
    host = LocalHost(stop=threading.Event())
    host.stop.set()
    with pytest.raises(Cancelled):
        report(host, study)
    assert told.page.read_bytes() == before


def test_checkpoints_get_a_section_with_the_one_to_keep(tmp_path):
    stacks = tuple((f"step {n}", LoraStack((entry(f"step{n}", 1.0),))) for n in (100, 200, 300))
    chosen = [
        replace(one, hashes=tuple(e.name for e in one.stack)) for one in arms_of(Sweep(stacks, axis="checkpoint"))
    ]
    study = render(Study.begin(tmp_path, plan(chosen, ("a",)), {}))
    told = report(LocalHost(), study)
    assert any("held-out loss of step 100, step 200, step 300 was not measured" in note for note in told.notes)
    for one, loss in zip(study.plan.arms, (0.5, 0.4, 0.3, 0.3), strict=True):
        losses = [
            [f"item {i}", d, loss + i / 10 + (i * 7 + d + len(one.label)) % 3 / 1e4] for i in range(8) for d in (0, 1)
        ]
        study.keep_heldout(one, {"dataset": "held", "losses": losses})
    told = report(LocalHost(), study)
    text = told.page.read_text("utf-8")
    assert "checkpoint 200: the lowest held-out loss" in text
    assert "300 cannot be told apart from it; it is the earliest of them and it moves the base least." in text
    assert {"checkpoints-01", "checkpoints-01-pareto"} <= {path.stem for path in told.plots}
    assert json.loads(told.data.read_text("utf-8"))["checkpoints"][0]["step"] == 200


def test_a_real_run_is_reported_with_what_the_model_held(host):
    arms = arms_of(Sweep((stack_from(host, "in=neon:0.8[steps=held 1@0.5]"),)))
    base = choose_base(host, DEMO)
    made = plan_study(
        host, base, arms, ("a large yellow triangle bouncing on a navy background",), (3,), Shot("", steps=2)
    )
    study = run(host, begin(host, "real", made), ["departure"])
    told = report(host, study)
    assert told.conclusions.findings == ()
    assert told.conclusions.checked == 2
    text = told.page.read_text("utf-8")
    assert "from step 1: nothing; from step 2: neon 0.8" in text
    assert text.count("as asked</span>") == 2
    assert [Path(path).name for path in told.grids] == ["grid-01.mp4"]
    assert "--plan plan.json" in text
    assert str(host.output_folder) not in text
    assert json.loads((told.folder / "plan.json").read_text("utf-8"))["arms"][1]["stack"] == [
        "neon:0.8[steps=held 1@0.5]"
    ]


def test_the_command_is_one_that_the_command_line_takes(made):
    words = shlex.split(command_of(made[0].plan).split("\n\n")[0].replace("\\\n", " "))
    args = app._parser().parse_args(words[2:])
    assert (args.stacks, args.weights, args.seeds, args.reference) == (["neon:1", "glow:1"], "0.5,1", "0", "base")
    assert args.prompt == [" ".join(HOSTILE.split(" ")), "a circle"]
    by_file = shlex.split(command_of(made[0].plan).split("\n")[-1])
    assert app._parser().parse_args(by_file[2:]).plan == Path("plan.json")

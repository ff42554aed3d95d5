"""The app's parts on their own: settings and rows from anywhere, work that is stopped, who may listen where."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from nodes.engine import video
from nodes.engine.errors import Cancelled, CogLoomError, StackError, UsageError
from nodes.engine.preview import Look
from nodes.export import as_comparison, as_graph, defaults
from nodes.host import LocalHost
from nodes.workflow import plan
from ui import text
from ui.compare_tab import prompts_from, seeds_from
from ui.gallery import settings_in
from ui.guard import Guard
from ui.render_tab import choices, name_from, settings_of, size_from
from ui.stack import rows_of
from ui.start import again, take
from ui.work import Report, Watch

from .ui_server import ROOT, serving

ROWS = [{"on": True, "adapter": "neon.safetensors", "weight": 0.8, "blocks": "attn:1", "steps": "held 1@0.4"}]


# --- the graph --------------------------------------------------------------------------------------------------------


def test_what_is_set_becomes_a_graph_that_runs(host: LocalHost):
    steps = plan(as_graph({"prompt": "a circle", "seed": 2**62, "steps": 7, "hold": "stacked"}, ROWS), host)
    by_node = {step.node.id: step for step in steps}
    assert by_node["CogLoomSampler"].inputs["seed"] == 2**62
    assert by_node["CogLoomSampler"].inputs["steps"] == 7
    assert by_node["CogLoomLoraStack"].inputs["hold"] == "stacked"
    assert json.loads(by_node["CogLoomLoraStack"].inputs["rows"]) == ROWS
    assert by_node["CogLoomPrompt"].inputs["prompt"] == "a circle"


def test_every_widget_of_the_graph_is_said():
    """A page that opens it must not fall back on defaults of another version."""
    from nodes.schema import NODES, Socket

    for one in as_graph({}).values():
        widgets = {i.name for i in NODES[one["class_type"]].inputs if not isinstance(i.kind, Socket)}
        assert widgets <= set(one["inputs"])


def test_two_to_four_stacks_become_a_comparison(host: LocalHost):
    graph = as_comparison({"prompt": "x"}, [ROWS, [], ROWS])
    (compare,) = [one for one in graph.values() if one["class_type"] == "CogLoomCompare"]
    assert {"a", "b", "c"} <= set(compare["inputs"])
    assert "d" not in compare["inputs"]
    assert plan(graph, host)
    with pytest.raises(UsageError, match="two to four"):
        as_comparison({}, [ROWS])


@pytest.mark.parametrize(
    ("said", "sentence"), [({"image": "a.png", "video": "b.mp4"}, "not both"), ({"foo": 1}, "foo")]
)
def test_a_graph_of_what_cannot_be_is_refused(said: dict[str, Any], sentence: str):
    with pytest.raises(UsageError, match=sentence):
        as_graph(said)


def test_a_video_becomes_comfyuis_own_loader():
    graph = as_graph({"video": "cogloom-1.mp4"})
    kinds = {one["class_type"]: key for key, one in graph.items()}
    (sampler,) = [one for one in graph.values() if one["class_type"] == "CogLoomSampler"]
    assert sampler["inputs"]["video"] == [kinds["GetVideoComponents"], 0]


# --- values from a page -----------------------------------------------------------------------------------------------

SCREEN = {name: value for name, value in defaults().items() if name not in ("width", "height", "name", "image", "video",
          "labels")} | {"size": "", "start": None, "seed": 3.0, "frames": "17"}  # fmt: skip


def test_fields_become_settings():
    settings = settings_of(SCREEN | {"prompt": "A Red, square!", "size": " 96 × 64 "})
    assert (settings["width"], settings["height"], settings["frames"], settings["seed"]) == (96, 64, 17, 3)
    assert settings["name"] == "a-red-square"
    assert (settings["image"], settings["video"]) == ("", "")
    assert settings_of(SCREEN | {"start": {"kind": "image", "name": "cogloom-1.png"}})["image"] == "cogloom-1.png"


@pytest.mark.parametrize("bad", [{"size": "big"}, {"size": "1e3x64"}, {"seed": 1.5}, {"seed": None}, {"frames": "many"},
                                 {"steps": True}, {"size": {"a": 1}}], ids=str)  # fmt: skip
def test_fields_that_cannot_be_are_refused(bad: dict[str, Any]):
    with pytest.raises(UsageError):
        settings_of(SCREEN | bad)


def test_sizes_and_lengths_offered_are_what_the_base_makes(host: LocalHost):
    from nodes.model import choose_base

    checkpoint = choose_base(host).checkpoint()
    sizes, lengths = choices(host, "cogloom-demo")
    assert sizes[0] == ("auto · 64 × 64", "")
    assert [value for _, value in lengths] == [0, 9, 17, 25, 33]
    for _, size in sizes[1:]:
        for _, frames in lengths[1:]:
            checkpoint.check_geometry(frames, *size_from(size))
    assert choices(host, "no such base") == ([("auto", "")], [("auto", 0)])


def test_names_of_files_come_from_prompts_in_plain_letters():
    assert name_from("../../etc/<script>") == "etc-script"
    assert name_from("画面") == name_from(None) == "clip"
    assert len(name_from("word " * 100)) <= 48


@pytest.mark.parametrize("bad", ["{", "{}", "[1]", "x" * 300_000, 5, "[" * 100_000], ids=lambda v: str(v)[:10])
def test_rows_that_are_none_are_refused(bad: Any):
    with pytest.raises(StackError):
        rows_of(bad)


def test_prompts_and_seeds_of_a_comparison():
    assert prompts_from(" a \n\n b") == ["a", "b"]
    assert seeds_from("1, 2，3、4 5") == [1, 2, 3, 4, 5]
    for bad in ("", "-1", "1.5", "x", ",".join("123456789"), "9" * 19):
        with pytest.raises(UsageError):
            seeds_from(bad)
    for bad in ("", "\n", "x\n" * 9):
        with pytest.raises(UsageError):
            prompts_from(bad)


@pytest.mark.parametrize("broken", [{}, {"compared": []}, {"settings": {}}, {"settings": {"prompt": 1}, "base": 3}])
def test_a_broken_record_gives_no_settings(host: LocalHost, broken: dict[str, Any]):
    with pytest.raises(UsageError, match="broken"):
        settings_in(host, broken)


# --- uploads ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def uploads(tmp_path: Path, host: LocalHost, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "uploads"
    folder.mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(folder))
    host.input_folder = tmp_path / "input"
    return folder


def test_an_upload_is_kept_by_what_it_shows(uploads: Path, host: LocalHost):
    video.write_png(torch.rand(8, 12, 3), uploads / "a.png")
    told = take(host, "image", str(uploads / "a.png"))
    assert told["text"] == "12×8"
    assert (host.input_folder / told["name"]).is_file()
    assert take(host, "image", str(uploads / "a.png")) == told
    assert again(host, told) == told
    (host.input_folder / told["name"]).unlink()
    assert again(host, told)["kind"] == ""


def test_what_is_no_upload_or_too_large_is_refused(uploads: Path, host: LocalHost, tmp_path: Path):
    from PIL import Image

    outside = video.write_png(torch.rand(8, 8, 3), tmp_path / "private.png")
    Image.new("1", (8000, 8000)).save(uploads / "huge.png")
    (uploads / "fake.mp4").write_bytes(b"#EXTM3U\nfile:///etc/passwd\n")
    for kind, path in (("image", outside), ("image", uploads / ".." / "private.png"), ("image", uploads),
                       ("image", uploads / "huge.png"), ("image", "a\0b"), ("video", uploads / "fake.mp4"),
                       ("image", None), ("script", uploads / "huge.png")):  # fmt: skip
        with pytest.raises(CogLoomError):
            take(host, kind, str(path) if path is not None else None)
    for forged in ({"kind": "image", "name": "../x.png"}, {"kind": "image", "name": "private.png"}):
        with pytest.raises(UsageError):
            again(host, forged)


# --- work -------------------------------------------------------------------------------------------------------------


def test_work_tells_how_far_it_is_and_gives_its_result(host: LocalHost):
    watch: Watch[str] = Watch(host)
    go = threading.Event()

    def job() -> str:
        for step in range(4):
            host.progress(step + 1, 4, "denoising", Look(torch.zeros(2, 3, 4, 4), None, 8) if step == 2 else None)
            go.wait(0.3)
        return "done"

    reports = list(watch.run(job))
    assert watch.result == "done"
    assert reports[-1].share == 1
    assert reports[-1].look.startswith("data:image/webp;base64,")
    assert [report.left for report in reports if report.done == 3][-1] is not None


def test_work_that_nobody_waits_for_is_stopped(host: LocalHost):
    ended = threading.Event()

    def job() -> None:
        try:
            while True:
                host.check_cancelled()
                host.progress(1, 2, "denoising")
                host.stop.wait(0.01)
        except Cancelled:
            ended.set()
            raise

    reports = Watch(host).run(job)
    next(reports)
    reports.close()
    assert ended.wait(10)


def test_work_waits_until_what_was_stopped_before_has_let_go(host: LocalHost):
    """Gradio calls the next at once, when the stopped one may still be in a step and hold its study's lock."""
    step, before = threading.Event(), []

    def slow() -> None:
        host.progress(1, 2, "denoising")
        assert step.wait(10)
        before.append("slow")

    stopped = Watch(host).run(slow)
    next(stopped)
    stopped.close()
    following = Watch(LocalHost(output_folder=host.output_folder)).run(lambda: before.append("next"))
    next(following)  # it reports that it waits
    assert before == []
    step.set()
    list(following)
    assert before == ["slow", "next"]


def test_what_work_raises_is_raised_where_it_is_waited_for(host: LocalHost):
    def job() -> None:
        raise UsageError("no")

    with pytest.raises(UsageError, match="no"):
        list(Watch(host).run(job))


def test_parts_of_work_add_up():
    assert Report("denoising", 5, 10, part=2, parts=4).share == pytest.approx(0.375)
    assert Report("decoding", 0, 1, part=4, parts=4).share == 0.75


# --- words ------------------------------------------------------------------------------------------------------------


def test_every_sentence_is_there_in_both_languages_with_the_same_values():
    import re

    for key, (english, chinese) in text.ALL.items():
        assert chinese.strip() or not english.strip(), key
        assert set(re.findall(r"\{(\w+)", english)) == set(re.findall(r"\{(\w+)", chinese)), key


def test_every_key_that_the_app_asks_for_is_there():
    """From the source: `text("key", …)`, `ui.t("key", …)` and the keys given to `said`."""
    asked = set()
    for file in (ROOT / "ui").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            first = node.args[0] if node.args else None
            if name in ("text", "text.text", "ui.t") and isinstance(first, ast.Constant):
                asked.add(first.value)
            if name == "ui.said":
                asked |= {k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
    assert len(asked) > 30
    assert asked <= set(text.ALL), asked - set(text.ALL)


# --- the server -------------------------------------------------------------------------------------------------------


def test_the_guard_counts_what_comes_in_pieces():
    """A body without a length is cut off where it becomes too large."""
    import asyncio

    got = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while True:
            message = await receive()
            got.append(message["type"])
            if message["type"] == "http.disconnect":
                return

    async def receive() -> Any:
        return {"type": "http.request", "body": b"x" * (1 << 20), "more_body": True}

    async def send(message: Any) -> None: ...

    scope = {"type": "http", "method": "POST", "path": "/gradio_api/queue/join", "headers": []}
    asyncio.run(Guard(app, upload=1 << 30)(scope, receive, send))
    assert got.count("http.request") == 4


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--listen", "0.0.0.0"], "lets others reach this machine"),
        (["--listen", "192.168.1.5"], "lets others reach this machine"),
        (["--listen", "0.0.0.0", "--auth", "nocolon"], "USER:PASSWORD"),
        (["--port", "99999"], "cannot be had"),
    ],
    ids=str,
)
def test_a_server_that_must_not_be_is_refused(options: list[str], sentence: str):
    done = subprocess.run([sys.executable, "app.py", "ui", "--no-open", *options], cwd=ROOT, capture_output=True,
                          text=True, timeout=120)  # fmt: skip
    assert done.returncode == 2
    assert sentence in " ".join(done.stderr.split())


@pytest.mark.heavy
def test_who_has_not_signed_in_gets_nothing(tmp_path: Path):
    """Neither Gradio's pages nor our own addresses; the client signs in, and then both."""
    from gradio_client import Client

    with serving(tmp_path, "--auth", "ann:secret") as server:
        (server.output / "a.mp4").write_bytes(b"\0" * 200)
        for route in ("cogloom/status", "cogloom/adapters", "cogloom/clip?name=a.mp4", "cogloom/record?name=a.mp4",
                      "config"):  # fmt: skip
            assert httpx.get(f"{server.url}/{route}").status_code == 401, route
        body = {"data": [], "fn_index": 0, "session_hash": "x"}
        assert httpx.post(f"{server.url}/gradio_api/queue/join", json=body).status_code == 401
        with httpx.Client() as browser:
            wrong = browser.post(f"{server.url}/login", data={"username": "ann", "password": "wrong"})
            assert wrong.status_code == 400
            browser.post(f"{server.url}/login", data={"username": "ann", "password": "secret"}).raise_for_status()
            assert browser.get(f"{server.url}/cogloom/clip?name=a.mp4").status_code == 200
        signed_in = Client(server.url, auth=("ann", "secret"), verbose=False)
        assert signed_in.predict(api_name="/bases")[0]["name"] == "cogloom-demo"

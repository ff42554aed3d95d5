"""The tabs Sweep, Vote and Report as programs meet them: the real app, the embedded demo, Gradio's client."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

from nodes.engine import video, votes

from .test_voting import ARMS, PROMPTS, made_study
from .ui_server import Server, serving

PROMPT = "a large red circle moving left on a navy background"
SMALL: dict[str, Any] = {"steps": 2, "frames": 9}
FORGED = ["../studies/mine", "mine/../mine", "/etc", "C:\\Windows", "", ".", "..", "mine\0", "x" * 5000, "none such",
          "mine/cells"]  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("studies") / "app"  # what leaves it is seen beside it, among nothing else
    made_study(folder / "output" / "studies" / "mine")
    with serving(folder) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Client:
    return Client(server.url, verbose=False)


def clip(server: Server, address: str) -> httpx.Response:
    return httpx.get(f"{server.url}{address}", timeout=60)


# --- votes ------------------------------------------------------------------------------------------------------------


def test_votes_by_program_are_blind_and_kept(client: Client, server: Server):
    pair = client.predict("mine", "ada", api_name="/vote_next")
    assert set(pair) == {"token", "prompt", "left", "right", "turn", "remaining", "before"}
    assert pair["prompt"] in PROMPTS
    assert client.predict("mine", "ada", api_name="/vote_next") == pair
    for side in ("left", "right"):
        answer = clip(server, pair[side])
        assert answer.headers["content-type"] == "video/mp4"
        assert not any(arm.encode() in answer.content for arm in ARMS)
        seen = server.folder / f"{side}.mp4"
        seen.write_bytes(answer.content)
        assert video.read_video(seen)[0].shape == (9, 64, 64, 3)
        part = httpx.get(f"{server.url}{pair[side]}", headers={"Range": "bytes=0-9"})
        assert (part.status_code, part.content) == (206, answer.content[:10])
    after = client.predict("mine", "ada", pair["token"], "left", api_name="/vote_cast")
    assert (after["turn"], after["remaining"]) == (2, 11)
    last = client.predict("mine", "ada", api_name="/vote_last")
    assert (last["token"], last["before"]) == (pair["token"], "left")
    client.predict("mine", "ada", pair["token"], "bad", api_name="/vote_cast")
    log = votes.read(server.output / "studies" / "mine" / "votes.jsonl")
    assert [vote.choice for vote in log.votes] == ["left", "bad"]
    standing = client.predict("mine", api_name="/vote_standing")
    assert standing["ranking"]["bad"] == 1
    assert {one["arm"] for one in standing["ranking"]["standings"]} < set(ARMS)
    assert client.predict("mine", "grace", api_name="/vote_last") == {}


@pytest.mark.parametrize("name", FORGED)
def test_only_studies_of_the_list_are_opened(client: Client, server: Server, name: str):
    before = sorted(path.name for path in server.folder.parent.iterdir())
    for call, more in (("vote_next", ["ada"]), ("vote_cast", ["ada", "0" * 16, "left"]), ("vote_standing", []),
                       ("vote_last", ["ada"]), ("study", []), ("report_make", []), ("sweep_resume", [])):  # fmt: skip
        with pytest.raises(AppError, match="no study"):
            client.predict(name, *more, api_name=f"/{call}")
    for address in ("vote", "report"):
        answer = httpx.get(f"{server.url}/cogloom/{address}", params={"study": name, "token": "0" * 16, "side": "left"})
        assert answer.status_code == 400
        assert "no study" in answer.json()["error"]
    assert sorted(path.name for path in server.folder.parent.iterdir()) == before


def test_forged_tokens_sides_and_files_are_refused(client: Client, server: Server):
    (server.output / "studies" / "mine" / "report").mkdir(exist_ok=True)
    (server.output / "studies" / "mine" / "report" / "x.js").write_text("1", encoding="utf-8")
    token = client.predict("mine", "forger", api_name="/vote_next")["token"]

    def ask(route: str, **query: str) -> int:
        return httpx.get(f"{server.url}/cogloom/{route}", params={"study": "mine", **query}).status_code

    assert ask("vote", token=token, side="left") == 200
    for query in ({"token": token, "side": "up"}, {"token": token}, {"token": "0" * 16, "side": "left"},
                  {"token": "../" + token, "side": "left"}, {"side": "left"}):  # fmt: skip
        assert ask("vote", **query) == 400, query
    cell = next(path.stem for path in (server.output / "studies" / "mine" / "cells").glob("*.mp4"))
    for file in (f"../cells/{cell}.mp4", "../study.json", "../votes.key", "/etc/passwd", "x.js", "", "a\0.png"):
        assert ask("report", file=file) == 400, file
    assert ask("report", file="none.png") == 404
    with pytest.raises(AppError, match="left, right, tie, bad"):
        client.predict("mine", "forger", token, "neon", api_name="/vote_cast")
    with pytest.raises(AppError, match="who judges"):
        client.predict("mine", " ", token, "left", api_name="/vote_cast")


def test_no_other_address_gives_a_file_of_a_study(server: Server):
    """The key to the votes, above all."""
    study = server.output / "studies" / "mine"
    clip = next((study / "cells").glob("*.mp4"))
    record = clip.with_suffix(".json")
    for path in (study / "votes.key", study / "votes.jsonl", study / "study.json", clip, record,
                 study.parent / "none" / ".." / "mine" / "study.json"):  # fmt: skip
        answer = httpx.get(f"{server.url}/gradio_api/file={path}")
        assert answer.status_code == 403, path
    for name in (f"studies/mine/cells/{clip.name}", f"./studies/mine/cells/{clip.name}"):
        assert httpx.get(f"{server.url}/cogloom/clip", params={"name": name}).status_code == 400


def test_two_judges_at_once_lose_no_vote(server: Server):
    study = server.output / "studies" / "mine"
    before = len(votes.read(study / "votes.jsonl").votes)

    def judge(name: str) -> None:
        client = Client(server.url, verbose=False)
        pair = client.predict("mine", name, api_name="/vote_next")
        for _ in range(5):
            pair = client.predict("mine", name, pair["token"], "tie", api_name="/vote_cast")

    threads = [threading.Thread(target=judge, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log = votes.read(study / "votes.jsonl")
    assert (len(log.votes) - before, log.notes) == (10, ())


# --- sweeps -----------------------------------------------------------------------------------------------------------


def swept(client: Client, *args: Any, **given: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    job = client.submit(*args, **given, api_name="/sweep")
    told = list(job)
    job.result()  # raises what the server has said went wrong
    return told[:-1], told[-1]


@pytest.mark.heavy
def test_a_sweep_is_estimated_run_resumed_and_reported(client: Client, server: Server):
    stacks = ["neon:0.8", "both=bounce:0.5[steps=0@0, 1@0.5]"]
    asked = {"stacks": stacks, "prompts": [PROMPT], "seeds": "0,1", **SMALL}
    cost = client.predict(**asked, name="api", api_name="/sweep_estimate")
    assert (cost["clips"], cost["done"], cost["arms"]) == (6, 0, ["base", "neon 0.8", "both"])
    assert (cost["steps"], cost["shared"]) == (12, 2)
    assert not (server.output / "studies" / "api").exists()
    progress, last = swept(client, "api", metrics=["motion", "psnr"], **asked)
    assert (last["study"], last["clips"]) == ("api", 6)
    assert any(line.startswith("psnr: neon 0.8") for line in last["words"])
    shares = [one["progress"]["share"] for one in progress]
    assert shares == sorted(shares)
    assert {one["progress"]["clips"] for one in progress[-3:]} == {6}
    log = server.output / "studies" / "api" / "log.jsonl"
    assert len(log.read_text(encoding="utf-8").splitlines()) == 6
    # More seeds: what is there stays, and only the rest is rendered.
    more = {**asked, "seeds": "0-2"}
    assert client.predict(**more, name="api", api_name="/sweep_estimate")["done"] == 6
    assert swept(client, "api", metrics=["motion"], **more)[1]["clips"] == 9
    assert len(log.read_text(encoding="utf-8").splitlines()) == 9
    (there,) = [one for one in client.predict(api_name="/studies") if one["name"] == "api"]
    assert (there["clips"], there["done"], there["seeds"], there["reference"]) == (9, 9, [0, 1, 2], "base")
    told = client.predict("api", api_name="/study")
    assert (told["rendered"], told["votes"]) == (9, None)
    with pytest.raises(AppError, match="another settings"):
        swept(client, "api", **{**more, "steps": 3})
    report = client.submit("api", api_name="/report_make").result(120)
    page = clip(server, report["page"])
    assert page.headers["content-type"].startswith("text/html")
    assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
    assert "neon 0.8" in page.text
    types = {one["name"].rpartition(".")[2]: clip(server, one["url"]) for one in report["files"]}
    assert {"mp4", "png", "svg", "csv", "json", "html"} <= set(types)
    assert types["svg"].headers["content-type"] == "image/svg+xml"
    assert {answer.status_code for answer in types.values()} == {200}
    assert client.predict("api", "ada", api_name="/vote_next")["prompt"] == PROMPT


@pytest.mark.heavy
def test_a_sweep_that_is_stopped_goes_on(client: Client, server: Server):
    asked = {"stacks": ["neon"], "prompts": [PROMPT], "seeds": "0-1", "metrics": ["motion"], "steps": 8, "frames": 9}
    job = client.submit("halted", **asked, api_name="/sweep")
    for told in job:
        if told["progress"]["clip"] >= 2:
            break
    job.cancel()
    # The queue has one place: this is only run when the other has let go.
    last = Client(server.url, verbose=False).submit("halted", ["motion"], api_name="/sweep_resume").result(300)
    assert last["clips"] == 4
    rows = [json.loads(line) for line in
            (server.output / "studies" / "halted" / "log.jsonl").read_text(encoding="utf-8").splitlines()]  # fmt: skip
    assert len(rows) == 4
    assert len({row["cell"] for row in rows}) == 4


@pytest.mark.parametrize(
    ("given", "said"),
    [({"name": "../out"}, "cannot name"), ({"name": "con"}, "cannot name"), ({"name": ""}, "cannot name"),
     ({"name": "x" * 65}, "cannot name"), ({"name": "a/b"}, "cannot name"), ({"stacks": ["../secret"]}, "secret"),
     ({"stacks": ["/etc/passwd"]}, "passwd"), ({"stacks": ["neon"] * 65}, "at most 64"), ({"seeds": "-1"}, "seed"),
     ({"seeds": "0-100000"}, "range"), ({"seeds": str(2**70)}, "seed"), ({"prompts": []}, "prompts"),
     ({"prompts": ["x"] * 201}, "200"), ({"weights": "nan"}, "weight"), ({"vary": ["prompt=x"]}, "prompt"),
     ({"weights": ",".join(map(str, range(65)))}, "400 arms"), ({"run": "../mine"}, "training run"),
     ({"run": "none"}, "not both"), ({"metrics": ["os:system"]}, "no metric"), ({"heldout": "../secret"}, "dataset"),
     ({"base": "nowhere"}, "nowhere"), ({"frames": 7}, "frames"), ({"vary": ["guidance=4,6"] * 2}, "twice|same")],
)  # fmt: skip
def test_what_cannot_be_a_sweep_is_said(client: Client, server: Server, given: dict[str, Any], said: str):
    asked = {"name": "wrong", "stacks": ["neon"], "prompts": [PROMPT], "seeds": "0", **SMALL, **given}
    if given.get("run") == "../mine":
        asked["stacks"] = []
    before = sorted(path.name for path in server.output.rglob("*") if path.name == "study.json" or path.is_dir())
    with pytest.raises(AppError, match=said):
        swept(client, **asked)
    assert before == sorted(
        path.name for path in server.output.rglob("*") if path.name == "study.json" or path.is_dir()
    )


def test_checkpoints_of_a_training_run_are_arms(client: Client, server: Server):
    from nodes.engine.lora_file import adapter_name
    from nodes.lora import DEMO_ADAPTERS

    run = server.output / "training" / "sun"
    for step in (50, 100):
        folder = run / f"checkpoint-{step:06d}"
        folder.mkdir(parents=True)
        source = DEMO_ADAPTERS / ("sunset.safetensors" if step == 50 else "neon.safetensors")
        assert adapter_name(source)
        (folder / "adapter.safetensors").write_bytes(source.read_bytes())
        state = {"step": step, "losses": [0.1] * step, "validation": [[step, 0.1 / step]]}
        (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
    cost = client.predict(prompts=[PROMPT], seeds="0", run="sun", **SMALL, api_name="/sweep_estimate")
    assert cost["arms"] == ["base", "50", "100"]

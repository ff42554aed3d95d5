"""The tabs Adapters, Workflows and Train as programs meet them: the real app, the embedded demo, Gradio's client."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from gradio_client import Client
from gradio_client.exceptions import AppError

from nodes.engine import video
from nodes.engine.lora_file import write
from nodes.export_ui import ui_of
from nodes.lora import DEMO_ADAPTERS
from nodes.workflow import Graph, api_of

from .ui_server import Server, serving

TEMPLATES = Path(__file__).resolve().parents[1] / "workflows"
LAYER = "transformer_blocks.0.attn1.to_q"
EVIL = "<img src=x onerror=window.pwned=1>${window.pwned=1}{{value}}\u202e"
TRAINING = {"frames": 9, "checkpoint_every": 0, "validation_every": 0, "validation_items": 1, "mixed_precision": "no"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("tabs") / "app"  # what leaves it is seen beside it, among nothing else
    prepare(folder)
    with serving(folder) as running:
        yield running


def prepare(folder: Path) -> None:
    """Adapters of mine, among them a hostile one and one for another base; a dataset, and what is none of the app's."""
    generator = torch.Generator().manual_seed(0)

    def adapter(name: str, width: int, metadata: dict[str, str], rank: int = 2) -> None:
        a, b = torch.randn(rank, width, generator=generator), torch.randn(width, rank, generator=generator)
        (folder / "loras").mkdir(parents=True, exist_ok=True)
        write(folder / "loras" / f"{name}.safetensors", {LAYER: (a, b)}, rank, metadata, torch.float32)

    adapter("mine", 192, {})
    adapter("wide", 320, {}, rank=6)
    evil = {"modelspec.title": EVIL, "modelspec.trigger_phrase": EVIL.rstrip("\u202e"), EVIL: "x" * 10_000}
    adapter("${window.pwned=1}", 192, {**evil, "comment": EVIL})
    data = folder / "data" / "toy"
    data.mkdir(parents=True)
    for number in range(4):
        clip = torch.zeros(9, 64, 64, 3)
        for step in range(9):
            clip[step, 16:32, 4 * step + number : 4 * step + number + 12, number % 3] = 1
        video.write_video(clip, data / f"{number}.mkv", 8.0)
        (data / f"{number}.txt").write_text(f"a square, {EVIL}", encoding="utf-8")
    (folder / "secret").mkdir()
    video.write_png(torch.zeros(8, 8, 3), folder / "secret" / "x.png")


@pytest.fixture
def client(server: Server) -> Client:
    return Client(server.url, verbose=False)


def template(name: str = "text_to_video") -> Graph:
    return json.loads((TEMPLATES / "api" / f"{name}.json").read_text(encoding="utf-8"))


def until(ask: Callable[[], Any], good: Callable[[Any], bool], seconds: float = 300) -> Any:
    deadline = time.monotonic() + seconds
    while not good(told := ask()):
        assert time.monotonic() < deadline, told
        threading.Event().wait(0.2)
    return told


# --- adapters ---------------------------------------------------------------------------------------------------------


def test_adapters_are_listed_inspected_and_measured(client: Client):
    assert [row["title"] for row in client.predict("neon", "", 0, api_name="/adapters")] == ["neon"]
    fitting = [row["title"] for row in client.predict("", "cogloom-demo", 0, api_name="/adapters")]
    assert "mine" in fitting
    assert "wide" not in fitting
    assert [row["title"] for row in client.predict(rank=6, api_name="/adapters")] == ["wide"]
    about = client.predict("neon", "cogloom-demo", api_name="/adapter")
    assert (about["rank"], about["scale"], about["trigger_words"]) == (8, 1.0, ["neon"])
    assert list(about["effect"]["blocks"]) == [str(block) for block in range(6)]
    assert all(0 < ratio < 1 for ratio in about["effect"]["blocks"].values())
    wide = client.predict("wide", "cogloom-demo", api_name="/adapter")
    assert wide["effect"] is None
    assert "320" in wide["problem"]
    pair = client.predict("neon", "sunset", "cogloom-demo", api_name="/adapter_overlap")
    assert -1 <= pair["overall"] <= 1
    assert len(pair["blocks"]) == 6
    with pytest.raises(AppError, match="twice"):
        client.predict("neon", "neon", "cogloom-demo", api_name="/adapter_overlap")


def test_a_scale_is_settled_once_and_stays(client: Client, server: Server):
    told = client.predict("mine", "1/4", "one, two", "my note", api_name="/adapter_settle")
    assert told["after"].startswith("0.25")
    beside = json.loads((server.folder / "loras" / "mine.safetensors.json").read_text(encoding="utf-8"))
    assert beside == {"scale": 0.25, "trigger_words": ["one", "two"], "notes": "my note"}
    about = client.predict("mine", api_name="/adapter")
    assert (about["scale"], about["trigger_words"], about["notes"]) == (0.25, ["one", "two"], "my note")
    for wrong, said in (("-1", "no scale"), ("many", "no scale"), ("", "nothing new")):
        with pytest.raises(AppError, match=said):
            client.predict("mine", wrong, api_name="/adapter_settle")
    assert json.loads((server.folder / "loras" / "mine.safetensors.json").read_text(encoding="utf-8")) == beside
    client.predict("mine", "auto", "", "", api_name="/adapter_settle")
    assert client.predict("mine", api_name="/adapter")["scale"] == 1.0


def test_converting_makes_another_adapter(client: Client, server: Server):
    made = client.predict("neon", None, api_name="/adapter_convert")
    assert made["target"] == "neon-diffusers.safetensors"
    assert made["tensors_used"] == made["tensors_total"] == 72
    assert (server.folder / "loras" / made["target"]).is_file()
    assert "neon-diffusers" in [row["title"] for row in client.predict("neon", api_name="/adapters")]


def test_a_hostile_file_is_told_as_it_is(client: Client):
    """As data; that the page shows it as text is for the browser to say."""
    about = client.predict("${window.pwned=1}", "cogloom-demo", api_name="/adapter")
    assert about["metadata"]["comment"] == EVIL
    assert len(about["metadata"][EVIL]) == 10_000


@pytest.mark.parametrize(
    "name", ["../secret/x", "/etc/passwd", "..\\secret\\x.png", "", "mine\0", "x" * 5000, "loras/../../mine"]
)
def test_adapters_elsewhere_are_not_there(client: Client, server: Server, name: str):
    before = sorted(path.name for path in server.folder.rglob("*.json"))
    for call in ("adapter", "adapter_settle", "adapter_convert"):
        with pytest.raises(AppError):
            client.predict(name, *(("0.5",) if call == "adapter_settle" else ()), api_name=f"/{call}")
    assert sorted(path.name for path in server.folder.rglob("*.json")) == before


# --- workflows --------------------------------------------------------------------------------------------------------


def test_a_workflow_is_read_changed_exported_and_run(client: Client, server: Server):
    graph = template()
    page = json.loads((TEMPLATES / "text_to_video.json").read_text(encoding="utf-8"))
    rows = client.predict(json.dumps(graph), api_name="/workflow_values")
    assert rows == client.predict(json.dumps(page), api_name="/workflow_values")
    key, sampler = next((key, one) for key, one in graph.items() if one["class_type"] == "CogLoomSampler")
    seed = {"node": key, "title": "CogVideoX Sampler", "input": "seed", "value": str(sampler["inputs"]["seed"])}
    assert seed in rows
    changes = ["CogLoomSampler.steps=2", "CogLoomSaveVideo.name=made/here"]
    exported = client.predict(json.dumps(graph), changes, "ui", api_name="/workflow_export")
    plain = client.predict(json.dumps(graph), changes, "api", api_name="/workflow_export")
    assert exported == ui_of(plain)
    assert api_of(exported) == plain
    (sampler,) = [one for one in plain.values() if one["class_type"] == "CogLoomSampler"]
    assert sampler["inputs"]["steps"] == 2
    told = client.predict(json.dumps(graph), changes, api_name="/workflow_run")
    (result,) = told["results"]
    assert (told["state"], result["name"]) == ("done", "here_00001_.mp4")
    fetched = httpx.get(f"{server.url}{result['url']}")
    assert fetched.headers["content-type"] == "video/mp4"
    assert fetched.content == (server.output / "made" / "here_00001_.mp4").read_bytes()


@pytest.mark.parametrize(
    ("change", "said"),
    [("CogLoomSampler.width=7", "CogVideoX Sampler .*7"), ("CogLoomSampler.steps=x", "CogVideoX Sampler .*steps"),
     ("CogLoomBase.checkpoint=nowhere", "CogVideoX Base .*nowhere"), ("nobody.steps=1", "nobody"),
     ("CogLoomSaveVideo.name=../../out", r"Save Video \(CogLoom\) .*outside"),
     ("CogLoomLoraStack.rows=[{\"adapter\": \"../secret\"}]", "Row 1")],
)  # fmt: skip
def test_errors_have_the_nodes_title(client: Client, server: Server, change: str, said: str):
    with pytest.raises(AppError, match=said):
        client.predict(json.dumps(template()), [change, "CogLoomSampler.seed=1"], api_name="/workflow_run")
    assert [path.name for path in server.folder.parent.iterdir()] == [server.folder.name]


def test_graphs_that_are_not_run(client: Client):
    strange = {**template(), "99": {"class_type": "KSampler", "inputs": {}}}
    picture = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "../secret/x.png"}},
        "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
    }
    for graph, said in ((strange, "KSampler"), (picture, "Load Image .*outside")):
        with pytest.raises(AppError, match=said):
            client.predict(json.dumps(graph), api_name="/workflow_run")
    for call in ("workflow_values", "workflow_run"):
        with pytest.raises(AppError, match="JSON"):
            client.predict("{", api_name=f"/{call}")


def test_a_run_that_is_cancelled_ends_within_a_step(client: Client, server: Server):
    before = server.clips()
    changes = ["CogLoomSampler.steps=1000", "CogLoomSampler.frames=33", "CogLoomSampler.width=96"]
    job = client.submit(json.dumps(template()), changes, api_name="/workflow_run")
    for told in job:
        if told.get("percent", 0) > 0:
            break
    job.cancel()
    # The queue has one place: this one is only run when the other has let go.
    told = Client(server.url, verbose=False).predict(
        json.dumps(template()), ["CogLoomSampler.steps=2", "CogLoomSaveVideo.name=after"], api_name="/workflow_run"
    )
    assert told["state"] == "done"
    assert server.clips() - before == {"after_00001_.mp4"}


def test_a_path_that_was_not_uploaded_is_not_read(client: Client, server: Server):
    """Every handler can be called, by its number, with whatever a page could send."""
    config = httpx.get(f"{server.url}/config").json()
    ids = {one["props"].get("elem_id"): one["id"] for one in config["components"]}
    wanted = [one["id"] for one in config["dependencies"]
              if any(target[0] == ids["cl-workflow-file"] for target in one["targets"])
              or any(target[0] == ids["cl-convert-run"] for target in one["targets"])]  # fmt: skip
    assert len(wanted) >= 2
    forged = {"path": str(DEMO_ADAPTERS / "neon.safetensors"), "meta": {"_type": "gradio.FileData"}}
    before = sorted(path.name for path in (server.folder / "loras").iterdir())
    for number in wanted:
        count = len(next(one for one in config["dependencies"] if one["id"] == number)["inputs"])
        values = ["en", forged, ""][:count] + [None] * (count - 3)
        body = {"data": values, "fn_index": number, "session_hash": f"forged{number}"}
        assert httpx.post(f"{server.url}/gradio_api/queue/join", json=body).status_code == 200
        told = httpx.get(f"{server.url}/gradio_api/queue/data", params={"session_hash": f"forged{number}"}, timeout=60)
        assert "process_completed" in told.text
        assert "used 72" not in told.text
        assert '"graph"' not in told.text
    assert sorted(path.name for path in (server.folder / "loras").iterdir()) == before


# --- training ---------------------------------------------------------------------------------------------------------


def test_only_datasets_below_the_data_folder_are_trained_on(client: Client, server: Server):
    assert client.predict(api_name="/train_datasets") == ["toy"]
    for name in ("../secret", str(server.folder / "secret"), "..", "", "toy/../../secret", "/etc"):
        with pytest.raises(AppError, match="dataset"):
            client.predict(name, "mine", api_name="/train_start")
    for settings, said in (({"steps": "x"}, "Steps"), ({"frames": 7}, "8N"), ({"nothing": 1}, "settings"),
                           ({"rank": 0}, "rank"), ({"learning_rate": -1}, "learning_rate")):  # fmt: skip
        with pytest.raises(AppError, match=said):
            client.predict("toy", "mine", settings=settings, api_name="/train_start")
    with pytest.raises(AppError, match="cannot name"):
        client.predict("toy", "../mine", api_name="/train_start")
    with pytest.raises(AppError, match="nowhere"):
        client.predict("toy", "mine", "nowhere", api_name="/train_start")
    assert client.predict(api_name="/train_status") == {"state": "idle"}
    assert not (server.output / "training").exists()


@pytest.mark.heavy
def test_training_is_stopped_goes_on_and_lets_others_render(client: Client, server: Server):
    status = lambda: client.predict(api_name="/train_status")  # noqa: E731
    given = {**TRAINING, "steps": 100_000, "rank": 2}
    told = client.predict("toy", "long", settings=given, api_name="/train_start")
    assert (told["state"], told["name"], told["steps"]) == ("running", "long", 100_000)
    with pytest.raises(AppError, match="long is being trained"):
        client.predict("toy", "other", settings=given, api_name="/train_start")
    told = until(status, lambda told: told["state"] != "running" or told["step"] >= 2)
    assert told["state"] == "running", told
    assert told["validation"][0][0] == 0
    assert len(told["losses"]) >= 1
    changes = ["CogLoomSampler.steps=1", "CogLoomSaveVideo.name=meanwhile"]
    client.predict(json.dumps(template()), changes, api_name="/workflow_run")
    assert status()["state"] == "running"
    client.predict(api_name="/train_stop")
    told = until(status, lambda told: told["state"] != "running")
    assert told["state"] == "stopped"
    assert "checkpoint" in told["error"]
    step = told["step"]
    assert (server.output / "training" / "long" / f"checkpoint-{step:06d}" / "adapter.safetensors").is_file()

    told = client.predict("toy", "long", settings={**given, "steps": step + 2}, api_name="/train_start")
    assert [one for one, _ in told["losses"]] == list(range(1, step + 1)) or len(told["losses"]) == 400
    told = until(status, lambda told: told["state"] != "running")
    assert (told["state"], told["step"], told["losses"][-1][0]) == ("done", step + 2, step + 2)
    assert (server.output / "training" / "long" / "long.safetensors").is_file()
    assert client.predict(api_name="/train_stop")["state"] == "done"


@pytest.mark.heavy
def test_what_a_training_says_of_its_data_reaches_the_client(client: Client):
    (first, *_) = [client.predict("toy", "bad", settings={**TRAINING, "steps": 1, "trigger_words": ["absent"]},
                                  api_name="/train_start")]  # fmt: skip
    assert first["state"] == "running"
    told = until(lambda: client.predict(api_name="/train_status"), lambda told: told["state"] != "running")
    assert told["state"] == "failed"
    assert "absent" in told["error"]

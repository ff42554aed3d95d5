"""The app's server as programs meet it: the real one, the embedded demo, Gradio's own client."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from nodes.engine import video
from nodes.host import LocalHost
from nodes.workflow import read_workflow, run_workflow

from .ui_server import Server, serving

PROMPT = "a small red square standing still on a gray background"
LONG = {"steps": 1000, "frames": 33, "width": 96, "height": 96}  # minutes, if nobody stops it
QUEUE = 3


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("app"), "--queue", str(QUEUE)) as running:
        yield running


def client(server: Server) -> Client:
    return Client(server.url, verbose=False)


def begun(job: Any) -> None:
    """Until the first step of a job was told of."""
    for told in job:
        if told.get("progress", {}).get("what") == "denoising" and told["progress"]["done"] >= 1:
            return
    raise AssertionError(f"it ended without a step: {job.result()}")


def test_the_page_has_nothing_in_it_that_only_programs_use(server: Server):
    """Gradio's page goes through all of its tree for each output of each event: it was a third of the time to start."""
    config: dict[str, Any] = client(server).config

    def ids(node: dict[str, Any]) -> Iterator[int]:
        yield node["id"]
        for child in node.get("children", ()):
            yield from ids(child)

    values = [one for one in config["components"] if one["type"] == "api"]
    assert len(values) > 100
    assert {one["id"] for one in values}.isdisjoint(ids(config["layout"]))
    assert not any(one["props"]["visible"] for one in values)  # or the page would wait for them
    quiet = [one for one in config["dependencies"] if one["show_progress"] == "hidden"]
    assert len(quiet) > 50
    assert all(one["show_progress_on"] == [] for one in quiet)


def test_a_clip_by_name_is_the_one_that_its_workflow_makes(server: Server, host: LocalHost, tmp_path: Path):
    made = client(server).predict(PROMPT, ["neon:0.8"], seed=5, steps=3, api_name="/render")
    record = made["record"]
    assert [(lora["name"], lora["weight"]) for lora in record["loras"]] == [("neon", 0.8)]
    assert (record["settings"]["seed"], record["settings"]["steps"], record["settings"]["frames"]) == (5, 3, 17)
    fetched = Path(made["video"])
    assert video.read_video(fetched)[0].shape == (17, 64, 64, 3)
    assert json.loads(video.read_tags(fetched)["cogloom"]) == record
    graph, _ = read_workflow(fetched)
    (shown,) = run_workflow(host, graph)
    (again,) = shown.ui["images"]
    tags = video.read_tags(Path(again["subfolder"], again["filename"]))
    assert json.loads(tags["cogloom"])["frames_sha256"] == record["frames_sha256"]


def test_the_graph_on_the_screen_is_the_graph_in_the_clip(server: Server):
    one = client(server)
    said = {"seed": 7, "steps": 2, "api_name": "/workflow"}
    graph = one.predict(PROMPT, ["bounce:0.5[steps=held 1@0.4]"], **said)
    made = one.predict(PROMPT, ["bounce:0.5[steps=held 1@0.4]"], **(said | {"api_name": "/render"}))
    assert read_workflow(Path(made["video"]))[0] == graph


def test_two_people_have_a_stack_each_on_one_base(server: Server):
    first, second = client(server), client(server)
    jobs = [
        one.submit(PROMPT, [name], steps=2, api_name="/render") for one, name in ((first, "neon"), (second, "star"))
    ]
    stacks = [[lora["name"] for lora in job.result(timeout=120)["record"]["loras"]] for job in jobs]
    assert stacks == [["neon"], ["star"]]
    assert first.predict(api_name="/status")["loads"] == 1


def test_a_comparison_differs_in_the_stack_alone(server: Server):
    made = client(server).predict([PROMPT], ["sunset"], [], seeds=[1, 2], steps=2, api_name="/compare")
    assert [(pair["prompt"], pair["seed"]) for pair in made["pairs"]] == [(PROMPT, 1), (PROMPT, 2)]
    a, b = (arm["record"] for arm in made["pairs"][1]["record"]["compared"])
    assert a["settings"] == b["settings"]
    assert a["settings"]["seed"] == 2
    assert ([lora["name"] for lora in a["loras"]], b["loras"]) == (["sunset"], [])
    assert Path(made["pairs"][0]["side_by_side"]).suffix == ".mp4"


def test_the_base_is_proved_to_be_what_its_file_holds(server: Server):
    one = client(server)
    one.predict(PROMPT, ["neon:2"], steps=1, api_name="/render")
    proof = one.predict(api_name="/verify_base")
    assert proof["checked"] > 100
    assert proof["wrong"] == 0
    assert one.predict(api_name="/status")["bases"][0]["held"] == []


def test_what_is_cancelled_ends_within_a_step(server: Server):
    """The next one is through although the first had hundreds of steps to go, and the first left nothing behind."""
    one, before = client(server), server.clips()
    job = one.submit("to be cancelled", **LONG, api_name="/render")
    begun(job)
    job.cancel()
    made = client(server).submit(PROMPT, steps=1, api_name="/render").result(timeout=60)
    assert server.clips() - before == {Path(made["video"]).name}


def test_a_closed_tab_frees_the_work(server: Server):
    """As a browser does it: an event, a stream of its messages, and then the connection is gone."""
    before = server.clips()
    config = httpx.get(f"{server.url}/config").json()
    (render,) = [one["id"] for one in config["dependencies"] if one["api_name"] == "render"]
    arguments = [None] * 17
    arguments[0], arguments[5], arguments[7:10] = "a tab to be closed", LONG["steps"], [33, 96, 96]
    names = ["prompt", "adapters", "negative", "base", "seed", "steps", "guidance", "frames", "width", "height"]
    defaults = {"negative": "", "base": "cogloom-demo", "seed": 0, "guidance": 0.0}
    for name, value in defaults.items():
        arguments[names.index(name)] = value
    arguments[10:] = ["auto", 0.8, None, None, "auto", "mp4", False]
    body = {"data": arguments, "fn_index": render, "session_hash": "closing"}
    assert httpx.post(f"{server.url}/gradio_api/queue/join", json=body).status_code == 200
    with httpx.stream("GET", f"{server.url}/gradio_api/queue/data?session_hash=closing", timeout=60) as stream:
        for line in stream.iter_lines():
            if '"denoising"' in line:
                break
        else:
            raise AssertionError("it ended without a step")
    made = client(server).submit(PROMPT, steps=1, api_name="/render").result(timeout=60)
    assert server.clips() - before == {Path(made["video"]).name}


def test_a_full_queue_says_so(server: Server):
    running = client(server).submit("the one that runs", **LONG, api_name="/render")
    begun(running)
    waiting = [client(server).submit("one that waits", **LONG, api_name="/render") for _ in range(QUEUE)]
    try:
        counted = threading.Event()
        for job in waiting:  # each has its place once it was told its rank
            while job.status().code.name not in ("IN_QUEUE", "JOINING_QUEUE"):
                counted.wait(0.05)
            while job.status().code.name == "JOINING_QUEUE":
                counted.wait(0.05)
        with pytest.raises(Exception, match=r"[Qq]ueue is full|503"):
            client(server).submit(PROMPT, steps=1, api_name="/render").result(timeout=60)
    finally:
        for job in (*waiting, running):
            job.cancel()
    assert client(server).submit(PROMPT, steps=1, api_name="/render").result(timeout=60)["record"]


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ({"adapters": ["nope"]}, "There is no adapter 'nope'"),
        ({"adapters": ["neon:1e9"]}, "is not a number from -100 to 100|1e9"),
        ({"adapters": ["../../secret"]}, "There is no adapter"),
        ({"frames": 10}, "nearest is 9"),
        ({"width": 4096, "height": 4096}, "nearest is"),
        ({"steps": -1}, "steps is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"guidance": 1e9}, "guidance is"),
        ({"base": "../elsewhere"}, "elsewhere"),
        ({"image": {"path": "/etc/passwd"}}, "not a file that was uploaded here"),
        ({"video": {"path": "C:\\secret.mp4"}}, "not a file that was uploaded here"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_in_a_sentence(server: Server, said: dict[str, Any], sentence: str):
    with pytest.raises(AppError, match=sentence):
        client(server).predict(PROMPT, api_name="/render", **said)


def test_image_to_video_from_an_upload(server: Server, tmp_path: Path):
    import torch

    picture = tmp_path / "start.png"
    video.write_png(torch.rand(64, 64, 3, generator=torch.Generator().manual_seed(0)), picture)
    made = client(server).predict(
        PROMPT, base="cogloom-demo-i2v", image=handle_file(str(picture)), steps=2, api_name="/render"
    )
    assert made["record"]["image"]
    graph, _ = read_workflow(Path(made["video"]))
    (load,) = [node for node in graph.values() if node["class_type"] == "LoadImage"]
    assert (server.folder / "input" / load["inputs"]["image"]).is_file()


def test_video_to_video_from_an_upload(server: Server):
    one = client(server)
    first = one.predict(PROMPT, steps=2, api_name="/render")
    made = one.predict(PROMPT, video=handle_file(first["video"]), strength=0.5, steps=4, api_name="/render")
    assert made["record"]["video"]
    assert made["record"]["settings"]["strength"] == 0.5


def test_an_upload_that_is_no_picture_is_refused(server: Server, tmp_path: Path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"<script>alert(1)</script>")
    with pytest.raises(AppError, match="not a picture that can be read"):
        client(server).predict(PROMPT, image=handle_file(str(bad)), api_name="/render")


# --- who may ask, and for what ----------------------------------------------------------------------------------------


def test_a_foreign_host_or_site_is_refused(server: Server):
    assert httpx.get(f"{server.url}/", headers={"Host": "evil.example"}).status_code == 400
    for origin in ("http://evil.example", "null", "http://localhost:1"):
        answer = httpx.post(f"{server.url}/gradio_api/queue/join", json={}, headers={"Origin": origin})
        assert (origin, answer.status_code) == (origin, 403)


def test_only_media_of_the_output_folder_are_served(server: Server):
    made = client(server).predict(PROMPT, steps=1, api_name="/render")
    name = Path(made["video"]).name
    (server.output / "training").mkdir(exist_ok=True)
    for hidden in ("training/page.html", "training/a.safetensors", "training/log.txt"):
        (server.output / hidden).write_bytes(b"<script>alert(1)</script>")
        for route in (f"cogloom/clip?name={hidden}", f"gradio_api/file={server.output / hidden}"):
            assert httpx.get(f"{server.url}/{route}").status_code in (400, 403), route
    (server.folder / "outside.mp4").write_bytes((server.output / name).read_bytes())
    for bad in (
        "../outside.mp4",
        str(server.folder / "outside.mp4"),
        "..%2foutside.mp4",
        "a\0.mp4",
        "x" * 5000 + ".mp4",
    ):
        answer = httpx.get(f"{server.url}/cogloom/clip", params={"name": bad})
        assert answer.status_code in (400, 404), bad
    assert httpx.get(f"{server.url}/gradio_api/file={server.folder / 'outside.mp4'}").status_code == 403
    good = httpx.get(f"{server.url}/cogloom/clip", params={"name": name}, headers={"Range": "bytes=0-99"})
    assert (good.status_code, len(good.content), good.headers["content-type"]) == (206, 100, "video/mp4")


def test_input_pictures_that_are_not_the_apps_own_are_not_shown(server: Server):
    (server.folder / "input").mkdir(exist_ok=True)
    (server.folder / "input" / "private.png").write_bytes(b"\x89PNG")
    for name in ("private.png", "cogloom-../private.png", "cogloom-\\..\\private.png"):
        assert httpx.get(f"{server.url}/cogloom/start", params={"name": name}).status_code in (400, 404)


def test_too_much_is_refused_before_it_is_read(server: Server):
    answer = httpx.post(f"{server.url}/gradio_api/queue/join", content=b" " * (5 << 20))
    assert answer.status_code == 413


def test_every_answer_says_what_a_page_may_load(server: Server):
    for route in ("", "cogloom/status", "cogloom/static/app.js"):
        headers = httpx.get(f"{server.url}/{route}").headers
        assert "default-src 'self'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


def test_the_page_names_no_address_elsewhere_that_is_loaded(server: Server):
    """What is named in meta tags is not asked for; scripts, styles and fonts would be."""
    import re

    page = httpx.get(f"{server.url}/").text
    loaded = re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=[\"'](https?://[^\"']+)", page)
    allowed = [url for url in loaded if url.startswith(server.url)]
    assert loaded == allowed


def test_the_handlers_of_the_page_are_no_part_of_the_api(server: Server):
    named = set(client(server).view_api(return_format="dict", print_info=False)["named_endpoints"])
    assert {"/render", "/compare", "/workflow", "/effect", "/bases", "/status", "/clips", "/record"} <= named
    assert not [name for name in named if name.endswith(("_1", "_2"))]

"""Clips made in ComfyUI: they carry their graph, and the command line makes the same frames from their record."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from nodes.engine.video import read_tags, read_video, write_png, write_video

from .graphs import PROMPT, SHOT, Graph, clip, finish, id_of, rows
from .server import Run, Server

App = Callable[..., None]


def files_of(run: Run, node: str, kind: str = "images") -> list[dict[str, Any]]:
    return run.outputs[node][kind]


def saved(server: Server, graph: Graph, workflow: Any = None) -> Path:
    """Queue it; the one clip that came of it."""
    run = server.run(graph.nodes, workflow).ok()
    (file,) = files_of(run, id_of(graph, "CogLoomSaveVideo"))
    return server.path_of(file)


def holds_graph(path: Path, graph: Graph, workflow: Any) -> None:
    """As it was queued: without what ComfyUI notes in it while it runs, and without this machine's folders."""
    tags = read_tags(path)
    assert json.loads(tags["prompt"]) == graph.nodes
    assert json.loads(tags["workflow"]) == workflow
    assert str(path.parents[1]) not in json.dumps(tags)


def same_frames(one: Path, other: Path) -> None:
    first, second = read_video(one)[0], read_video(other)[0]
    assert first.shape == second.shape
    assert torch.equal(first, second), f"{(first != second).float().mean():.3%} of the values differ"
    assert first.std() > 0.01  # a picture, not a plain colour


def moving(frames: int = 17, size: int = 64) -> torch.Tensor:
    """A bright bar that crosses a dark ground: (F, H, W, 3) in [0, 1], of 8 bits."""
    video = torch.full((frames, size, size, 3), 40 / 255)
    for i in range(frames):
        video[i, 16:48, 2 * i : 2 * i + 14] = torch.tensor([220, 60, 30]) / 255
    return video


def text_to_video(server: Server, info: dict[str, Any]) -> tuple[Graph, list[str]]:
    return clip(info, name="text"), []


def picture_to_video(server: Server, info: dict[str, Any]) -> tuple[Graph, list[str]]:
    picture = server.base / "input" / "first.png"
    write_png(moving()[4], picture)
    graph = Graph(info)
    loaded = graph.add("LoadImage", image="first.png")
    base = graph.add("CogLoomBase", checkpoint="cogloom-demo-i2v")
    encoded = graph.add("CogLoomPrompt", base=base["base"], prompt=PROMPT)
    return finish(graph, base, encoded, "picture", image=loaded[0]), ["--image", str(picture)]


def video_to_video(server: Server, info: dict[str, Any]) -> tuple[Graph, list[str]]:
    """Two pictures, each held for a while: ComfyUI's video decoders round in their own ways, its pictures are exact."""
    graph, shown, parts = Graph(info), [], []
    for name, frame, count in (("early.png", moving()[2], 9), ("late.png", moving()[12], 8)):
        write_png(frame, server.base / "input" / name)
        shown += [frame] * count
        parts.append(graph.add("RepeatImageBatch", image=graph.add("LoadImage", image=name)[0], amount=count))
    source = server.base / "input" / "source.mkv"
    write_video(torch.stack(shown), source, 8.0)
    frames = graph.add("ImageBatch", image1=parts[0][0], image2=parts[1][0])
    base = graph.add("CogLoomBase", checkpoint="cogloom-demo")
    encoded = graph.add("CogLoomPrompt", base=base["base"], prompt=PROMPT, negative="a plain background")
    return finish(graph, base, encoded, "video", video=frames[0], strength=0.75), ["--video", str(source)]


def stack_of_three(server: Server, info: dict[str, Any]) -> tuple[Graph, list[str]]:
    stack = rows("neon:0.8", {"adapter": "bounce.safetensors", "weight": 0.5, "blocks": "0-1:0.5"}, "star:-0.4")
    return clip(info, stack, name="three", dynamic_guidance=True, scheduler="dpm"), []


def schedule(server: Server, info: dict[str, Any]) -> tuple[Graph, list[str]]:
    graph = Graph(info)
    base = graph.add("CogLoomBase", checkpoint="cogloom-demo")
    encoded = graph.add("CogLoomPrompt", base=base["base"], prompt=PROMPT)
    first = graph.add("CogLoomLora", adapter="sunset.safetensors", weight=1.0)
    second = graph.add("CogLoomLora", adapter="orbit.safetensors", weight=0.6, stack=first["stack"])
    planned = graph.add("CogLoomSchedule", stack=second["stack"], steps="0@0 1@0.3 1@0.7 0.2@1", adapters="sunset")
    placed = graph.add("CogLoomBlocks", stack=planned["stack"], blocks="0-2:0.5", adapters="orbit")
    return finish(graph, base, encoded, "schedule", stack=placed["stack"]), []


@pytest.mark.parametrize(
    "made", [text_to_video, picture_to_video, video_to_video, stack_of_three, schedule], ids=lambda made: made.__name__
)
def test_a_clip_restores_its_graph_and_renders_the_same_from_the_command_line(
    server: Server, info: dict[str, Any], app: App, made: Callable[..., tuple[Graph, list[str]]]
):
    graph, arguments = made(server, info)
    workflow = graph.workflow()
    path = saved(server, graph, workflow)
    assert path.suffix == ".mp4"
    assert path.parent == server.base / "output"
    holds_graph(path, graph, workflow)
    again = server.base / f"again-{path.name}"
    app(server, "render", "--like", str(path), "-o", str(again), *arguments)
    same_frames(path, again)
    record, other = (json.loads(read_tags(file)["cogloom"]) for file in (path, again))
    for key in ("settings", "weights", "image", "video", "fps"):
        assert record[key] == other[key], key
    names = ("name", "weight", "blocks", "steps", "sha256", "hold")
    assert [[lora[n] for n in names] for lora in record["loras"]] == [
        [lora[n] for n in names] for lora in other["loras"]
    ]


def test_the_stack_changes_the_frames(server: Server, info: dict[str, Any]):
    """Else the comparisons above could all be of one clip."""
    plain = saved(server, clip(info, rows(), name="off"))
    styled = saved(server, clip(info, rows("neon:0.8"), name="on"))
    assert not torch.equal(read_video(plain)[0], read_video(styled)[0])


def test_compare_renders_both_sides_like_single_clips(server: Server, info: dict[str, Any], app: App):
    """A without an adapter, B with three; each side is what its own stack gives alone."""
    graph = Graph(info)
    base = graph.add("CogLoomBase", checkpoint="cogloom-demo")
    encoded = graph.add("CogLoomPrompt", base=base["base"], prompt=PROMPT)
    stack = graph.add("CogLoomLoraStack", rows=rows("neon:0.8", "bounce:0.5", "star:0.3"))
    compare = graph.add(
        "CogLoomCompare",
        base=base["base"],
        positive=encoded["positive"],
        negative=encoded["negative"],
        b=stack["stack"],
        name="ab",
        labels="plain, three",
        **SHOT,
    )
    workflow = graph.workflow()
    run = server.run(graph.nodes, workflow).ok()
    clips = files_of(run, compare.id, "cogloom_clips")
    assert [one["label"] for one in clips] == ["plain", "three"]
    assert run.outputs[compare.id]["cogloom_fps"] == [8.0]
    (beside,) = files_of(run, compare.id)
    holds_graph(server.path_of(beside), graph, workflow)
    width = read_video(server.path_of(beside))[0].shape[2]
    for one, stack_rows in zip(clips, (rows(), rows("neon:0.8", "bounce:0.5", "star:0.3")), strict=True):
        path = server.path_of(one)
        frames = read_video(path)[0]
        assert one["frames"] == len(frames) == 17
        assert width >= 2 * frames.shape[2]
        assert server.view({key: one[key] for key in ("filename", "subfolder", "type")}) == path.read_bytes()
        alone = saved(server, clip(info, stack_rows, name="alone"))
        same_frames(path, alone)
    again = server.base / "again-ab.mp4"
    app(server, "render", "--like", str(server.path_of(clips[1])), "-o", str(again))
    same_frames(server.path_of(clips[1]), again)


@pytest.mark.parametrize("format", ["webm", "mkv", "gif"])
def test_other_containers_carry_the_graph_too(server: Server, info: dict[str, Any], format: str):
    graph = clip(info, rows("neon:0.8"), name=f"sub/{format}", format=format)
    run = server.run(graph.nodes, {"version": 0.4}).ok()
    (path,) = (server.base / "output" / "sub").glob(f"{format}*.{format}")
    if format != "mkv":  # no browser plays it, so the page is given its name instead
        assert server.path_of(files_of(run, id_of(graph, "CogLoomSaveVideo"))[0]) == path
    holds_graph(path, graph, {"version": 0.4})
    assert read_video(path)[0].shape == (17, 64, 64, 3)


def test_names_are_not_reused(server: Server, info: dict[str, Any]):
    """The same prefix gives the next number; an earlier clip is never written over."""
    first = saved(server, clip(info, name="numbered", seed=21))
    kept = hashlib.sha256(first.read_bytes()).hexdigest()
    second = saved(server, clip(info, name="numbered", seed=22))
    assert first != second
    assert hashlib.sha256(first.read_bytes()).hexdigest() == kept


def test_frames_go_on_to_core_nodes(server: Server, info: dict[str, Any]):
    """Frames are an IMAGE, the latent a LATENT that core nodes pass on, and both end where core saves."""
    graph = Graph(info)
    base = graph.add("CogLoomBase", checkpoint="cogloom-demo")
    encoded = graph.add("CogLoomPrompt", base=base["base"], prompt=PROMPT)
    sampled = graph.add(
        "CogLoomSampler", base=base["base"], positive=encoded["positive"], negative=encoded["negative"], **SHOT
    )
    by_core = graph.add("LatentBatchSeedBehavior", samples=sampled["latent"], seed_behavior="fixed")
    decoded = graph.add("CogLoomDecode", base=base["base"], latent=by_core[0])
    video = graph.add("CreateVideo", images=decoded["frames"], fps=decoded["fps"])
    core = graph.add("SaveVideo", video=video[0], filename_prefix="core", format="mp4", codec="h264")
    run = server.run(graph.nodes).ok()
    (file,) = files_of(run, core.id)
    frames, fps = read_video(server.path_of(file))
    assert frames.shape == (17, 64, 64, 3)
    assert fps == 8.0


def test_progress_and_previews_arrive(server: Server, info: dict[str, Any]):
    graph = clip(info, rows("neon:0.7"), seed=31, steps=6)
    run = server.run(graph.nodes).ok()
    node = id_of(graph, "CogLoomSampler")
    assert [done for done, _ in run.steps(node)][-6:] == [1, 2, 3, 4, 5, 6]
    assert {total for _, total in run.steps(node)} == {6}
    told = [data for kind, data in run.messages if kind == "cogloom.preview"]
    assert told, "no cogloom.preview came"
    for one in told:
        assert one["node"] == node
        head, _, data = one["sheet"].partition(";base64,")
        assert head in ("data:image/png", "data:image/jpeg")
        sheet = Image.open(io.BytesIO(base64.b64decode(data)))
        assert sheet.size == (one["count"] * one["width"], one["height"])
        assert one["count"] == 5  # latent frames of 17
        assert one["total"] == 6
        assert one["fps"] == 2  # a latent frame stands for four
    assert [one["step"] for one in told] == sorted({one["step"] for one in told})

"""LORA_STACK of other packs comes in and goes out; ComfyUI's own text encoders are read or refused clearly."""

from __future__ import annotations

import json
from typing import Any

import torch

from .graphs import PROMPT, Graph, clip, finish, id_of, rows
from .server import Server
from .test_residency import frames_of


def shown(server: Server, graph: Graph, kind: str) -> str:
    run = server.run(graph.nodes).ok()
    (text,) = run.outputs[id_of(graph, kind)]["text"]
    return text


def test_a_lora_stack_of_another_pack_renders_like_our_own(server: Server, info: dict[str, Any]):
    own = clip(info, rows("neon:0.8", "bounce:0.5"), name="own", seed=91)
    expected = frames_of(server, server.run(own.nodes).ok(), own)
    entries = [["neon.safetensors", 0.8, 1.0], ["bounce.safetensors", 0.5, 0.3]]  # name, model, text encoder
    for kind, widgets in (("CogLoomLoraStack", {"rows": "[]"}), ("CogLoomLora", {"adapter": "bounce.safetensors"})):
        graph = Graph(info)
        base = graph.add("CogLoomBase", checkpoint="cogloom-demo")
        encoded = graph.add("CogLoomPrompt", base=base["base"], prompt=PROMPT)
        # The single node brings the second of the two itself.
        theirs = entries if kind == "CogLoomLoraStack" else entries[:1]
        weight = {} if kind == "CogLoomLoraStack" else {"weight": 0.5}
        given = graph.add("ExchangeEmit", entries=json.dumps(theirs))
        stack = graph.add(kind, lora_stack=given[0], **widgets, **weight)
        finish(graph, base, encoded, "theirs", stack=stack["stack"], seed=91)
        assert torch.equal(expected, frames_of(server, server.run(graph.nodes).ok(), graph)), kind


def test_our_stack_goes_out_as_a_lora_stack(server: Server, info: dict[str, Any]):
    graph = Graph(info)
    given = graph.add("ExchangeEmit", entries=json.dumps([["star.safetensors", 0.25, 0.25]]))
    off = {"adapter": "orbit.safetensors", "weight": 1.0, "on": False}
    stack = graph.add("CogLoomLoraStack", rows=rows("neon:0.8", off, "sunset:-0.5"), lora_stack=given[0])
    graph.add("ExchangeLook", lora_stack=stack["lora_stack"])
    told = json.loads(shown(server, graph, "ExchangeLook"))
    assert told["type"] == "list"
    assert told["kinds"] == ["tuple"] * 3
    by_name = {name.replace("\\", "/").rsplit("/", 1)[-1]: (model, text) for name, model, text in told["entries"]}
    assert {name: pair[0] for name, pair in by_name.items()} == {
        "star.safetensors": 0.25,
        "neon.safetensors": 0.8,
        "sunset.safetensors": -0.5,
    }


def test_trigger_words_are_those_of_active_adapters(server: Server, info: dict[str, Any]):
    graph = Graph(info)
    off = {"adapter": "orbit.safetensors", "on": False}
    stack = graph.add("CogLoomLoraStack", rows=rows("bounce", off, "neon:0.5"))
    graph.add("ExchangeText", text=stack["trigger_words"])
    assert set(shown(server, graph, "ExchangeText").split(", ")) == {"bouncing", "neon"}


def test_a_lora_stack_with_a_file_that_is_gone(server: Server, info: dict[str, Any]):
    graph = Graph(info)
    given = graph.add("ExchangeEmit", entries=json.dumps([["nowhere.safetensors", 1.0, 1.0]]))
    stack = graph.add("CogLoomLoraStack", rows="[]", lora_stack=given[0])
    graph.add("ExchangeText", text=stack["trigger_words"])
    error = server.run(graph.nodes).error
    assert error is not None
    assert error["node_id"] == stack.id
    assert "nowhere" in error["exception_message"]


def test_a_conditioning_of_another_encoder_is_refused_with_both_sizes(server: Server, info: dict[str, Any]):
    for tokens, width in ((77, 768), (24, 128)):
        graph = Graph(info)
        base = graph.add("CogLoomBase", checkpoint="cogloom-demo")
        foreign = graph.add("ExchangeEncoding", tokens=tokens, width=width)
        sampled = graph.add("CogLoomSampler", base=base["base"], positive=foreign[0], negative=foreign[0], steps=2)
        decoded = graph.add("CogLoomDecode", base=base["base"], latent=sampled["latent"])
        graph.add("CogLoomSaveVideo", frames=decoded["frames"], fps=decoded["fps"], name="foreign")
        error = server.run(graph.nodes).error
        assert error is not None
        assert error["node_id"] == sampled.id
        assert str((tokens, width)) in error["exception_message"]
        assert "CogVideoX Prompt" in error["exception_message"]
    good = clip(info, rows("neon"), name="good", seed=92)
    assert len(frames_of(server, server.run(good.nodes).ok(), good)) == 17


def test_a_conditioning_of_the_right_shape_is_used(server: Server, info: dict[str, Any]):
    """As from a T5 that ComfyUI holds itself; zeros here, which is another prompt and so another clip."""
    seen = []
    for foreign in (True, False):
        graph = Graph(info)
        base = graph.add("CogLoomBase", checkpoint="cogloom-demo")
        encoded = graph.add("CogLoomPrompt", base=base["base"], prompt=PROMPT)
        tokens, width = 24, 64
        zeros = graph.add("ExchangeEncoding", tokens=tokens, width=width)
        positive = zeros[0] if foreign else encoded["positive"]
        sampled = graph.add(
            "CogLoomSampler", base=base["base"], positive=positive, negative=encoded["negative"], seed=93, steps=3
        )
        decoded = graph.add("CogLoomDecode", base=base["base"], latent=sampled["latent"])
        graph.add("CogLoomSaveVideo", frames=decoded["frames"], fps=decoded["fps"], name="shape")
        seen.append(frames_of(server, server.run(graph.nodes).ok(), graph))
    assert not torch.equal(*seen)

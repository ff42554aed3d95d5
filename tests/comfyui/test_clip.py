"""ComfyUI's own text encoder in place of the base's: its CLIP class around its T5, small and with random weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from nodes.engine.video import read_tags, read_video

from .graphs import SHOT, Graph
from .server import Environment, Server, serving

# The width and the length of the embedded base's encodings.
PACK = """
import comfy.sd
import torch
from comfy import sd1_clip
from comfy.text_encoders import sd3_clip

SIZES = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_heads": 4, "num_layers": 2, "vocab_size": 32128}


class Tokens(sd3_clip.T5XXLTokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data={}):
        super().__init__(embedding_directory=embedding_directory, tokenizer_data=tokenizer_data, min_length=24)


class Tokenizer(sd1_clip.SD1Tokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data={}):
        super().__init__(embedding_directory=embedding_directory, tokenizer_data=tokenizer_data, clip_name="t5xxl",
                         tokenizer=Tokens)


class Encoder(sd1_clip.SD1ClipModel):
    def __init__(self, device="cpu", dtype=None, model_options={}):
        super().__init__(device=device, dtype=dtype, name="t5xxl", clip_model=sd3_clip.T5XXLModel,
                         model_options=model_options)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.2


class Target:
    params, clip, tokenizer = {}, Encoder, Tokenizer


class SmallT5:
    INPUT_TYPES = classmethod(lambda cls: {"required": {}})
    RETURN_TYPES = ("CLIP",)
    FUNCTION = "run"

    def run(self):
        return (comfy.sd.CLIP(Target, model_options={"t5xxl_model_config": SIZES, "dtype": torch.float32}),)


NODE_CLASS_MAPPINGS = {"SmallT5": SmallT5}
"""


@pytest.fixture(scope="module")
def server(environment: Environment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    base = tmp_path_factory.mktemp("clip")
    folder = base / "custom_nodes" / "small_t5"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(PACK, encoding="utf-8")
    with serving(environment, base) as running:
        yield running


def clip(server: Server, text: str, ours: bool) -> tuple[torch.Tensor, dict[str, Any]]:
    """(frames, record); `ours`: by CogVideoX Prompt with the CLIP connected, else by the core's own CLIPTextEncode."""
    graph = Graph(server.object_info())
    base, encoder = graph.add("CogLoomBase"), graph.add("SmallT5")
    if ours:
        prompt = graph.add("CogLoomPrompt", base=base[0], prompt=text, clip=encoder[0])
        positive, negative = prompt[0], prompt[1]
    else:
        positive, negative = (graph.add("CLIPTextEncode", clip=encoder[0], text=one)[0] for one in (text, ""))
    latent = graph.add("CogLoomSampler", base=base[0], positive=positive, negative=negative, **SHOT)
    frames = graph.add("CogLoomDecode", base=base[0], latent=latent[0])
    saved = graph.add("CogLoomSaveVideo", frames=frames[0], fps=frames[1], record=frames[2], format="mkv", name="t5")
    server.run(graph.nodes).ok()
    path = max((server.base / "output").glob("t5_*.mkv"))
    assert saved.id in graph.nodes
    return read_video(path)[0], json.loads(read_tags(path)["cogloom"])


def test_comfyuis_t5_encodes_for_our_sampler(server: Server):
    frames, record = clip(server, "a red square", ours=True)
    assert record["settings"]["prompt"] == "a red square"
    assert len(record["prompt_encoding"]) == 64  # the text alone, with the base's own encoder, gives another clip
    assert any("another text encoder" in note for note in record["notes"])
    other, _ = clip(server, "a blue circle", ours=True)
    assert not torch.equal(frames, other)


def test_the_cores_own_encoding_is_taken_as_it_is(server: Server):
    frames, _ = clip(server, "a red square", ours=True)
    same, record = clip(server, "a red square", ours=False)
    assert torch.equal(same, frames)
    assert record["settings"]["prompt"] == ""  # only its encoding is known
    assert len(record["prompt_encoding"]) == 64

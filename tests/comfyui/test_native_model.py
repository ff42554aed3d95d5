"""The native template on ComfyUI's own CogVideoX: a small transformer in the core's names, the core's VAE with random
weights (it fixes the widths), and encodings of a pack's in place of T5-XXL, which has one size alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nodes.engine.video import read_tags, read_video
from tests.test_native import SMALL, adapter, native_name

from .packs import put_exchange
from .server import Environment, Server, serving

TEMPLATE = Path(__file__).resolve().parents[2] / "workflows" / "api" / "native_model.json"
ENCODING = {
    "class_type": "ExchangeEncoding",
    "inputs": {"tokens": SMALL["max_text_seq_length"], "width": SMALL["text_embed_dim"]},
}


@pytest.fixture(scope="module")
def native(environment: Environment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if not (environment.comfyui / "comfy" / "ldm" / "cogvideo").is_dir():
        pytest.skip("this ComfyUI has no CogVideoX of its own; COMFYUI_PATH names another one")
    from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel

    base = tmp_path_factory.mktemp("native")
    models = base / "models"
    graph = json.loads(TEMPLATE.read_text(encoding="utf-8"))
    torch.manual_seed(0)
    small = CogVideoXTransformer3DModel(**SMALL).state_dict()
    put(models / "diffusion_models" / graph["1"]["inputs"]["unet_name"], {native_name(k): v for k, v in small.items()})
    put(models / "vae" / graph["3"]["inputs"]["vae_name"], AutoencoderKLCogVideoX().half().state_dict())
    (models / "loras").mkdir()
    adapter(models / "loras" / "it.safetensors")
    put_exchange(base)
    with serving(environment, base) as running:
        yield running


def put(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    file.parent.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def template(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """As it is shipped, but for the encoder, the size and the number of steps."""
    graph = json.loads(TEMPLATE.read_text(encoding="utf-8"))
    del graph["2"]
    graph |= {"4": ENCODING, "5": ENCODING}
    graph["6"]["inputs"]["rows"] = json.dumps(rows)
    graph["8"]["inputs"] |= {"width": 64, "height": 48, "length": 13}
    graph["9"]["inputs"]["steps"] = 3
    return graph


def clip(server: Server, rows: list[dict[str, Any]]) -> torch.Tensor:
    graph = template(rows)
    run = server.run(graph).ok()
    (file,) = run.outputs["11"]["images"]
    path = server.path_of(file)
    assert json.loads(read_tags(path)["prompt"]) == graph
    return read_video(path)[0]


def test_the_native_template_runs_and_its_stack_counts(native: Server):
    off = clip(native, [])
    on = clip(native, [{"adapter": "it.safetensors", "weight": 4.0}])
    assert off.shape[1:] == (48, 64, 3)  # how many frames its autoencoder makes of four latents is the core's affair
    assert not torch.equal(on, off)
    assert torch.equal(clip(native, [{"adapter": "it.safetensors", "weight": 4.0, "on": False}]), off)
    late = clip(native, [{"adapter": "it.safetensors", "weight": 4.0, "steps": "held 1@0.9"}])
    assert not torch.equal(late, off)
    assert not torch.equal(late, on)
    assert native.status()["loads"] == 0  # the core's model is used, and no base of ours


def test_a_schedule_without_conditionings_says_what_to_connect(native: Server):
    graph = template([{"adapter": "it.safetensors", "steps": "0@0 1@1"}])
    for name in ("positive", "negative"):
        graph["9"]["inputs"][name] = graph["7"]["inputs"].pop(name)
    error = native.run(graph).error
    assert error is not None
    assert error["node_id"] == "7"
    assert "connect" in error["exception_message"].lower()


def test_an_adapter_of_another_size_is_refused_on_the_node(native: Server):
    error = native.run(template([{"adapter": "neon.safetensors"}])).error
    assert error is not None
    assert error["node_id"] == "7"
    assert "neon.safetensors" in error["exception_message"]


def test_what_the_workshop_writes_opens_in_the_cores_own_loader(native: Server):
    """Load LoRA (Model Only) of ComfyUI, which knows none of CogVideoX's adapters by the names that they come with."""
    convert = {
        "1": {"class_type": "CogLoomConvert",
              "inputs": {"adapter": "it.safetensors", "layout": "comfyui", "name": "loras/core"}},
        "2": {"class_type": "CogLoomLora",
              "inputs": {"adapter": "it.safetensors", "weight": 1.0, "blocks": "", "steps": "", "partial": False}},
        "3": {"class_type": "CogLoomMerge",
              "inputs": {"stack": ["2", 0], "method": "svd", "density": 0.5, "majority": "total", "dare_seed": 0,
                         "keep": "energy", "rank": 64, "energy": 1.0, "size_mb": 50.0, "dtype": "fp32",
                         "name": "loras/merged"}},
    }  # fmt: skip
    native.run(convert).ok()
    off, ours = clip(native, []), clip(native, [{"adapter": "it.safetensors", "weight": 4.0}])
    graph = template([])
    loader = {"model": graph["7"]["inputs"]["model"], "lora_name": "core_00001_.safetensors", "strength_model": 4.0}
    graph["20"] = {"class_type": "LoraLoaderModelOnly", "inputs": loader}
    graph["7"]["inputs"]["model"] = ["20", 0]
    loads = native.log().count("lora key not loaded")
    (file,) = native.run(graph).ok().outputs["11"]["images"]
    core = read_video(native.path_of(file))[0]
    assert native.log().count("lora key not loaded") == loads
    assert (ours - off).abs().mean() > 0.01
    assert (core - ours).abs().mean() < 0.1 * (ours - off).abs().mean()
    merged = clip(native, [{"adapter": "merged_00001_.safetensors", "weight": 4.0}])
    assert (merged - ours).abs().mean() < 0.1 * (ours - off).abs().mean()

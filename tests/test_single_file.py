"""A base whose transformer is one file: the same bits as from the folder, or a sentence that says what is wrong."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nodes.engine import checkpoints as c
from nodes.engine import native
from nodes.engine.errors import CogLoomError, ModelError, ModelNotFound, NotAModel, WrongFamily
from nodes.engine.lora_stack import LoraStack
from nodes.engine.pipeline import Base, bases, load_transformer
from nodes.engine.pristine import PristineFiles, equal_bits
from nodes.host import LocalHost
from nodes.lora import read_stack, stack_loras
from nodes.model import choose_base
from nodes.native import base_from_file
from nodes.render import Shot, render
from tests import tiny

CORE = json.loads(Path(__file__).with_name("core_cogvideox.json").read_text(encoding="utf-8"))
IN_CORE = {  # diffusers' name -> ComfyUI's, of any block
    str(native.diffusers_name(name.format(b=0))): name.format(b=0)
    for name in (*CORE["CogVideoX1.5-5B-I2V"]["parameters"], native.TABLE)
}
DEMO_FILE = c.part_files(c.DEMO_FOLDER / c.DEMO / "transformer")[0]
SHOT = Shot(prompt="a red square moves left", steps=2, frames=9, width=64, height=64, seed=3)
Tensors = Mapping[str, torch.Tensor]


def comfy(tensors: Tensors, prefix: str = "") -> dict[str, torch.Tensor]:
    """With the names of ComfyUI's core."""
    renamed = {}
    for name, value in tensors.items():
        parts = name.split(".")
        block = parts[1] if parts[0] == "transformer_blocks" else ""
        known = IN_CORE[".".join(["transformer_blocks", "0", *parts[2:]]) if block else name]
        renamed[prefix + (known.replace("blocks.0.", f"blocks.{block}.", 1) if block else known)] = value
    return renamed


def diffusers(tensors: Tensors, prefix: str = "") -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in tensors.items()}


def whole_checkpoint(tensors: Tensors) -> dict[str, torch.Tensor]:
    """As ComfyUI saves a model with all that belongs to it."""
    beside = {"vae.decoder.conv_in.weight": torch.ones(3), "text_encoders.t5.ids": torch.ones(2, dtype=torch.int64)}
    return comfy(tensors, "model.diffusion_model.") | beside


WAYS: dict[str, Callable[[Tensors], dict[str, torch.Tensor]]] = {
    "comfyui": comfy,
    "comfyui-prefixed": lambda tensors: comfy(tensors, "model.diffusion_model."),
    "comfyui-whole": whole_checkpoint,
    "diffusers": diffusers,
    "diffusers-prefixed": lambda tensors: diffusers(tensors, "transformer."),
}


def written(path: Path, way: str = "comfyui", source: Path = DEMO_FILE) -> Path:
    save_file({name: value.contiguous() for name, value in WAYS[way](load_file(source)).items()}, path)
    return path


@pytest.fixture
def no_weights(tmp_path: Path, host: LocalHost) -> str:
    """The name of a checkpoint that is the demo but for its transformer's weights, which the file brings."""
    folder = tmp_path / "models" / "lender"
    shutil.copytree(c.DEMO_FOLDER / c.DEMO, folder)
    c.part_files(folder / "transformer")[0].unlink()
    return "lender"


# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["comfyui", "diffusers"])
def test_the_demo_from_a_file_renders_the_demos_bits(host: LocalHost, tmp_path: Path, no_weights: str, way: str):
    file = written(tmp_path / "demo.safetensors", way)
    base = base_from_file(host, file, no_weights)
    assert (base.name, base.file, base.checkpoint().family) == (
        file.name,
        str(file),
        choose_base(host).checkpoint().family,
    )
    got = render(host, base, LoraStack(), SHOT, verify=True)
    assert torch.equal(got.frames, render(host, choose_base(host), LoraStack(), SHOT).frames)
    assert got.record["verified"].startswith("base verified")
    assert got.record["base"]["name"] == "demo.safetensors"


@pytest.mark.parametrize("way", WAYS)
def test_every_spelling_is_read(host: LocalHost, tmp_path: Path, no_weights: str, way: str):
    base = base_from_file(host, written(tmp_path / "demo.safetensors", way), no_weights)
    read, wanted = load_transformer(base.checkpoint(), torch.float32).state_dict(), load_file(DEMO_FILE)
    assert read.keys() == wanted.keys()
    assert all(equal_bits(read[name], value.float()) for name, value in wanted.items())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_every_generation_loads_as_from_its_folder(checkpoints: Path, tmp_path: Path, kind: str, dtype: str):
    like = c.open_checkpoint(checkpoints / kind)
    file = written(tmp_path / "it.safetensors", "comfyui", c.part_files(checkpoints / kind / "transformer")[0])
    of = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    theirs, ours = (load_transformer(checkpoint, of) for checkpoint in (like, c.with_file(like, file)))
    for values in ("named_parameters", "named_buffers"):
        got, wanted = dict(getattr(ours, values)()), dict(getattr(theirs, values)())
        assert got.keys() == wanted.keys()
        assert all(equal_bits(got[name], wanted[name]) for name in wanted)
    assert not ours.training
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert {k: v for k, v in ours.config.items() if k[0] != "_"} == {
        k: v for k, v in theirs.config.items() if k[0] != "_"
    }


def test_adapters_fuse_and_are_taken_off_exactly(host: LocalHost, tmp_path: Path, no_weights: str):
    file = written(tmp_path / "demo.safetensors", "comfyui-prefixed")
    base, plain = base_from_file(host, file, no_weights, dtype="fp32"), choose_base(host, dtype="fp32")
    neon = read_stack(stack_loras(host, ["neon:0.8"]))
    for hold in ("fused", "stacked"):
        states = []
        for one in (base, plain):
            with bases.session(one, neon, hold=hold) as session:
                assert session.resident.switch.verify().ok
                states.append({n: p.detach().clone() for n, p in session.resident.transformer.named_parameters()})
        assert all(equal_bits(states[0][name], value) for name, value in states[1].items())
        with bases.session(base) as session:
            switch = session.resident.switch
            assert (switch.differing(), switch.held) == ((), ())
            assert switch.verify().ok
    assert bases.loads == 2  # each once, whatever was swapped
    switch = bases.resident()[0].switch
    assert {switch.norms[n] for n in ("proj_out.weight",)} == {bases.resident()[1].switch.norms["proj_out.weight"]}


def test_equal_descriptions_are_one_base_and_another_file_is_another(host: LocalHost, tmp_path: Path, no_weights: str):
    one, two = (written(tmp_path / f"{n}.safetensors", "diffusers") for n in ("one", "two"))
    first = base_from_file(host, one, no_weights)
    assert first == base_from_file(host, one, no_weights)
    assert first != base_from_file(host, two, no_weights)
    assert first != Base(first.name, first.folder)
    hashes = []
    for base in (first, base_from_file(host, one, no_weights), base_from_file(host, two, no_weights)):
        with bases.session(base) as session:
            hashes.append(session.resident.hash)
    assert bases.loads == 2
    assert len(set(hashes)) == 1  # the same content, under two names
    changed = load_file(two)
    changed["proj_out.bias"][0] += 1
    save_file(changed, two)
    assert c.transformer_hash(base_from_file(host, two, no_weights).checkpoint()) != hashes[0]


def test_a_file_that_changed_under_its_base_is_not_restored_from(host: LocalHost, tmp_path: Path, no_weights: str):
    file = written(tmp_path / "demo.safetensors")
    base = base_from_file(host, file, no_weights)
    neon = read_stack(stack_loras(host, ["neon:0.8"]))
    with bases.session(base, hold="fused"):
        pass
    written(file, "diffusers")
    with pytest.raises(ModelError, match=r"demo\.safetensors changed on disk"), bases.session(base, neon, hold="fused"):
        pass


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_is_what_its_values_say(host: LocalHost, tmp_path: Path, no_weights: str, kind: torch.dtype):
    path, original = tmp_path / "fp8.safetensors", load_file(DEMO_FILE)
    cast = {name: value.to(kind) if value.ndim == 2 else value for name, value in original.items()}
    save_file(comfy(cast), path)
    base = base_from_file(host, path, no_weights, dtype="bf16")
    with bases.session(base, read_stack(stack_loras(host, ["neon"])), hold="fused") as session:
        assert session.resident.switch.verify().ok
    with bases.session(base) as session:
        assert session.resident.switch.differing() == ()
        for name, parameter in session.resident.transformer.named_parameters():
            assert equal_bits(parameter.data, cast[name].to(torch.bfloat16))


def test_a_table_of_fixed_positions_is_made_and_not_read(checkpoints: Path, tmp_path: Path):
    """The 2b's, which ComfyUI's files have and diffusers computes."""
    like = c.open_checkpoint(checkpoints / "tiny-sincos")
    tensors = load_file(c.part_files(checkpoints / "tiny-sincos" / "transformer")[0])
    save_file(comfy({**tensors, native.TABLE: torch.full((1, 72, 64), 7.0)}), tmp_path / "it.safetensors")
    ours, theirs = (
        load_transformer(one, torch.float32) for one in (c.with_file(like, tmp_path / "it.safetensors"), like)
    )
    assert equal_bits(ours.patch_embed.pos_embedding, theirs.patch_embed.pos_embedding)


def test_only_the_tensors_that_are_spelt_out_are_looked_at(tmp_path: Path):
    save_file({"a.w": torch.ones(3), "b": torch.ones(2, dtype=torch.int64)}, tmp_path / "x.safetensors")
    files = PristineFiles([tmp_path / "x.safetensors"], torch.bfloat16, {"a.w": "weight", "gone": "bias"})
    assert files.shapes() == {"weight": (3,)}
    assert equal_bits(files("weight"), torch.ones(3, dtype=torch.bfloat16))


# --- what does not go together ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "like", "said"),
    [
        ("tiny-i2v", "tiny-t2v", "8 channels in, by a convolution of 2×2 (there 4 channels in"),
        ("tiny-1.5", "tiny-t2v", "32 numbers in for a patch, by a linear layer as in 1.5 (there 4 channels in"),
        ("tiny-t2v", "tiny-1.5", "16 numbers out for a patch (there 32 numbers out"),
        ("tiny-i2v", "tiny-learned", "no learned positions (there learned positions)"),
        ("tiny-1.5-i2v", "tiny-1.5", "an ofs embedding (there no ofs embedding)"),
        ("tiny-t2v", c.DEMO, "2 blocks (there 6 blocks); a width of 64 (there a width of 192)"),
    ],
)
def test_a_file_of_another_kind_is_refused_with_both_numbers(
    tiny_host: LocalHost, checkpoints: Path, tmp_path: Path, kind: str, like: str, said: str
):
    file = written(tmp_path / "it.safetensors", "comfyui", c.part_files(checkpoints / kind / "transformer")[0])
    with pytest.raises(WrongFamily) as refused:
        base_from_file(tiny_host, file, like)
    assert said in str(refused.value)
    assert f"it.safetensors does not go with {like}" in str(refused.value)


def hollow(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16") -> Path:
    """A file with these tensors at their true size, all of which is a hole that takes no space."""
    header, position = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    head = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        file.truncate(8 + len(head) + position)
    return path


@pytest.mark.parametrize("name", ["CogVideoX-2b", "CogVideoX-5b", "CogVideoX-5b-I2V", "CogVideoX1.5-5B-I2V"])
def test_the_checkpoint_that_would_do_is_named(host: LocalHost, tmp_path: Path, name: str):
    row = CORE[name]
    shapes = {
        pattern.format(b=block): tuple(shape)
        for pattern, shape in row["parameters"].items()
        for block in (range(row["blocks"]) if "{b}" in pattern else (0,))
    }
    file = hollow(tmp_path / "big.safetensors", shapes)
    with pytest.raises(WrongFamily, match=rf"{row['blocks']} blocks \(there 6 blocks\).*made from, such as {name}, to"):
        base_from_file(host, file, c.DEMO)
    file.unlink()  # where holes take space, they take gigabytes


def test_an_adapter_is_not_a_base(host: LocalHost):
    neon = Path(stack_loras(host, ["neon"]).entries[0].adapter)
    with pytest.raises(
        NotAModel, match=r"neon.safetensors is a LoRA adapter, not a base\. Put it among the LoRA files"
    ):
        base_from_file(host, neon, c.DEMO)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.diffusion_model.transformer.layers.0.attention.query_key_value.weight", "names of SAT"),
        (
            "double_blocks.0.img_attn.qkv.weight",
            "no CogVideoX transformer: its tensors have names like double_blocks.0",
        ),
        ("blocks.0.self_attn.q.weight", "no CogVideoX transformer"),
        ("decoder.conv_in.conv.weight", "no CogVideoX transformer"),
    ],
)
def test_another_model_is_named(host: LocalHost, tmp_path: Path, name: str, said: str):
    save_file({name: torch.ones(2, 2)}, tmp_path / "it.safetensors")
    with pytest.raises(NotAModel, match=said):
        base_from_file(host, tmp_path / "it.safetensors", c.DEMO)


def without(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            without("blocks.3.q.weight"),
            r"1 of the 160 tensors of such a transformer are missing; the first is transformer_blocks.3.attn1.to_q.w",
        ),
        (without("norm_final.bias"), r"1 of the 160 tensors .* norm_final.bias"),
        (
            lambda t: t.update({"blocks.0.q.scale_weight": torch.ones(1)}),
            r"such as the scales of quantised weights; the first is blocks.0.q.scale_weight",
        ),
        (lambda t: t.update({"blocks.0.q.comfy_quant": torch.ones(4, dtype=torch.uint8)}), r"scales of quantised"),
        (lambda t: t.update({"blocks.0.x.weight": torch.ones(1)}), r"none of a CogVideoX transformer's"),
        (lambda t: t.update({"blocks.00.q.weight": t["blocks.0.q.weight"].clone()}), r"1 tensors are there twice"),
        (
            lambda t: t.update({"proj_out.bias": torch.ones(3)}),
            r"1 tensors have other shapes than in cogloom-demo; the first is proj_out.bias",
        ),
        (
            lambda t: t.update({"blocks.1.k.weight": t["blocks.1.k.weight"].to(torch.int8)}),
            r"dtypes that are not read .*blocks.1.k.weight",
        ),
        (
            lambda t: t.update({native.TABLE: torch.ones(1, 9, 192)}),
            r"learned positions \(there no learned positions\)",
        ),
    ],
)  # fmt: skip
def test_a_file_that_is_not_whole_is_refused(
    host: LocalHost, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], said: str
):
    tensors = comfy(load_file(DEMO_FILE))
    change(tensors)
    save_file(tensors, tmp_path / "it.safetensors")
    with pytest.raises((NotAModel, WrongFamily), match=said):
        base_from_file(host, tmp_path / "it.safetensors", c.DEMO)


def test_what_is_no_safetensors_file_is_refused(host: LocalHost, tmp_path: Path):
    good = written(tmp_path / "good.safetensors").read_bytes()
    length = struct.unpack("<Q", good[:8])[0]
    files = {
        "empty.safetensors": b"",
        "cut.safetensors": good[: len(good) // 2],
        "long.safetensors": good + b"\0" * 64,
        "short.safetensors": good[:9],
        "header.safetensors": good[:8] + b"}" + good[9:],
        "huge.safetensors": struct.pack("<Q", 1 << 62) + good[8:],
        "twice.safetensors": twice(good, length),
        "pickle.safetensors": b"\x80\x02}q\x00." + b"\0" * 64,
        "zip.safetensors": b"PK\x03\x04" + b"\0" * 64,
        "lfs.safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "page.safetensors": b"<!doctype html><html></html>",
        "model.ckpt": good,
        "model.gguf": b"GGUF" + good,
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(NotAModel) as refused:
            base_from_file(host, tmp_path / name, c.DEMO)
        assert name in str(refused.value)
        assert not any(word in str(refused.value) for word in ("LoRA", "loras convert", "Traceback"))
    with pytest.raises(ModelNotFound, match=r"no file .*gone\.safetensors"):
        base_from_file(host, tmp_path / "gone.safetensors", c.DEMO)
    with pytest.raises(ModelNotFound):
        base_from_file(host, tmp_path, c.DEMO)
    with pytest.raises(CogLoomError, match="No base is called"):
        base_from_file(host, tmp_path / "good.safetensors", "nothing-like-it")
    assert bases.loads == 0


def twice(good: bytes, length: int) -> bytes:
    """The same key twice in the header, of which a careless reader takes the last."""
    header = good[8 : 8 + length].rstrip()
    first = json.loads(header)
    name = next(key for key in first if key != "__metadata__")
    head = header[:-1] + f",{json.dumps(name)}:{json.dumps(first[name])}".encode() + b"}"
    return struct.pack("<Q", len(head)) + head + good[8 + length :]


def test_a_base_without_a_file_is_as_it_was(host: LocalHost):
    base = choose_base(host)
    checkpoint = base.checkpoint()
    assert (base.file, checkpoint.file) == ("", None)
    assert c.transformer_hash(checkpoint) == c.fingerprint(checkpoint.part("transformer"))
    assert c.transformer_weights(checkpoint).nbytes == c.part_bytes(checkpoint.part("transformer"))
    assert replace(base, file="x.safetensors") != base

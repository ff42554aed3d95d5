"""What is written for other programs reads back as it was, to the bit, and these programs compute the same with it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from nodes.engine import native
from nodes.engine.checkpoints import open_checkpoint, part_files
from nodes.engine.errors import AdapterError, UsageError
from nodes.engine.lora_file import Adapter, read
from nodes.engine.lora_kinds import DoRA, Full, LoHa, LoKr, LoRA, Module
from nodes.engine.lora_names import IN_BLOCK, OUTSIDE, layout_of, parse
from nodes.engine.lora_write import TARGETS, best_target, replacing_folder, spell, write
from nodes.engine.pipeline import load_transformer
from nodes.engine.pristine import PristineFiles
from nodes.engine.switch import Switch
from tests import tiny
from tests.engine import layouts

Q, FF, CONV = "transformer_blocks.0.attn1.to_q", "transformer_blocks.1.ff.net.2", "patch_embed.proj"
ATTENTION = [f"transformer_blocks.{b}.attn1.{n}" for b in (0, 1) for n in ("to_q", "to_k", "to_v", "to_out.0")]
EVERY = [*(f"transformer_blocks.{b}.{name}" for b in (0, 11) for name in IN_BLOCK), *OUTSIDE]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3).to(dtype)


def lora(path: str, out: int = 64, into: int = 64, rank: int = 4, scale: float = 0.5, **how: Any) -> LoRA:
    return LoRA(path, random(rank, into, seed=1, **how), random(out, rank, seed=2, **how), scale)


def numbers(module: Module) -> Iterator[object]:
    """Everything that a module is, tensors as dtype, shape and bytes."""
    yield type(module)
    for field in fields(module):
        value = getattr(module, field.name)
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, Module):
                yield from numbers(one)
            elif isinstance(one, torch.Tensor):
                yield one.dtype, tuple(one.shape), one.contiguous().view(torch.uint8).numpy().tobytes()
            else:
                yield one


def same(one: Adapter, other: Adapter) -> None:
    assert [m.name for m in one.modules] == [m.name for m in other.modules]
    for a, b in zip(one.modules, other.modules, strict=True):
        assert list(numbers(a)) == list(numbers(b)), a.name
    assert one.alpha_known


def at(folder: Path, target: str) -> Path:
    return folder / target if TARGETS[target].folder else folder / f"{target}.safetensors"


# --- round trips ------------------------------------------------------------------------------------------------------

READABLE = {  # of the kinds in the corpus: who can express them
    "lora": {"diffusers", "peft", "kohya", "comfyui"},
    "loha": {"peft", "kohya", "comfyui"},
    "lokr": {"kohya", "comfyui"},
    "lora+diff": {"comfyui"},
    "diff": {"comfyui"},
}


@pytest.mark.parametrize("name", [name for name in layouts.names() if "dora" not in name])  # which has no `small`
def test_every_layout_goes_into_every_other_and_back(tmp_path: Path, name: str):
    wanted = {path: (random(4, 64, seed=3), random(64, 4, seed=4)) for path in ATTENTION}
    listed = layouts.listing(name, "tiny", 4)
    only = {t.of for t in listed.tensors.values()}
    source = layouts.small(tmp_path / "source", name, {path: ab for path, ab in wanted.items() if path in only})
    adapter = read(source)
    attention = all(".attn1.to_" in module.path for module in adapter.modules)
    can = READABLE[adapter.kind] | ({"sat"} if adapter.kind == "lora" and attention else set())
    for target in TARGETS:
        path = at(tmp_path, target)
        if target in can:
            same(read(write(path, adapter.modules, target)), adapter)
        else:
            with pytest.raises(AdapterError, match="nothing was written"):
                write(path, adapter.modules, target)
            assert not path.exists()


MODULES: dict[str, Callable[[], Module]] = {
    "bf16": lambda: lora(Q, dtype=torch.bfloat16),
    "fp16": lambda: lora(Q, dtype=torch.float16, scale=1 / 256),
    "mixed": lambda: LoRA(Q, random(4, 64, dtype=torch.bfloat16), random(64, 4), 1.0),
    "rank 3": lambda: lora(Q, rank=3, scale=1 / 3),
    "convolution": lambda: LoRA(CONV, random(4, 8, 2, 2), random(64, 4, 1, 1), 2.0),
    "dora": lambda: DoRA(Q, lora(Q), random(64, seed=5).abs()),
    "dora of a convolution": lambda: DoRA(
        CONV, LoRA(CONV, random(4, 8, 2, 2), random(64, 4, 1, 1), 1.0), random(64, seed=5).abs()
    ),
    "dora by columns": lambda: DoRA(FF, lora(FF, 64, 256), random(256, seed=5).abs(), True),
    "loha": lambda: LoHa(FF, random(64, 3), random(3, 256), random(64, 3, seed=6), random(3, 256), 2.0, (64, 256)),
    "lokr": lambda: LoKr(FF, (random(8, 16),), (random(8, 2), random(2, 16)), 0.25, (64, 256), 2),
    "lokr in full": lambda: LoKr(FF, (random(8, 16),), (random(8, 16),), 1.0, (64, 256), 0),
    "lokr of a convolution": lambda: LoKr(CONV, (random(8, 2),), (random(8, 16),), 1.0, (64, 8, 2, 2), 0),
    "norm": lambda: Full("transformer_blocks.0.norm1.norm", random(64)),
    "bias": lambda: Full(Q, random(64), 1.0, "bias"),
}


@pytest.mark.parametrize("target", list(TARGETS))
@pytest.mark.parametrize("name", list(MODULES))
def test_every_kind_comes_back_or_is_refused(tmp_path: Path, name: str, target: str):
    module = MODULES[name]()
    readable = {"bf16": 5, "fp16": 5, "mixed": 5, "rank 3": 5, "convolution": 4, "dora": 3, "dora of a convolution": 3,
                "dora by columns": 2, "loha": 3, "lokr": 2, "lokr in full": 2, "lokr of a convolution": 2, "norm": 1,
                "bias": 1}  # fmt: skip
    order = ["comfyui", "kohya", "peft", "diffusers", "sat"]
    if order.index(target) < readable[name]:
        adapter = read(write(at(tmp_path, target), [module], target))
        assert [list(numbers(m)) for m in adapter.modules] == [list(numbers(module))]
    else:
        with pytest.raises(AdapterError, match=rf"({re.escape(module.path)}|in full alone).*nothing was written"):
            write(at(tmp_path, target), [module], target)
        assert not list(tmp_path.iterdir())


def test_a_bias_of_lora_b_comes_back_with_its_scale(tmp_path: Path):
    modules = [lora(Q), Full(Q, random(64), 0.5, "bias")]
    for target in ("diffusers", "peft"):
        adapter = read(write(at(tmp_path, target), modules, target))
        assert sorted((m.name, m.strength) for m in adapter.modules) == [(f"{Q}.bias", 0.5), (f"{Q}.weight", 0.5)]
    with pytest.raises(AdapterError, match="ComfyUI's own CogVideoX cannot read a bias of lora_B"):
        write(tmp_path / "x.safetensors", modules, "comfyui")
    with pytest.raises(AdapterError, match="in every layer or in none, and 1 of 2"):
        write(tmp_path / "x.safetensors", [*modules, lora(FF)], "diffusers")


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "sat"])
def test_ranks_and_alphas_of_their_own(tmp_path: Path, target: str):
    modules = [lora(path, rank=rank, scale=scale) for path, rank, scale in
               zip(ATTENTION, (1, 2, 3, 4, 4, 4, 7, 8), (1, 0.5, 1 / 3, 2, 1, 1, 1, 0.01), strict=True)]  # fmt: skip
    adapter = read(write(at(tmp_path, target), modules, target))
    assert {m.path: (m.rank, m.strength) for m in adapter.modules} == {m.path: (m.rank, m.scale) for m in modules}


@given(rank=st.integers(1, 2048), alpha=st.floats(1e-3, 1024), root=st.booleans())
@settings(max_examples=300, deadline=None)
def test_an_alpha_that_was_a_scale_is_that_scale_again(rank: int, alpha: float, root: bool):
    """Whatever number a trainer divided; where no number does, as after √rank, to the last bit but one."""
    scale = alpha / (rank**0.5 if root else rank)
    written = spell([LoRA(Q, torch.ones(rank, 1), torch.ones(1, rank), scale)], "diffusers", {}, "x")
    again = json.loads(written.metadata["lora_adapter_metadata"])["transformer.lora_alpha"] / rank
    assert again == scale if not root else abs(again - scale) <= 2**-52 * scale
    tensors = spell([LoRA(Q, torch.ones(rank, 1), torch.ones(1, rank), scale)], "comfyui", {}, "x").tensors
    assert tensors["diffusion_model.blocks.0.q.alpha"].item() / rank == again


@pytest.mark.parametrize("target", ["diffusers", "peft", "kohya", "comfyui"])
def test_every_layer_has_a_name_that_is_read_back(target: str):
    for path in EVERY:
        key = TARGETS[target].key(path, "A")
        assert key is not None
        name = parse(key)
        assert name is not None
        layout, rest = layout_of(name.stem)
        assert layout.path_of(rest) == path


def test_comfyui_names_are_those_of_its_model():
    for path in EVERY:
        key = TARGETS["comfyui"].key(path, "weight") or ""
        assert native.diffusers_name(key.removeprefix("diffusion_model.")) == f"{path}.weight"


def test_sat_names_are_those_of_its_checkpoints(tmp_path: Path):
    listed = layouts.listing("01-sat-checkpoint", "tiny", 4)
    path = write(tmp_path / "x.safetensors", [lora(path, scale=0.25) for path in ATTENTION], "sat")
    assert load_file(path).keys() == listed.tensors.keys()
    with pytest.raises(AdapterError, match="one rank and one alpha for all layers, and these have ranks 2 to 4"):
        write(tmp_path / "y.safetensors", [lora(ATTENTION[0]), lora(ATTENTION[1], rank=2)], "sat")


# --- in the programs themselves ---------------------------------------------------------------------------------------


def seen(transformer: Any) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    angles = torch.outer(torch.arange(48.0), 0.1 ** torch.linspace(0, 2, 32))
    with torch.no_grad():
        return transformer(
            hidden_states=torch.randn(1, 3, 4, 8, 8, generator=random),
            encoder_hidden_states=torch.randn(1, 24, 64, generator=random),
            timestep=torch.tensor([500]),
            image_rotary_emb=(angles.cos(), angles.sin()),
            return_dict=False,
        )[0]


def mixed(checkpoint: Any) -> list[LoRA]:
    """Several ranks and scales, linear layers and a convolution."""
    shapes = PristineFiles(part_files(checkpoint.part("transformer")), torch.float32).shapes()
    layers = {**tiny.attention(shapes), **tiny.forward(shapes), CONV: shapes[f"{CONV}.weight"]}
    modules = []
    for n, (path, (out, *into)) in enumerate(sorted(layers.items())):
        rank = 2 + n % 3
        kernel = (1,) * (len(into) - 1)
        a, b = random(rank, *into, seed=n), random(out, rank, *kernel, seed=n + 50)
        modules.append(LoRA(path, a, b, (0.5, 1.0, 0.125)[n % 3]))
    return modules


def fused(checkpoint: Any, path: Path) -> torch.Tensor:
    transformer = load_transformer(checkpoint, torch.float32)
    files = part_files(checkpoint.part("transformer"))
    Switch(transformer, PristineFiles(files, torch.float32)).apply([(read(path), 1.0)])
    return seen(transformer)


def agree(one: torch.Tensor, other: torch.Tensor) -> None:
    assert float((one - other).norm() / other.norm()) < 2e-6


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`", "ignore:`torch_dtype` is deprecated")
def test_diffusers_and_peft_compute_the_same(checkpoints: Path, tmp_path: Path):
    from diffusers import CogVideoXPipeline
    from peft import PeftModel

    checkpoint = open_checkpoint(checkpoints / "tiny-t2v")
    modules = mixed(checkpoint)
    ours = fused(checkpoint, write(tmp_path / "d.safetensors", modules, "diffusers"))
    plain = load_transformer(checkpoint, torch.float32)
    assert float((seen(plain) - ours).norm() / ours.norm()) > 1e-2
    pipeline = CogVideoXPipeline.from_pretrained(checkpoint.folder, transformer=plain, local_files_only=True)
    pipeline.load_lora_weights(tmp_path, weight_name="d.safetensors")
    agree(seen(pipeline.transformer), ours)

    folder = tmp_path / "peft"
    write(folder, modules, "peft")
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    model = PeftModel.from_pretrained(load_transformer(checkpoint, torch.float32), str(folder))
    agree(seen(model.base_model.model), ours)
    agree(fused(checkpoint, folder / "adapter_model.safetensors"), ours)


@pytest.mark.parametrize("kind", ["loha", "dora"])
def test_peft_opens_its_other_kinds(checkpoints: Path, tmp_path: Path, kind: str):
    from peft import PeftModel

    checkpoint = open_checkpoint(checkpoints / "tiny-t2v")
    module = MODULES[kind]()
    path = write(tmp_path / "peft", [module], "peft")
    model = PeftModel.from_pretrained(load_transformer(checkpoint, torch.float32), str(path.parent))
    agree(seen(model.base_model.model), fused(checkpoint, path))


# --- files and folders ------------------------------------------------------------------------------------------------


def test_metadata_is_kept_but_for_what_speaks_of_a_scale(tmp_path: Path):
    said = {"modelspec.title": "Neon", "ss_network_alpha": "3", "lora_config": "{}", "cogloom": "{}"}
    adapter = read(write(tmp_path / "x.safetensors", [lora(Q)], "kohya", said))
    assert adapter.metadata == {"modelspec.title": "Neon", "cogloom": "{}"}


def test_the_size_is_known_before(tmp_path: Path):
    modules = [lora(path) for path in ATTENTION]
    for target in ("diffusers", "comfyui"):
        said = {"title": 'a "quoted" é'}
        path = write(tmp_path / f"{target}.safetensors", modules, target, said)
        planned, size = spell(modules, target, said, "").nbytes, path.stat().st_size
        assert size <= planned < size + 400


def test_who_can_read_it_decides_the_layout():
    assert best_target([lora(Q), lora(FF)]) == "diffusers"
    assert best_target([lora(Q), MODULES["norm"]()]) == "comfyui"


def test_what_cannot_be_written(tmp_path: Path):
    with pytest.raises(UsageError, match="'civitai' is no layout to write; there are diffusers, peft"):
        write(tmp_path / "x.safetensors", [lora(Q)], "civitai")
    with pytest.raises(UsageError, match="must end in"):
        write(tmp_path / "x.pt", [lora(Q)])
    with pytest.raises(UsageError, match="PEFT has a folder"):
        write(tmp_path / "x.safetensors", [lora(Q)], "peft")
    with pytest.raises(AdapterError, match="there is no layer to write"):
        write(tmp_path / "x.safetensors", [])
    with pytest.raises(AdapterError, match="or has values that are not finite"):
        write(tmp_path / "x.safetensors", [LoRA(Q, torch.full((1, 4), torch.inf), torch.ones(4, 1), 1.0)])
    with pytest.raises(AdapterError, match="alpha is 400000, not above 0"):
        write(tmp_path / "x.safetensors", [lora(Q, scale=1e5)])
    with pytest.raises(AdapterError, match="one kind of adapter for all layers, and here are DoRA over lora, lora"):
        write(tmp_path / "x", [MODULES["dora"](), lora(FF)], "peft")
    assert not list(tmp_path.iterdir())


def test_a_folder_of_pefts_is_replaced_and_no_other(tmp_path: Path):
    folder = tmp_path / "neon"
    write(folder, [lora(Q)], "peft")
    write(folder, [lora(Q, rank=2)], "peft")
    assert read(folder / "adapter_model.safetensors").ranks == (2,)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"there already, with notes\.txt"):
        write(folder, [lora(Q)], "peft")
    assert read(folder / "adapter_model.safetensors").ranks == (2,)
    assert [p.name for p in tmp_path.iterdir()] == ["neon"]


def test_a_folder_that_fails_is_not_there(tmp_path: Path):
    def half() -> None:
        with replacing_folder(tmp_path / "x") as part:
            (part / "half").write_text("a")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half()
    assert not list(tmp_path.iterdir())
    save_file({"a": torch.ones(1)}, tmp_path / "file")
    with pytest.raises(UsageError, match="there already, with file"), replacing_folder(tmp_path / "file"):
        raise AssertionError

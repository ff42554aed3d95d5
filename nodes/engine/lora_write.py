"""An adapter as other programs want to read it: one record for each way of naming, and the same numbers in all of them.

The reverse of `lora_file`: what is written here reads back as the modules that were given, to the bit of their tensors
and of their scale. What a program cannot express is refused by name and not bent: it would load, and be another
adapter.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import AdapterError, UsageError
from .files import cannot_write, write_atomic
from .lora_kinds import DoRA, Full, LoHa, LoKr, LoRA, Module
from .lora_scale import ALPHA_CAP, ALPHA_KEYS
from .safetensors_file import FLOATS, short
from .safetensors_file import write as write_container

SCALE_KEYS = ("lora_config", "ss_network_alpha", "ss_network_dim", "lora_adapter_metadata", "format")
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"

Name = Callable[[str, str], "str | None"]  # (layer, role) -> key of the tensor; None: this layer has none here

# --- names ------------------------------------------------------------------------------------------------------------

_PEFT = {"A": "lora_A.weight", "B": "lora_B.weight", "bias": "lora_B.bias", "magnitude": "lora_magnitude_vector"}
_KOHYA = {"A": "lora_down.weight", "B": "lora_up.weight"}
_COMFYUI = {  # what ComfyUI's own CogVideoX calls the layers of a block; the reader's table has it the other way round
    "attn1.to_q": "q", "attn1.to_k": "k", "attn1.to_v": "v", "attn1.to_out.0": "attn_out", "attn1.norm_q": "norm_q",
    "attn1.norm_k": "norm_k", "ff.net.0.proj": "ff_proj", "ff.net.2": "ff_out",
}  # fmt: skip
_SAT = {  # layer of a block -> SAT's layer, and which of its matrices; q, k and v are three of one fused projection
    **{f"attn1.to_{x}": ("attention.query_key_value", i) for i, x in enumerate("qkv")},
    "attn1.to_out.0": ("attention.dense", 0),
}
_IN_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)")


def _diffusers(path: str, role: str) -> str:
    return f"transformer.{path}.{_PEFT.get(role, role)}"


def _peft(path: str, role: str) -> str:
    return f"base_model.model.{path}.{_PEFT.get(role, role)}"


def _kohya(path: str, role: str) -> str:
    return f"lora_unet__{path.replace('.', '_')}.{_KOHYA.get(role, role)}"


def _comfyui(path: str, role: str) -> str:
    found = _IN_BLOCK.fullmatch(path)
    its = (
        f"blocks.{found[1]}.{_COMFYUI.get(found[2], found[2])}" if found else path.replace("_embedding.", "_embedding_")
    )
    return f"diffusion_model.{its}.{_KOHYA.get(role, role)}"


def _sat(path: str, role: str) -> str | None:
    found = _IN_BLOCK.fullmatch(path)
    if found is None or found[2] not in _SAT:
        return None
    layer, which = _SAT[found[2]]
    return f"model.diffusion_model.transformer.layers.{found[1]}.{layer}.matrix_{role}.{which}"


@dataclass(frozen=True)
class Target:
    """One program's way. `kinds` are those that it can read: of `lora_kinds`, `bias` for one of lora_B, `dora` for
    magnitudes by rows and `dora columns` for those by columns."""

    name: str
    title: str
    key: Name
    kinds: frozenset[str]
    scale: str  # how it is told: by a `config`, or by `alpha` tensors
    even: bool = False  # one rank and one alpha for all layers
    folder: bool = False


TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        # diffusers drops DoRA's magnitudes with a warning, and refuses files with differences in full.
        Target("diffusers", "diffusers", _diffusers, frozenset({"lora", "bias"}), "config"),
        Target("peft", "PEFT", _peft, frozenset({"lora", "bias", "dora", "loha"}), "config", folder=True),
        Target("kohya", "VideoX-Fun and kohya's scripts", _kohya,
               frozenset({"lora", "loha", "lokr", "dora", "dora columns"}), "alpha"),
        Target("comfyui", "ComfyUI's own CogVideoX", _comfyui,
               frozenset({"lora", "loha", "lokr", "dora", "dora columns", "diff"}), "alpha"),
        # SAT has r and lora_alpha once, in its configuration; the file says them for readers that ask.
        Target("sat", "SAT", _sat, frozenset({"lora"}), "config", even=True),
    )
}  # fmt: skip


def best_target(modules: Iterable[Module]) -> str:
    """diffusers' names where it can read all of it, else ComfyUI's, which takes every kind."""
    target = TARGETS["diffusers"]
    return target.name if all(_kinds(module) <= target.kinds for module in modules) else "comfyui"


def _kinds(module: Module) -> set[str]:
    """What a program has to understand for this module."""
    if isinstance(module, DoRA):
        return {"dora columns" if module.columns else "dora", *_kinds(module.inner)}
    if isinstance(module, Full) and module.of_leaf == "bias" and module.scale != 1.0:
        return {"bias"}
    return {module.kind}


# --- from modules to tensors ------------------------------------------------------------------------------------------


class Written(NamedTuple):
    """What a file will hold."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    config: Mapping[str, Any] | None  # of a folder's adapter_config.json

    @property
    def nbytes(self) -> int:
        """Of the file."""
        entries: dict[str, Any] = {"__metadata__": dict(self.metadata)}
        position = 0
        for name, tensor in self.tensors.items():
            entries[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [position, position]}
            position += tensor.nbytes
            entries[name]["data_offsets"][1] = position
        return 16 + len(json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()) + position


def spell(modules: Sequence[Module], target: str, metadata: Mapping[str, str], file: str) -> Written:
    """The modules as `target` (of TARGETS) has them; `metadata` is kept but for what speaks of a scale.

    Raises:
        UsageError: there is no such target. AdapterError: a module that it cannot express; `file` is for the message.
    """
    if target not in TARGETS:
        raise UsageError(f"{target[:40]!r} is no layout to write; there are {', '.join(TARGETS)}.")
    to = TARGETS[target]

    def fail(sentence: str) -> AdapterError:
        return AdapterError(f"{file}: {sentence}; nothing was written.")

    if not modules:
        raise fail("there is no layer to write")
    kept = {key: text for key, text in metadata.items() if key not in SCALE_KEYS}
    tensors: dict[str, Tensor] = {}
    scaled: list[Module] = []
    for module in modules:
        lacking = sorted(_kinds(module) - to.kinds)
        if lacking:
            others = [t.name for t in TARGETS.values() if all(_kinds(m) <= t.kinds for m in modules)]
            todo = f"write it as {' or '.join(others)}" if others else "no layout takes all of it"
            raise fail(f"{to.title} cannot read {_SAID.get(lacking[0], lacking[0])}, which {module.name} has; {todo}")
        for role, tensor in _parts(module, to):
            key = to.key(module.path, role)
            if key is None:
                raise fail(f"{to.title} has no adapter for {short(module.path)}, only for the attention of the blocks")
            if tensor.dtype not in FLOATS.values() or not bool(torch.isfinite(tensor).all()):
                raise fail(f"{module.name}: its {role} is {tensor.dtype} or has values that are not finite")
            tensors[key] = tensor.detach().cpu()
        if not isinstance(module, Full):
            scaled.append(module)
    alphas = {module.path: _alpha(module, fail) for module in scaled if module.rank}
    for module in scaled:
        if not module.rank and (module.strength != 1.0 or to.scale == "config"):
            raise fail(f"{module.name} has no rank, so {to.title} has no way to say its scale {module.strength:g}")
    if to.scale == "alpha":
        # For all or none, and for a LoKr in full too, to which no alpha applies: readers expect one for each layer.
        for module in scaled:
            tensors[to.key(module.path, "alpha") or ""] = _exact(alphas.get(module.path, 1.0))
        return Written(tensors, kept, None)
    if not scaled:
        raise fail(f"{to.title} reads no adapter that is differences in full alone; write it as comfyui")
    if to.even and len({(module.rank, alphas[module.path]) for module in scaled}) > 1:
        ranks, values = {module.rank for module in scaled}, set(alphas.values())
        raise fail(
            f"{to.title} has one rank and one alpha for all layers, and these have ranks {min(ranks)} to {max(ranks)} "
            f"with alphas {min(values):g} to {max(values):g}; resize it to one rank first"
        )
    config = _config(modules, scaled, alphas, fail)
    kept["format"] = "pt"
    if to.folder:
        return Written(tensors, kept, config)
    prefix = "transformer." if to.name == "diffusers" else ""
    kept["lora_adapter_metadata"] = json.dumps({f"{prefix}{k}": v for k, v in config.items()}, sort_keys=True)
    return Written(tensors, kept, None)


_SAID = {"diff": "differences in full", "dora": "DoRA", "dora columns": "DoRA by columns", "loha": "LoHa",
         "lokr": "LoKr", "bias": "a bias of lora_B"}  # fmt: skip


def _parts(module: Module, to: Target) -> Iterator[tuple[str, Tensor]]:
    """(role, tensor) of everything but the scale."""
    if isinstance(module, LoRA):
        yield from (("A", module.A), ("B", module.B))
    elif isinstance(module, LoHa):
        yield from (("hada_w1_a", module.w1a), ("hada_w1_b", module.w1b))
        yield from (("hada_w2_a", module.w2a), ("hada_w2_b", module.w2b))
    elif isinstance(module, LoKr):
        for side, tensors in (("lokr_w1", module.w1), ("lokr_w2", module.w2)):
            if side == "lokr_w2" and len(tensors) == 1:  # a convolution's kernel goes with its inputs in memory alone
                tensors = (tensors[0].view(tensors[0].shape[0], -1, *module.of[2:]),)
            yield from zip((side,) if len(tensors) == 1 else (f"{side}_a", f"{side}_b"), tensors, strict=True)
    elif isinstance(module, DoRA):
        yield from _parts(module.inner, to)
        sides = len(module.shape) - 1
        if to.name == "peft":
            yield "magnitude", module.magnitude if sides == 1 else module.magnitude.view(1, -1, *(1,) * (sides - 1))
        else:
            yield "dora_scale", module.magnitude.view(*((1, -1) if module.columns else (-1, 1)), *(1,) * (sides - 1))
    elif isinstance(module, Full):
        yield ("diff" if module.of_leaf == "weight" else "diff_b" if module.scale == 1.0 else "bias"), module.diff
    else:
        raise TypeError(type(module))


def _alpha(module: Module, fail: Callable[[str], AdapterError]) -> float:
    """The number that divided by the rank is the scale again, to the bit where there is one: the product may have been
    rounded, and then a neighbour of it is."""
    scale, rank = module.strength, module.rank
    near = scale * rank
    found = [a for a in (near, math.nextafter(near, 0), math.nextafter(near, math.inf)) if a / rank == scale]
    alpha = found[0] if found else near
    if not 0 < alpha <= ALPHA_CAP:
        raise fail(f"{module.path}: alpha is {alpha:g}, not above 0 and up to {ALPHA_CAP:g}")
    return alpha


def _exact(alpha: float) -> Tensor:
    """In float32, as others write it, unless that is another number."""
    single = torch.tensor(alpha, dtype=torch.float32)
    return single if single.item() == alpha else torch.tensor(alpha, dtype=torch.float64)


def _config(
    modules: Sequence[Module],
    scaled: Sequence[Module],
    alphas: Mapping[str, float],
    fail: Callable[[str], AdapterError],
) -> dict[str, Any]:
    """PEFT's configuration, which describes all layers at once."""
    kinds = {module.inner.kind if isinstance(module, DoRA) else module.kind for module in scaled}
    doras = sum(isinstance(module, DoRA) for module in scaled)
    biases = sum("bias" in _kinds(module) for module in modules)
    if len(kinds) > 1 or doras not in (0, len(scaled)):
        raise fail(f"PEFT has one kind of adapter for all layers, and here are {', '.join(sorted(_names(scaled)))}")
    if biases not in (0, len(scaled)):
        raise fail(f"PEFT has a bias of lora_B in every layer or in none, and {biases} of {len(scaled)} have one")
    peft_type = kinds.pop().upper()
    ranks = {module.path: module.rank for module in scaled}
    rank, common = (Counter(table.values()).most_common(1)[0][0] for table in (ranks, alphas))
    # PEFT reads pattern keys as the end of a path. Full paths are never another's end in CogVideoX, and are the one
    # form that old and new PEFT both understand.
    config: dict[str, Any] = {
        "peft_type": peft_type,
        "r": rank,
        ALPHA_KEYS[peft_type]: _plain(common),
        "target_modules": sorted(ranks),
        "rank_pattern": {name: n for name, n in sorted(ranks.items()) if n != rank},
        "alpha_pattern": {name: _plain(n) for name, n in sorted(alphas.items()) if n != common},
    }
    if peft_type == "LORA":
        config |= {"use_rslora": False, "use_dora": doras > 0, "lora_bias": biases > 0, "bias": "none",
                   "lora_dropout": 0.0}  # fmt: skip
    return config


def _names(modules: Iterable[Module]) -> set[str]:
    return {f"DoRA over {m.inner.kind}" if isinstance(m, DoRA) else m.kind for m in modules}


def _plain(value: float) -> int | float:
    return int(value) if float(value).is_integer() else float(value)


# --- to the disk ------------------------------------------------------------------------------------------------------


def write(path: Path, modules: Sequence[Module], target: str = "diffusers", metadata: Mapping[str, str] = {}) -> Path:
    """Write modules in a layout of TARGETS, whole or not at all: a file that ends in .safetensors, or for PEFT a folder
    that is not there yet (or PEFT's own, which is replaced).

    Returns:
        The file with the tensors.

    Raises:
        AdapterError: it cannot be expressed so. UsageError: a name that cannot be written to. DiskFull
    """
    path = Path(path)
    written = spell(modules, target, metadata, path.name)
    if TARGETS[target].folder:
        if path.suffix == ".safetensors":
            raise UsageError(f"{path.name}: {TARGETS[target].title} has a folder; name one without .safetensors.")
        return _write_folder(path, written)
    check_name(path)
    write_container(path, written.tensors, written.metadata)
    return path


def check_name(path: Path) -> None:
    """Raises UsageError."""
    if path.suffix != ".safetensors":
        raise UsageError(f"{path.name}: the file to write must end in .safetensors.")


def _write_folder(folder: Path, written: Written) -> Path:
    """Made beside it, then renamed: a folder with one file of two would load as another adapter."""
    config = {"task_type": None, "base_model_name_or_path": None, "inference_mode": True, **(written.config or {})}
    with replacing_folder(folder, {PEFT_WEIGHTS, PEFT_CONFIG, "README.md"}) as part:
        write_container(part / PEFT_WEIGHTS, written.tensors, written.metadata)
        write_atomic(part / PEFT_CONFIG, json.dumps(config, indent=2, sort_keys=True).encode())
    return folder / PEFT_WEIGHTS


@contextlib.contextmanager
def replacing_folder(folder: Path, ours: Iterable[str] = ()) -> Iterator[Path]:
    """A hidden folder beside `folder`, which becomes `folder` when the body ends well and is removed when it does not.
    One that is there is replaced when it holds nothing but `ours`; else the user would lose what else is in it.

    Raises:
        UsageError: there is something else of that name. DiskFull: for the OSErrors of the body and of the renaming.
    """
    folder, ours = Path(folder).absolute(), frozenset(ours)
    if folder.exists():
        inside = folder.iterdir() if folder.is_dir() else (folder,)
        other = sorted(path.name for path in inside if path.is_dir() or path.name not in ours)
        if other:
            raise UsageError(f"{folder} is there already, with {', '.join(other[:3])}. Name another folder.")
    part = folder.with_name(f".{folder.name[:40]}.{secrets.token_hex(4)}.part")
    try:
        part.mkdir(parents=True)
        yield part
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(part, folder)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError):
            raise cannot_write(folder, error) from error
        raise

"""A LoRA file becomes one canonical adapter, whoever wrote it: parameters of diffusers' model, what is added, and the
true scale.

Three steps: *spelling* (`lora_names` maps foreign names to layers and parts), *scale* (`lora_scale`: an ordered list of
witnesses, the first that speaks decides), *fit* (`fit` compares shapes with the base before anything is touched).
Everything is checked at the door; an `Adapter` in hand can be applied.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .checkpoints import FAMILIES
from .errors import AdapterError, AdapterMismatch, AdapterNotFound, AdapterUnreadable
from .lora_kinds import DoRA, Full, LoHa, LoKr, LoRA, Module
from .lora_names import KIND_OF_ROLE, SAT, Layout, layout_of, of_text_encoder, parse, refused
from .lora_scale import ALPHA_CAP, Case, decide, hints, read_sidecar, sidecar_path
from .safetensors_file import (
    FLOATS,
    HEADER_KEPT,
    WHOLE,
    Content,
    Source,
    Spec,
    opened,
    sha256_of,
    short,
    strict_json,
)
from .safetensors_file import write as write_container

FOLDER_NAMED = ("pytorch_lora_weights", "adapter_model")  # files that every trainer calls the same
WIDTHS = {192: "the embedded demo", 1920: "CogVideoX-2b", 3072: "a 5B base"}
KINDS = ("lora", "loha", "lokr", "dora", "diff")


@dataclass(frozen=True, eq=False)
class Adapter:
    name: str
    path: Path
    layout: str
    kind: str  # of its modules, joined by + where there are several
    modules: tuple[Module, ...]  # sorted by (path, leaf)
    scale_reason: str
    alpha_known: bool
    ranks: tuple[int, ...]  # distinct, ascending
    metadata: Mapping[str, str]  # untrusted text
    tensors_used: int
    tensors_total: int
    unused: tuple[str, ...]
    trigger_words: tuple[str, ...]
    notes: str
    hints: tuple[str, ...]  # what an unknown alpha may have been; shown, never applied
    width: int | None  # of the base it was made for, where the shapes tell
    blocks: int | None
    size_bytes: int
    spelt: Mapping[str, tuple[str, ...]]  # parameter -> the tensors that its module is made of, as the file names them
    content: Content | None  # None where the header alone was read

    @property
    def fingerprint(self) -> str:
        """A cheap id of the content, empty where only the header was read: see `Content.fingerprint`."""
        return self.content.fingerprint if self.content else ""

    @cached_property
    def sha256(self) -> str:
        """Of the whole file; of the very bytes that the modules are made of, where they were read."""
        return self.content.sha256 if self.content else sha256_of(self.path)

    @property
    def nbytes(self) -> int:
        """Of memory that it holds."""
        return self.content.nbytes if self.content else 0


# --- from names and shapes to modules ---------------------------------------------------------------------------------

_EXPECTED = "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight"
_LOKR_SIDES = (("lokr_w1", "lokr_w1_a", "lokr_w1_b"), ("lokr_w2", "lokr_w2_a", "lokr_w2_b"))


class _Layer(NamedTuple):
    """What a file has for one layer."""

    path: str
    keys: Mapping[str, str]  # role -> key
    kind: str  # lora, loha, lokr or diff; empty where it has a difference of the bias alone
    shape: tuple[int, ...]  # of the weight
    rank: int
    columns: bool  # which way the magnitudes go, where it has some


class _Keys(NamedTuple):
    layout: str
    layers: tuple[_Layer, ...]  # sorted by path
    unused: tuple[str, ...]


_known: dict[bytes, _Keys] = {}  # by header; steps that Python makes whole, so there is no lock
_KNOWN = 16


def _keys(source: Source) -> _Keys:
    """Which tensor is what, by names and shapes alone. Remembered, as the header is: it is a tenth of a read's time.

    Raises:
        AdapterUnreadable
    """
    known = _known.get(source.head)
    if known is None:
        known = _sorted_out(source)
        if len(source.head) <= HEADER_KEPT:
            while len(_known) >= _KNOWN:
                _known.pop(next(iter(list(_known)), b""), None)
            _known[source.head] = known
    return known


def _sorted_out(source: Source) -> _Keys:
    file = source.path.name
    unused = [key for key in source.tensors if of_text_encoder(key)]
    ours = [key for key in source.tensors if not of_text_encoder(key)] if unused else list(source.tensors)
    if not ours:
        raise AdapterUnreadable(f"{file}: it adapts the text encoder only, which a CogVideoX adapter never does.")
    layout: Layout | None = None
    parts: dict[str, dict[str, str]] = {}
    leftover = []
    for key in ours:
        name = parse(key)
        if name is None:
            leftover.append(key)
            continue
        its, rest = layout_of(name.stem)
        layout = layout or its
        if its is not layout:
            raise AdapterUnreadable(
                f"{file}: it mixes two layouts, {layout.name} and {its.name} (key {key}); convert it to one."
            )
        path = layout.path_of(rest)
        if path is None:
            raise AdapterUnreadable(
                f"{file}: {key} is spelt as {layout.name} does, but CogVideoX has no layer {short(rest)}. "
                "It was made for another model, or by a trainer that names layers in a way not known yet."
            )
        if parts.setdefault(path, {}).setdefault(name.role, key) != key:
            raise AdapterUnreadable(f"{file}: {key} and {parts[path][name.role]} are the same tensor, given twice.")
    for key in leftover:
        if why := refused(key):
            raise AdapterUnreadable(f"{file}: {key} is {why[0]}, which is not read; {why[1]}.")
    if layout is None:
        raise AdapterUnreadable(
            f"{file}: no LoRA layout is recognised. Its keys look like {', '.join(map(short, ours[:3]))}; "
            f"expected are keys like {_EXPECTED}. It may be a whole model instead of an adapter."
        )
    if layout.name == SAT and leftover:
        raise AdapterUnreadable(
            f"{file}: besides the adapter it holds {len(leftover)} tensors of the base it was trained on, as SAT's "
            f"checkpoints do (key {leftover[0]}). Take the adapter out of it with `python app.py loras convert`."
        )
    layers = tuple(_layer(source, path, parts[path]) for path in sorted(parts))
    return _Keys(layout.name, layers, tuple(sorted([*unused, *leftover])))


def _layer(source: Source, path: str, keys: Mapping[str, str]) -> _Layer:
    """Complete, of one kind, and with shapes that go together; or AdapterUnreadable."""
    specs = {role: source.tensors[key] for role, key in keys.items()}
    kinds = sorted({KIND_OF_ROLE[role] for role in keys if role in KIND_OF_ROLE})
    try:
        if len(kinds) > 1:
            raise ValueError(f"its weight is changed in {len(kinds)} ways at once, as {' and '.join(kinds)}")
        kind = kinds[0] if kinds else ""
        if "alpha" in keys:
            if kind in ("", "diff"):
                raise ValueError(f"{keys['alpha']} belongs to no matrix in the file")
            alpha = specs["alpha"]
            if math.prod(alpha.shape) != 1 or alpha.dtype not in FLOATS | WHOLE:
                raise ValueError(f"{keys['alpha']} is not one number but {alpha.dtype} of shape {alpha.shape}")
        for role, spec in specs.items():
            if role != "alpha" and spec.dtype not in FLOATS:
                raise AdapterUnreadable(
                    f"{source.path.name}: {keys[role]} is {spec.dtype}; convert it to one of {', '.join(FLOATS)}."
                )
        shape, rank = _SHAPES[kind](specs) if kind else ((), 0)
        columns = _magnitudes_are_columns(kind, specs, shape)
        if columns and (len(shape) > 2 or len(specs["dora_scale"].shape) > 2):
            raise AdapterUnreadable(
                f"{source.path.name}: {keys['dora_scale']} goes by the inputs of a convolution, which is not read; "
                "train it with LyCORIS's wd_on_out."
            )
        _check_biases(kind, specs, shape)
    except ValueError as error:
        raise AdapterUnreadable(
            f"{source.path.name}: {path}: {error}. The file is incomplete, damaged, or made of two; get it again."
        ) from None
    return _Layer(path, keys, kind, shape, rank, columns)


def _need(specs: Mapping[str, Spec], *roles: str) -> list[tuple[int, ...]]:
    """The shapes of these roles. Raises ValueError when one is missing."""
    missing = [role for role in roles if role not in specs]
    if missing:
        there = ", ".join(role for role in roles if role in specs) or "the rest"
        raise ValueError(f"it has {there} but no {' and no '.join(missing)} to go with it")
    return [specs[role].shape for role in roles]


def _lora_shape(specs: Mapping[str, Spec]) -> tuple[tuple[int, ...], int]:
    a, b = _need(specs, "A", "B")
    if len(a) not in (2, 4) or len(b) != len(a) or any(n != 1 for n in b[2:]):
        raise ValueError(f"A {a} and B {b} are neither a linear layer's matrices nor a 2-D convolution's")
    if a[0] != b[1]:
        raise ValueError(f"A {a} has rank {a[0]}, but B {b} has rank {b[1]}")
    return (b[0], *a[1:]), a[0]


def _loha_shape(specs: Mapping[str, Spec]) -> tuple[tuple[int, ...], int]:
    first, second = (_product(specs, f"hada_w{i}_a", f"hada_w{i}_b") for i in (1, 2))
    if first[:2] != second[:2]:
        raise ValueError(f"its two products are of shapes {first[:2]} and {second[:2]}")
    return first[:2], first[2]


def _lokr_shape(specs: Mapping[str, Spec]) -> tuple[tuple[int, ...], int]:
    sides, ranks = [], set()
    for whole, left, right in _LOKR_SIDES:
        if whole in specs:
            if left in specs or right in specs:
                raise ValueError(f"it has {whole} both in full and as a product")
            sides.append(specs[whole].shape)
            continue
        out, into, rank = _product(specs, left, right)
        sides.append((out, into))
        ranks.add(rank)
    first, second = sides
    if len(first) != 2 or len(second) not in (2, 4) or len(ranks) > 1:
        raise ValueError(
            f"its sides {first} and {second}, of rank {sorted(ranks) or 'none'}, have no Kronecker product"
        )
    return (first[0] * second[0], first[1] * second[1], *second[2:]), max(ranks, default=0)


def _product(specs: Mapping[str, Spec], left: str, right: str) -> tuple[int, int, int]:
    """(rows, columns, rank) of left (rows, rank) times right (rank, columns)."""
    a, b = _need(specs, left, right)
    if len(a) != 2 or len(b) != 2 or a[1] != b[0]:
        raise ValueError(f"{left} {a} and {right} {b} cannot be multiplied")
    return a[0], b[1], a[1]


def _diff_shape(specs: Mapping[str, Spec]) -> tuple[tuple[int, ...], int]:
    if not 1 <= len(specs["diff"].shape) <= 4:
        raise ValueError(f"diff {specs['diff'].shape} is shaped like no weight")
    return specs["diff"].shape, 0


_SHAPES: Mapping[str, Callable[[Mapping[str, Spec]], tuple[tuple[int, ...], int]]] = {
    "lora": _lora_shape,
    "loha": _loha_shape,
    "lokr": _lokr_shape,
    "diff": _diff_shape,
}


def _magnitudes_are_columns(kind: str, specs: Mapping[str, Spec], of: tuple[int, ...]) -> bool:
    """PEFT's magnitudes go by rows, (out,), for a convolution (1, out, 1, 1). LyCORIS and kohya keep the axes of the
    weight, so that (out, 1) goes by rows and (1, in) by columns, also where the layer is square."""
    role = next((role for role in ("magnitude", "dora_scale") if role in specs), None)
    if role is None:
        return False
    if kind in ("", "diff") or ("magnitude" in specs and "dora_scale" in specs) or "bias" in specs:
        raise ValueError("its magnitudes belong to no matrices, stand there twice, or go with a bias, as no DoRA does")
    shape = specs[role].shape
    if shape and math.prod(shape) == of[0] == max(shape) and (role == "magnitude" or shape[0] == of[0]):
        return False
    if role == "dora_scale" and shape == (1, *of[1:2], *[1] * (len(shape) - 2)):
        return True
    raise ValueError(f"magnitudes {shape} are neither one for each row nor for each column of {of}")


def _check_biases(kind: str, specs: Mapping[str, Spec], of: tuple[int, ...]) -> None:
    if "bias" in specs and "diff_b" in specs:
        raise ValueError("its bias is changed in 2 ways at once, as lora_B.bias and diff_b")
    if "diff_b" in specs and len(specs["diff_b"].shape) != 1:
        raise ValueError(f"diff_b {specs['diff_b'].shape} is shaped like no bias")
    if "bias" in specs and (kind != "lora" or specs["bias"].shape != of[:1]):
        raise ValueError(f"lora_B.bias {specs['bias'].shape} belongs to no matrices of this shape")


def _modules(
    layer: _Layer, tensors: Mapping[str, torch.Tensor], scale: float
) -> Iterator[tuple[Module, tuple[str, ...]]]:
    """The modules of one layer, by leaf, and the keys of the tensors that each is made of."""
    path, keys = layer.path, layer.keys
    parts = {role: tensors[key] for role, key in keys.items() if role != "alpha"}
    for role, strength in (("bias", scale), ("diff_b", 1.0)):
        if role in parts:
            yield Full(path, parts[role], strength, "bias"), (keys[role],)
    if not layer.kind:
        return
    module: Module
    if layer.kind == "lora":
        module = LoRA(path, parts["A"], parts["B"], scale)
    elif layer.kind == "loha":
        w1a, w1b, w2a, w2b = (parts[f"hada_w{i}_{x}"] for i in (1, 2) for x in "ab")
        module = LoHa(path, w1a, w1b, w2a, w2b, scale, layer.shape)
    elif layer.kind == "lokr":
        w1, w2 = (  # a convolution's kernel goes with its inputs: (out, in, height, width) -> (out, in·height·width)
            tuple(parts[role].flatten(1) for role in side if role in parts) for side in _LOKR_SIDES
        )
        module = LoKr(path, w1, w2, scale, layer.shape, layer.rank)
    else:
        module = Full(path, parts["diff"])
    magnitude = parts.get("magnitude", parts.get("dora_scale"))
    if magnitude is not None:
        module = DoRA(path, module, magnitude.flatten(), layer.columns)
    yield module, tuple(key for role, key in keys.items() if role not in ("bias", "diff_b"))


# --- a file, read and written -----------------------------------------------------------------------------------------


def read(path: Path) -> Adapter:
    """The whole file, checked. It is read once, into private memory that the modules are views of.

    Raises:
        AdapterNotFound, AdapterUnreadable
    """
    path = Path(path)
    with opened(path) as source:
        keys = _keys(source)
        sidecar = read_sidecar(path)
        content, adapter = source.read(
            [key for layer in keys.layers for key in layer.keys.values()],
            lambda tensors: _adapter(path, source, keys, sidecar, tensors),
        )
    _bound(adapter, keys, _peaks(path, content))
    return replace(adapter, content=content)


def outline(path: Path) -> Adapter:
    """The adapter without its numbers: header, sidecar and alphas are read, the matrices are on the meta device.

    Raises:
        AdapterNotFound, AdapterUnreadable
    """
    path = Path(path)
    with opened(path) as source:
        keys = _keys(source)
        sidecar = read_sidecar(path)
        hollow = {
            key: torch.empty(spec.shape, dtype=FLOATS[spec.dtype], device="meta")
            for layer in keys.layers
            for role, key in layer.keys.items()
            if role != "alpha" and (spec := source.tensors[key])
        }
        return _adapter(path, source, keys, sidecar, hollow)


def inspect(path: Path, sha256: str | None = None) -> dict[str, Any]:
    """What there is to know about a file, in plain values that JSON can hold: from its header, its sidecar and the few
    numbers that scale it. The matrices are not read; `sha256` is passed on to who has it.

    Raises:
        AdapterNotFound, AdapterUnreadable
    """
    return _described(outline(path), sha256)


def _adapter(
    path: Path,
    source: Source,
    keys: _Keys,
    sidecar: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
) -> Adapter:
    """Of the open file, without its content: of the data only alphas are looked at."""
    named = {layer.keys["alpha"]: layer.path for layer in keys.layers if "alpha" in layer.keys}
    in_order = [key for key in source.tensors if key in named] if named else []
    alphas = {named[key]: value for key, value in source.numbers(in_order).items()}
    scaled = [layer for layer in keys.layers if layer.kind not in ("", "diff")]
    case = Case(
        path,
        source.metadata,
        sidecar,
        alphas,
        ranks={layer.path: layer.rank for layer in scaled},
        kinds={layer.path: layer.kind for layer in scaled},
        doras=frozenset(layer.path for layer in scaled if "magnitude" in layer.keys or "dora_scale" in layer.keys),
        layout=keys.layout,
    )
    scales = decide(case)
    found = [part for layer in keys.layers for part in _modules(layer, tensors, scales.of.get(layer.path, 1.0))]
    modules = tuple(module for module, _ in found)
    return Adapter(
        name=adapter_name(path),
        path=path,
        layout=keys.layout,
        kind=_kind(modules),
        modules=modules,
        scale_reason=scales.reason,
        alpha_known=scales.known,
        ranks=_ranks(modules),
        metadata=source.metadata,
        tensors_used=len(source.tensors) - len(keys.unused),
        tensors_total=len(source.tensors),
        unused=keys.unused,
        trigger_words=_trigger_words(source.metadata, sidecar),
        notes=sidecar.get("notes", ""),
        hints=hints(case, scales, adapter_name(path)),
        width=_width(modules),
        blocks=_blocks(modules),
        size_bytes=source.size,
        spelt={module.name: its for module, its in found},
        content=None,
    )


def _bound(adapter: Adapter, keys: _Keys, peaks: Mapping[str, float]) -> None:
    """Save whoever asks for a module's bound a pass over its values."""
    roles = {layer.path: layer.keys for layer in keys.layers}
    for module in adapter.modules:
        if isinstance(module, LoRA):
            its = roles[module.path]
            bound = peaks[its["A"]] * peaks[its["B"]] * module.rank * abs(module.scale)
            object.__setattr__(module, "bound", bound)  # a value of the cache, not of the frozen ones


def _peaks(path: Path, content: Content) -> dict[str, float]:
    """No element of a tensor is larger than this. Raises AdapterUnreadable where one is not finite."""
    if content.peak is not None and math.isfinite(content.peak):
        return dict.fromkeys(content.tensors, content.peak)
    peaks: dict[str, float] = {}
    for key, tensor in content.tensors.items():
        low, high = map(float, torch.aminmax(tensor))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise AdapterUnreadable(
                f"{path.name}: {key} has values that are not finite (NaN or infinity), so every frame would be black. "
                "Its training diverged; use an earlier checkpoint of it."
            )
        peaks[key] = max(-low, high)
    return peaks


def _trigger_words(metadata: Mapping[str, str], sidecar: Mapping[str, Any]) -> tuple[str, ...]:
    words: Any = sidecar.get("trigger_words")
    try:
        words = strict_json(metadata["cogloom.trigger_words"]) if words is None else words
    except (KeyError, ValueError):
        words = metadata.get("modelspec.trigger_phrase", "").split(",")
    if not isinstance(words, list):
        return ()
    # From strangers: no control characters, nothing that turns the direction of writing, nothing endless.
    clean = ("".join(c for c in str(word)[:256] if c.isprintable()).strip() for word in words[:64])
    return tuple(dict.fromkeys(word for word in clean if word))


def _kind(modules: Iterable[Module]) -> str:
    found = {module.kind for module in modules}
    return "+".join(kind for kind in KINDS if kind in found)


def _ranks(modules: Iterable[Module]) -> tuple[int, ...]:
    return tuple(sorted({module.rank for module in modules} - {0}))


_AS_LONG_AS_WIDE = (  # rows of the weight, numbers of the bias
    "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.2", "norm1.norm", "norm2.norm", "norm_final",
    "norm_out.norm", "patch_embed.proj", "patch_embed.text_proj",
)  # fmt: skip
_TAKES_THE_WIDTH = ("ff.net.0.proj", "proj_out")


def _width(modules: Iterable[Module]) -> int | None:
    seen: Counter[int] = Counter()
    for module in modules:
        if module.path.endswith(_AS_LONG_AS_WIDE):
            seen[module.shape[0]] += 1
        elif module.path.endswith(_TAKES_THE_WIDTH) and len(module.shape) == 2:
            seen[module.shape[1]] += 1
    return seen.most_common(1)[0][0] if seen else None


def _blocks(modules: Iterable[Module]) -> int | None:
    found = (re.match(r"transformer_blocks\.(\d{1,4})\.", module.path) for module in modules)
    return max((int(match[1]) + 1 for match in found if match), default=None)


def _serves(adapter: Adapter) -> list[str]:
    """Names of the bases that it could have been made for, as far as its shapes tell."""
    embed = next((module for module in adapter.modules if module.name == "patch_embed.proj.weight"), None)
    found = []
    for family in FAMILIES:
        # The first generation embeds patches of 2 by 2 with a convolution, 1.5 flattened ones with a linear layer.
        flat = family.in_channels * 4 * (family.patch_size_t or 1)
        takes = (family.in_channels, 2, 2) if family.patch_size_t is None else (flat,)
        if (
            adapter.width == family.width
            and (adapter.blocks or 0) <= family.blocks
            and (embed is None or _suits(embed, (family.width, *takes)))
        ):
            found.append(family.name)
    return found


def describe(adapter: Adapter) -> dict[str, Any]:
    """Plain values for a face to show. The texts among them are untrusted: escape before any HTML."""
    return _described(adapter, adapter.sha256)


def _described(adapter: Adapter, sha256: str | None) -> dict[str, Any]:
    scales = sorted({module.strength for module in adapter.modules if module.kind != "diff"}) or [1.0]
    uniform = len(adapter.ranks) < 2
    return {
        "name": adapter.name,
        "file": adapter.path.name,
        "kind": adapter.kind,
        "layout": adapter.layout,
        "rank": max(adapter.ranks, default=0) if uniform else list(adapter.ranks),
        "scale": scales[0] if len(scales) == 1 else [scales[0], scales[-1]],  # one number, or from and to
        "scale_reason": adapter.scale_reason,
        "alpha_known": adapter.alpha_known,
        "hints": list(adapter.hints),
        "modules": len(adapter.modules),
        **({} if uniform else {"rank_per_module": {m.name: m.rank for m in adapter.modules if m.rank}}),
        "tensors_used": adapter.tensors_used,
        "tensors_total": adapter.tensors_total,
        "unused": list(adapter.unused),
        "width": adapter.width,
        "blocks": adapter.blocks,
        "fits": _serves(adapter),
        "trigger_words": list(adapter.trigger_words),
        "notes": adapter.notes,
        "sha256": sha256,
        "size_bytes": adapter.size_bytes,
        "metadata": dict(adapter.metadata),
    }


def write(
    path: Path,
    modules: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    alpha: float | Mapping[str, float],
    metadata: Mapping[str, str],
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Write module path -> (A, B) in the diffusers format, so that diffusers >= 0.34 scales it right as well.

    Raises:
        AdapterError: matrices that this reader would refuse; nothing is written.
        DiskFull
    """
    path, tensors = Path(path), {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}

    def fail(sentence: str) -> AdapterError:
        return AdapterError(f"{path.name}: {sentence}; nothing was written.")

    if not modules or path.suffix != ".safetensors" or dtype not in FLOATS.values():
        raise fail(f"needs at least one layer ({len(modules)}), a name in .safetensors and a float dtype ({dtype})")
    for name, (a, b) in modules.items():
        alphas[name] = value = alpha.get(name, 0.0) if isinstance(alpha, Mapping) else float(alpha)
        if a.ndim not in (2, 4) or b.ndim != a.ndim or a.shape[0] != b.shape[1] or any(n != 1 for n in b.shape[2:]):
            raise fail(f"{name}: A {tuple(a.shape)} and B {tuple(b.shape)} do not go together")
        if not 0 < value <= ALPHA_CAP:
            raise fail(f"{name}: alpha is {value}, not above 0 and up to {ALPHA_CAP:g}")
        ranks[name] = a.shape[0]
        for side, tensor in (("A", a), ("B", b)):
            tensors[f"transformer.{name}.lora_{side}.weight"] = kept = tensor.detach().to("cpu", dtype)
            if not bool(torch.isfinite(kept).all()):
                raise fail(f"{name}: {side} has values that are not finite in {dtype}")
    rank, common = (Counter(table.values()).most_common(1)[0][0] for table in (ranks, alphas))
    # PEFT reads pattern keys as the end of a path. Full paths are never another's end in CogVideoX, and are the one
    # form that old and new PEFT both understand.
    config = {
        "r": rank,
        "lora_alpha": _plain(common),
        "target_modules": sorted(modules),
        "rank_pattern": {name: n for name, n in sorted(ranks.items()) if n != rank},
        "alpha_pattern": {name: _plain(n) for name, n in sorted(alphas.items()) if n != common},
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": False,
        "bias": "none",
        "lora_dropout": 0.0,
    }
    said = json.dumps({f"transformer.{key}": value for key, value in config.items()}, sort_keys=True)
    write_container(path, tensors, {**metadata, "format": "pt", "lora_adapter_metadata": said})
    return path


def _plain(value: float) -> int | float:
    return int(value) if float(value).is_integer() else float(value)


# --- which file, and for which base -----------------------------------------------------------------------------------


def adapter_name(path: Path) -> str:
    return path.parent.name if path.stem.lower() in FOLDER_NAMED and path.parent.name else path.stem


def stamp(path: Path) -> tuple[int, ...]:
    """Changes with the file and with what beside it says its scale: size and mtime of each, 0 where there is none."""
    found: list[int] = []
    for file in (path, sidecar_path(path), path.with_name("adapter_config.json")):
        try:
            status = os.stat(file)
            found += [status.st_size, status.st_mtime_ns]
        except OSError:
            found += [0, 0]
    return tuple(found)


def find_adapters(folders: Iterable[Path]) -> list[Path]:
    """Every .safetensors file below the folders, sorted. Links are followed, as ComfyUI does; circles are not."""
    return sorted({file for _, file in listed_in(folders)}, key=lambda file: (str(file).lower(), str(file)))


def listed_in(folders: Iterable[Path]) -> list[tuple[str, Path]]:
    """(relative name with forward slashes, file), sorted. Of two files with one name, the one in the earlier folder
    counts."""
    files: dict[str, Path] = {}
    for root in folders:
        seen: set[str] = set()
        for folder, below, names in os.walk(root, followlinks=True):
            real = os.path.realpath(folder)
            if real in seen:
                below.clear()
                continue
            seen.add(real)
            for name in names:
                if name.lower().endswith(".safetensors") and not name.startswith("."):
                    file = Path(folder, name)
                    files.setdefault(file.relative_to(root).as_posix(), file)
    return sorted(files.items())


def resolve(name: str, folders: Iterable[Path]) -> Path:
    """The file that a listed name means: a relative path, a file name or an adapter's name, with or without suffix.

    Only files below the folders can be found. Raises AdapterNotFound, also when several would do.
    """
    folders = tuple(folders)
    listed = listed_in(folders)
    asked = name.replace("\\", "/").strip().removeprefix("./")

    def whole(relative: str, file: Path) -> set[str]:
        return {relative, relative[: -len(file.suffix)]}

    def short(relative: str, file: Path) -> set[str]:
        return {file.name, file.stem, adapter_name(file)}

    for fold in (str, str.casefold):
        for spellings in (whole, short):
            hits = [item for item in listed if fold(asked) in {fold(text) for text in spellings(*item)}]
            if len(hits) > 1:
                several = ", ".join(relative for relative, _ in hits[:6])
                raise AdapterNotFound(f"{asked!r} may mean {len(hits)} adapters: {several}. Name one of them in full.")
            if hits:
                return hits[0][1]
    where = ", ".join(str(folder) for folder in folders) or "no folder"
    names = sorted({adapter_name(file) for _, file in listed})
    near = difflib.get_close_matches(asked[:200], names, n=3, cutoff=0.3) or names[:3]
    hint = f"The nearest names are {', '.join(near)}." if near else "There are no .safetensors files there; add one."
    raise AdapterNotFound(f"There is no adapter {asked[:200]!r} in {where}. {hint}")


def resolve_path(text: str, folders: Iterable[Path]) -> Path:
    """For a person at the command line: any file of theirs, or a trainer's output folder; else as `resolve`."""
    path = Path(os.path.abspath(Path(text).expanduser()))  # links stay: the Hub's cache keeps the suffix in them alone
    candidates = (path, *(path / f"{name}.safetensors" for name in FOLDER_NAMED))
    return next((file for file in candidates if file.is_file()), None) or resolve(text, folders)


def fit(
    adapter: Adapter,
    shapes: Mapping[str, tuple[int, ...]],
    base_name: str,
    width: int,
    blocks: int,
    partial: bool = False,
) -> Adapter:
    """The adapter, when every module fits the base; with `partial`, its share that does, if there is any.

    `shapes`: of every parameter of the base, by name. What a partial use leaves out is added to `unused`, by the names
    that the file has for it.

    Raises:
        AdapterMismatch
    """
    misfits = [module for module in adapter.modules if not _suits(module, shapes.get(module.name))]
    if not misfits:
        return adapter
    lost = {key for module in misfits for key in adapter.spelt[module.name]}
    total, some = adapter.tensors_used, len(misfits) < len(adapter.modules)
    if partial and some:
        out = {module.name for module in misfits}
        kept = tuple(module for module in adapter.modules if module.name not in out)
        return replace(
            adapter,
            modules=kept,
            kind=_kind(kept),
            ranks=_ranks(kept),
            spelt={module.name: adapter.spelt[module.name] for module in kept},
            tensors_used=total - len(lost),
            unused=tuple(sorted({*adapter.unused, *lost})),
        )
    head = f"{adapter.path.name}: {total - len(lost)} of {total} tensors fit {base_name} (width {width})"
    allow = f", or allow partial use of the {total - len(lost)} that fit (NAME[partial])" if some else ""
    if adapter.width not in (None, width):
        origin = f"so it was made for {WIDTHS[adapter.width]}" if adapter.width in WIDTHS else "which no known base has"
        todo = f" Choose the base that it was trained on{allow}." if some else ""
        raise AdapterMismatch(f"{head}; the file's width is {adapter.width}, {origin}.{todo}")
    first = "; ".join(_misfit(module, shapes.get(module.name)) for module in misfits[:3])
    deep = (
        f" The file goes up to block {adapter.blocks}, the base has {blocks}." if (adapter.blocks or 0) > blocks else ""
    )
    raise AdapterMismatch(
        f"{head}; the first that do not: {first}.{deep} Choose the base that it was trained on{allow}."
    )


def _suits(module: Module, wanted: tuple[int, ...] | None) -> bool:
    made_for = module.shape
    if wanted is None or wanted == made_for:
        return wanted is not None
    # LoHa and LoKr flatten a convolution's kernel, and keep nothing that tells how.
    inner = module.inner if isinstance(module, DoRA) else module
    flat = (wanted[0], math.prod(wanted[1:])) == made_for
    return flat and len(wanted) == 4 and isinstance(inner, (LoHa, LoKr))


def _misfit(module: Module, wanted: tuple[int, ...] | None) -> str:
    name = short(module.path if module.leaf == "weight" else module.name)
    return f"{name} (no such layer)" if wanted is None else f"{name} (made for {module.shape}, here {tuple(wanted)})"

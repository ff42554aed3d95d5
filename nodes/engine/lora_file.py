"""A LoRA file becomes one canonical adapter, whoever wrote it: module paths of diffusers, A and B, and the true scale.

Three steps: *spelling* (a `Layout` maps foreign key names to module paths), *scale* (an ordered list of witnesses, the
first that speaks decides), *fit* (`check_fits` compares shapes with the base before anything is touched). Everything
is checked at the door; an `Adapter` in hand can be applied.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .errors import AdapterError, AdapterMismatch, AdapterNotFound, AdapterUnreadable
from .lora_scale import ALPHA_CAP, Case, decide, read_sidecar, sidecar_path
from .safetensors_file import FLOATS, WHOLE, Source, opened, strict_json
from .safetensors_file import write as write_container

FOLDER_NAMED = ("pytorch_lora_weights", "adapter_model")  # files that every trainer calls the same
WIDTHS = {192: "the embedded demo", 1920: "CogVideoX-2b", 3072: "a 5B base"}


@dataclass(frozen=True, eq=False)
class Module:
    """What the adapter adds to one layer at weight 1.0: scale · B·A, shaped as the layer's weight.

    Linear: A (r, in), B (out, r). Convolution: A (r, in, kh, kw), B (out, r, 1, 1).
    """

    path: str
    A: torch.Tensor
    B: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]


@dataclass(frozen=True, eq=False)
class Adapter:
    name: str
    path: Path
    sha256: str  # of the whole file
    layout: str
    modules: tuple[Module, ...]  # sorted by path
    scale_reason: str
    alpha_known: bool
    ranks: tuple[int, ...]  # distinct, ascending
    metadata: Mapping[str, str]  # untrusted text
    tensors_used: int
    tensors_total: int
    unused: tuple[str, ...]
    trigger_words: tuple[str, ...]
    notes: str
    width: int | None  # of the base it was made for, where the shapes tell
    blocks: int | None
    size_bytes: int


# --- spelling ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """One way of naming tensors. Adding one is adding a record."""

    name: str
    matches: Callable[[str], bool]
    path_of: Callable[[str], tuple[str, str] | None] = lambda key: None  # key -> (module path, "A" | "B" | "alpha")
    refusal: str = ""  # why it is not read, and what to do


def _spelt(name: str, prefix: str, down: str, up: str) -> Layout:
    pattern = re.compile(rf"{prefix}(?P<path>.+?)\.(?:(?P<A>{down})|(?P<B>{up})|(?P<alpha>alpha))")

    def path_of(key: str) -> tuple[str, str] | None:
        found = pattern.fullmatch(key)
        return (found["path"], str(found.lastgroup)) if found else None

    def matches(key: str) -> bool:
        part = path_of(key)
        return part is not None and part[1] != "alpha"  # an alpha is named alike in several layouts

    return Layout(name, matches, path_of)


def _refused(name: str, pattern: str, todo: str) -> Layout:
    found = re.compile(pattern).search
    return Layout(name, lambda key: found(key) is not None, refusal=todo)


_CONVERT = "convert it to the diffusers format (keys like {expected})"
_EXPECTED = "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight"
_PEFT = (r"lora_A(?:\.default)?\.weight", r"lora_B(?:\.default)?\.weight")

# In this order: what changes the arithmetic is refused first, wherever it stands; the bare spelling, which could be
# anything's, comes last.
LAYOUTS: tuple[Layout, ...] = (
    _refused("DoRA", r"\.dora_scale$|\.lora_magnitude_vector", "train or export it without DoRA"),
    _refused("LyCORIS LoHa", r"\.hada_[wt]\d", "extract a plain LoRA from it with LyCORIS"),
    _refused("LyCORIS LoKr", r"\.lokr_[wt]\d", "extract a plain LoRA from it with LyCORIS"),
    _refused("LyCORIS LoCon with a middle matrix", r"\.lora_mid\.", "extract a plain LoRA from it with LyCORIS"),
    _refused("LoRA with biases", r"\.lora_B(?:\.default)?\.bias$", "train it with lora_bias=False"),
    _refused("full-rank differences", r"\.diff(?:_b)?$", "extract a plain LoRA from it"),
    _refused("SAT checkpoint", r"\.matrix_[AB]\.\d", "export it with CogVideoX's tools/export_sat_lora_weight.py"),
    _refused("ComfyUI's own names", r"^diffusion_model\.", _CONVERT),
    _refused("kohya or VideoX-Fun", r"^lora_unet_", _CONVERT),
    _spelt("diffusers", r"transformer\.", *_PEFT),
    _spelt("diffusers, older", r"transformer\.", r"lora\.down\.weight", r"lora\.up\.weight"),
    _spelt("PEFT model", r"base_model\.model\.", *_PEFT),
    _spelt("PEFT", "", *_PEFT),
)
_TEXT_ENCODER = re.compile(r"text_encoder(?:_\d)?\.|lora_te\d?_")


class _Keys(NamedTuple):
    layout: str
    pairs: dict[str, tuple[str, str]]  # module path -> keys of A and B, sorted by path
    alphas: dict[str, str]  # module path -> key
    unused: tuple[str, ...]


def _keys(source: Source) -> _Keys:
    """Which tensor is what, by names and shapes alone. Raises AdapterUnreadable."""
    file, ours = source.path.name, [key for key in source.tensors if not _TEXT_ENCODER.match(key)]
    if not ours:
        raise AdapterUnreadable(f"{file}: it adapts the text encoder only, which a CogVideoX adapter never does.")
    layout = next((row for row in LAYOUTS for key in ours if row.matches(key)), None)
    if layout is None:
        raise AdapterUnreadable(
            f"{file}: no LoRA layout is recognised. Its keys look like {', '.join(ours[:3])}; "
            f"expected are keys like {_EXPECTED}. It may be a whole model instead of an adapter."
        )
    if layout.refusal:
        example = next(key for key in ours if layout.matches(key))
        todo = layout.refusal.format(expected=_EXPECTED)
        raise AdapterUnreadable(f"{file}: its layout is {layout.name} (key {example}), which is not read yet; {todo}.")
    parts: dict[str, dict[str, str]] = {}
    unused = [key for key in source.tensors if _TEXT_ENCODER.match(key)]
    for key in ours:
        part = layout.path_of(key)
        if part is None:
            other = next((row for row in LAYOUTS if row.matches(key)), None)
            if other is not None:
                raise AdapterUnreadable(
                    f"{file}: it mixes two layouts, {layout.name} and {other.name} (key {key}); convert it to one."
                )
            if key.endswith(".alpha"):
                raise AdapterUnreadable(f"{file}: {key} belongs to no matrix in the file; get the file again.")
            unused.append(key)
        elif parts.setdefault(part[0], {}).setdefault(part[1], key) != key:
            raise AdapterUnreadable(f"{file}: {key} and {parts[part[0]][part[1]]} are the same matrix, given twice.")
    for path, part in parts.items():
        _check_part(source, path, part)
    return _Keys(
        layout.name,
        {path: (parts[path]["A"], parts[path]["B"]) for path in sorted(parts)},
        {path: part["alpha"] for path, part in parts.items() if "alpha" in part},
        tuple(sorted(unused)),
    )


def _check_part(source: Source, path: str, part: Mapping[str, str]) -> None:
    def refuse(sentence: str) -> None:
        raise AdapterUnreadable(f"{source.path.name}: {sentence}. The file is incomplete or damaged; get it again.")

    for side in "AB":
        if side not in part:
            refuse(f"{path} has {', '.join(sorted(part.values()))} but no matrix {side} to go with it")
        dtype = source.tensors[part[side]].dtype
        if dtype not in FLOATS:
            raise AdapterUnreadable(
                f"{source.path.name}: {part[side]} is {dtype}; convert it to one of {', '.join(FLOATS)}."
            )
    a, b = source.tensors[part["A"]].shape, source.tensors[part["B"]].shape
    if len(a) not in (2, 4) or len(b) != len(a) or any(n != 1 for n in b[2:]):
        refuse(f"{path}: A {a} and B {b} are neither a linear layer's matrices nor a 2-D convolution's")
    if a[0] != b[1]:
        refuse(f"{path}: A {a} has rank {a[0]}, but B {b} has rank {b[1]}")
    if "alpha" in part:
        alpha = source.tensors[part["alpha"]]
        if math.prod(alpha.shape) != 1 or alpha.dtype not in FLOATS | WHOLE:
            refuse(f"{part['alpha']} is not one number but {alpha.dtype} of shape {alpha.shape}")


# --- a file, read and written -----------------------------------------------------------------------------------------


def read(path: Path) -> Adapter:
    """The whole file, checked. It is read once, and `sha256` is of the very bytes that the matrices are made of.

    Raises:
        AdapterNotFound, AdapterUnreadable
    """
    return _load(Path(path), data=True)


def inspect(path: Path) -> dict[str, Any]:
    """What there is to know about a file, in plain values that JSON can hold. Matrices are hashed but not kept.

    Raises:
        AdapterNotFound, AdapterUnreadable
    """
    return describe(_load(Path(path), data=False))


def _load(path: Path, data: bool) -> Adapter:
    with opened(path) as source:
        keys = _keys(source)
        matrices = {key for pair in keys.pairs.values() for key in pair}
        sidecar = read_sidecar(path)
        tensors, sha256 = source.read({*keys.alphas.values(), *(matrices if data else ())})
    for key in matrices - tensors.keys():
        spec = source.tensors[key]
        tensors[key] = torch.empty(spec.shape, dtype=FLOATS[spec.dtype], device="meta")
    if data:
        _check_finite(path, {key: tensors[key] for key in matrices})
    # In float: the quotient of an alpha kept in bf16 would be rounded to 8 bits.
    alphas = {module: float(tensors[key].item()) for module, key in keys.alphas.items()}
    ranks = {module: tensors[a].shape[0] for module, (a, _) in keys.pairs.items()}
    scales = decide(Case(path, source.metadata, sidecar, alphas, ranks))
    modules = tuple(Module(m, tensors[a], tensors[b], scales.of[m]) for m, (a, b) in keys.pairs.items())
    return Adapter(
        name=adapter_name(path),
        path=path,
        sha256=sha256,
        layout=keys.layout,
        modules=modules,
        scale_reason=scales.reason,
        alpha_known=scales.known,
        ranks=tuple(sorted(set(ranks.values()))),
        metadata=source.metadata,
        tensors_used=len(source.tensors) - len(keys.unused),
        tensors_total=len(source.tensors),
        unused=keys.unused,
        trigger_words=_trigger_words(source.metadata, sidecar),
        notes=sidecar.get("notes", ""),
        width=_width(modules),
        blocks=_blocks(modules),
        size_bytes=source.size,
    )


def _check_finite(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    for key, tensor in tensors.items():
        low, high = torch.aminmax(tensor)  # one pass, hands NaN on; 20 times faster than isfinite().all()
        if not (math.isfinite(low) and math.isfinite(high)):
            raise AdapterUnreadable(
                f"{path.name}: {key} has values that are not finite (NaN or infinity), so every frame would be black. "
                "Its training diverged; use an earlier checkpoint of it."
            )


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


def _width(modules: tuple[Module, ...]) -> int | None:
    takes = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj")
    gives = ("ff.net.2", "patch_embed.proj", "patch_embed.text_proj")
    seen = Counter(m.A.shape[1] for m in modules if m.path.endswith(takes))
    seen += Counter(m.B.shape[0] for m in modules if m.path.endswith(gives))
    return seen.most_common(1)[0][0] if seen else None


def _blocks(modules: tuple[Module, ...]) -> int | None:
    found = (re.match(r"transformer_blocks\.(\d{1,4})\.", module.path) for module in modules)
    return max((int(match[1]) + 1 for match in found if match), default=None)


def describe(adapter: Adapter) -> dict[str, Any]:
    """Plain values for a face to show. The texts among them are untrusted: escape before any HTML."""
    scales = sorted({module.scale for module in adapter.modules})
    return {
        "name": adapter.name,
        "file": adapter.path.name,
        "kind": "lora",
        "layout": adapter.layout,
        "rank": adapter.ranks[0] if len(adapter.ranks) == 1 else list(adapter.ranks),
        "scale": scales[0] if len(scales) == 1 else [scales[0], scales[-1]],  # one number, or from and to
        "scale_reason": adapter.scale_reason,
        "alpha_known": adapter.alpha_known,
        "modules": len(adapter.modules),
        "tensors_used": adapter.tensors_used,
        "tensors_total": adapter.tensors_total,
        "unused": list(adapter.unused),
        "width": adapter.width,
        "blocks": adapter.blocks,
        "fits": WIDTHS.get(adapter.width or 0, "unknown"),
        "trigger_words": list(adapter.trigger_words),
        "notes": adapter.notes,
        "sha256": adapter.sha256,
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
    return sorted({file for _, file in _listed(folders)}, key=lambda file: (str(file).lower(), str(file)))


def _listed(folders: Iterable[Path]) -> list[tuple[str, Path]]:
    """(relative name, file). Of two files with one relative name, the one in the earlier folder counts."""
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
    listed = _listed(folders)
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


def check_fits(
    adapter: Adapter, shapes: Mapping[str, tuple[int, ...]], base_name: str, width: int, blocks: int
) -> None:
    """`shapes`: weight shape per linear and convolution of the base. Every module must fit; raises AdapterMismatch."""
    misfits = []
    for module in adapter.modules:
        wanted, made_for = shapes.get(module.path), (module.B.shape[0], *module.A.shape[1:])
        if wanted is None:
            misfits.append(f"{module.path} (no such layer)")
        elif tuple(wanted) != made_for:
            misfits.append(f"{module.path} (made for {made_for}, here {tuple(wanted)})")
    if not misfits:
        return
    total = 2 * len(adapter.modules)
    head = f"{adapter.path.name}: {total - 2 * len(misfits)} of {total} tensors fit {base_name} (width {width})"
    if adapter.width not in (None, width):
        origin = f"so it was made for {WIDTHS[adapter.width]}" if adapter.width in WIDTHS else "which no known base has"
        raise AdapterMismatch(f"{head}; the file's width is {adapter.width}, {origin}.")
    deep = (
        f" The file goes up to block {adapter.blocks}, the base has {blocks}." if (adapter.blocks or 0) > blocks else ""
    )
    raise AdapterMismatch(
        f"{head}; the first that do not: {'; '.join(misfits[:3])}.{deep} Choose the base that it was trained on."
    )

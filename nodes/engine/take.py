"""What a training left behind, and where the weights are in it: one record for each way of leaving it.

    find(source)             -> Found: what it is, and the files that hold weights
    gather(found, folder)    -> Adapted, a readable adapter; or Whole, files of a fine-tuned transformer

Pickles are opened in a process of their own (`take_worker`). Safetensors are read by their headers, and of an adapter's
file only the adapter's tensors: a state of gigabytes costs what the adapter in it weighs.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import lora_file, native
from .checkpoints import part_files
from .errors import AdapterError, AdapterNotFound, AdapterUnreadable, NotAModel, ResumeError, UsageError
from .lora_file import Adapter
from .lora_kinds import LoRA
from .lora_names import SAT, layout_of, parse
from .lora_scale import sidecar_path
from .safetensors_file import FLOATS, Spec, opened, quoted, short
from .safetensors_file import write as write_container
from .sat import taken
from .selection import Checkpoint, checkpoints_of
from .train_state import whole_state

WORKER = Path(__file__).with_name("take_worker.py")
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
NEWEST, BEST = "newest", "best"

_SMALL = 1 << 16  # bytes of a `latest` or a state.json's neighbour
_TRAINED = re.compile(r"checkpoint[-_](\d{1,9})", re.ASCII)
_STEP = re.compile(r"(?:checkpoint|global_step|iter|step|epoch)[-_]?(\d{1,9})", re.ASCII)
_WRAPPED = re.compile(r"^(?:(?:module|_orig_mod|_fsdp_wrapped_module|model)\.)+(?!diffusion_model\.)")
_INSIDE = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_NAMED = re.compile(
    r".*\.(?:lora_A|lora_B|lora_magnitude_vector|hada_w\d_[ab]|lokr_w\d(?:_[ab])?)\.([A-Za-z0-9_-]+)(?:\.\w+)?"
)
_NO_NAME = ("weight", "bias")


@dataclass(frozen=True)
class Found:
    """`files` are what holds the weights: safetensors, pickles, or one folder that DeepSpeed made for a tag."""

    kind: str
    title: str
    files: tuple[Path, ...]
    folder: Path  # whose adapter_config.json speaks for the scale
    step: int | None = None


# --- what it is -------------------------------------------------------------------------------------------------------


def find(source: Path, which: str | int = NEWEST) -> Found:
    """What lies at `source`, a file or a folder. `which`, of a folder with several checkpoints: `newest`, `best` (by
    the validation that training wrote down) or a step.

    Raises:
        AdapterNotFound: nothing is there, or nothing that is known. UsageError: a step that is not there.
    """
    source = Path(source)
    if source.is_file():
        pickled = source.suffix.lower() in PICKLES
        title = "a checkpoint in one file" if pickled else "a file of weights"
        tag = source.parent if pickled and source.name.endswith("_model_states.pt") else None
        step = _step_in(source.stem, source.parent.name)
        return Found("file", title, (tag if tag and _shared(tag) else source,), source.parent, step)
    if not source.is_dir():
        raise AdapterNotFound(f"{source}: there is no such file or folder. Name what training left behind.")
    for look in LOOKS:
        found = look(source, which)
        if found is not None:
            return found
    names = ", ".join(sorted(path.name for path in source.iterdir())[:6]) or "nothing"
    raise AdapterNotFound(
        f"{source.name}: nothing that training leaves behind is known in it; it holds {names[:300]}. Known are the "
        "folders of `train`, of PEFT and diffusers, of accelerate's save_state, of DeepSpeed and SAT, whole "
        "checkpoints, and single files."
    )


def _run(folder: Path, which: str | int) -> Found | None:
    """Ours: checkpoints with a state in JSON."""
    if (folder / "state.json").is_file() and (folder / "adapter.safetensors").is_file():
        return Found("checkpoint", "a checkpoint of a training run", (folder / "adapter.safetensors",), folder,
                     _step_in(folder.name))  # fmt: skip
    if not any(_TRAINED.fullmatch(path.name) and (path / "state.json").is_file() for path in _below(folder)):
        return None
    chosen = _chosen(checkpoints_of(folder), which, folder.name)
    return Found("run", "a training run", (chosen.adapter,), folder, chosen.step)


def _chosen(there: Sequence[Checkpoint], which: str | int, name: str) -> Checkpoint:
    if which == NEWEST:
        return there[-1]
    if which == BEST:
        measured = [one for one in there if one.validation is not None]
        if not measured:
            raise UsageError(f"{name}: no checkpoint has a validation loss, so none is known as the best; name a step.")
        return min(measured, key=lambda one: (one.validation, one.step))
    for one in there:
        if str(one.step) == str(which):
            return one
    steps = ", ".join(str(one.step) for one in there[-8:])
    raise UsageError(f"{name} has no checkpoint {str(which)[:20]!r}; say newest, best or a step, such as {steps}.")


def _trainer(folder: Path, which: str | int) -> Found | None:
    """Another trainer's: folders named by steps, each of a kind that is known."""
    steps = {int(match[1]): path for path in _below(folder) if (match := _TRAINED.fullmatch(path.name))}
    if not steps:
        return None
    if which == BEST:
        raise UsageError(f"{folder.name}: its checkpoints tell no validation loss; say newest or a step.")
    step = max(steps) if which == NEWEST else int(which) if str(which).isdigit() else -1
    if step not in steps:
        raise UsageError(f"{folder.name} has no checkpoint {str(which)[:20]!r}; its steps are {sorted(steps)[-8:]}.")
    found = find(steps[step])
    return Found(found.kind, found.title, found.files, found.folder, step if found.step is None else found.step)


def _deepspeed(folder: Path, which: str | int) -> Found | None:
    """Of DeepSpeed, and so of SAT: a folder for each tag, and which is the newest in `latest`."""
    tag, latest = folder, folder / "latest"
    if str(which).isdigit():
        named = [path for path in _below(folder) if _step_in(path.name) == int(which) or path.name == str(which)]
        tag = next((path for path in named if _states(path)), folder)
    if not _states(tag) and latest.is_file() and latest.stat().st_size <= _SMALL:
        name = latest.read_text(encoding="utf-8", errors="replace").strip()
        if re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,200}", name):
            tag = folder / name
    if not _states(tag):
        tag = folder / "pytorch_model"  # what accelerate calls it
    if not _states(tag):
        return None
    return Found("deepspeed", "a DeepSpeed checkpoint", (tag,), folder, _step_in(tag.name, folder.name))


def _states(folder: Path) -> bool:
    return folder.is_dir() and any(folder.glob("*_model_states.pt"))


def _shared(tag: Path) -> bool:
    """Whether a model state alone is not enough."""
    return any(tag.glob("zero_pp_rank_*_model_states.pt"))


def _peft(folder: Path, which: str | int) -> Found | None:
    for name in lora_file.FOLDER_NAMED:
        for suffix in (".safetensors", ".bin"):
            file = folder / f"{name}{suffix}"
            if file.is_file():
                return Found("adapter", "an adapter's folder", (file,), folder, _step_in(folder.name))
    return None


def _accelerate(folder: Path, which: str | int) -> Found | None:
    """accelerate's save_state: model.safetensors or pytorch_model.bin, in shards or whole; of several models the one
    that is a CogVideoX is told by its tensors' names."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        whole, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
        if index.is_file():
            return Found("state", "an accelerate state", _shards(index), folder, _step_in(folder.name))
        if whole.is_file():
            more = sorted(folder.glob(f"{stem}_[0-9]*.{suffix}"))
            files = tuple(file for file in (whole, *more) if not more or suffix == "bin" or _ours(file))
            return Found("state", "an accelerate state", files[:1] or (whole,), folder, _step_in(folder.name))
    for path in _below(folder):
        if path.is_dir() and path.name.startswith("pytorch_model_fsdp"):
            raise AdapterUnreadable(
                f"{folder.name}: {path.name} is FSDP's, in shares. `accelerate merge-weights {_plain(path.name)} "
                "OUTPUT` makes a plain one, which is read."
            )
    return None


def _shards(index: Path) -> tuple[Path, ...]:
    try:
        if index.stat().st_size > 64 << 20:
            raise ValueError("it is larger than 64 MiB")
        names = sorted(set(map(str, json.loads(index.read_bytes())["weight_map"].values())))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise AdapterUnreadable(f"{index.name}: it tells of no shards ({error}). Get the folder again.") from None
    gone = [name for name in names if Path(name).name != name or not (index.parent / name).is_file()]
    if gone or not names:
        raise AdapterUnreadable(
            f"{index.parent.name}: {len(gone)} of {len(names)} shards are missing ({_plain(', '.join(gone[:3]))}). "
            "Copy the folder again."
        )
    return tuple(index.parent / name for name in names)


def _checkpoint(folder: Path, which: str | int) -> Found | None:
    """A whole pipeline, or the folder of its transformer, as diffusers has them."""
    for part in (folder / "transformer", folder):
        if any(part.glob("diffusion_pytorch_model*.safetensors*")):
            return Found("model", "a fine-tuned model", part_files(part), part, _step_in(folder.name))
    return None


LOOKS: tuple[Callable[[Path, str | int], Found | None], ...] = (
    _run, _peft, _deepspeed, _accelerate, _checkpoint, _trainer,
)  # fmt: skip


def _below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def _step_in(*names: str) -> int | None:
    """`checkpoint-500`, `global_step500`, SAT's `500`."""
    for name in names:
        found = _STEP.fullmatch(name) or re.fullmatch(r"(\d{1,9})", name, re.ASCII)
        if found:
            return int(found[1])
    return None


def _ours(file: Path) -> bool:
    with opened(file) as source:
        names = [clean(name) for name in source.tensors]
    return any(_adapts(name) for name in names) or native.spelling(names) is not None


# --- what is in it ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Adapted:
    """An adapter of it, read and checked."""

    adapter: Adapter
    left: tuple[str, ...]  # tensors that are not in it
    step: int | None
    notes: tuple[str, ...]


class Whole(NamedTuple):
    """A transformer in full. `spelling` is tensor in the files -> parameter."""

    files: tuple[Path, ...]
    spelling: Mapping[str, str]
    step: int | None
    notes: tuple[str, ...]


class _Part(NamedTuple):
    """A safetensors file with some of the weights."""

    file: Path
    tensors: Mapping[str, Spec]
    left: tuple[str, ...]


def gather(
    found: Found,
    folder: Path,
    timeout_s: float = 3600.0,
    check: Callable[[], None] = lambda: None,
    exact: bool = False,
) -> Any:
    """`Adapted` or `Whole`; what had to be written anew lies in `folder`. With `exact`, of a run of ours the float32
    numbers that were trained, where they are kept, in place of the adapter's rounded ones.

    Raises:
        AdapterUnreadable: no weights, or none that go together. NotAModel: weights of another model. DiskFull
    """
    parts, notes, step = [], [], found.step
    for number, file in enumerate(found.files):
        check()
        part = _Part(file, {}, ())
        if file.is_dir() or file.suffix.lower() in PICKLES:
            place = folder / str(number)
            place.mkdir()
            said = taken(file, place, timeout_s, WORKER)
            step = step if step is not None else said.get("step") if type(said.get("step")) is int else None
            if said.get("masters") is True:
                notes.append("its weights are the float32 ones that the optimiser keeps, not those in 16 bit that ran")
            elif said.get("masters") is False and file.is_dir():
                notes.append("its weights are those that ran, in the precision of the training")
            part = _Part(Path(said["path"]), {}, tuple(said["left"]))
        with opened(part.file) as source:
            parts.append(part._replace(tensors=source.tensors))
    names = [name for part in parts for name in part.tensors]
    if any(_adapts(clean(name)) for name in names):
        got = _adapted(found, parts, folder, step, notes)
        return _in_full(got, found, folder) if exact and found.kind in ("run", "checkpoint") else got
    return _whole(found, parts, step, notes)


def _adapts(name: str) -> bool:
    """Whether an adapter's tensor has such a name. `diff` alone does not make an adapter of a file."""
    found = parse(name)
    return found is not None and found.role not in ("alpha", "diff", "diff_b")


def clean(name: str) -> str:
    """Without what wrapping for training, compiling and sharding put around it."""
    return _INSIDE.sub("", _WRAPPED.sub("", name))


def _adapted(found: Found, parts: Sequence[_Part], folder: Path, step: int | None, notes: list[str]) -> Adapted:
    tensors: dict[str, torch.Tensor] = {}
    left = [name for part in parts for name in part.left]
    asked = {name: match[1] for part in parts for name in part.tensors if (match := _NAMED.fullmatch(clean(name)))}
    called = Counter(given for given in asked.values() if given not in _NO_NAME)
    chosen = "default" if "default" in called or not called else next(iter(called))
    if len(called) > 1:
        if chosen != "default":
            raise AdapterUnreadable(
                f"{found.folder.name} has {len(called)} adapters, {_plain(', '.join(sorted(called)[:6]))}, and none is "
                "PEFT's default. Save the one that is meant by itself, with `save_pretrained(selected_adapters=…)`."
            )
        notes.append(f"of {len(called)} adapters in it, the one called default was taken")
    unknown = 0
    for part in parts:
        wanted = {}
        for name in part.tensors:
            ours = parse(clean(name)) is not None and asked.get(name, chosen) in (chosen, *_NO_NAME)
            if ours and part.tensors[name].dtype in FLOATS:
                wanted[name] = clean(name)
            else:
                left.append(name)
                unknown += ".modules_to_save." in name
        for name, tensor in _some(part, wanted):
            if wanted[name] in tensors:
                raise AdapterUnreadable(f"{part.file.name}: {short(wanted[name])} is there twice. Take the right file.")
            tensors[wanted[name]] = tensor
    if unknown:
        notes.append(f"{unknown} tensors that were trained in full (modules_to_save) are not in it")
    first = parts[0].file
    metadata: Mapping[str, str] = {}
    with opened(first) as source:
        metadata = source.metadata
    path = folder / "adapter" / f"{first.stem[:100]}.safetensors"
    path.parent.mkdir()
    write_container(path, tensors, metadata)
    _beside(found, path)
    return Adapted(lora_file.read(path), tuple(left), step, tuple(notes))


def _in_full(got: Adapted, found: Found, folder: Path) -> Adapted:
    """With the numbers of the training's state."""
    kept: dict[str, torch.Tensor] = {}
    try:
        with whole_state(found.files[0].parent, folder) as state, opened(state) as source:
            part = _Part(state, source.tensors, ())
            kept = dict(_some(part, [name for name in source.tensors if name.startswith("param.")]))
    except (ResumeError, AdapterError):
        return replace(got, notes=(*got.notes, "the float32 numbers are not kept any more; these are the rounded ones"))
    modules = []
    for module in got.adapter.modules:
        a, b = (kept.get(f"param.{module.path}.lora_{side}.default.weight") for side in "AB")
        same = isinstance(module, LoRA) and a is not None and b is not None
        if not same or (a.shape, b.shape) != (module.A.shape, module.B.shape):  # type: ignore[union-attr]
            return replace(got, notes=(*got.notes, "its state is not of this adapter; these are its rounded numbers"))
        modules.append(replace(module, A=a, B=b))
    return replace(got, adapter=replace(got.adapter, modules=tuple(modules)))


def _beside(found: Found, out: Path) -> None:
    """What speaks for the scale of the source from beside it, is to be heard for what was taken out, too."""
    source = found.files[0]
    config, notes = found.folder / "adapter_config.json", sidecar_path(source)
    if notes.is_file():
        shutil.copyfile(notes, sidecar_path(out))
    fellows = sum(path.suffix.lower() in (".safetensors", *PICKLES) for path in found.folder.iterdir())
    if config.is_file() and (found.kind != "file" or source.stem == "adapter_model" or fellows == 1):
        shutil.copyfile(config, out.with_name(config.name))


def _some(part: _Part, names: Iterable[str]) -> Iterable[tuple[str, torch.Tensor]]:
    """These tensors of a file, in memory of their own; the others are not read."""
    with open(part.file, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        for name in names:
            spec = part.tensors[name]
            data = torch.empty(spec.end - spec.begin, dtype=torch.uint8)
            file.seek(start + spec.begin)
            if file.readinto(data.numpy().data) != len(data):  # type: ignore[attr-defined]
                raise AdapterUnreadable(f"{part.file.name}: it got shorter while it was read. Try again.")
            yield name, data.view(FLOATS[spec.dtype]).view(spec.shape)


def _whole(found: Found, parts: Sequence[_Part], step: int | None, notes: list[str]) -> Whole:
    names = [name for part in parts for name in part.tensors]
    spelt = native.spelling([clean(name) for name in names])
    if spelt is None:
        if any(layout_of(name)[0].name == SAT for name in names):
            what = (
                "the whole of a model that SAT trained, under names of SAT, whose q, k and v are one. Convert it to "
                "diffusers' layout with CogVideo's convert_weight_sat2hf.py, then take the adapter out of that"
            )
        else:
            what = f"{len(names):,} tensors such as {quoted(names[0])}: no adapter, and no CogVideoX transformer"
        raise NotAModel(f"{found.folder.name if found.kind != 'file' else found.files[0].name} holds {what}.")
    spelling = {name: spelt.of[clean(name)] for name in names if clean(name) in spelt.of}
    twice = [name for name, count in Counter(spelling.values()).items() if count > 1]
    if twice:
        raise NotAModel(f"{found.folder.name}: {short(twice[0])} is there twice. Take the right file.")
    return Whole(tuple(part.file for part in parts), spelling, step, tuple(notes))


def nbytes_of(source: Path) -> int:
    """Of a file, or of all files of a folder."""
    if source.is_file():
        return source.stat().st_size
    return sum(path.stat().st_size for path in source.rglob("*") if path.is_file() and not path.is_symlink())


def _plain(text: object) -> str:
    return re.sub(r"[^ -%'-;=?-~]", "?", str(text)[:200])

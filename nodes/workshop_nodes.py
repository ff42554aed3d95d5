"""The workshop's tools as nodes. Each writes below the output folder, under a number that is free, and gives what it
made as a stack: so it can be rendered, saved on or measured in the same run.

What lands in `output/loras` and `output/diffusion_models` is found by the lists of ComfyUI, which searches both.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch

from .engine import train_state
from .engine.checkpoints import DEMO
from .engine.errors import AdapterNotFound, ModelNotFound, UsageError
from .engine.files import in_megabytes, write_atomic
from .engine.finetune import OPTIMISERS, QUANTISED, SCHEDULES, TARGETS
from .engine.lora_file import adapter_name, listed_in
from .engine.lora_file import stamp as file_stamp
from .engine.lora_stack import Entry, LoraStack
from .engine.lora_write import TARGETS as LAYOUTS
from .engine.lowrank import Cut
from .engine.merge import EXACT, METHODS, Rule
from .engine.pipeline import bases
from .graph import ABSENT, StackIn, _stamp_lora, adapter_names, base_names
from .host import Host, contained, numbered
from .lora import find_adapter
from .model import choose_base, list_bases
from .schema import STACK, Choice, Flag, Number, Out, Shown, Text, Whole, node

if TYPE_CHECKING:
    from .engine.finetune import Result
    from .engine.lowrank import Fidelity
    from .engine.merge import Merged

CATEGORY = "CogLoom/workshop"
NO_DATA = "none"
DEPTH, FOUND, LOOKED = 4, 500, 20_000  # of folders that are listed: how deep, how many, how many files are looked at
# What lies in a folder that a training wrote: of ours, DeepSpeed, accelerate, PEFT and diffusers.
_LEFT = re.compile(
    r"state\.json|latest|.*_model_states\.pt|random_states_\d+\.pkl|adapter_config\.json|"
    r"pytorch_lora_weights\.safetensors"
)
_TRAINED = re.compile(r"checkpoint[-_]\d")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
_WINDOW = 20  # losses of a step are noise: a number that is shown is the mean of so many

# What several of them ask for, in the same words.
Origin = Annotated[str, Choice(
    base_names, others=True, tip="The base that it is made for: the embedded demo, a folder in models/CogVideo, or a "
    "known id. It is read from its files, not loaded."
)]  # fmt: skip
Adapter = Annotated[str, Choice(adapter_names, others=True, tip="A LoRA file, of any layout.")]
Rank = Annotated[int, Whole(1, 4096, tip="With keep at rank: as many in every layer.")]
Energy = Annotated[float, Number(
    0.01, 1.0, 0.001, tip="With keep at energy: the share of each layer's squares to keep; 0.99 loses little."
)]  # fmt: skip
Megabytes = Annotated[float, Number(
    0.01, 100_000.0, 0.1, tip="With keep at size: MB of the whole file, which the layers share where it helps most."
)]  # fmt: skip
Precision = Annotated[str, Choice(
    ("auto", "bf16", "fp16", "fp32"), advanced=True, tip="Of the matrices. auto: as the adapters have it."
)]  # fmt: skip
Prefix = Annotated[str, Text(
    tip="Where in the output folder, and the beginning of the name; a number follows. What is in loras can be chosen "
    "at once."
)]  # fmt: skip
STACK_OUT = Out("stack", STACK, "What was made, at weight 1, for a sampler or the next tool.")
FILE_OUT = Out("file", "STRING", "Where it is in the output folder.")


# --- what they have in common -----------------------------------------------------------------------------------------


def _check_name(host: Host, name: str | None = None, **_: Any) -> None:
    if name is not None:
        numbered(host.output_folder, name, ".safetensors")


def _check_adapter(host: Host, adapter: str | None = None, name: str | None = None, **_: Any) -> None:
    if adapter is not None:
        find_adapter(host, adapter)
    _check_name(host, name)


def _cut(keep: str, rank: int, energy: float, size_mb: float) -> Cut:
    from .workshop import cut_from

    return cut_from(
        rank if keep == "rank" else None, energy if keep == "energy" else None, size_mb if keep == "size" else None
    )


def _device(host: Host) -> str:
    """Where matrices are taken apart: not on a GPU that ComfyUI was told to leave alone."""
    return "cpu" if host.device == "cpu" else "auto"


def _stack_of(path: Path) -> LoraStack:
    path = path.resolve()
    return LoraStack((Entry(str(path), adapter_name(path), stamp=file_stamp(path)),))


def _below(host: Host, path: Path) -> str:
    return path.resolve().relative_to(host.output_folder.resolve()).as_posix()


def _made(host: Host, path: Path, lines: Sequence[str], rows: Sequence[tuple[str, str]] = ()) -> Shown:
    """The adapter that was written, with what there is to say, and the error of each block where there is one."""
    file = _below(host, path)
    said: dict[str, list[Any]] = {"text": ["\n".join([file, *lines])]}
    if rows:
        table = {"columns": ["block", "error"], "rows": [list(row) for row in rows], "words": [file, *lines]}
        said["cogloom_table"] = [table]
    return Shown((_stack_of(path), file), said)


def _smaller(before: int, after: int) -> str:
    """GB → MB, and how many times."""
    times = f", {before / after:.0f} times smaller" if after and before >= 2 * after else ""
    return f"{in_megabytes(before)} → {in_megabytes(after)}{times}"


def _fidelity(fidelity: Fidelity) -> tuple[list[str], list[tuple[str, str]]]:
    """In words, and the error of each block."""
    if not fidelity.kept:
        return ["exact: nothing was left out"], []
    said = fidelity.to_json(layers=False)
    lines = [f"error {said['error']:.2g} of the difference, {said['energy']:.2%} of its energy kept"]
    if said["ranks"]:
        low, high = said["ranks"]
        lines.append(f"rank {low}" if low == high else f"ranks {low} to {high}")
    if said["full"]:
        lines.append(f"{said['full']} differences are kept in full")
    if said["dropped"]:
        lines.append(f"{said['dropped']} differences were dropped, {said['dropped_energy']:.2%} of the energy")
    rows = [(f"block {key}" if key.isdigit() else key, f"{error:.2g}") for key, error in said["blocks"].items()]
    return lines, rows


def _merged(host: Host, done: Merged, more: Sequence[str] = ()) -> Shown:
    lines, rows = _fidelity(done.fidelity)
    ranks = f"ranks of all layers together: {done.before:,} → {done.after:,}"
    return _made(host, done.path, [_smaller(done.source_bytes, done.target_bytes), ranks, *lines, *more], rows)


# --- extract ----------------------------------------------------------------------------------------------------------


def tuned_models(host: Host) -> dict[str, Path]:
    """Name -> folder or file, of all that could be a fine-tuned transformer: bases that are here, transformers by
    themselves, single files. A transformer in several files is one folder."""
    found = {one.name: Path(one.folder) for one in list_bases(host) if one.state == "here"}
    for root in host.model_folders:
        for folder in sorted(root.iterdir()) if root.is_dir() else ():
            inner = folder / "transformer" if (folder / "transformer").is_dir() else folder
            if (inner / "config.json").is_file() and any(inner.glob("*.safetensors")):
                found.setdefault(folder.name, folder)
    for name, path in listed_in(host.transformer_folders):
        if _SHARD.search(name) and (path.parent / "config.json").is_file():
            found.setdefault(Path(name).parent.as_posix(), path.parent)
        else:
            found.setdefault(name, path)
    return found


def _tuned(host: Host, name: str) -> Path:
    there = tuned_models(host)
    if name not in there:
        raise ModelNotFound(
            f"No fine-tuned model is called {name[:200]!r}. Put its folder into models/CogVideo or a single file into "
            f"models/diffusion_models, and choose it: there are {', '.join(list(there)[:12])}."
        )
    return there[name]


def _check_extract(
    host: Host, finetuned: str | None = None, name: str | None = None, losses: str = NO_DATA, **_: Any
) -> None:
    if finetuned is not None:
        _tuned(host, finetuned)
    if losses != NO_DATA:
        _dataset(host, losses)
    _check_name(host, name)


def _stamp_extract(host: Host, finetuned: str | None = None, **_: Any) -> Any:
    if finetuned is None:
        return None
    path = _tuned(host, finetuned)
    files = [path] if path.is_file() else sorted((*path.glob("*.safetensors"), *path.glob("transformer/*.safetensors")))
    return [file_stamp(file)[:2] for file in files]


@node(
    "CogLoomExtract", "Extract LoRA", (STACK_OUT, FILE_OUT), category=CATEGORY, shows=True, check=_check_extract,
    stamp=_stamp_extract, search=("full fine-tune", "SVD", "difference", "checkpoint to lora"),
)  # fmt: skip
def extract_lora(
    host: Host,
    finetuned: Annotated[str, Choice(lambda host: list(tuned_models(host)), others=True, tip="The fine-tuned model: a "
                                     "folder in models/CogVideo, or a file or folder in models/diffusion_models.")],
    checkpoint: Origin = DEMO,
    keep: Annotated[str, Choice(("rank", "energy", "size", "all"), tip="How much of the difference: a rank, a share "
                                "of its energy, a file's size, or all there is.")] = "rank",
    rank: Rank = 64,
    energy: Energy = 0.99,
    size_mb: Megabytes = 50.0,
    norms: Annotated[bool, Flag(tip="Keep differences of norms and biases in full. diffusers cannot read such a file; "
                                "ComfyUI and CogLoom can.")] = True,
    as_trained: Annotated[bool, Flag(advanced=True, tip="Where the fine-tune is stored more coarsely than its base: "
                                     "the difference to the base as rounded.")] = False,
    dtype: Annotated[str, Choice(("bf16", "fp16", "fp32"), advanced=True, tip="Of the matrices.")] = "bf16",
    name: Prefix = "loras/extracted",
    losses: Annotated[str, Choice(lambda host: [NO_DATA, *datasets(host)], others=True, tip="A dataset of the input "
                                  "folder that was not trained on: the denoising loss of base, fine-tune and base with "
                                  "the LoRA is measured on it. Takes a while.")] = NO_DATA,
) -> Shown:  # fmt: skip
    """What a fully fine-tuned model has and its base has not, as a LoRA: megabytes in place of gigabytes. Layer by
    layer, so that neither has to fit into memory; says how much is lost in each block."""
    from .workshop import extract_adapter

    done = extract_adapter(
        host, str(_tuned(host, finetuned).resolve()), numbered(host.output_folder, name, ".safetensors"),
        checkpoint.removesuffix(ABSENT), _cut(keep, rank, energy, size_mb), norms, as_trained, dtype, _device(host),
        losses=None if losses == NO_DATA else _dataset(host, losses),
    )  # fmt: skip
    lines, rows = _fidelity(done.fidelity)
    lines = [_smaller(done.source_bytes, done.target_bytes), *lines]
    if done.cast > 0.01:
        lines.append(
            f"{min(done.cast, 1):.1%} of the difference is the base as rounded to the fine-tune's precision and no "
            "training; as_trained leaves it out"
        )
    if done.unchanged:
        lines.append(f"{len(done.unchanged)} parameters are the base's to the bit")
    if done.losses is not None:
        lines += done.losses.words()
    return _made(host, done.path, lines, rows)


# --- merge, resize, convert -------------------------------------------------------------------------------------------


@node(
    "CogLoomMerge", "Merge LoRA", (STACK_OUT, FILE_OUT), category=CATEGORY, shows=True, check=_check_name,
    search=("TIES", "DARE", "combine", "SVD", "mix lora"),
)  # fmt: skip
def merge_lora(
    host: Host,
    stack: StackIn,
    method: Annotated[str, Choice(METHODS, tip="concatenate is the exact sum, svd the sum made smaller; the others "
                                  "are PEFT's, those with _svd on what the adapters add.")] = EXACT,
    density: Annotated[float, Number(0.01, 1.0, 0.01, tip="For ties, dare and magnitude_prune: the share of values "
                                     "that stays.")] = 0.5,
    majority: Annotated[str, Choice(("total", "frequency"), advanced=True, tip="What elects the signs of ties: the sum "
                                    "of the values, or how many there are.")] = "total",
    # Not `seed`: pages give a number of that name a new value after each run.
    dare_seed: Annotated[int, Whole(0, 2**63 - 1, advanced=True, tip="Of dare's choice.")] = 0,
    keep: Annotated[str, Choice(("all", "rank", "energy", "size"), tip="For svd and methods that end with it. all: "
                                "the largest rank among the adapters, as PEFT keeps.")] = "all",
    rank: Rank = 64,
    energy: Energy = 0.99,
    size_mb: Megabytes = 50.0,
    dtype: Precision = "auto",
    name: Prefix = "loras/merged",
) -> Shown:  # fmt: skip
    """A stack's adapters at their weights and blocks as one file: exactly their sum, or made smaller by SVD, or by
    TIES and DARE. Weight 1 of it is the mix."""
    from .workshop import merge_adapters

    return _merged(host, merge_adapters(
        host, stack, numbered(host.output_folder, name, ".safetensors"), Rule(method, density, majority, dare_seed),
        _cut(keep, rank, energy, size_mb), dtype, _device(host),
    ))  # fmt: skip


@node(
    "CogLoomResize", "Resize LoRA", (STACK_OUT, FILE_OUT), category=CATEGORY, shows=True, check=_check_adapter,
    stamp=_stamp_lora, search=("rank", "shrink", "compress lora", "SVD"),
)  # fmt: skip
def resize_lora(
    host: Host,
    adapter: Adapter,
    keep: Annotated[str, Choice(("rank", "energy", "size"), tip="By a rank, by a share of each layer's energy, or by "
                                "the file's size.")] = "rank",
    rank: Rank = 16,
    energy: Energy = 0.99,
    size_mb: Megabytes = 10.0,
    dtype: Precision = "auto",
    name: Prefix = "loras/resized",
) -> Shown:  # fmt: skip
    """A LoRA with fewer ranks, by SVD of what it adds, the best that so many ranks can be. Says the error of each
    block, and draws the layers' singular values with where they were cut."""
    from .workshop import effects, resize_adapter, resized_svg

    cut = _cut(keep, rank, energy, size_mb)
    done = resize_adapter(
        host, adapter, numbered(host.output_folder, name, ".safetensors"), cut, dtype, _device(host)
    )  # fmt: skip
    told = effects(host, find_adapter(host, adapter), done.path)
    shown = _merged(host, done, () if told is None else (
        f"effect ‖ΔW‖/‖W‖ on {told.base}: {told.before:.3g} → {told.after:.3g}, {told.apart:.2g} between them",
    ))  # fmt: skip
    drawn = resized_svg(host, adapter, done, cut, _device(host))
    if not drawn:
        return shown
    return replace(shown, ui={**shown.ui, "cogloom_picture": [{"svg": drawn, "alt": "singular values of each layer"}]})


@node(
    "CogLoomConvert", "Convert LoRA", (STACK_OUT, FILE_OUT), category=CATEGORY, shows=True, check=_check_adapter,
    stamp=_stamp_lora, search=("kohya", "VideoX-Fun", "PEFT", "SAT", "diffusers", "layout", "rename keys"),
)  # fmt: skip
def convert_lora(
    host: Host,
    adapter: Adapter,
    layout: Annotated[str, Choice(tuple(LAYOUTS), tip="Whose names: diffusers, a PEFT folder, kohya and VideoX-Fun, "
                                  "ComfyUI's own CogVideoX, or SAT.")] = "comfyui",
    name: Prefix = "loras/converted",
) -> Shown:  # fmt: skip
    """The same adapter with another program's names, the same tensors to the bit: for diffusers, PEFT, VideoX-Fun,
    ComfyUI's own LoRA loader, or SAT."""
    from .workshop import convert_layout

    suffix = "" if LAYOUTS[layout].folder else ".safetensors"
    done = convert_layout(host, adapter, numbered(host.output_folder, name, suffix), layout)
    lines = [f"{LAYOUTS[layout].title}; {in_megabytes(done.target_bytes)}, the same tensors to the bit", *done.notes]
    return _made(host, done.path, lines)


# --- bake -------------------------------------------------------------------------------------------------------------


@node(
    "CogLoomBake", "Bake LoRA into a Base", (Out("folder", "STRING", "Where it is in the output folder."),),
    category=CATEGORY, shows=True, check=_check_name, search=("merge into checkpoint", "fuse", "full model"),
)  # fmt: skip
def bake_lora(
    host: Host,
    stack: StackIn,
    checkpoint: Origin = DEMO,
    dtype: Annotated[str, Choice(("auto", "bf16", "fp16", "fp32"), tip="Of the weights. auto: the base's own.")]
    = "auto",
    name: Annotated[str, Text(tip="Where in the output folder, and the beginning of the folder's name; a number "
                              "follows.")] = "diffusion_models/baked",
) -> Shown:  # fmt: skip
    """A base's transformer with a stack inside it, in a folder as diffusers has it, for programs that know no LoRA. As
    large as the base's own."""
    from .workshop import bake_adapters

    done = bake_adapters(host, stack, numbered(host.output_folder, name, ""), checkpoint.removesuffix(ABSENT), dtype)
    folder = _below(host, done.folder)
    lines = [folder, f"{in_megabytes(done.target_bytes)} in {len(done.files)} file{'s' * (len(done.files) > 1)}",
             f"{len(done.changed)} parameters are not the base's"]  # fmt: skip
    if len(done.files) == 1:
        lines.append("CogVideoX Base from File can choose it at once")
    return Shown((folder,), {"text": ["\n".join(lines)]})


# --- take out ---------------------------------------------------------------------------------------------------------


def sources(host: Host) -> dict[str, Path]:
    """Name -> folder or file, of what trainings leave behind: below output/training and the models' folders."""
    found: dict[str, Path] = {}
    looked = 0
    for prefix, root in (("training/", host.output_folder / "training"), *(
        ("", root) for root in (*host.model_folders, *host.lora_folders, *host.transformer_folders)
    )):  # fmt: skip
        for folder, below, files in os.walk(root):
            here, path = Path(folder).relative_to(root), Path(folder)
            looked += len(files) + len(below)
            if looked > LOOKED or len(found) >= FOUND:
                return found
            if "model_index.json" in files:  # a whole base
                below.clear()
                continue
            below[:] = sorted(one for one in below if not one.startswith(".")) if len(here.parts) < DEPTH else []
            if here.parts and (any(map(_TRAINED.match, below)) or any(map(_LEFT.fullmatch, files))):
                found.setdefault(prefix + here.as_posix(), path)
            for file in sorted(files):
                if file.lower().endswith((".pt", ".pth", ".ckpt")) and not _LEFT.fullmatch(file):
                    found.setdefault(prefix + (here / file).as_posix(), path / file)
    return found


def source_names(host: Host) -> list[str]:
    return list(sources(host)) or ["(no training is here)"]  # an empty list shows as "undefined"


def _source(host: Host, name: str) -> Path:
    there = sources(host)
    if name not in there:
        raise AdapterNotFound(
            f"No training is called {name[:200]!r}. Those of output/training are listed, and what lies in the folders "
            f"of models: {', '.join(list(there)[:12]) or 'none yet'}."
        )
    return there[name]


def _check_take(host: Host, source: str | None = None, name: str | None = None, **_: Any) -> None:
    if source is not None:
        _source(host, source)
    _check_name(host, name)


def _stamp_take(host: Host, source: str | None = None, **_: Any) -> Any:
    if source is None:
        return None
    path = _source(host, source)
    entries = [path] if path.is_file() else sorted(path.iterdir())
    return [[one.name, one.stat().st_mtime_ns] for one in entries]


@node(
    "CogLoomTake", "Take LoRA out", (STACK_OUT, FILE_OUT), category=CATEGORY, shows=True, check=_check_take,
    stamp=_stamp_take, search=("DeepSpeed", "accelerate", "SAT checkpoint", "save only the adapter", "state"),
)  # fmt: skip
def take_lora(
    host: Host,
    source: Annotated[str, Choice(source_names, others=True, tip="The folder or checkpoint of a training, in "
                                  "output/training or the models' folders.")],
    which: Annotated[str, Text(tip="Of several checkpoints: newest, best by the loss on held-out clips, or a step.")]
    = "newest",
    checkpoint: Origin = DEMO,
    rank: Annotated[int, Whole(1, 4096, tip="Where the whole model was trained: ranks of every layer.")] = 64,
    alpha: Annotated[float, Number(0.0, 1e6, 1.0, advanced=True, tip="Of the training, where the source does not tell "
                                   "it. 0: as it is found.")] = 0.0,
    dtype: Annotated[str, Choice(("auto", "bf16", "fp16", "fp32"), advanced=True, tip="Of the matrices. auto: as the "
                                 "source has it.")] = "auto",
    name: Prefix = "loras/taken",
) -> Shown:  # fmt: skip
    """The adapter alone out of what a training left behind: a run's folder, a SAT or DeepSpeed checkpoint, an
    accelerate state. Of a model that was trained in full, its difference to the base. Says how much smaller it is."""
    from .take import take_adapter

    done = take_adapter(
        host, _source(host, source), numbered(host.output_folder, name, ".safetensors"),
        checkpoint.removesuffix(ABSENT), Cut(rank=rank), dtype, _device(host), which=which.strip() or "newest",
        alpha=alpha or None,
    )  # fmt: skip
    return _made(host, done.path, [done.sentence(), *done.notes])


# --- train ------------------------------------------------------------------------------------------------------------


def datasets(host: Host) -> list[str]:
    """Folders below the input folder that hold clips, stills or lists of them. Links out of it are not followed."""
    from .engine.dataset import CLIPS, PROMPTS, STILLS

    root, found, looked = host.input_folder.resolve(), [], 0
    for folder, below, files in os.walk(root):
        here = Path(folder).relative_to(root)
        looked += len(files) + len(below)
        if here.parts and any(Path(file).suffix.lower() in CLIPS | STILLS or file == PROMPTS for file in files):
            found.append(here.as_posix())
        below[:] = sorted(name for name in below if not name.startswith(".")) if len(here.parts) < DEPTH else []
        if looked > LOOKED or len(found) >= FOUND:
            break
    return sorted(found)


def dataset_names(host: Host) -> list[str]:
    return datasets(host) or ["(none in the input folder)"]  # an empty list shows as "undefined"


def _dataset(host: Host, name: str) -> Path:
    if name not in datasets(host):
        raise UsageError(
            f"{name[:100]!r} is no dataset of the input folder. Make a folder in it with clips or stills, and a .txt "
            "of the same name beside each, or prompts.txt and videos.txt."
        )
    return contained(host.input_folder, name)


def _check_train(host: Host, dataset: str | None = None, **_: Any) -> None:
    if dataset is not None:
        _dataset(host, dataset)


@node(
    "CogLoomTrain", "Train LoRA", (STACK_OUT, FILE_OUT), category=CATEGORY, shows=True, check=_check_train,
    search=("fine-tune", "finetune", "dreambooth", "training"),
)  # fmt: skip
def train_lora(
    host: Host,
    dataset: Annotated[str, Choice(dataset_names, others=True, tip="A folder in the input folder: clips and stills, "
                                   "each with its caption in a .txt of the same name.")],
    checkpoint: Annotated[str, Choice(base_names, others=True, tip="The base to train on. It is loaded anew for it: a "
                                      "base in memory is never trained.")] = DEMO,
    name: Annotated[str, Text(tip="Of the adapter, and of its folder in output/training. The same name goes on where "
                              "it was stopped.")] = "my-lora",
    steps: Annotated[int, Whole(1, 1_000_000, tip="Optimiser steps.")] = 500,
    rank: Annotated[int, Whole(1, 1024, tip="Of the adapter: more can hold more, and is a larger file.")] = 16,
    learning_rate: Annotated[float, Number(1e-7, 1.0, 1e-5, tip="1e-4 is usual; halve it when the loss jumps.")] = 1e-4,
    layers: Annotated[str, Choice(tuple(TARGETS), tip="What is adapted: attention alone, or feed-forward as well.")]
    = "attention",
    frames: Annotated[int, Whole(0, 1000, tip="Length of a training clip, 8·N + 1. 0: the base's own.")] = 0,
    width: Annotated[int, Whole(0, 4096, 8, tip="In pixels. 0: the base's own.")] = 0,
    height: Annotated[int, Whole(0, 4096, 8, tip="In pixels. 0: the base's own.")] = 0,
    trigger_words: Annotated[str, Text(tip="Words of the captions that call it, with commas; written into the file.")]
    = "",
    random_seed: Annotated[int, Whole(0, 2**63 - 1, tip="One seed is one training, bit for bit on a CPU.")] = 0,
    batch_size: Annotated[int, Whole(1, 256, advanced=True, tip="Items of a step.")] = 1,
    gradient_accumulation: Annotated[int, Whole(1, 256, advanced=True, tip="Batches of a step, for larger ones than "
                                                "memory has room for.")] = 1,
    gradient_checkpointing: Annotated[bool, Flag(advanced=True, tip="Much less memory, a third more time.")] = False,
    schedule: Annotated[str, Choice(SCHEDULES, advanced=True, tip="How the learning rate goes on.")] = "constant",
    warmup: Annotated[int, Whole(0, 100_000, advanced=True, tip="Steps until the learning rate is reached.")] = 0,
    caption_dropout: Annotated[float, Number(0.0, 1.0, 0.05, advanced=True, tip="Share of captions left empty, which "
                                             "guidance needs.")] = 0.1,
    timestep_power: Annotated[float, Number(0.05, 20.0, 0.05, advanced=True, tip="Below 1 leans towards high noise, "
                                            "where layout and motion are decided.")] = 1.0,
    checkpoint_every: Annotated[int, Whole(0, 100_000, advanced=True, tip="Steps between checkpoints. 0: five to ten, "
                                           "where they matter: early, in the middle, the best, the last.")] = 0,
    validation_every: Annotated[int, Whole(0, 100_000, advanced=True, tip="Steps between measurements of the loss on "
                                           "clips that are held out.")] = 100,
    resume: Annotated[bool, Flag(tip="Go on from the last checkpoint of this name. Off: begin anew; what was there is "
                                 "kept beside it.")] = True,
    only_estimate: Annotated[bool, Flag(tip="Say what memory and time it takes, and train nothing.")] = False,
    quantise: Annotated[str, Choice(QUANTISED, advanced=True, tip="The base's weights while it is trained on: int8 and "
                                    "int4 by torchao, nf4 by bitsandbytes on CUDA. Less memory, a little slower.")]
    = "none",
    optimiser: Annotated[str, Choice(OPTIMISERS, advanced=True, tip="adamw8bit has its moments in 8 bits.")] = "adamw",
    buckets: Annotated[str, Text(tip="Other sizes besides, with commas: WxH or WxHxF, or auto; each file takes the "
                                 "nearest. Empty: all are of one size.")] = "",
    anyway: Annotated[bool, Flag(advanced=True, tip="Begin even where the estimate says that memory is too small.")]
    = False,
) -> Shown:  # fmt: skip
    """Train a LoRA on a folder of clips and stills with captions. Stopped at any moment it keeps a checkpoint, and the
    same name goes on from there. Says beforehand what it takes, and the loss on the way."""
    from .train import estimate, train

    base = choose_base(host, checkpoint.removesuffix(ABSENT), "auto", host.device)
    sizes = {key: value for key, value in (("frames", frames), ("width", width), ("height", height)) if value}
    settings = {
        **sizes, "steps": steps, "rank": rank, "learning_rate": learning_rate, "target_modules": layers,
        "trigger_words": tuple(word.strip() for word in trigger_words.split(",") if word.strip()), "seed": random_seed,
        "batch_size": batch_size, "gradient_accumulation": gradient_accumulation,
        "gradient_checkpointing": gradient_checkpointing, "lr_schedule": schedule, "warmup": min(warmup, steps),
        "caption_dropout": caption_dropout, "timestep_power": timestep_power,
        "checkpoint_every": checkpoint_every or None, "validation_every": validation_every, "quantise": quantise,
        "optimiser": optimiser, "buckets": tuple(size.strip() for size in buckets.split(",") if size.strip()),
    }  # fmt: skip
    data = _dataset(host, dataset)
    expected = estimate(host, base, settings).sentence()
    host.progress(0, 1, expected)
    if only_estimate:
        return Shown((LoraStack(), ""), {"text": [expected]})
    bases.unload()  # training holds a copy of its own
    host.make_room(base)
    report = _Losses(host)
    with torch.inference_mode(False), torch.enable_grad():
        result = train(host, base, data, name, settings, fresh=not resume, report=report, force=anyway)
    path = _kept(host, name, result.path)
    return _trained(host, path, result, expected)


class _Losses:
    """What the person who waits is told of a training."""

    def __init__(self, host: Host) -> None:
        self._host, self._losses, self._validation = host, list[float](), ""

    def __call__(self, done: int, total: int, what: str, told: dict[str, Any] | None = None) -> None:
        told = told or {}
        if "loss" in told:
            self._losses = [*self._losses, told["loss"]][-_WINDOW:]
        if "validation" in told:
            self._validation = f", held-out loss {told['validation']:.4f}"
        if self._losses:
            mean = math.fsum(self._losses) / len(self._losses)
            what = f"{what}: step {done} of {total}, loss {mean:.4f}{self._validation}"
        self._host.progress(done, total, what)


def _kept(host: Host, name: str, trained: Path) -> Path:
    """A copy where lists look for adapters; the training's folder has what it goes on from. An equal one serves."""
    folder, data = host.output_folder / "loras", trained.read_bytes()
    size = len(data)
    for path in sorted(folder.glob("*.safetensors")):
        if path.name.startswith(f"{name}_") and path.stat().st_size == size and path.read_bytes() == data:
            return path
    path = numbered(host.output_folder, f"loras/{name}", ".safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, data)
    return path


def _trained(host: Host, path: Path, result: Result, expected: str) -> Shown:
    file = _below(host, path)
    words = [
        file,
        f"{in_megabytes(path.stat().st_size)} after {result.steps:,} steps, {result.seconds / 60:.1f} min of training",
    ]
    rows = []
    for step, held in result.validation:
        near = result.losses[max(0, step - _WINDOW) : step]
        rows.append([f"step {step}", f"{math.fsum(near) / len(near):.4f}" if near else "–", f"{held:.4f}"])
    if result.validation:
        (_, first), best = result.validation[0], min(result.validation, key=lambda pair: pair[1])
        words.append(f"held-out loss: {first:.4f} of the base, least {best[1]:.4f} at step {best[0]}")
    words.append(f"Expected: {expected}")
    table = {"columns": ["", "loss", "held-out loss"], "rows": rows, "words": words}
    return Shown((_stack_of(path), file), {"text": ["\n".join(words)], "cogloom_table": [table]})


# --- what a training kept ---------------------------------------------------------------------------------------------


def run_names(host: Host) -> list[str]:
    """CogLoom's own trainings in output/training that have a checkpoint."""
    own = [(name, path) for name, path in sources(host).items() if name.startswith("training/") and path.is_dir()]
    found = [name.removeprefix("training/") for name, path in own if train_state.checkpoints(path)]
    return found or ["(no training is here)"]  # an empty list shows as "undefined"


def _run(host: Host, name: str) -> Path:
    if name not in (there := run_names(host)):
        raise UsageError(
            f"No training called {name[:200]!r} has a checkpoint in output/training: {', '.join(there[:12])}."
        )
    return contained(host.output_folder, f"training/{name}")


def _check_run(host: Host, run: str | None = None, name: str | None = None, **_: Any) -> None:
    if run is not None:
        _run(host, run)
    if name is not None:
        numbered(host.output_folder, name, "")


def _stamp_run(host: Host, run: str | None = None, **_: Any) -> Any:
    if run is None:
        return None
    files = [file for folder in train_state.checkpoints(_run(host, run)) for file in sorted(folder.iterdir())]
    return [[file.parent.name, file.name, file.stat().st_mtime_ns] for file in files]


@node(
    "CogLoomCheckpoints", "Training Checkpoints",
    (
        Out("stack", STACK, "The adapter as it was at the step, at weight 1, for a sampler."),
        Out("text", "STRING", "What was found or done."),
    ),
    category=CATEGORY, shows=True, check=_check_run, stamp=_stamp_run,
    search=("prune", "restore", "verify", "training run", "state"),
)  # fmt: skip
def training_checkpoints(
    host: Host,
    run: Annotated[str, Choice(run_names, others=True, tip="A training in output/training.")],
    action: Annotated[str, Choice(("list", "verify", "restore", "prune"), tip="list shows what there is. verify reads "
                                  "every byte. restore makes a run of its own of one. prune removes some.")] = "list",
    step: Annotated[int, Whole(0, 1_000_000, tip="Of the stack that is given, and with restore. 0: the newest, as "
                               "always with prune.")] = 0,
    keep: Annotated[str, Text(tip="With prune, what stays: steps, first, best, last, or key, the ones that training "
                              "itself would keep; with commas.")] = "key",
    only_tell: Annotated[bool, Flag(tip="With prune: say what it would win, and change nothing.")] = True,
    name: Annotated[str, Text(tip="With restore: where in the output folder, and the beginning of the run's name; a "
                              "number follows.")] = "training/restored",
) -> Shown:  # fmt: skip
    """What a training of CogLoom kept, and why: any checkpoint as a stack, brought back to the last bit as a run of its
    own, every byte checked, or fewer of them."""
    from .checkpoint_runs import checkpoint_at, list_checkpoints, prune_run, restore_checkpoint, verify_run

    folder = _run(host, run)
    words: list[str] = []
    at = step if step and action != "prune" else train_state.step_of(train_state.checkpoints(folder)[0])
    chosen = checkpoint_at(folder, at)
    if action == "verify":
        found = verify_run(folder)
        words += [problem for one in found for problem in one.problems]
        words.append(f"{sum(not one.problems for one in found)} of {len(found)} checkpoints are sound")
    if action == "prune":
        wanted = [word.strip() for word in keep.split(",") if word.strip()]
        wish = [int(word) if word.isascii() and word.isdigit() else word for word in wanted]
        done = prune_run(folder, wish, dry_run=only_tell)
        words += [*done.words(), _smaller(done.before_bytes, done.after_bytes)]
    if action == "restore":
        again = restore_checkpoint(folder, at, numbered(host.output_folder, name, ""))
        words.append(f"step {again.step} is back in {_below(host, again.folder.parent)}, SHA-256 {again.sha256}")
    there = list_checkpoints(folder)
    rows = [
        [f"step {one.step}", ", ".join(one.why) or "–", *("–" if loss is None else f"{loss:.4f}" for loss in (
            one.loss, one.validation)), in_megabytes(one.bytes), "–" if one.ratio is None else f"{one.ratio:.2f} ×"]
        for one in there
    ]  # fmt: skip
    words += [f"step {one.step}: {one.problem}" for one in there if one.problem and action != "verify"]
    words.append(f"{len(there)} checkpoints, {in_megabytes(sum(one.bytes for one in there))}")
    columns = ["", "kept because", "loss", "held-out loss", "size", "state smaller"]
    table = {"columns": columns, "rows": rows, "words": words}
    text = "\n".join(words)
    stack = _stack_of(chosen / train_state.ADAPTER)
    return Shown((stack, text), {"text": [text], "cogloom_table": [table]})


# --- where it comes from ----------------------------------------------------------------------------------------------


@node(
    "CogLoomLineage", "LoRA Lineage",
    (
        Out("text", "STRING", "The tree, a line for each adapter and base that it is made of."),
        Out("json", "STRING", "The same as JSON, with whole hashes."),
    ),
    category=CATEGORY, shows=True, check=_check_adapter, stamp=_stamp_lora,
    search=("provenance", "parents", "history", "made of"),
)  # fmt: skip
def lineage_of(host: Host, adapter: Adapter) -> Shown:
    """What a LoRA was made of, back to the base: each parent that its file names, compared by hash with what is in the
    models' folders."""
    from .lineage import lineage

    found = lineage(host, find_adapter(host, adapter))
    text = "\n".join(found.lines())
    return Shown((text, json.dumps(found.as_dict(), ensure_ascii=False, indent=1)), {"text": [text]})

"""Fine-tune an adapter on a base, from a folder of clips and stills with captions."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .engine import dataset, train_plan
from .engine.checkpoints import Checkpoint, fingerprint, part_files, transformer_config, transformer_hash
from .engine.errors import UsageError, WrongFamily
from .engine.finetune import Progress, Result, Settings, TrainableBase
from .engine.finetune import train as finetune
from .engine.pipeline import DTYPES, Base, choose_device, free_memory, load_text, load_transformer, load_vae, tokens_of
from .engine.safetensors_file import opened
from .engine.train_buckets import parse
from .engine.train_plan import TrainEstimate
from .host import Host, contained
from .lora import find_adapter

if TYPE_CHECKING:
    import torch

# Only what needs saying beyond the name; ranges are checked where the settings are made.
HELP = {
    "frames": "length of a training clip, 8N + 1; default: the base's",
    "height": "px; default: the base's",
    "width": "px; default: the base's",
    "steps": "optimiser steps",
    "fps": "resample clips to this rate; default: spread over the whole clip",
    "rank": "of the adapter",
    "alpha": "default: the rank, so that weight 1 is scale 1",
    "target_modules": "attention, attention+ff, or module name endings with commas",
    "image_ratio": "share of the batches that are stills, 0 to 1; default: their share of the files",
    "caption_dropout": "share of captions left empty, for guidance",
    "timestep_power": "t = 1000 u^p; below 1 leans towards high noise, where layout and motion are decided",
    "mixed_precision": "no, bf16 or fp16",
    "optimiser": "adamw, or adamw8bit: its moments in 8 bits",
    "quantise": "the base's weights while it is trained on: none, int8 or int4 (torchao), nf4 (4 bits, bitsandbytes)",
    "gradient_checkpointing": "compute activations anew in the backward pass: far less memory, a third more time",
    "buckets": "sizes besides the one above, with commas: WxH or WxHxF, or auto; every file takes the nearest",
    "checkpoint_every": "steps between checkpoints; default: 5 to 10 in all (early, middle, near the end, best on "
    "validation, before a jump of the loss, last); 0: the last alone",
    "checkpoint_minutes": "another to go on from, at least so often; 0: none",
    "validation_every": "steps between measurements of the held-out loss",
    "validation_items": "files held out; default: a tenth, at most 16",
    "sample_every": "steps between clips on the way, in <run>/samples; default: none",
    "sample_steps": "denoising steps of such a clip",
    "sample_prompts": "what they show; again for more; default: captions of held-out clips",
    "trigger_words": "with commas; written into the file",
}


def train(
    host: Host,
    base: Base,
    data: Path,
    name: str,
    settings: dict[str, Any],
    out: Path | None = None,
    fresh: bool = False,
    report: Progress | None = None,
    force: bool = False,
    start_from: str = "",
) -> Result:
    """Train `name` on `data`. `settings` are fields of `finetune.Settings`; what is left out takes its default.

    Goes on from the last checkpoint of the same run, unless `fresh`. `report` hears of losses and samples, too:
    (done, total, what, {"loss" | "validation" | "learning_rate" | "sample": …} or None); without it the host hears of
    the steps. What cannot fit into memory is refused before anything is loaded, unless `force`. `start_from` names an
    adapter, or a file, to begin with; it becomes the new one's parent.

    Raises:
        DatasetError, UsageError, GeometryError, ModelError (NotEnoughMemory), AdapterError (of `start_from`),
            ResumeError, Diverged, Cancelled (a checkpoint is kept)
    """
    if not name or any(c in name for c in '/\\:*?"<>|.') or name != name.strip():
        raise UsageError(
            f"{name!r} cannot name an adapter: no dots, slashes or other characters that files cannot have."
        )
    whole = _settings(base, {"title": name, **settings})
    items = dataset.scan(data)
    if not force:
        _estimate(base, whole).check()
    target = out or contained(host.output_folder, f"training/{name}")
    return finetune(
        trainable(base), items, whole, target, host.cache_folder,
        progress=report or (lambda done, total, what, _extra=None: host.progress(done, total, what)),
        check_cancelled=host.check_cancelled, resume=not fresh,
        start=find_adapter(host, start_from, anywhere=True) if start_from else None,
    )  # fmt: skip


def estimate(host: Host, base: Base, settings: dict[str, Any]) -> TrainEstimate:
    """What such a training takes of memory, by part, and how long a step is at least; nothing is loaded.

    The device is asked for its speed by a fifth of a second of matrix products. `settings` as `train` takes them.

    Raises:
        UsageError, GeometryError, ModelError
    """
    host.check_cancelled()
    return _estimate(base, _settings(base, settings), measure=True)


def _estimate(base: Base, settings: Settings, measure: bool = False) -> TrainEstimate:
    checkpoint, (device, dtype) = base.checkpoint(), _placed(base)
    processes = max(1, int(os.environ.get("WORLD_SIZE", "1") or 1))  # as a launcher says it
    free = free_memory(device)
    return train_plan.estimate(
        transformer_config(checkpoint),
        settings,
        base=checkpoint.name,
        task="i2v" if checkpoint.family.task == "i2v" else "t2v",
        dtype=dtype,
        vae=json.loads((checkpoint.part("vae") / "config.json").read_text(encoding="utf-8")),
        device=device,
        available=free // processes if device == "cpu" else free,
        text_bytes=_text_encoder(checkpoint, device, dtype)[1],
        vae_bytes=dtype.itemsize * _numbers(checkpoint.part("vae")),
        processes=processes,
        measure=measure,
    )


def _text_encoder(checkpoint: Checkpoint, device: str, dtype: torch.dtype) -> tuple[str, int]:
    """Where the text encoder computes, and the bytes that it takes of the training's device: it goes back to the CPU
    where the device has no room for it."""
    size = dtype.itemsize * _numbers(checkpoint.part("text_encoder"))
    return ("cpu", 0) if device != "cpu" and size > 0.9 * free_memory(device) else (device, size)


def _numbers(folder: Path) -> int:
    """How many numbers the weights of a part are, by their headers."""
    count = 0
    for file in part_files(folder):
        with opened(file) as source:
            count += sum(math.prod(spec.shape) for spec in source.tensors.values())
    return count


def _settings(base: Base, given: dict[str, Any]) -> Settings:
    if base.quantise != "none":
        raise UsageError(
            f"The base is quantised ({base.quantise}) for renders; a training packs it itself: choose the base without "
            "quantisation, and the training's own setting (--qlora int8 or nf4)."
        )
    checkpoint = base.checkpoint()
    frames, width, height = checkpoint.defaults()
    known = {field.name for field in dataclasses.fields(Settings)}
    strange = sorted(set(given) - known)
    if strange:
        raise UsageError(f"unknown training settings: {', '.join(strange)}; known are {', '.join(sorted(known))}.")
    whole = Settings(**{"frames": frames, "width": width, "height": height, **given})
    checkpoint.check_geometry(whole.frames, whole.width, whole.height)
    for bucket in parse(whole.buckets, whole.frames):
        checkpoint.check_geometry(bucket.frames, bucket.width, bucket.height)
    return whole


def _placed(base: Base) -> tuple[str, torch.dtype]:
    """The device that trains, and what the base is loaded in."""
    device, family = choose_device(base.device), base.checkpoint().family
    return device, DTYPES[base.dtype if base.dtype != "auto" else "fp32" if device == "cpu" else family.dtype]


def trainable(base: Base) -> TrainableBase:
    """A base's parts, fresh for training: the resident transformer is never trained on."""
    checkpoint = base.checkpoint()
    if checkpoint.family.task == "control":
        raise WrongFamily(f"{checkpoint.name} is a control model; adapters are trained on text and image bases.")
    device, dtype = _placed(base)
    text: list[Any] = []

    def encode(prompts: list[str]) -> Any:
        if not text:  # only when a caption is not in the cache
            tokenizer, encoder = load_text(checkpoint, dtype)
            text.append((tokenizer, encoder.to(_text_encoder(checkpoint, device, dtype)[0])))
        tokenizer, encoder = text[0]
        return tokens_of(encoder, tokenizer, prompts, checkpoint.text_length)

    from diffusers import CogVideoXDDIMScheduler

    scheduler: Any = CogVideoXDDIMScheduler.load_config(checkpoint.part("scheduler"), local_files_only=True)
    return TrainableBase(
        transformer=load_transformer(checkpoint, dtype),
        vae=load_vae(checkpoint, dtype),
        encode_prompts=encode,
        scheduler_config=scheduler,
        name=checkpoint.name,
        base_hash=transformer_hash(checkpoint),
        task="i2v" if checkpoint.family.task == "i2v" else "t2v",
        max_text_length=checkpoint.text_length,
        encoder_hash=fingerprint(checkpoint.part("text_encoder")),
        encoders_done=text.clear,
    )


def add_settings(parser: argparse.ArgumentParser) -> None:
    """One option per training setting, with the default that the setting has."""
    parser.add_argument("--estimate", action="store_true", help="say what it takes of memory and time, and stop")
    parser.add_argument("--anyway", action="store_true", help="train although the estimate says that it does not fit")
    group = parser.add_argument_group("training")
    for field in dataclasses.fields(Settings):
        if field.name in ("title",):
            continue
        default = None if field.default is dataclasses.MISSING else field.default
        text = HELP.get(field.name, "")
        if default not in (None, (), "") and not isinstance(default, bool):
            text = f"{text}; default {default}" if text else f"default {default}"
        option = "--qlora" if field.name == "quantise" else f"--{field.name.replace('_', '-')}"  # a base has --quantise
        if field.name == "sample_prompts":
            group.add_argument("--sample-prompt", dest="sample_prompts", action="append", metavar="TEXT", help=text)
        elif isinstance(default, bool):
            group.add_argument(option, action="store_true", default=None, help=text)
        else:
            kind = _kind(str(field.type))
            dest = option[2:].replace("-", "_")
            group.add_argument(option, dest=dest, type=kind, metavar="TEXT" if kind is str else "N", help=text)


def settings_from(args: argparse.Namespace) -> dict[str, Any]:
    names = {f.name: f.name for f in dataclasses.fields(Settings) if f.name != "title"} | {"quantise": "qlora"}
    given = {name: getattr(args, dest) for name, dest in names.items() if getattr(args, dest, None) is not None}
    for name in ("trigger_words", "target_modules", "buckets"):
        value = given.get(name)
        if isinstance(value, str) and (name != "target_modules" or "," in value):
            given[name] = tuple(part.strip() for part in value.split(",") if part.strip())
    return given


def _kind(annotation: str) -> type:
    return str if "str" in annotation else float if "float" in annotation else int

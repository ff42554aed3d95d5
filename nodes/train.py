"""Fine-tune an adapter on a base, from a folder of clips and stills with captions."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from .engine import dataset
from .engine.checkpoints import fingerprint, transformer_hash
from .engine.errors import UsageError, WrongFamily
from .engine.finetune import Progress, Result, Settings, TrainableBase
from .engine.finetune import train as finetune
from .engine.pipeline import DTYPES, Base, choose_device, load_text, load_transformer, load_vae, tokens_of
from .host import Host, contained

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
    "checkpoint_every": "steps between checkpoints (the adapter alone, never the base)",
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
) -> Result:
    """Train `name` on `data`. `settings` are fields of `finetune.Settings`; what is left out takes its default.

    Goes on from the last checkpoint of the same run, unless `fresh`. `report` hears of losses and samples, too:
    (done, total, what, {"loss" | "validation" | "learning_rate" | "sample": …} or None); without it the host hears of
    the steps.

    Raises:
        DatasetError, UsageError, GeometryError, ModelError, ResumeError, Diverged, Cancelled (a checkpoint is kept)
    """
    if not name or any(c in name for c in '/\\:*?"<>|.') or name != name.strip():
        raise UsageError(
            f"{name!r} cannot name an adapter: no dots, slashes or other characters that files cannot have."
        )
    checkpoint = base.checkpoint()
    frames, width, height = checkpoint.defaults()
    known = {field.name for field in dataclasses.fields(Settings)}
    strange = sorted(set(settings) - known)
    if strange:
        raise UsageError(f"unknown training settings: {', '.join(strange)}; known are {', '.join(sorted(known))}.")
    whole = Settings(**{"frames": frames, "width": width, "height": height, "title": name, **settings})
    checkpoint.check_geometry(whole.frames, whole.width, whole.height)
    items = dataset.scan(data)
    target = out or contained(host.output_folder, f"training/{name}")
    return finetune(
        trainable(base), items, whole, target, host.cache_folder,
        progress=report or (lambda done, total, what, _extra=None: host.progress(done, total, what)),
        check_cancelled=host.check_cancelled, resume=not fresh,
    )  # fmt: skip


def trainable(base: Base) -> TrainableBase:
    """A base's parts, fresh for training: the resident transformer is never trained on."""
    checkpoint = base.checkpoint()
    if checkpoint.family.task == "control":
        raise WrongFamily(f"{checkpoint.name} is a control model; adapters are trained on text and image bases.")
    device = choose_device(base.device)
    name = base.dtype if base.dtype != "auto" else "fp32" if device == "cpu" else checkpoint.family.dtype
    dtype = DTYPES[name]
    text: list[Any] = []

    def encode(prompts: list[str]) -> Any:
        if not text:  # only when a caption is not in the cache
            text.append(load_text(checkpoint, dtype))
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
    )


def add_settings(parser: argparse.ArgumentParser) -> None:
    """One option per training setting, with the default that the setting has."""
    group = parser.add_argument_group("training")
    for field in dataclasses.fields(Settings):
        if field.name in ("title",):
            continue
        default = None if field.default is dataclasses.MISSING else field.default
        text = HELP.get(field.name, "")
        if default not in (None, (), "") and not isinstance(default, bool):
            text = f"{text}; default {default}" if text else f"default {default}"
        option = f"--{field.name.replace('_', '-')}"
        if field.name == "sample_prompts":
            group.add_argument("--sample-prompt", dest="sample_prompts", action="append", metavar="TEXT", help=text)
        elif isinstance(default, bool):
            group.add_argument(option, action="store_true", default=None, help=text)
        else:
            kind = _kind(str(field.type))
            group.add_argument(option, type=kind, metavar="TEXT" if kind is str else "N", help=text)


def settings_from(args: argparse.Namespace) -> dict[str, Any]:
    names = [f.name for f in dataclasses.fields(Settings) if f.name != "title"]
    given = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    for name in ("trigger_words", "target_modules"):
        value = given.get(name)
        if isinstance(value, str) and (name == "trigger_words" or "," in value):
            given[name] = tuple(part.strip() for part in value.split(",") if part.strip())
    return given


def _kind(annotation: str) -> type:
    return str if "str" in annotation else float if "float" in annotation else int

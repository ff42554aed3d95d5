"""Studies: many arms over the same prompts and seeds. Plan, say what it will cost, render what is missing, measure.

arms_of(sweep) -> arms      what varies, as all its combinations
plan_study(…) -> Plan       every setting said, every file hashed; nothing is loaded
begin(host, name, plan)     the folder, new or gone on with
estimate(host, study)       clips, steps, minutes, bytes
run(host, study)            resumable at any moment, also after a kill
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from .engine import VERSION, measures, video
from .engine.checkpoints import fingerprint, transformer_hash
from .engine.denoise import Settings
from .engine.errors import CogLoomError, StudyError, UsageError
from .engine.files import write_atomic
from .engine.lora_stack import LoraStack
from .engine.pipeline import DTYPES, Base, bases, choose_device
from .engine.study import Arm, Cell, Key, Plan, Study, common_steps, items, latents_file, step_counts, steps_of
from .engine.trunk import Trunk
from .host import Host, contained
from .lora import adapter_cache
from .render import Shot, decode, hash_of, sample, settings_for, version_of

if TYPE_CHECKING:
    from .engine.preview import Look

FOLDER = "studies"  # in the host's output folder
BASE = "base"  # the label of the arm without adapters
VARIED = ("steps", "guidance", "dynamic_guidance", "scheduler", "frames", "width", "height", "strength", "negative")


@dataclass(frozen=True)
class Sweep:
    """What varies between arms, which are all combinations of it.

    stacks: (label, stack); a label of "" is made from the stack. weights: each replaces the weights of a stack, an
    entry's own being its share. vary: settings of VARIED, with their values. base_too: an arm without adapters as well.
    """

    stacks: tuple[tuple[str, LoraStack], ...] = ()
    weights: tuple[float, ...] = ()
    vary: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    base_too: bool = True
    axis: str = "stack"  # what the stacks are: "checkpoint", where they are one run's


def arms_of(sweep: Sweep) -> tuple[Arm, ...]:
    """All combinations, the base first; what would be the same twice is there once. Hashes are added by `plan_study`.

    Raises:
        UsageError: a setting that cannot be varied, or no arm. StackError
    """
    for name, values in sweep.vary:
        if name not in VARIED:
            raise UsageError(f"{name!r} cannot be varied; {', '.join(VARIED)} can.")
        if not values:
            raise UsageError(f"{name}: no value to vary over.")
    settings = [dict(zip((n for n, _ in sweep.vary), v, strict=True)) for v in product(*(v for _, v in sweep.vary))]
    found: list[tuple[str, LoraStack, tuple[tuple[str, str], ...]]] = []
    if sweep.base_too or not sweep.stacks:
        found.append((BASE, LoraStack(), ((sweep.axis, BASE),) if sweep.stacks else ()))
    for label, stack in sweep.stacks:
        name = label or named(stack, weights=not sweep.weights)
        at = ((sweep.axis, name),) if len(sweep.stacks) > 1 or not sweep.weights or sweep.base_too else ()
        if not sweep.weights:
            found.append((name, stack, at))
        for weight in sweep.weights:
            scaled = replace(stack, entries=tuple(replace(e, weight=e.weight * weight) for e in stack))
            if not scaled.active().entries and sweep.base_too:
                continue  # weight 0 is the base, which is an arm already
            shown = f"{weight:g}"
            found.append((f"{name} × {shown}" if label or len(stack) > 1 else named(scaled), scaled,
                          (*at, ("weight", shown))))  # fmt: skip
    arms = []
    for own in settings:
        more = tuple((key, _said(value)) for key, value in own.items())
        tail = "".join(f", {key} {value}" for key, value in more)
        arms += [
            Arm(f"{label}{tail}", stack, items(own), (*at, *more), ("",) * len(stack)) for label, stack, at in found
        ]
    return tuple(arms)


def named(stack: LoraStack, weights: bool = True) -> str:
    """What is active, in a few words; without `weights`, those of 1 are left out."""
    said = []
    for entry in stack.active():
        more = "".join(f"[{text}]" for text in (entry.blocks, entry.steps) if text)
        weight = f" {entry.weight:g}" if weights or entry.weight != 1 else ""
        said.append(f"{entry.name}{weight}{more}")
    return " + ".join(said)[:180] or BASE


def _said(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def plan_study(
    host: Host,
    base: Base,
    arms: Sequence[Arm],
    prompts: Sequence[str],
    seeds: Sequence[int],
    shot: Shot | None = None,
    reference: str = "",
    title: str = "",
) -> Plan:
    """A plan with every setting said and every file hashed, checked as far as can be without loading the base. `shot`
    has what all arms share; its prompt and seed are not used.

    Raises:
        UsageError, GeometryError, ModelError, AdapterError, StackError
    """
    shot = rounded(Shot("") if shot is None else shot)
    checkpoint = base.checkpoint()
    shared = _plain(settings_for(base, shot))
    cache, hashed = adapter_cache(), []
    for arm in arms:
        own = dict(arm.settings)
        resolved = _plain(settings_for(base, replace(shot, **own)))
        differing = {name: value for name, value in resolved.items() if value != shared[name]}
        hashes = tuple(cache.get(Path(entry.adapter)).sha256 for entry in arm.stack)
        hashed.append(replace(arm, settings=items(differing), hashes=hashes))
    device = choose_device(base.device)
    dtype = base.dtype
    if dtype == "auto":  # as a base is placed
        family = checkpoint.family.dtype
        dtype = family if device != "cpu" or family == "fp32" else "bf16"
    common = {
        "transformer": transformer_hash(checkpoint),
        "vae": fingerprint(checkpoint.part("vae")),
        "text_encoder": fingerprint(checkpoint.part("text_encoder")),
        "device": device,
        "dtype": dtype,
    }
    given = (("image", shot.image), ("video", shot.video))
    start = tuple((name, str(hash_of(tensor))) for name, tensor in given if tensor is not None)
    return Plan(
        base, tuple(hashed), tuple(prompts), tuple(seeds), items(shared), reference, items(common), start, title
    )  # fmt: skip


def rounded(shot: Shot) -> Shot:
    """With its picture or video in 8 bits: as a file gives it back."""
    as_kept = {
        name: video.eight_bit(tensor).float() / 255
        for name, tensor in (("image", shot.image), ("video", shot.video))
        if tensor is not None
    }
    return replace(shot, **as_kept)


def _plain(settings: Settings) -> dict[str, Any]:
    return {name: value for name, value in asdict(settings).items() if name not in ("prompt", "seed")}


def made_with() -> dict[str, str]:
    return {"cogloom": VERSION, "torch": torch.__version__, "diffusers": version_of("diffusers")}


def begin(host: Host, where: str | Path, plan: Plan, shot: Shot | None = None) -> Study:
    """The study's folder: a name is one in the host's output, a Path anywhere (for a person at the command line). The
    picture or video of `shot` is kept in it.

    Raises:
        StudyError, UsageError, DiskFull
    """
    study = Study.begin(_folder(host, where), plan, made_with())
    if shot is not None and shot.image is not None:
        video.write_png(shot.image, study.folder / "start.png")
    if shot is not None and shot.video is not None:
        video.write_video(shot.video, study.folder / "start.mkv", 8.0)
    return study


def open_study(host: Host, where: str | Path) -> Study:
    """Raises StudyError, UsageError."""
    return Study.open(_folder(host, where))


def _folder(host: Host, where: str | Path) -> Path:
    if isinstance(where, Path):
        return where
    if not where.strip(" ."):
        raise UsageError("The study has no name.")
    return contained(host.output_folder / FOLDER, where)


def list_studies(host: Host) -> list[str]:
    """Names of the host's studies, the last begun first."""
    found = (host.output_folder / FOLDER).glob("*/study.json")
    return [path.parent.name for path in sorted(found, key=lambda path: -path.stat().st_mtime)]


# --- what it will cost ---


@dataclass(frozen=True)
class Estimate:
    """What is left to do. `seconds` is None where nothing like it was rendered here before."""

    cells: int
    done: int
    steps: int  # denoising steps of all that is left
    shared: int  # of them, those that arms share and that are not computed again
    seconds: float | None
    bytes: int  # on disk

    def words(self) -> str:
        left = self.cells - self.done
        time = "" if self.seconds is None else f", about {_minutes(self.seconds)}"
        done = f" of {self.cells} ({self.done} are there)" if self.done else ""
        shared = f" of {self.steps:,}, for {self.shared:,} are shared between arms" if self.shared else ""
        return (
            f"{left} clips{done}; {self.steps - self.shared:,} denoising steps{shared}{time}; "
            f"about {self.bytes / 1e6:,.0f} MB."
        )


def _minutes(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def estimate(host: Host, study: Study, probe: bool = False) -> Estimate:
    """What is left of a study. With `probe`, where no pace is known for a size, two steps of it are rendered to find
    out, which loads the base.

    Raises:
        With `probe`, what `sample` raises.
    """
    plan = study.plan
    paces = _Paces(host, study)
    moving = any(name == "video" for name, _ in plan.start)
    units = [[cell for cell in cells if not study.done(cell)] for _, cells in plan.units()]
    left = [cell for unit in units for cell in unit]
    by_arm = {arm.label: steps_of(plan.settings_of(arm), moving) for arm in plan.arms}
    total, all_shared = step_counts(plan)
    steps = sum(by_arm[cell.arm] for cell in left)
    shared = round(all_shared * steps / total) if total else 0
    seconds: float | None = 0.0
    size = 0
    for arm in plan.arms:
        settings = plan.settings_of(arm)
        count = sum(cell.arm == arm.label for cell in left)
        pixels = settings["frames"] * settings["width"] * settings["height"]
        size += round(count * pixels * (1.6 + 0.25 + 0.2))  # lossless, to look at, latents: measured on the demo
        if not count:
            continue
        pace = paces.of(settings)
        if pace is None and probe:
            pace = _probe(host, study, arm, paces)
        if pace is None:
            seconds = None
        elif seconds is not None:
            seconds += count * (by_arm[arm.label] * pace[0] * (1 - shared / max(steps, 1)) + pace[1])
    return Estimate(len(plan.cells), len(plan.cells) - len(left), steps, shared, seconds, size)


class _Paces:
    """Seconds of a step and of what follows the steps, by base, size and guidance, kept from study to study."""

    def __init__(self, host: Host, study: Study) -> None:
        self._file = host.cache_folder / "pace.json"
        base = study.plan.base
        common = dict(study.plan.common)
        self._key = (
            f"{common['transformer'][:16]} {common['device']} {common['dtype']} {base.placement} {base.quantise}"
        )
        try:
            known = json.loads(self._file.read_bytes())
        except (OSError, ValueError):  # a cache: what cannot be read is measured again
            known = {}
        self._known: dict[str, Any] = known if isinstance(known, dict) else {}

    def _at(self, settings: Mapping[str, Any]) -> str:
        guided = settings["guidance"] > 1
        return f"{self._key} {settings['frames']}x{settings['width']}x{settings['height']} {guided}"

    def of(self, settings: Mapping[str, Any]) -> tuple[float, float] | None:
        pace = self._known.get(self._at(settings))
        if isinstance(pace, list) and len(pace) == 2 and all(isinstance(n, (int, float)) for n in pace):
            return float(pace[0]), float(pace[1])
        return None

    def learn(self, settings: Mapping[str, Any], step: float, after: float) -> None:
        old = self.of(settings)
        if old is not None:  # the last few count most
            step, after = (0.7 * before + 0.3 * now for before, now in zip(old, (step, after), strict=True))
        self._known[self._at(settings)] = [step, after]
        write_atomic(self._file, json.dumps(self._known, indent=1).encode())


def _probe(host: Host, study: Study, arm: Arm, paces: _Paces) -> tuple[float, float]:
    settings = study.plan.settings_of(arm)
    shot = shot_of(study, arm, study.plan.prompts[0], study.plan.seeds[0])
    few = 2 if "video" not in dict(study.plan.start) else max(2, round(2 / shot.strength))
    stack = LoraStack(hold=arm.stack.hold)  # adapters cost little beside a step
    sample(host, study.plan.base, stack, replace(shot, steps=few))  # loads, and warms up
    timed = sample(host, study.plan.base, stack, replace(shot, steps=few))
    started = time.perf_counter()
    decode(host, study.plan.base, timed.samples)
    paces.learn(settings, timed.seconds / 2, 2 * (time.perf_counter() - started))  # files take as long as decoding
    return cast("tuple[float, float]", paces.of(settings))


# --- rendering ---


def shot_of(study: Study, arm: Arm, prompt: str, seed: int) -> Shot:
    """What one cell renders. Raises StudyError: the study's picture or video is gone or another."""
    known = {field.name for field in fields(Shot)}
    settings = {name: value for name, value in study.plan.settings_of(arm).items() if name in known}
    start: dict[str, torch.Tensor] = {}
    for name, digest in study.plan.start:
        file = study.folder / ("start.png" if name == "image" else "start.mkv")
        start[name] = video.read_image(file) if name == "image" else video.read_video(file)[0]
        if hash_of(start[name]) != digest:
            raise StudyError(f"{file.name} in {study.folder} is not the {name} that the study was planned with.")
    return replace(Shot(prompt, seed=seed), **settings, **start)


class _Watched:
    """The host, saying which clip of how many is being worked on."""

    def __init__(self, host: Host, label: str) -> None:
        self._host, self._label = host, label

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)

    def progress(self, done: int, total: int, what: str, preview: Look | None = None) -> None:
        self._host.progress(done, total, f"{self._label}: {what}", preview)


def render_cell(host: Host, study: Study, cell: Cell, trunk: tuple[Trunk, int] | None = None) -> dict[str, Any]:
    """Render one cell and put it in the folder, its json last. Returns what goes into the log.

    Raises:
        What `sample`, `decode` and `write_video` raise. A cell is there as a whole or not at all.
    """
    arm = study.plan.arm(cell.arm)
    shot = shot_of(study, arm, cell.prompt, cell.seed)
    loads = bases.loads
    counted = (trunk[0].computed, trunk[0].shared) if trunk else (0, 0)
    sampled = sample(host, study.plan.base, arm.stack, shot, trunk=trunk)
    computed, shared = (
        (trunk[0].computed - counted[0], trunk[0].shared - counted[1]) if trunk else (None, 0)
    )  # fmt: skip
    started = time.perf_counter()
    frames = decode(host, study.plan.base, sampled.samples)
    # Notes tell of this run, such as that the base was loaded; they go into the log, so that a cell's files are the
    # same however often the study was stopped and gone on with.
    record = {name: value for name, value in sampled.record.items() if name != "notes"}
    tags = {"cogloom": json.dumps({**record, "notes": []})}
    write_atomic(_made(study.path(cell, ".safetensors")), latents_file(sampled.samples))
    video.write_video(frames, study.path(cell, ".mkv"), sampled.fps)
    video.write_video(frames, study.path(cell, ".mp4"), sampled.fps, tags)
    study.finish(cell, {"record": record, "latents_sha256": hash_of(sampled.samples)})
    return {
        "cell": cell.id,
        "arm": cell.arm,
        "seconds": round(sampled.seconds, 4),
        "after": round(time.perf_counter() - started, 4),
        "computed": computed,
        "shared": shared,
        "loaded": bases.loads - loads,
        "notes": sampled.record["notes"],
    }


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def run(
    host: Host,
    study: Study,
    metrics: Sequence[str] | None = None,
    on_cell: Callable[[Cell], None] = lambda cell: None,
    anywhere: bool = False,
) -> Study:
    """Render what is missing, and measure it: `metrics` are names as `measures.find` takes them, by default all that
    are built in. Stopped at any moment, also by a kill, it goes on with what was finished.

    Raises:
        StudyError: another process renders this study. Cancelled, and what `sample` raises: finished cells stay.
    """
    chosen = measures.find(metrics, anywhere)
    with study.alone() as mine:
        if not mine:
            raise StudyError(f"Another process is rendering {study.folder}. Wait for it, or stop it.")
        video.sweep_partial(study.folder / "cells")
        paces, trunk = _Paces(host, study), Trunk()
        done = sum(study.done(cell) for cell in study.plan.cells)
        total = len(study.plan.cells)
        for _, cells in study.plan.units():
            missing = [cell for cell in cells if not study.done(cell)]
            trunk.forget()
            for number, cell in enumerate(missing):
                host.check_cancelled()
                arm = study.plan.arm(cell.arm)
                later = [study.plan.arm(other.arm) for other in missing[number + 1 :]]
                before = [study.plan.arm(other.arm) for other in missing[:number]]
                keep = max((common_steps(study.plan, arm, other) for other in (*before, *later)), default=0)
                watched = cast("Host", _Watched(host, f"{done + 1} of {total}, {cell.arm}, seed {cell.seed}"))
                told = render_cell(watched, study, cell, (trunk, keep))
                study.log(**told)
                if not told["loaded"] and told["computed"]:
                    settings = study.plan.settings_of(arm)
                    paces.learn(settings, told["seconds"] / told["computed"], told["after"])
                done += 1
                on_cell(cell)
            measure(host, study, chosen, cells)
    return study


def measure(
    host: Host, study: Study, metrics: Sequence[Any] | None = None, cells: Sequence[Cell] | None = None
) -> None:
    """Measure finished cells by what they lack of `metrics`. Paired ones wait for the reference arm's clip.

    Raises:
        Unreadable, StudyError, Cancelled
    """
    chosen = measures.find(None) if metrics is None else metrics
    by_key: dict[Key, measures.Shown] = {}
    for cell in study.plan.cells if cells is None else cells:
        if not study.done(cell):
            continue
        known = study.measured(cell)
        values, notes = dict(known.get("values", {})), list(known.get("notes", ()))
        have = set(known.get("metrics", ()))
        reference = None
        if cell.arm != study.plan.reference:
            reference = by_key.get(cell.key)
            if reference is None and (beside := _reference(study, cell)) is not None:
                reference = by_key[cell.key] = shown(study, beside)
        lacking = [one for one in chosen if one.name not in have and not (_paired(one) and reference is None)]
        if not lacking:
            continue
        host.check_cancelled()
        host.progress(0, 1, f"measuring {cell.arm}, seed {cell.seed}")
        new = measures.measure(shown(study, cell), reference, lacking, notes.append)
        have |= {one.name for one in lacking}
        study.keep_measured(
            cell, {"metrics": sorted(have), "values": dict(sorted({**values, **new}.items())), "notes": notes}
        )
        study.keep_metrics({name: asdict(measures.described(name, lacking)) for name in new})


def _paired(metric: Any) -> bool:
    return isinstance(metric, measures.Metric) and metric.paired


def _reference(study: Study, cell: Cell) -> Cell | None:
    for other in study.plan.cells:
        if other.arm == study.plan.reference and other.key == cell.key:
            return other if study.done(other) else None
    return None


def shown(study: Study, cell: Cell) -> measures.Shown:
    """A finished cell as it is measured: read back from its files."""
    frames, fps = study.frames(cell)
    return measures.Shown(frames, fps, study.latents(cell), cell.prompt, cell.seed, study.path(cell, ".mkv"))


def dtype_of(study: Study) -> torch.dtype:
    return DTYPES[dict(study.plan.common)["dtype"]]


def refused(study: Study) -> list[str]:
    """What keeps this study from going on here, in sentences: files that are gone or others."""
    found = []
    for arm in study.plan.arms:
        for entry, digest in zip(arm.stack, arm.hashes, strict=True):
            try:
                if adapter_cache().get(Path(entry.adapter)).sha256 != digest:
                    found.append(f"{arm.label}: {entry.name} is another file than the study was planned with")
            except CogLoomError as error:
                found.append(f"{arm.label}: {error}")
    return list(dict.fromkeys(found))

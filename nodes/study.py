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
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from .engine import VERSION, dataset, heldout, measures, video
from .engine.checkpoints import fingerprint, transformer_hash
from .engine.denoise import Settings
from .engine.errors import CogLoomError, StudyError, UsageError
from .engine.files import write_atomic
from .engine.lora_stack import Asked, LoraStack
from .engine.pipeline import DTYPES, Base, bases, choose_device
from .engine.study import Arm, Cell, Key, Plan, Study, common_steps, items, latents_file, step_counts, steps_of
from .engine.trunk import Trunk
from .host import Host, contained
from .lora import adapter_cache, read_stack, stack_loras
from .model import choose_base
from .render import Shot, decode, hash_of, sample, settings_for, version_of

if TYPE_CHECKING:
    from .engine.preview import Look

FOLDER = "studies"  # in the host's output folder


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


# --- a plan that travels ---


def portable(plan: Plan) -> dict[str, Any]:
    """A plan without anything of this machine: adapters by name and hash, the base by name."""
    base = {k: v for k, v in asdict(plan.base).items() if k not in ("folder", "file", "stamp")}
    arms = []
    for arm in plan.arms:
        stack = [str(Asked(e.name, e.weight if e.on else 0.0, e.blocks, e.steps, e.partial)) for e in arm.stack]
        arms.append(
            {"label": arm.label, "stack": stack, "hold": arm.stack.hold, "sha256": list(arm.hashes),
             "settings": dict(arm.settings), "at": dict(arm.at)}
        )  # fmt: skip
    return {
        "cogloom_study": 1,
        "title": plan.title,
        "base": base,
        "common": dict(plan.common),
        "settings": dict(plan.settings),
        "start": dict(plan.start),
        "reference": plan.reference,
        "prompts": list(plan.prompts),
        "seeds": list(plan.seeds),
        "arms": arms,
    }


def read_plan(
    host: Host, path: Path, shot: Shot | None = None, note: Callable[[str], None] = lambda text: None
) -> Plan:
    """`portable`'s plan for this machine. A picture or video that clips start from is not in it and comes in `shot`.
    `note` hears of what is not as it was.

    Raises:
        UsageError: it is no plan, or lacks its picture. AdapterNotFound, ModelError, StackError
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["cogloom_study"] != 1:
            raise UsageError(
                f"{path.name} is a plan of version {str(data['cogloom_study'])[:20]}; this reads version 1."
            )
        known = {field.name for field in fields(Base)} - {"folder", "file", "stamp"}
        base = choose_base(host, **{name: value for name, value in data["base"].items() if name in known})
        arms = [
            Arm(
                str(row["label"]),
                stack_loras(host, [str(text) for text in row["stack"]], LoraStack(hold=str(row["hold"]))),
                items(row["settings"]),
                tuple((str(k), str(v)) for k, v in row["at"].items()),
                ("",) * len(row["stack"]),
            )
            for row in data["arms"]
        ]
        given = Shot("") if shot is None else shot
        settings = {name: value for name, value in data["settings"].items() if name in {f.name for f in fields(Shot)}}
        plan = plan_study(
            host, base, arms, [str(p) for p in data["prompts"]], [int(s) for s in data["seeds"]],
            replace(given, **settings), str(data["reference"]), str(data.get("title", "")),
        )  # fmt: skip
        hashes = [row["sha256"] for row in data["arms"]]
        common, start = dict(data["common"]), dict(data["start"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path.name} is no plan of a study ({type(error).__name__} {str(error)[:120]}).") from error
    for arm, then in zip(plan.arms, hashes, strict=True):
        for entry, now, was in zip(arm.stack, arm.hashes, then, strict=False):
            if now != was:
                note(f"{arm.label}: {entry.name} is another file than it was.")
    for name, value in plan.common:
        if common.get(name) != value:
            note(f"The {name} is {str(value)[:16]} and was {str(common.get(name))[:16]}; frames may differ.")
    for name, was in start.items():
        if dict(plan.start).get(name) != was:
            raise UsageError(
                f"The study starts from {'an image' if name == 'image' else 'a video'}; give it by --{name}."
            )
    return plan


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
        if not left:
            return f"All {self.cells} clips are there."
        time = "" if self.seconds is None else f", about {_minutes(self.seconds)}"
        done = f" of {self.cells} ({self.done} are there)" if self.done else ""
        shared = f" of {self.steps:,}, for {self.shared:,} are shared between arms" if self.shared else ""
        return (
            f"{left} clips{done}; {self.steps - self.shared:,} denoising steps{shared}{time}; "
            f"about {self.bytes / 1e6:,.0f} MB."
        )

    def words_among(self, workers: int) -> str:
        """The time again, when it is known how many share the work. Nobody takes less than one clip's."""
        left = self.cells - self.done
        shares = min(workers, left)
        if self.seconds is None or shares < 2:
            return f"{workers} {'worker' if workers == 1 else 'workers'}."
        longest = -(-left // shares) / left
        return f"{workers} workers: about {_minutes(self.seconds * longest)}, where each is as quick as this machine."


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
    shot = shot_of(study.plan, arm, study.plan.prompts[0], study.plan.seeds[0], start_of(study))
    few = 2 if "video" not in dict(study.plan.start) else max(2, round(2 / shot.strength))
    stack = LoraStack(hold=arm.stack.hold)  # adapters cost little beside a step
    sample(host, study.plan.base, stack, replace(shot, steps=few))  # loads, and warms up
    timed = sample(host, study.plan.base, stack, replace(shot, steps=few))
    started = time.perf_counter()
    decode(host, study.plan.base, timed.samples)
    paces.learn(settings, timed.seconds / 2, 2 * (time.perf_counter() - started))  # files take as long as decoding
    return cast("tuple[float, float]", paces.of(settings))


# --- rendering ---


def start_of(study: Study) -> dict[str, torch.Tensor]:
    """The picture or video that clips start from, by `Shot`'s names. Raises StudyError: it is gone or another."""
    start: dict[str, torch.Tensor] = {}
    for name, digest in study.plan.start:
        file = study.folder / ("start.png" if name == "image" else "start.mkv")
        start[name] = video.read_image(file) if name == "image" else video.read_video(file)[0]
        if hash_of(start[name]) != digest:
            raise StudyError(f"{file.name} in {study.folder} is not the {name} that the study was planned with.")
    return start


def shot_of(plan: Plan, arm: Arm, prompt: str, seed: int, start: Mapping[str, torch.Tensor]) -> Shot:
    """What one cell renders; `start` is `start_of` its study."""
    known = {field.name for field in fields(Shot)}
    settings = {name: value for name, value in plan.settings_of(arm).items() if name in known}
    return replace(Shot(prompt, seed=seed), **settings, **start)


class _Watched:
    """The host, saying which clip of how many is being worked on."""

    def __init__(self, host: Host, label: str) -> None:
        self._host, self._label = host, label

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)

    def progress(self, done: int, total: int, what: str, preview: Look | None = None) -> None:
        self._host.progress(done, total, f"{self._label}: {what}", preview)


@dataclass(frozen=True, eq=False)
class Rendered:
    """A cell's clip before it is in the folder: latents as `Sampled` has them, frames (F, H, W, 3) in [0, 1], frames
    per second, the record, and what the log tells of it."""

    samples: torch.Tensor
    frames: torch.Tensor
    fps: float
    record: dict[str, Any]
    told: dict[str, Any]


def render_cell(
    host: Host, plan: Plan, cell: Cell, start: Mapping[str, torch.Tensor], trunk: tuple[Trunk, int] | None = None
) -> Rendered:
    """Render one cell; `start` is `start_of` its study. It needs no folder, and so may be done on another machine.

    Raises:
        What `sample` and `decode` raise.
    """
    arm = plan.arm(cell.arm)
    shot = shot_of(plan, arm, cell.prompt, cell.seed, start)
    loads = bases.loads
    counted = (trunk[0].computed, trunk[0].shared) if trunk else (0, 0)
    sampled = sample(host, plan.base, arm.stack, shot, trunk=trunk)
    computed, shared = (
        (trunk[0].computed - counted[0], trunk[0].shared - counted[1]) if trunk else (None, 0)
    )  # fmt: skip
    started = time.perf_counter()
    frames = decode(host, plan.base, sampled.samples)
    # Notes tell of this run, such as that the base was loaded; they go into the log, so that a cell's files are the
    # same however often the study was stopped and gone on with.
    record = {name: value for name, value in sampled.record.items() if name != "notes"}
    told = {
        "cell": cell.id,
        "arm": cell.arm,
        "seconds": round(sampled.seconds, 4),
        "after": round(time.perf_counter() - started, 4),
        "computed": computed,
        "shared": shared,
        "loaded": bases.loads - loads,
        "notes": sampled.record["notes"],
    }
    return Rendered(sampled.samples, frames, sampled.fps, record, told)


def keep_cell(study: Study, cell: Cell, rendered: Rendered) -> dict[str, Any]:
    """Put a rendered cell in the folder, its json last, so that it is there as a whole or not at all. Returns what goes
    into the log.

    Raises:
        What `write_video` raises.
    """
    started = time.perf_counter()
    tags = {"cogloom": json.dumps({**rendered.record, "notes": []})}
    write_atomic(_made(study.path(cell, ".safetensors")), latents_file(rendered.samples))
    video.write_video(rendered.frames, study.path(cell, ".mkv"), rendered.fps)
    video.write_video(rendered.frames, study.path(cell, ".mp4"), rendered.fps, tags)
    study.finish(cell, {"record": rendered.record, "latents_sha256": hash_of(rendered.samples)})
    after = rendered.told["after"] + time.perf_counter() - started
    return {**rendered.told, "after": round(after, 4)}


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
        gone = refused(study)
        if gone:
            raise StudyError(f"{study.folder.name}: {'; '.join(gone)}. Put the files back, or begin another study.")
        video.sweep_partial(study.folder / "cells")
        paces, trunk = _Paces(host, study), Trunk()
        done = sum(study.done(cell) for cell in study.plan.cells)
        total = len(study.plan.cells)
        for _, cells in study.plan.units():
            missing = [cell for cell in cells if not study.done(cell)]
            start = start_of(study) if missing else {}
            trunk.forget()
            for cell in missing:
                host.check_cancelled()
                arm = study.plan.arm(cell.arm)
                others = [study.plan.arm(other.arm) for other in missing if other != cell]
                keep = max((common_steps(study.plan, arm, other) for other in others), default=0)
                watched = cast("Host", _Watched(host, f"{done + 1} of {total}, {cell.arm}, seed {cell.seed}"))
                watched.progress(0, 1, "rendering")  # denoising tells nothing before its first step is done
                told = keep_cell(study, cell, render_cell(watched, study.plan, cell, start, (trunk, keep)))
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


def measure_heldout(host: Host, study: Study, folder: Path, draws: heldout.Draws | None = None) -> None:
    """The held-out loss of each arm on a dataset: clips, with captions, that no adapter was trained on. It needs no
    rendering, and depends on an arm's stack alone. What is there already, of the same data and draws, is kept.

    Raises:
        DatasetError, ModelError, StudyError: another process is at it. Cancelled
    """
    draws = heldout.Draws() if draws is None else draws
    plan = study.plan
    found = dataset.scan(folder)
    asked = {"dataset": folder.name, "data": dataset.fingerprint(found), "draws": asdict(draws)}
    with study.alone() as mine:
        if not mine:
            raise StudyError(f"Another process is rendering {study.folder}. Wait for it, or stop it.")
        held: heldout.HeldOut | None = None
        known: dict[LoraStack, list[list[Any]]] = {}
        for arm in plan.arms:
            kept = study.heldout(arm)
            if {name: kept.get(name) for name in asked} == asked:
                known[arm.stack.canonical()] = kept["losses"]
                continue
            host.check_cancelled()
            if arm.stack.canonical() not in known:
                if held is None:
                    settings = dict(plan.settings)
                    sizes = {name: settings[name] for name in ("frames", "width", "height")}
                    held = heldout.encode(
                        plan.base, found, host.cache_folder, **sizes, progress=_told(host, "held out"),
                        check=host.check_cancelled,
                    )  # fmt: skip
                label = f"held-out loss of {arm.label}"
                host.make_room(plan.base)
                with bases.session(
                    plan.base, read_stack(arm.stack), host.cache_folder, hold=arm.stack.hold, check=host.check_cancelled
                ) as session:
                    host.holds(session.resident)
                    losses = heldout.losses(session, held, draws, _told(host, label), host.check_cancelled)
                known[arm.stack.canonical()] = [[item, draw, loss] for (item, draw), loss in losses.items()]
            study.keep_heldout(arm, {**asked, "losses": known[arm.stack.canonical()]})
        study.keep_metrics({heldout.LOSS.name: asdict(heldout.LOSS)})


def _told(host: Host, label: str) -> heldout.Progress:
    return lambda done, total, what, _=None: host.progress(done, total, f"{label}: {what}" if what else label)


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

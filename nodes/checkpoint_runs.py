"""The checkpoints of a training run: what is there, any of them back to the last bit, and fewer of them.

list_checkpoints(run)                     -> what each is, why it was kept, and what it takes
verify_run(run)                           -> what is damaged, file by file
restore_checkpoint(run, step, target)     -> a whole checkpoint, from which training goes on
prune_run(run, keep, dry_run)             -> what stays is packed anew first, and then the rest removed
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .engine import history, train_state
from .engine.errors import ResumeError, UsageError
from .engine.files import alone, cannot_write
from .engine.train_state import ADAPTER, DIFFERENCE, RECORD, WHOLE
from .host import Host, contained

WORDS = ("first", "best", "last", "key")  # that a list of steps may have: `key` are those that training would keep


@dataclass(frozen=True)
class Kept:
    """One checkpoint. Sizes in bytes; None where the state.json does not tell."""

    step: int
    name: str
    why: tuple[str, ...]
    form: str  # whole, difference, both, or adapter alone
    before: str  # the checkpoint that it is a difference to; empty: to none
    bytes: int  # of all its files
    state_bytes: int  # of the state, in the form that is kept longest
    whole_bytes: int  # of the state when it is whole; 0 where it was let go
    epoch: float | None
    loss: float | None
    validation: float | None  # of the latest validation up to here
    learning_rate: float | None
    problem: str  # what is wrong with it at a glance; `verify_run` looks at every byte

    @property
    def ratio(self) -> float | None:
        """How many times smaller the state is than whole."""
        return self.whole_bytes / self.state_bytes if self.whole_bytes and self.form != "whole" else None


@dataclass(frozen=True)
class Checked:
    step: int
    name: str
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Restored:
    folder: Path
    step: int
    sha256: str  # of the state, as it was when it was saved
    bytes: int
    links: int  # differences that were followed

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "folder": str(self.folder)}


@dataclass(frozen=True)
class Pruned:
    removed: tuple[int, ...]
    kept: tuple[int, ...]
    repacked: tuple[int, ...]  # that were differences to removed ones, or whole
    before_bytes: int
    after_bytes: int
    dry_run: bool

    @property
    def won(self) -> int:
        return self.before_bytes - self.after_bytes

    def words(self) -> list[str]:
        """Lines for a person, without the sizes."""
        would = "would be " if self.dry_run else ""
        told = {"kept": self.kept, "removed": self.removed}
        if self.repacked:
            told["packed anew"] = self.repacked
        return [f"{would}{what}: {', '.join(map(str, steps)) or 'none'}" for what, steps in told.items()]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "won": self.won}


def run_folder(host: Host, name: str) -> Path:
    """A run's folder, by its path or its name in the output's training folder. Raises UsageError."""
    path = Path(name)
    return path if path.is_dir() else contained(host.output_folder, f"training/{name}")


def list_checkpoints(run: Path) -> tuple[Kept, ...]:
    """By step. Nothing large is read.

    Raises:
        UsageError: no such folder, or one without a checkpoint.
    """
    return tuple(_kept(folder) for folder in _folders(run))


def checkpoint_at(run: Path, step: int) -> Path:
    """Its folder. Raises UsageError, as `list_checkpoints`, and with the steps that there are."""
    return _named(_folders(run), step, Path(run))


def verify_run(run: Path) -> tuple[Checked, ...]:
    """Read every byte, and restore every difference once. Raises UsageError, as `list_checkpoints`."""
    found = []
    for folder in _folders(run):
        problems = []
        try:
            state = train_state.read_state(folder)
        except ResumeError as error:
            problems.append(str(error))
            state = {}
        said = state.get("adapter_sha256")
        if not (folder / ADAPTER).is_file():
            problems.append(f"{folder.name}/{ADAPTER} is not there.")
        elif said and history.sha256_of(folder / ADAPTER) != said:
            problems.append(f"{folder.name}/{ADAPTER} is damaged: its bytes do not match their SHA-256.")
        whole = folder / WHOLE
        if state and whole.is_file() and history.sha256_of(whole) != state["sha256"]:
            problems.append(f"{folder.name}/{WHOLE} is damaged: its bytes do not match their SHA-256.")
        if state and (folder / DIFFERENCE).is_file():
            try:
                with train_state.whole_state(folder, use_whole=False):
                    pass
            except ResumeError as error:
                problems.append(str(error))
        found.append(Checked(train_state.step_of(folder), folder.name, tuple(problems)))
    return tuple(found)


def restore_checkpoint(run: Path, step: int, target: Path, force: bool = False) -> Restored:
    """Write `target`/checkpoint-<step>/ with its state whole, to the bit. Training with `target` as its folder goes on
    from there.

    Raises:
        UsageError: no such checkpoint, or `target` has it already (`force` replaces it).
        ResumeError: it cannot be restored; names the file or the link that is missing or damaged.
        DiskFull: no room; `target` is as it was.
    """
    folder = checkpoint_at(run, step)
    final = Path(target) / folder.name
    if final.resolve() == folder.resolve():
        raise UsageError(f"{final} is the checkpoint itself; name another folder.")
    if final.exists() and not force:
        raise UsageError(f"{final} is there already; name another folder, or replace it (--force).")
    state = train_state.read_state(folder)
    part = Path(target) / f".{folder.name}-{os.getpid()}-restored.part"
    try:
        part.mkdir(parents=True)
        with train_state.whole_state(folder, part) as path:
            shutil.copyfile(path, part / WHOLE)
        shutil.copyfile(folder / ADAPTER, part / ADAPTER)
        shutil.copyfile(folder / RECORD, part / RECORD)
        if history.sha256_of(part / WHOLE) != state["sha256"]:
            raise ResumeError(f"{folder.name} changed while it was restored; try again.")
        if state.get("adapter_sha256") not in (None, history.sha256_of(part / ADAPTER)):
            raise ResumeError(f"{folder.name}/{ADAPTER} is damaged: its bytes do not match their SHA-256.")
        if final.exists():
            shutil.rmtree(final)
        os.replace(part, final)
    except FileNotFoundError as error:
        raise ResumeError(f"{folder.name} lacks {Path(error.filename or '').name}.") from error
    except OSError as error:
        raise cannot_write(final, error) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Restored(final, step, state["sha256"], _size(final), train_state.links(folder))


def prune_run(run: Path, keep: Sequence[int | str] = ("key",), dry_run: bool = False) -> Pruned:
    """Remove the checkpoints that `keep` does not name, by step or by one of WORDS; what stays is kept lean, and comes
    back to the same bits. `dry_run`: everything is made and measured, and nothing kept or removed.

    Raises:
        UsageError: `keep` names one that is not there, or nothing would stay; or another program is at it.
        ResumeError: something that stays is damaged; nothing was removed.
        DiskFull: no room to pack anew; nothing was removed.
    """
    run = Path(run)
    folders = _folders(run)
    steps = _chosen(folders, keep, run)
    stay = [folder for folder in folders if train_state.step_of(folder) in steps]
    go = [folder for folder in folders if train_state.step_of(folder) not in steps]
    with alone(train_state.lock_of(run)) as mine:
        if not mine:
            raise UsageError(f"{run.name} is being written to by another program; try again when it is done.")
        before = sum(map(_size, folders))
        todo = train_state.changes(stay, go)
        after = before - sum(map(_size, go))
        for change in todo:
            if change.repack and dry_run:
                new = train_state.pack(change.folder, change.before, dry=True).bytes
                after += new - _bytes(change.folder / DIFFERENCE)
            after -= _bytes(change.folder / WHOLE) if change.lean else 0
        if not dry_run:
            train_state.rearrange(stay, go)
            after = sum(map(_size, stay))
    return Pruned(
        tuple(map(train_state.step_of, go)),
        tuple(map(train_state.step_of, stay)),
        tuple(train_state.step_of(change.folder) for change in todo if change.repack),
        before,
        after,
        dry_run,
    )


# --- small things -----------------------------------------------------------------------------------------------------


def _folders(run: Path) -> list[Path]:
    run = Path(run)
    if not run.is_dir():
        raise UsageError(f"{run} is no folder. Name the folder of a training run: it has checkpoint-000050 and so on.")
    found = train_state.checkpoints(run)[::-1]
    if not found:
        raise UsageError(f"{run.name} has no checkpoint in it (checkpoint-000050 and so on).")
    return found


def _named(folders: Sequence[Path], step: int, run: Path) -> Path:
    for folder in folders:
        if train_state.step_of(folder) == step:
            return folder
    there = ", ".join(str(train_state.step_of(folder)) for folder in folders)
    raise UsageError(f"{run.name} has no checkpoint at step {step}; it has {there}.")


def _chosen(folders: Sequence[Path], keep: Sequence[int | str], run: Path) -> frozenset[int]:
    steps: set[int] = set()
    for one in keep:
        if isinstance(one, int) and not isinstance(one, bool):
            steps.add(train_state.step_of(_named(folders, one, run)))
        elif one in ("first", "last"):
            steps.add(train_state.step_of(folders[0 if one == "first" else -1]))
        elif one == "best":
            steps.add(_best(folders, run))
        elif one == "key":
            reasons = [(train_state.step_of(f), tuple(train_state.read_state(f).get("why", ()))) for f in folders]
            steps |= train_state.retained(reasons)
        else:
            raise UsageError(f"{one!r} is no checkpoint; name steps, or {', '.join(WORDS)}.")
    if not steps:
        raise UsageError("Nothing would stay; name at least one checkpoint to keep.")
    return frozenset(steps)


def _best(folders: Sequence[Path], run: Path) -> int:
    measured = []
    for folder in folders:
        at = {int(step): float(loss) for step, loss in train_state.read_state(folder)["validation"]}
        step = train_state.step_of(folder)
        measured += [(at[step], step)] if step in at else []
    if not measured:
        raise UsageError(f"None of {run.name}'s checkpoints has a validation loss of its own step, so none is best.")
    return min(measured)[1]


def _kept(folder: Path) -> Kept:
    whole, packed = folder / WHOLE, folder / DIFFERENCE
    form = {(True, True): "both", (True, False): "whole", (False, True): "difference"}.get(
        (whole.is_file(), packed.is_file()), "adapter alone"
    )
    before, whole_bytes, problem, state = "", _bytes(whole), "", {}
    try:
        state = train_state.read_state(folder)
        if packed.is_file():
            need, whole_bytes = train_state.packed_from(folder)
            before = need.name if need else ""
            if need and not (folder.parent / need.name).is_dir():
                problem = f"it is a difference to {need.name}, which is not there."
        if not (folder / ADAPTER).is_file():
            problem = f"{ADAPTER} is not there."
    except ResumeError as error:
        problem = str(error)
    told = state.get("training") or {}
    losses = [loss for loss in state.get("losses", [])[-train_state.RECENT :] if isinstance(loss, (int, float))]
    validation = state.get("validation") or [[0, None]]
    rates = state.get("learning_rates") or [None]
    return Kept(
        step=train_state.step_of(folder),
        name=folder.name,
        why=tuple(str(one) for one in state.get("why", ())),
        form=form,
        before=before,
        bytes=_size(folder),
        state_bytes=_bytes(packed) or _bytes(whole),
        whole_bytes=whole_bytes,
        epoch=told.get("epoch"),
        loss=math.fsum(losses) / len(losses) if losses else None,
        validation=validation[-1][1],
        learning_rate=rates[0],
        problem=problem,
    )


def _size(folder: Path) -> int:
    return sum(_bytes(path) for path in folder.iterdir())


def _bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0

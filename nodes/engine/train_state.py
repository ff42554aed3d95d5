"""What a training run keeps on disk: checkpoints to go on from, and those of them that tell its story.

    save(out, step, tensors, state, write_adapter, why)   written aside and renamed: a kill leaves whole ones only
    settle(out, step)                                which older ones stay, and those as differences
    newest(out) -> Saved | None                      the newest whole one, its bytes checked against their hash
    whole_state(folder)                              any one's state, to the bit
    check_resumable(saved, identity, steps, …)       or ResumeError, naming what differs

    out/checkpoint-000050/state.json            step, why, settings, losses, what was trained on; hashes of the others
    out/checkpoint-000050/adapter.safetensors   the adapter so far, ready to use
    out/checkpoint-000050/state.safetensors     float32 adapter, the optimiser's moments, the generator's state: of the
                                                newest two that stay; of the others
    out/checkpoint-000050/state.difference      the same, less what the adapter's file and the checkpoint before say

A difference is packed while the one before is still whole, tried, and only then takes the place of the whole one. So a
kill at any moment leaves each checkpoint in one form or the other, or in both.

Nothing here is ever pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import history
from .errors import CogLoomError, ResumeError, UsageError
from .files import alone, write_atomic
from .history import Reference, sha256_of

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("cogloom")

STATE_VERSION = 1
STATE_CAP = 2**26  # bytes of a state.json: losses of three million steps
RECENT = 20  # steps over which a loss is averaged, as the adapter's own metadata has it
WHOLE, DIFFERENCE, RECORD, ADAPTER = "state.safetensors", "state.difference", "state.json", "adapter.safetensors"
_NAME = re.compile(r"checkpoint-(\d{6,9})", re.ASCII)

# Why a checkpoint was saved. Those that are planned and have no number here are at the end, or asked for.
PLAN = {"early": 0.1, "first quarter": 0.25, "middle": 0.5, "third quarter": 0.75, "near the end": 0.9}
ASKED, LAST, BEST, JUMP, TIME, STOPPED = "asked for", "last", "best", "jump", "time", "stopped"
MOST = 10  # key checkpoints

WINDOW, FEWEST = 64, 20  # losses that a jump is measured against, at most and at least
JUMPED = 6.0  # robust standard deviations of the losses' logarithms
APART = 50  # steps between two checkpoints for a jump, at least
LONG, TIMES = 25, 10.0  # steps over which, and how far above the base's loss, training counts as diverged
SOON = 5  # steps whose losses tell whether an adapter was good


@dataclass
class Saved:
    """A whole checkpoint, read and checked."""

    folder: Path
    state: dict[str, Any]
    tensors: dict[str, Tensor] = field(repr=False)

    @property
    def step(self) -> int:
        return self.state["step"]


# --- when to save, and what stays: pure ---


def planned(step: int, steps: int) -> tuple[str, ...]:
    """Why a training of `steps` keeps `step`, of its own accord."""
    found = [why for why, share in PLAN.items() if step == max(1, round(share * steps))]
    return (*found, LAST) if step == steps else tuple(found)


def jumped(losses: Sequence[float], loss: float) -> bool:
    """Whether `loss` is far above those before it, by their own spread: batches and timesteps alone move it a lot.

    The spread is the median absolute deviation of the logarithms. In 3,917 steps of 14 trainings of the demo base none
    was five of the standard deviations that it stands for above the middle, and one was four.
    """
    before = [math.log(max(one, 1e-12)) for one in losses[-WINDOW:]]
    if len(before) < FEWEST:
        return False
    middle = statistics.median(before)
    spread = 1.4826 * statistics.median(abs(one - middle) for one in before)
    return math.log(max(loss, 1e-12)) - middle > JUMPED * max(spread, 0.05)


def exploded(losses: Sequence[float], base: float) -> bool:
    """Whether training has been far above `base`, the loss it began with, for long: nothing comes back from there."""
    return len(losses) >= LONG and statistics.median(losses[-LONG:]) > TIMES * base


def retained(found: Sequence[tuple[int, Sequence[str]]]) -> frozenset[int]:
    """Steps to keep of (step, why): the newest, what was asked for or planned, the best on validation, the one before
    the latest jump of the loss and the one before that. What says no reason was saved by an earlier version, and stays.
    """
    steps = sorted(step for step, _ in found)
    if not steps:
        return frozenset()
    of = {why: max((step for step, reasons in found if why in reasons), default=0) for why in (BEST, JUMP)}
    keep = {steps[-1], *(step for step, reasons in found if not reasons or {ASKED, LAST} & set(reasons))}
    keep |= {of[BEST]} if of[BEST] else set()
    keep |= {of[JUMP], *[step for step in steps if step < of[JUMP]][-1:]} if of[JUMP] else set()
    plan = {step for step, reasons in found if set(PLAN) & set(reasons)} - keep
    keep |= plan
    # A run that was prolonged has the plans of two lengths: the one nearest to its neighbours goes.
    while len(keep) > MOST:
        order = sorted(keep)
        inner = [(b - a, at) for a, at, b in zip(order, order[1:], order[2:], strict=False) if at in plan]
        if not inner:
            break
        keep.discard(min(inner)[1])
    return frozenset(keep)


# --- from the live objects and back ---


def tensors_of(params: Mapping[str, Any], optimiser: Any, rng: Tensor) -> dict[str, Tensor]:
    """Everything that is not a plain number: `param.<name>`, `<moment>.<name>` for each of the optimiser's, `rng`."""
    from .train_quant import moments

    tensors = {f"param.{name}": parameter.detach() for name, parameter in params.items()}
    return {"rng": rng} | tensors | moments(optimiser, dict(params))


def restore_tensors(saved: Saved, params: Mapping[str, Any], optimiser: Any) -> None:
    """Adapter and moments as they were. Raises ResumeError where they are not this training's."""
    from .train_quant import restore_moments

    found = {name[6:]: t for name, t in saved.tensors.items() if name.startswith("param.")}
    kept = {name: t for name, t in saved.tensors.items() if name != "rng" and not name.startswith("param.")}
    same = {name: (t.shape, t.dtype) for name, t in found.items()} == {n: (p.shape, p.dtype) for n, p in params.items()}
    # Only a skipped fp16 step leaves the moments out.
    if (
        not same
        or not all(t.isfinite().all() for t in found.values())
        or (kept and not restore_moments(optimiser, dict(params), kept))
    ):
        raise ResumeError(
            f"{saved.folder} holds {len(saved.tensors)} tensors, and not the finite ones of this training's "
            f"{len(params)} parameters and its optimiser; train into another folder, or start anew (--fresh)."
        )
    for name, parameter in params.items():
        parameter.data.copy_(found[name])


def parent_of(start: Path) -> dict[str, Any]:
    """What a record says of the adapter that a training began with. Raises AdapterNotFound, AdapterUnreadable"""
    from . import lora_file, safetensors_file

    sha256 = safetensors_file.sha256_of(start)
    return {"name": lora_file.adapter_name(start), "sha256": sha256, "bytes": start.stat().st_size}


def begin_with(start: Path, params: Mapping[str, Any], targets: Sequence[str], scale: float) -> None:
    """An adapter's numbers in place of fresh ones. What it adds to a layer stays the same to float32's rounding: where
    its scale is not the training's, B takes the quotient.

    Raises:
        AdapterNotFound, AdapterUnreadable
        UsageError: it has other layers, ranks or kinds than are trained.
    """
    import torch

    from . import lora_file
    from .lora_kinds import LoRA

    adapter = lora_file.read(start)
    found = {module.path: module for module in adapter.modules}
    missing, more = sorted(set(targets) - set(found)), sorted(set(found) - set(targets))
    if missing or more or len(found) != len(adapter.modules):
        raise UsageError(
            f"{adapter.name} cannot be gone on with: it has {len(adapter.modules)} layers and {len(targets)} are "
            f"trained; the first that differs is {(missing or more or sorted(found))[0]}. Choose target_modules that "
            "name the layers that it has."
        )
    with torch.no_grad():
        for path, module in found.items():
            names = [next(n for n in params if n.startswith(f"{path}.lora_{side}.")) for side in "AB"]
            shapes = [tuple(params[name].shape) for name in names]
            if not isinstance(module, LoRA) or [tuple(module.A.shape), tuple(module.B.shape)] != shapes:
                raise UsageError(
                    f"{adapter.name} cannot be gone on with: in {path} it is a {module.kind} of rank {module.rank} for "
                    f"{'x'.join(map(str, module.shape))}, and a lora of rank {shapes[0][0]} for "
                    f"{shapes[1][0]}x{shapes[0][1]} is trained. Train with its rank, or bring it to this one with "
                    "`workshop resize`."
                )
            params[names[0]].copy_(module.A)
            params[names[1]].copy_(module.B.to(torch.float32) * (module.scale / scale))


# --- on disk ---


def folder_of(out: Path, step: int) -> Path:
    return out / f"checkpoint-{step:06d}"


def checkpoints(out: Path) -> list[Path]:
    """Checkpoint folders, the newest first."""
    folders = [f for f in out.glob("checkpoint-*") if _NAME.fullmatch(f.name) and f.is_dir()]
    return sorted(folders, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def read_state(folder: Path) -> dict[str, Any]:
    """A checkpoint's state.json. Raises ResumeError: it is not there, or damaged."""
    path = folder / RECORD
    try:
        with open(path, "rb") as file:
            data = file.read(STATE_CAP + 1)
        state = json.loads(data)
        said = state.get("check")
        whole = len(data) <= STATE_CAP and said in (None, _check(state))  # earlier versions wrote none
        if not whole or state["version"] != STATE_VERSION or state["step"] != step_of(folder):
            raise ValueError("its own check")
        return state
    except FileNotFoundError:
        raise ResumeError(f"{folder.name}/{RECORD} is not there.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ResumeError(f"{folder.name}/{RECORD} is damaged, or of another version ({error}).") from error


def _check(state: Mapping[str, Any]) -> str:
    """Of a state.json's content, for a digit that flipped leaves good JSON behind."""
    rest = {name: value for name, value in state.items() if name != "check"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _recorded(state: Mapping[str, Any]) -> bytes:
    plain = json.loads(json.dumps(state))
    return json.dumps({**plain, "check": _check(plain)}, indent=1).encode()


def save(
    out: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    write_adapter: Callable[[Path], None],
    why: Sequence[str] = (),
) -> Path:
    """Write a checkpoint aside and rename it: a kill leaves whole ones only. `state` gets its version and hashes here.

    Raises:
        DiskFull, UsageError: it cannot be written; those before it are as they were.
    """
    from safetensors.torch import save as serialise

    # Cloned: tensors that share memory are refused, and on the CPU .cpu() is no copy.
    data = serialise({name: tensor.cpu().clone().contiguous() for name, tensor in tensors.items()})
    whole = {"version": STATE_VERSION, "sha256": hashlib.sha256(data).hexdigest(), "step": step, "why": [*why], **state}
    final = folder_of(out, step)
    part = out / f".{final.name}-{os.getpid()}.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        write_atomic(part / WHOLE, data)
        write_adapter(part / ADAPTER)
        write_atomic(part / RECORD, _recorded({**whole, "adapter_sha256": sha256_of(part / ADAPTER)}))
        if final.exists():  # an earlier run that was cancelled here, or one that is broken
            _remove(final)
        os.replace(part, final)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return final


def add_reason(out: Path, step: int, why: str) -> None:
    """Say of the checkpoint at `step` that it is kept for `why`, too. One that was taken away meanwhile stays away."""
    folder = folder_of(out, step)
    try:
        state = read_state(folder)
    except ResumeError as error:
        log.warning("no reason added: %s", error)
        return
    if why not in state.get("why", ()):
        write_atomic(folder / RECORD, _recorded({**state, "why": [*state.get("why", ()), why]}))


def settle(out: Path, step: int) -> None:
    """After the checkpoint at `step` was saved: let go what does not stay, and keep older ones as differences.

    Steps beyond are of a run that was gone on with from an earlier one, and are left alone. What cannot be packed, for
    lack of room or because it is damaged, stays as it is, with a warning in the log.
    """
    with alone(lock_of(out)) as mine:
        if not mine:  # somebody prunes; the next checkpoint comes
            return
        found = []
        for folder in reversed(checkpoints(out)):
            if step_of(folder) <= step:
                try:
                    found.append((folder, tuple(read_state(folder).get("why", ()))))
                except ResumeError as error:
                    log.warning("left as it is: %s", error)
        keep = retained([(step_of(folder), why) for folder, why in found])
        stay = [folder for folder, _ in found if step_of(folder) in keep]
        go = [folder for folder, _ in found if step_of(folder) not in keep]
        try:
            rearrange(stay, go)
        except (CogLoomError, OSError) as error:  # OSError: a file that is open elsewhere, on Windows
            log.warning("not all checkpoints could be packed: %s", error)
            needed = {_needed(folder) for folder in stay}
            for folder in go:
                if folder.name not in needed and folder.is_dir():
                    with contextlib.suppress(OSError):  # the next time
                        _remove(folder)


def _needed(folder: Path) -> str:
    with contextlib.suppress(ResumeError):
        if need := history.needs(folder / DIFFERENCE).get("before"):
            return need.name
    return ""


@dataclass(frozen=True)
class Change:
    """What becomes of a checkpoint that stays."""

    folder: Path
    repack: bool
    before: Path | None  # to which it is then a difference
    lean: bool  # no longer whole


def changes(stay: Sequence[Path], go: Sequence[Path]) -> list[Change]:
    """For those that stay, in order: each but the newest a difference to the one before, the newest two whole, too.
    Those whose state was let go by an earlier version are passed over.

    Raises:
        ResumeError: a difference is damaged.
    """
    gone = {folder.name for folder in go}
    stay = [folder for folder in stay if (folder / WHOLE).is_file() or (folder / DIFFERENCE).is_file()]
    found = []
    for number, folder in enumerate(stay):
        packed = (folder / DIFFERENCE).is_file()
        need = history.needs(folder / DIFFERENCE).get("before") if packed else None
        found.append(
            Change(
                folder,
                repack=need.name in gone if need else not packed and number < len(stay) - 1,
                before=stay[number - 1] if number else None,
                lean=(folder / WHOLE).is_file() and number < len(stay) - 2,
            )
        )
    return found


def rearrange(stay: Sequence[Path], go: Sequence[Path]) -> None:
    """Remove `go`, and keep `stay` as `changes` says. What is a difference to one that goes is packed anew beforehand.

    Raises:
        ResumeError, DiskFull, UsageError: something that stays could not be packed; nothing was removed.
    """
    todo = changes(stay, go)
    for one in todo:
        if one.repack:
            pack(one.folder, one.before)
    for folder in go:
        _remove(folder)
    for one in todo:
        if one.lean:
            with contextlib.suppress(OSError):  # held open by another program, on Windows: the next time
                (one.folder / WHOLE).unlink()


def lock_of(out: Path) -> Path:
    """Whoever removes or packs checkpoints of a run holds it."""
    return out / ".checkpoints.lock"


# --- differences ---


def pack(folder: Path, before: Path | None, dry: bool = False) -> history.Packed:
    """Write a checkpoint's state.difference, against its adapter and `before`, and read it back for proof. `dry`: it is
    made and measured, and not kept.

    Raises:
        ResumeError: one of them is damaged.
        DiskFull, UsageError: no room; everything is as it was.
    """
    state = read_state(folder)
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(_scratch(folder.parent)))
        whole = stack.enter_context(whole_state(folder))
        references: dict[str, Reference] = {}
        adapter = folder / ADAPTER
        if state.get("adapter_sha256") and adapter.is_file() and sha256_of(adapter) == state["adapter_sha256"]:
            references["adapter"] = Reference(adapter, state["adapter_sha256"], f"{folder.name}/{ADAPTER}", _in_adapter)
        if before is not None:
            path = stack.enter_context(whole_state(before))
            references["before"] = Reference(path, read_state(before)["sha256"], before.name)
        made = history.pack(whole, scratch / DIFFERENCE, references)
        paths = {label: one.path for label, one in references.items()}
        if history.unpack(scratch / DIFFERENCE, scratch / WHOLE, paths) != state["sha256"]:
            raise ResumeError(f"{folder.name}/{WHOLE} changed while it was packed.")
        if not dry:
            os.replace(scratch / DIFFERENCE, folder / DIFFERENCE)
    return made


def _in_adapter(name: str) -> str:
    """`param.<layer>.lora_A.default.weight` -> `transformer.<layer>.lora_A.weight`: rounded, the same numbers."""
    found = re.fullmatch(r"param\.(.+\.lora_[AB])\.[^.]+\.weight", name)
    return f"transformer.{found[1]}.weight" if found else ""


@contextlib.contextmanager
def whole_state(folder: Path, scratch: Path | None = None, use_whole: bool = True) -> Iterator[Path]:
    """A state.safetensors as it was saved, to the bit: the one that is there, or restored below `scratch`, by default
    the run's folder, for as long as the body runs. Without `use_whole` the difference is restored in any case.

    Raises:
        ResumeError: it cannot be had; names the file or the link that is missing or damaged.
    """
    with contextlib.ExitStack() as stack:
        try:
            path = _restored(folder, scratch or folder.parent, stack, use_whole)
        except ResumeError as error:
            raise ResumeError(f"{folder.name} cannot be restored: {error}") from error
        yield path


def _restored(folder: Path, scratch: Path, stack: contextlib.ExitStack, use_whole: bool) -> Path:
    chain = _chain(folder, use_whole)
    last: Path | None = None
    if (use_whole or len(chain) > 1) and _is_whole(chain[-1]):
        last = chain.pop() / WHOLE
    if not chain:
        assert last is not None
        return last
    made = Path(stack.enter_context(_scratch(scratch)))
    for one in reversed(chain):
        target = made / f"{one.name}.safetensors"
        given = {"adapter": one / ADAPTER} | ({"before": last} if last else {})
        if history.unpack(one / DIFFERENCE, target, given) != read_state(one)["sha256"]:
            raise ResumeError(f"{one.name}/{DIFFERENCE} is of another state than {RECORD} tells.")
        if last is not None and last.parent == made:
            last.unlink()
        last = target
    assert last is not None
    return last


def _chain(folder: Path, use_whole: bool = True) -> list[Path]:
    """A checkpoint, the one it is a difference to, and so on, to the first that is whole or needs no other."""
    chain = [folder]
    while (not use_whole and len(chain) == 1) or not _is_whole(chain[-1]):
        at = chain[-1]
        if not (at / DIFFERENCE).is_file():
            if (at / WHOLE).is_file():
                raise ResumeError(f"{at.name}/{WHOLE} is damaged: its bytes do not match their SHA-256.")
            raise ResumeError(f"{at.name} has neither {WHOLE} nor {DIFFERENCE}: its optimiser's state was let go.")
        before = history.needs(at / DIFFERENCE).get("before")
        if before is None:
            break
        its = folder.parent / before.name
        # A difference is to an earlier step: whoever says otherwise would have us go round in circles.
        if not _NAME.fullmatch(before.name) or step_of(its) >= step_of(at):
            raise ResumeError(f"{at.name}/{DIFFERENCE} says that it is a difference to {before.name!r}.")
        if not its.is_dir():
            raise ResumeError(f"{at.name} is a difference to {before.name}, which is not there.")
        chain.append(its)
    return chain


def links(folder: Path) -> int:
    """How many differences lie between a checkpoint and a whole state. Raises ResumeError, as `whole_state`."""
    chain = _chain(folder)
    return len(chain) - _is_whole(chain[-1])


def packed_from(folder: Path) -> tuple[history.Need | None, int]:
    """What a state.difference is one to, if to any checkpoint, and the bytes of the whole state. Raises ResumeError."""
    needs, count = history.about(folder / DIFFERENCE)
    return needs.get("before"), count


def _is_whole(folder: Path) -> bool:
    path = folder / WHOLE
    return path.is_file() and sha256_of(path) == read_state(folder)["sha256"]


def _remove(folder: Path) -> None:
    """Out of sight at once, whatever happens while its files go."""
    aside = folder.with_name(f".{folder.name}-{os.getpid()}-old.part")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)


def _scratch(folder: Path) -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix=".checkpoint-", suffix=".part", dir=folder)


# --- going on ---


def newest(out: Path) -> Saved | None:
    """The newest checkpoint that can be gone on with; one that is damaged (a copy cut short) is passed over."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    for folder in checkpoints(out):
        try:
            state = read_state(folder)
            with whole_state(folder) as path:
                return Saved(folder, state, load(path.read_bytes()))
        except (ResumeError, OSError, SafetensorError) as error:
            log.info("passed over: %s", error)
    return None


def last_good(out: Path, losses: Sequence[float], base: float) -> Path | None:
    """The newest checkpoint whose bytes are right, and with whose adapter the loss was still near `base`, the one that
    training began with. `losses` has one for each step: that at s was computed with the adapter of checkpoint s.
    """
    for folder in checkpoints(out):
        step = step_of(folder)
        if step <= len(losses) and statistics.median(losses[step:][:SOON] or losses[-SOON:]) <= TIMES / 3 * base:
            with contextlib.suppress(ResumeError, OSError), whole_state(folder):
                return folder
    return None


def check_resumable(saved: Saved, identity: dict[str, Any], steps: int, lr_schedule: str) -> None:
    """Raises ResumeError naming what differs, with both values."""
    wayout = "Train into another folder, or start anew (--fresh)."
    was, now = saved.state["identity"], identity
    what = {"base": "another base", "data": "other clips or captions", "task": "another task"}
    for name, said in what.items():
        if was.get(name) != now[name]:
            raise ResumeError(
                f"{saved.folder} was trained on {said} ({name} {str(was.get(name))[:12]}, now {str(now[name])[:12]}). "
                + wayout
            )
    names = sorted(set(was["settings"]) | set(now["settings"]))
    pairs = [(name, was["settings"].get(name), now["settings"].get(name)) for name in names]
    changed = [f"{name} {before!r} (now {after!r})" for name, before, after in pairs if before != after]
    if changed:
        raise ResumeError(f"{saved.folder} was trained with {', '.join(changed)}. {wayout}")
    if steps != saved.state["steps"] and lr_schedule != "constant":
        raise ResumeError(
            f"{saved.folder} was trained for {saved.state['steps']} steps, now {steps} are wanted: the "
            f"{lr_schedule} schedule depends on their number, and only constant can be prolonged. {wayout}"
        )
    if steps < saved.step:
        raise ResumeError(
            f"{saved.folder} is at step {saved.step}, beyond the {steps} steps wanted now. Ask for at least "
            f"{saved.step} steps. {wayout}"
        )


def sweep(out: Path) -> None:
    """What a kill left behind. A checkpoint that was whole and about to take another's place gets it."""
    if not lock_of(out).exists():  # nobody ever rearranged anything here
        return _sweep(out)
    with alone(lock_of(out)) as mine:
        if mine:
            _sweep(out)


def _sweep(out: Path) -> None:
    for part in out.glob(".checkpoint-*.part"):
        found = re.fullmatch(r"\.(checkpoint-\d{6,9})-\d+\.part", part.name)
        if found and (part / RECORD).is_file() and not (out / found[1]).exists():  # which is written last
            os.replace(part, out / found[1])
        else:
            shutil.rmtree(part, ignore_errors=True)


def set_aside(out: Path) -> None:
    """Move the checkpoints of an earlier run out of the way; hours of work are not deleted for a flag."""
    folders = checkpoints(out)
    if not folders:
        return
    number = 1
    while (out / f"previous-{number}").exists():
        number += 1
    (out / f"previous-{number}").mkdir()
    for folder in folders:
        os.replace(folder, out / f"previous-{number}" / folder.name)

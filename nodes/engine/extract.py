"""A fine-tuned transformer becomes an adapter: what training changed in each layer, as a pair of small matrices.

Both models are read parameter by parameter, so that neither has to fit into memory. What is no matrix, norms and
biases, is kept as the difference itself or left out, and what is left out is in the report with its size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import native
from .errors import NotAModel, UsageError, WrongFamily
from .lora_kinds import Full
from .lora_write import best_target, check_name, write
from .lowrank import Cut, Fidelity, Kept, ratio, square
from .pristine import PristineFiles
from .shrink import Dense, Step, metadata, quiet, shrink
from .statistics import Difference, Measured, differences

ARMS = ("base", "fine-tuned", "extracted")


@dataclass(frozen=True)
class ArmLosses:
    """How well each predicts clips that it was not trained on: `heldout`'s loss, at noise and timesteps that are the
    same for all three, so that what they have in common cancels in the differences."""

    dataset: str
    clips: int
    draws: int  # of each clip
    means: Mapping[str, float]  # of ARMS
    differences: tuple[Difference, ...]  # fine-tuned − base, extracted − base, extracted − fine-tuned

    @property
    def recovered(self) -> float | None:
        """The share of what training gained that the adapter has; None where it gained nothing that can be told."""
        gain = self.differences[0]
        if not gain.told or gain.mean >= 0:
            return None
        return self.differences[1].mean / gain.mean

    def words(self) -> tuple[str, ...]:
        arms = ", ".join(f"{arm} {self.means[arm]:.4g}" for arm in ARMS)
        head = f"loss on {self.clips} held-out clips, {self.draws} draws each: {arms}"
        share = () if self.recovered is None else (f"{self.recovered:.1%} of what training gained is in the adapter",)
        return (head, *(difference.words() for difference in self.differences), *share)

    def to_json(self) -> dict[str, Any]:
        return {
            "dataset": self.dataset, "clips": self.clips, "draws": self.draws, "means": dict(self.means),
            "differences": [difference.to_json() for difference in self.differences], "recovered": self.recovered,
            "words": list(self.words()),
        }  # fmt: skip


def compare_losses(
    found: Mapping[str, Mapping[tuple[str, int], float]], dataset: str, clips: int, draws: int
) -> ArmLosses:
    """`found`: of each of ARMS, (item's name, draw) -> loss, as `heldout.losses` gives them."""
    measured = Measured("held_out_loss", found, higher_is_better=False)
    base, tuned, extracted = ARMS
    told = differences([measured], [(base, tuned), (base, extracted), (tuned, extracted)])
    means = {arm: math.fsum(found[arm].values()) / max(len(found[arm]), 1) for arm in ARMS}
    return ArmLosses(dataset, clips, draws, means, told)


@dataclass(frozen=True)
class Extraction:
    """What came of it. Bytes are those of the files."""

    path: Path
    layout: str  # of `lora_write.TARGETS`
    fidelity: Fidelity
    unchanged: tuple[str, ...]  # parameters that are the base's to the bit
    cast: float  # share of ‖Δ‖² that the base has when it is only rounded as coarsely as the fine-tune is stored
    source_bytes: int
    target_bytes: int
    losses: ArmLosses | None = None  # of base, fine-tune and base with the adapter, where they were asked for

    def to_json(self, layers: bool = True) -> dict[str, Any]:
        return {
            "target": str(self.path),
            "layout": self.layout,
            "source_bytes": self.source_bytes,
            "target_bytes": self.target_bytes,
            "unchanged": len(self.unchanged),
            "cast": self.cast,
            "dropped_names": [one.name for one in self.fidelity.of("dropped")],
            **self.fidelity.to_json(layers),
            **({} if self.losses is None else {"losses": self.losses.to_json()}),
        }


def extract(
    tuned: PristineFiles,
    base: PristineFiles,
    path: Path,
    cut: Cut,
    *,
    rest: bool = True,
    as_trained: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    source_bytes: int = 0,
    record: Mapping[str, Any] | None = None,
    step: Step = quiet,
) -> Extraction:
    """Write tuned − base as an adapter: with diffusers' names where it is matrices alone, else with ComfyUI's.

    `tuned` and `base` read in float32. `rest`: norms, biases and whatever else is no matrix are kept in full, in
    float32; diffusers cannot read such a file. Without it they are dropped. `dtype` is that of the matrices, and the
    errors that are reported are those of the rounded ones. `record` goes into the metadata.

    A base in fp16 that was trained in bf16 comes back rounded, all over, which no low rank can follow: `cast` tells how
    much of the difference is that. With `as_trained` it is left out: the difference is to the base as rounded.

    Raises:
        WrongFamily: the two are not of one architecture. NotAModel: numbers that are not finite.
        UsageError: a size that is too small, or nothing to write. AdapterError, DiskFull; what `step` raises: nothing
        is written.
    """
    check_name(path)
    vectors, matrices = _parameters(tuned, base)
    total = len(vectors) + len(matrices)
    unchanged: list[str] = []
    full: list[Full] = []
    kept: dict[str, Kept] = {}
    casts: dict[str, float] = {}

    def difference(name: str) -> Dense | None:
        delta, casts[name] = _delta(tuned, base, name, torch.device(device), as_trained)
        if delta is None:
            unchanged.append(name)
        return None if delta is None else Dense(delta)

    # ComfyUI calls from inference mode; tensors made there could not be used in training.
    with torch.inference_mode(False), torch.no_grad():
        try:
            for n, name in enumerate(vectors):
                step(n, total, name)
                delta = difference(name)
                if delta is None:
                    continue
                layer, _, leaf = name.rpartition(".")
                # The table of learned positions is no parameter: no adapter of any program can add to it.
                if rest and leaf in ("weight", "bias") and delta.delta.ndim == 1:
                    full.append(Full(layer, delta.delta.cpu(), 1.0, leaf))
                    kept[name] = Kept(name, "full", 0, delta.norm(), 0.0)
                else:
                    kept[name] = Kept(name, "dropped", 0, delta.norm(), delta.norm())
            said = record or {}
            low, of = shrink(
                matrices, difference, cut, dtype, full, said, lambda n, _, what: step(len(vectors) + n, total, what)
            )
        finally:
            for files in (tuned, base):
                files.release()
    kept |= of
    fidelity = Fidelity(tuple(kept[name] for name in (*vectors, *matrices) if name in kept))
    modules = sorted([*full, *low.values()], key=lambda module: (module.path, module.leaf))
    if not modules:
        raise UsageError(
            f"{path.name}: nothing to write: of {total} parameters {len(unchanged)} are the base's to the bit, and "
            f"{len(fidelity.of('dropped'))} differences were dropped. Is it the base itself? Else keep norms and "
            "biases, too."
        )
    layout = best_target(modules)
    step(total, total, f"writing {path.name}")
    write(path, modules, layout, metadata(said, cut, fidelity))
    whole = math.fsum(one.norm**2 for one in fidelity.kept)
    cast = ratio(math.fsum(casts[one.name] for one in fidelity.kept), whole)
    return Extraction(path, layout, fidelity, tuple(unchanged), cast, source_bytes, path.stat().st_size)


def _parameters(tuned: PristineFiles, base: PristineFiles) -> tuple[list[str], list[str]]:
    """Those that are no matrix, and those that are. Raises WrongFamily when the two models do not go together."""
    there, wanted = tuned.shapes(), base.shapes()
    apart = [name for name in (*wanted, *there) if there.get(name) != wanted.get(name)]
    if apart:
        own, its = native.traits(wanted), native.traits(there)
        said = [
            f"{its.get(trait, 'nothing')} (the base: {own[trait]})" for trait in own if its.get(trait) != own[trait]
        ]
        said = said or [f"{apart[0]} is {there.get(apart[0])} (the base: {wanted.get(apart[0])})"]
        raise WrongFamily(
            f"The fine-tuned transformer is not of the base's architecture, {len(apart)} parameters differ in shape: "
            f"{'; '.join(said[:4])}. Name the base that it was trained from."
        )
    names = sorted(wanted)
    matrices = [name for name in names if len(wanted[name]) in (2, 4) and name.endswith(".weight")]
    return sorted(set(names) - set(matrices)), matrices


def _delta(
    tuned: PristineFiles, base: PristineFiles, name: str, device: torch.device, as_trained: bool
) -> tuple[Tensor | None, float]:
    """tuned − base in float32 on the device, None where they are alike; and ‖·‖² of what is left in it of the base's
    rounding to the precision of the fine-tune. Raises NotAModel."""
    new = tuned(name).to(device, torch.float32, copy=True)
    old = base(name).to(device, torch.float32)
    # By the values, for a file in float32 may have been trained and saved in bf16 before.
    stored = next((kind for kind in (torch.bfloat16, torch.float16) if torch.equal(new.to(kind).float(), new)), None)
    rounded = old if stored is None else old.to(stored).float()
    cast = square(rounded - old)
    if as_trained and math.isfinite(cast):
        old, cast = rounded, 0.0
    delta = new.sub_(old)
    size = square(delta)
    if not math.isfinite(size):
        raise NotAModel(
            f"{name} of the fine-tuned transformer or of the base has values that are not finite (NaN or infinity). "
            "Its training diverged, or the file is damaged; use an earlier checkpoint."
        )
    return (delta if size else None), (cast if math.isfinite(cast) else 0.0)

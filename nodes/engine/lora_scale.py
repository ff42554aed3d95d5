"""How strong "as trained" is: the factor on B·A, which half of the trainers do not write into their files.

An ordered list of witnesses; the first that speaks decides, and what it said is shown to the user with the number.
All of it is untrusted: numbers are bounded, and a pattern from a file is compared as text, never run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .errors import AdapterUnreadable
from .lora_names import DIFFUSERS, PEFT, SAT
from .safetensors_file import quoted, strict_json

ALPHA_CAP = 65536.0
ALPHA_KEYS = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}  # PEFT's types that are read, and their alpha
SAT_RANK = 128  # the smallest of its trainings that were published
_SIDECAR_CAP = 1 << 20  # bytes


class Scales(NamedTuple):
    of: Mapping[str, float]
    reason: str
    known: bool = True


@dataclass(frozen=True)
class Case:
    """What the witnesses may look at: the modules that an alpha applies to, so no differences in full."""

    path: Path
    metadata: Mapping[str, str]
    sidecar: Mapping[str, Any]
    alphas: Mapping[str, float]  # module path -> its .alpha tensor, where it has one
    ranks: Mapping[str, int]  # module path -> rank; 0 for a LoKr that has none, to which LyCORIS applies no alpha
    kinds: Mapping[str, str]  # module path -> lora, loha or lokr
    doras: frozenset[str]  # paths of the modules that have magnitudes
    layout: str

    def refuse(self, sentence: str) -> AdapterUnreadable:
        return AdapterUnreadable(
            f"{self.path.name}: {sentence}. If you know the scale, say it in {sidecar_path(self.path).name}: "
            '{"scale": 0.5}.'
        )

    def number(self, value: object, what: str) -> float:
        if type(value) not in (int, float) or not 0 < value <= ALPHA_CAP:  # type: ignore[operator]
            raise self.refuse(f"{what} is {quoted(value)}, not a number above 0 and up to {ALPHA_CAP:g}")
        return float(value)  # type: ignore[arg-type]

    def even(self, scale: float) -> dict[str, float]:
        return {path: scale if rank else 1.0 for path, rank in self.ranks.items()}

    def by_alpha(
        self, alphas: Mapping[str, float], where: str, root: bool = False, ranks: Mapping[str, float] | None = None
    ) -> Scales:
        pairs = {path: (alphas[path], rank) for path, rank in (ranks or self.ranks).items() if rank}
        if not pairs:
            return Scales(self.even(1.0), "1: the two sides of each LoKr are in full, to which no alpha applies")
        of = {path: alpha / (math.sqrt(rank) if root else rank) for path, (alpha, rank) in pairs.items()}
        low, high, sign = min(of.values()), max(of.values()), "√" if root else ""
        alpha, rank = min(pairs.values())
        one = len(set(pairs.values())) == 1
        how = f"alpha {alpha:g} / {sign or 'rank '}{rank:g}" if one else f"alpha / {sign}rank of each layer"
        return Scales(self.even(1.0) | of, f"{low:g}{f' to {high:g}' if high != low else ''}: {how} in {where}")


def _by_sidecar(case: Case) -> Scales | None:
    if "scale" not in case.sidecar:
        return None
    scale = float(case.sidecar["scale"])
    return Scales(dict.fromkeys(case.ranks, scale), f"{scale:g}: said in {sidecar_path(case.path).name}")


def _by_alpha_tensors(case: Case) -> Scales | None:
    if not case.alphas:
        return None
    if len(case.alphas) != len(case.ranks):
        raise case.refuse(f"{len(case.alphas)} of {len(case.ranks)} layers have an alpha, the others none")
    alphas = {path: case.number(value, f"{path}.alpha") for path, value in case.alphas.items()}
    return case.by_alpha(alphas, "the .alpha tensors")


def _by_diffusers(case: Case) -> Scales | None:
    config = _parsed(case, "lora_adapter_metadata")
    if isinstance(config, dict) and any(key.startswith("transformer.") for key in config):
        config = {k.removeprefix("transformer."): v for k, v in config.items() if k.startswith("transformer.")}
    return _by_config(case, config, "lora_adapter_metadata")


def _by_finetrainers(case: Case) -> Scales | None:
    return _by_config(case, _parsed(case, "lora_config"), "lora_config")


def _by_peft_folder(case: Case) -> Scales | None:
    """Heard when it surely is this file's: in a folder of many adapters, a config speaks for one of them at most."""
    file = case.path.with_name("adapter_config.json")
    if not file.is_file():
        return None
    if case.path.stem != "adapter_model" and sum(1 for _ in case.path.parent.glob("*.safetensors")) > 1:
        return None
    return _by_config(case, _small_json(file), file.name)


def _by_kohya(case: Case) -> Scales | None:
    try:  # "None" and "Dynamic" are found there too
        alpha = float(case.metadata["ss_network_alpha"][:40])
        dim = float(case.metadata["ss_network_dim"][:40]) if "ss_network_dim" in case.metadata else None
    except (KeyError, ValueError):
        return None
    alpha = case.number(alpha, "ss_network_alpha")
    if dim is None:
        return case.by_alpha(dict.fromkeys(case.ranks, alpha), "ss_network_alpha")
    scale = alpha / case.number(dim, "ss_network_dim")
    return Scales(case.even(scale), f"{scale:g}: ss_network_alpha {alpha:g} / ss_network_dim {dim:g}")


def _by_sat(case: Case) -> Scales | None:
    """SAT's LoRA divides by the rank, and its lora_alpha is 1: CogVideo's configs set the rank alone."""
    if case.layout != SAT:
        return None
    return case.by_alpha(dict.fromkeys(case.ranks, 1.0), "SAT's names, whose trainer has alpha 1 unless told otherwise")


def _by_default(case: Case) -> Scales:
    reason = "1.0: alpha unknown (nothing in the file says it; a sidecar file can)"
    return Scales(dict.fromkeys(case.ranks, 1.0), reason, known=False)


def _by_config(case: Case, config: Any, where: str) -> Scales | None:
    """PEFT's LoraConfig, LoHaConfig or LoKrConfig. Read here and not by PEFT, which hangs on a crafted pattern and
    takes alpha 4e9 and NaN. What it says of the kind must be what the tensors are: a DoRA without its magnitudes would
    be another adapter, and there are loaders that drop them."""
    if config is None:
        return None
    if not isinstance(config, dict):
        raise case.refuse(f"{where} is not a JSON object")
    file, start = case.path.name, str(config.get("init_lora_weights")).lower()
    declared = str(config.get("peft_type", "LORA")).upper()
    if declared not in ALPHA_KEYS:
        raise AdapterUnreadable(
            f"{file}: {where} says {quoted(declared)}, which is not read; train or export it as plain LoRA."
        )
    for path, kind in case.kinds.items():
        if kind != declared.lower():
            raise AdapterUnreadable(f"{file}: {where} says {declared}, but {path} is a {kind} in it; get it again.")
        if config.get("use_dora") and path not in case.doras:
            raise AdapterUnreadable(
                f"{file}: {where} says DoRA, but {path} has no lora_magnitude_vector in it, which some loaders drop. "
                "Get the file that its trainer wrote."
            )
    if start.startswith(("pissa", "olora", "corda", "loftq")):
        raise AdapterUnreadable(
            f"{file}: {where} says it was begun as {quoted(start)}, so it belongs to a base changed by that method. "
            "Convert it to plain LoRA with PEFT's path_initial_model_for_weight_conversion."
        )
    key = ALPHA_KEYS[declared]
    if key not in config and not config.get("alpha_pattern"):
        return None
    alphas = _by_pattern(case, config, key, "alpha_pattern", where)
    ranks: Mapping[str, float] = case.ranks
    if "r" in config:
        ranks = _by_pattern(case, config, "r", "rank_pattern", where)
        for path, rank in ranks.items():
            if case.ranks[path] not in (0, rank):  # 0: both sides of a LoKr in full, which PEFT scales all the same
                raise case.refuse(f"{where} says rank {rank:g} for {path}, but its matrices have {case.ranks[path]}")
    return case.by_alpha(alphas, where, root=bool(config.get("use_rslora")), ranks=ranks)


def _by_pattern(case: Case, config: Mapping[str, Any], common: str, special: str, where: str) -> dict[str, float]:
    """PEFT takes the keys for regular expressions, matched at the end of a path; the first that matches wins. A
    stranger's expression is never run: names are compared as text, with the `^` that diffusers writes as the start."""
    patterns = config.get(special) or {}
    if not isinstance(patterns, dict):
        raise case.refuse(f"{special} in {where} is not a JSON object")
    for key in patterns:
        if not re.fullmatch(r"\^?[A-Za-z0-9_.-]+", key):
            raise case.refuse(f"{special} in {where} has the pattern {quoted(key)}; only plain module names are read")
    if not patterns:
        return dict.fromkeys(case.ranks, case.number(config.get(common), f"{common} in {where}"))
    order = {key: index for index, key in enumerate(patterns)}
    values: dict[str, float] = {}
    for path in case.ranks:
        ends = [path, *(path[dot.end() :] for dot in re.finditer(r"\.", path))]
        key = min((k for k in (f"^{path}", *ends) if k in order), key=order.__getitem__, default=None)
        value = config.get(common) if key is None else patterns[key]
        values[path] = case.number(value, f"{common if key is None else f'{special} of {key}'} in {where}")
    return values


def _parsed(case: Case, key: str) -> Any:
    try:
        return strict_json(case.metadata[key]) if case.metadata.get(key) else None
    except ValueError as error:
        raise case.refuse(f"{key}: {error}") from None


def _small_json(file: Path) -> Any:
    try:
        if file.stat().st_size > _SIDECAR_CAP:
            raise ValueError(f"it is longer than {_SIDECAR_CAP:,} bytes")
        return strict_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise AdapterUnreadable(f"{file.name}: {error}. Mend or remove it ({file}).") from None


def sidecar_path(path: Path) -> Path:
    """`neon.safetensors` → `neon.safetensors.json`. Not `neon.json`: other programs keep notes of theirs there."""
    return path.with_name(f"{path.name}.json")


def read_sidecar(path: Path) -> dict[str, Any]:
    file = sidecar_path(path)
    if not file.is_file():
        return {}
    said = _small_json(file)
    scale = said.get("scale", 1) if isinstance(said, dict) else None
    words = said.get("trigger_words", []) if isinstance(said, dict) else None
    if (
        not isinstance(said, dict)
        or set(said) - {"scale", "trigger_words", "notes"}
        or type(scale) not in (int, float)
        or not 0 < scale <= ALPHA_CAP  # type: ignore[operator]
        or not (isinstance(words, list) and all(isinstance(word, str) for word in words))
        or not isinstance(said.get("notes", ""), str)
    ):
        raise AdapterUnreadable(
            f"{file.name}: it should look like "
            '{"scale": 0.5, "trigger_words": ["a word"], "notes": ""}, each part optional, with a scale above 0 and up '
            f"to {ALPHA_CAP:g}. Mend or remove it ({file})."
        )
    return said


WITNESSES: tuple[Callable[[Case], Scales | None], ...] = (
    _by_sidecar,
    _by_alpha_tensors,
    _by_diffusers,
    _by_finetrainers,
    _by_peft_folder,
    _by_kohya,
    _by_sat,
    _by_default,
)


def decide(case: Case) -> Scales:
    """Raises AdapterUnreadable when the first witness that speaks says what cannot be."""
    if not case.ranks:
        ignored = f"; the one said in {sidecar_path(case.path).name} is not used" if "scale" in case.sidecar else ""
        return Scales({}, f"1: differences in full are applied as they are, with no alpha{ignored}")
    return next(said for witness in WITNESSES if (said := witness(case)) is not None)


def hints(case: Case, scales: Scales, name: str) -> tuple[str, ...]:
    """What an unknown alpha may have been, and how to settle it. Shown, never applied."""
    if scales.known:
        return ()
    # A name made by a stranger has a place in a line to be pasted into a shell only when it is plain.
    name = name if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name) else "NAME"
    command, rank = f"python app.py loras scale {name}", max(case.ranks.values())
    if case.layout == PEFT and case.path.name.lower() == "adapter_model.safetensors":
        return (
            f"Names without a prefix in a file called adapter_model.safetensors are CogKit's way, and it trains at "
            f"scale 0.5. If it comes from there: `{command} 0.5`",
        )
    if case.layout == DIFFUSERS and rank >= SAT_RANK:
        return (
            f"Rank {rank} under these names may be CogVideo's own finetuning, whose scale is 0.5: `{command} 0.5`",
            f"Or an export of a SAT training, which DimensionX's are, at 1/rank: `{command} {1 / rank:.6g}`",
            "If neither is so, 1 is right.",
        )
    return (
        "Nothing in the file can tell the alpha. Divide lora_alpha by the rank in the settings that it was trained "
        f"with, or compare renders, and say it once, 0.5 for example: `{command} 0.5`",
    )

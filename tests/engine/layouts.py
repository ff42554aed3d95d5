"""Listings of real adapter files, {key: shape} in every layout there is, and files made of them: hollow or small.

A listing of `corpus/` is written as patterns. {b} runs over the base's blocks, {n} and {c} over one of its `lists`:
what the trainer calls a layer, and what diffusers does. Shapes are in numbers, r (the rank) and d (the base's width).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

CORPUS = Path(__file__).with_name("corpus")
WIDTH_BLOCKS = {"CogVideoX-2b": (1920, 30), "CogVideoX-5b": (3072, 42), "tiny": (64, 2)}
RELEASED: Mapping[str, Mapping[str, Any]] = {  # where they differ from the class's defaults
    "CogVideoX-2b": {"num_attention_heads": 30, "num_layers": 30},
    "CogVideoX-5b": {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
}
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class Tensor(NamedTuple):
    of: str  # layer, as diffusers calls it
    role: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Listing:
    name: str
    file: str
    dtype: str
    rank: int
    alpha: float | None
    true_scale: float
    metadata: Mapping[str, str]
    beside: Mapping[str, Any]  # files next to it
    tensors: Mapping[str, Tensor]
    expect: Mapping[str, Any]


@lru_cache
def released(base: str) -> Mapping[str, tuple[int, ...]]:
    """Shape of every parameter of the real class at the size that was released, without its weights."""
    from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel

    with torch.device("meta"):
        model = CogVideoXTransformer3DModel(**RELEASED[base])
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def names() -> list[str]:
    return sorted(path.stem for path in CORPUS.glob("*.json"))


def listing(name: str, base: str, rank: int | None = None) -> Listing:
    """What a trainer writes for this base, at the rank that it is found with or at another."""
    row = json.loads((CORPUS / f"{name}.json").read_text(encoding="utf-8"))
    width, blocks = WIDTH_BLOCKS[base]
    r = row["rank"] if rank is None else rank
    more = r / row["rank"] if row["rank"] else 1.0  # times the rank, hence times the alpha
    alpha = row["alpha"] * (math.sqrt(more) if row.get("root") else more) if "alpha" in row else None

    def said(text: str) -> str:
        for mark, number in (("@r", r), ("@alpha", alpha)):
            text = text.replace(f'"{mark}"', f"{number:g}" if number is not None else "null")
            text = text.replace(mark, f"{number:g}" if number is not None else "")
        return text

    def side(size: int | str) -> int:
        if isinstance(size, int):
            return size
        times, _, over = size.partition("/")
        unit = r if times.endswith("r") else width
        return int(times[:-1] or 1) * unit // int(over or 1)

    tensors: dict[str, Tensor] = {}
    for pattern in row["tensors"]:
        for n, c in row["lists"][pattern["each"]]:
            for b in range(blocks) if "{b}" in pattern["key"] else (0,):
                key, of = (pattern[field].format(b=b, n=n, c=c) for field in ("key", "of"))
                tensors[key] = Tensor(of, pattern["role"], tuple(side(size) for size in pattern["shape"]))
    return Listing(
        name,
        row["file"],
        row["dtype"],
        r,
        alpha,
        1 / r if row["true_scale"] == "1/r" else row["true_scale"],
        {key: said(value) for key, value in row["metadata"].items()},
        json.loads(said(json.dumps(row["beside"]))),
        tensors,
        row["expect"],
    )


def _raw(value: torch.Tensor) -> bytes:
    return value.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _beside(path: Path, files: Mapping[str, Any]) -> None:
    for name, content in files.items():
        path.with_name(name).write_text(json.dumps(content), encoding="utf-8")


def hollow(folder: Path, listed: Listing) -> Path:
    """A file with the listing's header at its true size, in which only the alphas are written. The rest is a hole that
    takes no space."""
    path, dtype = folder / listed.file, DTYPES[listed.dtype]
    header: dict[str, Any] = {"__metadata__": dict(listed.metadata)} if listed.metadata else {}
    position, numbers = 0, []
    for key, tensor in sorted(listed.tensors.items()):
        end = position + math.prod(tensor.shape) * dtype.itemsize
        header[key] = {"dtype": listed.dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        if tensor.role == "alpha":
            numbers.append(position)
        position = end
    head = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for number in numbers:
            file.seek(8 + len(head) + number)
            file.write(_raw(torch.tensor(listed.alpha, dtype=dtype)))
        file.truncate(8 + len(head) + position)
    _beside(path, listed.beside)
    return path


Made = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]  # of A, B, and scale: (r, in), (out, r)
ROLES: Mapping[str, Made] = {
    "A": lambda A, B, scale: A,
    "B": lambda A, B, scale: B / scale,
    # A plain LoRA's difference as the other kinds can say it: times one, or with a block of one by one.
    "hada_w1_a": lambda A, B, scale: B / scale,
    "hada_w1_b": lambda A, B, scale: A,
    "hada_w2_a": lambda A, B, scale: torch.eye(1, B.shape[1]).expand(B.shape),
    "hada_w2_b": lambda A, B, scale: torch.eye(A.shape[0], 1).expand(A.shape),
    "lokr_w1": lambda A, B, scale: torch.ones(1, 1),
    "lokr_w2_a": lambda A, B, scale: B / scale,
    "lokr_w2_b": lambda A, B, scale: A,
    "lokr_w2": lambda A, B, scale: B @ A,
    "diff": lambda A, B, scale: B @ A,
    "diff_b": lambda A, B, scale: torch.zeros(B.shape[0]),
}


def small(folder: Path, name: str, modules: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> Path:
    """The adapter that adds B·A to each layer, in float32 as this trainer would have written it: under its names, with
    its scale said where it says it, or in a sidecar where it says nothing."""
    from safetensors.torch import save_file

    rank = next(iter(modules.values()))[0].shape[0]
    listed = listing(name, "tiny", rank)
    path, tensors = folder / listed.file, {}
    for key, tensor in listed.tensors.items():
        if tensor.of in modules:
            if tensor.role == "alpha":
                tensors[key] = torch.tensor(float(listed.alpha or 0))
            else:
                tensors[key] = ROLES[tensor.role](*modules[tensor.of], listed.true_scale).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, dict(listed.metadata) or None)
    _beside(path, listed.beside)
    if not listed.expect["alpha_known"]:
        _beside(path, {f"{path.name}.json": {"scale": listed.true_scale}})
    return path

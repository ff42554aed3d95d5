"""The line that says what is held: base, device, memory, loads, the last swap, and whether the base was verified."""

from __future__ import annotations

from typing import Any, NamedTuple

from nodes.engine.pipeline import bases
from nodes.schema import sentence  # noqa: F401  what tabs show errors with

from .parts import part


class Proof(NamedTuple):
    """Of how many parameters a base has been compared, how many were wrong, and at how many loads that was."""

    checked: int
    wrong: int
    loads: int


_proof: list[Proof] = []  # the latest; what is held belongs to the process, not to a visitor


def build(ui: Any) -> Any:
    return part("status", state(), elem_id="cl-status")


def verified(checked: int, wrong: int) -> None:
    _proof[:] = [Proof(checked, wrong, bases.loads)]


def state() -> dict[str, Any]:
    import psutil
    import torch

    residents = bases.resident()
    current = residents[-1] if residents else None
    memory = psutil.virtual_memory()
    free, total = memory.available, memory.total
    device = "cpu" if not torch.cuda.is_available() else "cuda"
    if current is not None:
        device = current.placement.device
    if device.startswith("cuda"):
        free, total = torch.cuda.mem_get_info()
    gib = 1 / (1 << 30)
    held = " + ".join(f"{name} {weight:g}" for name, weight in current.switch.names) if current else ""
    items = [
        ("status_base", current.checkpoint.name if current else "@no_base"),
        ("status_device", f"{device}, {current.placement.dtype}, {current.placement.kind}" if current else device),
        ("status_memory", f"{free * gib:.1f} / {total * gib:.1f} GiB"),
        ("status_loads", str(bases.loads)),
        ("status_swap", f"{bases.last_swap.seconds * 1000:.1f} ms" if bases.last_swap else "–"),
        ("status_adapters", held or "@no_adapters"),
    ]
    proof = _proof[-1] if _proof and _proof[-1].loads == bases.loads else None
    return {"items": items, "verified": None if proof is None else [proof.checked, proof.wrong]}

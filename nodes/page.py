"""What a page asks about adapters, blocks, schedules and bases: questions as texts, answers as plain data or a file.

Every face that shows the stack editor answers by these. None of them writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from . import graph
from .engine.checkpoints import find_checkpoint
from .engine.errors import AdapterNotFound, UsageError
from .engine.lora_stack import Blocks, Steps
from .engine.pipeline import bases
from .host import Host
from .lora import adapter_row, adapter_rows, find_adapter, picture_of

Query = Mapping[str, str]


def adapters(host: Host, query: Query) -> Any:
    return adapter_rows(host, _base_name(query))


def adapter(host: Host, query: Query) -> Any:
    name = query.get("name", "")
    return {**adapter_row(host, name, _base_name(query)), "name": name, "error": None}


def picture(host: Host, query: Query) -> Path:
    found = picture_of(find_adapter(host, query.get("name", "")))
    if found is None:
        raise AdapterNotFound("There is no picture beside this adapter.")
    return found


def curve(host: Host, query: Query) -> Any:
    steps, total = Steps.parse(query.get("steps", "")), query.get("total", "30")
    if not total.isascii() or not total.isdigit() or not 0 < int(total[:6]) <= 1000:
        raise UsageError("total is a number of steps from 1 to 1000.")
    return {"steps": str(steps), "factors": list(steps.over(int(total)))}


def blocks(host: Host, query: Query) -> Any:
    read, name, count = Blocks.parse(query.get("blocks", "")), _base_name(query), 30
    if name is not None:
        checkpoint = find_checkpoint(name, host.model_folders)
        count = checkpoint.family.blocks
        read.check(count, checkpoint.name)
    parts = {"attention": "attn1.to_q", "feed_forward": "ff.net.2"}
    factors = {
        part: [read.factor(f"transformer_blocks.{n}.{layer}.weight") for n in range(count)]
        for part, layer in parts.items()
    }
    return {"blocks": str(read), "factors": factors}


def status(host: Host, query: Query) -> Any:
    return {
        "loads": bases.loads,
        "bases": [
            {
                "name": one.checkpoint.name,
                "dtype": one.placement.dtype,
                "device": one.placement.device,
                "placement": one.placement.kind,
                "note": one.placement.reason,
                "held": [list(pair) for pair in one.switch.names],
            }
            for one in bases.resident()
        ],
        "swap_ms": None if bases.last_swap is None else bases.last_swap.seconds * 1000,
    }


ANSWERS: dict[str, Callable[[Host, Query], Any]] = {
    "adapters": adapters,
    "adapter": adapter,
    "picture": picture,
    "curve": curve,
    "blocks": blocks,
    "status": status,
}


def _base_name(query: Query) -> str | None:
    return query.get("base", "").removesuffix(graph.ABSENT) or None

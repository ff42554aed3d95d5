"""The demo: one prompt, one seed, one load of the base; no adapter, a style, a motion, both, and a sweep of weights."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from .engine import layout, video
from .engine.checkpoints import DEMO
from .engine.pipeline import bases
from .host import Host, contained
from .lora import DEMO_ADAPTERS, stack_loras
from .model import choose_base
from .render import Shot, render, save

PROMPT = "a large yellow triangle bouncing on a navy background"
STYLE, MOTION = "sunset", "bounce"
SWEEP = (0.25, 0.5, 0.75, 1.25)
SCALE = 3  # a 64 px picture is too small to look at


@dataclass(frozen=True)
class Shown:
    """What the demo did, as data. Paths are strings, times in seconds."""

    base: str
    placement: str
    base_loads: int
    load_seconds: float
    swaps: list[dict[str, Any]]  # from, to, seconds
    clips: list[dict[str, Any]]  # path, loras, seconds
    grid: str
    sheet: str
    base_verified: bool  # with the stack off, every weight is bit-identical to the checkpoint's file

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def showcase(
    host: Host, prompt: str = PROMPT, seed: int = 3, style: str = STYLE, motion: str = MOTION, folder: str = "demo"
) -> Shown:
    """Render the demo's clips into `folder` of the host's output: labelled clips, a grid, a contact sheet.

    Raises what `render` and `save` raise.
    """
    base = choose_base(host, DEMO)
    stacks = {
        "no adapter": [],
        f"{style} 1": [f"{style}:1"],
        f"{motion} 1": [f"{motion}:1"],
        f"{style} 1 + {motion} 1": [f"{style}:1", f"{motion}:1"],
        **{f"{style} {w:g}": [f"{style}:{w}"] for w in SWEEP},
    }
    described = {label: stack_loras(host, entries, folders=(DEMO_ADAPTERS,)) for label, entries in stacks.items()}
    target = contained(host.output_folder, folder)
    loads, swaps, clips, shown = bases.loads, [], [], []
    load_seconds = 0.0
    for number, (label, stack) in enumerate(described.items()):
        started = time.perf_counter()
        clip = render(host, base, stack, Shot(prompt=prompt, seed=seed))
        assert clip.swap is not None
        if number == 0:
            load_seconds = time.perf_counter() - started - clip.seconds - clip.swap.seconds
        else:
            swaps.append({"from": _say(clip.swap.before), "to": _say(clip.swap.after), "seconds": clip.swap.seconds})
        frames = layout.labelled(layout.enlarged(clip.frames, SCALE), label)
        shown.append((label, frames))
        name = f"{folder}/{number + 1}-{label.replace(' + ', '+').replace(' ', '-')}.mp4"
        path = save(host, type(clip)(frames, clip.fps, clip.record), name=name)
        loras = [{"name": name, "weight": weight} for name, weight in clip.swap.after]
        clips.append({"path": str(path), "loras": loras, "seconds": clip.seconds})
    grid = video.write_video(layout.grid([f for _, f in shown], columns=4), target / "grid.mp4", 8.0)
    sheet = video.write_png(layout.contact_sheet(shown), target / "sheet.png")
    with bases.session(base, ()) as session:  # everything off
        swap = session.swap
        swaps.append({"from": _say(swap.before), "to": _say(swap.after), "seconds": swap.seconds})
        differing = session.resident.switch.differing()
        placement = session.resident.placement.reason
    return Shown(
        base.name, placement, bases.loads - loads, load_seconds, swaps, clips, str(grid), str(sheet), not differing
    )  # fmt: skip


def _say(names: tuple[tuple[str, float], ...]) -> str:
    return " + ".join(f"{name} {weight:g}" for name, weight in names) or "no adapter"

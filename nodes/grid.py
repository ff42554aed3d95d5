"""What the nodes Grid and Metrics compose: a study from a node's texts, its clips as one moving picture, and what was
measured of it as a table with the verdicts in words."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .engine import layout, measures
from .engine.conclude import Conclusions, OfMetric, conclude
from .engine.errors import StudyError, UsageError
from .engine.lora_stack import LoraStack
from .engine.pipeline import Base
from .engine.statistics import FEWEST, plural
from .engine.study import Arm, Study
from .host import Host
from .render import Shot
from .study import FOLDER, begin, estimate, list_studies, measure, open_study, plan_study, portable, run
from .sweep import Sweep, arms_of, prompts_from, seeds_from, variation_from, weights_from

ARMS_CAP = 400
CAPTION = 28  # px: a line above each part of a grid
_NAME = re.compile(r"[^\W_](?:[\w -]{0,62}\w)?")
_DEVICE = re.compile(r"(?i)con|prn|aux|nul|com\d|lpt\d")  # files of Windows
UP, DOWN, NONE = "▲", "▼", "–"


# --- a study from texts -----------------------------------------------------------------------------------------------


def check_texts(
    vary: str | None = None,
    seeds: str | None = None,
    weights: str | None = None,
    prompts: str | None = None,
    name: str | None = None,
) -> None:
    """What can be wrong before anything runs; a text that comes from another node is not there yet.

    Raises:
        UsageError
    """
    variations(vary or "")
    weights_from(weights or "")
    if seeds is not None and not seeds_from(seeds):
        raise UsageError("seeds is empty; give some, such as 0-3 or 1,5,7.")
    if prompts is not None and not prompts_from(prompts):
        raise UsageError("prompts is empty; give one or more, each on a line of its own.")
    if name is not None:
        folder_name(name)


def folder_name(name: str) -> str:
    """Raises UsageError: it would not be one folder with a name that every system has."""
    name = name.strip()
    if not _NAME.fullmatch(name) or _DEVICE.fullmatch(name):
        raise UsageError(
            f"{name[:80]!r} is no name for a study: letters, digits, spaces, - and _, up to 64 of them, a letter or "
            "digit first."
        )
    return name


def variations(text: str) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    """SETTING=VALUE,VALUE, one a line. Raises UsageError."""
    found = [variation_from(line) for line in text.splitlines() if line.strip()]
    twice = next((name for n, (name, _) in enumerate(found) if name in dict(found[:n])), None)
    if twice is not None:
        raise UsageError(f"{twice} is varied twice; give all of its values on one line.")
    return tuple(found)


def arms_from(
    stacks: Sequence[LoraStack | None], labels: str, weights: str, vary: str, base_too: bool
) -> tuple[Arm, ...]:
    """Arms of the stacks that are connected. One with nothing active is the base, which is there once.

    Raises:
        UsageError, StackError
    """
    there = [stack for stack in stacks if stack is not None]
    given = [label.strip() for label in labels.split(",")] if labels.strip() else []
    if len(given) > len(there):
        raise UsageError(f"labels names {len(given)} and {len(there)} stacks are connected; give as many or fewer.")
    if weights.strip() and not there:
        raise UsageError("weights are of a stack, and none is connected. Connect one, or leave weights empty.")
    named = [(given[n] if n < len(given) else "", stack) for n, stack in enumerate(there)]
    kept = tuple((label, stack) for label, stack in named if stack.active().entries or not base_too)
    at, varied = weights_from(weights), variations(vary)
    count = (len(kept) * max(len(at), 1) + base_too) * math.prod(len(values) for _, values in varied)
    if count > ARMS_CAP:  # before all of them are made: a stranger's workflow says the numbers
        raise UsageError(f"{count:,} combinations of stacks, weights and settings; at most {ARMS_CAP} are compared.")
    return arms_of(Sweep(kept, at, varied, base_too))


def render_study(host: Host, base: Base, name: str, arms: Sequence[Arm], prompts: str, seeds: str, shot: Shot) -> Study:
    """Begin the study of this name, or go on with it: what is there is not rendered again.

    Raises:
        What `plan_study`, `begin` and `run` raise.
    """
    plan = plan_study(host, base, arms, prompts_from(prompts), seeds_from(seeds), shot)
    study = begin(host, folder_name(name), plan, shot)
    host.progress(0, 1, f"{name.strip()}: {estimate(host, study).words()}")
    return run(host, study)


# --- its clips as one picture -----------------------------------------------------------------------------------------


def picture(host: Host, study: Study) -> tuple[torch.Tensor, float, tuple[str, ...]]:
    """A rendered study -> ((F, H, W, 3) float32 in [0, 1], 8-bit values; frames per second; what had no room). The
    clips stand as in the study's report, with its grids below one another.

    Raises:
        StudyError, Unreadable, Cancelled
    """
    # The report knows the graph's nodes, for the workflow in it, and they know this.
    from .report import _padded, _tile, grids_of

    grids = grids_of(study.plan)
    columns, rows = max(len(grid.columns) for grid in grids), sum(len(grid.rows) for grid in grids)
    cells = {(cell.arm, cell.key): cell for cell in study.plan.cells}
    parts, fps = [], 8.0
    for grid in grids:
        placed: list[list[torch.Tensor | None]] = []
        for row in grid.cells:
            placed.append([])
            for at in row:
                host.check_cancelled()
                if at is None:
                    placed[-1].append(None)
                    continue
                frames, fps = study.frames(cells[at])
                placed[-1].append(_tile(frames, columns, rows))
        sizes = {clip.shape[1:3] for row in placed for clip in row if clip is not None}
        if len(sizes) > 1:
            size = max(height for height, _ in sizes), max(width for _, width in sizes)
            placed = [[None if clip is None else _padded(clip, *size) for clip in row] for row in placed]
        sheet = layout.edged(placed, grid.rows, grid.columns)
        if grid.caption:
            strip = layout.caption_strip(sheet.shape[2], grid.caption, CAPTION).to(sheet)
            sheet = torch.cat([strip.expand(len(sheet), *strip.shape), sheet], dim=1)
        parts.append(sheet)
    whole = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
    return whole.float().mul_(255).round_().div_(255), fps, tuple(grid.left_out for grid in grids[:1] if grid.left_out)


def record_of(study: Study) -> dict[str, Any]:
    """What a picture of the study says of itself: the plan, without anything of this machine."""
    return {"study": portable(study.plan)}


# --- what was measured ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """Means, an arm a row; a mark where an arm was told apart from the reference."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: tuple[str, ...]

    def markdown(self) -> str:
        lines = [self.columns, ("---", *("---:" for _ in self.columns[1:])), *self.rows] if self.rows else []
        table = ["| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in lines]
        return "\n".join([*table, *([""] if table else []), *(f"- {line}" for line in self.words)])

    def shown(self) -> dict[str, Any]:
        return {"columns": list(self.columns), "rows": [list(row) for row in self.rows], "words": list(self.words)}


def named_study(host: Host, name: str) -> Study:
    """Raises StudyError, UsageError: there is none of this name, with those that there are."""
    there = list_studies(host)
    listed = f"there are {', '.join(there[:12])}" if there else "there is none yet; CogVideoX Grid makes one"
    if not name.strip():
        raise UsageError(f"Connect a study, or give the name of one: {listed}.")
    if name.strip() not in there:
        raise StudyError(f"No study is called {name.strip()[:80]!r}; {listed}.")
    return open_study(host, name.strip())


def names_from(text: str) -> list[str]:
    """Metrics, with commas or on lines of their own, which are known. Raises UsageError."""
    names = [part.strip() for part in text.replace("，", ",").replace("\n", ",").split(",") if part.strip()]
    measures.find(names)
    return names


def state_of(host: Host) -> list[Any]:
    """Changes with all that is in the host's studies: clips, votes and held-out losses."""
    folder = host.output_folder / FOLDER
    return [[name, *(_stamp(folder / name / file) for file in ("study.json", "log.jsonl", "votes.jsonl", "heldout"))]
            for name in list_studies(host)]  # fmt: skip


def _stamp(path: Path) -> list[int] | None:
    try:
        told = path.stat()
    except OSError:
        return None
    return [told.st_size, told.st_mtime_ns]


def concluded_of(host: Host, study: Study, names: Sequence[str] = (), level: float = 0.95) -> Conclusions:
    """What the study says by the metrics of these names, measured now where they were not; all, if none is named.

    Raises:
        StudyError: nothing is rendered. UsageError, Unreadable, Cancelled
    """
    if not study.finished():
        raise StudyError(f"No clip of the study {study.folder.name} is rendered yet, or they are gone. Run it first.")
    measure(host, study, measures.find(list(names) or None))
    found = conclude(study, level=level)
    if not names:
        return found
    return replace(
        found,
        heldout=None,
        metrics=tuple(one for one in found.metrics if any(_is(one.metric.name, name) for name in names)),
    )


def _is(metric: str, name: str) -> bool:
    return metric == name or metric.startswith(f"{name}.")  # one function may measure several things


def table_of(study: Study, concluded: Conclusions) -> Table:
    every = concluded.all()
    columns = [f"{one.metric.name} ({one.metric.unit})" if one.metric.unit else one.metric.name for one in every]
    rows = [(arm.label, *(_cell(one, concluded, arm.label) for one in every)) for arm in study.plan.arms]
    if not every:
        return Table((), (), verdict(concluded))
    legend = f"{UP} {DOWN}: higher or lower than {concluded.reference}, told apart at {100 * concluded.level:g} %."
    marked = any(text.endswith((UP, DOWN)) for row in rows for text in row[1:])
    return Table(("arm", *columns), tuple(rows), (*verdict(concluded), *([legend] if marked else [])))


def _cell(one: OfMetric, concluded: Conclusions, arm: str) -> str:
    average = one.average(arm)
    if average is None:
        return NONE
    d = one.against(concluded.reference, arm)
    mark = "" if d is None or not d.told else f" {UP if d.mean > 0 else DOWN}"
    return f"{average.mean:.3g}{mark}".replace("-", "−")


def verdict_of(study: Study) -> tuple[str, ...]:
    return verdict(conclude(study))


def verdict(concluded: Conclusions) -> tuple[str, ...]:
    """What is wrong first, then how much there is, and what was found to differ or to be best."""
    told = concluded.verdicts() or _open(concluded)
    return (*concluded.findings, concluded.amount(), *concluded.notes, *told)


def _open(concluded: Conclusions) -> list[str]:
    differences = [d for one in concluded.metrics for d in one.differences]
    if not differences:
        return []
    pairs = max(d.pairs for d in differences)
    if max(d.units for d in differences) < FEWEST:
        return [f"Nothing is told over {plural(pairs, 'pair')}; from {FEWEST} on it can be. Add seeds or prompts."]
    return [f"No arms can be told apart over {plural(pairs, 'pair')}. More seeds or prompts may do it."]


def write_report(host: Host, study: Study, level: float) -> str:
    """The page's place in the output folder. Raises what `report` raises."""
    from .report import report

    page = report(host, study, level=level).page
    return page.resolve().relative_to(host.output_folder.resolve()).as_posix()


def as_json(concluded: Conclusions) -> str:
    return json.dumps(concluded.to_json(), ensure_ascii=False, indent=1)

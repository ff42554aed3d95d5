"""A study's report: what came of it, in files that need nothing to be read.

report/report.html    one page with clips, plots and data inside; it asks nobody for anything
report/results.csv    a row per clip: arm, axes, prompt, seed, every metric
report/results.json   the plan, the conclusions, every value
report/grid-01.mp4    all arms at once, in step, axes on the edges
report/sheet.png      frames of each arm
report/difference-01.mp4   what an arm changes, against the reference
report/plots/*.svg
report/plan.json      `python app.py compare --plan plan.json` makes the same study
report/workflow.json  up to four arms as a graph for ComfyUI

The same study gives the same bytes: no file has a date in it. No file names a folder of this machine.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shlex
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from . import report_page as html
from .engine import layout, measures, plots, selection, video
from .engine.conclude import NEUTRAL_CAP, Best, Conclusions, OfMetric, conclude, lines
from .engine.errors import CogLoomError, GeometryError, StudyError, UsageError
from .engine.files import write_atomic
from .engine.heldout import LOSS
from .engine.lora_stack import Asked, LoraStack
from .engine.pipeline import Base
from .engine.plots import Dot, Mark, Series, escape
from .engine.statistics import Difference, numbers, plural
from .engine.study import Arm, Cell, Key, Plan, Study
from .engine.votes import Lead
from .export import as_comparison
from .export_ui import ui_of
from .host import Host
from .report_page import Figure, Film, Page, Shot, Topic, Two, bdi
from .study import portable, shown
from .sweep import VARIED, Sweep, arms_of

BUDGET = 60_000_000  # bytes of the clips in the page
GRID_CAP = 64  # tiles
GRIDS_CAP = 4
COLUMNS_CAP = 16
DIFFERENCES_CAP = 4  # videos
MAPPED_CAP = 3  # prompts and seeds whose departure is drawn
ARMS_CAP = 24  # arms that a sheet or a picture has room for
VERDICTS_CAP = 16
_SMALL = 192  # px of height below which a clip is enlarged
_READABLE = 96  # px of width that a label needs
_WIDE, _TALL = 1920, 1200  # px that a grid is to fit in
# Quality (CRF) and by how much to shrink, from the best to what is still worth looking at.
_RUNGS = ((18, 1), (23, 1), (28, 1), (30, 2), (34, 2), (36, 4))
_OURS = re.compile(r"(?:(?:grid|difference)-\d\d\.mp4|plots/[a-z0-9_.-]+\.svg|workflow\.json)", re.ASCII)
# A folder's path within a text: what follows two slashes or more, or a drive.
_PATH = re.compile(r"(?:[A-Za-z]:|~|(?<![\w./\\]))(?:[\\/][^\\/\s:*?\"<>|']+){2,}")


@dataclass(frozen=True)
class Reported:
    """Where the files are. `notes` say what was left out, and why."""

    folder: Path
    page: Path
    table: Path
    data: Path
    sheet: Path | None
    grids: tuple[Path, ...]
    differences: tuple[Path, ...]
    plots: tuple[Path, ...]
    workflow: Path | None
    conclusions: Conclusions
    notes: tuple[str, ...]


def report(
    host: Host,
    study: Study,
    folder: Path | None = None,
    *,
    budget: int = BUDGET,
    level: float = 0.95,
    votes: bool = True,
) -> Reported:
    """Write the report of what is there now into the study's folder, or into `folder`. Beyond `budget` bytes the page's
    clips are encoded smaller, and then left out; a quarter of it is for grids and differences.

    Raises:
        StudyError: nothing is rendered yet, or a file of the study is broken. UsageError, Unreadable, DiskFull,
            Cancelled
    """
    if not study.finished():
        raise StudyError("There is nothing to report yet: no clip of this study is rendered. Run `compare` first.")
    if budget < 10_000:
        raise UsageError(f"A page whose clips have {budget:,} bytes; at least 10,000.")
    target = study.folder / "report" if folder is None else folder
    concluded = conclude(study, votes, level)
    made = _Made(target)
    with tempfile.TemporaryDirectory(prefix="cogloom-report-") as temp:
        looked = _look(host, study, made, Path(temp), budget)
    chosen, why_not = _selected(concluded, study.plan)
    topics = _topics(concluded, study.plan, made)
    picked = tuple(_selection(one, of, concluded, made, n) for n, (of, one) in enumerate(chosen))
    voted = _votes(concluded, made)
    table = made.text("results.csv", _csv(study, concluded))
    workflow, why_no_graph = _workflow(study.plan)
    plan_file = made.text("plan.json", _json(_plan(study.plan)))
    graph = None if workflow is None else made.text("workflow.json", _json(workflow))
    notes = [*looked.notes, *why_not, *([why_no_graph] if why_no_graph else [])]
    files = sorted([*made.files, "report.html", "results.json"])
    data = made.text("results.json", _json(_results(study, concluded, chosen, notes, files)))
    page = Page(
        title=title_of(study.plan),
        facts=_facts(study, concluded),
        findings=concluded.findings,
        verdicts=_verdicts(concluded, chosen),
        amount=_amount(concluded),
        overview=_overview(concluded, study.plan),
        grids=looked.grids,
        shots=looked.shots,
        selection=picked,
        topics=topics,
        votes=voted,
        weights=_weights(study, concluded),
        settings=_settings(study),
        command=command_of(study.plan),
        downloads=_downloads(table, data, plan_file, graph),
        notes=tuple(escape(note) for note in (*concluded.notes, *notes)),
        made_with=", ".join(f"{name} {version}" for name, version in study.made_with),
    )
    path = made.text("report.html", html.page(page))
    made.sweep(files)
    return Reported(
        folder=target,
        page=path,
        table=table,
        data=data,
        sheet=target / "sheet.png" if "sheet.png" in made.files else None,
        grids=made.paths("grid-"),
        differences=made.paths("difference-"),
        plots=made.paths("plots/"),
        workflow=graph,
        conclusions=concluded,
        notes=tuple(notes),
    )


@dataclass
class _Made:
    """The report's folder, and what was written into it."""

    folder: Path
    files: list[str] = field(default_factory=list)
    before: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        try:
            known = json.loads((self.folder / "results.json").read_bytes())["files"]
            self.before = tuple(name for name in known if isinstance(name, str) and _OURS.fullmatch(name))
        except (OSError, ValueError, KeyError, TypeError):
            self.before = ()  # no earlier report, or none of ours: nothing to clear away

    def text(self, name: str, text: str) -> Path:
        write_atomic(self.folder / name, text.encode("utf-8", "replace"))
        self.files.append(name)
        return self.folder / name

    def path(self, name: str) -> Path:
        """For a file that is about to be written."""
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        self.files.append(name)
        return self.folder / name

    def plot(self, name: str, svg: str) -> str:
        """Keep a picture; gives it back for the page."""
        self.text(f"plots/{name}.svg", svg)
        return svg.strip()

    def paths(self, start: str) -> tuple[Path, ...]:
        return tuple(self.folder / name for name in self.files if name.startswith(start))

    def sweep(self, now: Iterable[str]) -> None:
        """What an earlier report wrote and this one did not would be taken for its own."""
        for name in set(self.before) - set(now):
            (self.folder / name).unlink(missing_ok=True)


# --- pictures that move -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Looked:
    grids: tuple[tuple[str, bytes], ...]
    shots: tuple[Shot, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class GridPlan:
    """Which clip stands where. `left_out`: what there was no room for, in words."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[tuple[str, Key] | None, ...], ...]  # (arm, key)
    caption: str
    left_out: str = ""

    def all(self) -> set[tuple[str, Key]]:
        return {at for row in self.cells for at in row if at is not None}


def grids_of(plan: Plan) -> tuple[GridPlan, ...]:
    """Where arms differ in two things or more, a grid of these for each prompt, weights (or what varies last) across;
    else the arms across, and prompts and seeds down."""
    keys = [(prompt, seed) for seed in plan.seeds for prompt in plan.prompts]
    if len(plan.axes) < 2:
        columns = plan.arms[:COLUMNS_CAP]
        room = max(GRID_CAP // len(columns), 1)
        rows = keys[:room]
        cells = tuple(tuple((arm.label, key) for arm in columns) for key in rows)
        left = _left_out((len(columns), len(plan.arms), "arms"), (len(rows), len(keys), "prompts and seeds"))
        several = len(plan.prompts) > 1 or len(plan.seeds) > 1
        labels = tuple(_key_label(key, plan) if several else "" for key in rows)
        caption = "" if several else _key_label(rows[0], plan)
        return (GridPlan(labels, tuple(_columns(columns, plan)), cells, caption, left),)
    across = "weight" if "weight" in plan.axes else list(plan.axes)[-1]
    down = next(iter(axis for axis in plan.axes if axis != across))  # in which what has no place across is its own
    values = plan.axes[across][:COLUMNS_CAP]
    found: dict[tuple[tuple[str, str], ...], dict[str, str]] = {}  # row -> value -> arm
    beside: dict[tuple[tuple[str, str], ...], str] = {}  # arms that have no value, such as the base no weight
    for arm in plan.arms:
        at = dict(arm.at)
        value = at.pop(across, None)
        if value in values:
            found.setdefault(tuple(at.items()), {})[value] = arm.label
        elif value is None:
            beside[tuple((name, value) for name, value in at.items() if name != down)] = arm.label
    rows = list(found.items())[: max(GRID_CAP // (len(values) + bool(beside)), 1)]
    first = [beside.get(tuple((name, value) for name, value in row if name != down)) for row, _ in rows]
    shown_keys = keys[:GRIDS_CAP]
    left = _left_out(
        (len(values), len(plan.axes[across]), f"values of {across}"), (len(rows), len(found), "rows"),
        (len(shown_keys), len(keys), "prompts and seeds"),
    )  # fmt: skip
    edge = tuple(f"{across} {value}" for value in values)
    if any(first):
        edge = (first[0] if len(set(first)) == 1 and first[0] else f"no {across}", *edge)
    grids = []
    for key in shown_keys:
        cells = []
        for (_, row), own in zip(rows, first, strict=True):
            lead = [(own, key) if own else None] if any(first) else []
            cells.append((*lead, *((row[value], key) if value in row else None for value in values)))
        labels = tuple(", ".join(value for _, value in row) for row, _ in rows)
        grids.append(GridPlan(labels, edge, tuple(cells), _key_label(key, plan), left))
    return tuple(grids)


def _columns(arms: Sequence[Arm], plan: Plan) -> list[str]:
    """The axis' value, where there is one axis and the label says no more."""
    (axis,) = list(plan.axes) or [""]
    return [dict(arm.at).get(axis) or arm.label for arm in arms] if axis else [arm.label for arm in arms]


def _key_label(key: Key, plan: Plan) -> str:
    return key[0] if len(plan.seeds) == 1 else f"{key[0]}, seed {key[1]}"


def _left_out(*counts: tuple[int, int, str]) -> str:
    found = [f"{count} of {all_} {what}" for count, all_, what in counts if count < all_]
    return f"There is room for {', '.join(found)}." if found else ""


def _look(host: Host, study: Study, made: _Made, temp: Path, budget: int) -> _Looked:
    """Every clip once: into the grids, onto the sheet, into the page, and against the reference's."""
    plan, notes = study.plan, []
    by_key = {key: {cell.arm: cell for cell in cells} for key, cells in plan.units()}
    finished = {cell.id for cell in study.finished()}
    grids = grids_of(plan)
    wanted = set().union(*(grid.all() for grid in grids))
    tiles: dict[tuple[str, Key], torch.Tensor] = {}
    sheet: list[tuple[str, torch.Tensor]] = []
    shots: list[Shot] = []
    rung, spent, aside = _rung(study, temp, budget * 0.75), 0, 0
    fps, length, mapped, differences = 8.0, 1, 0, 0
    done: set[Key] = set()
    waiting, written = list(grids), list[tuple[str, bytes]]()
    for number, (key, cells) in enumerate(by_key.items()):
        there = [arm.label for arm in plan.arms if cells[arm.label].id in finished]
        if not there:
            continue
        host.progress(number, len(by_key), "report")
        base = shown(study, cells[plan.reference]) if plan.reference in there else None
        films, differing, maps, moved = [], [], [], []
        for arm in plan.arms:
            host.check_cancelled()
            if arm.label not in there:
                why = Two("not rendered yet", "尚未渲染")
                films.append(Film(arm.label, None, str(why)))
                continue
            one = base if base is not None and arm.label == plan.reference else shown(study, cells[arm.label])
            fps, length = one.fps, len(one.frames)
            if (arm.label, key) in wanted:
                tiles[arm.label, key] = _tile(one.frames, max(len(g.columns) for g in grids), len(grids[0].rows))
            if not shots and len(sheet) < ARMS_CAP:
                sheet.append((arm.label, one.frames))
            mp4 = _encoded(one.frames, one.fps, rung, temp)
            facts = _facts_of(study, cells[arm.label])
            if spent + _inside(mp4) > budget * 0.75:
                why = Two("left out, for the page would be too large", "页面会过大，未收入")
                films.append(Film(arm.label, None, str(why), facts))
            else:
                spent += _inside(mp4)
                films.append(Film(arm.label, mp4, facts=facts))
            if base is None or one is base or mapped >= MAPPED_CAP or len(moved) >= ARMS_CAP:
                continue
            try:
                departed = measures.departure(base, one)
            except GeometryError as error:
                notes.append(f"{arm.label}: no difference to {plan.reference} can be shown. {error}")
                continue
            moved.append((arm.label, departed))
            if not shots and differences < DIFFERENCES_CAP:
                path = made.path(f"difference-{differences + 1:02}.mp4")
                label = f"{arm.label} − {plan.reference}"
                shift = measures.difference_video(base.frames, one.frames)
                video.write_video(layout.labelled(_enlarged(shift), label), path, one.fps)
                differences += 1
                mp4 = _encoded(shift, one.fps, rung, temp)
                if aside + _inside(mp4) <= budget / 8:
                    aside += _inside(mp4)
                    differing.append((label, mp4))
                else:
                    notes.append(f"{path.name} ({label}) is beside the page and not in it, for it would be too large.")
        drawn = ""
        if moved:
            mapped += 1
            maps, drawn = _maps(moved, made, mapped)
        shots.append(Shot(*key, fps, length, tuple(films), tuple(differing), tuple(maps), drawn))
        done.add(key)
        for grid in [grid for grid in waiting if {at for _, at in grid.all()} <= done]:
            waiting.remove(grid)
            written += _grid(grid, tiles, len(written), fps, made, notes)
            for at in grid.all():
                tiles.pop(at, None)
    for grid in waiting:  # in part
        written += _grid(grid, tiles, len(written), fps, made, notes)
    gone = sum(film.mp4 is None and bool(film.facts) for shot in shots for film in shot.films)
    if gone:
        notes.append(
            f"{gone} clips are not in the page, whose clips would be more than {budget:,} bytes; they are in cells/."
        )
    if rung[1] > 1 or rung[0] > 23:
        notes.append("The page's clips are encoded smaller than those in cells/, to keep it within its size.")
    if sheet:
        video.write_png(layout.contact_sheet(sheet), made.path("sheet.png"))
    kept, room = [], budget / 4 - aside
    for number, (caption, mp4) in enumerate(written):
        if _inside(mp4) <= room:
            kept.append((caption, mp4))
            room -= _inside(mp4)
        else:
            notes.append(f"grid-{number + 1:02}.mp4 is beside the page and not in it, for it would be too large.")
    return _Looked(tuple(kept), tuple(shots), tuple(dict.fromkeys(notes)))


def _grid(
    grid: GridPlan, tiles: Mapping[tuple[str, Key], torch.Tensor], number: int, fps: float, made: _Made,
    notes: list[str],
) -> list[tuple[str, bytes]]:  # fmt: skip
    """(caption, mp4), or nothing where none of its clips is there."""
    placed = [[tiles.get(at) if at is not None else None for at in row] for row in grid.cells]
    sizes = [clip.shape[1:3] for row in placed for clip in row if clip is not None]
    if not sizes:
        return []
    if len(set(sizes)) > 1:  # a size is varied: the smaller ones stand in the middle of the largest
        size = max(h for h, _ in sizes), max(w for _, w in sizes)
        placed = [[None if clip is None else _padded(clip, *size) for clip in row] for row in placed]
    path = made.path(f"grid-{number + 1:02}.mp4")
    video.write_video(layout.edged(placed, grid.rows, grid.columns), path, fps, quality=20)
    if grid.left_out:
        notes.append(f"Grid: {grid.left_out}")
    return [(bdi(grid.caption) if grid.caption else "", path.read_bytes())]


def _tile(frames: torch.Tensor, columns: int, rows: int) -> torch.Tensor:
    """(F, H, W, 3) float16, enlarged by a whole factor or reduced, such that a grid of them fits; with half the bits of
    a float a grid of 64 takes half the memory, and 8 bits are exact in them to a tenth of a step."""
    height, width = frames.shape[1:3]
    factor = min(-(-_SMALL // height), _WIDE // (columns * width), _TALL // (rows * height))
    factor = max(factor, -(-_READABLE // width))
    if factor > 1:
        return layout.enlarged(frames, factor).half()
    share = min(1.0, max(_WIDE / (columns * width), _READABLE / width))
    return (frames if share == 1 else _resized(frames, share)).half()


def _enlarged(frames: torch.Tensor) -> torch.Tensor:
    return layout.enlarged(frames, max(1, -(-_SMALL // frames.shape[1])))


def _resized(frames: torch.Tensor, share: float) -> torch.Tensor:
    """To even sides, by area: nothing shimmers."""
    height, width = (max(2, round(n * share / 2) * 2) for n in frames.shape[1:3])
    return F.interpolate(frames.movedim(-1, 1), (height, width), mode="area").movedim(1, -1).contiguous()


def _padded(clip: torch.Tensor, height: int, width: int) -> torch.Tensor:
    top, left = (height - clip.shape[1]) // 2, (width - clip.shape[2]) // 2
    whole = clip.new_zeros(len(clip), height, width, 3)
    whole[:, top : top + clip.shape[1], left : left + clip.shape[2]] = clip
    return whole


def _encoded(frames: torch.Tensor, fps: float, rung: tuple[int, int], temp: Path) -> bytes:
    """Anew, and not the cell's own file: that one has its record in it."""
    quality, shrink = rung
    small = frames if shrink == 1 else _resized(frames, 1 / shrink)
    return video.write_video(small, temp / "clip.mp4", fps, quality=quality).read_bytes()


def _inside(mp4: bytes) -> int:
    """Bytes of it in the page, as base64."""
    return -(-len(mp4) // 3) * 4


def _rung(study: Study, temp: Path, room: float) -> tuple[int, int]:
    """The best with which all clips fit, judged by three of them."""
    cells = study.finished()
    few = [study.frames(cell) for cell in dict.fromkeys((cells[0], cells[len(cells) // 2], cells[-1]))]
    for rung in _RUNGS:
        mean = sum(len(_encoded(*one, rung, temp)) for one in few) / len(few)
        if mean * 4 / 3 * 1.1 * len(cells) <= room:  # the others may be a little larger
            return rung
    return _RUNGS[-1]


def _maps(
    moved: Sequence[tuple[str, measures.Departure]], made: _Made, number: int
) -> tuple[list[tuple[str, bytes]], str]:
    """(a strip of pictures for each arm, the same as one table of means)."""
    mapped = [(label, d.latents) for label, d in moved if d.latents is not None]
    if not mapped:
        return [], ""
    top = max(float(latents.max()) for _, latents in mapped) or 1.0
    strips = [(label, _strip(latents / top)) for label, latents in mapped[:DIFFERENCES_CAP]]
    means = [[float(frame.mean()) for frame in latents] for _, latents in mapped]
    longest = max(map(len, means))
    svg = plots.heat_map(
        [label for label, _ in mapped], [str(n + 1) for n in range(longest)],
        [[*row, *[None] * (longest - len(row))] for row in means], "Departure from the reference by latent frame",
        "Mean over the picture of the distance between latents, for each arm and latent frame.",
    )  # fmt: skip
    return strips, made.plot(f"departure-{number:02}", svg)


_RAMP = ((13, 17, 40), (61, 42, 114), (148, 52, 110), (225, 93, 75), (252, 178, 80), (252, 253, 191))


def _strip(latents: torch.Tensor) -> bytes:
    """(F', h, w) in [0, 1] -> PNG: the frames side by side."""
    from PIL import Image

    factor = max(1, 64 // latents.shape[1])
    colours = torch.tensor(_RAMP, dtype=torch.float32)
    place = latents.clamp(0, 1) * (len(_RAMP) - 1)
    low = place.floor().long().clamp(max=len(_RAMP) - 2)
    share = (place - low)[..., None]
    frames = colours[low] * (1 - share) + colours[low + 1] * share  # (F', h, w, 3)
    frames = frames.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    gap = torch.full((frames.shape[1], 4, 3), 255.0)
    parts = [part for frame in frames for part in (frame, gap)][:-1]
    alpha = [part for frame in frames for part in (torch.ones(*frame.shape[:2], 1), torch.zeros(*gap.shape[:2], 1))][
        :-1
    ]
    picture = torch.cat([torch.cat(parts, 1), torch.cat(alpha, 1) * 255], -1).round().to(torch.uint8)
    kept = io.BytesIO()
    Image.fromarray(picture.numpy(), "RGBA").save(kept, "PNG")
    return kept.getvalue()


# --- the numbers ------------------------------------------------------------------------------------------------------


def _topics(concluded: Conclusions, plan: Plan, made: _Made) -> tuple[Topic, ...]:
    names: set[str] = set()
    found = []
    for one in concluded.all():
        slug = _slug(one.metric.name, names)
        title = one.metric.name + (f" ({one.metric.unit})" if one.metric.unit else "")
        figures = [*_differences(one, concluded, made, slug), *_along(one, concluded, plan, made, slug)]
        figures += _by_prompt(one, plan, made, slug)
        told = any(d.told for d in one.differences) and one.metric.higher_is_better is not None
        words = [_two(one.said(d), d) for d in one.differences] or _means(one)
        words += [_best_said(best) for best in one.best if best.clear]
        words += [escape(line) for line in one.missing]
        found.append(Topic(title, one.metric.about, tuple(words), tuple(figures), _told_table(one), open=told))
    front = _front(concluded, made)
    return (*found, *front)


def _slug(name: str, taken: set[str]) -> str:
    """A file's name, on every system: ASCII, lower case, unlike all others."""
    stem = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "metric"
    slug, n = stem, 1
    while slug in taken:
        slug, n = f"{stem}-{n + 1}", n + 1
    taken.add(slug)
    return slug


def _two(said: str, d: Difference) -> str:
    return str(Two(escape(said), escape(html.in_chinese(d))))


def _means(one: OfMetric) -> list[str]:
    unit = f" {one.metric.unit}" if one.metric.unit else ""
    return [escape(average.words(unit)) for average in one.averages]


def _best_said(best: Best) -> str:
    where = f"{best.axis} {best.value}" if best.axis else best.value
    head = f"{best.of}：{where}" if best.of else where
    tail = f"，但尚不能与 {'、'.join(best.ties)} 区分" if best.ties else "，优于其他所有"
    return str(Two(escape(best.words()), escape(f"{head} 最好{tail}。")))


def _state(d: Difference, arm: str) -> str:
    if not d.told:
        return "even"
    if d.better is None:
        return "mark"
    return "good" if d.better == arm else "bad"


def _differences(one: OfMetric, concluded: Conclusions, made: _Made, slug: str) -> list[Figure]:
    """Each arm against the reference; where a metric is against it already, each arm's own value."""
    name = one.metric.name
    against = one.against_all(concluded.reference)[:ARMS_CAP]
    if against:
        rows = [Mark(d.b, d.mean, d.said.low, d.said.high, _state(d, d.b), one.said(d)) for d in against]
        svg = plots.intervals(
            rows, f"{name}: difference from {concluded.reference}",
            " ".join(one.said(d) for d in against), f"{name} − that of {concluded.reference}",
        )  # fmt: skip
        caption = Two(
            f"Difference from {bdi(concluded.reference)}, with intervals that hold at once. Filled: told apart.",
            f"与 {bdi(concluded.reference)} 之差及同时成立的区间。实心：可以区分。",
        )
        return [Figure(str(caption), made.plot(f"{slug}-differences", svg))]
    rows = [Mark(a.arm, a.mean, a.interval.low, a.interval.high) for a in one.averages[:ARMS_CAP]]
    if not rows:
        return []
    svg = plots.intervals(rows, name, "; ".join(a.words() for a in one.averages), name, zero=False)
    caption = Two(
        "Mean of each arm, with the interval for other prompts. Two that overlap may differ all the same.",
        "各组均值及对其他提示词的区间；重叠并不表示没有差异。",
    )
    return [Figure(str(caption), made.plot(f"{slug}-means", svg))]


def _along(one: OfMetric, concluded: Conclusions, plan: Plan, made: _Made, slug: str) -> list[Figure]:
    """Along each axis that is a number."""
    figures = []
    for axis in plan.axes:
        series = []
        differing = True
        for _, of, line in [found for found in lines(plan.arms) if found[0] == axis]:
            points = []
            for value, label in line:
                x, average = _number_of(axis, value), one.average(label)
                if x is None or average is None:
                    continue
                d = one.against(concluded.reference, label)
                differing = differing and d is not None
                mark = Mark(label, average.mean, average.interval.low, average.interval.high)
                points.append((x, mark, d))
            if len(points) > 1:
                series.append((of or axis, sorted(points, key=lambda point: point[0])))
        series = series[:8]
        if not series:
            continue
        drawn = tuple(
            Series(
                of,
                tuple(
                    (x, Mark(m.label, d.mean, d.said.low, d.said.high, _state(d, m.label), one.said(d)))
                    if differing and d is not None
                    else (x, m)
                    for x, m, d in points
                ),
            )
            for of, points in series
        )
        what = f"{one.metric.name} − that of {concluded.reference}" if differing else one.metric.name
        svg = plots.lines(drawn, f"{one.metric.name} along {axis}", f"{what} for each {axis}.", axis, what, differing)
        caption = Two(f"Along {bdi(axis)}.", f"随 {bdi(axis)} 变化。")
        figures.append(Figure(str(caption), made.plot(f"{slug}-along-{_slug(axis, set())}", svg)))
    return figures


def _number_of(axis: str, value: str) -> float | None:
    if axis == selection.AXIS:
        step = selection.step_of(value)
        return None if step is None else float(step)
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _by_prompt(one: OfMetric, plan: Plan, made: _Made, slug: str) -> list[Figure]:
    """Each arm on each prompt (or held-out item): where one prompt makes the difference, it shows."""
    items = list(dict.fromkeys(item for cells in one.cells.values() for item, _ in cells))
    if not 2 <= len(items) <= 40 or len(one.cells) > ARMS_CAP:
        return []
    order = [prompt for prompt in plan.prompts if prompt in items] or items
    labels = [arm.label for arm in plan.arms if arm.label in one.cells]
    means = [[_mean_of(one.cells[label], item) for item in order] for label in labels]
    name = one.metric.name
    desc = "; ".join(f"{n + 1} is {item}" for n, item in enumerate(order))
    numbered = [str(n + 1) for n in range(len(order))]
    svg = plots.heat_map(labels, numbered, means, f"{name} of each arm and prompt", desc)
    listed = "".join(f"<li>{bdi(item, 80)}</li>" for item in order)
    if one.metric.name == LOSS.name:
        caption = Two("Each arm on each held-out item:", "各组在每个留出样本上的值：")
    else:
        caption = Two("Each arm on each prompt:", "各组在每个提示词上的值：")
    return [Figure(f"{caption}<ol>{listed}</ol>", made.plot(f"{slug}-by-prompt", svg))]


def _mean_of(cells: Mapping[Key, float | None], item: str) -> float | None:
    known = [value for (at, _), value in cells.items() if at == item and value is not None and math.isfinite(value)]
    return math.fsum(known) / len(known) if known else None


def _told_table(one: OfMetric) -> str:
    if not one.differences:
        return ""
    rows = []
    for d in one.differences:
        told = Two("yes", "是") if d.told else Two("not yet", "尚未")
        better = bdi(d.better) if d.better else "–"
        rows.append([
            f"{bdi(d.b)} − {bdi(d.a)}", plots.number(d.mean, 4), _span(d.said.low, d.said.high),
            _span(d.interval.low, d.interval.high), plots.number(d.p_family, 2), d.pairs, told, better,
        ])  # fmt: skip
    head = [
        Two("difference", "差"), Two("mean", "均值"), Two("interval, corrected", "区间（校正后）"),
        Two("interval, alone", "单独区间"), "p", Two("pairs", "对数"), Two("told apart", "可区分"),
        Two("better", "更好"),
    ]  # fmt: skip
    return html.table(head, rows, numeric=1)


def _span(low: float, high: float) -> str:
    return f"{plots.number(low, 3)} … {plots.number(high, 3)}"


def _front(concluded: Conclusions, made: _Made) -> tuple[Topic, ...]:
    """What an arm learns, or how good it is, against how far it moves the base's clips."""
    departure = concluded.of("departure")
    directed = [one for one in concluded.all() if one.metric.higher_is_better is not None]
    if departure is None or not directed:
        return ()
    one = directed[0]
    sign = -1 if one.metric.higher_is_better else 1
    at = {a.arm: (sign * a.mean, moved.mean) for a in one.averages if (moved := departure.average(a.arm)) is not None}
    if len(at) < 2:
        return ()
    front = selection.pareto(at.items())
    dots = [Dot(arm, moved, sign * value) for arm, (value, moved) in at.items()]
    name = one.metric.name
    svg = plots.scatter(
        dots, front, f"{name} against departure", f"On the front: {', '.join(front)}.",
        "departure from the reference (less is nearer)",
        f"{name} ({'higher' if one.metric.higher_is_better else 'lower'} is better)",
    )  # fmt: skip
    caption = Two(
        "Joined: no other is better in one and not worse in the other.", "相连者：没有其他组在一项更好而另一项不差。"
    )
    about = f"{name} and how far a clip departs from the reference's: means, without intervals."
    listed = ", ".join(str(bdi(arm)) for arm in front)
    words = str(Two(f"On the front: {listed}.", f"前沿：{listed}。"))
    return (Topic("Pareto", about, (words,), (Figure(str(caption), made.plot("pareto", svg)),)),)


# --- the choice of a checkpoint, and votes ----------------------------------------------------------------------------


def _selected(concluded: Conclusions, plan: Plan) -> tuple[list[tuple[str, selection.Recommendation]], list[str]]:
    """(what each line of checkpoints has in common, and which one to keep; why there is none)."""
    found, why = [], []
    base = plan.reference if not plan.arm(plan.reference).stack.active().entries else None
    for of, checkpoints in selection.runs(plan.arms):
        try:
            found.append((of, selection.recommend(concluded, checkpoints, base)))
        except UsageError as error:
            why.append(f"No checkpoint is recommended: {error}")
    return found, list(dict.fromkeys(why))


def _selection(one: selection.Recommendation, of: str, concluded: Conclusions, made: _Made, number: int) -> Topic:
    averages = {a.arm: a for a in (concluded.heldout.averages if concluded.heldout else ())}
    points = tuple(
        (float(p.step), Mark(p.arm, p.loss, averages[p.arm].interval.low, averages[p.arm].interval.high))
        for p in one.points
    )
    tail = f"-{number + 1:02}"
    curve = plots.lines(
        [Series("held-out loss", points)], "Held-out loss by checkpoint",
        "Its mean over held-out items, with the interval for other items.", "step", "held-out loss",
    )  # fmt: skip
    figures = [
        Figure(str(Two("Held-out loss by step.", "留出损失随步数变化。")), made.plot(f"checkpoints{tail}", curve))
    ]
    dots = [Dot(str(p.step), p.departure, p.loss) for p in one.points if p.departure is not None]
    if len(dots) > 1:
        svg = plots.scatter(
            dots, {str(step) for step in one.front}, "Checkpoints: loss against departure",
            f"On the front: {', '.join(map(str, one.front))}.", "departure from the base's clips", "held-out loss",
        )  # fmt: skip
        caption = Two("What it has learnt against how far it moves the base.", "学到的程度与对基础模型的改变。")
        figures.append(Figure(str(caption), made.plot(f"checkpoints{tail}-pareto", svg)))
    title = f"checkpoint {one.step}" + (f" ({of})" if of else "")
    return Topic(title, "", tuple(escape(line) for line in one.words), tuple(figures), open=True)


def _votes(concluded: Conclusions, made: _Made) -> Topic | None:
    ranking = concluded.ranking
    if ranking is None:
        return None
    rows = [
        Mark(s.arm, s.strength, s.interval.low, s.interval.high, "mark" if len(ranking.groups) > 1 else "even",
             f"{s.arm}: {s.strength:.2f}, rank {s.best_rank} to {s.worst_rank}")
        for s in ranking.standings[:ARMS_CAP]
    ]  # fmt: skip
    svg = plots.bars(rows, "Strength by votes", ranking.words(), "log-odds against the average arm")
    caption = Two(
        "Strength: two that differ by 1.1 are preferred 3 to 1 where the judge decides.",
        "强度：相差 1.1 表示在有取舍的投票中约为 3 比 1。",
    )
    table = html.table(
        [Two("arm", "组"), Two("strength", "强度"), Two("interval", "区间"), Two("rank", "名次"),
         Two("group", "分组"), Two("votes", "票数")],
        [
            [bdi(s.arm), plots.number(s.strength), _span(s.interval.low, s.interval.high),
             s.best_rank if s.best_rank == s.worst_rank else f"{s.best_rank}–{s.worst_rank}", s.group, s.votes]
            for s in ranking.standings
        ],
        numeric=1,
        caption=Two("Arms that share a letter cannot be separated yet.", "字母相同的组尚不能区分。"),
    )  # fmt: skip
    words = [escape(line) for line in ranking.words().split("\n")]
    words += [escape(judge.words()) for judge in concluded.judges]
    return Topic("blind votes", "", tuple(words), (Figure(str(caption), made.plot("votes", svg)),), table, open=True)


# --- words and tables -------------------------------------------------------------------------------------------------


def title_of(plan: Plan) -> str:
    names = [arm.label for arm in plan.arms]
    return plan.title or (
        " · ".join(names) if len(names) <= 4 else f"{' · '.join(names[:3])} and {len(names) - 3} more"
    )


def _facts(study: Study, concluded: Conclusions) -> tuple[str, ...]:
    plan = study.plan
    reference, prompts, seeds = bdi(plan.reference, 60), len(plan.prompts), len(plan.seeds)
    return (
        str(Two(plural(len(plan.arms), "arm"), f"{len(plan.arms)} 组")),
        str(Two(f"{plural(prompts, 'prompt')} × {plural(seeds, 'seed')}", f"{prompts} 个提示词 × {seeds} 个种子")),
        str(Two(f"{concluded.rendered} of {concluded.cells} clips", f"{concluded.rendered}/{concluded.cells} 个片段")),
        str(Two(f"base: {bdi(clean(plan.base.name), 60)}", f"基础模型：{bdi(clean(plan.base.name), 60)}")),
        str(Two(f"reference: {reference}", f"参照：{reference}")),
    )  # fmt: skip


def _amount(concluded: Conclusions) -> str:
    zh = f"已渲染 {concluded.rendered} / {concluded.cells} 个片段，已测量 {concluded.measured} 个。"
    return str(Two(escape(concluded.amount()), zh))


def _verdicts(concluded: Conclusions, chosen: Sequence[tuple[str, selection.Recommendation]]) -> tuple[str, ...]:
    """A card for each source that bears on which is better."""
    found = [" ".join(map(escape, one.words)) for _, one in chosen]
    ranking = concluded.ranking
    if ranking is not None and any(lead.separated for lead in ranking.leads):
        told = [lead for lead in ranking.leads if lead.separated]
        listed = "".join(f"<li>{_lead(lead)}</li>" for lead in told[:VERDICTS_CAP])
        head = Two(f"{ranking.votes} blind votes", f"{ranking.votes} 次盲投")
        found.append(f"<b>{head}</b><ul>{listed}</ul>")
    for one in concluded.all():
        lines = [] if one.metric.higher_is_better is None else _verdict(one, concluded)
        if lines:
            found.append(f"<b>{escape(one.metric.name)}</b><ul>{''.join(f'<li>{line}</li>' for line in lines)}</ul>")
    neutral = [line for one in concluded.all() if one.metric.higher_is_better is None for line in _ways(one, concluded)]
    if neutral:
        head = Two("Different, and neither better nor worse by that", "有差异，但本身不分优劣")
        shown, more = neutral[:NEUTRAL_CAP], len(neutral) - NEUTRAL_CAP
        shown += [str(Two(f"and {more} more, in the numbers below", f"另有 {more} 条，见下文数值"))] if more > 0 else []
        found.append(f"<b>{head}</b><ul>{''.join(f'<li>{line}</li>' for line in shown)}</ul>")
    return tuple(found)


def _ways(one: OfMetric, concluded: Conclusions) -> list[str]:
    """Which arms are higher, and which lower, than the reference."""
    name, reference = escape(one.metric.name), bdi(concluded.reference)
    told = sorted((d for d in one.against_all(concluded.reference) if d.told), key=lambda d: -abs(d.mean))
    lines = []
    for kind, en, zh in (
        ([d for d in told if d.mean > 0], f"higher than {reference}", f"高于 {reference}"),
        ([d for d in told if d.mean < 0], f"lower than {reference}", f"低于 {reference}"),
    ):
        said = [f"{bdi(d.b)} {' '.join(_brief(d))}" for d in kind[:VERDICTS_CAP]]
        if said:
            lines.append(str(Two(f"{name}, {en}: {', '.join(said)}", f"{name}，{zh}：{'、'.join(said)}")))
    return lines


def _lead(lead: Lead) -> str:
    low, high = (1 / (1 + math.exp(-x)) for x in (lead.interval.low, lead.interval.high))
    zh = f"{lead.a} 优于 {lead.b}：有取舍的投票中占 {lead.preferred:.0%}（{low:.0%} 至 {high:.0%}）。"
    return str(Two(escape(lead.words()), escape(zh)))


def _verdict(one: OfMetric, concluded: Conclusions) -> list[str]:
    """What is best; and which arms are better, worse, or neither, than the reference."""
    reference = bdi(concluded.reference)
    whole = [best for best in one.best if not best.of]
    lines = [_best_said(best) for best in (whole or one.best)[:4] if best.clear]
    against = one.against_all(concluded.reference)
    for kind, en, zh in (
        ([d for d in against if d.better == d.b], f"Better than {reference}: ", f"优于 {reference}："),
        ([d for d in against if d.better == d.a], f"Worse than {reference}: ", f"劣于 {reference}："),
    ):
        order = sorted(kind, key=lambda d: -abs(d.mean))[:VERDICTS_CAP]
        said = [f"{bdi(d.b)} {' '.join(_brief(d))}" for d in order]
        if said:
            lines.append(str(Two(en + ", ".join(said), zh + "、".join(said))))
    open_ones = [d for d in against if not d.told]
    if lines and open_ones:
        names = ", ".join(bdi(d.b) for d in open_ones[:VERDICTS_CAP])
        lines.append(str(Two(f"Not told apart from {reference} yet: {names}", f"尚不能与 {reference} 区分：{names}")))
    return lines


def _brief(d: Difference) -> tuple[str, str]:
    mean, low, high = numbers(d.mean, d.said.low, d.said.high)
    return mean, f"({low} … {high})"


def _overview(concluded: Conclusions, plan: Plan) -> str:
    """Means, an arm a row; a mark where an arm can be told apart from the reference."""
    every = concluded.all()
    if not every:
        return ""
    rows = []
    for arm in plan.arms:
        row: list[object] = [bdi(arm.label)]
        for one in every:
            average, d = one.average(arm.label), one.against(concluded.reference, arm.label)
            kind = ""
            if d is not None and d.told:
                verdict = "" if d.better is None else " ok" if d.better == arm.label else " worse"
                kind = f' class="{"up" if d.mean > 0 else "down"}{verdict}"'
            row.append(f"<span{kind}>{plots.number(average.mean if average else None)}</span>")
        rows.append(row)
    head = [Two("arm", "组"), *(escape(one.metric.name) for one in every)]
    caption = Two(
        "Means. ▲ ▼: higher or lower than the reference, told apart.", "均值。▲ ▼：与参照可区分地更高或更低。"
    )
    return html.table(head, rows, numeric=1, caption=caption)


def _weights(study: Study, concluded: Conclusions) -> str:
    """What was asked for, and what was read back from the model."""
    rows = []
    finished: dict[str, Cell] = {}
    for cell in study.finished():
        finished.setdefault(cell.arm, cell)
    for arm in study.plan.arms:
        asked = " + ".join(
            f"{e.name} {e.weight:g}" + "".join(f" [{text}]" for text in (e.blocks, e.steps) if text)
            for e in arm.stack.active()
        )
        held = "–"
        if arm.label in finished:
            record = study.record(finished[arm.label]).get("record", {})
            held = _held(record.get("weights", ()))
        wrong = any(line.startswith(f"{arm.label}: ") for line in concluded.findings)
        said = Two("not as asked", "与要求不符") if wrong else Two("as asked", "符合要求")
        mark = f'<span class="{"bad" if wrong else "ok"}">{said}</span>' if arm.label in finished else "–"
        rows.append([bdi(arm.label), bdi(asked or "–"), bdi(held), mark])
    head = [Two("arm", "组"), Two("asked for", "要求"), Two("read back", "读回"), ""]
    told = Two(
        f"Read back from the model before each step that changed a weight. In {concluded.checked} of "
        f"{concluded.rendered} clips they are what was asked for.",
        f"在每个权重变化的步骤前从模型读回。{concluded.rendered} 个片段中有 {concluded.checked} 个与要求一致。",
    )
    return html.table(head, rows, caption=told)


def _held(weights: Any) -> str:
    """Of the first clip; a schedule by its first and last."""
    try:
        rows = [(int(step), " + ".join(f"{name} {weight:.4g}" for name, weight in now if weight) or "nothing")
                for step, now in weights]  # fmt: skip
    except (TypeError, ValueError):
        return "–"
    if len(rows) <= 1:
        return rows[0][1] if rows else "–"
    few = rows if len(rows) <= 3 else [rows[0], rows[-1]]
    return "; ".join(f"from step {step + 1}: {text}" for step, text in few) + (
        f" ({len(rows)} changes)" if len(rows) > 3 else ""
    )


def _facts_of(study: Study, cell: Cell) -> str:
    """Under a clip: some of its numbers, the user's own first."""
    values = study.measured(cell).get("values", {})
    own = [name for name in values if name not in measures.METRICS]
    names = [*own, *(name for name in ("departure", "motion", "ssim") if name in values)][:3]
    return "<br>".join(f"{escape(name)} {plots.number(values[name])}" for name in names)


def _settings(study: Study) -> tuple[tuple[str, str], ...]:
    plan = study.plan
    usual = ("", False, None, "auto", "none")
    base = {name: value for name, value in _plan(plan)["base"].items() if value not in usual and name != "rank_budget"}
    pairs = {
        "base": ", ".join(f"{name} {value}" if name != "name" else str(value) for name, value in base.items()),
        **{name: str(value)[:16] for name, value in plan.common},
        **{name: value for name, value in plan.settings if value not in ("", False)},
        **{f"starts from ({name})": digest[:16] for name, digest in plan.start},
        "prompts": len(plan.prompts),
        "seeds": ", ".join(map(str, plan.seeds[:40])),
        "reference": plan.reference,
    }
    return html.entries(pairs)


# --- data -------------------------------------------------------------------------------------------------------------


def clean(text: object) -> str:
    """Without folders: of each path in it, the last part."""
    return _PATH.sub(lambda match: re.split(r"[\\/]", match[0])[-1], str(text))


def _plan(plan: Plan) -> dict[str, Any]:
    data = portable(plan)
    return {**data, "base": {**data["base"], "name": clean(plan.base.name)}}


def _last(path: str) -> str:
    return re.split(r"[\\/]", path)[-1]


def _results(
    study: Study, concluded: Conclusions, chosen: Sequence[tuple[str, selection.Recommendation]],
    notes: Sequence[str], files: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    finished = {cell.id for cell in study.finished()}
    cells = []
    for cell in study.plan.cells:
        known = study.measured(cell) if cell.id in finished else {}
        cells.append({
            "id": cell.id, "arm": cell.arm, "prompt": cell.prompt, "seed": cell.seed, "rendered": cell.id in finished,
            "values": known.get("values", {}), "notes": [clean(note) for note in known.get("notes", ())],
        })  # fmt: skip
    heldout = {}
    for arm in study.plan.arms:
        found = study.heldout(arm)
        if found:
            heldout[arm.label] = {**found, "dataset": _last(str(found.get("dataset", "")))}
    said = concluded.to_json()
    said["notes"] = [clean(note) for note in said["notes"]]
    if said["heldout"] is not None:
        said["heldout"]["dataset"] = _last(concluded.dataset)
    return {
        "made_with": dict(study.made_with),
        "plan": _plan(study.plan),
        "metrics": study.metrics(),
        "conclusions": said,
        "checkpoints": [{"of": of, **one.to_json()} for of, one in chosen],
        "cells": cells,
        "heldout": heldout,
        "notes": [clean(note) for note in notes],
        "files": list(files),
    }


def _json(data: Any) -> str:
    return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _csv(study: Study, concluded: Conclusions) -> str:
    """A row per clip, in the plan's order. A text that a spreadsheet would take for a formula gets a ' in front."""
    plan = study.plan
    axes = list(plan.axes)
    names = [one.metric.name for one in concluded.metrics]
    finished = {cell.id for cell in study.finished()}
    kept = io.StringIO()
    writer = csv.writer(kept, lineterminator="\n")
    writer.writerow([_tame(name) for name in ("id", "arm", *axes, "prompt", "seed", "rendered", *names)])
    for cell in plan.cells:
        at = dict(plan.arm(cell.arm).at)
        values = study.measured(cell).get("values", {}) if cell.id in finished else {}
        texts = (cell.id, cell.arm, *(at.get(axis, "") for axis in axes), cell.prompt)
        numbers = ("" if values.get(name) is None else repr(values[name]) for name in names)
        writer.writerow([*map(_tame, texts), cell.seed, "yes" if cell.id in finished else "no", *numbers])
    return kept.getvalue()


def _tame(text: str) -> str:
    """A negative number is a number."""
    if text[:1] in ("=", "+", "-", "@", "\t", "\r"):
        try:
            float(text)
        except ValueError:
            return f"'{text}"
    return text


# --- to do it again ---------------------------------------------------------------------------------------------------


def _workflow(plan: Plan) -> tuple[dict[str, Any] | None, str]:
    """(a graph for ComfyUI's page, why there is none). Of up to four arms: the reference, and the first others."""
    order = [plan.arm(plan.reference), *(arm for arm in plan.arms if arm.label != plan.reference)]
    alike = [arm for arm in order if not arm.settings and arm.stack.hold == order[0].stack.hold]
    if order[0].settings or len(alike) < 2:
        return None, "There is no graph: the arms differ in settings, and the compare node has one for all."
    if plan.start:
        return None, "There is no graph: the clips start from a picture or video, and the compare node does from text."
    chosen = alike[:4]
    base = plan.base
    settings = dict(plan.settings)
    known = ("steps", "guidance", "dynamic_guidance", "scheduler", "frames", "width", "height", "negative")
    given = {name: settings[name] for name in known if name in settings}
    held = ("dtype", "placement", "attention", "vae_tiling", "compile", "quantise", "rank_budget")
    given |= {name: getattr(base, name) for name in held}
    given |= {"prompt": plan.prompts[0], "seed": plan.seeds[0], "hold": order[0].stack.hold, "checkpoint": base.name}
    rows = [
        [{"on": e.on, "adapter": _last(e.adapter), "weight": e.weight, "blocks": e.blocks, "steps": e.steps,
          "partial": e.partial} for e in arm.stack]
        for arm in chosen
    ]  # fmt: skip
    labels = ",".join(arm.label.replace(",", " ") for arm in chosen)
    try:
        return ui_of(as_comparison(given, rows, labels)), ""
    except CogLoomError as error:
        return None, f"There is no graph: {clean(error)}"


def command_of(plan: Plan) -> str:
    """What to type for the same study: in words, where they say all of it; and by the plan's file."""
    words = _spelled(plan)
    by_file = "python app.py compare --plan plan.json"
    return f"{words}\n\n# or with every setting and hash:\n{by_file}" if words else by_file


def _spelled(plan: Plan) -> str:
    """The command in a shell's words, or "" where it would make another plan."""
    settings, base = dict(plan.settings), plan.base
    sweep = next((one for one in _sweeps(plan) if _makes(one, plan)), None)
    if sweep is None or plan.start or len(plan.prompts) > 50 or Base(base.name, base.folder) != base:
        return ""
    words = ["python app.py compare"]
    for label, stack in sweep.stacks:
        text = " + ".join(str(Asked(e.name, e.weight, e.blocks, e.steps, e.partial)) for e in stack)
        words.append(shlex.quote(f"{label}={text}" if label else text))
    if sweep.weights:
        words.append(f"--weights {','.join(f'{weight:g}' for weight in sweep.weights)}")
    words += [f"--vary {shlex.quote(name + '=' + ','.join(map(str, values)))}" for name, values in sweep.vary]
    words += [] if sweep.base_too else ["--no-base-too"]
    words += [f"--prompt {shlex.quote(prompt)}" for prompt in plan.prompts]
    words.append(f"--seeds {','.join(map(str, plan.seeds))}")
    words.append(f"--reference {shlex.quote(plan.reference)}")
    words.append(f"--base {shlex.quote(clean(base.name))}")
    words += [f"--{name} {settings[name]}" for name in ("steps", "guidance", "scheduler", "frames") if name in settings]
    if {"width", "height"} <= set(settings):
        words.append(f"--size {settings['width']}x{settings['height']}")
    words += [f"--negative {shlex.quote(settings['negative'])}"] if settings.get("negative") else []
    words += ["--dynamic-guidance"] if settings.get("dynamic_guidance") else []
    hold = plan.arms[-1].stack.hold
    words += [f"--hold {hold}"] if hold != "auto" else []
    return " \\\n  ".join(words)


def _sweeps(plan: Plan) -> Iterator[Sweep]:
    """What may have made the plan: with labels of its own or made ones, with weights or without."""
    named = next((axis for axis in ("stack", selection.AXIS) if axis in plan.axes), "stack")
    vary = tuple((axis, values) for axis, values in plan.axes.items() if axis in VARIED)
    weights = tuple(w for value in plan.axes.get("weight", ()) if (w := _number_of("weight", value)) is not None)
    for scaled in (True, False) if weights else (False,):
        stacks: dict[str, LoraStack] = {}
        for arm in plan.arms:
            at = dict(arm.at)
            weight = _number_of("weight", at.get("weight", "")) if scaled else 1.0
            if arm.stack.active().entries and weight:
                share = tuple(replace(e, weight=round(e.weight / weight, 9)) for e in arm.stack)
                stacks.setdefault(at.get(named, arm.label), replace(arm.stack, entries=share))
        base_too = any(not arm.stack.active().entries for arm in plan.arms)
        for labels in (False, True):
            yield Sweep(
                tuple((label if labels else "", stack) for label, stack in stacks.items()),
                weights if scaled else (), vary, base_too, named,
            )  # fmt: skip


def _makes(sweep: Sweep, plan: Plan) -> bool:
    """Whether it makes these very arms."""
    try:
        made = arms_of(sweep)
    except CogLoomError:
        return False

    def said(arm: Arm) -> tuple[Any, ...]:
        entries = [(e.adapter, round(e.weight, 9), e.blocks, e.steps, e.partial, e.on) for e in arm.stack]
        return arm.label, arm.at, arm.stack.hold if entries else "", entries

    return [said(arm) for arm in made] == [said(arm) for arm in plan.arms]


def _downloads(table: Path, data: Path, plan: Path, graph: Path | None) -> tuple[tuple[str, str, bytes], ...]:
    found = [
        (str(Two("All values (CSV)", "全部数值（CSV）")), table.name, table.read_bytes()),
        (str(Two("Plan, conclusions, values (JSON)", "计划、结论与数值（JSON）")), data.name, data.read_bytes()),
        (str(Two("Plan, to repeat it (JSON)", "计划，用于重做（JSON）")), plan.name, plan.read_bytes()),
    ]
    if graph is not None:
        what = Two("Workflow for ComfyUI (JSON)", "ComfyUI 工作流（JSON）")
        found.insert(0, (str(what), graph.name, graph.read_bytes()))
    return tuple(found)

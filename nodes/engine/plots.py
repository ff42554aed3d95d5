"""Pictures of a study's numbers, as SVG written by hand: numbers in, one well-formed <svg> out, nothing else.

Colours are of a small palette that changes with the reader's light or dark; what is told by colour is told by a shape,
too: filled where two can be told apart, hollow where not. Names and labels may be strangers' text and are escaped. Each
picture has a title and a description for who does not see it, and each mark a <title> with its numbers. Equal arguments
give equal text.

No plotting library: they bring fonts, styles and megabytes for what is some lines and circles, and their SVG has dates
and random ids.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

WIDTH = 640  # of the picture's own units; it is drawn as wide as there is room
_ROW = 30
_ENDLESS = 1e290  # larger is drawn as infinite, for arithmetic to have room
_LETTER = 6.6  # width of a letter of 12 px type, about; nothing is cut if it is a little more
_STYLE = (
    "svg.plot{--ink:#1c2330;--soft:#5d6675;--line:#d5dae2;--mark:#2456c4;--band:#2456c426;--good:#0a7a5c;--bad:#b4480f;"
    "--ground:#fff;color:var(--ink);background:var(--ground);font:12px system-ui,-apple-system,'Segoe UI',sans-serif;"
    "max-width:100%;height:auto}"
    "@media(prefers-color-scheme:dark){svg.plot{--ink:#e7eaf0;--soft:#9aa4b4;--line:#343b47;--mark:#7ba6ff;"
    "--band:#7ba6ff2e;--good:#3fcf9f;--bad:#ff9b5e;--ground:#171b22}}"
    "svg.plot text{fill:currentColor;font-size:12px}svg.plot .soft{fill:var(--soft)}svg.plot .grid{stroke:var(--line)}"
    "svg.plot .axis{stroke:var(--soft)}svg.plot .mark{stroke:var(--mark);fill:var(--mark)}"
    "svg.plot .good{stroke:var(--good);fill:var(--good)}svg.plot .bad{stroke:var(--bad);fill:var(--bad)}"
    "svg.plot .even{stroke:var(--soft);fill:var(--soft)}svg.plot .hollow{fill:var(--ground)}"
    "svg.plot .open{fill:none}svg.plot .band{fill:var(--band);stroke:none}svg.plot .strong{font-weight:600}"
)

# What reverses or hides text, or is no character of XML: shown, instead of obeyed.
_STRANGE = re.compile(
    "[\0-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\uffff]"
)


@dataclass(frozen=True)
class Mark:
    """One value with its interval; ends may be infinite. `state`: good, bad, even (it cannot be told), or mark (no
    verdict is meant)."""

    label: str
    value: float | None
    low: float = math.nan
    high: float = math.nan
    state: str = "mark"
    words: str = ""


@dataclass(frozen=True)
class Series:
    """`points`: marks with numbers for x, ascending."""

    label: str
    points: tuple[tuple[float, Mark], ...]


@dataclass(frozen=True)
class Dot:
    label: str
    x: float
    y: float


def plain(text: object, cap: int = 0) -> str:
    """Text on one line that is what it seems: letters that turn the direction of what follows, and control characters,
    become a visible �. With `cap`, no longer than that, the middle left out."""
    text = " ".join(str(text).split())
    text = _STRANGE.sub("\ufffd", text)
    if cap and len(text) > cap:
        tail = cap // 3
        text = f"{text[: cap - tail - 1]}…{text[len(text) - tail :]}"
    return text


def escape(text: object, cap: int = 0) -> str:
    """`plain`, for content and for attributes in either kind of quotes."""
    text = plain(text, cap)
    for letter, instead in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&quot;"), ("'", "&#39;")):
        text = text.replace(letter, instead)
    return text


def number(value: float | None, digits: int = 3) -> str:
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:.{digits}g}"
    if "e" in text and 1 <= abs(value) < 1e9:
        text = f"{float(text):.0f}"
    return text.replace("-", "−")


# --- the pictures -----------------------------------------------------------------------------------------------------


def intervals(rows: Sequence[Mark], title: str, desc: str, axis: str = "", zero: bool = True) -> str:
    """A row each: a dot and its interval, along one axis; with `zero`, a line where nothing differs."""
    left = _margin([row.label for row in rows])
    right, top, bottom = WIDTH - 20, 12, 12 + _ROW * max(len(rows), 1)
    scale = _Scale.over(_ends(rows) + ([0.0] if zero else []), left, right)
    parts = _ticks_along(scale, top, bottom, axis)
    if zero:
        parts.append(_line(scale(0), top, scale(0), bottom, "axis"))
    for n, row in enumerate(rows):
        y = top + _ROW * (n + 0.5)
        parts.append(_label(left - 10, y + 4, row.label, _room(left), "end"))
        parts.append(_told(row, _interval(row, scale, y)))
    return _svg(bottom + (46 if axis else 30), title, desc, parts)


def lines(series: Sequence[Series], title: str, desc: str, x_axis: str, y_axis: str, zero: bool = False) -> str:
    """Values along a number, with a band for the intervals where there is one series, and with bars where there are
    several: bands over one another cannot be told apart. Where x are ten times apart or more it is their rank that is
    drawn to scale, for else all but the last would be one spot."""
    marks = [mark for one in series for _, mark in one.points]
    xs = sorted({x for one in series for x, _ in one.points})
    top, bottom, left, right = 36, 270, 68, WIDTH - 24
    y = _Scale.over(_ends(marks) + ([0.0] if zero else []), bottom, top)
    positive = [x for x in xs if x > 0]
    ranked = len(positive) > 2 and positive[-1] / positive[0] >= 20
    place = {x: float(n) if ranked else x for n, x in enumerate(xs)}
    span = (min(place.values()), max(place.values())) if xs else (0.0, 1.0)
    pad = (span[1] - span[0]) * 0.04 or 0.5
    x = _Scale(span[0] - pad, span[1] + pad, left, right, ())
    parts = []
    for tick in y.ticks:
        parts += [
            _line(left, y(tick), right, y(tick), "grid"),
            _text(left - 8, y(tick) + 4, number(tick, 4), "soft", "end"),
        ]
    shown = xs if len(xs) <= 12 else [xs[round(i * (len(xs) - 1) / 11)] for i in range(12)]
    parts += [_text(x(place[at]), bottom + 18, number(at, 4), "soft", "middle") for at in shown]
    parts.append(_line(left, bottom, right, bottom, "axis"))
    if zero and y.low < 0 < y.high:
        parts.append(_line(left, y(0), right, y(0), "axis"))
    for n, one in enumerate(series):
        kind = ("mark", "bad", "good", "even")[n % 4]
        dash = ("", "6 3", "2 3", "8 3 2 3")[n % 4]
        known = [(x(place[at]), mark) for at, mark in one.points if _finite(mark.value)]
        if len(series) == 1:
            banded = [(at, mark) for at, mark in known if _finite(mark.low) and _finite(mark.high)]
            if len(banded) > 1:
                upper = [f"{at:.1f},{y(mark.high):.1f}" for at, mark in banded]
                lower = [f"{at:.1f},{y(mark.low):.1f}" for at, mark in reversed(banded)]
                parts.append(f'<polygon class="band" points="{" ".join(upper + lower)}"/>')
        path = " ".join(f"{at:.1f},{y(mark.value or 0):.1f}" for at, mark in known)
        stroke = f' stroke-dasharray="{dash}"' if dash else ""
        parts.append(f'<polyline class="{kind} open" stroke-width="2"{stroke} points="{path}"/>')
        for at, mark in known:
            bar = ""
            if len(series) > 1 and _finite(mark.low) and _finite(mark.high):
                bar = _line(at, y(mark.low), at, y(mark.high), kind)
            hollow = " hollow" if mark.state == "even" else ""
            dot = (
                f'<circle class="{kind}{hollow}" stroke-width="2" cx="{at:.1f}" cy="{y(mark.value or 0):.1f}" r="4.5"/>'
            )
            parts.append(_told(mark, bar + dot))
    parts.append(_text((left + right) / 2, bottom + 38, x_axis, "soft", "middle", 90))
    parts.append(_text(12, 18, y_axis, "soft", "start", 90))
    height = bottom + 60
    if len(series) > 1:
        for n, one in enumerate(series):
            kind = ("mark", "bad", "good", "even")[n % 4]
            dash = ("", "6 3", "2 3", "8 3 2 3")[n % 4]
            stroke = f' stroke-dasharray="{dash}"' if dash else ""
            ends = f'x1="{left}" y1="{height}" x2="{left + 28}" y2="{height}"'
            parts.append(f'<line class="{kind}" stroke-width="2"{stroke} {ends}/>')
            parts.append(_text(left + 36, height + 4, one.label, "", "start", 80))
            height += 20
    return _svg(height - 8, title, desc, parts)


def scatter(dots: Sequence[Dot], front: Collection[str], title: str, desc: str, x_axis: str, y_axis: str) -> str:
    """Two measures of each arm. Those named in `front`, which no other surpasses in both, are filled and joined."""
    top, bottom, left, right = 36, 310, 68, WIDTH - 24
    x = _Scale.over([dot.x for dot in dots], left, right, 0.08)
    y = _Scale.over([dot.y for dot in dots], bottom, top, 0.1)
    parts = []
    for tick in y.ticks:
        parts += [
            _line(left, y(tick), right, y(tick), "grid"),
            _text(left - 8, y(tick) + 4, number(tick, 4), "soft", "end"),
        ]
    for tick in x.ticks:
        parts += [
            _line(x(tick), top, x(tick), bottom, "grid"),
            _text(x(tick), bottom + 18, number(tick, 4), "soft", "middle"),
        ]
    best = sorted((dot for dot in dots if dot.label in front), key=lambda dot: (dot.x, dot.y))
    if len(best) > 1:
        path = " ".join(f"{x(dot.x):.1f},{y(dot.y):.1f}" for dot in best)
        parts.append(f'<polyline class="good open" stroke-width="2" points="{path}"/>')
    taken: list[tuple[float, float]] = []
    for dot in dots:
        on = dot.label in front
        at = x(dot.x), y(dot.y)
        mark = Mark(dot.label, dot.y, words=f"{plain(dot.label)}: {number(dot.x)}, {number(dot.y)}")
        kind = "good" if on else "even hollow"
        parts.append(
            _told(mark, f'<circle class="{kind}" stroke-width="2" cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="5.5"/>')
        )
        side, offset = ("start", 10) if at[0] < (left + right) / 2 else ("end", -10)
        height = at[1] + 4
        while any(abs(height - h) < 13 and abs(at[0] - w) < 150 for w, h in taken) and height < bottom - 4:
            height += 13
        taken.append((at[0], height))
        parts.append(_text(at[0] + offset, height, dot.label, "strong" if on else "soft", side, 28))
    parts.append(_text((left + right) / 2, bottom + 38, x_axis, "soft", "middle", 90))
    parts.append(_text(12, 18, y_axis, "soft", "start", 90))
    return _svg(bottom + 48, title, desc, parts)


def heat_map(
    rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]], title: str, desc: str
) -> str:
    """A cell per row and column, darker where the value is larger; what has no value is crossed out. The number is
    written in where there is room for it."""
    left = _margin(rows)
    wide = (WIDTH - 20 - left) / max(len(columns), 1)
    numbered = max(len(columns[0]) if columns else 0, 5) * _LETTER < wide + 6
    top, tall = 34, 26
    known = [value for row in values for value in row if value is not None and math.isfinite(value)]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    parts = []
    room = max(int(wide / _LETTER), 1)
    every = max(1, -(-24 // max(int(wide), 1)))
    for n, name in enumerate(columns):
        if n % every == 0:
            parts.append(_text(left + wide * (n + 0.5), top - 10, name, "soft", "middle", max(room, 3)))
    for i, (name, row) in enumerate(zip(rows, values, strict=True)):
        at = top + tall * i
        parts.append(_label(left - 10, at + tall / 2 + 4, name, _room(left), "end"))
        for j, value in enumerate(row):
            x, words = left + wide * j, f"{plain(name)}, {plain(columns[j])}: {number(value)}"
            if not _finite(value):
                drawn = _line(x + 4, at + 4, x + wide - 4, at + tall - 4, "grid")
            else:
                share = ((value or 0) - low) / (high - low) if high > low else 0.5
                drawn = (
                    f'<rect class="mark" stroke="none" fill-opacity="{0.06 + 0.74 * share:.3f}" stroke-opacity="0" '
                    f'x="{x + 1:.1f}" y="{at + 1}" width="{max(wide - 2, 1):.1f}" height="{tall - 2}" rx="3"/>'
                )
                if numbered:
                    ink = ' style="fill:var(--ground)"' if share > 0.62 else ""
                    middle = f'x="{x + wide / 2:.1f}" y="{at + tall / 2 + 4:.1f}" text-anchor="middle"'
                    drawn += f"<text {middle}{ink}>{number(value)}</text>"
            parts.append(_told(Mark(name, value, words=words), drawn))
    end = top + tall * len(rows)
    parts.append(_text(WIDTH - 20, end + 18, f"{number(low)} … {number(high)}", "soft", "end"))
    return _svg(end + 28, title, desc, parts)


def bars(rows: Sequence[Mark], title: str, desc: str, axis: str = "") -> str:
    """A bar from 0 for each, with its interval."""
    left = _margin([row.label for row in rows])
    right, top, bottom = WIDTH - 20, 12, 12 + _ROW * max(len(rows), 1)
    scale = _Scale.over([*_ends(rows), 0.0], left, right)
    parts = _ticks_along(scale, top, bottom, axis)
    for n, row in enumerate(rows):
        y = top + _ROW * (n + 0.5)
        parts.append(_label(left - 10, y + 4, row.label, _room(left), "end"))
        drawn = ""
        if _finite(row.value):
            at, zero = scale(row.value or 0), scale(0)
            drawn = (
                f'<rect class="{row.state}" fill-opacity="0.35" stroke="none" x="{min(at, zero):.1f}" y="{y - 9:.1f}" '
                f'width="{abs(at - zero):.1f}" height="18" rx="2"/>'
            )
        parts.append(_told(row, drawn + _interval(row, scale, y)))
    parts.append(_line(scale(0), top, scale(0), bottom, "axis"))
    return _svg(bottom + (46 if axis else 30), title, desc, parts)


# --- what they are made of --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scale:
    """From numbers to places."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]

    @staticmethod
    def over(values: Sequence[float], start: float, end: float, pad: float = 0.05) -> _Scale:
        known = [value for value in values if abs(value) < _ENDLESS]
        low, high = (min(known), max(known)) if known else (0.0, 1.0)
        size = max(abs(low), abs(high))
        # What differs by no more than rounding has no scale of its own.
        span = high - low if high - low > max(1e-9 * size, 1e-290) else size if size > 1e-290 else 1.0
        low, high = low - pad * span, high + pad * span
        return _Scale(low, high, start, end, _ticks(low, high))

    def __call__(self, value: float) -> float:
        """Clamped: an interval without end is drawn to the picture's edge."""
        value = min(max(value, self.low), self.high)
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _ticks(low: float, high: float) -> tuple[float, ...]:
    """Round numbers, four to eight of them."""
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (5, 2, 1) if (high - low) / (step * factor) >= 4 or factor == 1)
    first = math.ceil(low / step - 1e-9)
    return tuple(n * step for n in range(first, math.floor(high / step + 1e-9) + 1))


def _ends(marks: Sequence[Mark]) -> list[float]:
    return [
        end for mark in marks for end in (mark.value, mark.low, mark.high) if end is not None and math.isfinite(end)
    ]


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _margin(labels: Sequence[str]) -> float:
    """For labels at the left, up to two fifths of the picture."""
    return min(max((len(plain(label)) for label in labels), default=4) * _LETTER + 26, WIDTH * 0.4)


def _room(left: float) -> int:
    return int((left - 20) / _LETTER)


def _ticks_along(scale: _Scale, top: float, bottom: float, axis: str) -> list[str]:
    parts = []
    for tick in scale.ticks:
        parts.append(_line(scale(tick), top, scale(tick), bottom, "grid"))
        parts.append(_text(scale(tick), bottom + 18, number(tick, 4), "soft", "middle"))
    if axis:
        parts.append(_text((scale.start + scale.end) / 2, bottom + 36, axis, "soft", "middle", 80))
    return parts


def _interval(row: Mark, scale: _Scale, y: float) -> str:
    if not _finite(row.value):
        return _text((scale.start + scale.end) / 2, y + 4, "no value", "soft", "middle")
    drawn = ""
    if not math.isnan(row.low) and not math.isnan(row.high):
        low, high = scale(row.low), scale(row.high)
        drawn = f'<line class="{row.state}" stroke-width="3" x1="{low:.1f}" y1="{y:.1f}" x2="{high:.1f}" y2="{y:.1f}"/>'
        for end, at in ((row.low, low), (row.high, high)):
            if math.isfinite(end):  # an end that is none has no cap
                cap = f'x1="{at:.1f}" y1="{y - 5:.1f}" x2="{at:.1f}" y2="{y + 5:.1f}"'
                drawn += f'<line class="{row.state}" stroke-width="2" {cap}/>'
    hollow = " hollow" if row.state == "even" else ""
    return (
        drawn
        + f'<circle class="{row.state}{hollow}" stroke-width="2" cx="{scale(row.value or 0):.1f}" cy="{y:.1f}" r="5"/>'
    )


def _told(mark: Mark, drawn: str) -> str:
    words = mark.words or f"{plain(mark.label)}: {number(mark.value)}" + (
        "" if math.isnan(mark.low) else f" ({number(mark.low)} to {number(mark.high)})"
    )
    return f"<g><title>{escape(words)}</title>{drawn}</g>"


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, kind: str, anchor: str, cap: int = 0) -> str:
    attributes = f' class="{kind}"' if kind else ""
    return f'<text{attributes} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text, cap)}</text>'


def _label(x: float, y: float, text: str, room: int, anchor: str) -> str:
    """With all of it in a <title> where it is cut."""
    if len(plain(text)) <= room:
        return _text(x, y, text, "", anchor)
    return f"<g><title>{escape(text)}</title>{_text(x, y, text, '', anchor, max(room, 4))}</g>"


def _svg(height: float, title: str, desc: str, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" role="img" viewBox="0 0 {WIDTH} {height:.0f}" '
        f'width="{WIDTH}" height="{height:.0f}" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title><desc>{escape(desc)}</desc><style>{_STYLE}</style>{''.join(parts)}</svg>\n"
    )

"""The singular values of an adapter's layers as a picture: where a curve falls steeply, fewer ranks would do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .lowrank import share_of_ranks
from .plots import WIDTH, _line, _Scale, _svg, _text, escape, number, plain

FLOOR = 1e-4  # of a layer's largest value; smaller ones lie on the lower edge
MOST = 600  # layers that are drawn
_POINTS = 48  # of a curve, the first ranks each, the later ones thinned out
_TALL, _BARS = 260, 90


@dataclass(frozen=True)
class Layer:
    """One curve: singular values, largest first; `kept` of them stay, with the share `energy` of their squares. Without
    a cut, `kept` is how many have 99 % of the squares."""

    name: str
    values: tuple[float, ...]
    kept: int
    energy: float


def layers(spectra: Mapping[str, Sequence[float]], kept: Mapping[str, tuple[int, float]] | None = None) -> list[Layer]:
    """`kept`, of each layer: ranks that stay, and their share of its squares."""
    found = []
    for name, values in spectra.items():
        values = tuple(float(value) for value in values)
        if kept is None:
            rank = share_of_ranks(values, 0.99) if values else 0
            whole = math.fsum(value**2 for value in values)
            energy = math.fsum(value**2 for value in values[:rank]) / whole if whole else 1.0
        else:
            rank, energy = kept.get(name, (0, 0.0))
        found.append(Layer(name.removesuffix(".weight"), values, rank, energy))
    return found


def picture(shown: Sequence[Layer], title: str, cut: str | None) -> str:
    """An SVG: above, every layer's values as shares of its largest, with a dot where it is cut; below, the ranks of
    each layer before and after. `cut` says to what it is cut; None: nothing is cut, and the dots stand at 99 % of the
    squares."""
    shown = [layer for layer in shown if layer.values][:MOST]
    most = max((len(layer.values) for layer in shown), default=1)
    left, right, top, bottom = 68, WIDTH - 24, 36, 36 + _TALL
    x = _Scale.over([1.0, float(max(most, 2))], left, right)
    low = min((_share(layer.values, n) for layer in shown for n in range(len(layer.values))), default=0.1)
    floor = math.floor(min(low, -1.0))
    parts = []
    for power in range(floor, 1):
        y = bottom + (top - bottom) * (power - floor) / -floor
        parts += [_line(left, y, right, y, "grid"), _text(left - 8, y + 4, f"{10.0**power:g}", "soft", "end")]
    for tick in x.ticks:
        if tick >= 1 and tick == int(tick):
            parts.append(_text(x(tick), bottom + 18, f"{tick:g}", "soft", "middle"))
    parts.append(_line(left, bottom, right, bottom, "axis"))

    def height(values: Sequence[float], n: int) -> float:
        return bottom + (top - bottom) * (_share(values, n) - floor) / -floor

    for layer in shown:
        chosen = _thinned(len(layer.values))
        path = " ".join(f"{x(n + 1):.1f},{height(layer.values, n):.1f}" for n in chosen)
        said = f"{plain(layer.name)}: {_said(layer)}"
        drawn = f'<polyline class="{_kind(layer.name)} open" stroke-opacity="0.4" stroke-width="1.2" points="{path}"/>'
        if 0 < layer.kept <= len(layer.values):
            at = f'cx="{x(layer.kept):.1f}" cy="{height(layer.values, layer.kept - 1):.1f}"'
            drawn += f'<circle class="{_kind(layer.name)}" {at} r="3"/>'
        parts.append(f"<g><title>{escape(said)}</title>{drawn}</g>")
    parts.append(_text((left + right) / 2, bottom + 38, "rank", "soft", "middle"))
    parts.append(_text(12, 18, "singular value, as a share of its layer's largest", "soft", "start", 90))
    ranks = f"{sum(layer.kept for layer in shown)} of {sum(len(layer.values) for layer in shown)} ranks"
    squares = [(math.fsum(value**2 for value in layer.values), layer.energy) for layer in shown]
    whole = math.fsum(square for square, _ in squares)
    energy = math.fsum(square * share for square, share in squares) / whole if whole else 1.0
    parts.append(_text(right, 18, f"{ranks}, {number(100 * energy, 4)} % of the squares", "", "end"))
    parts += _bars(shown, left, right, bottom + 66, most, cut)
    base = bottom + 66 + _BARS + 44
    for n, (kind, label) in enumerate((("mark", "attention"), ("good", "feed-forward"), ("even", "others"))):
        at = left + 150 * n
        parts.append(f'<line class="{kind}" stroke-width="2" x1="{at}" y1="{base}" x2="{at + 24}" y2="{base}"/>')
        parts.append(_text(at + 30, base + 4, label, "", "start"))
    dots = f"cut to {cut}" if cut else "dots stand where 99 % of a layer's squares are reached"
    return _svg(base + 20, title, f"{len(shown)} layers of up to {most} ranks; {dots}: {ranks} in all.", parts)


def _bars(shown: Sequence[Layer], left: float, right: float, top: float, most: int, cut: str | None) -> list[str]:
    wide = (right - left) / max(len(shown), 1)
    bottom = top + _BARS
    said = f"ranks of each layer, {'before and after' if cut else 'and for 99 % of its squares'}"
    parts = [_text(12, top - 8, said, "soft", "start")]
    for n, layer in enumerate(shown):
        at, drawn = left + wide * n, ""
        for count, opacity in ((len(layer.values), 0.2), (layer.kept, 0.8)):
            tall = _BARS * count / max(most, 1)
            drawn += (
                f'<rect class="{_kind(layer.name)}" stroke="none" stroke-opacity="0" fill-opacity="{opacity}" '
                f'x="{at:.2f}" y="{bottom - tall:.1f}" width="{max(wide - 1, 0.6):.2f}" height="{tall:.1f}"/>'
            )
        parts.append(f"<g><title>{escape(f'{plain(layer.name)}: {_said(layer)}')}</title>{drawn}</g>")
    parts.append(_line(left, bottom, right, bottom, "axis"))
    parts.append(_text(left - 8, top + 8, str(most), "soft", "end"))
    parts.append(_text(left - 8, bottom + 4, "0", "soft", "end"))
    return parts


def _said(layer: Layer) -> str:
    return f"{layer.kept} of {len(layer.values)} ranks have {number(100 * layer.energy, 4)} % of its squares"


def _share(values: Sequence[float], n: int) -> float:
    """log10 of a value as a share of the first, the floor where there is none."""
    share = values[n] / values[0] if values[0] > 0 else 0.0
    return math.log10(max(share, FLOOR))


def _thinned(count: int) -> list[int]:
    if count <= _POINTS:
        return list(range(count))
    near = _POINTS // 2
    return [*range(near), *sorted({near + round(i * (count - 1 - near) / (near - 1)) for i in range(near)})]


def _kind(name: str) -> str:
    return "mark" if ".attn1." in name else "good" if ".ff." in name else "even"

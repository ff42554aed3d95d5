"""Clips side by side, captions, contact sheets: pictures made of pictures.

Everything here takes and gives float32 (F, H, W, 3) in [0, 1] unless it says otherwise, and never scales a clip except
where the name says so.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .errors import UsageError
from .video import eight_bit

if TYPE_CHECKING:
    from PIL import Image

_GROUND = 38  # of 255: the dark gray behind and between clips
_INK = 235
_SMALLEST, _LARGEST = 10, 20  # pixels of type; less cannot be read
_LEADING = 1.25  # line height over type size
_INSTEAD = str.maketrans(
    {"×": "x", "–": "-", "—": "-", "−": "-", "·": "-", "→": "->", "≤": "<=", "≥": ">=", "ß": "ss"}
    | dict.fromkeys("“”„«»", '"')
    | dict.fromkeys("‘’‚", "'")
)


def caption_strip(width: int, text: str, height: int = 32) -> torch.Tensor:
    """A line of text, or as many as fit -> float32 (height, width, 3); an odd height is made even by one more row.

    The largest type that fits, down to 10 pixels; then the text ends in an ellipsis. Below about 120 pixels of width
    that leaves a word or two: scale the clip up first (`enlarged`).
    """
    if width < 1 or height < _SMALLEST:
        raise UsageError(f"A caption of {width}×{height} pixels; it needs a width, and {_SMALLEST} pixels of height.")
    return _frame(_panel(width, height + height % 2, text))


def labelled(frames: torch.Tensor, text: str) -> torch.Tensor:
    """(F, H, W, 3) -> (F, h + H, W, 3): a caption above the clip; h is even, about a tenth of H, 24 at the least."""
    height = max(24, frames.shape[1] // 20 * 2)
    strip = caption_strip(frames.shape[2], text, height).to(frames)
    return torch.cat([strip.expand(len(frames), *strip.shape), frames], dim=1)


def enlarged(frames: torch.Tensor, factor: int) -> torch.Tensor:
    """(F, H, W, 3) -> (F, H·factor, W·factor, 3): each pixel a square, so that nothing is invented."""
    if factor < 1:
        raise UsageError(f"Enlarged {factor} times; the factor is a whole number from 1.")
    return frames.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)


def grid(clips: list[torch.Tensor], columns: int, gap: int = 4) -> torch.Tensor:
    """Clips of one size, row by row -> (longest F, H, W, 3) with even sides; `gap` pixels of dark gray between them.

    A shorter clip holds its last frame. UsageError: no clips, sizes that differ, fewer than one column.
    """
    if not clips or columns < 1 or gap < 0:
        raise UsageError(f"A grid of {len(clips)} clips in {columns} columns, {gap} pixels apart; 1, 1 and 0 at least.")
    sizes = {tuple(clip.shape[1:]) for clip in clips}
    if len(sizes) > 1:
        shown = ", ".join(f"{width}×{height}" for height, width, _ in sorted(sizes))
        raise UsageError(
            f"A grid holds clips of one size; these are {shown}. Render them alike, or enlarge the smaller."
        )
    height, width = clips[0].shape[1:3]
    columns = min(columns, len(clips))
    rows = -(-len(clips) // columns)
    length = max(len(clip) for clip in clips)
    tall, wide = rows * (height + gap) - gap, columns * (width + gap) - gap
    sheet = clips[0].new_full((length, tall + tall % 2, wide + wide % 2, 3), _GROUND / 255)
    for number, clip in enumerate(clips):
        top, left = number // columns * (height + gap), number % columns * (width + gap)
        tile = sheet[:, top : top + height, left : left + width]
        tile[: len(clip)] = clip
        tile[len(clip) :] = clip[-1]
    return sheet


def edged(
    tiles: Sequence[Sequence[torch.Tensor | None]], rows: Sequence[str], columns: Sequence[str], gap: int = 4
) -> torch.Tensor:
    """Rows of clips of one size -> (longest F, H, W, 3) with even sides: what a row has in common at its left, a column
    above it. Where there is no clip it stays dark; a shorter one holds its last frame. Without any text on an edge that
    edge is left out.

    UsageError: no clips, sizes that differ, or edges that do not fit the rows and columns.
    """
    clips = [clip for row in tiles for clip in row if clip is not None]
    if not clips or len(tiles) != len(rows) or any(len(row) != len(columns) for row in tiles):
        raise UsageError(
            f"A grid of {len(clips)} clips in rows of {', '.join(str(len(row)) for row in tiles) or 'none'}, labelled "
            f"{len(rows)} × {len(columns)}; each row has a clip or None per column, and one is a clip at least."
        )
    if len({tuple(clip.shape[1:]) for clip in clips}) > 1:
        raise UsageError("A grid holds clips of one size; enlarge or reduce them alike.")
    height, width = clips[0].shape[1:3]
    left = min(200, max(96, width)) if any(rows) else 0
    top = max(28, height // 20 * 2) if any(columns) else 0
    tall, wide = top + len(rows) * (height + gap) - gap, left + len(columns) * (width + gap) - gap
    length = max(len(clip) for clip in clips)
    sheet = clips[0].new_full((length, tall + tall % 2, wide + wide % 2, 3), _GROUND / 255)
    for j, text in enumerate(columns if top else ()):
        x = left + j * (width + gap)
        sheet[:, :top, x : x + width] = caption_strip(width, text, top)[:top].to(sheet)
    for i, (row, text) in enumerate(zip(tiles, rows, strict=True)):
        y = top + i * (height + gap)
        if left:
            sheet[:, y : y + height, :left] = caption_strip(left, text, height)[:height].to(sheet)
        for j, clip in enumerate(row):
            if clip is not None:
                tile = sheet[:, y : y + height, left + j * (width + gap) :][:, :, :width]
                tile[: len(clip)] = clip
                tile[len(clip) :] = clip[-1]
    return sheet


def contact_sheet(
    clips: list[tuple[str, torch.Tensor]], frames_per_clip: int = 6, tile_width: int = 160
) -> Image.Image:
    """One row per (label, clip): the label at the left, then evenly spaced frames, the first and the last among them.

    A frame is `tile_width` wide or a little less: enlarged by a whole factor, or reduced. Clips may differ in size and
    length; one with fewer frames shows each once. RGB. UsageError: no clips, or no frames asked for.
    """
    from PIL import Image

    if not clips or frames_per_clip < 1 or tile_width < 16:
        raise UsageError(
            f"A contact sheet of {len(clips)} clips with {frames_per_clip} frames each, {tile_width} pixels wide; "
            "at least 1, 1 and 16."
        )
    gap, margin = 4, 160
    rows = [[_tile(clip[number], tile_width) for number in _spread(len(clip), frames_per_clip)] for _, clip in clips]
    width = margin + max(sum(tile.width + gap for tile in row) for row in rows)
    height = sum(row[0].height + gap for row in rows) - gap
    sheet = Image.new("RGB", (width - gap, height), (_GROUND,) * 3)
    top = 0
    for (label, _), row in zip(clips, rows, strict=True):
        sheet.paste(_panel(margin, row[0].height, label), (0, top))
        left = margin
        for tile in row:
            sheet.paste(tile, (left, top))
            left += tile.width + gap
        top += row[0].height + gap
    return sheet


def _spread(length: int, count: int) -> list[int]:
    """`count` evenly spaced numbers below `length`, ends included; all of them if there are no more."""
    if count >= length:
        return list(range(length))
    return [round(i * (length - 1) / max(count - 1, 1)) for i in range(count)]


def _tile(frame: torch.Tensor, width: int) -> Image.Image:
    from PIL import Image

    picture = Image.fromarray(eight_bit(frame).numpy())
    if picture.width > width:
        return picture.resize((width, max(1, round(picture.height * width / picture.width))), Image.Resampling.LANCZOS)
    factor = width // picture.width
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _frame(picture: Image.Image) -> torch.Tensor:
    import numpy as np

    return torch.from_numpy(np.array(picture)).float().div_(255)


def _panel(width: int, height: int, text: str) -> Image.Image:
    """Text on a dark panel, in the middle from top to bottom, in the largest type with which it fits."""
    from PIL import Image, ImageDraw, ImageFont

    text = _plain(text)
    edge = min(6, width // 10)
    picture = Image.new("RGB", (width, height), (_GROUND,) * 3)
    for size in range(max(_SMALLEST, min(_LARGEST, int(height / _LEADING))), _SMALLEST - 1, -1):
        font = ImageFont.load_default(size)

        def fits(part: str, font: Any = font) -> bool:
            return font.getlength(part) <= width - 2 * edge

        room = max(1, int(height / (size * _LEADING)))
        lines = _wrapped(text, fits)
        # Smaller type comes before a word cut in two, and the ellipsis last of all.
        if size == _SMALLEST or (len(lines) <= room and all(map(fits, text.split()))):
            if len(lines) > room:
                lines = [*lines[: room - 1], _shortened(lines[room - 1], fits)]
            pen = ImageDraw.Draw(picture)
            step = round(size * _LEADING)
            for row, line in enumerate(lines):
                middle = height / 2 + (row - (len(lines) - 1) / 2) * step
                pen.text((edge, middle), line, font=font, fill=(_INK,) * 3, anchor="lm")
            break
    return picture


def _wrapped(text: str, fits: Callable[[str], bool]) -> list[str]:
    lines, line = [], ""
    for word in text.split():
        if fits(f"{line} {word}".strip()):
            line = f"{line} {word}".strip()
            continue
        if line:
            lines.append(line)
        while not fits(word) and len(word) > 1:
            cut = 1
            while fits(word[: cut + 1]):
                cut += 1
            lines.append(word[:cut])
            word = word[cut:]
        line = word
    return [*lines, line]


def _shortened(line: str, fits: Callable[[str], bool]) -> str:
    while line and not fits(line + "…"):
        line = line[:-1]
    return line.rstrip() + "…"


def _plain(text: str) -> str:
    """Text in the letters that Pillow's own font has: ASCII and hardly more. It draws a box for "×", "–" and "ä"."""
    text = text.translate(_INSTEAD)
    letters = (letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    return "".join(letter if letter.isspace() or " " <= letter <= "~" else "?" for letter in letters)

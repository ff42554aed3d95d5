"""Training on more than one size: every clip and still goes to the nearest size, and a batch is of one size.

    buckets(settings, unit, …)      the sizes there are: that of the settings, those asked for, or all that fit (auto)
    nearest(buckets, shape, still)  which of them a clip or still of a shape is trained in
    measure(item, …)                the shape that a file has, decoded once and remembered

Without buckets nothing here is used, and a run draws the same numbers as before there were any.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .dataset import LONGEST, Item, read_item
from .errors import GeometryError, UsageError
from .files import write_atomic

AUTO = "auto"
ASPECTS = (2.0, 16 / 9, 3 / 2, 4 / 3, 1.0, 3 / 4, 2 / 3, 9 / 16, 0.5)  # width to height, of auto
SHORTER = (1, 2, 4)  # auto's lengths: all of it, a half, a quarter


@dataclass(frozen=True, order=True)
class Bucket:
    """Frames, and pixels. A still has one frame."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.frames}"

    @property
    def volume(self) -> int:
        """Pixels of a whole clip: what its batch costs grows with it."""
        return self.frames * self.height * self.width


def parse(words: Sequence[str], frames: int) -> tuple[Bucket, ...]:
    """`720x480` or `480x720x25`, as (width, height, frames); `frames` where none are said. Without `auto`.

    Raises:
        UsageError, GeometryError
    """
    found = []
    for word in words:
        if word == AUTO:
            continue
        match = re.fullmatch(r"(\d{1,5})x(\d{1,5})(?:x(\d{1,4}))?", word) if isinstance(word, str) else None
        if match is None:
            raise UsageError(f"buckets: {word!r} is no size; write 720x480, 720x480x25 (frames last), or auto.")
        width, height, length = (int(n) if n else frames for n in match.groups())
        if not width or not height or length % 8 != 1:
            near = max(1, 8 * round((length - 1) / 8) + 1)
            raise GeometryError(f"buckets: {word} has {length} frames and pixels above 0 are wanted; clips are trained "
                                f"on 8N + 1 frames, the nearest is {near}.")  # fmt: skip
        found.append(Bucket(length, height, width))
    return tuple(found)


def buckets(
    words: Sequence[str], main: Bucket, unit: int, step: int = 8, largest: tuple[int, int] | None = None
) -> tuple[Bucket, ...]:
    """All sizes of a training, the one of its settings first. `unit` are the pixels that sides are multiples of, `step`
    what lengths are, plus one; `largest` (width, height) bounds those of auto, and where it is the main size (a base
    with learned positions) there is no other.

    auto: of common aspects the largest size with no more pixels than the main one, in its length, half and a quarter.
    """
    found = [main, *parse(words, main.frames)]
    if AUTO in words:
        spans = [(main.frames - 1) // step // part * step + 1 for part in SHORTER]
        lengths = sorted({span for span in spans if span > 1} | {main.frames})
        sizes = {(main.width, main.height)}
        for aspect in ASPECTS:
            size = _size(aspect, main.width * main.height, unit)
            if size and (largest is None or (size[0] <= largest[0] and size[1] <= largest[1])):
                sizes.add(size)
        found += [Bucket(length, height, width) for length in lengths for width, height in sorted(sizes)]
    return tuple(dict.fromkeys(found))


def _size(aspect: float, area: int, unit: int) -> tuple[int, int] | None:
    """(width, height) of about this aspect, of no more pixels than `area`; None where there is none."""
    exact = math.sqrt(area * aspect) / unit
    found = []
    for width in {math.floor(exact) * unit, math.ceil(exact) * unit} - {0}:
        height = min(area // width // unit, round(width / aspect / unit)) * unit
        if height:
            found.append((abs(math.log(width / height / aspect)), -width * height, width, height))
    return min(found)[2:] if found else None


def nearest(among: Iterable[Bucket], shape: tuple[int, int, int], still: bool) -> Bucket:
    """The bucket for (frames, height, width): of the nearest aspect, then the longest that the clip fills, then of the
    nearest size. A still goes by its picture alone, and its bucket has one frame."""
    frames, height, width = shape
    found = sorted({Bucket(1, b.height, b.width) for b in among} if still else set(among))

    def away(bucket: Bucket) -> tuple[float, float, float, Bucket]:
        aspect = abs(math.log(bucket.width * height / (bucket.height * width)))
        # A clip that is too short even for the shortest is held at its end, or refused, by `to_frames`.
        length = 0.0 if still else frames - bucket.frames if bucket.frames <= frames else 1e6 + bucket.frames
        size = abs(math.log(bucket.width * bucket.height / (width * height)))
        return round(aspect, 6), length, round(size, 6), bucket

    return min(found, key=away)


def measure(
    item: Item, frames: int, fps: float | None, cache: Path, check_cancelled: Callable[[], None] = lambda: None
) -> tuple[int, int, int]:
    """(frames, height, width) of a file, frames at the rate `fps` if one is wanted, counted up to what is ever used of
    a clip of `frames`. Decoded once: the answer lies in the cache under the hash of the content.

    Raises:
        DatasetError: it cannot be decoded.
    """
    path = cache / "training" / "sizes" / f"{item.sha256}-{LONGEST * frames}.json"
    known = _known(path)
    if known is None:
        check_cancelled()
        clip, rate = read_item(item, LONGEST * frames)
        known = (*clip.shape[:3], rate)
        write_atomic(path, json.dumps(known).encode())
    count, height, width, rate = known
    if item.kind == "clip" and fps and rate:
        count = max(1, int(count * fps / rate + 0.5))
    return int(count), int(height), int(width)


def _known(path: Path) -> tuple[Any, ...] | None:
    """What was measured; a broken entry is measured anew."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    good = isinstance(found, list) and len(found) == 4 and all(isinstance(n, (int, float)) and n > 0 for n in found)
    return tuple(found) if good else None

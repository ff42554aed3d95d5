"""A folder of clips and stills with captions, and their latents and text states, encoded once.

    scan(folder) -> items        which files, which words; nothing is decoded yet
    encode(items, …) -> Encoded  everything the trainer needs, from the cache where it was encoded before

Two layouts are read: the lists of CogVideo's own trainer (`prompts.txt` with `videos.txt`, and `images.txt` for
image to video, line by line), and a plain folder in which `x.mp4` or `x.png` lies beside `x.txt`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .errors import CogLoomError, DatasetError, MediaError
from .files import write_atomic

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CLIPS = frozenset({".mp4", ".webm", ".gif", ".mkv", ".mov", ".avi", ".m4v"})
STILLS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
PROMPTS, VIDEOS, IMAGES = "prompts.txt", "videos.txt", "images.txt"
# Longer clips are read up to here: beyond it, motion would be squeezed to more than eight times its speed.
LONGEST = 8
CACHE_VERSION = 1  # part of every key; raise it when `to_frames` or the encoding changes


@dataclass(frozen=True)
class Item:
    """One clip or still with its caption. `name` is the path inside the folder, with forward slashes."""

    path: Path
    caption: str
    kind: Literal["clip", "still"]
    name: str
    size: int  # bytes
    sha256: str
    first: Path | None = None  # image to video: the picture it starts from, if it is not the clip's first frame
    first_sha256: str = ""


def scan(folder: Path) -> list[Item]:
    """The items of a dataset folder, in list order, or by name in a plain folder.

    Raises:
        DatasetError: no such folder, nothing in it, lists of different lengths, a path that leads outside, a
            missing or empty caption, a missing, empty or unreadable file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DatasetError(f"{folder} is not a folder; name the one that holds the clips and their captions.")
    videos, images = (folder / VIDEOS).is_file(), (folder / IMAGES).is_file()
    return _listed(folder) if (folder / PROMPTS).is_file() and (videos or images) else _plain(folder)


def fingerprint(items: Iterable[Item]) -> str:
    """sha256 over every item's relative path, size, content and caption; the order of the items does not count."""
    rows = sorted([item.name, item.size, item.sha256, item.caption, item.first_sha256] for item in items)
    return hashlib.sha256(json.dumps(rows, ensure_ascii=True).encode()).hexdigest()


def to_frames(item: Item, frames: int, height: int, width: int, fps: float | None = None) -> Tensor:
    """Decode an item to the training size: float32 (F, height, width, 3) in [0, 1], F = `frames`, or 1 for a still.

    With `fps` a clip is resampled to that rate from its beginning; without, frames are taken at an equal stride over
    the whole clip, as CogVideo's own trainer does. A clip that is too short holds its last frame.

    Raises:
        DatasetError: unreadable, or shorter than half of `frames`.
    """
    import torch

    clip, rate = read_item(item, LONGEST * frames)
    if item.kind == "still":
        return fit(clip, height, width)
    if fps and rate:
        count = int(len(clip) * fps / rate + 0.5)
        pick = (torch.arange(min(max(count, 1), frames)) * (rate / fps)).round().long().clamp(max=len(clip) - 1)
    else:
        pick = torch.arange(0, len(clip), max(len(clip) // frames, 1))[:frames]
    if 2 * len(pick) < frames:
        at = f" at {fps:g} frames a second" if fps and rate else ""
        raise DatasetError(
            f"{item.name} has {len(pick)} frames{at}, fewer than half of the {frames} trained on; "
            "take it out of the dataset, or train on fewer frames."
        )
    short = frames - len(pick)
    return fit(clip[torch.cat([pick, pick[-1:].expand(short)])], height, width)


def read_item(item: Item, most: int) -> tuple[Tensor, float]:
    """A file as it is, float32 (F, H, W, 3) in [0, 1], up to `most` frames, and its frames a second, 0 of a still.

    Raises:
        DatasetError: unreadable.
    """
    from . import video

    if item.kind == "still":
        return _read(item.name, lambda: video.read_image(item.path))[None], 0.0
    return _read(item.name, lambda: video.read_video(item.path, max_frames=most))


def fit(frames: Tensor, height: int, width: int) -> Tensor:
    """Centre crop to the aspect of the target, then resize: float32 (F, H, W, 3) -> (F, height, width, 3)."""
    from torch.nn.functional import interpolate

    _, h, w, _ = frames.shape
    scale = min(h / height, w / width)
    crop_h, crop_w = min(h, round(height * scale)), min(w, round(width * scale))
    top, left = (h - crop_h) // 2, (w - crop_w) // 2
    frames = frames[:, top : top + crop_h, left : left + crop_w]
    if frames.shape[1:3] == (height, width):
        return frames.contiguous()
    pictures = frames.permute(0, 3, 1, 2)
    if scale >= 1:
        pictures = interpolate(pictures, (height, width), mode="area")
    else:  # area averaging only repeats pixels when it enlarges
        pictures = interpolate(pictures, (height, width), mode="bilinear", align_corners=False)
    return pictures.permute(0, 2, 3, 1).clamp(0, 1).contiguous()


@dataclass(frozen=True)
class Encoded:
    """Where the latents and text states lie; tensors are read when a batch needs them, so a large set needs no RAM."""

    _latents: dict[str, Path]
    _firsts: dict[str, Path]
    _prompts: dict[str, Path]

    def latents(self, item: Item) -> Tensor:
        """Unscaled latents (F, C, h, w) in the autoencoder's dtype."""
        return _load(self._latents[item.name])

    def first(self, item: Item) -> Tensor:
        """Unscaled latent (1, C, h, w) of the picture that an image-to-video clip starts from."""
        return _load(self._firsts[item.name])

    def prompt(self, text: str) -> Tensor:
        """Text states (L, D)."""
        return _load(self._prompts[text])


def encode(
    items: Sequence[Item],
    *,
    frames: int,
    height: int,
    width: int,
    fps: float | None,
    vae: Any,
    encode_prompts: Callable[[list[str]], Tensor],
    encoder_hash: str,
    cache: Path,
    firsts: bool = False,
    extra_prompts: Sequence[str] = (),
    share: Callable[[Sequence[Any]], Sequence[Any]] = lambda jobs: jobs,
    size_of: Callable[[Item], tuple[int, int, int]] | None = None,
    progress: Callable[[int, int, str, dict | None], None] = lambda *_: None,
    check_cancelled: Callable[[], None] = lambda: None,
) -> Encoded:
    """Latents of every item and states of every caption; what the cache folder already holds is not encoded again.


    Everything is encoded one by one, so that an entry never depends on what it was batched with. `firsts` adds the
    condition latents of image to video. `share` picks, of all that is to be encoded, what this process encodes;
    `size_of` says the (frames, height, width) of an item where not all are of one size.

    Raises:
        DatasetError: an item that cannot be decoded, or latents or text states that are not numbers.
        Cancelled: from `check_cancelled`; what was encoded so far stays in the cache.
    """
    import torch

    vae_hash = weights_hash(vae)
    dtype = str(vae.dtype)

    def size(item: Item) -> tuple[int, int, int]:
        return (frames, height, width) if size_of is None else size_of(item)

    def key(item: Item, part: str) -> Path:
        of = item.first_sha256 if part == "first" and item.first else item.sha256
        geometry = dict(zip(("frames", "height", "width"), size(item), strict=True)) | {"fps": fps}
        given = {"part": part, "kind": item.kind, "content": of, "picture": bool(item.first) and part == "first"}
        return cache / "training" / "latents" / _key(given | geometry | {"vae": vae_hash, "dtype": dtype})

    def condition(item: Item) -> Tensor:
        from . import video

        picture = item.first
        if picture is None:
            return to_frames(item, *size(item), fps)[:1]
        return fit(_read(f"{item.name} (its first picture)", lambda: video.read_image(picture))[None], *size(item)[1:])

    jobs: list[tuple[str, Path, Callable[[], Tensor]]] = []
    for item in items:

        def latents(item: Item = item) -> Tensor:
            return _latents(vae, to_frames(item, *size(item), fps))

        def first(item: Item = item) -> Tensor:
            # As a single image, which is how the pipelines encode it: the norms' statistics differ from a clip's.
            return _latents(vae, condition(item))

        jobs.append((item.name, key(item, "clip"), latents))
        if firsts:
            jobs.append((item.name, key(item, "first"), first))
    # A folder of its own: `prompts/` beside it is pruned while renders go on.
    texts = list(dict.fromkeys([*(item.caption for item in items), *extra_prompts]))
    prompt_keys = {
        text: cache / "training" / "captions" / _key({"text": text, "encoder": encoder_hash}) for text in texts
    }
    for text, path in prompt_keys.items():
        jobs.append((f"the caption {text[:60]!r}", path, lambda text=text: encode_prompts([text])[0]))

    jobs = list(share(jobs))
    with torch.no_grad():
        for done, (what, path, make) in enumerate(jobs):
            check_cancelled()
            if _cached(path):
                continue
            progress(done, len(jobs), "encoding", None)
            tensor = make().detach().cpu().contiguous()
            if not tensor.isfinite().all():
                raise DatasetError(
                    f"{what}: encoding gave values that are not numbers in {tensor.dtype}; "
                    "load the base in bfloat16 or float32, or take the item out of the dataset."
                )
            _store(path, tensor)
    progress(len(jobs), len(jobs), "encoding", None)
    return Encoded(
        {item.name: key(item, "clip") for item in items},
        {item.name: key(item, "first") for item in items} if firsts else {},
        prompt_keys,
    )


def weights_hash(module: torch.nn.Module) -> str:
    """sha256 over the names, dtypes, shapes and bytes of a module's tensors."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# --- reading folders ---


def _listed(folder: Path) -> list[Item]:
    """CogVideo's lists. With `videos.txt`, `images.txt` holds the pictures that the clips start from."""
    prompts = _lines(folder / PROMPTS)
    media_list = VIDEOS if (folder / VIDEOS).is_file() else IMAGES
    media = _lines(folder / media_list)
    firsts = _lines(folder / IMAGES) if media_list == VIDEOS and (folder / IMAGES).is_file() else []
    for name, lines in ((media_list, media), (IMAGES, firsts)):
        if lines and len(lines) != len(prompts):
            raise DatasetError(
                f"{folder}: {PROMPTS} has {len(prompts)} lines and {name} has {len(lines)}; "
                "line n of one belongs to line n of the other, so make them equally long."
            )
    if not media:
        raise DatasetError(f"{folder / media_list} is empty; write one path a line, relative to the folder.")
    items, seen = [], set()
    for number, (name, caption) in enumerate(zip(media, prompts, strict=True), 1):
        if not caption:
            raise DatasetError(f"{folder / PROMPTS}, line {number}: the caption of {name} is empty; describe the clip.")
        path = _inside(folder, name, f"{folder / media_list}, line {number}")
        if path in seen:
            raise DatasetError(f"{folder / media_list}, line {number}: {name} is listed twice; leave one of them out.")
        seen.add(path)
        first = _inside(folder, firsts[number - 1], f"{folder / IMAGES}, line {number}") if firsts else None
        if first is not None and first.suffix.lower() not in STILLS:
            raise DatasetError(f"{folder / IMAGES}, line {number}: {first.name} is no picture; {_known()}")
        items.append(_item(path.relative_to(folder.resolve()).as_posix(), path, caption, first))
    return items


def _plain(folder: Path) -> list[Item]:
    media = sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and path.suffix.lower() in CLIPS | STILLS and not path.name.startswith(".")
    )
    if not media:
        raise DatasetError(
            f"{folder} holds no clip and no picture; put x.mp4 or x.png beside x.txt, or lists named "
            f"{PROMPTS} and {VIDEOS}. {_known()}"
        )
    missing = [path.name for path in media if not path.with_suffix(".txt").is_file()]
    if missing:
        raise DatasetError(
            f"{folder}: {len(missing)} of {len(media)} files have no caption ({_some(missing)}); "
            f"write it into {Path(missing[0]).with_suffix('.txt').name} beside the file."
        )
    items = []
    for path in media:
        caption = " ".join(_text(path.with_suffix(".txt")).split())
        if not caption:
            raise DatasetError(f"{path.with_suffix('.txt')} is empty; describe what {path.name} shows.")
        items.append(_item(path.name, path, caption, None))
    return items


def _item(name: str, path: Path, caption: str, first: Path | None) -> Item:
    suffix = path.suffix.lower()
    if suffix not in CLIPS | STILLS:
        raise DatasetError(f"{path}: {suffix or 'a file without ending'} is not read; {_known()}")
    size, digest = _digest(path)
    return Item(
        path=path,
        caption=caption,
        kind="clip" if suffix in CLIPS else "still",
        name=name,
        size=size,
        sha256=digest,
        first=first,
        first_sha256=_digest(first)[1] if first else "",
    )


def _inside(folder: Path, name: str, where: str) -> Path:
    """A listed path, resolved. Lists come with downloaded datasets, so links that lead out are refused as well."""
    root = folder.resolve()
    path = (root / name).resolve()
    if root not in path.parents:
        raise DatasetError(f"{where}: {name!r} leads outside {folder}; write paths relative to the folder.")
    return path


def _digest(path: Path) -> tuple[int, str]:
    """Size in bytes and sha256 of a file's content."""
    digest, size = hashlib.sha256(), 0
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
                size += len(block)
    except OSError as error:
        raise DatasetError(
            f"{path} cannot be read ({error.strerror}); restore it, or take it out of the dataset."
        ) from error
    if size == 0:
        raise DatasetError(f"{path} is empty (0 bytes); copy it again, or take it out of the dataset.")
    return size, digest.hexdigest()


def _lines(path: Path) -> list[str]:
    """Lines without their white space; empty ones at the end do not count."""
    lines = [line.strip() for line in _text(path).splitlines()]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from error
    except OSError as error:
        raise DatasetError(f"{path} cannot be read ({error.strerror}); restore it.") from error


def _known() -> str:
    return f"clips end in {', '.join(sorted(CLIPS))}, stills in {', '.join(sorted(STILLS))}."


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _read(name: str, reader: Callable[[], Any]) -> Any:
    try:
        return reader()
    except MediaError as error:
        raise DatasetError(f"{name}: {error} Or take it out of the dataset.") from error


# --- the cache ---


def _latents(vae: Any, frames: Tensor) -> Tensor:
    """float32 (F, H, W, 3) in [0, 1] -> unscaled latents (f, C, h, w) in the autoencoder's dtype.

    The mode of the distribution and not a sample: an entry is made once and used for the whole training, so one
    draw of its (tiny) noise would be frozen into the target; and the mode needs no seed in the key.
    """
    x = (frames * 2 - 1).permute(3, 0, 1, 2)[None].to(vae.device, vae.dtype)  # (1, 3, F, H, W)
    return vae.encode(x).latent_dist.mode()[0].permute(1, 0, 2, 3)


def _key(given: dict[str, Any]) -> str:
    text = json.dumps({"version": CACHE_VERSION} | given, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest() + ".safetensors"


def _store(path: Path, tensor: Tensor) -> None:
    from safetensors.torch import save

    write_atomic(path, save({"value": tensor}))


def _load(path: Path) -> Tensor:
    """Through private memory: a mapped file that somebody truncates would kill the process."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(path.read_bytes())["value"]
    except (OSError, SafetensorError, KeyError) as error:
        raise DatasetError(f"{path} is missing from the cache or broken ({error}); start again to make it.") from error


def _cached(path: Path) -> bool:
    """Whether a whole entry lies there; a broken one is made again."""
    if not path.is_file():
        return False
    try:
        _load(path)
    except CogLoomError:
        return False
    return True

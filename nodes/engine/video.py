"""Frames <-> files, with the record inside.

A clip is float32 (F, H, W, 3) in [0, 1]. What is written is its rounded 8-bit form at its own size, never rescaled:

    .mp4    H.264, 4:2:0, the index in front: plays everywhere
    .webm   VP9, 4:2:0
    .mkv    FFV1, RGB: the very bytes come back
    .gif    256 colours chosen for the clip

Tags are separate entries of the container ("prompt" and "workflow" are what ComfyUI's front end looks for). A file is
written beside its target under a hidden name and renamed at the end, so a target is always the old file or the new one.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .errors import MediaError, Unreadable, UsageError
from .files import replacing

if TYPE_CHECKING:
    from PIL import Image

# One matrix for the conversion, and the same one in the tag: a player that trusts the tag gets our colours back.
# ffmpeg's own choice is BT.601 untagged, which players read as BT.709 for large pictures. `setparams` comes after the
# conversion because -color_primaries and -color_trc as output options are overruled by what the frames say.
_YUV = [
    "-vf",
    "scale=flags=bicubic+accurate_rnd+full_chroma_int:out_color_matrix=bt709:out_range=tv,format=yuv420p,"
    "setparams=range=tv:colorspace=bt709:color_primaries=bt709:color_trc=bt709",
]


# Matroska has a random number in each file; without it the same frames are the same bytes.
_SAME = ["-fflags", "+bitexact"]


@dataclass(frozen=True)
class _Container:
    arguments: tuple[str, ...]
    even: bool = False  # 4:2:0 has one colour sample for two by two pixels
    quality: tuple[int, int, int] | None = None  # CRF: best, default, worst
    fastest: float = 240.0  # frames per second


_CONTAINERS = {
    # CRF 0 is left out: it would switch H.264 to a profile that browsers do not play.
    ".mp4": _Container(
        (*_YUV, "-c:v", "libx264", "-preset", "medium", "-movflags", "+faststart+use_metadata_tags"), True, (1, 17, 51)
    ),
    ".webm": _Container(
        (*_YUV, *_SAME, "-c:v", "libvpx-vp9", "-b:v", "0", "-deadline", "good", "-cpu-used", "2", "-row-mt", "1"),
        True,
        (1, 20, 63),
    ),
    ".mkv": _Container((*_SAME, "-c:v", "ffv1", "-level", "3", "-slicecrc", "1", "-pix_fmt", "bgr0")),
    # A delay is a whole number of hundredths; browsers slow anything below two of them down to ten frames a second.
    ".gif": _Container(
        (
            "-filter_complex",
            "[0:v]split[a][b];[a]palettegen=stats_mode=full[p];[b][p]paletteuse=dither=sierra2_4a:diff_mode=rectangle",
        ),
        fastest=50.0,
    ),
}
SUFFIXES = tuple(_CONTAINERS)
STILLS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

MAX_PIXELS = 2**31  # frames * height * width of a file that is read: 24 GiB as float32
_PNG, _GIF = b"\x89PNG\r\n\x1a\n", b"GIF8"
_PARTIAL = re.compile(r"^\..*\.[0-9a-f]{8}\.part\.[a-z0-9]+$", re.DOTALL)
_STALE = 3600.0  # seconds

# A stranger's file may be a playlist under a video's name, which would have ffmpeg open other files, or the net.
_READ = [
    *("-protocol_whitelist", "file"),
    *("-format_whitelist", "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,gif,avi,mpeg,mpegts"),
]


# --- frames -> file


def write_video(
    frames: torch.Tensor, path: Path, fps: float, tags: dict[str, str] | None = None, quality: int | None = None
) -> Path:
    """Write a clip; its suffix chooses the container. Returns `path`.

    frames: floating point (F, H, W, 3) in [0, 1]; what lies outside is clamped. fps: frames per second, 0.1 to 240
    (gif: 50). tags: lower-case names and any text; see `read_tags`. quality: CRF, less is better; None for the
    container's own; .mkv and .gif have none.

    MediaError: a suffix that is not one of SUFFIXES, NaN, an odd side for 4:2:0, a text that no container can hold,
    or ffmpeg failed. DiskFull: no room. UsageError: fps or quality out of range. An older file survives all of them.
    """
    path = Path(path)
    container = _CONTAINERS.get(path.suffix.lower())
    if container is None:
        raise MediaError(
            f"{path.name}: a clip cannot be written as {path.suffix or 'a file without a suffix'!r}; "
            f"end the name in one of {', '.join(SUFFIXES)}."
        )
    _check_frames(frames, path)
    height, width = frames.shape[1:3]
    if container.even and (height % 2 or width % 2):
        raise MediaError(
            f"{path.name}: {width}×{height} has an odd side, and {path.suffix} stores colour for two by two pixels; "
            "write .mkv or .gif instead, or make both sides even."
        )
    if not 0.1 <= fps <= container.fastest:
        raise UsageError(f"{path.name}: {fps} frames per second; {path.suffix} takes 0.1 to {container.fastest:g}.")
    tags = _checked_tags(tags, path)
    crf = _crf(container, quality, path)
    gif = path.suffix.lower() == ".gif"
    with replacing(path) as part:
        notes = part.with_suffix(".ffmeta")  # a file, since Windows ends a command line after 32,767 characters
        try:
            notes.write_text(_ffmetadata({} if gif else tags), encoding="utf-8", newline="")
            _encode(
                frames,
                [
                    *("-f", "rawvideo", "-pixel_format", "rgb24", "-video_size", f"{width}x{height}"),
                    *("-framerate", f"{fps:.9g}", "-i", "pipe:0", "-f", "ffmetadata", "-i", str(notes)),
                    *("-map_metadata", "1", *container.arguments, *crf, str(part)),
                ],
                path,
            )
        finally:
            notes.unlink(missing_ok=True)
        if gif and tags:
            _append_comment(part, tags)
    return path


def write_png(picture: Image.Image | torch.Tensor, path: Path, tags: dict[str, str] | None = None) -> Path:
    """Write a PIL image, or one frame (H, W, 3) floating point in [0, 1], as PNG with `tags` as text chunks.

    MediaError and DiskFull as for `write_video`; an older file at `path` survives them. Returns `path`.
    """
    from PIL import Image, PngImagePlugin

    path = Path(path)
    if path.suffix.lower() != ".png":
        raise MediaError(f"{path.name}: a picture is written as .png; end the name so.")
    if isinstance(picture, torch.Tensor):
        _check_frames(picture[None], path)
        picture = Image.fromarray(eight_bit(picture).numpy())
    chunks = PngImagePlugin.PngInfo()
    for name, text in _checked_tags(tags, path).items():
        # A tEXt chunk is Latin-1 by the standard and UTF-8 to some readers: anything beyond ASCII goes into iTXt.
        (chunks.add_text if text.isascii() else chunks.add_itxt)(name, text)
    with replacing(path) as part:
        picture.save(part, format="PNG", pnginfo=chunks)
    return path


def eight_bit(frames: torch.Tensor) -> torch.Tensor:
    """Floating point in [0, 1], any shape -> uint8 on the CPU: clamped, and rounded rather than cut off."""
    return frames.detach().to("cpu", torch.float32).clamp(0, 1).mul(255).round().to(torch.uint8)


def sweep_partial(folder: Path) -> int:
    """Remove what a killed writer left in `folder` more than an hour ago; how many files that was."""
    removed = 0
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            # One that another process removes, or holds open (Windows), is not ours to worry about.
            with contextlib.suppress(OSError):
                if _PARTIAL.match(entry.name) and time.time() - entry.stat().st_mtime > _STALE:
                    os.unlink(entry.path)
                    removed += 1
    return removed


def _check_frames(frames: torch.Tensor, path: Path) -> None:
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape or not frames.is_floating_point():
        raise MediaError(
            f"{path.name}: a clip is floating point (frames, height, width, 3), none of them 0; "
            f"this one is {str(frames.dtype).removeprefix('torch.')} {tuple(frames.shape)}."
        )
    broken = [number for number, frame in enumerate(frames) if torch.isnan(frame).any()]
    if broken:
        raise MediaError(
            f"{path.name}: {len(broken)} of {len(frames)} frames hold NaN, the first is frame {broken[0]} (counted "
            "from 0); nothing was written. fp16 overflows so: render in bf16 or fp32, or with smaller adapter weights."
        )


def _crf(container: _Container, quality: int | None, path: Path) -> list[str]:
    if container.quality is None:
        if quality is not None:
            raise UsageError(f"{path.name}: {path.suffix} has no quality to choose; leave it out.")
        return []
    best, default, worst = container.quality
    quality = default if quality is None else quality
    if not best <= quality <= worst:
        raise UsageError(
            f"{path.name}: quality {quality}; {path.suffix} takes {best} (best) to {worst} (smallest file)."
        )
    return ["-crf", str(quality)]


def _encode(frames: torch.Tensor, arguments: list[str], path: Path) -> None:
    arguments = ["-loglevel", "level+error", "-y", *arguments]
    with ffmpeg(arguments, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as (process, finish):
        starved = False
        try:
            for frame in frames:
                process.stdin.write(eight_bit(frame).numpy().tobytes())
            process.stdin.close()
        except OSError:  # ffmpeg has left; it says why below
            starved = True
        end = finish()
    if end.code == 0 and not starved:
        return
    # C's own words, on every system.
    for words, number in (
        ("No space left on device", errno.ENOSPC),
        ("Disk quota exceeded", errno.ENOSPC),
        ("File too large", errno.EFBIG),
    ):
        if words in end.text:
            raise OSError(number, words)  # which `replacing` translates
    why = end.errors[0] if end.errors else "it said nothing"
    raise MediaError(f"{path.name}: ffmpeg could not write it: {why} (code {end.code}).")


# --- file -> frames


def read_video(path: Path, max_frames: int | None = None) -> tuple[torch.Tensor, float]:
    """A file -> (frames, fps): float32 (F, H, W, 3) in [0, 1], and frames per second as ffmpeg rounds it (0.01).

    A still picture is one frame at 1.0 frames per second. max_frames: stop there; None reads all.
    Unreadable: missing, no video, broken, cut short, or more than MAX_PIXELS in all.
    """
    path = Path(path)
    if max_frames is not None and max_frames < 1:
        raise UsageError(f"{path.name}: max_frames is {max_frames}; ask for 1 or more, or None for all.")
    if path.suffix.lower() in STILLS:
        return read_image(path)[None], 1.0
    _must_be_file(path)
    frames: list[torch.Tensor] = []
    command = [
        *("-loglevel", "level+info", "-nostats", "-xerror", *_READ, "-i", str(path.absolute())),
        *("-map", "0:V:0", "-map_metadata", "-1", "-fps_mode", "passthrough"),
        *(() if max_frames is None else ("-frames:v", str(max_frames))),
        # PPM says its size in front of each frame: after rotation, and without asking ffmpeg twice.
        *("-vf", "scale=flags=bicubic+accurate_rnd+full_chroma_int", "-pix_fmt", "rgb24"),
        *("-f", "image2pipe", "-c:v", "ppm", "pipe:1"),
    ]
    with ffmpeg(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as (process, finish):
        for frame in _ppm_frames(process.stdout):
            if frames and frame.shape != frames[0].shape:
                raise Unreadable(f"{path.name}: the picture changes its size at frame {len(frames)}; encode it anew.")
            frames.append(frame)
            if len(frames) * frame.shape[0] * frame.shape[1] > MAX_PIXELS:
                raise Unreadable(
                    f"{path.name}: more than {MAX_PIXELS:,} pixels ({len(frames)} frames of "
                    f"{frame.shape[1]}×{frame.shape[0]} so far); cut it, or read fewer frames."
                )
        end = finish()
    # The last block on output is ours; what stands above it holds the file's own words, which may say anything.
    rate = re.search(r"Video: ppm.*?, ([\d.]+)(k?) fps", end.text.rpartition("Output #0")[2])
    # A webm, mkv or gif that is cut short ends with code 0, having complained.
    if end.code or end.errors or not frames or rate is None:
        raise _unreadable(path, end)
    clip = torch.empty(len(frames), *frames[0].shape)
    for into, frame in zip(clip, frames, strict=True):
        torch.div(frame, 255, out=into)
    return clip, float(rate[1]) * (1000 if rate[2] else 1)


def read_image(path: Path) -> torch.Tensor:
    """A picture -> float32 (H, W, 3) in [0, 1]: turned as its EXIF says, transparent parts on black.

    The first one of a file with several. Unreadable: missing, broken, or so large that it looks like an attack.
    """
    import numpy as np
    from PIL import Image, ImageOps

    path = Path(path)
    _must_be_file(path)
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            if picture.mode.startswith("I"):  # 16-bit grey, which convert() would clip rather than scale
                grey = np.asarray(picture, dtype=np.float32) / 65535
                return torch.from_numpy(np.repeat(grey[..., None].clip(0, 1), 3, axis=2))
            rgba = torch.from_numpy(np.array(picture.convert("RGBA"))).float().div_(255)
            return rgba[..., :3] * rgba[..., 3:]
    except Exception as error:  # Pillow's readers raise whatever the broken byte leads to
        raise Unreadable(f"{path.name}: not a picture that can be read ({error}); save it anew as PNG.") from error


def read_tags(path: Path) -> dict[str, str]:
    """The tags of a clip or PNG, names in lower case (Matroska keeps them in upper case); {} for other pictures.

    What the container itself says ("encoder", "major_brand") is among them. Unreadable: missing or broken.
    """
    path = Path(path)
    _must_be_file(path)
    with open(path, "rb") as file:
        magic = file.read(8)
    if magic == _PNG:
        return _png_tags(path)
    if magic.startswith(_GIF):
        return _gif_tags(path)
    if path.suffix.lower() in STILLS:
        return {}
    command = ["-loglevel", "level+error", *_READ, "-i", str(path.absolute()), "-f", "ffmetadata", "pipe:1"]
    with ffmpeg(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as (process, finish):
        text = process.stdout.read().decode("utf-8", "replace")
        end = finish()
    if end.code or end.errors:
        raise _unreadable(path, end)
    return _parsed_ffmetadata(text)


def _must_be_file(path: Path) -> None:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise Unreadable(f"{path.name}: {path.absolute()} {what}; check the name.")


def _unreadable(path: Path, end: _End) -> Unreadable:
    why = end.errors[0] if end.errors else "it holds no pictures"
    return Unreadable(
        f"{path.name} ({path.stat().st_size:,} bytes): not a video that can be read: {why}. "
        "It may be cut short or of another kind: copy it again, or encode it anew as .mp4."
    )


def _ppm_frames(stream: Any) -> Iterator[torch.Tensor]:
    """ffmpeg's PPM stream -> uint8 (H, W, 3), one by one; a frame that is cut short is left out."""
    while stream.readline() == b"P6\n":
        width, height = map(int, stream.readline().split())
        stream.readline()  # 255
        pixels = bytearray(stream.read(height * width * 3))
        if len(pixels) < height * width * 3:
            return
        yield torch.frombuffer(pixels, dtype=torch.uint8).view(height, width, 3)


# --- tags


def _checked_tags(tags: dict[str, str] | None, path: Path) -> dict[str, str]:
    for name, text in (tags or {}).items():
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name == "encoder":
            raise MediaError(
                f"{path.name}: a tag cannot be called {name!r}; lower-case letters, digits and _ survive in every "
                "container ('encoder' is the container's own)."
            )
        if "\0" in text or re.search("[\ud800-\udfff]", text):
            raise MediaError(
                f"{path.name}: tag {name!r} holds NUL or half a character, which no container keeps; "
                "write it as JSON with ASCII escapes."
            )
    return dict(tags or {})


def _ffmetadata(tags: dict[str, str]) -> str:
    # A line end counts as escaped when any backslash stands before it, itself escaped or not (ffmpeg 9.0): a value that
    # ends in one would swallow the next tag. An escaped NUL stands between, and ffmpeg's strings end there.
    lines = [
        f"{name}=" + re.sub(r"([=;#\\\n\r])", r"\\\1", text) + ("\\\0" if text.endswith("\\") else "") + "\n"
        for name, text in tags.items()
    ]
    return ";FFMETADATA1\n" + "".join(lines)


def _parsed_ffmetadata(text: str) -> dict[str, str]:
    tags: dict[str, str] = {}
    # A record is text in which a backslash takes the next character along, newlines too.
    for record in re.findall(r"(?:[^\\\n]|\\.)+", text.partition("\n")[2], re.DOTALL):
        if record.startswith(("[STREAM]", "[CHAPTER]")):
            break
        name, found, value = record.partition("=")
        if found and not record.startswith(";"):
            tags[_unescaped(name).lower()] = _unescaped(value)
    return tags


def _unescaped(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text, flags=re.DOTALL)


def _append_comment(part: Path, tags: dict[str, str]) -> None:
    """ffmpeg's GIF writer drops all metadata: one comment with the tags as JSON goes before the trailer byte."""
    text = json.dumps(tags).encode("ascii")
    blocks = b"".join(bytes([len(text[i : i + 255])]) + text[i : i + 255] for i in range(0, len(text), 255))
    with open(part, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x21\xfe" + blocks + b"\x00\x3b")


def _gif_tags(path: Path) -> dict[str, str]:
    data, comment = path.read_bytes(), b""

    def skip_table(at: int, flags: int) -> int:
        return at + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)

    try:
        at = skip_table(13, data[10])
        while data[at] != 0x3B:
            kind = data[at : at + 2]
            at = at + 2 if data[at] == 0x21 else skip_table(at + 10, data[at + 9]) + 1
            while size := data[at]:
                if kind == b"\x21\xfe":
                    comment += data[at + 1 : at + 1 + size]
                at += 1 + size
            at += 1
    except IndexError:
        raise Unreadable(f"{path.name} ({len(data):,} bytes): a GIF that is cut short; copy it again.") from None
    try:
        tags = json.loads(comment)
    except ValueError:
        tags = None
    if isinstance(tags, dict) and all(isinstance(text, str) for text in tags.values()):
        return tags
    return {"comment": comment.decode("utf-8", "replace")} if comment else {}


def _png_tags(path: Path) -> dict[str, str]:
    from PIL import Image

    try:
        with Image.open(path) as picture:
            picture.load()  # text may stand behind the pixels
            return {str(name).lower(): str(text) for name, text in picture.info.items() if isinstance(text, str)}
    except Exception as error:  # as in read_image
        raise Unreadable(f"{path.name}: not a PNG that can be read ({error}); copy it again.") from error


# --- ffmpeg


@dataclass(frozen=True)
class _End:
    code: int
    text: str  # all that it said

    @property
    def errors(self) -> list[str]:
        """Its complaints in order, without the "[part @ 0x…] [error]" before each; the first one names the cause."""
        return re.findall(r"^(?:\[[^\]\n]* @ \w+\] )*\[(?:error|fatal|panic)\] (.+?)\.?$", self.text, re.MULTILINE)


@contextlib.contextmanager
def ffmpeg(arguments: list[str], stdin: int, stdout: int) -> Iterator[tuple[Any, Callable[[], _End]]]:
    """ffmpeg at work: its process, and a function that waits for its end. It is killed if the body raises."""
    try:
        import imageio_ffmpeg

        program = imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise MediaError(f"No ffmpeg here ({error}); `pip install imageio-ffmpeg` brings one.") from error
    with (
        tempfile.TemporaryFile() as log,  # which unlike a pipe cannot fill up while nobody reads it
        subprocess.Popen(
            [program, "-hide_banner", "-nostdin", *arguments],
            stdin=stdin,
            stdout=stdout,
            stderr=log,
            restore_signals=False,  # SIGXFSZ stays ignored: a file-size limit then gives an error, not a death
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        ) as process,
    ):

        def finish() -> _End:
            code = process.wait()
            log.seek(0)
            return _End(code, log.read().decode("utf-8", "replace"))

        try:
            yield process, finish
        except BaseException:  # also a stop: FFmpeg would wait for frames for ever
            process.kill()
            raise

"""Clips to files and back, with the real ffmpeg."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nodes.engine import video
from nodes.engine.errors import DiskFull, MediaError, Unreadable, UsageError
from nodes.engine.files import cannot_write
from nodes.engine.video import (
    SUFFIXES,
    eight_bit,
    read_image,
    read_tags,
    read_video,
    sweep_partial,
    write_png,
    write_video,
)

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (128, 64, 200), (10, 240, 120)]
NASTY = {
    "cogloom": json.dumps({"notes": "x" * 300_000, "path": "C:\\temp\\new"}),
    "prompt": "a=b;c#d\\e\n\nüñ漢😀 \"q\" 's' \r\n\ttab  \n;no comment\n#nor this\n[CHAPTER]\\",
    "workflow": '{"nodes": [], "version": 0.4}',
    "comment": "  spaces at both ends  ",
    "note_2": "\\\\",
}


def noise(frames: int = 5, height: int = 48, width: int = 64) -> torch.Tensor:
    return torch.rand(frames, height, width, 3, generator=torch.Generator().manual_seed(0))


def smooth(frames: int = 9, height: int = 48, width: int = 64) -> torch.Tensor:
    """A ramp from left to right that moves."""
    ramp = torch.linspace(0, 1, width).view(1, 1, width, 1) + torch.linspace(0, 0.2, frames).view(-1, 1, 1, 1)
    return (ramp / 1.2).expand(frames, height, width, 3).contiguous()


def flat() -> torch.Tensor:
    return (torch.tensor(COLOURS) / 255).view(-1, 1, 1, 3).expand(-1, 48, 64, -1).contiguous()


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# --- what goes in comes out


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("fps", [8, 16.0, 12.5])
def test_frames_size_and_rate_come_back(tmp_path, suffix, fps):
    path = write_video(smooth(), tmp_path / "new" / f"clip{suffix}", fps)
    frames, rate = read_video(path)
    assert (frames.shape, frames.dtype) == ((9, 48, 64, 3), torch.float32)
    assert rate == fps
    assert names(path.parent) == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_still_clip_keeps_each_of_its_frames(tmp_path, suffix):
    assert len(read_video(write_video(torch.full((20, 32, 32, 3), 0.5), tmp_path / f"still{suffix}", 8))[0]) == 20
    assert len(read_video(write_video(torch.zeros(1, 32, 32, 3), tmp_path / f"one{suffix}", 8))[0]) == 1


def test_mkv_is_exact_to_the_rounded_byte(tmp_path):
    frames = noise() * 1.4 - 0.2  # some of it out of range
    back, _ = read_video(write_video(frames, tmp_path / "clip.mkv", 8))
    assert torch.equal(back * 255, eight_bit(frames).float())
    assert torch.equal(eight_bit(back), eight_bit(frames))


def test_bytes_are_rounded_and_clamped():
    values = torch.tensor([-1.0, 0.0, 0.49 / 255, 0.51 / 255, 127.6 / 255, 254.6 / 255, 1.0, 7.0, float("inf")])
    assert eight_bit(values).tolist() == [0, 0, 0, 1, 128, 255, 255, 255, 255]
    assert eight_bit(values.bfloat16()).dtype == torch.uint8


@pytest.mark.parametrize(("suffix", "levels"), [(".mp4", 3), (".webm", 3), (".gif", 0), (".mkv", 0)])
def test_colours_come_back(tmp_path, suffix, levels):
    path = write_video(flat(), tmp_path / f"flat{suffix}", 8)
    back, _ = read_video(path)
    assert ((back - flat()).abs().amax(dim=(1, 2, 3)) * 255).round().max() <= levels


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_the_tag_of_the_colours_agrees_with_the_conversion(tmp_path, suffix):
    path = write_video(flat(), tmp_path / f"flat{suffix}", 8)
    assert "yuv420p(tv, bt709, progressive)" in described(path)
    # A player that has only the tag to go by: BT.709, limited range, in its own arithmetic.
    raw = subprocess.run(
        [ffmpeg(), "-loglevel", "error", "-i", str(path), "-f", "rawvideo", "-pix_fmt", "yuv444p", "-"],
        capture_output=True,
        check=True,
    ).stdout
    y, u, v = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, 3, 48, 64).float().unbind(1)
    y, u, v = (y - 16) / 219, (u - 128) / 224, (v - 128) / 224
    rgb = torch.stack([y + 1.5748 * v, y - 0.1873 * u - 0.4681 * v, y + 1.8556 * u], dim=-1).clamp(0, 1)
    assert ((rgb - flat()).abs() * 255).max() < 3


def test_a_gif_of_a_photograph_is_close(tmp_path):
    back, _ = read_video(write_video(smooth(), tmp_path / "clip.gif", 8))
    assert ((back - smooth()).abs() * 255).mean() < 3


def test_the_index_of_an_mp4_is_in_front(tmp_path):
    data = write_video(smooth(), tmp_path / "clip.mp4", 8, NASTY).read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")


def test_quality_chooses_the_size_of_the_file(tmp_path):
    for suffix, best, worst in ((".mp4", 1, 51), (".webm", 1, 63)):
        good, bad = (write_video(noise(), tmp_path / f"{q}{suffix}", 8, quality=q) for q in (best, worst))
        assert good.stat().st_size > 3 * bad.stat().st_size


def test_reading_stops_where_it_is_told(tmp_path):
    frames = noise(9)
    path = write_video(frames, tmp_path / "clip.mkv", 8)
    assert torch.equal(eight_bit(read_video(path, max_frames=4)[0]), eight_bit(frames[:4]))
    assert len(read_video(path, max_frames=40)[0]) == 9
    with pytest.raises(UsageError, match="max_frames is 0"):
        read_video(path, max_frames=0)


def test_names_that_ffmpeg_could_take_for_something_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("-y.mp4", "a'b %03d é [1]&=#.mkv", "x" * 240 + ".mp4", "UPPER.MP4"):
        write_video(smooth(2), Path(name), 8, {"prompt": name})
        assert len(read_video(Path(name))[0]) == 2
        assert read_tags(Path(name))["prompt"] == name
    assert len(names(tmp_path)) == 4


# --- tags


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_tags_survive_letter_for_letter(tmp_path, suffix):
    path = write_video(smooth(), tmp_path / f"clip{suffix}", 8, NASTY)
    found = read_tags(path)
    assert {name: found.get(name) for name in NASTY} == NASTY
    assert len(read_video(path)[0]) == 9


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_workflow_of_a_megabyte(tmp_path, suffix):
    tags = {"workflow": json.dumps(["node", "ü"] * 70_000), "prompt": "p"}
    found = read_tags(write_video(smooth(2), tmp_path / f"clip{suffix}", 8, tags))
    assert {name: found[name] for name in tags} == tags


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_tags_are_none_of_ours(tmp_path, suffix):
    found = read_tags(write_video(smooth(2), tmp_path / f"clip{suffix}", 8))
    assert not found.keys() & {"prompt", "workflow", "cogloom", "comment"}


def test_ffmpeg_shows_prompt_and_workflow_as_two_entries(tmp_path):
    path = write_video(smooth(), tmp_path / "clip.mp4", 8, {"prompt": '{"1": {}}', "workflow": '{"nodes": []}'})
    lines = [line.split(":", 1)[0].strip() for line in described(path).splitlines()]
    assert lines.count("prompt") == lines.count("workflow") == 1


@pytest.mark.parametrize(
    ("tags", "word"),
    [
        ({"Prompt": "x"}, "lower-case"),
        ({"a b": "x"}, "lower-case"),
        ({"encoder": "x"}, "container's own"),
        ({"prompt": "a\0b"}, "NUL"),
        ({"prompt": "\ud83d"}, "half a character"),
    ],
)
def test_tags_that_no_container_keeps_are_refused(tmp_path, tags, word):
    for write in (
        lambda: write_video(smooth(2), tmp_path / "a.mp4", 8, tags),
        lambda: write_png(smooth()[0], tmp_path / "a.png", tags),
    ):
        with pytest.raises(MediaError, match=word):
            write()
    assert names(tmp_path) == []


def test_the_comment_of_a_stranger_s_gif(tmp_path):
    data = write_video(smooth(2), tmp_path / "clip.gif", 8).read_bytes()
    (tmp_path / "clip.gif").write_bytes(data[:-1] + b"\x21\xfe\x05hello\x00\x3b")
    assert read_tags(tmp_path / "clip.gif") == {"comment": "hello"}


# --- pictures


def test_png_and_its_tags(tmp_path):
    frame = noise()[0]
    path = write_png(frame, tmp_path / "new" / "a.png", NASTY)
    assert read_tags(path) == NASTY
    assert torch.equal(eight_bit(read_image(path)), eight_bit(frame))
    frames, fps = read_video(path)
    assert (frames.shape, fps) == ((1, 48, 64, 3), 1.0)
    assert names(path.parent) == ["a.png"]


def test_a_pillow_picture_is_a_picture_too(tmp_path):
    from PIL import Image

    path = write_png(Image.new("RGB", (10, 7), (1, 2, 3)), tmp_path / "a.png")
    assert (read_image(path) * 255).round().unique().tolist() == [1, 2, 3]


def test_a_photograph_is_turned_as_its_exif_says(tmp_path):
    from PIL import Image

    picture = Image.new("RGB", (32, 16), (0, 0, 0))
    picture.paste((255, 255, 255), (0, 0, 8, 16))  # white at the left
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise: left goes up
    picture.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    read = read_image(tmp_path / "turned.jpg")
    assert read.shape == (32, 16, 3)
    assert read[:6].mean() > 0.95
    assert read[10:].mean() < 0.05


def test_transparency_is_black_and_sixteen_bits_are_scaled(tmp_path):
    import numpy as np
    from PIL import Image

    Image.new("RGBA", (4, 4), (255, 255, 255, 0)).save(tmp_path / "clear.png")
    Image.new("RGBA", (4, 4), (255, 0, 0, 51)).save(tmp_path / "red.webp", lossless=True)
    Image.fromarray(np.full((4, 4), 32768, np.uint16)).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "clear.png").max() == 0
    assert read_image(tmp_path / "red.webp")[0, 0].tolist() == pytest.approx([0.2, 0, 0])
    assert read_image(tmp_path / "deep.png").unique().tolist() == pytest.approx([0.5], abs=1e-4)
    assert read_tags(tmp_path / "red.webp") == {}


# --- refusals leave everything as it was


@pytest.mark.parametrize(
    ("frames", "name", "fps", "options", "error", "words"),
    [
        (smooth(), "clip.avi", 8, {}, MediaError, r"\.avi.*\.mp4, \.webm, \.mkv, \.gif"),
        (smooth(), "clip", 8, {}, MediaError, "without a suffix"),
        (smooth(height=47), "clip.mp4", 8, {}, MediaError, r"64×47 .*\.mkv or \.gif"),
        (smooth(width=63), "clip.webm", 8, {}, MediaError, r"63×48 .*\.mkv or \.gif"),
        (smooth()[:, :, :, :2], "clip.mp4", 8, {}, MediaError, r"\(9, 48, 64, 2\)"),
        (smooth()[:0], "clip.mp4", 8, {}, MediaError, r"\(0, 48, 64, 3\)"),
        (eight_bit(smooth()), "clip.mp4", 8, {}, MediaError, "uint8"),
        (smooth(), "clip.mp4", 0, {}, UsageError, "0.1 to 240"),
        (smooth(), "clip.mp4", float("nan"), {}, UsageError, "0.1 to 240"),
        (smooth(), "clip.gif", 60, {}, UsageError, "0.1 to 50"),
        (smooth(), "clip.mp4", 8, {"quality": 0}, UsageError, r"1 \(best\) to 51"),
        (smooth(), "clip.gif", 8, {"quality": 17}, UsageError, "no quality"),
    ],
)
def test_what_cannot_be_written_is_said_beforehand(tmp_path, frames, name, fps, options, error, words):
    (tmp_path / name).write_bytes(b"older")
    with pytest.raises(error, match=words) as caught:
        write_video(frames, tmp_path / name, fps, **options)
    assert type(caught.value) is error
    assert (tmp_path / name).read_bytes() == b"older"
    assert names(tmp_path) == [name]


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif"])
def test_nan_names_its_frame(tmp_path, name):
    frames = smooth()
    frames[3, 5, 5, 1] = float("nan")
    frames[7] = float("nan")
    (tmp_path / name).write_bytes(b"older")
    with pytest.raises(MediaError, match=r"2 of 9 frames hold NaN, the first is frame 3"):
        write_video(frames, tmp_path / name, 8)
    assert (tmp_path / name).read_bytes() == b"older"
    assert names(tmp_path) == [name]


@pytest.mark.parametrize("suffix", [".mkv", ".gif"])
def test_odd_sides_are_kept_where_the_container_can(tmp_path, suffix):
    assert read_video(write_video(smooth(height=47, width=63), tmp_path / f"odd{suffix}", 8))[0].shape == (9, 47, 63, 3)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, MediaError])
def test_a_stop_in_the_middle_leaves_nothing(tmp_path, monkeypatch, stop):
    path = write_video(smooth(), tmp_path / "clip.mp4", 8)
    before, calls = path.read_bytes(), []

    def stopping(frame):
        calls.append(names(tmp_path))
        if len(calls) == 5:
            raise stop("now")
        return eight_bit(frame)

    monkeypatch.setattr(video, "eight_bit", stopping)
    with pytest.raises(stop):
        write_video(smooth(), path, 8, {"prompt": "p"})
    assert any(name.endswith(".part.ffmeta") for name in calls[-1])
    assert names(tmp_path) == ["clip.mp4"]
    assert path.read_bytes() == before


def test_what_ffmpeg_cannot_do_is_quoted(tmp_path):
    with pytest.raises(MediaError, match=r"wide\.mp4: ffmpeg could not write it: .*(width|parameters|encoder)"):
        write_video(torch.zeros(1, 2, 40_000, 3), tmp_path / "wide.mp4", 8)
    assert names(tmp_path) == []


def test_a_folder_in_the_way(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "clip.mkv").mkdir()
    for path in (tmp_path / "clip.mkv", tmp_path / "file" / "clip.mkv"):
        with pytest.raises(UsageError, match=r"clip\.mkv: cannot be written in "):
            write_video(smooth(1), path, 8)
    assert names(tmp_path) == ["clip.mkv", "file"]


# A limit on the size of files is the one full disk that needs no rights and harms nobody.
LIMITED = """
import resource, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from nodes.engine.errors import DiskFull
from nodes.engine.video import write_png, write_video
frames = torch.rand(8, 96, 128, 3)
for limit in (10_000, 1_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    for suffix in (".mp4", ".webm", ".mkv", ".gif", ".png"):
        path = Path(sys.argv[1], "clip" + suffix)
        try:
            write_png(frames[0], path) if suffix == ".png" else write_video(frames, path, 8, {"prompt": "p" * 3_000})
        except DiskFull as error:
            print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no RLIMIT_FSIZE to stand in for a full disk")
@pytest.mark.heavy
def test_a_full_disk_is_said_and_leaves_the_older_file(tmp_path):
    for suffix in (*SUFFIXES, ".png"):
        (tmp_path / f"clip{suffix}").write_bytes(b"older")
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("larger than the largest file") == 10, run.stdout + run.stderr
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {b"older"}
    assert len(names(tmp_path)) == 5


def test_no_room_says_how_much_there_is(tmp_path):
    error = cannot_write(tmp_path / "clip.mp4", OSError(28, "No space left on device"))
    assert isinstance(error, DiskFull)
    assert str(error).startswith("clip.mp4: no room on the disk: ")
    assert f"bytes are free in {tmp_path}" in str(error)


def test_sweep_removes_old_partial_files_of_ours_alone(tmp_path):
    ours = [".clip.0a1b2c3d.part.mp4", ".clip.0a1b2c3d.part.ffmeta", ".a.b c.00000000.part.png"]
    others = ["clip.mp4", ".hidden.mp4", ".clip.part.mp4", "clip.0a1b2c3d.part.mp4", ".clip.0a1b2c3d.part.mp4.txt"]
    for name in (*ours, *others, ".young.0a1b2c3d.part.mp4"):
        (tmp_path / name).write_bytes(b"")
        if "young" not in name:
            os.utime(tmp_path / name, (time.time() - 4000, time.time() - 4000))
    assert sweep_partial(tmp_path) == 3
    assert names(tmp_path) == sorted([*others, ".young.0a1b2c3d.part.mp4"])
    assert sweep_partial(tmp_path / "missing") == 0


# --- broken files


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.gif", "clip.png", "clip.jpg"])
@pytest.mark.parametrize(
    "content", [b"", b"hello, garbage" * 100, b"GIF89a", b"\x89PNG\r\n\x1a\n", b"\x1a\x45\xdf\xa3"]
)
def test_garbage_is_unreadable(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Unreadable, match=name):
        read_video(tmp_path / name)
    if name not in ("clip.png", "clip.jpg") or content[:4] in (b"GIF8", b"\x89PNG"):
        with pytest.raises(Unreadable, match=name):
            read_tags(tmp_path / name)


@pytest.mark.parametrize("read", [read_video, read_tags, read_image])
def test_missing_files_and_folders_say_so(tmp_path, read):
    for name in ("clip.mp4", "a.png"):
        with pytest.raises(Unreadable, match=r"does not exist; check the name"):
            read(tmp_path / name)
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(Unreadable, match="is a folder"):
        read(tmp_path / "folder.mp4")


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".png"])
@pytest.mark.parametrize("keep", [0.1, 0.6, 0.97])
def test_a_file_cut_short_is_unreadable(tmp_path, suffix, keep):
    path = tmp_path / f"clip{suffix}"
    write_png(noise()[0], path) if suffix == ".png" else write_video(noise(), path, 8)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(Unreadable, match=path.name):
        read_video(path)


def test_a_playlist_under_a_video_s_name_opens_nothing(tmp_path):
    write_video(smooth(), tmp_path / "other.mp4", 8)
    for playlist in ("ffconcat version 1.0\nfile other.mp4\n", "#EXTM3U\n#EXTINF:1,\nother.mp4\n#EXT-X-ENDLIST\n"):
        (tmp_path / "clip.mp4").write_text(playlist)
        with pytest.raises(Unreadable, match=r"clip\.mp4"):
            read_video(tmp_path / "clip.mp4")


def test_too_many_pixels_are_refused_while_they_come(tmp_path, monkeypatch):
    path = write_video(smooth(), tmp_path / "clip.mkv", 8)
    monkeypatch.setattr(video, "MAX_PIXELS", 4 * 48 * 64)
    with pytest.raises(Unreadable, match=r"more than 12,288 pixels \(5 frames of 64×48 so far\)"):
        read_video(path)
    assert len(read_video(path, max_frames=4)[0]) == 4


def test_an_ffmpeg_that_is_not_there_names_the_remedy(tmp_path, monkeypatch):
    import imageio_ffmpeg

    def missing():
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", missing)
    with pytest.raises(MediaError, match="pip install imageio-ffmpeg"):
        write_video(smooth(1), tmp_path / "clip.mp4", 8)
    assert names(tmp_path) == []


def ffmpeg() -> str:
    import imageio_ffmpeg

    return imageio_ffmpeg.get_ffmpeg_exe()


def described(path: Path) -> str:
    return subprocess.run([ffmpeg(), "-hide_banner", "-i", str(path)], capture_output=True).stderr.decode()


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".mkv", ".gif"])
def test_the_same_frames_are_the_same_bytes(tmp_path: Path, suffix: str):
    clip = torch.rand(5, 32, 48, 3, generator=torch.Generator().manual_seed(0))
    once, twice = (
        video.write_video(clip, tmp_path / f"{n}{suffix}", 8.0, {"cogloom": "{}"}).read_bytes() for n in "ab"
    )
    assert once == twice

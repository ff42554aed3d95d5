"""Folders, captions, sizes and the cache."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX

from demo.world import Scene, draw
from nodes.engine.dataset import encode, fingerprint, fit, scan, to_frames, weights_hash
from nodes.engine.errors import Cancelled, DatasetError, UsageError
from nodes.engine.files import write_atomic
from nodes.engine.video import write_png, write_video


def clip(path: Path, frames: int = 9, side: int = 16, fps: float = 8) -> torch.Tensor:
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = draw(Scene(motion="right"), random.Random(1), frames=frames, side=side)
    write_video(drawn, path, fps=fps)
    return drawn


def numbered(path: Path, frames: int, fps: float = 8, side: int = 16) -> None:
    """A clip whose frame n has the grey value n / 255."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video((torch.arange(frames) / 255).view(-1, 1, 1, 1).expand(-1, side, side, 3).contiguous(), path, fps=fps)


def numbers(frames: torch.Tensor) -> list[int]:
    return (frames[:, 0, 0, 0] * 255).round().int().tolist()


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    clip(tmp_path / "a.mkv")
    (tmp_path / "a.txt").write_text("  a red\ncircle \n", encoding="utf-8-sig")
    write_png(torch.rand(20, 30, 3), tmp_path / "b.png")
    (tmp_path / "b.txt").write_text("a still")
    (tmp_path / "README.md").write_text("not an item")
    return tmp_path


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    for i in range(2):
        clip(tmp_path / "videos" / f"{i}.mkv")
        write_png(torch.rand(16, 16, 3), tmp_path / "images" / f"{i}.png")
    (tmp_path / "prompts.txt").write_text("first\nsecond\n\n")
    (tmp_path / "videos.txt").write_text("videos/0.mkv\nvideos/1.mkv\n")
    return tmp_path


# --- scanning


def test_a_plain_folder(plain: Path) -> None:
    a, b = scan(plain)
    assert (a.name, a.caption, a.kind, a.path) == ("a.mkv", "a red circle", "clip", plain / "a.mkv")
    assert (b.name, b.caption, b.kind) == ("b.png", "a still", "still")
    assert a.size == (plain / "a.mkv").stat().st_size


def test_cogvideos_lists(listed: Path) -> None:
    items = scan(listed)
    assert [(i.name, i.caption, i.kind, i.first) for i in items] == [
        ("videos/0.mkv", "first", "clip", None),
        ("videos/1.mkv", "second", "clip", None),
    ]
    (listed / "images.txt").write_text("images/0.png\nimages/1.png")
    assert [i.first for i in scan(listed)] == [(listed / "images" / f"{i}.png").resolve() for i in range(2)]
    (listed / "videos.txt").unlink()
    assert [(i.name, i.kind) for i in scan(listed)] == [("images/0.png", "still"), ("images/1.png", "still")]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompts.txt": "first\n"}, r"prompts\.txt has 1 lines and videos\.txt has 2"),
        ({"images.txt": "images/0.png\n"}, r"prompts\.txt has 2 lines and images\.txt has 1"),
        ({"prompts.txt": "first\n\nthird"}, "has 3 lines"),
        ({"prompts.txt": "\nsecond"}, r"line 1: the caption of videos/0\.mkv is empty"),
        ({"prompts.txt": "", "videos.txt": ""}, r"videos\.txt is empty"),
        ({"videos.txt": "videos/0.mkv\n../outside.mkv"}, r"line 2: '\.\./outside\.mkv' leads outside"),
        ({"videos.txt": "videos/0.mkv\n/etc/passwd"}, r"line 2: '/etc/passwd' leads outside"),
        ({"videos.txt": "videos/0.mkv\nlink.mkv"}, r"'link\.mkv' leads outside"),
        ({"videos.txt": "videos/0.mkv\nvideos/../videos/0.mkv"}, "line 2.*listed twice"),
        ({"videos.txt": "videos/0.mkv\nvideos/9.mkv"}, r"9\.mkv cannot be read \(No such file"),
        ({"videos.txt": "videos/0.mkv\nprompts.txt"}, r"\.txt is not read; clips end in"),
        ({"images.txt": "images/0.png\nvideos/1.mkv"}, r"1\.mkv is no picture"),
    ],
)
def test_lists_that_cannot_be_right(change: dict[str, str], words: str, listed: Path, tmp_path_factory: Any) -> None:
    outside = tmp_path_factory.mktemp("outside") / "clip.mkv"
    clip(outside)
    (listed / "link.mkv").symlink_to(outside)
    for name, text in change.items():
        (listed / name).write_text(text)
    with pytest.raises(DatasetError, match=words):
        scan(listed)


def test_plain_folders_that_cannot_be_right(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(DatasetError, match=r"holds no clip and no picture; put x\.mp4"):
        scan(empty)
    with pytest.raises(DatasetError, match="is not a folder"):
        scan(empty / "nowhere")
    (plain / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DatasetError, match=r"a\.txt is not UTF-8 text \(byte 3\)"):
        scan(plain)
    (plain / "a.txt").write_text(" \n")
    with pytest.raises(DatasetError, match=r"a\.txt is empty; describe what a\.mkv shows"):
        scan(plain)
    (plain / "a.txt").unlink()
    with pytest.raises(DatasetError, match=r"1 of 2 files have no caption \(a\.mkv\); write it into a\.txt"):
        scan(plain)
    (plain / "a.txt").write_text("words")
    (plain / "a.mkv").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"a\.mkv is empty \(0 bytes\)"):
        scan(plain)


# --- the fingerprint


def test_the_fingerprint_knows_content_names_and_captions_and_no_order(plain: Path) -> None:
    items = scan(plain)
    first = fingerprint(items)
    assert first == fingerprint(items[::-1]) == fingerprint(scan(plain))
    for change in ({"caption": "other"}, {"name": "c.mkv"}, {"sha256": "0" * 64}, {"size": 1}, {"first_sha256": "1"}):
        assert fingerprint([replace(items[0], **change), items[1]]) != first
    assert fingerprint(items[:1]) != first


# --- frames


def test_a_clip_of_the_right_size_comes_as_it_is(tmp_path: Path) -> None:
    drawn = clip(tmp_path / "x.mkv")
    (tmp_path / "x.txt").write_text("x")
    frames = to_frames(scan(tmp_path)[0], 9, 16, 16)
    assert frames.dtype == torch.float32
    torch.testing.assert_close(frames, drawn, rtol=0, atol=0.5 / 255 + 1e-6)


@pytest.mark.parametrize(
    ("length", "fps", "picked"),
    [
        (9, None, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (20, None, [0, 2, 4, 6, 8, 10, 12, 14, 16]),
        (100, None, [8 * n for n in range(9)]),  # no more than eight times as fast
        (6, None, [0, 1, 2, 3, 4, 5, 5, 5, 5]),
        (40, 2.0, [0, 4, 8, 12, 16, 20, 24, 28, 32]),
        (9, 16.0, [0, 0, 1, 2, 2, 2, 3, 4, 4]),
        (20, 8.0, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_which_frames_of_a_clip_are_taken(length: int, fps: float | None, picked: list[int], tmp_path: Path) -> None:
    numbered(tmp_path / "x.mkv", length, fps=8)
    (tmp_path / "x.txt").write_text("x")
    assert numbers(to_frames(scan(tmp_path)[0], 9, 16, 16, fps)) == picked


def test_a_clip_that_is_far_too_short_is_refused(tmp_path: Path) -> None:
    numbered(tmp_path / "x.mkv", 4)
    (tmp_path / "x.txt").write_text("x")
    item = scan(tmp_path)[0]
    with pytest.raises(DatasetError, match=r"x\.mkv has 4 frames, fewer than half of the 9"):
        to_frames(item, 9, 16, 16)
    with pytest.raises(DatasetError, match=r"has 2 frames at 4 frames a second"):
        to_frames(item, 9, 16, 16, fps=4)


def test_an_unreadable_file_is_named(plain: Path) -> None:
    (plain / "a.mkv").write_bytes(b"no video at all")
    (plain / "b.png").write_bytes(b"no picture")
    for item in scan(plain):
        with pytest.raises(DatasetError, match=item.name):
            to_frames(item, 9, 16, 16)


def test_a_still_is_one_frame(plain: Path) -> None:
    frames = to_frames(scan(plain)[1], 9, 16, 16)
    assert frames.shape == (1, 16, 16, 3)


def test_the_crop_is_centred_and_area_is_averaged() -> None:
    wide = torch.zeros(1, 4, 12, 3)
    wide[:, :, 4:8] = torch.tensor([0.0, 1.0]).repeat(2).view(1, 1, 4, 1)  # stripes in the middle, one pixel wide
    assert torch.equal(fit(wide, 2, 2), torch.full((1, 2, 2, 3), 0.5))
    tall = wide.transpose(1, 2).contiguous()
    assert torch.equal(fit(tall, 2, 2), torch.full((1, 2, 2, 3), 0.5))
    assert fit(wide, 8, 8).shape == (1, 8, 8, 3)
    assert fit(torch.rand(2, 31, 17, 3), 16, 48).shape == (2, 16, 48, 3)


# --- the cache


def tiny_vae() -> Any:
    config: dict[str, Any] = {
        "block_out_channels": (4, 4, 4),
        "down_block_types": ("CogVideoXDownBlock3D",) * 3,
        "up_block_types": ("CogVideoXUpBlock3D",) * 3,
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "temporal_compression_ratio": 4,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoencoderKLCogVideoX(**config).eval()


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Counter:
    """The autoencoder and a text encoder, counted."""

    def __init__(self) -> None:
        self.vae, self.latents, self.prompts = tiny_vae(), 0, 0
        whole = self.vae.encode

        def encode(*args: Any, **kwargs: Any) -> Any:
            self.latents += 1
            return whole(*args, **kwargs)

        self.vae.encode = encode

    def encode_prompts(self, texts: list[str]) -> torch.Tensor:
        self.prompts += len(texts)
        return torch.stack([torch.full((3, 2), float(len(text))) for text in texts])

    def run(self, items: Any, cache: Path, **changes: Any) -> Any:
        self.latents = self.prompts = 0
        given: dict[str, Any] = {"frames": 9, "height": 16, "width": 16, "fps": None, "encoder_hash": "t5"}
        given |= {"vae": self.vae, "encode_prompts": self.encode_prompts, "cache": cache}
        return encode(items, **(given | changes))


def test_what_is_in_the_cache_is_not_encoded_again(plain: Path, tmp_path: Path) -> None:
    counter, items, cache = Counter(), scan(plain), tmp_path / "cache"
    first = counter.run(items, cache, extra_prompts=("",))
    assert (counter.latents, counter.prompts) == (2, 3)
    assert first.latents(items[0]).shape == (3, 4, 4, 4)
    assert first.latents(items[1]).shape == (1, 4, 4, 4)
    assert torch.equal(first.prompt("a still"), torch.full((3, 2), 7.0))

    again = counter.run(items, cache, extra_prompts=("",))
    assert (counter.latents, counter.prompts) == (0, 0)
    assert torch.equal(first.latents(items[0]), again.latents(items[0]))

    for change, want in (
        ({"height": 32}, (2, 0)),
        ({"fps": 8.0}, (2, 0)),
        ({"encoder_hash": "other"}, (0, 2)),
        ({"firsts": True}, (2, 0)),
        ({"vae": None}, (2, 0)),
    ):
        if "vae" in change:
            next(counter.vae.parameters()).data.mul_(2)
            change = {}
        counter.run(items, cache, **change)
        assert (counter.latents, counter.prompts) == want, change
    renamed = [replace(item, name=f"other/{item.name}", caption=item.caption) for item in items]
    counter.run(renamed, cache)
    assert (counter.latents, counter.prompts) == (0, 0)


def test_latents_are_the_mode_of_the_whole_clip(plain: Path, tmp_path: Path) -> None:
    counter, items = Counter(), scan(plain)
    encoded = counter.run(items, tmp_path / "cache", firsts=True)
    x = (to_frames(items[0], 9, 16, 16) * 2 - 1).permute(3, 0, 1, 2)[None]
    with torch.no_grad():
        want = counter.vae.encode(x).latent_dist.mode()[0].permute(1, 0, 2, 3)
        first = counter.vae.encode(x[:, :, :1]).latent_dist.mode()[0].permute(1, 0, 2, 3)
    assert torch.equal(encoded.latents(items[0]), want)
    assert torch.equal(encoded.first(items[0]), first)


def test_a_broken_entry_is_made_again(plain: Path, tmp_path: Path) -> None:
    counter, items, cache = Counter(), scan(plain), tmp_path / "cache"
    counter.run(items, cache)
    entry = next((cache / "training" / "latents").iterdir())
    entry.write_bytes(entry.read_bytes()[:-4])
    encoded = counter.run(items, cache)
    assert counter.latents == 1
    entry.unlink()
    with pytest.raises(DatasetError, match="missing from the cache or broken"):
        [encoded.latents(item) for item in items]


def test_a_stop_keeps_what_was_encoded(plain: Path, tmp_path: Path) -> None:
    counter, items, cache = Counter(), scan(plain), tmp_path / "cache"

    def check() -> None:
        if counter.latents:
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        counter.run(items, cache, check_cancelled=check)
    counter.run(items, cache)
    assert counter.latents == 1
    assert not [f for f in cache.rglob("*") if f.is_file() and f.suffix != ".safetensors"]


def test_values_that_are_not_numbers_are_refused(plain: Path, tmp_path: Path) -> None:
    counter, items = Counter(), scan(plain)
    with pytest.raises(DatasetError, match=r"caption 'a red circle': encoding gave values that are not numbers"):
        counter.run(
            items, tmp_path / "cache", encode_prompts=lambda texts: torch.full((len(texts), 3, 2), float("nan"))
        )


def test_the_hash_of_weights_knows_values_and_names() -> None:
    a, b = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    b.load_state_dict(a.state_dict())
    assert weights_hash(a) == weights_hash(b)
    assert weights_hash(a.bfloat16()) != weights_hash(b)
    b.bias.data[0] += 1
    a = torch.nn.Linear(3, 2)
    assert weights_hash(a) != weights_hash(b)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "deep" / "x.bin"
    write_atomic(target, b"old")

    def fail(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UsageError, match="Permission denied"):
        write_atomic(target, b"new")
    assert target.read_bytes() == b"old"
    assert [f.name for f in target.parent.iterdir()] == ["x.bin"]

"""Clips and stills of mixed sizes: which size each goes to, that a batch is of one, and how a run goes on with them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given as generated
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from demo.world import Scene, caption, draw
from nodes.engine import finetune
from nodes.engine.dataset import Item, scan
from nodes.engine.errors import Cancelled, GeometryError, UsageError
from nodes.engine.finetune import Settings, TrainableBase, train
from nodes.engine.train_buckets import Bucket, buckets, measure, nearest, parse
from nodes.engine.train_plan import largest
from nodes.engine.video import write_png, write_video
from nodes.host import LocalHost
from nodes.model import choose_base
from nodes.train import trainable

MAIN = Bucket(49, 480, 720)


# --- which sizes there are


def test_sizes_are_width_height_frames() -> None:
    assert parse(("480x720", "768x768x25"), 49) == (Bucket(49, 720, 480), Bucket(25, 768, 768))
    assert buckets(("480x720", "720x480"), MAIN, 16) == (MAIN, Bucket(49, 720, 480))


@pytest.mark.parametrize(
    ("word", "error", "said"),
    [
        ("big", UsageError, "'big' is no size"),
        ("720x480x", UsageError, "is no size"),
        ("720x480x24", GeometryError, "the nearest is 25"),
        ("0x480", GeometryError, "above 0"),
    ],
)
def test_a_word_that_is_no_size_is_refused(word: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        Settings(frames=49, height=480, width=720, buckets=(word,))


@pytest.mark.parametrize(("step", "unit"), [(8, 16), (16, 16)])
def test_auto_takes_no_more_memory_than_the_main_size(step: int, unit: int) -> None:
    main = Bucket(81, 480, 720)
    found = buckets(("auto",), main, unit, step)
    assert found[0] == main
    assert len(set(found)) == len(found) > 12
    assert all(b.width % unit == 0 and b.height % unit == 0 and b.frames % step == 1 for b in found)
    assert all(b.width * b.height <= main.width * main.height and b.frames <= main.frames for b in found)
    assert Bucket(81, 720, 480) in found  # upright
    assert any(b.width == b.height for b in found)
    small = buckets(("auto",), main, unit, step, largest=(720, 480))
    assert all(b.width <= 720 and b.height <= 480 for b in small)
    assert largest(Settings(frames=81, height=480, width=720, buckets=("auto",))) == (81, 480, 720)
    assert largest(Settings(frames=49, height=480, width=720, buckets=("768x768",))) == (49, 768, 768)


# --- which of them an item goes to


def test_the_nearest_is_of_its_aspect_then_its_length_then_its_size() -> None:
    among = (MAIN, Bucket(25, 480, 720), Bucket(49, 720, 480), Bucket(49, 512, 512), Bucket(49, 1024, 1024))
    assert nearest(among, (100, 1080, 1620), False) == MAIN
    assert nearest(among, (30, 1080, 1620), False) == Bucket(25, 480, 720)
    assert nearest(among, (3, 1080, 1620), False) == Bucket(25, 480, 720)  # too short for all: the shortest
    assert nearest(among, (60, 1920, 1080), False) == Bucket(49, 720, 480)
    assert nearest(among, (60, 500, 500), False) == Bucket(49, 512, 512)
    assert nearest(among, (60, 2000, 2000), False) == Bucket(49, 1024, 1024)
    assert nearest(among, (1, 500, 500), True) == Bucket(1, 512, 512)


@generated(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=8),
    st.tuples(st.integers(1, 200), st.integers(8, 2000), st.integers(8, 2000)),
    st.booleans(),
    st.randoms(),
)
@hypothesis_settings(max_examples=60, deadline=None)
def test_the_choice_depends_on_the_set_alone(sizes: Any, shape: Any, still: bool, rng: random.Random) -> None:
    among = [Bucket(8 * n + 1, 16 * h, 16 * w) for n, h, w in sizes]
    chosen = nearest(among, shape, still)
    assert chosen in ({Bucket(1, b.height, b.width) for b in among} if still else set(among))
    shuffled = rng.sample(among, len(among))
    assert nearest([*shuffled, among[0]], shape, still) == chosen


# --- training on them


def settings(**changes: Any) -> Settings:
    given: dict[str, Any] = {
        "frames": 9, "height": 32, "width": 32, "steps": 6, "rank": 4, "batch_size": 2, "learning_rate": 1e-3,
        "mixed_precision": "no", "checkpoint_every": 0, "validation_every": 0, "validation_items": 0, "title": "Toy",
        "buckets": ("32x48", "48x32x17"),
    }  # fmt: skip
    return Settings(**(given | changes))


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> list[Item]:
    """Two square clips, two upright ones, two wide and long ones, an upright still and a square one."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(2)
    for name, frames, height, width in (
        ("a", 9, 64, 64), ("b", 12, 64, 64), ("c", 9, 48, 32), ("d", 9, 96, 64), ("e", 20, 64, 96), ("f", 17, 32, 48),
        ("g", 1, 96, 64), ("h", 1, 64, 64),
    ):  # fmt: skip
        scene = Scene(colour=rng.choice(["red", "green", "blue"]), motion="right")
        clip = draw(scene, rng, frames=frames, side=96)[:, :height, :width]
        if frames > 1:
            write_video(clip, folder / f"{name}.mkv", fps=8)
        else:
            write_png(clip[0], folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(caption(scene))
    return scan(folder)


WHERE = {
    "a.mkv": "32x32x9", "b.mkv": "32x32x9", "c.mkv": "32x48x9", "d.mkv": "32x48x9", "e.mkv": "48x32x17",
    "f.mkv": "48x32x17", "g.png": "32x48x1", "h.png": "32x32x1",
}  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def demo() -> TrainableBase:
    return trainable(choose_base(LocalHost(), "cogloom-demo"))


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Of every batch that the trainer computes the loss of; the loss is the real one."""
    seen: list[tuple[int, ...]] = []
    real = finetune.batch_loss

    def watched(model: Any, config: Any, signal: Any, dtype: Any, batch: finetune.Batch) -> torch.Tensor:
        seen.append(tuple(batch.x0.shape))
        return real(model, config, signal, dtype, batch)

    monkeypatch.setattr(finetune, "batch_loss", watched)
    return seen


def test_items_go_to_their_sizes_and_batches_are_of_one(
    items: list[Item], cache: Path, tmp_path: Path, shapes: list[tuple[int, ...]]
) -> None:
    result = train(demo(), items, settings(steps=8), tmp_path, cache)
    batches = {shape[1:2] + shape[3:] for shape in shapes if shape[0] == 2}
    # (latent frames, height, width): 4 px and 4 frames a latent
    legal = {(3, 8, 8), (3, 12, 8), (5, 8, 12), (1, 12, 8), (1, 8, 8)}
    assert batches <= legal
    assert len(batches) >= 3
    with safe_open(result.path, "pt") as file:
        record = json.loads(file.metadata()["cogloom.training"])
    counted: dict[str, int] = {}
    for word in WHERE.values():
        counted[word] = counted.get(word, 0) + 1
    assert record["bucket_items"] == counted
    assert all(loss == loss and loss < 10 for loss in result.losses)


def test_a_run_on_many_sizes_goes_on_bit_for_bit(items: list[Item], cache: Path, tmp_path: Path) -> None:
    given = settings(steps=6, caption_dropout=0.3)
    whole = train(demo(), items, given, tmp_path / "whole", cache)
    done = 0

    def progress(step: int, total: int, what: str, info: dict | None) -> None:
        nonlocal done
        done = step if what == "training" else 0

    def check() -> None:
        if done >= 3:
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        train(demo(), items, given, tmp_path / "parts", cache, progress, check)
    parts = train(demo(), items, given, tmp_path / "parts", cache)
    assert parts.losses == whole.losses
    a, b = load_file(whole.path), load_file(parts.path)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_one_size_draws_what_it_drew_before(items: list[Item], cache: Path, tmp_path: Path) -> None:
    """Naming the one size anew changes the draws (a size is drawn), naming none does not touch the generator."""
    clips = [item for item in items if item.name in ("a.mkv", "b.mkv")]
    none = train(demo(), clips, settings(buckets=()), tmp_path / "none", cache)
    again = train(demo(), clips, settings(buckets=()), tmp_path / "again", cache)
    one = train(demo(), clips, settings(buckets=("32x32",)), tmp_path / "one", cache)
    assert none.losses == again.losses
    assert none.losses != one.losses
    assert none.validation[0] == one.validation[0]


def test_a_file_is_measured_once_and_at_the_wanted_rate(items: list[Item], tmp_path: Path) -> None:
    one = next(item for item in items if item.name == "e.mkv")
    calls: list[int] = []
    assert measure(one, 17, None, tmp_path, lambda: calls.append(1)) == (20, 64, 96)
    assert measure(one, 17, 4.0, tmp_path, lambda: calls.append(1)) == (10, 64, 96)
    assert len(calls) == 1
    (entry,) = (tmp_path / "training" / "sizes").iterdir()
    entry.write_text("{broken")
    assert measure(one, 17, None, tmp_path, lambda: calls.append(1)) == (20, 64, 96)
    assert len(calls) == 2


def test_a_size_that_the_base_cannot_have_is_refused(items: list[Item], cache: Path, tmp_path: Path) -> None:
    with pytest.raises(GeometryError, match="cannot train at 36x32"):
        train(demo(), items, settings(buckets=("36x32",)), tmp_path, cache)

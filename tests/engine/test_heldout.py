"""Held-out losses on the embedded base and on small ones of every generation: the same questions for every arm."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from demo.world import Scene, caption, draw, random_scene
from nodes.engine import dataset
from nodes.engine.checkpoints import DEMO_FOLDER
from nodes.engine.dataset import Item
from nodes.engine.errors import Cancelled, DatasetError, GeometryError, UsageError, WrongFamily
from nodes.engine.finetune import Settings
from nodes.engine.heldout import LOSS, Draws, HeldOut, encode, losses, sample_losses
from nodes.engine.lora_file import Adapter, read
from nodes.engine.lora_stack import Entry
from nodes.engine.pipeline import Base, Session, bases
from nodes.engine.statistics import Measured, differences
from nodes.engine.video import write_png, write_video
from nodes.host import LocalHost
from nodes.model import choose_base
from nodes.train import trainable
from tests import tiny

pytestmark = pytest.mark.heavy  # real models: the default run stays below ten minutes

LORAS = Path(__file__).resolve().parents[2] / "demo" / "loras"
DEMO = Base(folder=str(DEMO_FOLDER / "cogloom-demo"), dtype="fp32", device="cpu")
FEW = Draws(per_item=2)
Losses = dict[tuple[str, int], float]


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_scenes(folder: Path, scenes: Sequence[Scene], frames: int = 17, still: bool = False) -> list[Item]:
    folder.mkdir(parents=True)
    rng = random.Random(7)
    for number, scene in enumerate(scenes):
        clip = draw(scene, rng, frames)
        if still:
            write_png(clip[0], folder / f"{number:02}.png")
        else:
            write_video(clip, folder / f"{number:02}.mkv", 8)
        (folder / f"{number:02}.txt").write_text(caption(scene))
    return dataset.scan(folder)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> dict[str, HeldOut]:
    """Eight scenes that no training saw, plain and at sunset, encoded for the embedded base."""
    folder = tmp_path_factory.mktemp("worlds")
    rng = random.Random(11)
    scenes = [random_scene(rng, train=False) for _ in range(8)]
    sunset = [replace(scene, style="sunset") for scene in scenes]
    return {
        name: encode(DEMO, write_scenes(folder / name, these), cache)
        for name, these in (("plain", scenes), ("sunset", sunset))
    }


@pytest.fixture(scope="module")
def sunset() -> Adapter:
    return read(LORAS / "sunset.safetensors")


@pytest.fixture(scope="module")
def found(worlds: dict[str, HeldOut], sunset: Adapter) -> dict[tuple[str, str], Losses]:
    """(world, arm) -> losses, one arm after the other in one resident base."""
    results = {}
    for arm, adapters in (("base", []), ("sunset", [(sunset, 1.0)])):
        for name, held in worlds.items():
            with bases.session(DEMO, adapters) as session:
                results[name, arm] = losses(session, held, Draws(per_item=4 if name == "sunset" else 2))
    return results


def arms(found: dict[tuple[str, str], Losses], world: str) -> Measured:
    return Measured(LOSS.name, {arm: found[world, arm] for arm in ("base", "sunset")}, LOSS.higher_is_better)


def test_a_few_items_tell_an_adapter_from_its_base(found: dict[tuple[str, str], Losses]):
    (evening,) = differences([arms(found, "sunset")])
    assert evening.by_prompt
    assert (evening.pairs, evening.units) == (32, 8)
    assert evening.better == "sunset", evening.words()
    (day,) = differences([arms(found, "plain")])
    assert day.pairs == 16
    assert day.better == "base", day.words()


def test_common_numbers_tell_what_independent_ones_do_not(
    found: dict[tuple[str, str], Losses], worlds: dict[str, HeldOut], sunset: Adapter
):
    """Two weights that are near each other: the intervals' widths are 14 times apart."""
    with bases.session(DEMO, [(sunset, 0.8)]) as session:
        common, independent = (losses(session, worlds["sunset"], Draws(per_item=4, seed=seed)) for seed in (0, 1))
    told = []
    for weaker in (common, independent):
        assert weaker.keys() == found["sunset", "sunset"].keys()
        told += differences([Measured("loss", {"full": found["sunset", "sunset"], "weaker": weaker}, False)])
    widths = [each.interval.high - each.interval.low for each in told]
    assert widths[0] < widths[1] / 5
    assert told[0].better == "full"
    assert not told[1].told


def test_the_same_bits_alone_in_any_order_and_after_anything(
    found: dict[tuple[str, str], Losses], worlds: dict[str, HeldOut], sunset: Adapter
):
    with bases.session(DEMO, [(read(LORAS / "neon.safetensors"), 0.7)]) as session:
        losses(session, replace(worlds["plain"], items=worlds["plain"].items[:2]), Draws(per_item=1))
    held = worlds["sunset"]
    with bases.session(DEMO, [(sunset, 1.0)]) as session:
        assert losses(session, held, Draws(per_item=4)) == found["sunset", "sunset"]
    with bases.session(DEMO) as session:
        # Fewer items are asked the same of what is left.
        some = losses(session, replace(held, items=held.items[:2]), Draws(per_item=4))
        assert some == {key: value for key, value in found["sunset", "base"].items() if key in some}
        assert len(some) == 8
        batched = losses(session, replace(held, items=held.items[:2]), Draws(per_item=4, batch=5))
        assert session.resident.switch.differing() == ()
    assert list(batched) == list(some)
    assert batched == {key: pytest.approx(value, rel=1e-4) for key, value in some.items()}


def test_draws_are_of_names_and_numbers():
    draws = Draws(per_item=8, seed=3)
    steps = [draws.timestep("a/b.mkv", k, 1000) for k in range(8)]
    assert all(125 * k <= t < 125 * (k + 1) for k, t in enumerate(steps)), "one in each eighth"
    assert steps == [Draws(8, 3, batch=4).timestep("a/b.mkv", k, 1000) for k in range(8)]
    assert steps != [draws.timestep("a/c.mkv", k, 1000) for k in range(8)]
    assert steps != [Draws(8, 4).timestep("a/b.mkv", k, 1000) for k in range(8)]
    noise = draws.noise("a/b.mkv", 0, (5, 6, 16, 16))
    assert torch.equal(noise, draws.noise("a/b.mkv", 0, (5, 6, 16, 16)))
    assert not torch.equal(noise, draws.noise("a/b.mkv", 1, (5, 6, 16, 16)))
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05
    # Written down, so that a change of the recipe shows: studies are compared over versions.
    assert [Draws().timestep("clip.mkv", k, 1000) for k in range(4)] == [67, 310, 684, 810]
    for bad in ({"per_item": 0}, {"seed": -1}, {"batch": 0}):
        with pytest.raises(UsageError):
            Draws(**bad)


def test_it_is_the_loss_that_training_reports(tmp_path: Path, cache: Path, worlds: dict[str, HeldOut]):
    """Step 0 of a training run validates the base, here on all items, at noise drawn from one generator."""
    from nodes.engine.finetune import train

    held = worlds["plain"]
    settings = Settings(
        17, 64, 64, steps=1, mixed_precision="no", validation_items=0, batch_size=1, checkpoint_every=0, rank=1
    )
    result = train(trainable(DEMO), held.items, settings, tmp_path / "run", cache)
    with bases.session(DEMO) as session:
        generator = torch.Generator().manual_seed(settings.seed ^ 0x5EED)
        values = []
        for i, item in enumerate(held.items):
            noise = torch.randn((1, 5, 6, 16, 16), generator=generator)
            values.append(sample_losses(session, held, [item], [int((i + 0.5) * 1000 / 8)], noise).item())
    assert result.validation[0] == (0, pytest.approx(sum(values) / 8, rel=1e-6))


def test_a_schedule_is_followed_along_the_timesteps_and_taken_back(worlds: dict[str, HeldOut], sunset: Adapter):
    held = replace(worlds["sunset"], items=worlds["sunset"].items[:2])
    draws = Draws(per_item=4)
    with bases.session(DEMO) as session:
        plain = losses(session, held, draws)
    with bases.session(DEMO, [(sunset, 1.0)], hold="stacked") as session:
        full = losses(session, held, draws)
    entry = Entry(str(sunset.path), "sunset", steps="held 0@0 1@0.5")
    with bases.session(DEMO, [(sunset, entry)]) as session:
        late = losses(session, held, draws)
        assert session.resident.switch.names == (), "as for the first step again"
        assert losses(session, held, draws) == late
        assert losses(session, held, Draws(per_item=4, batch=3)) == {
            key: pytest.approx(value, rel=1e-4) for key, value in late.items()
        }
    before = [key for key in late if draws.timestep(*key, 1000) > 500]
    assert 2 <= len(before) <= 6
    for key, value in late.items():
        assert value == pytest.approx((plain if key in before else full)[key], rel=1e-5), key
        assert plain[key] != pytest.approx(full[key], rel=1e-5)


def test_weights_change_no_more_often_than_the_schedule(worlds: dict[str, HeldOut], sunset: Adapter):
    held = replace(worlds["sunset"], items=worlds["sunset"].items[:2])
    entry = Entry(str(sunset.path), "sunset", steps="held 0@0 1@0.5")
    with bases.session(DEMO, [(sunset, entry)]) as session:
        positions: list[float] = []
        stack = session._stack

        def counted(position: float) -> Any:
            positions.append(position)
            return stack(position)

        session._stack = counted
        losses(session, held, FEW)
    assert len(positions) == 3, "off, on, and back"
    assert positions == [*sorted(positions[:2]), 0.0]


def test_a_stop_puts_the_weights_back(worlds: dict[str, HeldOut], sunset: Adapter):
    entry = Entry(str(sunset.path), "sunset", steps="held 0@0 1@0.01")
    seen: list[tuple[int, int]] = []

    with bases.session(DEMO, [(sunset, entry)]) as session:

        def check() -> None:
            if len(seen) == 9:
                assert session.resident.switch.names == (("sunset", 1.0),)
                raise Cancelled("Stopped.")

        with pytest.raises(Cancelled):
            losses(session, worlds["plain"], FEW, lambda done, total, *_: seen.append((done, total)), check)
        assert session.resident.switch.names == ()
        assert session.resident.switch.differing() == ()
    assert seen == [(done, 16) for done in range(9)]


# --- every generation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in tiny.KINDS if name != "tiny-control"])
def test_every_generation_is_measured_as_it_is_trained(tiny_host: LocalHost, tmp_path: Path, name: str):
    base = choose_base(tiny_host, name, dtype="fp32", device="cpu")
    frames = 17 if "1.5" in name else 9
    items = write_scenes(tmp_path / "data", [Scene(motion="up"), Scene(colour="green", motion="right")], 17)
    held = encode(base, items, tmp_path / "cache", frames=frames, width=64, height=64)
    with bases.session(base) as session:
        values = losses(session, held, FEW)
    assert len(set(values.values())) == 4
    # The trainer's own arithmetic, with its own batch.
    assert values == {key: pytest.approx(value, rel=1e-5) for key, value in trained(base, held, FEW, frames).items()}


def trained(base: Base, held: HeldOut, draws: Draws, frames: int) -> Losses:
    from nodes.engine.finetune import _Plan, _Trainer

    parts = trainable(base)
    settings = Settings(frames, 64, 64, mixed_precision="no", rank=1)
    found: Losses = {}
    with (
        torch.no_grad(),
        _Trainer(parts, _Plan(held.items, (), 0.0), held.encoded, settings, Path("unused"), {}) as trainer,
    ):
        for item in held.items:
            for k in range(draws.per_item):
                batch = trainer._batch([item], [item.caption], torch.tensor([0]), torch.Generator())
                batch.noise = draws.noise(item.name, k, batch.x0.shape[1:])[None]
                batch.timesteps = torch.tensor([draws.timestep(item.name, k, 1000)])
                found[item.name, k] = trainer._loss(batch).item()
    return found


def test_stills_are_measured_beside_clips(tiny_host: LocalHost, tmp_path: Path):
    base = choose_base(tiny_host, "tiny-t2v", dtype="fp32", device="cpu")
    clips = write_scenes(tmp_path / "clips", [Scene(), Scene(colour="green")], 9)
    stills = [replace(i, name=f"still-{i.name}") for i in write_scenes(tmp_path / "stills", [Scene()], still=True)]
    held = encode(base, [*clips, *stills], tmp_path / "cache", frames=9, width=64, height=64)
    with bases.session(base) as session:
        alone, together = (losses(session, held, Draws(per_item=3, batch=batch)) for batch in (1, 4))
    assert len(alone) == 9
    assert together == {key: pytest.approx(value, rel=1e-4) for key, value in alone.items()}


# --- encoding ---------------------------------------------------------------------------------------------------------


def test_what_is_encoded_is_taken_from_the_cache(tiny_host: LocalHost, tmp_path: Path):
    base = choose_base(tiny_host, "tiny-t2v", dtype="fp32", device="cpu")
    items = write_scenes(tmp_path / "data", [Scene(), Scene(colour="green")], 9)
    notes: list[str] = []
    given: dict[str, Any] = {"frames": 9, "width": 64, "height": 64, "note": notes.append}
    first = encode(base, items, tmp_path / "cache", **given)
    assert bases.loads == 0, "no transformer is needed for it"
    assert notes == ["loading the text encoder"], "once for all captions"
    bases.unload()
    notes.clear()
    again = encode(base, items, tmp_path / "cache", **given)
    assert notes == []
    for item in items:
        assert torch.equal(first.encoded.latents(item), again.encoded.latents(item))
    half = encode(replace(base, dtype="bf16"), items, tmp_path / "cache", **given)
    assert half.encoded.prompt(items[0].caption).dtype == torch.bfloat16, "not what was encoded in another dtype"


def test_what_cannot_be_measured_is_refused(tiny_host: LocalHost, tmp_path: Path):
    base = choose_base(tiny_host, "tiny-t2v", dtype="fp32", device="cpu")
    items = write_scenes(tmp_path / "clips", [Scene()], 9)
    stills = write_scenes(tmp_path / "stills", [Scene()], still=True)
    cache = tmp_path / "cache"
    with pytest.raises(DatasetError, match="0 items"):
        encode(base, [], cache)
    with pytest.raises(DatasetError, match=r"1 of 1 items are stills \(00\.png\)"):
        encode(choose_base(tiny_host, "tiny-i2v"), stills, cache)
    with pytest.raises(WrongFamily, match="control"):
        encode(choose_base(tiny_host, "tiny-control"), items, cache)
    with pytest.raises(GeometryError, match="the nearest is"):
        encode(base, items, cache, frames=10, width=64, height=64)
    held = encode(base, items, cache, frames=9, width=64, height=64)
    with (
        bases.session(choose_base(tiny_host, "tiny-sincos")) as session,
        pytest.raises(UsageError, match="encode them"),
    ):
        losses(session, held, FEW)


def test_a_session_can_be_moved_along_its_schedule(sunset: Adapter):
    entry = Entry(str(sunset.path), "sunset", 0.8, steps="0@0 1@1")

    def weights(session: Session) -> tuple[tuple[str, float], ...]:
        return session.resident.switch.names

    with bases.session(DEMO, [(sunset, entry)]) as session:
        assert weights(session) == ()
        swap = session.at(0.5)
        assert weights(session) == swap.after == (("sunset", pytest.approx(0.4)),)
        session.at(0.0)
        assert weights(session) == session.at(0.0).after == ()
        assert session.weights == [], "these are of a render's steps"

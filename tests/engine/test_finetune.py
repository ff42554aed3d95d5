"""The trainer, on the real classes made tiny."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel
from diffusers.pipelines.cogvideo.pipeline_cogvideox import CogVideoXPipeline
from diffusers.pipelines.cogvideo.pipeline_cogvideox_image2video import CogVideoXImageToVideoPipeline
from diffusers.schedulers.scheduling_ddim_cogvideox import CogVideoXDDIMScheduler
from safetensors.torch import load_file
from transformers import T5Config, T5EncoderModel

from demo.world import Scene, caption, draw
from nodes.engine import finetune
from nodes.engine.dataset import scan
from nodes.engine.errors import (
    Cancelled,
    DatasetError,
    Diverged,
    GeometryError,
    NotEnoughMemory,
    PlacementError,
    ResumeError,
    UsageError,
    WrongFamily,
)
from nodes.engine.finetune import Settings, TrainableBase, train
from nodes.engine.video import write_png, write_video

SIDE, FRAMES, LENGTH = 16, 9, 8  # px, frames, tokens
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "snr_shift_scale": 3.0,
}


class Counting(AutoencoderKLCogVideoX):
    """The real autoencoder, counting what it is asked to encode."""

    calls = 0

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return super().encode(*args, **kwargs)


def tiny_transformer(**changes: Any) -> CogVideoXTransformer3DModel:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config: dict[str, Any] = {
            "num_attention_heads": 1,
            "attention_head_dim": 32,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 16,
            "text_embed_dim": 16,
            "num_layers": 2,
            "sample_width": 4,
            "sample_height": 4,
            "sample_frames": FRAMES,
            "max_text_seq_length": LENGTH,
            "use_rotary_positional_embeddings": True,
        }
        return CogVideoXTransformer3DModel(**(config | changes))


def tiny_base(task: str = "t2v", vae: dict[str, Any] | None = None, **changes: Any) -> TrainableBase:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        config: dict[str, Any] = {
            "block_out_channels": (4, 4, 4),
            "down_block_types": ("CogVideoXDownBlock3D",) * 3,
            "up_block_types": ("CogVideoXUpBlock3D",) * 3,
            "latent_channels": 4,
            "layers_per_block": 1,
            "norm_num_groups": 2,
            "temporal_compression_ratio": 4,
            "scaling_factor": 0.7,
        }
        autoencoder = Counting(**(config | (vae or {}))).eval()
        encoder = T5EncoderModel(
            T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0)
        ).eval()
    calls: list[str] = []

    def encode_prompts(texts: list[str]) -> torch.Tensor:
        calls.extend(texts)
        ids = torch.tensor([[1 + ord(c) % 63 for c in text[:LENGTH].ljust(LENGTH)] for text in texts])
        return encoder(ids)[0]

    base = TrainableBase(
        transformer=tiny_transformer(**({"in_channels": 8} if task == "i2v" else {}), **changes),
        vae=autoencoder,
        encode_prompts=encode_prompts,
        scheduler_config=SCHEDULER,
        name="CogVideoX-tiny",
        base_hash="b" * 64,
        task=task,  # pyright: ignore[reportArgumentType]
        max_text_length=LENGTH,
    )
    base.prompt_calls = calls  # pyright: ignore[reportAttributeAccessIssue]
    return base


def settings(**changes: Any) -> Settings:
    given: dict[str, Any] = {
        "frames": FRAMES,
        "height": SIDE,
        "width": SIDE,
        "steps": 6,
        "rank": 4,
        "batch_size": 2,
        "learning_rate": 1e-3,
        "mixed_precision": "no",
        "checkpoint_every": 2,
        "validation_every": 0,
        "validation_items": 0,
        "title": "Toy",
    }
    return Settings(**(given | changes))


def write_items(folder: Path, clips: int, stills: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(3)
    for i in range(clips + stills):
        scene = Scene(colour=("red", "green", "cyan", "white")[i % 4], motion="right" if i % 2 else "up")
        frames = draw(scene, rng, frames=FRAMES if i < clips else 2, side=SIDE)
        if i < clips:
            write_video(frames, folder / f"clip{i}.mkv", fps=8)
            (folder / f"clip{i}.txt").write_text(caption(scene))
        else:
            write_png(frames[0], folder / f"still{i}.png")
            (folder / f"still{i}.txt").write_text(caption(scene))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_items(tmp_path_factory.mktemp("data"), clips=3)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class StopAt:
    """A check that raises when `step` optimiser steps are done."""

    def __init__(self, step: int) -> None:
        self.step, self.done = step, 0

    def progress(self, done: int, total: int, what: str, info: dict | None) -> None:
        self.done = done if what == "training" else 0

    def check(self) -> None:
        if self.done >= self.step:
            raise Cancelled("Stopped at your request.")


def state_of(out: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(out / f"checkpoint-{step:06d}" / "state.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def bits(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


# --- training


def test_it_learns_one_clip_and_leaves_the_base_as_it_was(tmp_path: Path, cache: Path) -> None:
    items = scan(write_items(tmp_path / "one", clips=1))
    base = tiny_base()
    before, names = bits(base.transformer), [name for name, _ in base.transformer.named_modules()]
    result = train(
        base,
        items,
        settings(steps=60, batch_size=4, learning_rate=1e-2, target_modules="attention+ff", validation_every=30),
        tmp_path / "out",
        cache,
    )
    assert result.steps == 60
    assert len(result.losses) == 60
    assert all(math.isfinite(loss) for loss in result.losses)
    assert [step for step, _ in result.validation] == [0, 30, 60]
    assert result.validation[-1][1] < 0.9 * result.validation[0][1]
    assert result.path == tmp_path / "out" / "toy.safetensors"
    assert same(before, bits(base.transformer))
    assert names == [name for name, _ in base.transformer.named_modules()]
    assert "forward" not in base.transformer.__dict__


def test_comfyuis_inference_mode_does_not_stop_it(data: Path, cache: Path, tmp_path: Path) -> None:
    base = tiny_base()
    with torch.inference_mode():
        result = train(base, scan(data), settings(steps=2), tmp_path, cache)
    assert result.steps == 2


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        ("t2v", {"patch_size_t": 2, "patch_bias": False}),
        ("t2v", {"use_rotary_positional_embeddings": False}),
        ("i2v", {}),
        ("i2v", {"patch_size_t": 2, "ofs_embed_dim": 16}),
    ],
    ids=["1.5", "2b", "i2v", "1.5-i2v"],
)
def test_every_generation_and_task_trains(
    task: str, changes: dict[str, Any], data: Path, cache: Path, tmp_path: Path
) -> None:
    base = tiny_base(task, **changes)
    result = train(base, scan(data), settings(steps=2), tmp_path, cache)
    assert all(math.isfinite(loss) for loss in (*result.losses, *(v for _, v in result.validation)))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_half_precision_keeps_the_adapter_in_float32(precision: str, data: Path, cache: Path, tmp_path: Path) -> None:
    base = tiny_base()
    base.transformer.to(torch.bfloat16)
    train(base, scan(data), settings(steps=2, mixed_precision=precision), tmp_path, cache)
    assert not {"forward", "_original_forward"} & base.transformer.__dict__.keys()  # accelerate wraps it in autocast
    state = state_of(tmp_path, 2)
    assert {t.dtype for name, t in state.items() if name != "rng"} == {torch.float32}
    assert any(t.abs().sum() > 0 for name, t in state.items() if name.startswith("param.") and ".lora_B." in name)


def test_gradient_checkpointing_changes_no_bit(data: Path, cache: Path, tmp_path: Path) -> None:
    given = settings(steps=2, gradient_accumulation=2)
    base = tiny_base()
    train(base, scan(data), given, tmp_path / "a", cache)
    train(base, scan(data), replace(given, gradient_checkpointing=True), tmp_path / "b", cache)
    assert same(state_of(tmp_path / "a", 2), state_of(tmp_path / "b", 2))
    assert not base.transformer.is_gradient_checkpointing


# --- the file


def test_diffusers_loads_the_file_and_computes_what_was_trained(data: Path, cache: Path, tmp_path: Path) -> None:
    from peft import LoraConfig

    from nodes.engine import lora_file

    given = settings(steps=8, alpha=2.0, learning_rate=1e-2, target_modules="attention+ff", trigger_words=("moving",))
    result = train(tiny_base(), scan(data), given, tmp_path, cache)
    state = {n[6:]: t for n, t in state_of(tmp_path, 8).items() if n.startswith("param.")}
    paths = sorted(name.removesuffix(".lora_A.default.weight") for name in state if ".lora_A." in name)
    assert len(paths) == 2 * 6

    trained = tiny_transformer().eval()
    trained.add_adapter(LoraConfig(r=4, lora_alpha=2, target_modules=paths))  # pyright: ignore[reportArgumentType]
    trained.load_state_dict(state, strict=False)
    pairs = {p: (state[f"{p}.lora_A.default.weight"], state[f"{p}.lora_B.default.weight"]) for p in paths}
    exact = lora_file.write(tmp_path / "exact.safetensors", pairs, 2.0, {}, dtype=torch.float32)

    x, states = torch.randn(1, 3, 4, 8, 8), torch.randn(1, LENGTH, 16)

    def run(model: Any) -> torch.Tensor:
        with torch.no_grad():
            rotary = finetune.rotary(model.config, x)
            return model(x, states, torch.tensor([500]), image_rotary_emb=rotary, return_dict=False)[0]

    def loaded(path: Path) -> torch.Tensor:
        model = tiny_transformer().eval()
        model.load_lora_adapter(str(path.parent), weight_name=path.name, prefix="transformer")
        return run(model)

    want, plain = run(trained), run(tiny_transformer().eval())
    assert (want - plain).abs().max() > 0.02
    torch.testing.assert_close(loaded(exact), want, rtol=0, atol=1e-5)
    torch.testing.assert_close(loaded(result.path), want, rtol=0, atol=1e-2)
    checkpoint = tmp_path / "checkpoint-000008" / "adapter.safetensors"
    torch.testing.assert_close(loaded(checkpoint), loaded(result.path), rtol=0, atol=0)


def test_the_file_says_what_it_was_trained_on(data: Path, cache: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    items = scan(data)
    result = train(tiny_base(), items, settings(steps=3, trigger_words=("moving",)), tmp_path, cache)
    with safe_open(result.path, "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.title"] == "Toy"
    assert metadata["modelspec.architecture"] == "cogvideox-tiny-t2v/lora"
    assert metadata["modelspec.trigger_phrase"] == "moving"
    record = json.loads(metadata["cogloom.training"])
    expected = {
        "base": "CogVideoX-tiny",
        "base_hash": "b" * 64,
        "parent": None,
        "clips": 3,
        "stills": 0,
        "step": 3,
        "epoch": 2.0,
        "optimiser": "adamw",
        "learning_rate": 1e-3,
        "rank": 4,
        "alpha": 4.0,
        "targets": ["to_q", "to_k", "to_v", "to_out.0"],
        "seed": 0,
    }
    assert {name: record[name] for name in expected} == expected
    assert record["validation"] == [list(pair) for pair in result.validation]
    assert {"torch", "diffusers", "peft"} <= record["versions"].keys()


@pytest.mark.parametrize(
    ("name", "task", "said"),
    [
        ("CogVideoX-2b", "t2v", "cogvideox-2b-t2v/lora"),
        ("CogVideoX1.5-5B-I2V", "i2v", "cogvideox-1.5-5b-i2v/lora"),
        ("cogloom-demo", "t2v", "cogvideox-cogloom-demo-t2v/lora"),
    ],
)
def test_architecture_names(name: str, task: str, said: str) -> None:
    assert finetune.architecture(name, task) == said


# --- checkpoints


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_stopped_run_goes_on_bit_for_bit(schedule: str, data: Path, cache: Path, tmp_path: Path) -> None:
    items = scan(data)
    given = settings(
        lr_schedule=schedule, warmup=2, checkpoint_every=0, gradient_accumulation=2, caption_dropout=0.3,
        validation_every=3,
    )  # fmt: skip
    whole = train(tiny_base(), items, given, tmp_path / "whole", cache)

    stop = StopAt(3)
    with pytest.raises(Cancelled, match=r"step 3 of 6.*checkpoint-000003"):
        train(tiny_base(), items, given, tmp_path / "parts", cache, stop.progress, stop.check)
    assert not list(tmp_path.glob("parts/*.safetensors"))
    resumed = train(tiny_base(), items, given, tmp_path / "parts", cache)

    assert same(state_of(tmp_path / "whole", 6), state_of(tmp_path / "parts", 6))
    assert same(load_file(whole.path), load_file(resumed.path))
    assert whole.losses == resumed.losses
    assert whole.validation == resumed.validation


def test_a_stop_between_two_accumulated_batches_loses_nothing(data: Path, cache: Path, tmp_path: Path) -> None:
    items, given = scan(data), settings(steps=3, gradient_accumulation=3, checkpoint_every=0)
    train(tiny_base(), items, given, tmp_path / "whole", cache)
    calls = 0
    training = False

    def progress(done: int, total: int, what: str, info: dict | None) -> None:
        nonlocal training
        training = what == "training" and done == 2

    def check() -> None:
        nonlocal calls
        calls += training
        if calls == 3:  # the loop asks once, then each batch
            calls = 100
            raise Cancelled("stop")

    with pytest.raises(Cancelled, match="step 2 of 3"):
        train(tiny_base(), items, given, tmp_path / "parts", cache, progress, check)
    train(tiny_base(), items, given, tmp_path / "parts", cache)
    assert same(state_of(tmp_path / "whole", 3), state_of(tmp_path / "parts", 3))


def test_a_run_can_be_prolonged_if_its_rate_is_constant(data: Path, cache: Path, tmp_path: Path) -> None:
    items = scan(data)
    train(tiny_base(), items, settings(steps=4), tmp_path / "whole", cache)
    train(tiny_base(), items, settings(steps=2), tmp_path / "parts", cache)
    train(tiny_base(), items, settings(steps=4), tmp_path / "parts", cache)
    assert same(state_of(tmp_path / "whole", 4), state_of(tmp_path / "parts", 4))


def test_a_finished_run_started_again_trains_nothing(data: Path, cache: Path, tmp_path: Path) -> None:
    items, given = scan(data), settings(steps=2)
    first = train(tiny_base(), items, given, tmp_path, cache)
    done: list[int] = []
    again = train(tiny_base(), items, given, tmp_path, cache, lambda d, t, what, i: done.append(what == "training"))
    assert not any(done)
    assert first.losses == again.losses


def test_a_broken_checkpoint_is_passed_over(data: Path, cache: Path, tmp_path: Path) -> None:
    items = scan(data)
    train(tiny_base(), items, settings(steps=4), tmp_path, cache)
    want = state_of(tmp_path, 4)
    broken = tmp_path / "checkpoint-000004" / "state.safetensors"
    broken.write_bytes(broken.read_bytes()[:-10])
    (tmp_path / ".checkpoint-000005-1.part").mkdir()  # a run killed while it wrote
    steps: list[int] = []
    train(tiny_base(), items, settings(steps=4), tmp_path, cache, lambda done, *_: steps.append(done))
    assert same(want, state_of(tmp_path, 4))
    assert not list(tmp_path.glob(".checkpoint-*"))


def test_old_checkpoints_keep_their_adapter_and_a_difference(data: Path, cache: Path, tmp_path: Path) -> None:
    train(tiny_base(), scan(data), settings(steps=4, checkpoint_every=1), tmp_path, cache)
    have = {f.name: sorted(p.name for p in f.iterdir()) for f in tmp_path.glob("checkpoint-*")}
    adapter, packed, record, whole = "adapter.safetensors", "state.difference", "state.json", "state.safetensors"
    forms = {1: [packed, record], 2: [packed, record], 3: [packed, record, whole], 4: [record, whole]}
    assert have == {f"checkpoint-{n:06d}": [adapter, *form] for n, form in forms.items()}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank": 2, "alpha": 4.0}, ["rank 4 (now 2)"]),
        ({"learning_rate": 5e-4}, ["learning_rate 0.001", "0.0005"]),
        ({"steps": 1}, ["at step 2", "1 steps wanted"]),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(
    changes: dict[str, Any], words: list[str], data: Path, cache: Path, tmp_path: Path
) -> None:
    items, given = scan(data), settings(steps=2)
    train(tiny_base(), items, given, tmp_path, cache)
    before = (tmp_path / "toy.safetensors").read_bytes()
    with pytest.raises(ResumeError) as caught:
        train(tiny_base(), items, replace(given, **changes), tmp_path, cache)
    for word in (*words, "checkpoint-000002", "--fresh"):
        assert word in str(caught.value)
    assert (tmp_path / "toy.safetensors").read_bytes() == before


def test_a_checkpoint_of_another_base_or_other_data_is_refused(data: Path, cache: Path, tmp_path: Path) -> None:
    items, given = scan(data), settings(steps=2, lr_schedule="linear")
    train(tiny_base(), items, given, tmp_path, cache)
    with pytest.raises(ResumeError, match=r"another base \(base bbbbbbbbbbbb, now cccccccccccc"):
        train(replace_hash(tiny_base()), items, given, tmp_path, cache)
    with pytest.raises(ResumeError, match="other clips or captions"):
        train(tiny_base(), items[:2], given, tmp_path, cache)
    with pytest.raises(ResumeError, match=r"for 2 steps, now 4.*linear"):
        train(tiny_base(), items, replace(given, steps=4), tmp_path, cache)


def replace_hash(base: TrainableBase) -> TrainableBase:
    base.base_hash = "c" * 64
    return base


def test_a_fresh_start_moves_the_old_checkpoints_aside(data: Path, cache: Path, tmp_path: Path) -> None:
    items = scan(data)
    train(tiny_base(), items, settings(steps=4), tmp_path, cache)
    result = train(tiny_base(), items, settings(steps=2, rank=2), tmp_path, cache, resume=False)
    assert result.steps == 2
    assert sorted(f.name for f in (tmp_path / "previous-1").iterdir()) == ["checkpoint-000002", "checkpoint-000004"]
    assert [f.name for f in tmp_path.glob("checkpoint-*")] == ["checkpoint-000002"]


def test_a_stop_before_the_first_step_writes_nothing(data: Path, cache: Path, tmp_path: Path) -> None:
    stop = StopAt(0)
    with pytest.raises(Cancelled):
        train(tiny_base(), scan(data), settings(), tmp_path, cache, stop.progress, stop.check)
    assert not list(tmp_path.iterdir())


def test_divergence_names_the_last_good_checkpoint(data: Path, cache: Path, tmp_path: Path) -> None:
    base = tiny_base()
    name, weight = next(iter(base.transformer.named_parameters()))
    good = weight.detach().clone()

    def spoil(done: int, total: int, what: str, info: dict | None) -> None:
        if what == "training" and done == 3:
            weight.data.fill_(float("nan"))

    with pytest.raises(Diverged, match=r"loss is nan at step 4 of 6.*checkpoint-000002 \(step 2\).*0\.001"):
        train(base, scan(data), settings(), tmp_path, cache, spoil)
    assert not list(tmp_path.glob("*.safetensors"))
    weight.data.copy_(good)
    assert train(base, scan(data), settings(), tmp_path, cache).steps == 6, name


def test_a_base_that_cannot_compute_is_named_before_the_first_step(data: Path, cache: Path, tmp_path: Path) -> None:
    base = tiny_base()
    next(base.transformer.parameters()).data.fill_(float("nan"))
    with pytest.raises(Diverged, match="before the first step"):
        train(base, scan(data), settings(), tmp_path, cache)
    assert not list(tmp_path.iterdir())


# --- batches and the cache


def test_the_second_run_encodes_nothing(data: Path, tmp_path: Path) -> None:
    items, base = scan(data), tiny_base("i2v")
    first = train(base, items, settings(steps=2), tmp_path / "a", tmp_path / "cache")
    assert base.vae.calls == 6  # three clips, three first frames
    assert sorted(base.prompt_calls) == sorted(["", *{i.caption for i in items}])  # pyright: ignore[reportAttributeAccessIssue]
    again = tiny_base("i2v")
    second = train(again, items, settings(steps=2), tmp_path / "b", tmp_path / "cache")
    assert again.vae.calls == 0
    assert not again.prompt_calls  # pyright: ignore[reportAttributeAccessIssue]
    assert first.losses == second.losses


def test_batches_are_all_stills_or_all_clips_at_the_asked_ratio(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = scan(write_items(tmp_path / "mixed", clips=2, stills=3))
    seen: list[int] = []
    whole = finetune._Trainer._loss

    def watched(self: Any, batch: Any) -> torch.Tensor:
        seen.append(batch.x0.shape[1])
        return whole(self, batch)

    monkeypatch.setattr(finetune._Trainer, "_loss", watched)
    result = train(tiny_base(), items, settings(steps=80, image_ratio=0.25, checkpoint_every=0), tmp_path / "o", cache)
    training = Counter(seen[8:-8])  # a validation of eight before and after
    assert set(training) == {1, 3}
    assert sum(training.values()) == 80
    assert 10 <= training[1] <= 32
    record = json.loads(metadata_of(result.path)["cogloom.training"])
    assert (record["stills_seen"], record["clips_seen"]) == (2 * training[1], 2 * training[3])


def metadata_of(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()


def test_held_out_items_are_never_trained_on(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = scan(write_items(tmp_path / "mixed", clips=4, stills=4))
    given = settings(steps=6, validation_items=2, validation_every=2, batch_size=3)
    plan = finetune._plan(tiny_base(), items, given)
    assert Counter(item.kind for item in plan.held_out) == {"clip": 1, "still": 1}
    used: list[tuple[str, ...]] = []
    whole = finetune._Trainer._batch

    def watched(self: Any, chosen: Any, *rest: Any) -> Any:
        used.append(tuple(item.name for item in chosen))
        return whole(self, chosen, *rest)

    monkeypatch.setattr(finetune._Trainer, "_batch", watched)
    result = train(tiny_base(), items, given, tmp_path / "out", cache)
    held = {item.name for item in plan.held_out}
    assert {name for batch in used if len(batch) == 1 for name in batch} == held
    assert not {name for batch in used if len(batch) == 3 for name in batch} & held
    assert [step for step, _ in result.validation] == [0, 2, 4, 6]
    assert [item.name for item in finetune._plan(tiny_base(), items[::-1], given).held_out] == [
        item.name for item in plan.held_out
    ]


def test_the_first_picture_can_be_a_file_of_its_own(data: Path, tmp_path: Path) -> None:
    items = scan(data)
    picture = tmp_path / "first.png"
    write_png(torch.rand(SIDE, SIDE, 3), picture)
    own = [replace(item, first=picture, first_sha256="f" * 64) for item in items]
    base = tiny_base("i2v")
    a = train(base, items, settings(steps=1), tmp_path / "a", tmp_path / "cache")
    b = train(base, own, settings(steps=1), tmp_path / "b", tmp_path / "cache")
    assert a.losses != b.losses


# --- arithmetic, against diffusers


def test_the_loss_is_the_one_of_cogvideox(tmp_path: Path) -> None:
    scheduler: Any = CogVideoXDDIMScheduler(**SCHEDULER)
    levels = finetune.signal_levels(SCHEDULER)
    assert levels.dtype == torch.float32
    assert levels[-1] == 0
    generator = torch.Generator().manual_seed(0)
    x0, noise, output = (torch.randn(5, 2, 4, 3, 3, generator=generator) for _ in range(3))
    t = torch.tensor([10, 250, 500, 900, 999])
    noisy = scheduler.add_noise(x0, noise, t)
    predicted = scheduler.get_velocity(output, noisy, t)  # as its trainers do: the velocity turned into x0
    weights = (1 / (1 - scheduler.alphas_cumprod[t])).view(-1, 1, 1, 1, 1)
    theirs = (weights * (predicted - x0) ** 2).mean((1, 2, 3, 4)).float()
    ours = finetune.velocity_loss(output, x0, noise, levels[t])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"patch_size_t": 2}], ids=["1.0", "1.5"])
@pytest.mark.parametrize("pipeline", [CogVideoXPipeline, CogVideoXImageToVideoPipeline])
def test_rotary_embeddings_are_the_pipelines(pipeline: Any, changes: dict[str, Any]) -> None:
    config = tiny_transformer(**changes).config
    stand_in = SimpleNamespace(vae_scale_factor_spatial=2, transformer=SimpleNamespace(config=config))
    for frames, h, w in ((4, 4, 4), (2, 2, 4)):
        latents = torch.zeros(1, frames, 4, h, w)
        cos, sin = pipeline._prepare_rotary_positional_embeddings(stand_in, 2 * h, 2 * w, frames, torch.device("cpu"))
        mine = finetune.rotary(config, latents)
        assert mine is not None
        assert torch.equal(mine[0], cos)
        assert torch.equal(mine[1], sin)


def test_odd_latent_frames_repeat_the_first_one_in_front() -> None:
    latents = torch.arange(3.0).view(1, 3, 1, 1, 1)
    assert finetune.pad_latents(latents, 2).flatten().tolist() == [0, 0, 1, 2]
    assert finetune.pad_latents(latents, None) is latents
    assert finetune.pad_latents(latents[:, :2], 2).flatten().tolist() == [0, 1]


def test_timesteps_lean_towards_noise_below_power_one() -> None:
    def drawn(power: float) -> torch.Tensor:
        return finetune.draw_timesteps(4000, 1000, power, torch.Generator().manual_seed(0))

    uniform, high = drawn(1.0), drawn(0.7)
    assert uniform.min() >= 0
    assert high.max() <= 999
    assert abs(uniform.float().mean().item() - 500) < 15
    assert abs(high.float().mean().item() - 1000 / 1.7) < 15


@pytest.mark.parametrize(("inverted", "factor"), [(False, 0.7), (True, 1 / 0.7)])
def test_the_condition_is_scaled_as_the_pipeline_scales_it(
    inverted: bool, factor: float, data: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base("i2v", vae={"invert_scale_latents": inverted})
    seen: list[Any] = []
    whole = finetune._Trainer._loss
    monkeypatch.setattr(finetune._Trainer, "_loss", lambda self, b: seen.append(b) or whole(self, b))
    items = scan(data)
    train(base, items, settings(steps=1, batch_size=1), tmp_path, cache)
    from nodes.engine.dataset import to_frames

    batch, item = seen[0], items[0]  # the first validation
    picture = to_frames(item, FRAMES, SIDE, SIDE)[:1]
    with torch.no_grad():
        latent = base.vae.encode((picture * 2 - 1).permute(3, 0, 1, 2)[None]).latent_dist.mode()
    torch.testing.assert_close(batch.condition[:, 0], latent[:, :, 0] * factor)
    assert not batch.condition[:, 1:].any()
    assert batch.condition.shape == batch.x0.shape


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"rank": 0}, UsageError, "rank is 0.*1 to 4096"),
        ({"learning_rate": float("nan")}, UsageError, "learning_rate is nan"),
        ({"learning_rate": -1.0}, UsageError, "learning_rate is -1.0"),
        ({"batch_size": 1.5}, UsageError, "batch_size is 1.5.*whole number"),
        ({"image_ratio": 2.0}, UsageError, "image_ratio is 2.0.*0 to 1"),
        ({"lr_schedule": "steps"}, UsageError, "constant, linear, cosine"),
        ({"mixed_precision": "fp8"}, UsageError, "no, bf16, fp16"),
        ({"target_modules": "everything"}, UsageError, "attention or attention.ff"),
        ({"target_modules": ()}, UsageError, "target_modules is empty"),
        ({"warmup": 7}, UsageError, "warmup is 7 steps and the training has 6"),
        ({"validation_items": -1}, UsageError, "validation_items is -1"),
        ({"fps": 0.0}, UsageError, "fps is 0.0"),
        ({"frames": 12}, GeometryError, "frames is 12.*nearest is 9"),
        ({"height": 0}, GeometryError, "16x0"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        settings(**changes)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"width": 18}, GeometryError, r"18x16.*multiples of 8.*nearest size is 16x16"),
        ({"target_modules": ("to_q", "to_z")}, UsageError, "'to_z' is the ending of none of the"),
        ({"image_ratio": 0.5}, DatasetError, "asks for stills.*3 clips and 0 stills; set it to 0"),
        ({"trigger_words": ("zebra",)}, DatasetError, "'zebra' is in none of the 3 captions"),
        ({"validation_items": 3}, UsageError, "validation_items is 3.*3 clips"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_written(
    changes: dict[str, Any], error: type[Exception], words: str, data: Path, cache: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        train(tiny_base(), scan(data), settings(**changes), tmp_path / "out", cache)
    assert not (tmp_path / "out").exists()


def test_bases_and_items_that_do_not_go_together_are_refused(data: Path, cache: Path, tmp_path: Path) -> None:
    items = scan(data)
    base = tiny_base()
    base.task = "i2v"
    with pytest.raises(WrongFamily, match="takes 4 latent channels and i2v needs 8"):
        train(base, items, settings(), tmp_path, cache)
    epsilon = tiny_base()
    epsilon.scheduler_config = SCHEDULER | {"prediction_type": "epsilon"}
    with pytest.raises(WrongFamily, match="'epsilon'"):
        train(epsilon, items, settings(), tmp_path, cache)
    stills = scan(write_items(tmp_path / "stills", clips=1, stills=1))
    with pytest.raises(DatasetError, match=r"1 stills.*condition is the answer"):
        train(tiny_base("i2v"), stills, settings(), tmp_path, cache)
    with pytest.raises(DatasetError, match="0 items"):
        train(tiny_base(), [], settings(), tmp_path, cache)
    with pytest.raises(DatasetError, match="in the dataset twice"):
        train(tiny_base(), [*items, items[0]], settings(), tmp_path, cache)
    joined = tiny_base(patch_size_t=2, patch_bias=False)
    with pytest.raises(GeometryError, match="positions for up to 16x16; 16x24"):
        train(joined, items, settings(height=24), tmp_path, cache)
    learned = tiny_base(use_learned_positional_embeddings=True, max_text_seq_length=LENGTH)
    with pytest.raises(GeometryError, match="learned positions for 16x16 alone; 32x32"):
        train(learned, items, settings(height=32, width=32), tmp_path, cache)


def test_too_little_memory_says_what_to_turn_down(
    data: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, batch: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    base = tiny_base()
    with monkeypatch.context() as patch:
        patch.setattr(finetune._Trainer, "_loss", full)
        with pytest.raises(NotEnoughMemory, match=r"2 clips of 9 frames at 16x16.*gradient_checkpointing"):
            train(base, scan(data), settings(), tmp_path, cache)
    assert not any("lora" in name for name, _ in base.transformer.named_parameters())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU does it")
def test_fp16_needs_a_gpu(data: Path, cache: Path, tmp_path: Path) -> None:
    base = tiny_base()
    with pytest.raises(PlacementError, match=r"fp16 needs a GPU.*bf16 or no"):
        train(base, scan(data), settings(mixed_precision="fp16"), tmp_path, cache)
    assert train(base, scan(data), settings(steps=1), tmp_path, cache).steps == 1


def test_a_folder_that_cannot_be_written_is_named(data: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(UsageError, match=r"cannot be written.*choose another folder"):
        train(tiny_base(), scan(data), settings(steps=1), tmp_path / "out", tmp_path / "cache")

"""The states that trainers leave behind, made by the trainers themselves: accelerate and PEFT; DeepSpeed's by its
layout, as its zero_to_fp32.py reads it."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nodes.engine import take_worker
from nodes.engine.errors import AdapterNotFound, AdapterUnreadable, NotAModel, UsageError
from nodes.engine.lora_file import Adapter, LoRA
from nodes.engine.take import Adapted, Whole, clean, find, gather

from .test_sat import Call, pickled, sat_model

pytestmark = pytest.mark.heavy  # real models: the default run stays below ten minutes


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """For what has to be written anew."""
    folder = tmp_path / "place"
    folder.mkdir()
    return folder


def taken(source: Path, place: Path, **how: Any) -> Adapted:
    got = gather(find(source, **how), place)
    assert isinstance(got, Adapted)
    return got


def matrices(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {
        f"{module.path}.{side}": getattr(module, side)
        for module in adapter.modules
        if isinstance(module, LoRA)
        for side in "AB"
    }


@pytest.fixture(scope="module")
def model() -> Any:
    """diffusers' own transformer with PEFT's own adapter in it, as the training scripts have it."""
    from diffusers import CogVideoXTransformer3DModel
    from peft import LoraConfig

    from tests.tiny import SMALL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = CogVideoXTransformer3DModel(**SMALL)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_out.0"], init_lora_weights=False)
        transformer.add_adapter(config)
    return transformer


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {
        name.replace(".lora_A.default.weight", ".A").replace(".lora_B.default.weight", ".B"): tensor
        for name, tensor in model.state_dict().items()
        if ".lora_" in name
    }


def check(got: Adapted, wanted: Mapping[str, torch.Tensor]) -> None:
    found = matrices(got.adapter)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


# --- accelerate and PEFT ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how", ["safetensors", "pickle", "shards", pytest.param("pickled shards", marks=pytest.mark.heavy)]
)
def test_a_state_of_accelerate(how: str, model: Any, tmp_path: Path, place: Path):
    from accelerate import Accelerator

    safe = "pickle" not in how
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(model)
    if "shards" in how:
        accelerator.save_model(prepared, tmp_path / "state", max_shard_size="400KB", safe_serialization=safe)
        assert len(list((tmp_path / "state").glob("*-of-*"))) > 1
    else:
        accelerator.save_state(tmp_path / "state", safe_serialization=safe)
    got = taken(tmp_path / "state", place)
    check(got, trained(model))
    assert len(got.left) == len([name for name in model.state_dict() if ".lora_" not in name])
    assert not got.adapter.alpha_known  # such a state has no lora_alpha
    assert got.adapter.layout == "PEFT"


def test_a_checkpoint_among_several(model: Any, tmp_path: Path, place: Path):
    """Folders named by steps, as trainers leave them; a config beside tells the scale."""
    from accelerate import Accelerator

    run = tmp_path / "run"
    Accelerator(cpu=True).save_model(model, run / "checkpoint-20")
    for step in (100, 20):
        folder = run / f"checkpoint-{step}"
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    save_file({name: t * 2 for name, t in model.state_dict().items()}, run / "checkpoint-100" / "model.safetensors")
    newest = taken(run, place)
    assert newest.step == 100
    assert {module.strength for module in newest.adapter.modules} == {2.0}
    (place / "other").mkdir()
    older = taken(run, place / "other", which=20)
    assert older.step == 20
    check(older, trained(model))
    with pytest.raises(UsageError, match=r"no checkpoint '30'; its steps are \[20, 100\]"):
        find(run, 30)
    with pytest.raises(UsageError, match="tell no validation loss"):
        find(run, "best")


def test_wrapped_for_training(model: Any, tmp_path: Path, place: Path):
    """By DDP, torch.compile and PEFT's own model, all at once."""
    wrapped = {f"module._orig_mod.base_model.model.{name}": tensor for name, tensor in model.state_dict().items()}
    folder = tmp_path / "state"
    folder.mkdir()
    save_file(wrapped, folder / "model.safetensors")
    check(taken(folder, place), trained(model))
    assert clean("module.transformer_blocks.0._orig_mod.attn1.to_q.weight") == "transformer_blocks.0.attn1.to_q.weight"
    assert clean("model.diffusion_model.transformer.layers.0") == "model.diffusion_model.transformer.layers.0"


def test_what_was_trained_in_full_beside_it_is_told(model: Any, tmp_path: Path, place: Path):
    state = model.state_dict() | {"proj_out.modules_to_save.default.weight": torch.ones(4, 4)}
    (tmp_path / "state").mkdir()
    save_file(state, tmp_path / "state" / "model.safetensors")
    got = taken(tmp_path / "state", place)
    assert "1 tensors that were trained in full (modules_to_save) are not in it" in got.notes
    check(got, trained(model))


def test_two_adapters_in_one_state(model: Any, tmp_path: Path, place: Path):
    (tmp_path / "state").mkdir()
    state = model.state_dict()
    other = {name.replace(".default.", ".style."): tensor + 1 for name, tensor in state.items() if ".lora_" in name}
    save_file(state | other, tmp_path / "state" / "model.safetensors")
    got = taken(tmp_path / "state", place)
    check(got, trained(model))
    assert "of 2 adapters in it, the one called default was taken" in got.notes
    save_file(
        {name.replace(".default.", ".first."): tensor for name, tensor in state.items()} | other,
        tmp_path / "state" / "model.safetensors",
    )
    with pytest.raises(AdapterUnreadable, match="has 2 adapters, first, style, and none is PEFT's default"):
        gather(find(tmp_path / "state"), place)


def test_a_folder_of_peft(tmp_path: Path, place: Path):
    from diffusers import CogVideoXTransformer3DModel
    from peft import LoraConfig, get_peft_model

    from tests.tiny import SMALL

    wrapped = get_peft_model(
        CogVideoXTransformer3DModel(**SMALL),
        LoraConfig(r=4, lora_alpha=6, target_modules=["to_q"], init_lora_weights=False),
    )
    for safe in (True, False):
        wrapped.save_pretrained(tmp_path / str(safe), safe_serialization=safe)
        (place / str(safe)).mkdir()
        got = taken(tmp_path / str(safe), place / str(safe))
        assert {module.strength for module in got.adapter.modules} == {1.5}
        assert len(got.adapter.modules) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="files with holes")
def test_of_a_large_state_the_adapter_alone_is_read(tmp_path: Path, place: Path):
    """64 GB, all but a few bytes of which are a hole: more than memory, and more than could be read in time."""
    (tmp_path / "state").mkdir()
    path = "transformer_blocks.0.attn1.to_q"
    header, end = {}, 0
    for name, shape in (
        (f"{path}.base_layer.weight", (1 << 17, 1 << 17)),
        (f"{path}.lora_A.default.weight", (2, 64)),
        (f"{path}.lora_B.default.weight", (64, 2)),
    ):
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    head = json.dumps(header).encode()
    with open(tmp_path / "state" / "model.safetensors", "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + end - 1024)
        file.seek(0, os.SEEK_END)
        file.write(torch.ones(256).numpy().tobytes())
    got = taken(tmp_path / "state", place)
    assert {name: float(tensor.sum()) for name, tensor in matrices(got.adapter).items()} == {
        f"{path}.A": 128.0, f"{path}.B": 128.0,
    }  # fmt: skip


# --- DeepSpeed --------------------------------------------------------------------------------------------------------

NAME = "transformer_blocks.0.attn1.to_{}.lora_{}.default.weight"


def trainables(seed: int = 0, rank: int = 3) -> OrderedDict[str, torch.Tensor]:
    """Odd sizes, so that every kind of padding is met."""
    generator = torch.Generator().manual_seed(seed)
    found: OrderedDict[str, torch.Tensor] = OrderedDict()
    for x in "qk":
        found[NAME.format(x, "A")] = torch.randn(rank, 65, generator=generator)
        found[NAME.format(x, "B")] = torch.randn(65, rank, generator=generator)
    return found


class LossScaler:
    """Stands for DeepSpeed's, which its optimiser states have in them as an object."""

    def __init__(self) -> None:
        self.cur_scale = 1.0


@pytest.fixture
def deepspeed(monkeypatch: pytest.MonkeyPatch) -> type:
    """The class under DeepSpeed's own name, so that pickling it writes that name."""
    parts = ["deepspeed", "runtime", "fp16", "loss_scaler"]
    for n in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:n]), types.ModuleType(".".join(parts[:n])))
    kind = type("LossScaler", (LossScaler,), {"__module__": ".".join(parts)})
    sys.modules[".".join(parts)].LossScaler = kind  # type: ignore[attr-defined]
    return kind


def frozen() -> dict[str, torch.Tensor]:
    return {"transformer_blocks.0.attn1.to_q.base_layer.weight": torch.ones(65, 65, dtype=torch.bfloat16)}


def zero_2(tag: Path, weights: Mapping[str, torch.Tensor], ranks: int, scaler: Any) -> None:
    """ZeRO 1, 2 and BF16_Optimizer: the groups of parameters flat, padded to twice the ranks, cut into equal shares."""
    tag.mkdir(parents=True)
    groups = [dict(list(weights.items())[:3]), dict(list(weights.items())[3:])]
    module = OrderedDict({name: tensor.bfloat16() for name, tensor in weights.items()} | frozen())
    shapes = [OrderedDict((name, tensor.shape) for name, tensor in group.items()) for group in groups]
    state = {"module": module, "buffer_names": [], "param_shapes": shapes, "shared_params": {}, "global_steps": 40,
             "ds_config": {"zero_optimization": {"stage": 2}}, "ds_version": "0.16.0", "optimizer": None}  # fmt: skip
    torch.save(state, tag / "mp_rank_00_model_states.pt")
    flats = []
    for group in groups:
        flat = torch.cat([tensor.flatten() for tensor in group.values()])
        padded = 2 * ranks * math.ceil(len(flat) / (2 * ranks))
        flats.append(torch.cat([flat, torch.zeros(padded - len(flat))]).chunk(ranks))
    for rank in range(ranks):
        optimiser = {
            "optimizer_state_dict": {
                "loss_scaler": scaler, "zero_stage": 2, "partition_count": [ranks, ranks],
                "single_partition_of_fp32_groups": [chunks[rank].clone() for chunks in flats],
                "base_optimizer_state": {"state": {}},
            },
            "ds_version": "0.16.0",
        }  # fmt: skip
        torch.save(optimiser, tag / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


def zero_3(tag: Path, weights: Mapping[str, torch.Tensor], ranks: int, scaler: Any, groups: int = 2) -> None:
    """Every parameter cut into equal shares by itself; a rank's shares in flat groups."""
    tag.mkdir(parents=True)

    def share(tensor: torch.Tensor, rank: int) -> torch.Tensor:
        part = math.ceil(tensor.numel() / ranks)
        return torch.cat([tensor.flatten(), torch.zeros(part * ranks - tensor.numel())])[rank * part :][:part].clone()

    names = list(weights)
    for rank in range(ranks):
        state = {
            "module": OrderedDict((name, torch.empty(0, dtype=torch.bfloat16)) for name in (*weights, *frozen())),
            "buffer_names": [], "param_shapes": [OrderedDict((name, t.shape) for name, t in weights.items())],
            "frozen_param_shapes": OrderedDict((name, t.shape) for name, t in frozen().items()),
            "frozen_param_fragments": OrderedDict((name, share(t.float(), rank)) for name, t in frozen().items()),
            "global_steps": 41,
        }  # fmt: skip
        torch.save(state, tag / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        cut = len(names) // groups
        flats = [
            torch.cat([share(weights[name], rank) for name in part])
            for part in (names[:cut], names[cut:])[2 - groups :]
            if part
        ]
        optimiser = {"loss_scaler": scaler, "zero_stage": 3, "partition_count": ranks, "fp32_flat_groups": flats}
        torch.save({"optimizer_state_dict": optimiser}, tag / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


@pytest.mark.parametrize("ranks", [1, 3, 11])
@pytest.mark.parametrize("make", [zero_2, zero_3])
def test_the_float32_weights_of_deepspeed(make: Callable[..., None], ranks: int, deepspeed: type, tmp_path: Path):
    """To the bit, of any number of ranks (and rank 10 comes after rank 9); what is frozen, too."""
    weights = trainables()
    make(tmp_path / "tag", weights, ranks, deepspeed())
    found, said = take_worker.assembled(tmp_path / "tag")
    assert said["masters"] is True
    assert found.keys() == weights.keys() | frozen().keys()
    for name, tensor in weights.items():
        assert torch.equal(found[name].make(), tensor)
    for name, tensor in frozen().items():
        assert torch.equal(found[name].make().bfloat16(), tensor)


@pytest.mark.parametrize("make", [pytest.param(zero_2, marks=pytest.mark.heavy), zero_3])
def test_an_adapter_that_deepspeed_trained(make: Callable[..., None], deepspeed: type, tmp_path: Path, place: Path):
    weights = trainables()
    make(tmp_path / "run" / "global_step40", weights, 2, deepspeed())
    (tmp_path / "run" / "latest").write_text("global_step40")
    got = taken(tmp_path / "run", place)
    assert got.step == 40
    found = matrices(got.adapter)
    assert len(found) == 4
    for x in "qk":
        for side in "AB":
            assert torch.equal(found[f"transformer_blocks.0.attn1.to_{x}.{side}"], weights[NAME.format(x, side)])
    assert any("float32" in note for note in got.notes)


def test_without_the_optimisers_what_ran_is_taken(deepspeed: type, tmp_path: Path, place: Path):
    weights = trainables()
    tag = tmp_path / "run" / "pytorch_model"  # as accelerate calls it
    zero_2(tag, weights, 2, deepspeed())
    next(tag.glob("*_optim_states.pt")).unlink()
    got = taken(tmp_path / "run", place)
    found = matrices(got.adapter)
    assert found["transformer_blocks.0.attn1.to_q.A"].dtype == torch.bfloat16
    assert torch.equal(found["transformer_blocks.0.attn1.to_q.A"], weights[NAME.format("q", "A")].bfloat16())
    assert any("those that ran" in note for note in got.notes)
    assert got.step == 40


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda tag: next(tag.glob("*rank_1_*_optim_states.pt")).unlink(), r"2 of 3 optimiser states are there"),
        (lambda tag: [f.unlink() for f in tag.glob("*_optim_states.pt")], r"are not there"),
        (lambda tag: (tag / "zero_pp_rank_0_mp_rank_01_model_states.pt").write_bytes(b""), r"2 ranks of tensor paral"),
    ],
)
def test_shares_that_cannot_be_put_together(spoil: Callable[[Path], Any], said: str, deepspeed: type, tmp_path: Path):
    tag = tmp_path / "run" / "global_step41"
    zero_3(tag, trainables(), 3, deepspeed())
    spoil(tag)
    assert find(tag).files == (tag,)
    with pytest.raises(take_worker.sat_worker.Refused, match=said) as refused:
        take_worker.assembled(tag)
    assert "mp_rank_01" in said or "tensor" in said or "zero_to_fp32.py" in str(refused.value)


def test_shares_that_are_too_short_are_refused():
    with pytest.raises(take_worker.Refused, match="goes beyond the end"):
        take_worker._cut("x", [torch.zeros(3), torch.zeros(3)], 2, (5,))
    whole = take_worker._cut("x", [torch.arange(3), torch.arange(3, 6)], 2, (2, 2)).make()
    assert whole.tolist() == [[2, 3], [4, 5]]


def test_a_checkpoint_of_sat(tmp_path: Path, place: Path):
    """DeepSpeed's layout with SAT's names, whose scale is 1/rank."""
    tag = tmp_path / "lora-disney" / "1000"
    tag.mkdir(parents=True)
    (tmp_path / "lora-disney" / "latest").write_text("1000")
    pickled(tag / "mp_rank_00_model_states.pt", {"module": sat_model(), "iteration": 1000})
    got = taken(tmp_path / "lora-disney", place)
    assert got.step == 1000
    assert got.adapter.alpha_known
    assert {module.strength for module in got.adapter.modules} == {1 / 8}
    assert len(got.adapter.modules) == 8


# --- whole models, and what is refused --------------------------------------------------------------------------------


def test_a_whole_model_in_a_pickle(tmp_path: Path, place: Path):
    from diffusers import CogVideoXTransformer3DModel

    from tests.tiny import SMALL

    state = CogVideoXTransformer3DModel(**SMALL).state_dict()
    source = pickled(tmp_path / "mp_rank_00_model_states.pt", {"module": {f"module.{n}": t for n, t in state.items()}})
    got = gather(find(source), place)
    assert isinstance(got, Whole)
    assert set(got.spelling.values()) == set(state)
    from nodes.engine.pristine import PristineFiles

    files = PristineFiles(got.files, torch.float32, got.spelling)
    assert all(torch.equal(files(name), tensor) for name, tensor in state.items())
    files.release()


def test_a_pickle_that_wants_to_run_is_refused(tmp_path: Path, place: Path):
    mark = tmp_path / "mark"
    for n, name in enumerate(("pytorch_model.bin", "mp_rank_00_model_states.pt")):
        folder = tmp_path / str(n)
        folder.mkdir()
        pickled(folder / name, {"module": {NAME.format("q", "A"): Call(os.mkdir, str(mark))}})
        with pytest.raises(AdapterUnreadable, match=r"to be run when it is opened|it tries|could not be opened"):
            gather(find(folder), place)
        assert not mark.exists()
        shutil.rmtree(place / "0")


def test_a_pickle_of_endless_tensors_is_refused():
    """A stride of 0 makes terabytes of one number."""
    weights = take_worker.weights_of(
        {"transformer_blocks.0.norm1.linear.weight": torch.ones(1).expand(1 << 20, 1 << 20)}
    )
    with pytest.raises(take_worker.sat_worker.Refused, match="larger than the file"):
        take_worker.chosen(weights, 1 << 20)
    weights = take_worker.weights_of({"a b": torch.ones(3)})
    with pytest.raises(take_worker.sat_worker.Refused, match="characters that no module has"):
        take_worker.chosen(weights, 1 << 20)


def test_what_is_nothing(tmp_path: Path, place: Path):
    with pytest.raises(AdapterNotFound, match="no such file or folder"):
        find(tmp_path / "gone")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("x")
    with pytest.raises(
        AdapterNotFound, match=r"nothing that training leaves behind is known in it; it holds notes\.txt"
    ):
        find(tmp_path / "a")
    (tmp_path / "a" / "pytorch_model_fsdp_0").mkdir()
    with pytest.raises(AdapterUnreadable, match="accelerate merge-weights pytorch_model_fsdp_0"):
        find(tmp_path / "a")
    (tmp_path / "b").mkdir()
    save_file({"unet.weight": torch.ones(2)}, tmp_path / "b" / "model.safetensors")
    with pytest.raises(NotAModel, match="no adapter, and no CogVideoX transformer"):
        gather(find(tmp_path / "b"), place)
    pickled(
        tmp_path / "whole.pt",
        {"module": {f"model.diffusion_model.transformer.layers.0.{x}": torch.ones(2) for x in "ab"}},
    )
    with pytest.raises(NotAModel, match="under names of SAT"):
        gather(find(tmp_path / "whole.pt"), place)
    index = tmp_path / "b" / "model.safetensors.index.json"
    for text, said in (
        ('{"weight_map": {"x": "gone.safetensors"}}', "1 of 1 shards are missing"),
        ('{"weight_map": {"x": "../a/notes.txt"}}', "1 of 1 shards are missing"),
        ('{"weight_map": 3}', "tells of no shards"),
    ):
        index.write_text(text)
        with pytest.raises(AdapterUnreadable, match=said):
            find(tmp_path / "b")
    (tmp_path / "b" / "latest").write_text("../../etc")
    index.unlink()
    assert find(tmp_path / "b").kind == "state"

"""The switch: exact, all or nothing, and independent of order and history."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from nodes.engine.checkpoints import open_checkpoint, part_files
from nodes.engine.errors import AdapterMismatch, ModelError, StackError
from nodes.engine.lora_file import read
from nodes.engine.pipeline import load_transformer
from nodes.engine.switch import PristineFiles, Switch, plan
from tests import tiny


def fresh(checkpoints: Path, dtype: torch.dtype = torch.float32):
    checkpoint = open_checkpoint(checkpoints / "tiny-t2v")
    transformer = load_transformer(checkpoint, dtype)
    return transformer, Switch(transformer, PristineFiles(part_files(checkpoint.part("transformer")), dtype))


def weights(transformer: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in transformer.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)) for name in a)


@pytest.fixture
def adapters(checkpoints: Path, tmp_path: Path):
    _, switch = fresh(checkpoints)
    shapes = switch.shapes()
    attention = tiny.attention(shapes)
    forward = {name: shape for name, shape in shapes.items() if ".ff." in name}
    return [
        read(tiny.write_lora(tmp_path / "one.safetensors", attention, rank=4, alpha=2, seed=1)),
        read(tiny.write_lora(tmp_path / "two.safetensors", attention | forward, rank=3, alpha=3, seed=2)),
        read(tiny.write_lora(tmp_path / "three.safetensors", forward, rank=8, alpha=8, seed=3)),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_off_means_off_bit_for_bit(checkpoints: Path, adapters, dtype: torch.dtype):
    transformer, switch = fresh(checkpoints, dtype)
    before = weights(transformer)
    one, two, three = adapters
    for stack in ([(one, 1.0)], [(one, 0.3), (two, -0.7)], [(three, 2.0)], [(one, 1.0), (two, 1.0), (three, 1.0)]):
        switch.apply(stack)
        assert not same(before, weights(transformer))
        assert switch.differing()
    switch.apply([])
    assert same(before, weights(transformer))
    assert switch.differing() == ()


def test_the_sum_is_what_algebra_says(checkpoints: Path, adapters):
    transformer, switch = fresh(checkpoints)
    before = weights(transformer)
    one, two, _ = adapters
    switch.apply([(one, 0.5), (two, -1.5)])
    assert one.modules[0].scale == pytest.approx(0.5)  # alpha 2, rank 4
    for name, now in weights(transformer).items():
        wanted = before[name].double()
        for adapter, weight in ((one, 0.5), (two, -1.5)):
            for module in adapter.modules:
                if f"{module.path}.weight" == name:
                    wanted = wanted + weight * module.scale * (module.B.double() @ module.A.double())
        torch.testing.assert_close(now.double(), wanted, atol=2e-6, rtol=1e-5)


def test_order_and_history_do_not_show(checkpoints: Path, adapters):
    wanted = [(adapters[0], 0.8), (adapters[1], -0.4), (adapters[2], 1.3)]
    results = []
    for number, order in enumerate(itertools.permutations(wanted)):
        transformer, switch = fresh(checkpoints, torch.bfloat16)
        for past in range(number % 3):
            switch.apply([(adapters[past], 1.0 + past)])
        switch.apply(order)
        results.append(weights(transformer))
    assert all(same(results[0], other) for other in results[1:])


def test_weight_zero_is_absent_and_one_adapter_twice_is_the_sum(checkpoints: Path, adapters):
    transformer, switch = fresh(checkpoints)
    one, two, _ = adapters
    switch.apply([(one, 0.75), (two, 0.0)])
    expected = weights(transformer)
    assert switch.names == (("one", 0.75),)
    switch.apply([(one, 0.5), (one, 0.25)])
    assert same(expected, weights(transformer))
    switch.apply([(one, 0.5), (one, -0.5)])
    assert switch.differing() == ()


def test_only_what_changes_is_written(checkpoints: Path, adapters):
    _, switch = fresh(checkpoints)
    one, _, three = adapters
    assert switch.apply([(one, 1.0)]).layers == len(one.modules)
    assert switch.apply([(one, 1.0)]).layers == 0
    assert switch.apply([(one, 1.0), (three, 1.0)]).layers == len(three.modules)


def test_a_failed_swap_leaves_the_earlier_stack(checkpoints: Path, adapters):
    one, two, _ = adapters
    transformer, switch = fresh(checkpoints)
    switch.apply([(one, 1.0)])
    earlier = weights(transformer)
    for failing in range(len(two.modules)):
        calls = iter(range(10**6))

        def fail(calls=calls, failing=failing) -> None:
            if next(calls) == failing:
                raise RuntimeError("pulled the plug")

        with pytest.raises(RuntimeError, match="plug"):
            switch.apply([(two, 1.0)], check=fail)
        assert same(earlier, weights(transformer))
        assert switch.names == (("one", 1.0),)
    switch.apply([])
    assert switch.differing() == ()
    assert not switch.spoiled


def test_a_sum_beyond_the_dtype_is_refused(checkpoints: Path, tmp_path: Path):
    transformer, switch = fresh(checkpoints, torch.float16)
    before = weights(transformer)
    path = tiny.write_lora(tmp_path / "loud.safetensors", tiny.attention(switch.shapes()), alpha=65536, seed=4)
    with pytest.raises(StackError, match=r"cannot hold.*Lower the weights"):
        switch.apply([(read(path), 100.0)])
    assert same(before, weights(transformer))


def test_a_layer_that_is_not_there_changes_nothing(checkpoints: Path, tmp_path: Path):
    transformer, switch = fresh(checkpoints)
    before = weights(transformer)
    path = tiny.write_lora(tmp_path / "odd.safetensors", {"transformer_blocks.7.attn1.to_q": (64, 64)})
    with pytest.raises(AdapterMismatch, match=r"transformer_blocks\.7"):
        switch.apply([(read(path), 1.0)])
    assert same(before, weights(transformer))


def test_planning_changes_nothing(checkpoints: Path, adapters):
    transformer, switch = fresh(checkpoints)
    before = weights(transformer)
    drawn = plan({}, [(adapters[0], 1.0), (adapters[1], 2.0)])
    assert set(drawn.changed) == {m.path for a in adapters[:2] for m in a.modules}
    assert same(before, weights(transformer))
    assert switch.held == ()


def test_works_inside_inference_mode(checkpoints: Path, adapters):
    _, switch = fresh(checkpoints)
    with torch.inference_mode():
        switch.apply([(adapters[0], 1.0)])
    switch.apply([])  # weights made in inference mode could not be written to here
    assert switch.differing() == ()


def test_a_checkpoint_that_changed_on_disk_is_refused(checkpoints: Path, adapters, tmp_path: Path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(checkpoints / "tiny-t2v", copy / "tiny-t2v")
    _, switch = fresh(copy)
    file = part_files(copy / "tiny-t2v" / "transformer")[0]
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ModelError, match="changed on disk"):
        switch.apply([(adapters[0], 1.0)])
    file.unlink()
    with pytest.raises(ModelError, match="cannot be read any more"):
        switch.apply([(adapters[0], 1.0)])


@pytest.mark.parametrize("placement", ["group", "sequential"])
def test_offloaded_weights_are_reached(checkpoints: Path, adapters, placement: str):
    """The device is the CPU here, but the hooks and where they keep the weights are the real ones."""
    plain, plain_switch = fresh(checkpoints)
    transformer, switch = fresh(checkpoints)
    if placement == "group":
        transformer.enable_group_offload(
            torch.device("cpu"), torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
        )
    else:
        from accelerate import cpu_offload

        cpu_offload(transformer, execution_device=torch.device("cpu"))
    inputs = dict(
        hidden_states=torch.randn(1, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        encoder_hidden_states=torch.zeros(1, 24, 64),
        timestep=torch.tensor([500]),
        image_rotary_emb=(torch.ones(48, 32), torch.zeros(48, 32)),
        return_dict=False,
    )
    with torch.no_grad():
        off = transformer(**inputs)[0]
        for s in (switch, plain_switch):
            s.apply([(adapters[0], 1.0), (adapters[2], 0.5)])
        on = transformer(**inputs)[0]
        torch.testing.assert_close(on, plain(**inputs)[0], atol=0, rtol=0)
        assert not torch.equal(on, off)
        switch.apply([])
        assert torch.equal(transformer(**inputs)[0], off)
    assert switch.differing() == ()

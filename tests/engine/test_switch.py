"""The switch: exact, all or nothing, and independent of order and history, in both ways of holding a stack."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch

from nodes.engine.checkpoints import open_checkpoint, part_files
from nodes.engine.errors import AdapterMismatch, AdapterUnreadable, ModelError, StackError
from nodes.engine.lora_file import read
from nodes.engine.lora_kinds import DoRA, Full, LoHa, LoKr, LoRA, Module
from nodes.engine.lora_stack import Blocks, Strength
from nodes.engine.pipeline import load_transformer
from nodes.engine.pristine import PristineFiles, checksum
from nodes.engine.switch import Held, Room, Switch, Target, add, plan
from tests import tiny

HOLDS = ("fused", "stacked")


def fresh(checkpoints: Path, dtype: torch.dtype = torch.float32):
    checkpoint = open_checkpoint(checkpoints / "tiny-t2v")
    transformer = load_transformer(checkpoint, dtype)
    return transformer, Switch(transformer, PristineFiles(part_files(checkpoint.part("transformer")), dtype))


def weights(transformer: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in transformer.named_parameters()}


def seen(transformer: torch.nn.Module) -> torch.Tensor:
    """What the transformer computes: the effect of a stack that is held at run time shows here alone."""
    kind = next(transformer.parameters()).dtype
    with torch.no_grad():
        return transformer(
            hidden_states=torch.randn(1, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(kind),
            encoder_hidden_states=torch.zeros(1, 24, 64, dtype=kind),
            timestep=torch.tensor([500]),
            image_rotary_emb=(torch.ones(48, 32), torch.zeros(48, 32)),
            return_dict=False,
        )[0]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)) for name in a)


@pytest.fixture
def adapters(checkpoints: Path, tmp_path: Path):
    _, switch = fresh(checkpoints)
    shapes = switch.shapes()
    attention = tiny.attention(shapes)
    forward = tiny.forward(shapes)
    return [
        read(tiny.write_lora(tmp_path / "one.safetensors", attention, rank=4, alpha=2, seed=1)),
        read(tiny.write_lora(tmp_path / "two.safetensors", attention | forward, rank=3, alpha=3, seed=2)),
        read(tiny.write_lora(tmp_path / "three.safetensors", forward, rank=8, alpha=8, seed=3)),
    ]


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_off_means_off_bit_for_bit(checkpoints: Path, adapters, dtype: torch.dtype, hold: str):
    transformer, switch = fresh(checkpoints, dtype)
    switch.seal()
    before, off = weights(transformer), seen(transformer)
    one, two, three = adapters
    for stack in ([(one, 1.0)], [(one, 0.3), (two, -0.7)], [(three, 2.0)], [(one, 1.0), (two, 1.0), (three, 1.0)]):
        switch.apply(stack, hold=hold)
        assert not torch.equal(seen(transformer), off)
        assert same(before, weights(transformer)) == (hold == "stacked")
        assert bool(switch.differing()) == (hold == "fused")
        assert switch.verify().ok
    switch.apply([], hold=hold)
    assert same(before, weights(transformer))
    assert torch.equal(seen(transformer), off)
    assert switch.differing() == ()
    assert switch.verify().ok


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_both_holds_are_one_stack(checkpoints: Path, adapters, dtype: torch.dtype):
    """In fp32 to rounding; in half precision as far apart as either is from the fp32 truth."""
    exact, exact_switch = fresh(checkpoints)
    transformer, switch = fresh(checkpoints, dtype)
    stack = [(adapters[0], 0.8), (adapters[1], -0.4), (adapters[2], 1.3)]
    exact_switch.apply(stack)
    truth = seen(exact)
    held = {}
    for hold in HOLDS:
        switch.apply(stack, hold=hold)
        held[hold] = seen(transformer).float()
    limit = {torch.float32: 2e-6, torch.bfloat16: 0.05, torch.float16: 0.007}[dtype]
    assert (held["fused"] - held["stacked"]).norm() / truth.norm() < limit
    assert (held["stacked"] - truth).norm() / truth.norm() < limit


@pytest.mark.parametrize("hold", HOLDS)
def test_a_new_weight_writes_nothing_but_numbers(checkpoints: Path, adapters, hold: str):
    transformer, switch = fresh(checkpoints)
    one, two, _ = adapters
    switch.apply([(one, 1.0), (two, 1.0)], hold=hold)
    swap = switch.apply([(two, -0.5), (one, 0.25)], hold=hold)
    assert (swap.layers == 0) == (hold == "stacked")
    assert dict(swap.after) == {"one": 0.25, "two": -0.5}
    moved = seen(transformer)
    other, other_switch = fresh(checkpoints)
    other_switch.apply([(one, 0.25), (two, -0.5)], hold=hold)
    assert torch.equal(moved, seen(other))
    switch.apply([(two, 1.0)], hold=hold)
    other_switch.apply([], hold=hold)
    other_switch.apply([(two, 1.0)], hold=hold)
    assert torch.equal(seen(transformer), seen(other))


@pytest.mark.parametrize("hold", HOLDS)
def test_blocks_weigh_layers_one_by_one(checkpoints: Path, adapters, hold: str):
    transformer, switch = fresh(checkpoints)
    one, two, _ = adapters
    switch.apply([(one, Strength(2.0, Blocks.parse("1:0.5"))), (two, Strength(1.0, Blocks.parse("0.ff:1")))], hold=hold)
    got = seen(transformer)
    reference, reference_switch = fresh(checkpoints)
    named = [m for m in one.modules if m.path.startswith("transformer_blocks.1.")]
    named += [m for m in two.modules if m.path.startswith("transformer_blocks.0.ff.")]
    with torch.no_grad():
        for module in named:
            reference.get_submodule(module.path).weight.add_(module.dense(torch.empty(module.shape)))
    torch.testing.assert_close(got, seen(reference), atol=2e-5, rtol=1e-5)
    assert not torch.equal(got, seen(fresh(checkpoints)[0]))
    # The same adapter in two rows is the sum, layer by layer.
    switch.apply([(one, Strength(1.0, Blocks.parse("0:1"))), (one, Strength(1.0, Blocks.parse("1:1")))], hold=hold)
    reference_switch.apply([])
    twice, twice_switch = fresh(checkpoints)
    twice_switch.apply([(one, 1.0)], hold=hold)
    torch.testing.assert_close(seen(transformer), seen(twice), atol=1e-6, rtol=1e-6)


def odd_kinds(shapes: dict[str, tuple[int, ...]]) -> list[Module]:
    """One module of every kind, on layers of the tiny base."""
    g = torch.Generator().manual_seed(5)
    block = "transformer_blocks.0"

    def noise(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=g) * 0.2

    q, k, v = (shapes[f"{block}.attn1.to_{x}.weight"] for x in "qkv")
    conv = shapes["patch_embed.proj.weight"]
    return [
        LoHa(f"{block}.attn1.to_q", noise(q[0], 2), noise(2, q[1]), noise(q[0], 2), noise(2, q[1]), 1.5, q),
        LoKr(f"{block}.attn1.to_k", (noise(8, 8),), (noise(k[0] // 8, 2), noise(2, k[1] // 8)), 0.5, k, 2),
        DoRA(
            f"{block}.attn1.to_v",
            LoRA(f"{block}.attn1.to_v", noise(3, v[1]), noise(v[0], 3), 1.0),
            noise(v[0]).abs() + 1,
        ),
        Full(f"{block}.attn1.norm_q", noise(*shapes[f"{block}.attn1.norm_q.weight"])),
        Full(f"{block}.ff.net.2", noise(*shapes[f"{block}.ff.net.2.bias"]), 1.0, "bias"),
        LoRA("patch_embed.proj", noise(4, *conv[1:]), noise(conv[0], 4, 1, 1), 0.7),
    ]


def made_of(adapter, modules: list[Module], name: str = "odd"):
    """An adapter in hand with other modules; `replace` drops what was remembered of the first."""
    modules = sorted(modules, key=lambda m: m.name)
    content = dataclasses.replace(adapter.content, _head=name.encode())
    return dataclasses.replace(adapter, name=name, content=content, modules=tuple(modules))


def test_every_kind_is_added_as_its_arithmetic_says(checkpoints: Path, adapters):
    """A preference for run time is followed where there are factors; norms, biases and DoRA are fused beside them."""
    for hold in HOLDS:
        transformer, switch = fresh(checkpoints)
        switch.seal()
        before = weights(transformer)
        odd = made_of(adapters[0], odd_kinds(switch.shapes()))
        switch.apply([(odd, -0.5)], hold=hold)
        got = seen(transformer)
        assert switch.held[0].hold == ("fused" if hold == "fused" else "both")
        assert switch.verify().ok
        reference, _ = fresh(checkpoints)
        with torch.no_grad():
            for module in odd.modules:
                reference.get_parameter(module.name).add_(module.dense(before[module.name].clone()), alpha=-0.5)
        torch.testing.assert_close(got, seen(reference), atol=2e-5, rtol=1e-5)
        switch.apply([])
        assert same(before, weights(transformer))


def test_what_can_be_held_in_neither_way_is_refused_in_a_sentence(checkpoints: Path, adapters):
    _, switch = fresh(checkpoints)
    cast = {name: Target(False, name.endswith(".weight")) for name in switch.shapes()}
    whole = made_of(adapters[0], [m for m in odd_kinds(switch.shapes()) if isinstance(m, DoRA)])
    with pytest.raises(StackError, match=r"to_v\.weight is a dora module.*Choose a base without quantisation"):
        plan({}, [(whole, 1.0)], cast)
    drawn = plan({}, [(adapters[0], 1.0)], cast, "fused")  # low-rank ones need no second thought
    assert (drawn.held[0].hold, len(drawn.stacked[0][1]), drawn.fused) == ("stacked", len(adapters[0].modules), {})


def test_verify_finds_what_was_changed_behind_its_back(checkpoints: Path, adapters):
    transformer, switch = fresh(checkpoints, torch.bfloat16)
    switch.seal()
    switch.apply([(adapters[0], 1.0)])
    fused, untouched = transformer.transformer_blocks[0].attn1.to_q.weight, transformer.proj_out.bias
    for parameter, name in ((fused, "transformer_blocks.0.attn1.to_q.weight"), (untouched, "proj_out.bias")):
        kept = parameter.detach().clone()
        flat = parameter.data.view(-1)
        flat[[0, 1]] = flat[[1, 0]].clone() if flat[0] != flat[1] else flat[[0, 1]] + 1  # a sum alone would not see it
        verdict = switch.verify()
        assert verdict.wrong == (name,)
        assert "NOT as loaded" in str(verdict)
        parameter.data.copy_(kept)
        assert switch.verify().ok


def test_the_checksum_sees_single_bits_and_exchanges():
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        tensor = (torch.randn(300, 131, generator=generator) * 50).to(dtype)
        first = checksum(tensor)
        assert checksum(tensor.clone()) == first
        assert checksum(tensor.t().contiguous().t()) == first  # of the values in order, not of how they lie
        for at in ((0, 0), (299, 130), (150, 7)):
            other = tensor.clone()
            other[at] += 1
            assert checksum(other) != first
        exchanged = tensor.clone()
        exchanged[[3, 200]] = exchanged[[200, 3]]
        assert checksum(exchanged) != first


@pytest.mark.parametrize("hold", HOLDS)
def test_order_and_history_do_not_show(checkpoints: Path, adapters, hold: str):
    wanted = [(adapters[0], 0.8), (adapters[1], -0.4), (adapters[2], 1.3)]
    results = []
    for number, order in enumerate(itertools.permutations(wanted)):
        transformer, switch = fresh(checkpoints, torch.bfloat16)
        for past in range(number % 3):
            switch.apply([(adapters[past], 1.0 + past)], hold=HOLDS[past % 2])
        switch.apply(order, hold=hold)
        results.append((weights(transformer), seen(transformer)))
    assert all(same(results[0][0], other) for other, _ in results[1:])
    assert all(torch.equal(results[0][1], other) for _, other in results[1:])


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_memory_that_is_used_again_changes_no_bit(dtype: torch.dtype):
    """Layers of several sizes after one another, larger than what torch shares out, in one room: as in fresh memory."""
    generator = torch.Generator().manual_seed(0)

    def matrix(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    rooms = [Room(in_pieces=True), Room()]
    for out, into, kinds in (
        (700, 640, (dtype, torch.bfloat16)),
        (64, 900, (torch.float32,)),
        (900, 700, (dtype, dtype)),
    ):
        weight = matrix(out, into).to(dtype)
        modules = [LoRA("layer", matrix(96, into).to(kind), matrix(out, 96).to(kind), 0.3) for kind in kinds]
        for strengths in ((1.0, 0.5), (-0.7, 1 / 0.3)):
            parts = tuple(zip(modules, strengths, strict=False))
            expected = weight.clone()
            add(expected, parts)
            assert not torch.equal(expected, weight)
            for room in rooms:
                again = weight.clone()
                add(again, parts, room)
                assert torch.equal(again, expected)


def test_a_new_adapter_alone_is_not_hashed_before_it_acts(checkpoints: Path, adapters):
    """There is nothing that it could be mistaken for; beside another one there is."""
    _, switch = fresh(checkpoints)
    for hold in HOLDS:
        switch.apply([(adapters[0], 1.0)], hold=hold)
        assert "fingerprint" not in adapters[0].content.__dict__
    switch.apply([(adapters[0], 1.0), (adapters[1], 1.0)])
    assert "fingerprint" in adapters[0].content.__dict__
    assert len(switch.state) == 2


def test_only_what_changes_is_written(checkpoints: Path, adapters):
    _, switch = fresh(checkpoints)
    one, _, three = adapters
    assert switch.apply([(one, 1.0)]).layers == len(one.modules)
    assert switch.apply([(one, 1.0)]).layers == 0
    assert switch.apply([(one, 1.0), (three, 1.0)]).layers == len(three.modules)


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("earlier_hold", HOLDS)
@pytest.mark.parametrize("hold", HOLDS)
def test_a_failed_swap_leaves_the_earlier_stack(checkpoints: Path, adapters, hold: str, earlier_hold: str, ahead: bool):
    one, two, three = adapters
    transformer, switch = fresh(checkpoints)
    switch.seal()
    switch.ahead = ahead  # also in the tiny weights of this base a thread prepares the next
    switch.apply([(one, 1.0), (three, -0.3)], hold=earlier_hold)
    earlier = weights(transformer), seen(transformer), switch.names
    for failing in range(100):
        calls = itertools.count()

        def fail(calls=calls, failing=failing) -> None:
            if next(calls) == failing:
                raise RuntimeError("pulled the plug")

        try:
            switch.apply([(two, 1.0)], check=fail, hold=hold)
        except RuntimeError as error:
            assert "plug" in str(error)  # noqa: PT017
            assert same(earlier[0], weights(transformer))
            assert torch.equal(earlier[1], seen(transformer))
            assert switch.names == earlier[2]
            assert switch.verify().ok
        else:
            break
    assert failing >= len(two.modules)  # it was tried before each layer that is written
    assert dict(switch.names) == {"two": 1.0}
    switch.apply([])
    assert switch.differing() == ()
    assert not switch.spoiled


def test_a_failure_inside_a_layer_is_undone_too(checkpoints: Path, adapters):
    """Not between layers but in the middle of one: factors that cannot be had when they are asked for."""

    class Broken(LoRA):
        def factors(self):
            raise MemoryError("no room for the factors")

    transformer, switch = fresh(checkpoints)
    switch.seal()
    switch.ahead = True
    last = adapters[0].modules[-1]
    bad = made_of(adapters[0], [*adapters[0].modules[:-1], Broken(last.path, last.A, last.B, last.scale)])
    for hold in HOLDS:
        switch.apply([(adapters[1], 0.7)], hold=hold)
        earlier = seen(transformer)
        with pytest.raises(MemoryError):
            switch.apply([(bad, 1.0), (adapters[2], 1.0)], hold=hold)
        assert torch.equal(earlier, seen(transformer))
        assert switch.verify().ok
        assert switch.names == (("two", 0.7),)


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
    for hold in HOLDS:
        with pytest.raises(AdapterMismatch, match=r"1 of 1 layers .* transformer_blocks\.7"):
            switch.apply([(read(path), 1.0)], hold=hold)
    assert same(before, weights(transformer))


def test_planning_changes_nothing(checkpoints: Path, adapters):
    transformer, switch = fresh(checkpoints)
    before = weights(transformer)
    targets = {name: Target(True, True) for name in switch.shapes()}
    drawn = plan({}, [(adapters[0], 1.0), (adapters[1], 2.0)], targets)
    assert set(drawn.changed) == {m.name for a in adapters[:2] for m in a.modules}
    assert all(isinstance(held, Held) for held in drawn.held)
    assert same(before, weights(transformer))
    assert switch.held == ()


def test_works_inside_inference_mode(checkpoints: Path, adapters):
    _, switch = fresh(checkpoints)
    for hold in HOLDS:
        with torch.inference_mode():
            switch.apply([(adapters[0], 1.0)], hold=hold)
        switch.apply([(adapters[0], 0.5)], hold=hold)  # what is made in inference mode could not be written to here
        switch.apply([])
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
    assert not switch.spoiled  # seen before anything was touched
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
    switch.seal()
    off = seen(transformer)
    for hold in HOLDS:
        for s in (switch, plain_switch):
            s.apply([(adapters[0], 1.0), (adapters[2], 0.5)], hold=hold)
        on = seen(transformer)
        torch.testing.assert_close(on, seen(plain), atol=0, rtol=0)
        assert not torch.equal(on, off)
        assert switch.verify().ok
        switch.apply([])
        assert torch.equal(seen(transformer), off)
    assert switch.differing() == ()


def test_room_reserved_keeps_what_is_held(checkpoints: Path, adapters):
    transformer, switch = fresh(checkpoints)
    one, two, _ = adapters
    switch.apply([(one, 0.7), (two, -1.0)], hold="stacked")
    before = seen(transformer)
    switch.reserve(64)
    torch.testing.assert_close(seen(transformer), before, atol=2e-5, rtol=1e-5)
    size = switch.arena_bytes
    switch.apply([(two, 0.5)], hold="stacked")
    switch.apply([])
    assert switch.arena_bytes == size  # for good
    assert torch.equal(seen(transformer), seen(fresh(checkpoints)[0]))
    switch.apply([(one, 0.7), (two, -1.0)], hold="stacked")
    torch.testing.assert_close(seen(transformer), before, atol=2e-5, rtol=1e-5)


def test_run_time_memory_is_given_back_when_nothing_is_stacked(checkpoints: Path, adapters):
    _, switch = fresh(checkpoints)
    switch.apply([(adapters[0], 1.0)], hold="stacked")
    assert switch.arena_bytes > 0
    switch.apply([(adapters[0], 1.0)], hold="fused")
    assert switch.arena_bytes == 0


@pytest.mark.parametrize("hold", HOLDS)
def test_numbers_beyond_the_dtype_are_refused_in_both_holds(checkpoints: Path, adapters, hold: str):
    """At run time nothing is summed up that could be looked at, so it is seen from the factors."""
    for dtype, size in ((torch.bfloat16, 1e19), (torch.float16, 2e3)):
        transformer, switch = fresh(checkpoints, dtype)
        switch.seal()
        switch.apply([(adapters[0], 0.5)], hold=hold)
        earlier = seen(transformer)
        path = "transformer_blocks.1.attn1.to_k"
        huge = made_of(adapters[0], [LoRA(path, torch.full((4, 64), size), torch.full((64, 4), size), 1.0)], "huge")
        with pytest.raises(StackError, match=r"huge.*(bfloat16|float16) cannot hold.*Lower the weight"):
            switch.apply([(adapters[1], 1.0), (huge, 1.0)], hold=hold)
        assert torch.equal(seen(transformer), earlier)
        assert switch.verify().ok
        # A weight that makes it small is fine, and the slider cannot get round the check.
        switch.apply([(huge, 1e-30 if dtype == torch.bfloat16 else 1e-4)], hold=hold)
        with pytest.raises(StackError, match="cannot hold"):
            switch.apply([(huge, 100.0)], hold=hold)
        assert switch.verify().ok


def test_a_file_larger_than_memory_is_refused_before_it_is_read(tmp_path: Path):
    import json
    import struct

    size = 1 << 42  # a hole: it takes no disk
    shape = [1, size // 2]
    entries = {
        "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight": {
            "dtype": "BF16", "shape": shape, "data_offsets": [0, size]},
        "transformer.transformer_blocks.0.attn1.to_q.lora_B.weight": {
            "dtype": "BF16", "shape": [64, 1], "data_offsets": [size, size + 128]},
    }  # fmt: skip
    head = json.dumps(entries).encode()
    path = tmp_path / "vast.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        try:
            file.truncate(8 + len(head) + size + 128)
        except OSError:
            pytest.skip("this file system has no holes of that size")
    with pytest.raises(AdapterUnreadable, match=r"no memory for its 4,398,046,511,232 bytes, [\d,]+ are free"):
        read(path)


def test_modules_shared_by_two_adapters_do_not_confuse_them(checkpoints: Path, adapters):
    """A copy with the same modules, as a partial fit makes it, is another adapter with another weight."""
    transformer, switch = fresh(checkpoints)
    switch.apply([(adapters[0], 0.5)], hold="stacked")
    copy = dataclasses.replace(adapters[0])
    switch.apply([(copy, 2.0)], hold="stacked")
    got = seen(transformer)
    switch.apply([])
    switch.apply([(adapters[0], 2.0)], hold="stacked")
    assert torch.equal(got, seen(transformer))

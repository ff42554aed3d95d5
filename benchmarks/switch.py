"""Swapping adapters, ours beside diffusers, PEFT and ComfyUI's way, in one run: what counts is the ratio.

python benchmarks/switch.py --size 2b --json result.json --markdown

A row is {name, ours, peer, peer_value, unit, ratio, goal}; `ratio` is how many times better we are, so larger is
better, and `goal` is the least it should be, or null. Where ours has to stay below a limit, ratio = limit / ours and
goal 1; where nothing at all may happen (bits that differ, recompilations), ratio = 1 / (1 + ours) and goal 1.
Which row means what, and how each peer is driven, is in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import logging
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.clock import Contestant, Growth, Stopwatch, Times, growth, machine, race, touch
from benchmarks.material import SIZES, Materials, Size, attention, inputs, kept_in, load
from benchmarks.peers import Floor, Hotswap, Patched, Peft, reload
from nodes.engine import lora_file
from nodes.engine.checkpoints import part_files
from nodes.engine.errors import CogLoomError, NotEnoughMemory, UsageError
from nodes.engine.files import write_atomic
from nodes.engine.lora_file import Adapter
from nodes.engine.pipeline import choose_device
from nodes.engine.switch import PristineFiles, Switch

MIB = 1 << 20
WEIGHTS = (1.0, 0.75, 0.5, 0.25)
RANKS = (4, 16, 64, 128)  # of the stacks drawn at random
BUDGET = 256  # rows of the arena under torch.compile; a stack's ranks add up to no more
SHORT = 4  # times as many rounds for what takes milliseconds
WEIGHT_CALLS = 50  # new weights per sample, on both sides
FUSE_ROUNDS = 10  # of the peer whose drift is shown beside ours
COMPILED_SWAPS = 20
LEAST = 0.01  # percentage points; a smaller overhead cannot be told from none


@dataclass(frozen=True)
class Row:
    name: str
    ours: float
    peer: str
    peer_value: float | None
    unit: str
    ratio: float
    goal: float | None
    cpu_ratio: float | None = None  # the same of CPU time, which other programs disturb less; in the table alone

    @property
    def met(self) -> bool:
        return self.goal is None or self.ratio >= self.goal

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "cpu_ratio"}


@dataclass(frozen=True)
class Settings:
    size: Size
    device: torch.device
    repeat: int
    swaps: int


class Subject:
    """Our side: a transformer, loaded once, and the switch that holds its adapters."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder = folder
        self.transformer = load(folder, device)
        self.switch = Switch(self.transformer, PristineFiles(part_files(folder), torch.bfloat16))
        self._places = [p.data_ptr() for p in self.transformer.parameters()]

    def fused(self, stack: Sequence[tuple[Adapter, float]]) -> None:
        self.switch.apply(stack, hold="fused")

    def stacked(self, stack: Sequence[tuple[Adapter, float]]) -> None:
        self.switch.apply(stack, hold="stacked")

    def off(self) -> None:
        self.switch.apply([])

    def loads(self) -> int:
        """1, and 1 more when any weight lies elsewhere than the load put it."""
        return 1 + (self._places != [p.data_ptr() for p in self.transformer.parameters()])


class Bench:
    """What the measurements share: the base that ours is measured on from beginning to end, and its adapters."""

    def __init__(self, settings: Settings, materials: Materials) -> None:
        self.size, self.device = settings.size, settings.device
        self.repeat, self.swaps = settings.repeat, settings.swaps
        self.materials = materials
        self.reloads = 0  # of the peer that cannot do without

    @cached_property
    def ours(self) -> Subject:
        self._check_memory()
        subject = Subject(self.materials.base(self.size), self.device)
        touch(subject.transformer)
        return subject

    @property
    def started(self) -> bool:
        return "ours" in self.__dict__

    def files(self, rank: int, count: int) -> list[Path]:
        return self.materials.adapters(self.size, rank, count)

    @cached_property
    def four(self) -> list[Adapter]:
        return [lora_file.read(file) for file in self.files(self.size.ranks[0], 4)]

    def stack(self, count: int) -> list[tuple[Adapter, float]]:
        return list(zip(self.four[:count], WEIGHTS, strict=False))

    @contextlib.contextmanager
    def another(self, size: Size | None = None) -> Iterator[Any]:
        """A transformer for a peer, freed afterwards."""
        transformer = load(self.materials.base(size or self.size), self.device)
        touch(transformer)
        try:
            yield transformer
        finally:
            # The peer may still hold it for a moment; what matters is that its weights are gone.
            for parameter in transformer.parameters():
                parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _check_memory(self) -> None:
        import psutil

        base = sum(file.stat().st_size for file in part_files(self.materials.base(self.size)))
        need = base * 7 // 2  # ours, two peers, backups and adapters
        for free, where in (
            (psutil.virtual_memory().available, "of memory"),
            (torch.cuda.mem_get_info()[0] if self.device.type == "cuda" else need, "on the GPU"),
        ):
            if free < need:
                raise NotEnoughMemory(
                    f"The {self.size.name} needs about {need / 2**30:.0f} GiB {where} for ours and the peers beside "
                    f"it, and {free / 2**30:.1f} are free. Choose a smaller --size."
                )


# --- what is measured -------------------------------------------------------------------------------------------------


def _versus(name: str, ours: Times, peer: str, theirs: Times, goal: float | None) -> Row:
    cpu = theirs.cpu_median / ours.cpu_median if ours.cpu_median else None  # too short for the clock of some systems
    return Row(name, ours.median, peer, theirs.median, "s", theirs.median / ours.median, goal, cpu)


def _answer(transformer: Any, size: Size) -> torch.Tensor:
    """What one adapted layer makes of fixed numbers, (16, width) float32: shows whether an adapter acts, and how."""
    layer = transformer.get_submodule(attention(size)[-1])
    width = size.config["num_attention_heads"] * size.config.get("attention_head_dim", 64)
    x = torch.randn(16, width, generator=torch.Generator().manual_seed(0))
    parameter = next(transformer.parameters())
    with torch.no_grad():
        return layer(x.to(parameter)).float().cpu()


def _agree(what: str, plain: torch.Tensor, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """A race in which one side does not do the work says nothing."""
    effect, apart = (ours - plain).norm(), (ours - theirs).norm()
    if not (effect > 0 and apart <= 0.1 * effect):
        raise CogLoomError(
            f"{what}: the adapters change a layer's output by {effect:.3g} here, and the peer's is {apart:.3g} away "
            "from that. The two do not do the same thing, so their times cannot be compared."
        )


def memory(bench: Bench) -> Iterator[Row]:
    """First of all, before an allocator could have kept anything from earlier swaps."""
    stack, ours = bench.stack(4), bench.ours
    with growth(bench.device) as mine:
        ours.fused(stack)
    ours.off()
    with bench.another() as transformer:
        patched = Patched(transformer)
        with growth(bench.device) as theirs:
            patched.patch(stack)
    yield _memory_row("extra memory, fused, 4 adapters", mine, "ComfyUI-style patch with backup", theirs, 64)


def _memory_row(name: str, mine: Growth, peer: str, theirs: Growth, limit: float) -> Row:
    value = mine.bytes / MIB
    # A page is the least there is to measure.
    return Row(name, value, peer, theirs.bytes / MIB, "MiB", limit / max(value, 4096 / MIB), 1.0)


def fused(bench: Bench) -> Iterator[Row]:
    ours, device = bench.ours, bench.device
    with bench.another() as first, bench.another() as second:
        peft, patched = Peft(first), Patched(second)
        plain = _answer(ours.transformer, bench.size)
        names = peft.load(bench.files(bench.size.ranks[0], 4))
        peft.set(names, WEIGHTS)
        for count, said in ((1, "1 adapter"), (4, "4 adapters")):
            stack = bench.stack(count)
            floor = Floor(second, stack)

            def swap(_: int, stack: Any = stack) -> None:
                ours.fused(stack)
                ours.off()

            def fuse_and_unfuse(_: int, chosen: list[str] = names[:count]) -> None:
                peft.fuse(chosen)
                peft.unfuse()

            def patch_and_restore(_: int, stack: Any = stack) -> None:
                patched.patch(stack)
                patched.restore()

            ours.fused(stack)
            mine = _answer(ours.transformer, bench.size)
            ours.off()
            peft.fuse(names[:count])
            _agree(f"fuse_lora, {said}", plain, mine, _answer(first, bench.size))
            peft.unfuse()
            patched.patch(stack)
            _agree(f"patch with backup, {said}", plain, mine, _answer(second, bench.size))
            patched.restore()
            times = race(
                [
                    Contestant("ours", swap),
                    Contestant("peft", fuse_and_unfuse),
                    Contestant("patched", patch_and_restore),
                    Contestant("apply", lambda _, stack=stack: ours.fused(stack), after=lambda _: ours.off()),
                    Contestant("floor", lambda _, floor=floor: floor.run()),
                ],
                bench.repeat,
                device,
            )
            name = f"fused swap with exact restore, {said}"
            yield _versus(f"{name}, vs fuse + unfuse", times["ours"], "PEFT fuse_lora + unfuse_lora", times["peft"], 6)
            yield _versus(
                f"{name}, vs patch + restore", times["ours"], "ComfyUI-style patch + restore", times["patched"], 3.5
            )
            yield _versus(
                f"fused swap, {said}, share of the floor", times["apply"], "GEMM + memcpy", times["floor"], 0.85
            )


def stacked(bench: Bench) -> Iterator[Row]:
    ours = bench.ours
    low, high = bench.size.ranks
    with bench.another() as first, bench.another() as second:
        plain = _answer(ours.transformer, bench.size)
        peft, hotswap = Peft(first), Hotswap(second, bench.files(low, 1)[0], high)
        peft.set(peft.load(bench.files(low, 1)), [1.0])
        for rank in (low, high):
            files = bench.files(rank, 2)
            ready = [lora_file.read(file) for file in files]
            ours.stacked([(ready[0], 1.0)])
            mine = _answer(ours.transformer, bench.size)
            peft.replace(files[:1], [1.0])
            _agree(f"delete + load + set, r{rank}", plain, mine, _answer(first, bench.size))
            hotswap.replace(files[0])
            _agree(f"hotswap, r{rank}", plain, mine, _answer(second, bench.size))

            def from_file(n: int, files: Any = files) -> None:
                ours.stacked([(lora_file.read(files[n % 2]), 1.0)])

            def in_ram(n: int, ready: Any = ready) -> None:
                ours.stacked([(ready[n % 2], 1.0)])

            def other(n: int, in_ram: Any = in_ram) -> None:
                in_ram(n + 1)

            # All take turns between two files, so that nothing but the page cache is warm.
            times = race(
                [
                    Contestant("file", from_file, before=other),
                    Contestant("peft", lambda n, files=files: peft.replace([files[n % 2]], [1.0])),
                    Contestant("hotswap", lambda n, files=files: hotswap.replace(files[n % 2])),
                    Contestant("ram", in_ram, before=other),
                ],
                SHORT * bench.repeat,
                bench.device,
            )
            new, both = f"new adapter r{rank} from its file, stacked", "PEFT delete + load + set"
            yield _versus(f"{new}, vs delete + load + set", times["file"], both, times["peft"], 10)
            yield _versus(f"{new}, vs hotswap", times["file"], f"diffusers hotswap to rank {high}", times["hotswap"], 3)
            yield _versus(f"adapter r{rank} in RAM, stacked", times["ram"], both, times["peft"], 30)
    ours.off()


def weights(bench: Bench) -> Iterator[Row]:
    ours, rng = bench.ours, random.Random(0)
    drawn = [[rng.uniform(0.1, 1.5) for _ in WEIGHTS] for _ in range(97)]
    with bench.another() as transformer:
        plain = _answer(ours.transformer, bench.size)
        peft = Peft(transformer)
        names = peft.load(bench.files(bench.size.ranks[0], 4))

        def slide(n: int) -> None:
            ours.stacked(list(zip(bench.four, drawn[n % len(drawn)], strict=True)))

        def set_adapters(n: int) -> None:
            peft.set(names, drawn[n % len(drawn)])

        for n in (0, 1):
            slide(n)
            set_adapters(n)
            _agree("set_adapters", plain, _answer(ours.transformer, bench.size), _answer(transformer, bench.size))
        times = race(
            [Contestant("ours", slide, inner=WEIGHT_CALLS), Contestant("peft", set_adapters, inner=WEIGHT_CALLS)],
            bench.repeat,
            bench.device,
        )
        yield _versus("four new weights, stacked", times["ours"], "PEFT set_adapters", times["peft"], 500)
    ours.off()


def reloading(bench: Bench) -> Iterator[Row]:
    ours, device = bench.ours, bench.device
    folder, files = ours.folder, bench.files(bench.size.ranks[0], 2)
    held: list[Any] = []

    def whole(n: int) -> None:
        bench.reloads += 1
        held.append(reload(folder, files[n % 2], device))
        touch(held[-1])

    def free(_: int) -> None:
        held.clear()
        gc.collect()

    def alone(_: int) -> None:
        held.append(load(folder, device))
        touch(held[-1])

    def fuse(n: int) -> None:
        ours.fused([(lora_file.read(files[n % 2]), 1.0)])

    def stack(n: int) -> None:
        ours.stacked([(lora_file.read(files[n % 2]), 1.0)])

    times = race(
        [
            # From one adapter to another, held in the same way.
            Contestant("fused", fuse, before=lambda n: fuse(n + 1)),
            Contestant("stacked", stack, before=lambda n: stack(n + 1)),
            Contestant("reload", whole, after=free),
            Contestant("load", alone, after=free),
        ],
        bench.repeat,
        device,
    )
    ours.off()
    rank = bench.size.ranks[0]
    yield _versus(
        f"new adapter r{rank} from its file, fused, vs reload with it", times["fused"],
        "from_pretrained + load + fuse", times["reload"], None,
    )  # fmt: skip
    yield _versus(
        f"new adapter r{rank} from its file, stacked, vs the load alone", times["stacked"],
        "from_pretrained in bf16, pages touched", times["load"], None,
    )  # fmt: skip


def overhead(bench: Bench) -> Iterator[Row]:
    """Of one forward. On a CPU with one block, because all do the same and thirty would take minutes."""
    size = bench.size if bench.device.type == "cuda" else bench.size.cut(1)
    rank, device = bench.size.ranks[0], bench.device
    files = bench.materials.adapters(size, rank, 8)
    eight = [(lora_file.read(file), 1.0) for file in files]
    ours, fed = Subject(bench.materials.base(size), device), inputs(size, device)
    with bench.another(size) as plain, bench.another(size) as other:
        peft = Peft(other)
        names = peft.load(files)

        def forward(transformer: Any) -> Callable[[int], object]:
            def act(_: int) -> torch.Tensor:
                with torch.no_grad():
                    return transformer(**fed)[0]

            return act

        # A forward of 5 s differs by 5 % from itself here, and 1 % is to be seen: so its time in the adapted layers is
        # compared, all else being the same code for everyone. A GPU would have to be waited for at each of them.
        watches = {
            id(model): Stopwatch(model.get_submodule(path) for path in attention(size))
            for model in (plain, ours.transformer, other)
            if device.type == "cpu"
        }

        def contestant(name: str, transformer: Any, state: Callable[[], object] | None = None) -> Contestant:
            before, watch = (lambda _: state() if state else None), watches.get(id(transformer))
            return Contestant(name, forward(transformer), before=before, part=watch)

        times = race(
            [
                contestant("plain", plain),
                contestant("fused 4", ours.transformer, lambda: ours.fused(eight[:4])),
                contestant("stacked 4", ours.transformer, lambda: ours.stacked(eight[:4])),
                contestant("peft 4", other, lambda: peft.set(names[:4], [1.0] * 4)),
                contestant("stacked 8", ours.transformer, lambda: ours.stacked(eight)),
                contestant("peft 8", other, lambda: peft.set(names, [1.0] * 8)),
            ],
            bench.repeat,
            device,
        )

    def extra(name: str) -> tuple[float, float]:
        """Per cent of a plain forward, in wall and in CPU time: the median over rounds, each against its own plain
        one."""
        mine, base = times[name], times["plain"]
        wholes = zip(*base.whole, strict=True)
        wall, cpu = (
            100 * statistics.median((a - b) / max(whole, 1e-9) for a, b, whole in zip(*of, strict=True))
            for of in zip((mine.wall, mine.cpu), (base.wall, base.cpu), wholes, strict=True)
        )
        return wall, cpu

    def row(count: int, said: str, mine: str, limit: float | None, goal: float) -> Row:
        ours_, peer = extra(mine), extra(f"peft {count}")
        ratio, cpu = (
            max(theirs if limit is None else limit, LEAST) / max(own, LEAST)
            for own, theirs in zip(ours_, peer, strict=True)
        )
        name = f"overhead per step at {size.tokens:,} tokens, {count} adapters r{rank}, {said}"
        return Row(name, ours_[0], "PEFT", peer[0], "%", ratio, goal, cpu if device.type == "cpu" else None)

    allowed = 100 * _share(ours.transformer, size, 4 * rank) + 2
    yield row(4, "fused (limit 1 %)", "fused 4", 1.0, 1.0)
    yield row(4, f"stacked (limit {allowed:.1f} %)", "stacked 4", allowed, 1.0)
    yield row(8, "stacked", "stacked 8", None, 1 / 0.7)


def _share(transformer: Any, size: Size, rank: int) -> float:
    """FLOPs of A and B of `rank` over those of a forward's blocks: multiplications per token and block."""
    block, config = transformer.transformer_blocks[0], transformer.config
    linears = sum(
        module.weight.numel()
        for path, module in block.named_modules()
        if isinstance(module, torch.nn.Linear) and path.startswith(("attn1.", "ff."))
    )
    # queries by keys, and their softmax by values
    products = 2 * size.tokens * config.num_attention_heads * config.attention_head_dim
    reached = (block.get_submodule(path.partition("0.")[2]) for path in attention(size.cut(1)))
    return rank * sum(sum(layer.weight.shape) for layer in reached) / (linears + products)


def _stacks(adapters: dict[int, list[Adapter]], rng: random.Random) -> Iterator[list[tuple[Adapter, float]]]:
    """One to four adapters with a total rank in the budget, of weights that may be negative; now and then none."""
    pool = [adapter for of_rank in adapters.values() for adapter in of_rank]
    while True:
        chosen = rng.sample(pool, rng.choice((0, 1, 1, 2, 2, 3, 4)))
        if sum(adapter.ranks[-1] for adapter in chosen) <= BUDGET:
            yield [(adapter, rng.uniform(-1.5, 1.5)) for adapter in chosen]


def _holds(rng: random.Random) -> Any:
    """How the next stack is held: one way, the other, or each adapter for itself."""
    return rng.choice(("fused", "stacked", lambda adapter, strengths: rng.choice(("fused", "stacked"))))


def differing_bits(transformer: Any, folder: Path) -> int:
    """Between the parameters and the checkpoint's file, read by the library and not by us."""
    from safetensors import safe_open

    stored, count = dict(transformer.named_parameters()), 0
    for file in part_files(folder):
        with safe_open(file, "pt") as source:
            for name in source.keys():  # noqa: SIM118 - it is no dict
                # PEFT puts the layer that it wraps one level deeper.
                owner, _, leaf = name.rpartition(".")
                value = stored[name] if name in stored else stored[f"{owner}.base_layer.{leaf}"]
                a, b = (t.detach().cpu().contiguous().view(torch.int16) for t in (source.get_tensor(name), value))
                count += _ones(a ^ b)
    return count


def _ones(bits: torch.Tensor) -> int:
    changed = bits[bits != 0]  # nearly always none, and then there is nothing to count
    return sum(int(((changed >> place) & 1).sum()) for place in range(16))


def drift(bench: Bench) -> Iterator[Row]:
    """With two blocks: a swap's arithmetic is each layer's own. What the whole base went through is looked at last."""
    size, rng = bench.size.cut(2), random.Random(0)
    ours = Subject(bench.materials.base(size), bench.device)
    plain = _answer(ours.transformer, size)
    adapters = {r: [lora_file.read(f) for f in bench.materials.adapters(size, r, 2)] for r in RANKS}
    for stack in itertools.islice(_stacks(adapters, rng), bench.swaps):
        ours.switch.apply(stack, hold=_holds(rng))
    ours.off()
    bits = differing_bits(ours.transformer, ours.folder)
    bits += _ones(plain.view(torch.int32).view(torch.int16) ^ _answer(ours.transformer, size).view(torch.int16))
    with bench.another(size) as transformer:
        peft = Peft(transformer)
        names = peft.load(bench.materials.adapters(size, bench.size.ranks[0], 1))
        for _ in range(FUSE_ROUNDS):
            peft.fuse(names)
            peft.unfuse()
        theirs = differing_bits(transformer, ours.folder)
    yield Row(
        f"drift after {bench.swaps:,} random swaps, both holds mixed", bits,
        f"PEFT, {FUSE_ROUNDS} x fuse + unfuse", theirs, "bits", 1 / (1 + bits), 1.0,
    )  # fmt: skip


def compiled(bench: Bench) -> Iterator[Row]:
    """Counted in graphs that dynamo makes. They are not turned into code: that costs seconds each, and which adapters
    make a new one necessary is decided before."""
    size, device, swaps = SIZES["traced"], bench.device, min(COMPILED_SWAPS, bench.swaps)
    files = {r: bench.materials.adapters(size, r, 2) for r in RANKS}
    adapters = {r: [lora_file.read(f) for f in fs] for r, fs in files.items()}
    file_of = {id(a): f for r in RANKS for a, f in zip(adapters[r], files[r], strict=True)}
    fed, rng = inputs(size, device), random.Random(1)
    stacks = [s for s in itertools.islice(_stacks(adapters, rng), 3 * swaps) if s][:swaps]
    singles = [rng.choice(adapters[rng.choice(RANKS)]) for _ in range(swaps)]
    ours = Subject(bench.materials.base(size), device)
    ours.switch.reserve(BUDGET)
    mine = _graphs(ours.transformer, fed, [lambda s=s: ours.switch.apply(s, hold=_holds(rng)) for s in stacks])
    alone = _graphs(ours.transformer, fed, [lambda a=a: ours.stacked([(a, 1.0)]) for a in singles], compile_=False)
    with bench.another(size) as transformer:
        peft = Peft(transformer)
        peft.set(peft.load([files[RANKS[0]][0]]), [1.0])
        theirs = _graphs(
            transformer,
            fed,
            [lambda s=s: peft.replace([file_of[id(a)] for a, _ in s], [w for _, w in s]) for s in stacks],
        )
    with bench.another(size) as transformer:
        hotswap = Hotswap(transformer, files[RANKS[0]][0], RANKS[-1])
        swapped = _graphs(transformer, fed, [lambda a=a: hotswap.replace(file_of[id(a)]) for a in singles])
    for what, count, peer, value in (
        ("stacks", mine, "PEFT delete + load + set", theirs),
        ("single adapters", alone, f"diffusers hotswap to rank {RANKS[-1]}", swapped),
    ):
        yield Row(
            f"recompilations over {swaps} swaps of {what}, ranks {RANKS[0]}–{RANKS[-1]}",
            count, peer, value, "graphs", 1 / (1 + count), 1.0,
        )  # fmt: skip


def _graphs(transformer: Any, fed: dict[str, Any], swaps: Sequence[Callable[[], object]], compile_: bool = True) -> int:
    """How many more graphs dynamo has after a forward for each swap than after the first."""
    import torch._dynamo as dynamo
    from torch._dynamo.utils import counters

    def forward() -> int:
        with torch.no_grad():
            transformer(**fed)
        return counters["stats"]["unique_graphs"]

    # With the usual limit of 8 dynamo would give up in silence, and a peer's count would end there.
    with dynamo.config.patch(cache_size_limit=256, accumulated_cache_size_limit=4096):
        if compile_:
            dynamo.reset()
            transformer._repeated_blocks = ["CogVideoXBlock"]  # the class lists none, and diffusers then refuses
            transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
        before = after = forward()
        for swap in swaps:
            swap()
            after = forward()
    return after - before


MEASURES: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "memory": memory,  # first, see there
    "fused": fused,
    "stacked": stacked,
    "weights": weights,
    "reload": reloading,
    "overhead": overhead,
    "drift": drift,
    "compile": compiled,
}


def closing(bench: Bench) -> Iterator[Row]:
    """What the whole run did to the one base that ours was measured on."""
    if bench.started:
        ours = bench.ours
        loads = ours.loads()
        yield Row(
            "base loads over the whole run", loads, "reload for each adapter", bench.reloads or None, "loads",
            1 / loads, 1.0,
        )  # fmt: skip
        bits = differing_bits(ours.transformer, ours.folder)
        yield Row("drift of the base over the whole run", bits, "none", None, "bits", 1 / (1 + bits), 1.0)


# --- the run ----------------------------------------------------------------------------------------------------------


def run(settings: Settings, materials: Materials, only: Sequence[str], note: Callable[[str], None]) -> list[Row]:
    bench, rows, started = Bench(settings, materials), [], time.perf_counter()
    chosen = [(name, measure) for name, measure in MEASURES.items() if not only or name in only]
    for name, measure in (*chosen, ("the base at the end", closing)):
        note(f"{time.perf_counter() - started:6.1f} s  {name} …")
        for row in measure(bench):
            note(f"          {_line(row)}")
            rows.append(row)
    note(f"{time.perf_counter() - started:6.1f} s  done")
    return rows


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Log lines and progress bars cost the peers time that is not theirs."""
    from diffusers.utils import logging as diffusers_logging

    bars, level = diffusers_logging.is_progress_bar_enabled(), logging.root.manager.disable
    try:
        logging.disable(logging.CRITICAL)
        diffusers_logging.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        if bars:
            diffusers_logging.enable_progress_bar()


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return "–"
    if unit != "s":
        return f"{value:,.0f} {unit}" if unit in ("bits", "graphs", "loads") else f"{value:,.1f} {unit}"
    scale, name = next(((s, n) for s, n in ((1, "s"), (1e-3, "ms")) if value >= s), (1e-6, "µs"))
    return f"{value / scale:.3g} {name}"


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name, _number(row.ours, row.unit), row.peer, _number(row.peer_value, row.unit), f"{row.ratio:,.3g}",
        "–" if row.cpu_ratio is None else f"{row.cpu_ratio:,.3g}",
        "–" if row.goal is None else f"{row.goal:,.3g}", "" if row.met else "missed",
    )  # fmt: skip


def _line(row: Row) -> str:
    name, ours, peer, theirs, ratio, cpu, goal, missed = _cells(row)
    return f"{name}: {ours}, {peer} {theirs}; ratio {ratio} ({cpu} in CPU time), goal {goal} {missed}".rstrip()


def table(rows: Sequence[Row], markdown: bool) -> str:
    head = ("what", "ours", "peer", "its", "ratio", "CPU time", "goal", "")
    lines = [head, *(_cells(row) for row in rows)]
    if markdown:
        lines.insert(1, ("---", "--:", "---", "--:", "--:", "--:", "--:", "---"))
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    widths = [max(len(cells[n]) for cells in lines) for n in range(len(head))]
    sides = "<><>>>><"
    return "\n".join(
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(cells, sides, widths, strict=True)).rstrip()
        for cells in lines
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--size", choices=("tiny", "2b", "5b"), default="2b", help="architecture (default: %(default)s)"
    )
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="of the CPU (default: 1 on a CPU, as many as there are with a GPU)")
    parser.add_argument("--repeat", type=int, default=5, help="rounds that are counted (default: %(default)s)")
    parser.add_argument("--swaps", type=int, default=1000, help="of the drift measurement (default: %(default)s)")
    parser.add_argument("--only", action="append", choices=tuple(MEASURES), help="may be given again and again")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="keep bases and adapters for the next run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    args = parser.parse_args(arguments)
    threads = torch.get_num_threads()
    try:
        for name in ("repeat", "swaps", "threads"):
            value = getattr(args, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name} {value}: needs at least 1.")
        # `auto` never means a Mac's GPU here: neither memory nor time is measured on it.
        wanted = "cuda" if args.device == "auto" and torch.cuda.is_available() else args.device
        device = torch.device(choose_device("cpu" if wanted == "auto" else wanted))
        if args.threads or device.type == "cpu":
            torch.set_num_threads(args.threads or 1)
        settings = Settings(SIZES[args.size], device, args.repeat, args.swaps)
        with quiet(), kept_in(args.cache, device) as materials:
            _import()

            facts = [f"size: {args.size}, {args.repeat} rounds, medians of wall time", *machine(device)]
            for fact in facts:
                _note(fact)
            rows = run(settings, materials, args.only or (), _note)
    except CogLoomError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    finally:
        torch.set_num_threads(threads)
        gc.unfreeze()
    mark = "- " if args.markdown else ""
    print("\n".join(f"{mark}{fact}" for fact in facts), table(rows, args.markdown), sep="\n\n")
    if args.json:
        write_atomic(args.json, json.dumps([row.to_json() for row in rows], indent=1, ensure_ascii=False).encode())
    return 0


def _import() -> None:
    """What diffusers would import within the first measurements. What all this made is then left out when garbage is
    collected between them, which takes longer than what is measured."""
    import diffusers.models.transformers.cogvideox_transformer_3d  # noqa: F401
    import peft  # noqa: F401
    import torch._dynamo  # noqa: F401

    gc.collect()
    gc.freeze()


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""Hundreds of broken and hostile files: each is refused at once and in a sentence, and leaves everything as it was."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import torch

from nodes.engine.errors import AdapterMismatch, CogLoomError
from nodes.engine.lora_file import adapter_name, find_adapters, stamp
from nodes.engine.lora_index import Index
from nodes.engine.lora_stack import Entry, LoraStack
from nodes.engine.pipeline import Base, Resident, bases
from nodes.host import LocalHost
from nodes.lora import read_stack, stack_loras
from nodes.model import choose_base
from tests import tiny

from . import hostile
from .hostile import BASE, CHANCE, HEADER, SUM, VALUES, Bad

REFUSED = 300  # that many at the least
SECONDS = 1.0  # of processor time, all threads together: a busy machine takes longer and is no slower
CHARACTERS = 600  # of a message
OFTEN = 25  # files, after which base and output are looked at again
LARGE = 1 << 20  # bytes
PASSES = 3
# What so many passes may leave behind in bytes, which is the allocator's own doing: a little, and more where each file
# makes it hold a hundred millions of bytes for a moment.
FLAT, FLAT_WHEN_LARGE = 4 << 20, 32 << 20


class Made(NamedTuple):
    bad: Bad
    path: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Made]]:
    """All of them in one folder: the first 50 of every sort that there is."""
    root = tmp_path_factory.mktemp("hostile")
    yield [Made(bad, bad.put(root)) for bad in (*hostile.hand_made(), *hostile.fuzzed(8))]
    shutil.rmtree(root, ignore_errors=True)  # 250 MB


@dataclass
class Holding:
    """A resident base that holds a good stack, on which others are to be put."""

    host: LocalHost
    base: Base
    stack: LoraStack
    resident: Resident
    names: tuple[tuple[str, float], ...]
    output: torch.Tensor

    def put(self, path: Path) -> None:
        """On top of the good stack, as a render would, and reading ahead as a face would."""
        if path.is_file():
            wanted = stack_loras(self.host, [str(path)], self.stack, anywhere=True)
        else:  # a workflow that was saved when it was one
            wanted = self.stack.with_entry(Entry(str(path), path.stem, stamp=stamp(path)))
        self._hold(wanted)

    def put_again(self, path: Path) -> None:
        """In this thread alone, so that memory can be told."""
        self._hold(self.stack.with_entry(Entry(str(path), path.stem, stamp=stamp(path))))

    def back(self) -> None:
        self._hold(self.stack)

    def _hold(self, wanted: LoraStack) -> None:
        with bases.session(self.base, read_stack(wanted)):
            pass

    def same_to_the_bit(self) -> bool:
        return self.resident.switch.verify().ok and torch.equal(seen(self.resident), self.output)


def seen(resident: Resident) -> torch.Tensor:
    """What the transformer computes just now."""
    kind = resident.dtype
    with torch.no_grad():
        return resident.transformer(
            hidden_states=torch.randn(1, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(kind),
            encoder_hidden_states=torch.zeros(1, 24, 64, dtype=kind),
            timestep=torch.tensor([500]),
            image_rotary_emb=(torch.ones(48, 32), torch.zeros(48, 32)),
            return_dict=False,
        )[0]


@pytest.fixture
def holding(tiny_host: LocalHost) -> Holding:
    base = choose_base(tiny_host, "tiny-t2v")
    with bases.session(base) as session:
        resident, off = session.resident, seen(session.resident)
    tiny.write_lora(tiny_host.lora_folders[0] / "good.safetensors", tiny.attention(resident.shapes))
    stack = stack_loras(tiny_host, ["good:0.8"])
    with bases.session(base, read_stack(stack)):
        names, output = resident.switch.names, seen(resident)
    assert names == (("good", 0.8),)
    assert not torch.equal(output, off)
    return Holding(tiny_host, base, stack, resident, names, output)


def flaws(text: str, bad: Bad, path: Path) -> list[str]:
    """What is wrong with a message, for a person at a terminal or a browser."""
    names = (path.name, adapter_name(path), *(name.replace("@", path.name) for name in bad.beside))
    checks = {
        "does not name the file": any(name in text for name in names),
        "is not one paragraph of printable text": text.isprintable() and text == text.strip(),
        "has HTML": "<" not in text,
        f"has {len(text)} characters": 30 <= len(text) <= CHARACTERS,
        f"does not say {bad.said!r}": re.search(bad.said, text, re.IGNORECASE) is not None,
    }
    return [f"the message {flaw}: {text[:300]}" for flaw, right in checks.items() if not right]


def wait_for_reading_ahead() -> None:
    for thread in threading.enumerate():
        if thread.name == "adapters ahead":
            thread.join()


def test_what_they_are_made_of_is_sound(holding: Holding, tmp_path: Path) -> None:
    for bad in hostile.sound():
        path = bad.put(tmp_path)
        holding.put(path)
        assert {*holding.resident.switch.names} == {*holding.names, (adapter_name(path), 1.0)}, bad.name
        assert holding.resident.switch.verify().ok, bad.name
        assert not torch.equal(seen(holding.resident), holding.output), bad.name
        holding.back()
        assert holding.same_to_the_bit(), bad.name


def test_a_hostile_file_is_refused_at_once_and_the_earlier_stack_stays(holding: Holding, made: list[Made]) -> None:
    switch = holding.resident.switch
    faults: list[str] = []
    refused = applied = 0
    for number, (bad, path) in enumerate(made, 1):
        started = time.process_time()
        try:
            holding.put(path)
        except CogLoomError as error:
            refused += 1
            faults += [f"{bad.name}: {flaw}" for flaw in flaws(str(error), bad, path)]
        except Exception as error:
            faults.append(f"{bad.name}: {type(error).__name__}: {error}")
        else:
            applied += 1
            right = {*switch.names} == {*holding.names, (adapter_name(path), 1.0)} and switch.verify().ok
            if bad.found != CHANCE or not right:
                faults.append(f"{bad.name}: it was put on the stack, {'wholly' if right else 'but not as it should'}")
            holding.back()
        seconds = time.process_time() - started
        if seconds > SECONDS:
            faults.append(f"{bad.name}: it took {seconds:.2f} s")
        if switch.names != holding.names or (number % OFTEN == 0 and not holding.same_to_the_bit()):
            faults.append(f"{bad.name}: it, or one of the {OFTEN} before, changed the stack that was there")
            holding.back()
        wait_for_reading_ahead()
    assert not faults, "\n".join([f"{len(faults)} faults", *faults[:40]])
    assert holding.same_to_the_bit()
    assert bases.loads == 1  # never spoiled, never loaded again
    assert refused + applied == len(made)
    assert refused >= REFUSED
    assert applied < len(made) // 10  # what a fuzzer spoilt not at all


def test_there_are_enough_of_them_and_no_two_are_alike(made: list[Made]) -> None:
    contents = [
        hashlib.sha256(path.read_bytes() + repr(bad.beside).encode()).digest()
        for bad, path in made
        if path.is_file() and os.access(path, os.R_OK)
    ]
    assert len({*contents}) == len(contents) >= REFUSED
    assert len({bad.name for bad, _ in made}) == len(made)
    assert sum(bad.name.startswith("fuzz-") for bad, _ in made) >= 150


@pytest.mark.heavy
def test_memory_is_flat(holding: Holding, made: list[Made]) -> None:
    large = {path for _, path in made if path.is_file() and path.stat().st_size >= LARGE}
    small = [path for _, path in made if path not in large]
    for paths, limit in ((small, FLAT), (sorted(large), FLAT_WHEN_LARGE)):
        total = sum(path.stat().st_size for path in paths if path.is_file())
        assert PASSES * total > limit  # else it would not show if they were kept
        _pass(holding, paths)
        before = _memory()
        for _ in range(PASSES):
            _pass(holding, paths)
        grown = [now - then for now, then in zip(_memory(), before, strict=True)]
        assert grown[0] <= limit, f"{len(paths)} files, {PASSES} times: {grown[0] / 1e6:.1f} MB more"
        assert grown[1] < PASSES * len(paths), f"{len(paths)} files, {PASSES} times: {grown[1]} blocks more"


def _pass(holding: Holding, paths: Sequence[Path]) -> None:
    for path in paths:
        try:
            holding.put_again(path)
        except CogLoomError:
            continue
    holding.back()


def _memory() -> tuple[int, int]:
    """(bytes resident, blocks that Python has allocated)"""
    gc.collect()
    blocks = sys.getallocatedblocks()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:  # glibc keeps what was freed, unless it is told not to
        trim(0)
    return psutil.Process().memory_info().rss, blocks


def test_a_folder_of_them_is_listed_with_the_reason_of_each(made: list[Made], tmp_path: Path) -> None:
    paths = [path for _, path in made]
    assert {*find_adapters([paths[0].parent])} >= {path for path in paths if path.is_file()}
    rows = Index(tmp_path).rows(paths)
    faults: list[str] = []
    for (bad, path), row in zip(made, rows, strict=True):
        assert row.path == path
        if (row.about is None) == (row.error is None):
            faults.append(f"{bad.name}: both or neither are told")
        elif row.error is not None:
            faults += [f"{bad.name}: {flaw}" for flaw in flaws(row.error, bad, path)]
            if bad.found in (VALUES, BASE, SUM):  # the header is in order, and nothing else was looked at
                faults.append(f"{bad.name}: {row.error}")
        elif bad.found == HEADER or len(json.dumps(row.about)) < 100:
            faults.append(f"{bad.name}: it is listed as an adapter")
    assert not faults, "\n".join([f"{len(faults)} faults", *faults[:40]])
    assert Index(tmp_path).rows(paths) == rows  # from the cache, mostly
    assert sum(row.error is not None for row in rows) >= REFUSED


def test_another_generation_embeds_in_another_form(tiny_host: LocalHost, tmp_path: Path) -> None:
    """The first embeds patches with a convolution, 1.5 with a linear layer."""
    tensors = {"transformer.patch_embed.proj.diff": hostile.numbers(64, 4, 2, 2)}
    path = Bad("other", hostile.file(tensors)).put(tmp_path)
    stack = stack_loras(tiny_host, [str(path)], anywhere=True)
    with bases.session(choose_base(tiny_host, "tiny-t2v"), read_stack(stack)) as session:
        assert session.resident.switch.names == (("other", 1.0),)
    with (
        pytest.raises(AdapterMismatch, match=r"^other\.safetensors: 0 of 1 tensors fit tiny-1\.5 .*patch_embed\.proj"),
        bases.session(choose_base(tiny_host, "tiny-1.5"), read_stack(stack)),
    ):
        pass
    assert [resident.switch.names for resident in bases.resident()] == [(("other", 1.0),), ()]

"""Adapters in memory: never more than the limit, never twice, and reading ahead that stays out of the way."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nodes.engine import lora_cache, lora_file
from nodes.engine.errors import AdapterNotFound, AdapterUnreadable
from nodes.engine.lora_cache import AdapterCache
from nodes.engine.lora_file import Adapter
from nodes.engine.lora_index import write_sidecar

ROOT = Path(__file__).resolve().parents[2]
Q = "transformer_blocks.0.attn1.to_q"


def adapter(path: Path, rank: int = 4, seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, 64, generator=generator), torch.randn(64, rank, generator=generator)
    return lora_file.write(path, {Q: (a, b)}, rank, {})


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return [adapter(tmp_path / f"{number:02}.safetensors", seed=number) for number in range(20)]


@pytest.fixture
def size(paths: list[Path]) -> int:
    """Bytes of memory that one of `paths` takes."""
    return lora_file.read(paths[0]).nbytes


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files read, in order; they are really read."""
    seen: list[str] = []
    read = lora_file.read

    def counted(path: Path) -> Adapter:
        seen.append(Path(path).stem)
        return read(path)

    monkeypatch.setattr(lora_cache.lora_file, "read", counted)
    return seen


def arrived() -> None:
    """When what is read ahead is there."""
    for thread in threading.enumerate():
        if thread.name == "adapters ahead":
            thread.join()


def at_once(count: int, what: Callable[[], object]) -> list[object]:
    """What each of `count` threads got, or raised."""
    gate, results = threading.Barrier(count), []

    def work() -> None:
        gate.wait()
        try:
            results.append(what())
        except Exception as error:
            results.append(error)

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


# --- what is held -----------------------------------------------------------------------------------------------------


def test_memory_stays_flat(paths: list[Path], size: int) -> None:
    cache, chosen, born = AdapterCache(5 * size + 100), random.Random(0), []
    for _ in range(200):
        path = chosen.choice(paths)
        got = cache.get(path)
        assert got.name == path.stem
        if not any(ref() is got for ref in born):
            born.append(weakref.ref(got))
        del got
        assert cache.held_bytes <= cache.limit_bytes
    gc.collect()
    living = [ref() for ref in born if ref() is not None]
    assert len(born) > 50
    assert len(living) == 5
    assert cache.held_bytes == sum(held.nbytes for held in living if held) == 5 * size


def test_the_least_recently_used_goes_first(paths: list[Path], size: int, reads: list[str]) -> None:
    cache = AdapterCache(2 * size)
    for number in (0, 1, 0, 2, 0, 1):
        cache.get(paths[number])
    assert reads == ["00", "01", "02", "01"]


def test_one_larger_than_the_limit_is_lent_and_drives_nothing_out(
    tmp_path: Path, paths: list[Path], size: int, reads: list[str]
) -> None:
    large, cache = adapter(tmp_path / "large.safetensors", rank=64), AdapterCache(2 * size)
    cache.get(paths[0]), cache.get(paths[1])
    assert cache.get(large).ranks == (64,)
    assert cache.held_bytes == 2 * size
    cache.get(paths[0]), cache.get(paths[1])
    gc.collect()
    cache.get(large)
    assert reads == ["00", "01", "large", "large"]


def test_there_is_never_a_second_copy(paths: list[Path], size: int, reads: list[str]) -> None:
    cache = AdapterCache(size)
    first = cache.get(paths[0])
    cache.get(paths[1])
    assert cache.get(paths[0]) is first  # let go, but in use
    cache.clear()
    assert cache.held_bytes == 0
    assert cache.get(paths[0].parent / "." / paths[0].name) is first
    assert reads == ["00", "01"]


def test_an_edited_file_or_sidecar_takes_the_place_of_the_old(paths: list[Path], size: int) -> None:
    cache = AdapterCache(5 * size)
    old = cache.get(paths[0])
    write_sidecar(paths[0], scale=0.25)
    settled = cache.get(paths[0])
    assert (old.modules[0].strength, settled.modules[0].strength) == (1, 0.25)
    adapter(paths[0], seed=99)
    os.utime(paths[0], ns=(0, 1))
    assert cache.get(paths[0]).sha256 != old.sha256
    assert cache.held_bytes == size


def test_a_lower_limit_holds_from_the_next_reading_on(paths: list[Path], size: int) -> None:
    cache = AdapterCache(5 * size)
    for path in paths[:5]:
        cache.get(path)
    cache.limit_bytes = 2 * size
    cache.get(paths[5])
    assert cache.held_bytes == 2 * size
    cache.limit_bytes = size - 1
    cache.get(paths[5])
    assert cache.held_bytes == 0


def test_room_is_made_before_the_reading(paths: list[Path], size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, during, read = AdapterCache(2 * size), [], lora_file.read

    def watched(path: Path) -> Adapter:
        during.append(cache.held_bytes)
        return read(path)

    monkeypatch.setattr(lora_cache.lora_file, "read", watched)
    for path in paths[:4]:
        cache.get(path)
    assert max(during) <= cache.limit_bytes - size


# --- several at once --------------------------------------------------------------------------------------------------


def test_threads_that_want_the_same_share_one_reading(paths: list[Path], size: int, reads: list[str]) -> None:
    for limit in (5 * size, 0):  # also of one that is not kept, as long as somebody holds it
        cache = AdapterCache(limit)
        reads.clear()
        got = at_once(8, lambda cache=cache: cache.get(paths[0]))
        assert len({id(one) for one in got}) == 1
        assert isinstance(got[0], Adapter)
        assert reads == ["00"]


def test_an_error_reaches_all_who_wait_and_is_not_kept(paths: list[Path], size: int) -> None:
    whole, cache = paths[0].read_bytes(), AdapterCache(5 * size)
    paths[0].write_bytes(whole[:-1])
    assert all(isinstance(one, AdapterUnreadable) for one in at_once(4, lambda: cache.get(paths[0])))
    paths[0].write_bytes(whole)
    os.utime(paths[0], ns=(0, 1))
    assert cache.get(paths[0]).name == "00"
    paths[0].unlink()
    with pytest.raises(AdapterNotFound, match="not there any more"):
        cache.get(paths[0])


def test_a_reading_that_is_stopped_leaves_nobody_waiting(
    paths: list[Path], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, read, second = AdapterCache(5 * size), lora_file.read, []

    def stopped(path: Path) -> Adapter:
        monkeypatch.setattr(lora_cache.lora_file, "read", read)
        waiter = threading.Thread(target=lambda: second.append(cache.get(paths[0])))
        waiter.start()
        threads.append(waiter)
        raise KeyboardInterrupt

    threads: list[threading.Thread] = []
    monkeypatch.setattr(lora_cache.lora_file, "read", stopped)
    with pytest.raises(KeyboardInterrupt):
        cache.get(paths[0])
    threads[0].join()
    assert second == [cache.get(paths[0])]


# --- reading ahead ----------------------------------------------------------------------------------------------------


def test_what_was_read_ahead_is_there(paths: list[Path], size: int, reads: list[str]) -> None:
    cache = AdapterCache(5 * size)
    cache.get(paths[0])
    cache.prefetch(paths[:3])
    arrived()
    assert sorted(reads) == ["00", "01", "02"]
    assert cache.held_bytes == 3 * size
    for path in paths[:3]:
        cache.get(path)
    assert len(reads) == 3


def test_more_than_fits_is_not_begun(paths: list[Path], size: int, reads: list[str]) -> None:
    cache = AdapterCache(2 * size)
    cache.prefetch(paths[:3])
    arrived()
    assert (reads, cache.held_bytes) == ([], 0)


def test_what_was_read_ahead_is_not_driven_out_by_its_like(paths: list[Path], size: int, reads: list[str]) -> None:
    cache = AdapterCache(5 * size)
    cache.prefetch(paths[:3])
    arrived()
    cache.prefetch(paths[3:6])
    arrived()
    assert sorted(reads) == ["00", "01", "02"]
    for path in paths[:3]:  # used now, so they may go
        cache.get(path)
    cache.prefetch(paths[3:6])
    arrived()
    assert sorted(reads) == ["00", "01", "02", "03", "04", "05"]
    assert cache.held_bytes == 5 * size


def test_what_is_wanted_and_there_makes_way_for_nothing(paths: list[Path], size: int, reads: list[str]) -> None:
    cache = AdapterCache(3 * size)
    for path in paths[:3]:
        cache.get(path)
    cache.prefetch([paths[0], paths[3]])
    arrived()
    cache.get(paths[0])
    assert reads == ["00", "01", "02", "03"]


def test_a_file_that_cannot_be_read_is_passed_over(
    tmp_path: Path, paths: list[Path], size: int, reads: list[str]
) -> None:
    paths[0].write_bytes(b"nothing much")
    cache = AdapterCache(5 * size)
    cache.prefetch([tmp_path / "nowhere.safetensors", paths[0], paths[1]])
    arrived()
    assert reads == ["00", "01"]
    with pytest.raises(AdapterUnreadable, match=r"00\.safetensors"):
        cache.get(paths[0])
    cache.get(paths[1])
    assert reads == ["00", "01", "00"]


def test_one_thread_reads_ahead_for_all(paths: list[Path], size: int, reads: list[str], monkeypatch) -> None:
    cache, gate, read, most = AdapterCache(20 * size), threading.Event(), lora_cache.lora_file.read, []

    def held_up(path: Path) -> Adapter:
        gate.wait()
        most.append(sum(thread.name == "adapters ahead" for thread in threading.enumerate()))
        return read(path)

    monkeypatch.setattr(lora_cache.lora_file, "read", held_up)
    for path in paths:
        cache.prefetch([path])
    gate.set()
    arrived()
    assert most == [1] * 20
    assert sorted(reads) == [path.stem for path in paths]


def test_the_program_ends_while_files_are_read_ahead(tmp_path: Path) -> None:
    """Neither kept alive by the files still to come nor taken down by a thread that was ended by force."""
    files = [adapter(tmp_path / f"{number}.safetensors", rank=64) for number in range(60)]
    code = (
        "import sys, threading; from pathlib import Path\n"
        "from nodes.engine import lora_file; from nodes.engine.lora_cache import AdapterCache\n"
        "read, done, begun = lora_file.read, [], threading.Event()\n"
        "def counted(path):\n"
        "    done.append(path)\n"
        "    print(len(done), flush=True)\n"
        "    begun.set()\n"
        "    sys.stdin.readline() if len(done) == 1 else None\n"
        "    adapter = read(path)\n"
        "    print('read', flush=True)\n"
        "    return adapter\n"
        "lora_file.read = counted\n"
        "AdapterCache(1 << 30).prefetch([Path(a) for a in sys.argv[1:]])\n"
        "begun.wait()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, *map(str, files)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "1\n"
        out, errors = process.communicate("go\n")
    assert process.returncode == 0, errors
    assert errors == ""
    assert out.startswith("read\n")  # the one that was begun was waited for
    assert out.count("read") < len(files)

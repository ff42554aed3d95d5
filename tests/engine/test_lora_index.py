"""The list of adapters: opened once, believed as long as nothing changed, and never in the way of a listing."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nodes.engine import lora_file, lora_index
from nodes.engine.errors import AdapterNotFound, AdapterUnreadable, CogLoomError, UsageError
from nodes.engine.lora_index import Index, scale_from, settle, write_sidecar

Q = "transformer_blocks.0.attn1.to_q"
MATRICES = {f"transformer.{Q}.lora_A.weight": torch.ones(2, 8), f"transformer.{Q}.lora_B.weight": torch.ones(8, 2)}


def adapter(path: Path, alpha: float = 2, metadata: dict[str, str] | None = None, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 8, generator=generator), torch.randn(8, 2, generator=generator)
    return lora_file.write(path, {Q: (a, b)}, alpha, metadata or {})


def bare(path: Path) -> Path:
    """An adapter that does not say its alpha."""
    save_file(MATRICES, path)
    return path


def spoil(path: Path) -> None:
    """Other bytes, the same size and time: who still describes it did not open it."""
    status = path.stat()
    path.write_bytes(b"\xff" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def later(path: Path) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1_000_000_000))


# --- listing ----------------------------------------------------------------------------------------------------------


def test_a_thousand_files_are_opened_once(tmp_path: Path) -> None:
    data = adapter(tmp_path / "loras" / "0.safetensors").read_bytes()
    paths = [tmp_path / "loras" / f"{number}.safetensors" for number in range(1000)]
    for path in paths[1:]:
        path.write_bytes(data)
    cold = Index(tmp_path / "cache").rows(paths)
    assert [row.path for row in cold] == paths
    assert all(row.about is not None and row.about["name"] == row.path.stem for row in cold)
    for path in paths:
        spoil(path)
    index = Index(tmp_path / "cache")
    assert index.rows(paths) == cold
    later(paths[7])
    touched = index.rows(paths)
    assert touched[7].about is None
    assert "7.safetensors" in str(touched[7].error)
    assert [row for row in touched if row.path != paths[7]] == [row for row in cold if row.path != paths[7]]


def test_a_row_is_what_inspect_tells_but_for_long_metadata(tmp_path: Path) -> None:
    metadata = {"modelspec.title": "Neon", "modelspec.thumbnail": "x" * 100_000}
    path = adapter(tmp_path / "x.safetensors", metadata=metadata)
    told, index = lora_file.inspect(path), Index(tmp_path / "cache")
    row = index.rows([path])[0].about
    assert row is not None
    assert set(row["metadata"]) == set(told["metadata"]) - {"modelspec.thumbnail"}
    assert {**row, "metadata": None} == {**told, "metadata": None}
    assert index.about(path) == {**told, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def test_what_stands_beside_a_file_is_seen(tmp_path: Path) -> None:
    path, index = bare(tmp_path / "a.safetensors"), Index(tmp_path / "cache")

    def scale() -> float:
        about = index.rows([path])[0].about
        assert about is not None
        return about["scale"]

    assert scale() == 1
    write_sidecar(path, scale=0.5)
    assert scale() == 0.5
    write_sidecar(path, scale="auto")
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 8}')
    assert scale() == 4
    bare(tmp_path / "b.safetensors")  # now the config is no longer surely that of `a`
    assert scale() == 1


def test_broken_files_have_their_reason_and_are_not_opened_again(tmp_path: Path) -> None:
    path, index = tmp_path / "x.safetensors", Index(tmp_path / "cache")
    path.write_bytes(b"nothing much")
    row = index.rows([path])[0]
    assert row.about is None
    assert str(row.error).startswith("x.safetensors: ")
    status = path.stat()
    whole = adapter(tmp_path / "whole.safetensors").read_bytes()
    path.write_bytes(whole[: status.st_size])  # broken in another way, which only who opens it can tell
    os.utime(path, ns=(0, status.st_mtime_ns))
    assert index.rows([path]) == [row]
    path.write_bytes(whole)
    assert index.rows([path])[0].error is None


def test_what_may_pass_is_not_kept(tmp_path: Path) -> None:
    path, index = tmp_path / "x.safetensors", Index(tmp_path / "cache")
    assert "there is no such file" in str(index.rows([path])[0].error)
    assert not (tmp_path / "cache").exists()
    assert index.rows([adapter(path)])[0].error is None
    assert (tmp_path / "cache").exists()


# --- the cache file ---------------------------------------------------------------------------------------------------

GOOD = {"format": "", "abouts": {}, "hashes": {}}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"[" * 100_000,
        json.dumps(GOOD).encode(),
        json.dumps(GOOD | {"format": "own", "abouts": []}).encode(),
        json.dumps(GOOD | {"format": "own", "abouts": {"x": [1, [1, "2"], {}, None]}}).encode(),
        json.dumps(GOOD | {"format": "own", "abouts": {"x": [1, [1, 2], None, None]}}).encode(),
        json.dumps(GOOD | {"format": "own", "abouts": {"x": 5}}).encode(),
        json.dumps(GOOD | {"format": "own", "hashes": {"x": [1, [1, 2], "short"]}}).encode(),
    ],
    ids=range(11),
)
def test_a_broken_or_foreign_cache_is_begun_anew(tmp_path: Path, content: bytes) -> None:
    path, file = adapter(tmp_path / "x.safetensors"), tmp_path / "cache" / "adapters.json"
    file.parent.mkdir()
    file.write_bytes(content.replace(b'"own"', json.dumps(lora_index._format()).encode()))
    assert Index(file.parent).rows([path])[0].error is None
    spoil(path)
    assert Index(file.parent).rows([path])[0].error is None


def test_a_cache_that_cannot_be_written_costs_the_cache_alone(tmp_path: Path) -> None:
    path = adapter(tmp_path / "x.safetensors")
    (tmp_path / "file").write_text("")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for folder in (tmp_path / "file" / "cache", None):
        index = Index(folder)
        assert index.rows([path])[0].error is None
        assert index.sha256(path) == digest
    assert (tmp_path / "file").read_text() == ""


def test_the_entries_not_seen_for_longest_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_index, "ENTRIES_CAP", 3)
    paths = [adapter(tmp_path / f"{name}.safetensors") for name in "abcde"]
    index = Index(tmp_path / "cache")
    for days, path in enumerate([*paths, paths[0]]):  # `a` is seen again at the end
        monkeypatch.setattr(time, "time", lambda days=days: 86_400.0 * 30 * days)
        index.rows([path])
    kept = json.loads((tmp_path / "cache" / "adapters.json").read_bytes())["abouts"]
    assert sorted(Path(name).stem for name in kept) == ["a", "d", "e"]


def test_writers_add_to_each_other(tmp_path: Path) -> None:
    """Two indices on one folder stand for two processes: each holds what it loaded, and neither undoes the other."""
    ours, theirs = adapter(tmp_path / "ours.safetensors"), adapter(tmp_path / "theirs.safetensors")
    one, two = Index(tmp_path / "cache"), Index(tmp_path / "cache")

    def meanwhile() -> Iterator[Path]:
        one.rows([ours])
        one.sha256(ours)
        yield theirs

    two.rows(meanwhile())
    for path in (ours, theirs):
        spoil(path)
    assert all(row.error is None for row in Index(tmp_path / "cache").rows([ours, theirs]))
    assert all(row.error is None for row in one.rows([ours, theirs]))
    assert one.sha256(ours) == Index(tmp_path / "cache").sha256(ours)


def test_what_was_just_learnt_outlasts_what_was_written_before(tmp_path: Path) -> None:
    path, other = adapter(tmp_path / "x.safetensors"), adapter(tmp_path / "other.safetensors")
    one, two = Index(tmp_path / "cache"), Index(tmp_path / "cache")
    one.rows([path]), two.rows([path])
    later(adapter(path, seed=1))

    def meanwhile() -> Iterator[Path]:
        yield path
        two.rows([other])  # written anew, with the old entry of `path` in it

    one.rows(meanwhile())
    spoil(path)
    assert Index(tmp_path / "cache").rows([path])[0].error is None


def test_many_threads_and_writers_at_once(tmp_path: Path) -> None:
    paths = [adapter(tmp_path / f"{number}.safetensors") for number in range(12)]
    indices, faults = [Index(tmp_path / "cache") for _ in range(2)], []

    def work(number: int) -> None:
        try:
            for path in paths[number:] + paths[:number]:
                assert indices[number % 2].rows([path])[0].error is None
                indices[number % 2].sha256(path)
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    lora_index._checked(json.loads((tmp_path / "cache" / "adapters.json").read_bytes()))
    assert sorted(file.name for file in (tmp_path / "cache").iterdir()) == ["adapters.json"]


# --- hashes -----------------------------------------------------------------------------------------------------------


def test_a_hash_is_computed_once(tmp_path: Path) -> None:
    path, index = adapter(tmp_path / "x.safetensors"), Index(tmp_path / "cache")
    digest = index.sha256(path)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest() == lora_file.read(path).sha256
    write_sidecar(path, notes="it is not the file that changed")
    data = path.read_bytes()
    spoil(path)
    assert index.sha256(path) == Index(tmp_path / "cache").sha256(path) == digest
    path.write_bytes(data)
    adapter(path, seed=1)
    later(path)
    assert index.sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest() != digest


def test_a_hash_of_what_is_no_adapter(tmp_path: Path) -> None:
    index = Index(tmp_path / "cache")
    with pytest.raises(AdapterNotFound):
        index.sha256(tmp_path / "x.safetensors")
    with pytest.raises(AdapterNotFound):
        index.about(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"nothing much")
    with pytest.raises(AdapterUnreadable):
        index.about(tmp_path / "x.safetensors")


# --- sidecars ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "scale"),
    [
        ("0.5", 0.5),
        (" 1/256 ", 1 / 256),
        ("1.5/3", 0.5),
        ("3.90625e-05", 3.90625e-05),
        ("AUTO", "auto"),
        ("65536", 65536),
    ],
)
def test_scales_as_they_are_written(text: str, scale: float | str) -> None:
    assert scale_from(text) == scale


@pytest.mark.parametrize("text", ["", "x", "0", "-1", "nan", "inf", "1/0", "1/", "/2", "1/2/3", "65537", "1/x", "0,5"])
def test_scales_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="is no scale: a number above 0"):
        scale_from(text)


def test_a_sidecar_is_merged_and_goes_when_it_is_empty(tmp_path: Path) -> None:
    path = bare(tmp_path / "x.safetensors")
    file = write_sidecar(path, scale=0.5)
    assert file == tmp_path / "x.safetensors.json"
    write_sidecar(path, trigger_words=[" neon light ", "", "glow", "glow"], notes="from a friend, ☃")
    assert json.loads(file.read_bytes()) == {
        "scale": 0.5,
        "trigger_words": ["neon light", "glow"],
        "notes": "from a friend, ☃",
    }
    told = lora_file.inspect(path)
    assert (told["scale"], told["trigger_words"], told["notes"]) == (0.5, ["neon light", "glow"], "from a friend, ☃")
    write_sidecar(path, scale="auto", notes="")
    assert json.loads(file.read_bytes()) == {"trigger_words": ["neon light", "glow"]}
    before = file.stat().st_mtime_ns
    write_sidecar(path, trigger_words=["neon light", "glow"])
    assert file.stat().st_mtime_ns == before
    write_sidecar(path, trigger_words=[])  # said to have none, whatever its metadata say
    assert lora_file.inspect(path)["trigger_words"] == []
    file.write_text('{"scale": 0.5}')
    write_sidecar(path, scale="auto")
    assert not file.exists()
    write_sidecar(path, scale="auto")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.safetensors"]


@pytest.mark.parametrize(
    "said",
    [
        {"scale": 0.0},
        {"scale": float("nan")},
        {"scale": 65537.0},
        {"trigger_words": ["x" * 257]},
        {"trigger_words": [str(number) for number in range(65)]},
        {"trigger_words": ["\x1b[2J"]},
        {"notes": "x" * 10_001},
        {"notes": "\udcff"},
    ],
    ids=str,
)
def test_what_cannot_be_said_changes_nothing(tmp_path: Path, said: dict) -> None:
    path = bare(tmp_path / "x.safetensors")
    file = write_sidecar(path, scale=0.25)
    before = file.read_bytes()
    with pytest.raises(UsageError):
        write_sidecar(path, **said)
    assert file.read_bytes() == before


def test_a_broken_sidecar_is_not_written_over(tmp_path: Path) -> None:
    path = bare(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors.json").write_text('{"scale": "much"}')
    with pytest.raises(AdapterUnreadable, match="Mend or remove it"):
        settle(path, scale=0.5)
    assert (tmp_path / "x.safetensors.json").read_text() == '{"scale": "much"}'


def test_settling_tells_before_and_after(tmp_path: Path) -> None:
    path = bare(tmp_path / "x.safetensors")
    before, about = settle(path, scale=1 / 256)
    assert "alpha unknown" in before
    assert about["scale_reason"] == "0.00390625: said in x.safetensors.json"
    assert about["hints"] == []


def test_settling_ends_a_contradiction(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(MATRICES, path, {"lora_config": '{"r": 4, "lora_alpha": 4}'})
    with pytest.raises(AdapterUnreadable, match="says rank 4"):
        lora_file.inspect(path)
    before, about = settle(path, scale=0.5)
    assert "says rank 4" in before
    assert about["scale"] == 0.5


@pytest.mark.parametrize("old", [None, '{"notes": "mine"}'])
def test_a_file_that_stays_unreadable_gets_no_sidecar(tmp_path: Path, old: str | None) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"nothing much")
    if old:
        (tmp_path / "x.safetensors.json").write_text(old)
    with pytest.raises(CogLoomError, match=r"^x\.safetensors"):
        settle(path, scale=0.5)
    left = {file.name: file.read_text() for file in tmp_path.glob("*.json")}
    assert left == ({"x.safetensors.json": old} if old else {})

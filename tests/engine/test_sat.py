"""Other programs' files become safetensors adapters; pickles that want more than to be read are refused."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from nodes.engine import lora_file, sat, sat_worker
from nodes.engine.errors import AdapterError, AdapterNotFound, AdapterUnreadable, DiskFull, UsageError
from nodes.engine.sat import convert

HIDDEN, RANK, BLOCKS = 64, 8, 2
PREFIX = "model.diffusion_model.transformer.layers."


def sat_model(
    frozen: bool = True, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> OrderedDict[str, torch.Tensor]:
    """Names and shapes of a SAT model in training: each linear layer's own weight beside its adapter's matrices."""
    generator, table = torch.Generator().manual_seed(seed), OrderedDict()

    def put(name: str, *shape: int) -> None:
        table[PREFIX + name] = torch.randn(shape, generator=generator).to(dtype)

    for block in range(BLOCKS):
        for layer, parts in (("query_key_value", 3), ("dense", 1)):
            if frozen:
                put(f"{block}.attention.{layer}.original.weight", parts * HIDDEN, HIDDEN)
                put(f"{block}.attention.{layer}.original.bias", parts * HIDDEN)
            for part in range(parts):
                put(f"{block}.attention.{layer}.matrix_A.{part}", RANK, HIDDEN)
                put(f"{block}.attention.{layer}.matrix_B.{part}", HIDDEN, RANK)
    if frozen:
        table["conditioner.embedders.0.weight"] = torch.ones(3, 3, dtype=dtype)
    return table


def peft_model(prefix: str = "base_model.model.") -> dict[str, torch.Tensor]:
    path = f"{prefix}transformer_blocks.0.attn1.to_q"
    return {f"{path}.lora_A.weight": torch.randn(4, HIDDEN), f"{path}.lora_B.weight": torch.randn(HIDDEN, 4)}


def pickled(path: Path, value: Any, **how: Any) -> Path:
    torch.save(value, path, **how)
    return path


class Call:
    """Pickles as a call of a function, which is how a pickle attacks."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


# --- what is converted ------------------------------------------------------------------------------------------------


def test_a_sat_checkpoint(tmp_path: Path) -> None:
    """As DeepSpeed leaves it: the model's table among counters, shapes and the states of four random generators."""
    table = sat_model()
    state = {
        "module": table,
        "iteration": 1000,
        "lr_scheduler": {"rate": np.float64(1e-3), "steps": [1, 2]},
        "random_rng_state": random.Random(0).getstate(),
        "np_rng_state": np.random.RandomState(0).get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "param_shapes": [OrderedDict(a=torch.Size([3, 4]))],
    }
    source = pickled(tmp_path / "mp_rank_00_model_states.pt", state)
    report = convert(source, tmp_path / "new" / "mine.safetensors")
    adapter = lora_file.read(tmp_path / "new" / "mine.safetensors")
    modules = {module.path: module for module in adapter.modules}
    for block in range(BLOCKS):
        for ours, theirs in (
            ("attn1.to_q", "query_key_value.matrix_{}.0"),
            ("attn1.to_k", "query_key_value.matrix_{}.1"),
            ("attn1.to_v", "query_key_value.matrix_{}.2"),
            ("attn1.to_out.0", "dense.matrix_{}.0"),
        ):
            module = modules.pop(f"transformer_blocks.{block}.{ours}")
            assert isinstance(module, lora_file.LoRA)
            assert torch.equal(module.A, table[f"{PREFIX}{block}.attention.{theirs.format('A')}"])
            assert torch.equal(module.B, table[f"{PREFIX}{block}.attention.{theirs.format('B')}"])
            assert module.strength == 1 / RANK
    assert modules == {}
    assert (adapter.layout, adapter.alpha_known, adapter.unused) == ("diffusers", True, ())
    used, total = 16, len(table)
    assert (report["layout"], report["tensors_used"], report["tensors_total"]) == ("SAT", used, total)
    assert set(report["unused"]) == {key for key in table if "matrix" not in key}
    assert (report["rank"], report["alpha"], report["scale"]) == (RANK, 1, 1 / RANK)
    assert "SAT" in report["scale_reason"]
    assert (report["source_bytes"], report["target_bytes"]) == (source.stat().st_size, adapter.size_bytes)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["mine.safetensors"]


def test_the_alpha_that_is_given_counts(tmp_path: Path) -> None:
    source = tmp_path / "x.safetensors"
    save_file(sat_model(frozen=False), source, {"modelspec.trigger_phrase": "orbit", "ss_network_alpha": "3"})
    report = convert(source, tmp_path / "y.safetensors", alpha=2)
    adapter = lora_file.read(tmp_path / "y.safetensors")
    assert {module.strength for module in adapter.modules} == {2 / RANK} == {report["scale"]}
    assert "as it was asked for" in report["scale_reason"]
    assert adapter.trigger_words == ("orbit",)
    assert "ss_network_alpha" not in adapter.metadata


def test_a_sat_model_in_safetensors_is_picked_from(tmp_path: Path) -> None:
    source, target = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    save_file(dict(sat_model()), source)
    report = convert(source, target)
    assert (report["tensors_used"], report["tensors_total"], report["scale"]) == (16, 25, 1 / RANK)
    assert len(lora_file.read(target).modules) == 8


def test_a_peft_folder_with_a_pickle(tmp_path: Path) -> None:
    tensors = peft_model() | {"base_model.model.proj_out.weight": torch.ones(4, 4)}
    source = pickled(tmp_path / "adapter_model.bin", tensors, _use_new_zipfile_serialization=False)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 2}')
    report = convert(source, tmp_path / "x.safetensors")
    assert (report["layout"], report["scale"], report["tensors_used"], report["tensors_total"]) == (
        "PEFT model",
        0.5,
        2,
        3,
    )
    assert report["unused"] == ["base_model.model.proj_out.weight"]
    (module,) = lora_file.read(tmp_path / "x.safetensors").modules
    assert isinstance(module, lora_file.LoRA)
    assert torch.equal(module.A, tensors["base_model.model.transformer_blocks.0.attn1.to_q.lora_A.weight"])
    assert module.A.dtype == torch.float32


def test_layers_keep_their_own_scales_and_the_sidecar_is_heard(tmp_path: Path) -> None:
    source = tmp_path / "x.safetensors"
    stems = [f"lora_unet__transformer_blocks_0_attn1_to_{part}" for part in "qk"]
    tensors = {f"{stem}.lora_down.weight": torch.randn(4, HIDDEN).half() for stem in stems}
    tensors |= {f"{stem}.lora_up.weight": torch.randn(HIDDEN, 4).half() for stem in stems}
    alphas = {f"{stem}.alpha": torch.tensor(alpha).half() for stem, alpha in zip(stems, (1.0, 8.0), strict=True)}
    save_file({**tensors, **alphas, "lora_te_x.lora_down.weight": torch.ones(2, 2)}, source)
    report = convert(source, tmp_path / "y.safetensors")
    q, k = sorted(lora_file.read(tmp_path / "y.safetensors").modules, key=lambda module: module.path[-1] == "k")
    assert (q.strength, k.strength) == (0.25, 2)
    assert (report["layout"], report["unused"]) == ("VideoX-Fun", ["lora_te_x.lora_down.weight"])
    assert isinstance(q, lora_file.LoRA)
    assert q.A.dtype == torch.float16
    Path(f"{source}.json").write_text('{"scale": 0.125, "trigger_words": ["glow"]}')
    convert(source, tmp_path / "z.safetensors")
    again = lora_file.read(tmp_path / "z.safetensors")
    assert {module.strength for module in again.modules} == {0.125}
    assert again.trigger_words == ("glow",)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "how", "named"),
    [
        (lambda mark: Call(os.system, f"echo x > {mark}"), {}, r"\w+\.system"),
        (lambda mark: Call(exec, f"open({str(mark)!r}, 'w')"), {"_use_new_zipfile_serialization": False}, "exec"),
    ],
    ids=["zip, os.system", "older format, exec"],
)
def test_a_pickle_that_attacks_is_refused(tmp_path: Path, call: Callable[[Path], Any], how: Any, named: str) -> None:
    mark, source = tmp_path / "marked", tmp_path / "x.pt"
    pickled(source, {"module": sat_model(), "extra": call(mark)}, **how)
    with pytest.raises(AdapterUnreadable, match=rf"^x\.pt: it wants '{named}' to be run when it is opened.*refused"):
        convert(source, tmp_path / "x.safetensors")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.pt"]


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is Linux's")
def test_a_small_pickle_that_claims_twelve_gigabytes_is_refused(tmp_path: Path) -> None:
    source = pickled(tmp_path / "x.pt", {"a": torch.ones(2000)}, _use_new_zipfile_serialization=False)
    count, huge = b"M" + struct.pack("<H", 2000), b"\x8a\x05" + (3 << 30).to_bytes(5, "little")  # of 4 bytes each
    assert count in source.read_bytes()
    source.write_bytes(source.read_bytes().replace(count, huge))
    with pytest.raises(AdapterUnreadable, match=r"^x\.pt: it says that it holds more than there is memory for"):
        convert(source, tmp_path / "x.safetensors")


def _rezipped(path: Path, method: int) -> Path:
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return path


def _cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-2000])
    return path


def _changed(path: Path, old: bytes, new: bytes) -> Path:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))
    return path


WHOLE = {"module": sat_model()}
TWICE = sat_model(frozen=False) | {f"module.{PREFIX}0.attention.dense.matrix_A.0": torch.ones(RANK, HIDDEN)}
WIDE = sat_model(frozen=False) | {f"{PREFIX}0.attention.dense.matrix_A.0": torch.ones(1).expand(1 << 20, 1 << 20)}
SPARSE = {"x.lora_A.weight": torch.eye(3).to_sparse()}
EMPTY = {"x.lora_A.weight": torch.ones(0, 3)}
META = {"x.lora_A.weight": torch.ones(2, 3, device="meta")}
ODD = {"x\x1b[2J.lora_A.weight": torch.ones(2, 3)}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: _cut(pickled(p, WHOLE)), "table of contents is missing or broken"),
        (lambda p: _rezipped(pickled(p, WHOLE), zipfile.ZIP_DEFLATED), "compressed, as PyTorch never writes"),
        (lambda p: pickled(p, {"a": torch.ones(3), "b": 1}), "no adapter among its 1 tensors; it holds a, b"),
        (lambda p: pickled(p, [torch.ones(3)]), "no adapter among its 0 tensors; it holds nothing"),
        (lambda p: pickled(p, torch.ones(3)), "no adapter among its 0 tensors"),
        (lambda p: pickled(p, {"x.lora_A.weight": "text"}), "not an ordinary tensor"),
        (lambda p: pickled(p, SPARSE), "not an ordinary tensor"),
        (lambda p: pickled(p, {"x.lora_A.weight": torch.ones(2, 2, dtype=torch.complex64)}), "not an ordinary tensor"),
        (lambda p: pickled(p, EMPTY), "is empty"),
        (lambda p: pickled(p, META), "is empty"),
        (lambda p: pickled(p, ODD), "characters that no module has"),
        (lambda p: pickled(p, TWICE), "the same adapter matrix twice"),
        (lambda p: pickled(p, WIDE), "larger than the file they came in"),
    ],
    ids=range(13),
)
def test_what_the_process_refuses_to_take(tmp_path: Path, make: Callable[[Path], Path], said: str) -> None:
    """`pick` is what the process apart does; called here, it saves starting one for each."""
    with pytest.raises(sat_worker.Refused, match=said):
        sat_worker.pick(make(tmp_path / "x.pt"))


def test_nesting_ends(tmp_path: Path) -> None:
    table: Any = sat_model(frozen=False)
    for _ in range(3):
        table = {"module": table}
    assert len(sat_worker.pick(pickled(tmp_path / "x.pt", table))[0]) == 16
    with pytest.raises(sat_worker.Refused, match="no adapter"):
        sat_worker.pick(pickled(tmp_path / "x.pt", {"state_dict": table}))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: p.write_bytes(b"hello world " * 100), r"could not be opened as a file of weights \(\w+: "),
        (lambda p: p.write_bytes(b""), r"could not be opened as a file of weights \(EOFError: no more is known"),
        (lambda p: p.write_bytes(pickle.dumps([1], protocol=4)), r"of weights \(UnpicklingError: Unsupported operand"),
        (lambda p: pickled(p, {"args": argparse.Namespace(x=1)}), "it wants 'argparse.Namespace' to be run"),
        (lambda p: p.write_bytes(pickle.dumps(Call(eval, "1"), protocol=4)), "it wants 'builtins.eval' to be run"),
    ],
    ids=["text", "empty", "another pickle", "a harmless object", "a call in a newer pickle"],
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_wrong_file_is_told_so(tmp_path: Path, make: Callable[[Path], Any], said: str) -> None:
    source = tmp_path / "x.pt"
    make(source)
    told = sat._why(sat_worker.taken(source, tmp_path / "x.safetensors"))
    assert re.search(said, told)
    assert "weights_only" not in told  # PyTorch's advice to do without the protection
    assert not (tmp_path / "x.safetensors").exists()


def test_a_pickle_that_calls_itself_safetensors_is_none(tmp_path: Path) -> None:
    source = pickled(tmp_path / "x.safetensors", WHOLE)
    convert(source, tmp_path / "y.safetensors")
    assert len(lora_file.read(tmp_path / "y.safetensors").modules) == 8


def test_what_comes_out_is_read_with_suspicion(tmp_path: Path) -> None:
    table = sat_model(frozen=False)
    table[f"{PREFIX}1.attention.dense.matrix_A.0"][0, 0] = float("nan")
    with pytest.raises(AdapterUnreadable, match="not finite"):
        convert(pickled(tmp_path / "x.pt", {"module": table}), tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize(
    ("tensors", "kind"),
    [
        ({"lokr_w1": (8, 8), "lokr_w2": (8, 8)}, "lokr"),
        ({"lora_A.weight": (4, HIDDEN), "lora_B.weight": (HIDDEN, 4), "diff_b": (HIDDEN,)}, r"lora\+diff"),
        ({"lora_A.weight": (4, HIDDEN), "lora_B.weight": (HIDDEN, 4), "dora_scale": (HIDDEN, 1)}, "dora"),
    ],
)
def test_other_kinds_are_refused_by_name(tmp_path: Path, tensors: dict[str, tuple[int, ...]], kind: str) -> None:
    stem = "transformer.transformer_blocks.0.attn1.to_q"
    save_file({f"{stem}.{name}": torch.ones(shape) for name, shape in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(AdapterUnreadable, match=rf"^x\.safetensors: its kind is {kind}, and only plain LoRA"):
        convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors")
    assert not (tmp_path / "y.safetensors").exists()


@pytest.mark.parametrize(
    ("source", "target", "alpha", "error", "said"),
    [
        ("nowhere.pt", "y.safetensors", None, AdapterNotFound, "no such file to convert"),
        ("x.safetensors", "y.pt", None, UsageError, r"must end in \.safetensors"),
        ("x.safetensors", "x.safetensors", None, UsageError, "the file to convert itself"),
        ("x.safetensors", "y.safetensors", 0.0, UsageError, "alpha 0 is not above 0"),
        ("x.safetensors", "y.safetensors", float("nan"), UsageError, "alpha nan"),
        ("x.safetensors", "y.safetensors", 1e9, UsageError, "up to 65536"),
    ],
)
def test_what_cannot_be_asked(
    tmp_path: Path, source: str, target: str, alpha: float | None, error: type[Exception], said: str
) -> None:
    save_file(peft_model("transformer."), tmp_path / "x.safetensors")
    before = (tmp_path / "x.safetensors").read_bytes()
    with pytest.raises(error, match=said):
        convert(tmp_path / source, tmp_path / target, alpha)
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]
    assert (tmp_path / "x.safetensors").read_bytes() == before


# --- the process apart ------------------------------------------------------------------------------------------------


def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> Path:
    """A process that does what a hostile file might make of ours; returns a file to convert."""
    (tmp_path / "worker.py").write_text(f"import os, sys\nsource, out, report = sys.argv[1:]\n{code}\n")
    monkeypatch.setattr(sat, "WORKER", tmp_path / "worker.py")
    return pickled(tmp_path / "x.pt", WHOLE)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("os._exit(9)", r"the process that opened it died \(code 9\)"),
        ("sys.exit('\\x1b[2Jlast words')", r"died \(code 1: \?\[2Jlast words\)"),
        ("open(report, 'w').write('{')", r"died \(code 0\)"),
        ("open(report, 'w').write('[' * 100000)", r"died \(code 0\)"),
        ("open(report, 'w').write('{\"total\": \"x\"}'); open(out, 'w')", r"died \(code 0\)"),
        ("open(report, 'w').write('{\"total\": 1}')", r"died \(code 0\)"),
        ("open(report, 'w').write('{\"total\": 1}'); open(out, 'w').write('nothing')", "too short to be a LoRA file"),
        ("open(report, 'w').write('{\"refused\": \"<b>\\\\u001b\"}')", r"^x\.pt: \?b\?\?\. Nothing was written"),
        ('open(report, \'w\').write(\'{"error": "E", "text": 5, "calls": null}\')', r"weights \(E: 5\)"),
    ],
    ids=range(9),
)
def test_a_process_that_dies_or_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, said: str) -> None:
    source = worker(tmp_path, monkeypatch, code)
    with pytest.raises(AdapterUnreadable, match=said):
        convert(source, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_a_full_disk_is_called_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = worker(tmp_path, monkeypatch, "open(report, 'w').write('{\"unsaved\": \"No space left\"}')")
    with pytest.raises(DiskFull, match="TMPDIR"):
        convert(source, tmp_path / "x.safetensors")


def test_a_process_that_hangs_is_broken_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = worker(tmp_path, monkeypatch, "sys.stdin.read()\nwhile True: pass")
    with pytest.raises(AdapterUnreadable, match=r"more than 0\.2 s and was broken off"):
        convert(source, tmp_path / "x.safetensors", timeout_s=0.2)


def test_the_process_knows_little_of_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No secrets from the environment, another folder, nothing of the package in its path."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    told = tmp_path / "told.json"
    code = f"import json; json.dump([dict(os.environ), os.getcwd(), sys.path], open({str(told)!r}, 'w'))"
    with pytest.raises(AdapterUnreadable):
        convert(worker(tmp_path, monkeypatch, code), tmp_path / "x.safetensors")
    environment, folder, path = json.loads(told.read_text())
    assert "secret" not in environment.values()
    assert Path(environment["HOME"]).name == Path(folder).name
    assert not Path(folder).exists()
    assert str(tmp_path) not in path


def test_python_code_in_the_process_can_do_no_harm(tmp_path: Path) -> None:
    """What stands behind PyTorch's own refusal, should that have a hole one day."""
    code = (
        "import os, shutil, socket, subprocess, sys; from pathlib import Path; import sat_worker\n"
        "sat_worker.guard(Path('report'))\n"
        "for attempt in (\n"
        "    lambda: os.system('echo'),\n"
        "    lambda: subprocess.run(['echo']),\n"
        "    lambda: socket.socket().connect(('127.0.0.1', 9)),\n"
        "    lambda: open('other', 'w'),\n"
        "    lambda: os.open('other', os.O_CREAT | os.O_WRONLY),\n"
        "    lambda: os.remove('keep'),\n"
        "    lambda: os.rename('keep', 'other'),\n"
        "    lambda: shutil.rmtree('.'),\n"
        "):\n"
        "    try: attempt(); print('done')\n"
        "    except sat_worker.Refused: pass\n"
        "Path('report').write_text('x'); print(Path('keep').read_text())"
    )
    (tmp_path / "keep").write_text("kept")
    environment = {**os.environ, "PYTHONPATH": str(sat.WORKER.parent)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert (done.stdout.strip(), done.returncode) == ("kept", 0), done.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == ["keep", "report"]


def test_a_target_that_cannot_be_written(tmp_path: Path) -> None:
    save_file(peft_model("transformer."), tmp_path / "x.safetensors")
    (tmp_path / "file").write_text("")
    with pytest.raises((UsageError, AdapterError), match=re.escape("y.safetensors")):
        convert(tmp_path / "x.safetensors", tmp_path / "file" / "y.safetensors")

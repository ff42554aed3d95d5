"""`app.py loras` as a person meets it: list, inspect, scale, convert, and names that try to move the cursor."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import app
from nodes import lora
from nodes.engine import lora_file
from nodes.engine.errors import UsageError
from nodes.engine.lora_stack import LoraStack
from nodes.host import LocalHost

Q = "transformer_blocks.0.attn1.to_q"
EVIL = "\x1b[2J\u202egnp\x7f\x9b"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The person's own adapters."""
    for name in ("loras", "output", "cache", "models"):
        monkeypatch.setenv(f"COGLOOM_{name.upper()}", str(tmp_path / name))
    (tmp_path / "loras").mkdir()
    return tmp_path / "loras"


class Ran:
    def __init__(self, code: int, out: str, errors: str) -> None:
        self.code, self.out, self.errors = code, out, " ".join(errors.split())
        self.words = " ".join(out.split())

    @property
    def data(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    def ran(*arguments: str) -> Ran:
        capsys.readouterr()
        try:
            code = app.main(["loras", *arguments])
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
        return Ran(code, *capsys.readouterr())

    return ran


def matrices(rank: int = 4, width: int = 1920, prefix: str = "transformer.") -> dict[str, torch.Tensor]:
    path = f"{prefix}{Q}"
    return {f"{path}.lora_A.weight": torch.ones(rank, width), f"{path}.lora_B.weight": torch.ones(width, rank)}


def saved(path: Path, metadata: dict[str, str] | None = None, **how: Any) -> Path:
    save_file(matrices(**how), path, metadata)
    return path


# --- list -------------------------------------------------------------------------------------------------------------


def test_the_list_tells_what_each_is(folder: Path, run) -> None:
    saved(folder / "mine.safetensors", {"lora_config": '{"r": 4, "lora_alpha": 2}'})
    (folder / "torn.safetensors").write_bytes(b"nothing much")
    for arguments in ([], ["list"]):
        ran = run(*arguments)
        assert ran.code == 0
        assert "mine lora rank 4 fits " in ran.words
        assert "CogVideoX-2b" in ran.words
        assert " scale 0.5: alpha 2 / rank 4 in lora_config" in ran.words
        assert "neon lora rank 8 fits cogloom-demo" in ran.words
        assert "triggers: sunset" in ran.words
        assert "not read: torn.safetensors: " in ran.words
        assert ran.words.endswith(f"6 adapters, 1 more not read; your own go into {folder}")


def test_the_list_as_data(folder: Path, run) -> None:
    (folder / "torn.safetensors").write_bytes(b"nothing much")
    for arguments in (["--json"], ["list", "--json"], ["--json", "list"]):
        rows = {Path(row["path"]).stem: row for row in run(*arguments).data}
        assert set(rows["torn"]) == {"path", "error"}
        assert (rows["neon"]["kind"], rows["neon"]["rank"], rows["neon"]["scale"]) == ("lora", 8, 1.0)


def test_the_list_does_not_open_what_it_knows(folder: Path, run) -> None:
    path = saved(folder / "mine.safetensors")
    before = run("--json").data
    status = path.stat()
    path.write_bytes(b"x" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    lora._index.cache_clear()  # as another process would begin
    assert run("--json").data == before


# --- inspect ----------------------------------------------------------------------------------------------------------


def test_inspect_reads_like_a_sentence(folder: Path, run) -> None:
    saved(folder / "mine.safetensors", {"lora_config": '{"r": 4, "lora_alpha": 2}', "modelspec.title": "Mine"})
    ran = run("inspect", "mine")
    assert ran.out.splitlines()[0] == "used 2/2 tensors, rank 4, scale 0.5 (alpha 2 / rank 4 in lora_config)"
    assert "layout diffusers, lora, 1 layers" in ran.words
    assert "(width 1920, 1 blocks)" in ran.words
    assert "metadata modelspec.title = Mine" in ran.words


def test_inspect_shows_what_an_unknown_alpha_may_have_been(folder: Path, run) -> None:
    path = saved(folder / "mine.safetensors", rank=128)
    told = run("inspect", str(path)).words
    assert told.startswith("used 2/2 tensors, rank 128, scale 1.0 (alpha unknown")
    for hint in lora_file.inspect(path)["hints"]:
        assert hint in told


def test_inspect_as_data(folder: Path, run) -> None:
    path = saved(folder / "mine.safetensors", {"x": "y"})
    about = run("inspect", "mine", "--json").data
    keys = (
        "layout kind rank scale scale_reason tensors_used tensors_total width blocks fits trigger_words sha256 metadata"
    )
    assert set(keys.split()) <= set(about)
    assert about["sha256"] == lora_file.read(path).sha256
    assert about["metadata"] == {"x": "y"}
    assert about == run("--json", "inspect", "mine").data


# --- scale ------------------------------------------------------------------------------------------------------------


def test_scale_is_settled_and_unsettled(folder: Path, run) -> None:
    path, file = saved(folder / "mine.safetensors"), folder / "mine.safetensors.json"
    ran = run("scale", "mine", "1/256", "--trigger-words", "orbit, turning round", "--notes", "as its author says")
    assert ran.out.splitlines()[0] == "mine.safetensors: scale 0.00390625: said in mine.safetensors.json"
    assert "before: 1.0: alpha unknown" in ran.words
    assert "trigger words: orbit, turning round" in ran.words
    assert json.loads(file.read_bytes()) == {
        "scale": 1 / 256,
        "trigger_words": ["orbit", "turning round"],
        "notes": "as its author says",
    }
    assert lora_file.read(path).modules[0].strength == 1 / 256
    assert "scale 0.00390625: said in mine.safetensors.json, as before" in run("scale", "mine", "--notes", "").words
    told = run("scale", "mine", "auto", "--json").data
    assert told["before"].startswith("0.00390625")
    assert told["after"].startswith("1.0: alpha unknown")
    assert json.loads(file.read_bytes()) == {"trigger_words": ["orbit", "turning round"]}
    assert run("inspect", "mine", "--json").data["scale"] == 1


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["inspect"], 2, "Which adapter?"),
        (["inspect", "neno"], 1, "neon"),
        (["scale"], 2, "Nothing to say"),
        (["scale", "mine"], 2, "Nothing to say"),
        (["scale", "mine", "much"], 2, "'much' is no scale"),
        (["scale", "mine", "-1"], 2, "'-1' is no scale"),
        (["scale", "", "0.5"], 2, "Which adapter?"),
        (["scale", "mine", "--trigger-words", EVIL], 2, "printable characters"),
        (["scale", "torn", "0.5"], 1, "torn.safetensors"),
        (["convert"], 2, "Which file?"),
        (["convert", "nowhere.pt"], 1, "There is no adapter 'nowhere.pt'"),
        (["convert", "mine", "--alpha", "nan"], 2, "alpha nan is not above 0"),
        (["convert", "mine", "-o", "mine.pt"], 2, "must end in .safetensors"),
        (["remove", "mine"], 2, "invalid choice"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_errors_are_one_paragraph(folder: Path, run, arguments: list[str], code: int, said: str) -> None:
    saved(folder / "mine.safetensors")
    (folder / "torn.safetensors").write_bytes(b"nothing much")
    ran = run(*arguments)
    assert ran.code == code
    assert said in ran.errors
    assert ran.errors.isprintable()
    assert "Traceback" not in ran.errors
    assert sorted(file.name for file in folder.iterdir()) == ["mine.safetensors", "torn.safetensors"]


# --- convert ----------------------------------------------------------------------------------------------------------


def test_convert_a_sat_checkpoint(folder: Path, run) -> None:
    layer = "model.diffusion_model.transformer.layers.0.attention.dense"
    tensors = {
        f"{layer}.original.weight": torch.ones(64, 64),
        f"{layer}.matrix_A.0": torch.ones(8, 64),
        f"{layer}.matrix_B.0": torch.ones(64, 8),
    }
    source = folder / "mp_rank_00_model_states.pt"
    torch.save({"module": tensors}, source)
    ran = run("convert", str(source), "--alpha", "4")
    assert (ran.code, ran.errors) == (0, "")
    lines = ran.out.splitlines()
    assert lines[0] == "SAT: used 2/3 tensors, rank 8"
    assert lines[1] == f"not used: 1, such as {layer}.original.weight"
    assert lines[2].startswith("scale 0.5: alpha 4 / rank 8")
    assert lines[4] == str(source.with_suffix(".safetensors"))
    assert lora_file.inspect(source.with_suffix(".safetensors"))["scale"] == 0.5


def test_convert_by_name_and_never_over_a_file(folder: Path, run) -> None:
    source = saved(
        folder / "mine.safetensors", {"lora_config": '{"r": 4, "lora_alpha": 2}'}, prefix="base_model.model."
    )
    report, target = run("convert", "mine", "--json").data, folder / "mine-diffusers.safetensors"
    assert (report["layout"], report["scale"], report["alpha"], report["target"]) == ("PEFT model", 0.5, 2, str(target))
    written = target.read_bytes()
    ran = run("convert", str(source), "--alpha", "8")
    assert ran.code == 2
    assert "is there already. Name another with -o, or replace it with --force." in ran.errors
    assert target.read_bytes() == written
    assert run("convert", str(source), "--alpha", "8", "--force").code == 0
    assert lora_file.inspect(target)["scale"] == 2
    assert run("convert", str(source), "-o", str(folder / "other.safetensors")).code == 0
    assert (folder / "other.safetensors").read_bytes() == written


# --- strangers' texts -------------------------------------------------------------------------------------------------


def test_nothing_of_a_file_reaches_the_terminal_raw(folder: Path, run) -> None:
    metadata = {f"title{EVIL}": f"text{EVIL}", "modelspec.trigger_phrase": "雪 snow"}
    saved(folder / "mine.safetensors", metadata)
    (folder / "mine.safetensors.json").write_text(json.dumps({"notes": EVIL}))
    for arguments in (["list"], ["inspect", "mine"], ["inspect", "mine", "--json"], ["list", "--json"]):
        ran = run(*arguments)
        assert ran.code == 0
        assert ran.out.replace("\n", "").isprintable()
        assert "雪 snow" in ran.out
        if "--json" in arguments:  # escaped, and all there
            (about,) = [row for row in (ran.data if isinstance(ran.data, list) else [ran.data]) if row["notes"]]
            assert about["notes"] == EVIL
            assert about["metadata"][f"title{EVIL}"] == f"text{EVIL}"
    told = run("inspect", "mine").out
    assert r"text\x1b[2J\u202egnp\x7f\x9b" in told


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_nor_does_its_name(folder: Path, run) -> None:
    (folder / f"torn{EVIL}.safetensors").write_bytes(b"nothing much")
    saved(folder / f"mine{EVIL}.safetensors")
    for arguments in (
        ["list"],
        ["list", "--json"],
        ["inspect", f"mine{EVIL}"],
        ["inspect", f"torn{EVIL}"],
        ["scale", f"torn{EVIL}", "1"],
    ):
        ran = run(*arguments)
        assert (ran.out + ran.errors).replace("\n", "").isprintable()
        assert r"\x1b[2J" in ran.out + ran.errors or r"\u001b[2J" in ran.out


# --- the cache of adapters --------------------------------------------------------------------------------------------


def test_the_limit_is_read_when_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COGLOOM_ADAPTER_CACHE", "3")
    assert lora.adapter_cache().limit_bytes == 3 << 20
    monkeypatch.setenv("COGLOOM_ADAPTER_CACHE", "much")
    with pytest.raises(UsageError, match="COGLOOM_ADAPTER_CACHE is 'much'; it is a whole number of MiB"):
        lora.adapter_cache()
    monkeypatch.delenv("COGLOOM_ADAPTER_CACHE")
    assert lora.adapter_cache().limit_bytes == lora.CACHED_BYTES == 1 << 30


def test_a_described_stack_is_read_ahead_and_read_once(folder: Path) -> None:
    saved(folder / "mine.safetensors")
    stack = lora.stack_loras(LocalHost(), ["mine:0.5", "mine:0.25[blocks=0:1]", "neon:0"])
    assert [entry.name for entry in stack] == ["mine", "mine", "neon"]
    (first, one), (second, other) = lora.read_stack(stack)
    assert first is second
    assert (first.name, one.weight, other.weight, other.blocks) == ("mine", 0.5, 0.25, "0:1")
    assert lora.read_stack(LoraStack()) == []

"""Resident bases: loaded once, shared where files are the same, placed by the memory there is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from nodes.engine.checkpoints import part_files
from nodes.engine.errors import AdapterMismatch, NotAModel, NotEnoughMemory, PlacementError, UsageError
from nodes.engine.lora_file import read
from nodes.engine.pipeline import Base, bases, choose_device, load_text, plan_placement
from nodes.engine.prompts import PromptCache
from nodes.host import LocalHost
from nodes.model import choose_base
from tests import tiny

GIB = 1 << 30
SIZES = {"transformer": 11 * GIB, "vae": GIB // 2, "text_encoder": 9 * GIB}  # the 5B's, about
WORK = (2 * GIB, 4 * GIB)  # denoising, decoding


def test_equal_descriptions_are_one_base(tiny_host: LocalHost):
    for _ in range(3):
        with bases.session(choose_base(tiny_host, "tiny-t2v")) as session:
            assert session.loaded == (bases.loads == 1 and _ == 0)
    assert bases.loads == 1
    with bases.session(choose_base(tiny_host, "tiny-t2v", dtype="bf16")) as session:
        assert session.resident.transformer.dtype == torch.bfloat16
    assert bases.loads == 2
    bases.unload()
    assert bases.resident() == ()
    with bases.session(choose_base(tiny_host, "tiny-t2v")):
        assert bases.loads == 3


def test_siblings_share_what_is_the_same_file(tiny_host: LocalHost, host: LocalHost):
    with (
        bases.session(choose_base(host, "cogloom-demo")) as text,
        bases.session(choose_base(host, "cogloom-demo-i2v")) as image,
    ):
        assert text.resident.vae is image.resident.vae
        assert text.resident.transformer is not image.resident.transformer
    with bases.session(choose_base(tiny_host, "tiny-t2v")) as other:
        assert other.resident.vae is not text.resident.vae


def test_swaps_never_load(tiny_host: LocalHost, tmp_path: Path):
    base = choose_base(tiny_host, "tiny-t2v")
    with bases.session(base) as session:
        targets = tiny.attention(session.resident.shapes)
    adapters = [read(tiny.write_lora(tmp_path / f"a{i}.safetensors", targets, seed=i)) for i in range(3)]
    for step in range(12):
        stack = [(adapters[i], 0.5 + i) for i in range(3) if (step >> i) & 1]
        with bases.session(base, stack) as session:
            assert dict(session.swap.after) == {a.name: w for a, w in stack}
    with bases.session(base) as session:
        assert session.resident.switch.differing() == ()
    assert bases.loads == 1


def test_an_adapter_for_another_base_is_refused_before_anything_changes(tiny_host: LocalHost, tmp_path: Path):
    base = choose_base(tiny_host, "tiny-t2v")
    with bases.session(base) as session:
        targets = tiny.attention(session.resident.shapes)
    good = read(tiny.write_lora(tmp_path / "good.safetensors", targets))
    wide = {name: (3072, 3072) for name in targets}
    bad = read(tiny.write_lora(tmp_path / "bad.safetensors", wide, rank=1))
    with bases.session(base, [(good, 1.0)]):
        pass
    with pytest.raises(AdapterMismatch, match="3072"), bases.session(base, [(bad, 1.0)]):
        pytest.fail("the session must not open")
    assert bases.resident()[0].switch.names == (("good", 1.0),)


def test_an_error_inside_a_session_keeps_the_base(tiny_host: LocalHost):
    base = choose_base(tiny_host, "tiny-t2v")
    with pytest.raises(ZeroDivisionError), bases.session(base):
        _ = 1 / 0
    with bases.session(base):
        assert bases.loads == 1


def test_broken_weights_are_an_error_of_ours(checkpoints: Path, host: LocalHost, tmp_path: Path):
    folder = Path(shutil.copytree(checkpoints / "tiny-t2v", tmp_path / "models" / "torn"))
    file = part_files(folder / "transformer")[0]
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(NotAModel, match="torn"), bases.session(choose_base(host, "torn")):
        pytest.fail("the session must not open")
    assert bases.loads == 0


def test_a_repeated_prompt_never_loads_the_text_encoder(tiny_host: LocalHost):
    base = choose_base(tiny_host, "tiny-t2v")
    notes: list[str] = []
    with bases.session(base, cache=tiny_host.cache_folder, note=notes.append) as session:
        first = session.encode(["a red circle", ""])
    assert "loading the text encoder" in notes
    bases.unload()
    notes.clear()
    with bases.session(base, cache=tiny_host.cache_folder, note=notes.append) as session:
        assert torch.equal(first, session.encode(["a red circle", ""]))
        assert "loading the text encoder" not in notes
        alone = session.encode([""])
        assert torch.equal(alone, first[1:])


def test_a_cut_prompt_is_said(tiny_host: LocalHost):
    notes: list[str] = []
    with bases.session(choose_base(tiny_host, "tiny-t2v"), note=notes.append) as session:
        assert session.encode(["a large red circle moving right on a navy background " * 3]).shape == (1, 24, 64)
    assert any("reads 24" in note and "background" in note for note in notes)


def test_a_broken_cache_entry_is_made_again(tmp_path: Path):
    cache = PromptCache(tmp_path, "encoder", "24")
    states = torch.randn(1, 24, 8)
    cache.put("a prompt", states)
    file = next((tmp_path / "prompts").iterdir())
    assert torch.equal(cache.get("a prompt"), states)
    file.write_bytes(b"not a tensor")
    assert cache.get("a prompt") is None
    cache.put("a prompt", states)
    assert torch.equal(cache.get("a prompt"), states)
    assert PromptCache(tmp_path, "another encoder", "24").get("a prompt") is None


@pytest.mark.parametrize(("free", "kind"), [(80, "resident"), (15, "model"), (6, "group")])
def test_auto_takes_the_fastest_that_fits(free: float, kind: str):
    placed = plan_placement("bf16", SIZES, WORK, Base(), "cuda", int(free * GIB), 64 * GIB)
    assert placed.kind == kind
    assert kind in placed.reason
    assert f"{free:.1f} GiB free on cuda" in placed.reason


def test_too_little_memory_says_how_much_is_missing():
    with pytest.raises(NotEnoughMemory, match=r"needs about 4\.5 GiB on cuda and 1\.0 are free.*VAE tiling"):
        plan_placement("bf16", SIZES, WORK, Base(), "cuda", GIB, 64 * GIB)
    with pytest.raises(NotEnoughMemory, match=r"about 27\.0 GiB in fp32.*dtype bf16"):
        plan_placement("bf16", SIZES, WORK, Base(dtype="fp32"), "cpu", 8 * GIB, 8 * GIB)
    with pytest.raises(NotEnoughMemory, match=r"keeps 11\.5 GiB in memory and 8\.0"):
        plan_placement("bf16", SIZES, WORK, Base(placement="group"), "cuda", 8 * GIB, 8 * GIB)


def test_combinations_that_cannot_be_are_refused():
    with pytest.raises(PlacementError, match="on the CPU choose auto"):
        plan_placement("bf16", SIZES, WORK, Base(placement="model"), "cpu", 64 * GIB, 64 * GIB)
    if not torch.cuda.is_available():
        with pytest.raises(PlacementError, match="sees no cuda device"):
            choose_device("cuda")
    with pytest.raises(UsageError, match="none of auto, fp32"):
        Base(dtype="int3")


@pytest.mark.parametrize("placement", ["group", "sequential"])
def test_placements_render_the_same(tiny_host: LocalHost, placement: str):
    from nodes.engine.lora_stack import LoraStack
    from nodes.render import Shot, render

    shot = Shot("a red circle", steps=2, frames=9)
    plain = render(tiny_host, choose_base(tiny_host, "tiny-t2v"), LoraStack(), shot)
    placed = render(tiny_host, choose_base(tiny_host, "tiny-t2v", placement=placement), LoraStack(), shot)
    assert placed.record["base"]["placement"] == placement
    assert torch.equal(plain.frames, placed.frames)


def test_a_tokenizer_as_the_released_bases_ship_it(checkpoints: Path, host: LocalHost, tmp_path: Path):
    """They have a SentencePiece file and no tokenizer.json; reading that needs sentencepiece and protobuf."""
    import json

    from sentencepiece import sentencepiece_model_pb2

    pb = sentencepiece_model_pb2  # its classes are made at run time
    model, kind = pb.ModelProto(), pb.ModelProto.SentencePiece  # pyright: ignore[reportAttributeAccessIssue]
    spec = model.trainer_spec
    spec.model_type, spec.pad_id, spec.eos_id, spec.unk_id, spec.bos_id = 1, 0, 1, 2, -1
    pieces = [("<pad>", kind.CONTROL), ("</s>", kind.CONTROL), ("<unk>", kind.UNKNOWN)]
    for rank, (piece, type_) in enumerate([*pieces, *((f"\u2581{w}", kind.NORMAL) for w in ("a", "red", "circle"))]):
        model.pieces.add(piece=piece, score=-float(rank), type=type_)
    folder = Path(shutil.copytree(checkpoints / "tiny-t2v", tmp_path / "models" / "released"))
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "spiece.model").write_bytes(model.SerializeToString())
    config = {"tokenizer_class": "T5Tokenizer", "model_max_length": 226, "extra_ids": 0, "legacy": True}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer, _ = load_text(choose_base(host, "released").checkpoint(), torch.float32)
    assert tokenizer("a red circle").input_ids == [3, 4, 5, 1]
    with bases.session(choose_base(host, "released")) as session:
        assert session.encode(["a red circle"]).shape == (1, 24, 64)

"""Where adapters come from: told by files, proved by hashes, carried into records; and strangers' stories, bounded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from nodes.engine.checkpoints import DEMO, DEMO_FOLDER, open_checkpoint, transformer_hash
from nodes.engine.lineage import COUNT, DEPTH, Found, Lineage, proved, recorded
from nodes.engine.lora_file import read
from nodes.engine.lowrank import Cut
from nodes.host import LocalHost
from nodes.lineage import lineage, unlike
from nodes.lora import inspect_adapter, save_adapter, stack_loras
from nodes.model import choose_base
from nodes.render import Shot, entries_from, render
from nodes.workshop import bake_adapters, convert_layout, extract_adapter, merge_adapters, resize_adapter
from tests import tiny

NEON = DEMO_FOLDER / "loras" / "neon.safetensors"
BOUNCE = NEON.with_stem("bounce")
HASH = "0123456789abcdef" * 4


def other(number: int) -> str:
    return f"{number:064x}"


def states(tree: Lineage) -> dict[str, str]:
    return {node.name: node.state for node in tree.walk()}


def rewrite(source: Path, target: Path, metadata: dict[str, str]) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(load_file(source), target, metadata)
    return target


# --- what the workshop makes ------------------------------------------------------------------------------------------


@pytest.mark.heavy
def test_from_a_child_of_children_down_to_the_base(host: LocalHost, tmp_path: Path):
    """Merged, resized, converted: every generation is found by its hash, until the base."""
    folder = tmp_path / "loras"
    merge_adapters(host, stack_loras(host, ["neon", "bounce:0.5"]), folder / "both.safetensors")
    resize_adapter(host, "both", folder / "small.safetensors", Cut(rank=4))
    path = convert_layout(host, "small", folder / "native.safetensors", "comfyui").path
    tree = lineage(host, "native")
    assert tree.how == "convert"
    (small,) = tree.parents
    (both,) = small.parents
    assert [(small.name, small.how), (both.name, both.how)] == [("small", "resize"), ("both", "merge concatenate")]
    assert [(p.name, p.part) for p in both.parents] == [("neon", "weight 1"), ("bounce", "weight 0.5")]
    assert set(states(tree).values()) == {"verified"}
    assert [base.name for base in tree.bases()] == [DEMO]
    lines = tree.lines()
    assert len(lines) == 7
    assert lines[0] == "native (adapter, convert)"
    assert lines[1].startswith("+- small (adapter, resize) ")
    assert lines[4] == f"   |     +- {DEMO} (base) {tree.bases()[0].sha256[:12]}: verified" or "|" in lines[4]
    assert inspect_adapter(host, "native")["lineage"] == tree.as_dict()
    assert json.loads(json.dumps(tree.as_dict())) == tree.as_dict()
    for name in ("both", "small"):  # the file still tells of them, and of what they were made of
        (folder / f"{name}.safetensors").unlink()
    gone = lineage(host, path)
    found = states(gone)
    assert found.pop("both") == found.pop("small") == "not here"
    assert set(found.values()) == {"verified"}
    assert {"neon", "bounce", DEMO} < set(found)


@pytest.mark.heavy
def test_an_extracted_one_knows_what_was_baked(host: LocalHost, tmp_path: Path):
    folder = tmp_path / "models" / "tuned"
    shutil.copytree(DEMO_FOLDER / DEMO, folder, ignore=shutil.ignore_patterns("transformer"))
    bake_adapters(host, stack_loras(host, ["neon"]), folder / "transformer", dtype="fp32")
    done = extract_adapter(host, "tuned", tmp_path / "loras" / "out.safetensors", cut=Cut(rank=8))
    tree = lineage(host, done.path)
    base, tuned = tree.parents
    assert (base.role, base.state) == ("base", "verified")
    assert (tuned.role, tuned.state) == ("fine-tuned", "verified")
    assert {parent.name for parent in tuned.parents} == {DEMO, "neon"}
    assert set(states(tree).values()) == {"verified"}


def test_what_was_saved_in_one(host: LocalHost, tmp_path: Path):
    path = save_adapter(host, stack_loras(host, ["neon:0.25[blocks=0-2:1]"]), tmp_path / "loras" / "one.safetensors")
    (parent,) = lineage(host, path).parents
    assert (parent.name, parent.part, parent.state) == ("neon", "weight 0.25, blocks 0-2:1", "verified")


def test_another_file_of_that_name(host: LocalHost, tmp_path: Path):
    """The right one is found under another name."""
    folder = tmp_path / "loras"
    shutil.copytree(NEON.parent, folder)
    child = merge_adapters(host, stack_loras(host, ["neon"]), folder / "child.safetensors").path
    rewrite(folder / "bounce.safetensors", folder / "neon.safetensors", {"x": "another"})
    assert lineage(host, child).parents[0].state == "differs"  # the demo's own is hidden by it
    shutil.copy(NEON, folder / "renamed.safetensors")
    assert lineage(host, child).parents[0].state == "verified"


@pytest.fixture
def alone(host: LocalHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalHost:
    """Without the demo's adapters."""
    monkeypatch.setattr("nodes.lora.DEMO_ADAPTERS", tmp_path / "none")
    return host


def test_gone_renamed_and_another(alone: LocalHost, tmp_path: Path):
    folder = tmp_path / "loras"
    folder.mkdir()
    shutil.copy(NEON, folder / "neon.safetensors")
    child = merge_adapters(alone, stack_loras(alone, ["neon"]), folder / "child.safetensors").path
    assert lineage(alone, child).parents[0].state == "verified"
    (folder / "neon.safetensors").rename(folder / "renamed.safetensors")
    assert lineage(alone, child).parents[0].state == "verified"
    (folder / "renamed.safetensors").unlink()
    assert lineage(alone, child).parents[0].state == "not here"
    shutil.copy(BOUNCE, folder / "neon.safetensors")
    (neon,) = lineage(alone, child).parents
    assert neon.state == "differs"
    assert neon.parents[0].name == DEMO  # by what the child tells, not by what that other file does
    assert "here is another file of that name" in lineage(alone, child).lines()[1]


def test_another_base_of_that_name(tiny_host: LocalHost, checkpoints: Path, tmp_path: Path):
    said = {"base": "tiny-t2v", "base_hash": HASH, "step": 5}
    path = rewrite(NEON, tmp_path / "loras" / "x.safetensors", {"cogloom.training": json.dumps(said)})
    assert states(lineage(tiny_host, path)) == {"x": "verified", "tiny-t2v": "differs"}
    said["base_hash"] = transformer_hash(open_checkpoint(checkpoints / "tiny-t2v"))
    rewrite(NEON, path, {"cogloom.training": json.dumps(said)})
    assert states(lineage(tiny_host, path)) == {"x": "verified", "tiny-t2v": "verified"}
    assert unlike(tiny_host, path, "tiny-t2v") is None
    assert "was made for tiny-t2v with weights" in str(unlike(tiny_host, path, "tiny-i2v"))
    assert unlike(tiny_host, rewrite(NEON, path, {}), "tiny-t2v") is None


# --- in records -------------------------------------------------------------------------------------------------------


def test_a_record_tells_it_and_old_ones_are_read(tiny_host: LocalHost, checkpoints: Path, tmp_path: Path):
    """Made for other weights: told, and rendered all the same."""
    folder = tmp_path / "loras"
    base = choose_base(tiny_host, "tiny-t2v")
    shapes = {name: (64, 64) for name in ("transformer_blocks.0.attn1.to_q", "transformer_blocks.1.attn1.to_q")}
    mine = tiny.write_lora(folder / "mine.safetensors", shapes)
    own = transformer_hash(base.checkpoint())
    training = {"base": "tiny-t2v", "base_hash": own, "step": 5}
    rewrite(mine, folder / "right.safetensors", {**_metadata(mine), "cogloom.training": json.dumps(training)})
    training["base_hash"] = HASH
    rewrite(mine, folder / "wrong.safetensors", {**_metadata(mine), "cogloom.training": json.dumps(training)})
    merge_adapters(tiny_host, stack_loras(tiny_host, ["wrong"]), folder / "child.safetensors")
    shot = Shot("a red circle", steps=1, frames=9)
    clip = render(tiny_host, base, stack_loras(tiny_host, ["mine:0.1", "right:0.1", "child:0.1"]), shot)
    told = {lora["name"]: lora["lineage"] for lora in clip.record["loras"]}
    assert told["mine"] == []
    assert [(one["role"], one["state"]) for one in told["right"]] == [("base", "verified")]
    assert told["child"][0]["name"] == "wrong"
    assert told["child"][0]["parents"][0]["state"] == "differs"
    notes = [note for note in clip.record["notes"] if "was made for" in note]
    assert notes == [
        f"child was made for tiny-t2v with weights {HASH[:12]}, and tiny-t2v has "
        f"{own.removeprefix('sampled:')[:12]}: it fits, and may look otherwise than it was trained to"
    ]
    json.dumps(clip.record)
    old = json.loads(json.dumps(clip.record))
    for lora in old["loras"]:
        del lora["lineage"]
    assert entries_from(old) == entries_from(clip.record)


def _metadata(path: Path) -> dict[str, str]:
    return dict(read(path).metadata)


# --- strangers --------------------------------------------------------------------------------------------------------


def chain(length: int, hash_of: Callable[[int], str] = other) -> dict[str, Any]:
    made: dict[str, Any] = {"name": "end", "sha256": hash_of(0)}
    for number in range(1, length):
        made = {"name": f"n{number}", "sha256": hash_of(number), "parents": [made]}
    return {"parents": [made]}


def test_a_circle_is_called_one():
    looped = chain(6, lambda n: other(n % 3 + 1))
    tree = recorded("x", {"cogloom": json.dumps(looped)}, other(99))
    assert [node.state for node in tree.walk()][-1] == "circle"
    assert len(list(tree.walk())) == 5
    own = recorded("x", {"cogloom": json.dumps({"parents": [{"name": "x", "sha256": HASH}]})}, HASH)
    assert own.parents[0].state == "circle"
    assert "its own ancestor" in own.lines()[1]


def test_a_circle_of_files_ends():
    """Files that name each other, with hashes that are taken for right."""
    one, two = other(1), other(2)
    metadata = {
        one: {"cogloom": json.dumps({"parents": [{"name": "two", "sha256": two}]})},
        two: {"cogloom": json.dumps({"parents": [{"name": "one", "sha256": one}]})},
    }
    tree = recorded("one", metadata[one], one)
    found = proved(tree, lambda claim: Found("verified", metadata[claim.sha256]))
    assert [(node.name, node.state) for node in found.walk()] == [
        ("one", "verified"), ("two", "verified"), ("one", "circle"),
    ]  # fmt: skip


def test_depth_and_number_are_bounded():
    deep = recorded("x", {"cogloom": json.dumps(chain(60))}, HASH)
    assert len(list(deep.walk())) <= DEPTH + 3
    assert [node.state for node in deep.walk()][-1] == "cut off"
    wide = {"parents": [{"name": f"n{n}", "sha256": other(n)} for n in range(10_000)]}
    tree = recorded("x", {"cogloom": json.dumps(wide)}, HASH)
    assert len(tree.parents) <= COUNT + 1
    assert tree.parents[-1].state == "cut off"
    bush = {"name": "a", "sha256": "", "parents": [{"name": "leaf"}] * 30}
    for _ in range(3):
        bush = {"name": "a", "sha256": "", "parents": [bush] * 30}
    tree = recorded("x", {"cogloom": json.dumps(bush)}, HASH)
    assert len(list(tree.walk())) <= 3 * COUNT
    asked: list[str] = []
    endless = {"cogloom": json.dumps({"parents": [{"name": f"n{n}", "sha256": other(n)} for n in range(100)]})}

    def find(claim: Lineage) -> Found:
        asked.append(claim.name)
        return Found("verified", endless)

    assert len(list(proved(recorded("x", endless, HASH), find).walk())) <= COUNT * (COUNT + 2)
    assert len(asked) <= COUNT


def test_odd_metadata_tells_nothing():
    for text in ("", "{", "[]", "3", '{"parents": 3}', '{"parents": [1, "x", null]}', "[" * 10_000, '{"a": 1, "a": 2}'):
        tree = recorded("x", {"cogloom": text, "cogloom.training": text}, HASH)
        assert not any(node.sha256 for node in tree.parents)
        assert tree.lines()
    assert recorded("x", {"cogloom": " " * (2 << 20)}, HASH).parents == ()
    odd = {"name": "a\x1b[31m\u202eb" * 50, "sha256": "0" * 63, "weight": float("1e9"), "bytes": -5, "blocks": {"a": 1}}
    (parent,) = recorded("x", {"cogloom": json.dumps({"parents": [odd]})}, HASH).parents
    assert parent.sha256 == ""
    assert parent.state == "unknown"
    assert parent.nbytes is None
    assert len(parent.name) <= 80
    assert parent.name.isprintable()


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from([other(1), other(2), HASH]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.sampled_from(["parents", "name", "sha256", "role", "base", "weight", "bytes", "made_by", "rule", "parent"]),
        inner, max_size=5,
    ),
    max_leaves=40,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(_json, _json)
def test_any_metadata_makes_a_small_tree(made: Any, training: Any):
    metadata = {"cogloom": json.dumps(made), "cogloom.training": json.dumps(training)}
    tree = recorded("x", metadata, HASH)
    found = proved(tree, lambda claim: Found("verified", metadata))
    for one in (tree, found):
        assert len(list(one.walk())) <= 1000
        assert all(node.state != "recorded" for node in found.walk())
        json.dumps(one.as_dict())
        assert len(one.lines()) <= 1000
    again = recorded("y", {"cogloom": json.dumps({"parents": [tree.to_record()]})})
    assert [node.name for node in again.parents[0].walk()][:3] == [node.name for node in tree.walk()][:3]

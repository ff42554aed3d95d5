"""What the tabs Adapters, Workflows and Train do between page and nodes, without a page."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from nodes.engine.errors import CogLoomError, UsageError, WorkflowError
from nodes.host import LocalHost
from nodes.lora import DEMO_ADAPTERS
from nodes.workflow import ALLOWED, Graph, plan
from ui import text, training
from ui.adapters_tab import browse, convert_of, found
from ui.tab_parts import plain
from ui.text_more import MORE
from ui.train_tab import KNOWN, settings_of
from ui.workflows_tab import _input_name, graph_of, rows_of, with_values

TEMPLATES = Path(__file__).resolve().parents[1] / "workflows"


def template(name: str = "text_to_video") -> Graph:
    return json.loads((TEMPLATES / "api" / f"{name}.json").read_text(encoding="utf-8"))


def key_of(graph: Graph, kind: str) -> str:
    return next(key for key, one in graph.items() if one["class_type"] == kind)


def edited(rows: list[list[str]], key: str, name: str, value: Any) -> list[list[Any]]:
    rows = deepcopy(rows)
    next(row for row in rows if row[0] == key and row[2] == name)[3] = value
    return rows


# --- the table of a workflow ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("name", ["text_to_video", "compare_a_b", "schedule", "image_to_video"])
def test_a_table_that_was_not_touched_changes_nothing(name: str, language: str):
    graph = template(name)
    rows = rows_of(graph, language)
    assert with_values(graph, rows, language) == graph
    assert with_values(graph, rows[::-1], language) == graph  # sorted by a click on a column
    assert with_values(graph, rows_of(graph, "en"), language) == graph  # the language was changed meanwhile
    assert with_values(graph, [list(row) for row in rows if row[0] == rows[0][0]], language) == graph


def test_edits_have_the_type_of_their_input():
    graph = template()
    key, rows = key_of(graph, "CogLoomSampler"), rows_of(graph, "en")
    for name, said, meant in (
        ("seed", str(2**62), 2**62), ("steps", 12, 12), ("guidance", "2.5", 2.5), ("verify", "TRUE", True),
        ("scheduler", " ddim ", "ddim"),
    ):  # fmt: skip
        made = with_values(graph, edited(rows, key, name, said), "en")[key]["inputs"][name]
        assert made == meant
        assert type(made) is type(meant)
    prompt = key_of(graph, "CogLoomPrompt")
    text_of_it = 'two\nlines, "quoted" <b>'
    made = with_values(graph, edited(rows, prompt, "prompt", text_of_it), "en")
    assert made[prompt]["inputs"]["prompt"] == text_of_it
    assert graph == template()  # the one that is open stays as it was read


def test_a_number_that_is_none_is_said_with_the_nodes_title(host: LocalHost):
    graph = template()
    key = key_of(graph, "CogLoomSampler")
    graph[key]["_meta"]["title"] = "My sampler"
    made = with_values(graph, edited(rows_of(graph, "en"), key, "steps", "many"), "en")
    with pytest.raises(WorkflowError, match=r"My sampler .*steps is 'many'"):
        plan(made, host)


def test_links_are_shown_and_cannot_be_written_over():
    graph = template()
    key, rows = key_of(graph, "CogLoomDecode"), rows_of(graph, "en")
    links = {row[2]: row[3] for row in rows if row[0] == key}
    assert set(links) == {"base", "latent"}
    assert links["latent"].startswith("← CogVideoX Sampler (")
    with pytest.raises(UsageError, match=r"latent of node .* is linked"):
        with_values(graph, edited(rows, key, "latent", "5"), "en")
    said = edited(rows, key_of(graph, "CogLoomPrompt"), "prompt", "← not a link")
    assert with_values(graph, said, "en")[key_of(graph, "CogLoomPrompt")]["inputs"]["prompt"] == "← not a link"


@pytest.mark.parametrize(
    "rows",
    [None, "x", [1], [["1", "a", "b"]], [["1", "a", "no such", "x"]], [["99", "a", "steps", "x"]],
     [[{}, [], None, 1]], [["1", "a", "checkpoint", "x" * 30_000]]],
    ids=["none", "text", "number", "short", "input", "node", "objects", "long"],
)  # fmt: skip
def test_a_table_that_is_none_is_refused(rows: Any):
    with pytest.raises(CogLoomError):
        with_values(template(), rows, "en")


@pytest.mark.parametrize("language", ["en", "zh"])
def test_no_two_inputs_of_a_node_have_one_name_in_the_table(language: str):
    for kind, node in ALLOWED.items():
        names = [_input_name(kind, one.name, language) for one in node.inputs]
        assert len(set(names)) == len(names), (kind, names)


@pytest.mark.parametrize(
    "text_of_it", ["", "[]", "null", "{}", "[" * 100_000, '{"nodes": 3}', '{"1": {"class_type": 3}}']
)
def test_texts_that_are_no_workflow(text_of_it: str):
    with pytest.raises(WorkflowError):
        rows_of(graph_of(text_of_it), "en")


# --- adapters ---------------------------------------------------------------------------------------------------------


def test_adapters_are_found_by_word_rank_and_base(host: LocalHost):
    def names(search: str = "", base: str = "", rank: int = 0) -> list[str]:
        return [row["title"] for row in found(host, search, base, rank)]

    assert names() == ["bounce", "neon", "orbit", "star", "sunset"]
    assert names("NEO") == ["neon"]
    assert names("neon safetensors") == ["neon"]
    assert names(rank=8) == ["neon", "sunset"]
    assert names(base="cogloom-demo-i2v") == ["bounce", "neon", "orbit", "star", "sunset"]
    assert names("nothing like it") == []
    assert [row["title"] for row in browse(host, "en", "star", "", 0, "star.safetensors")["rows"]] == ["star"]
    assert browse(host, "en", "star", "", 0, "star.safetensors")["rows"][0]["chosen"] is True
    for wrong in ((3, "", 0), ("", "no such base", 0), ("", 3, 0), ("", "", "x")):
        with pytest.raises(CogLoomError):
            found(host, *wrong)
        assert browse(host, "en", *wrong, None)["rows"] == []


def test_converting_replaces_nothing(host: LocalHost):
    source = DEMO_ADAPTERS / "neon.safetensors"
    first = convert_of(host, source, "-diffusers", None)
    second = convert_of(host, source, "-diffusers", 4.0)
    assert [first["target"], second["target"]] == ["neon-diffusers.safetensors", "neon-diffusers-2.safetensors"]
    assert second["scale"] == 0.5
    assert {path.name for path in host.lora_folders[0].iterdir()} == {first["target"], second["target"]}
    with pytest.raises(UsageError):
        convert_of(host, source, "", True)


def test_what_is_not_printable_is_spelt_out_and_what_is_long_is_cut():
    assert plain("a\u202eb<script>") == "a\\u202eb<script>"
    assert plain("x" * 10_000) == "x" * 2_000 + "… (10,000)"
    assert plain({"a": ["\u2066"]}) == '{"a": ["\\u2066"]}'


# --- training ---------------------------------------------------------------------------------------------------------


def test_datasets_are_the_folders_below_the_data_folder(tmp_path: Path):
    root, outside = tmp_path / "data", tmp_path / "outside"
    for folder in (root / "a", root / "b" / "c", root / ".hidden", root / "empty", outside):
        folder.mkdir(parents=True)
    for file in (root / "a" / "x.mp4", root / "b" / "c" / "prompts.txt", root / ".hidden" / "x.png", outside / "x.mp4",
                 root / "y.png"):  # fmt: skip
        file.touch()
    if hasattr(os, "symlink"):
        with contextlib.suppress(OSError):  # Windows lets not everybody
            (root / "link").symlink_to(outside, target_is_directory=True)
    assert training.datasets(root) == ["a", "b/c"]
    assert training.dataset_at(root, "b/c") == (root / "b" / "c").resolve()
    for name in (
        "..",
        "../outside",
        str(outside),
        "link",
        ".",
        "",
        "a/../../outside",
        "a\0",
        None,
        3,
        ".hidden",
        "empty",
    ):
        with pytest.raises(UsageError):
            training.dataset_at(root, name)
    assert training.datasets(tmp_path / "not there") == []


def test_settings_are_typed_and_named_when_they_are_wrong():
    made = settings_of(
        {"steps": "12", "learning_rate": 1e-3, "frames": "", "fps": None, "trigger_words": " a, b ,", "alpha": "4",
         "target_modules": "to_q, to_k", "gradient_checkpointing": True, "mixed_precision": "no"}, "en",
    )  # fmt: skip
    assert made == {
        "steps": 12, "learning_rate": 1e-3, "trigger_words": ["a", "b"], "alpha": 4.0, "mixed_precision": "no",
        "target_modules": ["to_q", "to_k"], "gradient_checkpointing": True,
    }  # fmt: skip
    for name, value in (("steps", "x"), ("steps", 1.5), ("rank", True), ("alpha", []), ("steps", math.inf)):
        with pytest.raises(UsageError, match=text.text(f"s_{name}", "en")):
            settings_of({name: value}, "en")


def test_a_line_of_many_steps_keeps_its_ends_and_its_mean():
    values = {step: float(step) for step in range(1, 10_001)} | {5: math.nan}
    made = training.points(values)
    assert len(made) <= training.POINTS
    assert made[-1][0] == 10_000
    assert made == sorted(made)
    assert training.points({}) == []
    assert training.points({2: 0.5, 1: 1.0}) == [[1, 1.0], [2, 0.5]]


def test_names_that_files_cannot_have(host: LocalHost, tmp_path: Path):
    for name in ("", "../x", "a/b", "a.b", " a", "x" * 81, "nul\0"):
        with pytest.raises(UsageError):
            training.start(host, tmp_path, name, "cogloom-demo", {}, 1, False)
    assert not (host.output_folder / "training").exists()


# --- texts ------------------------------------------------------------------------------------------------------------


def test_both_languages_say_the_same_values():
    for key, (english, chinese) in MORE.items():
        assert chinese
        assert english or key.startswith("h_")
        fields = [sorted(set(re.findall(r"\{(\w+)\}", one))) for one in (english, chinese)]
        assert fields[0] == fields[1], key
        assert key not in text.T
    for name in KNOWN:
        assert f"s_{name}" in MORE

"""The page's texts and the help pages say what the schemas say, in both languages."""

from __future__ import annotations

import ast
import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from locales.make import DOCS, LOCALES, SYNTAX, categories, wanted
from nodes.schema import NODES, Node

ROOT = Path(__file__).resolve().parents[1]
PICTURE_BYTES = 60_000
LANGUAGES = ("en", "zh")
nodes = pytest.mark.parametrize("node", NODES.values(), ids=lambda node: node.id)
languages = pytest.mark.parametrize("language", LANGUAGES)


@functools.cache
def texts(language: str, file: str = "nodeDefs") -> dict[str, Any]:
    return json.loads((LOCALES / language / f"{file}.json").read_text(encoding="utf-8"))


def test_what_is_made_from_the_schemas_is_up_to_date():
    """If not: `python locales/make.py`."""
    off = [
        file.relative_to(ROOT).as_posix()
        for file, text in wanted()
        if not file.is_file() or file.read_text(encoding="utf-8") != text
    ]
    assert off == []


@nodes
def test_every_node_input_and_output_has_a_chinese_name_and_tooltip(node: Node):
    told = texts("zh")[node.id]
    assert set(told) == {"display_name", "description", "inputs", "outputs"}
    assert list(told["inputs"]) == [one.name for one in node.inputs]
    assert list(told["outputs"]) == [str(n) for n in range(len(node.outputs))]
    for one in (*told["inputs"].values(), *told["outputs"].values()):
        assert set(one) == {"name", "tooltip"}
        assert one["name"].strip()
        assert re.search(r"[\u4e00-\u9fff]", one["tooltip"]), one
    assert re.search(r"[\u4e00-\u9fff]", told["description"])


def test_nothing_is_translated_that_is_not_there():
    assert set(texts("zh")) == set(NODES)


@languages
def test_categories_are_named(language: str):
    assert set(texts(language, "main")["nodeCategories"]) == set(categories())


@languages
def test_no_text_has_a_character_that_the_page_would_interpret(language: str):
    """Front end 1.27 fails to show a node whose text has a @, and shows nothing in place of {…}."""
    found = []

    def look(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                look(inner, f"{path}.{key}")
        elif SYNTAX & set(value):
            found.append(path)

    look(texts(language), language)
    assert found == []


# --- help pages -------------------------------------------------------------------------------------------------------


def page(node: Node, language: str) -> str:
    return (DOCS / node.id / f"{language}.md").read_text(encoding="utf-8")


@nodes
@languages
def test_a_page_has_a_picture_lists_examples_and_errors(node: Node, language: str):
    text = page(node, language)
    headings = re.findall(r"^## (.+)$", text, re.M)
    assert headings == (
        ["Inputs", "Outputs", "Examples", "If it says"] if language == "en" else ["输入", "输出", "示例", "出错时"]
    )
    (picture,) = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert picture == f"{node.id}/{language}.webp"
    data = (DOCS / picture).read_bytes()
    assert data[:4] == b"RIFF"
    assert data[8:12] == b"WEBP"
    assert len(data) <= PICTURE_BYTES
    for name in (*(one.name for one in node.inputs), *(out.name for out in node.outputs)):
        assert f"\n- `{name}`" in text
    examples = text.split("\n## ")[3]
    assert len(re.findall(r"^- ", examples, re.M)) >= 2


def test_no_page_or_picture_is_left_over():
    assert {file.stem for file in DOCS.glob("*.md")} == set(NODES)
    assert {folder.name for folder in DOCS.iterdir() if folder.is_dir()} == set(NODES)
    allowed = {f"{language}{suffix}" for language in LANGUAGES for suffix in (".md", ".webp")}
    for folder in DOCS.iterdir():
        if folder.is_dir():
            assert {file.name for file in folder.iterdir()} == allowed


@functools.cache
def sentences() -> str:
    """Every text in the product's source, adjacent literals joined as Python joins them."""
    found = []
    for file in (ROOT / "nodes").rglob("*.py"):
        for at in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(at, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in at.values))
            elif isinstance(at, ast.Constant) and isinstance(at.value, str):
                found.append(at.value)
    return "\n".join(found)


def quoted(node: Node, language: str) -> list[str]:
    """What stands before the dash of each point of a page's last part."""
    dash = " – " if language == "en" else "："
    points = re.findall(r"^- (.+)$", page(node, language).split("\n## ")[4], re.M)
    return [quote for point in points if dash in point for quote in re.findall(r"`([^`]+)`", point.split(dash)[0])]


@nodes
@languages
def test_the_messages_that_a_page_explains_are_messages_that_exist(node: Node, language: str):
    told = quoted(node, language)
    assert told
    for quote in told:
        assert quote in sentences(), quote


@nodes
def test_both_languages_explain_the_same_messages(node: Node):
    assert quoted(node, "en") == quoted(node, "zh")

"""What follows from the node schemas: locales/en, and the lists of inputs and outputs in the help pages of web/docs.

    python locales/make.py            writes what is out of step
    python locales/make.py --check    names it, with exit status 1

Written by hand are locales/zh, and all of the help pages but these lists, which stand below their first two headings
of second level.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import nodes.graph  # noqa: E402, F401  (fills NODES)
from nodes.schema import NODES, Choice, Flag, Input, Node, Number, Socket, Text, Whole  # noqa: E402

LOCALES, DOCS = ROOT / "locales", ROOT / "web" / "docs"
SYNTAX = frozenset("@{}|")  # vue-i18n reads these as its own; front end 1.27 then fails to draw the node
WORDS = {
    "en": {
        "point": "- `{name}`{label}: {tip}<br>*{kind}*",
        "default": "{kind}; default {value}",
        "connection": "{kind}; {value}",
        "none": "This node has no outputs.",
        "optional": "may stay unconnected",
        "required": "has to be connected",
        "choice": "choice",
        "range": "{kind}, {low} to {high}",
        "flag": {True: "on", False: "off"},
        "text": {True: "text of several lines", False: "text"},
        "advanced": "advanced",
    },
    "zh": {
        "point": "- `{name}`{label}：{tip}<br>*{kind}*",
        "default": "{kind}；默认 {value}",
        "connection": "{kind}；{value}",
        "none": "此节点没有输出。",
        "optional": "可不连接",
        "required": "必须连接",
        "choice": "选项",
        "range": "{kind}，{low} 到 {high}",
        "flag": {True: "开", False: "关"},
        "text": {True: "多行文本", False: "文本"},
        "advanced": "高级",
    },
}


def definitions() -> dict[str, Any]:
    """locales/en/nodeDefs.json: what the server says anyway, so that other languages have a model to follow.

    A text with a character of vue-i18n's syntax is left out: the page then shows the server's own.
    """
    return {node.id: _definition(node) for node in NODES.values()}


def _definition(node: Node) -> dict[str, Any]:
    return {
        "display_name": node.title,
        "description": " ".join(node.about.split()),
        "inputs": {one.name: _plain({"name": one.name, "tooltip": one.kind.tip}) for one in node.inputs},
        "outputs": {str(n): _plain({"name": out.name, "tooltip": out.tip}) for n, out in enumerate(node.outputs)},
    }


def _plain(texts: dict[str, str]) -> dict[str, str]:
    return {key: text for key, text in texts.items() if not SYNTAX & set(text)}


def categories() -> dict[str, str]:
    """Every part of every category: that is how the page looks them up."""
    return {part: part for node in NODES.values() for part in node.category.split("/")}


# --- help pages -------------------------------------------------------------------------------------------------------


def with_lists(page: str, node: Node, language: str, texts: dict[str, Any]) -> str:
    """The page with its lists of inputs and outputs anew. Everything else of it stays.

    Lists and not tables: the page shows them in a panel as narrow as a phone, which cuts tables off.
    """
    parts = page.split("\n## ")
    if len(parts) < 3:
        raise SystemExit(f"{node.id}, {language}: a page has a heading `## ` for its inputs, and one for its outputs.")
    for number, points in ((1, _inputs(node, language, texts)), (2, _outputs(node, language, texts))):
        heading = parts[number].split("\n", 1)[0]
        parts[number] = f"{heading}\n\n{points}\n"
    return "\n## ".join(parts)


def _inputs(node: Node, language: str, texts: dict[str, Any]) -> str:
    words = WORDS[language]
    points = []
    for one in node.inputs:
        kind = _with_default(one, _kind(one, words), words)
        kind += f" ({words['advanced']})" if one.kind.advanced else ""
        points.append(_point(one.name, texts["inputs"][one.name], one.kind.tip, kind, words))
    return "\n".join(points)


def _outputs(node: Node, language: str, texts: dict[str, Any]) -> str:
    words = WORDS[language]
    points = [
        _point(out.name, texts["outputs"][str(n)], out.tip, out.type, words) for n, out in enumerate(node.outputs)
    ]
    return "\n".join(points) or words["none"]


def _point(name: str, told: dict[str, str], english: str, kind: str, words: dict[str, Any]) -> str:
    label = "" if told["name"] == name else f" {told['name']}"
    # Chinese has the wide form where the narrow one is vue-i18n's; here there is no such need.
    tip = told.get("tooltip", english).replace("＠", "@")
    return words["point"].format(name=name, label=label, tip=tip, kind=kind)


def _kind(one: Input, words: dict[str, Any]) -> str:
    kind = one.kind
    if isinstance(kind, Socket):
        return kind.type
    if isinstance(kind, Choice):
        return words["choice"] if callable(kind.options) else ", ".join(kind.options)
    if isinstance(kind, (Whole, Number)):
        name = "INT" if isinstance(kind, Whole) else "FLOAT"
        return words["range"].format(kind=name, low=_number(kind.low), high=_number(kind.high))
    if isinstance(kind, Flag):
        return " / ".join(words["flag"].values())
    assert isinstance(kind, Text)
    return words["text"][kind.lines]


def _number(value: float) -> str:
    return "2⁶³−1" if value == 2**63 - 1 else f"{value:,g}"


def _with_default(one: Input, kind: str, words: dict[str, Any]) -> str:
    if isinstance(one.kind, Socket):
        return words["connection"].format(kind=kind, value=words["required" if one.required else "optional"])
    if not one.has_default or one.default == "":
        return kind
    value = words["flag"][one.default] if isinstance(one.default, bool) else one.default
    return words["default"].format(kind=kind, value=value)


# --- files ------------------------------------------------------------------------------------------------------------


def wanted() -> Iterator[tuple[Path, str]]:
    """Every file that is made here, with what it should hold.

    The page asks for NODE/LANGUAGE.md, then for NODE.md: the English page is there under both names, since all other
    languages come to the second.
    """
    english = definitions()
    yield LOCALES / "en" / "nodeDefs.json", _json(english)
    yield LOCALES / "en" / "main.json", _json({"nodeCategories": categories()})
    texts = {"en": english, "zh": json.loads((LOCALES / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))}
    for node in NODES.values():
        for language, said in texts.items():
            file = DOCS / node.id / f"{language}.md"
            page = with_lists(file.read_text(encoding="utf-8"), node, language, said[node.id])
            yield file, page
            if language == "en":
                yield DOCS / f"{node.id}.md", page


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"


def main(arguments: list[str]) -> int:
    off = [(file, text) for file, text in wanted() if not file.is_file() or file.read_text(encoding="utf-8") != text]
    for file, text in off:
        if "--check" not in arguments:
            file.write_text(text, encoding="utf-8", newline="\n")
        sys.stdout.write(f"{file.relative_to(ROOT).as_posix()}\n")
    return 1 if off and "--check" in arguments else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

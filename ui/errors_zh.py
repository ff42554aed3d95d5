"""Chinese words for what the engine and the nodes say. They say it in English, where it is raised: one language in
logs, exceptions and API answers. The page, if it is Chinese, has the finished sentence translated here.

`locales/zh/messages.json` has {"sentences": …, "phrases": …}, each {English: Chinese}. The English is the f-string as
the source has it, with {} for each hole; holes side by side are one. In the Chinese {0} is the first hole's value as it
stands, and
    {0:t}   is translated itself, if it is a sentence or a phrase (else it stays English)
    {0:l}   likewise, item by item, of a list with `; `; {0:c} of one with commas
    {0:n}   has to be a number, and {0:w} one word, or the template is not meant
Phrases are looked for in such holes alone, so that a file called `a video` keeps its name. One that begins with a blank
or a comma may follow another one.
"""

from __future__ import annotations

import functools
import json
import re
import string
from collections.abc import Iterator
from dataclasses import dataclass

from nodes.engine.errors import CogLoomError
from nodes.host import ROOT
from nodes.schema import sentence

LENGTH_CAP = 8_000  # characters of a sentence
DEPTH = 8  # sentences in sentences
TRIES = 300  # texts that are looked up for one message
PARTS = 20  # of a list, or sentences in a row
WEAK = 8  # letters; with fewer, what is known of a text may be so by chance
NUMBER = re.compile(r"[+\-−]?[\d.,/]{1,40}(e[+\-]?\d{1,4})? ?%?", re.ASCII)
HAN = re.compile("[\u4e00-\u9fff]")
CLOSED = re.compile("[\u4e00-\u9fff，。；：？）]")
LATIN = re.compile("[A-Za-z0-9]")


@dataclass(frozen=True)
class Template:
    literals: tuple[str, ...]  # between the holes; first and last may be ""
    chinese: tuple[tuple[str, int | None, str], ...]  # (text, then the hole's number or None, and its kind)
    letters: int
    longest: str  # of the literals

    @property
    def weight(self) -> int:
        return sum(map(len, self.literals))

    def values(self, text: str) -> list[str] | None:
        """What the holes hold, None where the text is not made by this template. Each hole ends at the first place
        where what follows it begins: no going back, so the time is linear in the text whatever is in it."""
        first, *inner = self.literals
        if not text.startswith(first):
            return None
        if not inner:
            return [] if text == first else None
        last, at, found = inner.pop(), len(first), []
        for literal in inner:
            end = text.find(literal, at)
            if end < 0:
                return None
            found.append(text[at:end])
            at = end + len(literal)
        if len(text) - at < len(last) or not text.endswith(last):
            return None
        return [*found, text[at : len(text) - len(last)]]


def chinese(text: str) -> str:
    """A sentence of ours, or several in a row or on lines, in Chinese; as it is where it is not known."""
    return text if len(text) > LENGTH_CAP else _cached(text)


def told(text: str, language: str) -> str:
    return chinese(text) if language == "zh" else text


def phrase(text: str, language: str) -> str:
    """As `told`, for what is no sentence: what is being done, or a reason."""
    found = Look().sentence(text, 1) if language == "zh" and len(text) <= LENGTH_CAP else None
    return text if found is None else found.text


def worded(error: CogLoomError, language: str) -> str:
    """An error for the page: in its language where there are words for it, and safe to show as plain text."""
    return told(sentence(error), language)


@functools.lru_cache(256)
def _cached(text: str) -> str:
    return "\n".join(_line(line) for line in text.split("\n", PARTS))


def _line(text: str) -> str:
    look = Look()
    whole = look.sentence(text, 0)
    row = look.row(text, r"(?<=[.?!]) ", 0)
    if all(row[1]) and (whole is None or sum(one.letters for one in row[1] if one) > whole.letters):
        return "".join(row[0])
    if whole is None:  # half a message in another language helps nobody, but a note may be no sentence
        found = look.sentence(text, 1)
        whole = found if found is not None and found.letters >= 2 * WEAK else None
    return text if whole is None else whole.text


@dataclass(frozen=True)
class Found:
    text: str
    letters: int  # that were known: of several ways to read a message, the one that explains the most is meant


class Look:
    """One message's translation. `budget` bounds the work, whatever names and files bring into it."""

    def __init__(self) -> None:
        self.budget = TRIES
        self.known: dict[tuple[str, bool], Found | None] = {}

    def sentence(self, text: str, depth: int) -> Found | None:
        key = (text, depth > 0)
        if key not in self.known:
            if depth > DEPTH or self.budget <= 0:
                return None
            self.budget -= 1
            self.known[key] = self._best(text, depth)
        return self.known[key]

    def _best(self, text: str, depth: int) -> Found | None:
        best: Found | None = None
        swapped = text[:1].swapcase() + text[1:]
        both = f"{text}\n{swapped[:400]}"
        for one in _tables()[depth > 0]:  # those with the most words of their own first
            if one.longest not in both:
                continue
            values, turned = one.values(text), 0
            if values is None and one.literals[0]:  # a name keeps its case
                values, turned = one.values(swapped), 1
            if values is not None:
                said = self._filled(one, values, depth)
                if said is not None and (best is None or said.letters - turned > best.letters):
                    best = Found(said.text, said.letters - turned)
        return best

    def _filled(self, one: Template, values: list[str], depth: int) -> Found | None:
        said, letters, asked, inner = "", one.letters, False, None
        for text, hole, kind in one.chinese:
            # A template has a blank where a name may stand; Chinese words in its place want none.
            ends = inner is not None and bool(CLOSED.match(said[-1:]))
            tight = ends and text[:1] == " " and HAN.match(text[1:2])
            said = _joined(said, text[1:] if tight else text)
            inner = None
            if hole is None:
                continue
            value = values[hole]
            if kind == "n" and not NUMBER.fullmatch(value):
                return None
            if kind == "w" and (not value or re.search(r"\s", value)):
                return None
            if kind in ("l", "c") and re.search("[.?!] [A-Z]", value):
                return None  # that is no list any more
            if kind in ("t", "l", "c") and value:
                asked = True
                inner = self._hole(value, kind, depth + 1)
                if inner is not None:
                    value, letters = inner.text, letters + inner.letters
                    if said[-1:] == " " and HAN.match(said[-2:-1]) and HAN.match(value[:1]):
                        said = said[:-1]
            said = _joined(said, value)
        return None if asked and letters < WEAK else Found(said, letters)

    def _hole(self, text: str, kind: str, depth: int) -> Found | None:
        whole = self.sentence(text, depth)
        if kind == "t":
            return whole
        mark, joined = ("; ", "；") if kind == "l" else (", (?:and |or )?| and | or ", "、")
        row = self.row(text, mark, depth)
        letters = sum(one.letters for one in row[1] if one)
        return whole if letters <= (whole.letters if whole else 0) else Found(joined.join(row[0]), letters)

    def row(self, text: str, mark: str, depth: int) -> tuple[list[str], list[Found | None]]:
        """What several sentences say, cut where the most is known: one of them may hold the mark itself."""
        parts = re.split(f"({mark})", text, maxsplit=PARTS)  # with the marks between them
        # From each part on to the end: (letters known, how many are not, where the first one ends, what it says).
        best: dict[int, tuple[int, int, int, Found | None]] = {len(parts) + 1: (0, 0, 0, None)}
        for at in range(len(parts) - 1, -1, -2):
            ways = []
            for end in range(at + 1, len(parts) + 1, 2):
                whole = (at, end) == (0, len(parts))  # that was tried
                one = None if whole else self.sentence("".join(parts[at:end]), depth)
                if one is not None or end == at + 1:
                    letters, missing, _, _ = best[end + 1]
                    ways.append((letters + (one.letters if one else 0), -missing - (one is None), -end, one))
            letters, missing, end, one = max(ways, key=lambda way: way[:3])
            best[at] = (letters, -missing, -end, one)
        texts: list[str] = []
        found: list[Found | None] = []
        at = 0
        while at < len(parts):
            _, _, end, one = best[at]
            texts.append("".join(parts[at:end]) if one is None else one.text)
            found.append(one)
            at = end + 1
        return texts, found


def _joined(before: str, after: str) -> str:
    """With a blank between Chinese and what is not: templates do not know their values."""
    ends, begins = before[-1:], after[:1]
    apart = (HAN.match(ends) and LATIN.match(begins)) or (LATIN.match(ends) and HAN.match(begins))
    return f"{before} {after}" if apart else before + after


@functools.cache
def _tables() -> tuple[tuple[Template, ...], tuple[Template, ...]]:
    """(sentences, sentences and phrases), the heaviest first."""
    data = json.loads((ROOT / "locales" / "zh" / "messages.json").read_text(encoding="utf-8"))
    sentences = [template(*pair) for pair in data["sentences"].items()]
    phrases = [template(*_headed(*pair)) for pair in data["phrases"].items()]

    def ordered(found: list[Template]) -> tuple[Template, ...]:
        return tuple(sorted(found, key=lambda one: -one.weight))

    return ordered(sentences), ordered(sentences + phrases)


def _headed(english: str, said: str) -> tuple[str, str]:
    """What begins with a blank or a comma goes on from something else, which is a hole before it."""
    if english[:1] not in (" ", ",", ";"):
        return english, said
    moved = "".join(
        text.replace("{", "{{").replace("}", "}}") + ("" if hole is None else f"{{{hole + 1}:{kind}}}")
        for text, hole, kind in _parsed(said)
    )
    return "{}" + english, "{0:t}" + moved


def template(english: str, said: str) -> Template:
    parts = list(string.Formatter().parse(english))
    literals = [text for text, _, _, _ in parts]
    if not parts or parts[-1][1] is not None:
        literals.append("")
    joined: list[str] = []
    holes = [name is not None for _, name, _, _ in parts]
    for text, after_hole in zip(literals, [True, *holes], strict=False):
        if after_hole or not joined:  # an escaped brace ends a part, too, but there is no hole
            joined.append(text)
        else:
            joined[-1] += text
    letters = sum(c.isascii() and c.isalpha() for c in "".join(joined))
    return Template(tuple(joined), tuple(_parsed(said)), letters, max(joined, key=len))


def _parsed(said: str) -> Iterator[tuple[str, int | None, str]]:
    for text, name, kind, _ in string.Formatter().parse(said):
        yield text, None if name is None else int(name), kind or ""

"""Where an adapter comes from: adapter → parent adapters → base, each by its hash, as files tell it of themselves.

What a file tells is a claim. It is read with suspicion here (bounded in depth, number and length, and a circle is
called one), and it is proved elsewhere: `proved` asks for each claim whether there is a file with that hash.

    "cogloom"            of what the workshop wrote: made_by, and parents with name, sha256, role, weight, bytes; a
                         parent may bring its own made_by and parents, so that the line does not end where a file of
                         it is not at hand
    "cogloom.training"   of what was trained: base, base_hash, step, and the adapter that it started from
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from .safetensors_file import strict_json

Role = Literal["adapter", "base", "fine-tuned"]
# recorded: claimed by a file and not looked for; unknown: claimed without a hash
State = Literal["recorded", "verified", "not here", "differs", "unknown", "circle", "cut off"]

DEPTH = 12  # generations
COUNT = 128  # nodes of a tree
CARRIED = 4  # generations above a parent that a record carries on
_TEXT = 1 << 20  # characters of one record
_NAME = 80  # characters
_HASH = re.compile(r"(?:sampled:)?[0-9a-f]{64}")
_SAID: Mapping[State, str] = {
    "recorded": "recorded",
    "verified": "verified",
    "not here": "not here",
    "differs": "here is another file of that name",
    "unknown": "no hash is recorded",
    "circle": "a circle: it is named as its own ancestor",
    "cut off": "more is recorded than is read",
}


@dataclass(frozen=True)
class Lineage:
    """One node, and what it was made of."""

    name: str
    role: Role
    sha256: str = ""  # empty: not known
    how: str = ""  # it was made, where it says so
    part: str = ""  # it has in what was made of it, such as its weight
    state: State = "recorded"
    parents: tuple[Lineage, ...] = ()
    nbytes: int | None = field(default=None, compare=False)  # of its file, which makes it easier to find

    def walk(self) -> Iterator[Lineage]:
        """This node and all above it."""
        yield self
        for parent in self.parents:
            yield from parent.walk()

    def bases(self) -> tuple[Lineage, ...]:
        """What it adds to, by the adapters that it was made of. What a fine-tuned model was made of is not asked."""
        found = [parent for parent in self.parents if parent.role == "base"]
        for parent in self.parents:
            if parent.role == "adapter":
                found += parent.bases()
        return tuple({(base.name, base.sha256): base for base in found}.values())

    def lines(self) -> tuple[str, ...]:
        """A small tree, a line for each node. Names in it are strangers' text."""
        head = f"{self.name} ({self.role}{f', {self.how}' if self.how else ''})"
        return (head, *self._below("")) if self.parents else (f"{head}: nothing is recorded of where it comes from",)

    def _below(self, indent: str) -> Iterator[str]:
        for n, parent in enumerate(self.parents, 1):
            what = ", ".join(filter(None, (parent.role, parent.how, parent.part)))
            short = f" {parent.sha256.removeprefix('sampled:')[:12]}" if parent.sha256 else ""
            yield f"{indent}+- {parent.name} ({what}){short}: {_SAID[parent.state]}"
            yield from parent._below(f"{indent}|  " if n < len(self.parents) else f"{indent}   ")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        told: dict[str, Any] = {"name": self.name, "role": self.role, "sha256": self.sha256 or None}
        told["state"] = self.state
        told |= {key: text for key, text in (("how", self.how), ("part", self.part)) if text}
        return told | ({"parents": [parent.as_dict() for parent in self.parents]} if self.parents else {})

    def to_record(self, generations: int = CARRIED) -> dict[str, Any]:
        """As a parent's entry in the record of what is made of it, with so many generations above."""
        told: dict[str, Any] = {"name": self.name, "role": self.role, "sha256": self.sha256}
        told |= {key: text for key, text in (("made_by", self.how), ("part", self.part)) if text}
        told |= {"bytes": self.nbytes} if self.nbytes else {}
        above = [parent.to_record(generations - 1) for parent in self.parents] if generations else []
        return told | ({"parents": above} if above else {})


class Found(NamedTuple):
    """What was found of a claim. `metadata` is that of the file, empty where there is none."""

    state: State
    metadata: Mapping[str, str] = {}


def recorded(name: str, metadata: Mapping[str, str], sha256: str = "", role: Role = "adapter") -> Lineage:
    """The tree as a file's metadata tells it, nothing looked for. Metadata that cannot be read tells nothing."""
    return _Reader().root(name, metadata, sha256, role)


def proved(tree: Lineage, find: Callable[[Lineage], Found]) -> Lineage:
    """The tree with the state of every claim. Where a file with the very hash is at hand, what it tells of itself
    counts, and not what its descendant tells of it."""
    budget = [COUNT]

    def node(claim: Lineage, above: tuple[str, ...]) -> Lineage:
        budget[0] -= 1
        if budget[0] < 0 or len(above) > DEPTH:
            return replace(claim, state="cut off", parents=())
        if claim.state in ("circle", "cut off"):
            return replace(claim, parents=())
        if claim.sha256 and claim.sha256 in above:
            return replace(claim, state="circle", parents=())
        found = find(claim) if claim.sha256 else Found("unknown")
        claim = replace(claim, state=found.state)
        if found.state == "verified" and found.metadata:
            own = recorded(claim.name, found.metadata, claim.sha256, claim.role)
            claim = replace(claim, how=own.how or claim.how, parents=own.parents or claim.parents)
        line = (*above, claim.sha256) if claim.sha256 else (*above, "")
        return replace(claim, parents=tuple(node(parent, line) for parent in claim.parents))

    parents = tuple(node(parent, (tree.sha256,)) for parent in tree.parents)
    return replace(tree, state="verified", parents=parents)


def held(tree: Lineage, base: str, transformer: str) -> tuple[Lineage, str | None]:
    """The recorded tree for the record of what is rendered on a base: `transformer` is its hash, and nothing is read.
    And a sentence where the adapter was made for weights other than these."""

    def node(claim: Lineage) -> Lineage:
        state = claim.state
        if claim.role == "base" and claim.sha256:
            state = "verified" if claim.sha256 == transformer else "differs"
        return replace(claim, state=state, parents=tuple(map(node, claim.parents)))

    known = [claim for claim in tree.bases() if claim.sha256]
    if not known or any(claim.sha256 == transformer for claim in known):
        return node(tree), None
    first = known[0]
    return node(tree), (
        f"{tree.name} was made for {first.name} with weights {_brief(first.sha256)}, and {base} has "
        f"{_brief(transformer)}: it fits, and may look otherwise than it was trained to"
    )


def _brief(sha256: str) -> str:
    return sha256.removeprefix("sampled:")[:12]


class _Reader:
    """One reading, with what is left of its bounds."""

    def __init__(self) -> None:
        self.left = COUNT

    def root(self, name: str, metadata: Mapping[str, str], sha256: str, role: Role) -> Lineage:
        made, training = (_table(metadata.get(key)) for key in ("cogloom", "cogloom.training"))
        above = (sha256,) if sha256 else ()
        parents = self.parents(made, above)
        trained = self.trained(training, above)
        if not parents:
            how = _made(made) or (_trained(training) if trained else "")
            return Lineage(_clean(name), role, sha256, how, parents=trained)
        # One parent that tells nothing of itself: what was kept of its training speaks for it.
        if len(parents) == 1 and parents[0].role == "adapter" and not parents[0].parents and trained:
            parents = (replace(parents[0], how=parents[0].how or _trained(training), parents=trained),)
        return Lineage(_clean(name), role, sha256, _made(made), parents=parents)

    def parents(self, made: Mapping[str, Any], above: tuple[str, ...]) -> tuple[Lineage, ...]:
        listed = made.get("parents")
        found = []
        for entry in listed if isinstance(listed, list) else ():
            if not isinstance(entry, dict):
                continue
            self.left -= 1
            if self.left < 0 or len(above) > DEPTH:
                found.append(Lineage("…", "adapter", state="cut off"))
                break
            found.append(self.entry(entry, above))
        base = made.get("base")
        if isinstance(base, dict) and not any(parent.role == "base" for parent in found):
            found.insert(0, self.entry({**base, "role": "base", "parents": []}, above))
        return tuple(found)

    def entry(self, entry: Mapping[str, Any], above: tuple[str, ...]) -> Lineage:
        role: Role = {"base": "base", "fine-tuned": "fine-tuned"}.get(str(entry.get("role")), "adapter")  # type: ignore[assignment]
        sha256 = _hash(entry.get("sha256"))
        state: State = "recorded" if sha256 else "unknown"
        size = entry.get("bytes")
        lineage = Lineage(_clean(entry.get("name")), role, sha256, _made(entry), _part(entry), state,
                          nbytes=size if type(size) is int and 0 < size < 1 << 48 else None)  # fmt: skip
        if sha256 and sha256 in above:
            return replace(lineage, state="circle")
        return replace(lineage, parents=self.parents(entry, (*above, sha256)))

    def trained(self, training: Mapping[str, Any], above: tuple[str, ...]) -> tuple[Lineage, ...]:
        if not training:
            return ()
        entry = {"name": training.get("base"), "sha256": training.get("base_hash"), "role": "base"}
        found = [self.entry(entry, above)]
        start = training.get("parent")
        if isinstance(start, str):
            start = {"name": start if not _HASH.fullmatch(start) else "an adapter", "sha256": start}
        if isinstance(start, dict):
            found.append(self.entry({**start, "role": "adapter", "part": "it was begun from"}, above))
        return tuple(found)


def _table(text: str | None) -> Mapping[str, Any]:
    if not text or len(text) > _TEXT:
        return {}
    try:
        table = strict_json(text)
    except ValueError:
        return {}
    return table if isinstance(table, dict) else {}


def _made(made: Mapping[str, Any]) -> str:
    rule = made.get("rule")
    method = rule.get("method") if isinstance(rule, dict) else None
    return " ".join(_clean(text, 60) for text in (made.get("made_by"), method) if isinstance(text, str))


def _trained(training: Mapping[str, Any]) -> str:
    step = training.get("step")
    return f"trained, step {step}" if type(step) is int else "trained"


def _part(entry: Mapping[str, Any]) -> str:
    weight, blocks = entry.get("weight"), entry.get("blocks")
    said = [_clean(entry["part"], 60)] if isinstance(entry.get("part"), str) else []
    if type(weight) in (int, float):
        said.append(f"weight {weight:g}")
    return ", ".join([*said, *([f"blocks {_clean(blocks, 40)}"] if blocks and isinstance(blocks, str) else [])])


def _hash(value: Any) -> str:
    return value if isinstance(value, str) and _HASH.fullmatch(value) else ""


def _clean(value: Any, most: int = _NAME) -> str:
    """A stranger's text on one line, with nothing in it that turns the direction of writing."""
    text = value if isinstance(value, str) else ""
    return "".join(c for c in text[: 4 * most] if c.isprintable())[:most].strip() or "without a name"

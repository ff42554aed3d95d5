"""What the command line says, and how: text that cannot move the cursor, data, errors, one line of progress."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from typing import Any


def plain(text: str) -> str:
    """Names and texts come from strangers' files: nothing that moves the cursor, or turns the direction of writing."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def print_json(value: Any) -> None:
    """Readable beyond ASCII; what is not printable is escaped as JSON does it, which leaves DEL and C1 as they are."""
    text = json.dumps(value, indent=2, ensure_ascii=False)

    def escaped(c: str) -> str:
        raw = c.encode("utf-16-be", "surrogatepass").hex()
        return "".join(f"\\u{raw[i : i + 4]}" for i in range(0, len(raw), 4))

    print("".join(c if c.isprintable() or c == "\n" else escaped(c) for c in text))


def width() -> int:
    return max(60, shutil.get_terminal_size((100, 24)).columns)


def say_error(message: str) -> None:
    message = plain(" ".join(message.split()))
    print(textwrap.fill(f"error: {message}", width(), break_long_words=False, break_on_hyphens=False), file=sys.stderr)


def say(text: str) -> None:
    """A paragraph on stdout."""
    Bar.clear()
    print(textwrap.fill(plain(text), width(), subsequent_indent="  ", break_long_words=False, break_on_hyphens=False))


class Bar:
    """One line of progress on stderr; on a terminal it redraws, elsewhere it keeps quiet."""

    def __init__(self) -> None:
        self._what = ""

    def __call__(self, done: int, total: int, what: str, preview: Any = None) -> None:
        if not sys.stderr.isatty():
            return
        share = done / total if total else 1.0
        filled = round(share * 24)
        line = f"{what:<28.60} {'█' * filled}{'░' * (24 - filled)} {done}/{total}"
        sys.stderr.write(f"\r\x1b[2K{line[: width() - 1]}")
        sys.stderr.flush()

    def close(self) -> None:
        self.clear()

    @staticmethod
    def clear() -> None:
        if sys.stderr.isatty():
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()

"""Blind votes on a study's clips: what a judge is shown, what they say of it, and how the arms stand.

A judge gets a token, a prompt and two clips, and nothing that tells an arm: the clips are copies under the token's name
whose containers say nothing of themselves, and the sides are shuffled. The page has the same pairs as the terminal.

Beside the study's votes.jsonl lies votes.key, a random secret: with it a token can be read back, without it not.
"""

from __future__ import annotations

import contextlib
import functools
import hmac
import re
import secrets
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from .engine import votes
from .engine.errors import UsageError
from .engine.files import append_line, write_atomic
from .engine.statistics import Key, plural
from .engine.study import Cell, Study
from .engine.votes import Consistency, Pair, Ranking, Vote
from .host import Host

SIDES = ("left", "right")
JUDGE_CAP = 60  # characters of a judge's name
KEPT = 24 * 3600.0  # seconds for which a copy is left for a browser that comes back to it
COPIES = "votes"  # in the temporary folder
ASKED = {"l": "left", "r": "right", "t": "tie", "b": "bad"}  # what a judge types
_KEY = re.compile(rb"[0-9a-f]{64}")
_TOKEN = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Shown:
    """What a judge may see."""

    token: str
    prompt: str
    left: Path  # .mp4
    right: Path
    turn: int  # which one of this judge's votes it will be, from 1
    remaining: int  # pairs of this study that the judge has not seen, this one among them
    before: str | None = None  # what was said of it, where it is shown again to be thought over

    @property
    def progress(self) -> str:
        return f"vote {self.turn}; {plural(self.remaining, 'pair')} of this study not seen yet"


@dataclass(frozen=True)
class Standings:
    """What a judge had better not see before they are done."""

    ranking: Ranking
    judges: tuple[Consistency, ...]  # all together, then each
    notes: tuple[str, ...]  # lines of the log that were torn

    def words(self) -> str:
        return "\n".join([self.ranking.words(), *(one.words() for one in self.judges), *self.notes])

    def to_json(self) -> dict[str, object]:
        return {"ranking": self.ranking.to_json(), "judges": [votes.jsonable(one) for one in self.judges],
                "words": self.words()}  # fmt: skip


def next_pair(host: Host, study: Study, judge: str) -> Shown | None:
    """The pair whose vote tells most, to be shown to this judge; None when they have seen all there are. The same until
    somebody votes.

    Raises:
        UsageError: fewer than two arms with a clip, or no name for a judge. StudyError, DiskFull
    """
    judge, counted, there = checked_judge(judge), votes.read(study.votes).counted(), _available(study)
    pairs = votes.next_pairs(counted, there, _secret(study), judge)
    mine = [vote for vote in counted if vote.judge == judge]
    return _shown(host, study, pairs[0], len(mine) + 1, _unseen(mine, there)) if pairs else None


def last_pair(host: Host, study: Study, judge: str) -> Shown | None:
    """The pair that this judge voted on last, to be thought over: a second vote on it takes the first one's place. None
    before the first vote.

    Raises:
        UsageError, StudyError, DiskFull
    """
    judge, log, there = checked_judge(judge), votes.read(study.votes), _available(study)
    still = [vote for vote in log.votes if vote.judge == judge and _both(vote, there)]
    if not still:
        return None
    last, mine = still[-1], [vote for vote in log.counted() if vote.judge == judge]
    turn = next(number for number, vote in enumerate(mine, 1) if vote.pair == last.pair)
    return _shown(host, study, _decoded(study, last.pair), turn, _unseen(mine, there), last.choice)


def cast(study: Study, token: str, judge: str, choice: str) -> Vote:
    """Write down what a judge says of a pair: one of CHOICES. Of several votes on one token the last counts.

    Raises:
        UsageError: no pair of this study, or not such a choice or judge. DiskFull
    """
    vote = _decoded(study, token).vote(checked_judge(judge), choice)
    votes.append(study.votes, vote)
    return vote


def clip(host: Host, study: Study, token: str, side: str) -> Path:
    """The copy of a clip that a judge is shown.

    Raises:
        UsageError: no pair or no side. StudyError: it is not rendered any more. DiskFull
    """
    if side not in SIDES:
        raise UsageError(f"{str(side)[:40]!r} is no side; it is left or right.")
    pair = _decoded(study, token)
    return _copy(host, study, pair, side)


def standing(study: Study) -> Standings:
    """How the arms stand by all votes so far, and how far judges agree with themselves.

    Raises:
        UsageError: no votes yet, or fewer than two arms.
    """
    log = votes.read(study.votes)
    known = {arm.label for arm in study.plan.arms}
    counted = [vote for vote in log.counted() if vote.left in known and vote.right in known]
    if not counted:
        raise UsageError("There are no votes on this study yet.")
    shown = {arm for vote in counted for arm in (vote.left, vote.right)}
    arms = [arm.label for arm in study.plan.arms if arm.label in shown]
    return Standings(votes.rank(counted, arms), votes.consistency(counted), log.notes)


def vote(
    host: Host, study: Study, judge: str, ask: Callable[[str], str] = input, tell: Callable[[str], None] = print
) -> int:
    """At a terminal: tell of two files, ask which is better, and go on until there is no pair left or the judge types
    q. How many votes were cast. `ask` may raise EOFError, which ends it too.

    Raises:
        UsageError, StudyError, DiskFull
    """
    cast_now, back = 0, False
    while True:
        shown = (last_pair(host, study, judge) if back else None) or next_pair(host, study, judge)
        back = False
        if shown is None:
            tell("You have seen every pair of this study.")
            return cast_now
        for line in (shown.progress, _printable(shown.prompt), f"left: {shown.left}", f"right: {shown.right}"):
            tell(line)
        while True:
            try:
                said = ask("Which is better? l left, r right, t tie, b both bad, u the one before, q quit: ")
            except EOFError:
                return cast_now
            said = said.strip().lower()[:1]
            if said == "q":
                return cast_now
            if said == "u" or said in ASKED:
                break
        if said == "u":
            back = True
            continue
        cast(study, shown.token, judge, ASKED[said])
        cast_now += 1


def checked_judge(name: object) -> str:
    """Raises UsageError."""
    found = name.strip() if isinstance(name, str) else ""
    if not found or len(found) > JUDGE_CAP or not found.isprintable():
        raise UsageError(f"Say who judges: a name of 1 to {JUDGE_CAP} characters.")
    return found


# --- pairs ------------------------------------------------------------------------------------------------------------


def _available(study: Study) -> dict[str, set[Key]]:
    """Arm -> prompts and seeds that are rendered. Raises UsageError."""
    found: dict[str, set[Key]] = {}
    for cell in study.finished():
        found.setdefault(cell.arm, set()).add(cell.key)
    if len(found) < 2:
        raise UsageError(
            f"A vote needs clips of two arms, and this study has those of {len(found)} of {len(study.plan.arms)} so "
            "far. Render more of it."
        )
    return found


def _unseen(mine: Sequence[Vote], there: dict[str, set[Key]]) -> int:
    by_key: dict[Key, int] = {}
    for keys in there.values():
        for key in keys:
            by_key[key] = by_key.get(key, 0) + 1
    seen = {(*sorted((vote.left, vote.right)), vote.prompt, vote.seed) for vote in mine if _both(vote, there)}
    return sum(n * (n - 1) // 2 for n in by_key.values()) - len(seen)


def _both(vote: Vote, there: dict[str, set[Key]]) -> bool:
    return all((vote.prompt, vote.seed) in there.get(arm, ()) for arm in (vote.left, vote.right))


def _shown(host: Host, study: Study, pair: Pair, turn: int, remaining: int, before: str | None = None) -> Shown:
    _sweep(host)
    left, right = (_copy(host, study, pair, side) for side in SIDES)
    return Shown(pair.token, pair.prompt, left, right, turn, remaining, before)


def _decoded(study: Study, token: object) -> Pair:
    """Raises UsageError."""
    if not isinstance(token, str) or not _TOKEN.fullmatch(token):
        raise UsageError(f"{str(token)[:40]!r} is no pair of this study. Open the page again for the next pair.")
    plan = study.plan
    keys = tuple((prompt, seed) for prompt in plan.prompts for seed in plan.seeds)
    return _remembered(_secret(study), token, tuple(arm.label for arm in plan.arms), keys)


@functools.lru_cache(maxsize=1024)
def _remembered(secret: bytes, token: str, arms: tuple[str, ...], keys: Collection[Key]) -> Pair:
    """A page asks four times for each pair, and every time all pairs would be tried."""
    return votes.decode(secret, token, arms, keys)


def _secret(study: Study) -> bytes:
    """Made when it is first asked for. Lines are appended one after the other, whoever appends them, and the first one
    is the secret: two processes that both find none still agree. Raises UsageError, DiskFull."""
    path = study.folder / "votes.key"
    for _ in range(2):
        try:
            lines = path.read_bytes().split(b"\n")[:-1]  # what has no end was torn
        except FileNotFoundError:
            lines = []
        except OSError as error:
            raise UsageError(f"{path.name}: cannot be read ({error.strerror or error}).") from error
        whole = next((line for line in lines if _KEY.fullmatch(line)), None)
        if whole is not None:
            return bytes.fromhex(whole.decode())
        append_line(path, secrets.token_hex(32).encode())
    raise UsageError(f"{path.name}: no key can be kept in {path.parent}; is the disk full?")


# --- clips ------------------------------------------------------------------------------------------------------------


def _copy(host: Host, study: Study, pair: Pair, side: str) -> Path:
    cell = _cell(study, pair, side)
    # Of what it is made as well, under the secret: a study that was copied has the same tokens.
    made_of = hmac.digest(_secret(study), f"{pair.token} {side} {cell.id}".encode(), "sha256").hex()[:8]
    path = host.temp_folder / COPIES / f"{pair.token}-{made_of}-{side}.mp4"
    if path.is_file():
        return path
    try:
        data = study.clip(cell).read_bytes()
    except OSError as error:
        raise UsageError(
            f"This pair's {side} clip is not there ({error.strerror or error}); ask for the next."
        ) from None
    write_atomic(path, untagged(data))
    return path


def _cell(study: Study, pair: Pair, side: str) -> Cell:
    arm = getattr(pair, side)
    return next(cell for cell in study.plan.cells if cell.arm == arm and cell.key == (pair.prompt, pair.seed))


def _sweep(host: Host) -> None:
    """Copies that nobody comes back to."""
    with contextlib.suppress(OSError):
        for path in (host.temp_folder / COPIES).iterdir():
            # One that is gone already, or is being played (Windows), is left.
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > KEPT:
                    path.unlink()


_HOLDS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf")  # boxes
_SAYS = (b"udta", b"meta", b"uuid")


def untagged(data: bytes) -> bytes:
    """An mp4 that says nothing of itself: the boxes with its tags become free ones of zeros. Nothing moves, so that the
    places of its frames, which the file gives as numbers, stay right; encoding it anew would cost seconds and quality.

    Raises:
        UsageError: it is no mp4.
    """
    made = bytearray(data)
    if data[4:8] != b"ftyp":
        raise UsageError("A clip of this study is no mp4, and cannot be shown without its name.")
    _blot(made, 0, len(made))
    return bytes(made)


def _blot(made: bytearray, at: int, end: int) -> None:
    while at < end:
        size, kind, head = int.from_bytes(made[at : at + 4], "big"), bytes(made[at + 4 : at + 8]), 8
        if size == 1:
            size, head = int.from_bytes(made[at + 8 : at + 16], "big"), 16
        elif size == 0:
            size = end - at
        if size < head or at + size > end:
            raise UsageError("A clip of this study is a broken mp4, and cannot be shown without its name.")
        if kind in _SAYS:
            made[at + 4 : at + 8] = b"free"
            made[at + head : at + size] = bytes(size - head)
        elif kind in _HOLDS:
            _blot(made, at + head, at + size)
        at += size


def _printable(text: str) -> str:
    """A stranger's text on a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)

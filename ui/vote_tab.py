"""The Vote tab: two clips without names, which of them is better, and at the end how the arms stand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import gradio as gr

from nodes import voting
from nodes.engine.errors import CogLoomError, UsageError
from nodes.engine.statistics import about
from nodes.engine.votes import CHOICES, Consistency, Lead
from nodes.host import LocalHost
from nodes.schema import sentence

from . import parts
from .app import Ui
from .render_tab import Kept, Tab, _known
from .study_parts import LOOK, QUICK, choices, nothing_yet, part, said, study_named
from .tab_parts import notes, plain
from .text import text

STRENGTH_END = 12.0  # log-odds; a scale that went on to what one-sided votes give would show nothing else


def build(ui: Ui) -> Tab:
    folders = ui.folders
    with ui.said(gr.Tab(id="vote", elem_id="cl-tab-vote"), label="tab_vote") as tab:
        ui.said(gr.Markdown(elem_classes="cl-hint"), value="vote_hint")
        with gr.Row(elem_classes="cs-begin"):
            study = ui.said(gr.Dropdown([], value=None, elem_id="cl-vote-study", min_width=160, scale=3),
                            label="study", info="report_info")  # fmt: skip
            judge = ui.said(gr.Textbox("", elem_id="cl-vote-judge", max_length=voting.JUDGE_CAP, min_width=130,
                                       scale=2),
                            label="judge", info="judge_info")  # fmt: skip
            go = ui.said(gr.Button(variant="primary", elem_id="cl-vote-begin", min_width=110, scale=1), value="begin")
        pair = part("vote", None, elem_id="cl-vote")
        with ui.said(gr.Accordion(open=False, elem_id="cl-vote-standing"), label="standing"):
            warning = parts.part("notes", notes(), elem_id="cl-vote-warning")
            look = ui.said(gr.Button(size="sm", elem_id="cl-vote-look"), value="standing_look")
            ranking = part("ranking", None, elem_id="cl-vote-ranking")
        _api(ui)
    ui.told.append((warning, lambda language: {"value": notes(text("standing_hint", language), level="warn")}))

    def reread(language: str, chosen: Any) -> Any:
        found = choices(folders, chosen)
        if found["value"] is None and found["choices"]:
            found["value"] = found["choices"][0]
        language = _known(language)
        return found | {"info": nothing_yet(folders, language) or text("report_info", language)}

    gr.on([tab.select, ui.language.change], reread, [ui.language, study], study, **QUICK)

    def begin(language: str, name: Any, who: Any) -> Any:
        return _guarded(language, lambda: _next(folders, name, who, _known(language)))

    gr.on([go.click, judge.submit], begin, [ui.language, study, judge], pair, **QUICK)

    def voted(language: str, event: gr.EventData) -> Any:
        given: dict[str, Any] = {
            key: getattr(event, key, None) for key in ("what", "study", "judge", "token", "choice")
        }

        def work() -> dict[str, Any]:
            one = study_named(folders, given["study"])
            if given["what"] == "back":
                shown = voting.last_pair(ui.host(), one, given["judge"])
                if shown is not None:
                    return _pair_of(given["study"], given["judge"], shown, _known(language))
            elif given["what"] == "vote":
                voting.cast(one, given["token"], given["judge"], given["choice"])
            return _next(folders, given["study"], given["judge"], _known(language))

        return _guarded(language, work)

    pair.select(voted, ui.language, pair, **QUICK)
    # Another study's ranking has nothing to do here.
    gr.on([study.change, go.click], lambda: None, None, ranking, **QUICK)

    def looked(language: str, name: Any) -> Any:
        try:
            return _ranking_of(voting.standing(study_named(folders, name)), _known(language))
        except Exception as error:
            return {"rows": [], "lines": [said(error, _known(language))]}

    look.click(looked, [ui.language, study], ranking, **QUICK)
    return Tab({"vote_judge": Kept(judge, _short)})


def _api(ui: Ui) -> None:
    """The same by gradio_client. No answer but /vote_standing says which arm is which."""
    folders = ui.folders

    def vote_next(study: str, judge: str) -> dict[str, Any]:
        """The pair that this judge should see next: {token, prompt, left, right, turn, remaining}; left and right are
        addresses of clips on this server. {} when there is none left.

        Args:
            study: One of /studies.
            judge: Who judges.
        """
        return _told(lambda: _api_pair(study, voting.next_pair(folders, study_named(folders, study), judge)))

    def vote_cast(study: str, judge: str, token: str, choice: str) -> dict[str, Any]:
        """Vote on a pair that /vote_next gave, and get the next. A second vote on a pair takes the first one's place.

        Args:
            study: One of /studies.
            judge: Who judges.
            token: Of the pair.
            choice: left, right, tie or bad: neither is any good.
        """

        def work() -> dict[str, Any]:
            one = study_named(folders, study)
            voting.cast(one, token, judge, choice)
            return _api_pair(study, voting.next_pair(folders, one, judge))

        return _told(work)

    def vote_last(study: str, judge: str) -> dict[str, Any]:
        """The pair that this judge voted on last, to be thought over, with what was said; {} before the first vote.

        Args:
            study: One of /studies.
            judge: Who judges.
        """
        return _told(lambda: _api_pair(study, voting.last_pair(folders, study_named(folders, study), judge)))

    def vote_standing(study: str) -> dict[str, Any]:
        """How the arms stand by all votes, and how far judges agree with themselves. Who has seen this is not blind any
        more.

        Args:
            study: One of /studies.
        """
        return _told(lambda: voting.standing(study_named(folders, study)).to_json())

    for function in (vote_next, vote_cast, vote_last, vote_standing):
        gr.api(function, api_name=function.__name__, **LOOK)


def _api_pair(study: str, shown: voting.Shown | None) -> dict[str, Any]:
    if shown is None:
        return {}
    return {"token": shown.token, "prompt": shown.prompt, "left": _url(study, shown.token, "left"),
            "right": _url(study, shown.token, "right"), "turn": shown.turn, "remaining": shown.remaining,
            "before": shown.before}  # fmt: skip


def _told(work: Any) -> Any:
    try:
        return work()
    except CogLoomError as error:
        raise gr.Error(sentence(error), print_exception=False) from None


def clip(folders: LocalHost, query: Any) -> Path:
    """One side of a pair, for the page: by token, so that no address tells an arm."""
    name, token, side = (query.get(key, "") for key in ("study", "token", "side"))
    return voting.clip(folders, study_named(folders, name), token, side)


def _url(study: str, token: str, side: str) -> str:
    return f"/cogloom/vote?{urlencode({'study': study, 'token': token, 'side': side})}"


# --- what is shown ----------------------------------------------------------------------------------------------------


def _guarded(language: str, work: Any) -> dict[str, Any]:
    try:
        return work()
    except Exception as error:
        return {"state": "failed", "text": said(error, _known(language))}


def _next(folders: LocalHost, name: Any, judge: Any, language: str) -> dict[str, Any]:
    """For the `vote` part. Raises CogLoomError."""
    if name is None or name == "":
        raise UsageError(nothing_yet(folders, language) or text("study_choose", language))
    judge = voting.checked_judge(judge)
    shown = voting.next_pair(folders, study_named(folders, name), judge)
    if shown is None:
        return {"state": "done", "study": name, "judge": judge, "text": text("vote_all_seen", language)}
    return _pair_of(name, judge, shown, language)


def _pair_of(name: str, judge: str, shown: voting.Shown, language: str) -> dict[str, Any]:
    words = text("vote_progress", language, turn=f"{shown.turn:,}", left=f"{shown.remaining:,}")
    return {"state": "pair", "study": name, "judge": judge, "token": shown.token, "prompt": plain(shown.prompt),
            "left": _url(name, shown.token, "left"), "right": _url(name, shown.token, "right"), "text": words,
            "before": shown.before if shown.before in CHOICES else "", "back": shown.turn > 1 or bool(shown.before)
            }  # fmt: skip


def _ranking_of(told: voting.Standings, language: str) -> dict[str, Any]:
    """For the `ranking` part: {rows: [{arm, group, about, at, low, high}], lines}, places from 0 to 1 on one scale."""
    ranking = told.ranking
    ends = [one.strength for one in ranking.standings]
    ends += [end for one in ranking.standings for end in (one.interval.low, one.interval.high)]
    top = min(max((abs(end) for end in ends if math.isfinite(end)), default=1.0), STRENGTH_END) or 1.0

    def place(value: float) -> float:
        return round((min(max(value, -top), top) + top) / (2 * top), 4)

    rows = []
    for one in ranking.standings:
        rank = str(one.best_rank) if one.best_rank == one.worst_rank else f"{one.best_rank}–{one.worst_rank}"
        rows.append(
            {"arm": plain(one.arm, 200), "group": one.group,
             "about": text("standing_about", language, rank=rank, votes=f"{one.votes:,}"),
             "at": place(one.strength), "low": place(one.interval.low), "high": place(one.interval.high)}
        )  # fmt: skip
    counts = {"votes": f"{ranking.votes:,}", "ties": f"{ranking.ties:,}", "bad": f"{ranking.bad:,}"}
    lines = [text("standing_counts", language, **counts)]
    lines += [_lead(lead, language) for lead in ranking.neighbours()]
    if ranking.side_shows:
        lines.append(text("standing_left" if ranking.side > 0 else "standing_right", language,
                          odds=f"{math.exp(abs(ranking.side)):.2g}"))  # fmt: skip
    lines += [_judge(one, language) for one in told.judges if one.judge is not None or len(told.judges) > 2]
    return {"rows": rows, "lines": [*lines, *told.notes]}


def _lead(lead: Lead, language: str) -> str:
    names = {"a": plain(lead.a, 200), "b": plain(lead.b, 200)}
    if lead.separated:
        low, high = (1 / (1 + math.exp(-end)) for end in (lead.interval.low, lead.interval.high))
        return text(
            "lead_apart", language, share=f"{lead.preferred:.0%}", low=f"{low:.0%}", high=f"{high:.0%}", **names
        )
    if not math.isfinite(lead.interval.high):
        return text("lead_unlinked", language, **names)
    if lead.more is None:
        return text("lead_alike", language, **names)
    return text("lead_more", language, n=f"{about(lead.more):,}", **names)


def _judge(one: Consistency, language: str) -> str:
    who = text("judges_all", language) if one.judge is None else plain(one.judge, 80)
    again = text("judge_again", language, agreed=one.agreed, repeats=one.repeats) if one.repeats else (
        text("judge_no_repeats", language))  # fmt: skip
    lean = "" if 0.5 in one.left_share else text("judge_leans", language)
    return text("judge_line", language, who=who, again=again, left=one.left, decided=one.decided, lean=lean)


def _short(value: Any) -> str:
    if not isinstance(value, str) or len(value) > voting.JUDGE_CAP:
        raise UsageError("too long")
    return value

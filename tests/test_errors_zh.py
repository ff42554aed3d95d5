"""Every message that the page can show has Chinese words for it, and those words lose nothing that it tells."""

from __future__ import annotations

import ast
import functools
import itertools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from locales.make import NODES as SCHEMA
from nodes.engine import lora_file
from nodes.engine.checkpoints import DEMO, find_checkpoint
from nodes.engine.denoise import Settings
from nodes.engine.errors import CogLoomError
from nodes.engine.lora_stack import Blocks, Steps
from nodes.host import LocalHost
from nodes.lora import stack_rows
from nodes.voting import checked_judge
from ui import api, render_tab, study_parts, tab_parts
from ui.errors_zh import LENGTH_CAP, WEAK, Look, Template, chinese, phrase, template, worded
from ui.work import Report

ROOT = Path(__file__).resolve().parents[1]
KINDS = {
    at.name
    for at in ast.walk(ast.parse((ROOT / "nodes/engine/errors.py").read_text(encoding="utf-8")))
    if isinstance(at, ast.ClassDef)
}
# Arguments that are read by programs, or that have their Chinese in locales/.
ELSEWHERE = {"tip", "help", "search", "title", "category", "metavar", "description", "name"}
QUIET = {"getLogger", "debug", "info", "warning", "exception", "compile", "node", "Out", "startswith", "endswith",
         "split", "removeprefix", "removesuffix", "search", "match", "fullmatch", "add_argument",
         "Metric"}  # fmt: skip


def pieces(at: ast.expr) -> list[tuple[str, list[ast.expr]]]:
    """What an expression's text can be, as ("template with {}", [nodes it consists of]); an if doubles it."""
    if isinstance(at, ast.Constant) and isinstance(at.value, str):
        # A text with {} is filled by str.format.
        return [(at.value.replace("{", "{{").replace("}", "}}").replace("{{}}", "{}"), [at])]
    if isinstance(at, ast.JoinedStr):
        parts = [pieces(one) if isinstance(one, ast.Constant) else [("{}", [])] for one in at.values]
    elif isinstance(at, ast.BinOp) and isinstance(at.op, ast.Add):
        parts = [pieces(at.left), pieces(at.right)]
    elif isinstance(at, ast.IfExp):
        return [*pieces(at.body), *pieces(at.orelse)]
    else:
        return [("{}", [])]
    found = []
    for combination in itertools.product(*parts):
        text = re.sub(r"(?:\{\}){2,}", "{}", "".join(text for text, _ in combination))
        found.append((text, [at, *(one for _, used in combination for one in used)]))
    return found


def called(at: ast.Call) -> str:
    return getattr(at.func, "id", getattr(at.func, "attr", ""))


def raised(tree: ast.AST) -> Iterator[tuple[int, str, list[ast.expr]]]:
    """(line, template, nodes) of each error that is made with a text of its own."""
    for at in ast.walk(tree):
        if isinstance(at, ast.Call) and called(at) in KINDS and at.args:
            for text, used in pieces(at.args[0]):
                if re.search("[a-z]", text):
                    yield at.lineno, text, used


def other(tree: ast.AST, known: set[int]) -> Iterator[tuple[int, str]]:
    """(line, template) of each other text of more than a word that is neither a docstring nor said to programs."""
    quiet = set(known)
    for at in ast.walk(tree):
        hidden: list[ast.AST] = []
        if isinstance(at, (ast.Module, ast.ClassDef, ast.FunctionDef)) and isinstance(at.body[0], ast.Expr):
            hidden.append(at.body[0])
        elif isinstance(at, (ast.Assert, ast.Compare)):
            hidden.append(at.msg or at.test if isinstance(at, ast.Assert) else at)
        elif isinstance(at, (ast.AnnAssign, ast.arg)) and at.annotation:
            hidden.append(at.annotation)
        elif isinstance(at, ast.FunctionDef):
            hidden += [at.returns] if at.returns else []
        elif isinstance(at, ast.Assign) and ast.unparse(at.targets[0]) == "HELP":  # what a command's options mean
            hidden.append(at)
        elif isinstance(at, ast.Call):
            hidden += [at] if called(at) in QUIET else [one.value for one in at.keywords if one.arg in ELSEWHERE]
        quiet |= {id(inner) for one in hidden for inner in ast.walk(one)}
    for at in ast.walk(tree):
        if id(at) in quiet or not isinstance(at, (ast.BinOp, ast.JoinedStr, ast.Constant)):
            continue
        for text, used in pieces(at):
            quiet |= {id(one) for one in used}
            if " " in text.strip() and re.search(r"[A-Za-z]{2}", text) and "\\" not in text:  # else a pattern
                yield at.lineno, text


# --- what is covered --------------------------------------------------------------------------------------------------

# Modules whose errors, notes and reasons reach the page. A new one: add it, and the test says which lines to add.
ENGINE = """bake checkpoints conclude dataset denoise effect extract files finetune heldout hold layout lora_cache
    lora_file lora_index lora_names lora_scale lora_stack lora_write lowrank measures merge native pipeline pristine
    safetensors_file sat sat_worker selection shrink statistics study switch
    history lineage take take_worker train_buckets train_plan train_quant train_ranks train_state
    video votes"""
NODES = """compare core export graph grid host lora model native render schema study sweep train voting workflow
    workshop workshop_nodes take lineage checkpoint_runs"""
PAGE = """adapters_tab compare_tab gallery make render_tab report_tab stack start study_parts sweep_tab train_tab
    train_runs training vote_tab workflows_tab workshop_tab"""
COVERED = [
    *(ROOT / "nodes" / "engine" / f"{name}.py" for name in ENGINE.split()),
    *(ROOT / "nodes" / f"{name}.py" for name in NODES.split()),
]
# Of these the errors alone: what else the page says is in ui/text*.py, in both languages.
ERRORS_ONLY = [ROOT / "ui" / f"{name}.py" for name in PAGE.split()]

# Texts of the covered modules that no Chinese page shows as they stand: as templates, by what they are.
UNSAID = {
    # read by programs, or from other programs
    "`python app.py loras scale {}", "python app.py loras scale {}", "dict | None", "float | Strength", "str | None",
    "tuple[float, float]", "dora columns", "python zero_to_fp32.py . OUTPUT", "sha256: {}", "{}, {} MB",
    "WeightsUnpickler error:", "No space left on device", "Disk quota exceeded", "File too large", "Load Image",
    "Load Video", "Get Video Components", "Newton's method did not end on a concave function",
    "{}; default {}", "default {}",
    # put together with others; the table has the whole
    "{} is {}", "{}, {}", " ({} are free)", "{} for {}", "{} GiB", "{} MiB", "{} GB", "{} MB",
    "more pair", "more vote", "decided vote", "checkpoint {}: {} {}", "{}: {} ({} to {})",
    # at a terminal alone
    "Which is better? l left, r right, t tie, b both bad, u the one before, q quit: ",
    "vote {}; {} of this study not seen yet", "left: {}", "right: {}", "You have seen every pair of this study.",
}  # fmt: skip


def table() -> dict[str, dict[str, str]]:
    return json.loads((ROOT / "locales" / "zh" / "messages.json").read_text(encoding="utf-8"))


@functools.cache
def said() -> tuple[tuple[str, str, str], ...]:
    """(where, template, "sentences" or "phrases")"""
    return tuple(_said())


def _said() -> Iterator[tuple[str, str, str]]:
    for file in (*COVERED, *ERRORS_ONLY):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        used: set[int] = set()
        for line, text, at in raised(tree):
            used |= {id(one) for one in at}
            yield f"{file.relative_to(ROOT).as_posix()}:{line}", text, "sentences"
        if file in COVERED:
            for line, text in other(tree, used):
                yield f"{file.relative_to(ROOT).as_posix()}:{line}", text, "phrases"


def missing() -> list[str]:
    there = table()
    found = {}
    for where, text, kind in said():
        known = {text, text.strip()} & (UNSAID | set(there["sentences"]) | set(there["phrases"]))
        if not known:
            found.setdefault(text, f'{where} ({kind}): {json.dumps(text, ensure_ascii=False)}: "…",')
    return list(found.values())


def test_every_message_has_its_chinese():
    """If not: these lines go into locales/zh/messages.json, with the Chinese in place of the dots."""
    assert missing() == []


# --- the table --------------------------------------------------------------------------------------------------------

# What is put together from parts, so that no single f-string of the source is it.
JOINED = {"checkpoint {}: the lowest held-out loss {}", "checkpoint {}: held-out loss {}",
          "{} decided vote", "{} decided votes", "{} more vote", "{} more votes", "{} more pair", "{} more pairs",
          "{} of {}, {}, seed {}: {}",
          "{} is higher", "{} is lower", "denoising", "decoding", "rendering", "measuring", "encoding", "training",
          "sampling", "{}: {} does not exist; check the name.", "{}: {} is a folder; check the name.",
          "{} ({} are free)", "the base in 4 bits (--qlora nf4) ({})",
          "That does not fit. Change: {}; or go on anyway (--anyway)."}  # fmt: skip
PLAIN = re.compile(r"\{\d*(?::[a-z])?\}")
# English that stands in a Chinese sentence as it is: names, commands, formats.
COMMON = re.compile(
    r"\b(the|is|are|was|of|and|or|not|with|from|in|at|it|its|that|this|which|has|have|been|there|here|more|than|what|them"
    r"|but|if|an|a|by|so|does|can|cannot|choose|give|take|write|make)\b"
)
ALLOWED = {"GPU", "CPU", "JSON", "CogVideoX", "LoRA", "PyTorch", "pickle"}
FEW = 6


def pairs() -> list[tuple[str, str, str]]:
    return [(kind, english, said) for kind, entries in table().items() for english, said in entries.items()]


def test_nothing_is_translated_that_is_not_said():
    """A message that was changed leaves its old words behind; what has few letters is a part of many."""
    there = {one for _, text, _ in said() for one in (text, text.strip())} | JOINED
    letters = {english: len(re.findall("[A-Za-z]", english)) for _, english, _ in pairs()}
    assert [english for _, english, _ in pairs() if english not in there and letters[english] >= WEAK] == []


def test_the_two_kinds_have_nothing_in_common():
    assert set(table()) == {"sentences", "phrases"}
    assert set(table()["sentences"]) & set(table()["phrases"]) == set()


def test_every_hole_is_filled_once():
    off = []
    for _, english, said in pairs():
        holes = PLAIN.findall(re.sub(r"\{\{|\}\}", "", english))
        kinds = re.findall(r"\{(\d+)(?::([tlcnw]))?\}", re.sub(r"\{\{(?!\d+\})|(?<!\d)\}\}", "", said))
        if sorted(int(number) for number, _ in kinds) != list(range(len(holes))):
            off.append(english)
    assert off == []


def test_the_chinese_is_chinese():
    """What is not is a name, a command or a format, and then the English has it, too."""
    off = []
    for _, english, said in pairs():
        words = {*re.findall(r"[A-Za-z]{2,}", re.sub(r"`[^`]*`", "", PLAIN.sub("", said)))}
        strange = {word for word in words if (word not in english and word not in ALLOWED) or COMMON.fullmatch(word)}
        same = re.sub(r"\{\d+(:\w)?\}", "{}", said).replace("：", ": ") == english  # a formula
        if strange or not (same or re.search(r"[\u4e00-\u9fff]", said) or not re.search("[a-z]{3}", english)):
            off.append((english, sorted(strange)))
    assert off == []


def test_what_has_few_words_is_held_by_its_holes():
    """Else `{} of {}` would take a name apart."""
    assert [
        english
        for _, english, said in pairs()
        if english.startswith("{}")
        and template(english, said).letters < FEW
        and not re.search(r"\{\d+:[tlcnw]\}", said)
    ] == []


# --- sentences --------------------------------------------------------------------------------------------------------

STRANGE = ["x", "模型 一", "a{b}", "{0}", "{}", "C:\\new\\x", "(a|b)*+?$", "1,024", "−0.5", "'q'", "ä‖é", "%s",
           "日本", "@"]  # fmt: skip
PHRASES = {"held-out items": "留出项", "rendering": "生成"}


def value_of(kind: str, draw: random.Random) -> str:
    if kind == "n":
        return str(draw.randrange(10**6))
    if kind in ("t", "l", "c"):
        return draw.choice([*PHRASES])
    return "".join(draw.sample(STRANGE, 3)).replace(" ", "" if kind == "w" else " ")


def filled(one: Template, draw: random.Random) -> tuple[str, dict[int, str]]:
    """An English sentence with strange values in its holes, and the values."""
    kinds = {hole: kind for _, hole, kind in one.chinese if hole is not None}
    marks = [literal for literal in one.literals[1:] if literal]
    values = {}
    for hole, kind in sorted(kinds.items()):
        # One that holds what comes after it ends too early for anybody.
        values[hole] = next(
            value for value in (value_of(kind, draw) for _ in range(1000)) if not any(mark in value for mark in marks)
        )
    text = one.literals[0] + "".join(values[n] + literal for n, literal in enumerate(one.literals[1:]))
    return text, values


@pytest.mark.parametrize("kind", ["sentences", "phrases"])
def test_every_value_is_kept_and_every_word_translated(kind: str):
    draw = random.Random(7)
    off = []
    for english, said in table()[kind].items():
        if kind == "phrases" and english[:1] in " ,;":  # those go on from another one
            continue
        one = template(english, said)
        text, values = filled(one, draw)
        made = chinese(text) if kind == "sentences" else phrase(text, "zh")
        kinds = {hole: its for _, hole, its in one.chinese if hole is not None}
        wanted = [PHRASES[value] if kinds[hole] in ("t", "l", "c") else value for hole, value in values.items()]
        left = [word for word in re.findall("[a-z]{4,}", " ".join(one.literals)) if word not in said and word in made]
        own = Look()._filled(one, list(values.values()), int(kind == "phrases"))
        assert own is not None, english
        if made != own.text or left or not all(value in made for value in wanted):
            off.append((text, made, left))
    assert off == []


def test_each_template_finds_its_values():
    draw = random.Random(11)
    for _, english, said in pairs():
        one = template(english, said)
        text, values = filled(one, draw)
        assert one.values(text) == list(values.values()), english


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("motion: neon − base = 0.12 (0.05 to 0.19) over 24 pairs of 3 prompts, for which alone this speaks (1 pair "
         "dropped, a value is missing), corrected for 6 comparisons: neon is better.",
         "motion: neon − base = 0.12（0.05 至 0.19），基于 24 对、3 个提示词，结论只适用于这些（缺少数值，舍去 1 对），"
         "已按 6 次比较校正：neon 更好。"),
        ("49 frames: CogVideoX 2B makes 8·N + 1 frames, 9 to 49; the nearest is 49; 10×10: CogVideoX 2B has learned "
         "positions and makes one size only, 720×480.",
         "49 帧：CogVideoX 2B 只能生成 8·N + 1 帧，从 9 到 49；最接近的是 49；10×10：CogVideoX 2B 使用学习得到的位置"
         "编码，只能生成 720×480。"),
        ("All 20 clips are rendered; 12 of them are measured.", "全部 20 段视频均已生成；其中已测量 12 段。"),
        ("12 votes: neon > base\nThere are no votes on this study yet.", "12 票：neon > base\n此研究还没有投票。"),
        ("checkpoint 300: the lowest held-out loss 0.12, -0.02 (-0.03 to -0.01) against 200. 100 cannot be told apart "
         "from it; it is the earliest of them and it moves the base least.",
         "检查点 300：留出损失最低，0.12，相对于 200 为 -0.02（-0.03 至 -0.01）。100 与它无法区分；它是其中最早的，"
         "且对基础模型改动最小。"),
        ("x.pt: it wants os.system to be run when it is opened, which weights never need, so it was refused. Unless "
         "you know who made it, delete it; else ask for a .safetensors file. Nothing was written.",
         "x.pt：它要求在打开时运行 os.system，权重文件从不需要这样，因此已拒绝。除非知道是谁制作的，否则请删除；"
         "或索取 .safetensors 文件。未写入任何内容。"),
        ("Sampler (4): steps is 0; it is a whole number from 1 to 1,000.",
         "Sampler (4): steps 为 0；应为 1 到 1,000 的整数。"),
    ],
)  # fmt: skip
def test_messages_with_messages_in_them(text: str, wanted: str):
    assert chinese(text) == wanted


@pytest.mark.parametrize("text", ["Something quite new.", "a video", "clip: left", "", " ", "x" * (LENGTH_CAP + 1)])
def test_what_is_not_known_stays_as_it_is(text: str):
    assert chinese(text) == text


def test_names_that_are_words_keep_their_case_and_their_words():
    assert chinese("There is no folder a video.") == "没有文件夹 a video。"
    assert chinese("Name.safetensors has no adapter.safetensors.") == "Name.safetensors 中没有 adapter.safetensors。"


@pytest.mark.parametrize("piece", ["; ", ": ", " is ", ". ", ", ", " of ", "{}", "a; b: c is d of e. "])
def test_a_strangers_text_costs_no_more_than_its_budget(piece: str):
    text = (piece * LENGTH_CAP)[: LENGTH_CAP // 4]
    look = Look()
    look.sentence(text, 0)
    assert look.budget >= 0
    assert isinstance(chinese(text), str)


def refused(work: Any) -> CogLoomError:
    with pytest.raises(CogLoomError) as caught:
        work()
    return caught.value


def broken_file(folder: Path) -> None:
    file = folder / "neon one.safetensors"
    file.write_bytes((12).to_bytes(8, "little") + b'{"a": 1, 2}  ')
    lora_file.read(file)


HOST = LocalHost()
REAL = {
    "stack": (lambda _: Blocks.parse("9-2:1"), ["9-2:1", "9", "2"]),
    "schedule": (lambda _: Steps.parse("held"), ["held 1@0.4"]),
    "row": (lambda _: stack_rows(HOST, [{"adapter": 1}]), ["1"]),
    "size": (lambda _: find_checkpoint(DEMO, ()).check_geometry(9, 101, 64), ["101×64"]),
    "settings": (lambda _: Settings(prompt="", strength=3.0), ["strength", "3.0"]),
    "node": (lambda _: SCHEMA["CogLoomSampler"].checked(HOST, {"steps": "many"}), ["steps", "'many'", "1,000"]),
    "file": (broken_file, ["neon one.safetensors", "JSON"]),
    "judge": (lambda _: checked_judge(""), ["1"]),
}


@pytest.mark.parametrize("what", REAL)
def test_real_errors_are_told_in_the_language_of_the_page(what: str, tmp_path: Path):
    work, values = REAL[what]
    error = refused(lambda: work(tmp_path))
    assert worded(error, "en") == str(error)
    made = worded(error, "zh")
    assert re.search(r"[\u4e00-\u9fff]", made), made
    assert made.endswith(("。", "）", "`"))
    assert not re.search(r"\b(the|is|are|of|not)\b", made), made
    for value in values:
        assert value in made, (value, made)


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_shows_it_in_its_language_and_a_client_in_english():
    error = refused(lambda: Settings(prompt="", strength=3.0))
    english, its = str(error), "strength 为 3.0；应大于 0 且不超过 1。"
    for language, wanted in (("en", english), ("zh", its)):
        assert render_tab.failed(error, language) == {"state": "failed", "text": wanted}
        assert tab_parts.failed(error, language) == {"level": "bad", "lines": [wanted]}
        assert study_parts.said(error, language) == wanted

    def endpoint() -> None:
        raise error

    with pytest.raises(gr.Error) as caught:
        api._said(endpoint)()
    assert caught.value.message == english


def test_progress_is_told_in_the_language_of_the_page():
    report = Report("1 of 3, neon, seed 4: denoising", 0, 1)
    assert render_tab.shown_of(report, "zh")["text"] == "第 1 段，共 3 段，neon，种子 4：去噪"
    assert render_tab.shown_of(report, "en")["text"] == report.what


@pytest.mark.parametrize("file", sorted((ROOT / "ui").glob("*_tab.py")), ids=lambda file: file.name)
def test_only_what_goes_to_a_client_is_told_without_a_language(file: Path):
    for line in file.read_text(encoding="utf-8").splitlines():
        assert "sentence(error)" not in line or "raise gr.Error(sentence(error)" in line, line

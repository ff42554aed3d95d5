"""The report's page: one HTML file that asks nobody for anything, with clips, plots and data inside.

    page(Page(…)) -> text

Everything that is shown passes `escape`, whoever wrote it. The policy in the page's head allows no request, no script
but the one whose hash it names, and no frame, form or plugin. Without a script clips play with the browser's own
controls, and the language is a checkbox and CSS. Our own sentences are there in English and in Chinese; sentences of
the statistics are English, with their numbers in Chinese besides.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .engine.plots import escape
from .engine.statistics import Difference, numbers


@dataclass(frozen=True)
class Two:
    """A text of ours in both languages, as HTML."""

    en: str
    zh: str

    def __str__(self) -> str:
        return f'<span class="en">{self.en}</span><span class="zh" lang="zh">{self.zh}</span>'


Html = str  # escaped already


@dataclass(frozen=True)
class Film:
    """One arm's clip; `mp4` None where it is not there, for the reason given."""

    label: str
    mp4: bytes | None
    why: Html = ""
    facts: Html = ""  # under it


@dataclass(frozen=True)
class Shot:
    """One prompt and seed: the arms' clips, and how they depart from the reference's."""

    prompt: str
    seed: int
    fps: float
    frames: int
    films: tuple[Film, ...]
    differences: tuple[tuple[str, bytes], ...] = ()  # label, mp4
    maps: tuple[tuple[str, bytes], ...] = ()  # label, PNG
    plot: Html = ""  # of the maps' means


@dataclass(frozen=True)
class Figure:
    caption: Html
    svg: Html


@dataclass(frozen=True)
class Topic:
    """A metric: what it is, what came of it."""

    name: str
    about: str
    words: tuple[Html, ...]
    figures: tuple[Figure, ...]
    table: Html = ""
    open: bool = False


@dataclass(frozen=True)
class Page:
    title: str
    facts: tuple[Html, ...]  # under the title
    findings: tuple[str, ...]
    verdicts: tuple[Html, ...]
    amount: Html
    overview: Html = ""  # a table
    grids: tuple[tuple[Html, bytes], ...] = ()  # caption, mp4
    shots: tuple[Shot, ...] = ()
    selection: tuple[Topic, ...] = ()
    topics: tuple[Topic, ...] = ()
    votes: Topic | None = None
    weights: Html = ""
    settings: tuple[tuple[Html, Html], ...] = ()
    command: str = ""
    downloads: tuple[tuple[Html, str, bytes], ...] = ()  # text, file name, JSON or CSV
    notes: tuple[Html, ...] = ()
    made_with: str = ""


def data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def bdi(text: object, cap: int = 0) -> Html:
    """A stranger's text: it cannot turn what stands beside it."""
    return f"<bdi>{escape(text, cap)}</bdi>"


def table(head: Sequence[object], rows: Sequence[Sequence[object]], numeric: int = 0, caption: object = "") -> Html:
    """Cells are HTML; the first is the row's head, and those from `numeric` on stand at the right."""

    def cell(n: int, value: object, kind: str) -> str:
        scope = ' scope="row"' if kind == "th" and n == 0 else ' scope="col"' if kind == "th" else ""
        right = ' class="n"' if numeric and n >= numeric else ""
        return f"<{kind}{scope}{right}>{value}</{kind}>"

    top = "".join(cell(n, value, "th").replace('scope="row"', 'scope="col"') for n, value in enumerate(head))
    body = "".join(
        "<tr>" + "".join(cell(n, value, "th" if n == 0 else "td") for n, value in enumerate(row)) + "</tr>"
        for row in rows
    )
    said = f"<caption>{caption}</caption>" if caption else ""
    return f'<div class="wide"><table>{said}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def in_chinese(d: Difference) -> str:
    """`Difference.words` once more, as text."""
    head = f"{d.b} − {d.a}"
    if not d.pairs:
        return f"{head}：还没有成对的数据。"
    if not math.isfinite(d.said.low):
        return f"{head} = {d.mean:.3g}，{d.pairs} 对；数据太少，没有区间。"
    mean, low, high = numbers(d.mean, d.said.low, d.said.high)
    family = f"，已按 {d.family} 次比较校正" if d.family > 1 else ""
    dropped = f"（{d.dropped} 对缺值未计）" if d.dropped else ""
    if d.better:
        verdict = f"{d.better} 更好"
    elif d.told:
        verdict = f"{d.b} 更{'高' if d.mean > 0 else '低'}"
    elif d.said.low == d.said.high == 0:
        verdict = "每一对都相同"
    else:
        verdict = "尚不能区分"
    return f"{head} = {mean}（{low} 至 {high}），{d.pairs} 对{dropped}{family}：{verdict}。"


# --- the page ---------------------------------------------------------------------------------------------------------


def page(p: Page) -> str:
    hashed = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{hashed}'; base-uri 'none'; form-action 'none'"
    )
    sections = [
        ("verdict", Two("What it shows", "结论"), _verdicts(p)),
        ("grid", Two("Grid", "网格"), _grids(p)),
        ("selection", Two("Which checkpoint", "选哪个检查点"), "".join(map(_topic, p.selection))),
        ("votes", Two("Votes", "投票"), _topic(p.votes) if p.votes else ""),
        ("numbers", Two("Numbers", "数值"), p.overview + "".join(map(_topic, p.topics))),
        ("clips", Two("Clips", "片段"), "".join(_shot(n, shot) for n, shot in enumerate(p.shots))),
        ("weights", Two("What the model held", "模型实际持有的权重"), p.weights),
        ("settings", Two("Settings", "设置"), _settings(p)),
        ("repeat", Two("Do it again", "重做一遍"), _repeat(p)),
    ]
    there = [(name, title, body) for name, title, body in sections if body]
    nav = "".join(f'<a href="#{name}">{title}</a>' for name, title, _ in there)
    main = "".join(
        f'<section id="{name}" aria-labelledby="{name}-h"><h2 id="{name}-h">{title}</h2>{body}</section>'
        for name, title, body in there
    )
    facts = "".join(f"<li>{fact}</li>" for fact in p.facts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">\n'
        f"<title>{escape(p.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        '<header><div class="bar"><span class="mark">CogLoom</span>'
        '<label class="switch"><input type="checkbox" id="zh"><span>中文</span></label></div>'
        f'<h1>{bdi(p.title)}</h1><ul class="facts">{facts}</ul></header>\n<nav>{nav}</nav>\n<main>{main}</main>\n'
        f"<footer>{escape(p.made_with)}</footer>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _verdicts(p: Page) -> Html:
    loud = "".join(f"<li>{escape(line)}</li>" for line in p.findings)
    alert = f'<div class="alert" role="alert"><ul lang="en">{loud}</ul></div>' if loud else ""
    if p.verdicts:
        body = '<ul class="verdicts">' + "".join(f"<li>{line}</li>" for line in p.verdicts) + "</ul>"
    else:
        nothing = Two(
            "Nothing is told apart yet. The numbers below say how many more clips or votes it would take.",
            "目前还没有能区分的差异。下面的数值说明还需要多少片段或投票。",
        )
        body = f'<p class="none">{nothing}</p>'
    notes = "".join(f"<li>{note}</li>" for note in p.notes)
    return f'{alert}{body}<p class="soft">{p.amount}</p>' + (f'<ul class="soft">{notes}</ul>' if notes else "")


def _grids(p: Page) -> Html:
    films = [
        f'<figure class="grid"><video controls loop muted playsinline preload="{"none" if n else "auto"}" '
        f'src="{data_uri("video/mp4", mp4)}"></video><figcaption>{caption}</figcaption></figure>'
        for n, (caption, mp4) in enumerate(p.grids)
    ]
    if len(films) < 2:
        return "".join(films)
    others = Two(f"{len(films) - 1} more", f"另外 {len(films) - 1} 个")
    return f'{films[0]}<details class="topic grids"><summary>{others}</summary>{"".join(films[1:])}</details>'


def _topic(topic: Topic) -> Html:
    words = "".join(f"<li>{line}</li>" for line in topic.words)
    figures = "".join(
        f'<figure><div class="scroll" tabindex="0">{f.svg}</div><figcaption>{f.caption}</figcaption></figure>'
        for f in topic.figures
    )
    is_open = " open" if topic.open else ""
    about = f'<p class="soft" lang="en">{escape(topic.about)}</p>' if topic.about else ""
    return (
        f'<details class="topic"{is_open}><summary>{bdi(topic.name)}</summary>{about}'
        f'<ul class="words">{words}</ul><div class="figures">{figures}</div>{topic.table}</details>'
    )


def _shot(number: int, shot: Shot) -> Html:
    films = "".join(
        f'<figure class="film"><video controls muted playsinline preload="{"metadata" if number == 0 else "none"}" '
        f'aria-label="{escape(film.label)}" src="{data_uri("video/mp4", film.mp4)}"></video>'
        f'<figcaption><b title="{escape(film.label)}">{bdi(film.label)}</b>{film.facts}</figcaption></figure>'
        if film.mp4 is not None
        else f'<figure class="film"><div class="gone">{film.why}</div>'
        f"<figcaption><b>{bdi(film.label)}</b>{film.facts}</figcaption></figure>"
        for film in shot.films
    )
    there = [film for film in shot.films if film.mp4 is not None]
    options = "".join(f'<option value="{n}">{escape(film.label)}</option>' for n, film in enumerate(there))
    stage = _STAGE.replace("OPTIONS", options) if len(there) > 1 else ""
    differing = "".join(
        f'<figure class="film"><video controls muted playsinline preload="{"metadata" if number == 0 else "none"}" '
        f'src="{data_uri("video/mp4", mp4)}"></video><figcaption>{bdi(label)}</figcaption></figure>'
        for label, mp4 in shot.differences
    )
    maps = "".join(
        f'<figure class="map"><img alt="{escape(label)}" src="{data_uri("image/png", png)}">'
        f"<figcaption>{bdi(label)}</figcaption></figure>"
        for label, png in shot.maps
    )
    more = ""
    if differing:
        told = Two(
            "What differs from the reference, four times as much as it is; grey where nothing does.",
            "与参照的差异，放大四倍；灰色表示没有差异。",
        )
        more += f'<h4>{told}</h4><div class="films more">{differing}</div>'
    if maps or shot.plot:
        told = Two(
            "Departure from the reference in each latent frame: bright where it departs most, on one scale for all.",
            "每个潜变量帧与参照的偏离：越亮偏离越大，所有图同一标度。",
        )
        plot = f'<figure><div class="scroll" tabindex="0">{shot.plot}</div></figure>' if shot.plot else ""
        more += f"<h4>{told}</h4>{maps}{plot}"
    is_open = " open" if number == 0 else ""
    return (
        f'<details class="shot" data-fps="{shot.fps:g}" data-frames="{shot.frames}"{is_open}>'
        f"<summary><q>{bdi(shot.prompt)}</q> <small>{Two('seed', '种子')} {shot.seed}</small></summary>"
        f'{_CONTROLS if there else ""}<div class="films">{films}</div>{stage}{more}</details>'
    )


def _settings(p: Page) -> Html:
    rows = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in p.settings)
    return f"<dl>{rows}</dl>" if rows else ""


def _repeat(p: Page) -> Html:
    parts = []
    if p.command:
        parts.append(f'<pre tabindex="0"><code>{escape_lines(p.command)}</code></pre>')
    links = "".join(
        f'<a class="button" download="{escape(name)}" '
        f'href="{data_uri("text/csv" if name.endswith(".csv") else "application/json", data)}">{text}</a>'
        for text, name, data in p.downloads
    )
    return "".join(parts) + (f'<p class="downloads">{links}</p>' if links else "")


def escape_lines(text: str) -> Html:
    return "\n".join(("  " if line[:1] == " " else "") + escape(line) for line in text.split("\n"))


def entries(pairs: Mapping[str, object]) -> tuple[tuple[Html, Html], ...]:
    return tuple((escape(name), bdi(value, 400)) for name, value in pairs.items())


_CONTROLS = (
    '<div class="controls" hidden>'
    '<button type="button" data-do="play" aria-pressed="false"><i class="play" aria-hidden="true"></i>'
    f"{Two('Play all', '全部播放')}</button>"
    '<button type="button" data-do="back" aria-label="one frame back">−1</button>'
    '<button type="button" data-do="next" aria-label="one frame on">+1</button>'
    '<input type="range" min="0" value="0" step="1" aria-label="frame"><output></output>'
    f'<label><input type="checkbox" data-do="loop" checked>{Two("Loop", "循环")}</label></div>'
)
_STAGE = (
    '<details class="ab" hidden><summary>'
    f"{Two('Two of them on top of each other', '两个片段重叠比较')}</summary>"
    '<div class="controls"><label>A <select data-side="a">OPTIONS</select></label>'
    '<label>B <select data-side="b">OPTIONS</select></label>'
    '<select data-do="mode" aria-label="how">'
    '<option value="wipe">wipe 擦除</option><option value="blend">blend 叠加</option>'
    '<option value="difference">difference 差异</option></select>'
    '<input type="range" data-do="split" min="0" max="100" value="50" aria-label="how much of B"></div>'
    '<div class="stage"><video muted playsinline class="a"></video><video muted playsinline class="b"></video>'
    '<span class="edge"></span></div></details>'
)

STYLE = """
:root{color-scheme:light dark;--ink:#1c2330;--soft:#5d6675;--ground:#fff;--card:#f6f7f9;--line:#dde1e8;--mark:#2456c4;
--alert:#8a1f11;--alert-ground:#fdeceb;--good:#0a7a5c;--worse:#b4480f}
@media(prefers-color-scheme:dark){:root{--ink:#e7eaf0;--soft:#9aa4b4;--ground:#0f1217;--card:#171b22;--line:#2c333e;
--mark:#7ba6ff;--alert:#ffb4a8;--alert-ground:#3a1714;--good:#3fcf9f;--worse:#ff9b5e}}
*{box-sizing:border-box}
html:has(#zh:checked) .en,html:not(:has(#zh:checked)) .zh{display:none}
body{margin:0;background:var(--ground);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI","Noto Sans CJK SC",sans-serif;
overflow-wrap:anywhere}
header,nav,main,footer{max-width:1120px;margin:0 auto;padding:0 20px}
header{padding-top:20px}
.bar{display:flex;justify-content:space-between;align-items:center}
.mark{color:var(--mark);font-weight:700;letter-spacing:.02em}
h1{font-size:clamp(1.5rem,4vw,2.3rem);line-height:1.2;margin:.5em 0 .3em}
h2{font-size:1.3rem;margin:0 0 .7em}
h4{font-size:.95rem;font-weight:600;margin:1.4em 0 .6em}
.facts{list-style:none;display:flex;flex-wrap:wrap;gap:.4em .6em;margin:0;padding:0;color:var(--soft)}
.facts li{border:1px solid var(--line);border-radius:99px;padding:.1em .8em;font-size:.9rem}
nav{position:sticky;top:0;z-index:5;display:flex;gap:.2em 1.1em;overflow-x:auto;background:var(--ground);
padding-top:14px;padding-bottom:10px;border-bottom:1px solid var(--line);margin-top:14px;white-space:nowrap;
scrollbar-width:none}
nav a{color:var(--soft);text-decoration:none;font-size:.92rem}
nav a:hover,nav a:focus-visible{color:var(--mark)}
section{padding:34px 0 8px;scroll-margin-top:34px}
:focus-visible{outline:2px solid var(--mark);outline-offset:2px;border-radius:3px}
.verdicts{list-style:none;margin:0;padding:0;display:grid;gap:10px}
.verdicts>li{background:var(--card);border:1px solid var(--line);border-left:4px solid var(--good);border-radius:8px;
padding:.7em 1em}
.verdicts ul{margin:.2em 0 0;padding-left:1.1em}
.none{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.8em 1em}
.alert{background:var(--alert-ground);color:var(--alert);border:1px solid;border-radius:8px;padding:.7em 1em;
margin-bottom:14px;font-weight:600}
.alert ul{margin:0;padding-left:1.1em}
.soft{color:var(--soft);font-size:.92rem}
figure{margin:0}
figcaption{color:var(--soft);font-size:.88rem;margin-top:.4em}
.grid{margin-bottom:22px}
.grid video{max-width:100%;min-width:min(100%,480px);max-height:85vh;border-radius:8px;
background:#262626;display:block;image-rendering:pixelated}
.topic,.shot,.ab{border:1px solid var(--line);border-radius:10px;margin-bottom:12px;background:var(--ground)}
.topic>*,.shot>*,.ab>*{margin-left:16px;margin-right:16px}
summary{cursor:pointer;padding:.75em 0;font-weight:600}
details[open]>summary{margin-bottom:.2em}
summary small{color:var(--soft);font-weight:400}
.words{padding-left:1.1em;margin-top:.2em}
.words li{margin:.25em 0}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr));gap:20px;margin-bottom:16px}
.figures figure,.shot>figure{max-width:640px;min-width:0}.scroll{overflow-x:auto}
.figures svg.plot,.shot svg.plot{width:100%;min-width:430px;max-width:none;height:auto;
border:1px solid var(--line);border-radius:8px;padding:6px;
display:block}
.wide{overflow-x:auto;margin-bottom:16px}
table{border-collapse:collapse;font-size:.9rem;min-width:100%}
caption{text-align:left;color:var(--soft);padding-bottom:.5em}
tbody th{min-width:7em}table{overflow-wrap:normal}
th,td{padding:.4em .9em .4em 0;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
thead th{color:var(--soft);font-weight:600;white-space:nowrap}
tbody th{font-weight:500}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.up::before{content:"▲ "}.down::before{content:"▼ "}.up,.down{font-weight:600}
.ok{color:var(--good)}.worse{color:var(--worse)}.bad{color:var(--alert);font-weight:600}
.films{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(46%,200px),1fr));gap:14px;margin-bottom:16px}
.film video,.gone{width:100%;border-radius:8px;background:#262626;display:block;image-rendering:pixelated}
.gone{aspect-ratio:3/2;display:grid;place-items:center;color:#c9ced6;font-size:.88rem;padding:1em;text-align:center}
.film figcaption b{display:block;color:var(--ink);font-weight:600;font-size:.92rem}
.map{margin-bottom:12px}
.map img{max-width:100%;image-rendering:pixelated;border-radius:6px;display:block}
.controls{display:flex;flex-wrap:wrap;align-items:center;gap:8px;margin-bottom:12px}
.controls[hidden],.ab[hidden]{display:none}
.controls input[type=range]{flex:1 1 140px;min-width:100px;accent-color:var(--mark)}
.controls output{font-variant-numeric:tabular-nums;color:var(--soft);font-size:.9rem;min-width:4.5em}
button,.button,select{font:inherit;font-size:.92rem;color:var(--ink);background:var(--card);
border:1px solid var(--line);
border-radius:7px;padding:.35em .8em;cursor:pointer;text-decoration:none;display:inline-block;max-width:100%}
button:hover,.button:hover{border-color:var(--mark)}
i.play{display:inline-block;border:.38em solid transparent;border-left:.6em solid;border-right:0;margin-right:.5em}
[aria-pressed=true] i.play{border:0;width:.6em;height:.75em;border-left:.2em solid;border-right:.2em solid}
.ab .controls select{max-width:14em}
.stage{position:relative;max-width:560px;margin-bottom:16px;border-radius:8px;overflow:hidden;background:#262626;
touch-action:none;cursor:ew-resize}
.stage video{display:block;width:100%;image-rendering:pixelated;pointer-events:none}
.stage .b{position:absolute;inset:0;height:100%;clip-path:inset(0 0 0 50%)}
.stage .edge{position:absolute;top:0;bottom:0;left:50%;width:2px;background:#fff;mix-blend-mode:difference}
.stage:not(.wipe) .edge{display:none}
dl{display:grid;grid-template-columns:minmax(110px,auto) 1fr;gap:.25em 1.2em;margin:0;font-size:.93rem}
dt{color:var(--soft)}dd{margin:0}
pre{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:1em;overflow-x:auto;
font-size:.86rem}
.downloads{display:flex;flex-wrap:wrap;gap:10px}
.switch{cursor:pointer;font-size:.92rem;color:var(--soft)}
.switch input{accent-color:var(--mark);margin-right:.4em}
footer{color:var(--soft);font-size:.85rem;padding-top:26px;padding-bottom:40px}
@media(max-width:480px){header,nav,main,footer{padding-left:14px;padding-right:14px}
.topic>*,.shot>*,.ab>*{margin-left:10px;margin-right:10px}
.films{grid-template-columns:1fr 1fr;gap:10px}dl{grid-template-columns:1fr}dd{margin-bottom:.5em}}
@media print{nav,.controls{display:none}}
"""

# The clips of a shot follow one clock, which is the page's own: a video's is good to some frames, and stops when it
# likes. A video that is off by more than a frame is put right.
SCRIPT = """
'use strict';
const zh = document.getElementById('zh');
zh.checked = navigator.language.startsWith('zh');
const speak = () => { document.documentElement.lang = zh.checked ? 'zh' : 'en'; };
zh.addEventListener('change', speak);
speak();
for (const more of document.querySelectorAll('.grids')) {
  more.addEventListener('toggle', () => {
    for (const video of more.querySelectorAll('video')) video.preload = 'auto';
  });
}
for (const shot of document.querySelectorAll('.shot')) {
  const films = shot.querySelector('.films').querySelectorAll('video');
  const controls = shot.querySelector('.controls');
  if (!films.length || !controls) continue;
  const fps = Number(shot.dataset.fps), frames = Number(shot.dataset.frames);
  const ab = shot.querySelector('.ab'), stage = ab && ab.querySelector('.stage');
  const pair = stage ? [...stage.querySelectorAll('video')] : [];
  const all = [...films, ...shot.querySelectorAll('.films.more video'), ...pair];
  const range = controls.querySelector('input[type=range]'), output = controls.querySelector('output');
  const play = controls.querySelector('[data-do=play]'), loop = controls.querySelector('[data-do=loop]');
  let frame = 0, began = null, request = 0;
  for (const video of all) video.controls = false;
  controls.hidden = false;
  range.max = frames - 1;
  const middle = (n) => (n + 0.5) / fps;
  const show = () => {
    range.value = frame;
    output.textContent = `${frame + 1} / ${frames}`;
  };
  const seek = (n) => {
    frame = Math.min(Math.max(n, 0), frames - 1);
    for (const video of all) if (video.src) { video.preload = 'auto'; video.currentTime = middle(frame); }
    show();
  };
  const pause = () => {
    if (began === null) return;
    began = null;
    cancelAnimationFrame(request);
    play.setAttribute('aria-pressed', 'false');
    for (const video of all) video.pause();
    seek(frame);
  };
  const start = () => {
    if (frame >= frames - 1) frame = 0;
    began = performance.now() - middle(frame) * 1000;
    play.setAttribute('aria-pressed', 'true');
    for (const video of all) if (video.src) {
      video.preload = 'auto';
      video.currentTime = middle(frame);
      video.play().catch(() => {});
    }
    request = requestAnimationFrame(tick);
  };
  const tick = () => {
    if (began === null) return;
    let now = (performance.now() - began) / 1000;
    if (now >= frames / fps) {
      if (!loop.checked) { frame = frames - 1; return pause(); }
      began = performance.now();
      now = 0;
      for (const video of all) if (video.src) { video.currentTime = 0; video.play().catch(() => {}); }
    }
    frame = Math.min(Math.floor(now * fps), frames - 1);
    for (const video of all) {
      if (!video.src || video.seeking || video.readyState < 2) continue;
      const off = now - video.currentTime;
      if (Math.abs(off) > 1 / fps) video.currentTime = now;
      else video.playbackRate = Math.min(Math.max(1 + off, 0.9), 1.1);
      if (video.paused && !video.ended) video.play().catch(() => {});
    }
    show();
    request = requestAnimationFrame(tick);
  };
  play.addEventListener('click', () => (began === null ? start() : pause()));
  controls.querySelector('[data-do=back]').addEventListener('click', () => { pause(); seek(frame - 1); });
  controls.querySelector('[data-do=next]').addEventListener('click', () => { pause(); seek(frame + 1); });
  range.addEventListener('input', () => { pause(); seek(Number(range.value)); });
  shot.addEventListener('toggle', () => { if (shot.open) seek(frame); else pause(); });
  if (stage) {
    ab.hidden = false;
    const [a, b] = pair, mode = ab.querySelector('[data-do=mode]'), split = ab.querySelector('[data-do=split]');
    const [pickA, pickB] = ab.querySelectorAll('[data-side]');
    pickB.value = '1';
    const look = () => {
      const share = Number(split.value);
      stage.className = `stage ${mode.value}`;
      b.style.clipPath = mode.value === 'wipe' ? `inset(0 0 0 ${share}%)` : 'none';
      b.style.opacity = mode.value === 'blend' ? share / 100 : 1;
      b.style.mixBlendMode = mode.value === 'difference' ? 'difference' : 'normal';
      stage.querySelector('.edge').style.left = `${share}%`;
      split.disabled = mode.value === 'difference';
    };
    const choose = () => {
      if (!ab.open) return;
      const there = [...films];
      for (const [video, pick] of [[a, pickA], [b, pickB]]) {
        const src = there[Number(pick.value)].src;
        if (video.src !== src) video.src = src;
      }
      pause();
      seek(frame);
    };
    const drag = (event) => {
      if (!(event.buttons & 1)) return;
      const box = stage.getBoundingClientRect();
      split.value = Math.round((event.clientX - box.left) / box.width * 100);
      look();
    };
    stage.addEventListener('pointerdown', drag);
    stage.addEventListener('pointermove', drag);
    for (const one of [mode, split]) one.addEventListener('input', look);
    for (const one of [pickA, pickB]) one.addEventListener('change', choose);
    ab.addEventListener('toggle', (event) => { event.stopPropagation(); choose(); });
    look();
  }
  if (shot.open) seek(0);
  show();
}
"""

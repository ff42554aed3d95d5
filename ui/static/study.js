/**
 * The parts of the tabs Sweep, Vote and Report. As in app.js: a gr.HTML's element is filled, values are put in as text
 * nodes, never as markup, since names and prompts come from strangers.
 */

import { t } from "/cogloom/static/app.js";
import { icon, iconButton, make } from "/cogloom/web/dom.js";

const SMALL = 320; // pixels of width below which a clip is shown as pixels, not blurred
const APART = 0.04; // seconds between the two clips that are let pass
const LOST = 0.3; // seconds from which the second clip is put where the first one is

document.head.append(make("link", { rel: "stylesheet", href: "/cogloom/static/study.css" }));

/** Draws when the part is there, when its value has changed, and when the language has. */
function drawn({ element, props, watch }, draw) {
  const box = element.querySelector(".cl-part");
  const now = () => draw(box, props.value);
  watch("value", now);
  now();
  new MutationObserver(now).observe(document.documentElement, { attributeFilter: ["lang"] });
}

/** A name of a stranger's, which must not turn the direction of what is beside it. */
const name = (text, props = {}) => make("bdi", props, text);

// --- vote ---------------------------------------------------------------------------------------------------------------

const CHOICES = ["left", "tie", "bad", "right"];
const KEYS = { ArrowLeft: "left", ArrowRight: "right", ArrowUp: "tie", ArrowDown: "bad" };

/**
 * value: null, {state: "failed" | "done", text}, or {state: "pair", study, judge, token, prompt, left, right, text,
 * before, back}. Event: select {what: "vote" | "back", study, judge, token, choice}.
 */
export function vote(part) {
  const { element, props, trigger } = part;
  const box = element.querySelector(".cl-part");
  let pair = null;
  let last = null;
  const send = (what, choice = "") => {
    const { study, judge, token } = props.value;
    trigger("select", { what, study, judge, token, choice });
  };
  drawn(part, (_box, value) => {
    const now = JSON.stringify([value, document.documentElement.lang]);
    if (now === last) return;
    last = now;
    const focused = box.contains(document.activeElement) || document.activeElement?.id === "cl-vote-begin";
    pair?.end();
    pair = null;
    if (value?.state !== "pair") {
      const props = { class: "cl-empty", role: "status", dataset: { state: value?.state ?? "" } };
      return box.replaceChildren(make("p", props, value?.text ?? t("vote_empty")));
    }
    pair = new Pair(box, value, send);
    if (focused || document.activeElement === document.body) pair.element.focus({ preventScroll: true });
  });
  // On the document, for a judge goes on with the keyboard wherever a click has left the focus.
  document.addEventListener("keydown", (event) => {
    if (!pair || box.offsetParent === null || event.ctrlKey || event.metaKey || event.altKey) return;
    const at = event.target instanceof Element ? event.target : document.body;
    if (at.closest("input, textarea, select, [contenteditable], [role=tab], [role=slider], [role=listbox]")) return;
    if (event.key in KEYS) {
      event.preventDefault();
      if (!event.repeat) pair.choose(KEYS[event.key]);
    } else if (event.key === " " && !at.closest("button, a, summary")) {
      event.preventDefault();
      pair.toggle();
    }
  });
}

/** Two clips on one clock, and the buttons. Nothing can be said before both are there. */
class Pair {
  constructor(box, value, send) {
    Object.assign(this, { value, send, ready: false, said: false, playing: false, urls: [] });
    this.ended = new AbortController();
    this.sides = ["left", "right"].map((side) => this.side(side));
    this.buttons = CHOICES.map((choice) =>
      make(
        "button",
        { type: "button", class: `cs-choice cs-${choice}`, disabled: true, dataset: { choice }, on: { click: () => this.choose(choice) } },
        make("span", { class: "cs-word" }, t(`vote_${choice}`)),
      ),
    );
    this.told = make("p", { class: "cl-said", role: "status" }, t("vote_loading"));
    this.play = iconButton("pause", t("vote_play"), () => this.toggle(), { disabled: true });
    const back = make(
      "button",
      { type: "button", class: "cs-quiet cs-back", disabled: !value.back, on: { click: () => this.leave("back") } },
      t("vote_back"),
    );
    this.element = make(
      "div",
      { class: "cs-pair", role: "group", "aria-label": t("vote_question"), tabindex: "-1", dataset: { token: value.token } },
      make("p", { class: "cs-prompt" }, name(value.prompt)),
      make("div", { class: "cs-clips" }, this.sides.map((one) => one.figure)),
      make("div", { class: "cs-choices" }, this.buttons),
      make("div", { class: "cs-under" }, this.play, back, this.told, make("span", { class: "cs-keys" }, t("vote_keys"))),
    );
    if (value.before) {
      const before = make("p", { class: "cs-before" }, t("vote_before", { choice: t(`vote_${value.before}`) }));
      this.element.insertBefore(before, this.element.lastChild);
      this.buttons.find((one) => one.dataset.choice === value.before)?.setAttribute("aria-pressed", "true");
    }
    box.replaceChildren(this.element);
    this.load();
  }

  side(side) {
    const video = make("video", { playsinline: true, preload: "auto", tabindex: "-1", "aria-label": t(`vote_${side}`) });
    video.muted = true;
    const caption = make("figcaption", {}, t(`vote_${side}`));
    return { side, video, caption, figure: make("figure", { class: "cs-clip" }, video, caption) };
  }

  /** Both whole, so that neither stutters, and under addresses that say nothing. */
  async load() {
    const { signal } = this.ended;
    try {
      await Promise.all(
        this.sides.map(async ({ side, video }) => {
          const answer = await fetch(this.value[side], { signal });
          if (!answer.ok) throw new Error(`HTTP ${answer.status}`);
          const url = URL.createObjectURL(await answer.blob());
          this.urls.push(url);
          await new Promise((resolve, reject) => {
            video.addEventListener("loadeddata", resolve, { once: true, signal });
            video.addEventListener("error", () => reject(new Error(video.error?.message)), { once: true, signal });
            video.src = url;
          });
        }),
      );
    } catch (error) {
      if (signal.aborted) return;
      const retry = make("button", { type: "button", class: "cs-quiet", on: { click: () => this.again() } }, t("vote_retry"));
      return this.told.replaceChildren(`${t("vote_lost")} (${error.message}) `, retry);
    }
    if (signal.aborted) return this.release();
    const [a, b] = this.sides.map((one) => one.video);
    for (const video of [a, b]) video.classList.toggle("cs-small", video.videoWidth < SMALL);
    this.lay(a.videoWidth / a.videoHeight);
    a.addEventListener("ended", () => this.restart(), { signal });
    this.follow(a, b);
    this.ready = true;
    this.told.textContent = this.value.text;
    for (const button of [...this.buttons, this.play]) button.disabled = false;
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) this.show();
    else this.toggle();
  }

  again() {
    this.release();
    this.told.textContent = t("vote_loading");
    this.load();
  }

  /** Wide clips stand on a phone one above the other, and the buttons say so. */
  lay(shape) {
    const narrow = matchMedia("(max-width: 640px)");
    const draw = () => {
      const stacked = narrow.matches && shape > 1.2;
      this.element.classList.toggle("cs-stacked", stacked);
      for (const [side, above] of [["left", "top"], ["right", "bottom"]]) {
        const word = t(`vote_${stacked ? above : side}`);
        this.buttons.find((one) => one.dataset.choice === side).querySelector(".cs-word").textContent = word;
        this.sides.find((one) => one.side === side).caption.textContent = word;
      }
    };
    narrow.addEventListener("change", draw, { signal: this.ended.signal });
    draw();
  }

  /** The second is held to the first one's clock: a little faster or slower, or put there where it is far off. */
  follow(a, b) {
    const step = () => {
      if (this.ended.signal.aborted) return;
      const drift = b.currentTime - a.currentTime;
      if (Math.abs(drift) > LOST && !b.seeking) b.currentTime = a.currentTime;
      b.playbackRate = Math.abs(drift) > APART ? 1 - Math.sign(drift) * 0.1 : 1;
      a.requestVideoFrameCallback(step);
    };
    a.requestVideoFrameCallback(step);
  }

  restart() {
    for (const { video } of this.sides) video.currentTime = 0;
    if (this.playing) for (const { video } of this.sides) video.play().catch(() => {});
  }

  toggle() {
    if (!this.ready) return;
    this.playing = !this.playing;
    const [a, b] = this.sides.map((one) => one.video);
    if (!this.playing) b.currentTime = a.currentTime;
    else if (a.ended) this.restart();
    for (const video of [a, b]) this.playing ? video.play().catch(() => {}) : video.pause();
    this.show();
  }

  show() {
    this.play.replaceChildren(icon(this.playing ? "pause" : "play"));
    this.element.dataset.playing = this.playing;
  }

  choose(choice) {
    if (this.ready) this.leave("vote", choice);
  }

  leave(what, choice) {
    if (this.said) return;
    this.said = true;
    for (const button of this.element.querySelectorAll("button")) button.disabled = true;
    this.element.setAttribute("aria-busy", "true");
    this.send(what, choice);
  }

  release() {
    for (const url of this.urls.splice(0)) URL.revokeObjectURL(url);
  }

  end() {
    this.ended.abort();
    for (const { video } of this.sides) video.pause();
    this.release();
  }
}

/** value: null, or {rows: [{arm, group, about, at, low, high}], lines: [text]}; places are from 0 to 1. */
export function ranking(part) {
  drawn(part, (box, value) => {
    if (!value) return box.replaceChildren();
    const { rows = [], lines = [] } = value;
    const made = rows.map(({ arm, group, about, at, low, high }) =>
      make(
        "li",
        { class: "cs-standing" },
        make("span", { class: "cs-letters" }, group),
        make("span", { class: "cs-arm" }, name(arm), make("small", {}, about)),
        make(
          "span",
          { class: "cs-scale", "aria-hidden": "true" },
          make("i", { class: "cs-range", style: { left: `${low * 100}%`, width: `${(high - low) * 100}%` } }),
          make("i", { class: "cs-dot", style: { left: `${at * 100}%` } }),
        ),
      ),
    );
    const list = made.length
      ? [make("ol", { class: "cs-ranking" }, made), make("p", { class: "cs-legend" }, make("span", {}, t("standing_group")), make("span", {}, t("standing_scale")))]
      : [];
    box.replaceChildren(...list, ...lines.map((line) => make("p", { class: "cs-line" }, name(line))));
  });
}

// --- sweep --------------------------------------------------------------------------------------------------------------

/** value: [{label, rows, said}]. Event: input, when one is taken away. */
export function arms(part) {
  const { props, trigger } = part;
  drawn(part, function draw(box, value) {
    const found = Array.isArray(value) ? value : [];
    const remove = (index) => {
      props.value = found.filter((_, n) => n !== index);
      trigger("input");
      draw(box, props.value); // what is set here is not told to who watches
      box.querySelector(`li:nth-child(${Math.min(index, found.length - 2) + 1}) button`)?.focus();
    };
    const items = found.map(({ label, said }, index) => {
      const title = label || said;
      return make(
        "li",
        { class: "cs-item" },
        make("span", { class: "cs-number", "aria-hidden": "true" }, String.fromCharCode(65 + (index % 26))),
        make("span", { class: "cs-arm" }, name(title), label && said && label !== said ? make("small", {}, name(said)) : null),
        iconButton("remove", t("sweep_remove", { name: title }), () => remove(index)),
      );
    });
    box.replaceChildren(items.length ? make("ul", { class: "cs-list" }, items) : make("p", { class: "cs-none" }, t("sweep_arms_none")));
  });
}

/** value: null, or {facts: [[name, text]], lines: [text], level: "fine" | "bad"}. */
export function facts(part) {
  drawn(part, (box, value) => {
    if (!value) return box.replaceChildren(make("p", { class: "cl-empty" }, t("cost_empty")));
    const { facts: found = [], lines = [], level = "fine" } = value;
    box.dataset.level = level;
    const list = found.flatMap(([key, text]) => [make("dt", {}, key), make("dd", {}, name(text))]);
    box.replaceChildren(
      list.length ? make("dl", { class: "cs-facts" }, list) : "",
      ...lines.map((line) => make("p", { class: "cs-line", role: "status" }, line)),
    );
  });
}

/** value: null, {said, level: "bad"}, or {said, head: [{name, unit, about}], rows: [{arm, reference, cells: [[mean, around]]}],
 * verdicts, findings, words: [text], more}. */
export function outcome(part) {
  drawn(part, (box, value) => {
    if (!value) return box.replaceChildren(make("p", { class: "cl-empty" }, t("outcome_empty")));
    const { said = "", level = "fine", head = [], rows = [], more = 0 } = value;
    box.dataset.level = level;
    if (level === "bad") return box.replaceChildren(make("p", { class: "cs-line", role: "status" }, said));
    box.replaceChildren(...sentences(value), head.length ? table(head, rows) : "", more ? make("p", { class: "cs-quiet-line" }, t("outcome_more", { n: more })) : "", all(value));
  });
}

function sentences({ said = "", findings = [], verdicts = [] }) {
  const lines = verdicts.length ? verdicts : [t("outcome_open")];
  return [
    ...findings.map((line) => make("p", { class: "cs-finding", role: "alert" }, name(line))),
    make("h3", { class: "cl-heading" }, t("outcome_verdicts")),
    make("ul", { class: "cs-verdicts" }, lines.map((line) => make("li", {}, name(line)))),
    said ? make("p", { class: "cs-quiet-line" }, said) : "",
  ];
}

function all({ words = [] }) {
  if (!words.length) return "";
  return make(
    "details",
    { class: "cs-all" },
    make("summary", {}, t("outcome_words")),
    words.map((line) => make("p", { class: "cs-line" }, name(line))),
  );
}

function table(head, rows) {
  const columns = head.map(({ name: metric, unit, about }) =>
    make("th", { scope: "col", title: about }, name(metric), unit ? make("small", {}, unit) : null),
  );
  const lines = rows.map(({ arm, reference, cells }) =>
    make(
      "tr",
      {},
      make("th", { scope: "row" }, name(arm), reference ? make("small", {}, t("outcome_reference")) : null),
      cells.map(([mean, around]) => make("td", {}, mean, around ? make("small", {}, around) : null)),
    ),
  );
  return make(
    "div",
    { class: "cs-scroll", tabindex: "0", role: "region", "aria-label": t("outcome_table") },
    make(
      "table",
      { class: "cs-table" },
      make("caption", {}, t("outcome_table")),
      make("thead", {}, make("tr", {}, make("th", { scope: "col" }, t("outcome_arm")), columns)),
      make("tbody", {}, lines),
    ),
  );
}

// --- report -------------------------------------------------------------------------------------------------------------

/** value: null, {said}, or {page, save, findings, verdicts, words: [text], videos, pictures, plots, files: [{name, url}]}. */
export function report(part) {
  let last = null;
  drawn(part, (box, value) => {
    const now = JSON.stringify([value, document.documentElement.lang]);
    if (now === last) return; // a video goes on playing
    last = now;
    if (!value) return box.replaceChildren(make("p", { class: "cl-empty" }, t("report_empty")));
    const { page = "", save = "", said = "", level = "fine", videos = [], pictures = [], plots = [], files = [] } = value;
    box.dataset.level = level;
    if (!page) return box.replaceChildren(make("p", { class: "cl-empty", role: "status" }, said));
    const links = make(
      "p",
      { class: "cs-links" },
      make("a", { class: "cs-link cs-main", href: page, target: "_blank", rel: "noopener" }, t("report_open")),
      make("a", { class: "cs-link", href: page, download: save }, t("report_save")),
      files.map(({ name: file, url }) => make("a", { class: "cs-link", href: url, download: file.split("/").at(-1) }, name(file))),
    );
    box.replaceChildren(
      links,
      ...sentences(value),
      ...shelf(t("report_videos"), videos, ({ name: file, url }) => {
        const video = make("video", { src: url, controls: true, loop: true, playsinline: true, preload: "metadata", "aria-label": file });
        video.muted = true;
        return video;
      }),
      ...shelf("", pictures, ({ name: file, url }) => make("img", { src: url, alt: file, loading: "lazy" })),
      ...shelf(t("report_plots"), plots, ({ name: file, url }) => make("img", { src: url, alt: file, loading: "lazy" })),
      all(value),
    );
  });
}

function shelf(title, found, shown) {
  if (!found.length) return [];
  const figures = found.map((one) => make("figure", {}, shown(one), make("figcaption", {}, name(one.name))));
  return [title ? make("h3", { class: "cl-heading" }, title) : "", make("div", { class: "cs-shelf" }, figures)];
}

/**
 * The parts of the tabs Adapters, Workflows and Train. As in app.js: a gr.HTML's element is filled, values are put in as
 * text nodes, never as markup, since names, metadata and captions come from strangers' files.
 */

import { t } from "/cogloom/static/app.js";
import { make } from "/cogloom/web/dom.js";

const SVG = "http://www.w3.org/2000/svg";

document.head.append(make("link", { rel: "stylesheet", href: "/cogloom/static/more.css" }));

/** Draws when the part is there, when its value has changed, and when the language has. */
export function drawn({ element, props, watch }, draw) {
  const box = element.querySelector(".cl-part");
  const now = () => draw(box, props.value);
  watch("value", now);
  now();
  new MutationObserver(now).observe(document.documentElement, { attributeFilter: ["lang"] });
}

export function drawing(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, String(value));
  element.append(...children);
  return element;
}

/** A name of a stranger's, which must not turn the direction of what is beside it. */
export const name = (text, props = {}) => make("bdi", props, text);

// --- adapters -----------------------------------------------------------------------------------------------------------

/** value: {rows: [{name, title, folder, about, problem, picture, chosen}], said}. Event: select {name}. */
export function adapters(part) {
  drawn(part, (box, value) => {
    const { rows = [], said = "" } = value ?? {};
    const focused = box.contains(document.activeElement) ? document.activeElement.dataset.name : null;
    const cards = rows.map((row) => adapterCard(row, () => part.trigger("select", { name: row.name })));
    box.replaceChildren(make("ul", { class: "cm-grid" }, cards), make("p", { class: "cm-said", role: "status" }, said));
    if (focused !== null) [...box.querySelectorAll("button")].find((one) => one.dataset.name === focused)?.focus();
  });
}

function adapterCard(row, choose) {
  const picture = row.picture
    ? make("img", { src: `/cogloom/picture?${new URLSearchParams({ name: row.name })}`, alt: "", loading: "lazy" })
    : make("span", { class: "cm-letter", "aria-hidden": "true" }, [...row.title][0]?.toUpperCase() ?? "?");
  const text = [name(row.title, { class: "cm-title" }), make("span", { class: "cm-about" }, row.about)];
  if (row.folder) text.push(name(row.folder, { class: "cm-about" }));
  if (row.problem) text.push(make("span", { class: "cm-problem" }, row.problem));
  const button = make(
    "button",
    { type: "button", class: "cm-adapter", "aria-pressed": row.chosen ? "true" : "false", dataset: { name: row.name }, on: { click: choose } },
    picture,
    make("span", { class: "cm-text" }, text),
  );
  return make("li", {}, button);
}

/** value: null, or {title, problem, hints: [text], facts: [[key, text]], metadata: [[name, text]]}. */
export function adapter(part) {
  drawn(part, (box, value) => {
    if (!value) return box.replaceChildren(make("p", { class: "cl-empty" }, t("pick_adapter")));
    const facts = value.facts.map(([key, text]) => [make("dt", {}, t(key)), make("dd", {}, name(text))]);
    const metadata = value.metadata.map(([key, text]) => [make("dt", {}, name(key)), make("dd", {}, name(text))]);
    box.replaceChildren(
      make("h3", {}, name(value.title)),
      value.problem ? make("p", { class: "cm-problem", role: "alert" }, value.problem) : "",
      ...value.hints.map((hint) => make("p", { class: "cm-hint" }, hint)),
      make("dl", { class: "cm-facts" }, facts),
      make(
        "details",
        { class: "cm-metadata" },
        make("summary", {}, `${t("a_metadata")} (${metadata.length})`),
        metadata.length ? make("dl", { class: "cm-facts", tabindex: "0" }, metadata) : make("p", {}, t("a_no_metadata")),
      ),
    );
  });
}

/** value: null, or {title, none, rows: [[depth, name, about, state]]}: a tree, each row below what it went into. */
export function lineage(part) {
  drawn(part, (box, value) => {
    if (!value) return box.replaceChildren();
    const rows = value.rows.map(([depth, file, about, state]) =>
      make(
        "li",
        { dataset: { state }, style: { "--cm-depth": depth }, "aria-level": depth + 1 },
        name(file, { class: "cm-parent" }),
        make("span", { class: "cm-about" }, about),
      ),
    );
    box.replaceChildren(
      make("p", { class: "cm-head" }, value.title),
      rows.length ? make("ul", { class: "cm-lineage" }, rows) : make("p", { class: "cm-said" }, value.none),
    );
  });
}

// --- drawings -----------------------------------------------------------------------------------------------------------

export const WIDTH = 640;
export const HEIGHT = 200;
export const LEFT = 52;
export const BOTTOM = 24;

/** A few round numbers from low to high. */
export function ticks(low, high, count = 4) {
  const rough = (high - low || 1) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((one) => one * power).find((one) => one >= rough);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step / 1e6; at += step) found.push(Math.abs(at) < step / 1e6 ? 0 : at);
  return found;
}

export const short = (number) => String(Number(number.toPrecision(3)));

export function frame(label, low, high, y) {
  const svg = drawing("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "cm-chart", role: "img", "aria-label": label });
  for (const at of ticks(low, high)) {
    svg.append(
      drawing("line", { x1: LEFT, x2: WIDTH, y1: y(at), y2: y(at), class: at === 0 ? "cm-axis" : "cm-rule" }),
      drawing("text", { x: LEFT - 6, y: y(at) + 4, "text-anchor": "end" }, short(at)),
    );
  }
  return svg;
}

/** The numbers behind a drawing, for who cannot see it or wants them. */
export function numbers(rows) {
  const body = rows.map(([label, value]) => make("tr", {}, make("th", { scope: "row" }, label), make("td", {}, value)));
  return make("table", { class: "cl-offscreen cm-numbers" }, make("tbody", {}, body));
}

/** value: null, or {title, said, bars: [[label, number]], low, high}. */
export function bars(part) {
  drawn(part, (box, value) => {
    if (!value) return box.replaceChildren();
    const { title, said = "", bars: found = [] } = value;
    const head = make("p", { class: "cm-head" }, name(title), said ? make("b", {}, said) : "");
    if (!found.length) return box.replaceChildren(head);
    const high = Math.max(value.high ?? 0, ...found.map(([, one]) => one), 0) || 1;
    const low = Math.min(value.low ?? 0, ...found.map(([, one]) => one), 0);
    const y = (one) => 8 + ((high - one) / (high - low)) * (HEIGHT - 8 - BOTTOM);
    const svg = frame(title, low, high, y);
    const step = (WIDTH - LEFT) / found.length;
    const every = Math.ceil(found.length / 16);
    found.forEach(([label, one], index) => {
      const x = LEFT + index * step;
      const bar = drawing("rect", {
        x: x + step * 0.12, width: step * 0.76, y: Math.min(y(one), y(0)), height: Math.max(Math.abs(y(one) - y(0)), 0.5),
        class: one < 0 ? "cm-bar cm-below" : "cm-bar",
      });
      bar.append(drawing("title", {}, `${label}: ${short(one)}`));
      svg.append(bar);
      if (index % every === 0) svg.append(drawing("text", { x: x + step / 2, y: HEIGHT - 6, "text-anchor": "middle" }, label));
    });
    box.replaceChildren(head, svg, numbers(found.map(([label, one]) => [label, short(one)])));
  });
}

/** value: null, or {total, loss: [[step, number]], validation: [[step, number]]}. */
export function plot(part) {
  drawn(part, (box, value) => {
    const { total = 1, loss = [], validation = [] } = value ?? {};
    const all = [...loss, ...validation].map(([, one]) => one);
    if (!all.length) return box.replaceChildren(make("p", { class: "cl-empty" }, t("plot_empty")));
    const high = Math.max(...all);
    const low = Math.min(0, ...all);
    const x = (step) => LEFT + (step / Math.max(total, 1)) * (WIDTH - LEFT - 20);
    const y = (one) => 8 + ((high - one) / (high - low || 1)) * (HEIGHT - 8 - BOTTOM);
    const svg = frame(t("plot"), low, high, y);
    for (const at of ticks(0, total, 6)) {
      svg.append(drawing("text", { x: x(at), y: HEIGHT - 6, "text-anchor": "middle" }, short(at)));
    }
    const line = (points, kind) => {
      const path = points.map(([step, one]) => `${x(step).toFixed(1)},${y(one).toFixed(1)}`).join(" ");
      svg.append(drawing("polyline", { points: path, class: `cm-line cm-${kind}` }));
    };
    line(loss, "loss");
    line(validation, "validation");
    for (const [step, one] of validation) {
      const dot = drawing("circle", { cx: x(step), cy: y(one), r: 4, class: "cm-dot" });
      dot.append(drawing("title", {}, `${t("validation")} ${step}: ${short(one)}`));
      svg.append(dot);
    }
    const legend = make(
      "p",
      { class: "cm-legend" },
      make("span", { class: "cm-key-loss" }, t("loss")),
      make("span", { class: "cm-key-validation" }, t("validation")),
    );
    const last = [...validation].map(([step, one]) => [`${t("validation")} ${step}`, short(one)]);
    if (loss.length) last.push([`${t("loss")} ${loss.at(-1)[0]}`, short(loss.at(-1)[1])]);
    box.replaceChildren(legend, svg, numbers(last));
  });
}

// --- workflows ----------------------------------------------------------------------------------------------------------

/** value: [{title, url, name, shown: "video" | "image" | "none", text}]. */
export function results(part) {
  drawn(part, (box, value) => {
    const found = value ?? [];
    if (!found.length) return box.replaceChildren(make("p", { class: "cl-empty" }, t("workflow_empty")));
    box.replaceChildren(
      ...found.map(({ title, url, name: file, shown, text }) => {
        const body = [];
        if (shown === "video") {
          const video = make("video", { src: url, controls: true, loop: true, playsinline: true, preload: "metadata", "aria-label": title });
          video.muted = true;
          body.push(video);
        } else if (shown === "image") body.push(make("img", { src: url, alt: title }));
        if (url) body.push(make("a", { href: url, download: file.split("/").at(-1), class: "cm-link" }, `${t("download")}: ${file}`));
        if (text) body.push(make("pre", { tabindex: "0" }, text));
        return make("figure", { class: "cm-result" }, make("figcaption", {}, name(title)), body);
      }),
    );
  });
}

/** value: null, or {name, text, stamp}: a file that is handed to the browser, once for each stamp. */
export function saved(part) {
  let last = part.props.value?.stamp ?? null; // what was there before the page was is not asked for again
  part.watch("value", () => {
    const { name: file, text, stamp } = part.props.value ?? {};
    if (!stamp || stamp === last) return;
    last = stamp;
    const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    const link = make("a", { href: url, download: file });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
  });
}

// --- training -----------------------------------------------------------------------------------------------------------

/** value: [[name, caption]]. */
export function captions(part) {
  drawn(part, (box, value) => {
    const rows = (value ?? []).map(([file, caption]) =>
      make("tr", {}, make("th", { scope: "row" }, name(file)), make("td", {}, name(caption))),
    );
    box.replaceChildren(rows.length ? make("table", { class: "cm-captions" }, make("tbody", {}, rows)) : "");
  });
}

/* Clips on the way of a training: [{url, title}], the latest first. A clip that is shown stays as it is. */
export function samples(part) {
  drawn(part, (box, value) => {
    const kept = new Map([...box.querySelectorAll("figure")].map((one) => [one.dataset.url, one]));
    const shown = (value ?? []).map(({ url, title }) => {
      if (kept.has(url)) return kept.get(url);
      const film = make("video", { src: url, controls: true, loop: true, playsinline: true, preload: "metadata", "aria-label": title });
      film.muted = true;
      const figure = make("figure", {}, film, make("figcaption", {}, name(title)));
      figure.dataset.url = url;
      return figure;
    });
    box.replaceChildren(...shown);
  });
}

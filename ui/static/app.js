/**
 * The parts of the page that Gradio has no component for. Each is put into the element of a gr.HTML, which gives it its
 * value and takes its events; whatever is shown goes in as text, never as markup.
 */

import { app } from "/scripts/app.js";
import { iconButton, make } from "/cogloom/web/dom.js";
import { createPlayer } from "/cogloom/web/player.js";
import { refreshStacks, stackWidget } from "/cogloom/web/stack.js";
import { texts } from "/cogloom/web/text.js";

const TABLES = JSON.parse(document.getElementById("cogloom-text")?.textContent ?? '{"en":{},"zh":{}}');
const THEME = "cogloom-theme";
const base = { type: "CogLoomBase", widgets: [{ name: "checkpoint", value: null }] };
app.graph.nodes.push(base);

// --- language and theme -------------------------------------------------------------------------------------------------

let language = "en";
const listeners = new Set();

export function t(key, values = {}) {
  const text = TABLES[language]?.[key] ?? TABLES.en[key] ?? key;
  return text.replace(/\{(\w+)\}/g, (whole, name) => (name in values ? String(values[name]) : whole));
}

/** Runs `draw` now, and again when the language changes. */
function inLanguage(draw) {
  listeners.add(draw);
  draw();
}

export function setLanguage(code) {
  if (code === language || !(code in TABLES)) return;
  language = code;
  document.documentElement.lang = code === "zh" ? "zh-CN" : code;
  for (const draw of listeners) draw();
}

export function setBase(name) {
  base.widgets[0].value = name;
  refreshStacks();
}

function setTheme(dark) {
  document.body.classList.toggle("dark", dark);
  document.documentElement.style.colorScheme = dark ? "dark" : "light";
}

const stored = localStorage.getItem(THEME);
setTheme(stored ? stored === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
document.documentElement.lang = "en";
// The page may have said both before this was here.
window.cogloom = { setLanguage, setBase };
if (window.cogloomBase) setBase(window.cogloomBase);
setLanguage(window.cogloomLanguage);

/** Gradio's own style sheet says how every input looks, as strongly as ours do: ours have to come after it. */
function styleLast() {
  for (const link of document.querySelectorAll('link[href^="/cogloom/"]')) document.head.append(link);
}

export function header(element) {
  styleLast();
  const button = element.querySelector(".cl-theme");
  const draw = () => {
    element.querySelector(".cl-tagline").textContent = t("tagline");
    button.title = t("theme");
    button.setAttribute("aria-label", t("theme"));
  };
  inLanguage(draw);
  button.addEventListener("click", () => {
    const dark = !document.body.classList.contains("dark");
    setTheme(dark);
    localStorage.setItem(THEME, dark ? "dark" : "light");
  });
}

export function heading(element, key) {
  inLanguage(() => (element.querySelector(".cl-heading").textContent = t(key)));
}

// --- parts --------------------------------------------------------------------------------------------------------------

/** The stack editor of ComfyUI's node. The value is the JSON text of the rows. */
export function stack({ element, props, trigger, watch }) {
  const box = element.querySelector(".cl-part");
  let node = null;
  let shown = null;
  const build = () => {
    if (node) app.graph.nodes.splice(app.graph.nodes.indexOf(node), 1);
    shown = props.value || "[]";
    node = stackNode(box, (text) => {
      shown = text;
      props.value = text;
      trigger("input");
    });
    app.graph.nodes.push(node);
    stackWidget(node, "rows", texts(language), shown);
  };
  inLanguage(build);
  watch("value", () => {
    if ((props.value || "[]") === shown) return;
    shown = props.value || "[]";
    node.options.setValue(shown);
  });
}

/** As much of a node as the editor's widget looks at. */
function stackNode(box, onChange) {
  const node = {
    type: "CogLoomLoraStack",
    graph: { nodes: [], links: [], getNodeById: () => null },
    outputs: [],
    size: [440, 200],
    computeSize: () => [440, 200],
    setSize: () => {},
    addDOMWidget(_name, _kind, element, options) {
      node.options = options;
      box.replaceChildren(element);
      return { callback: onChange };
    },
  };
  return node;
}

/** value: {state: "idle" | "running" | "done" | "failed", text, percent, look}. */
export function progress({ element, props, watch }) {
  const box = element.querySelector(".cl-part");
  const bar = make("div", { class: "cl-bar" });
  const track = make("div", { class: "cl-track", role: "progressbar", "aria-valuemin": 0, "aria-valuemax": 100 }, bar);
  const look = make("img", { class: "cl-look", alt: "", hidden: true });
  const said = make("p", { class: "cl-said", role: "status", "aria-live": "polite" });
  box.append(look, track, said);
  const draw = () => {
    const { state = "idle", text = "", percent = 0, look: picture = "" } = props.value ?? {};
    box.dataset.state = state;
    track.hidden = state !== "running";
    track.setAttribute("aria-valuenow", Math.round(percent));
    track.setAttribute("aria-label", text);
    bar.style.width = `${percent}%`;
    if (said.textContent !== text) said.textContent = text;
    look.hidden = state !== "running" || !picture;
    if (picture.startsWith("data:image/") && look.src !== picture) look.src = picture;
  };
  watch("value", draw);
  draw();
}

/** value: {clips: [{url, label, frames}], fps}. */
export function player({ element, props, watch }) {
  const box = element.querySelector(".cl-part");
  let made = null;
  let last = "";
  const draw = () => {
    const { clips = [], fps = 8 } = props.value ?? {};
    const now = JSON.stringify([clips, fps, language]);
    if (now === last) return;
    last = now;
    made?.destroy();
    made = null;
    if (!clips.length) return box.replaceChildren(make("p", { class: "cl-empty" }, t(box.dataset.empty)));
    box.replaceChildren();
    made = createPlayer(box, { clips, fps, text: texts(language) });
  };
  watch("value", draw);
  inLanguage(draw);
}

/** value: [{name, url, shown, title, about}], the newest first. Events: select {name, what: "open" | "use"}. */
export function gallery({ element, props, trigger, watch }) {
  const box = element.querySelector(".cl-part");
  let last = null;
  const draw = () => {
    const made = props.value ?? [];
    const now = JSON.stringify([made, language]);
    if (now === last) return;
    last = now;
    const cards = made.map((one) => card(one, (what) => trigger("select", { name: one.name, what })));
    box.replaceChildren(...(cards.length ? cards : [make("p", { class: "cl-empty" }, t("nothing_yet"))]));
  };
  watch("value", draw);
  inLanguage(draw);
}

function card({ name, url, shown, title, about }, choose) {
  const picture = shown === "video" ? moving(url) : shown === "image" ? make("img", { src: url, alt: "", loading: "lazy" }) : none();
  const look = make(
    "button",
    { type: "button", class: "cl-open", title: t("open"), "aria-label": `${t("open")}: ${title}`, on: { click: () => choose("open") } },
    picture,
  );
  if (shown === "none") look.disabled = true;
  const use = make("button", { type: "button", class: "cl-use", on: { click: () => choose("use") } }, t("use_settings"));
  const save = make("a", { class: "cl-save", href: url, download: name.split("/").at(-1), "aria-label": `${t("download")}: ${name}` }, t("download"));
  const details = make("details", {}, make("summary", {}, t("record")));
  details.addEventListener("toggle", () => details.open && readRecord(details, name), { once: true });
  return make(
    "figure",
    { class: "cl-card" },
    look,
    make("figcaption", {}, make("b", { title }, title), make("span", {}, about)),
    make("div", { class: "cl-row" }, use, save),
    details,
  );
}

function none() {
  return make("span", { class: "cl-empty" }, t("not_shown"));
}

/** Plays while it is pointed at. */
function moving(url) {
  // The fragment has the browser show a frame; without it some show nothing until it plays.
  const video = make("video", { src: `${url}#t=0.5`, preload: "metadata", loop: true, playsinline: true, tabindex: "-1" });
  video.muted = true;
  video.addEventListener("pointerenter", () => video.play().catch(() => {}));
  video.addEventListener("pointerleave", () => video.pause());
  return video;
}

async function readRecord(details, name) {
  const answer = await fetch(`/cogloom/record?${new URLSearchParams({ name })}`);
  const record = await answer.json().catch(() => ({ error: `HTTP ${answer.status}` }));
  const text = record.error ?? JSON.stringify(record, null, 2);
  details.append(make("pre", { tabindex: "0" }, text));
}

/** value: [{title}]. Event: select {index}. */
export function examples({ element, props, trigger, watch }) {
  const box = element.querySelector(".cl-part");
  const draw = () => {
    const found = props.value ?? [];
    const chips = found.map(({ title, tip }, index) =>
      make("button", { type: "button", class: "cl-chip", title: tip, on: { click: () => trigger("select", { index }) } }, title),
    );
    box.replaceChildren(...chips);
  };
  watch("value", draw);
  draw();
}

/** value: {kind: "" | "image" | "video", name, text}. Events: upload {kind, path}; clear. */
export function start({ element, props, trigger, watch, upload }) {
  const box = element.querySelector(".cl-part");
  const kinds = { image: ".png,.jpg,.jpeg,.webp,.bmp", video: ".mp4,.webm,.mkv,.gif,.mov,.avi" };
  const take = async (file, kind) => {
    box.setAttribute("aria-busy", "true");
    try {
      const { path } = await upload(file);
      trigger("upload", { kind, path });
    } finally {
      box.removeAttribute("aria-busy");
    }
  };
  const draw = () => {
    const { kind = "", name = "", text = "" } = props.value ?? {};
    if (kind) {
      const url = `/cogloom/start?${new URLSearchParams({ name })}`;
      const picture = kind === "image" ? make("img", { src: url, alt: t("image") }) : moving(url);
      const remove = iconButton("remove", texts(language).remove, () => trigger("clear"));
      box.replaceChildren(make("div", { class: "cl-started" }, picture, make("span", {}, text), remove));
      return;
    }
    const choices = Object.entries(kinds).map(([which, accept]) => {
      const field = make("input", { type: "file", accept, class: "cl-file", "aria-label": t(which) });
      field.addEventListener("change", () => field.files[0] && take(field.files[0], which));
      return make("label", { class: "cl-drop" }, field, make("span", {}, t(which)));
    });
    box.replaceChildren(...choices);
  };
  box.addEventListener("dragover", (event) => event.preventDefault());
  box.addEventListener("drop", (event) => {
    event.preventDefault();
    const file = event.dataTransfer.files[0];
    if (file) take(file, file.type.startsWith("video/") ? "video" : "image");
  });
  watch("value", draw);
  inLanguage(draw);
}

/** value: {items: [[key, text]], verified: null | [count, wrong]}. */
export function status({ element, props, watch }) {
  const box = element.querySelector(".cl-part");
  const draw = () => {
    const { items = [], verified = null } = props.value ?? {};
    const told = items.map(([key, text]) =>
      make("span", { class: "cl-item", dataset: { key } }, make("i", {}, t(key)), make("b", {}, text.startsWith("@") ? t(text.slice(1)) : text)),
    );
    const [key, n] = verified === null ? ["unverified", 0] : verified[1] ? ["not_verified", verified[1]] : ["verified", verified[0]];
    told.push(make("span", { class: `cl-item cl-${key}` }, make("b", {}, t(key, { n }))));
    box.replaceChildren(...told);
  };
  watch("value", draw);
  inLanguage(draw);
}

/** value: {level: "fine" | "warn" | "bad", lines: [text]}. */
export function notes({ element, props, watch }) {
  const box = element.querySelector(".cl-part");
  const draw = () => {
    const { level = "fine", lines = [] } = props.value ?? {};
    box.dataset.level = level;
    box.replaceChildren(...lines.map((line) => make("p", {}, line)));
  };
  watch("value", draw);
  draw();
}

/** The two panels of a row: what a file is (the card); in which blocks and at which steps it acts (the settings). */

import { chart, copyText, icon, iconButton, make, shown } from "./dom.js";
import { closePopup } from "./popup.js";
import { splitName } from "./rows.js";
import { ask, pictureUrl, readText } from "./server.js";
import { fill } from "./text.js";

const TYPING = 200; // ms of quiet before a text is read
const STEPS = 30; // of the drawn schedule

// --- the card --------------------------------------------------------------------------------------------------------

/** The card of an adapter. It fills itself when the server has answered; `known` is what the list said of it. */
export function infoCard({ text, name, base, warning, known }) {
  const body = make("div", { class: "cogloom-card-body" }, known ? facts(known, text) : text.loading);
  const alert =
    warning && make("p", { class: "cogloom-alert", role: "alert" }, icon("warn"), make("span", {}, warning));
  const { folder, file } = splitName(name);
  const title = make(
    "h3",
    { class: "cogloom-card-title" },
    make("span", { class: "folder" }, folder),
    known?.title || file,
  );
  const head = make(
    "header",
    {},
    title,
    iconButton("remove", text.close, () => closePopup({ back: true })),
  );
  ask("adapter", { name, base }).then(
    (adapter) => body.replaceChildren(...full(adapter, text)),
    (error) => body.replaceChildren(make("p", { class: "cogloom-error", role: "alert" }, error.message)),
  );
  return make("div", { class: "cogloom-card" }, head, alert, body);
}

function full(adapter, text) {
  return [
    adapter.picture &&
      make("img", {
        class: "cogloom-picture",
        src: pictureUrl(adapter.name),
        alt: fill(text.picture, { name: adapter.name }),
      }),
    adapter.error && make("p", { class: "cogloom-error", role: "alert" }, adapter.error),
    facts(adapter, text),
    triggerWords(adapter.trigger_words ?? [], text),
    effect(adapter.effect, text),
    notes([adapter.notes, adapter.hints].flat().filter(Boolean), text),
    hash(adapter.sha256, text),
    metadata(adapter.metadata ?? {}, text),
  ].filter(Boolean);
}

function facts(adapter, text) {
  const scale = adapter.scale === null || adapter.scale === undefined ? text.scale_unknown : shown(adapter.scale);
  const rows = [
    [text.file, adapter.name],
    [text.layout, adapter.layout],
    [text.rank_label, adapter.rank],
    [text.scale_label, make("span", {}, scale, make("small", {}, adapter.scale_reason ?? ""))],
    [text.fits, (adapter.fits ?? []).join(", ") || text.fits_none],
    [text.width, adapter.width && `${adapter.width} × ${adapter.blocks ?? "?"}`],
    [
      text.tensors,
      adapter.tensors_total && fill(text.tensors_used, { used: adapter.tensors_used, all: adapter.tensors_total }),
    ],
    [text.size, adapter.size_bytes && bytes(adapter.size_bytes)],
  ].filter(([, value]) => value !== null && value !== undefined && value !== "");
  return make(
    "dl",
    { class: "cogloom-facts" },
    rows.map(([term, value]) => [make("dt", {}, term), make("dd", {}, value instanceof Node ? value : String(value))]),
  );
}

function bytes(size) {
  const unit = [
    [1e9, "GB"],
    [1e6, "MB"],
    [1e3, "kB"],
  ].find(([least]) => size >= least) ?? [1, "B"];
  return `${Number((size / unit[0]).toPrecision(3))} ${unit[1]}`;
}

function triggerWords(words, text) {
  if (!words.length) return null;
  const chips = words.map((word) => copyButton(word, word, text, "cogloom-chip"));
  return section(text.trigger_words, make("div", { class: "cogloom-chips" }, chips));
}

/** A button that copies `value` and says so for a moment. */
function copyButton(label, value, text, kind) {
  const button = make("button", { type: "button", class: kind, title: text.click_to_copy }, label);
  button.addEventListener("click", async () => {
    if (!(await copyText(value))) return;
    button.classList.add("copied");
    button.dataset.said = text.copied;
    setTimeout(() => button.classList.remove("copied"), 1200);
  });
  return button;
}

function effect(found, text) {
  if (!found) return section(text.effect, make("p", { class: "cogloom-note" }, text.effect_unknown));
  const blocks = Object.entries(found.blocks ?? {})
    .map(([block, value]) => [Number(block), value])
    .sort(([one], [other]) => one - other);
  return section(
    text.effect,
    make(
      "p",
      { class: "cogloom-effect" },
      make("strong", {}, shown(found.overall)),
      make("small", {}, text.effect_hint),
    ),
    blocks.length > 0 &&
      chart(
        blocks.map(([, value]) => value),
        { label: text.effect_blocks, height: 44 },
      ),
    found.warning &&
      make("p", { class: "cogloom-alert", role: "alert" }, icon("warn"), make("span", {}, found.warning)),
  );
}

function notes(lines, text) {
  if (!lines.length) return null;
  return section(
    text.notes,
    make(
      "ul",
      { class: "cogloom-notes" },
      lines.map((line) => make("li", {}, line)),
    ),
  );
}

function hash(sha, text) {
  if (!sha) return null;
  return section(
    text.sha,
    make("div", { class: "cogloom-sha" }, make("code", {}, sha), copyButton(text.copy, sha, text, "cogloom-chip")),
  );
}

function metadata(pairs, text) {
  const entries = Object.entries(pairs);
  if (!entries.length) return null;
  const said = (value) => (typeof value === "string" ? value : JSON.stringify(value));
  return make(
    "details",
    { class: "cogloom-metadata" },
    make("summary", {}, fill(text.metadata, { n: entries.length })),
    make(
      "dl",
      {},
      entries.map(([key, value]) => [make("dt", {}, key), make("dd", {}, said(value))]),
    ),
  );
}

function section(title, ...content) {
  return make("section", {}, make("h4", {}, title), content);
}

// --- the settings ----------------------------------------------------------------------------------------------------

/** The settings of a row. onChange(key, value) comes once for each change that is done. */
export function settingsPanel({ text, row, base, count, onChange }) {
  const { file } = splitName(row.adapter);
  const head = make(
    "header",
    {},
    make("h3", { class: "cogloom-card-title" }, file),
    iconButton("remove", text.close, () => closePopup({ back: true })),
  );
  const blocks = textField({
    text,
    label: text.blocks,
    hint: text.blocks_hint,
    value: row.blocks,
    presets: blockPresets(count ?? 30, text),
    read: (value) => readText("blocks", { blocks: value, base }),
    draw: (found) => blockCharts(found.factors, text),
    onChange: (value) => onChange("blocks", value),
  });
  const steps = textField({
    text,
    label: text.steps,
    hint: text.steps_hint,
    value: row.steps,
    presets: stepPresets(text),
    read: (value) => readText("curve", { steps: value, total: STEPS }),
    draw: (found) => stepChart(found.factors, text),
    onChange: (value) => onChange("steps", value),
  });
  return make("div", { class: "cogloom-card" }, head, blocks, steps, partialSwitch(row, text, onChange));
}

function blockPresets(count, text) {
  const half = Math.floor(count / 2);
  return [
    [text.preset_all, ""],
    [text.preset_attention, "attn:1"],
    [text.preset_feed_forward, "ff:1"],
    [text.preset_early, `0-${half - 1}:1`],
    [text.preset_late, `${half}-${count - 1}:1`],
  ];
}

function stepPresets(text) {
  return [
    [text.preset_constant, ""],
    [text.preset_fade_in, "0@0 1@0.3"],
    [text.preset_fade_out, "1@0.7 0@1"],
    [text.preset_bell, "0@0 1@0.3 1@0.7 0@1"],
    [text.preset_from, "held 1@0.4"],
  ];
}

function blockCharts({ attention, feed_forward }, text) {
  const same = attention.every((value, n) => value === feed_forward[n]);
  const one = (values, label, name) => [
    chart(values, { label, height: 34, top: 1 }),
    make("div", { class: "cogloom-axis" }, make("span", {}, "0"), name, make("span", {}, values.length - 1)),
  ];
  if (same) return one(attention, text.blocks_chart, make("span", {}, `${text.attention} + ${text.feed_forward}`));
  return [
    ...one(attention, text.blocks_chart, make("span", {}, text.attention)),
    ...one(feed_forward, text.blocks_chart_ff, make("span", {}, text.feed_forward)),
  ];
}

function stepChart(factors, text) {
  const ends = [make("span", {}, text.first_step), make("span", {}, text.last_step)];
  return [
    chart(factors, { label: text.steps_chart, line: true, top: 1 }),
    make("div", { class: "cogloom-axis" }, ends),
  ];
}

/** A text that the server reads while one types: its drawing, or its sentence at the field. */
function textField({ text, label, hint, value, presets, read, draw, onChange }) {
  const id = `cogloom-field-${label}`;
  const input = make("input", {
    id,
    type: "text",
    class: "cogloom-field",
    spellcheck: "false",
    autocomplete: "off",
    maxlength: 2000,
  });
  input.value = value;
  const drawing = make("div", { class: "cogloom-drawing" });
  const error = make("p", { class: "cogloom-error", role: "alert", id: `${id}-error` });
  let timer = 0;
  let committed = value;

  async function look() {
    const asked = input.value.trim();
    const found = await read(asked);
    if (asked !== input.value.trim()) return; // typed on meanwhile; a later answer is under way
    error.textContent = found.error ?? "";
    input.setAttribute("aria-invalid", Boolean(found.error));
    if (!found.error) drawing.replaceChildren(...draw(found));
  }

  function done() {
    clearTimeout(timer);
    look();
    if (input.value.trim() === committed) return;
    committed = input.value.trim();
    onChange(committed);
  }

  input.setAttribute("aria-describedby", `${id}-error`);
  input.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(look, TYPING);
  });
  input.addEventListener("change", done);
  input.addEventListener("keydown", (event) => event.key === "Enter" && !event.isComposing && done());
  const chips = presets.map(([name, preset]) =>
    make(
      "button",
      { type: "button", class: "cogloom-chip", on: { click: () => ((input.value = preset), done()) } },
      name,
    ),
  );
  look();
  return make(
    "section",
    {},
    make("h4", {}, make("label", { for: id }, label)),
    input,
    error,
    make("div", { class: "cogloom-chips", role: "group", "aria-label": text.presets }, chips),
    drawing,
    make("p", { class: "cogloom-note" }, hint),
  );
}

function partialSwitch(row, text, onChange) {
  const box = make("input", { type: "checkbox", on: { change: () => onChange("partial", box.checked) } });
  box.checked = row.partial;
  return make(
    "label",
    { class: "cogloom-check", title: text.partial_hint },
    box,
    make("span", {}, text.partial, make("small", {}, text.partial_hint)),
  );
}

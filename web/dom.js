/** Small things for building pages. Text goes in as text nodes only: names and metadata come from strangers' files. */

const SVG = "http://www.w3.org/2000/svg";

/** Lines of a 16 × 16 drawing, stroked in the current colour. */
const ICONS = {
  grip: "M6 3v.01M10 3v.01M6 8v.01M10 8v.01M6 13v.01M10 13v.01",
  plus: "M8 3v10M3 8h10",
  info: "M8 7.2v4M8 4.6v.01M8 1.8a6.2 6.2 0 1 0 0 12.4 6.2 6.2 0 0 0 0-12.4",
  tune: "M2 4.5h6M12 4.5h2M2 11.5h2M8 11.5h6M10 2.8v3.4M6 9.8v3.4",
  copy: "M5.5 5.5v-3h8v8h-3M2.5 5.5h8v8h-8z",
  remove: "M4 4l8 8M12 4l-8 8",
  warn: "M8 6.2v3.2M8 11.6v.01M8 2 1.8 13.4h12.4z",
  search: "M7 2.5a4.5 4.5 0 1 0 0 9 4.5 4.5 0 0 0 0-9M10.4 10.4 14 14",
  play: "M4.5 2.5v11l9-5.5z",
  pause: "M5 3v10M11 3v10",
  back: "M12.5 3 6 8l6.5 5zM3.5 3v10",
  next: "M3.5 3 10 8l-6.5 5zM12.5 3v10",
  loop: "M3 8a5 5 0 0 1 8.6-3.4L13 6M13 2.5V6H9.5M13 8a5 5 0 0 1-8.6 3.4L3 10M3 13.5V10h3.5",
  swap: "M3 5.5h10M10.5 3 13 5.5 10.5 8M13 11H3M5.5 8.5 3 11l2.5 2.5",
  chevron: "M4 6l4 4 4-4",
  picture: "M2 3h12v10H2zM2 11l3.5-3.5L9 11l2-2 3 3",
};

/**
 * An element. `props` are attributes (true: present; false, null: absent), `class`, `on: {event: listener}`,
 * `dataset` and `style` (an object); children are elements, texts, or nothing.
 */
export function make(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name === "on") for (const [type, listener] of Object.entries(value)) element.addEventListener(type, listener);
    else if (name === "dataset") Object.assign(element.dataset, value);
    else if (name === "style") for (const [key, one] of Object.entries(value)) element.style.setProperty(key, one);
    else attribute(element, name, value);
  }
  element.append(
    ...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false),
  );
  return element;
}

/** Sets, or takes away, an attribute. */
export function attribute(element, name, value) {
  if (value === false || value === null || value === undefined) element.removeAttribute(name);
  else element.setAttribute(name, value === true ? "" : String(value));
}

/** A drawing of ICONS; it is decoration, its button has the name. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 16 16");
  svg.setAttribute("class", "cogloom-icon");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/** A button with a drawing, whose name is read out and shown as its tip. */
export function iconButton(name, label, onClick, props = {}) {
  const { class: extra = "", ...rest } = props;
  return make(
    "button",
    {
      type: "button",
      class: `cogloom-button ${extra}`,
      title: label,
      "aria-label": label,
      on: { click: onClick },
      ...rest,
    },
    icon(name),
  );
}

/** A drawing of numbers: bars, or a stepped line where `line` is true. Values may be negative. */
export function chart(values, { label, line = false, width = 320, height = 56, top = null } = {}) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("class", "cogloom-chart");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", label);
  const high = Math.max(top ?? 0, ...values, 0);
  const low = Math.min(...values, 0);
  const y = (value) => height - 2 - ((value - low) / (high - low || 1)) * (height - 4);
  const step = width / Math.max(values.length, 1);
  const shapes = line ? [curve(values, step, y, width)] : bars(values, step, y);
  svg.append(axis(width, y(0)), ...shapes);
  return svg;
}

function axis(width, y) {
  const line = document.createElementNS(SVG, "line");
  for (const [name, value] of Object.entries({ x1: 0, x2: width, y1: y, y2: y, class: "axis" })) {
    line.setAttribute(name, value);
  }
  return line;
}

function bars(values, step, y) {
  return values.map((value, n) => {
    const rect = document.createElementNS(SVG, "rect");
    const [from, to] = [Math.min(y(value), y(0)), Math.max(y(value), y(0))];
    const gap = Math.min(1.5, step / 4);
    const places = { x: n * step + gap / 2, y: from, width: step - gap, height: Math.max(to - from, value ? 1 : 0) };
    for (const [name, at] of Object.entries(places)) rect.setAttribute(name, at.toFixed(2));
    const title = document.createElementNS(SVG, "title");
    title.textContent = `${n}: ${shown(value)}`;
    rect.append(title);
    return rect;
  });
}

/** A line through the middle of each step: a step has one factor, there is nothing between two of them. */
function curve(values, step, y, width) {
  const path = document.createElementNS(SVG, "path");
  const points = values.map((value, n) => `${(n * step + step / 2).toFixed(2)} ${y(value).toFixed(2)}`);
  const [first, last] = [y(values[0]).toFixed(2), y(values.at(-1)).toFixed(2)];
  path.setAttribute("d", `M0 ${first}L${points.join("L")}L${width} ${last}`);
  path.setAttribute("class", "curve");
  return path;
}

/** A number as people write it: no trailing zeros, at most four significant places after the point. */
export function shown(number) {
  return Number.isFinite(number) ? String(Number(number.toPrecision(4))) : "–";
}

/** Adds a style sheet of this folder to the page, once. */
export function styleSheet(name) {
  const id = `cogloom-style-${name.replace(/\W/g, "-")}`;
  if (document.getElementById(id)) return;
  document.head.append(make("link", { id, rel: "stylesheet", href: new URL(name, import.meta.url).href }));
}

/** Copies to the clipboard; over plain http, where there is no clipboard API, the old way. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const focused = document.activeElement;
    const field = make("textarea", { class: "cogloom-offscreen", readonly: true });
    field.value = text;
    document.body.append(field);
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    focused?.focus?.({ preventScroll: true });
    return done;
  }
}

/**
 * Keys that are typed inside `root` stay there: Backspace in a field must not delete the node, nor R reload.
 * What has Ctrl or Cmd goes on, so that Ctrl+Enter queues and Ctrl+S saves; in a text field only those two do,
 * since Ctrl+Z, A, C, V, X mean the field.
 */
export function keepKeys(root) {
  const keep = (event) => {
    const field = event.target.closest("input, textarea, select");
    const command = event.ctrlKey || event.metaKey;
    if (command && (!field || ["Enter", "s", "S"].includes(event.key))) return;
    event.stopPropagation();
  };
  for (const type of ["keydown", "keyup", "keypress"]) root.addEventListener(type, keep);
}

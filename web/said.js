/** What a node has to say after a run: a picture, a table of numbers, lines of text. The front end shows none by itself. */

import { app } from "../../scripts/app.js";
import { passToCanvas } from "./canvas.js";
import { make } from "./dom.js";
import { everyNode, nodeById } from "./graph.js";

const OURS = /^CogLoom/;
const LINES = 108; // px of a box with lines alone
const TABLE = 320; // and of one with a table
const WIDTH = 480; // px that a table needs at the least

const made = new WeakMap(); // node -> {element, shown: what it shows, as a text}

/** After a run: `output` is what the node sent, {text, cogloom_table, cogloom_picture}. */
export function showSaid(id, output, text) {
  const node = nodeById(id);
  if (node && OURS.test(node.type)) fill(node, output, text);
}

/** After a graph was loaded: what the front end still knows of outputs, it gives to the nodes again. */
export function restoreSaid(text) {
  for (const node of everyNode()) {
    if (!OURS.test(node.type ?? "")) continue;
    fill(node, app.nodeOutputs?.[node.id] ?? app.nodeOutputs?.[`${node.graph?.id}:${node.id}`], text);
  }
}

function fill(node, output, text) {
  const [table] = output?.cogloom_table ?? [];
  const [picture] = output?.cogloom_picture ?? [];
  const lines = table?.words ?? output?.text?.flatMap?.((said) => String(said).split("\n")) ?? [];
  if (!lines.length) return;
  const shown = JSON.stringify([table, lines, picture]);
  if (made.get(node)?.shown === shown) return;
  if (!made.has(node)) made.set(node, add(node, table ? TABLE : LINES, table ? WIDTH : 0, text));
  const known = made.get(node);
  known.shown = shown;
  known.element.replaceChildren(
    ...(picture ? [pictured(picture)] : []),
    ...(table?.rows?.length ? [drawn(table)] : []),
    ...lines.map((line) => make("p", {}, line)),
  );
  known.element.scrollTop = 0;
}

/** As an image, where nothing in it can run. */
function pictured({ svg, alt }) {
  return make("img", { class: "cogloom-told-picture", src: `data:image/svg+xml,${encodeURIComponent(svg)}`, alt });
}

function drawn({ columns, rows }) {
  const head = columns.map((name) => make("th", { scope: "col" }, name));
  const lines = rows.map(([arm, ...values]) =>
    make(
      "tr",
      {},
      make("th", { scope: "row" }, arm),
      values.map((value) => make("td", {}, value)),
    ),
  );
  const table = make("table", {}, make("thead", {}, make("tr", {}, head)), make("tbody", {}, lines));
  return make("div", { class: "cogloom-told-table" }, table);
}

function add(node, height, width, text) {
  const element = make("div", { class: "cogloom cogloom-told", tabindex: "0", role: "region", "aria-label": text.said });
  const widget = node.addDOMWidget("cogloom_said", "cogloom_said", element, {
    serialize: false,
    getMinHeight: () => height,
    margin: 6,
  });
  widget.serialize = false; // not in widgets_values: it is a view of the output, no value
  element.style.minHeight = `${height - 12}px`;
  passToCanvas(element, () => element.scrollHeight > element.clientHeight);
  const [wide, high] = node.size;
  node.setSize([Math.max(wide, width), Math.max(high, node.computeSize()[1])]);
  return { element };
}

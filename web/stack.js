/** The LoRA stack's widget: rows over a STRING input. Its value is the JSON text, and nothing else is kept. */

import { app } from "../../scripts/app.js";
import { passToCanvas } from "./canvas.js";
import { icon, keepKeys, make } from "./dom.js";
import { infoCard, settingsPanel } from "./details.js";
import { baseOf, everyNode } from "./graph.js";
import { openPicker } from "./picker.js";
import { closePopup, openPopup } from "./popup.js";
import { RowView } from "./row.js";
import { formatRows, parseRows } from "./rows.js";
import { adapterList, knownList, readText } from "./server.js";
import { fill } from "./text.js";

const ROW = 44; // pixels of a row; cogloom.css has the same
const FRAME = 66; // header, footer and their gaps
const EMPTY = 74; // the hint where rows would be
const ROWS_SHOWN = 10; // more scroll
const ROWS_FILTERED = 6; // more get a filter
const MARGIN = 8; // around a DOM widget, in the canvas's own units
const WIDTH = 440;

const stacks = new WeakMap(); // node -> Stack

/** What the front end calls to make the widget of an input: {widget, minWidth, minHeight}. */
export function stackWidget(node, name, text, value) {
  const stack = new Stack(node, text);
  const widget = node.addDOMWidget(name, "cogloom_rows", stack.element, {
    getValue: () => stack.text,
    setValue: (given) => stack.take(given),
    getMinHeight: () => stack.height() + 2 * MARGIN,
    margin: MARGIN,
    hideOnZoom: true,
  });
  stack.widget = widget;
  stack.take(value);
  if (latest) stack.showStatus(latest);
  stacks.set(node, stack);
  return { widget, minWidth: WIDTH, minHeight: 170 };
}

/** All stacks look again at what they lead to, and at the files. */
export function refreshStacks() {
  for (const node of everyNode()) stacks.get(node)?.refresh();
}

let latest = null; // what the server last said of its bases

/** All stacks show what the server says of its bases. */
export function showStatus(status) {
  latest = status;
  for (const node of everyNode()) stacks.get(node)?.showStatus(status);
}

class Stack {
  constructor(node, t) {
    Object.assign(this, {
      node,
      t,
      widget: null,
      text: "[]",
      rows: [],
      error: null,
      views: new Map(),
      base: null,
      filter: "",
    });
    this.faults = new Map(); // row -> the server's sentence about its blocks or steps
    this.build();
    this.draw();
  }

  // --- value ---------------------------------------------------------------------------------------------------------

  /** A value from outside: a loaded workflow, undo, a paste. Kept to the letter until a row is changed here. */
  take(value) {
    this.text = typeof value === "string" ? value : JSON.stringify(value ?? []);
    const { rows, error } = parseRows(this.text);
    this.rows = rows;
    this.error = error;
    this.views.clear();
    this.filter = this.filterField.value = "";
    closePopup();
    this.draw();
    this.measured = this.height();
    this.makeRoom();
    this.refresh();
  }

  /** Rows that came without a size of their own, from a script or a file made by hand: they stay in the node. */
  makeRoom() {
    if (!this.widget) return; // still being built; the front end measures it then
    const [width, height] = this.node.size;
    const least = this.node.computeSize()[1];
    if (height < least) this.node.setSize([width, least]);
  }

  /** One change by a person: one step of undo, with the node's new height in it. */
  commit(change) {
    app.canvas?.emitBeforeChange?.();
    try {
      change();
      this.text = formatRows(this.rows);
      this.draw();
      this.fit();
      this.widget?.callback?.(this.text);
    } finally {
      app.canvas?.emitAfterChange?.();
    }
    this.check();
    this.node.setDirtyCanvas?.(true, true);
  }

  // --- size ----------------------------------------------------------------------------------------------------------

  /** Pixels of the element, from what it holds and not from the page: it is asked before it is in the page. */
  height() {
    if (this.error) return 200;
    return FRAME + (this.listHeight() || EMPTY);
  }

  listHeight() {
    return Math.min(this.rows.length, ROWS_SHOWN) * ROW;
  }

  /** The node grows and shrinks with its rows; what the user has added to its height stays. */
  fit() {
    const now = this.height();
    const by = now - (this.measured ?? now);
    this.measured = now;
    this.element.style.minHeight = `${now}px`;
    if (!by) return;
    const [width, height] = this.node.size;
    this.node.setSize([width, Math.max(height + by, this.node.computeSize()[1])]);
  }

  // --- elements ------------------------------------------------------------------------------------------------------

  build() {
    const { t } = this;
    this.all = make("button", {
      type: "button",
      class: "cogloom-switch",
      role: "switch",
      "aria-label": t.toggle_all,
      title: t.toggle_all,
      on: { click: () => this.toggleAll() },
    });
    this.count = make("span", { class: "cogloom-count", "aria-live": "polite" });
    this.filterField = make("input", {
      type: "search",
      class: "cogloom-field cogloom-filter",
      placeholder: t.filter,
      "aria-label": t.filter,
      on: { input: () => this.narrow(this.filterField.value) },
    });
    this.add = make(
      "button",
      { type: "button", class: "cogloom-add", "aria-haspopup": "listbox", on: { click: () => this.pickNew() } },
      icon("plus"),
      make("span", {}, t.add),
    );
    this.list = make("ul", { class: "cogloom-rows", "aria-label": t.stack });
    this.hint = make("p", { class: "cogloom-empty" }, t.add_hint);
    this.raw = make("div", { class: "cogloom-raw" });
    this.status = make(
      "div",
      { class: "cogloom-status", role: "status" },
      make("span", { class: "base" }),
      make("span", { class: "swap" }),
    );
    const head = make("div", { class: "cogloom-head" }, this.all, this.count, this.filterField, this.add);
    this.element = make("div", {
      class: "cogloom cogloom-stack",
      role: "group",
      "aria-label": t.stack,
      tabindex: "-1",
    });
    this.element.append(head, this.list, this.hint, this.raw, this.status);
    keepKeys(this.element);
    passToCanvas(this.element, (event) => this.scrolls(event));
    // A front end that keeps no history tells of no change in the graph; who looks here is to see what holds now.
    this.element.addEventListener("pointerenter", () => this.refresh());
  }

  /** Brings the elements to what the rows are; a row that stayed keeps its elements, and with them the focus. */
  draw() {
    const focused = document.activeElement;
    const views = this.rows.map((row) => this.view(row));
    for (const [n, { element }] of views.entries()) {
      if (this.list.children[n] !== element) this.list.insertBefore(element, this.list.children[n] ?? null);
    }
    while (this.list.children.length > views.length) this.list.lastChild.remove();
    for (const row of this.views.keys()) if (!this.rows.includes(row)) this.views.delete(row);
    if (focused !== document.activeElement && this.list.contains(focused)) focused.focus({ preventScroll: true });
    this.drawFrame();
    this.showRows();
  }

  drawFrame() {
    const { rows, t } = this;
    const on = rows.filter((row) => row.on).length;
    this.all.setAttribute("aria-checked", on === 0 ? false : on === rows.length ? true : "mixed");
    this.all.disabled = !rows.length;
    this.count.textContent = rows.length ? fill(t.count, { on, all: rows.length }) : "";
    this.filterField.hidden = rows.length <= ROWS_FILTERED;
    this.hint.hidden = rows.length > 0 || Boolean(this.error);
    this.list.hidden = !rows.length;
    this.list.style.minHeight = `${this.listHeight()}px`;
    // Vue nodes take every wheel for the canvas, unless one with this has the focus; `scrolls` is for the others.
    this.list.dataset.captureWheel = rows.length > ROWS_SHOWN;
    this.add.disabled = Boolean(this.error);
    this.drawRaw();
    this.element.style.minHeight = `${this.height()}px`;
  }

  /** The text itself, where it is not rows: to be corrected by hand, never thrown away. */
  drawRaw() {
    this.raw.hidden = !this.error;
    if (!this.error) return this.raw.replaceChildren();
    const { t } = this;
    const field = make("textarea", { class: "cogloom-field", "aria-label": t.raw, spellcheck: "false" });
    field.value = this.text;
    field.addEventListener("change", () => this.takeTyped(field.value));
    const [key, values] = this.error;
    const sentence = fill(t.unreadable, { error: fill(t[key], values) });
    this.raw.replaceChildren(make("p", { class: "cogloom-error", role: "alert" }, sentence), field);
  }

  takeTyped(text) {
    app.canvas?.emitBeforeChange?.();
    const before = this.measured;
    this.take(text);
    this.measured = before;
    this.fit();
    app.canvas?.emitAfterChange?.();
  }

  view(row) {
    if (!this.views.has(row)) this.views.set(row, new RowView(row, this.t, this.actions()));
    return this.views.get(row);
  }

  /** What the rows show beside their own values: what the list of files says of them. */
  showRows() {
    const list = knownList(this.base);
    const byName = new Map(list?.adapters.map((adapter) => [adapter.name, adapter]));
    const wanted = this.filter.toLowerCase();
    let hits = 0;
    for (const [n, row] of this.rows.entries()) {
      const adapter = byName.get(row.adapter) ?? null;
      const view = this.view(row);
      view.show({ adapter, warning: this.warning(row, adapter, list), n: n + 1, all: this.rows.length });
      view.element.hidden = !row.adapter.toLowerCase().includes(wanted);
      hits += !view.element.hidden;
    }
    if (!this.error && this.rows.length) this.showMisses(hits, wanted);
  }

  showMisses(hits, wanted) {
    this.hint.hidden = hits > 0;
    this.hint.textContent = hits ? this.t.add_hint : fill(this.t.filter_none, { text: wanted });
  }

  /** Why this row would not work, in the server's words; null where it would, or where nothing is known yet. */
  warning(row, adapter, list) {
    if (!list) return this.unlisted ?? null;
    if (!adapter) return this.t.not_found;
    const taken = row.partial && adapter.alpha_known !== false; // which answers a misfit, not an unknown scale
    return adapter.error ?? (taken ? null : adapter.problem) ?? this.faults.get(row) ?? null;
  }

  // --- what is known of the files ------------------------------------------------------------------------------------

  /** Asks for the list of the base that this stack leads to. Nothing here changes the value or the node's size. */
  async refresh() {
    this.base = this.node.graph ? baseOf(this.node) : null;
    try {
      await adapterList(this.base);
      this.unlisted = null;
    } catch (error) {
      this.unlisted = fill(this.t.no_list, { error: error.message });
    }
    this.showRows();
    this.check();
  }

  /** Has the server read each row's blocks and steps. */
  async check() {
    for (const row of this.rows) {
      const asked = [
        row.blocks && readText("blocks", { blocks: row.blocks, base: this.base }),
        row.steps && readText("curve", { steps: row.steps, total: 30 }),
      ];
      const [blocks, steps] = await Promise.all(asked);
      const fault = blocks?.error ?? steps?.error ?? null;
      if ((this.faults.get(row) ?? null) === fault) continue;
      this.faults.set(row, fault);
      this.showRows();
    }
    for (const row of this.faults.keys()) if (!this.rows.includes(row)) this.faults.delete(row);
  }

  showStatus({ loads = 0, swap_ms = null }) {
    const [base, swap] = this.status.children;
    base.textContent = loads ? fill(this.t.status_loads, { n: loads }) : this.t.status_none;
    swap.textContent =
      loads && swap_ms !== null ? fill(this.t.status_swap, { ms: Number(swap_ms.toPrecision(3)) }) : "";
  }

  // --- what people do ------------------------------------------------------------------------------------------------

  actions() {
    return {
      toggle: (row) => this.commit(() => (row.on = !row.on)),
      scrub: (row, weight) => (row.weight = weight),
      weigh: (row, weight) => this.commit(() => (row.weight = weight)),
      choose: (row, anchor) => this.pickFor(row, anchor),
      more: (row, anchor) => this.openSettings(row, anchor),
      info: (row, anchor) => this.openCard(row, anchor),
      duplicate: (row) => this.commit(() => this.rows.splice(this.rows.indexOf(row) + 1, 0, { ...row })),
      remove: (row) => this.removeRow(row),
      move: (row, by) => this.moveRow(row, by),
      drag: (row, view, event) => this.dragRow(row, view, event),
    };
  }

  toggleAll() {
    const on = !this.rows.every((row) => row.on);
    this.commit(() => this.rows.forEach((row) => (row.on = on)));
  }

  pickNew() {
    openPicker(this.add, { text: this.t, base: this.base, onPick: (name) => this.addRow(name) });
  }

  addRow(adapter) {
    this.commit(() => this.rows.push({ on: true, adapter, weight: 1, blocks: "", steps: "", partial: false }));
    this.list.lastChild?.scrollIntoView?.({ block: "nearest" });
    this.refresh(); // the list that the picker got may be newer than the one in use
  }

  pickFor(row, anchor) {
    const onPick = (name) => this.commit(() => (row.adapter = name));
    openPicker(anchor, { text: this.t, base: this.base, current: row.adapter, onPick });
  }

  openCard(row, anchor) {
    const list = knownList(this.base);
    const known = list?.adapters.find(({ name }) => name === row.adapter) ?? null;
    const warning = this.warning(row, known, list);
    const card = infoCard({ text: this.t, name: row.adapter, base: this.base, warning, known });
    openPopup(anchor, card, { label: `${this.t.info}: ${row.adapter}`, width: 380 });
  }

  openSettings(row, anchor) {
    const onChange = (key, value) => this.commit(() => (row[key] = value));
    const count = knownList(this.base)?.blocks;
    const panel = settingsPanel({ text: this.t, row, base: this.base, count, onChange });
    openPopup(anchor, panel, { label: `${this.t.more}: ${row.adapter}`, width: 380 });
  }

  removeRow(row) {
    const n = this.rows.indexOf(row);
    closePopup();
    this.commit(() => this.rows.splice(n, 1));
    const next = this.rows[Math.min(n, this.rows.length - 1)];
    (next ? this.view(next).name : this.add).focus({ preventScroll: true });
  }

  moveRow(row, by) {
    const from = this.rows.indexOf(row);
    const to = from + by;
    if (to < 0 || to >= this.rows.length) return;
    this.commit(() => this.rows.splice(to, 0, ...this.rows.splice(from, 1)));
    this.view(row).element.scrollIntoView({ block: "nearest" });
  }

  narrow(text) {
    this.filter = text.trim();
    this.showRows();
  }

  /** While a row is dragged the others move around it: an element that is moved itself would lose the pointer. */
  dragRow(row, view, event) {
    if (event.button !== 0) return;
    event.preventDefault();
    const { grip, element } = view;
    grip.focus({ preventScroll: true });
    grip.setPointerCapture(event.pointerId);
    element.classList.add("dragging");
    const before = [...this.list.children];
    const move = ({ clientY }) => this.dragTo(element, clientY);
    const end = () => {
      grip.removeEventListener("pointermove", move);
      for (const type of ["pointerup", "pointercancel"]) grip.removeEventListener(type, end);
      element.classList.remove("dragging");
      const order = [...this.list.children];
      if (order.some((one, n) => one !== before[n])) this.commit(() => this.orderAs(order));
    };
    grip.addEventListener("pointermove", move);
    for (const type of ["pointerup", "pointercancel"]) grip.addEventListener(type, end);
  }

  dragTo(element, y) {
    const middle = (one) => one.getBoundingClientRect().top + one.getBoundingClientRect().height / 2;
    let next = element.nextElementSibling;
    while (next && (next.hidden || y > middle(next))) {
      this.list.insertBefore(next, element);
      next = element.nextElementSibling;
    }
    let last = element.previousElementSibling;
    while (last && (last.hidden || y < middle(last))) {
      this.list.insertBefore(last, element.nextElementSibling);
      last = element.previousElementSibling;
    }
    this.autoScroll(y);
  }

  autoScroll(y) {
    const { top, bottom } = this.list.getBoundingClientRect();
    if (y < top + 12) this.list.scrollTop -= 12;
    else if (y > bottom - 12) this.list.scrollTop += 12;
  }

  orderAs(elements) {
    const place = new Map(elements.map((element, n) => [element, n]));
    this.rows.sort((one, other) => place.get(this.view(one).element) - place.get(this.view(other).element));
  }

  /** Over a list that scrolls, the wheel scrolls it; everywhere else it is the canvas's. */
  scrolls({ target }) {
    const { list } = this;
    return Boolean(target.closest("textarea")) || (list.scrollHeight > list.clientHeight + 1 && list.contains(target));
  }
}

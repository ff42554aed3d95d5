/** One row of the stack, as elements. It holds no value of its own: it shows a row and says what was done to it. */

import { icon, iconButton, make } from "./dom.js";
import { describe } from "./picker.js";
import { splitName } from "./rows.js";
import { fill } from "./text.js";
import { weightField } from "./weight.js";

export class RowView {
  /** `does` has what the row can ask for: toggle, choose, scrub, weigh, more, info, duplicate, remove, move, drag. */
  constructor(row, text, does) {
    Object.assign(this, { row, text });
    this.grip = iconButton("grip", text.move, () => {}, { class: "grip" });
    this.switch = make("button", {
      type: "button",
      class: "cogloom-switch",
      role: "switch",
      "aria-label": text.on,
      title: text.on,
      on: { click: () => does.toggle(row) },
    });
    this.name = make("button", {
      type: "button",
      class: "cogloom-choose",
      "aria-haspopup": "listbox",
      on: { click: () => does.choose(row, this.name) },
    });
    this.weight = weightField(text, {
      onScrub: (weight) => does.scrub(row, weight),
      onCommit: (weight) => does.weigh(row, weight),
    });
    this.more = iconButton("tune", text.more, () => does.more(row, this.more), { "aria-haspopup": "dialog" });
    this.info = iconButton("info", text.info, () => does.info(row, this.info), { "aria-haspopup": "dialog" });
    this.said = make("button", {
      type: "button",
      class: "cogloom-said",
      tabindex: "-1",
      on: { click: () => does.info(row, this.said) },
    });
    this.badges = make("span", { class: "cogloom-badges" });
    this.element = make(
      "li",
      { class: "cogloom-row" },
      this.grip,
      this.switch,
      this.name,
      this.weight.element,
      this.more,
      this.info,
      iconButton("copy", text.duplicate, () => does.duplicate(row)),
      iconButton("remove", text.remove, () => does.remove(row), { class: "danger" }),
      make("div", { class: "cogloom-second" }, this.said, this.badges),
    );
    this.element.addEventListener("keydown", (event) => this.moveKey(event, does));
    this.grip.addEventListener("pointerdown", (event) => does.drag(row, this, event));
  }

  moveKey(event, does) {
    const by = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (!by || !event.altKey) return;
    event.preventDefault();
    does.move(this.row, by);
  }

  /** `adapter`: what the list says of the file, or null; `warning`: a sentence, or null. */
  show({ adapter, warning, n, all }) {
    const { row, text } = this;
    const { folder, file } = splitName(row.adapter);
    this.element.setAttribute("aria-label", fill(text.row, { n, all, name: file }));
    this.element.classList.toggle("off", !row.on);
    this.element.classList.toggle("wrong", Boolean(warning));
    this.switch.setAttribute("aria-checked", row.on);
    this.name.replaceChildren(
      make("span", { class: "folder" }, folder),
      make("span", { class: "file" }, file || text.choose),
    );
    this.name.title = row.adapter || text.choose;
    this.name.setAttribute("aria-label", `${text.choose}: ${row.adapter}`);
    if (document.activeElement !== this.weight.element) this.weight.show(row.weight);
    this.said.replaceChildren(
      ...(warning ? [icon("warn"), make("span", {}, warning)] : [adapter ? describe(adapter, text) : ""]),
    );
    this.said.title = warning ?? "";
    this.badges.replaceChildren(...badges(row, text));
    this.more.classList.toggle("active", Boolean(row.blocks || row.steps || row.partial));
  }

  /** The weight again, even in a field that has the focus: after undo, or a value from elsewhere. */
  showWeight() {
    this.weight.show(this.row.weight);
  }
}

function badges(row, text) {
  const one = (label, value) => make("span", { class: "cogloom-badge", title: value }, label);
  return [
    row.blocks && one(fill(text.badge_blocks, { text: row.blocks }), row.blocks),
    row.steps && one(fill(text.badge_steps, { text: row.steps }), row.steps),
    row.partial && one(text.badge_partial, text.partial_hint),
  ].filter(Boolean);
}

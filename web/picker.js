/** Choosing an adapter: a field that filters as one types, over a list with pictures. */

import { icon, make } from "./dom.js";
import { closePopup, openPopup } from "./popup.js";
import { splitName } from "./rows.js";
import { adapterList, pictureUrl } from "./server.js";
import { fill } from "./text.js";

const AT_ONCE = 80; // options in the page; nobody reads more, and thousands of elements are slow

/** Opens the list at `anchor`; onPick(name) once. `base` decides which of them fit. */
export function openPicker(anchor, { text, base, current = null, onPick }) {
  const picker = new Picker(text, base, current, (name) => {
    closePopup({ back: true });
    onPick(name);
  });
  openPopup(anchor, picker.element, { label: text.choose, width: 400 });
  if (picker.element.isConnected) picker.start();
}

class Picker {
  constructor(text, base, current, onPick) {
    Object.assign(this, { text, base, current, onPick, all: [], found: [], at: 0 });
    this.input = make("input", {
      type: "text",
      class: "cogloom-field",
      role: "combobox",
      placeholder: text.search,
      "aria-label": text.search,
      "aria-expanded": "true",
      "aria-autocomplete": "list",
      "aria-controls": "cogloom-options",
      autocomplete: "off",
      spellcheck: "false",
      on: { input: () => this.filter(), keydown: (event) => this.key(event) },
    });
    this.list = make("ul", {
      id: "cogloom-options",
      class: "cogloom-options",
      role: "listbox",
      "aria-label": text.adapters,
    });
    this.note = make("p", { class: "cogloom-note", role: "status" }, text.loading);
    const search = make("div", { class: "cogloom-search" }, icon("search"), this.input);
    this.element = make("div", { class: "cogloom-picker" }, search, this.list, this.note);
  }

  async start() {
    this.input.focus();
    try {
      this.all = (await adapterList(this.base, true)).adapters.map(searchable);
    } catch (error) {
      this.note.textContent = fill(this.text.no_list, { error: error.message });
      return;
    }
    const chosen = this.early;
    this.loaded = true;
    this.filter();
    if (chosen && this.element.isConnected) this.choose();
  }

  filter() {
    this.early = false;
    if (!this.loaded) return;
    const words = this.input.value.toLowerCase().split(/\s+/).filter(Boolean);
    const has = (text) => words.every((word) => text.includes(word));
    const order = ({ rank, name }) => 2 * rank + (has(name) ? 0 : 1); // what is called so before what is described so
    this.found = this.all.filter(({ words: text }) => has(text));
    this.found.sort((one, other) => order(one) - order(other)); // stable: in each group the server's order
    const chosen = words.length ? 0 : this.found.findIndex(({ adapter }) => adapter.name === this.current);
    this.at = Math.max(0, chosen);
    this.draw();
  }

  draw() {
    const from = Math.max(0, Math.min(this.at - AT_ONCE / 2, this.found.length - AT_ONCE));
    const shown = this.found.slice(from, from + AT_ONCE);
    this.list.replaceChildren(...shown.map(({ adapter }, n) => this.option(adapter, from + n)));
    this.note.textContent = this.remark(this.found.length - shown.length);
    this.mark();
  }

  remark(hidden) {
    if (!this.all.length) return this.text.no_adapters;
    if (!this.found.length) return fill(this.text.no_match, { text: this.input.value });
    return hidden > 0 ? fill(this.text.many_more, { n: hidden }) : "";
  }

  option(adapter, n) {
    const { folder, file } = splitName(adapter.name);
    const wrong = adapter.error ?? adapter.problem;
    return make(
      "li",
      {
        id: `cogloom-option-${n}`,
        class: `cogloom-option${wrong ? " wrong" : ""}`,
        role: "option",
        title: wrong ?? adapter.name,
        dataset: { at: n },
        on: { click: () => this.onPick(adapter.name), pointermove: () => this.go(n) },
      },
      thumbnail(adapter),
      make(
        "div",
        { class: "cogloom-option-text" },
        make("div", { class: "cogloom-name" }, make("span", { class: "folder" }, folder), file),
        make("div", { class: "cogloom-meta" }, wrong ? [icon("warn"), wrong] : describe(adapter, this.text)),
      ),
    );
  }

  key(event) {
    const by = { ArrowDown: 1, ArrowUp: -1, PageDown: 8, PageUp: -8 }[event.key];
    if (by) {
      event.preventDefault();
      this.go(Math.max(0, Math.min(this.at + by, this.found.length - 1)), true);
    } else if (event.key === "Enter" && !event.isComposing) { // an Enter that ends a Chinese word is not a choice
      event.preventDefault();
      if (this.loaded) this.choose();
      else this.early = true; // who types faster than the list comes means what it will find
    }
  }

  choose() {
    if (this.found.length) this.onPick(this.found[this.at].adapter.name);
  }

  go(at, scroll = false) {
    this.at = at;
    if (!this.list.querySelector(`[data-at="${at}"]`)) this.draw();
    this.mark(scroll);
  }

  mark(scroll = true) {
    for (const option of this.list.children) {
      const here = Number(option.dataset.at) === this.at;
      option.setAttribute("aria-selected", here);
      if (here && scroll) option.scrollIntoView({ block: "nearest" });
    }
    if (this.found.length) this.input.setAttribute("aria-activedescendant", `cogloom-option-${this.at}`);
    else this.input.removeAttribute("aria-activedescendant");
  }
}

/** What fits first, then what has a problem, last what cannot be read. */
function searchable(adapter) {
  const words = [adapter.name, adapter.title ?? "", ...(adapter.trigger_words ?? [])].join(" ").toLowerCase();
  return { adapter, words, name: adapter.name.toLowerCase(), rank: adapter.error ? 2 : adapter.problem ? 1 : 0 };
}

/** layout · rank · scale, in one line. */
export function describe(adapter, text) {
  const known = (value) => value !== null && value !== undefined;
  return [
    adapter.layout,
    known(adapter.rank) && fill(text.rank, { rank: adapter.rank }),
    known(adapter.scale) && fill(text.scale, { scale: Number(Number(adapter.scale).toPrecision(4)) }),
  ]
    .filter(Boolean)
    .join(" · ");
}

function thumbnail(adapter) {
  if (!adapter.picture) return make("div", { class: "cogloom-thumb" }, icon("picture"));
  return make("img", { class: "cogloom-thumb", src: pictureUrl(adapter.name), alt: "", loading: "lazy" });
}

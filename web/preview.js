/** The animated preview on a node that samples: the frames of a latent, so far, in a row on one picture. */

import { app } from "../../scripts/app.js";
import { passToCanvas } from "./canvas.js";
import { make } from "./dom.js";
import { nodeById } from "./graph.js";
import { fill } from "./text.js";

const LINE = 22; // pixels of the line below the picture
const HIGHEST = 260;

const made = new WeakMap(); // node -> Preview; it is made once and shown for each run
const running = new Map(); // node -> Preview, until its run ends

/** One message of the server: {node, sheet, count, width, height, fps, step, total}. */
export function showPreview(message, text) {
  const node = nodeById(message.node);
  if (!node || !(message.count > 0)) return;
  if (!made.has(node)) made.set(node, new Preview(node, text));
  running.set(node, made.get(node));
  made.get(node).show(message);
}

/** Ends the previews: all of them, or all but that of the node `except`. */
export function endPreviews(except = null) {
  const stays = except === null ? null : nodeById(except);
  for (const [node, preview] of running) {
    if (node === stays) continue;
    preview.hide();
    running.delete(node);
  }
}

/** A widget of its own that is in no saved value: `serialize` false keeps it out of widgets_values and the prompt. */
class Preview {
  constructor(node, text) {
    Object.assign(this, { node, text, on: false, timer: 0, frame: 0, message: null, sheet: new Image() });
    this.canvas = make("canvas", { role: "img", "aria-label": text.preview });
    this.line = make("div", { class: "cogloom-preview-line", role: "status" });
    this.element = make("div", { class: "cogloom cogloom-preview", hidden: true }, this.canvas, this.line);
    this.widget = node.addDOMWidget("cogloom_preview", "cogloom_preview", this.element, {
      serialize: false,
      margin: 0,
      getMinHeight: () => this.height(),
      getMaxHeight: () => this.height(),
    });
    this.widget.serialize = false;
    passToCanvas(this.element);
  }

  /** 0 while there is nothing to show; else the picture over the node's width, but not endlessly high. */
  height() {
    if (!this.on) return 0;
    const { width, height } = this.message;
    return Math.round(Math.min(HIGHEST, (this.node.size[0] - 20) * (height / width))) + LINE + 8;
  }

  show(message) {
    this.message = message;
    this.sheet.src = message.sheet;
    this.line.textContent = fill(this.text.step_of, { n: message.step, all: message.total });
    this.line.style.setProperty("--done", `${(100 * message.step) / message.total}%`);
    if (this.on) return;
    this.on = true;
    this.element.hidden = false;
    this.grow(1);
    this.timer = setInterval(() => this.draw(), 1000 / (message.fps || 8));
  }

  hide() {
    clearInterval(this.timer);
    if (!this.on) return;
    this.grow(-1);
    this.on = false;
    this.element.hidden = true;
    this.element.style.minHeight = "";
    this.sheet.removeAttribute("src"); // pictures of a whole run would stay in memory
  }

  /** Makes room in the node, or gives back what was made. */
  grow(sign) {
    if (sign > 0) this.room = this.height();
    this.element.style.minHeight = `${this.room}px`;
    const [width, height] = this.node.size;
    this.node.setSize([width, height + sign * this.room]);
    app.canvas?.setDirty?.(true, true);
  }

  draw() {
    const { count, width, height } = this.message;
    if (!this.sheet.complete || !this.sheet.naturalWidth) return; // the next sheet is being decoded
    this.frame = (this.frame + 1) % count;
    if (this.canvas.width !== width || this.canvas.height !== height) Object.assign(this.canvas, { width, height });
    const from = [this.frame * width, 0, width, height];
    this.canvas.getContext("2d").drawImage(this.sheet, ...from, 0, 0, width, height);
  }
}

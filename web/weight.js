/** A weight: drag it, type it, or use the arrow keys. */

import { make } from "./dom.js";
import { heldWeight, readWeight, shownWeight } from "./rows.js";
import { fill } from "./text.js";

const SLACK = 3; // pixels that a click may wander
const PER_PIXEL = { plain: 0.01, shift: 0.001, ctrl: 0.1 };
const PER_KEY = { plain: 0.05, shift: 0.01, ctrl: 0.5 };

/**
 * {element, show(weight)}. onScrub(weight) comes while dragging, onCommit(weight) once for each change that is done,
 * so that one gesture is one step of undo.
 */
export function weightField(text, { onScrub, onCommit }) {
  const input = make("input", {
    type: "text",
    inputmode: "decimal",
    class: "cogloom-weight",
    role: "spinbutton",
    "aria-label": text.weight,
    "aria-valuemin": -100,
    "aria-valuemax": 100,
    title: fill(text.weight_hint, {}),
    autocomplete: "off",
    spellcheck: "false",
  });
  let current = 1;

  function show(weight) {
    current = weight;
    input.value = shownWeight(weight);
    input.setAttribute("aria-valuenow", weight);
    input.classList.toggle("negative", weight < 0);
    input.style.setProperty("--fill", `${Math.min(Math.abs(weight) / 2, 1) * 100}%`);
  }

  function commit(weight) {
    const changed = weight !== current;
    show(weight);
    if (changed) onCommit(weight);
  }

  function typed() {
    commit(readWeight(input.value) ?? current); // what cannot be read goes back to what was
  }

  input.addEventListener("keydown", (event) => {
    const up = { ArrowUp: 1, ArrowDown: -1 }[event.key];
    if (event.altKey) return; // moves the row
    if (up) {
      event.preventDefault();
      commit(heldWeight((readWeight(input.value) ?? current) + up * amount(event, PER_KEY)));
      input.select();
    } else if (event.key === "Enter") {
      typed();
      input.select();
    } else if (event.key === "Escape") {
      show(current);
      input.blur();
    }
  });
  input.addEventListener("blur", typed);
  input.addEventListener("dblclick", () => {
    commit(1);
    input.select();
  });
  scrub(
    input,
    () => current,
    (weight) => {
      show(weight);
      onScrub(weight);
    },
    onCommit,
  );
  show(1);
  return { element: input, show };
}

function amount(event, table) {
  return event.shiftKey ? table.shift : event.ctrlKey || event.metaKey ? table.ctrl : table.plain;
}

/** Horizontal dragging on a field that is not being typed in; without movement it is a click into the field. */
function scrub(input, current, onMove, onDone) {
  let from = null; // {x: where the pointer was last, start: the weight before, moved}

  input.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || document.activeElement === input) return;
    event.preventDefault(); // no focus and no selection before it is clear that this is a click
    input.setPointerCapture(event.pointerId);
    from = { x: event.clientX, start: current(), exact: current(), moved: false };
  });
  input.addEventListener("pointermove", (event) => {
    if (!from) return;
    const by = event.clientX - from.x;
    if (!from.moved && Math.abs(by) < SLACK) return;
    from.moved = true;
    from.x = event.clientX;
    from.exact += by * amount(event, PER_PIXEL);
    input.classList.add("dragging");
    onMove(heldWeight(from.exact, event.shiftKey ? 3 : 2));
  });
  const end = (event) => {
    if (!from) return;
    const { start, moved } = from;
    from = null;
    input.classList.remove("dragging");
    if (moved && current() !== start) onDone(current());
    if (!moved && event.type === "pointerup") {
      input.focus();
      input.select();
    }
  };
  input.addEventListener("pointerup", end);
  input.addEventListener("pointercancel", end);
}

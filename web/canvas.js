/** What a pointer does over our elements that is meant for the canvas below them. */

import { app } from "../../scripts/app.js";

const PASSED = { pointerdown: "processMouseDown", pointermove: "processMouseMove", pointerup: "processMouseUp" };

/**
 * The wheel zooms the canvas and the middle button drags it, as over the front end's own text boxes. `keeps(event)` is
 * true where the element wants the wheel itself.
 */
export function passToCanvas(element, keeps = () => false) {
  element.addEventListener("wheel", (event) => passWheel(event, keeps), { passive: false });
  for (const type of Object.keys(PASSED)) element.addEventListener(type, (event) => passMiddle(type, event));
}

function passWheel(event, keeps) {
  if (!event.ctrlKey && !event.metaKey && keeps(event)) return event.stopPropagation();
  if (globalThis.LiteGraph?.vueNodesMode) return; // there the wheel reaches the canvas by itself
  app.canvas?.processMouseWheel?.(event);
}

function passMiddle(type, event) {
  const middle = type === "pointermove" ? event.buttons & 4 : event.button === 1;
  if (middle) app.canvas?.[PASSED[type]]?.(event);
}

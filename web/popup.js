/** A panel over the page beside something in a node. At the page's own size, so that it reads at every zoom. */

import { keepKeys, make } from "./dom.js";

const GAP = 4;
const EDGE = 8;

let open = null; // one at a time

/**
 * Opens `content` below `anchor` (above where there is no room below). It follows the anchor while the canvas moves,
 * and closes on Escape, on a click elsewhere, and when the anchor is gone. Returns close().
 */
export function openPopup(anchor, content, { label, width = 340, role = "dialog", onClose = () => {} } = {}) {
  const again = open?.anchor === anchor;
  closePopup();
  if (again) return () => {}; // the button that opened it closes it
  const element = make("div", { class: "cogloom cogloom-popup", role, "aria-label": label, tabindex: "-1" }, content);
  element.style.width = `${width}px`;
  keepKeys(element);
  // A wheel over the panel is the panel's: without this the canvas underneath would zoom.
  element.addEventListener("wheel", (event) => event.stopPropagation());
  document.body.append(element);
  document.addEventListener("pointerdown", elsewhere, true);
  document.addEventListener("keydown", escape, true);
  open = { anchor, element, onClose };
  element.focus({ preventScroll: true });
  follow();
  return closePopup;
}

export function closePopup({ back = false } = {}) {
  if (!open) return;
  const { anchor, element, onClose } = open;
  open = null;
  document.removeEventListener("pointerdown", elsewhere, true);
  document.removeEventListener("keydown", escape, true);
  element.remove();
  onClose();
  if (back && anchor.isConnected) anchor.focus({ preventScroll: true });
}

function elsewhere(event) {
  if (!open.element.contains(event.target) && !open.anchor.contains(event.target)) closePopup();
}

/** Wherever the focus is: Escape means the panel that is open, and nothing behind it. */
function escape(event) {
  if (event.key !== "Escape" || event.isComposing) return;
  event.stopPropagation();
  event.preventDefault();
  closePopup({ back: true });
}

function follow() {
  if (!open) return;
  const at = open.anchor.getBoundingClientRect();
  if (!at.width) return closePopup();
  place(open.element, at);
  requestAnimationFrame(follow);
}

function place(element, at) {
  const { offsetWidth: width, offsetHeight: height } = element;
  const below = innerHeight - at.bottom - GAP - EDGE;
  const above = at.top - GAP - EDGE;
  const top = height <= below || below >= above ? at.bottom + GAP : at.top - GAP - height;
  element.style.left = `${clamp(at.left, EDGE, innerWidth - width - EDGE)}px`;
  element.style.top = `${clamp(top, EDGE, innerHeight - height - EDGE)}px`;
}

function clamp(number, low, high) {
  return Math.max(low, Math.min(number, high));
}

/** The comparison player in the node that made the clips. */

import { app } from "../../scripts/app.js";
import { passToCanvas } from "./canvas.js";
import { make } from "./dom.js";
import { everyNode, nodeById } from "./graph.js";
import { createPlayer } from "./player.js";
import { fileUrl } from "./server.js";

export const COMPARE = "CogLoomCompare";
const HEIGHT = 330;
const WIDTH = 460;

const players = new WeakMap(); // node -> {player, shown: what it shows, as a text}

/** A compare node shows its clips in the player: the front end's own picture of the output would show them twice. */
export function prepareCompare(node) {
  node.hideOutputImages = true; // Vue nodes
  node.onDrawBackground = () => {}; // canvas nodes: where this node's default preview is begun
}

/** After a run: `output` is what the node sent, {cogloom_clips, cogloom_fps}. */
export function showClips(id, output, text) {
  const node = nodeById(id);
  if (node && output?.cogloom_clips?.length) fillPlayer(node, output, text);
}

/** After a graph was loaded: what the front end still knows of outputs, it gives to the nodes again. */
export function restoreClips(text) {
  for (const node of everyNode()) {
    if (node.type !== COMPARE) continue;
    const output = app.nodeOutputs?.[node.id] ?? app.nodeOutputs?.[`${node.graph?.id}:${node.id}`];
    if (output?.cogloom_clips?.length) fillPlayer(node, output, text);
  }
}

function fillPlayer(node, { cogloom_clips: files, cogloom_fps: [fps] = [8] }, text) {
  const shown = JSON.stringify([files, fps]);
  const known = players.get(node);
  if (known?.shown === shown) return;
  const clips = files.map((file) => ({ url: fileUrl(file), label: file.label, frames: file.frames }));
  if (known) known.player.update({ clips, fps });
  else addPlayer(node, { clips, fps, text });
  players.get(node).shown = shown;
}

function addPlayer(node, options) {
  const element = make("div", { class: "cogloom-player-box" });
  const widget = node.addDOMWidget("cogloom_player", "cogloom_player", element, {
    serialize: false,
    getMinHeight: () => HEIGHT,
    margin: 6,
  });
  passToCanvas(element);
  widget.serialize = false; // not in widgets_values: it is a view of the output, no value
  element.style.minHeight = `${HEIGHT - 12}px`;
  const player = createPlayer(element, options);
  players.set(node, { player });
  const removed = node.onRemoved;
  node.onRemoved = function (...given) {
    removed?.apply(this, given);
    player.destroy();
    players.delete(node);
  };
  const [width, height] = node.size;
  node.setSize([Math.max(width, WIDTH), Math.max(height, node.computeSize()[1])]);
}

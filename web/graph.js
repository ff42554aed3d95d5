/** Finding things in the graph: every node, and the base that a stack's output leads to. */

import { app } from "../../scripts/app.js";

const STACKS = ["COGLOOM_STACK", "LORA_STACK"];
const BASE_WIDGETS = { CogLoomBase: "checkpoint", CogLoomBaseFile: "like" };
const ENTRY = -10; // the ids by which links inside a subgraph name its own inputs and outputs
const EXIT = -20;
const FAR = 500; // nodes after which a walk gives up; a graph with a ring would not end by itself

function rootGraph() {
  return app.rootGraph ?? app.graph;
}

/** Every node of the graph and of the subgraphs in it. */
export function* everyNode(graph = rootGraph(), seen = new Set()) {
  if (!graph || seen.has(graph)) return;
  seen.add(graph);
  for (const node of graph.nodes ?? graph._nodes ?? []) {
    yield node;
    if (node.subgraph) yield* everyNode(node.subgraph, seen);
  }
}

/** The node that a message of the server names: "7", or "12:7" for node 7 in the subgraph of node 12. */
export function nodeById(id) {
  let graph = rootGraph();
  let node = null;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(part) ?? graph?.getNodeById(Number(part)) ?? null;
    graph = node?.subgraph;
  }
  return node;
}

/**
 * The checkpoint that this stack will be applied to: of the sampler or compare node that its output reaches, else of
 * the only base in the graph. Null where that is open: no base, or several.
 */
export function baseOf(node) {
  const reached = new Set();
  const queue = stackOutputs(node);
  for (let steps = 0; queue.length && steps < FAR; steps++) {
    const { graph, link } = queue.shift();
    for (const next of targets(graph, link)) {
      const base = baseOfInput(next);
      if (base) return base;
      if (!reached.has(next)) queue.push(...stackOutputs(next));
      reached.add(next);
    }
  }
  return onlyBase();
}

/** The links that leave a node with a stack on them; a reroute passes on whatever it got. */
function stackOutputs(node) {
  const carries = (link) => node.type === "Reroute" || STACKS.includes(node.outputs?.[link.origin_slot]?.type);
  return leaving(node.graph, node.id)
    .filter(carries)
    .map((link) => ({ graph: node.graph, link }));
}

// Links are read from the graph and not from the slots: newer front ends warn of `input.link` and `output.links`.

function linksOf(graph) {
  const links = graph?.links ?? graph?._links ?? [];
  return typeof links.values === "function" ? [...links.values()] : Object.values(links).filter(Boolean);
}

function leaving(graph, id, slot = null) {
  return linksOf(graph).filter((link) => same(link.origin_id, id) && (slot === null || link.origin_slot === slot));
}

function entering(graph, id, slot) {
  return linksOf(graph).find((link) => same(link.target_id, id) && link.target_slot === slot) ?? null;
}

/** Ids are numbers in some front ends and texts in others. */
function same(one, other) {
  return String(one) === String(other);
}

/** Where a link ends: a node; several when it enters a subgraph or leaves one. */
function targets(graph, link) {
  if (same(link.target_id, EXIT)) {
    return hosts(graph).flatMap((host) => followed(host.graph, host.id, link.target_slot));
  }
  const node = graph.getNodeById(link.target_id);
  if (!node) return [];
  return node.subgraph ? followed(node.subgraph, ENTRY, link.target_slot) : [node];
}

function followed(graph, id, slot) {
  return leaving(graph, id, slot).flatMap((link) => targets(graph, link));
}

/** The nodes that stand for a subgraph in the graphs around it. */
function hosts(graph) {
  return [...everyNode()].filter((node) => node.subgraph === graph);
}

function baseOfInput(node) {
  const slot = (node.inputs ?? []).findIndex(({ type }) => type === "COGLOOM_BASE");
  return slot < 0 ? null : baseBehind(node.graph, entering(node.graph, node.id, slot), 0);
}

/** The checkpoint at the beginning of a link, through reroutes and the walls of subgraphs. */
function baseBehind(graph, link, depth) {
  if (!link || depth > FAR) return null;
  if (same(link.origin_id, ENTRY)) {
    const [host] = hosts(graph);
    return host ? baseBehind(host.graph, entering(host.graph, host.id, link.origin_slot), depth + 1) : null;
  }
  const node = graph.getNodeById(link.origin_id);
  if (!node) return null;
  if (node.subgraph) return baseBehind(node.subgraph, entering(node.subgraph, EXIT, link.origin_slot), depth + 1);
  if (node.type === "Reroute") return baseBehind(graph, entering(graph, node.id, 0), depth + 1);
  return checkpoint(node);
}

function checkpoint(node) {
  const name = BASE_WIDGETS[node.type];
  return node.widgets?.find((widget) => widget.name === name)?.value ?? null;
}

function onlyBase() {
  const names = [...everyNode()].map(checkpoint).filter(Boolean);
  return new Set(names).size === 1 ? names[0] : null;
}

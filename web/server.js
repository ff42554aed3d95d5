/** What the pack's own routes answer. They only read; each answer is JSON, an error is {"error": sentence}. */

import { api } from "../../scripts/api.js";

const STALE = 4000; // ms for which a list is shown without asking again

/** GETs a route. Throws an Error whose message is the server's own sentence. */
export async function ask(route, query = {}) {
  const answer = await api.fetchApi(`/cogloom/${route}?${encoded(query)}`, { cache: "no-store" });
  const found = await answer.json().catch(() => ({}));
  if (!answer.ok || found.error) throw new Error(found.error ?? `${route}: HTTP ${answer.status}`);
  return found;
}

/** The address of an adapter's picture. */
export function pictureUrl(name) {
  return api.apiURL(`/cogloom/picture?${encoded({ name })}`);
}

/** The address of a file that a node wrote: {filename, subfolder, type}. */
export function fileUrl(file) {
  const { filename, subfolder = "", type = "output" } = file;
  return api.apiURL(`/view?${encoded({ filename, subfolder, type })}`);
}

function encoded(query) {
  const given = Object.entries(query).filter(([, value]) => value !== null && value !== undefined && value !== "");
  return new URLSearchParams(given).toString();
}

const lists = new Map(); // base name, or "" -> {at, answer: Promise, done: what it came to}

/** {adapters, blocks} for a base (null: none known). Asked again when older than a moment, or with `fresh`. */
export function adapterList(base, fresh = false) {
  const key = base ?? "";
  const known = lists.get(key);
  if (known && (known.pending || (!fresh && performance.now() - known.at < STALE))) return known.answer;
  const entry = { at: performance.now(), pending: true, done: known?.done ?? null };
  entry.answer = ask("adapters", { base }).then(
    (found) => Object.assign(entry, { pending: false, done: found }).done,
    (error) => {
      lists.delete(key); // the next one asks again
      throw error;
    },
  );
  lists.set(key, entry);
  return entry.answer;
}

/** The list as it was last answered, or null; never waits. */
export function knownList(base) {
  return lists.get(base ?? "")?.done ?? null;
}

export function forgetLists() {
  for (const entry of lists.values()) entry.at = -Infinity;
}

const drawn = new Map(); // what was asked -> Promise of {factors, …} or {error}

/** A blocks or steps text, read by the server: its answer, or {error: sentence}. Never throws. */
export function readText(route, query) {
  const key = `${route}?${encoded(query)}`;
  if (drawn.size > 500) drawn.clear();
  if (!drawn.has(key))
    drawn.set(
      key,
      ask(route, query).catch((error) => failed(key, error)),
    );
  return drawn.get(key);
}

function failed(key, error) {
  if (error instanceof TypeError) drawn.delete(key); // the network, not the text
  return { error: error.message };
}

/** The rows of a stack and their JSON text, which is what the node, a saved workflow and the API see. */

export const WEIGHT_CAP = 100;

/**
 * The rows of a text: {rows, error}. With an error, which is a key of the texts and its values, the text is kept as it
 * is: a workflow of a newer version must not lose what this one cannot show. A row keeps the keys it came with.
 */
export function parseRows(text) {
  let found;
  try {
    found = text.trim() ? JSON.parse(text) : [];
  } catch (error) {
    return { rows: [], error: ["bad_json", { error: error.message }] };
  }
  if (!Array.isArray(found)) return { rows: [], error: ["bad_list", {}] };
  const wrong = found.findIndex((row) => fault(row));
  if (wrong >= 0) return { rows: [], error: [fault(found[wrong]), { n: wrong + 1 }] };
  return { rows: found.map(complete), error: null };
}

function fault(row) {
  if (typeof row !== "object" || row === null || typeof row.adapter !== "string") return "bad_adapter";
  const { weight = 1, on = true, blocks = "", steps = "", partial = false } = row;
  if (typeof weight !== "number" || !(Math.abs(weight) <= WEIGHT_CAP)) return "bad_weight";
  if (typeof on !== "boolean" || typeof partial !== "boolean") return "bad_switch";
  return typeof blocks === "string" && typeof steps === "string" ? null : "bad_text";
}

function complete(row) {
  return { on: true, weight: 1, blocks: "", steps: "", partial: false, ...row };
}

/** The text of rows: on, adapter and weight always, the rest where it says something. */
export function formatRows(rows) {
  return JSON.stringify(rows.map(shortened));
}

function shortened(row) {
  const { on, adapter, weight, blocks, steps, partial, ...others } = row;
  return {
    on,
    adapter,
    weight,
    ...(blocks && { blocks }),
    ...(steps && { steps }),
    ...(partial && { partial }),
    ...others,
  };
}

/** A typed weight, or null. A comma for the point and full-width digits are what some keyboards write. */
export function readWeight(text) {
  const plain = text.normalize("NFKC").trim().replace(",", ".").replace("−", "-");
  return /^[+-]?(\d+\.?\d*|\.\d+)$/.test(plain) ? heldWeight(Number(plain), 4) : null;
}

/** Within the cap, and without the digits that adding 0.05 leaves behind. */
export function heldWeight(number, places = 2) {
  const capped = Math.min(WEIGHT_CAP, Math.max(-WEIGHT_CAP, number));
  return Number(capped.toFixed(places)) + 0; // + 0: no -0
}

/** What is shown of a file's name: {folder, file}, without the ending. */
export function splitName(name) {
  const cut = name.lastIndexOf("/") + 1;
  return { folder: name.slice(0, cut), file: name.slice(cut).replace(/\.safetensors$/i, "") };
}

/** At least two places, so that a column of weights lines up. */
export function shownWeight(weight) {
  const short = String(weight);
  return (short.split(".")[1] ?? "").length > 2 ? short : weight.toFixed(2);
}

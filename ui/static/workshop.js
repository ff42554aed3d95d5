/**
 * The parts of the Workshop tab. As in app.js: a gr.HTML's element is filled, values are put in as text nodes, never as
 * markup.
 */

import { t } from "/cogloom/static/app.js";
import { BOTTOM, drawing, drawn, frame, HEIGHT, LEFT, name, numbers, short, ticks, WIDTH } from "/cogloom/static/more.js";
import { make } from "/cogloom/web/dom.js";

document.head.append(make("link", { rel: "stylesheet", href: "/cogloom/static/workshop.css" }));

/** value: [{url, name, size}]. */
export function downloads(part) {
  drawn(part, (box, value) => {
    const links = (value ?? []).map(({ url, name: file, size }) =>
      make("li", {}, make("a", { href: url, download: file, class: "cm-link" }, t("ws_download", { name: file, size }))),
    );
    box.replaceChildren(links.length ? make("ul", { class: "cw-links", "aria-label": t("ws_made") }, links) : "");
  });
}

/** value: null, or {title, curves: [[key, [share by rank]]], rows: [[share, fewest, middle, most]], rank, energy}. */
export function spectrum(part) {
  drawn(part, (box, value) => {
    if (!value) return box.replaceChildren();
    const { title, curves, rows = [], rank = null, energy = null } = value;
    const head = make("p", { class: "cm-head" }, name(title));
    if (!curves.length) return box.replaceChildren(head);
    const most = curves[0][1].length;
    const x = (at) => LEFT + (at / most) * (WIDTH - LEFT - 20);
    const y = (share) => 8 + (1 - share) * (HEIGHT - 8 - BOTTOM);
    const svg = frame(title, 0, 1, y);
    for (const at of ticks(0, most, 6)) {
      if (Number.isInteger(at)) svg.append(drawing("text", { x: x(at), y: HEIGHT - 6, "text-anchor": "middle" }, short(at)));
    }
    for (const [key, shares] of curves) {
      const points = [[0, 0], ...shares.map((share, index) => [index + 1, share])];
      const path = points.map(([at, share]) => `${x(at).toFixed(1)},${y(share).toFixed(1)}`).join(" ");
      svg.append(drawing("polyline", { points: path, class: `cm-line ${key.replaceAll("_", "-")}` }));
    }
    if (rank !== null && rank <= most) svg.append(drawing("line", { x1: x(rank), x2: x(rank), y1: y(1), y2: y(0), class: "cw-chosen" }));
    if (energy !== null) svg.append(drawing("line", { x1: LEFT, x2: WIDTH - 20, y1: y(energy), y2: y(energy), class: "cw-chosen" }));
    const legend = make("p", { class: "cw-legend" }, curves.map(([key]) => make("span", { class: key.replaceAll("_", "-") }, t(key))));
    const table = make(
      "table",
      { class: "cw-needed", "aria-label": t("ws_needed") },
      make("tbody", {}, rows.map(([share, ...ranks]) => make("tr", {}, make("th", { scope: "row" }, share), ranks.map((one) => make("td", {}, String(one)))))),
    );
    const middle = curves[1][1].map((share, index) => [String(index + 1), short(share)]);
    box.replaceChildren(head, legend, svg, make("p", { class: "cm-said" }, t("ws_needed")), table, numbers(middle));
  });
}

/** value: null, or {title, head: [text], rows: [[text]]}. A column in which nothing stands is left out. */
export function table(part) {
  drawn(part, (box, value) => {
    if (!value) return box.replaceChildren();
    const { title, head, rows } = value;
    const shown = head.map((_, index) => rows.some((row) => row[index] && row[index] !== "–"));
    const cells = (tag, row) => row.filter((_, index) => shown[index]).map((text) => make(tag, tag === "th" ? { scope: "col" } : {}, name(text)));
    box.replaceChildren(
      make(
        "div",
        { class: "cw-scroll", tabindex: "0", role: "region", "aria-label": title },
        make(
          "table",
          { class: "cw-table" },
          make("thead", {}, make("tr", {}, cells("th", head))),
          make("tbody", {}, rows.map((row) => make("tr", {}, cells("td", row)))),
        ),
      ),
    );
  });
}

// Two lessons side by side: what changed is marked, what did not is folded.

import { el } from "./dom.js";

let shown = null; // "06-07"

/** Show the diff to the lesson before, with a choice of any two. */
export async function showDiff(box, state, notice, from, to) {
  if (!state) return;
  const numbers = state.lessons.map((lesson) => lesson.number);
  const here = numbers.indexOf(state.lesson.number);
  from ??= numbers[Math.max(0, here < 0 ? numbers.length - 2 : here - 1)];
  to ??= here < 0 ? numbers.at(-1) : state.lesson.number;
  if (shown === `${from}-${to}`) return;
  if (!shown) box.replaceChildren(el("p", { class: "quiet", role: "status" }, "Comparing…"));
  const answer = await fetch(`/api/diff?from=${from}&to=${to}`);
  const diff = await answer.json();
  if (!answer.ok) {
    if (!shown) box.replaceChildren();
    return notice(diff.error);
  }
  shown = `${from}-${to}`;
  const again = () => showDiff(box, state, notice, selected(box, "from"), selected(box, "to"));
  box.replaceChildren(
    chooser(state.lessons, from, to, again),
    contents(diff),
    ...diff.files.map(file),
  );
}

const selected = (box, name) => box.querySelector(`[name=${name}]`).value;

function chooser(lessons, from, to, again) {
  const select = (name, value) => {
    const options = lessons.map(({ number, name: title }) =>
      el(
        "option",
        { value: number, selected: number === value },
        `${number} ${title.replaceAll("-", " ")}`,
      ),
    );
    const box = el("select", { name, "aria-label": name }, options);
    box.addEventListener("change", again);
    return box;
  };
  return el(
    "div",
    { class: "choose" },
    "From lesson",
    select("from", from),
    "to",
    select("to", to),
  );
}

function contents(diff) {
  const links = diff.files.map((file, number) =>
    el("li", {}, el("a", { href: `#file-${number}` }, file.name)),
  );
  const same = diff.same.length ? `The same in both: ${diff.same.join(", ")}.` : "";
  return el(
    "nav",
    { "aria-label": "Files" },
    el("ol", {}, links),
    el("p", { class: "quiet" }, same),
  );
}

function file({ name, state, rows }, number) {
  const isOne = state !== "changed"; // added or removed: one side has nothing to show
  const side = state === "removed" ? "left" : "right";
  const line = isOne ? (row) => oneSide(row, side) : twoSides;
  const columns = isOne ? ["n", ""] : ["n", "", "n", ""];
  return el(
    "article",
    { id: `file-${number}` },
    el("h2", {}, name, el("span", {}, state)),
    el(
      "div",
      { class: `code ${isOne ? `one ${state}` : ""}`, tabindex: "0", role: "group", "aria-label": name },
      el(
        "table",
        {},
        el(
          "colgroup",
          {},
          columns.map((kind) => el("col", { class: kind || null })),
        ),
        el("tbody", {}, lines(rows, line, columns.length)),
      ),
    ),
  );
}

function lines(rows, line, width) {
  return rows.flatMap((row) => (row.kind === "fold" ? fold(row.rows, line, width) : [line(row)]));
}

/** A button in place of lines that are the same in both. */
function fold(rows, line, width) {
  const button = el("button", { class: "plain" }, `${rows.length} lines that are the same`);
  const place = el("tr", { class: "fold" }, el("td", { colspan: width }, button));
  button.addEventListener("click", () => place.replaceWith(...rows.map(line)));
  return place;
}

function twoSides(row) {
  return el("tr", {}, half(row.left, "left", row.kind), half(row.right, "right", row.kind));
}

function oneSide(row, side) {
  return el("tr", {}, half(row[side], side, row.kind));
}

function half(line, side, kind) {
  if (!line) return [el("td", { class: "n absent" }), el("td", { class: "absent" })];
  const code = line.spans.map(([text, token, isMarked]) => {
    // On the colour of a mark only ink can be read.
    if (isMarked) return el("mark", {}, text);
    const look = lookOf(token);
    return look ? el("span", { class: look }, text) : text;
  });
  return [el("td", { class: "n" }, String(line.n)), el("td", { class: `${side}-${kind}` }, code)];
}

/** How a token looks: k keyword, s string, c comment, m number, d definition; most like text. */
function lookOf(token) {
  if (["nf", "nc", "fm"].includes(token)) return "d";
  return token && "kscm".includes(token[0]) ? token[0] : null;
}

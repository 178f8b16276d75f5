// The workers' log lines, as they come. Only so many stay, or a thousand tasks would be too many.

import { chip, clock, el } from "./dom.js";

const KEPT = 20_000; // lines, of all tasks: of a thousand orders with their steps
const SHOWN = 400;
const BEGINNINGS = ["scene", "reset"]; // what is before them is about other tasks

let lines = [];

/** The number of the last line that is known. */
export const lastNumber = () => lines.at(-1)?.n ?? 0;

/** Take in new lines; those that are known already are left out. */
export function take(news) {
  const last = lastNumber();
  lines = [...lines, ...news.filter((line) => line.n > last)].slice(-KEPT);
}

/** Show the lines of these tasks (null: of all), and stay at the end if that is where one looks. */
export function show(box, tasks) {
  const wanted = lines.filter(filterFor(tasks)).slice(-SHOWN);
  // What a program did for the lab, a retry say, is heard of only when the program has ended.
  wanted.sort((one, other) => one.at - other.at);
  const isAtEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 30;
  const old = new Map([...box.children].map((child) => [child.dataset.key, child]));
  const rows = wanted.map((line) => old.get(String(line.n)) ?? row(line));
  if (!wanted.length) rows.push(el("p", { class: "quiet" }, "Nothing yet."));
  if (rows.length === box.children.length && rows.at(-1) === box.lastChild) return;
  box.replaceChildren(...rows);
  if (isAtEnd) box.scrollTop = box.scrollHeight;
}

/** Lines of these tasks, and what the lab did since the scene began in which they were first heard of. */
function filterFor(tasks) {
  if (!tasks) return () => true;
  const first = lines.find((line) => tasks.has(line.task))?.n ?? Infinity;
  const begin = lines.findLast((line) => BEGINNINGS.includes(line.what) && line.n < first)?.n ?? 0;
  return (line) =>
    line.task == null ? line.worker === "lab" && line.n >= begin : tasks.has(line.task);
}

function row(line) {
  const isLab = line.worker === "lab";
  const isBad = /WARN|ERROR|CRIT/.test(line.level ?? "");
  return el(
    "div",
    { "data-key": line.n, class: BEGINNINGS.includes(line.what) ? "begin" : null },
    el("time", {}, `${clock(line.at)}.${thousandths(line.at)}`),
    isLab ? el("span") : chip(line.worker),
    el("span", { class: isLab ? "hand" : isBad ? "bad" : "" }, line.text),
  );
}

const thousandths = (at) => String(new Date(at * 1000).getMilliseconds()).padStart(3, "0");

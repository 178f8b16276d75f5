// What in the picture does not explain itself: a sample of it, and a word on it.

import { el, svg } from "./dom.js";

const box = (kind) => svg("rect", { class: kind, x: 1, y: 1, width: 24, height: 12, rx: 2 });
const line = (kind, x1, y1, x2, y2) => svg("line", { class: kind, x1, y1, x2, y2 });

const LEGEND = {
  ".stale": ["RUNNING, and nobody runs it", () => box("stale")],
  ".queued": ["QUEUED", () => box("queued")],
  ".suspended": ["SUSPENDED: nobody has it", () => line("suspended", 1, 7, 25, 7)],
  ".asleep": ["SLEEPING", () => box("asleep")],
  ".due": ["its time had come", () => line("due", 13, 0, 13, 14)],
  ".lost": ["not this attempt's any more", () => box("lane lost")],
  ".past": ["on a branch that was left", () => svg("g", { class: "past" }, box("lane"))],
  ".event": ["an event is written", () => svg("circle", { class: "event", cx: 13, cy: 7, r: 4.5 })],
};

/** Of all that, what this picture has. */
export function legend(picture) {
  const shown = Object.keys(LEGEND).filter((kind) => picture.querySelector(kind));
  if (!shown.length) return null;
  return el(
    "p",
    { class: "legend", "data-key": "legend" },
    shown.map((kind) => {
      const [words, sample] = LEGEND[kind];
      return el("span", {}, svg("svg", { class: "chart", "aria-hidden": "true" }, sample()), words);
    }),
  );
}

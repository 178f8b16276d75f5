// What stands in a timeline: moments, and how things ended.

import { svg } from "./dom.js";

const RED = ["kill", "died"];
// What happened, in a word or two; the log has it in full.
const NAMES = {
  kill: (key) => `kill -9 ${key}`,
  freeze: (key) => `${key} frozen`,
  thaw: (key) => `${key} thawed`,
  stop: (key) => `SIGTERM to ${key}`,
  cut: (key) => `connections of ${key} cut`,
  died: (key) => `${key} has ended`,
  ended: (key) => `${key} has ended`,
  restart: (key, text) => (text.includes("has been") ? "Postgres is back" : "Postgres restarts"),
  requeued: (key) => `queued again by ${key}`,
};
const LEVEL = 17; // pixels between two lines of moments' names
const LEVELS = 3;

/** About how wide a text of 12 to 13 pixels is. */
export function textWidth(text) {
  return 6.8 * text.length;
}

/** The moments: their names in as many levels as they need, and a line down from each. */
export function marks(moments, place) {
  const ends = []; // where the last name of each level ends
  const placed = withoutRepetitions(moments).map(({ moment, text }) => {
    const x = place.x(moment.at);
    const width = textWidth(text) + 14;
    const isLeft = x + width > place.width; // its name stands left of its line
    const start = isLeft ? x - width : x;
    let level = ends.findIndex((end) => end <= start);
    if (level < 0 && ends.length < LEVELS) level = ends.push(0) - 1;
    if (level >= 0) ends[level] = start + width;
    return { moment, x, text, level, isLeft };
  });
  const height = ends.length ? ends.length * LEVEL + 8 : 2;
  const isRed = (moment) => RED.includes(moment.what);
  const top = (one) => (Math.max(0, one.level) + 1) * LEVEL - 13;
  return {
    height,
    lines: (bottom) =>
      placed.map((one) =>
        svg(
          "line",
          {
            class: `moment ${isRed(one.moment) ? "red" : ""}`,
            x1: one.x,
            x2: one.x,
            y1: top(one),
            y2: bottom,
          },
          svg("title", {}, one.text),
        ),
      ),
    texts: placed
      .filter((one) => one.level >= 0)
      .map((one) =>
        svg(
          "text",
          {
            class: isRed(one.moment) ? "red-text" : "quiet",
            x: one.x + (one.isLeft ? -5 : 5),
            y: top(one) + 10,
            "text-anchor": one.isLeft ? "end" : "start",
          },
          one.text,
        ),
      ),
  };
}

/** What has been said within the same second, of a task and its child, is said once. */
function withoutRepetitions(moments) {
  const named = moments.map((moment) => ({
    moment,
    text: NAMES[moment.what]?.(moment.worker_key, moment.text) ?? moment.what,
  }));
  return named.filter(({ moment, text }, number) => {
    const same = named.slice(0, number).findLast((other) => other.text === text);
    return !same || moment.at - same.moment.at > 1;
  });
}

/** A cross: somebody's process ended here, and not by itself. */
export function kill(x, y) {
  return svg("path", { class: "kill", d: `M${(x - 6).toFixed(1)} ${y - 6}l12 12m0 -12l-12 12` });
}

/** A status, or how an attempt ended: in a column of its own, where no line runs through it. */
export function status(text, place, y) {
  const kind = text === "COMPLETED" ? "done" : text === "FAILED" ? "bad" : "quiet";
  const at = place.isNarrow
    ? { x: place.width, y: y - 6, "text-anchor": "end" }
    : { x: place.end + 8, y: y + 15 };
  return svg("text", { class: kind, ...at }, text);
}

/** Hatched: the row says RUNNING, and nobody runs it. */
export function hatch() {
  return svg(
    "defs",
    {},
    svg(
      "pattern",
      {
        id: "hatch",
        width: 7,
        height: 7,
        patternUnits: "userSpaceOnUse",
        patternTransform: "rotate(45)",
      },
      svg("rect", { class: "hatch-back", width: 7, height: 7 }),
      svg("rect", { class: "hatch-line", width: 2, height: 7 }),
    ),
  );
}

// The axis of a timeline: where a time is, and where time is folded because nothing happened.

import { seconds, svg } from "./dom.js";

const STEPS = [1, 2, 5, 10, 20, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 86400];
const LONGEST = 8; // seconds that one stretch without any happening may take on the axis
const SHORTEST = 4; // seconds that the whole axis has at least

export const BAR = 20; // how high a bar is
export const LEAST = 15; // how wide it is at least: its letter must fit

/** Where times and rows are, so many pixels wide. A narrow picture has its names above the rows. */
export function layout(happenings, from, until, now, width) {
  const isNarrow = width < 640;
  const left = isNarrow ? 4 : 206;
  const end = width - (isNarrow ? 8 : 104);
  const to = Math.max(from + SHORTEST, until);
  const { stops, folds } = fold(happenings, from, to);
  const scale = (end - left - LEAST) / stops.at(-1).shown;
  return {
    from,
    to,
    x: (time) => left + scale * shownAt(stops, Math.min(Math.max(time, from), to)),
    folds,
    scale,
    left,
    end,
    width,
    isNarrow,
    now,
    row: isNarrow ? 46 : 32,
    names: isNarrow ? 19 : 0,
  };
}

/** Each time at which something happened, and how many seconds of the axis are left of it. */
function fold(happenings, from, to) {
  const times = happenings.filter((time) => time > from && time < to).sort((one, two) => one - two);
  const stops = [{ time: from, shown: 0 }];
  const folds = [];
  for (const time of [...times, to]) {
    const last = stops.at(-1);
    const gap = time - last.time;
    stops.push({ time, shown: last.shown + Math.min(gap, LONGEST) });
    if (gap > LONGEST) folds.push({ from: last.time, to: time });
  }
  return { stops, folds };
}

function shownAt(stops, time) {
  const next = Math.max(1, stops.findIndex((stop) => stop.time >= time));
  const [before, after] = [stops[next - 1], stops[next]];
  const share = (time - before.time) / (after.time - before.time || 1);
  return before.shown + share * (after.shown - before.shown);
}

/** Seconds since the left edge, below everything. */
export function axis(place, bottom) {
  const step = STEPS.find((one) => one * place.scale > 46) ?? STEPS.at(-1);
  const parts = [];
  for (let second = 0; second <= place.to - place.from + 0.01; second += step) {
    const time = place.from + second;
    const inside = place.folds.find((fold) => time > fold.from && time < fold.to);
    if (inside) {
      second += step * Math.max(0, Math.floor((inside.to - time) / step) - 1);
      continue;
    }
    const x = place.x(time);
    parts.push(
      svg("line", { class: "grid", x1: x, x2: x, y1: bottom, y2: bottom + 5 }),
      svg(
        "text",
        { class: "quiet", x, y: bottom + 19, "text-anchor": second ? "middle" : "start" },
        second ? String(second) : "0 s",
      ),
    );
  }
  return svg(
    "g",
    {},
    svg("line", { class: "grid", x1: place.left, x2: place.end, y1: bottom, y2: bottom }),
    parts,
  );
}

/** Where time is folded: a cut through everything, but not through names, and how long it was. */
export function folds(place, rows, bottom) {
  const bars = rows.map((y) => [y + place.names - 2, y + place.names + BAR + 2]);
  const cuts = place.isNarrow ? [...bars, [bottom - 6, bottom + 6]] : [[-2, bottom + 6]];
  return place.folds.map((one) => {
    const x = (place.x(one.from) + place.x(one.to)) / 2;
    const line = (offset) => cuts.map(([top, end]) => `M${x + offset + 3} ${top}L${x + offset - 3} ${end}`);
    return svg(
      "g",
      { class: "fold" },
      svg("path", { class: "cut", d: line(0).join("") }),
      svg("path", { class: "edge", d: [...line(-4), ...line(4)].join("") }),
      svg(
        "text",
        { class: "quiet", x, y: bottom + 19, "text-anchor": "middle" },
        `${seconds(one.to - one.from)} long, folded`,
      ),
    );
  });
}

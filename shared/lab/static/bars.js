// The bars of one row: its attempts, and what the table said of it before, between and behind them.

import { colour, svg } from "./dom.js";
import { BAR, LEAST } from "./axis.js";
import { kill, textWidth } from "./marks.js";

/** Seconds that the lab may hear of something later than it has happened. */
export const LATE = 0.4;
const SEEN = 5; // pixels between two things that are to be seen as two
/** The statuses of a task that has not ended. */
export const OPEN = ["QUEUED", "RUNNING", "SLEEPING", "SUSPENDED"];

/** The attempts of one row, and what the table said of it between them. */
export function bars(lanes, row, moments, place, y, following) {
  return lanes.flatMap((lane, number) => {
    const next = lanes[number + 1] ?? following;
    const parts = [bar(lane, ownedUntil(lane, next, row, moments, place), moments, place, y)];
    if (lane.end === "FAILED" && lanes[number + 1]) parts.push(failure(lane, next, place, y));
    if (lane.to != null) parts.push(...after(lane, next, row, moments, place, y));
    if (isCutOff(lane)) parts.push(kill(place.x(lane.to), y + BAR / 2));
    return parts;
  });
}

const isCutOff = (lane) => lane.end === "killed" || lane.end === "worker ended";

/** Until when the row was this attempt's: a frozen worker, say, goes on without owning it. */
function ownedUntil(lane, next, row, moments, place) {
  const end = lane.to ?? place.now;
  const isTaken = lane.end === "fenced off" || lane.end === "requeued";
  const taken = isTaken ? requeuedAfter(lane.from, moments) : null;
  return Math.min(end, taken ?? next?.from ?? row.finished_at ?? end);
}

function requeuedAfter(time, moments) {
  return moments.find((moment) => moment.what === "requeued" && moment.at >= time)?.at;
}

/** An attempt: hatched while its worker is frozen, pale when the row is not its own any more. */
function bar(lane, owned, moments, place, y) {
  const end = lane.to ?? place.now;
  const isLost = (time) => end - owned > LATE && time >= owned;
  const frozen = freezes(lane, end, moments);
  const isFrozen = (time) => frozen.some(([from, to]) => from <= time && time < to);
  const times = [lane.from, owned, ...frozen.flat(), end].sort((one, two) => one - two);
  const x = place.x(lane.from);
  const edge = (time) => (time === lane.from ? x : Math.max(x + LEAST, place.x(time)));
  const parts = [];
  for (const [number, from] of times.slice(0, -1).entries()) {
    const kind = `${isFrozen(from) ? "stale" : "lane"} ${isLost(from) ? "lost" : ""}`;
    const last = parts.at(-1);
    const to = edge(times[number + 1]);
    if (last?.kind === kind) last.to = to;
    else if (to > edge(from)) parts.push({ kind, from: edge(from), to });
  }
  return svg(
    "g",
    { class: colour(lane.worker_key ?? "") },
    svg("title", {}, lane.text ?? `attempt ${lane.attempt}`),
    parts.map(({ kind, from, to }) => rect(kind, from, to - from, y)),
    lane.worker_key &&
      svg("text", { class: "on", x: x + 7.5, y: y + 14.5, "text-anchor": "middle" }, lane.worker_key),
  );
}

const rect = (kind, x, width, y) =>
  svg("rect", { class: kind, x, y, width, height: BAR, rx: 3 });

/** The times from which and until which a lane's worker was frozen. */
function freezes(lane, end, moments) {
  const own = moments.filter((one) => one.worker_key === lane.worker_key);
  return own
    .filter(({ what, at }) => what === "freeze" && at >= lane.from && at < end)
    .map(({ at }) => [at, Math.min(end, own.find((m) => m.what === "thaw" && m.at >= at)?.at ?? end)]);
}

/** That an attempt has failed, where another one of the same row follows. */
function failure(lane, next, place, y) {
  const x = Math.max(place.x(lane.to), place.x(lane.from) + LEAST);
  const hasRoom = place.x(next.from) - x > textWidth("FAILED") + 10;
  return svg(
    "g",
    {},
    rect("bad", x - 3, 3, y),
    hasRoom && svg("text", { class: "bad", x: x + 6, y: y + 15 }, "FAILED"),
  );
}

/** From the end of an attempt until the next one: whose is the row meanwhile? */
function after(lane, next, row, moments, place, y) {
  const end = next?.from ?? (OPEN.includes(row.status) ? place.now : lane.to);
  if (end <= lane.to) return [];
  if (lane.end === "SUSPENDED") {
    const woken = wokenAt(lane, next, row, end);
    return [suspended(lane.to, woken, place, y), stretch("queued", woken, end, place, y)];
  }
  if (lane.end === "QUEUED") return [stretch("queued", lane.to, end, place, y)];
  if (!isCutOff(lane)) return [];
  const until = Math.min(requeuedAfter(lane.to, moments) ?? end, end);
  return [stretch("stale", lane.to, until, place, y), stretch("queued", until, end, place, y)];
}

/** When a suspended task was queued again: its first child that ends after that does it. */
function wokenAt(lane, next, row, end) {
  if (!next && row.status === "SUSPENDED") return end;
  const ends = (row.children ?? []).map((child) => child.finished_at);
  const later = ends.filter((at) => at != null && at >= lane.to - LATE && at <= end);
  return later.length ? Math.max(lane.to, Math.min(...later)) : end;
}

function suspended(from, to, place, y) {
  const [x1, x2, middle] = [place.x(from) + 4, place.x(to), y + BAR / 2];
  if (x2 <= x1) return "";
  const title = svg("title", {}, "SUSPENDED");
  return svg("line", { class: "suspended", x1, x2, y1: middle, y2: middle }, title);
}

/** A sleep or a wait; and when its time had come, if nobody ended it then. */
export function asleep(child, place, y) {
  const end = child.finished_at ?? place.now;
  const x = place.x(child.wake_at ?? end);
  const room = place.x(end) - x;
  return [
    stretch("asleep", child.inserted_at, end, place, y),
    room >= SEEN &&
      svg(
        "g",
        {},
        svg("line", { class: "due", x1: x, x2: x, y1: y - 3, y2: y + BAR + 3 }),
        room > textWidth("due") + 12 && svg("text", { class: "quiet bare", x: x + 6, y: y + 14 }, "due"),
      ),
  ];
}

const SAYS = { stale: "RUNNING, but nobody runs it", queued: "QUEUED" };

/** A stretch of time in which no worker has the row. */
export function stretch(kind, from, to, place, y) {
  const x = place.x(from);
  const width = place.x(to) - x;
  if (width < 1) return "";
  const text = SAYS[kind];
  const hasText = kind === "queued" && width > textWidth(text) + 20;
  return svg(
    "g",
    {},
    text && svg("title", {}, text),
    svg("rect", { class: kind, x: x + 0.5, y: y + 0.5, width, height: BAR - 1, rx: 2 }),
    hasText && svg("text", { class: "quiet", x: x + 8, y: y + 14 }, text),
  );
}

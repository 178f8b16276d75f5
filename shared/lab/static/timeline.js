// The chosen task on an axis of time: a lane for each attempt, below them a row for each event.

import { colour, svg } from "./dom.js";
import { axis, BAR, folds, layout, LEAST } from "./axis.js";
import { hatch, kill, marks, status, textWidth } from "./marks.js";

const LANES = 6; // so many attempts have a lane; of more, the last ones
const LATE = 0.4; // seconds that the lab may hear of something later than it has happened
const OPEN = ["QUEUED", "RUNNING", "SLEEPING", "SUSPENDED"];
// What the lanes themselves show is not marked once more.
const MARKED = [
  "kill",
  "freeze",
  "thaw",
  "stop",
  "cut",
  "restart",
  "died",
  "ended",
  "requeued",
  "retry",
  "replay",
  "fork",
  "signal",
];

/** The picture, so many pixels wide. `now` is Postgres's clock. */
export function timeline(chosen, now, width) {
  const lanes = chosen.lanes.slice(-LANES);
  const first = lanes[0]?.from ?? now;
  const from = hiddenAttempts(chosen) ? first : Math.min(chosen.task.inserted_at, first);
  const until = isOpen(chosen) ? now : lastEnd(chosen) + 0.3;
  const place = layout(happenings(chosen), from, until, now, width);
  const moments = chosen.moments.filter(
    (moment) => MARKED.includes(moment.what) && moment.at >= place.from && moment.at <= place.to,
  );
  const drawnMoments = marks(moments, place);
  let y = drawnMoments.height;
  const parts = [];
  const rowOf = new Map(); // attempt -> y
  const rows = []; // all of their ys
  for (const lane of lanes) {
    rowOf.set(lane.attempt, y);
    rows.push(y);
    parts.push(attempt(lane, chosen, place, y));
    y += place.row;
  }
  if (!lanes.length) {
    parts.push(...pending(chosen, place, y));
    y += place.row;
  }
  y += lanes.length ? 6 : 0;
  const children = new Map((chosen.children ?? []).map((child) => [child.id, child]));
  const links = [];
  for (const event of chosen.events ?? []) {
    parts.push(child(event, children.get(event.child), chosen, place, y));
    links.push(link(event, lanes, rowOf, place, y));
    rows.push(y);
    y += place.row;
  }
  return svg(
    "svg",
    {
      class: "chart",
      role: "img",
      "aria-label": describe(chosen),
      width,
      height: y + 26,
      viewBox: `0 0 ${width} ${y + 26}`,
    },
    hatch(),
    axis(place, y),
    drawnMoments.lines(y),
    links.map((pair) => pair[0]),
    parts,
    folds(place, rows, y),
    links.map((pair) => pair[1]),
    drawnMoments.texts,
  );
}

/** How many attempts have no lane. */
export function hiddenAttempts(chosen) {
  return Math.max(0, chosen.lanes.length - LANES);
}

/** All times at which something happened to the task or its children. */
function happenings({ task, lanes, children, events, moments }) {
  const rows = [{ ...task, lanes }, ...(children ?? [])];
  const marked = moments.filter((moment) => MARKED.includes(moment.what));
  const times = rows.flatMap((row) => [
    row.inserted_at,
    row.finished_at,
    ...(row.lanes ?? []).flatMap((lane) => [lane.from, lane.to]),
  ]);
  return [...times, ...[...(events ?? []), ...marked].map((one) => one.at)];
}

const isOpen = ({ task, lanes }) =>
  OPEN.includes(task.status) || lanes.some((lane) => lane.to == null);

/** When the last thing of a finished task, and of its children, has ended. */
function lastEnd({ task, lanes, children }) {
  const rows = [{ ...task, lanes }, ...(children ?? [])];
  const times = rows.flatMap((row) => [
    row.finished_at,
    ...(row.lanes ?? []).map((lane) => lane.to),
  ]);
  return Math.max(...times.filter((time) => time != null));
}

function name(text, place, y, quiet) {
  const most = Math.floor((place.isNarrow ? place.width : place.left - 16) / 7);
  const short = text.length > most ? `${text.slice(0, most - 1)}…` : text;
  return svg(
    "text",
    {
      x: place.isNarrow ? place.left : 0,
      y: y + (place.isNarrow ? 12 : 15),
      class: `name ${quiet ? "quiet" : ""} ${place.isNarrow ? "halo" : ""}`,
    },
    short,
  );
}

function attempt(lane, chosen, place, y) {
  const following = chosen.lanes.find((other) => other.attempt > lane.attempt);
  const parts = bars([lane], chosen.task, chosen.moments, place, y + place.names, following);
  const isFirst = lane === chosen.lanes[0];
  return svg(
    "g",
    { class: colour(lane.worker_key ?? "") },
    name(`attempt ${lane.attempt}`, place, y),
    isFirst && stretch("queued", chosen.task.inserted_at, lane.from, place, y + place.names),
    parts,
    outcome(lane, following, chosen.task, place, y + place.names),
  );
}

/** The task that nobody has claimed yet. */
function pending(chosen, place, y) {
  const top = y + place.names;
  return [
    name("nobody has claimed it", place, y, true),
    stretch("queued", chosen.task.inserted_at, chosen.task.finished_at ?? place.now, place, top),
    status(chosen.task.status, place, top),
  ];
}

/** The attempts of one row, and what the table said of it between them. */
function bars(lanes, row, moments, place, y, following) {
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
    const at = { y1: y + BAR / 2, y2: y + BAR / 2 };
    return [svg("line", { class: "suspended", x1: place.x(lane.to) + 4, x2: place.x(end), ...at })];
  }
  if (lane.end === "QUEUED") return [stretch("queued", lane.to, end, place, y)];
  if (!isCutOff(lane)) return [];
  const until = Math.min(requeuedAfter(lane.to, moments) ?? end, end);
  return [stretch("stale", lane.to, until, place, y), stretch("queued", until, end, place, y)];
}

const SAYS = { stale: "RUNNING, but nobody runs it", queued: "QUEUED" };

/** A stretch of time in which no worker has the row. */
function stretch(kind, from, to, place, y) {
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

const SAID = {
  killed: "",
  "worker ended": "",
  requeued: "taken from it",
  "fenced off": "refused",
  QUEUED: "put back",
};

/** How an attempt ended, right of its bar. */
function outcome(lane, following, task, place, y) {
  if (lane.end == null) return following ? "" : status(task.status, place, y);
  if (!following && OPEN.includes(task.status)) return status(task.status, place, y);
  return status(SAID[lane.end] ?? lane.end, place, y);
}

/** A row for an event: the child that it leads to, from its creation to its end. */
function child(event, child, chosen, place, y) {
  const isPast = event.abandoned_in != null;
  const top = y + place.names;
  if (!child) return svg("g", { class: isPast ? "past" : null }, eventName(event, child, place, y));
  const lanes = child.lanes ?? [];
  const claimed = lanes[0]?.from ?? child.finished_at ?? place.now;
  const isAsleep = child.status === "SLEEPING" || (!lanes.length && event.kind !== "TASK_STARTED");
  return svg(
    "g",
    { class: isPast ? "past" : null },
    eventName(event, child, place, y),
    isAsleep
      ? stretch("asleep", child.inserted_at, child.finished_at ?? place.now, place, top)
      : stretch("queued", child.inserted_at, claimed, place, top),
    bars(lanes, child, chosen.moments, place, top),
    status(child.status, place, top),
  );
}

/** Which event this is, and which task: both have numbers. */
function eventName(event, child, place, y) {
  const what = event.name ?? child?.name ?? event.kind;
  const numbers = `event ${event.event_id}${child ? `, task ${child.id}` : ""}`;
  if (place.isNarrow) return name(`${what} (${numbers})`, place, y);
  return svg("g", {}, name(what, place, y - 5), name(numbers, place, y + 8, true));
}

/** From the attempt that wrote the event down to the event's row. */
function link(event, lanes, rowOf, place, y) {
  const lane = lanes.findLast((one) => one.from <= event.at + LATE) ?? lanes[0];
  if (!lane || event.at < lane.from - LATE) return ["", ""];
  const x = Math.max(place.x(event.at), place.x(lane.from)).toFixed(1);
  const from = rowOf.get(lane.attempt) + place.names + BAR;
  const title = svg("title", {}, `event ${event.event_id}`);
  return [
    svg("path", { class: "link", d: `M${x} ${from + 4}V${y + place.names}` }),
    svg("circle", { class: "event", cx: x, cy: from + 4, r: 4.5 }, title),
  ];
}

/** The picture in words. */
function describe(chosen) {
  const lanes = chosen.lanes.map((lane) => {
    const worker = lane.worker_key ? ` on worker ${lane.worker_key}` : "";
    return `attempt ${lane.attempt}${worker}: ${lane.end ?? "running"}`;
  });
  const children = (chosen.children ?? []).map(
    (child) => `${child.name} ${child.status}, attempt ${child.attempt}`,
  );
  return [`task ${chosen.task.id}, ${chosen.task.status}`, ...lanes, ...children].join("; ");
}

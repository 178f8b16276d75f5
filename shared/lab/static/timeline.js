// The chosen task on an axis of time: a lane for each attempt, below them a row for each event.

import { colour, svg } from "./dom.js";
import { axis, BAR, folds, layout } from "./axis.js";
import { asleep, bars, LATE, OPEN, stretch } from "./bars.js";
import { hatch, marks, status } from "./marks.js";

const LANES = 6; // so many attempts have a lane; of more, the last ones
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
    row.wake_at < (row.finished_at ?? Infinity) ? row.wake_at : null,
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
  const row = { ...chosen.task, children: chosen.children };
  const parts = bars([lane], row, chosen.moments, place, y + place.names, following);
  const isFirst = lane === chosen.lanes[0];
  return svg(
    "g",
    { class: colour(lane.worker_key ?? "") },
    name(attemptName(lane, chosen), place, y),
    isFirst && stretch("queued", chosen.task.inserted_at, lane.from, place, y + place.names),
    parts,
    outcome(lane, following, chosen.task, place, y + place.names),
  );
}

/** Where the log has branches, with the one that the attempt was on: each ended before the next. */
function attemptName(lane, { task, branches }) {
  const words = `attempt ${lane.attempt}`;
  if (!branches?.length) return words;
  const left = branches.find((one) => lane.from < one.finished_at);
  return `${words}, branch ${left?.branch ?? task.branch}`;
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

const SAID = {
  killed: "",
  "worker ended": "",
  "fenced off": "refused",
  QUEUED: "put back",
};

/** How an attempt ended, right of its bar. */
function outcome(lane, following, task, place, y) {
  if (lane.end == null) return following ? "" : status(task.status, place, y);
  if (!following && OPEN.includes(task.status)) return status(task.status, place, y);
  if (lane.end === "requeued") return status(`taken from ${lane.worker_key}`, place, y);
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
      ? asleep(child, place, top)
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

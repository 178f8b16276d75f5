// The chosen task on an axis of time: a lane for each attempt, below them a row for each event.

import { colour, svg } from "./dom.js";
import { axis, hatch, kill, marks, status, textWidth } from "./marks.js";

const LANES = 6; // so many attempts have a lane; of more, the last ones
const BAR = 20;
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
  "requeued",
  "retry",
  "replay",
  "fork",
  "signal",
];

/** The picture, so many pixels wide. `now` is Postgres's clock. */
export function timeline(chosen, now, width) {
  const place = layout(chosen, now, width);
  const lanes = chosen.lanes.slice(-LANES);
  const moments = chosen.moments.filter(
    (moment) => MARKED.includes(moment.what) && moment.at >= place.from,
  );
  const drawnMoments = marks(moments, place);
  let y = drawnMoments.height;
  const parts = [];
  const rowOf = new Map(); // attempt -> y
  for (const lane of lanes) {
    rowOf.set(lane.attempt, y);
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
    links.map((pair) => pair[1]),
    drawnMoments.texts,
  );
}

/** How many attempts have no lane. */
export function hiddenAttempts(chosen) {
  return Math.max(0, chosen.lanes.length - LANES);
}

/** Where a time and a row are. A narrow picture has its names above the rows. */
function layout(chosen, now, width) {
  const isNarrow = width < 640;
  const left = isNarrow ? 4 : 206;
  const right = isNarrow ? 8 : 104;
  const first = chosen.lanes.slice(-LANES)[0]?.from ?? now;
  const from = Math.max(Math.min(chosen.task.inserted_at, first), first - 15);
  const isOpen =
    OPEN.includes(chosen.task.status) ||
    chosen.lanes.some((lane) => lane.to == null && lane.end == null);
  const known = [
    chosen.task.finished_at,
    ...chosen.lanes.map((lane) => lane.to),
    ...chosen.moments.map((moment) => moment.at),
    ...(chosen.children ?? []).flatMap((child) => [
      child.finished_at,
      ...(child.lanes ?? []).map((lane) => lane.to),
    ]),
  ].filter((time) => time != null);
  const to = Math.max(from + 6, isOpen ? now : Math.max(...known));
  const scale = (width - left - right) / (to - from);
  const x = (time) => left + (Math.min(Math.max(time, from), to) - from) * scale;
  return {
    from,
    to,
    x,
    left,
    end: width - right,
    width,
    isNarrow,
    now,
    row: isNarrow ? 44 : 31,
    names: isNarrow ? 18 : 0,
  };
}

function name(text, place, y, quiet) {
  const most = Math.floor((place.isNarrow ? place.width : place.left - 16) / 7);
  const short = text.length > most ? `${text.slice(0, most - 1)}…` : text;
  return svg(
    "text",
    {
      x: place.isNarrow ? place.left : 0,
      y: y + (place.isNarrow ? 12 : 15),
      class: quiet ? "quiet" : null,
    },
    short,
  );
}

function attempt(lane, chosen, place, y) {
  const following = chosen.lanes.find((other) => other.attempt > lane.attempt);
  const parts = bars([lane], chosen, place, y + place.names, following);
  return svg(
    "g",
    { class: colour(lane.worker_key ?? "") },
    name(`attempt ${lane.attempt}`, place, y),
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
    status(chosen.task.status, place.x(chosen.task.finished_at ?? place.now), place, top),
  ];
}

/** The bars of attempts in one row, and what the row of the table said between them. */
function bars(lanes, chosen, place, y, following) {
  return lanes.flatMap((lane, number) => {
    const next = lanes[number + 1] ?? following;
    const parts = [bar(lane, place, y)];
    if (lane.to != null) parts.push(...after(lane, next, chosen, place, y));
    if (lane.end === "killed" || lane.end === "worker ended")
      parts.push(kill(place.x(lane.to), y + BAR / 2));
    return parts;
  });
}

function bar(lane, place, y) {
  const x = place.x(lane.from);
  const width = Math.max(2, place.x(lane.to ?? place.now) - x);
  const isPast = lane.end === "fenced off" || lane.end === "requeued";
  return svg(
    "g",
    { class: `${colour(lane.worker_key ?? "")} ${isPast ? "past" : ""}` },
    svg(
      "rect",
      { class: "lane", x, y, width, height: BAR, rx: 3 },
      svg("title", {}, lane.text ?? `attempt ${lane.attempt}`),
    ),
    width > 16 &&
      lane.worker_key &&
      svg("text", { class: "on", x: x + 6, y: y + 14 }, lane.worker_key),
  );
}

/** From the end of an attempt until the next one: whose is the row meanwhile? */
function after(lane, next, chosen, place, y) {
  const end = next?.from ?? (OPEN.includes(chosen.task.status) ? place.now : lane.to);
  if (end <= lane.to) return [];
  if (lane.end === "SUSPENDED") {
    const height = y + BAR / 2;
    return [
      svg("line", {
        class: "suspended",
        x1: place.x(lane.to) + 4,
        x2: place.x(end),
        y1: height,
        y2: height,
      }),
    ];
  }
  if (lane.end === "QUEUED") return [stretch("queued", lane.to, end, place, y)];
  if (lane.end !== "killed" && lane.end !== "worker ended") return [];
  const requeued = chosen.moments.find(
    (moment) => moment.what === "requeued" && moment.at >= lane.to,
  );
  const until = Math.min(requeued?.at ?? end, end);
  return [stretch("stale", lane.to, until, place, y), stretch("queued", until, end, place, y)];
}

function stretch(kind, from, to, place, y) {
  const x = place.x(from);
  const width = place.x(to) - x;
  if (width < 1) return "";
  const says = { stale: "RUNNING, but nobody runs it", queued: "QUEUED" }[kind];
  return svg(
    "g",
    {},
    svg("rect", { class: kind, x: x + 0.5, y: y + 0.5, width, height: BAR - 1, rx: 2 }),
    says &&
      kind === "queued" &&
      width > textWidth(says) + 10 &&
      svg("text", { class: "quiet", x: x + 8, y: y + 14 }, says),
    says && kind === "stale" && svg("title", {}, says),
  );
}

const SAID = { killed: "", "worker ended": "", requeued: "taken from it", QUEUED: "put back" };

function outcome(lane, following, task, place, y) {
  if (lane.end == null) return following ? "" : status(task.status, place.x(place.now), place, y);
  const isStillStale = !following && OPEN.includes(task.status);
  const text = SAID[lane.end] ?? lane.end;
  const x = isStillStale ? place.x(place.now) : place.x(lane.to);
  return status(isStillStale ? task.status : text, x, place, y);
}

/** A row for an event: the child that it leads to, from its creation to its end. */
function child(event, child, chosen, place, y) {
  const label = `${event.event_id}  ${event.name ?? event.kind}`;
  const isPast = event.abandoned_in != null;
  const top = y + place.names;
  if (!child) return svg("g", { class: isPast ? "past" : null }, name(label, place, y));
  const lanes = child.lanes ?? [];
  const context = { task: child, moments: chosen.moments };
  const claimed = lanes[0]?.from ?? child.finished_at ?? place.now;
  const isAsleep = child.status === "SLEEPING" || (!lanes.length && event.kind !== "TASK_STARTED");
  const ends =
    child.finished_at ??
    (lanes.at(-1)?.to != null && !OPEN.includes(child.status) ? lanes.at(-1).to : place.now);
  return svg(
    "g",
    { class: isPast ? "past" : null },
    name(label, place, y),
    isAsleep
      ? stretch("asleep", child.inserted_at, child.finished_at ?? place.now, place, top)
      : stretch("queued", child.inserted_at, claimed, place, top),
    bars(lanes, context, place, top),
    status(child.status, place.x(ends), place, top),
  );
}

/** From the attempt that wrote the event down to the event's row. */
function link(event, lanes, rowOf, place, y) {
  const lane = lanes.findLast(
    (one) => one.from <= event.at + 0.05 && (one.to ?? place.now) >= event.at - 0.05,
  );
  const x = place.x(event.at);
  const to = y + place.names;
  if (!lane) return ["", ""];
  const from = rowOf.get(lane.attempt) + place.names + BAR;
  return [
    svg("path", { class: "link", d: `M${x.toFixed(1)} ${from}V${to}` }),
    svg(
      "circle",
      { class: "event", cx: x, cy: from - 1, r: 4.5 },
      svg("title", {}, `event ${event.event_id}`),
    ),
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

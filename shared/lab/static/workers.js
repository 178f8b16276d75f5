// Workers as cards, with the age of the heartbeat on an axis.

import { action, colour, el, seconds, svg } from "./dom.js";

const STATES = {
  starting: "starting",
  alive: "alive",
  frozen: "frozen, and knows nothing of it",
  stopping: "stopping: it ends what it can",
};

/** The cards. `late` is how many seconds ago the state was true. */
export function workers(state, late) {
  if (!state.workers.length) {
    const isWaiting = ["QUEUED", "RUNNING"].some((status) => state.queue?.[status]);
    const waits = isWaiting ? " What is in the queue waits." : "";
    return [el("p", { class: "none" }, `No worker runs.${waits}`)];
  }
  // Each keeps its place: a second click must not hit another one's button.
  const cards = state.workers.map((worker) => card(worker, state, late));
  if (state.workers.some((worker) => worker.state === "dead"))
    cards.push(action("clear", {}, "Forget the dead", { class: "small" }));
  return cards;
}

function card(worker, { lesson, database }, late) {
  return el(
    "article",
    {
      class: `worker ${colour(worker.key)} ${worker.state}`,
      "data-key": worker.key,
      "aria-label": `worker ${worker.key}`,
      tabindex: "-1",
    },
    el(
      "div",
      { class: "row" },
      el("span", { class: "name" }, worker.key),
      el("span", { class: `state ${isAmiss(worker) ? "failed" : ""}` }, stateText(worker)),
    ),
    el("p", { class: "small-print" }, `process ${worker.pid}${displayName(worker)}`),
    worker.error && el("pre", { tabindex: "0", "aria-label": "its last words" }, worker.error),
    lesson.inactive_after != null &&
      pulse(worker, lesson.inactive_after, late, database.state !== "up"),
    worker.state !== "dead" && worker.slots && slots(worker),
    (worker.state !== "dead" && worker.held ? worker.held : []).map(heldAt),
    worker.state !== "dead" && buttons(worker),
  );
}

// By itself, or by a SIGTERM that was wanted and that it has no answer to yet.
const hasStopped = (worker) => worker.asked && [0, 143, -15].includes(worker.exit);
const isAmiss = (worker) => worker.state === "dead" && worker.exit !== 0 && !hasStopped(worker);

function stateText(worker) {
  if (worker.state !== "dead") return STATES[worker.state] ?? worker.state;
  if (worker.exit === -9) return "killed";
  if (hasStopped(worker)) return "stopped, as asked";
  if (worker.exit == null) return "dead";
  return worker.exit === 0 ? "ended" : `ended, status ${worker.exit}`;
}

function displayName(worker) {
  return worker.display_name ? `, known as ${worker.display_name}` : "";
}

function withoutHeartbeat(worker, isAway) {
  if (isAway) return "Its heartbeat cannot be read at the moment.";
  return worker.state === "starting" ? "No heartbeat yet." : "It has no row in workers any more.";
}

function pulse(worker, limit, late, isAway) {
  if (worker.heartbeat_age == null) {
    return el("p", { class: "small-print" }, withoutHeartbeat(worker, isAway));
  }
  const age = Math.max(0, worker.heartbeat_age + late);
  const scale = 1.5 * limit; // seconds from left to right
  const x = `${(Math.min(1, age / scale) * 100).toFixed(1)}%`;
  const isLate = age > limit;
  const label = `heartbeat ${seconds(age)} ago`;
  return svg(
    "svg",
    { class: "pulse", role: "img", "aria-label": `last ${label}; inactive after ${seconds(limit)}` },
    svg("line", { x1: 0, x2: "100%", y1: 10, y2: 10 }),
    svg("line", { class: "limit", x1: "66.7%", x2: "66.7%", y1: 2, y2: 18 }),
    svg("circle", { class: isLate ? "late" : "", cx: x, cy: 10, r: 6 }),
    svg("text", { x: 0, y: 35 }, label),
    svg("text", { x: "66.7%", y: 35, "text-anchor": "middle" }, `inactive after ${limit} s`),
  );
}

function slots({ slots, state }) {
  const since = state === "frozen" ? ", as it last said" : "";
  return el(
    "div",
    { class: "slots" },
    Object.entries(slots).flatMap(([kind, [used, limit]]) => [
      el("span", {}, `${kind} slots`),
      bar(used, limit),
      el("span", {}, `${used} of ${limit}${since}`),
    ]),
  );
}

function bar(used, limit) {
  const share = limit ? Math.min(1, used / limit) : 0;
  return svg(
    "svg",
    { "aria-hidden": "true" },
    svg("rect", { x: 0.5, y: 0.5, width: "99%", height: 7, rx: 3.5 }),
    used > 0 &&
      svg("rect", {
        class: "used",
        width: `${Math.max(3, 99 * share).toFixed(1)}%`,
        height: 8,
        rx: 4,
      }),
  );
}

function heldAt(held) {
  const [name, place] = held.gate.split(":");
  return el(
    "p",
    { class: "held" },
    `task ${held.task} is held in ${name}: ${PLACES[place] ?? place}`,
  );
}

const PLACES = {
  start: "at its start",
  charged: "the customer is charged, no outcome is written",
  between: "between two steps",
  sent: "the email is out, no outcome is written",
  end: "after the last step",
};

function buttons(worker) {
  const body = { worker: worker.key };
  const button = (name, text, title, attributes) =>
    action(name, body, text, {
      class: "small",
      title,
      "data-key": name,
      "aria-label": `${text}: worker ${worker.key}`,
      ...attributes,
    });
  const frozen = worker.state === "frozen";
  return el(
    "div",
    { class: "buttons" },
    button("kill", "Kill -9", "SIGKILL: it cannot even say goodbye", { class: "small danger" }),
    frozen
      ? button("thaw", "Thaw", "SIGCONT: it goes on as if nothing had been")
      : button("freeze", "Freeze", "SIGSTOP: as if a laptop's lid were closed"),
    !frozen && button("stop", "Stop", "SIGTERM: it is told to end"),
    button("cut_connections", "Cut connections", "Postgres ends all its sessions"),
  );
}

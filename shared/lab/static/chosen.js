// The chosen task: what it is, its timeline, and what can be done to it.

import { action, el, text } from "./dom.js";
import { legend } from "./legend.js";
import { hiddenAttempts, timeline } from "./timeline.js";

const NO_TASK = "Enqueue an order, or choose a task of the queue.";
const NO_ORDER = "The scene has no order yet.";

/** All of the panel. */
export function chosenTask(state, now, width) {
  const chosen = state.chosen;
  if (!chosen)
    return [el("p", { class: "none" }, state.scene ? NO_ORDER : NO_TASK)];
  const hidden = hiddenAttempts(chosen);
  const picture = timeline(chosen, now, width);
  return [
    head(chosen.task),
    hidden > 0 && el("p", { class: "quiet" }, `${hidden} earlier attempts are not drawn.`),
    picture,
    legend(picture),
    extras(chosen),
    hand(chosen, state.lesson.abilities),
  ].filter(Boolean);
}

function head(task) {
  const numbers = [
    task.attempt ? `attempt ${task.attempt}` : "not claimed yet",
    task.retry_count ? `${task.retry_count} retried` : null,
    task.lost_count ? `${task.lost_count} times lost` : null,
    task.branch > 1 ? `branch ${task.branch}` : null,
    task.is_durable ? "durable" : null,
  ];
  return el(
    "div",
    { class: "head" },
    el("b", {}, `Task ${task.id}: ${task.name}`),
    el("span", { class: `status s-${task.status}` }, task.status),
    el("span", { class: "quiet" }, numbers.filter(Boolean).join(", ")),
  );
}

/** What else the tables say of it. */
function extras(chosen) {
  const pairs = [["output", chosen.task.output == null ? null : text(chosen.task.output)]];
  if (chosen.payments && chosen.task.name !== "pack_parcel") pairs.push(["payments", payments(chosen.payments)]);
  for (const signal of chosen.signals ?? []) {
    const fate =
      signal.received_by == null
        ? "nobody has received it"
        : `received by wait ${signal.received_by}`;
    pairs.push([`signal ${signal.name}`, `${text(signal.payload)}, ${fate}`]);
  }
  for (const branch of chosen.branches ?? []) {
    pairs.push([`branch ${branch.branch}`, `${branch.status}, left at event ${branch.from_event}`]);
  }
  const shown = pairs.filter((pair) => pair[1]);
  if (!shown.length) return null;
  return el(
    "dl",
    { class: "extra" },
    shown.map(([name, value]) =>
      el("div", {}, el("dt", {}, name), el("dd", { class: "mono" }, value)),
    ),
  );
}

function payments(rows) {
  if (!rows.length) return "none";
  const key = (row) => (row.idempotency_key == null ? "" : `, key ${row.idempotency_key}`);
  return rows.map((row) => `${row.amount}${key(row)}`).join("; ");
}

function hand(chosen, abilities) {
  const task = { task: chosen.task.id };
  const isFinished = ["COMPLETED", "FAILED"].includes(chosen.task.status);
  const isTop = chosen.task.parent == null;
  const can = (what) => abilities.includes(what) && chosen.task.is_durable && isTop;
  const parts = [];
  if (can("retry") && chosen.task.status === "FAILED")
    parts.push(button("retry", task, "Retry", "It is queued again; steps that are completed do not run again"));
  if (can("replay") && isFinished)
    parts.push(button("replay", task, "Replay", "It is queued again, and all its steps run again"));
  if (can("fork") && isFinished) parts.push(fork(task, chosen));
  if (can("signal") && !isFinished) parts.push(...signal(task));
  return parts.length
    ? el(
        "div",
        {
          class: "buttons hand",
          role: "group",
          "aria-label": "What can be done to it",
          "data-key": "hand",
        },
        parts,
      )
    : null;
}

function button(name, task, text, title, attributes) {
  return action(name, task, text, { class: "small", title, "data-key": name, ...attributes });
}

/** A group of its own: its number is no other button's. */
function fork(task, chosen) {
  const last = Math.max(
    0,
    ...(chosen.events ?? [])
      .filter((event) => event.abandoned_in == null)
      .map((event) => event.event_id),
  );
  const title = "What is before this event is kept; the rest runs again, on a new branch";
  return el(
    "span",
    { class: "group", "data-key": "fork-group" },
    button("fork", task, "Fork", title, { "data-inputs": "event" }),
    el(
      "label",
      { "data-key": "fork-at" },
      "from event ",
      el("input", {
        type: "text",
        inputmode: "numeric",
        class: "number",
        name: "event",
        value: last || 1,
        pattern: "[0-9]+",
      }),
    ),
  );
}

function signal(task) {
  return [
    el(
      "label",
      { "data-key": "signal-name" },
      "signal ",
      el("input", { type: "text", name: "name", value: "approval" }),
    ),
    el(
      "label",
      { "data-key": "signal-payload" },
      "payload ",
      el("input", { type: "text", name: "payload", value: '{"by": "you"}' }),
    ),
    action("signal", task, "Send", {
      class: "small",
      "data-key": "signal",
      "data-inputs": "name payload",
    }),
  ];
}

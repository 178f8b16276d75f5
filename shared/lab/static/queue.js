// The queue: how many tasks have which status, the newest tasks, and what can be enqueued.

import { action, chip, el } from "./dom.js";

const NEWEST = 30; // so many the server lists
const ENQUEUE = [
  ["order", 1, "An order"],
  ["slow_order", 1, "A slow one", "Each step takes five seconds"],
  ["order", 10, "Ten"],
  ["order", 1000, "A thousand"],
  ["failing_order", 1, "One that fails", "The email's first attempt fails; a retry succeeds"],
  ["sleeper", 1, "One that sleeps"],
  ["approval", 1, "One to approve"],
  ["plain", 1, "A parcel"],
];

/** The buttons that enqueue what this lesson's tasks can do. */
export function enqueueButtons(state) {
  const kinds = state.lesson.kinds ?? ["order"];
  return ENQUEUE.filter(([kind]) => kinds.includes(kind)).map(([kind, count, text, title]) =>
    action("enqueue", { kind, count }, text, { class: "small", title }),
  );
}

/** Counts and the newest tasks, each a button that chooses it. */
export function queue(state, chosen) {
  const counts = Object.entries(state.queue ?? {}).map(([status, count]) =>
    el(
      "div",
      { class: count ? "" : "zero", "data-key": status },
      el("b", {}, count.toLocaleString("en")),
      el("span", { class: `status s-${status}` }, status),
    ),
  );
  const tasks = family(state.tasks).map((task) => item(task, chosen));
  return [
    el("div", { class: "counts", "data-key": "counts" }, counts),
    notes(state) && el("p", { class: "quiet", "data-key": "notes" }, notes(state)),
    tasks.length > 0 &&
      action("empty", {}, "Reset the lab", {
        class: "small",
        "data-key": "empty",
        title: "Kills all workers, and deletes all tasks",
      }),
    tasks.length
      ? el("ol", { class: "tasks", "aria-label": "The newest tasks" }, tasks)
      : el("p", { class: "none" }, "The queue is empty."),
  ].filter(Boolean);
}

/** What the numbers count, and the list leaves out. */
function notes({ lesson, tasks }) {
  const isCut = tasks.length >= NEWEST;
  if (!tasks.length) return "";
  const cut = `The list shows ${NEWEST} tasks: the chosen one, those that failed or run, then the newest.`;
  return [lesson.abilities?.includes("durable") && "The numbers include steps.", isCut && cut]
    .filter(Boolean)
    .join(" ");
}

/** Parents newest first, each followed by its children in their order. */
function family(tasks) {
  const ids = new Set(tasks.map((task) => task.id));
  const children = groupByParent(tasks, ids);
  const withChildren = (task) => [
    task,
    ...(children.get(task.id) ?? []).sort((one, other) => one.id - other.id).flatMap(withChildren),
  ];
  return (children.get(null) ?? []).sort((one, other) => other.id - one.id).flatMap(withChildren);
}

function groupByParent(tasks, ids) {
  const groups = new Map();
  for (const task of tasks) {
    const parent = ids.has(task.parent) ? task.parent : null;
    groups.set(parent, [...(groups.get(parent) ?? []), task]);
  }
  return groups;
}

/** A step that no log leads to any more, and by its input the task whose replay that was. */
function leftBy({ is_left: isLeft, left_by: task }) {
  return isLeft && el("i", {}, task ? ` left by a replay of ${task}` : " left by a replay");
}

function item(task, chosen) {
  const isRerun = task.attempt > 1;
  return el(
    "li",
    { class: task.parent ? "child" : "", "data-key": `task-${task.id}` },
    el(
      "button",
      {
        class: "plain",
        "data-choose": task.id,
        title: isRerun ? `${task.attempt} attempts` : null,
        "aria-current": task.id === chosen ? "true" : null,
      },
      el("span", { class: "id" }, String(task.id)),
      el("span", { class: "of" }, task.name, leftBy(task)),
      el("span", { class: "again" }, isRerun && `×${task.attempt}`),
      el("span", { class: `status s-${task.status}` }, task.status),
      chip(task.worker_key) ?? el("span"),
    ),
  );
}

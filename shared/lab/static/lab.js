// The page: it listens to the server's stream, shows what comes, and sends what is clicked.

import { chosenTask } from "./chosen.js";
import { showDiff } from "./diff.js";
import { action, el, morph } from "./dom.js";
import { lastNumber, show as showLog, take } from "./log.js";
import { enqueueButtons, queue } from "./queue.js";
import { scene } from "./scene.js";
import { workers } from "./workers.js";

const NEXT = "button.primary, .choices button, .programme button, .working";
const TICK = 500; // ms between two looks at the clock while a task is open; each costs a repaint
const IDLE_TICK = 1000; // and while only heartbeats grow older

const REPEATED = ["start_worker", "enqueue"]; // who clicks twice wants two

const $ = (id) => document.getElementById(id);
let state = null; // the server's last word
let received = 0; // when it came, by performance.now()
let chosen = null; // the id of the task that the reader, or a scene, has chosen
let follows = undefined; // what the server chose last
let playing = undefined; // the name of the scene that is played
let stream = null;

/** How many seconds ago the state was true. */
const late = () => (performance.now() - received) / 1000;

/** Listen, while the tab is seen: a browser has six connections to the lab for all tabs. */
function connect() {
  stream?.close();
  if (document.hidden) return;
  const task = chosen == null ? "" : `task=${chosen}&`;
  stream = new EventSource(`/api/stream?${task}seen=${lastNumber()}`);
  stream.addEventListener("state", (event) => receive(JSON.parse(event.data)));
  stream.addEventListener("log", (event) => {
    take(JSON.parse(event.data));
    renderLog();
  });
  stream.addEventListener("open", () => fault(null));
  stream.addEventListener("error", () =>
    fault(
      "The lab does not answer. If it has ended, start it again in its terminal, and open the address that it prints.",
    ),
  );
}

function receive(news) {
  if (news.now != null) received = performance.now();
  // While the database is away, the tables are shown as they were when last seen.
  state = news.now == null ? { tasks: [], ...state, ...news, chosen: state?.chosen } : news;
  // A reload keeps what the address names.
  if (state.choose !== (follows === undefined ? null : follows)) choose(state.choose);
  follows = state.choose;
  // A scene that has no order yet shows none: not the one that was looked at before.
  const scene = state.scene?.name ?? null;
  if (playing !== undefined && scene && scene !== playing && state.choose == null) choose(null);
  playing = scene;
  const newest = state.tasks.find((task) => task.parent == null);
  if (chosen == null && newest && !state.scene) choose(newest.id);
  fault(state.lesson.error);
  render();
}

function choose(id) {
  if (id === chosen) return;
  chosen = id;
  history.replaceState(null, "", id == null ? location.pathname : `#task-${id}`);
  connect();
}

function render() {
  const { lesson, database } = state;
  document.title = `The lab: lesson ${lesson.number}`;
  morph($("lesson"), [
    document.createTextNode(`Lesson ${lesson.number}: ${lesson.name.replaceAll("-", " ")}`),
  ]);
  $("database").className = `database ${database.state}`;
  morph($("database"), databaseParts(database));
  renderScene();
  morph($("enqueue"), enqueueButtons(state));
  morph($("queue"), queue(state, chosen));
  renderWhatMoves();
  renderLog();
}

/** Who plays a scene with the keyboard stays in it, although the buttons are others each time. */
function renderScene() {
  const isInside = $("scene").contains(document.activeElement);
  morph($("scene"), scene(state));
  if (isInside && !$("scene").contains(document.activeElement))
    $("scene").querySelector(NEXT)?.focus();
}

/** What changes with the clock alone. */
function renderWhatMoves() {
  if (!state || document.hidden) return;
  renderWorkers();
  const isShown = state.chosen?.task.id === chosen;
  if (isShown || !state.chosen)
    morph($("timeline"), chosenTask(state, state.now + late(), $("timeline").clientWidth || 600));
}

/** Whose card's button is gone stays with the card; whose card is gone, with the next thing to do. */
function renderWorkers() {
  const card = document.activeElement.closest?.("#workers .worker");
  const isInside = $("workers").contains(document.activeElement);
  morph($("workers"), workers(state, late()));
  if (!isInside || $("workers").contains(document.activeElement)) return;
  (card?.isConnected ? card : document.querySelector("[data-action=start_worker]")).focus();
}

function databaseParts(database) {
  const whose = database.embedded ? "Postgres" : "Postgres at DATABASE_URL";
  return [
    el("span", { role: "status" }, `${whose} is ${database.state}`),
    database.embedded &&
      action("restart_postgres", {}, "Restart", {
        class: "small",
        "aria-label": "Restart Postgres",
      }),
  ].filter(Boolean);
}

function renderLog() {
  const task = state?.chosen;
  const isOfAll = $("log-all").checked || !task;
  showLog(
    $("log"),
    isOfAll ? null : new Set([task.task.id, ...(task.children ?? []).map((child) => child.id)]),
  );
}

function fault(text) {
  $("fault").hidden = !text;
  if ($("fault").textContent !== (text ?? "")) $("fault").textContent = text ?? "";
}

/** Show an error for a while. */
function notice(text) {
  $("notice").replaceChildren(el("p", {}, text));
  setTimeout(() => text === $("notice").textContent && $("notice").replaceChildren(), 8000);
}

async function send(name, body) {
  const answer = await fetch(`/api/${name}`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  });
  const result = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(result.error ?? "The lab has a fault. Its terminal says more.");
  return result;
}

async function act(button) {
  if (button.ariaBusy === "true" && !REPEATED.includes(button.dataset.action)) return;
  button.ariaBusy = "true";
  try {
    const body = { ...JSON.parse(button.dataset.body ?? "{}"), ...inputs(button) };
    const result = await send(button.dataset.action, body);
    if (result.first != null) choose(result.first);
    $("notice").replaceChildren();
  } catch (error) {
    notice(error instanceof TypeError ? "The lab does not answer." : error.message);
  } finally {
    button.ariaBusy = null;
  }
}

/** What stands in the inputs next to a button. */
function inputs(button) {
  const values = {};
  for (const name of (button.dataset.inputs ?? "").split(" ").filter(Boolean)) {
    const value = button.parentElement.querySelector(`[name=${name}]`).value;
    values[name] = name === "name" ? value : parse(value);
  }
  return values;
}

function parse(value) {
  try {
    return JSON.parse(value);
  } catch {
    throw new Error(`That is not JSON: ${value}`);
  }
}

function showTab(name) {
  for (const tab of document.querySelectorAll("[role=tab]")) {
    const isThis = tab.id === `tab-${name}`;
    tab.ariaSelected = String(isThis);
    tab.tabIndex = isThis ? 0 : -1;
    $(tab.getAttribute("aria-controls")).hidden = !isThis;
  }
  if (name === "diff") showDiff($("diff"), state, notice);
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button?.dataset.action) act(button);
  else if (button?.dataset.choose) choose(Number(button.dataset.choose));
  else if (button?.role === "tab") showTab(button.id.slice(4));
});
document.querySelector("[role=tablist]").addEventListener("keydown", (event) => {
  if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
  const other = document.querySelector("[role=tab][aria-selected=false]");
  showTab(other.id.slice(4));
  other.focus();
});
$("log-all").addEventListener("change", renderLog);
addEventListener("resize", renderWhatMoves);
document.addEventListener("visibilitychange", connect);

function tick() {
  if (late() > TICK / 2000) renderWhatMoves(); // else it has just been drawn
  const isOpen = state?.chosen && !["COMPLETED", "FAILED"].includes(state.chosen.task.status);
  setTimeout(tick, isOpen ? TICK : IDLE_TICK);
}
tick();

const address = location.hash.match(/^#task-(\d+)$/);
if (address) chosen = Number(address[1]);
connect();

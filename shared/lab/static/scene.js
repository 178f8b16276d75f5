// Scenes: one sentence at a time, a question before what follows, the tables' own rows as the answer.

import { action, el, text } from "./dom.js";

/** The scene that is played, or the programme. */
export function scene(state) {
  return state.scene ? played(state.scene) : programme(state.scenes ?? []);
}

function programme(scenes) {
  if (!scenes.length)
    return [el("p", { class: "quiet" }, "This lesson has no scenes. Do with it what you like.")];
  return [
    el("h2", {}, "Scenes"),
    el(
      "ol",
      { class: "programme" },
      scenes.map(({ name, title }) =>
        el("li", { "data-key": name }, action("scene", { name }, title, { class: "plain" })),
      ),
    ),
  ];
}

function played(scene) {
  return [
    el(
      "div",
      { class: "over", "data-key": "over" },
      el("h2", {}, `Scene: ${scene.title}`),
      !scene.done && action("scene_stop", {}, "Leave the scene", { class: "small" }),
    ),
    el(
      "div",
      { "aria-live": "polite", "data-key": "words" },
      scene.answer && answer(scene.answer),
      el("p", { class: "sentence" }, scene.sentence),
      scene.rows && table(scene.rows),
      scene.question && el("p", { class: "question" }, scene.question),
      scene.said && el("p", { class: "answer" }, `You said “${scene.said}”.`),
      scene.error && el("p", { class: "failed" }, `The scene cannot go on. ${scene.error}`),
    ),
    scene.choices && choices(scene),
    !scene.choices && next(scene),
  ].filter(Boolean);
}

function answer({ asked, given, right, is_right: isRight }) {
  return el(
    "p",
    { class: "answer" },
    el("span", { class: "quiet" }, `${asked} `),
    el(
      "span",
      { class: `verdict ${isRight ? "right" : "wrong"}` },
      isRight ? "Right:" : "Not quite.",
    ),
    isRight ? " " : ` You said “${given}”. It was: `,
    el("span", { class: "truth" }, right),
  );
}

function choices(scene) {
  return el(
    "div",
    { class: "choices", role: "group", "aria-label": "Your answer", "data-key": "choices" },
    scene.choices.map((choice) => action("scene_next", { answer: choice }, choice)),
  );
}

/** What leads on; or, while the scene is on its way, what to watch. */
function next(scene) {
  const button = () =>
    scene.done
      ? action("scene_stop", {}, "To the other scenes", { class: "primary" })
      : action("scene_next", {}, scene.button, { class: "primary" });
  return el(
    "div",
    { class: "buttons", "data-key": "next" },
    // It takes the focus, so that who plays with the keyboard is not lost meanwhile.
    scene.busy
      ? el("span", { class: "working", role: "status", tabindex: "-1" }, scene.busy)
      : button(),
  );
}

function table({ title, rows }) {
  if (!rows.length) return el("p", { class: "quiet" }, `${title}: no rows`);
  const columns = Object.keys(rows[0]);
  return el(
    "div",
    { class: "rows", tabindex: "0", role: "group", "aria-label": title },
    el(
      "table",
      {},
      el("caption", {}, title),
      el(
        "thead",
        {},
        el(
          "tr",
          {},
          columns.map((column) => el("th", { scope: "col" }, column)),
        ),
      ),
      el(
        "tbody",
        {},
        rows.map((row) =>
          el(
            "tr",
            {},
            columns.map((column) => el("td", {}, text(row[column]))),
          ),
        ),
      ),
    ),
  );
}

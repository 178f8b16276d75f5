// Scenes: one sentence at a time, a question before what follows, the tables' own rows as the answer.

import { action, clock, el, text } from "./dom.js";

/** The scene that is played, or the programme. */
export function scene(state) {
  const scenes = state.scenes ?? [];
  return state.scene ? played(state.scene, scenes) : programme(scenes);
}

function programme(scenes) {
  if (!scenes.length)
    return [el("p", { class: "quiet" }, "This lesson has no scenes. Do with it what you like.")];
  return [
    el(
      "p",
      { class: "hint" },
      `The lesson runs here for real, and you can break it. ${where(scenes)}`,
    ),
    el("h2", {}, "Scenes"),
    el("ol", { class: "programme" }, scenes.map((one) => entry(one, scenes))),
  ];
}

/** Where to begin: with the first scene that was not played yet. */
function where(scenes) {
  const next = scenes.findIndex(({ played }) => !played) + 1;
  const [first, hand] = ["start a worker and enqueue an order.", `Start with scene ${next}, or `];
  return next ? hand + first : first[0].toUpperCase() + first.slice(1);
}

function entry({ name, title, moment, own, played }, all) {
  const isMarked = own && all.some((other) => !other.own);
  return el(
    "li",
    { "data-key": name },
    action("scene", { name }, title),
    el(
      "span",
      { class: "quiet" },
      [moment && `moment ${moment}`, isMarked && "this lesson's own", played && "✓ played"].filter(Boolean).join(", "),
    ),
  );
}

const ORDINALS = ["", "first", "second", "third", "fourth", "fifth"];

function played(scene, scenes) {
  const number = scenes.findIndex(({ name }) => name === scene.name) + 1;
  const moment = scene.moment ? ` (the ${ORDINALS[scene.moment]} moment)` : "";
  return [
    el(
      "div",
      { class: "over", "data-key": "over" },
      el("h2", {}, `Scene ${number}: ${scene.title}${moment}`),
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
    !scene.choices && next(scene, scenes[number]),
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
function next(scene, following) {
  const buttons = () => {
    if (!scene.done) return [action("scene_next", {}, scene.button, { class: "primary" })];
    const others = action("scene_stop", {}, "To the other scenes", {
      class: following ? null : "primary",
    });
    if (!following) return [others];
    const { name, title } = following;
    return [action("scene", { name }, "Next scene", { class: "primary", title }), others];
  };
  return el(
    "div",
    { class: "buttons", "data-key": "next" },
    // It takes the focus, so that who plays with the keyboard is not lost meanwhile.
    scene.busy
      ? el("span", { class: "working", role: "status", tabindex: "-1" }, scene.busy)
      : buttons(),
  );
}

function table({ title, rows, at }) {
  if (!rows.length) return el("p", { class: "quiet" }, `${title}, at ${clock(at)}: no rows`);
  const columns = Object.keys(rows[0]);
  return el(
    "div",
    { class: "rows", tabindex: "0", role: "group", "aria-label": title },
    el(
      "table",
      {},
      el("caption", {}, `${title}, at ${clock(at)}`),
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

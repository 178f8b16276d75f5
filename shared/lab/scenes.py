"""Scenes: crashes and waits, played step by step on real workers.

A scene makes its moment certain by gates in the lab's own task functions. The lesson is as it is.
"""

import asyncio
import logging
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psycopg

from shared.errors import error_text
from shared.lab import crashes as c
from shared.lab import stops as s
from shared.lab import waits as w
from shared.lab.errors import LabError
from shared.lab.hand import Hand
from shared.lab.lesson import OpenLesson
from shared.lab.step import Play, Step
from shared.outages import one_line

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scene:
    """A play, and what a lesson must be able to do, and what not, for it to be true there."""

    name: str
    title: str
    play: Play
    needs: frozenset[str] | set[str]
    without: frozenset[str] | set[str] = frozenset()
    moment: int | None = None  # of the five that the README of lesson 07 has
    of: str | None = None  # the lesson that is about it


def moment(number: int, name: str, title: str, play: Play) -> Scene:
    """A moment of a crash. An order that is suspended while it waits cannot be lost there."""
    return Scene(name, title, play, {"durable"}, {"suspension"}, number, "07")


SCENES = [
    Scene(
        "charged-twice",
        "Killed half-way through an order",
        c.charged_twice,
        {"heartbeats", "payments"},
        {"events"},
        of="04",
    ),
    moment(1, "before-event", "Killed before event and child are committed", c.before_the_event),
    moment(2, "before-claim", "Killed before anybody claims the child", c.before_the_claim),
    moment(3, "child-runs", "Killed while the child runs", c.while_the_child_runs),
    moment(3, "after-charge", "Killed after the charge, before its outcome", c.after_the_charge),
    moment(4, "between", "Killed between two steps", c.between_two_steps),
    moment(4, "after-last", "Killed after the last step", c.after_the_last_step),
    moment(5, "frozen", "Frozen, and back", s.refused_a_step),
    Scene("frozen", "Frozen, and back", s.fenced_off, {"heartbeats"}, {"durable"}, of="04"),
    Scene("frozen", "Frozen, and back", s.fenced_off, {"suspension"}),
    Scene("stop", "Told to stop", s.told_to_stop, {"graceful_stop", "durable"}, of="09"),
    Scene(
        "sleep", "Killed while an order sleeps", w.slept_through, {"sleep"}, {"suspension"}, of="12"
    ),
    Scene("suspended", "Killed, and nothing is lost", w.nobodys, {"suspension"}, of="13"),
    Scene("early-signal", "Approved before it has asked", w.early_signal, {"signal"}, of="14"),
    Scene("late-signal", "Approved while no worker runs", w.signal_to_nobody, {"signal"}, of="14"),
    Scene("fork", "Only the email again", w.forked, {"fork"}, of="15"),
]


def about(scene: Scene, lesson: OpenLesson) -> dict[str, Any]:
    """What the page says of a scene. Only one lesson's README counts the moments."""
    shown: dict[str, Any] = {"name": scene.name, "title": scene.title}
    if scene.of == lesson.number:
        shown["own"] = True
    has_moment = scene.moment is not None and lesson.number == "07"
    return shown | {"moment": scene.moment} if has_moment else shown


def of_lesson(lesson: OpenLesson) -> list[Scene]:
    """What can be played on this lesson: first what it is about."""
    can = lesson.abilities
    found = [scene for scene in SCENES if scene.needs <= can and not scene.without & can]
    return sorted(found, key=lambda scene: scene.of != lesson.number)


class Performance:
    """One scene while it is played."""

    def __init__(self, scene: Scene, lab: Hand) -> None:
        self.scene = scene
        self.lab = lab
        self._steps = scene.play(lab)
        self._step: Step | None = None
        self._asked: str | None = None  # the last question
        self._given: str | None = None  # and the reader's answer
        self._error: str | None = None
        self._work: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        """Come to the first step."""
        await self._advance(None)

    def go_on(self, answer: str | None) -> None:
        """Work towards the next step, in the background: that may take as long as a takeover."""
        if self._step is None or self.is_done():
            raise LabError("the scene is over")
        if self._work is not None:
            raise LabError("the scene is on its way to the next step")
        if self._step.choices and answer not in self._step.choices:
            raise LabError("the question wants one of its answers")
        self._asked, self._given = self._step.question, answer
        self._work = asyncio.create_task(self._advance(answer))

    async def end(self) -> None:
        """Leave it, wherever it is."""
        if self._work is not None:
            self._work.cancel()
            await asyncio.wait([self._work])
        with suppress(psycopg.Error):  # of what it has open in a database that is away
            await self._steps.aclose()

    async def _advance(self, answer: str | None) -> None:
        try:
            self._step = await self._steps.asend(answer)
        except (LabError, psycopg.Error) as error:
            # The reader, or the reader's lesson, has done what the scene is not about.
            self._error = one_line(error)
        except Exception as error:
            log.exception("scene %s", self.scene.name)
            self._error = error_text(error)
        finally:
            self._work = None
        self.lab.touch()

    def is_done(self) -> bool:
        """Whether nothing follows."""
        return self._error is not None or self.is_played()

    def is_played(self) -> bool:
        """Whether it has come to its end."""
        return self._error is None and self._step is not None and self._step.is_last

    def state(self) -> dict[str, Any] | None:
        """What the page shows."""
        if (step := self._step) is None:
            return None
        shown: dict[str, Any] = {
            **about(self.scene, self.lab.lesson),
            "sentence": step.sentence,
            "question": step.question,
            "rows": step.rows and vars(step.rows),
            "button": step.button,
            "busy": step.meanwhile if self._work is not None else None,
            "said": self._given if self._work is not None else None,
            "choices": None if self._work is not None or self._error else step.choices or None,
            "answer": self._answer(step),
            "error": self._error,
            "done": self.is_done(),
        }
        return {name: value for name, value in shown.items() if value is not None}

    def _answer(self, step: Step) -> dict[str, Any] | None:
        if step.right is None or self._work is not None:
            return None
        return {
            "asked": self._asked,
            "given": self._given,
            "right": step.right,
            "is_right": self._given == step.right,
        }


class Player:
    """Plays the lab's scenes, one at a time."""

    def __init__(self, lab: Hand) -> None:
        self.lab = lab
        self._performance: Performance | None = None
        self._played: set[str] = set()  # to their ends
        self._leaving = asyncio.Lock()  # two tabs may want to at once

    def programme(self) -> list[dict[str, Any]]:
        """The scenes of the lesson, and whether they have been played."""
        lesson = self.lab.lesson
        return [
            about(scene, lesson) | {"played": scene.name in self._played}
            for scene in of_lesson(lesson)
        ]

    async def start(self, name: str) -> None:
        """Begin a scene: whatever worker runs is killed, and the first step is shown.

        Raises LabError while tasks are open: a worker would be held at a gate in one of these.
        """
        scene = next((one for one in of_lesson(self.lab.lesson) if one.name == name), None)
        if scene is None:
            raise LabError(f"there is no scene {name!r} in this lesson")
        if count := await self.lab.open_tasks():
            tasks = f"{count} open tasks" if count > 1 else "an open task"
            raise LabError(
                f"The queue still has {tasks}, and a scene needs the workers for itself. "
                "Start a worker and let it finish, or press “Reset the lab”."
            )
        await self.stop()
        await self.lab.stop_all()
        self.lab.choose(None)
        self.lab.record.say("scene", f"the scene begins: {scene.title}")
        self._performance = Performance(scene, self.lab)
        await self._performance.begin()

    async def next(self, answer: str | None = None) -> None:
        """Go on to the next step, with the reader's answer if there is a question."""
        if self._performance is None:
            raise LabError("no scene is being played")
        self._performance.go_on(answer)
        self.lab.touch()

    async def stop(self) -> None:
        """Leave the scene. Its workers stay; its gates do not."""
        async with self._leaving:
            if self._performance is not None:
                await self._performance.end()
                if self._performance.is_played():
                    self._played.add(self._performance.scene.name)
                self._performance = None
            await self.lab.release()
        self.lab.touch()

    def state(self) -> dict[str, Any] | None:
        """What the page shows; None if no scene is played."""
        return None if self._performance is None else self._performance.state()

"""The scenes (a placeholder of LA's until LB's comes)."""

from typing import Any

from shared.lab.errors import LabError
from shared.lab.hand import Hand
from shared.lab.lesson import OpenLesson


def available(lesson: OpenLesson) -> list[dict[str, str]]:
    """The scenes of this lesson."""
    return []


class Player:
    """Plays one scene at a time."""

    def __init__(self, lab: Hand) -> None:
        self.lab = lab

    async def start(self, name: str) -> None:
        raise LabError(f"There is no scene {name}.")

    async def next(self, answer: str | None = None) -> None:
        raise LabError("No scene is open.")

    async def stop(self) -> None:
        pass

    def state(self) -> dict[str, Any] | None:
        return None

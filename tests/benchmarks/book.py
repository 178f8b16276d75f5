"""Where everything that was measured is written down."""

from collections import defaultdict

FLOOR = "floor.noop_per_s"


class Book(defaultdict[str, list[float | str]]):
    """All values that were measured, by the name of the figure. A value is a number, or a text."""

    def __init__(self) -> None:
        super().__init__(list)

    def rate(self, name: str, per_s: float) -> None:
        """Write down a rate, and its ratio to the floor that was measured last, just before it."""
        self[name].append(per_s)
        if name != FLOOR:
            self[f"{name.removesuffix('_per_s')}_ratio"].append(per_s / float(self[FLOOR][-1]))

    def costs(self, prefix: str, costs: dict[str, float], unit: str) -> None:
        """Write down what a run has cost, per task or per order."""
        for name, cost in costs.items():
            self[f"{prefix}.{name}_per_{unit}"].append(cost)

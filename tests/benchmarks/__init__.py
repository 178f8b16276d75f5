"""What each lesson costs and brings, measured: python tests/benchmarks/run.py"""

import math
import os

QUEUE = "benchmark"
SLOTS = 100
CONNECTIONS = 10  # as many as the lessons' pool has at most

# For the test of this program, which wants to see it run, not its figures.
SCALE = float(os.environ.get("BENCHMARK_SCALE", "1"))


def scaled(count: int) -> int:
    return math.ceil(count * SCALE)


TASKS = scaled(5000)
ORDERS = scaled(800)

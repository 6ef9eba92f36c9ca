"""Timing in turns: every contestant once a round, there and back, so that a busy moment hits all alike."""

import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec

import torch

OURS, REFERENCE = "ours", "reference"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HAS_REFERENCE = find_spec("diffusers") is not None


def turns(jobs: dict[str, Callable[[], object]], rounds: int, calls: int = 1) -> dict[str, list[float]]:
    """Seconds a call of each job in every round, after one round that warms up.

    Args:
        jobs: what to call, by name; the names begin with "ours" or "reference".
        rounds: how many count.
        calls: of each job in a row, for what is too short for the clock.
    """
    seconds = {name: [] for name in jobs}
    for number in range(rounds + 1):
        for name in list(jobs) if number % 2 else reversed(jobs):
            _finish()
            start = time.perf_counter()
            for _ in range(calls):
                jobs[name]()
            _finish()
            seconds[name].append((time.perf_counter() - start) / calls)
    return {name: taken[1:] for name, taken in seconds.items()}


def compared(what: str, taken: dict[str, list[float]], goal: float | None = None, unit: str = "s") -> dict:
    """What the file says of one measure.

    Args:
        what: a sentence on what is measured.
        taken: seconds, or whatever the unit is, of each contestant in every round; less is better.
        goal: what the ratio should be at most.
        unit: of the numbers.

    Returns:
        The median, the least and the most of each; and as the median over the rounds, the ratio of our best setting to the
        reference's best, and to the reference's first setting, as its users run it.  Both None where there is no reference.
    """
    medians = {name: statistics.median(numbers) for name, numbers in taken.items()}
    best, reference = (
        min((n for n in taken if n.startswith(side)), key=medians.get, default=None) for side in (OURS, REFERENCE)
    )
    plain = next((name for name in taken if name.startswith(REFERENCE)), None)

    def ratio(other: str | None) -> float | None:
        return statistics.median(a / b for a, b in zip(taken[best], taken[other], strict=True)) if other else None

    return {
        "what": what,
        "unit": unit,
        "contestants": {n: {"median": medians[n], "least": min(t), "most": max(t)} for n, t in taken.items()},
        "best": [name for name in (best, reference) if name],
        "ratio": ratio(reference),
        "ratio to the plain reference": ratio(plain),
        "goal": goal,
    }


def _finish() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()

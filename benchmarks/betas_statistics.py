"""What `benchmarks.stages --betas` concludes from its rows: means, and differences that are paired by seed.

    interval([0.02, 0.05, 0.03])        # {"mean": 0.033, "low": -0.005, "high": 0.071, "n": 3}

A seed has one start, one split of the pairs and one order of the prompts for all methods, so methods are compared seed
by seed. Intervals are Student's, at 95 %, over seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Row = dict[str, Any]
Interval = dict[str, float]

# the 97.5 % quantile of Student's t by degrees of freedom
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
STAGES = 3
ORDERS = ("reversed", "random")
LEVELS = 9  # distances at which two curves are compared


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % interval of the mean, of two to ten values."""
    mean, count = statistics.mean(values), len(values)
    half = STUDENT[count - 1] * statistics.stdev(values) / math.sqrt(count)
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": count}


def accuracy(row: Row) -> float:
    """What a task is judged by: answers exactly right, or pairs ranked right where answers cannot be checked."""
    found: float = row["pair_accuracy"] if row["exactly_right"] is None else row["exactly_right"]
    return found


def conclusions(rows: Sequence[Row]) -> list[Row]:
    """For each task the means of its cells, and differences: from DPO in four ways, of the orders also from sDPO."""
    found = []
    for task in dict.fromkeys(row["task"] for row in rows):
        of = [row for row in rows if row["task"] == task]
        methods = [name for name in dict.fromkeys(r["method"] for r in of) if name not in ("initial_model", "dpo")]
        found.append(
            {
                "task": task,
                "seeds": sorted({row["seed"] for row in of}),
                "cells": means(of),
                "same_beta": {method: same_beta(of, method) for method in methods},
                "divided_beta": {method: same_beta(of, method, divisor=STAGES) for method in methods},
                "same_distance": {method: same_distance(of, method) for method in methods},
                "best_beta": {method: best_beta(of, method) for method in methods},
                "order": {method: order(of, method) for method in methods if method in ORDERS},
            }
        )
    return found


def means(rows: Sequence[Row]) -> list[Row]:
    """Each method and β: intervals over seeds of accuracy, pair accuracy and KL."""
    found = []
    measures: dict[str, Callable[[Row], float]] = {
        "accuracy": accuracy, "pair_accuracy": lambda row: row["pair_accuracy"], "kl": lambda row: row["kl"],
    }  # fmt: skip
    for method, beta in dict.fromkeys((row["method"], row["beta"]) for row in rows):
        of = [row for row in rows if (row["method"], row["beta"]) == (method, beta)]
        intervals = {name: interval([value(row) for row in of]) for name, value in measures.items()}
        found.append({"method": method, "beta": beta} | intervals)
    return found


def order(rows: Sequence[Row], method: str) -> Row:
    """Another order of the stages minus sDPO's, at equal β and at equal distance."""
    return {"same_beta": same_beta(rows, method, "sdpo"), "same_distance": same_distance(rows, method, "sdpo")}


def same_beta(rows: Sequence[Row], method: str, base: str = "dpo", divisor: float = 1.0) -> list[Row]:
    """`method` at each β minus `base` at β / `divisor`, where both are: accuracy, and the logarithm of the KL."""
    pairs: dict[float, list[tuple[Row, Row]]] = {}
    for one in (row for row in rows if row["method"] == method):
        for other in (row for row in rows if row["method"] == base and row["seed"] == one["seed"]):
            if math.isclose(other["beta"] * divisor, one["beta"]):
                pairs.setdefault(one["beta"], []).append((one, other))
    return [
        {
            "beta": beta,
            "accuracy": interval([accuracy(one) - accuracy(other) for one, other in of]),
            "log_kl": interval([math.log(one["kl"] / other["kl"]) for one, other in of]),
        }
        for beta, of in pairs.items()
    ]


def same_distance(rows: Sequence[Row], method: str, base: str = "dpo") -> Interval | None:
    """`method` minus `base` in accuracy at equal KL, over seeds; None if the distances of some seed do not overlap.

    For each seed accuracy is taken as linear in log KL between neighbouring β. The difference of the two lines is
    averaged over LEVELS distances, evenly spaced in log KL, from the largest of both first distances to the smallest of
    both last ones.
    """
    found = []
    for seed in sorted({row["seed"] for row in rows}):
        curves = [curve(rows, name, seed) for name in (method, base)]
        low, high = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
        if low >= high:
            return None
        levels = np.linspace(low, high, LEVELS)
        one, other = (np.interp(levels, *of) for of in curves)
        found.append(float((one - other).mean()))
    return interval(found)


def curve(rows: Sequence[Row], method: str, seed: int) -> tuple[list[float], list[float]]:
    """(log KL, accuracy) of a method's models, by rising distance."""
    of = sorted((r for r in rows if (r["method"], r["seed"]) == (method, seed)), key=lambda row: row["kl"])
    return [math.log(row["kl"]) for row in of], [accuracy(row) for row in of]


def best_beta(rows: Sequence[Row], method: str) -> Interval:
    """`method` minus DPO, each at its best β, which for a seed is the one that is best on the mean of the others.

    A β chosen on the seed it is judged on would favour the method with the noisier results.
    """
    seeds = sorted({row["seed"] for row in rows})
    return interval([at_best(rows, method, seed) - at_best(rows, "dpo", seed) for seed in seeds])


def at_best(rows: Sequence[Row], method: str, seed: int) -> float:
    """The accuracy of `method` on `seed` at the β that is best on the other seeds."""
    others: dict[float, list[float]] = {}
    own: dict[float, float] = {}
    for row in rows:
        if row["method"] == method and row["seed"] == seed:
            own[row["beta"]] = accuracy(row)
        elif row["method"] == method:
            others.setdefault(row["beta"], []).append(accuracy(row))
    return own[max(own, key=lambda beta: statistics.mean(others[beta]))]

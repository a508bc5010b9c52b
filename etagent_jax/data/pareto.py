"""Group-wise Pareto sampling: choose the questions whose rollouts differ most in tool use and correctness."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from etagent_jax.trajectory import Group

QA_RIGHT_FROM = 0.75  # F1 from which the selection counts a qa rollout as right (arXiv 2601.06860)


@dataclass(frozen=True, slots=True)
class QuestionStatistics:
    """Population variances of the number of tool calls and of correctness, float64 [questions], and
    whether the question has both right and wrong rollouts, bool [questions]."""

    tool_variance: np.ndarray
    correctness_variance: np.ndarray
    eligible: np.ndarray


def question_statistics(groups: Sequence[Group], correctness: Sequence[np.ndarray]) -> QuestionStatistics:
    """Statistics of each group, given the correctness in [0, 1] of its trajectories.

    Eligible: a mathematics group holds a 0 and a 1; a qa group one at or above 0.75 and one below.
    Equal collections give bit-equal variances, in whatever order their rollouts came.
    """
    for group, scores in zip(groups, correctness, strict=True):
        if len(scores) != len(group.trajectories):
            raise ValueError(
                f"question {group.question.id}: {len(group.trajectories)} trajectories "
                f"but {len(scores)} correctness values"
            )
    return QuestionStatistics(
        np.array([np.var(sorted(len(t.calls) for t in group.trajectories)) for group in groups]),
        np.array([np.var(np.sort(scores)) for scores in correctness]),
        np.array([_is_mixed(group, scores) for group, scores in zip(groups, correctness, strict=True)], bool),
    )


def _is_mixed(group: Group, scores: np.ndarray) -> bool:
    lowest, highest = np.min(scores), np.max(scores)
    if group.question.kind == "mathematics":
        return bool(lowest == 0 and highest == 1)
    return bool(lowest < QA_RIGHT_FROM <= highest)


def select(tool_variance: np.ndarray, correctness_variance: np.ndarray, eligible: np.ndarray, count: int) -> np.ndarray:
    """Indices, int64 [min(count, eligible questions)], of the best eligible questions, best front first.

    Both variances are maximised: non-dominated fronts are taken whole, in order; of the front that
    overflows, those with the largest crowding distance.  Ties, and the order within a whole front, go
    by index.  O(N log N).  All inputs are [questions]; raises ValueError if their lengths differ, a
    variance is not finite or `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"the number of questions to select must be at least 1, got {count}")
    if not len(tool_variance) == len(correctness_variance) == len(eligible):
        raise ValueError(
            f"{len(tool_variance)} tool variances, {len(correctness_variance)} correctness variances and "
            f"{len(eligible)} eligibility flags: there must be one of each for every question"
        )
    candidates = np.flatnonzero(eligible)
    points = np.column_stack([tool_variance, correctness_variance]).astype(np.float64)[candidates]
    if not np.isfinite(points).all():
        raise ValueError("a variance of an eligible question is not a finite number")
    front = fronts(points)
    order = np.argsort(front, kind="stable")
    if count >= len(order):
        return candidates[order]
    last = front[order[count]]
    whole, overflowing = order[front[order] < last], np.flatnonzero(front == last)
    widest = np.argsort(-crowding_distance(points[overflowing]), kind="stable")
    return candidates[np.concatenate([whole, overflowing[widest]])[:count]]


def fronts(points: np.ndarray) -> np.ndarray:
    """The non-dominated front, int64 [n] from 0, of each point, [n, 2], both coordinates maximised.

    A point dominates another if it is at least as large in both and larger in one; front k + 1 is what
    is non-dominated once fronts 0..k are gone.  Sweeping from the largest first coordinate down, a front
    dominates a new point exactly if it has reached the point's second coordinate; fronts are ordered
    by how far they have reached, so a binary search finds the point's own (Jensen 2003).
    """
    distinct, inverse = np.unique(points, axis=0, return_inverse=True)
    reached: list[float] = []  # for each front, minus the largest second coordinate so far: ascending
    front_of = np.empty(len(distinct), np.int64)
    for i in range(len(distinct) - 1, -1, -1):
        second = float(distinct[i, 1])
        k = bisect_right(reached, -second)
        reached[k : k + 1] = [-second]
        front_of[i] = k
    return front_of[inverse.reshape(-1)]


def crowding_distance(points: np.ndarray) -> np.ndarray:
    """Crowding distance within one front (NSGA-II, Deb et al. 2002), float64 [n], of points [n, 2].

    Sum over coordinates of the gap between a point's two neighbours over the coordinate's range; the
    two ends are infinite; a coordinate without range is skipped.  Equal values are ordered by index.
    """
    distance = np.zeros(len(points))
    for values in points.T:
        order = np.argsort(values, kind="stable")
        ordered = values[order]
        extent = ordered[-1] - ordered[0]
        if extent > 0:
            distance[order[1:-1]] += (ordered[2:] - ordered[:-2]) / extent
            distance[order[[0, -1]]] = np.inf
    return distance

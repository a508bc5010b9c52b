"""How an agent behaved, by rules and without a judge: patterns, wasted calls, and averages with intervals."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from etagent_jax import protocol
from etagent_jax.scoring.answers import is_correct
from etagent_jax.trajectory import Group, Trajectory

Z95 = 1.959963984540054  # the 97.5 % point of the standard normal distribution
_LETTERS = {protocol.THINK: "T", protocol.ANSWER: "A"}
Scored = Sequence[tuple[Trajectory, float]]


@lru_cache
def _blocks(tools: tuple[str, ...]) -> re.Pattern[str]:
    names = "|".join(map(re.escape, (protocol.THINK, protocol.ANSWER, *tools)))
    return re.compile(rf"<({names})>.*?</\1>", re.DOTALL)


def pattern(trajectory: Trajectory) -> str:
    """The sequence of closed blocks in the assistant's text, a letter each: think T, answer A, and a tool
    the first letter of its name (search S, python P), such as "TSTPTA"."""
    blocks = _blocks(trajectory.tools)
    tags = (match.group(1) for turn in trajectory.turns for match in blocks.finditer(turn))
    return "".join(_LETTERS.get(tag) or tag[0].upper() for tag in tags)


def failed_calls(trajectory: Trajectory) -> int:
    """Calls whose tool did not report `ok`."""
    return sum(call.result.failed for call in trajectory.calls)


def repeated_calls(trajectory: Trajectory) -> int:
    """Calls that an earlier call of the trajectory already made: same tool, same input but for blanks and case."""
    calls = trajectory.calls
    return len(calls) - len({(call.tool, " ".join(call.input.lower().split())) for call in calls})


def needless_calls(group: Group, correctness: Sequence[float]) -> np.ndarray:
    """Calls of each trajectory, int64 [n], where the group shows that none was needed, else 0.

    Shown by trajectories without a call, at least half of which are correct (so a lucky guess among
    many wrong ones shows nothing).  correctness: of each trajectory, in [0, 1].
    """
    calls, correct = _calls_and_correct(group, correctness)
    without = correct[calls == 0]
    return calls if without.size and 2 * without.sum() >= without.size else np.zeros_like(calls)


def missing_calls(group: Group, correctness: Sequence[float]) -> np.ndarray:
    """Whether each trajectory, bool [n], is wrong without a call where one with calls was right."""
    calls, correct = _calls_and_correct(group, correctness)
    return (calls == 0) & ~correct & (correct & (calls > 0)).any()


def _calls_and_correct(group: Group, correctness: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    calls = np.array([len(t.calls) for t in group.trajectories])
    correct = np.array([is_correct(group.question, c) for c in correctness])
    if calls.shape != correct.shape:
        raise ValueError(
            f"question {group.question.id}: {len(calls)} trajectories but {len(correct)} correctness values"
        )
    return calls, correct


def behaviour(trajectory: Trajectory, correctness: float) -> dict[str, Any]:
    """Every measure of one trajectory.  correctness: its score in [0, 1].

    efficiency: correctness per call, or correctness itself without a call.  concise: no call was
    repeated or failed; ET-Agent asks a judge, this is a rule.
    """
    calls, failed, repeated = len(trajectory.calls), failed_calls(trajectory), repeated_calls(trajectory)
    return {
        "pattern": pattern(trajectory),
        "correctness": correctness,
        "tool_calls": calls,
        "failed_calls": failed,
        "repeated_calls": repeated,
        "efficiency": correctness / max(calls, 1),
        "format_valid": trajectory.format_error is None,
        "concise": not failed and not repeated,
        "reasoning_tokens": trajectory.model_tokens,
    }


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over `n` questions with its 95 % confidence interval (low, high)."""

    mean: float
    ci95: tuple[float, float]
    n: int


def summarise(scored: Scored) -> dict[str, Estimate]:
    """ET-Agent's measures of a set of trajectories, each with its correctness in [0, 1].

    correctness, tool_calls, efficiency, format_valid, conciseness (share of trajectories in which no
    call was repeated or failed: by rule, not by a judge), reasoning_tokens: means over questions
    of each question's mean.  successful_execution: clean results / all results of the whole set;
    where nothing was called nothing failed, so it is 1, known from 0 questions.

    Trajectories of one question are not independent, so the question is the unit of every interval
    (`mean_estimate`, `ratio_estimate`).
    """
    if not scored:
        raise ValueError("there are no trajectories to summarise")
    questions = _by_question(scored)
    rows = [(len(t.calls), failed_calls(t), repeated_calls(t), t.model_tokens, t.format_error is None, c)
            for t, c in scored]  # fmt: skip
    calls, failed, repeated, tokens, valid, correctness = np.array(rows, np.float64).T

    def sums(values: np.ndarray) -> np.ndarray:
        return np.bincount(questions, weights=values)

    def mean(values: np.ndarray, share: bool = True) -> Estimate:
        return mean_estimate(sums(values) / np.bincount(questions), share)

    return {
        "correctness": mean(correctness),
        "tool_calls": mean(calls, share=False),
        "efficiency": mean(correctness / np.maximum(calls, 1)),
        "format_valid": mean(valid),
        "successful_execution": ratio_estimate(sums(calls - failed), sums(calls)),
        "reasoning_tokens": mean(tokens, share=False),
        "conciseness": mean((failed == 0) & (repeated == 0)),
    }


def distinct_correct_patterns(scored: Scored) -> Estimate:
    """Number of distinct patterns among a question's correct trajectories, averaged over all questions.

    It grows with the number of trajectories for each question: compare sets with equally many.
    """
    if not scored:
        raise ValueError("there are no trajectories to summarise")
    seen: dict[str, set[str]] = {t.question.id: set() for t, _ in scored}
    for trajectory, correctness in scored:
        if is_correct(trajectory.question, correctness):
            seen[trajectory.question.id].add(pattern(trajectory))
    return mean_estimate(np.array([len(patterns) for patterns in seen.values()], np.float64), share=False)


def mean_estimate(values: np.ndarray, share: bool) -> Estimate:
    """Mean of one value per question, [n], with mean ± 1.96 s / √n (s with ddof 1).

    share: the values lie in [0, 1] (otherwise only at or above 0), and the interval is cut to that.
    A share whose values are all 0 or all 1 gets Wilson's score interval for n trials instead, as s says
    nothing there.  A single question tells nothing either: its interval is the whole range.
    """
    n, mean, top = len(values), float(values.mean()), 1.0 if share else math.inf
    if n == 1:
        return Estimate(mean, (0.0, top), n)
    if share and (np.all(values == 0) or np.all(values == 1)):
        return Estimate(mean, _wilson_at_an_end(mean, n), n)
    half = Z95 * float(values.std(ddof=1)) / math.sqrt(n)
    return Estimate(mean, (max(mean - half, 0.0), min(mean + half, top)), n)


def ratio_estimate(parts: np.ndarray, wholes: np.ndarray) -> Estimate:
    """Σ parts / Σ wholes over questions, each [questions], with the ratio estimator's interval.

    Linearised (Cochran, Sampling Techniques, 3rd ed., §6.4): e = part - ratio · whole for each question,
    standard error √(Σe² / (n - 1) / n) / mean whole.  n counts questions with a whole above 0.  At 0 or 1:
    Wilson's interval for n trials; with n ≤ 1: (0, 1), and with n = 0 the ratio is 1.
    """
    parts, wholes = parts[wholes > 0], wholes[wholes > 0]
    n = len(wholes)
    if n == 0:
        return Estimate(1.0, (0.0, 1.0), 0)
    ratio = float(parts.sum() / wholes.sum())
    if n == 1:
        return Estimate(ratio, (0.0, 1.0), n)
    if ratio in (0.0, 1.0):
        return Estimate(ratio, _wilson_at_an_end(ratio, n), n)
    residuals = parts - ratio * wholes
    half = Z95 * math.sqrt(float(residuals @ residuals) / (n - 1) / n) / float(wholes.mean())
    return Estimate(ratio, (max(ratio - half, 0.0), min(ratio + half, 1.0)), n)


def _wilson_at_an_end(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval (1927) for 0 or n successes in n trials."""
    reach = Z95**2 / (n + Z95**2)
    return (0.0, reach) if share == 0 else (1 - reach, 1.0)


def _by_question(scored: Iterable[tuple[Trajectory, float]]) -> np.ndarray:
    """A number for each trajectory's question, int64 [len(scored)], counted from 0 in order of appearance."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(t.question.id, len(numbers)) for t, _ in scored])

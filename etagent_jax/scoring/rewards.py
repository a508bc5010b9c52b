"""From a group of trajectories to rewards and advantages: ET-Agent's group reward, and a variant of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from etagent_jax.scoring import answers
from etagent_jax.trajectory import Group, Question

EPSILON = 1e-6  # added to the standard deviation of a group's rewards; also the least spread that counts


@dataclass(frozen=True, slots=True)
class RewardConfig:
    """variant: `paper`, or `sign_preserving` (see `score_group`).

    sigma_tool, sigma_length: strength of the two efficiency terms, at least 0; ET-Agent's are 0.2 and 0.5.
    """

    variant: Literal["paper", "sign_preserving"]
    sigma_tool: float
    sigma_length: float

    def __post_init__(self) -> None:
        if self.variant not in ("paper", "sign_preserving"):
            raise ValueError(f"reward variant {self.variant!r} is not 'paper' or 'sign_preserving'")
        for name in ("sigma_tool", "sigma_length"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """A group with correctness in [0, 1], rewards and advantages, each float64 [n] in its trajectories' order."""

    group: Group
    correctness: np.ndarray
    rewards: np.ndarray
    advantages: np.ndarray

    @property
    def has_spread(self) -> bool:
        """Whether there is anything to learn: some advantage is not (numerically) zero."""
        return bool(np.abs(self.advantages).max() > EPSILON)


def decayed_sigma(sigma: float, step: int, steps: int) -> float:
    """ET-Agent's schedule: sigma (T - t) / (T - 1), whole at step t = 1 and 0 at t = T = `steps`.

    A round of a single step keeps the whole sigma.
    """
    if not 1 <= step <= steps:
        raise ValueError(f"step must be in 1..{steps}, got {step}")
    return sigma if steps == 1 else sigma * (steps - step) / (steps - 1)


def efficiency_factor(tool_calls: np.ndarray, tokens: np.ndarray, config: RewardConfig) -> np.ndarray:
    """f_tool · f_len of each rollout, float64 [n], in (0, 4); 1 for an average one (arXiv 2601.06860).

    f_tool = 2 / (1 + exp(sigma_tool (n - mean n))); f_len = 2 / (1 + exp(sigma_length z)), where z is the
    group's z-score of length with the population standard deviation, 0 where all lengths are equal.
    tool_calls, tokens: numbers of calls, and of tokens the model wrote, [n].
    """
    excess = tool_calls - tool_calls.mean()
    spread = tokens.std()
    z = (tokens - tokens.mean()) / spread if spread > 0 else np.zeros(len(tokens))
    return 4 / ((1 + np.exp(config.sigma_tool * excess)) * (1 + np.exp(config.sigma_length * z)))


def advantages(rewards: np.ndarray) -> np.ndarray:
    """(R - mean) / (standard deviation with ddof 1 + 1e-6) within one group, [n]; zeros where all are equal."""
    if len(rewards) == 1 or np.ptp(rewards) == 0:
        return np.zeros(len(rewards))
    return (rewards - rewards.mean()) / (rewards.std(ddof=1) + EPSILON)


def score_group(
    group: Group, config: RewardConfig, correctness_fn: Callable[[Question, str | None], float] = answers.correctness
) -> ScoredGroup:
    """Correctness r, rewards R and advantages A of a group; f is the `efficiency_factor`.

    `paper`: R = r f, minus 1 if the format is invalid; A = `advantages`(R).

    `sign_preserving`: R = r f if the format is valid, else r - 1, which is at most 0: a badly formed
    answer earns nothing by being short and stays below every well-formed one that is not wholly wrong.
    Then the efficiency terms may set the size of an advantage, not its sign: a rollout at or above the
    group's mean of the same reward without them (R at f = 1) has A >= 0, one below it A <= 0.  Where all
    rollouts are equally right, the efficient ones are therefore raised and none is pushed down.
    """
    trajectories = group.trajectories
    correctness = np.array([correctness_fn(group.question, t.answer) for t in trajectories], np.float64)
    valid = np.array([t.format_error is None for t in trajectories])
    tool_calls = np.array([len(t.calls) for t in trajectories], np.float64)
    tokens = np.array([t.model_tokens for t in trajectories], np.float64)
    shaped = correctness * efficiency_factor(tool_calls, tokens, config)
    if config.variant == "paper":
        rewards = np.where(valid, shaped, shaped - 1)
        return ScoredGroup(group, correctness, rewards, advantages(rewards))
    rewards = np.where(valid, shaped, correctness - 1)
    unshaped = advantages(np.where(valid, correctness, correctness - 1))
    signed = advantages(rewards)
    signed = np.where(unshaped >= -EPSILON, np.maximum(signed, 0), np.minimum(signed, 0))
    return ScoredGroup(group, correctness, rewards, signed)

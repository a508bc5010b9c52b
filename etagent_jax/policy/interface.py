"""What every policy (SGLang over HTTP, the embedded engine) offers to rollouts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

Finish = Literal["stop", "length", "abort"]

MIN_TEMPERATURE = 1e-6
"""Logits divided by less than this overflow."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample one completion.

    temperature: 0 is greedy, else at least MIN_TEMPERATURE.  max_new_tokens: at most so many tokens are sampled.
    stop: generation ends at the token that completes one of these strings; that token is kept.
    seed: together with a token's position it fixes the random draw of the embedded engine.
    """

    temperature: float
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature != 0 and not MIN_TEMPERATURE <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 or at least {MIN_TEMPERATURE}, got {self.temperature}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")


@dataclass(frozen=True, slots=True)
class Completion:
    """What was sampled, token for token.

    logprobs: natural log-probabilities at the sampling temperature (at temperature 0: those of
    T = 1), not renormalised by top-p.  finish: `stop` (a stop string or the end-of-sequence
    token), `length`, or `abort`.  weight_versions: for each token, the version that sampled it.
    cached_tokens: how many of the input's were found in a cache; not compared.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Finish
    weight_versions: tuple[int, ...]
    cached_tokens: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        lengths = {len(self.token_ids), len(self.logprobs), len(self.weight_versions)}
        if len(lengths) != 1:
            raise ValueError(
                f"{len(self.token_ids)} tokens, {len(self.logprobs)} log-probabilities and "
                f"{len(self.weight_versions)} weight versions: a completion needs as many of each"
            )


@dataclass(frozen=True, slots=True)
class Scores:
    """How probable a model finds n given tokens.

    logprobs [n - 1]: natural log-probability of each token but the first, given those before it, at
    temperature 1.  weight_version: of the weights that gave them.
    """

    logprobs: tuple[float, ...]
    weight_version: int


class Policy(Protocol):
    """A language model that can be sampled: all that rollouts ask of one.

    Both policies also score given tokens, `score(token_ids) -> Scores`, and take new weights,
    `update_weights(version, weights)`, in the form that suits them: the engine parameters on the
    device, a server a folder that it can read.
    """

    async def generate(self, token_ids: Sequence[int], sampling: Sampling, session: str = "") -> Completion:
        """Continue `token_ids`; `session` names the trajectory, so that its prefix is found again."""
        ...

"""A group of rollouts of one question, some of them forked where a tool result left the policy unsure."""

import asyncio
import math
from collections import deque
from collections.abc import Sequence
from functools import partial

from etagent_jax.rollout.agent import Agent
from etagent_jax.rollout.groups import Rollouts, cancelling_tasks, check_tool_free, roll, trajectory_seed
from etagent_jax.trajectory import Group, Origin, Question, Segment, Trajectory

OPERATOR = "branch"
"""In the `Origin` of a trajectory that was forked off another."""


async def branching(
    agent: Agent, question: Question, *, ids: Sequence[str], rollouts: Rollouts, initial: int,
    probability: float = 0.5, weight: float = 0.2, window: int = 20, tool_free: int = 0,
) -> Group:  # fmt: skip
    """A group (see GroupFunction) grown by entropy branching, after ARPO (arXiv 2507.19849).

    The first `initial` rollouts start at the prompt, and with them the last `tool_free`, which may call
    nothing, as in `plain`.  The others are free.  When a rollout has written its turn after a tool
    result, it is forked with probability clip(`probability` + `weight` · ΔH, 0, 1), where ΔH is its
    `entropy_rise` over `window` tokens; forks may be forked in turn, at results of their own.  A fork takes
    the next free id.  It keeps the segments up to that result, token for token, and samples on with its
    own seed; its origin names the parent, OPERATOR, and the step that the result ended (from 1).

    Whether a rollout is forked depends on the run's seed, its id and the step only (and on what it wrote);
    which free id the fork gets, on which rollout came there first.  A refused call forks nothing.  Free ids
    that no fork can take any more start at the prompt, at once, and are not forked: a rollout with c calls
    left can be forked 2ᶜ − 1 times, its forks included, so these are all beyond the sum over those that run.

    Raises ValueError for settings that no group can meet.
    """
    check_tool_free(tool_free, len(ids))
    if not 1 <= initial <= len(ids) - tool_free:
        raise ValueError(
            f"initial must be between 1 and the {len(ids) - tool_free} rollouts of a group that may call, got {initial}"
        )
    if not 0 <= probability <= 1 or window < 1:
        raise ValueError(
            f"probability must be in [0, 1] and window at least 1, got probability {probability} and window {window}"
        )
    may_call = len(ids) - tool_free
    free = deque(id for id in ids[initial:may_call] if id not in rollouts.finished)
    calls_left: dict[str, int] = {}  # of those running that may be forked
    started: dict[str, asyncio.Task[Trajectory]] = {}

    def fill() -> None:
        while len(free) > sum(2**left - 1 for left in calls_left.values()):
            id = free.popleft()
            started[id] = tasks.create_task(roll(agent, question, id, rollouts))

    async def grow(id: str, prefix: Sequence[Segment] = (), origin: Origin | None = None) -> Trajectory:
        trajectory = await roll(
            agent, question, id, rollouts, prefix=prefix, origin=origin, on_turn=partial(consider, id, len(prefix))
        )  # fmt: skip
        del calls_left[id]
        fill()
        return trajectory

    def consider(id: str, kept: int, segments: Sequence[Segment]) -> None:
        """Fork rollout `id`, or not, at the result before its newest turn, if it is past the first `kept` segments."""
        call = segments[-2].call if len(segments) > kept + 1 else None
        if call is None or call.result.status == "refused":
            return
        calls_left[id] -= 1
        step = sum(segment.source == "tool" for segment in segments)
        draw = trajectory_seed(rollouts.seed, f"{id}/{OPERATOR}/{step}") / 2**31
        rise = entropy_rise(segments, agent.tokenizer.vocab_size, window)
        if free and draw < probability + weight * rise:
            fork = free.popleft()
            calls_left[fork] = calls_left[id]
            origin = Origin(id, OPERATOR, step)
            started[fork] = tasks.create_task(grow(fork, tuple(segments[:-1]), origin))
        fill()

    async with cancelling_tasks() as tasks:
        for id in ids[:initial]:
            if id not in rollouts.finished:
                calls_left[id] = agent.budget.calls
                started[id] = tasks.create_task(grow(id))
        for id in ids[may_call:]:
            if id not in rollouts.finished:
                started[id] = tasks.create_task(roll(agent, question, id, rollouts, may_call=False))
        fill()
    return Group(question, tuple(started[id].result() if id in started else rollouts.finished[id] for id in ids))


def entropy_rise(segments: Sequence[Segment], vocab_size: int, window: int) -> float:
    """How much less sure the policy is in the last of `segments` than in the first, both of the model.

    The mean of −logprob over at most the first `window` tokens of the last, minus that of the first,
    divided by log(vocab_size), the entropy of a uniform draw.  Without top-p, −logprob of a sampled token
    is an unbiased estimate of the entropy of the distribution that it was drawn from.
    """
    after, start = (segment.logprobs[:window] for segment in (segments[-1], segments[0]))
    return (sum(start) / len(start) - sum(after) / len(after)) / math.log(vocab_size)

"""A group of rollouts of one question, each sampled from the prompt on."""

import asyncio
import dataclasses
import hashlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from etagent_jax.rollout.agent import Agent
from etagent_jax.trajectory import Group, Question, Trajectory


@dataclass(frozen=True, slots=True)
class Rollouts:
    """What all rollouts of a sampling have in common.

    slots: one is held by each rollout that runs, so it bounds how many do; a rollout that fails keeps its
    own, so that no other starts while the error makes its way up.  finished: by id, those of an interrupted
    run, which are not made again.  on_trajectory: called with every other one the moment it is finished,
    before anything else is done with it.
    """

    seed: int
    temperature: float
    top_p: float
    slots: asyncio.Semaphore
    finished: Mapping[str, Trajectory]
    on_trajectory: Callable[[Trajectory], None]


class GroupFunction(Protocol):
    """Makes the group of a question: trajectory i has the id `ids[i]` and the seed `trajectory_seed(seed, ids[i])`.

    Those in `rollouts.finished` are taken from there.  The first error of a rollout or of
    `on_trajectory` cancels the others and propagates; when the function is cancelled, so are they.
    """

    async def __call__(self, agent: Agent, question: Question, *, ids: Sequence[str], rollouts: Rollouts) -> Group: ...


def trajectory_seed(seed: int, id: str) -> int:
    """A seed in [0, 2³¹) for the trajectory `id` of a run with `seed`, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{id}".encode(), digest_size=4).digest(), "big") >> 1


async def plain(
    agent: Agent, question: Question, *, ids: Sequence[str], rollouts: Rollouts, tool_free: int = 0
) -> Group:
    """A group whose rollouts all start at the prompt (see GroupFunction).

    The last `tool_free` of them may call nothing: the prompt is the same, and a call is refused as if the
    budget were used up (EAPO, arXiv 2606.02132).  Raises ValueError if there are not so many.
    """
    check_tool_free(tool_free, len(ids))
    async with cancelling_tasks() as tasks:
        started = {
            id: tasks.create_task(roll(agent, question, id, rollouts, may_call=i < len(ids) - tool_free))
            for i, id in enumerate(ids)
            if id not in rollouts.finished
        }
    return Group(question, tuple(started[id].result() if id in started else rollouts.finished[id] for id in ids))


async def roll(
    agent: Agent, question: Question, id: str, rollouts: Rollouts, *, may_call: bool = True, **options: Any
) -> Trajectory:
    """One rollout of a group, as soon as a slot is free; `options` are those of `Agent.rollout`."""
    if not may_call:
        agent = agent.with_budget(dataclasses.replace(agent.budget, calls=0))
    await rollouts.slots.acquire()
    try:
        trajectory = await agent.rollout(
            question, id=id, seed=trajectory_seed(rollouts.seed, id), temperature=rollouts.temperature,
            top_p=rollouts.top_p, **options,
        )  # fmt: skip
    except asyncio.CancelledError:
        rollouts.slots.release()
        raise
    rollouts.on_trajectory(trajectory)
    rollouts.slots.release()
    return trajectory


@asynccontextmanager
async def cancelling_tasks() -> AsyncIterator[asyncio.TaskGroup]:
    """Waits for its tasks at the end; the first error cancels the others and propagates as it is."""
    try:
        async with asyncio.TaskGroup() as tasks:
            yield tasks
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


def check_tool_free(tool_free: int, samples: int) -> None:
    if not 0 <= tool_free <= samples:
        raise ValueError(f"tool_free must be between 0 and the {samples} rollouts of a group, got {tool_free}")

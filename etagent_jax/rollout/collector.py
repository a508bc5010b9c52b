"""Many rollouts at once, handed on group by group as each question's are complete."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from types import MappingProxyType
from typing import Any

from etagent_jax.rollout.agent import Agent
from etagent_jax.rollout.groups import Rollouts, plain
from etagent_jax.trajectory import Group, Question, Trajectory

NONE_FINISHED: Mapping[str, Trajectory] = MappingProxyType({})


async def collect(
    agent: Agent, questions: Sequence[Question], samples: int, *, tag: str, seed: int, temperature: float,
    top_p: float = 1.0, concurrency: int, finished: Mapping[str, Trajectory] = NONE_FINISHED,
    on_trajectory: Callable[[Trajectory], None],
) -> AsyncGenerator[Group, None]:  # fmt: skip
    """Sample `samples` trajectories for each question; yield each group as soon as it is complete.

    Trajectory i of a question is `{tag}/{question.id}/{i}`, and i-th in its group.  At most
    `concurrency` rollouts run at once, questions in the order given, each group begun when no rollout
    of those before it waits.  Those in `finished` (by id, from an interrupted run) are taken from
    there; `on_trajectory` is called with every other one the moment it is finished, before anything
    else is done with it.  The first error of a rollout or of `on_trajectory` cancels all the others
    and propagates.  Leaving early: `aclose` the generator, which cancels what is running.
    """
    if samples < 1 or concurrency < 1:
        raise ValueError(f"collect: samples and concurrency must be positive, got {samples} and {concurrency}")
    if len({question.id for question in questions}) < len(questions):
        raise ValueError(f"collect {tag}: two questions have the same id")
    ids = {question.id: [f"{tag}/{question.id}/{i}" for i in range(samples)] for question in questions}
    slots = asyncio.Semaphore(concurrency)
    rollouts = Rollouts(seed, temperature, top_p, slots, finished, on_trajectory)
    running: set[asyncio.Task[Group | None]] = set()
    ended: asyncio.Queue[asyncio.Task[Group | None]] = asyncio.Queue()

    def start(coroutine: Coroutine[Any, Any, Group | None]) -> None:
        task = asyncio.create_task(coroutine)
        running.add(task)
        task.add_done_callback(ended.put_nowait)

    async def start_groups() -> None:
        complete_first = sorted(questions, key=lambda question: not all(id in finished for id in ids[question.id]))
        for question in complete_first:
            async with slots:  # a semaphore is fair: all rollouts that waited have had theirs
                start(plain(agent, question, ids=ids[question.id], rollouts=rollouts))
                await asyncio.sleep(0)  # the group starts its rollouts,
                await asyncio.sleep(0)  # and they wait for slots

    start(start_groups())
    try:
        while running:
            task = await ended.get()
            running.remove(task)
            if (group := task.result()) is not None:
                yield group
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def collect_all(
    agent: Agent, questions: Sequence[Question], samples: int, *, tag: str, seed: int, temperature: float,
    top_p: float = 1.0, concurrency: int, finished: Mapping[str, Trajectory] = NONE_FINISHED,
    on_trajectory: Callable[[Trajectory], None], on_group: Callable[[Group], None] = lambda _: None,
) -> list[Group]:  # fmt: skip
    """As `collect`, but all groups together, in the order of the questions; `on_group` sees each as it comes."""
    groups: dict[str, Group] = {}
    collecting = collect(
        agent, questions, samples, tag=tag, seed=seed, temperature=temperature, top_p=top_p,
        concurrency=concurrency, finished=finished, on_trajectory=on_trajectory,
    )  # fmt: skip
    async with aclosing(collecting):
        async for group in collecting:
            groups[group.question.id] = group
            on_group(group)
    return [groups[question.id] for question in questions]

"""Many rollouts at once, handed on group by group as each question's are complete."""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from types import MappingProxyType

from etagent_jax.rollout.agent import Agent
from etagent_jax.trajectory import Group, Question, Trajectory

NONE_FINISHED: Mapping[str, Trajectory] = MappingProxyType({})


def trajectory_seed(seed: int, id: str) -> int:
    """A seed in [0, 2³¹) for the trajectory `id` of a run with `seed`, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{id}".encode(), digest_size=4).digest(), "big") >> 1


async def collect(
    agent: Agent, questions: Sequence[Question], samples: int, *, tag: str, seed: int, temperature: float,
    top_p: float = 1.0, concurrency: int, finished: Mapping[str, Trajectory] = NONE_FINISHED,
    on_trajectory: Callable[[Trajectory], None],
) -> AsyncGenerator[Group, None]:  # fmt: skip
    """Sample `samples` trajectories for each question; yield each group as soon as it is complete.

    Trajectory i of a question is `{tag}/{question.id}/{i}`, and i-th in its group.  At most
    `concurrency` rollouts run at once, questions in the order given.  Those in `finished` (by id,
    from an interrupted run) are taken from there; `on_trajectory` is called with every other one
    the moment it is finished, before anything else is done with it.  The first error of a rollout
    or of `on_trajectory` cancels all the others and propagates.  Leaving early: `aclose` the
    generator, which cancels what is running.
    """
    if samples < 1 or concurrency < 1:
        raise ValueError(f"collect: samples and concurrency must be positive, got {samples} and {concurrency}")
    if len({question.id for question in questions}) < len(questions):
        raise ValueError(f"collect {tag}: two questions have the same id")
    ids = {question.id: [f"{tag}/{question.id}/{i}" for i in range(samples)] for question in questions}
    found = {question.id: {i: finished[i] for i in ids[question.id] if i in finished} for question in questions}
    # Groups that are complete, and runners that have ended (for their errors), as they come.
    events: asyncio.Queue[Question | asyncio.Task[None]] = asyncio.Queue()
    for question in questions:
        if len(found[question.id]) == samples:
            events.put_nowait(question)
    missing = iter([(question, i) for question in questions for i in ids[question.id] if i not in finished])

    async def run() -> None:
        for question, id in missing:  # an iterator all runners share
            trajectory = await agent.rollout(
                question, id=id, seed=trajectory_seed(seed, id), temperature=temperature, top_p=top_p
            )
            on_trajectory(trajectory)
            group = found[question.id]
            group[id] = trajectory
            if len(group) == samples:
                events.put_nowait(question)

    runners = [asyncio.create_task(run()) for _ in range(min(concurrency, samples * len(questions)))]
    for runner in runners:
        runner.add_done_callback(events.put_nowait)
    try:
        left = len(questions)
        while left:
            event = await events.get()
            if isinstance(event, Question):
                trajectories = found.pop(event.id)
                yield Group(event, tuple(trajectories[i] for i in ids[event.id]))
                left -= 1
            else:
                event.result()
    finally:
        for runner in runners:
            runner.cancel()
        await asyncio.gather(*runners, return_exceptions=True)


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

"""Groups that are complete when a test says so: no clock, no agent, no policy."""

import asyncio
from collections.abc import Sequence
from itertools import count

from etagent_jax.rollout.stream import GroupStream, Planned, StreamBatch
from etagent_jax.trajectory import Group, Question, Segment, Trajectory


def plan(length: int | None = None):
    """Groups 0, 1, …: of a question each, with one trajectory."""
    for i in count() if length is None else range(length):
        yield Planned(i, Question(f"q{i}", f"question {i}", ("yes",), "qa", "test"), (f"t{i}",))


class Rolls:
    """Groups in the making; one is complete when the test calls `finish`, with tokens of the versions given."""

    def __init__(self) -> None:
        self.started: list[int] = []
        self.running: dict[int, tuple[Planned, asyncio.Future[Group]]] = {}
        self.alike: set[int] = set()

    async def __call__(self, planned: Planned) -> Group:
        self.started.append(planned.index)
        self.running[planned.index] = planned, asyncio.get_running_loop().create_future()
        try:
            return await self.running[planned.index][1]
        finally:
            del self.running[planned.index]

    async def finish(self, index: int, versions: Sequence[int] = (0,), spread: bool = True) -> None:
        planned, future = self.running[index]
        if not spread:
            self.alike.add(index)
        n, source = len(versions), "model" if versions else "program"
        segment = Segment(source, (1,) * n, "", (-1.0,) * n, tuple(versions))
        trajectory = Trajectory(planned.ids[0], planned.question, (1,), (segment,), "stop", 0, 1.0, ())
        future.set_result(Group(planned.question, (trajectory,)))
        await settle()

    async def fail(self, index: int, error: Exception) -> None:
        self.running[index][1].set_exception(error)
        await settle()

    def has_spread(self, group: Group) -> bool:
        return int(group.question.id[1:]) not in self.alike


async def settle() -> None:
    """Until every task waits for the test."""
    for _ in range(10):
        await asyncio.sleep(0)


def stream_of(rolls: Rolls, length: int | None = None, **settings) -> GroupStream:
    settings = {"batch": 2, "version": 0, "last": 10**6, "has_spread": rolls.has_spread} | settings
    return GroupStream(rolls, plan(length), **settings)


async def ask(stream: GroupStream, version: int) -> asyncio.Task[StreamBatch]:
    task = asyncio.create_task(stream.next_batch(version))
    await settle()
    return task


def indices(batch: StreamBatch) -> list[int]:
    return [int(group.question.id[1:]) for group in batch.groups]

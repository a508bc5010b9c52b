"""Groups rolled out ahead of the updates that use them, within a bound on staleness."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

from etagent_jax.trajectory import Group, Question


@dataclass(frozen=True, slots=True)
class Planned:
    """A group to be rolled out: its place in the run, its question, the ids of its trajectories."""

    index: int
    question: Question
    ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StreamBatch:
    """The groups of one update, in plan order, and what was planned for each.

    staleness: of each group, in weight versions.  stale, without_spread, aborted: how many groups were given up since
    the batch before, because they were too old, all alike, or still running when the batch was full.
    """

    planned: tuple[Planned, ...]
    groups: tuple[Group, ...]
    staleness: tuple[int, ...]
    stale: int
    without_spread: int
    aborted: int


@dataclass(frozen=True, slots=True, eq=False)
class _Complete:
    """oldest, newest: versions of its model tokens.  bare: without spread, and so to be replaced if it may be."""

    planned: Planned
    group: Group
    oldest: int
    newest: int
    bare: bool


class GroupStream:
    """Groups of a plan, made by `roll`, handed on in batches of `batch`.

    version, last: of the first batch, and of the last that will be asked for.  A group's staleness in the batch of a
    version is that version less the oldest that sampled one of its tokens.  max_staleness: beyond it a group is given
    up, as is one with a token of a version that is not there yet (left by a run that was stopped and goes on from an
    earlier step); groups of so many batches are rolled out ahead, so that with 0 none are.  spare: so many groups more
    than are needed are started; at max_staleness 0 those that still run when a batch is full are cancelled, else they
    go on into the next.  replacements: for so many groups a batch that are complete without spread
    (`has_spread(group)` is false) others are started, and take their places if they are better; with 0 spread does not
    matter.  batch: may be 0, of a process without a share.  One event loop at a time.
    """

    def __init__(
        self, roll: Callable[[Planned], Awaitable[Group]], plan: Iterator[Planned], *, batch: int, version: int,
        last: int, max_staleness: int = 0, spare: int = 0, replacements: int = 0,
        has_spread: Callable[[Group], bool] = lambda _: True,
    ):  # fmt: skip
        for name, value, least in (("batch", batch, 0), ("max_staleness", max_staleness, 0), ("spare", spare, 0),
                                   ("replacements", replacements, 0)):  # fmt: skip
            if value < least:
                raise ValueError(f"stream of groups: {name} must be at least {least}, got {value}")
        self._roll, self._plan, self._has_spread = roll, plan, has_spread
        self._batch, self._max_staleness, self._spare, self._replacements = batch, max_staleness, spare, replacements
        self._first, self._last, self._version = version, last, version - 1
        self._used = self._stale = 0
        self._open: set[int] = set()
        self._running: dict[int, asyncio.Task[None]] = {}
        self._complete: list[_Complete] = []
        self._failed: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    async def next_batch(self, version: int) -> StreamBatch:
        """The groups for the update of `version`, once they are complete.

        First starts what may run by now: whatever is sampled from here on should be sampled with weights of `version`.
        When the plan has ended, the last batch is smaller, and after it comes RuntimeError.  The first error of a
        `roll` (or of the plan, or of `has_spread`) cancels what runs, and is raised here, now and ever after.
        """
        if not self._version < version <= self._last:
            raise ValueError(
                f"stream of groups: versions must grow, up to {self._last}, got {version} after {self._version}"
            )
        self._version = version
        while self._failed is None:
            self._drop_stale()
            self._admit()
            if len(self._complete) - self._replaced() >= self._batch or not self._running:
                break
            self._changed.clear()
            await self._changed.wait()
        if self._failed is not None:
            await self.close()
            self._failed.result()
        if self._batch and not self._complete:
            raise RuntimeError(f"the plan of groups has ended: none is left for the update of version {version}")
        aborted = [] if self._max_staleness else await self._cancel()
        self._open.difference_update(aborted)
        return self._take(len(aborted))

    def open(self) -> list[int]:
        """Indices of the groups that were started and neither used nor given up; a resumed run plans them again."""
        return sorted(self._open)

    async def close(self) -> None:
        """Cancel what runs, and wait until it has ended; it stays among the `open`."""
        await self._cancel()

    def _drop_stale(self) -> None:
        oldest = self._version - self._max_staleness
        stale = [c for c in self._complete if c.oldest < oldest or c.newest > self._version]
        self._complete = [c for c in self._complete if c not in stale]
        self._open.difference_update(c.planned.index for c in stale)
        self._stale += len(stale)

    def _admit(self) -> None:
        """Start groups until as many are open as may be: those of this batch and of max_staleness more, the spare."""
        batches = min(self._version + self._max_staleness, self._last) - self._first + 1
        while len(self._open) + self._used - self._replaced() < batches * self._batch + self._spare:
            planned = next(self._plan, None)
            if planned is None:
                break
            if planned.index in self._open:
                raise ValueError(f"stream of groups: group {planned.index} is planned twice")
            self._open.add(planned.index)
            task = self._running[planned.index] = asyncio.create_task(self._run(planned))
            task.add_done_callback(self._ended)

    def _replaced(self) -> int:
        """How many of the complete groups lack spread and have others started in their places."""
        return min(sum(c.bare for c in self._complete), self._replacements)

    async def _run(self, planned: Planned) -> None:
        group = await self._roll(planned)
        if planned.index not in self._running:  # cancelled, and did not heed it
            return
        bare = self._replacements > 0 and not self._has_spread(group)
        versions = {v for t in group.trajectories for s in t.segments for v in s.weight_versions} or {self._version}
        self._complete.append(_Complete(planned, group, min(versions), max(versions), bare))
        self._admit()
        del self._running[planned.index]
        self._changed.set()

    def _ended(self, task: asyncio.Task[None]) -> None:
        failed = task.cancelled() or task.exception() is not None
        if failed and self._failed is None and task in self._running.values():
            self._failed = task
            for other in self._running.values():
                other.cancel()
            self._changed.set()

    async def _cancel(self) -> list[int]:
        """Cancel what runs, wait until it has ended, and say which groups that were."""
        running, self._running = self._running, {}
        for task in running.values():
            task.cancel()
        await asyncio.gather(*running.values(), return_exceptions=True)
        return list(running)

    def _take(self, aborted: int) -> StreamBatch:
        """The oldest complete groups, those without spread last; what was replaced and is not needed is given up."""
        replaced = self._replaced()
        self._complete.sort(key=lambda c: (c.bare, c.oldest, c.planned.index))
        chosen, rest = self._complete[: self._batch], self._complete[self._batch :]
        given_up = rest[max(len(rest) - replaced, 0) :]
        chosen.sort(key=lambda c: c.planned.index)
        self._complete = rest[: len(rest) - len(given_up)]
        self._open.difference_update(c.planned.index for c in (*chosen, *given_up))
        self._used += len(chosen)
        stale, self._stale = self._stale, 0
        staleness = tuple(self._version - c.oldest for c in chosen)
        planned, groups = tuple(c.planned for c in chosen), tuple(c.group for c in chosen)
        return StreamBatch(planned, groups, staleness, stale, len(given_up), aborted)

"""The groups of one calibration round, rolled out for its updates."""

import asyncio
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from ml_collections import ConfigDict

from etagent_jax import distributed
from etagent_jax.data.store import TrajectoryLog
from etagent_jax.rollout.agent import Agent
from etagent_jax.rollout.branching import branching
from etagent_jax.rollout.groups import GroupFunction, Rollouts, plain
from etagent_jax.rollout.stream import GroupStream, Planned
from etagent_jax.stages import setup
from etagent_jax.stages.directory import StageDirectory
from etagent_jax.stages.sampling import gather_groups, own_log, progress, read_all
from etagent_jax.trajectory import Group, Question, Trajectory


@dataclass(frozen=True)
class Position:
    """How far the plan of a round has been used.

    next: for each of the processes that did so, the first index of its share that it had not started.  open: indices
    below those that were started, and neither used nor dropped.
    """

    next: tuple[int, ...]
    open: frozenset[int]

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Self:
        return cls(tuple(row["next"]), frozenset(row["open"]))

    def used(self, index: int, size: int) -> bool:
        """Whether group `index` is done with; of each `size` groups, a process has every n-th."""
        return index < self.next[index % size % len(self.next)] and index not in self.open


class Round:
    """The groups of a round's updates, rolled out ahead of them as far as `max_staleness` allows.

    The plan goes through the selected questions in a seeded order, again and again.  Group `index` of it has its place
    at step `index // size` of the round, which uses it unless others are late or given up.  The processes share out
    each place.  A trajectory is on disk the moment it is finished, in the file of its place; those that are there
    already, of a run that was stopped, are not sampled again.
    """

    def __init__(
        self, config: ConfigDict, stage: str, directory: StageDirectory, agent: Agent, selected: Sequence[Question],
        version: int, position: Position | None, has_spread: Callable[[Group], bool],
    ):  # fmt: skip
        c, round = config[stage], version // config[stage].steps
        self._config, self._stage, self._directory, self._agent = config, stage, directory, agent
        self._round, self._selected, self._samples, self._steps = round, selected, c.samples, c.steps
        self._size = min(c.questions_per_step, len(selected))
        place = version - round * c.steps
        self._position = position or Position((place * self._size,), frozenset())
        self._next = min(self._position.next)
        self._before: tuple[int, list[int]] | None = None
        self._logs: dict[int, TrajectoryLog] = {}
        self._finished: dict[int, dict[str, Trajectory]] = {}
        self._slots = asyncio.Semaphore(config.rollout.concurrency)
        self._sample = group_function(c)
        share = len(distributed.my_share(range(self._size)))
        self._bar = progress(share, stage)
        self._stream = GroupStream(
            self._roll, self._plan(), batch=share, version=version, last=(round + 1) * c.steps - 1,
            has_spread=has_spread, **c.stream,
        )  # fmt: skip

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await distributed.undisturbed(self._stream.close())
        for log in self._logs.values():
            log.close()
        self._bar.close()

    async def groups(self, version: int) -> tuple[list[Group], dict[str, float]]:
        """The groups for the update of `version`, the same on all processes, and how many were given up, and why."""
        self._bar.reset()
        self._before = self._here()  # where to go on from if not all processes get their batch
        batch = await distributed.together(self._stream.next_batch(version))
        self._before = None
        mine = [(planned.index, group) for planned, group in zip(batch.planned, batch.groups, strict=True)]
        groups = gather_groups(mine, self._question)
        self._let_go()
        counts = {"groups_stale": batch.stale, "groups_replaced": batch.without_spread, "groups_aborted": batch.aborted}
        all_counts = distributed.exchange(counts)
        return groups, {name: sum(each[name] for each in all_counts) for name in counts}

    def position(self) -> dict[str, Any]:
        """How far all processes have come, to be given to `Position.from_json` in a run that goes on from here."""
        shares = distributed.exchange(self._before or self._here())
        return {"next": [next for next, _ in shares], "open": sorted(i for _, open in shares for i in open)}

    def _here(self) -> tuple[int, list[int]]:
        """The first index of this process's share that is not started, and those below it that are yet to be used."""
        end, share = max(self._next, *self._position.next), distributed.my_share(range(self._size))
        skipped = (i for i in range(self._next, end) if i % self._size in share)
        later = [i for i in skipped if not self._position.used(i, self._size)]
        return end, sorted({*self._stream.open(), *later})

    def _question(self, index: int) -> Question:
        """The `index`-th question of the endless order."""
        epoch, at = divmod(index, len(self._selected))
        return self._selected[_order(self._config.seed, self._stage, self._round, epoch, len(self._selected))[at]]

    def _plan(self) -> Iterator[Planned]:
        """This process's share, from the position on."""
        if not distributed.my_share(range(self._size)):
            return
        for place in itertools.count(min([*self._position.next, *self._position.open]) // self._size):
            for index in distributed.my_share(range(place * self._size, (place + 1) * self._size)):
                self._next = index + 1
                if not self._position.used(index, self._size):
                    yield self._planned(index)

    def _planned(self, index: int) -> Planned:
        question = self._question(index)
        place = index // self._size
        again = sum(self._question(i).id == question.id for i in range(place * self._size, index))
        tag = f"{self._stage}/{self._name(place)}/{question.id}"
        ids = tuple(f"{tag}/{i}" for i in range(again * self._samples, (again + 1) * self._samples))
        return Planned(index, question, ids)

    async def _roll(self, planned: Planned) -> Group:
        place = planned.index // self._size
        file = self._directory.trajectories / f"{self._name(place)}.jsonl"
        if place not in self._logs:
            self._logs[place] = own_log(file)
            self._finished[place] = {t.id: t for t in read_all(file)}
        rollouts = Rollouts(
            seed=self._config.seed, temperature=self._config[self._stage].temperature, top_p=1.0, slots=self._slots,
            finished=self._finished[place], on_trajectory=self._logs[place].append,
        )  # fmt: skip
        group = await self._sample(self._agent, planned.question, ids=planned.ids, rollouts=rollouts)
        self._bar.update()
        return group

    def _name(self, place: int) -> str:
        """Of a place's file and in its trajectories' ids; those past the round's last step must not look like the
        next round's."""
        step = self._round * self._steps + place
        return f"step-{step:05d}" if place < self._steps else f"round-{self._round}-{place:05d}"

    def _let_go(self) -> None:
        """Close the files of places that nothing will be written to again."""
        first = min([self._next, *self._stream.open()]) // self._size
        for place in [place for place in self._logs if place < first]:
            self._logs.pop(place).close()
            del self._finished[place]


def group_function(section: ConfigDict) -> GroupFunction:
    """How a stage rolls out a group: plainly, or with branches, by its settings."""
    if not section.branching.initial:
        return functools.partial(plain, tool_free=section.tool_free)
    return functools.partial(branching, tool_free=section.tool_free, **section.branching)


@functools.lru_cache(maxsize=8)
def _order(seed: int, stage: str, round: int, epoch: int, count: int) -> np.ndarray:
    return setup.np_rng(seed, stage, round, epoch).permutation(count)

"""The groups of a calibration round: their order, what is on disk, and a round that goes on where another stopped."""

import asyncio
import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import phase2
from etagent_jax import distributed
from etagent_jax.data.store import TrajectoryLog
from etagent_jax.policy.interface import Completion
from etagent_jax.rollout.agent import Agent, Budget
from etagent_jax.stages import round as rounds
from etagent_jax.stages import setup
from etagent_jax.stages.directory import StageDirectory
from etagent_jax.stages.round import Position, Round
from etagent_jax.world import SYSTEM_PROMPT, TOOLS
from tests.stand_ins import CountingTool, WritingPolicy


class VersionedPolicy(WritingPolicy):
    """Writes with the weights of `version`."""

    version = 0

    async def generate(self, token_ids, sampling, session="") -> Completion:
        completion = await super().generate(token_ids, sampling, session)
        return dataclasses.replace(completion, weight_versions=(self.version,) * len(completion.token_ids))


@pytest.fixture
def config(tmp_path):
    config = phase2.get_config("tiny")
    config.run, config.seed = str(tmp_path), 0
    config.questions.countries = 60
    config.phase2.update({"questions_per_step": 3, "samples": 2, "steps": 4, "rounds": 2})
    return config


@pytest.fixture
def policy(tokenizer):
    return VersionedPolicy(tokenizer)


def open_round(config, policy, version: int, position: Position | None = None, questions: int = 5, **more) -> Round:
    world = setup.world(config)
    tools = {name: CountingTool(name, world) for name in TOOLS}
    agent = Agent(policy, policy.tokenizer, tools, SYSTEM_PROMPT, Budget(10, 10, 1024, 30.0))
    selected = setup.questions(config, "train", questions, "selected")
    more = {"has_spread": lambda group: True} | more
    return Round(config, "phase2", StageDirectory(config, "phase2"), agent, selected, version, position, **more)


async def until(holds) -> None:
    while not holds():  # noqa: ASYNC110
        await asyncio.sleep(0)


async def steps_of(config, policy, versions, position=None, **more) -> tuple[list[list[str]], dict]:
    """The trajectories' ids of each step, and the position after the last."""
    ids = []
    async with open_round(config, policy, versions[0], position, **more) as round:
        for version in versions:
            policy.version = version
            groups, _ = await round.groups(version)
            ids.append([t.id for group in groups for t in group.trajectories])
        return ids, round.position()


async def test_a_round_goes_through_its_questions_again_and_again(config, policy):
    ids, position = await steps_of(config, policy, range(4))
    names = [id.split("/") for step in ids for id in step]
    assert [name[1] for name in names] == [f"step-{step:05d}" for step in range(4) for _ in range(6)]
    order = [name[2] for name in names[::2]]
    assert len(set(order[:5])) == len(set(order[5:10])) == 5
    assert len({tuple(name) for name in names}) == 24
    assert position == {"next": [12], "open": []}


async def test_no_two_groups_of_a_round_share_a_trajectory(config, policy):
    planned = [open_round(config, policy, 0)._planned(index) for index in range(60)]
    ids = [id for group in planned for id in group.ids]
    assert len(set(ids)) == len(ids) == 120
    twice = [i for i in range(60) if any(planned[i].question == planned[j].question for j in range(i // 3 * 3, i))]
    assert twice  # where an order ends and the next begins, a step can have a question twice
    assert all(id.rsplit("/", 1)[1] in "23" for i in twice for id in planned[i].ids)


async def test_what_is_on_disk_is_not_sampled_again(config, policy):
    before, _ = await steps_of(config, policy, [0, 1])
    policy.served.clear()
    again, position = await steps_of(config, policy, [1], Position.from_json({"next": [3], "open": []}))
    assert again == before[1:]
    assert policy.served == []
    assert position == {"next": [6], "open": []}
    file = StageDirectory(config, "phase2").trajectories / "step-00001.jsonl"
    assert sorted(t.id for t in TrajectoryLog(file).read()) == sorted(before[1])


async def test_ahead_of_the_update_no_more_is_rolled_out_than_staleness_allows(config, policy):
    config.phase2.stream.max_staleness = 1
    async with open_round(config, policy, 0) as round:
        await round.groups(0)
        await until(lambda: round.position() == {"next": [6], "open": [3, 4, 5]})
        for _ in range(100):
            await asyncio.sleep(0)
        assert round.position() == {"next": [6], "open": [3, 4, 5]}
        policy.version = 1
        groups, given_up = await round.groups(1)
        assert {v for g in groups for t in g.trajectories for s in t.segments for v in s.weight_versions} == {0}
        assert given_up == {"groups_stale": 0, "groups_replaced": 0, "groups_aborted": 0}
        policy.version = 2
        await round.groups(2)  # rolled out with version 1
        position = round.position()
    assert position["next"] == [12]  # the round has four steps, of three groups
    assert position["open"] == [9, 10, 11]

    policy.version = 3
    last, after = await steps_of(config, policy, [3], Position.from_json(position))
    assert [id.split("/")[1] for id in last[0]] == ["step-00003"] * 6
    assert after == {"next": [12], "open": []}


async def test_tokens_of_an_update_that_was_lost_are_not_learned_from(config, policy):
    config.phase2.stream.max_staleness = 1
    policy.version = 2  # of a run that was killed before its checkpoint of step 2
    async with open_round(config, policy, 0) as round:
        waiting = asyncio.create_task(round.groups(0))
        log = TrajectoryLog(StageDirectory(config, "phase2").trajectories / "step-00000.jsonl")
        await until(lambda: len(list(log.read())) == 6)
        policy.version = 0
        groups, given_up = await waiting
    assert given_up["groups_stale"] >= 3
    assert {v for g in groups for t in g.trajectories for s in t.segments for v in s.weight_versions} == {0}


async def test_groups_without_spread_are_replaced_by_later_ones(config, policy):
    config.phase2.stream.replacements = 2
    seen = []

    def has_spread(group) -> bool:
        seen.append(group)
        return len(seen) > 1

    async with open_round(config, policy, 0, has_spread=has_spread) as round:
        groups, given_up = await round.groups(0)
        position = round.position()
    assert given_up["groups_replaced"] == 1
    assert len(groups) == 3
    assert seen[0] not in groups
    assert position == {"next": [4], "open": []}


@given(
    size=st.integers(1, 7), processes=st.integers(1, 4), now=st.integers(1, 4), done=st.lists(st.integers(0, 40)),
    started=st.integers(0, 5),
)  # fmt: skip
def test_any_number_of_processes_goes_on_with_what_the_others_have_not_used(size, processes, now, done, started):
    mine = [[i for i in range(size * 12) if i % size % processes == p] for p in range(processes)]
    next = tuple(share[min(started, len(share) - 1)] if share else 0 for share in mine)
    begun = {i for share, first in zip(mine, next, strict=True) for i in share if i < first}
    open = begun - set(done)
    position = Position.from_json({"next": list(next), "open": sorted(open)})
    assert {i for i in range(size * 12) if position.used(i, size)} == begun & set(done)


async def test_what_other_processes_had_used_stays_used_when_fewer_go_on(config, policy):
    of_three = Position.from_json({"next": [12, 13, 8], "open": [2, 5]})
    steps, position = await steps_of(config, policy, [2], of_three)
    assert [id.split("/")[1] for id in steps[0][::2]] == ["step-00000", "step-00001", "step-00002"]
    assert position == {"next": [13], "open": [11, 12]}


async def test_a_stop_before_all_processes_have_their_batch_leaves_it_to_be_used(config, policy, monkeypatch):
    async def stopped_elsewhere(work):
        await work
        raise asyncio.CancelledError

    async with open_round(config, policy, 0) as round:
        await round.groups(0)
        policy.version = 1
        monkeypatch.setattr(distributed, "together", stopped_elsewhere)
        with pytest.raises(asyncio.CancelledError):
            await round.groups(1)
        assert round.position() == {"next": [3], "open": []}


async def test_a_process_without_a_share_has_no_groups(config, policy, monkeypatch):
    monkeypatch.setattr(distributed, "my_share", lambda items: items[5::6])
    config.phase2.stream.spare = 2
    async with open_round(config, policy, 0) as round:
        assert (await round.groups(0))[0] == []


def test_the_order_is_that_of_the_seed_the_stage_the_round_and_the_epoch():
    orders = [tuple(rounds._order(*key, 50)) for key in ((0, "a", 0, 0), (1, "a", 0, 0), (0, "b", 0, 0), (0, "a", 1, 0),
                                                         (0, "a", 0, 1))]  # fmt: skip
    assert len(set(orders)) == 5
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert distributed.my_share(range(3)) == range(3)

"""The collector over groups of scripted rollouts."""

import asyncio
import random
from contextlib import aclosing

import pytest

from etagent_jax.rollout.agent import Agent, Budget
from etagent_jax.rollout.collector import collect, collect_all
from etagent_jax.rollout.groups import Rollouts, plain, trajectory_seed
from etagent_jax.trajectory import Question, Trajectory
from tests.scripted import ANSWER, BUDGET, QUESTION, SEARCH, FixedTool, ScriptedPolicy, make_agent

QUESTIONS = [Question(f"q{i}", f"What is {i}?", ("Mira",), "qa", "one_hop") for i in range(4)]
OPTIONS = {"tag": "round", "seed": 3, "temperature": 1.0, "concurrency": 3}


async def settle() -> None:
    """Everything has been done that waits for nothing."""
    for _ in range(50):
        await asyncio.sleep(0)


async def test_six_calls_run_side_by_side(tokenizer):
    agent = make_agent(tokenizer, SEARCH, ANSWER, seconds=0.5)
    await collect_all(agent, [QUESTION], 6, **OPTIONS | {"concurrency": 6}, on_trajectory=lambda _: None)
    assert agent.tools["search"].most_running == 6


@pytest.mark.parametrize("concurrency", [1, 3, 100])
async def test_collect_all_orders_groups_and_trajectories(tokenizer, concurrency):
    """Sample 0 of each question takes longest, so that finishing order is not the order asked for."""
    policy = ScriptedPolicy(tokenizer, lambda session, k: SEARCH if session.endswith("/0") and k < 3 else ANSWER)
    search = FixedTool("search")
    agent = Agent(policy, tokenizer, {"search": search}, "Answer.", Budget(5, 5, 400, 60))
    finished = []
    groups = await collect_all(
        agent, QUESTIONS, 3, **OPTIONS | {"concurrency": concurrency}, on_trajectory=finished.append
    )
    assert [group.question for group in groups] == QUESTIONS
    assert [[t.id for t in group.trajectories] for group in groups] == [
        [f"round/q{q}/{i}" for i in range(3)] for q in range(4)
    ]
    assert sorted(t.id for t in finished) == sorted(t.id for group in groups for t in group.trajectories)
    assert all(t.seed == trajectory_seed(3, t.id) for t in finished)
    assert len({t.seed for t in finished}) == 12
    if concurrency > 1:
        assert [t.id for t in finished] != sorted(t.id for t in finished)


async def test_at_most_so_many_rollouts_at_once(tokenizer):
    agent = make_agent(tokenizer, SEARCH, ANSWER, seconds=0.001)
    await collect_all(agent, QUESTIONS, 5, **OPTIONS, on_trajectory=lambda _: None)
    assert agent.tools["search"].most_running == 3


async def test_a_group_is_yielded_as_soon_as_it_is_complete(tokenizer):
    """The first question never finishes; the others' groups arrive all the same."""
    agent = make_agent(tokenizer, SEARCH, ANSWER)
    finishing = agent.rollout

    async def rollout(question, **options):
        if question.id == "q0":
            await asyncio.Event().wait()
        return await finishing(question, **options)

    agent.rollout = rollout
    groups = collect(agent, QUESTIONS, 2, **OPTIONS, on_trajectory=lambda _: None)
    async with aclosing(groups):
        ids = [(await anext(groups)).question.id for _ in range(3)]
    assert sorted(ids) == ["q1", "q2", "q3"]
    assert len(asyncio.all_tasks()) == 1, "leaving early cancels what is running"


async def test_finished_trajectories_are_not_run_again(tokenizer):
    agent = make_agent(tokenizer, ANSWER)
    first: list[Trajectory] = []
    expected = await collect_all(agent, QUESTIONS, 2, **OPTIONS, on_trajectory=first.append)
    finished = {t.id: t for t in first if t.question.id in ("q1", "q2") or t.id == "round/q3/1"}
    again: list[Trajectory] = []
    groups = [group async for group in collect(agent, QUESTIONS, 2, **OPTIONS, finished=finished,
                                               on_trajectory=again.append)]  # fmt: skip
    assert sorted(t.id for t in again) == ["round/q0/0", "round/q0/1", "round/q3/0"]
    assert {g.question.id for g in groups[:2]} == {"q1", "q2"}
    by_id = {g.question.id: g for g in groups}
    for group in expected:
        for before, after in zip(group.trajectories, by_id[group.question.id].trajectories, strict=True):
            assert (before.id, before.seed, before.token_ids) == (after.id, after.seed, after.token_ids)
            assert (after is before) == (before.id in finished)


async def test_groups_are_started_as_slots_come_free(tokenizer):
    """A set of questions is not a task for each of its rollouts from the start."""
    agent = make_agent(tokenizer, SEARCH, ANSWER)
    begun, stuck = [], asyncio.Event()
    finishing = agent.rollout

    async def rollout(question, **options):
        begun.append(options["id"])
        if question.id in ("q40", "q41"):
            await stuck.wait()
        return await finishing(question, **options)

    agent.rollout = rollout
    questions = [Question(f"q{i}", "What?", ("Mira",), "qa", "one_hop") for i in range(20_000)]
    groups = collect(agent, questions, 8, **OPTIONS | {"concurrency": 12}, on_trajectory=lambda _: None)
    async with aclosing(groups):
        assert [(await anext(groups)).question.id for _ in range(40)] == [f"q{i}" for i in range(40)]
        await settle()
        assert len(begun) == 40 * 8 + 12, "as many as there are slots"
        assert len(asyncio.all_tasks()) < 40
        stuck.set()
        assert {(await anext(groups)).question.id for _ in range(3)} == {"q40", "q41", "q42"}
    assert len(asyncio.all_tasks()) == 1


@pytest.mark.parametrize("concurrency", [1, 7, 20])
async def test_all_slots_are_used_until_the_last_rollouts(tokenizer, concurrency):
    agent = make_agent(tokenizer, ANSWER)
    finishing, waiting = agent.rollout, []

    async def rollout(question, **options):
        waiting.append(asyncio.Event())
        await waiting[-1].wait()
        return await finishing(question, **options)

    agent.rollout = rollout
    questions = [Question(f"q{i}", "What?", ("Mira",), "qa", "one_hop") for i in range(12)]
    options = OPTIONS | {"concurrency": concurrency, "on_trajectory": lambda _: None}
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(collect_all(agent, questions, 5, **options))
        draw = random.Random(0)
        for left in range(60, 0, -1):
            await settle()
            assert len(waiting) == min(concurrency, left)
            waiting.pop(draw.randrange(len(waiting))).set()


async def test_the_last_of_a_group_may_be_free_of_tools(tokenizer):
    agent = make_agent(tokenizer, SEARCH, ANSWER)
    rollouts = Rollouts(0, 1.0, 1.0, asyncio.Semaphore(2), {}, lambda _: None)
    group = await plain(agent, QUESTION, ids=list("abcde"), rollouts=rollouts, tool_free=2)
    assert [[call.result.status for call in t.calls] for t in group.trajectories] == [["ok"]] * 3 + [["refused"]] * 2
    assert len(agent.tools["search"].inputs) == 3
    assert len({t.prompt_ids for t in group.trajectories}) == 1
    with pytest.raises(ValueError, match="tool_free must be between 0 and the 5 rollouts of a group, got 6"):
        await plain(agent, QUESTION, ids=list("abcde"), rollouts=rollouts, tool_free=6)


async def test_a_cancelled_group_leaves_its_slots(tokenizer):
    agent = make_agent(tokenizer, SEARCH, ANSWER, seconds=1000)
    slots = asyncio.Semaphore(2)
    group = asyncio.create_task(
        plain(agent, QUESTION, ids="abc", rollouts=Rollouts(3, 1.0, 1.0, slots, {}, lambda _: None))
    )
    await settle()
    assert slots.locked()
    group.cancel()
    with pytest.raises(asyncio.CancelledError):
        await group
    assert len(asyncio.all_tasks()) == 1
    await slots.acquire()
    assert not slots.locked(), "both are free again"


async def test_an_error_cancels_the_rest_and_propagates(tokenizer):
    def script(session: str, k: int) -> str:
        if session == "round/q2/0":
            raise RuntimeError("the server is gone")
        return SEARCH if session == "round/q0/0" else ANSWER

    search = FixedTool("search", seconds=1000)
    agent = Agent(ScriptedPolicy(tokenizer, script), tokenizer, {"search": search}, "Answer.", BUDGET)
    written: list[str] = []
    with pytest.raises(RuntimeError, match="the server is gone"):
        await collect_all(
            agent, QUESTIONS, 2, **OPTIONS | {"concurrency": 2}, on_trajectory=lambda t: written.append(t.id)
        )
    assert written == ["round/q0/1", "round/q1/0", "round/q1/1"]
    assert len(asyncio.all_tasks()) == 1


async def test_an_error_of_the_writer_propagates(tokenizer):
    def full(_):
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        await collect_all(make_agent(tokenizer, ANSWER), QUESTIONS, 2, **OPTIONS, on_trajectory=full)


async def test_collect_refuses_what_it_cannot_do(tokenizer):
    agent = make_agent(tokenizer, ANSWER)
    for questions, samples, message in [
        ([QUESTION, QUESTION], 2, "two questions have the same id"),
        ([QUESTION], 0, "samples and concurrency must be positive"),
    ]:
        with pytest.raises(ValueError, match=message):
            await collect_all(agent, questions, samples, **OPTIONS, on_trajectory=lambda _: None)
    assert await collect_all(agent, [], 2, **OPTIONS, on_trajectory=lambda _: None) == []


def test_seeds_are_the_same_everywhere():
    assert [trajectory_seed(0, "round/q0/0"), trajectory_seed(0, "round/q0/1")] == [1454938819, 282208058]
    assert all(0 <= trajectory_seed(seed, "t") < 2**31 for seed in range(1000))
    assert len({trajectory_seed(seed, "t") for seed in range(1000)}) == 1000

"""Entropy branching: which rollouts are forked, what a fork keeps, and when the rest of a group starts."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etagent_jax.policy.interface import Completion
from etagent_jax.rollout.agent import Agent, Budget
from etagent_jax.rollout.branching import branching, entropy_rise
from etagent_jax.rollout.groups import Rollouts, trajectory_seed
from etagent_jax.trajectory import Group, Question, Segment, ToolResult, Trajectory

QUESTION = Question("q", "What is the capital?", ("Mira",), "qa", "one_hop")
ANSWER = "<think>done</think><answer>\\boxed{Mira}</answer>"
OPTIONS = {"seed": 3, "temperature": 1.0, "top_p": 1.0}

Calls = Callable[[str], int]
LogProb = Callable[[str, int], float]


class WanderingPolicy:
    """After r results, session s searches for s:r if r < `calls(s)`, else it answers; `logprob(s, r)` each token.

    It takes `pace(s, r)` turns of the event loop.
    """

    def __init__(self, tokenizer, calls: Calls, logprob: LogProb, pace: Callable[[str, int], int]):
        self.tokenizer, self.calls, self.logprob, self.pace = tokenizer, calls, logprob, pace
        self.served: list[tuple[str, tuple[int, ...], int]] = []

    async def generate(self, token_ids, sampling, session=""):
        self.served.append((session, tuple(token_ids), sampling.seed))
        results = self.tokenizer.decode(token_ids).count("</result>")
        for _ in range(self.pace(session, results)):
            await asyncio.sleep(0)
        text = f"<think>so</think><search>{session}:{results}</search>" if results < self.calls(session) else ANSWER
        ids = self.tokenizer.encode(text)
        return Completion(
            ids, (self.logprob(session, results),) * len(ids), "stop", (len(self.served),) * len(ids)
        )  # fmt: skip


class GatedTool:
    """Answers a call once its gate is open; a call without one at once."""

    name, description = "search", "answers when it may"

    def __init__(self):
        self.gates: dict[str, asyncio.Event] = {}

    async def run(self, text: str) -> ToolResult:
        if text in self.gates:
            await self.gates[text].wait()
        return ToolResult("it is Mira", "ok")

    async def close(self) -> None: ...


def make_agent(
    tokenizer, *, budget: int = 3, calls: Calls = lambda _: 1, logprob: LogProb = lambda *_: -1.0,
    pace: Callable[[str, int], int] = lambda *_: 0,
) -> Agent:  # fmt: skip
    policy = WanderingPolicy(tokenizer, calls, logprob, pace)
    return Agent(policy, tokenizer, {"search": GatedTool()}, "Answer.", Budget(budget, budget, 2000, 60))


async def grow(
    agent: Agent, samples: int, *, tag="", slots=100, finished=(), on_trajectory=lambda _: None, **settings
) -> Group:
    rollouts = Rollouts(
        **OPTIONS, slots=asyncio.Semaphore(slots), finished={t.id: t for t in finished}, on_trajectory=on_trajectory
    )
    return await branching(
        agent, QUESTION, ids=[f"{tag}{i}" for i in range(samples)], rollouts=rollouts, **settings
    )  # fmt: skip


async def settle() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


def forks(group: Group) -> set[tuple[str, int]]:
    return {(t.origin.parent, t.origin.step) for t in group.trajectories if t.origin is not None}


def model_segment(logprobs) -> Segment:
    return Segment("model", (1,) * len(logprobs), "", tuple(logprobs), (0,) * len(logprobs))


def test_entropy_rise_is_the_difference_of_two_means_over_the_vocabularys_entropy():
    rng = np.random.default_rng(0)
    start, middle, after = -rng.exponential(size=30), -rng.exponential(size=9), -rng.exponential(size=25)
    segments = [model_segment(logprobs) for logprobs in (start, middle, after)]
    expected = (np.mean(-after[:20]) - np.mean(-start[:20])) / np.log(1000)
    assert entropy_rise(segments, 1000, 20) == pytest.approx(expected)
    expected = (np.mean(-middle) - np.mean(-start[:20])) / np.log(1000)
    assert entropy_rise(segments[:2], 1000, 20) == pytest.approx(expected), "a short turn is measured whole"


def test_entropy_rise_estimates_the_rise_of_the_entropy_of_the_distribution():
    rng = np.random.default_rng(0)
    entropies, segments = [], []
    for concentration in (0.3, 3.0):
        p = rng.dirichlet(np.full(50, concentration))
        entropies.append(-np.sum(p * np.log(p)))
        segments.append(model_segment(np.log(p[rng.choice(50, size=20_000, p=p)])))
    expected = (entropies[1] - entropies[0]) / np.log(50)
    assert entropy_rise(segments, 50, 20_000) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(
    ("settings", "start", "after"),
    [
        ({}, -1.0, -1.0),
        ({"weight": 1.0}, -0.2, -2.0),
        ({"weight": 1.0}, -2.0, -0.2),
        ({"probability": 0.1}, -0.1, -0.1),
        ({"probability": 0.0, "weight": 1.0}, -2.0, -1.0),
        ({"probability": 0.9, "weight": 1.0}, -1.0, -4.0),
    ],
)
async def test_a_rollout_is_forked_with_the_probability_of_the_formula(tokenizer, settings, start, after):
    agent = make_agent(tokenizer, budget=1, logprob=lambda _, results: after if results else start)
    n = 500
    groups = await asyncio.gather(*(grow(agent, 2, tag=f"{i}/", initial=1, **settings) for i in range(n)))
    rise = (start - after) / np.log(tokenizer.vocab_size)
    expected = np.clip(settings.get("probability", 0.5) + settings.get("weight", 0.2) * rise, 0, 1)
    forked = sum(len(forks(group)) for group in groups)
    assert abs(forked / n - expected) <= 4 * np.sqrt(expected * (1 - expected) / n)


async def test_the_same_rollouts_are_forked_however_long_each_takes(tokenizer):
    found = []
    for order in (1, -1):
        agent = make_agent(tokenizer, budget=2, calls=lambda _: 2, pace=lambda s, _, order=order: 50 + order * int(s))
        group = await grow(agent, 40, initial=10)
        found.append({fork for fork in forks(group) if int(fork[0]) < 10})
    assert found[0] == found[1]
    assert 0 < len(found[0]) < 20
    assert {step for _, step in found[0]} == {1, 2}
    assert 1 in Counter(parent for parent, _ in found[0]).values(), "a draw for each step"


@settings(max_examples=60)
@given(
    samples=st.integers(1, 12), initial=st.integers(1, 12), tool_free=st.integers(0, 4), calls=st.integers(0, 4),
    probability=st.sampled_from([0.0, 0.5, 1.0]), slots=st.sampled_from([1, 3, 100]), seed=st.integers(0, 1000),
    kept=st.integers(0, 12),
)  # fmt: skip
def test_a_group_is_whole_and_forks_keep_what_they_share(
    tokenizer, samples, initial, tool_free, calls, probability, slots, seed, kept
):
    """All over sizes, lengths, paces and what an interrupted run has left."""
    initial, tool_free = min(initial, samples), min(tool_free, samples - min(initial, samples))
    draw = lambda *key: random.Random(f"{seed}/{key}").random()
    agent = make_agent(
        tokenizer, calls=lambda s: int(draw(s) * (calls + 1)), logprob=lambda s, r: -draw(s, r),
        pace=lambda s, r: int(draw(s, r) * 20),
    )  # fmt: skip
    settings = {"initial": initial, "tool_free": tool_free, "probability": probability, "slots": slots}
    settings["weight"] = 0.2 if probability else 0.0  # or a great rise alone could fork

    async def twice() -> tuple[Group, Group, list[Trajectory]]:
        whole = await grow(agent, samples, **settings)
        finished = random.Random(seed).sample(whole.trajectories, min(kept, samples))
        del agent.policy.served[:]
        made: list[Trajectory] = []
        again = await grow(agent, samples, finished=finished, on_trajectory=made.append, **settings)
        assert all(t in again.trajectories for t in finished)
        assert sorted(t.id for t in (*made, *finished)) == sorted(t.id for t in again.trajectories)
        assert len(asyncio.all_tasks()) == 1
        return whole, again, made

    whole, again, made = asyncio.run(twice())
    for group in (whole, again):
        assert [t.id for t in group.trajectories] == [str(i) for i in range(samples)]
        assert all(t.seed == trajectory_seed(OPTIONS["seed"], t.id) for t in group.trajectories)
        assert all(
            t.origin is None for t in (*group.trajectories[:initial], *group.trajectories[samples - tool_free :])
        )
        assert not any(
            call.result.status == "ok" for t in group.trajectories[samples - tool_free :] for call in t.calls
        )
    by_id = {t.id: t for t in whole.trajectories}
    for fork in (t for t in whole.trajectories if t.origin is not None):
        shared = sum(map(len, by_id[fork.origin.parent].steps[: fork.origin.step]))
        assert fork.origin.operator == "branch"
        assert fork.segments[:shared] == by_id[fork.origin.parent].segments[:shared]
        assert fork.segments[shared - 1].call.result.status == "ok"
        assert fork.segments[shared].weight_versions[0] > fork.segments[shared - 2].weight_versions[0]
    first = {}
    for session, ids, sampling_seed in agent.policy.served:
        assert sampling_seed == trajectory_seed(OPTIONS["seed"], session)
        first.setdefault(session, ids)
    for t in made:
        shared = 0 if t.origin is None else sum(map(len, t.steps[: t.origin.step]))
        assert first[t.id] == t.prompt_ids + tuple(i for segment in t.segments[:shared] for i in segment.token_ids)
    if probability == 0:
        assert not forks(whole)


async def test_the_number_of_rollouts_is_never_exceeded(tokenizer):
    agent = make_agent(tokenizer, calls=lambda _: 3)
    group = await grow(agent, 16, initial=8, probability=1.0)
    assert Counter(t.origin is not None for t in group.trajectories) == {True: 8, False: 8}
    group = await grow(agent, 8, initial=1, probability=1.0)
    assert forks(group) > {("0", step) for step in (1, 2, 3)}
    assert len(forks(group)) == 7, "one rollout of three calls, and its forks, can be forked seven times"


async def test_the_rest_starts_at_once_when_nothing_can_be_forked_any_more(tokenizer):
    """The rollouts that were begun still write when the last of their calls have been decided on."""
    agent = make_agent(tokenizer, budget=6)
    agent.tools["search"].gates = {f"{i}:0": asyncio.Event() for i in range(3)}
    task = asyncio.create_task(grow(agent, 16, initial=3, probability=0.0, tool_free=2))
    started = lambda: {session for session, _, _ in agent.policy.served}
    await settle()
    assert started() == {"0", "1", "2", "14", "15"}
    agent.tools["search"].gates["0:0"].set()
    agent.tools["search"].gates["2:0"].set()
    await settle()
    assert started() == {"0", "1", "2", "14", "15"}, "rollout 1 may still be forked, up to 63 times"
    agent.tools["search"].gates["1:0"].set()
    await settle()
    assert started() == {str(i) for i in range(16)}
    assert forks(await task) == set()


async def test_no_more_ids_wait_for_a_slow_tool_than_forks_can_come_of_it(tokenizer):
    agent = make_agent(tokenizer, budget=1)
    agent.tools["search"].gates = {"1:0": asyncio.Event()}
    finished: list[str] = []
    task = asyncio.create_task(
        grow(agent, 12, initial=2, probability=0.0, on_trajectory=lambda t: finished.append(t.id))
    )
    await settle()
    assert sorted(map(int, finished)) == [0, *range(2, 11)]
    agent.tools["search"].gates["1:0"].set()
    assert len((await task).trajectories) == 12


async def test_ids_are_given_up_as_soon_as_a_decision_leaves_fewer_forks_to_come(tokenizer):
    agent = make_agent(tokenizer, budget=2, calls=lambda _: 2)
    agent.tools["search"].gates = {"0:0": asyncio.Event(), "0:1": asyncio.Event()}
    task = asyncio.create_task(grow(agent, 4, initial=1, probability=0.0))
    started = lambda: {session for session, _, _ in agent.policy.served}
    await settle()
    assert started() == {"0"}, "a rollout of two calls can be forked three times, its forks included"
    agent.tools["search"].gates["0:0"].set()
    await settle()
    assert started() == {"0", "1", "2"}
    agent.tools["search"].gates["0:1"].set()
    assert len((await task).trajectories) == 4


async def test_only_the_rollout_that_called_a_slow_tool_waits_for_it(tokenizer):
    agent = make_agent(tokenizer, budget=3)
    agent.tools["search"].gates = {"0:0": asyncio.Event()}
    finished: list[str] = []
    task = asyncio.create_task(
        grow(agent, 6, initial=3, probability=1.0, on_trajectory=lambda t: finished.append(t.id))
    )
    await settle()
    assert sorted(finished) == ["1", "2", "3", "4"]
    agent.tools["search"].gates["0:0"].set()
    assert ("0", 1) in forks(await task)


async def test_a_refused_call_forks_nothing(tokenizer):
    agent = make_agent(tokenizer, budget=1, calls=lambda _: 2)
    group = await grow(agent, 6, initial=2, probability=1.0)
    assert forks(group) == {("0", 1), ("1", 1)}
    assert [t.calls[-1].result.status for t in group.trajectories] == ["refused"] * 6


async def test_cancelling_a_group_leaves_no_task(tokenizer):
    agent = make_agent(tokenizer, calls=lambda _: 2)
    agent.tools["search"].gates = {f"{i}:{r}": asyncio.Event() for i in range(2, 8) for r in range(2)}
    task = asyncio.create_task(grow(agent, 8, initial=4, probability=1.0))
    await settle()
    assert len(asyncio.all_tasks()) > 4
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(asyncio.all_tasks()) == 1


async def test_the_first_error_of_a_fork_ends_the_group(tokenizer):
    def pace(session: str, results: int) -> int:
        if session == "5":
            raise RuntimeError("the server is gone")
        return 0

    agent = make_agent(tokenizer, pace=pace)
    agent.tools["search"].gates = {"0:0": asyncio.Event()}
    with pytest.raises(RuntimeError, match="the server is gone"):
        await grow(agent, 8, initial=4, probability=1.0)
    assert len(asyncio.all_tasks()) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"initial": 0}, "initial must be between 1 and the 4 rollouts of a group that may call, got 0"),
        ({"initial": 5}, "between 1 and the 4 rollouts"),
        ({"initial": 3, "tool_free": 2}, "between 1 and the 2 rollouts"),
        ({"initial": 1, "tool_free": -1}, "tool_free must be between 0 and the 4 rollouts"),
        ({"initial": 1, "probability": 1.5}, "got probability 1.5"),
        ({"initial": 1, "window": 0}, "and window 0"),
    ],
)
async def test_settings_that_no_group_can_meet_are_refused(tokenizer, settings, message):
    agent = make_agent(tokenizer)
    with pytest.raises(ValueError, match=message):
        await grow(agent, 4, **settings)
    assert agent.policy.served == []

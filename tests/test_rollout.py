"""The agent loop and the collector, driven by a scripted policy over the real tokenizer.

`ScriptedPolicy` stands in for an engine; real engines meet the same interface in their own tests.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import aclosing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etagent_jax import protocol
from etagent_jax.policy.interface import Completion, Sampling
from etagent_jax.rollout.agent import NO_CALLS_LEFT, Agent, Budget
from etagent_jax.rollout.collector import collect, collect_all, trajectory_seed
from etagent_jax.tokenizer import Tokenizer
from etagent_jax.tools.python import PythonTool
from etagent_jax.trajectory import Origin, Question, Segment, ToolResult, Trajectory

SEARCH = "<think>I search</think><search>the capital</search>"
PYTHON = "<think>I compute</think><python>print(1)</python>"
ANSWER = "<think>done</think><answer>\\boxed{Mira}</answer>"
BUDGET = Budget(calls_per_tool=2, calls=3, context=400, seconds=60)
QUESTION = Question("q1", "What is the capital?", ("Mira",), "qa", "one_hop")


class ScriptedPolicy:
    """Writes `script(session, k)` as completion k of a session, up to the first stop string.

    It ends with the end-of-sequence token where the script holds no stop string.
    """

    def __init__(self, tokenizer: Tokenizer, script: Callable[[str, int], str]):
        self.tokenizer, self.script = tokenizer, script
        self.served: list[tuple[tuple[int, ...], Sampling, str]] = []
        self.counts: Counter[str] = Counter()

    async def generate(self, token_ids: Sequence[int], sampling: Sampling, session: str = "") -> Completion:
        self.served.append((tuple(token_ids), sampling, session))
        text = self.script(session, self.counts[session])
        self.counts[session] += 1
        ids: list[int] = []
        finish = "length"
        for token in (*self.tokenizer.encode(text), *self.tokenizer.eos_ids):
            if len(ids) == sampling.max_new_tokens:
                break
            ids.append(token)
            written = self.tokenizer.decode(ids)
            if token in self.tokenizer.eos_ids or any(stop in written for stop in sampling.stop):
                finish = "stop"
                break
        return Completion(tuple(ids), (-0.5,) * len(ids), finish, (len(self.served),) * len(ids))


class FixedTool:
    """Answers every call alike, and counts those that run at the same time."""

    description = "answers every call alike"

    def __init__(self, name: str, output: str = "it is Mira", status: str = "ok", seconds: float = 0):
        self.name, self.output, self.status, self.seconds = name, output, status, seconds
        self.inputs: list[str] = []
        self.running = self.most_running = 0

    async def run(self, text: str) -> ToolResult:
        self.inputs.append(text)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        await asyncio.sleep(self.seconds)
        self.running -= 1
        return ToolResult(self.output, self.status)

    async def close(self) -> None: ...


def make_agent(tokenizer, *turns: str, budget: Budget = BUDGET, **tool) -> Agent:
    """An agent whose every session writes `turns`, one each completion, the last one again and again."""
    policy = ScriptedPolicy(tokenizer, lambda _, k: turns[min(k, len(turns) - 1)])
    tools = {name: FixedTool(name, **tool) for name in ("search", "python")}
    return Agent(policy, tokenizer, tools, "Answer with tools.", budget)


async def run(agent: Agent, **options) -> Trajectory:
    trajectory = await agent.rollout(QUESTION, **({"id": "t", "seed": 7, "temperature": 1.0} | options))
    assert_token_exact(agent, trajectory)
    return trajectory


def assert_token_exact(agent: Agent, trajectory: Trajectory) -> None:
    """Each prompt served for the trajectory is its start, up to the model segment that was then sampled."""
    served = [ids for ids, _, session in agent.policy.served if session == trajectory.id]
    ids, starts = trajectory.prompt_ids, []
    for segment in trajectory.segments:
        starts.append(ids)
        ids += segment.token_ids
    assert ids == trajectory.token_ids
    assert set(served) <= {*starts, ids}
    assert len(trajectory.token_ids) <= agent.budget.context


async def test_a_trajectory_from_question_to_answer(tokenizer):
    agent = make_agent(tokenizer, SEARCH + "never written", PYTHON, ANSWER + "never written")
    trajectory = await run(agent, top_p=0.9)
    assert trajectory.finish == "answer"
    assert trajectory.text == f"{SEARCH}<result>it is Mira</result>{PYTHON}<result>it is Mira</result>{ANSWER}"
    assert trajectory.answer == "Mira"
    assert trajectory.format_error is None
    assert [(call.tool, call.input) for call in trajectory.calls] == [("search", "the capital"), ("python", "print(1)")]
    assert [segment.source for segment in trajectory.segments] == ["model", "tool", "model", "tool", "model"]
    assert trajectory.prompt_ids == tokenizer.prompt("Answer with tools.", QUESTION.text)
    assert [segment.weight_versions[0] for segment in trajectory.segments[::2]] == [1, 2, 3]
    sent = [sampling for _, sampling, _ in agent.policy.served]
    assert {(s.seed, s.temperature, s.top_p, s.stop) for s in sent} == {
        (7, 1.0, 0.9, ("</search>", "</python>", "</answer>"))
    }
    assert [s.max_new_tokens for s in sent] == [BUDGET.context - len(ids) for ids, _, _ in agent.policy.served]


@pytest.mark.parametrize(
    ("turns", "finish", "error"),
    [
        (["<think>so</think>"], "stop", "no <answer> block"),
        ([SEARCH, ""], "stop", "no <answer> block"),
        (["<think>so</think></search>"], "malformed", "</search> without <search>"),
        (["<think><search>q</think></python>"], "malformed", "<search> inside <think>"),
        (["</answer>"], "answer", "does not start with <think>"),
        (["<think>" + "so " * 500], "length", "<think> is not closed"),
    ],
)
async def test_other_ends(tokenizer, turns, finish, error):
    trajectory = await run(make_agent(tokenizer, *turns))
    assert (trajectory.finish, trajectory.format_error) == (finish, error)


async def test_end_of_sequence_is_kept_as_a_model_token(tokenizer):
    trajectory = await run(make_agent(tokenizer, "<think>so</think>"))
    assert trajectory.segments[-1].token_ids[-1] in tokenizer.eos_ids


async def test_a_stop_string_may_end_inside_a_token(tokenizer):
    """As in large vocabularies, where one token may hold `>` and what follows it."""
    agent = make_agent(tokenizer, "")

    def complete(text):
        ids = tokenizer.encode(text)
        return Completion(ids, (-0.5,) * len(ids), "stop", (0,) * len(ids))

    written = iter([SEARCH + "<", "<think></think><answer>\\boxed{Mira}</answer>.\n"])

    class OverrunningPolicy:
        async def generate(self, token_ids, sampling, session=""):
            return complete(next(written))

    agent.policy = OverrunningPolicy()
    trajectory = await agent.rollout(QUESTION, id="t", seed=0, temperature=1.0)
    assert (trajectory.finish, trajectory.answer) == ("answer", "Mira")
    assert trajectory.calls[0].input == "the capital"
    assert trajectory.format_error == "a result does not follow a call"


async def test_a_refused_call_leaves_one_more_chance(tokenizer):
    agent = make_agent(tokenizer, SEARCH, SEARCH, SEARCH, ANSWER)
    trajectory = await run(agent)
    assert trajectory.finish == "answer"
    assert [call.result.status for call in trajectory.calls] == ["ok", "ok", "refused"]
    assert trajectory.segments[-2].text == f"<result>{NO_CALLS_LEFT}</result>"
    assert len(agent.tools["search"].inputs) == 2


async def test_the_second_refused_call_is_the_end(tokenizer):
    agent = make_agent(tokenizer, SEARCH)
    trajectory = await run(agent)
    assert trajectory.finish == "budget"
    assert [call.result.status for call in trajectory.calls] == ["ok", "ok", "refused", "refused"]
    assert trajectory.segments[-1].source == "tool"
    assert len(agent.tools["search"].inputs) == 2


async def test_calls_are_bounded_per_tool_and_in_all(tokenizer):
    one_tool_spent = await run(make_agent(tokenizer, SEARCH, SEARCH, SEARCH, PYTHON, ANSWER))
    assert [call.result.status for call in one_tool_spent.calls] == ["ok", "ok", "refused", "ok"]
    all_spent = await run(make_agent(tokenizer, SEARCH, SEARCH, PYTHON, PYTHON, PYTHON))
    assert [call.result.status for call in all_spent.calls] == ["ok", "ok", "ok", "refused", "refused"]
    none = await run(make_agent(tokenizer, SEARCH, ANSWER, budget=Budget(0, 0, 400, 60)))
    assert [call.result.status for call in none.calls] == ["refused"]


async def test_a_result_is_appended_whole_or_not_at_all(tokenizer):
    result = tokenizer.encode(protocol.render_result("it is Mira"))
    prompt = tokenizer.prompt("Answer with tools.", QUESTION.text)
    full = len(prompt) + len(tokenizer.encode(SEARCH)) + len(result)
    for context, sources in [(full - 1, ["model"]), (full, ["model", "tool"])]:
        trajectory = await run(make_agent(tokenizer, SEARCH, ANSWER, budget=Budget(2, 3, context, 60)))
        assert trajectory.finish == "length"
        assert [segment.source for segment in trajectory.segments] == sources
    one_more = await run(make_agent(tokenizer, SEARCH, ANSWER, budget=Budget(2, 3, full + 1, 60)))
    assert one_more.finish == "length"
    assert len(one_more.segments[-1].token_ids) == 1


async def test_out_of_time_keeps_what_was_complete(tokenizer):
    agent = make_agent(tokenizer, SEARCH, SEARCH, seconds=1000, budget=Budget(2, 3, 400, 0.05))
    trajectory = await run(agent)
    assert trajectory.finish == "timeout"
    assert trajectory.text == SEARCH
    assert trajectory.seconds >= 0.05


class StubbornPolicy:
    """Gives up, or never answers, without a token."""

    def __init__(self, finish: str | None):
        self.finish, self.served = finish, []

    async def generate(self, token_ids, sampling, session=""):
        if self.finish is None:
            await asyncio.Event().wait()
        return Completion((), (), self.finish, ())


@pytest.mark.parametrize(("finish", "expected"), [("abort", "abort"), ("length", "length"), (None, "timeout")])
async def test_nothing_written_is_an_empty_segment_of_the_program(tokenizer, finish, expected):
    agent = make_agent(tokenizer, "", budget=Budget(2, 3, 400, 0.05))
    agent.policy = StubbornPolicy(finish)
    trajectory = await run(agent)
    assert trajectory.finish == expected
    assert trajectory.segments == (Segment("program", (), ""),)
    assert trajectory.model_tokens == 0


async def test_a_prompt_longer_than_the_context_is_refused(tokenizer):
    agent = make_agent(tokenizer, ANSWER, budget=Budget(2, 3, 5, 60))
    with pytest.raises(ValueError, match=r"question q1: the prompt has \d+ tokens and the context only 5"):
        await run(agent)
    assert agent.policy.served == []


async def test_errors_of_tools_and_policies_propagate(tokenizer):
    agent = make_agent(tokenizer, SEARCH)

    async def broken(text):
        raise TimeoutError("of the tool, not of the rollout")

    agent.tools["search"].run = broken
    with pytest.raises(TimeoutError, match="of the tool"):
        await run(agent)


async def test_a_prefix_that_ends_in_a_call_has_it_made_first(tokenizer):
    first = (await run(make_agent(tokenizer, SEARCH, ANSWER))).segments[:2]
    edited = Segment("reviser", tokenizer.encode(PYTHON), PYTHON)
    agent = make_agent(tokenizer, PYTHON, PYTHON, ANSWER)
    origin = Origin("parent", "self_correction", 1)
    trajectory = await run(agent, prefix=(*first, edited), origin=origin)
    assert trajectory.segments[:3] == (*first, edited)
    assert [segment.source for segment in trajectory.segments] == [
        "model", "tool", "reviser", "tool", "model", "tool", "model", "tool", "model",
    ]  # fmt: skip
    assert [call.result.status for call in trajectory.calls] == ["ok", "ok", "ok", "refused"]
    assert agent.tools["python"].inputs == ["print(1)"] * 2
    assert trajectory.origin == origin


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("<think>wait, ", f"<think>wait, {ANSWER}"),
        (f"{SEARCH} wait, ", f"{SEARCH} wait, {ANSWER}"),
        (ANSWER, ANSWER),
        (f"<think></think>{SEARCH}\n", f"<think></think>{SEARCH}\n<result>it is Mira</result>{ANSWER}"),
    ],
)
async def test_a_prefix_is_gone_on_from(tokenizer, prefix, expected):
    segments = (Segment("program", tokenizer.encode(prefix), prefix),)
    trajectory = await run(make_agent(tokenizer, ANSWER), prefix=segments)
    assert (trajectory.text, trajectory.finish) == (expected, "answer")


async def test_an_end_without_a_stop_string_does_not_make_an_old_call(tokenizer):
    segments = (Segment("program", tokenizer.encode(SEARCH + " so"), SEARCH + " so"),)
    trajectory = await run(make_agent(tokenizer, "it is Mira"), prefix=segments)
    assert (trajectory.finish, trajectory.calls) == ("stop", ())


tool_output = st.lists(
    st.one_of(
        st.sampled_from(
            [ANSWER, SEARCH, "</result>", "<result>", "</search>", "<answer>", "<|im_end|>", "<|im_start|>", "<", ">"]
        ),
        st.text(max_size=8),
    ),
    max_size=6,
).map("".join)


@given(output=tool_output)
def test_nothing_a_tool_says_can_steer_the_agent(tokenizer, output):
    budget = Budget(2, 3, 4000, 60)

    async def both():
        return [await run(make_agent(tokenizer, SEARCH, PYTHON, ANSWER, output=text, budget=budget))
                for text in ("harmless", output)]  # fmt: skip

    harmless, hostile = asyncio.run(both())
    assert hostile.turns == harmless.turns
    assert hostile.finish == harmless.finish == "answer"
    assert (hostile.answer, hostile.format_error) == ("Mira", None)
    assert [call.input for call in hostile.calls] == [call.input for call in harmless.calls]
    assert [call.result.output for call in hostile.calls] == [output, output]
    results = [segment for segment in hostile.segments if segment.source == "tool"]
    assert not {*tokenizer.eos_ids, tokenizer.pad_id}.intersection(id for s in results for id in s.token_ids)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Budget(-1, 1, 1, 1), "calls_per_tool must be at least 0"),
        (lambda: Budget(1, -1, 1, 1), "calls must be at least 0"),
        (lambda: Budget(1, 1, 0, 1), "context must be at least 1"),
        (lambda: Budget(1, 1, 1, 0), "seconds must be positive"),
        (lambda: Agent(None, None, {"find": FixedTool("search")}, "", BUDGET), "'search' cannot be called 'find'"),
        (lambda: Agent(None, None, {"answer": FixedTool("answer")}, "", BUDGET), "cannot be called 'answer'"),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


QUESTIONS = [Question(f"q{i}", f"What is {i}?", ("Mira",), "qa", "one_hop") for i in range(4)]
OPTIONS = {"tag": "round", "seed": 3, "temperature": 1.0, "concurrency": 3}


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


async def test_with_the_real_python_tool(tokenizer):
    python = PythonTool(timeout_seconds=10)
    policy = ScriptedPolicy(tokenizer, lambda _, k: ("<think></think><python>6 * 7</python>", ANSWER)[k])
    agent = Agent(policy, tokenizer, {"python": python}, "Answer.", BUDGET)
    trajectory = await run(agent)
    await python.close()
    assert trajectory.segments[1].text == "<result>42</result>"
    assert trajectory.calls[0].result.seconds > 0

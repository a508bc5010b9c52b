"""The agent loop, driven by a scripted policy over the real tokenizer."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etagent_jax import protocol
from etagent_jax.policy.interface import Completion
from etagent_jax.rollout.agent import NO_CALLS_LEFT, Agent, Budget
from etagent_jax.tools.python import PythonTool
from etagent_jax.trajectory import Origin, Segment, Trajectory
from tests.scripted import ANSWER, BUDGET, PYTHON, QUESTION, SEARCH, FixedTool, ScriptedPolicy, make_agent


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


@pytest.mark.parametrize(
    ("turns", "finish", "void"),
    [
        ([SEARCH, ANSWER], "answer", False),
        ([SEARCH, "<think>so</think>"], "stop", True),
        ([SEARCH, ""], "stop", True),
        (["<think>so</think></search>"], "malformed", True),
        (["<think>so</think><answer>Mira</answer>"], "answer", True),
        ([SEARCH, "<think>" + "so " * 500], "length", True),
        ([SEARCH, SEARCH, SEARCH, SEARCH], "budget", False),
    ],
)
async def test_a_turn_is_void_that_holds_neither_a_call_nor_a_boxed_answer(tokenizer, turns, finish, void):
    trajectory = await run(make_agent(tokenizer, *turns))
    assert (trajectory.finish, trajectory.has_void_turn) == (finish, void)


async def test_no_turn_is_void_where_none_was_written(tokenizer):
    prompt = tokenizer.prompt("Answer with tools.", QUESTION.text)
    called = len(prompt) + len(tokenizer.encode(SEARCH))
    for context in (called, called + len(tokenizer.encode(protocol.render_result("it is Mira")))):
        trajectory = await run(make_agent(tokenizer, SEARCH, ANSWER, budget=Budget(2, 3, context, 60)))
        assert (trajectory.finish, trajectory.has_void_turn) == ("length", False)
    for turns in ([], [SEARCH]):
        agent = make_agent(tokenizer, *turns, budget=Budget(2, 3, 400, 0.05))
        agent.policy.generate = falls_silent(agent.policy.generate, len(turns))
        trajectory = await run(agent)
        assert (trajectory.finish, trajectory.has_void_turn) == ("timeout", False)
        assert len(trajectory.calls) == len(turns)


def falls_silent(generate, after: int):
    """`generate` that never answers again after so many answers."""
    answered = iter(range(after))

    async def generate_or_wait(*arguments):
        return await (asyncio.Event().wait() if next(answered, None) is None else generate(*arguments))

    return generate_or_wait


async def test_every_turn_is_told_before_its_call_is_made(tokenizer):
    agent = make_agent(tokenizer, SEARCH, PYTHON, ANSWER)
    told = []

    def on_turn(segments):
        told.append((tuple(segments), [len(tool.inputs) for tool in agent.tools.values()]))

    trajectory = await run(agent, on_turn=on_turn)
    assert told == [
        (trajectory.segments[:1], [0, 0]), (trajectory.segments[:3], [1, 0]), (trajectory.segments, [1, 1]),
    ]  # fmt: skip


async def test_no_room_left_at_the_policy_ends_the_trajectory(tokenizer):
    """A server whose context is smaller than the budget's answers without a token."""
    agent = make_agent(tokenizer, SEARCH)
    written = agent.policy.generate

    async def generate(token_ids, sampling, session=""):
        full = len(token_ids) > len(tokenizer.prompt("Answer with tools.", QUESTION.text))
        return Completion((), (), "length", ()) if full else await written(token_ids, sampling, session)

    agent.policy.generate = generate
    trajectory = await run(agent)
    assert trajectory.finish == "length"
    assert trajectory.text == f"{SEARCH}<result>it is Mira</result>"


async def test_another_budget_is_another_agents(tokenizer):
    agent = make_agent(tokenizer, SEARCH, ANSWER)
    without_calls = await run(agent.with_budget(Budget(2, 0, 400, 60)), id="without")
    with_calls = await run(agent)
    assert [call.result.status for call in without_calls.calls] == ["refused"]
    assert [call.result.status for call in with_calls.calls] == ["ok"]
    assert without_calls.prompt_ids == with_calls.prompt_ids


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


async def test_with_the_real_python_tool(tokenizer):
    python = PythonTool(timeout_seconds=10)
    policy = ScriptedPolicy(tokenizer, lambda _, k: ("<think></think><python>6 * 7</python>", ANSWER)[k])
    agent = Agent(policy, tokenizer, {"python": python}, "Answer.", BUDGET)
    trajectory = await run(agent)
    await python.close()
    assert trajectory.segments[1].text == "<result>42</result>"
    assert trajectory.calls[0].result.seconds > 0

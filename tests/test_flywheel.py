"""The flywheel's rounds, and which of their trajectories become fine-tuning data."""

import asyncio
from collections import Counter

import pytest

from etagent_jax.flywheel.operators import Context, Refusal
from etagent_jax.flywheel.rounds import (
    ENHANCE,
    REFLECT,
    FlywheelConfig,
    Pool,
    count_refusals,
    grow_pool,
    run_flywheel,
)
from etagent_jax.flywheel.sft_data import select_for_sft
from etagent_jax.scoring.answers import correctness, is_correct
from etagent_jax.scoring.behaviour import pattern
from etagent_jax.trajectory import Question
from etagent_jax.world import World
from etagent_jax.world.demonstrations import HINTS, LONG_THOUGHT
from etagent_jax.world.reviser import RuleBasedReviser
from etagent_jax.world.solver import answer, call
from tests.stand_ins import asked, ideal_writer, make_agent, make_trajectory

WORLD = World.make(0, countries=20)
QUESTIONS = WORLD.questions("train", 26, seed=1)
CAPITAL = WORLD.split("train").countries[0].fact("capital")
ONE_HOP = Question("one", f"What is the {CAPITAL.query}?", (CAPITAL.value,), "qa", "one_hop")
FIND = call("I need it.", "search", CAPITAL.query)
FOUND = ("search", CAPITAL.query, CAPITAL.sentence)
DONE = answer("Now I know it.", CAPITAL.value)
WRONG = answer("I guess.", "nowhere")


THREE_ROUNDS = FlywheelConfig()


def score(trajectory):
    return correctness(trajectory.question, trajectory.answer)


def clumsy_writer(session, question, results, turn):
    """Guesses at first; once hinted or corrected it solves the question, after a long think."""
    if "sample" in session:
        return WRONG
    return ideal_writer(session, question, results, turn).replace("<think>", f"<think>{LONG_THOUGHT} ")


class RubbishReviser:
    async def complete(self, messages):
        return "As a language model I like steps."


def make_context(tokenizer, write=clumsy_writer, reviser=None) -> Context:
    agent = make_agent(tokenizer, WORLD, write)
    return Context(agent, agent, reviser or RuleBasedReviser(), tuple(HINTS), temperature=1.0)


async def grow(context, question=ONE_HOP, config=THREE_ROUNDS, finished=(), report=lambda t: None) -> Pool:
    return await grow_pool(
        question, context, config, seed=3, score=score, is_correct=is_correct, on_trajectory=report, finished=finished
    )


def shape(pool: Pool) -> list[tuple]:
    """All of a pool that does not tell the time."""
    return [(t.id, t.token_ids, t.seed, t.origin, pool.scores[t.id]) for t in pool.trajectories]


# ---------------------------------------------------------------- rounds


async def test_a_wrong_base_is_reflected_on_and_a_right_one_enhanced(tokenizer):
    reported = []
    pool = await grow(make_context(tokenizer), report=reported.append)
    ids = [t.id for t in pool.trajectories]
    assert ids[0] == "flywheel/one/r0/sample-0"
    assert ids[1:4] == [f"flywheel/one/r1/{operator.__name__}" for operator in REFLECT]
    assert {id.rpartition("/")[2] for id in ids[4:]} <= {operator.__name__ for operator in ENHANCE}
    assert all(t.origin.parent == ids[0] for t in pool.trajectories[1:4])
    assert [t.id in pool.correct for t in pool.trajectories[:2]] == [False, True]
    assert Counter(t.id for t in reported) == Counter(ids)  # each once
    assert len(ids) + len(pool.refusals) == 10
    assert len({t.seed for t in pool.trajectories}) == len(ids)


@pytest.mark.parametrize(("initial", "rounds"), [(1, 0), (2, 1), (3, 3), (1, 5)])
async def test_a_pool_holds_at_most_so_many(tokenizer, initial, rounds):
    pool = await grow(make_context(tokenizer), config=FlywheelConfig(initial, rounds))
    assert len(pool.trajectories) + len(pool.refusals) == initial + 3 * rounds


@pytest.mark.parametrize(("initial", "rounds"), [(0, 3), (1, -1)])
def test_a_flywheel_needs_a_first_sample(initial, rounds):
    with pytest.raises(ValueError, match="initial ≥ 1 and rounds ≥ 0"):
        FlywheelConfig(initial, rounds)


def test_the_best_base_comes_first(tokenizer):
    pool = Pool(ONE_HOP)
    for name, value, calls in [("wrong", 0.0, 0), ("half", 0.5, 2), ("right late", 1.0, 2), ("right", 1.0, 1),
                               ("right again", 1.0, 1), ("half short", 0.5, 0)]:  # fmt: skip
        pool.trajectories.append(make_trajectory(tokenizer, ONE_HOP, [FIND, FOUND] * calls + [DONE], id=name))
        pool.scores[name] = value
    pool.correct = {name for name, value in pool.scores.items() if value == 1.0}
    order = ["right", "right again", "right late", "half short", "half", "wrong"]
    assert [t.id for t in pool.best_first()] == order


async def test_no_base_is_used_twice(tokenizer):
    pool = await grow(make_context(tokenizer), config=FlywheelConfig(2, 4))
    bases = [{t.origin.parent for t in pool.trajectories if f"/r{number}/" in t.id} for number in range(1, 5)]
    assert all(len(parents) == 1 for parents in bases)
    assert len(set.union(*bases)) == 4


async def test_the_same_seed_gives_the_same_pool(tokenizer):
    first, second = await grow(make_context(tokenizer)), await grow(make_context(tokenizer))
    assert shape(first) == shape(second)
    assert first.refusals == second.refusals


@pytest.mark.parametrize("kept", [[0], [0, 1], [0, 2], [0, 1, 2, 3], [0, 1, 2, 3, 5], range(10)])
async def test_a_pool_is_rebuilt_from_what_is_there(tokenizer, kept):
    whole = await grow(make_context(tokenizer))
    finished = [t for i, t in enumerate(whole.trajectories) if i in kept]
    context, reported = make_context(tokenizer), []
    pool = await grow(context, finished=[*reversed(finished)], report=reported.append)
    assert shape(pool) == shape(whole)
    assert {t.id for t in reported} == {t.id for t in whole.trajectories} - {t.id for t in finished}
    assert {session for session, _ in context.agent.policy.served}.isdisjoint(t.id for t in finished)


async def test_a_started_round_keeps_its_base(tokenizer):
    """What was refused before a restart may be made after it, and be better than the base that was chosen then."""
    whole = await grow(make_context(tokenizer, reviser=RubbishReviser()))
    first_rounds = [t.id for t in whole.trajectories if "/r0/" in t.id or "/r1/" in t.id]
    assert first_rounds == ["flywheel/one/r0/sample-0", "flywheel/one/r1/trajectory_hint"]
    resumed = await grow(make_context(tokenizer), finished=whole.trajectories)
    parents = {t.origin.parent for t in resumed.trajectories if "/r2/" in t.id}
    assert parents == {"flywheel/one/r1/trajectory_hint"}
    assert "flywheel/one/r1/self_correction" in resumed.correct


async def test_finished_trajectories_of_another_question_or_prompt_are_refused(tokenizer):
    (sample,) = (await grow(make_context(tokenizer), config=FlywheelConfig(1, 0))).trajectories
    other = Question(ONE_HOP.id, "What is it?", ("x",), "qa", "one_hop")
    with pytest.raises(ValueError, match="another question of the id one"):
        await grow(make_context(tokenizer), question=other, finished=[sample])
    context = make_context(tokenizer)
    context.agent.system_prompt = "Answer."
    with pytest.raises(ValueError, match="another system prompt or tokenizer"):
        await grow(context, finished=[sample])


async def test_a_reviser_that_writes_rubbish_costs_its_operators_only(tokenizer):
    context = make_context(tokenizer, reviser=RubbishReviser())
    pool = await grow(context)
    made = Counter(t.origin.operator for t in pool.trajectories if t.origin)
    assert set(made) == {"trajectory_hint", "re_rollout"}
    assert set(pool.refusals) == {
        Refusal(name, "the reviser's reply did not parse, twice")
        for name in ("self_correction", "step_hint", "redundancy_modification", "global_refinement")
    }
    assert context.unparsed.total() == 2 * len(pool.refusals)
    assert set(context.unparsed) == {"no step line", "text before"}
    assert count_refusals([pool])["step_hint", "the reviser's reply did not parse, twice"] == 1


async def test_a_questions_time_limit_keeps_what_it_has(tokenizer):
    class StuckReviser:
        async def complete(self, messages):
            await asyncio.Event().wait()

    reported = []
    context = make_context(tokenizer, reviser=StuckReviser())
    pool = await grow(context, config=FlywheelConfig(seconds=1.0), report=reported.append)
    assert pool.timed_out
    assert [t.id for t in pool.trajectories] == ["flywheel/one/r0/sample-0", "flywheel/one/r1/trajectory_hint"]
    assert [t.id for t in reported] == [t.id for t in pool.trajectories]


async def test_errors_propagate_after_what_was_finished_is_reported(tokenizer):
    def write(session, *rest):
        if "r1/self_correction" in session:
            raise ConnectionError("the policy is gone")
        return clumsy_writer(session, *rest)

    reported = []
    growing = run_flywheel(
        [ONE_HOP], make_context(tokenizer, write), FlywheelConfig(), seed=0, score=score, is_correct=is_correct,
        on_trajectory=reported.append,
    )  # fmt: skip
    with pytest.raises(ConnectionError, match="the policy is gone"):
        async for _ in growing:
            pass
    assert reported[0].id == "flywheel/one/r0/sample-0"


async def test_a_slow_question_holds_up_no_other(tokenizer):
    context, others_done, slow = make_context(tokenizer), asyncio.Event(), QUESTIONS[0]

    class WaitingReviser(RuleBasedReviser):
        async def complete(self, messages):
            if slow.text in messages[1]["content"]:
                await others_done.wait()
            return await super().complete(messages)

    context = make_context(tokenizer, reviser=WaitingReviser())
    done = []
    async for pool in run_flywheel(
        QUESTIONS, context, FlywheelConfig(rounds=2), seed=0, score=score, is_correct=is_correct,
        on_trajectory=lambda t: None, concurrency=3,
    ):  # fmt: skip
        done.append(pool.question.id)
        if len(done) == len(QUESTIONS) - 1:
            others_done.set()
    assert done[-1] == slow.id
    assert sorted(done) == sorted(question.id for question in QUESTIONS)


async def test_a_run_resumes_from_all_that_was_reported(tokenizer):
    async def run(context, finished, report):
        pools = [pool async for pool in run_flywheel(
            QUESTIONS, context, FlywheelConfig(), seed=0, score=score, is_correct=is_correct, on_trajectory=report,
            finished=finished,
        )]  # fmt: skip
        return {pool.question.id: shape(pool) for pool in pools}

    reported = []
    whole = await run(make_context(tokenizer), (), reported.append)
    again, context = [], make_context(tokenizer)
    assert await run(context, reported[:100], again.append) == whole
    assert {t.id for t in again} == {t.id for t in reported[100:]}
    context = make_context(tokenizer)
    assert await run(context, reported, again.append) == whole
    assert asked(context.agent) == []
    assert context.agent.policy.served == []


async def test_two_questions_of_one_id_are_refused(tokenizer):
    growing = run_flywheel(
        [ONE_HOP, ONE_HOP], make_context(tokenizer), FlywheelConfig(), seed=0, score=score, is_correct=is_correct,
        on_trajectory=print,
    )  # fmt: skip
    with pytest.raises(ValueError, match="same id"):
        await anext(growing)


# ---------------------------------------------------------------- fine-tuning data


def select(trajectories, per_question=3):
    pool = Pool(ONE_HOP, trajectories)
    return [t.id for t in select_for_sft([pool], score, is_correct, pattern, per_question)]


def test_the_shortest_of_each_pattern_fewest_calls_first(tokenizer):
    def make(id, parts, **rest):
        return make_trajectory(tokenizer, ONE_HOP, parts, id=id, **rest)

    long = FIND.replace("<think>", f"<think>{LONG_THOUGHT} ")
    pool = [
        make("long", [long, FOUND, DONE]),
        make("twice", [FIND, FOUND, FIND, FOUND, DONE]),
        make("short", [FIND, FOUND, DONE]),
        make("copy", [FIND, FOUND, DONE]),
        make("computed", [FIND, FOUND, call("t", "python", "print(1)"), ("python", "print(1)", "1"), DONE]),
        make("wrong", [WRONG]),
        make("no think", ["<answer>" + DONE.partition("<answer>")[2]]),
        make("failed", [FIND, FOUND, DONE], status="error"),
        make("unfinished", [FIND, FOUND, DONE], finish="stop"),
    ]
    assert select(pool) == ["copy", "computed", "twice"]
    assert select(pool, 2) == ["copy", "computed"]
    assert select(pool, 1) == ["copy"]
    assert select(pool[:1]) == ["long"]
    assert select([pool[5]]) == []


def test_hints_only_where_there_is_nothing_else_and_mistakes_never(tokenizer):
    mistake, rest = "<think>I guess.", f" {FIND.removeprefix('<think>')}"
    reopened = make_trajectory(
        tokenizer, ONE_HOP, [mistake, " Wait, stop it.", rest, FOUND, DONE], id="reopened", sources={1: "program"}
    )
    hinted = make_trajectory(
        tokenizer, ONE_HOP, ["<think>Wait, stop it.", rest, FOUND, DONE], id="hinted", sources={0: "program"}
    )
    plain = make_trajectory(tokenizer, ONE_HOP, [FIND, FOUND, FIND, FOUND, DONE], id="plain")
    assert all(score(t) == 1 and t.format_error is None for t in (reopened, hinted, plain))
    assert select([reopened, hinted, plain]) == ["plain"]
    assert select([reopened, hinted]) == ["hinted"]
    assert select([reopened]) == []


async def test_fine_tuning_data_from_a_clumsy_model_is_right_short_and_unhinted(tokenizer):
    pools = [pool async for pool in run_flywheel(
        QUESTIONS, make_context(tokenizer), FlywheelConfig(), seed=0, score=score, is_correct=is_correct,
        on_trajectory=lambda t: None,
    )]  # fmt: skip
    chosen = select_for_sft(pools, score, is_correct, pattern, per_question=2)
    assert {t.question.id for t in chosen} == {question.id for question in QUESTIONS}
    assert all(score(t) == 1 and t.format_error is None for t in chosen)
    assert not any(segment.source == "program" for t in chosen for segment in t.segments)
    assert not any(LONG_THOUGHT in t.text for t in chosen)

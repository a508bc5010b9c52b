"""Answers, rewards and behaviour, each against a plain version, hand numbers or stated properties."""

import math
import threading
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etagent_jax.scoring import answers, behaviour, rewards
from etagent_jax.scoring.rewards import RewardConfig, score_group
from etagent_jax.trajectory import Group, Question, Segment, ToolCall, ToolResult, Trajectory

TOOLS = ("search", "python")
QUESTION = Question("q0", "How many?", ("4",), "mathematics", "test")


def attempt(id="t0", question=QUESTION, calls=(), answer="4", tokens=100, valid=True) -> Trajectory:
    """A trajectory that thinks, makes `calls`, each (tool, input[, status]), and answers; `tokens` in all."""
    segments = []
    for tool, text, *status in calls:
        written = f"<think>hm</think><{tool}>{text}</{tool}>"
        segments.append(Segment("model", (1,), written, (-1.0,), (0,)))
        call = ToolCall(tool, text, ToolResult("out", *(status or ["ok"])))
        segments.append(Segment("tool", (2, 2, 2), "<result>out</result>", call=call))
    text = f"<think>so</think><answer>\\boxed{{{answer}}}</answer>" + ("" if valid else " and more")
    rest = tokens - len(calls)
    segments.append(Segment("model", (3,) * rest, text, (-1.0,) * rest, (0,) * rest))
    return Trajectory(id, question, (0,), tuple(segments), "answer", 0, 1.0, TOOLS)


def group(calls, tokens, right, valid=None) -> Group:
    valid = valid or [True] * len(calls)
    rows = zip(calls, tokens, right, valid, strict=True)
    return Group(QUESTION, tuple(attempt(f"t{i}", calls=[("search", f"{j}") for j in range(n)], tokens=k,
                                         answer="4" if r else "5", valid=v)
                                 for i, (n, k, r, v) in enumerate(rows)))  # fmt: skip


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("0.50", "1/2"), ("1/2", "0.50"), ("1,000", "1000"), ("10,\\!080", "10080"), ("2", "2.0"), ("18", "$18"),
        ("\\frac{1}{2}", ".5"), ("\\frac43", "4/3"), ("1/3", "0.33333333"), ("90^\\circ", "90"), ("-3", "−3"),
        ("p - q", "-q+p"), ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\pi/2)"), ("1,-2", "-2,1"), ("5", "x=5"),
        ("\\text{Evelyn}", "evelyn"), ("52_8", "52_{8}"), ("3", "\\sqrt{9}"),
    ],
)  # fmt: skip
def test_equal_mathematics(reference, answer):
    assert answers.equal_mathematics(reference, answer)


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("3.14", "314"), ("314", "3.14"), ("1/2", "0.51"), ("1/2", "1/0"), ("1,2,3", "123"), ("(3,4]", "(3,4)"),
        ("\\text{even}", "odd"), ("3", "three"), ("3", "3 or 5"), ("3", "5 $ $3"), ("3", "\\boxed{3} 5"),
        ("4", "4" * 500), ("52_8", "42"),
    ],
)  # fmt: skip
def test_unequal_mathematics(reference, answer):
    assert not answers.equal_mathematics(reference, answer)


@pytest.mark.slow
def test_an_answer_too_big_to_compute_is_wrong():
    assert not answers.equal_mathematics("3", "9^{9^{9}}")


@pytest.mark.slow
def test_mathematics_outside_the_main_thread():
    found = []
    thread = threading.Thread(target=lambda: found.extend(answers.equal_mathematics(*p) for p in
                                                          [("x+3", "3 + x"), ("x+3", "4 + x")]))  # fmt: skip
    thread.start()
    thread.join()
    assert found == [True, False]


def qa(*references: str) -> Question:
    return Question("qa", "Who?", references, "qa", "test")


@pytest.mark.parametrize(
    ("references", "answer", "f1", "em"),
    [
        (("Barack Hussein Obama",), "Barack Obama", 0.8, False),
        (("Barack Obama",), "Barack Hussein Obama", 0.8, False),
        (("The Beatles!",), "beatles", 1.0, True),
        (("Rome", "the city of Rome"), "City of Rome", 1.0, True),
        (("a b b",), "b b b", 0.8, False),  # the article goes; min counts: 2 · 2 / (2 + 3)
        (("yes",), "yes no", 0.0, False),
        (("A",), "the", 0.0, False),
        (("A",), "a", 1.0, True),
        (("Rome",), None, 0.0, False),
        (("Rome",), " ", 0.0, False),
    ],
)
def test_qa_f1_and_exact_match(references, answer, f1, em):
    assert answers.correctness(qa(*references), answer) == f1
    assert answers.exact_match(qa(*references), answer) is em


def test_is_correct_needs_more_than_four_fifths_in_qa_and_all_in_mathematics():
    assert [answers.is_correct(qa("x"), s) for s in (0.8, 0.81)] == [False, True]
    assert [answers.is_correct(QUESTION, s) for s in (0.99, 1.0)] == [False, True]


# ---------------------------------------------------------------- rewards


def plain_rewards(calls, tokens, right, valid, sigma_tool, sigma_length):
    """ET-Agent's reward and advantage, written as loops over Python floats."""
    n = len(calls)
    mean_calls, mean_tokens = sum(calls) / n, sum(tokens) / n
    deviation = math.sqrt(sum((t - mean_tokens) ** 2 for t in tokens) / n)
    result = []
    for c, t, r, v in zip(calls, tokens, right, valid, strict=True):
        z = (t - mean_tokens) / deviation if deviation else 0.0
        f_tool = 2 / (1 + math.exp(sigma_tool * (c - mean_calls)))
        f_len = 2 / (1 + math.exp(sigma_length * z))
        result.append(r * f_tool * f_len + (0 if v else -1))
    mean = sum(result) / n
    deviation = math.sqrt(sum((r - mean) ** 2 for r in result) / (n - 1))
    return result, [(r - mean) / (deviation + 1e-6) for r in result]


members = st.tuples(st.integers(0, 6), st.integers(10, 400), st.booleans(), st.booleans())
sigmas = st.tuples(st.floats(0, 2), st.floats(0, 2))


@given(st.lists(members, min_size=2, max_size=8), sigmas)
@settings(deadline=None, max_examples=60)
def test_paper_reward_is_the_plain_one(rows, sigma):
    calls, tokens, right, valid = zip(*rows, strict=True)
    scored = score_group(group(calls, tokens, right, valid), RewardConfig("paper", *sigma))
    expected_rewards, expected_advantages = plain_rewards(calls, tokens, right, valid, *sigma)
    np.testing.assert_allclose(scored.rewards, expected_rewards, atol=1e-12)
    np.testing.assert_allclose(scored.advantages, expected_advantages, atol=1e-6)
    np.testing.assert_array_equal(scored.correctness, right)


PAPER, SIGNED = RewardConfig("paper", 0.2, 0.5), RewardConfig("sign_preserving", 0.2, 0.5)


def test_a_correct_but_tool_heavy_rollout_among_correct_ones():
    all_right = group([0, 0, 1, 2, 3, 5], [100] * 6, [1] * 6)
    assert score_group(all_right, PAPER).advantages[-1] == pytest.approx(-1.62, abs=0.005)
    signed = score_group(all_right, SIGNED).advantages
    assert (signed >= 0).all()
    assert signed[0] > 0 == signed[-1]


def test_a_badly_formed_short_answer_against_a_well_formed_long_one():
    rollouts = group([0, 10, 10, 4], [100, 800, 200, 300], [1] * 4, [False, True, True, True])
    np.testing.assert_allclose(score_group(rollouts, PAPER).rewards[:2], [0.89, 0.38], atol=0.005)
    scored = score_group(rollouts, SIGNED)
    assert scored.rewards[0] == 0 < scored.rewards[1]
    assert scored.advantages[0] == scored.advantages.min() < 0


partial = st.sampled_from([0.0, 0.3, 0.5, 0.8, 1.0])


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(10, 400), partial, st.booleans()), min_size=2, max_size=8),
       sigmas)  # fmt: skip
@settings(deadline=None, max_examples=200)
def test_sign_preserving_properties(rows, sigma):
    calls, tokens, scores, valid = zip(*rows, strict=True)
    rollouts = group(calls, tokens, [1] * len(rows), valid)
    given_scores = iter(scores)
    scored = score_group(rollouts, RewardConfig("sign_preserving", *sigma), lambda *_: next(given_scores))
    unshaped = [s if v else s - 1 for s, v in zip(scores, valid, strict=True)]
    mean = math.fsum(unshaped) / len(unshaped)
    for i, base in enumerate(unshaped):
        if base > mean + 1e-5:
            assert scored.advantages[i] >= 0
        elif base < mean - 1e-5:
            assert scored.advantages[i] <= 0
        elif valid[i] and scores[i] > 0:
            assert scored.advantages[i] >= 0
        for j in range(len(rows)):
            if not valid[i] and valid[j] and scores[j] > 0:
                assert scored.rewards[i] <= 0 < scored.rewards[j]
                assert scored.advantages[i] <= scored.advantages[j]


@given(st.lists(members, min_size=2, max_size=8))
@settings(deadline=None, max_examples=50)
def test_without_sigma_the_variant_is_correctness_and_format_alone(rows):
    calls, tokens, right, valid = zip(*rows, strict=True)
    scored = score_group(group(calls, tokens, right, valid), RewardConfig("sign_preserving", 0.0, 0.0))
    expected, expected_advantages = plain_rewards(calls, tokens, right, valid, 0.0, 0.0)
    np.testing.assert_allclose(scored.rewards, expected)
    np.testing.assert_allclose(scored.advantages, expected_advantages, atol=1e-6)
    assert scored.has_spread == (len(set(expected)) > 1)


def test_tool_results_do_not_count_as_length():
    calls = [("search", "x")] * 2
    assert attempt(calls=calls, tokens=50).model_tokens == 50


def test_decayed_sigma_runs_from_whole_to_nothing():
    assert [rewards.decayed_sigma(0.5, t, 5) for t in range(1, 6)] == [0.5, 0.375, 0.25, 0.125, 0.0]
    assert rewards.decayed_sigma(0.5, 1, 1) == 0.5
    with pytest.raises(ValueError, match=r"step must be in 1\.\.5"):
        rewards.decayed_sigma(0.5, 6, 5)


@pytest.mark.parametrize(("values", "message"), [(("papers", 0.1, 0.1), "papers"), (("paper", -1, 0), "sigma_tool")])
def test_wrong_reward_config_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        RewardConfig(*values)


# ---------------------------------------------------------------- behaviour


def test_pattern_reads_blocks_in_order_and_nothing_inside_them():
    calls = [("search", "<think>x</think>"), ("python", "1")]
    assert behaviour.pattern(attempt(calls=calls)) == "TSTPTA"
    cut = Segment("model", (1,), "<think>a</think><search>b", (-1.0,), (0,))
    assert behaviour.pattern(Trajectory("t", QUESTION, (0,), (cut,), "length", 0, 1.0, TOOLS)) == "T"


def test_behaviour_of_one_trajectory():
    calls = [
        ("search", "Who  is X"),
        ("search", "who is x "),
        ("python", "who is x", "error"),
        ("search", "y", "empty"),
    ]
    measured = behaviour.behaviour(attempt(calls=calls, tokens=60), 1.0)
    assert measured == {
        "pattern": "TSTSTPTSTA", "correctness": 1.0, "tool_calls": 4, "failed_calls": 2, "repeated_calls": 1,
        "efficiency": 0.25, "format_valid": True, "concise": False, "reasoning_tokens": 60,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("calls", "correctness", "needless", "missing"),
    [
        ([0, 2, 1], [1, 1, 0], [0, 2, 1], [False] * 3),  # right without a call: every call was needless
        ([0, 0, 0, 2], [1, 0, 0, 1], [0] * 4, [False, True, True, False]),  # a lucky guess
        ([1, 2], [1, 1], [0, 0], [False] * 2),
        ([0, 2], [0, 0], [0, 0], [False] * 2),
    ],
)
def test_needless_and_missing_calls(calls, correctness, needless, missing):
    rollouts = group(calls, [50] * len(calls), correctness)
    assert behaviour.needless_calls(rollouts, correctness).tolist() == needless
    assert behaviour.missing_calls(rollouts, correctness).tolist() == missing


def plain_summary(scored):
    """Means and intervals as loops over questions; no care for the ends of a range."""
    questions = defaultdict(list)
    for t, c in scored:
        questions[t.question.id].append((t, c))
    measures = {
        "correctness": lambda t, c: c,
        "tool_calls": lambda t, c: len(t.calls),
        "efficiency": lambda t, c: c / len(t.calls) if t.calls else c,
        "format_valid": lambda t, c: float(t.format_error is None),
        "reasoning_tokens": lambda t, c: t.model_tokens,
        "conciseness": lambda t, c: float(not any(call.result.failed for call in t.calls)
                                          and len({(x.tool, x.input) for x in t.calls}) == len(t.calls)),
    }  # fmt: skip
    result = {}
    n = len(questions)
    for name, measure in measures.items():
        means = [sum(measure(t, c) for t, c in rows) / len(rows) for rows in questions.values()]
        mean = sum(means) / n
        half = 1.96 * math.sqrt(sum((m - mean) ** 2 for m in means) / (n - 1)) / math.sqrt(n)
        result[name] = (mean, mean - half, mean + half, n)
    return result


def random_set(rng: np.random.Generator, questions: int, each: int):
    scored = []
    for q in range(questions):
        question = Question(f"q{q}", "How many?", ("4",), "mathematics", "test")
        for i in range(each):
            status = ["ok", "ok", "error"]
            calls = [("search", str(rng.integers(3)), status[rng.integers(3)]) for _ in range(rng.integers(4))]
            trajectory = attempt(
                f"{q}-{i}", question, calls, tokens=int(rng.integers(20, 60)), valid=rng.random() < 0.7
            )
            scored.append((trajectory, float(rng.random() < (q + 1) / (questions + 1))))
    return scored


def test_summary_is_the_plain_one():
    scored = random_set(np.random.default_rng(0), questions=40, each=5)
    summary = behaviour.summarise(scored)
    for name, (mean, low, high, n) in plain_summary(scored).items():
        estimate = summary[name]
        assert estimate.mean == pytest.approx(mean), name
        assert estimate.ci95 == pytest.approx((low, high), rel=1e-4), name
        assert estimate.n == n
    results = [call.result.failed for t, _ in scored for call in t.calls]
    assert summary["successful_execution"].mean == pytest.approx(1 - sum(results) / len(results))


def test_interval_of_a_ratio_agrees_with_the_bootstrap():
    rng = np.random.default_rng(1)
    wholes = rng.integers(1, 12, 200).astype(float)
    parts = rng.binomial(wholes.astype(int), rng.beta(3, 2, 200)).astype(float)
    estimate = behaviour.ratio_estimate(parts, wholes)
    drawn = rng.integers(200, size=(4000, 200))
    low, high = np.percentile(parts[drawn].sum(1) / wholes[drawn].sum(1), [2.5, 97.5])
    assert estimate.ci95 == pytest.approx((low, high), abs=0.01)


def test_intervals_at_the_ends_are_wilsons_and_stay_in_range():
    # Wilson's interval for 0 of 10 and 400 of 400, from Brown, Cai and DasGupta's formula.
    assert behaviour.mean_estimate(np.zeros(10), True).ci95 == pytest.approx((0.0, 0.2775), abs=1e-4)
    low, high = behaviour.mean_estimate(np.ones(400), True).ci95
    assert high == 1.0
    assert low == pytest.approx(1 / (1 + 1.96**2 / 400), abs=1e-5)
    assert behaviour.mean_estimate(np.array([1.0, 1.0, 1.0, 0.9]), True).ci95[1] == 1.0
    assert behaviour.mean_estimate(np.array([0.5]), True).ci95 == (0.0, 1.0)
    assert behaviour.ratio_estimate(np.zeros(3), np.zeros(3)) == behaviour.Estimate(1.0, (0.0, 1.0), 0)
    assert behaviour.ratio_estimate(np.array([2.0, 3.0, 0.0]), np.array([2.0, 3.0, 0.0])).n == 2


def test_more_rollouts_of_the_same_questions_do_not_narrow_the_interval():
    scored = random_set(np.random.default_rng(2), questions=30, each=1)
    copies = [(attempt(f"{t.id}-{i}", t.question, tokens=30), c) for t, c in scored for i in range(8)]
    assert behaviour.summarise(copies)["correctness"] == behaviour.summarise(scored)["correctness"]


def test_distinct_correct_patterns():
    first, second = (Question(id, "How many?", ("4",), "mathematics", "test") for id in ("a", "b"))
    search, both = [("search", "x")], [("search", "x"), ("python", "y")]
    scored = [
        (attempt("1", first, search), 1.0), (attempt("2", first, both), 1.0), (attempt("3", first, search), 1.0),
        (attempt("4", first), 0.0), (attempt("5", second, both), 0.0),
    ]  # fmt: skip
    estimate = behaviour.distinct_correct_patterns(scored)
    assert (estimate.mean, estimate.n) == (1.0, 2)


@pytest.mark.parametrize("measure", [behaviour.summarise, behaviour.distinct_correct_patterns])
def test_nothing_to_summarise(measure):
    with pytest.raises(ValueError, match="no trajectories"):
        measure([])

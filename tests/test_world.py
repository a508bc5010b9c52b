"""The built-in world: distinct, divided, repeatable; demonstrations true to the real tools; the tiny tokenizer."""

import itertools
import json
import re
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etagent_jax import protocol
from etagent_jax.rollout.agent import NO_CALLS_LEFT
from etagent_jax.tokenizer import Tokenizer
from etagent_jax.tools.python import EMPTY_OUTPUT, PythonTool
from etagent_jax.tools.search import NO_RESULTS, LocalSearch
from etagent_jax.trajectory import Trajectory
from etagent_jax.world import SYSTEM_PROMPT, TOOLS, World
from etagent_jax.world.demonstrations import (
    FLAWED_SHARES,
    HINTS,
    LONG_SHARE,
    LONG_THOUGHT,
    RAISING_SHARE,
    demonstrations,
    to_trajectory,
)
from etagent_jax.world.entities import MAX_COUNTRIES, RELATIONS, SPLIT_SHARES, SYLLABLES
from etagent_jax.world.questions import PROPORTIONS
from etagent_jax.world.solver import evaluate, ideal_step, least_calls
from etagent_jax.world.vocabulary import BYTE_SCORE, make_tokenizer

CONTEXT = 256
LEAST_CALLS = {"given": 0, "arithmetic": 1, "one_hop": 1, "two_hops": 2, "compute": 2}


@pytest.fixture(scope="module")
def world() -> World:
    return World.make(0)


@pytest.fixture(scope="module")
def search(world: World) -> LocalSearch:
    return LocalSearch(world.documents())


@pytest.fixture(scope="module")
def clean(world: World, tokenizer: Tokenizer) -> list[Trajectory]:
    made = demonstrations(world, "train", 400, seed=1, flawed=False)
    return [to_trajectory(d, tokenizer, SYSTEM_PROMPT, str(i)) for i, d in enumerate(made)]


@pytest.fixture(scope="module")
def flawed(world: World, tokenizer: Tokenizer) -> list[tuple[str, bool, Trajectory]]:
    made = demonstrations(world, "train", 2000, seed=1, flawed=True)
    return [(d.plan, d.long, to_trajectory(d, tokenizer, SYSTEM_PROMPT, str(i))) for i, d in enumerate(made)]


def names_of(world: World, split: str) -> list[str]:
    return [name for c in world.splits[split].countries for name in (c.name, c.capital, c.ruler, c.mayor)]


# --- entities


def test_names_are_distinct_across_splits(world):
    names = list(itertools.chain.from_iterable(names_of(world, split) for split in SPLIT_SHARES))
    assert len(names) == len(set(names)) == 4 * 500
    assert {len(name) for name in names} == {6, 9}


def test_splits_share_no_product(world):
    products = [{a * b for a, b in world.splits[split].factors} for split in SPLIT_SHARES]
    assert all(not a & b for a, b in itertools.combinations(products, 2))
    assert all(products)


@pytest.mark.parametrize(("countries", "sizes"), [(500, [300, 80, 120]), (50, [30, 8, 12])])
def test_split_sizes(countries, sizes):
    assert [len(split.countries) for split in World.make(3, countries).splits.values()] == sizes


def test_a_name_has_one_segmentation():
    pattern = re.compile("|".join(SYLLABLES))
    for pair in itertools.product(SYLLABLES, repeat=2):
        name = "".join(pair)
        inside = [i for i in range(len(name)) if pattern.match(name, i)]
        assert inside == [0, 3], name


def test_the_names_of_the_largest_world_do_not_run_out():
    assert len(SYLLABLES) ** 2 == 4 * MAX_COUNTRIES // 2
    with pytest.raises(ValueError, match=f"between 20 and {MAX_COUNTRIES}, got {MAX_COUNTRIES + 1}"):
        World.make(0, MAX_COUNTRIES + 1)


def test_one_seed_one_world(world):
    again, other = World.make(0), World.make(1)
    assert again == world
    assert again.questions("test", 100, 5) == world.questions("test", 100, 5)
    assert other.documents() != world.documents()
    assert world.questions("test", 100, 6) != world.questions("test", 100, 5)


# --- questions


@pytest.mark.parametrize("split", SPLIT_SHARES)
def test_questions_are_distinct_and_in_proportion(world, split):
    questions = world.questions(split, 390, seed=2)
    assert len({q.text for q in questions}) == len({q.id for q in questions}) == 390
    counts = Counter(q.category for q in questions)
    assert counts == {category: 30 * share for category, share in PROPORTIONS.items()}
    assert {q.category for q in questions if q.kind == "mathematics"} == {"arithmetic", "compute"}
    for question in questions:
        assert re.fullmatch(rf"{split}-{question.category}-\d{{5,}}", question.id)


def test_a_question_mentions_only_its_own_split(world):
    others = set(names_of(world, "train")) | set(names_of(world, "validation"))
    for question in world.questions("test", 480, seed=0):
        assert not others & set(re.findall(r"\w+", question.text)), question.text


def test_an_id_means_one_question_whatever_the_draw(world):
    texts: dict[str, str] = {}
    for seed in range(5):
        for question in world.questions("validation", 300, seed):
            assert texts.setdefault(question.id, question.text) == question.text


def test_too_many_questions_are_refused_clearly(world):
    with pytest.raises(ValueError, match=r"2000 distinct test questions need 461 of kind two_hops, .* has 240"):
        world.questions("test", 2000, seed=0)
    with pytest.raises(ValueError, match="split must be one of train, validation, test, got 'dev'"):
        world.questions("dev", 1, seed=0)
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        world.questions("test", 0, seed=0)


def test_answers_follow_from_the_documents(world):
    facts = dict(re.findall(r"^The (.+ of \w+) is (\w+)\.$", "\n".join(world.documents()), flags=re.MULTILINE))
    assert len(facts) == 500 * len(RELATIONS)
    for question in world.questions("test", 480, seed=0):
        text, answer = question.text, question.answers[0]
        match question.category:
            case "arithmetic":
                assert int(answer) == eval(text.removeprefix("What is ").removesuffix("?"))
            case "given" | "one_hop":
                assert answer == facts[text.rpartition("What is the ")[2].removesuffix("?")]
                assert (f"is {answer}." in text) == (question.category == "given")
            case "two_hops":
                relation, country = re.fullmatch(r"What is the (.+) of the capital of (\w+)\?", text).groups()
                assert answer == facts[f"{relation} of {facts[f'capital of {country}']}"]
            case "compute":
                number, query = re.search(r"\d+", text)[0], re.search(r"the ([a-z ]+ of [a-z]+)", text)[1]
                query = query.removesuffix(" plus")
                operation = int.__mul__ if " times " in text else int.__add__
                assert int(answer) == operation(int(number), int(facts[query]))


# --- corpus and tools


async def test_search_finds_every_fact_and_description(world, search):
    assert len(world.found) == 500 * (len(RELATIONS) + 2)
    for query, expected in world.found.items():
        result = await search.run(query)
        assert (result.output, result.status) == (expected, "ok"), query


async def test_demonstrated_results_are_what_the_real_tools_return(world, search, flawed):
    python = PythonTool()
    tools = {"search": search, "python": python}
    seen, failures = Counter(), set()
    try:
        for _, _, trajectory in flawed:
            for call in trajectory.calls:
                if seen[call.tool, call.result.status] < 15:
                    seen[call.tool, call.result.status] += 1
                    real = await tools[call.tool].run(call.input)
                    assert replace(call.result, seconds=real.seconds) == real, call.input
                    failures |= {real.output} if real.failed else set()
    finally:
        await python.close()
    assert failures == {"no output", "NameError: name 'x' is not defined"}
    assert set(seen) == {("search", "ok"), ("python", "ok"), ("python", "empty"), ("python", "error")}


# --- solver


@pytest.mark.parametrize("expression", ["34 * 27 + 8", "99 * 98 - 9", "17 * 437", "437 + 38", "1 - 2 * 3 * 4 + 5"])
def test_evaluate(expression):
    assert evaluate(expression) == eval(expression)


def test_solver_takes_the_least_calls_and_reads_results_only(world):
    for question in world.questions("validation", 200, seed=0):
        results: list[str] = []
        step = ideal_step(question.text, results)
        while (call := protocol.ending_call(step, TOOLS)) is not None:
            assert ideal_step(question.text, [*results, "zantor is a country."]) == step
            tool, text = call
            results.append(world.found[text] if tool == "search" else str(eval(text.removeprefix("print"))))
            step = ideal_step(question.text, results)
        assert protocol.extract_answer([step]) == question.answers[0]
        assert len(results) == least_calls(question.text) == LEAST_CALLS[question.category]


def test_solver_follows_what_results_say():
    text = "What is the mayor of the capital of zantor?"
    told = ["The capital of zantor is belmir.", "The mayor of belmir is fangol."]
    assert "<search>capital of zantor</search>" in ideal_step(text, [])
    assert "<search>mayor of belmir</search>" in ideal_step(text, told[:1])
    assert "<search>capital of zantor</search>" in ideal_step(text, told[1:])
    assert "<answer>\\boxed{fangol}</answer>" in ideal_step(text, ["\n".join(told)])
    asked = "What is 17 times the area of zantor?"
    looked_up = ["The area of zantor is 40."]
    assert "<python>print(17 * 40)</python>" in ideal_step(asked, looked_up)
    assert "<python>print(17 * 40)</python>" in ideal_step(asked, [*looked_up, "no output", "57"])
    assert "\\boxed{680}" in ideal_step(asked, [*looked_up, "680"])


@pytest.mark.parametrize("text", ["", "What is the capital of France?", "What is 3 + 4?", "The mayor of a is b."])
def test_solver_declines_other_questions(text):
    with pytest.raises(ValueError, match="not a question of the built-in world"):
        ideal_step(text, [])
    with pytest.raises(ValueError, match="not a question of the built-in world"):
        least_calls(text)


# --- demonstrations


def test_clean_demonstrations_are_right_and_frugal(clean):
    assert {t.question.category for t in clean} == set(PROPORTIONS)
    for trajectory in clean:
        assert trajectory.format_error is None
        assert trajectory.answer == trajectory.question.answers[0]
        assert len(trajectory.calls) == LEAST_CALLS[trajectory.question.category]
        assert not any(call.result.failed for call in trajectory.calls)
        assert len(trajectory.token_ids) <= 100


def test_flawed_demonstrations_fit_and_keep_the_format(flawed):
    for _, _, trajectory in flawed:
        assert trajectory.format_error is None
        assert len(trajectory.token_ids) <= CONTEXT - 64


def test_a_trajectory_is_its_parts_encoded_one_by_one(world, tokenizer, flawed):
    for _, _, trajectory in flawed[:300]:
        assert all(tokenizer.decode(s.token_ids) == s.text for s in trajectory.segments)
        assert tokenizer.encode(trajectory.text) == trajectory.token_ids[len(trajectory.prompt_ids) :]
        assert Trajectory.from_json(json.loads(json.dumps(trajectory.to_json()))) == trajectory


def test_shares_of_flaws(flawed):
    plans = Counter((t.question.category, plan) for plan, _, t in flawed)
    totals = Counter(t.question.category for _, _, t in flawed)
    for category, shares in FLAWED_SHARES.items():
        assert sum(shares.values()) == pytest.approx(1)
        for plan, share in shares.items():
            four_errors = 4 * (share * (1 - share) / totals[category]) ** 0.5
            assert plans[category, plan] / totals[category] == pytest.approx(share, abs=four_errors), (category, plan)
    assert sum(long for _, long, _ in flawed) / len(flawed) == pytest.approx(LONG_SHARE, abs=0.04)
    silent = [t for plan, _, t in flawed if plan in ("give up", "print late")]
    raised = sum(t.calls[1:2] != () and t.calls[1].result.status == "error" for t in silent)
    assert raised / len(silent) == pytest.approx(RAISING_SHARE, abs=0.07)


def test_each_flaw_is_what_its_name_says(flawed):
    for plan, long, trajectory in flawed:
        category, calls = trajectory.question.category, trajectory.calls
        right = trajectory.answer == trajectory.question.answers[0]
        extra = len(calls) - LEAST_CALLS[category]
        assert long == (LONG_THOUGHT in trajectory.turns[0])
        assert right == (plan not in ("guess", "stop early", "in the head", "give up")), plan
        match plan:
            case "right":
                assert extra == 0
            case "search" | "vague query":
                assert extra == 1
            case "verify":
                assert extra == 1
                assert calls[-1] == calls[-2]
            case "search and verify":
                assert extra == 2
                assert calls[0] == calls[1]
            case "guess":
                assert not calls
            case "stop early" | "in the head":
                assert extra == -1
            case "give up" | "print late":
                assert calls[0].result.status == "empty"
            case "reconsider":
                assert any(hint in trajectory.text for hint in HINTS)


def test_demonstrations_repeat_by_seed(world):
    first, again, other = (list(demonstrations(world, "train", 20, seed, True)) for seed in (4, 4, 5))
    assert first == again != other


# --- tokenizer


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.text(max_size=20),
            st.sampled_from([*SYLLABLES[:9], "<think>", "</result>", "<|im_end|>", "<0x41>", "Ġ", " of ", "12", " "]),
        ),
        max_size=8,
    ).map("".join)
)
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_vocabulary_is_small_and_the_same_for_every_world(world, tokenizer):
    assert tokenizer.vocab_size == len(make_tokenizer(World.make(7, countries=30))) < 700
    other = Tokenizer(make_tokenizer(World.make(7, countries=30)))
    for trajectory in itertools.islice(demonstrations(world, "train", 50, 3, True), 50):
        for part in trajectory.parts:
            assert other.encode(part.text) == tokenizer.encode(part.text)


@pytest.mark.parametrize(
    ("before", "after"),
    [("", ""), (" ", " "), ("What is the capital of ", "?"), (" is ", "."), ("\\boxed{", "}"),
     ("<search>", "</search>"), ("area of ", " plus 7?"), ("I search for ", "."), ("\n", "\n"), ("17", "4")],
)  # fmt: skip
def test_names_are_their_syllables_everywhere(tokenizer, before, after):
    left, right = tokenizer.encode(before), tokenizer.encode(after)
    for pair in itertools.islice(itertools.product(SYLLABLES, repeat=2), 0, None, 29):
        syllables = tuple(tokenizer.encode(s)[0] for s in (*pair, pair[0]))
        assert tokenizer.encode(f"{before}{''.join((*pair, pair[0]))}{after}") == left + syllables + right


def test_digits_are_single_tokens(tokenizer):
    digits = {tokenizer.encode(d)[0] for d in "0123456789"}
    for text in ("34 * 27 + 8", "print(17*437)", "is 1234.", "\\boxed{90}", "x = 5", "\n6", "zan7tor"):
        used = [t for t in tokenizer.encode(text) if any(c.isdigit() for c in tokenizer.decode([t]))]
        assert set(used) <= digits
        assert len(used) == sum(c.isdigit() for c in text)


def test_tags_and_fixed_replies_are_single_ordinary_tokens(tokenizer):
    assert all(len(tokenizer.encode(reply)) == 1 for reply in (EMPTY_OUTPUT, NO_RESULTS, NO_CALLS_LEFT))
    tags = [f"<{slash}{tag}>" for tag in (*protocol.RESERVED, *TOOLS) for slash in ("", "/")]
    assert all(len(tokenizer.encode(tag)) == 1 for tag in tags)
    assert not set(tags) & set(tokenizer.special_tokens)
    assert tokenizer.special_tokens == ("<|endoftext|>", "<|im_end|>", "<|im_start|>")
    assert tokenizer.encode("<|im_end|>") == tokenizer.eos_ids
    assert tokenizer.encode("<|endoftext|>") == (tokenizer.pad_id,)


def test_demonstrations_never_fall_back_to_bytes(world, tokenizer, flawed):
    model = json.loads(make_tokenizer(world).backend_tokenizer.to_str())["model"]
    byte_ids = {i for i, (_, score) in enumerate(model["vocab"]) if score == BYTE_SCORE}
    for _, _, trajectory in flawed:
        assert not byte_ids & set(trajectory.token_ids), trajectory.text


def test_prompt_is_a_short_qwen_chat(tokenizer):
    ids = tokenizer.prompt(SYSTEM_PROMPT, "What is 34 * 27 + 8?")
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nAnswer with tools.<|im_end|>\n<|im_start|>user\nWhat is 34 * 27 + 8?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert len(ids) == 20


def test_hints_fit_the_vocabulary_the_model_has_seen(tokenizer, flawed):
    seen = {token for _, _, trajectory in flawed for token in trajectory.token_ids}
    for hint in HINTS:
        assert set(tokenizer.encode(hint)) <= seen
        assert set(tokenizer.encode(f" {hint}")) <= seen


@pytest.mark.parametrize("config", [None, {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}])
def test_saves_and_loads_as_a_hugging_face_folder(tokenizer, tmp_path, config):
    tokenizer.save(tmp_path)
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = Tokenizer.load(tmp_path)
    text = "<think>I need the capital of zantor.</think> 12 é漢\x00<0x41>"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.decode(loaded.encode(text)) == text
    assert loaded.prompt("a", "b") == tokenizer.prompt("a", "b")
    assert (loaded.special_tokens, loaded.eos_ids, loaded.pad_id, loaded.vocab_size) == (
        tokenizer.special_tokens, tokenizer.eos_ids, tokenizer.pad_id, tokenizer.vocab_size,
    )  # fmt: skip

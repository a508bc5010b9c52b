"""The flywheel's operators, what the reviser is asked, and how its replies are read."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from etagent_jax import protocol
from etagent_jax.chat import ChatError
from etagent_jax.flywheel import operators, prompts
from etagent_jax.flywheel.operators import Context, Refusal
from etagent_jax.tokenizer import Tokenizer
from etagent_jax.trajectory import Question, Segment
from etagent_jax.world import TOOLS, World
from etagent_jax.world.demonstrations import HINTS, LONG_THOUGHT, demonstrations, to_trajectory
from etagent_jax.world.reviser import RuleBasedReviser
from etagent_jax.world.solver import answer, call, ideal_step, least_calls
from tests.stand_ins import asked, make_agent, make_trajectory

WORLD = World.make(0, countries=20)
COUNTRY = WORLD.split("train").countries[0]
CAPITAL, MAYOR = COUNTRY.fact("capital"), next(fact for fact in COUNTRY.facts if fact.relation == "mayor")
ONE_HOP = Question("one", f"What is the {CAPITAL.query}?", (CAPITAL.value,), "qa", "one_hop")
TWO_HOPS = Question("two", f"What is the mayor of the {CAPITAL.query}?", (MAYOR.value,), "qa", "two_hops")

FIND = call("I need it.", "search", CAPITAL.query)
FOUND = ("search", CAPITAL.query, CAPITAL.sentence)
CHECK = call("Let me check it again.", "search", CAPITAL.query)
DONE = answer("Now I know it.", CAPITAL.value)


class ScriptedReviser:
    """Gives the replies it was made with, one after the other; keeps what it was asked."""

    def __init__(self, *replies: str | ChatError):
        self.replies, self.asked = list(replies), []

    async def complete(self, messages):
        self.asked.append(messages)
        reply = self.replies.pop(0)
        if isinstance(reply, ChatError):
            raise reply
        return reply


def make_context(tokenizer, reviser=None, hints=tuple(HINTS), world=WORLD) -> Context:
    agent = make_agent(tokenizer, world)
    return Context(agent, agent, reviser or RuleBasedReviser(), hints, temperature=1.0)


@pytest.fixture
def verified(tokenizer):
    return make_trajectory(tokenizer, ONE_HOP, [FIND, FOUND, CHECK, FOUND, DONE])


@pytest.fixture
def stopped_early(tokenizer):
    return make_trajectory(tokenizer, TWO_HOPS, [FIND, FOUND, DONE])


# ---------------------------------------------------------------- operators for a correct base


async def test_re_rollout_is_a_fresh_sample(tokenizer, verified):
    context = make_context(tokenizer)
    made = await operators.re_rollout(verified, context, "new", 5)
    assert (made.id, made.seed, made.answer) == ("new", 5, CAPITAL.value)
    assert made.origin.parent == "base"
    assert made.origin.operator == "re_rollout"
    assert context.agent.policy.served[0] == ("new", verified.prompt_ids)


async def test_redundancy_modification_replaces_the_step_and_keeps_the_tokens_before_it(tokenizer, verified):
    context = make_context(tokenizer)
    made = await operators.redundancy_modification(verified, context, "new", 0)
    assert made.segments[:2] == verified.segments[:2]
    assert made.segments[2].source == "reviser"
    assert len(made.segments) == 3
    assert made.answer == CAPITAL.value
    assert made.origin.step == 2
    assert made.format_error is None
    assert asked(context.agent) == []  # no kept call is run again
    assert context.agent.policy.served == []  # and nothing is left to generate


async def test_a_corrected_call_is_run_and_the_policy_goes_on_from_exactly_these_tokens(tokenizer):
    base = make_trajectory(tokenizer, TWO_HOPS, [FIND, FOUND, CHECK, FOUND, call("m", "search", MAYOR.query),
                           ("search", MAYOR.query, MAYOR.sentence), answer("k", MAYOR.value)])  # fmt: skip
    context = make_context(tokenizer)
    made = await operators.redundancy_modification(base, context, "new", 0)
    assert asked(context.agent) == [MAYOR.query]
    assert [segment.source for segment in made.segments] == ["model", "tool", "reviser", "tool", "model"]
    assert made.segments[:2] == base.segments[:2]
    (served,) = context.agent.policy.served
    assert served == ("new", base.prompt_ids + sum((s.token_ids for s in made.segments[:4]), ()))
    assert made.token_ids[: len(served[1])] == served[1]
    assert made.answer == MAYOR.value


async def test_global_refinement_keeps_all_but_the_thinking_byte_for_byte(tokenizer):
    code = "x = 1  # <b>\n\nprint('é')\t"
    compute = f"<think>{LONG_THOUGHT} I need it.</think>\n<python>{code}</python>"
    finish = f"<think> {LONG_THOUGHT} I know.\n</think><answer> It is\n\\boxed{{{CAPITAL.value}}} .</answer>"
    base = make_trajectory(tokenizer, ONE_HOP, [compute, ("python", code, " 5\n"), finish])
    context = make_context(tokenizer, ScriptedReviser("Think 1: I need it.\nThink 2: I know."))
    made = await operators.global_refinement(base, context, "new", 0)
    assert made.turns == (
        f"<think>I need it.</think>\n<python>{code}</python>",
        f"<think> I know.\n</think><answer> It is\n\\boxed{{{CAPITAL.value}}} .</answer>",
    )
    assert made.segments[1] == base.segments[1]
    assert (made.answer, made.calls, made.finish) == (base.answer, base.calls, base.finish)
    assert made.format_error is None
    assert [segment.source for segment in made.segments] == ["reviser", "tool", "reviser"]
    assert made.model_tokens < base.model_tokens


async def test_global_refinement_leaves_unchanged_turns_to_their_author(tokenizer, verified):
    reviser = ScriptedReviser("Think 1: I need it.\nThink 2: Once more.\nThink 3: Now I know it.")
    made = await operators.global_refinement(verified, make_context(tokenizer, reviser), "new", 0)
    assert [segment.source for segment in made.segments] == ["model", "tool", "reviser", "tool", "model"]
    reviser = ScriptedReviser("Think 1: I need it.\nThink 2: Let me check it again.\nThink 3: Now I know it.")
    made = await operators.global_refinement(verified, make_context(tokenizer, reviser), "new", 0)
    assert made == Refusal("global_refinement", "no thinking was changed")


async def test_global_refinement_refuses_a_badly_formed_base(tokenizer):
    base = make_trajectory(tokenizer, ONE_HOP, ["<answer>\\boxed{x}</answer>"])
    made = await operators.global_refinement(base, make_context(tokenizer), "new", 0)
    assert made == Refusal("global_refinement", "the base is badly formed")


# ---------------------------------------------------------------- operators for an incorrect base


async def test_self_correction_replaces_the_first_flawed_step(tokenizer, stopped_early):
    context = make_context(tokenizer)
    made = await operators.self_correction(stopped_early, context, "new", 0)
    assert made.segments[:2] == stopped_early.segments[:2]
    assert made.origin.step == 2
    assert made.origin.note
    assert asked(context.agent) == [MAYOR.query]
    assert made.answer == MAYOR.value


async def test_step_hint_can_hint_the_last_step_with_a_whole_sentence_that_is_not_trained_on(tokenizer, stopped_early):
    context = make_context(tokenizer, hints=("Wait, let me search again.",))
    made = await operators.step_hint(stopped_early, context, "new", 0)
    assert made.segments[:2] == stopped_early.segments[:2]
    assert (made.segments[2].source, made.segments[2].text) == ("program", "<think>Wait, let me search again.")
    assert made.segments[3].source == "model"
    assert made.origin.step == 2
    assert made.origin.note == "Wait, let me search again."
    assert made.answer == MAYOR.value
    assert made.format_error is None


async def test_step_hint_at_the_first_step_keeps_the_prompt_only(tokenizer):
    base = make_trajectory(tokenizer, ONE_HOP, [answer("I guess.", "nowhere")])
    made = await operators.step_hint(base, make_context(tokenizer), "new", 1)
    assert made.segments[0].source == "program"
    assert made.answer == CAPITAL.value


GUESS = "<think>I guess."


@pytest.mark.parametrize(
    ("parts", "finish", "kept", "written"),
    [
        ([f"{GUESS}</think><answer>\\boxed{{x}}</answer>"], "answer", GUESS, " Wait, stop it."),
        ([f"{GUESS}</think>\n<answer>\\boxed{{x}}"], "length", GUESS, " Wait, stop it."),
        ([GUESS], "length", GUESS, " Wait, stop it."),
        ([f"{GUESS}<|im_end|>"], "stop", GUESS, " Wait, stop it."),
        (["<|im_end|>"], "stop", "", "<think>Wait, stop it."),
        ([f"{GUESS}</search>"], "malformed", GUESS, " Wait, stop it."),
        (["<answer>\\boxed{x}</answer>"], "answer", "", "<think>Wait, stop it."),
        ([f"{GUESS}</think><search>a"], "length", GUESS, " Wait, stop it."),
        ([FIND, FOUND], "timeout", f"{FIND}<result>{CAPITAL.sentence}</result>", "<think>Wait, stop it."),
        ([FIND, FOUND, "<answer>\\boxed{x}</answer>"], "answer", f"{FIND}<result>{CAPITAL.sentence}</result>",
         "<think>Wait, stop it."),
    ],
)  # fmt: skip
async def test_trajectory_hint_removes_the_answer_and_reopens_the_last_think(tokenizer, parts, finish, kept, written):
    base = make_trajectory(tokenizer, ONE_HOP, parts, finish=finish)
    made = await operators.trajectory_hint(base, make_context(tokenizer, hints=("Wait, stop it.",)), "new", 0)
    hint = next(i for i, segment in enumerate(made.segments) if segment.source == "program")
    assert made.segments[hint].text == written
    assert "".join(segment.text for segment in made.segments[:hint]) == kept
    before = sum((segment.token_ids for segment in made.segments[:hint]), ())
    assert before == sum((segment.token_ids for segment in base.segments), ())[: len(before)]
    assert made.answer == CAPITAL.value
    assert made.format_error is None


def test_agent_and_continuer_have_one_prompt(tokenizer):
    agent, continuer = make_agent(tokenizer, WORLD), make_agent(tokenizer, WORLD)
    continuer.system_prompt = "Answer."
    with pytest.raises(ValueError, match="same system prompt"):
        Context(agent, continuer, RuleBasedReviser(), tuple(HINTS), temperature=1.0)


@pytest.mark.parametrize("hints", ["Wait, let me think.", (), ("W",), ("no end",)])
def test_hints_are_whole_sentences(tokenizer, hints):
    with pytest.raises(ValueError, match="sentence"):
        make_context(tokenizer, hints=hints)


# ---------------------------------------------------------------- cutting inside a segment


@pytest.fixture(scope="module")
def merging() -> Tokenizer:
    """Byte-level pairs where `.</` is one token, as it is in large vocabularies."""
    merges = [("<", "/"), (".", "</"), ("t", "h"), ("th", "i")]
    vocab = {piece: i for i, piece in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)])}
    fast = FastTokenizer(models.BPE(vocab=vocab, merges=merges))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    chat = "{% for message in messages %}{{ message.content }}{% endfor %}"
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="!", chat_template=chat))


def model_segment(tokenizer: Tokenizer, text: str) -> Segment:
    ids = tokenizer.encode(text)
    return Segment("model", ids, text, tuple(-float(i) for i in range(len(ids))), tuple(range(len(ids))))


def test_a_token_across_the_cut_goes_and_its_beginning_is_handed_back(merging):
    segment = model_segment(merging, "<think>so 5.</think>")
    kept, rest = operators.cut(segment, segment.text.index("</think>"), merging)
    assert (kept.text, rest) == ("<think>so 5", ".")
    assert kept.logprobs == segment.logprobs[: len(kept.token_ids)]
    assert kept.weight_versions == segment.weight_versions[: len(kept.token_ids)]


def test_what_such_a_token_held_is_for_the_program_to_write(merging):
    base = make_trajectory(merging, ONE_HOP, ["<think>so 5.</think><answer>\\boxed{x}</answer>"])
    assert operators.reopen(base, merging)[1] == "."


@given(st.text(alphabet=st.sampled_from([*".</thiné日𝄞"]), min_size=1, max_size=30), st.integers(0, 30))
def test_cut_keeps_whole_tokens_and_loses_no_character(merging, text, end):
    segment, end = model_segment(merging, text), min(end, len(text))
    kept, rest = operators.cut(segment, end, merging)
    ids, before = (kept.token_ids, kept.text) if kept else ((), "")
    assert before + rest == text[:end]
    assert ids == segment.token_ids[: len(ids)]
    assert merging.decode(ids) == before
    following = merging.decode(segment.token_ids[: len(ids) + 1])
    assert len(ids) == len(segment.token_ids) or len(following) > end or not text.startswith(following)


# ---------------------------------------------------------------- replies


GOOD = "Step: 2\nAnalysis: it repeats.\nCorrected step:\n" + DONE


def test_a_good_reply_is_read(verified):
    revision = prompts.parse_revision(GOOD, verified)
    assert (revision.step, revision.analysis, revision.text) == (2, "it repeats.", DONE)
    assert prompts.parse_revision("Step: no", verified) is None
    assert prompts.parse_location("Step: 3\nAnalysis: x", 3) == 3


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        ("I am a language model.", "no step line"),
        ("Step: 1\nStep: 2", "no step line"),
        (GOOD.replace("Step: 2", "Step: two"), "no step number"),
        (GOOD.replace("Step: 2", "Step: 9"), "step out of range"),
        (GOOD.replace("Step: 2", "Step: 0"), "step out of range"),
        (GOOD.replace("Analysis: ", ""), "no analysis"),
        ("Step: 2\nAnalysis: x", "no corrected step"),
        (GOOD + "<result>5</result>", "bad corrected step"),
        (GOOD.replace("<think>", ""), "bad corrected step"),
        (GOOD.replace("\\boxed", ""), "bad corrected step"),
        (f"Step: 2\nAnalysis: x\nCorrected step:\n{FIND}{DONE}", "bad corrected step"),
        ("Step: 2\nAnalysis: x\nCorrected step:\n<think>a</think>", "bad corrected step"),
        (GOOD.replace("Now", "<|im_end|>"), "special token"),
        (f"Step: 2\nAnalysis: x\nCorrected step:\n{CHECK}", "nothing corrected"),
    ],
)
def test_a_bad_revision_is_named_by_kind(verified, reply, kind):
    with pytest.raises(prompts.ReplyError) as error:
        prompts.parse_revision(reply, verified, ("<|im_end|>",))
    assert error.value.kind == kind


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        ("Sure!\nThink 1: a\nThink 2: b", "text before"),
        ("Think 1: a", "wrong think numbers"),
        ("Think 2: a\nThink 1: b", "wrong think numbers"),
        ("Think 1: a\nThink 2: b\nThink 3: c", "wrong think numbers"),
        ("Think 1:\nThink 2: b", "empty think"),
        ("Think 1: a</think><search>b\nThink 2: b", "tag in think"),
        ("Think 1: a<|im_end|>\nThink 2: b", "tag in think"),
    ],
)
def test_bad_thinking_is_named_by_kind(reply, kind):
    with pytest.raises(prompts.ReplyError) as error:
        prompts.parse_thinking(reply, 2, TOOLS, ("<|im_end|>",))
    assert error.value.kind == kind


async def test_a_bad_reply_is_sent_back_once_with_its_fault(tokenizer, verified):
    reviser = ScriptedReviser("rubbish", GOOD)
    context = make_context(tokenizer, reviser)
    made = await operators.redundancy_modification(verified, context, "new", 0)
    assert made.answer == CAPITAL.value
    assert context.unparsed == Counter({"no step line": 1})
    assert reviser.asked[1][:3] == [*reviser.asked[0], {"role": "assistant", "content": "rubbish"}]
    assert "lines that start with 'Step:'" in reviser.asked[1][3]["content"]


@pytest.mark.parametrize(
    ("replies", "reason"),
    [
        (("rubbish", "rubbish"), "the reviser's reply did not parse, twice"),
        (("Step: no",), "the reviser found no such step"),
        ((ChatError("down"),), "the reviser could not be reached"),
    ],
)
@pytest.mark.parametrize(
    "operator", [operators.redundancy_modification, operators.self_correction, operators.step_hint]
)
async def test_refusals_have_constant_reasons(tokenizer, verified, operator, replies, reason):
    made = await operator(verified, make_context(tokenizer, ScriptedReviser(*replies)), "new", 0)
    assert made == Refusal(operator.__name__, reason)


# ---------------------------------------------------------------- the world's reviser


@pytest.fixture(scope="module")
def flawed(tokenizer):
    shown = demonstrations(WORLD, "train", 400, seed=3, flawed=True)
    return [to_trajectory(demo, tokenizer, "Answer with tools.", f"demo-{i}") for i, demo in enumerate(shown)]


async def test_it_mends_every_wrong_demonstration(tokenizer, flawed):
    wrong = [t for t in flawed if t.answer not in t.question.answers]
    assert {t.question.category for t in wrong} == {"given", "arithmetic", "one_hop", "two_hops", "compute"}
    for base in wrong:
        for operator in (operators.self_correction, operators.step_hint):
            made = await operator(base, make_context(tokenizer), "new", 0)
            assert made.answer in base.question.answers, base.text
            assert len(made.calls) == least_calls(base.question.text)
            assert made.format_error is None


async def test_it_finds_calls_that_bring_nothing_and_only_those(tokenizer, flawed):
    right = [t for t in flawed if t.answer in t.question.answers]
    wasteful = 0
    for base in right:
        made = await operators.redundancy_modification(base, make_context(tokenizer), "new", 0)
        if len(base.calls) > least_calls(base.question.text):
            wasteful += 1
            assert len(made.calls) == least_calls(base.question.text)
            assert made.answer in base.question.answers
        else:
            assert made == Refusal("redundancy_modification", "the reviser found no such step")
    assert 0 < wasteful < len(right)


async def test_it_shortens_long_thinking_to_the_solvers(tokenizer, flawed):
    right = [t for t in flawed if t.answer in t.question.answers and LONG_THOUGHT in t.text]
    assert right
    for base in right:
        made = await operators.global_refinement(base, make_context(tokenizer), "new", 0)
        assert made.calls == base.calls
        assert made.answer == base.answer
        assert LONG_THOUGHT not in made.text
        if len(base.calls) == least_calls(base.question.text):
            results: list[str] = []
            for turn in made.turns:
                assert turn == ideal_step(base.question.text, results)
                if protocol.ending_call(turn, TOOLS):
                    results.append(made.calls[len(results)].result.output)


async def test_it_declines_what_it_does_not_understand(tokenizer):
    reviser = RuleBasedReviser()
    question = Question("q", "Who am I?", ("you",), "qa", "other")
    base = make_trajectory(tokenizer, question, [DONE])
    assert "built-in world" in await reviser.complete(prompts.messages(prompts.REDUNDANCY, base))
    base = make_trajectory(tokenizer, ONE_HOP, [DONE])
    assert await reviser.complete(prompts.messages("# Task: sing", base)) == "I do not know this task."
    assert await reviser.complete([]) == "I need a task and a trajectory to look at."

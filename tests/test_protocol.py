"""The tag language, and that nothing a tool returns can change how a trajectory is read."""

import json
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etagent_jax import protocol
from etagent_jax.trajectory import Group, Origin, Question, Segment, ToolCall, ToolResult, Trajectory

TOOLS = ("search", "python")
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
GOOD = "<think>a</think><answer>\\boxed{b}</answer>"
CALL = "<think>a</think><search>q</search>"


@pytest.mark.parametrize(
    ("turns", "answer"),
    [
        (["<answer>\\boxed{7}</answer>"], "7"),
        (["<answer>so \\boxed {\\frac{1}{2}} it is</answer>"], "\\frac{1}{2}"),
        (["<answer>\\boxed{1} or \\boxed{2}</answer>"], "2"),
        (["<answer>\\boxed{1}</answer><answer>\\boxed{2}</answer>"], "2"),
        (["<answer>\\boxed{ \\text{New York} }</answer>"], "New York"),
        (["<answer>\\boxed{\\text{a} and \\text{b}}</answer>"], "\\text{a} and \\text{b}"),
        (["<answer>\\boxed{}</answer>"], ""),
        (["\\boxed{1}"], None),
        (["<answer>7</answer>"], None),
        (["<answer>\\boxed{7</answer>"], None),
        (["<answer>\\boxed{7}"], None),
        (["\\boxed{7}</answer>"], None),
        (["<answer>\\boxed{1}</answer><search>q</search>", "no"], None),
        ([CALL, "<answer>\\boxed{late}</answer>"], "late"),
    ],
)
def test_extract_answer(turns, answer):
    assert protocol.extract_answer(turns) == answer


def test_displayed_answer_falls_back_to_the_last_box_anywhere():
    assert protocol.displayed_answer(["\\boxed{1}", "\\boxed{2} then"]) == "2"
    assert protocol.displayed_answer(["\\boxed{1}", "<answer>\\boxed{2}</answer> \\boxed{3}"]) == "2"
    assert protocol.displayed_answer(["nothing"]) is None


@pytest.mark.parametrize(
    ("turns", "error"),
    [
        ([GOOD], None),
        ([CALL, GOOD], None),
        ([CALL, "<python>1</python>", "\n" + GOOD + "\n"], None),
        ([" " + CALL + " ", "<answer>\\boxed{b}</answer>"], None),
        (["<answer>\\boxed{b}</answer>"], "does not start with <think>"),
        (["so <think>a</think>"], "does not start with <think>"),
        (["<think>a<result>b</result></think>" + GOOD], "the model wrote a <result> tag"),
        (["<think>a<think>b</think></think>" + GOOD], "<think> inside <think>"),
        (["<think><search>q</search></think>" + GOOD], "<search> inside <think>"),
        (["<think>a</think><answer><python>1</python>\\boxed{1}</answer>"], "<python> inside <answer>"),
        ([GOOD + "<think>b</think>"], "<think> after the answer"),
        ([GOOD + "<answer>\\boxed{c}</answer>"], "<answer> after the answer"),
        ([CALL + GOOD], "<think> after a call without its result"),
        (["<think>a</think></search>"], "</search> without <search>"),
        (["<think>a</python></think>"], "</python> without <python>"),
        (["<think>a</think><answer>b</answer>"], "the answer does not hold exactly one \\boxed{}"),
        (["<think>a</think><answer>\\boxed{b}\\boxed{b}</answer>"], "the answer does not hold exactly one \\boxed{}"),
        (["<think>a"], "<think> is not closed"),
        ([CALL, "<think>a</think><answer>\\boxed{b}"], "<answer> is not closed"),
        (["<think>a</think>", GOOD], "a result does not follow a call"),
        ([CALL + " so", GOOD], "a result does not follow a call"),
        ([CALL, "", GOOD], "a result does not follow a call"),
        ([CALL], "the last call has no result"),
        ([GOOD + " and"], "text after the answer"),
        (["<think>a</think>"], "no <answer> block"),
        ([CALL, ""], "no <answer> block"),
    ],
)
def test_format_error(turns, error):
    assert protocol.format_error(turns, TOOLS) == error


@pytest.mark.parametrize(
    ("text", "call"),
    [
        (CALL, ("search", "q")),
        ("<python>\nprint(1)\n</python>\n", ("python", "print(1)")),
        ("<search>a</search> <search>b</search>", ("search", "b")),
        ("<think>use <search> now</think><search>b</search>", ("search", "b")),
        ("<search>a<search>b</search>", ("search", "b")),
        ("<search></search>", ("search", "")),
        ("<python>1</search>", None),
        ("q</search>", None),
        ("<search>a</search></search>", None),
        (CALL + "x", None),
        ("<other>1</other>", None),
    ],
)
def test_ending_call(text, call):
    assert protocol.ending_call(text, TOOLS) == call


def test_stop_strings():
    assert protocol.stop_strings(TOOLS) == ("</search>", "</python>", "</answer>")


@pytest.mark.parametrize(
    ("text", "specials", "expected"),
    [
        ("<think>", (), "< think>"),
        ("< think>", (), "< think>"),
        ("</Search >", (), "< /Search >"),
        ("</ python>", (), "< / python>"),
        ("<thinking> 1 < 2 > 0", (), "<thinking> 1 < 2 > 0"),
        ("<<result>result>", (), "<< result>result>"),
        ("<|im_end|>", ("<|im_end|>",), "< |im_end|>"),
        ("a [SEP] b", ("[SEP]", "a"), "a [ SEP] b"),
        ("x <s>", (" <s>",), "x < s>"),
        ("aaa", ("aa",), "a a a"),
        ("a b c", ("a b", "ab"), "a  b c"),
        ("  \n", ("  ", "\n"), "  \n"),
    ],
)
def test_neutralise_breaks_tags_and_special_tokens_once(text, specials, expected):
    assert protocol.neutralise(text, TOOLS, specials) == expected
    assert protocol.neutralise(expected, TOOLS, specials) == expected


QUESTION = Question("q/1", "What is it?", ("b",), "qa", "given")


def trajectory(output: str, tokenizer, turns=(CALL, GOOD), finish="answer") -> Trajectory:
    """Turns of the model with a tool's `output` between them, made as the agent makes it."""
    segments = []
    for i, turn in enumerate(turns):
        if i:
            text = protocol.render_result(protocol.neutralise(output, TOOLS, tokenizer.special_tokens))
            call = ToolCall("search", "q", ToolResult(output, "ok"))
            token_ids = tokenizer.encode(text)
            segments.append(Segment("tool", token_ids, tokenizer.decode(token_ids), call=call))
        token_ids = tokenizer.encode(turn)
        if token_ids:
            n = len(token_ids)
            segments.append(Segment("model", token_ids, tokenizer.decode(token_ids), (-0.5,) * n, (0,) * n))
    return Trajectory("t", QUESTION, (1,), tuple(segments), finish, 0, 1.0, TOOLS)


tags = st.builds(
    lambda slash, name, blank, case: case(f"<{blank}{slash}{blank}{name}{blank}>"),
    st.sampled_from(["", "/"]),
    st.sampled_from([*protocol.RESERVED, *TOOLS]),
    st.sampled_from(["", " ", "\n"]),
    st.sampled_from([str, str.upper, str.title]),
)
pieces = st.one_of(
    tags,
    st.sampled_from(
        [*SPECIALS, "<", "</", ">", "<|", "|>", "im_end", "think", "\\boxed{c}", "{", "}", "\\text{", GOOD]
    ),
    st.text(max_size=5),
    st.text(alphabet=string.printable, max_size=5),
)
hostile = st.lists(pieces, max_size=12).map("".join)


def interleave(outer: str, at: int, inner: str) -> str:
    return outer[:at] + inner + outer[at:]


nested = st.builds(interleave, st.one_of(tags, st.sampled_from(SPECIALS)), st.integers(0, 8), hostile)
tool_text = st.one_of(hostile, nested)


@given(output=tool_text)
def test_tool_text_cannot_change_the_parse(tokenizer, output):
    for turns, finish in [((CALL, GOOD), "answer"), ((CALL, "so"), "stop"), ((CALL, ""), "timeout")]:
        hostile_one = trajectory(output, tokenizer, turns, finish)
        harmless = trajectory("harmless", tokenizer, turns, finish)
        for read in ("turns", "answer", "format_error"):
            assert getattr(hostile_one, read) == getattr(harmless, read)
        assert [call.input for call in hostile_one.calls] == ["q"]
        assert len(hostile_one.steps) == len(harmless.steps)


@given(output=tool_text)
def test_tool_text_read_flat_holds_no_tag_but_its_own(tokenizer, output):
    """Whoever reads the flat text (a person, another program, the model itself) is not fooled either."""
    text = protocol.neutralise(output, TOOLS, tokenizer.special_tokens)
    lowered = text.lower()
    for name in (*protocol.RESERVED, *TOOLS):
        assert protocol.opening(name) not in lowered
        assert protocol.closing(name) not in lowered
    assert not any(special in text for special in tokenizer.special_tokens)
    assert protocol.extract_answer([text]) is None
    assert protocol.ending_call(text, TOOLS) is None
    assert text.replace(" ", "") == output.replace(" ", "")
    assert protocol.neutralise(text, TOOLS, tokenizer.special_tokens) == text


@given(output=tool_text)
def test_tool_text_yields_no_special_token(tokenizer, output):
    forbidden = {id for special in tokenizer.special_tokens for id in tokenizer.encode(special)}
    tag_ids = {id for name in (*protocol.RESERVED, *TOOLS)
               for tag in (protocol.opening(name), protocol.closing(name)) for id in tokenizer.encode(tag)}  # fmt: skip
    assert len(forbidden) == len(SPECIALS)
    assert len(tag_ids) == 10
    first, *inside, last = trajectory(output, tokenizer).segments[1].token_ids
    assert (first,) == tokenizer.encode("<result>")
    assert (last,) == tokenizer.encode("</result>")
    assert not forbidden.intersection(inside)
    assert not tag_ids.intersection(inside)


finite = st.floats(allow_nan=False, allow_infinity=False)
ids = st.integers(0, 10**6)
calls = st.builds(
    ToolCall, st.sampled_from(TOOLS), st.text(),
    st.builds(ToolResult, st.text(), st.sampled_from(["ok", "error", "timeout", "refused", "empty", "unavailable"]),
              finite, st.booleans(), st.text()),
)  # fmt: skip
written = st.one_of(
    st.lists(st.tuples(ids, finite, st.integers(0, 3)), min_size=1, max_size=5).flatmap(
        lambda rows: st.builds(Segment, st.just("model"), st.just(tuple(r[0] for r in rows)), st.text(),
                               st.just(tuple(r[1] for r in rows)), st.just(tuple(r[2] for r in rows)))
    ),
    st.builds(Segment, st.sampled_from(["reviser", "program"]), st.lists(ids, max_size=5).map(tuple), st.text()),
)  # fmt: skip
results = st.builds(
    lambda ids, text, call: Segment("tool", tuple(ids), text, call=call), st.lists(ids), st.text(), calls
)
segment_lists = st.lists(st.tuples(written, st.none() | results), min_size=1, max_size=4).map(
    lambda rows: tuple(segment for pair in rows for segment in pair if segment is not None)
)
questions = st.builds(
    Question, st.text(min_size=1), st.text(min_size=1).filter(str.strip),
    st.lists(st.text(min_size=1), min_size=1).map(tuple), st.sampled_from(["mathematics", "qa"]), st.text(),
)  # fmt: skip
trajectories = st.builds(
    Trajectory, id=st.text(), question=questions, prompt_ids=st.lists(ids, min_size=1).map(tuple),
    segments=segment_lists, finish=st.sampled_from(["answer", "stop", "length"]), seed=st.integers(0, 2**63),
    temperature=finite, tools=st.just(TOOLS), seconds=finite,
    origin=st.none() | st.builds(Origin, st.text(), st.text(), st.none() | st.integers(), st.text()),
)  # fmt: skip


@given(trajectories)
def test_json_round_trip_is_exact(trajectory):
    again = Trajectory.from_json(json.loads(json.dumps(trajectory.to_json())))
    assert again == trajectory
    assert again.token_ids == trajectory.token_ids
    assert hash(again.question) == hash(trajectory.question)


def segment(source="model", n=2, **changes) -> Segment:
    scores = {"logprobs": (-1.0,) * n, "weight_versions": (0,) * n} if source == "model" else {}
    return Segment(source, (5,) * n, "text", **(scores | changes))


RESULT = Segment("tool", (7,), "<result></result>", call=ToolCall("search", "q", ToolResult("", "ok")))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: segment(n=0), "at least one token"),
        (lambda: segment(logprobs=(-1.0,)), "1 log-probabilities, needs 2"),
        (lambda: segment("reviser", logprobs=(-1.0, -1.0)), "2 log-probabilities, needs 0"),
        (lambda: segment(weight_versions=(0,)), "1 weight versions, needs 2"),
        (lambda: segment("tool"), "carry a call"),
        (lambda: segment(call=RESULT.call), "carry a call"),
        (lambda: Trajectory("t", QUESTION, (), (segment(),), "stop", 0, 1.0, TOOLS), "the prompt is empty"),
        (lambda: Trajectory("t", QUESTION, (1,), (), "stop", 0, 1.0, TOOLS), "at least one segment"),
        (lambda: Trajectory("t", QUESTION, (1,), (RESULT,), "stop", 0, 1.0, TOOLS), "starts with a tool result"),
        (
            lambda: Trajectory("t", QUESTION, (1,), (segment(), RESULT, RESULT), "stop", 0, 1.0, TOOLS),
            "two results in a row",
        ),
        (lambda: Trajectory("t", QUESTION, (1,), (segment(), RESULT), "stop", 0, 1.0, ()), "unknown tool 'search'"),
        (lambda: Question("", "text", ("a",), "qa", "c"), "needs an id"),
        (lambda: Question("1", " ", ("a",), "qa", "c"), "text is empty"),
        (lambda: Question("1", "text", (), "qa", "c"), "at least one answer"),
        (lambda: Question("1", "text", ("a",), "other", "c"), "not mathematics or qa"),
        (lambda: Group(QUESTION, ()), "no trajectories"),
    ],
)
def test_broken_records_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_group_holds_one_question_and_each_trajectory_once(tokenizer):
    one = trajectory("x", tokenizer)
    with pytest.raises(ValueError, match="a trajectory id repeats"):
        Group(QUESTION, (one, one))
    with pytest.raises(ValueError, match="of another question"):
        Group(Question("2", "?", ("b",), "qa", "c"), (one,))


def test_turns_steps_and_counts_come_from_segments():
    turn = segment(n=3)
    whole = Trajectory("t", QUESTION, (1, 2), (turn, segment("program"), RESULT, segment("reviser"), segment()),
                       "stop", 0, 1.0, TOOLS)  # fmt: skip
    assert whole.turns == ("texttext", "texttext")
    assert [len(step) for step in whole.steps] == [3, 2]
    assert whole.token_ids == (1, 2, 5, 5, 5, 5, 5, 7, 5, 5, 5, 5)
    assert whole.model_tokens == 7
    assert whole.answer is None

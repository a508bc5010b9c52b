"""Training sequences from trajectories, and their packing into rows."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from etagent_jax.data.packing import Batch, TrainingSequence, first_fit_decreasing, pack, sequence_from_trajectory
from etagent_jax.trajectory import Question, Segment, ToolCall, ToolResult, Trajectory

QUESTION = Question("q", "What is 1 + 1?", ("2",), "mathematics", "arithmetic")
CALL = ToolCall("python", "1 + 1", ToolResult("2", "ok"))


def trajectory() -> Trajectory:
    segments = (
        Segment("program", (3,), "a"),
        Segment("model", (4, 5), "b", (-0.5, -0.25), (7, 7)),
        Segment("tool", (6, 7, 8), "c", call=CALL),
        Segment("reviser", (9,), "d"),
        Segment("model", (10,), "e", (-1.0,), (8,)),
    )
    return Trajectory("t", QUESTION, (1, 2), segments, "answer", seed=0, temperature=1.0, tools=("python",))


def sequence(name: str, tokens: list[int], advantage: float = 0.0) -> TrainingSequence:
    ids = np.asarray(tokens, np.int32)
    return TrainingSequence(name, ids, np.arange(len(ids)) % 3 == 1, -ids.astype(np.float32), advantage)


@pytest.mark.parametrize(
    ("sources", "learned"), [(("model",), {4, 5, 10}), (("model", "reviser"), {4, 5, 9, 10}), (("tool",), {6, 7, 8})]
)
def test_loss_falls_on_the_segments_of_the_named_sources_only(sources, learned):
    made = sequence_from_trajectory(trajectory(), sources=sources, advantage=0.5)
    assert tuple(made.token_ids) == trajectory().token_ids
    assert set(made.token_ids[made.loss_mask].tolist()) == learned
    np.testing.assert_array_equal(made.logprobs, [0, 0, 0, -0.5, -0.25, 0, 0, 0, 0, -1])
    assert made.advantage == 0.5


lengths = st.lists(st.integers(1, 12), min_size=1, max_size=40)


@given(lengths, st.integers(1, 5))
def test_every_sequence_is_in_the_batch_once_and_whole(sizes, multiple):
    starts = np.cumsum([0, *sizes])
    sequences = [sequence(str(i), list(range(starts[i] + 1, starts[i + 1] + 1)), i) for i in range(len(sizes))]
    batch = pack(sequences, 12, multiple=multiple)
    assert batch.tokens.shape[0] % multiple == 0
    found = {}
    for row in range(batch.tokens.shape[0]):
        ids = batch.segment_ids[row]
        used = int((ids > 0).sum())
        assert (ids[:used] > 0).all()
        assert (np.diff(ids[:used]) >= 0).all()
        for segment in range(1, ids.max(initial=0) + 1):
            here = ids == segment
            assert here.any()
            np.testing.assert_array_equal(batch.positions[row][here], np.arange(here.sum()))
            index = int(batch.advantages[row][here][0])
            assert index not in found
            found[index] = True
            original = sequences[index]
            np.testing.assert_array_equal(batch.tokens[row][here], original.token_ids)
            np.testing.assert_array_equal(batch.loss_mask[row][here], original.loss_mask)
            np.testing.assert_array_equal(batch.sampler_logprobs[row][here], original.logprobs)
            assert (batch.advantages[row][here] == index).all()
        assert not batch.loss_mask[row][ids == 0].any()
        assert not batch.tokens[row][ids == 0].any()
    assert len(found) == len(sizes)


@given(lengths)
def test_first_fit_leaves_no_sequence_that_an_earlier_row_had_room_for(sizes):
    bins = first_fit_decreasing(sizes, 12)
    assert sorted(i for members in bins for i in members) == list(range(len(sizes)))
    filled = [sum(sizes[i] for i in members) for members in bins]
    assert max(filled) <= 12
    for later in range(1, len(bins)):
        for earlier in range(later):
            # What stands first in a row found no room in any row before it.
            taken = sum(sizes[i] for i in bins[earlier] if (-sizes[i], i) < (-sizes[bins[later][0]], bins[later][0]))
            assert taken + sizes[bins[later][0]] > 12


def test_first_fit_decreasing_on_a_known_case():
    assert first_fit_decreasing([4, 8, 1, 4, 2, 1], 10) == [[1, 4], [0, 3, 2, 5]]


def test_rows_are_fixed_when_asked_for():
    batch = pack([sequence("a", [1, 2, 3]), sequence("b", [4, 5])], 4, rows=5)
    assert batch.tokens.shape == (5, 4)
    assert batch.tokens.dtype == batch.segment_ids.dtype == np.int32
    assert batch.loss_mask.dtype == np.bool_
    with pytest.raises(ValueError, match="need 2 rows of 4 tokens, more than 1"):
        pack([sequence("a", [1, 2, 3]), sequence("b", [4, 5])], 4, rows=1)


def test_a_batch_is_a_pytree_that_rows_can_be_taken_from():
    batch = pack([sequence("a", [1, 2, 3]), sequence("b", [4, 5, 6])], 4)
    assert len(jax.tree.leaves(batch)) == 6
    taken = batch.take(np.array([1]))
    assert isinstance(taken, Batch)
    np.testing.assert_array_equal(taken.tokens, [[4, 5, 6, 0]])


def test_bad_sequences_are_named():
    with pytest.raises(ValueError, match="sequence long: 5 tokens do not fit into rows of 4"):
        pack([sequence("long", [1, 2, 3, 4, 5])], 4)
    with pytest.raises(ValueError, match="no sequences"):
        pack([], 4)
    ids, none = np.array([1, 2], np.int32), np.zeros(2, np.float32)
    with pytest.raises(ValueError, match="sequence x: its first token bears loss"):
        TrainingSequence("x", ids, np.array([True, True]), none)
    with pytest.raises(ValueError, match=r"sequence x: loss_mask is bool \(3,\), needs bool \(2,\)"):
        TrainingSequence("x", ids, np.zeros(3, np.bool_), none)
    with pytest.raises(ValueError, match="sequence x: token_ids is int64"):
        TrainingSequence("x", ids.astype(np.int64), np.zeros(2, np.bool_), none)
    with pytest.raises(ValueError, match="not finite"):
        TrainingSequence("x", ids, np.zeros(2, np.bool_), none, advantage=float("nan"))


def agent_lengths(count: int, longest: int) -> list[int]:
    """Lengths of trajectories as an agent's would be with these real search results, four characters a token."""
    file = Path(__file__).parents[2] / "shared" / "data" / "web_search_results.jsonl"
    if not file.is_file():
        pytest.skip("the shared data is not here")
    results = [len(json.loads(line)["result"]) // 4 for line in file.read_text().splitlines()]
    rng = np.random.default_rng(0)
    made = [300 + sum(120 + rng.choice(results) for _ in range(rng.integers(0, 7))) for _ in range(count)]
    return [min(n, longest) for n in made]


def log_normal_lengths(count: int, longest: int) -> list[int]:
    """A long tail: half below 1,100 tokens, one in twenty above 4,100."""
    lengths = np.exp(np.random.default_rng(0).normal(7.0, 0.8, count)).astype(int)
    return [int(n) for n in np.clip(lengths, 50, longest)]


@pytest.mark.parametrize("lengths_of", [agent_lengths, log_normal_lengths])
@pytest.mark.parametrize("length", [6096, 10_000])
def test_packing_leaves_little_padding_on_real_lengths(lengths_of, length):
    lengths = lengths_of(2000, length)
    rows = len(first_fit_decreasing(lengths, length))
    assert 1 - sum(lengths) / (rows * length) < 0.05

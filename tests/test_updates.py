"""The updates of a calibration step: what is learned from, what is left out, what becomes of an update not applied."""

import jax
import numpy as np
import pytest

from configs import phase2
from etagent_jax.data.packing import Batch
from etagent_jax.learner.losses import PolicyLossConfig
from etagent_jax.learner.optimizer import OptimizerConfig
from etagent_jax.learner.step import Learner
from etagent_jax.scoring.rewards import ScoredGroup
from etagent_jax.stages.updates import MOST_SKIPPED, Updates, pack_groups
from etagent_jax.trajectory import Group, Question
from tests.servers import CONFIG
from tests.stand_ins import make_trajectory

QUESTION = Question("q", "What is it?", ("it",), "qa", "test")
ANSWER = "<think>so</think><answer>\\boxed{it}</answer>"


@pytest.fixture
def section():
    section = phase2.get_config("tiny").phase2
    section.update({"questions_per_step": 2, "samples": 2, "micro_batches": 1, "length": 128})
    return section


def make_updates(section, folder, **loss) -> tuple[Updates, object]:
    learner = Learner(CONFIG, OptimizerConfig(1e-3, total_steps=8), policy=PolicyLossConfig(**loss))
    return Updates(learner, None, section, folder / "skipped"), learner.init_state(0)


def scored(tokenizer, name: str, *texts: str, advantages=(1.0, -1.0)) -> ScoredGroup:
    trajectories = tuple(
        make_trajectory(
            tokenizer, QUESTION, [text], id=f"{name}/{i}", finish="answer" if "<answer>" in text else "stop"
        )
        for i, text in enumerate(texts)
    )
    ones = np.ones(len(texts))
    return ScoredGroup(Group(QUESTION, trajectories), ones, ones, np.array(advantages))


def groups(tokenizer) -> list[ScoredGroup]:
    return [scored(tokenizer, name, ANSWER, f"<think>well</think>{ANSWER}") for name in "ab"]


def leaves(state) -> list[np.ndarray]:
    return [np.array(x) for x in jax.tree.leaves(state.params)]


def test_a_step_learns_from_the_groups_with_spread(tokenizer, section, tmp_path):
    update, state = make_updates(section, tmp_path)
    flat = scored(tokenizer, "flat", ANSWER, ANSWER, advantages=(0.0, 0.0))
    before = leaves(state)
    state, metrics = update(state, [*groups(tokenizer)[:1], flat], np.random.default_rng(0), 0)
    assert metrics["groups_without_spread"] == 1
    assert metrics["updates_skipped"] == 0
    assert metrics["tokens"] == sum(t.model_tokens for t in groups(tokenizer)[0].group.trajectories)
    assert any((a != b).any() for a, b in zip(before, leaves(state), strict=True))
    state, metrics = update(state, [flat], np.random.default_rng(0), 1)
    assert metrics == {"groups_without_spread": 1}


def test_an_update_that_is_not_applied_changes_nothing_and_its_batch_is_kept(tokenizer, section, tmp_path):
    """The sampler's log-probabilities are far from the learner's: every sequence is rejected, no token bears loss."""
    update, state = make_updates(section, tmp_path, max_sequence_weight=1.5)
    before, data = leaves(state), groups(tokenizer)
    state, metrics = update(state, data, np.random.default_rng(0), 7)
    assert all((a == b).all() for a, b in zip(before, leaves(state), strict=True))
    assert metrics["updates_skipped"] == 4  # two minibatches, two epochs
    assert metrics["sequences_rejected"] == 8
    assert metrics["sampler_gap_mean"] > 1
    assert "entropy" not in metrics
    files = sorted((tmp_path / "skipped").iterdir())
    assert [file.name for file in files] == [f"step-00007-update-{i}.npz" for i in range(4)]
    part = np.random.default_rng(0).permutation(2)[:1]
    expected = pack_groups([data[i] for i in part], 128, 2)
    kept = np.load(files[0])
    assert set(kept) == set(Batch.__dataclass_fields__)
    assert all((kept[name] == getattr(expected, name)).all() for name in kept)

    def go_on(state) -> None:
        for step in range(8, 8 + MOST_SKIPPED):
            state, _ = update(state, data, np.random.default_rng(0), step)

    with pytest.raises(FloatingPointError, match=f": {MOST_SKIPPED} updates in a row .* 2 sequences rejected"):
        go_on(state)
    assert update.skipped_in_a_row == MOST_SKIPPED


def test_an_applied_update_ends_the_count_of_skipped_ones(tokenizer, section, tmp_path):
    update, state = make_updates(section, tmp_path)
    update.skipped_in_a_row = MOST_SKIPPED - 1
    update(state, groups(tokenizer), np.random.default_rng(0), 0)
    assert update.skipped_in_a_row == 0


def test_trajectories_with_a_void_turn_can_be_left_out(tokenizer):
    group = scored(tokenizer, "a", ANSWER, "<think>I do not know</think>")
    whole, without = (pack_groups([group], 128, 2, drop_void) for drop_void in (False, True))
    assert whole.segment_ids.max() == 2
    assert without.segment_ids.max() == 1
    assert without.loss_mask.sum() == group.group.trajectories[0].model_tokens
    assert pack_groups([scored(tokenizer, "a", "<think>no</think>", advantages=(1.0,))], 128, 2, True) is None

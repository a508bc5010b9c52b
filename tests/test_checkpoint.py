"""Checkpoints: whole or passed over, bit for bit what was saved, and the state that a run goes on from."""

import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from etagent_jax.learner.checkpoint import Checkpoints
from etagent_jax.learner.step import Learner
from etagent_jax.model.lora import Lora
from etagent_jax.stages.setup import resume
from tests.learning import CONFIG, MUON, assert_same_bits, fine_tune, subprocess_environment


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    muon_learner = Learner(CONFIG, MUON)
    straight, _ = fine_tune(muon_learner, 6)
    half, _ = fine_tune(muon_learner, 3)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, half, {"note": "half way", "seen": [1, 2]})
    checkpoints.close()

    learner = Learner(CONFIG, MUON)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() == 3
    restored, extra = checkpoints.restore(3, learner.abstract_state)
    checkpoints.close()
    assert extra == {"note": "half way", "seen": [1, 2]}
    assert_same_bits(restored, half)
    assert_same_bits(fine_tune(learner, 3, restored)[0], straight)


STATE = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": (np.int32(1), np.zeros(3, np.float32))}
ABSTRACT = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), STATE)


@pytest.fixture
def checkpoints(tmp_path):
    made = Checkpoints(tmp_path / "checkpoints")
    yield made
    made.close()


def as_jax(step: int) -> dict:
    return jax.tree.map(lambda x: jnp.asarray(x + x.dtype.type(step)), STATE)


def test_the_newest_checkpoints_are_kept(checkpoints):
    assert checkpoints.latest() is None
    for step in (1, 2, 3):
        checkpoints.save(step, as_jax(step), {})
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == ["2", "3"]
    with pytest.raises(ValueError, match="of this step is there already"):
        checkpoints.save(3, as_jax(3), {})
    with pytest.raises(ValueError, match="1: not a whole checkpoint"):
        checkpoints.restore(1, ABSTRACT)


@pytest.mark.parametrize("damage", ["truncated", "removed", "no manifest", "truncated manifest"])
def test_a_checkpoint_cut_short_is_passed_over_and_can_be_written_again(checkpoints, damage):
    for step in (1, 2):
        checkpoints.save(step, as_jax(step), {"step": step})
    newest = checkpoints.folder / "2"
    manifest = newest / "manifest.json"
    data = max((newest / "state" / "d").iterdir(), key=lambda p: p.stat().st_size)
    if damage == "truncated":
        data.write_bytes(data.read_bytes()[:-1])
    elif damage == "removed":
        data.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_bytes(manifest.read_bytes()[:-1])
    assert checkpoints.latest() == 1
    state, extra = checkpoints.restore(1, ABSTRACT)
    assert_same_bits(state, as_jax(1))
    assert extra == {"step": 1}
    with pytest.raises(ValueError, match="2: not a whole checkpoint"):
        checkpoints.restore(2, ABSTRACT)
    checkpoints.save(2, as_jax(2), {})
    assert checkpoints.latest() == 2
    assert_same_bits(checkpoints.restore(2, ABSTRACT)[0], as_jax(2))


def test_a_checkpoint_of_another_state_is_refused(checkpoints):
    checkpoints.save(1, as_jax(1), {})
    wider = {**ABSTRACT, "a": jax.ShapeDtypeStruct((2, 4), np.float32)}
    with pytest.raises(ValueError, match=r"1: a is float32\[2, 3\] in the checkpoint, but .* need it float32\[2, 4\]"):
        checkpoints.restore(1, wider)
    with pytest.raises(ValueError, match="c is absent in the checkpoint"):
        checkpoints.restore(1, {**ABSTRACT, "c": ABSTRACT["a"]})


@pytest.mark.slow
def test_a_kill_while_saving_leaves_a_whole_checkpoint(tmp_path):
    program = (
        "import sys\n"
        "from tests.test_checkpoint import *\n"
        "checkpoints = Checkpoints(sys.argv[1])\n"
        "step = (checkpoints.latest() or 0) + 1\n"
        "while True:\n"
        "    checkpoints.save(step, as_jax(step), {'step': step})\n"
        "    print(step, flush=True)\n"
        "    step += 1\n"
    )
    rng = np.random.default_rng(0)
    reached = 0
    for _ in range(4):
        child = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True,
                                 env=subprocess_environment())  # fmt: skip
        assert child.stdout is not None
        reached = int(child.stdout.readline())
        time.sleep(0.2 + 0.3 * rng.random())
        child.send_signal(signal.SIGKILL)
        reached = max([reached, *map(int, child.stdout.read().split())])
        child.wait()
        checkpoints = Checkpoints(tmp_path)
        latest = checkpoints.latest()
        assert latest in (reached, reached + 1)
        state, extra = checkpoints.restore(latest, ABSTRACT)
        checkpoints.close()
        assert extra == {"step": latest}
        assert_same_bits(state, as_jax(latest))


def test_a_checkpoint_of_adapters_holds_no_frozen_parameter(tmp_path):
    learner = Learner(CONFIG, MUON, lora=Lora(2, 4.0))
    state, _ = fine_tune(learner, 2)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, learner.changing(state), {"loss": 1.0})
    loads = 0

    def initial():
        nonlocal loads
        loads += 1
        return learner.init_state(0)

    done, resumed, extra = resume(checkpoints, learner, initial)
    checkpoints.close()
    assert (done, loads, extra) == (2, 1, {"loss": 1.0})
    assert_same_bits(resumed, state)
    names = (tmp_path / "2" / "state" / "_METADATA").read_text()
    assert "lora_in" in names
    assert "kernel" not in names


def test_where_all_learns_a_resumed_run_does_not_load_what_it_began_with(tmp_path):
    learner = Learner(CONFIG, MUON)
    state, _ = fine_tune(learner, 1)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, learner.changing(state), {})
    done, resumed, _ = resume(checkpoints, learner, lambda: pytest.fail("loaded"))
    checkpoints.close()
    assert done == 1
    assert_same_bits(resumed, state)

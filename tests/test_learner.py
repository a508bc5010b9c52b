"""The learner: losses against NumPy, optimizers against their definitions, meshes, resume to the bit."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from etagent_jax.data.packing import Batch, TrainingSequence, pack
from etagent_jax.learner import losses, mesh
from etagent_jax.learner.checkpoint import Checkpoints
from etagent_jax.learner.losses import PolicyLossConfig, TokenScores
from etagent_jax.learner.optimizer import OptimizerConfig, learning_rate, make_optimizer
from etagent_jax.learner.step import Learner, check_finite
from etagent_jax.model.transformer import ModelConfig, Transformer

VOCABULARY, LENGTH = 48, 32
CONFIG = ModelConfig(VOCABULARY, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2,
                     head_dim=8)  # fmt: skip
ADAMW = OptimizerConfig(3e-3, total_steps=60, warmup_steps=2, schedule="cosine", weight_decay=0.1)
MUON = dataclasses.replace(ADAMW, name="muon")


def sequences(count: int, seed: int = 0) -> list[TrainingSequence]:
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        n = int(rng.integers(5, 20))
        mask = rng.random(n) < 0.6
        mask[0], mask[-1] = False, True
        logprobs = np.where(mask, -3 * rng.random(n), 0).astype(np.float32)
        made.append(TrainingSequence(f"s{i}", rng.integers(0, VOCABULARY, n, np.int32), mask, logprobs, rng.normal()))
    return made


@pytest.fixture(scope="module")
def learner() -> Learner:
    return Learner(CONFIG, ADAMW, policy=PolicyLossConfig(temperature=0.7))


@pytest.fixture(scope="module")
def muon_learner() -> Learner:
    return Learner(CONFIG, MUON)


@pytest.fixture(scope="module")
def batch() -> Batch:
    return pack(sequences(14), LENGTH, rows=8)


def leaves(tree) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def assert_same_bits(one, other) -> None:
    for a, b in zip(leaves(one), leaves(other), strict=True):
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes()


# --- scores ---------------------------------------------------------------------------------------


def test_scores_are_the_log_softmax_at_the_temperature(learner, batch):
    params = learner.init_state(0).params
    logprobs, entropy = (np.asarray(x) for x in learner.score(params, batch))
    model = learner.model(params)
    logits = np.asarray(model.logits(model(batch.tokens, batch.positions, batch.segment_ids)), np.float64) / 0.7
    log_softmax = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    most_likely = losses.token_scores(model, batch, 0.7).most_likely
    for r, t in np.ndindex(batch.tokens.shape):
        if batch.segment_ids[r, t] == 0 or batch.positions[r, t] == 0:
            assert logprobs[r, t] == entropy[r, t] == most_likely[r, t] == 0
            continue
        row = log_softmax[r, t - 1]
        assert abs(logprobs[r, t] - row[batch.tokens[r, t]]) < 1e-5
        assert abs(entropy[r, t] + (np.exp(row) * row).sum()) < 1e-5
        assert bool(most_likely[r, t]) == (row[batch.tokens[r, t]] == row.max())


def test_a_packed_sequence_is_learned_as_if_it_were_alone(learner):
    model = learner.model(learner.init_state(0).params)
    some = sequences(3)
    together = pack(some, 64, rows=1)
    tokens = jnp.float32(together.loss_mask.sum())
    assert together.segment_ids.max() == 3

    def loss(model: Transformer, batch: Batch) -> jax.Array:
        return losses.sft_loss(model, batch, tokens)[0]

    value_and_grad = jax.jit(jax.value_and_grad(loss))
    value, gradient = value_and_grad(model, together)
    alone = [value_and_grad(model, pack([s], 64)) for s in some]
    assert abs(value - sum(v for v, _ in alone)) < 1e-6
    summed = jax.tree.map(lambda *g: sum(g), *(g for _, g in alone))
    for a, b in zip(leaves(gradient), leaves(summed), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


# --- the policy loss ------------------------------------------------------------------------------


def numpy_policy_loss(logprobs, entropy, old, sampler, reference, advantages, mask, c: PolicyLossConfig) -> dict:
    """The loss token by token, in float64."""
    total = dict.fromkeys(("loss", "policy_loss", "kl", "entropy", "ratio", "clip_fraction", "approximate_kl"), 0.0)
    for i in np.flatnonzero(mask):
        ratio = np.exp(logprobs[i] - old[i])
        advantage = advantages[i]
        objective = min(ratio * advantage, np.clip(ratio, 1 - c.clip_low, 1 + c.clip_high) * advantage)
        if advantage < 0:
            objective = max(objective, c.dual_clip * advantage)
        policy = -objective * min(np.exp(old[i] - sampler[i]), c.max_weight)
        kl = np.exp(reference[i] - logprobs[i]) - (reference[i] - logprobs[i]) - 1
        total["policy_loss"] += policy
        total["kl"] += kl
        total["entropy"] += entropy[i]
        total["ratio"] += ratio
        total["clip_fraction"] += not np.isclose(objective, ratio * advantage, rtol=1e-12)
        total["approximate_kl"] += ratio - 1 - np.log(ratio)
        total["loss"] += policy + c.kl_coefficient * kl - c.entropy_coefficient * entropy[i]
    return {name: value / mask.sum() for name, value in total.items()}


@pytest.mark.parametrize("seed", range(3))
def test_policy_loss_and_its_gradient_agree_with_numpy(seed):
    config = PolicyLossConfig(clip_low=0.2, clip_high=0.28, dual_clip=1.5, max_weight=1.3, kl_coefficient=0.3,
                              entropy_coefficient=0.1)  # fmt: skip
    rng = np.random.default_rng(seed)
    old = -3 * rng.random(60)
    logprobs, sampler, reference = (old + 0.5 * rng.normal(size=60) for _ in range(3))
    entropy, advantages, mask = rng.random(60), rng.normal(size=60), rng.random(60) < 0.7
    # What stands where no loss falls must not matter, however wild.
    old[~mask], sampler[~mask] = 1e4, -1e4

    as_row = lambda x: jnp.asarray(x, jnp.float32)[None]
    ints = jnp.zeros((1, 60), jnp.int32)
    batch = Batch(ints, ints, ints, jnp.asarray(mask)[None], as_row(advantages), as_row(sampler))

    def loss(logprobs: jax.Array, entropy: jax.Array) -> tuple:
        scores = TokenScores(logprobs, entropy, jnp.zeros((1, 60), bool))
        tokens = jnp.float32(mask.sum())
        return losses.policy_loss(scores, batch, as_row(old), as_row(reference), tokens, config)

    gradients, metrics = jax.grad(loss, argnums=(0, 1), has_aux=True)(as_row(logprobs), as_row(entropy))
    arguments = (entropy, old, sampler, reference, advantages, mask, config)
    expected = numpy_policy_loss(logprobs, *arguments)
    assert 0.2 < expected["clip_fraction"] < 0.8
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert abs(float(metrics[name]) - value) < 1e-5, name

    step = 1e-6
    for i in range(60):
        moved = np.zeros(60)
        moved[i] = step
        up, down = (numpy_policy_loss(logprobs + d, *arguments)["loss"] for d in (moved, -moved))
        assert abs(gradients[0][0, i] - (up - down) / (2 * step)) < 1e-5
    np.testing.assert_allclose(gradients[1][0], np.where(mask, -0.1 / mask.sum(), 0), atol=1e-7)


def test_on_policy_the_ratio_is_one_and_the_sampler_agrees(learner, batch):
    state = learner.init_state(0)
    old, _ = learner.score(state.params, batch)
    batch = dataclasses.replace(batch, sampler_logprobs=old)
    state, metrics = learner.policy_step(state, batch, old, old)
    assert abs(metrics["ratio"] - 1) < 1e-6
    assert abs(metrics["approximate_kl"]) < 1e-6
    assert metrics["clip_fraction"] == metrics["sampler_gap_mean"] == metrics["sampler_gap_max"] == 0
    new, _ = learner.score(state.params, batch)
    gain = np.where(batch.loss_mask, (new - old) * batch.advantages, 0).sum()
    assert gain > 0


def test_the_gap_between_sampler_and_learner_is_measured(learner, batch):
    state = learner.init_state(0)
    old, _ = learner.score(state.params, batch)
    _, metrics = learner.policy_step(state, batch, old, old)
    gap = np.abs(np.asarray(old) - batch.sampler_logprobs)[batch.loss_mask]
    np.testing.assert_allclose(metrics["sampler_gap_mean"], gap.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["sampler_gap_max"], gap.max(), rtol=1e-5)
    assert abs(metrics["kl"]) < 1e-6


def test_without_a_reference_there_is_no_kl(learner, batch):
    _, metrics = jax.eval_shape(learner.policy_step, learner.abstract_state, batch, batch.sampler_logprobs, None)
    assert "kl" not in metrics
    assert metrics["loss"].shape == ()


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", 0.0), ("clip_low", 1.0), ("dual_clip", 1.2), ("max_weight", 0.5)]
)
def test_a_policy_loss_that_makes_no_sense_is_refused(field, value):
    with pytest.raises(ValueError, match=field):
        PolicyLossConfig(**{field: value})


# --- the optimizer --------------------------------------------------------------------------------

TREE_AXES = {"kernel": P("layers", "embed", "mlp"), "bias": P("layers", "mlp"), "embedding": P("vocab", "embed")}


def small_tree(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (3, 8, 12), "bias": (3, 12), "embedding": (10, 8)}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def test_the_schedule_warms_up_and_ends_where_it_should():
    cosine = learning_rate(OptimizerConfig(1.0, total_steps=100, warmup_steps=10, schedule="cosine"))
    np.testing.assert_allclose([cosine(0), cosine(10), cosine(55), cosine(100)], [0.1, 1, 0.55, 0.1], rtol=1e-6)
    constant = learning_rate(OptimizerConfig(2.0, total_steps=100), scale=3.0)
    assert float(constant(0)) == float(constant(99)) == 6


def test_adamw_follows_its_definition_and_only_matrices_decay():
    config = OptimizerConfig(0.1, total_steps=9, weight_decay=0.5, clip_norm=2.0)
    optimizer = make_optimizer(config, TREE_AXES)
    params = small_tree(0)
    expected = {name: np.asarray(p, np.float64) for name, p in params.items()}
    first, second = (dict.fromkeys(params, 0.0) for _ in range(2))
    state = optimizer.init(params)
    for t in (1, 2, 3):
        gradients = small_tree(t)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        norm = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in gradients.values()))
        for name, g in gradients.items():
            g = np.asarray(g, np.float64) * min(1, 2.0 / norm)
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g**2
            move = first[name] / (1 - 0.9**t) / (np.sqrt(second[name] / (1 - 0.999**t)) + 1e-8)
            decay = 0.5 if name == "kernel" else 0
            expected[name] -= 0.1 * (move + decay * expected[name])
    for name, value in expected.items():
        np.testing.assert_allclose(params[name], value, rtol=1e-4, atol=1e-5)


def test_muon_orthogonalises_each_layer_by_itself_and_leaves_the_rest_to_adam():
    config = OptimizerConfig(0.1, total_steps=9, name="muon", weight_decay=0.0, clip_norm=1e9, muon_scale=7.0)
    optimizer = make_optimizer(config, TREE_AXES)
    params, gradients = small_tree(0), small_tree(1)
    # Layer 1's gradient is tiny, which must not matter to its update.
    gradients["kernel"] = gradients["kernel"].at[1].multiply(1e-3)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    for layer in range(3):
        u, _, vt = np.linalg.svd(np.asarray(gradients["kernel"][layer], np.float64), full_matrices=False)
        update = np.asarray(updates["kernel"][layer])
        singular = np.linalg.svd(update, compute_uv=False) / (0.7 * np.sqrt(12 / 8))
        assert (singular > 0.6).all()
        assert (singular < 1.3).all()
        assert (-update * (u @ vt)).sum() / np.linalg.norm(update) / np.linalg.norm(u @ vt) > 0.95
    for name in ("bias", "embedding"):  # Adam's first step is the sign, Nesterov's a little longer
        ratio = -np.asarray(updates[name]) / np.sign(gradients[name]) / 0.1
        assert (ratio > 0.9).all()
        assert (ratio < 2).all()


# --- steps ----------------------------------------------------------------------------------------


def run(learner: Learner, steps: int, state=None) -> tuple:
    state = learner.init_state(0) if state is None else state
    history = []
    for _ in range(steps):
        # The batch follows from the step alone, so a resumed run sees what an uninterrupted one saw.
        batch = pack(sequences(14, seed=int(state.step)), LENGTH, rows=8)
        state, metrics = learner.sft_step(state, batch)
        history.append(float(metrics["loss"]))
    return state, history


def test_fine_tuning_learns_a_batch_by_heart(muon_learner, batch):
    state = muon_learner.init_state(0)
    for step in range(60):
        state, metrics = muon_learner.sft_step(state, batch)
        check_finite(metrics, step)
    assert metrics["accuracy"] > 0.9
    assert metrics["loss"] < np.log(VOCABULARY) / 2
    assert metrics["tokens"] == batch.loss_mask.sum()
    assert int(state.step) == 60
    assert muon_learner.sft_step._cache_size() == 1


def test_micro_batches_change_nothing_but_rounding(learner):
    four = Learner(CONFIG, ADAMW, policy=learner.policy, micro_batches=4)
    (one_state, one), (four_state, split) = run(learner, 3), run(four, 3)
    np.testing.assert_allclose(one, split, rtol=1e-6)
    for a, b in zip(leaves(one_state.params), leaves(four_state.params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    batch = pack(sequences(14), LENGTH, rows=8)
    params = learner.init_state(1).params
    for a, b in zip(learner.score(params, batch), four.score(params, batch), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_an_update_that_is_not_finite_is_not_applied(learner, batch):
    state = learner.init_state(0)
    before = jax.tree.map(np.array, state)
    old = np.array(batch.sampler_logprobs)
    poisoned = dataclasses.replace(batch, advantages=np.full_like(batch.advantages, np.inf))
    state, metrics = learner.policy_step(state, poisoned, old, old)
    with pytest.raises(FloatingPointError, match=r"step 7: .*the update was not applied"):
        check_finite(metrics, step=7)
    assert_same_bits((state.params, state.opt_state), (before.params, before.opt_state))


def test_a_model_is_copied_into_a_state_and_back(learner, batch):
    model = Transformer(CONFIG, nnx.Rngs(3))
    before = leaves(nnx.state(model, nnx.Param))
    state = learner.load_state(model)
    state, _ = learner.sft_step(state, batch)
    assert_same_bits(nnx.state(model, nnx.Param), before)
    assert learner.model(state.params).embedding.shape == (VOCABULARY, 32)
    with pytest.raises(ValueError, match="num_layers=1"):
        learner.load_state(Transformer(dataclasses.replace(CONFIG, num_layers=1), nnx.Rngs(0)))


def test_rows_that_do_not_divide_are_an_error(batch):
    learner = Learner(CONFIG, ADAMW, micro_batches=3)
    with pytest.raises(ValueError, match="8 rows cannot be split into 3 micro-batches over 1 devices"):
        learner.sft_step.trace(learner.abstract_state, batch)


# --- meshes ---------------------------------------------------------------------------------------


def test_parameters_lie_where_their_axes_say():
    kernel = jax.ShapeDtypeStruct((3, 8, 12), np.float32)
    there = mesh.parameter_shardings({"k": kernel}, {"k": P("layers", "embed", "mlp")},
                                     AbstractMesh((1, 4, 3), mesh.AXES))  # fmt: skip
    assert there["k"].spec == P(None, "fsdp", "tensor")
    with pytest.raises(ValueError, match=r"^k \(3, 8, 12\): its axis 'embed' of size 8 .* axis fsdp of size 3$"):
        mesh.parameter_shardings({"k": kernel}, {"k": P("layers", "embed", "mlp")},
                                 AbstractMesh((1, 3, 4), mesh.AXES))  # fmt: skip


def test_a_mesh_must_fit_the_devices():
    assert mesh.make_mesh().shape == {"data": jax.device_count(), "fsdp": 1, "tensor": 1}
    with pytest.raises(ValueError, match="data=3, fsdp=1, tensor=2: the sizes must multiply to the number of devices"):
        mesh.make_mesh(3, 1, 2)
    with pytest.raises(ValueError, match="one of them may be -1"):
        mesh.make_mesh(-1, -1, 1)


def subprocess_environment(**more: str) -> dict[str, str]:
    root = Path(__file__).parent.parent
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", **more}


@pytest.mark.slow
def test_eight_devices_do_what_one_does(muon_learner):
    program = (
        "import json\n"
        "from tests.test_learner import *\n"
        "learner = Learner(CONFIG, MUON, mesh=mesh.make_mesh(2, 2, 2), micro_batches=2)\n"
        "state, history = run(learner, 5)\n"
        "kernel = state.params['layers']['feed_forward']['up']['kernel']\n"
        "print(json.dumps([history, learner.sft_step._cache_size(), kernel.addressable_shards[0].data.shape]))\n"
    )
    environment = subprocess_environment(XLA_FLAGS="--xla_force_host_platform_device_count=8")
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    history, compilations, shard = json.loads(done.stdout.splitlines()[-1])
    np.testing.assert_allclose(history, run(muon_learner, 5)[1], rtol=1e-5)
    assert compilations == 1
    assert shard == [2, 16, 24]


# --- checkpoints ----------------------------------------------------------------------------------


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(muon_learner, tmp_path):
    straight, _ = run(muon_learner, 6)
    half, _ = run(muon_learner, 3)
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
    assert_same_bits(run(learner, 3, restored)[0], straight)


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
        "from tests.test_learner import *\n"
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

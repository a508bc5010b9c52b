"""Scores of tokens: values and gradients against NumPy in float64, memory, and what a mesh moves."""

import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from benchmarks.cross_entropy import LOSSES, chunked, naive, temporaries
from etagent_jax.data.packing import Batch, pack
from etagent_jax.learner.losses import PolicyLossConfig
from etagent_jax.learner.mesh import ROWS, make_mesh
from etagent_jax.learner.scores import CHUNK_BYTES, TABLE, score_targets, token_scores
from etagent_jax.learner.step import Learner
from etagent_jax.model.transformer import ModelConfig, Transformer
from tests.learning import ADAMW, CONFIG, LENGTH, sequences, subprocess_environment

R, T, D, V = 2, 5, 16, 300
COLLECTIVES = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
NARROW = 1  # bytes: chunks of the least size, 128 entries, so 128 + 128 + 44


def inputs(scale: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """hidden [R, T, D] and table [V, D], which numbers of bfloat16 hold exactly, and targets [R, T]."""
    rng = np.random.default_rng(seed)
    exact = lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)
    hidden, table = rng.normal(size=(R, T, D)), scale * rng.normal(size=(V, D))
    return exact(hidden), exact(table), rng.integers(0, V, (R, T), np.int32)


def expected(hidden, table, targets, temperature: float, of_logprob, of_entropy) -> tuple[np.ndarray, ...]:
    """Log-probabilities, entropies, and the gradients of Σ of_logprob · logprob + of_entropy · entropy, in float64."""
    states, table = hidden.reshape(-1, D).astype(np.float64), table.astype(np.float64)
    logits = states @ table.T / temperature
    log_p = logits - logits.max(-1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
    p = np.exp(log_p)
    chosen = np.eye(V)[targets.reshape(-1)]
    entropy = -(p * log_p).sum(-1, keepdims=True)
    of_logits = of_logprob.reshape(-1, 1) * (chosen - p) - of_entropy.reshape(-1, 1) * p * (log_p + entropy)
    of_logits /= temperature
    by_token = lambda x: x.reshape(targets.shape)
    return by_token((log_p * chosen).sum(-1)), by_token(entropy), of_logits @ table, of_logits.T @ states


def computed(hidden, table, targets, temperature: float, of_logprob, of_entropy, chunk_bytes: int, dtype=np.float32):
    def weighted(hidden, table):
        scores = score_targets(hidden, table, targets, temperature, make_mesh(), chunk_bytes)
        return (of_logprob * scores.logprobs + of_entropy * scores.entropy).sum(), scores

    hidden, table = jnp.asarray(hidden, dtype), jnp.asarray(table, dtype)
    gradients, scores = jax.jit(jax.grad(weighted, argnums=(0, 1), has_aux=True))(hidden, table)
    assert [g.dtype for g in gradients] == [dtype, dtype]
    of_hidden, of_table = (np.asarray(g, np.float64) for g in gradients)
    return scores.logprobs, scores.entropy, of_hidden.reshape(-1, D), of_table


@pytest.mark.parametrize("chunk_bytes", [NARROW, CHUNK_BYTES])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("weights", [(1, 0), (0, 1), (-1, 0.3)], ids=["logprob", "entropy", "both"])
def test_values_and_gradients_agree_with_numpy(chunk_bytes, temperature, weights):
    rng = np.random.default_rng(1)
    arguments = (*inputs(), temperature, *(w * rng.normal(size=(R, T)).astype(np.float32) for w in weights))
    for ours, theirs in zip(computed(*arguments, chunk_bytes), expected(*arguments), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_in_bfloat16_values_are_those_of_float32_and_gradients_lose_only_their_own_rounding():
    arguments = (*inputs(0.3), 0.7, -np.ones((R, T), np.float32), np.full((R, T), 0.1, np.float32))
    ours, theirs = computed(*arguments, NARROW, dtype=jnp.bfloat16), expected(*arguments)
    for mine, exact in zip(ours[:2], theirs[:2], strict=True):
        np.testing.assert_allclose(mine, exact, atol=1e-5)
    for mine, exact in zip(ours[2:], theirs[2:], strict=True):  # bfloat16 rounds by up to 2⁻⁸ of a number
        np.testing.assert_allclose(mine, exact, rtol=2**-6, atol=2**-8 * np.abs(exact).max())


@pytest.mark.parametrize("chunk_bytes", [NARROW, CHUNK_BYTES])
def test_logits_of_ten_thousands_stay_exact_and_finite(chunk_bytes):
    hidden, table, targets = inputs(1000.0)
    logits = hidden @ table.T
    assert logits.max() > 1e4
    assert logits.min() < -1e4
    ones = np.ones((R, T), np.float32)
    for ours, theirs in zip(
        computed(hidden, table, targets, 1.0, ones, ones, chunk_bytes),
        expected(hidden, table, targets, 1.0, ones, ones),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=5e-3)


def test_ties_for_the_likeliest_are_all_most_likely():
    hidden, table, _ = inputs()
    table[200] = table[7] = 9 * hidden[0, 0]
    targets = np.array([[7, 200, 7, 8, 9], [7, 200, 7, 8, 9]], np.int32)
    score = jax.jit(lambda hidden: score_targets(hidden, table, targets, 1.0, make_mesh(), NARROW))
    likely = score(np.tile(hidden[:1, :1], (2, 5, 1))).most_likely
    assert likely.tolist() == [[True, True, True, False, False]] * 2


def test_only_what_predicts_a_token_of_its_own_segment_has_a_gradient():
    hidden, table, targets = inputs()
    segments = np.array([[1, 1, 2, 2, 0], [1, 1, 1, 0, 0]], np.int32)
    batch = Batch(targets, targets, segments, segments > 0, *np.zeros((2, R, T), np.float32))

    def loss(hidden: jax.Array) -> jax.Array:
        model = lambda tokens, positions, segment_ids: hidden
        model.output_kernel = lambda: jnp.asarray(table.T)
        scores = token_scores(model, batch)
        return (scores.logprobs + scores.entropy).sum()

    gradient = jax.jit(jax.grad(loss))(jnp.asarray(hidden))
    predicts = [[True, False, True, False, False], [True, True, False, False, False]]
    assert (np.abs(gradient).max(axis=-1) > 0).tolist() == predicts


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_learns_through_its_scores_as_through_its_logits(tied):
    config = ModelConfig(V, 32, 48, 1, 4, 2, 8, tie_embeddings=tied)
    model = Transformer(config, nnx.Rngs(0))
    batch = pack(sequences(5), LENGTH)

    def through_logits(model: Transformer) -> jax.Array:
        logits = model.logits(model(batch.tokens, batch.positions, batch.segment_ids)) / 0.7
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits)[:, :-1], batch.tokens[:, 1:, None], axis=-1)[..., 0]
        return jnp.where(batch.loss_mask[:, 1:], log_p, 0).mean()

    def through_scores(model: Transformer) -> jax.Array:
        return jnp.where(batch.loss_mask, token_scores(model, batch, 0.7).logprobs, 0)[:, 1:].mean()

    (one, theirs), (other, ours) = (jax.jit(jax.value_and_grad(f))(model) for f in (through_logits, through_scores))
    np.testing.assert_allclose(one, other, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), ours, theirs)


def test_scores_are_the_log_softmax_at_the_temperature():
    learner = Learner(CONFIG, ADAMW, policy=PolicyLossConfig(temperature=0.7))
    batch = pack(sequences(14), LENGTH, rows=8)
    params = learner.init_state(0).params
    logprobs, entropy = (np.asarray(x) for x in learner.score(params, batch))
    model = learner.model(params)
    forward = jax.jit(lambda model: model.logits(model(batch.tokens, batch.positions, batch.segment_ids)))
    logits = np.asarray(forward(model), np.float64) / 0.7
    log_softmax = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    most_likely = jax.jit(lambda model: token_scores(model, batch, 0.7))(model).most_likely
    for r, t in np.ndindex(batch.tokens.shape):
        if batch.segment_ids[r, t] == 0 or batch.positions[r, t] == 0:
            assert logprobs[r, t] == entropy[r, t] == most_likely[r, t] == 0
            continue
        row = log_softmax[r, t - 1]
        assert abs(logprobs[r, t] - row[batch.tokens[r, t]]) < 1e-5
        assert abs(entropy[r, t] + (np.exp(row) * row).sum()) < 1e-5
        assert bool(most_likely[r, t]) == (row[batch.tokens[r, t]] == row.max())


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_temporaries_are_at_most_a_fifth_of_those_of_all_logits(loss):
    sizes = (4, 4096, 32_768, 64, "float32")
    assert temporaries(chunked, loss, *sizes) <= temporaries(naive, loss, *sizes) / 5


def on_mesh(*axes: int) -> dict[str, list]:
    """Scores and gradients on a mesh, and what its devices send each other: with a table that learns, and a frozen one.

    `moved`, `frozen`: pairs of the text of an HLO type and the name of the collective that makes it.
    """
    mesh = make_mesh(*axes, devices=jax.devices()[: int(np.prod(axes))])
    rows, parts = NamedSharding(mesh, ROWS), NamedSharding(mesh, TABLE)
    hidden, table, targets = inputs()
    hidden, targets = np.tile(hidden, (4, 1, 1)), np.tile(targets, (4, 1))

    def loss(hidden: jax.Array, table: jax.Array) -> tuple:
        scores = score_targets(hidden, table, targets, 0.7, mesh, NARROW)
        return (scores.entropy - scores.logprobs).mean(), scores

    def compiled(argnums: tuple[int, ...]) -> jax.stages.Compiled:
        shardings = (rows, parts)[: len(argnums)]
        gradient = jax.grad(loss, argnums, has_aux=True)
        jitted = jax.jit(gradient, in_shardings=(rows, parts), out_shardings=(shardings, None))
        return jitted.lower(hidden, table).compile()

    both, frozen = compiled((0, 1)), compiled((0,))
    gradients, scores = both(jax.device_put(hidden, rows), jax.device_put(table, parts))
    results = [np.asarray(x, np.float64).tolist() for x in (*scores, *gradients)]
    sent = lambda program: re.findall(rf"= (.*) ({COLLECTIVES})(?:-start)?\(", program.as_text())
    return {"results": results, "moved": sent(both), "frozen": sent(frozen)}


MESHES = ((1, 1, 1), (1, 1, 2), (2, 2, 2), (1, 8, 1))
PROGRAM = "from tests.test_scores import *; print(json.dumps([on_mesh(*axes) for axes in MESHES]))"


@pytest.fixture(scope="module")
def on_meshes() -> list[dict[str, list]]:
    environment = subprocess_environment(XLA_FLAGS="--xla_force_host_platform_device_count=8")
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def elements(shape: str) -> list[int]:
    """Sizes of the arrays in the text of an HLO type, such as (f32[4,8]{1,0}, s32[])."""
    return [int(np.prod([int(n) for n in axes.split(",") if n])) for axes in re.findall(r"\[([\d,]*)\]", shape)]


@pytest.mark.slow
def test_every_mesh_gives_the_scores_and_gradients_of_one_device(on_meshes):
    alone, *others = (run["results"] for run in on_meshes)
    for results in others:
        for ours, theirs in zip(results, alone, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.slow
def test_no_device_is_sent_logits_and_the_table_moves_a_chunk_at_a_time(on_meshes):
    chunk, states = 128 * D, 4 * R * T * D
    for run in on_meshes[1:]:
        assert run["moved"]
        for shape, kind in run["moved"]:
            largest = chunk if kind in ("all-gather", "reduce-scatter") else max(chunk, states)
            assert max(elements(shape)) <= largest, (shape, kind)


@pytest.mark.slow
def test_a_frozen_table_has_no_gradient_to_be_summed(on_meshes):
    for run in on_meshes[2:]:
        assert "reduce-scatter" in [kind for _, kind in run["moved"]]
        assert "reduce-scatter" not in [kind for _, kind in run["frozen"]]

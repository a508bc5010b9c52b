"""Scoring of given tokens by the embedded engine, and the dtype in which it serves."""

import asyncio
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from etagent_jax.model import weights
from etagent_jax.model.transformer import ModelConfig, Transformer
from etagent_jax.policy import decoding
from etagent_jax.policy.engine import Engine
from etagent_jax.policy.interface import Sampling
from tests.test_engine import CONFIG, CONTEXT, SLOTS, Gate, make_engine, make_tokenizer, model, prompt

AT_ONCE = decoding.SCORED_AT_ONCE


@pytest.fixture
def engine():
    engine = make_engine(context=CONFIG.max_position)
    yield engine
    engine.close()


def params(model: Transformer) -> dict:
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


async def test_scores_agree_with_transformers(engine, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    weights.save(params(model()), CONFIG, tmp_path, eos_ids=(1,), pad_id=0)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for length in (2, 40, AT_ONCE, AT_ONCE + 1, AT_ONCE + 2, CONFIG.max_position):
        ids = prompt(length, length)
        with torch.no_grad():
            logprobs = torch.log_softmax(reference(torch.tensor([ids])).logits[0].double(), -1).numpy()
        expected = logprobs[np.arange(length - 1), ids[1:]]
        scores = await engine.score(ids)
        np.testing.assert_allclose(scores.logprobs, expected, atol=1e-5)


async def test_one_token_has_no_score(engine):
    scores = await engine.score(prompt(1))
    assert (scores.logprobs, scores.weight_version) == ((), 0)


async def test_scores_are_those_the_tokens_were_sampled_with(engine):
    ids = prompt(100)
    completion = await engine.generate(ids, Sampling(1.0, 80, seed=3))
    scores = await engine.score(ids + completion.token_ids)
    np.testing.assert_allclose(scores.logprobs[99:], completion.logprobs, atol=5e-5)


async def test_neighbours_change_no_bit_of_scores_nor_scores_of_what_is_sampled(engine):
    sequences = [prompt(length, length) for length in (5, 90, 200)]
    alone = [await engine.score(ids) for ids in sequences]
    sampling = Sampling(1.0, 100, seed=1)
    expected = await engine.generate(prompt(20), sampling)
    generating = [engine.generate(prompt(20), sampling, f"s{i}") for i in range(SLOTS + 2)]
    scoring = [engine.score(ids) for ids in sequences * 2]
    results = await asyncio.gather(*generating, *scoring)
    assert results[: SLOTS + 2] == [expected] * (SLOTS + 2)
    assert results[SLOTS + 2 :] == alone * 2


async def test_scores_are_of_the_weights_served_and_compile_once(engine):
    ids = prompt(50)
    before = await engine.score(ids)
    compiled = decoding.score._cache_size()
    await engine.update_weights(7, nnx.state(model(1)))
    after = await engine.score(ids)
    await engine.score(prompt(200))
    assert (before.weight_version, after.weight_version) == (0, 7)
    assert np.abs(np.subtract(before.logprobs, after.logprobs)).max() > 0.1
    assert decoding.score._cache_size() == compiled


def test_memory_is_for_a_chunk_of_logits_not_for_all():
    config = ModelConfig(**{**CONFIG.__dict__, "vocab_size": 50_000})
    abstract = nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0)))
    lowered = decoding.score.lower(abstract, np.zeros(64 * AT_ONCE + 1, np.int32), np.int32(9))
    temporary = lowered.compile().memory_analysis().temp_size_in_bytes
    chunk = AT_ONCE * config.vocab_size * 4
    assert chunk <= temporary < 4 * chunk


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ((), "0 tokens given; an input has 1 to 256"),
        ((1,) * 257, "257 tokens given; an input has 1 to 256"),
        ((3, CONFIG.vocab_size), "outside the vocabulary"),
        ((-1,), "outside the vocabulary"),
    ],
)
async def test_what_cannot_be_scored_is_refused(engine, ids, message):
    with pytest.raises(ValueError, match=message):
        await engine.score(ids)


async def test_a_cancelled_or_closed_scoring_harms_nobody(engine, monkeypatch):
    gate = Gate(monkeypatch)
    generating = asyncio.create_task(engine.generate(prompt(5), Sampling(1.0, 100)))
    await asyncio.to_thread(gate.reached.wait)
    scoring = [asyncio.create_task(engine.score(prompt(9))) for _ in range(3)]
    await asyncio.sleep(0)
    scoring[0].cancel()
    gate.open()
    assert len((await generating).token_ids) == 100
    assert len((await scoring[1]).logprobs) == 8
    assert await scoring[2] == await scoring[1]
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        await engine.score(prompt(9))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_an_error_in_scoring_reaches_every_caller(engine, monkeypatch):
    def fail(*args):
        raise MemoryError("the device is full")

    monkeypatch.setattr(decoding, "score", fail)
    requests = [engine.score(prompt(9)), engine.score(prompt(8)), engine.generate(prompt(5), Sampling(1.0, 100))]
    for error in await asyncio.gather(*requests, return_exceptions=True):
        assert isinstance(error, RuntimeError)
        assert "the engine's thread has failed" in str(error)


# --- dtypes ------------------------------------------------------------------------------------------


async def test_a_bfloat16_folder_is_served_in_bfloat16_and_masters_are_cast(tmp_path):
    """What float32 masters give in a bfloat16 engine is bit for bit what their bfloat16 folder gives."""
    half = dataclasses.replace(CONFIG, dtype="bfloat16", param_dtype="bfloat16")
    for seed in (0, 1):
        weights.save(params(model(seed)), half, tmp_path / str(seed), eos_ids=(1,), pad_id=0)
    served, updated = (
        Engine(weights.load(tmp_path / str(seed)), make_tokenizer(), slots=SLOTS, context=CONTEXT) for seed in (1, 0)
    )
    sampling = Sampling(1.0, 20, seed=2)
    await updated.generate(prompt(40), sampling)
    compiled = [f._cache_size() for f in (decoding.decode, decoding.prefill)]
    masters = nnx.state(model(1))
    await updated.update_weights(1, masters)
    after = await updated.generate(prompt(40), sampling)
    assert [f._cache_size() for f in (decoding.decode, decoding.prefill)] == compiled
    expected = await served.generate(prompt(40), sampling)
    assert (after.token_ids, after.logprobs) == (expected.token_ids, expected.logprobs)
    assert (await updated.score(prompt(60))).logprobs == (await served.score(prompt(60))).logprobs
    assert {x.dtype for x in jax.tree.leaves((updated._model, updated._cache))} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(masters)} == {jnp.dtype("float32")}
    served.close()
    updated.close()

"""The embedded engine against a plain forward pass, and what it promises about batches, prefixes and weights."""

import asyncio
import functools
import threading

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as RawTokenizer
from transformers import PreTrainedTokenizerFast

from etagent_jax.model.transformer import ModelConfig, Transformer
from etagent_jax.policy import decoding
from etagent_jax.policy.engine import Engine
from etagent_jax.policy.interface import Completion, Sampling
from etagent_jax.policy.stops import StopTable
from etagent_jax.tokenizer import Tokenizer
from tests.families import random_model

SLOTS, CONTEXT, CHUNK = 8, 160, 16
CONFIG = ModelConfig(vocab_size=128, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2, num_kv_heads=1,
                     head_dim=16, max_position=256)  # fmt: skip
CHARACTERS = [*map(chr, range(32, 127)), "\n", "\x1b"]
PIECES = [*CHARACTERS, "ab", "ba", "aba", "</", "<se", "arch>", "answer>", "ans", "wer>", "\\boxed{"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}<|im_start|>"


def make_tokenizer() -> Tokenizer:
    """ASCII characters and a few longer pieces that overlap one another and the protocol's tags."""
    raw = RawTokenizer(models.Unigram([(piece, -1.0) for piece in PIECES], unk_id=None, byte_fallback=False))
    raw.decoder = decoders.Fuse()
    raw.add_special_tokens([AddedToken(token, normalized=False) for token in ("<|im_start|>", "<|im_end|>")])
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", chat_template=TEMPLATE)
    return Tokenizer(fast)


@functools.cache
def model(seed: int = 0) -> Transformer:
    return random_model(CONFIG, seed)


def make_engine(eos: tuple[int, ...] = (), **changes) -> Engine:
    """Without an end-of-sequence token, unless told, so that lengths are known."""
    tokenizer = make_tokenizer()
    tokenizer.eos_ids = eos
    return Engine(model(), tokenizer, **{"slots": SLOTS, "context": CONTEXT, "chunk": CHUNK} | changes)


@pytest.fixture
def engine():
    engine = make_engine()
    yield engine
    engine.close()


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, len(PIECES), length).tolist())


@jax.jit
def _logits(model: Transformer, ids: jax.Array) -> jax.Array:
    return model.logits(model(ids[None], np.arange(CONTEXT)[None], np.ones((1, CONTEXT), np.int32)))[0]


def logits_after(ids: tuple[int, ...], start: int, seed: int = 0) -> np.ndarray:
    """Logits [len(ids) - start, V] of a plain forward pass, for each of ids[start:]."""
    padded = np.zeros(CONTEXT, np.int32)
    padded[: len(ids)] = ids
    return np.asarray(_logits(model(seed), padded), np.float64)[start - 1 : len(ids) - 1]


def forward_logprobs(given: tuple[int, ...], sampled: tuple[int, ...], temperature: float, seed=0) -> np.ndarray:
    scaled = logits_after(given + sampled, len(given), seed) / (temperature or 1.0)
    shifted = scaled - scaled.max(-1, keepdims=True)
    logprobs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return logprobs[np.arange(len(sampled)), list(sampled)]


class Gate:
    """Holds the engine's thread after its first run of the compiled loop until `open`."""

    def __init__(self, monkeypatch):
        self.reached, self._opened = threading.Event(), threading.Event()
        self._decode = decoding.decode
        monkeypatch.setattr(decoding, "decode", self._gated)

    def _gated(self, *args, **kwargs):
        result = self._decode(*args, **kwargs)
        jax.block_until_ready(result)
        self.reached.set()
        self._opened.wait()
        return result

    def open(self):
        self._opened.set()


# --- what is sampled ---------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
async def test_logprobs_are_those_of_a_full_forward(engine, temperature):
    prompts = [prompt(length, length) for length in (1, 5, 16, 17, 40, 64)]
    requests = [engine.generate(p, Sampling(temperature, 50, seed=len(p))) for p in prompts]
    for ids, completion in zip(prompts, await asyncio.gather(*requests), strict=True):
        expected = forward_logprobs(ids, completion.token_ids, temperature)
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)
        if temperature == 0:
            assert completion.token_ids == tuple(logits_after(ids + completion.token_ids, len(ids)).argmax(-1))


async def test_tokens_follow_the_softmax(engine):
    """Total variation of 2,000 draws from the exact distribution, against draws of NumPy's."""
    ids, draws = prompt(20), 2000
    requests = [engine.generate(ids, Sampling(0.7, 1, seed=seed)) for seed in range(draws)]
    tokens = [c.token_ids[0] for c in await asyncio.gather(*requests)]
    expected = np.exp([forward_logprobs(ids, (token,), 0.7)[0] for token in range(CONFIG.vocab_size)])
    distance = lambda sample: np.abs(np.bincount(sample, minlength=len(expected)) / draws - expected).sum() / 2
    rng = np.random.default_rng(0)
    typical = [distance(rng.choice(len(expected), draws, p=expected / expected.sum())) for _ in range(200)]
    assert distance(tokens) < np.mean(typical) + 5 * np.std(typical)


async def test_top_p_keeps_the_nucleus_and_the_logprobs(engine):
    ids = prompt(20)
    completion = await engine.generate(ids, Sampling(0.5, 100, top_p=0.3, seed=1))
    sampled = completion.token_ids
    np.testing.assert_allclose(completion.logprobs, forward_logprobs(ids, sampled, 0.5), atol=1e-4)
    scaled = logits_after(ids + sampled, len(ids)) / 0.5
    probabilities = np.exp(scaled) / np.exp(scaled).sum(-1, keepdims=True)
    above = [row[row > row[token]].sum() for row, token in zip(probabilities, sampled, strict=True)]
    assert max(above) < 0.3
    assert len(set(sampled)) > 10


async def test_length_is_bounded_by_request_and_context(engine):
    short = await engine.generate(prompt(10), Sampling(0.0, 7))
    assert (len(short.token_ids), short.finish) == (7, "length")
    full = await engine.generate(prompt(CONTEXT - 3), Sampling(0.0, 100))
    assert (len(full.token_ids), full.finish) == (3, "length")


async def test_end_of_sequence_stops(engine):
    ids = prompt(10)
    free = (await engine.generate(ids, Sampling(1.0, 40, seed=3))).token_ids
    other = make_engine(eos=(free[20],))
    stopped = await other.generate(ids, Sampling(1.0, 40, seed=3))
    other.close()
    assert stopped.finish == "stop"
    assert stopped.token_ids == free[: free.index(free[20]) + 1]


async def test_stop_strings_end_at_the_completing_token(engine):
    tokenizer, ids = make_tokenizer(), prompt(10)
    free = await engine.generate(ids, Sampling(1.0, 60, seed=4))
    texts = [tokenizer.decode([i]) for i in free.token_ids]
    text = "".join(texts)
    for start, length in ((0, 1), (7, 2), (20, 3), (31, 7)):
        stop = text[start : start + length]
        end = text.find(stop) + length
        count = next(n for n in range(len(texts) + 1) if len("".join(texts[:n])) >= end)
        completion = await engine.generate(ids, Sampling(1.0, 60, ("never", stop), seed=4))
        assert completion.finish == "stop"
        assert completion.token_ids == free.token_ids[:count]
        assert completion.logprobs == free.logprobs[:count]


async def test_many_sets_of_stops_neither_grow_the_table_nor_disturb_what_runs(engine, monkeypatch):
    stop = make_tokenizer().decode((await engine.generate(prompt(10), Sampling(1.0, 150, seed=4))).token_ids)[90:94]
    expected = await engine.generate(prompt(10), Sampling(1.0, 150, (stop,), seed=4))
    assert expected.finish == "stop"
    shape = engine._stops.table.shape
    gate = Gate(monkeypatch)
    running = asyncio.create_task(engine.generate(prompt(10), Sampling(1.0, 150, (stop,), seed=4)))
    await asyncio.to_thread(gate.reached.wait)
    gate.open()
    for i in range(30):
        await engine.generate(prompt(5), Sampling(1.0, 1, (f"{i} is never", f"written {i}")))
    assert await running == expected
    assert engine._stops.table.shape == shape


fragments = st.text("ab<", max_size=4)


@given(
    texts=st.lists(fragments, min_size=1, max_size=8),
    stops=st.lists(st.text("ab<", min_size=1, max_size=5), max_size=4).map(tuple),
    earlier=st.lists(st.text("ab<", min_size=1, max_size=5), max_size=4).map(tuple),
    data=st.data(),
)
def test_stop_table_agrees_with_find(texts, stops, earlier, data):
    table = StopTable(texts, capacity=4)
    table.start(earlier)
    state, written = table.start(stops), ""
    for token in data.draw(st.lists(st.integers(0, len(texts) - 1), max_size=20)):
        state, written = table.table[state, token], written + texts[token]
        assert table.accepts[state] == any(written.find(stop) >= 0 for stop in stops)


# --- whatever else is in the batch -------------------------------------------------------------------


async def two_turns(engine: Engine, session: str) -> list[Completion]:
    """Two turns of one trajectory, with 9 given tokens between them."""
    first = await engine.generate(prompt(37), Sampling(1.0, 29, seed=11), session)
    second = await engine.generate(
        prompt(37) + first.token_ids + prompt(9, 1), Sampling(1.0, 29, seed=11), session
    )  # fmt: skip
    return [first, second]


async def test_a_seed_fixes_every_bit_whatever_runs_beside_it():
    alone, busy = make_engine(), make_engine()
    expected = await two_turns(alone, "a")
    alone.close()
    others = [
        asyncio.create_task(busy.generate(prompt(5 + 3 * i, i), Sampling(1.0, 100, seed=i), f"o{i}")) for i in range(20)
    ]
    repeated = await asyncio.gather(*(two_turns(busy, f"s{i}") for i in range(5)))
    await asyncio.gather(*others)
    busy.close()
    assert all(turns == expected for turns in repeated)


async def test_a_lost_slot_changes_no_bit(engine):
    expected = await two_turns(engine, "a")
    again = (await engine.generate(prompt(37), Sampling(1.0, 29, seed=11), "b"),)
    await asyncio.gather(*(engine.generate(prompt(50, 9 + i), Sampling(1.0, 5), f"c{i}") for i in range(SLOTS)))
    before = engine.statistics.reused
    ids = prompt(37) + again[0].token_ids + prompt(9, 1)
    assert await engine.generate(ids, Sampling(1.0, 29, seed=11), "b") == expected[1]
    assert engine.statistics.reused == before


async def test_prefixes_are_reused_between_turns_and_within_a_group(engine):
    await two_turns(engine, "a")
    assert engine.statistics.reused == 37 // CHUNK * CHUNK
    before, computed = engine.statistics.reused, engine.statistics.computed
    await asyncio.gather(*(engine.generate(prompt(37), Sampling(1.0, 5, seed=i), f"g{i}") for i in range(SLOTS)))
    assert engine.statistics.reused - before == SLOTS * (37 // CHUNK * CHUNK)
    # the rest of the prompt and the sampled tokens but the last
    assert engine.statistics.computed - computed == SLOTS * (37 % CHUNK + 4)


# --- new weights -------------------------------------------------------------------------------------


async def test_new_weights_leave_nothing_stale_and_nothing_to_compile(engine):
    await engine.generate(prompt(40), Sampling(1.0, 20), "a")
    compiled = [f._cache_size() for f in (decoding.decode, decoding.prefill)]
    assert engine.version == 0
    await engine.update_weights(7, nnx.state(model(1)))
    assert engine.version == 7
    reused = engine.statistics.reused
    completion = await engine.generate(prompt(40), Sampling(1.0, 20), "a")
    expected = forward_logprobs(prompt(40), completion.token_ids, 1.0, seed=1)
    np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)
    assert np.abs(expected - forward_logprobs(prompt(40), completion.token_ids, 1.0, seed=0)).max() > 0.1
    assert set(completion.weight_versions) == {7}
    assert engine.statistics.reused == reused
    assert [f._cache_size() for f in (decoding.decode, decoding.prefill)] == compiled


async def test_an_update_in_mid_generation_is_recorded_token_for_token(engine, monkeypatch):
    gate = Gate(monkeypatch)
    generating = asyncio.create_task(engine.generate(prompt(20), Sampling(1.0, 120, seed=2)))
    await asyncio.to_thread(gate.reached.wait)
    updating = asyncio.create_task(engine.update_weights(1, nnx.state(model(1))))
    await asyncio.sleep(0)
    gate.open()
    await updating
    completion = await generating
    old = completion.weight_versions.count(0)
    assert 0 < old < 120
    assert completion.weight_versions == (0,) * old + (1,) * (120 - old)
    before, after = (forward_logprobs(prompt(20), completion.token_ids, 1.0, seed) for seed in (0, 1))
    np.testing.assert_allclose(completion.logprobs, np.concatenate([before[:old], after[old:]]), atol=1e-4)


async def test_weights_of_another_shape_are_refused(engine):
    other = random_model(ModelConfig(**{**CONFIG.__dict__, "intermediate_size": 64}))
    with pytest.raises(ValueError, match="differ in names or shapes"):
        await engine.update_weights(1, nnx.state(other))
    assert (await engine.generate(prompt(5), Sampling(0.0, 3))).weight_versions == (0, 0, 0)


# --- ends and errors ---------------------------------------------------------------------------------


async def test_cancelled_requests_free_their_slots(engine, monkeypatch):
    gate = Gate(monkeypatch)
    requests = [asyncio.create_task(engine.generate(prompt(5), Sampling(1.0, 150, seed=i))) for i in range(SLOTS + 3)]
    await asyncio.to_thread(gate.reached.wait)
    for request in requests:
        request.cancel()
    assert all(isinstance(r, asyncio.CancelledError) for r in await asyncio.gather(*requests, return_exceptions=True))
    gate.open()
    assert len((await engine.generate(prompt(9), Sampling(1.0, 4))).token_ids) == 4
    assert engine.statistics.sampled < SLOTS * 100


async def test_a_cancelled_update_harms_nobody(engine, monkeypatch):
    gate = Gate(monkeypatch)
    generating = asyncio.create_task(engine.generate(prompt(5), Sampling(1.0, 100)))
    await asyncio.to_thread(gate.reached.wait)
    updating = asyncio.create_task(engine.update_weights(1, nnx.state(model(1))))
    await asyncio.sleep(0)
    updating.cancel()
    await asyncio.sleep(0)
    gate.open()
    assert len((await generating).token_ids) == 100


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ((), "0 tokens given"),
        ((3, CONFIG.vocab_size), "outside the vocabulary"),
        ((-1,), "outside the vocabulary"),
        ((10**12,), "outside the vocabulary"),
        ((1,) * CONTEXT, f"{CONTEXT} tokens given; an input has 1 to {CONTEXT - 1}"),
    ],
)
async def test_bad_input_is_refused(engine, ids, message):
    with pytest.raises(ValueError, match=message):
        await engine.generate(ids, Sampling(1.0, 4))


@pytest.mark.parametrize("stop", ["", "é"])
async def test_stop_strings_it_cannot_hold_are_refused(engine, stop):
    with pytest.raises(ValueError, match="must be ASCII and not empty"):
        await engine.generate(prompt(5), Sampling(1.0, 4, (stop,)))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("part", ["decode", "prefill"])
async def test_an_error_in_the_thread_reaches_every_caller(engine, monkeypatch, part):
    def fail(*args, **kwargs):
        raise MemoryError("the device is full")

    monkeypatch.setattr(decoding, part, fail)
    requests = [engine.generate(prompt(40, i), Sampling(1.0, 4)) for i in range(SLOTS + 3)]
    for error in await asyncio.gather(*requests, return_exceptions=True):
        assert isinstance(error, RuntimeError)
        assert "the engine's thread has failed" in str(error)
    assert engine.closed
    with pytest.raises(RuntimeError, match="has failed"):
        await engine.generate(prompt(5), Sampling(1.0, 4))
    with pytest.raises(RuntimeError, match="has failed"):
        await engine.update_weights(1, nnx.state(model(1)))


async def test_closing_cancels_what_is_open(engine, monkeypatch):
    gate = Gate(monkeypatch)
    generating = asyncio.create_task(engine.generate(prompt(5), Sampling(1.0, 150)))
    await asyncio.to_thread(gate.reached.wait)
    closing = asyncio.create_task(asyncio.to_thread(engine.close))
    await asyncio.sleep(0.01)
    gate.open()
    await closing
    with pytest.raises(asyncio.CancelledError):
        await generating
    with pytest.raises(RuntimeError, match="closed"):
        await engine.generate(prompt(5), Sampling(1.0, 4))


def test_a_model_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="context 300 exceeds the model's 256 positions"):
        make_engine(context=300)
    tokenizer = make_tokenizer()
    tokenizer.vocab_size = 200
    with pytest.raises(ValueError, match="200 tokens, the model's embedding only 128"):
        Engine(model(), tokenizer)

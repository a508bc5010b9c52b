"""Byte-level tokenizers as real models have them: stops, prompts, rollouts and serving where a token may be half a
character and a tag several tokens."""

import functools
import json

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as RawTokenizer
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from etagent_jax import protocol
from etagent_jax.model.transformer import ModelConfig
from etagent_jax.policy.engine import Engine
from etagent_jax.policy.interface import Completion, Sampling
from etagent_jax.policy.server import make_app
from etagent_jax.policy.sglang import SGLangPolicy
from etagent_jax.policy.stops import StopTable
from etagent_jax.rollout.agent import Agent, Budget
from etagent_jax.tokenizer import Tokenizer
from etagent_jax.tools.search import LocalSearch
from etagent_jax.trajectory import Question
from tests.families import random_model
from tests.test_engine import TEMPLATE
from tests.test_serving import running

TEXT = [
    "search searches research</searches >answer answers ansatz",
    "größer Größe à 東京 東北 🙂 🙃",
    "<think>\n\n x = [y]\n",
]
TAGS = [f"{protocol.opening(name)}{protocol.closing(name)}" for name in (*protocol.RESERVED, "search")]
STOPS = protocol.stop_strings(["search"])
CONFIG = ModelConfig(vocab_size=512, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2, num_kv_heads=1,
                     head_dim=16, max_position=256)  # fmt: skip


@functools.cache
def byte_level() -> PreTrainedTokenizerFast:
    """A byte-level BPE with a start token as Llama's, and fewer tokens than CONFIG's padded vocabulary."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, min_frequency=1, show_progress=False)
    raw.train_from_iterator(TEXT, trainer)
    raw.add_special_tokens([AddedToken(token) for token in ("<|start|>", "<|im_start|>", "<|im_end|>", "<|end|>")])
    raw.post_processor = processors.TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", raw.token_to_id("<|start|>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", chat_template=TEMPLATE)


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer(byte_level())


@functools.cache
def token_bytes() -> list[bytes]:
    """Each token's bytes, by the table of GPT-2."""
    table = {character: byte for byte, character in bytes_to_unicode().items()}
    specials = tokenizer().special_tokens
    tokens = byte_level().convert_ids_to_tokens(range(tokenizer().vocab_size))
    return [t.encode() if t in specials else bytes(table[character] for character in t) for t in tokens]


@pytest.fixture
def engine():
    engine = Engine(random_model(CONFIG), tokenizer(), slots=4, context=160)
    yield engine
    engine.close()


def test_the_tokens_here_split_characters_and_tags():
    assert len(tokenizer().encode("</search>")) > 1
    assert b"\xc3" in token_bytes()
    assert "\ufffd" in tokenizer().decode(tokenizer().encode("é")[:1])


@given(st.text())
def test_text_comes_back(text):
    own = text
    for token in tokenizer().special_tokens:
        own = own.replace(token, "")
    assert tokenizer().decode(tokenizer().encode(own)) == own


@given(st.lists(st.sampled_from([*TEXT, *TAGS, "é", "</sea", "rch>"]), max_size=6).map("".join), st.integers(0))
def test_a_stop_is_found_at_the_token_that_completes_its_bytes(text, seed):
    """Over tokens of running text, and over random ones, whose bytes need not be UTF-8."""
    table = StopTable([tokenizer().decode([i]) for i in range(tokenizer().vocab_size)])
    start = table.start(STOPS)
    noise = np.random.default_rng(seed).integers(0, tokenizer().vocab_size, 10).tolist()
    ids = [*tokenizer().encode(text), *noise, *tokenizer().encode("</search>"), *noise]
    state, written = start, b""
    for i in ids:
        state, written = table.table[state, i], written + token_bytes()[i]
        assert table.accepts[state] == any(stop.encode() in written for stop in STOPS)


async def test_generation_ends_at_a_stop_of_several_tokens(engine):
    ids = tokenizer().prompt("Be brief.", "Größe?")
    free = await engine.generate(ids, Sampling(1.0, 100, seed=2))
    known = [i for i in free.token_ids if i < tokenizer().vocab_size]
    written = b"".join(token_bytes()[i] for i in known)
    starts = [n for n in range(len(written) - 4) if written[n : n + 4].isascii()]
    for start in starts[:: len(starts) // 5]:
        stop = written[start : start + 4]
        stopped = await engine.generate(ids, Sampling(1.0, 100, (stop.decode(),), seed=2))
        assert stopped.finish == "stop"
        assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]
        until = [token_bytes()[i] for i in stopped.token_ids if i < tokenizer().vocab_size]
        assert stop in b"".join(until)
        assert stop not in b"".join(until[:-1])


class Script:
    """Writes its texts in turn, token by token, and stops where a stop table says so."""

    def __init__(self, *texts: str):
        self._texts = iter(texts)
        self._table = StopTable([tokenizer().decode([i]) for i in range(tokenizer().vocab_size)])
        self.served: list[tuple[int, ...]] = []

    async def generate(self, token_ids, sampling, session=""):
        self.served.append(tuple(token_ids))
        state, written = self._table.start(sampling.stop), []
        for i in tokenizer().encode(next(self._texts)):
            state = self._table.table[state, i]
            written.append(i)
            if self._table.accepts[state]:
                break
        return Completion(tuple(written), (-1.0,) * len(written), "stop", (0,) * len(written))


async def test_an_agent_calls_and_answers_where_tags_are_several_tokens():
    said = (
        "<think>größer 🙂</think><search>東京 größe</search> ansatz",
        "<think>x</think><answer>\\boxed{é}</answer>\n",
    )
    policy, tools = Script(*said), {"search": LocalSearch(["größe 🙃", "東京"])}
    agent = Agent(policy, tokenizer(), tools, "Größe.", Budget(2, 2, 2000, 60))
    question = Question("q", "東?", ("é",), "qa", "test")
    trajectory = await agent.rollout(question, id="t", seed=0, temperature=1.0)
    assert trajectory.finish == "answer"
    assert [s.source for s in trajectory.segments] == ["model", "tool", "model"]
    assert trajectory.segments[1].call.input == "東京 größe"
    assert trajectory.segments[1].text == "<result>größe 🙃</result>"
    assert "".join(trajectory.turns).startswith("<think>größer 🙂</think><search>東京 größe</search>")
    assert protocol.extract_answer(trajectory.turns) == "é"
    first, result, _ = trajectory.segments
    assert policy.served == [trajectory.prompt_ids, trajectory.prompt_ids + first.token_ids + result.token_ids]


async def test_a_served_round_trip_keeps_ids_and_text(engine):
    given = "größer 🙂 </sea"
    with running(make_app(engine, tokenizer(), "bytes")) as url:
        async with SGLangPolicy(url) as policy, httpx.AsyncClient() as client:
            sampling = Sampling(1.0, 60, ("</search>",), seed=7)
            ids = tokenizer().encode_start(given)
            completion = await policy.generate(ids, sampling)
            assert completion == await engine.generate(ids, sampling)
            assert await policy.score(ids) == await engine.score(ids)
            parameters = {"max_new_tokens": 60, "stop": ["</search>"], "sampling_seed": 7, "skip_special_tokens": False}
            answer = (await client.post(f"{url}/generate", json={"text": given, "sampling_params": parameters})).json()
    assert answer["meta_info"]["prompt_tokens"] == len(ids)
    assert answer["output_ids"] == list(completion.token_ids)
    assert answer["text"] == tokenizer().decode(completion.token_ids)


# --- folders -----------------------------------------------------------------------------------------


def test_a_turn_ends_at_the_ids_that_the_folder_names(tmp_path):
    byte_level().save_pretrained(tmp_path)
    own, other = (byte_level().convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|end|>"))
    assert Tokenizer.load(tmp_path).eos_ids == (own,)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", "eos_token_id": other}))
    assert Tokenizer.load(tmp_path).eos_ids == (own, other)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [own, 3]}))
    assert Tokenizer.load(tmp_path).eos_ids == (own, 3, other)


def test_only_a_text_of_its_own_begins_with_the_start_token():
    start = byte_level().convert_tokens_to_ids("<|start|>")
    assert tokenizer().encode_start("ab") == (start, *tokenizer().encode("ab"))
    assert start not in tokenizer().encode("ab")


def test_a_tokenizer_that_cannot_write_the_tags_is_refused(tmp_path):
    words = RawTokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "[END]": 2}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="[END]").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"cannot write <think> \(it comes back as '\[UNK\]'\)"):
        Agent(Script(), Tokenizer.load(tmp_path), {}, "", Budget(2, 2, 200, 60))


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    raw = RawTokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=raw).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path}: the tokenizer has no end-of-sequence token"):
        Tokenizer.load(tmp_path)

"""Throughput: FLOPs of a step counted from shapes, against a count product by product."""

import jax
import numpy as np
import pytest

from etagent_jax.learner import throughput
from etagent_jax.learner.step import Learner
from etagent_jax.model.lora import Lora
from etagent_jax.model.transformer import ModelConfig
from tests.learning import ADAMW, CONFIG, batch_of


def plain_flops(c: ModelConfig, lengths: list[int]) -> float:
    """Every product of a forward pass over separate sequences, one by one, times three."""
    total = 0
    for n in lengths:
        for _ in range(c.num_layers):
            for size in (c.num_heads, 2 * c.num_kv_heads, c.num_heads):
                total += 2 * n * c.hidden_size * size * c.head_dim
            total += 3 * 2 * n * c.hidden_size * c.intermediate_size
            for query in range(n):
                total += (query + 1) * c.num_heads * c.head_dim * 2 * 2
        total += 2 * n * c.hidden_size * c.vocab_size
    return 3.0 * total


@pytest.mark.parametrize("tied", [True, False])
def test_step_flops_are_those_of_every_product(tied):
    config = ModelConfig(64, 32, 48, 2, 4, 2, 8, tie_embeddings=tied)
    lengths = [5, 17, 9]
    counted = throughput.step_flops(config, sum(lengths), sum(n * (n + 1) // 2 for n in lengths))
    assert counted == pytest.approx(plain_flops(config, lengths), rel=0.02)  # norms and biases are no products


def test_throughput_counts_tokens_and_pairs_without_padding(monkeypatch):
    batch = batch_of(0)
    used = batch.segment_ids > 0
    pairs = sum(
        n * (n + 1) // 2
        for row, segments in zip(used, batch.segment_ids, strict=True)
        for n in np.bincount(segments[row])[1:]
    )
    learner = Learner(CONFIG, ADAMW)
    monkeypatch.setitem(throughput.PEAK_TFLOPS, jax.devices()[0].device_kind, 1e-3)
    metrics = throughput.throughput(learner, batch, seconds=0.5)
    expected = throughput.step_flops(CONFIG, int(used.sum()), int(pairs)) / 0.5 / jax.device_count() / 1e12
    assert metrics["tokens_per_second"] == 2 * used.sum()
    assert metrics["tflops_per_device"] == pytest.approx(expected)
    assert metrics["mfu"] == pytest.approx(expected / 1e-3)
    assert 0.05 < metrics["memory_gib"] < 64


def test_a_device_without_a_known_peak_has_no_mfu():
    assert throughput.peak_tflops("abacus") is None
    assert throughput.peak_tflops("NVIDIA H200") == 989
    assert throughput.peak_tflops("TPU v5 lite") == 197
    assert throughput.peak_tflops("TPU v5") == 459


def test_what_does_not_learn_costs_no_gradient_of_its_own():
    batch, seconds = batch_of(0), 1.0
    adapters = Learner(CONFIG, ADAMW, lora=Lora(1, 1.0, ("query",)))
    ratio = (
        throughput.throughput(adapters, batch, seconds)["tflops_per_device"]
        / throughput.throughput(Learner(CONFIG, ADAMW), batch, seconds)["tflops_per_device"]
    )
    assert 0.65 < ratio < 0.75

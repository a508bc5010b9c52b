"""How fast a step was: tokens per second, model FLOPs utilisation, memory."""

import resource

import jax
import numpy as np

from etagent_jax.data.packing import Batch
from etagent_jax.learner.step import Learner
from etagent_jax.model.transformer import ModelConfig, count_parameters

PEAK_TFLOPS = {
    "TPU v4": 275, "TPU v5 lite": 197, "TPU v5e": 197, "TPU v5p": 459, "TPU v5": 459, "TPU v6 lite": 918,
    "TPU v6e": 918, "NVIDIA A100": 312, "NVIDIA H100": 989, "NVIDIA H200": 989, "NVIDIA B200": 2250,
}  # fmt: skip
"""Dense bfloat16 TFLOP/s of one device, from the vendors' data sheets, by how its `device_kind` begins."""


def throughput(learner: Learner, batch: Batch, seconds: float) -> dict[str, float]:
    """What an update on `batch`, a batch that this process holds whole, came to in `seconds` of wall time.

    tokens_per_second: of all tokens but padding, over all devices.  tflops_per_device: model FLOPs as in
    `step_flops`, 10¹² per second.  mfu: that over the device's peak, where the peak is known.  memory_gib:
    the most that a device of this process has had in use (on a CPU: that the process has had).
    """
    used = np.asarray(batch.segment_ids) > 0
    tokens, pairs = int(used.sum()), int((np.asarray(batch.positions)[used].astype(np.int64) + 1).sum())
    devices = learner.mesh.devices
    rate = step_flops(learner.config, tokens, pairs, learner.learning_size) / seconds / devices.size / 1e12
    metrics = {"tokens_per_second": tokens / seconds, "tflops_per_device": rate, "memory_gib": memory_gib()}
    peak = peak_tflops(devices.flat[0].device_kind)
    return metrics if peak is None else metrics | {"mfu": rate / peak}


def step_flops(config: ModelConfig, tokens: int, pairs: int, learning: int | None = None) -> float:
    """Model FLOPs of one update: products of the forward and the backward pass, nothing that remat repeats.

    tokens: without padding.  pairs: of a query with a key that it sees, so causal attention counts half
    of the square.  learning: parameters that learn (default: all); the others have no gradient.
    Each parameter of a product costs 2 FLOPs a token forward, 2 backward for the input's gradient and
    2 for its own (PaLM, arXiv 2204.02311, appendix B); a pair costs 4 · H a head and layer forward,
    twice that backward.
    """
    products = count_parameters(config)
    if not config.tie_embeddings:
        products -= config.vocab_size * config.hidden_size  # a look-up is no product
    learning = products if learning is None else min(learning, products)
    attention = 12 * config.num_layers * config.num_heads * config.head_dim * pairs
    return float((4 * products + 2 * learning) * tokens + attention)


def peak_tflops(device_kind: str) -> float | None:
    """Dense bfloat16 TFLOP/s of a device, or None for one that is not in the table."""
    return next((peak for kind, peak in PEAK_TFLOPS.items() if device_kind.startswith(kind)), None)


def memory_gib() -> float:
    """Peak memory in GiB of this process's fullest device; of the process itself where devices keep no count."""
    peaks = [stats["peak_bytes_in_use"] for device in jax.local_devices() if (stats := device.memory_stats())]
    return (max(peaks) if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2**30

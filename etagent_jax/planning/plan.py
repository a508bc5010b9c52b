"""What a step needs and what it can reach: compiled from shapes, then read off the program."""

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from etagent_jax.data.packing import DTYPES
from etagent_jax.learner.throughput import peak_tflops, step_flops
from etagent_jax.model.transformer import ModelConfig, Remat
from etagent_jax.planning import devices
from etagent_jax.planning.collectives import Collective, collectives
from etagent_jax.planning.hlo import Program
from etagent_jax.planning.steps import Step
from etagent_jax.planning.traffic import traffic

GIB = 2**30
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Plan:
    """One compiled step; bytes, FLOPs and seconds are of one device.

    memory: by kind.  available: of the device, None if not known.  problem: why the step cannot run, empty if
    it can.  model_flops: as `step_flops` counts them; executed_flops: with what the backward pass repeats.
    seconds: what each of the three bounds would take alone, empty if the device is not known.
    """

    stage: str
    kind: str
    rows: int
    length: int
    micro_batches: int
    mesh: dict[str, int]
    device: str
    memory: dict[str, int]
    available: float | None
    problem: str
    model_flops: float
    executed_flops: float
    compile_seconds: float
    traffic: int
    collectives: tuple[Collective, ...]
    seconds: dict[str, float]

    @property
    def fits(self) -> bool:
        return not self.problem

    @property
    def bound(self) -> str:
        """What the step waits for longest."""
        return max(self.seconds, key=self.seconds.__getitem__) if self.seconds else ""

    @property
    def mfu(self) -> float | None:
        """The most of the device's peak that model FLOPs can reach, if all three bounds overlap perfectly."""
        peak = peak_tflops(self.device)
        return self.model_flops / self.seconds[self.bound] / peak / 1e12 if self.seconds and peak else None


def make_plan(step: Step, available: float | None = None) -> Plan:
    """Compile the step.  available: bytes of a device, in place of what is known of it."""
    learner = step.learner
    device = learner.mesh.devices.flat[0]
    available = devices.memory_of(device) if available is None else available
    memory = exact_memory(step)
    in_model, executed = _flops(step)
    moved, sent, seconds = 0, [], {}
    lowered, began, refused = step.lower(), time.perf_counter(), False
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        refused = True
        memory["activations"] = _activations_refused(str(error), memory)
    compile_seconds = time.perf_counter() - began
    if not refused:
        memory |= _rest(compiled.memory_analysis(), device.platform, memory)
        program = Program(compiled.as_text() or "", learner.micro_batches)
        moved, sent = traffic(program), collectives(program, dict(learner.mesh.shape))
        seconds = _seconds(device, executed, moved, sent)
    total, problem = sum(memory.values()), ""
    if refused or (available is not None and total > available):
        limit = f", and a device has {available / GIB:.2f}" if available else ""
        problem = f"needs {total / GIB:.2f} GiB a device{limit}"
    return Plan(
        step.stage, step.kind, step.rows, step.length, learner.micro_batches, dict(learner.mesh.shape),
        device.device_kind, memory, available, problem, in_model, executed, compile_seconds, moved,
        tuple(sent), seconds,
    )  # fmt: skip


def exact_memory(step: Step) -> dict[str, int]:
    """Bytes of a device for what is there whatever the compiler does, from the shardings alone.

    Gradients are summed over micro-batches in arrays like the parameters that learn.
    """
    learner = step.learner
    state = learner.abstract_state
    batch = sum(np.dtype(dtype).itemsize for dtype in DTYPES.values()) * step.rows * step.length
    if step.kind == "policy":
        batch += 4 * step.rows * step.length * (2 if learner.policy.kl_coefficient else 1)
    return {
        "parameters": _shard_bytes(state.params),
        "optimizer": _shard_bytes(state.opt_state),
        "gradients": _shard_bytes(learner.changing(state).params),
        "batch": batch // (learner.mesh.shape["data"] * learner.mesh.shape["fsdp"]),
    }


def saved_activations(step: Step) -> int:
    """Bytes of a device for the hidden states between layers, which every way to compute gradients keeps."""
    learner, c = step.learner, step.learner.config
    rows = step.rows // learner.micro_batches // (learner.mesh.shape["data"] * learner.mesh.shape["fsdp"])
    return c.num_layers * rows * step.length * c.hidden_size * jax.numpy.dtype(c.dtype).itemsize


def repeated_flops(config: ModelConfig, tokens: int, pairs: int, remat: Remat) -> float:
    """FLOPs of forward products that the backward pass does again, in the terms of `step_flops`.

    The logits always, for they are never kept; the layers with "full"; attention with "dots".
    """
    c = config
    attention = 4 * c.num_layers * c.num_heads * c.head_dim * pairs
    heads = 2 * c.num_heads * c.head_dim + 2 * c.num_kv_heads * c.head_dim
    layers = 2 * c.num_layers * c.hidden_size * (heads + 3 * c.intermediate_size) * tokens
    logits = 2 * c.vocab_size * c.hidden_size * tokens
    return float(logits + {"none": 0, "dots": attention, "full": attention + layers}[remat])


def _flops(step: Step) -> tuple[float, float]:
    """Of one device, for rows without padding that hold one sequence each: model FLOPs, and those executed."""
    learner, tokens = step.learner, step.rows * step.length
    pairs = step.rows * step.length * (step.length + 1) // 2
    model = step_flops(learner.config, tokens, pairs, learner.learning_size)
    executed = model + repeated_flops(learner.config, tokens, pairs, learner.remat)
    return model / learner.mesh.size, executed / learner.mesh.size


def _seconds(device: jax.Device, flops: float, moved: int, sent: Iterable[Collective]) -> dict[str, float]:
    known, peak = devices.hardware(device), peak_tflops(device.device_kind)
    if known is None or peak is None:
        return {}
    return {
        "compute": flops / peak / 1e12,
        "memory": moved / known.memory_rate,
        "network": sum(c.sent for c in sent) / known.network_rate,
    }


def _rest(stats: Any, platform: str, exact: dict[str, int]) -> dict[str, int]:
    """The kinds of memory that only the compiler knows: the program, and temporaries other than gradients.

    For a TPU the peak is what the compiler compares with the memory there is; its sum of temporaries counts
    some buffers twice.  Elsewhere the peak leaves temporaries out.
    """
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    total = stats.argument_size_in_bytes + stats.temp_size_in_bytes + outputs
    if platform == "tpu":
        total = stats.peak_memory_in_bytes
    return {"activations": max(0, total - sum(exact.values())), "program": stats.generated_code_size_in_bytes}


def _activations_refused(message: str, exact: dict[str, int]) -> int:
    """Bytes of temporaries other than gradients, from the total in the compiler's refusal; 0 if it gives none."""
    found = re.search(r"(?:[Uu]sed |temporaries \()([\d.]+)([KMGT])", message)
    return max(0, round(float(found.group(1)) * UNITS[found.group(2)]) - sum(exact.values())) if found else 0


def _shard_bytes(tree: Any) -> int:
    """Bytes of one device's part of all arrays."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )

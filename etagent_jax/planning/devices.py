"""The devices to plan for: those of a TPU slice that need not be there, virtual CPUs, or those at hand."""

import functools
import importlib.util
import math
import os
import re
from dataclasses import dataclass

import jax
from jax.experimental import topologies


@dataclass(frozen=True)
class Hardware:
    """memory: bytes of one device that a program may use.  memory_rate: bytes per second between that memory and
    the cores.  network_rate: bytes per second that a device sends to others, over all its links together."""

    memory: float
    memory_rate: float
    network_rate: float


HARDWARE = {
    "TPU v5 lite": Hardware(15.75 * 2**30, 819e9, 200e9),
    "TPU v6 lite": Hardware(31.25 * 2**30, 1600e9, 400e9),
    "TPU v5": Hardware(95.74 * 2**30, 2765e9, 600e9),
}
"""By how a device_kind begins.  Rates: docs.cloud.google.com/tpu/docs/{v5e,v6e,v5p}, where the network's is given
for both directions together.  Memory: what the compiler says is available, a little less than the data sheets'."""

SLICES = {
    "v5e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v6e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
}
"""Of each generation, by size; the sizes that Google Cloud offers, from one whole host on."""

NO_TPU = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4",
          "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # fmt: skip
"""Tells libtpu not to ask a TPU machine for its place in the slice, nor to keep its TPUs for one process."""


@functools.cache
def find(topology: str) -> tuple[jax.Device, ...]:
    """Devices of `topology`: v5e:4x8 and the like, cpu:8 (virtual ones), or here.

    ValueError says what is wrong with the name, or what must be installed.  Must be called before JAX is
    used for anything else, but for "here".
    """
    if topology == "here":
        return tuple(jax.devices())
    kind, _, shape = topology.partition(":")
    if kind == "cpu" and re.fullmatch(r"[1-9]\d*", shape):
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", int(shape))
        return tuple(jax.devices())
    if kind not in SLICES or not re.fullmatch(r"\d+(x\d+)+", shape):
        examples = ", ".join(f"{kind}:{shapes[3]}" for kind, shapes in SLICES.items())
        raise ValueError(f"topology {topology!r} is not known: give a TPU slice as in {examples}, or cpu:8, or here")
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(f"topology {topology}: TPUs are compiled for with libtpu, which is not installed; "
                         "pip install -r requirements-tpu.txt (no TPU is needed)")  # fmt: skip
    for name, value in NO_TPU.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")
    try:
        return tuple(topologies.get_topology_desc(topology_name=topology, platform="tpu").devices)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"topology {topology}: libtpu does not know it ({str(error).splitlines()[0]}); "
                         f"slices of {kind} are {', '.join(SLICES[kind])}") from error  # fmt: skip


def larger(topology: str) -> list[str]:
    """The next three larger slices of the same generation."""
    kind, _, shape = topology.partition(":")
    count = lambda shape: math.prod(int(n) for n in shape.split("x"))
    return [f"{kind}:{other}" for other in SLICES.get(kind, ()) if count(other) > count(shape)][:3]


def hardware(device: jax.Device) -> Hardware | None:
    """What is known of a device of this kind."""
    return next((known for kind, known in HARDWARE.items() if device.device_kind.startswith(kind)), None)


def memory_of(device: jax.Device) -> float | None:
    """Bytes that a program may use; None where that is not known."""
    if known := hardware(device):
        return known.memory
    return (device.memory_stats() or {}).get("bytes_limit") if device in jax.devices() else None

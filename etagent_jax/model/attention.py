"""Grouped-query attention over packed rows, by the kernel that suits the device.

Shapes: B rows, T tokens of a row, N query heads, K key/value heads, H head size.  Segment ids [B, T]
int32 tell the sequences of a row apart; padding is segment 0, and attends to nothing but padding.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from absl import logging
from jax.experimental.pallas.ops.gpu import attention as triton_attention
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
"""query [B, T, N, H], key and value [B, T, K, H], segment_ids [B, T] → [B, T, N, H], causal inside a segment."""

AttentionKind = Literal["xla", "cudnn", "pallas", "splash"]

PLATFORM_OF = {"cudnn": "gpu", "pallas": "gpu", "splash": "tpu"}
ROWS, HEADS = P(("data", "fsdp")), P(("data", "fsdp"), None, "tensor")
BLOCK = 128
"""Kernels see rows of a multiple of so many tokens: their smallest block, and the lanes of a TPU."""
SPLASH_BLOCK = 512


def xla(query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Attention as XLA computes it on any device; the scores [B, N, T, T] are held in memory."""
    mask = _same_segment(segment_ids)
    return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=True, implementation="xla")


def cudnn(query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """cuDNN's flash attention, T even.  The segments are a bias [B, 1, T, T], and its gradient is as large."""
    mask = _same_segment(segment_ids)
    return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=True, implementation="cudnn")


def pallas(
    query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array, interpret: bool = False
) -> jax.Array:
    """JAX's Triton flash attention, T a multiple of 128.  It knows no groups: keys and values are repeated."""
    groups = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
    scale = query.shape[-1] ** -0.5
    return triton_attention.mha(query, key, value, segment_ids, sm_scale=scale, causal=True, interpret=interpret)


def splash(
    query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array, interpret: bool = False
) -> jax.Array:
    """JAX's TPU flash attention, T a multiple of 128.  Blocks above the diagonal are not computed."""
    length, heads, head_dim = query.shape[1:]
    block = math.gcd(length, SPLASH_BLOCK)
    attend = splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask([splash_attention.CausalMask((length, length))] * heads),
        block_sizes=splash_attention.BlockSizes(
            block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
        ),
        interpret=interpret,
    )
    query, key, value = (x.swapaxes(1, 2) for x in (query * head_dim**-0.5, key, value))
    return jax.vmap(attend)(query, key, value, splash_attention.SegmentIds(segment_ids, segment_ids)).swapaxes(1, 2)


def _same_segment(segment_ids: jax.Array) -> jax.Array:
    """[B, T] → [B, 1, T, T] bool."""
    return segment_ids[:, None, :, None] == segment_ids[:, None, None, :]


@dataclass(frozen=True)
class PerDevice:
    """A kernel that GSPMD cannot split, run by each device of the mesh on its own rows and heads.

    Rows are padded to a multiple of 128 tokens for it.
    """

    kernel: Attend
    mesh: Mesh

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array) -> jax.Array:
        length = segment_ids.shape[1]
        padded = (
            jnp.pad(x, [(0, 0), (0, -length % BLOCK)] + [(0, 0)] * (x.ndim - 2))
            for x in (query, key, value, segment_ids)
        )
        attend = jax.shard_map(
            self.kernel, mesh=self.mesh, in_specs=(HEADS, HEADS, HEADS, ROWS), out_specs=HEADS, check_vma=False
        )
        return attend(*padded)[:, :length]


def make(kind: AttentionKind | Literal["auto"], mesh: Mesh, *, dtype: str, head_dim: int, num_kv_heads: int) -> Attend:
    """Attention for a mesh (data, fsdp, tensor), whose devices need not be there; hashable.

    "auto" is splash on TPUs, pallas on GPUs if it takes the model's dtype and head_dim, xla elsewhere.
    ValueError if the kind cannot run on those devices, or the heads do not divide over the tensor axis.
    """
    kinds = get_args(AttentionKind)
    if kind not in ("auto", *kinds):
        raise ValueError(f"attention {kind!r} is not known: choose auto, {', '.join(kinds)}")
    platform, reason = mesh.devices.flat[0].platform, "as configured"
    if kind == "auto":
        kind, reason = _choose(platform, dtype, head_dim)
    if kind != "xla":
        if obstacle := _obstacle(kind, platform, dtype, head_dim):
            raise ValueError(f"attention {kind!r} cannot be used: {obstacle}; choose auto or xla")
        if num_kv_heads % mesh.shape["tensor"]:
            raise ValueError(f"attention {kind!r} cannot split {num_kv_heads} key/value heads over the mesh axis "
                             f"tensor of size {mesh.shape['tensor']}: make it a divisor, or choose xla")  # fmt: skip
    logging.info("attention: %s (%s)", kind, reason)
    return xla if kind == "xla" else PerDevice({"cudnn": cudnn, "pallas": pallas, "splash": splash}[kind], mesh)


def kind_of(attend: Attend) -> str:
    """The kind of what `make` gave."""
    kernel = attend.kernel if isinstance(attend, PerDevice) else attend
    return getattr(kernel, "__name__", repr(kernel))


def _choose(platform: str, dtype: str, head_dim: int) -> tuple[AttentionKind, str]:
    """The kind that suits the devices, and why."""
    if platform == "tpu":
        return "splash", "the mesh is of TPUs"
    if platform != "gpu":
        return "xla", f"no kernel for {platform} devices"
    if obstacle := _obstacle("pallas", platform, dtype, head_dim):
        return "xla", f"not pallas: {obstacle}"
    return "pallas", "the mesh is of GPUs, and cudnn would hold a [T, T] bias for each packed row"


def _obstacle(kind: AttentionKind, platform: str, dtype: str, head_dim: int) -> str | None:
    """Why the kernel cannot run, if it cannot."""
    if platform != PLATFORM_OF[kind]:
        return f"it is for {PLATFORM_OF[kind]} devices, and the mesh is of {platform} devices"
    if platform == "gpu" and dtype not in ("bfloat16", "float16"):
        return f"it takes bfloat16 or float16, and the model's dtype is {dtype}"
    if platform == "gpu" and (head_dim % 16 or head_dim > 128):
        return f"it takes a head_dim that is a multiple of 16 up to 128, and the model's is {head_dim}"
    return None

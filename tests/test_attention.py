"""Attention over packed rows: every kernel against XLA's, XLA's against NumPy, and which one is chosen."""

import functools
import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding

from etagent_jax.model import attention

AXES = ("data", "fsdp", "tensor")
TOLERANCE = 1e-5  # absolute, float32, values and gradients of order 1: kernels add up in another order


def make_mesh(*sizes: int) -> Mesh:
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3)


def interpreted(kind: str, mesh: Mesh) -> attention.Attend:
    return attention.PerDevice(functools.partial(getattr(attention, kind), interpret=True), mesh)


def packed_batch(rows: int, length: int, heads: int = 4, kv_heads: int = 2, head_dim: int = 16):
    """query, key, value, segment_ids and the loss's weights [B, T, N, H], which are 0 on padding.

    Each row holds three sequences, which end elsewhere in each row; its last tenth is padding.
    """
    random = np.random.default_rng(0)
    shapes = [(rows, length, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    query, key, value, weights = (random.normal(size=shape).astype(np.float32) for shape in shapes)
    segment_ids = np.zeros((rows, length), np.int32)
    for row in segment_ids:
        ends = [0, *sorted(random.choice(np.arange(1, length * 9 // 10), 2, replace=False)), length * 9 // 10]
        for i in range(3):
            row[ends[i] : ends[i + 1]] = i + 1
    return query, key, value, segment_ids, weights * (segment_ids > 0)[:, :, None, None]


def value_and_gradients(attend: attention.Attend, query, key, value, segment_ids, weights):
    """The output, then the gradients of its weighted sum by query, key and value."""

    def loss(query, key, value):
        out = attend(query, key, value, jnp.asarray(segment_ids))
        return jnp.sum(out.astype(jnp.float32) * weights), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(query, key, value)
    return [np.asarray(x) for x in (out, *gradients)]


def attention_in_float64(query, key, value, segment_ids):
    """softmax(Q Kᵀ / √H) V (arXiv 1706.03762, eq. 1), one sequence after the other."""
    out = np.zeros(query.shape)
    groups = query.shape[2] // key.shape[2]
    for b, t, n in np.ndindex(*query.shape[:3]):
        seen = (segment_ids[b] == segment_ids[b, t]) & (np.arange(len(segment_ids[b])) <= t)
        scores = key[b, seen, n // groups].astype(np.float64) @ query[b, t, n] / np.sqrt(query.shape[3])
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights @ value[b, seen, n // groups] / weights.sum()
    return out


# --- what is computed -----------------------------------------------------------------------------


def test_xla_is_softmax_attention_inside_each_sequence():
    query, key, value, segment_ids, _ = packed_batch(rows=2, length=40)
    out = attention.xla(query, key, value, jnp.asarray(segment_ids))
    np.testing.assert_allclose(out, attention_in_float64(query, key, value, segment_ids), atol=1e-6)


def test_a_sequence_has_the_same_output_and_gradients_packed_as_alone():
    query, key, value, segment_ids, weights = batch = packed_batch(rows=1, length=60)
    packed = value_and_gradients(attention.xla, *batch)
    for segment in (1, 2, 3):
        own = segment_ids[0] == segment
        alone = value_and_gradients(attention.xla, *(x[:, own] for x in (query, key, value, segment_ids, weights)))
        for x, y in zip(packed, alone, strict=True):
            np.testing.assert_allclose(x[:, own], y, atol=1e-6)


@pytest.mark.parametrize("kind", ["pallas", "splash"])
@pytest.mark.parametrize(("length", "head_dim"), [(300, 16), (256, 64), (128, 128)])
def test_a_kernel_gives_the_values_and_gradients_of_xla(kind, length, head_dim):
    batch = packed_batch(rows=2, length=length, head_dim=head_dim)
    expected = value_and_gradients(attention.xla, *batch)
    for x, y in zip(value_and_gradients(interpreted(kind, make_mesh(1, 1, 1)), *batch), expected, strict=True):
        np.testing.assert_allclose(x, y, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["pallas", "splash"])
def test_a_kernel_keeps_the_dtype_and_is_as_near_to_float32_as_xla_in_bfloat16(kind):
    query, key, value, segment_ids, weights = packed_batch(rows=2, length=256, head_dim=64)
    narrow = [x.astype(jnp.bfloat16) for x in (query, key, value)]
    wide = value_and_gradients(attention.xla, *(x.astype(np.float32) for x in narrow), segment_ids, weights)
    from_xla = value_and_gradients(attention.xla, *narrow, segment_ids, weights)
    from_kernel = value_and_gradients(interpreted(kind, make_mesh(1, 1, 1)), *narrow, segment_ids, weights)
    for exact, x, y in zip(wide, from_xla, from_kernel, strict=True):
        assert y.dtype == jnp.bfloat16
        assert np.abs(y - exact).mean() < 1.5 * np.abs(x - exact).mean()


@pytest.mark.parametrize("kind", ["xla", "pallas", "splash"])
def test_padding_is_finite_and_takes_no_gradient(kind):
    query, key, value, segment_ids, weights = packed_batch(rows=2, length=140)
    segment_ids[1] = 0
    weights[1] = 0
    attend = attention.xla if kind == "xla" else interpreted(kind, make_mesh(1, 1, 1))
    out, *gradients = value_and_gradients(attend, query, key, value, segment_ids, weights)
    assert np.isfinite(out).all()
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        assert np.abs(gradient[segment_ids > 0]).max() > 0
        assert (gradient[segment_ids == 0] == 0).all()


def differences_on_eight_devices() -> dict[str, float]:
    """How far each kernel is from XLA when a mesh (2, 2, 2) splits rows and heads."""
    batch = packed_batch(rows=4, length=140)
    expected = value_and_gradients(attention.xla, *batch)
    found = {}
    for kind in ("pallas", "splash"):
        results = value_and_gradients(interpreted(kind, make_mesh(2, 2, 2)), *batch)
        found[kind] = max(float(np.abs(x - y).max()) for x, y in zip(results, expected, strict=True))
    return found


@pytest.mark.slow
def test_a_kernel_split_over_eight_devices_gives_the_values_and_gradients_of_xla():
    program = "import json; from tests.test_attention import *; print(json.dumps(differences_on_eight_devices()))"
    root = Path(__file__).parent.parent
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")])),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == {"pallas", "splash"}
    assert max(found.values()) < TOLERANCE


# --- which kernel is chosen -----------------------------------------------------------------------


@dataclass(frozen=True)
class AbsentDevice:
    """As much of a device as `make` looks at."""

    platform: str
    id: int
    process_index: int = 0


def absent_mesh(platform: str, tensor: int = 1) -> Mesh:
    devices = [AbsentDevice(platform, i) for i in range(tensor)]
    return Mesh(np.array(devices).reshape(1, 1, tensor), AXES)


def make(kind: str, mesh: Mesh, dtype: str = "bfloat16", head_dim: int = 128, num_kv_heads: int = 2):
    return attention.make(kind, mesh, dtype=dtype, head_dim=head_dim, num_kv_heads=num_kv_heads)


@pytest.mark.parametrize(
    ("platform", "dtype", "head_dim", "chosen", "reason"),
    [
        ("cpu", "float32", 64, "xla", "no kernel for cpu devices"),
        ("tpu", "bfloat16", 64, "splash", "TPU"),
        ("tpu", "float32", 128, "splash", "TPU"),
        ("gpu", "bfloat16", 128, "pallas", "GPU"),
        ("gpu", "float16", 64, "pallas", "GPU"),
        ("gpu", "float32", 64, "xla", "the model's dtype is float32"),
        ("gpu", "bfloat16", 256, "xla", "the model's is 256"),
    ],
)
def test_auto_chooses_by_the_devices_of_the_mesh_and_logs_why(platform, dtype, head_dim, chosen, reason, caplog):
    with caplog.at_level(logging.INFO, logger="absl"):
        attend = make("auto", absent_mesh(platform), dtype, head_dim)
    assert getattr(attend, "kernel", attend) is getattr(attention, chosen)
    (message,) = caplog.messages
    assert message.startswith(f"attention: {chosen} (")
    assert reason in message


@pytest.mark.parametrize("kind", ["cudnn", "pallas", "splash"])
def test_an_override_is_followed_where_it_can_work(kind):
    mesh = absent_mesh("tpu" if kind == "splash" else "gpu", tensor=2)
    attend = make(kind, mesh)
    assert attend == attention.PerDevice(getattr(attention, kind), mesh)
    assert hash(attend) == hash(make(kind, mesh))
    assert make("xla", mesh) is attention.xla


@pytest.mark.parametrize(
    ("kind", "mesh", "settings", "sentence"),
    [
        ("splash", absent_mesh("gpu"), {}, "is for tpu devices, and the mesh is of gpu devices"),
        ("pallas", absent_mesh("cpu"), {}, "is for gpu devices, and the mesh is of cpu devices"),
        ("cudnn", absent_mesh("tpu"), {}, "is for gpu devices, and the mesh is of tpu devices"),
        ("cudnn", absent_mesh("gpu"), {"dtype": "float32"}, "the model's dtype is float32"),
        ("pallas", absent_mesh("gpu"), {"head_dim": 24}, "multiple of 16 up to 128, and the model's is 24"),
        ("auto", absent_mesh("tpu", tensor=4), {}, "2 key/value heads over the mesh axis tensor of size 4"),
        ("flash", absent_mesh("cpu"), {}, "attention 'flash' is not known: choose auto, xla, cudnn, pallas, splash"),
    ],
)
def test_what_cannot_work_is_refused_with_a_sentence(kind, mesh, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(kind, mesh, **settings)


# --- compiling for devices that are not there -----------------------------------------------------


def gradients(attend: attention.Attend):
    def loss(query, key, value, segment_ids):
        return jnp.sum(attend(query, key, value, segment_ids).astype(jnp.float32))

    return jax.grad(loss, (0, 1, 2))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_pallas_kernel_lowers_for_cuda_without_an_array_of_scores(head_dim):
    length = 1024
    shapes = [jax.ShapeDtypeStruct((2, length, heads, head_dim), jnp.bfloat16) for heads in (14, 2, 2)]
    lowered = (
        jax.jit(gradients(attention.pallas))
        .trace(*shapes, jax.ShapeDtypeStruct((2, length), jnp.int32))
        .lower(lowering_platforms=("cuda",))
        .as_text()
    )
    assert lowered.count("custom_call @__gpu$xla.gpu.triton") == 3
    assert f"{length}x{length}" not in lowered


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x4", "v5p:2x2x2", "v6e:2x4"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(28, 4, 128), (14, 2, 64)])
def test_splash_compiles_for_tpus_in_less_memory_than_the_scores_of_one_head(
    topology, heads, kv_heads, head_dim, monkeypatch
):
    pytest.importorskip("libtpu")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # another process may be compiling as well
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices
    mesh = Mesh(np.array(devices).reshape(1, 4, 2), AXES)
    attend = make("auto", mesh, head_dim=head_dim, num_kv_heads=kv_heads)
    rows, length = 4, 8192

    def shape(sizes, spec, dtype):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))

    inputs = [shape((rows, length, n, head_dim), attention.HEADS, jnp.bfloat16) for n in (heads, kv_heads, kv_heads)]
    compiled = jax.jit(gradients(attend)).lower(*inputs, shape((rows, length), attention.ROWS, jnp.int32)).compile()
    assert compiled.as_text().count("tpu_custom_call") == 3
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * length**2

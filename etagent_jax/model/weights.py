"""Parameters between a Hugging Face folder and the devices they live on, tensor by tensor."""

import functools
import json
import math
import os
from collections import defaultdict, deque
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from etagent_jax.model import shards
from etagent_jax.model.folder import hugging_face_config, read_config
from etagent_jax.model.shards import Stored
from etagent_jax.model.transformer import ModelConfig, Transformer

Params = dict[str, Any]
"""Arrays in nested dicts, as nnx.to_pure_dict(nnx.state(model, nnx.Param)) makes them."""

Name = tuple[str, ...]
"""The path of a parameter in such dicts."""

MAX_SHARD_BYTES = 5 * 10**9

AHEAD = 2
"""So many tensors are gathered while one is written."""

# A kernel is the transposed `weight` of a Hugging Face module, a scale its `weight`.
LAYER_MODULES = {
    ("attention", "query"): "self_attn.q_proj",
    ("attention", "key"): "self_attn.k_proj",
    ("attention", "value"): "self_attn.v_proj",
    ("attention", "output"): "self_attn.o_proj",
    ("attention", "query_norm"): "self_attn.q_norm",
    ("attention", "key_norm"): "self_attn.k_norm",
    ("feed_forward", "gate"): "mlp.gate_proj",
    ("feed_forward", "up"): "mlp.up_proj",
    ("feed_forward", "down"): "mlp.down_proj",
    ("attention_norm",): "input_layernorm",
    ("feed_forward_norm",): "post_attention_layernorm",
}
TOP_TENSORS = {
    ("embedding",): "model.embed_tokens.weight",
    ("norm", "scale"): "model.norm.weight",
    ("head", "kernel"): "lm_head.weight",
}


def abstract_params(config: ModelConfig) -> Params:
    """The parameters of a model as jax.ShapeDtypeStruct."""
    model = nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0)))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def folder_keys(name: Name, layers: int) -> list[str]:
    """The Hugging Face keys of one of our parameters: one, or if it is stacked one for each layer."""
    if name in TOP_TENSORS:
        return [TOP_TENSORS[name]]
    if name[1:-1] not in LAYER_MODULES or name[-1] not in ("kernel", "scale", "bias"):
        raise ValueError(f"parameter {'.'.join(name)} has no place in a Hugging Face folder "
                         "(adapters must be merged into their kernels first)")  # fmt: skip
    leaf = "bias" if name[-1] == "bias" else "weight"
    return [f"model.layers.{i}.{LAYER_MODULES[name[1:-1]]}.{leaf}" for i in range(layers)]


def folder_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors of a model's Hugging Face folder, in the order of our parameters."""
    shapes = {}
    for name, leaf in flatten_dict(abstract_params(config)).items():
        shape = leaf.shape[1:] if _stacked(name) else leaf.shape
        for key in folder_keys(name, config.num_layers):
            shapes[key] = shape[::-1] if _transposed(name) else shape
    return shapes


def load(folder: str | Path, dtype: str | None = None) -> Transformer:
    """The model in a Hugging Face `folder`, computing in and keeping `dtype` (default: the folder's)."""
    config = read_config(folder)
    if dtype is not None:
        config = replace(config, dtype=dtype, param_dtype=dtype)
    graph, _ = nnx.split(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))))
    return nnx.merge(graph, load_params(folder, config))


def load_params(
    folder: str | Path,
    config: ModelConfig,
    shardings: Params | None = None,
    advance: Callable[[int], Any] = lambda _: None,
) -> Params:
    """The parameters in `folder`, of config.param_dtype, placed as `shardings` says (default: on one device).

    Every process reads the slices that its own devices hold, a layer at a time; on the host there are never
    more than two of them.  `advance` is told the bytes read.
    ValueError names the file and tensor if one is missing, unknown, or of another shape.
    """
    stored = check(folder, config)
    places = None if shardings is None else flatten_dict(shardings)
    loaded = {}
    for name, leaf in flatten_dict(abstract_params(config)).items():
        tensors = [stored[key] for key in folder_keys(name, config.num_layers)]
        if places is None:
            loaded[name] = _read_part(name, leaf, tensors, [(0, size) for size in leaf.shape], [None], advance)[0]
        else:
            loaded[name] = _read_sharded(name, leaf, tensors, places[name], advance)
    return unflatten_dict(loaded)


def check(folder: str | Path, config: ModelConfig) -> dict[str, Stored]:
    """The tensors in `folder` by key, after a look at all the files' headers; errors as in `load_params`."""
    stored, wanted = shards.stored_tensors(folder), folder_shapes(config)
    for key, tensor in stored.items():
        if key not in wanted and not (key == TOP_TENSORS["head", "kernel"] and config.tie_embeddings):
            raise ValueError(f"{tensor.file}: unknown tensor {key}, which a {config.family} model has no place for")
        if key in wanted and tensor.shape != wanted[key]:
            raise ValueError(f"{tensor.file}: {key} has shape {tensor.shape}, the configuration asks for {wanted[key]}")
    missing = [key for key in wanted if key not in stored]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(f"{folder}: {', '.join(missing[:3])}{more} missing in its safetensors files")
    return stored


def save(
    params: Params,
    config: ModelConfig,
    folder: str | Path,
    eos_ids: Sequence[int],
    pad_id: int,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    durable: bool = True,
) -> None:
    """Write config.json and the tensors, cast to config.dtype, as transformers and SGLang read them.

    To be called by all processes, with a folder that they share.  Each writes some of the tensors; what was there
    before is replaced when all are done.  durable: wait until the folder would survive a loss of power; a kill
    of the processes it survives in any case.
    """
    flat, folder = flatten_dict(params), Path(folder)
    for name in flat:
        folder_keys(name, config.num_layers)
    folder.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
        unfinished = folder / ".config.json.unfinished"
        unfinished.write_text(json.dumps(hugging_face_config(config, eos_ids, pad_id), indent=2))
        os.replace(unfinished, folder / "config.json")
    save_tensors(flat.__getitem__, config, folder, max_shard_bytes=max_shard_bytes, durable=durable)


def save_tensors(
    read: Callable[[Name], jax.Array],
    config: ModelConfig,
    folder: Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    durable: bool = True,
    advance: Callable[[int], Any] = lambda _: None,
) -> None:
    """Write the tensors alone; `read` gives the parameters, in turn.  `advance` is told the bytes dealt with."""
    shapes, dtype = folder_shapes(config), jnp.dtype(config.dtype)
    sizes = {key: math.prod(shape) * dtype.itemsize for key, shape in shapes.items()}
    shares = shards.share_out(sizes, jax.process_count(), max_shard_bytes)
    mine = shares[jax.process_index()]
    tensors = host_tensors(read, config, {key for keys in mine.values() for key in keys}, advance)
    shards.write(folder, mine, shapes, dtype, tensors, durable)
    deque(tensors, maxlen=0)  # the others need this process for theirs
    _wait_for_all("tensors written")
    if jax.process_index() == 0:
        files = {name: keys for share in shares for name, keys in share.items()}
        shards.finish(folder, files, sum(sizes.values()))
    _wait_for_all("model folder written")


def host_tensors(
    read: Callable[[Name], jax.Array],
    config: ModelConfig,
    wanted: Container[str],
    advance: Callable[[int], Any] = lambda _: None,
) -> Iterator[np.ndarray]:
    """The tensors of a folder whose keys this process wants, in the folder's order, of config.dtype.

    All processes go through all tensors together.  While one is in use, the next AHEAD are on their way.
    """

    def on_their_way() -> Iterator[tuple[bool, jax.Array]]:
        for name in flatten_dict(abstract_params(config)):
            param = read(name)
            for layer, key in enumerate(folder_keys(name, config.num_layers)):
                tensor = _take(param, layer, stacked=_stacked(name), transposed=_transposed(name), dtype=config.dtype)
                if not param.is_fully_addressable:
                    assert isinstance(param.sharding, NamedSharding)
                    tensor = replicate(param.sharding.mesh)(tensor)
                if key in wanted:
                    tensor.copy_to_host_async()
                yield key in wanted, tensor

    def in_turn() -> Iterator[tuple[bool, jax.Array]]:
        waiting: deque[tuple[bool, jax.Array]] = deque()
        for item in on_their_way():
            waiting.append(item)
            if len(waiting) > AHEAD:
                yield waiting.popleft()
        yield from waiting

    for here, tensor in in_turn():
        tensor.block_until_ready()  # or those that nobody wants here would queue up on the device
        if here:
            yield np.asarray(tensor)
        advance(tensor.nbytes)


def _wait_for_all(what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def _stacked(name: Name) -> bool:
    return name[0] == "layers"


def _transposed(name: Name) -> bool:
    return name[-1] == "kernel"


def _read_sharded(
    name: Name,
    leaf: jax.ShapeDtypeStruct,
    tensors: Sequence[Stored],
    sharding: jax.sharding.Sharding,
    advance: Callable[[int], Any],
) -> jax.Array:
    """A parameter over the devices of `sharding`, what several of them hold read once."""
    devices_of = defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        assert index is not None
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True))
        devices_of[bounds].append(device)
    parts = [
        part
        for bounds, devices in devices_of.items()
        for part in _read_part(name, leaf, tensors, bounds, devices, advance)
    ]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, parts)


def _read_part(
    name: Name,
    leaf: jax.ShapeDtypeStruct,
    tensors: Sequence[Stored],
    bounds: Sequence[tuple[int, int]],
    devices: Sequence[jax.Device | None],
    advance: Callable[[int], Any],
) -> list[jax.Array]:
    """What lies inside `bounds` of a parameter, (start, stop) for each axis, on each of `devices`.

    One tensor is read while the one before is on its way to its place.
    """
    inner = bounds[1:] if _stacked(name) else bounds
    index = tuple(slice(*b) for b in (inner[::-1] if _transposed(name) else inner))
    shape = tuple(stop - start for start, stop in bounds)
    place = functools.partial(_place, transposed=_transposed(name), dtype=leaf.dtype)
    if not _stacked(name):
        piece = tensors[0].read(index)
        advance(piece.nbytes)
        return [place(jax.device_put(piece, device)) for device in devices]
    parts = [jnp.zeros(shape, leaf.dtype, device=device) for device in devices]
    for row, tensor in enumerate(tensors[slice(*bounds[0])]):
        piece = tensor.read(index)
        advance(piece.nbytes)
        jax.block_until_ready(parts)  # or pieces would queue up on the host
        parts = [
            _insert(part, place(jax.device_put(piece, device)), row)
            for part, device in zip(parts, devices, strict=True)
        ]
    return parts


@functools.partial(jax.jit, static_argnames=("transposed", "dtype"))
def _place(piece: jax.Array, *, transposed: bool, dtype: np.dtype) -> jax.Array:
    """The (layer of a) parameter that is a tensor of a folder."""
    return (piece.T if transposed else piece).astype(dtype)


@functools.partial(jax.jit, donate_argnums=0)
def _insert(part: jax.Array, layer: jax.Array, row: int) -> jax.Array:
    """`part` [L, …] with a layer in its place.

    The bits are moved as integers: XLA on a CPU makes a detour through float32 for the whole of a bfloat16 array.
    """
    bits = jnp.dtype(f"uint{8 * part.dtype.itemsize}")
    moved = jax.lax.dynamic_update_index_in_dim(part.view(bits), layer.view(bits), row, axis=0)
    return moved.view(part.dtype)


@functools.partial(jax.jit, static_argnames=("stacked", "transposed", "dtype"))
def _take(param: jax.Array, layer: int, *, stacked: bool, transposed: bool, dtype: str) -> jax.Array:
    """The tensor of a folder that is (a layer of) a parameter."""
    piece = jax.lax.dynamic_index_in_dim(param, layer, keepdims=False) if stacked else param
    return (piece.T if transposed else piece).astype(dtype)


@functools.cache
def replicate(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """A compiled copy of an array, whole on every device."""
    return jax.jit(jnp.copy, out_shardings=NamedSharding(mesh, P()))

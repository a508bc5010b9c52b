"""Hugging Face folders in and out: shapes, shards, devices, and what is said about broken ones."""

import dataclasses
import itertools
import json
import math
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors import safe_open
from safetensors.numpy import load_file

from etagent_jax.model import folder as folders
from etagent_jax.model import shards, weights
from tests.families import FAMILIES, LLAMA, QWEN2, QWEN3, SCALING, random_folder, random_params
from tests.learning import subprocess_environment

every_family = pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)

SHARD_BYTES = 60_000


def bits(array: jax.Array | np.ndarray) -> tuple:
    return array.shape, str(array.dtype), np.asarray(array).tobytes()


def assert_same_bits(one: weights.Params, other: weights.Params) -> None:
    assert {k: bits(v) for k, v in flatten_dict(one).items()} == {k: bits(v) for k, v in flatten_dict(other).items()}


def edit_config(folder: Path, without: tuple[str, ...] = (), **changes: object) -> None:
    path = folder / "config.json"
    raw = {key: value for key, value in json.loads(path.read_text()).items() if key not in without}
    path.write_text(json.dumps(raw | changes))


# What is written is read again ------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_folder_gives_back_its_model_to_the_bit(config, dtype, tmp_path):
    config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
    params = random_folder(config, tmp_path)
    assert weights.read_config(tmp_path) == config
    assert_same_bits(weights.load_params(tmp_path, config), params)


def test_every_pattern_of_bits_survives(tmp_path):
    """Subnormal numbers, infinities and negative zero included; of the NaNs the usual one."""
    config = dataclasses.replace(QWEN3, hidden_size=256, vocab_size=256, dtype="bfloat16", param_dtype="bfloat16")
    params = random_params(config)
    patterns = np.arange(2**16, dtype=np.uint16).reshape(256, 256).view(ml_dtypes.bfloat16)
    patterns[np.isnan(patterns.astype(np.float32))] = np.nan
    params["embedding"] = jnp.asarray(patterns)
    params["layers"]["attention"]["key"]["kernel"] = jnp.broadcast_to(jnp.asarray(patterns[:, ::4]), (3, 256, 64))
    weights.save(params, config, tmp_path, eos_ids=(1,), pad_id=0)
    assert_same_bits(weights.load_params(tmp_path, config), params)


def test_masters_are_written_in_the_dtype_of_the_folder(tmp_path):
    config = dataclasses.replace(LLAMA, dtype="bfloat16")
    params = random_folder(config, tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as opened:
        stored = opened.get_tensor("model.layers.1.mlp.down_proj.weight")
    rounded = params["layers"]["feed_forward"]["down"]["kernel"][1].T.astype(jnp.bfloat16)
    assert bits(stored) == bits(rounded)


def test_tensors_of_another_dtype_than_config_json_says_are_cast(tmp_path):
    params = random_folder(QWEN3, tmp_path)
    edit_config(tmp_path, dtype="bfloat16", torch_dtype="bfloat16")
    config = weights.read_config(tmp_path)
    assert config.param_dtype == "bfloat16"
    assert_same_bits(weights.load_params(tmp_path, config), jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))


def test_a_large_model_is_written_in_shards_with_an_index(tmp_path):
    params = random_folder(QWEN3, tmp_path, max_shard_bytes=SHARD_BYTES)
    names = sorted(path.name for path in tmp_path.iterdir())
    count = len(names) - 2
    assert count > 2
    assert names == ["config.json", *(f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)),
                     "model.safetensors.index.json"]  # fmt: skip
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    held = {key: name for name in names[1:-1] for key in load_file(tmp_path / name)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(params))
    assert all(sum(x.nbytes for x in load_file(tmp_path / name).values()) <= SHARD_BYTES for name in names[1:-1])
    assert_same_bits(weights.load_params(tmp_path, QWEN3), params)


def test_a_folder_written_again_holds_nothing_of_the_one_before(tmp_path):
    random_folder(QWEN3, tmp_path, max_shard_bytes=SHARD_BYTES)
    (tmp_path / ".model-00001-of-00009.safetensors.unfinished").write_text("of a process that was killed")
    params = random_folder(QWEN3, tmp_path, seed=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert_same_bits(weights.load_params(tmp_path, QWEN3), params)


def break_off_writing(folder: Path) -> None:
    """Other parameters than `random_folder`'s, written up to the last one."""
    flat = flatten_dict(random_params(QWEN3, seed=1))

    def read(name: weights.Name) -> jax.Array:
        if name == ("norm", "scale"):
            raise KeyboardInterrupt
        return flat[name]

    with pytest.raises(KeyboardInterrupt):
        weights.save_tensors(read, QWEN3, folder, max_shard_bytes=SHARD_BYTES)
    assert list(folder.glob(".model-*.unfinished"))


def test_a_folder_whose_writing_is_broken_off_does_not_look_whole(tmp_path):
    break_off_writing(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds neither"):
        shards.files(tmp_path)


def test_writing_that_is_broken_off_leaves_what_was_there(tmp_path):
    params = random_folder(QWEN3, tmp_path, max_shard_bytes=SHARD_BYTES)
    break_off_writing(tmp_path)
    assert_same_bits(weights.load_params(tmp_path, QWEN3), params)


def test_no_more_than_a_few_tensors_are_held_while_they_are_written(tmp_path):
    config = dataclasses.replace(QWEN2, num_layers=16, hidden_size=128, num_heads=8)
    params = random_params(config)
    held = lambda: sum({x.unsafe_buffer_pointer(): x.nbytes for x in jax.live_arrays()}.values())
    before, seen = held(), []
    weights.save_tensors(flatten_dict(params).__getitem__, config, tmp_path, advance=lambda _: seen.append(held()))
    sizes = [4 * math.prod(shape) for shape in weights.folder_shapes(config).values()]
    assert len(seen) == len(sizes)
    assert max(seen) - before <= (weights.AHEAD + 2) * max(sizes) < sum(sizes) / 8


def test_tensors_are_shared_out_evenly_and_in_turn():
    """Of processes that gather all tensors together, each has some of its own to write all the time."""
    sizes = {key: 4 * math.prod(shape) for key, shape in weights.folder_shapes(QWEN2).items()}
    shares = shards.share_out(sizes, 4, SHARD_BYTES)
    written = [[key for keys in share.values() for key in keys] for share in shares]
    assert sorted(itertools.chain(*written)) == sorted(sizes)
    totals = [sum(map(sizes.__getitem__, keys)) for keys in written]
    assert max(totals) - min(totals) <= max(sizes.values())
    names = [name for share in shares for name in share]
    assert names == [f"model-{i:05}-of-{len(names):05}.safetensors" for i in range(1, len(names) + 1)]
    order = list(sizes)
    assert all(order.index(keys[-1]) > len(order) // 2 > order.index(keys[0]) for keys in written)
    assert shards.share_out({"a": 4}, 3, SHARD_BYTES) == [{"model.safetensors": ["a"]}, {}, {}]


def test_the_digest_changes_with_any_tensor(tmp_path):
    digests = set()
    for seed, size in ((0, SHARD_BYTES), (1, SHARD_BYTES), (1, 10**9)):
        random_folder(QWEN3, tmp_path, seed=seed, max_shard_bytes=size)
        digests.add(shards.digest(tmp_path))
        assert shards.digest(tmp_path) in digests
    assert len(digests) == 3


def test_adapters_are_not_written_silently_away(tmp_path):
    params = random_params(QWEN3)
    params["layers"]["attention"]["query"]["lora_in"] = jnp.zeros((3, 64, 2))
    with pytest.raises(ValueError, match=r"layers\.attention\.query\.lora_in has no place .* merged"):
        weights.save(params, QWEN3, tmp_path, eos_ids=(1,), pad_id=0)


# Devices ----------------------------------------------------------------------------------------------------------


def shardings(params: weights.Params, mesh: jax.sharding.Mesh) -> weights.Params:
    """Kernels split over two axes, the embedding over one, scales whole."""

    def of(name: weights.Name, leaf: jax.Array) -> NamedSharding:
        if name == ("embedding",):
            return NamedSharding(mesh, P(None, "tensor"))
        return NamedSharding(mesh, P(None, "fsdp", "tensor") if leaf.ndim == 3 else P())

    return unflatten_dict({name: of(name, leaf) for name, leaf in flatten_dict(params).items()})


SHARDED = """
import pathlib, sys, jax
from jax.sharding import AxisType
from etagent_jax.model import shards, weights
from tests.families import QWEN2
from tests.test_weights import bits, shardings

source, target, port, count, rank = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 8 // int(count))
if int(count) > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", int(count), int(rank))
mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
places = shardings(weights.abstract_params(QWEN2), mesh)
split = weights.load_params(source, QWEN2, places)
assert all(jax.tree.leaves(jax.tree.map(lambda x, place: x.sharding == place, split, places)))
assert split["layers"]["attention"]["query"]["kernel"].addressable_shards[0].data.shape == (3, 32, 32)
whole = weights.load_params(source, QWEN2)
for x, y in zip(jax.tree.leaves(split), jax.tree.leaves(whole), strict=True):
    assert all(bits(shard.data) == bits(y[shard.index]) for shard in x.addressable_shards)
weights.save(split, QWEN2, pathlib.Path(target), eos_ids=(1,), pad_id=0)
assert len(shards.files(target)) == int(count)
"""


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_parameters_are_read_into_their_shards_and_written_from_them(processes, tmp_path):
    params = random_folder(QWEN2, tmp_path / "source")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (str(x) for x in (tmp_path / "source", tmp_path / "target", port, processes))
    command = [sys.executable, "-c", SHARDED, *arguments]
    running = [
        subprocess.Popen([*command, str(rank)], env=subprocess_environment(), stderr=subprocess.PIPE, text=True)
        for rank in range(processes)
    ]
    for process in running:
        said = process.communicate()[1]
        assert process.returncode == 0, said
    assert_same_bits(weights.load_params(tmp_path / "target", QWEN2), params)


def test_every_tensor_is_read_once_and_alone(tmp_path):
    random_folder(QWEN2, tmp_path)
    read: list[int] = []
    weights.load_params(tmp_path, QWEN2, advance=read.append)
    assert sorted(read) == sorted(4 * math.prod(shape) for shape in weights.folder_shapes(QWEN2).values())


# config.json ------------------------------------------------------------------------------------------------------


@every_family
def test_transformers_reads_the_same_config(config, tmp_path):
    from transformers import AutoConfig

    random_folder(config, tmp_path)
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert (theirs.model_type, theirs.hidden_size, theirs.head_dim) == (config.family, 64, config.head_dim)
    assert theirs.tie_word_embeddings == config.tie_embeddings
    theirs.architectures = json.loads((tmp_path / "config.json").read_text())["architectures"]
    theirs.save_pretrained(tmp_path / "theirs")  # in the spelling of the installed version
    assert weights.read_config(tmp_path / "theirs") == config


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
    ],
)
def test_rope_is_read_in_the_old_and_the_new_spelling(spelling, tmp_path):
    random_folder(LLAMA, tmp_path)
    edit_config(tmp_path, without=("rope_theta", "rope_scaling", "rope_parameters"), **spelling)
    config = weights.read_config(tmp_path)
    assert (config.rope_theta, config.rope_scaling) == (5e5, SCALING)


def test_what_config_json_leaves_out_is_as_in_transformers(tmp_path):
    for family, head_dim in ((QWEN2, 16), (QWEN3, 128), (LLAMA, 16)):
        random_folder(family, tmp_path)
        edit_config(tmp_path, without=("head_dim", "rope_theta", "rope_scaling", "rope_parameters", "dtype",
                                       "torch_dtype", "attention_bias", "mlp_bias", "tie_word_embeddings"))  # fmt: skip
        config = weights.read_config(tmp_path)
        assert (config.head_dim, config.rope_theta, config.rope_scaling) == (head_dim, 1e4, None)
        assert (config.dtype, config.attention_bias, config.mlp_bias) == ("float32", False, False)
        assert not config.tie_embeddings


def test_a_sliding_window_is_refused_only_where_it_is_in_use(tmp_path):
    random_folder(QWEN2, tmp_path)
    for unused in (
        {"use_sliding_window": False, "sliding_window": 32, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 3},
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 32, "layer_types": ["full_attention"] * 3},
    ):
        edit_config(tmp_path, without=("layer_types",), **unused)
        assert weights.read_config(tmp_path) == QWEN2
    for used in ({"max_window_layers": 2}, {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}):
        edit_config(tmp_path, without=("layer_types",), use_sliding_window=True, sliding_window=32, **used)
        with pytest.raises(ValueError, match="sliding-window attention are not supported"):
            weights.read_config(tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not one of Qwen2.*, Qwen3.*, LlamaForCausalLM"),
        ({"architectures": None}, "architecture none is not one of"),
        ({"hidden_size": "64"}, "hidden_size must be a positive whole number, got '64'"),
        ({"num_hidden_layers": None}, "num_hidden_layers must be a positive whole number, got None"),
        ({"num_key_value_heads": 3}, "config.json: num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"rms_norm_eps": None}, "rms_norm_eps must be a number"),
        ({"dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn' is not one of float32, bfloat16, float16"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is set"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "type 'yarn' is not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is not supported"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "'llama3' lacks low_freq_factor, high"),
        ({"rope_parameters": {"rope_type": "llama3", **LLAMA3, "factor": 0.5}}, "factor must be at least 1"),
    ],
)
def test_a_config_that_we_cannot_run_is_refused(change, says, tmp_path):
    random_folder(QWEN2, tmp_path)
    edit_config(tmp_path, **change)
    with pytest.raises(ValueError, match=rf"config\.json: .*{says}|{says}"):
        weights.read_config(tmp_path)


def test_a_missing_or_broken_config_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json: not there"):
        weights.read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: is not JSON"):
        weights.read_config(tmp_path)


def test_a_tokenizer_larger_than_the_embedding_is_refused():
    folders.check_vocabulary(QWEN3, 97, "models/mine")
    with pytest.raises(ValueError, match="models/mine: the tokenizer has 98 tokens, the model's embedding only 97"):
        folders.check_vocabulary(QWEN3, 98, "models/mine")

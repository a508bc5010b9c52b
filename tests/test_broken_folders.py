"""What is said about model folders whose tensors are missing, cut short, misshapen or strange."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from etagent_jax.model import weights
from tests.families import QWEN2, QWEN3, random_folder


def rewrite(file, **changes) -> None:
    """Replace tensors of a safetensors file; None takes one out."""
    tensors = load_file(file) | {key.replace("__", "."): value for key, value in changes.items()}
    save_file({key: value for key, value in tensors.items() if value is not None}, file)


def test_a_missing_shard_is_named(tmp_path):
    random_folder(QWEN3, tmp_path, max_shard_bytes=60_000)
    (tmp_path / "model-00002-of-00012.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00012\.safetensors missing, of the 12 files that"):
        weights.load(tmp_path)


def test_a_truncated_file_is_named(tmp_path):
    random_folder(QWEN3, tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for size in (len(whole) - 100, 1000, 4, 0):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model\.safetensors: cannot be read as safetensors .*copy it again"):
            weights.load(tmp_path)


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(tmp_path):
    random_folder(QWEN3, tmp_path)
    rewrite(tmp_path / "model.safetensors", model__layers__1__mlp__up_proj__weight=np.zeros((96, 63), np.float32))
    said = r"model\.safetensors: model\.layers\.1\.mlp\.up_proj\.weight has shape \(96, 63\), .* for \(96, 64\)"
    with pytest.raises(ValueError, match=said):
        weights.load(tmp_path)


def test_an_unknown_tensor_is_named(tmp_path):
    random_folder(QWEN3, tmp_path)
    rewrite(tmp_path / "model.safetensors", model__layers__0__mlp__gate_proj__bias=np.zeros(96, np.float32))
    with pytest.raises(ValueError, match=r"unknown tensor model\.layers\.0\.mlp\.gate_proj\.bias, which a qwen3"):
        weights.load(tmp_path)


def test_missing_tensors_are_named(tmp_path):
    random_folder(QWEN2, tmp_path)
    rewrite(tmp_path / "model.safetensors", **{f"model.layers.{i}.self_attn.q_proj.bias": None for i in range(3)},
            model__norm__weight=None)  # fmt: skip
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj\.bias, .* and 1 more missing"):
        weights.load(tmp_path)


def test_the_head_of_a_tied_model_may_be_stored_too(tmp_path):
    random_folder(QWEN3, tmp_path)
    rewrite(tmp_path / "model.safetensors", lm_head__weight=np.zeros((97, 64), np.float32))
    assert weights.load(tmp_path).head is None


def test_a_tensor_of_integers_is_refused(tmp_path):
    random_folder(QWEN3, tmp_path)
    rewrite(tmp_path / "model.safetensors", model__norm__weight=np.zeros(64, np.int8))
    with pytest.raises(ValueError, match=r"model\.norm\.weight is of type I8, not one of F32, F16, BF16"):
        weights.load(tmp_path)


def test_pickled_weights_are_not_read(tmp_path):
    random_folder(QWEN3, tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"holds pickled weights .* save it as safetensors"):
        weights.load(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds neither model\.safetensors nor"):
        weights.load(tmp_path)


def test_a_broken_index_is_named(tmp_path):
    random_folder(QWEN3, tmp_path, max_shard_bytes=60_000)
    for text in ("{", "[]", json.dumps({"weight_map": None})):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ValueError, match=r"index\.json: is not an index of safetensors files"):
            weights.load(tmp_path)

"""Conversion between Hugging Face folders and orbax checkpoints."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import orbax.checkpoint as ocp
import pytest
from safetensors import safe_open

from etagent_jax import convert
from etagent_jax.learner.checkpoint import Checkpoints
from etagent_jax.learner.optimizer import OptimizerConfig
from etagent_jax.learner.step import Learner
from etagent_jax.model import shards, weights
from etagent_jax.model.lora import Lora
from tests.families import FAMILIES, LLAMA, QWEN2, QWEN3, random_folder
from tests.test_weights import assert_same_bits, bits, edit_config

every_family = pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)


def tensors(folder: Path) -> dict[str, tuple]:
    found = {}
    for file in shards.files(folder):
        with safe_open(file, framework="numpy") as opened:
            found |= {key: bits(opened.get_tensor(key)) for key in opened.keys()}  # noqa: SIM118
    return found


def beside(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and "model" not in path.name}


def downloaded(config, folder: Path) -> Path:
    """A folder as it comes from elsewhere: sharded, with a tokenizer and fields that we do not know."""
    random_folder(config, folder, max_shard_bytes=60_000)
    edit_config(folder, transformers_version="4.43.1", auto_map={"AutoModel": "x"}, bos_token_id=5)
    (folder / "tokenizer.json").write_text('{"vocab": "ü"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def trained(config, folder: Path, lora: Lora | None = None) -> weights.Params:
    """The first checkpoint of a run of stage `folder`; returns its parameters."""
    learner = Learner(
        dataclasses.replace(config, param_dtype="float32"),
        OptimizerConfig(learning_rate=1e-3, total_steps=10),
        lora=lora,
    )
    state = learner.init_state(3)
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save(7, state, {"loss": 1.0})
    checkpoints.close()
    return state.params


@every_family
def test_there_and_back_is_exact(config, tmp_path):
    config = dataclasses.replace(config, dtype="bfloat16", param_dtype="bfloat16")
    source = downloaded(config, tmp_path / "source")
    convert.convert(source, tmp_path / "orbax")
    convert.convert(tmp_path / "orbax", tmp_path / "back")
    assert tensors(tmp_path / "back") == tensors(source)
    assert beside(tmp_path / "orbax") == beside(tmp_path / "back") == beside(source)
    assert len(beside(source)) == 3


def test_the_checkpoint_holds_the_parameters_as_the_learner_keeps_them(tmp_path):
    source = downloaded(LLAMA, tmp_path / "source")
    convert.convert(source, tmp_path / "orbax")
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore((tmp_path / "orbax" / "params").absolute())
    assert_same_bits(restored, weights.load_params(source, LLAMA))


def test_the_dtype_of_the_target_can_be_chosen(tmp_path):
    config = dataclasses.replace(QWEN2, dtype="bfloat16", param_dtype="bfloat16")
    source = downloaded(config, tmp_path / "source")
    convert.convert(source, tmp_path / "wide", dtype="float32")
    convert.convert(tmp_path / "wide", tmp_path / "back", dtype="bfloat16")
    assert weights.read_config(tmp_path / "wide") == QWEN2
    assert tensors(tmp_path / "back") == tensors(source)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["auto_map"] == {"AutoModel": "x"}


def test_a_training_checkpoint_is_exported_like_the_model_of_its_stage(tmp_path):
    config = dataclasses.replace(QWEN3, dtype="bfloat16", param_dtype="bfloat16")
    params = trained(config, tmp_path / "sft")
    downloaded(config, tmp_path / "sft" / "model")
    convert.convert(tmp_path / "sft" / "checkpoints" / "7", tmp_path / "exported")
    rounded = jax.tree.map(lambda x: x.astype("bfloat16"), params)
    assert_same_bits(weights.load_params(tmp_path / "exported", config), rounded)
    assert beside(tmp_path / "exported") == beside(tmp_path / "sft" / "model")


def test_a_training_checkpoint_of_a_run_without_a_model_needs_one_that_is_like_it(tmp_path):
    params = trained(QWEN3, tmp_path / "sft")
    checkpoint = tmp_path / "sft" / "checkpoints" / "7"
    with pytest.raises(FileNotFoundError, match=r"no config\.json there; name with --like"):
        convert.convert(checkpoint, tmp_path / "exported")
    unlike = downloaded(dataclasses.replace(QWEN3, num_layers=2), tmp_path / "unlike")
    with pytest.raises(ValueError, match=r"kernel is \(3, .*\) in the checkpoint, and \(2, "):
        convert.convert(checkpoint, tmp_path / "exported", like=unlike)
    convert.convert(checkpoint, tmp_path / "exported", like=downloaded(QWEN3, tmp_path / "like"))
    assert_same_bits(weights.load_params(tmp_path / "exported", QWEN3), params)


def test_a_checkpoint_with_adapters_is_not_exported_without_them(tmp_path):
    trained(QWEN3, tmp_path / "sft", Lora(rank=2, alpha=4.0))
    like = downloaded(QWEN3, tmp_path / "like")
    with pytest.raises(ValueError, match=r"lora_in is \(3, .*, 2\) in the checkpoint, and absent"):
        convert.convert(tmp_path / "sft" / "checkpoints" / "7", tmp_path / "exported", like=like)


def test_a_checkpoint_that_is_not_whole_is_refused(tmp_path):
    trained(QWEN3, tmp_path / "sft")
    downloaded(QWEN3, tmp_path / "sft" / "model")
    (tmp_path / "sft" / "checkpoints" / "7" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        convert.convert(tmp_path / "sft" / "checkpoints" / "7", tmp_path / "exported")


def test_a_source_or_target_that_cannot_be_is_refused_before_anything_is_made(tmp_path):
    source = downloaded(QWEN3, tmp_path / "source")
    with pytest.raises(FileNotFoundError, match=r"nothing: holds no config\.json"):
        convert.convert(tmp_path / "nothing", tmp_path / "target")
    with pytest.raises(ValueError, match="source: is there already"):
        convert.convert(source, source)
    with pytest.raises(ValueError, match="--like is for a training checkpoint"):
        convert.convert(source, tmp_path / "target", like=source)
    (source / "model-00003-of-00012.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00003-of-00012"):
        convert.convert(source, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_conversion_that_fails_leaves_no_target(tmp_path, monkeypatch):
    source = downloaded(QWEN3, tmp_path / "source")
    with monkeypatch.context() as patch:
        patch.setattr(convert, "write_checkpoint", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert.convert(source, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


KILLED = """
import os, signal, sys
from pathlib import Path
from etagent_jax import convert
from etagent_jax.model import shards

original, count = shards.Stored.read, 0
def read(self, index):
    global count
    count += 1
    if count == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, index)

shards.Stored.read = read
convert.main(["--from", sys.argv[1], "--to", sys.argv[2]])
"""


def test_a_killed_conversion_leaves_nothing_in_the_way_of_the_next(tmp_path):
    source, target = downloaded(QWEN3, tmp_path / "source"), tmp_path / "target"
    assert subprocess.run([sys.executable, "-c", KILLED, source, target], capture_output=True).returncode == -9
    assert not target.exists()
    assert len(list(tmp_path.iterdir())) == 2
    done = subprocess.run([sys.executable, "-m", "etagent_jax.convert", "--from", source, "--to", target],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "writing: 100%" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]
    again = subprocess.run([sys.executable, "-m", "etagent_jax.convert", "--from", source, "--to", target],
                           capture_output=True, text=True)  # fmt: skip
    assert again.returncode == 1
    assert again.stderr.strip() == f"convert: {target}: is there already; give a new directory"

"""Convert a model between a Hugging Face folder and an orbax checkpoint.

    python -m etagent_jax.convert --from Qwen2.5-7B --to Qwen2.5-7B-orbax
    python -m etagent_jax.convert --from Qwen2.5-7B-orbax --to Qwen2.5-7B-again
    python -m etagent_jax.convert --from runs/mine/sft/checkpoints/400 --to step-400 --like runs/mine/base/model

What the source is, is seen from its content.  Everything else in a folder (tokenizer, chat template, unknown
fields of config.json) is kept.  The third command exports a checkpoint of a training run.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from tqdm import tqdm

from etagent_jax.learner.checkpoint import is_whole
from etagent_jax.model import weights
from etagent_jax.model.folder import DTYPES, read_config, read_json
from etagent_jax.model.transformer import ModelConfig

PARAMS = "params"
"""Where a converted model has its orbax checkpoint, beside config.json and tokenizer."""

STATE = "state"
"""Where a training checkpoint has its arrays (see learner/checkpoint.py)."""

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".gguf")

CHUNK_BYTES = 128 * 2**20


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m etagent_jax.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--from", dest="source", type=Path, required=True, metavar="DIR", help="what to convert")
    parser.add_argument("--to", dest="target", type=Path, required=True, metavar="DIR", help="what to make; new")
    parser.add_argument("--dtype", choices=DTYPES, help="of the target's arrays (default: the one in config.json)")
    parser.add_argument(
        "--like", type=Path, metavar="DIR",
        help="model folder with config.json and tokenizer of a training checkpoint (default: its stage's model/)",
    )  # fmt: skip
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    jax.config.update("jax_platforms", "cpu")
    try:
        convert(options.source, options.target, options.dtype, options.like)
    except (OSError, ValueError) as error:
        sys.exit(f"convert: {error}")


def convert(source: Path, target: Path, dtype: str | None = None, like: Path | None = None) -> None:
    """Make `target` from `source`; it appears when it is complete.  ValueError or OSError say what cannot be."""
    if target.exists():
        raise ValueError(f"{target}: is there already; give a new directory")
    if like is not None and not (source / STATE).is_dir():
        raise ValueError(f"--like is for a training checkpoint, which {source} is not")
    if (source / STATE).is_dir():
        beside, stored = model_like(source, like), CheckpointParams(source / STATE, "params/")
    elif (source / PARAMS).is_dir():
        beside, stored = source, CheckpointParams(source / PARAMS, "")
    elif (source / "config.json").is_file():
        beside, stored = source, None
    else:
        raise FileNotFoundError(f"{source}: holds no config.json (a Hugging Face folder), {PARAMS}/ (made by convert) "
                                f"or {STATE}/ (a training checkpoint, runs/…/checkpoints/<step>)")  # fmt: skip
    config = read_config(beside)
    config = replace(config, param_dtype=dtype or config.dtype, dtype=dtype or config.dtype)
    if stored is None:
        weights.check(source, config)
    else:
        stored.check(config)
    with appearing(target) as unfinished:
        copy_beside(beside, unfinished, config.dtype)
        if stored is None:
            write_checkpoint(source, unfinished / PARAMS, config)
        else:
            write_folder(stored, unfinished, config)


def model_like(checkpoint: Path, like: Path | None) -> Path:
    """The folder with shape and tokenizer of a training checkpoint: `like`, or the model its stage has made."""
    if not is_whole(checkpoint):
        raise ValueError(f"{checkpoint}: not a whole checkpoint; take an earlier one")
    folder = checkpoint.absolute().parent.parent / "model" if like is None else like
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no config.json there; name with --like a model folder whose shape and "
                                "tokenizer the checkpoint has")  # fmt: skip
    return folder


class CheckpointParams:
    """The parameters in an orbax checkpoint, restored one at a time.

    Their names there begin with `prefix` and are ours, joined by "/" or nested.
    """

    def __init__(self, folder: Path, prefix: str):
        self.folder = folder.absolute()
        self._checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        stored = flatten_dict(self._checkpointer.metadata(self.folder).item_metadata.tree)
        named = {"/".join(key): key for key in stored}
        self._keys = {
            tuple(name.removeprefix(prefix).split("/")): key for name, key in named.items() if name.startswith(prefix)
        }
        self.shapes = {name: stored[key].shape for name, key in self._keys.items()}

    def check(self, config: ModelConfig) -> None:
        """ValueError if these are not the parameters of such a model."""
        wanted = {name: leaf.shape for name, leaf in flatten_dict(weights.abstract_params(config)).items()}
        for name in sorted(wanted.keys() | self.shapes.keys()):
            there, here = (shapes.get(name, "absent") for shapes in (self.shapes, wanted))
            if there != here:
                raise ValueError(f"{self.folder}: {'.'.join(name)} is {there} in the checkpoint, and {here} in a "
                                 "model as config.json has it (adapters and frozen parameters cannot be exported "
                                 "from a checkpoint)")  # fmt: skip

    def read(self, name: weights.Name, dtype: str) -> jax.Array:
        """One parameter, as `dtype`."""
        key = self._keys[name]
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        args = ocp.args.PyTreeRestore(
            item=unflatten_dict({key: jax.ShapeDtypeStruct(self.shapes[name], dtype)}),
            restore_args=unflatten_dict({key: ocp.ArrayRestoreArgs(dtype=dtype, sharding=place)}),
            partial_restore=True,
        )
        return flatten_dict(self._checkpointer.restore(self.folder, args=args))[key]


def write_checkpoint(source: Path, target: Path, config: ModelConfig) -> None:
    """The orbax checkpoint `target` of the Hugging Face folder `source`."""
    total = sum(tensor.nbytes for tensor in weights.check(source, config).values())
    with progress(total, "reading") as bar:
        params = weights.load_params(source, config, advance=bar.update)
    largest = max(param.nbytes for param in jax.tree.leaves(params))
    handler = ocp.PyTreeCheckpointHandler(save_concurrent_gb=largest // 10**9 + 1)
    args = ocp.args.PyTreeSave(
        params,
        save_args=jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), params),
        ocdbt_target_data_file_size=CHUNK_BYTES,
    )
    with progress(total, "writing") as bar, ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(target.absolute(), args=args)
        bar.update(total)


def write_folder(stored: CheckpointParams, target: Path, config: ModelConfig) -> None:
    """The safetensors files of the Hugging Face folder `target`."""
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weights.abstract_params(config)))
    with progress(total, "converting") as bar:
        weights.save_tensors(lambda name: stored.read(name, config.dtype), config, target, advance=bar.update)


def copy_beside(source: Path, target: Path, dtype: str) -> None:
    """Copy what is no weights from one model folder to another; its config.json says `dtype` there."""
    for path in source.iterdir():
        if path.is_file() and path.suffix not in WEIGHT_SUFFIXES and not path.name.endswith(".index.json"):
            shutil.copyfile(path, target / path.name)
    if read_config(source).dtype != dtype:
        raw = read_json(source / "config.json")
        (target / "config.json").write_text(json.dumps(raw | {"dtype": dtype, "torch_dtype": dtype}, indent=2))


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A new directory beside `target` that becomes it at the end; one that a kill left there is replaced."""
    unfinished = target.absolute().with_name(f".{target.absolute().name}.unfinished")
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        os.replace(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def progress(total: int, what: str) -> Any:
    return tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc=what)


if __name__ == "__main__":
    main()

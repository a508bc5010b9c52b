"""The safetensors files of a Hugging Face folder, read by slices, written tensor by tensor."""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """The part of the tensor under `index`, one slice per axis.

        The file is open only meanwhile, so that its pages do not add up in this process.
        """
        with safe_open(self.file, framework="numpy") as opened:
            return opened.get_slice(self.key)[index]


def files(folder: str | Path) -> list[Path]:
    """The safetensors files of `folder`: model.safetensors, or the shards that its index names.

    FileNotFoundError says which is missing.
    """
    folder = Path(folder)
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.is_file():
        if any(folder.glob("pytorch_model*.bin*")):
            raise FileNotFoundError(f"{folder}: holds pickled weights (pytorch_model.bin), which are not read; save "
                                    "it as safetensors with transformers' save_pretrained first")  # fmt: skip
        raise FileNotFoundError(f"{folder}: holds neither {WEIGHTS} nor {INDEX}")
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: is not an index of safetensors files ({error!r}); copy it again") from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder}: {', '.join(missing)} missing, of the {len(names)} files that {INDEX} "
                                "names; copy the folder again")  # fmt: skip
    return [folder / name for name in names]


def stored_tensors(folder: str | Path) -> dict[str, Stored]:
    """Every tensor of `folder` by its key, from the headers of the files alone.

    ValueError names a file that is cut short or no safetensors file, and a tensor of no floating type.
    """
    found = {}
    for file in files(folder):
        try:
            with safe_open(file, framework="numpy") as opened:
                for key in opened.keys():  # noqa: SIM118
                    header = opened.get_slice(key)
                    dtype = header.get_dtype()
                    if dtype not in DTYPES:
                        raise ValueError(f"{file}: {key} is of type {dtype}, not one of {', '.join(DTYPES)}")
                    found[key] = Stored(file, key, tuple(header.get_shape()), DTYPES[dtype])
        except SafetensorError as error:
            raise ValueError(f"{file}: cannot be read as safetensors ({error}); copy it again") from error
    return found


def digest(folder: str | Path) -> str:
    """16 hexadecimal digits that change with any byte of the tensor files of `folder`."""
    total = hashlib.sha256()
    for path in files(folder):
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                total.update(block)
    return total.hexdigest()[:16]


def share_out(sizes: Mapping[str, int], processes: int, max_shard_bytes: int) -> list[dict[str, list[str]]]:
    """The files that each process writes, by name, with the keys of their tensors in the order of `sizes` (bytes).

    The next tensor goes to the process that has least so far, so that all write at the same time.  A process
    has files of at most max_shard_bytes (more for a larger tensor); one file in all is model.safetensors.
    """
    shares: list[dict[str, int]] = [{} for _ in range(processes)]
    totals = [0] * processes
    for key, size in sizes.items():
        process = totals.index(min(totals))
        shares[process][key] = size
        totals[process] += size
    groups = [_groups(share, max_shard_bytes) for share in shares]
    count = sum(map(len, groups))
    names = iter([WEIGHTS] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)])
    return [{next(names): keys for keys in own} for own in groups]


def write(
    folder: Path,
    files: Mapping[str, Sequence[str]],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
    tensors: Iterable[np.ndarray],
    durable: bool,
) -> None:
    """Write `files`, each with the tensors of these keys, under names of unfinished files.

    `tensors` come in the order of the keys and are of `dtype`; one is held at a time.  durable: wait until they
    would survive a loss of power.
    """
    coming = iter(tensors)
    for name, keys in files.items():
        _write_file(_unfinished(folder, name), {key: shapes[key] for key in keys}, dtype, coming, durable)


def finish(folder: Path, files: Mapping[str, Sequence[str]], total_bytes: int) -> None:
    """Put the unfinished `files`, of all processes, in the place of what was in `folder` before.

    A kill leaves model.safetensors or the index only with all that belongs to it.
    """
    for stale in (folder / INDEX, *folder.glob("model*.safetensors")):
        stale.unlink(missing_ok=True)
    for name in files:
        os.replace(_unfinished(folder, name), folder / name)
    for stale in folder.glob(_unfinished(folder, "*").name):
        stale.unlink()
    if len(files) > 1:
        weight_map = {key: name for name, keys in files.items() for key in keys}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        _unfinished(folder, INDEX).write_text(json.dumps(index, indent=2, sort_keys=True))
        os.replace(_unfinished(folder, INDEX), folder / INDEX)


def _groups(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Keys in their order, in groups whose sizes sum to at most `limit`, or that have one member."""
    groups: list[list[str]] = []
    total = 0
    for key, size in sizes.items():
        if not groups or total + size > limit:
            groups.append([])
            total = 0
        groups[-1].append(key)
        total += size
    return groups


def _unfinished(folder: Path, name: str) -> Path:
    return folder / f".{name}.unfinished"


def _write_file(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype, coming: Iterable[np.ndarray], durable: bool
) -> None:
    """One safetensors file: the length of the header, the header as JSON, the tensors' bytes (its README, Format)."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (key, shape), tensor in zip(shapes.items(), coming, strict=False):
            if tensor.shape != shape or tensor.dtype != dtype:
                raise ValueError(f"{key} is {tensor.dtype}{tensor.shape}, not {dtype}{shape}")
            file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
        file.flush()
        if durable:
            os.fsync(file.fileno())

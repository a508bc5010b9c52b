"""Checkpoints of a training state: atomic, bit-exact, and known to be whole before they are read.

With several processes all call the same functions: each writes and reads its own shards, and the first decides.
"""

import json
import os
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from absl import logging

from etagent_jax import distributed

State = TypeVar("State")

MANIFEST = "manifest.json"


class Checkpoints:
    """The checkpoints of one run, each in `folder`/<step>, the newest `keep` of them.

    A checkpoint counts once its manifest, the sizes of all its files, is in place, which is the last
    thing written: what a kill, a full disk or a bad copy left behind is passed over.
    """

    def __init__(self, folder: str | Path, keep: int = 2):
        if keep < 2:
            raise ValueError(f"checkpoints in {folder}: keep must be at least 2, one whole while the next is written")
        self.folder = Path(folder).absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        handlers = {"state": ocp.StandardCheckpointHandler(), "extra": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def save(self, step: int, state: Any, extra: dict[str, Any]) -> None:
        """Write the arrays of `state` and the JSON of `extra`; all on disk when this returns.

        An earlier, broken checkpoint of the same step is replaced; a whole one is a ValueError.
        """
        place = self.folder / str(step)
        steps = {s: is_whole(self.folder / str(s)) for s in self._manager.all_steps()}
        steps = dict(distributed.from_first(list(steps.items())))
        if steps.get(step):
            raise ValueError(f"{place}: a checkpoint of this step is there already")
        for broken in [s for s, whole in steps.items() if not whole]:
            self._manager.delete(broken)  # or it would count among those kept
        args = ocp.args.Composite(state=ocp.args.StandardSave(_named(state)), extra=ocp.args.JsonSave(extra))
        self._manager.save(step, args=args, force=True)
        self._manager.wait_until_finished()
        distributed.barrier()
        if distributed.is_first():
            unfinished = place / f"{MANIFEST}.unfinished"
            unfinished.write_text(json.dumps(_sizes(place)))
            os.replace(unfinished, place / MANIFEST)
        distributed.barrier()

    def latest(self) -> int | None:
        """The newest step with a whole checkpoint; None if there is none.  Says which it passed over."""
        return distributed.from_first(self._latest() if distributed.is_first() else None)

    def _latest(self) -> int | None:
        for step in sorted((int(p.name) for p in self.folder.iterdir() if p.name.isdigit()), reverse=True):
            if is_whole(self.folder / str(step)):
                return step
            logging.warning("%s: this checkpoint is incomplete, an earlier one is used", self.folder / str(step))
        return None

    def restore(self, step: int, abstract: State) -> tuple[State, dict[str, Any]]:
        """The state of `step`, its arrays placed as `abstract` (shapes, dtypes, shardings) says, and `extra`.

        ValueError names a folder that is missing or cut short, or the first array that does not fit.
        """
        place = self.folder / str(step)
        if not distributed.from_first(is_whole(place)):
            raise ValueError(f"{place}: not a whole checkpoint; use an earlier one or remove the folder")
        wanted = _named(abstract)
        stored = self._manager.item_metadata(step)["state"]
        for name in sorted(wanted.keys() | stored.keys()):
            there, here = (_kind(tree[name]) if name in tree else "absent" for tree in (stored, wanted))
            if there != here:
                raise ValueError(f"{place}: {name} is {there} in the checkpoint, but the model and optimizer need "
                                 f"it {here}; was it made with another configuration?")  # fmt: skip
        args = ocp.args.Composite(state=ocp.args.StandardRestore(wanted), extra=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=args)
        arrays = [restored["state"][name] for name in wanted]
        return jax.tree.unflatten(jax.tree.structure(abstract), arrays), restored["extra"]

    def close(self) -> None:
        self._manager.close()


def is_whole(place: Path) -> bool:
    """Whether the checkpoint folder `place` holds the files of its manifest, at full size."""
    try:
        manifest = json.loads((place / MANIFEST).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    there = _sizes(place)
    return all(there.get(name) == size for name, size in manifest.items())


def _sizes(place: Path) -> dict[str, int]:
    """Relative path and size in bytes of every file of a checkpoint but its manifest."""
    files = (path for path in place.rglob("*") if path.is_file() and not path.name.startswith(MANIFEST))
    return {path.relative_to(place).as_posix(): path.stat().st_size for path in files}


def _named(tree: Any) -> dict[str, Any]:
    """The leaves of any tree by their path, in order."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def _kind(array: Any) -> str:
    return f"{array.dtype}{list(array.shape)}"

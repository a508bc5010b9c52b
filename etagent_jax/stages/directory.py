"""A stage's directory: whose config it is, what it was made from, whether it is finished."""

import contextlib
import fcntl
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from etagent_jax import distributed
from etagent_jax.data.store import write_json_atomic
from etagent_jax.model import shards
from etagent_jax.stages.setup import flatten

RUNTIME = (
    "run", "stages", "mesh", "remat", "attention", "policy.backend", "policy.url", "policy.timeout",
    "policy.patience", "policy.colocated", "reviser.concurrency", "rollout.concurrency", "tools.python.workers",
    "*.micro_batches", "*.checkpoint_every",
)  # fmt: skip
"""Settings that say where and how a stage runs and not what it computes; they may differ when it is resumed."""

SELECTED = "selected.jsonl"
"""The flywheel's output, as `model/` is that of the stages that train."""


class StageDirectory:
    """`<run>/<stage>/`: config.json, metrics.jsonl, checkpoints/, trajectories/, model/, and DONE, written last."""

    def __init__(self, config: ConfigDict, stage: str):
        self.path = Path(config.run) / stage
        self.checkpoints = self.path / "checkpoints"
        self.trajectories = self.path / "trajectories"
        self.model = self.path / "model"
        self.selected = self.path / SELECTED
        self._done = self.path / "DONE"
        self._config = self.path / "config.json"
        others = {*config.stages, "evaluate"} - {stage}
        if stage in ("base", "flywheel", "evaluate"):
            others |= {"lora", "frozen"}  # what they do not read
        self._settings = {key: value for key, value in config.to_dict().items() if key not in others}
        before = config.stages[: config.stages.index(stage)] if stage in config.stages else config.evaluate.stages
        self._parents = {parent: Path(config.run) / parent / "DONE" for parent in before}

    @property
    def done(self) -> bool:
        return self._done.is_file()

    def check(self) -> None:
        """ValueError if the directory holds a run of another config or of other parents, naming what differs."""
        if not self._config.is_file():
            return
        before = flatten(json.loads(self._config.read_text()))
        now = flatten(json.loads(json.dumps(self._recorded())))
        differing = [
            f"{key} was {before.get(key, 'not set')}, now {now.get(key, 'not set')}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
            and not any(fnmatch(key, pattern) or fnmatch(key, f"{pattern}.*") for pattern in RUNTIME)
        ]
        if differing:
            raise ValueError(
                f"{self.path} belongs to another config: {'; '.join(differing)}. "
                "Put the settings back, give --config.run=… a new directory, or remove this one to make it anew"
            )

    @contextmanager
    def opened(self) -> Iterator[None]:
        """The directory, made if need be, with the config in it, for the processes of this run alone."""
        with contextlib.ExitStack() as held:
            if distributed.is_first():
                self.trajectories.mkdir(parents=True, exist_ok=True)
                held.enter_context(self._locked())
                self.check()
                if not self._config.is_file():
                    write_json_atomic(self._config, self._recorded())
            distributed.barrier()
            yield

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.path / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BlockingIOError(f"{self.path}: another run is at work on this stage") from error
            yield

    def finish(self, summary: dict[str, Any]) -> None:
        """Mark the stage as done; `summary` is what its row in the final table shows.  All processes call it."""
        if distributed.is_first():
            outputs = [shards.digest(self.model)] if self.model.is_dir() else []
            if self.selected.is_file():
                outputs.append(hashlib.sha256(self.selected.read_bytes()).hexdigest()[:16])
            write_json_atomic(self._done, {"summary": summary, "output": " ".join(outputs)})
        distributed.barrier()

    def summary(self) -> dict[str, Any]:
        return json.loads(self._done.read_text())["summary"]

    def _recorded(self) -> dict[str, Any]:
        """The settings of this stage, the shared ones and its own, and what its parents have put out."""
        outputs = {
            parent: json.loads(done.read_text())["output"] if done.is_file() else "not finished"
            for parent, done in self._parents.items()
        }
        return {**self._settings, "made from": outputs}

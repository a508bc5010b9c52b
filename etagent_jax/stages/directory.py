"""A stage's directory: whose config it is, what it was made from, whether it is finished."""

import fcntl
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from etagent_jax.data.store import write_json_atomic

RUNTIME = (
    "run", "stages", "mesh", "remat", "policy.backend", "policy.url", "reviser.concurrency", "rollout.concurrency",
    "tools.python.workers",
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
        before = _flatten(json.loads(self._config.read_text()))
        now = _flatten(json.loads(json.dumps(self._recorded())))
        differing = [
            f"{key} was {before.get(key, 'not set')}, now {now.get(key, 'not set')}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and not any(key == r or key.startswith(f"{r}.") for r in RUNTIME)
        ]
        if differing:
            raise ValueError(
                f"{self.path} belongs to another config: {'; '.join(differing)}. "
                "Put the settings back, give --config.run=… a new directory, or remove this one to make it anew"
            )

    @contextmanager
    def opened(self) -> Iterator[None]:
        """The directory, made if need be, with the config in it, for this process alone."""
        self.trajectories.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BlockingIOError(f"{self.path}: another process is at work on this stage") from error
            self.check()
            if not self._config.is_file():
                write_json_atomic(self._config, self._recorded())
            yield

    def finish(self, summary: dict[str, Any]) -> None:
        """Mark the stage as done; `summary` is what its row in the final table shows."""
        outputs = (self.model / "model.safetensors", self.selected)
        digests = [hashlib.sha256(output.read_bytes()).hexdigest()[:16] for output in outputs if output.is_file()]
        write_json_atomic(self._done, {"summary": summary, "output": " ".join(digests)})

    def summary(self) -> dict[str, Any]:
        return json.loads(self._done.read_text())["summary"]

    def _recorded(self) -> dict[str, Any]:
        """The settings of this stage, the shared ones and its own, and what its parents have put out."""
        outputs = {
            parent: json.loads(done.read_text())["output"] if done.is_file() else "not finished"
            for parent, done in self._parents.items()
        }
        return {**self._settings, "made from": outputs}


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        k: v for key, value in tree.items() for k, v in _flatten(value, f"{prefix}.{key}" if prefix else key).items()
    }

"""A stage's directory: whose config it is, whether it is finished, where its parts lie."""

import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from etagent_jax.data.store import write_json_atomic

RUNTIME = (
    "run", "stages", "mesh", "remat", "policy.backend", "policy.url", "reviser.url", "reviser.concurrency",
    "rollout.concurrency", "tools.python.workers",
)  # fmt: skip
"""Settings that say where and how a stage runs and not what it computes; they may differ when it is resumed."""


class StageDirectory:
    """`<run>/<stage>/`: config.json, metrics.jsonl, checkpoints/, trajectories/, model/, and DONE, written last."""

    def __init__(self, config: ConfigDict, stage: str):
        self.path = Path(config.run) / stage
        self.checkpoints = self.path / "checkpoints"
        self.trajectories = self.path / "trajectories"
        self.model = self.path / "model"
        self._done = self.path / "DONE"
        self._config = self.path / "config.json"
        self._recorded = recorded_settings(config, stage)

    @property
    def done(self) -> bool:
        return self._done.is_file()

    def check(self) -> None:
        """ValueError if the directory holds a run of another config, naming the settings that differ."""
        if not self._config.is_file():
            return
        before = _flatten(json.loads(self._config.read_text()))
        now = _flatten(json.loads(json.dumps(self._recorded)))
        differing = [
            f"{key} was {before.get(key, 'not set')}, now {now.get(key, 'not set')}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and not key.startswith(RUNTIME)
        ]
        if differing:
            raise ValueError(
                f"{self.path} belongs to another config: {'; '.join(differing)}. "
                "Give --config.run=… a new directory, or put the settings back"
            )

    def open(self) -> None:
        """Make the directory, with the config in it; safe to repeat."""
        self.trajectories.mkdir(parents=True, exist_ok=True)
        if not self._config.is_file():
            write_json_atomic(self._config, self._recorded)

    def finish(self, summary: dict[str, Any]) -> None:
        """Mark the stage as done; `summary` is what its row in the final table shows."""
        write_json_atomic(self._done, summary)

    def summary(self) -> dict[str, Any]:
        return json.loads(self._done.read_text())


def recorded_settings(config: ConfigDict, stage: str) -> dict[str, Any]:
    """The settings of a stage: the shared ones and its own."""
    others = {*config.stages, "evaluate"} - {stage}
    return {key: value for key, value in config.to_dict().items() if key not in others}


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        k: v for key, value in tree.items() for k, v in _flatten(value, f"{prefix}.{key}" if prefix else key).items()
    }

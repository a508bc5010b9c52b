"""Small runs of the real entry points, by one process or several, for the tests that need them."""

import importlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from etagent_jax.model import shards

ROOT = Path(__file__).parent.parent
STAGES = ("base", "flywheel", "sft", "phase1", "phase2")
SMALL = [
    "--config.base.optimizer.total_steps=300", "--config.base.demonstrations=3000",
    "--config.base.checkpoint_every=100", "--config.questions.countries=60", "--config.flywheel.questions=24",
    "--config.phase1.steps=1", "--config.phase1.selection.questions=48", "--config.phase1.questions_per_step=8",
    "--config.phase1.samples=4", "--config.phase2.steps=3", "--config.phase2.selection.questions=48",
    "--config.phase2.questions_per_step=8", "--config.phase2.samples=4",
]  # fmt: skip


def command(module: str, config: str, run: Path, *flags: str) -> list[str]:
    """The command of a small run up to the stage that `config` names."""
    known = importlib.import_module(f"configs.{config}").get_config()
    small = [flag for flag in SMALL if flag.split(".")[1] in known]  # a parent's config lacks its children's sections
    start = [sys.executable, "-m", f"etagent_jax.{module}", f"--config=configs/{config}.py", f"--config.run={run}"]
    return [*start, *small, *flags]


def start(command: Sequence[str]) -> subprocess.Popen:
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1"}, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate()
    assert process.returncode == 0, f"{out[-3000:]}\n{err[-3000:]}"
    return out


def start_together(commands: Sequence[Sequence[str]]) -> list[subprocess.Popen]:
    """One process for each command; they find one another."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        start([*each, f"--coordinator=127.0.0.1:{port}", f"--processes={len(commands)}", f"--process={i}"])
        for i, each in enumerate(commands)
    ]


def finish_together(processes: Sequence[subprocess.Popen]) -> list[str]:
    return [finish(process) for process in processes]


def copy_before(stage: str, finished: Path, to: Path) -> Path:
    """A run in which the stages before `stage` are finished."""
    shutil.copytree(finished, to, ignore=shutil.ignore_patterns(*STAGES[STAGES.index(stage) :], "report", "evaluate"))
    return to


def assert_same_weights(run: Path, other: Path, stage: str, tolerance: float) -> None:
    """The largest difference of any weight of the two stages' models is within `tolerance`."""
    files = (shards.files(r / stage / "model") for r in (run, other))  # several processes write several
    one, two = ({name: x for file in own for name, x in load_file(file).items()} for own in files)
    assert one.keys() == two.keys()
    for name, weight in one.items():
        np.testing.assert_allclose(weight, two[name], rtol=0, atol=tolerance, err_msg=name)

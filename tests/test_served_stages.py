"""Whole stages that generate on servers: the same learning as with the engine in the process."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from etagent_jax.data.store import TrajectoryLog
from tests import servers
from tests.runs import assert_same_weights, command, copy_before, finish, start

pytestmark = pytest.mark.slow
STEPS = 8
LONGER = (f"--config.phase2.steps={STEPS}", "--config.phase2.questions_per_step=16", "--config.phase2.samples=8")


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("SGLANG_API_KEY", servers.KEY)


@pytest.fixture(scope="module")
def sglang_server(finished_run, tmp_path_factory):
    """Started with the model of `base`, as a user's is."""
    with servers.sglang([finished_run / "base" / "model"], tmp_path_factory.mktemp("sglang")) as server:
        yield server


def before_phase2(finished: Path, to: Path) -> Path:
    return copy_before("phase2", finished, to)


def phase2_on(server: servers.Server, run: Path, *flags: str) -> list[str]:
    return command(
        "train", "phase2", run, "--config.policy.backend=sglang", f"--config.policy.url={server.url}", *flags
    )


def rows_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "phase2" / "metrics.jsonl").read_text().splitlines()]


def versions_by_step(run: Path) -> list[set[int]]:
    """The weight versions that the trajectories of each step were sampled by."""
    return [
        {v for t in TrajectoryLog(file).read() for s in t.segments for v in s.weight_versions}
        for file in sorted((run / "phase2" / "trajectories").glob("step-*.jsonl"))
    ]


def assert_on_policy(run: Path, steps: int) -> None:
    rows = rows_of(run)
    assert [row["step"] for row in rows] == list(range(steps))
    assert versions_by_step(run) == [{step} for step in range(steps)]
    updated = [row for row in rows if "loss" in row]
    assert updated
    assert max(row["sampler_gap_mean"] for row in updated) < 1e-4
    assert max(row["staleness_max"] for row in rows) == 0


def test_on_the_embedded_server_phase2_ends_with_the_weights_of_the_engine_in_the_process(finished_run, tmp_path):
    """One draws as the other does; that they do not batch alike costs last bits, and with them a token at times."""
    run = before_phase2(finished_run, tmp_path / "run")
    with servers.embedded([finished_run / "base" / "model"], tmp_path, "--context=256") as server:
        finish(start(phase2_on(server, run)))
    assert_on_policy(run, 3)
    assert not list((run / "phase2" / "weights").glob("0*"))  # no server will be asked to read them
    assert_same_weights(run, finished_run, "phase2", 5e-3)


def test_on_a_real_server_phase2_learns_what_it_learns_in_the_process(finished_run, sglang_server, tmp_path):
    """The same questions from the same weights, other draws: rewards and their growth agree within their noise."""
    run, other = (before_phase2(finished_run, tmp_path / name) for name in ("served", "embedded"))
    finish(start(phase2_on(sglang_server, run, *LONGER)))
    finish(start(command("train", "phase2", other, *LONGER)))
    assert_on_policy(run, STEPS)
    rewards = np.array([[row["reward"] for row in rows_of(r)] for r in (run, other)])
    differences = rewards[0] - rewards[1]
    assert abs(differences.mean()) < 4 * differences.std(ddof=1) / np.sqrt(STEPS) + 0.05
    halves = rewards.reshape(2, 2, STEPS // 2).mean(axis=2)
    assert (halves[:, 1] > halves[:, 0]).all()  # both have learned


def test_ahead_of_the_learner_and_sharing_its_memory(finished_run, sglang_server, tmp_path):
    """Rollouts that run one version ahead, then a run whose servers lend their memory."""
    ahead, lending = (before_phase2(finished_run, tmp_path / name) for name in ("ahead", "lending"))
    flags = ("stream.max_staleness=1", "branching.initial=2", "loss.max_sequence_weight=2")
    finish(start(phase2_on(sglang_server, ahead, *(f"--config.phase2.{flag}" for flag in flags))))
    rows = rows_of(ahead)
    assert max(row["staleness_max"] for row in rows) == 1
    assert all(versions <= {step - 1, step, step + 1} for step, versions in enumerate(versions_by_step(ahead)))
    finish(start(phase2_on(sglang_server, lending, "--config.policy.colocated=true")))
    assert_on_policy(lending, 3)


def test_killed_with_its_server_in_mid_rollout_a_run_goes_on(finished_run, sglang_server, tmp_path):
    """SIGKILL to the trainer, then in the second life to its only server, which comes back with the base model."""
    run = before_phase2(finished_run, tmp_path / "run")
    train = phase2_on(sglang_server, run)
    trajectories = run / "phase2" / "trajectories"

    def until_written(file: str, process) -> None:
        while not (trajectories / file).exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)

    first = start(train)
    until_written("step-00001.jsonl", first)
    first.kill()
    first.communicate()
    lines = {f.name: f.read_text().count("\n") for f in trajectories.glob("step-*.jsonl")}
    second = start(train)
    until_written("step-00002.jsonl", second)
    starts = sglang_server.starts()
    os.kill(sglang_server.process(), signal.SIGKILL)
    finish(second)
    assert sglang_server.starts() == starts + 1
    assert_on_policy(run, 3)
    for name, before in lines.items():
        ids = [t.id for t in TrajectoryLog(trajectories / name).read()]
        assert len(ids) == len(set(ids)) == 32 >= before


def test_a_server_with_another_model_is_refused_before_any_work(finished_run, models, tmp_path):
    run = before_phase2(finished_run, tmp_path / "run")
    with servers.embedded(models, tmp_path) as server:
        process = start(phase2_on(server, run))
        out, err = process.communicate()
    assert process.returncode == 1
    assert "phase2: starts" not in out
    assert "error: " in err
    assert str(models[0]) in err
    assert str(run / "base" / "model") in err

"""Several processes as one program: what they tell one another, and runs that come out as those of one process."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from etagent_jax import distributed
from etagent_jax.stages import sampling
from etagent_jax.trajectory import Question, Segment, Trajectory
from tests.runs import assert_same_weights, command, copy_before, finish, finish_together, start, start_together

ROWS = ("--config.sft.micro_batches=-1", "--config.phase1.micro_batches=-1", "--config.phase2.micro_batches=-1")
"""Four processes are four devices, over which the small runs' own micro-batches do not divide."""


def test_a_process_by_itself_has_nobody_to_wait_for():
    assert distributed.exchange({"a": (1, 2)}) == [{"a": (1, 2)}]
    assert distributed.from_first("x") == "x"
    assert distributed.my_share("abc") == "abc"
    assert distributed.gather_shares([object], pytest.fail, pytest.fail) == [object]
    distributed.barrier()


async def test_a_cancellation_of_what_must_be_finished_is_put_off_to_the_next_wait_for_all():
    done = []

    async def work() -> str:
        await asyncio.sleep(0.02)
        done.append("work")
        return "result"

    async def step() -> None:
        try:
            done.append(await distributed.undisturbed(work()))
            await distributed.together(asyncio.sleep(0, "not reached"))
            done.append("went on")
        except asyncio.CancelledError:
            await distributed.undisturbed(work())  # as in closing down
            done.append("saved")
            raise

    running = asyncio.create_task(step())
    await asyncio.sleep(0.01)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert done == ["work", "result", "work", "saved"]

    done.clear()
    whole = asyncio.create_task(distributed.together(distributed.undisturbed(work())))
    await asyncio.sleep(0.01)
    whole.cancel()
    with pytest.raises(asyncio.CancelledError):
        await whole
    assert done == ["work"]


async def test_an_error_of_what_must_be_finished_is_raised_at_once():
    async def work() -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        await distributed.undisturbed(work())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host:1", 2, None), "--coordinator, --processes and --process belong together"),
        (("host:1", 2, 2), r"--process must be in 0\.\.1"),
        (("host", 2, 0), "--coordinator must be HOST:PORT"),
    ],
)
def test_flags_that_do_not_fit_together_are_refused(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        distributed.initialise(tmp_path, *arguments, timeout=1)


PROGRAM = """
import asyncio, json, os, sys
from pathlib import Path
from etagent_jax import distributed

folder, coordinator, processes, process = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
distributed.initialise(folder, coordinator, processes, process, 60)

def refused(check, *arguments):
    try:
        check(*arguments)
    except ValueError as error:
        return str(error)

async def cancelled(here):
    async def work():
        if here:
            raise asyncio.CancelledError
        return process
    try:
        return await distributed.together(work())
    except asyncio.CancelledError:
        return "cancelled"

items = list(range(7))
out = {
    "exchange": distributed.exchange({"process": process, "text": "é" * process * 1000}),
    "from first": distributed.from_first(process),
    "shares": distributed.gather_shares([[i, process] for i in distributed.my_share(items)]),
    "different": refused(distributed.check_same, {"a": 1, "phase2.steps": 3 + (process == 1)}),
    "same": refused(distributed.check_same, {"a": 1}),
    "shared": refused(distributed.check_same_directory, folder),
    "not shared": refused(distributed.check_same_directory, folder / str(process)),
    "cancelled": [asyncio.run(cancelled(process == 2)), asyncio.run(cancelled(False))],
}
distributed.PIECE = 64
out["in pieces"] = distributed.exchange(os.urandom(100).hex() if process == 1 else "short")[::2]
print(json.dumps(out), flush=True)
with distributed.failing_at_once():
    if process == 1:
        sys.exit(3)
    distributed.barrier()
"""


@pytest.mark.slow
def test_processes_exchange_agree_and_end_together(tmp_path):
    with contextlib.ExitStack() as stack:
        port = 20_000 + os.getpid() % 20_000
        processes = [
            stack.enter_context(start([sys.executable, "-c", PROGRAM, str(tmp_path), f"127.0.0.1:{port}", "3", str(i)]))
            for i in range(3)
        ]
        outputs = [process.communicate() for process in processes]
    told = [json.loads(out.splitlines()[-1]) for out, _ in outputs]
    for process, each in enumerate(told):
        assert each["exchange"] == [{"process": i, "text": "é" * i * 1000} for i in range(3)]
        assert each["from first"] == 0
        assert each["shares"] == [[i, i % 3] for i in range(7)]
        assert "phase2.steps is 3 on process 0 and 2, 4 on process 1" in each["different"]
        assert each["same"] is each["shared"] is None
        assert "process 1, 2 does not see what process 0 writes there" in each["not shared"]
        assert each["cancelled"] == ["cancelled", process]
        assert each["in pieces"] == ["short", "short"]
    statuses = [process.returncode for process in processes]
    assert statuses[1] == 3
    assert 0 not in statuses


def test_every_process_writes_a_log_of_its_own_and_all_are_read(tmp_path, monkeypatch):
    def trajectory(name: str) -> Trajectory:
        question = Question(name, "q", ("a",), "qa", "c")
        return Trajectory(name, question, (1,), (Segment("program", (2,), "x"),), "stop", 0, 1.0, ())

    file = tmp_path / "step-00001.jsonl"
    for process in (0, 2):
        monkeypatch.setattr(sampling.jax, "process_index", lambda process=process: process)
        with sampling.own_log(file) as log:
            log.append(trajectory(f"t{process}"))
    with sampling.own_log(tmp_path / "step-00002.jsonl") as log:
        log.append(trajectory("of another step"))
    assert {path.name for path in tmp_path.iterdir()} == {
        "step-00001.jsonl", "step-00001.2.jsonl", "step-00002.2.jsonl",
    }  # fmt: skip
    assert [t.id for t in sampling.read_all(file)] == ["t0", "t2"]


@pytest.mark.slow
def test_hosts_with_different_configs_are_refused_with_the_field(tmp_path):
    one, other = (command("train", "phase2", tmp_path, f"--config.phase2.steps={steps}") for steps in (3, 4))
    for process in start_together([one, other]):
        _, error = process.communicate()
        assert process.returncode != 0
        if process.returncode == 1:  # the slower one may be ended by the other's end before it has spoken
            assert "config.phase2.steps is 3 on process 0, 4 on process 1" in error
    assert not (tmp_path / "base").exists()


@pytest.mark.slow
@pytest.mark.parametrize("there", [0, 1])
def test_a_host_that_never_arrives_is_named(there, tmp_path):
    flags = ("--coordinator=127.0.0.1:9", "--processes=2", f"--process={there}", "--initialization_timeout=2")
    if there == 0:
        flags = (f"--coordinator=127.0.0.1:{20_000 + os.getpid() % 20_000}", *flags[1:])
    process = start(command("train", "phase2", tmp_path, *flags))
    _, error = process.communicate()
    assert process.returncode == 1
    assert f"of 2 processes {1 - there} did not arrive within 2 s" in error


def steps_logged(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "phase2" / "metrics.jsonl").read_text().splitlines()]


def trajectory_ids(run: Path) -> list[str]:
    files = sorted((run / "phase2" / "trajectories").iterdir())
    return [json.loads(line)["id"] for file in files for line in file.read_text().splitlines()]


def wait_for_checkpoint(step: int, run: Path, process: subprocess.Popen) -> None:
    while not (run / "phase2" / "checkpoints" / str(step) / "manifest.json").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)


@pytest.mark.slow
def test_two_processes_stopped_and_killed_end_with_the_weights_of_one(finished_run, tmp_path):
    run = copy_before("flywheel", finished_run, tmp_path / "two")
    train = command("train", "phase2", run)
    processes = start_together([train] * 2)
    wait_for_checkpoint(1, run, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    assert "the same command goes on from here" in finish_together(processes)[0]
    assert not (run / "phase2" / "DONE").exists()

    supervise = [sys.executable, "-m", "etagent_jax.supervise", "--processes=2", f"--run={run}", "--pause=0.5"]
    supervisor = start([*supervise, "--", *train])
    wait_for_checkpoint(2, run, supervisor)
    children = subprocess.run(["pgrep", "-P", str(supervisor.pid)], capture_output=True, text=True, check=True).stdout
    os.kill(int(children.split()[-1]), signal.SIGKILL)
    finish(supervisor)
    once, shared = (json.loads((r / "flywheel" / "pools.json").read_text()) for r in (finished_run, run))
    assert once == shared
    assert_same_weights(run, finished_run, "sft", 1e-5)
    assert_same_weights(run, finished_run, "phase2", 1e-5)
    assert steps_logged(run) == [0, 1, 2]
    assert sorted(trajectory_ids(run)) == sorted(trajectory_ids(finished_run))


@pytest.mark.slow
def test_four_processes_end_with_the_weights_of_one(finished_run, tmp_path):
    run = copy_before("sft", finished_run, tmp_path / "sft")
    finish_together(start_together([command("train", "sft", run, *ROWS[:1])] * 4))
    assert_same_weights(run, finished_run, "sft", 1e-5)

    run = copy_before("phase2", finished_run, tmp_path / "phase2")
    finish_together(start_together([command("train", "phase2", run, *ROWS)] * 4))
    assert_same_weights(run, finished_run, "phase2", 1e-5)
    assert steps_logged(run) == [0, 1, 2]

    for count in (1, 2):  # the last step again, from the checkpoint before it
        resumed = tmp_path / f"on {count}"
        shutil.copytree(run, resumed)
        (resumed / "phase2" / "DONE").unlink()
        shutil.rmtree(resumed / "phase2" / "checkpoints" / "3")
        finish_together(start_together([command("train", "phase2", resumed, *ROWS)] * count))
        assert_same_weights(resumed, finished_run, "phase2", 1e-5)
        assert steps_logged(resumed) == [0, 1, 2]
        assert sorted(trajectory_ids(resumed)) == sorted(trajectory_ids(run))

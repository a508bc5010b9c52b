"""The supervisor, over real processes that die, hang, fail, progress and stop."""

import os
import pty
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from etagent_jax.supervise import Progress

ROOT = Path(__file__).parent.parent
BEGINNING = """
    import os, signal, sys, time
    from pathlib import Path
    from etagent_jax import heartbeat
    heartbeat.start()
    folder = Path(sys.argv[1])
    index = next((int(flag.split("=")[1]) for flag in sys.argv if flag.startswith("--process=")), 0)
    attempt = len(list(folder.glob(f"started-{index}-*")))
    (folder / f"started-{index}-{attempt}.new").write_text(str(os.getpid()))
    (folder / f"started-{index}-{attempt}.new").rename(folder / f"started-{index}-{attempt}")
"""
SAVE_AT_SIGTERM = """
    def save(*_):
        (folder / f"saved-{index}").touch()
        sys.exit(0)
    signal.signal(signal.SIGTERM, save)
    (folder / f"ready-{index}").touch()
"""
WAIT = "time.sleep(600)"


def supervise(folder: Path, code: str, *flags: str, **how) -> subprocess.Popen:
    """The supervisor over python processes that run `code`, with `folder`, `index` and `attempt` (from 0) set."""
    script = folder / "script.py"
    script.write_text(textwrap.dedent(BEGINNING) + textwrap.dedent(code))
    command = [sys.executable, "-m", "etagent_jax.supervise", "--pause=0.1", "--grace=5", *flags, "--"]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": os.environ, "text": True, **how}
    how["env"] = {**how["env"], "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([*command, sys.executable, str(script), str(folder)], **how)


def first_pid(supervisor: subprocess.Popen, folder: Path, index: int = 0) -> int:
    """The process of the first attempt, once it runs the code."""
    path = folder / f"started-{index}-0"
    wait_for(lambda: path.exists() or supervisor.poll() is not None)
    return int(path.read_text())


def wait_for(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.05)


def attempts(folder: Path, index: int) -> int:
    return len(list(folder.glob(f"started-{index}-*")))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_one_of_three_killed_and_all_start_again_and_finish(tmp_path):
    process = supervise(tmp_path, f"if attempt == 0: {WAIT}\nprint('finished')", "--processes=3")
    first = [first_pid(process, tmp_path, index) for index in range(3)]
    os.kill(first[1], signal.SIGKILL)
    out, err = process.communicate()
    assert process.returncode == 0
    assert sorted(out.splitlines()) == ["[0] finished", "[1] finished", "[2] finished"]
    assert "process 1 was killed by signal 9" in err
    assert "process 0" not in err
    assert "process 2" not in err  # they were ended, they did not fail
    assert [attempts(tmp_path, index) for index in range(3)] == [2, 2, 2]
    assert not any(is_running(pid) for pid in first)


@pytest.mark.slow
def test_a_stopped_process_is_found_and_a_busy_one_is_left_alone(tmp_path):
    busy_for_longer_than_stale = """
        until = time.monotonic() + (600 if attempt == 0 else 10)
        while time.monotonic() < until:
            sum(range(100_000))
    """
    process = supervise(tmp_path, busy_for_longer_than_stale, "--processes=2", "--stale=7")
    stopped, other = first_pid(process, tmp_path, 1), first_pid(process, tmp_path)
    os.kill(stopped, signal.SIGSTOP)
    _, err = process.communicate()
    assert process.returncode == 0
    assert "process 1 has given no sign of life for" in err
    assert attempts(tmp_path, 0) == attempts(tmp_path, 1) == 2
    assert not is_running(stopped)
    assert not is_running(other)


def test_three_failures_without_progress_end_it_with_the_reason(tmp_path):
    code = """
        for i in range(30):
            print(f"line {i}", file=sys.stderr)
        sys.exit(7 if index == 1 else 0)
    """
    process = supervise(tmp_path, code, "--processes=2", f"--run={tmp_path}")
    _, err = process.communicate()
    assert process.returncode == 1
    assert attempts(tmp_path, 1) == 3
    given_up = err[err.index("given up") :]
    assert given_up.startswith("given up, 3 failures without progress: process 1 ended with exit status 7")
    assert [line.strip() for line in given_up.splitlines()[1:]] == [f"line {i}" for i in range(10, 30)]


def test_failures_with_progress_between_them_go_on(tmp_path):
    code = """
        checkpoint = folder / "sft" / "checkpoints" / str(attempt)
        checkpoint.mkdir(parents=True)
        (checkpoint / "manifest.json").write_text("{}")
        os._exit(1 if attempt < 5 else 0)
    """
    process = supervise(tmp_path, code, f"--run={tmp_path}")
    _, err = process.communicate()
    assert process.returncode == 0
    assert attempts(tmp_path, 0) == 6
    assert "given up" not in err


def test_failures_in_a_row_are_counted_from_the_last_progress(tmp_path):
    code = """
        if attempt == 2:
            (folder / "sft").mkdir()
            (folder / "sft" / "DONE").touch()
        sys.exit(1)
    """
    process = supervise(tmp_path, code, f"--run={tmp_path}")
    process.communicate()
    assert process.returncode == 1
    assert attempts(tmp_path, 0) == 6  # two, the one with progress, three


def test_progress_is_a_file_that_is_new_or_longer_than_ever(tmp_path):
    log = tmp_path / "phase1" / "trajectories" / "step-00000.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text("one\n")
    progress = Progress(tmp_path)
    assert not progress.made()
    log.write_text("one\ntw")
    assert progress.made()
    log.write_text("one\n")  # the torn line is cut off
    assert not progress.made()
    log.write_text("one\ntx")
    assert not progress.made()
    log.write_text("one\ntwo\n")
    assert progress.made()
    (tmp_path / "phase1" / "metrics.jsonl").write_text("{}\n")
    assert not progress.made()
    assert not Progress(None).made()


def test_wrong_arguments_are_not_tried_again(tmp_path):
    process = supervise(tmp_path, "print('error: no such preset', file=sys.stderr); sys.exit(2)")
    _, err = process.communicate()
    assert process.returncode == 2
    assert attempts(tmp_path, 0) == 1
    assert "its arguments are wrong" in err
    assert err.count("error: no such preset") == 2  # said, and in the reason


def test_of_processes_that_end_together_the_abort_is_not_the_reason(tmp_path):
    code = """
        dying = folder / f"dying-{attempt}"
        while index == 0 and not dying.exists():
            pass
        dying.touch()
        os.kill(os.getpid(), signal.SIGABRT if index == 0 else signal.SIGSEGV)
    """
    process = supervise(tmp_path, code, "--processes=2")
    _, err = process.communicate()
    assert process.returncode == 1
    assert "failures without progress: process 1 was killed by signal 11" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_nothing_starts_again(tmp_path, number):
    process = supervise(tmp_path, SAVE_AT_SIGTERM + "\n    " + WAIT, "--processes=2")
    children = [first_pid(process, tmp_path, index) for index in range(2)]
    wait_for(lambda: all((tmp_path / f"ready-{index}").exists() for index in range(2)))
    process.send_signal(number)
    process.communicate()
    assert process.returncode == 128 + number
    assert all((tmp_path / f"saved-{index}").exists() for index in range(2))
    assert [attempts(tmp_path, index) for index in range(2)] == [1, 1]
    assert not any(map(is_running, children))


def test_a_second_signal_kills_what_does_not_stop(tmp_path):
    process = supervise(
        tmp_path, f"signal.signal(signal.SIGTERM, lambda *_: (folder / 'deaf').touch())\n{WAIT}\n{WAIT}"
    )
    child = first_pid(process, tmp_path)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    wait_for((tmp_path / "deaf").exists)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 1
    assert "killed at the second signal" in err
    assert not is_running(child)


def test_what_a_process_has_left_behind_is_ended_too(tmp_path):
    code = f"""
        import subprocess
        left = subprocess.Popen([sys.executable, "-c", "import time; {WAIT}"])
        (folder / f"left-{{attempt}}").write_text(str(left.pid))
        os._exit(0 if attempt else 1)
    """
    process = supervise(tmp_path, code, stdout=subprocess.DEVNULL)
    process.communicate()
    assert process.returncode == 0
    assert not any(is_running(int((tmp_path / f"left-{attempt}").read_text())) for attempt in range(2))


def test_without_their_supervisor_processes_save_and_end(tmp_path):
    process = supervise(tmp_path, SAVE_AT_SIGTERM + "\n    " + WAIT)
    child = first_pid(process, tmp_path)
    wait_for((tmp_path / "ready-0").exists)
    process.kill()
    process.communicate()
    wait_for(lambda: not is_running(child))
    assert (tmp_path / "saved-0").exists()


def test_processes_are_told_how_to_find_each_other_and_share_the_devices(tmp_path):
    code = "print(*sys.argv[2:], os.environ['CUDA_VISIBLE_DEVICES'])"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    out, _ = supervise(tmp_path, code, "--processes=2", env=environment).communicate()
    first, second = (line.split() for line in sorted(out.splitlines()))
    assert first[1].startswith("--coordinator=127.0.0.1:")
    assert first[1] == second[1]
    assert first[2:] == ["--processes=2", "--process=0", "0,1"]
    assert second[2:] == ["--processes=2", "--process=1", "2,3"]


def test_one_process_gets_its_command_and_its_output_as_they_are(tmp_path):
    code = "sys.stdout.write('half a line'); sys.stdout.flush(); sys.stderr.write('words'); sys.exit(len(sys.argv) - 2)"
    out, err = supervise(tmp_path, code).communicate()
    assert (out, err) == ("half a line", "words")


def test_the_first_process_keeps_its_progress_bar_on_a_terminal(tmp_path):
    code = """
        for step in range(3):
            print(f"\\r{step}/3", end="", file=sys.stderr, flush=True)
            time.sleep(0.1)
        print(sys.stderr.isatty(), os.get_terminal_size(2).columns if index == 0 else "", file=sys.stderr)
    """
    ours, theirs = pty.openpty()
    subprocess.run(["stty", "cols", "123"], stdin=theirs, check=True)
    process = supervise(tmp_path, code, "--processes=2", stderr=theirs)
    process.communicate()
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    assert "\r0/3\r1/3\r2/3" in shown  # as it was written, not line by line
    assert "True 123" in shown
    assert "[1] \r0/3\r1/3\r2/3False" in shown
    os.close(ours)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--processes=0", "--", "true"], "--processes must be at least 1, got 0"),
        (["--stale=1", "--", "true"], "--stale must be at least 6, two heartbeats, got 1"),
        (["--", "no-such-command-anywhere"], "no-such-command-anywhere: no such command"),
        (["--processes=2", "--", "true"], "the 3 devices in CUDA_VISIBLE_DEVICES cannot be dealt out evenly"),
        ([], "required: COMMAND"),
    ],
)
def test_wrong_flags_are_a_sentence_and_status_2(arguments, sentence):
    done = subprocess.run(
        [sys.executable, "-m", "etagent_jax.supervise", *arguments], capture_output=True, text=True, check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "0,1,2"}, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 2
    assert sentence in done.stderr


def test_the_supervisor_imports_no_jax():
    code = "import sys, etagent_jax.supervise; assert 'jax' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

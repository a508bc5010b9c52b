"""Supervise a command: start it, watch it, and start it again from its last checkpoint when it dies or hangs.

    python -m etagent_jax.supervise [--processes=N] [--run=DIR] -- python -m etagent_jax.train --config=…

One process on this machine, or N that find each other: then `--coordinator=127.0.0.1:PORT --processes=N
--process=I` is appended to each command, and the devices of CUDA_VISIBLE_DEVICES, if that is set, are dealt out.
On a cluster, the cluster's launcher starts one supervisor wherever it would start the command.

When a process ends with a non-zero status, is killed, or gives no sign of life (etagent_jax/heartbeat.py), all are
ended and started again.  Three failures in a row without progress in the run directory end the supervisor, with
the reason; so does exit status 2, by which a command says that its arguments are wrong.  SIGTERM or Ctrl-C is
passed on, so that the run saves itself; a second one kills.  Exit status: 0 if all is done, 143 or 130 if it was
stopped by SIGTERM or Ctrl-C, 2 for wrong arguments, else 1.
"""

import argparse
import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections import deque
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from etagent_jax import heartbeat

MOST_FAILURES = 3
WRONG_ARGUMENTS = 2
POLL_SECONDS = 0.2
TAIL_LINES = 20
PROGRESS = ("*/DONE", "*/checkpoints/*/manifest.json", "*/trajectories/*")
"""What a stage leaves so that it need not do it again."""

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1
_CLEAR_LINE = b"\r\x1b[K"
_LONGEST_LINE = 1 << 16


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m etagent_jax.supervise", usage="%(prog)s [flags] -- COMMAND …", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--processes", type=int, default=1, help="how many to start here (default: %(default)s)")
    parser.add_argument("--run", type=Path, help="run directory, in which progress shows; without it none is seen")
    for name, seconds, meaning in (
        ("stale", 45.0, "without a sign of life, after one, that mean death"),
        ("grace", 10.0, "from SIGTERM to SIGKILL for the others when one has failed"),
        ("pause", 5.0, "before all are started again"),
    ):
        parser.add_argument(f"--{name}", type=float, default=seconds, help=f"seconds {meaning} (default: %(default)s)")
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="what to run, after --")
    options = parser.parse_args(arguments)
    if options.processes < 1:
        parser.error(f"--processes must be at least 1, got {options.processes}")
    if options.stale < 2 * heartbeat.SECONDS:
        parser.error(f"--stale must be at least {2 * heartbeat.SECONDS:g}, two heartbeats, got {options.stale:g}")
    if shutil.which(options.command[0]) is None:
        parser.error(f"{options.command[0]}: no such command; give one that can be run, after --")
    if len(_cuda_devices()) % options.processes:
        parser.error(
            f"the {len(_cuda_devices())} devices in CUDA_VISIBLE_DEVICES cannot be dealt out evenly to "
            f"{options.processes} processes; change it or --processes"
        )
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: signals.append(number))
    sys.exit(supervise(options, signals))


def supervise(options: argparse.Namespace, signals: list[int]) -> int:
    """Start all, again and again, until that is done, cannot be done, or a signal arrives in `signals`.

    The exit status.
    """
    progress = Progress(options.run)
    failures = 0
    while True:
        with tempfile.TemporaryDirectory(prefix="etagent-heartbeats-") as folder:
            troubles = attempt(start(options, Path(folder)), options, signals)
        for process, trouble in troubles.items():
            say(f"process {process.index} {trouble}")
        if signals:
            return 1 if troubles else 128 + signals[0]
        if not troubles:
            return 0
        failures = 0 if progress.made() else failures + 1
        cause = min(troubles, key=lambda process: (not process.wrong_arguments, process.aborted))
        if cause.wrong_arguments or failures == MOST_FAILURES:
            why = "its arguments are wrong" if cause.wrong_arguments else f"{failures} failures without progress"
            tail = "".join(f"\n  {line}" for line in cause.tail)
            say(f"given up, {why}: process {cause.index} {troubles[cause]}; it said last on stderr:{tail}")
            return WRONG_ARGUMENTS if cause.wrong_arguments else 1
        say(f"starting again in {options.pause:g} s; failures since the last progress: {failures}")
        until = time.monotonic() + options.pause
        while time.monotonic() < until:
            if signals:
                return 128 + signals[0]
            time.sleep(POLL_SECONDS)


def say(text: str) -> None:
    print(f"supervise: {text}", file=sys.stderr, flush=True)


class Progress:
    """Whether a run directory, if there is one, holds more than it did."""

    def __init__(self, run: Path | None):
        self._run = run
        self._sizes: dict[Path, int] = {}
        self.made()

    def made(self) -> bool:
        """Whether there is a new file, or more of one than ever before, since this was last asked."""
        before = dict(self._sizes)
        for path in (path for pattern in PROGRESS if self._run for path in self._run.glob(pattern)):
            with contextlib.suppress(FileNotFoundError):  # an old checkpoint is just being removed
                self._sizes[path] = max(path.stat().st_size, self._sizes.get(path, 0))
        return self._sizes != before


class Process:
    """One copy of the command, in a session of its own."""

    def __init__(self, index: int, command: Sequence[str], environment: dict[str, str], heartbeats: Path, bar: bool):
        """bar: its stderr is a terminal, as ours is, so that it shows its progress bar."""
        self.index = index
        self.bar = bar
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        """What it said last on stderr."""
        self._heartbeats = heartbeats
        self._stamps: dict[Path, tuple[int, float]] = {}
        heartbeats.mkdir()
        master, stderr = _open_terminal() if bar else (None, subprocess.PIPE)
        self._process = subprocess.Popen(
            command, bufsize=0, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr,
            env={**environment, heartbeat.VARIABLE: str(heartbeats)},
            start_new_session=True, preexec_fn=_end_with_parent,
        )  # fmt: skip
        if master is not None:
            os.close(stderr)
        self.stdout = self._process.stdout
        self.stderr = self._process.stderr if master is None else os.fdopen(master, "rb", buffering=0)

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def wrong_arguments(self) -> bool:
        return self._process.returncode == WRONG_ARGUMENTS

    @property
    def aborted(self) -> bool:
        """Whether it ended as JAX ends a process when another one is gone."""
        return self._process.returncode == -signal.SIGABRT

    def trouble(self, stale: float, stopping: bool) -> str:
        """What is wrong with it, to be put behind its name; empty if nothing is."""
        status = self._process.poll()
        if status is None:
            silence = self._silence()
            return f"has given no sign of life for {silence:.0f} s" if silence > stale else ""
        if status == 0 or (stopping and status == -signal.SIGTERM):
            return ""
        return f"was killed by signal {-status} ({signal.strsignal(-status)})" if status < 0 else (
            f"ended with exit status {status}"
        )  # fmt: skip

    def _silence(self) -> float:
        """Seconds since the last sign of life; 0 if there was none, as it may still be starting."""
        now = time.monotonic()
        before, self._stamps = self._stamps, {}
        for path in self._heartbeats.iterdir():
            with contextlib.suppress(FileNotFoundError):  # it is ending
                stamp = path.stat().st_mtime_ns
                seen = before.get(path)
                self._stamps[path] = seen if seen and seen[0] == stamp else (stamp, now)
        return max((now - since for _, since in self._stamps.values()), default=0.0)

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        """End it and whatever it has left behind."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def start(options: argparse.Namespace, folder: Path) -> list[Process]:
    """All copies of the command; each has its own heartbeats in `folder`."""
    count = options.processes
    devices = _cuda_devices()
    share = len(devices) // count
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{listener.getsockname()[1]}"
    processes = []
    for index in range(count):
        command, environment = list(options.command), dict(os.environ)
        if count > 1:
            command += [f"--coordinator={coordinator}", f"--processes={count}", f"--process={index}"]
        if devices:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices[index * share : (index + 1) * share])
        bar = index == 0 and sys.stderr.isatty()
        processes.append(Process(index, command, environment, folder / str(index), bar))
    return processes


def attempt(processes: list[Process], options: argparse.Namespace, signals: list[int]) -> dict[Process, str]:
    """Watch until all have ended; when one fails, end the others.  What was wrong with which at that moment."""
    speakers = []
    for process in processes:
        prefix = f"[{process.index}] ".encode() if len(processes) > 1 else b""
        for arguments in (
            (process.stdout, sys.stdout.buffer, prefix, None),
            (process.stderr, sys.stderr.buffer, b"" if process.bar else prefix, process.tail),
        ):
            speakers.append(threading.Thread(target=_pass_on, args=arguments, daemon=True))
            speakers[-1].start()
    try:
        return _watch(processes, options, signals)
    finally:
        for process in processes:
            process.kill()
        for speaker in speakers:
            speaker.join(timeout=1)  # whatever has left the session may still hold the other end


def _watch(processes: list[Process], options: argparse.Namespace, signals: list[int]) -> dict[Process, str]:
    stopping = False
    while True:
        if signals and not stopping:
            stopping = True
            say("stopping; a second signal kills")
            for process in processes:
                process.terminate()
        running = [process for process in processes if process.running]
        if len(signals) > 1:
            return dict.fromkeys(running, "was killed at the second signal")
        troubles = _troubles(processes, options.stale, stopping)
        if troubles:
            # In a job whose processes wait for each other, one that hangs may bring down others first.
            troubles = _troubles(processes, min(options.stale, 3 * heartbeat.SECONDS), stopping) | troubles
            break
        if not running:
            return {}
        time.sleep(POLL_SECONDS)
    for process in processes:
        process.terminate()
    until = time.monotonic() + options.grace
    while any(process.running for process in processes) and time.monotonic() < until:
        time.sleep(POLL_SECONDS)
    return troubles


def _troubles(processes: list[Process], stale: float, stopping: bool) -> dict[Process, str]:
    return {process: trouble for process in processes if (trouble := process.trouble(stale, stopping))}


def _pass_on(source: FileIO, sink: BinaryIO, prefix: bytes, tail: deque[str] | None) -> None:
    """Copy to `sink` what comes from `source`: whole lines behind `prefix`, or all as it comes if that is empty."""
    start = (_CLEAR_LINE if sink.isatty() else b"") + prefix
    rest = b""
    while piece := _read(source):
        *lines, rest = (rest + piece).split(b"\n")
        rest = rest[-_LONGEST_LINE:]  # a progress bar ends no line
        if tail is not None:
            tail.extend(_visible(line) for line in lines)
        _write(sink, b"".join(start + line + b"\n" for line in lines) if prefix else piece)
    if rest and tail is not None:
        tail.append(_visible(rest))
    if rest and prefix:
        _write(sink, start + rest + b"\n")
    source.close()


def _read(source: FileIO) -> bytes:
    try:
        return source.read(1 << 16)
    except OSError:  # how a terminal says that nobody writes to it any more
        return b""


def _write(sink: BinaryIO, data: bytes) -> None:
    sink.write(data)
    sink.flush()


def _visible(line: bytes) -> str:
    """What a terminal would show of it."""
    return line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace")


def _open_terminal() -> tuple[int, int]:
    """Both ends of a new terminal as wide as the one on our stderr."""
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, termios.tcgetwinsize(sys.stderr.fileno()))
    return ours, theirs


def _end_with_parent() -> None:
    """Have the system send SIGTERM to this process when its supervisor is gone, even by SIGKILL."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _cuda_devices() -> list[str]:
    return [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]


if __name__ == "__main__":
    main()

"""The process behind `PythonTool`: forks a bounded child for each call and removes all that it started.

    python -s -P python_worker.py TIMEOUT_SECONDS MEMORY_MIB MAX_OUTPUT_CHARS FOLDER

reads one call a line on stdin, a JSON string of code, and answers each with one line on stdout,
a JSON list [status, output].  Calls run in temporary folders inside FOLDER.  It ends when stdin is
closed, at once and with whatever was running, and leaves no folder.
Linux only.  It imports nothing but the standard library, so that it starts and forks fast.
"""

import ast
import ctypes
import json
import math
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import types
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

CUT_NOTE = "\n(output cut)"
MAX_ERROR_CHARS = 300
MAX_FILE_BYTES = 16 << 20
MAX_OPEN_FILES = 64

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
LIBC = ctypes.CDLL(None)


@dataclass(frozen=True)
class Bounds:
    """seconds: of wall time for a call.  memory: bytes of address space.  chars: of output."""

    seconds: float
    memory: int
    chars: int


def execute(code: str) -> None:
    """Run `code` as a script and print the value of a last bare expression, unless it is None."""
    sys.modules["__main__"] = module = types.ModuleType("__main__")
    tree = ast.parse(code)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<python>", "exec"), module.__dict__)
    if isinstance(last, ast.Expr):
        value = eval(compile(ast.Expression(last.value), "<python>", "eval"), module.__dict__)
        if value is not None:
            print(value)


def describe(error: BaseException) -> str:
    """The error on one bounded line: `NameError: name 'y' is not defined`."""
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    line = " ".join(f"{type(error).__name__}: {text[: 4 * MAX_ERROR_CHARS]}".split())
    return line.removesuffix(":")[:MAX_ERROR_CHARS]


def confine(bounds: Bounds, folder: str, output: int, report: int) -> None:
    """Give this process its limits, its folder, and no file descriptors but its output and its report."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.setsid()
    os.chdir(folder)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor, replacement in ((0, nothing), (1, output), (2, nothing)):
        os.dup2(replacement, descriptor)
    os.closerange(3, report)
    os.closerange(report + 1, os.sysconf("SC_OPEN_MAX"))
    cpu = math.ceil(bounds.seconds) + 1
    for limit, value in (
        (resource.RLIMIT_AS, bounds.memory),
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_FSIZE, MAX_FILE_BYTES),
        (resource.RLIMIT_NOFILE, MAX_OPEN_FILES),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))


def child(code: str, bounds: Bounds, folder: str, output: int, report: int) -> NoReturn:
    """Run `code` in this process and end it; an error of the code goes to `report`."""
    status = 1
    try:
        confine(bounds, folder, output, report)
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stdout = stdout = open(1, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
        try:
            execute(code)
            status = 0
        except MemoryError:
            os.write(report, b"MemoryError")
        except SystemExit as end:
            if end.code in (None, 0):
                status = 0
            else:
                os.write(report, describe(end).encode(errors="backslashreplace"))
        except BaseException as error:  # whatever the model's code raises is its result
            os.write(report, describe(error).encode(errors="backslashreplace"))
        stdout.flush()
    finally:
        os._exit(status)


def children() -> list[int]:
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(pid) for pid in file.read().split()]


def remove_processes(pid: int) -> int:
    """Kill process `pid`, its session, and whatever else descends from it; return the wait status of `pid`.

    This process is their reaper: descendants that left the session become its children when their
    parents die, so nothing is left once there are no children.
    """
    for kill in (os.kill, os.killpg):
        with suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    while alive := children():
        for descendant in alive:
            os.kill(descendant, signal.SIGKILL)
        for descendant in alive:
            os.waitpid(descendant, 0)
    return status


def watch(pid: int, output: int, bounds: Bounds) -> tuple[bytes, int | None]:
    """What process `pid` wrote, and its wait status or None if its time ran out.

    At most 4 × (chars + 1) bytes are kept, enough to know whether the output was longer than `chars`.
    """
    kept, limit = bytearray(), 4 * (bounds.chars + 1)
    deadline = time.monotonic() + bounds.seconds
    end = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(output, select.POLLIN)
    poll.register(end, select.POLLIN)
    poll.register(0, 0)  # only that it was closed
    ended = False
    while not ended and (left := deadline - time.monotonic()) > 0:
        events = dict(poll.poll(math.ceil(left * 1000)))
        if 0 in events:
            remove_processes(pid)
            sys.exit()
        ended = end in events
        if output in events:
            chunk = os.read(output, 1 << 16)
            kept += chunk[: limit - len(kept)]
            if not chunk:
                poll.unregister(output)
    os.close(end)
    status = remove_processes(pid)
    while chunk := os.read(output, 1 << 16):
        kept += chunk[: limit - len(kept)]
    return bytes(kept), status if ended else None


def answer(code: str, bounds: Bounds, folder: str) -> tuple[str, str]:
    """Run one call; return its status and what the model is to see."""
    (output, write_output), (report, write_report) = os.pipe(), os.pipe()
    call_folder = tempfile.mkdtemp(dir=folder)
    pid = os.fork()
    if pid == 0:
        child(code, bounds, call_folder, write_output, write_report)
    os.close(write_output)
    os.close(write_report)
    kept, wait_status = watch(pid, output, bounds)
    error = os.read(report, 4 * MAX_ERROR_CHARS).decode(errors="replace")
    os.close(output)
    os.close(report)
    shutil.rmtree(call_folder, ignore_errors=True)

    text = kept.decode(errors="replace").rstrip()
    if len(text) > bounds.chars:
        text = text[: max(bounds.chars - len(CUT_NOTE), 0)] + CUT_NOTE
    if wait_status is None or (os.WIFSIGNALED(wait_status) and os.WTERMSIG(wait_status) == signal.SIGXCPU):
        status, error = "timeout", f"TimeoutError: not done after {bounds.seconds:g} s"
    elif wait_status:
        status = "error"
        if not error:
            code_or_signal = os.waitstatus_to_exitcode(wait_status)
            what = f"exit status {code_or_signal}" if code_or_signal > 0 else signal.Signals(-code_or_signal).name
            error = f"the code ended without a result ({what})"
    else:
        status, error = "ok" if text else "empty", ""
    return status, "\n".join(filter(None, (text, error)))


def main() -> None:
    seconds, memory_mib, chars, folder = sys.argv[1:]
    bounds = Bounds(float(seconds), int(memory_mib) << 20, int(chars))
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with tempfile.TemporaryDirectory(prefix="etagent_python_", dir=folder, ignore_cleanup_errors=True) as own_folder:
        for line in sys.stdin.buffer:
            reply = json.dumps(answer(json.loads(line), bounds, own_folder)).encode() + b"\n"
            while reply:
                reply = reply[os.write(1, reply) :]


if __name__ == "__main__":
    main()

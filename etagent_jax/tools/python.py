"""The python tool: runs a block of code in a bounded process of its own and returns what it printed."""

import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path

from etagent_jax.trajectory import ToolResult

WORKER = Path(__file__).with_name("python_worker.py")
EMPTY_OUTPUT = "no output"
UNAVAILABLE = "the interpreter is not available"
GRACE_SECONDS = 10.0  # beyond its own time limit, before a worker that does not answer is given up
# Nothing of ours is passed on; the two settings make output repeatable and keep numpy to one thread.
ENVIRONMENT = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}


class PythonTool:
    """Runs python code; each call starts from nothing and leaves nothing behind.

    timeout_seconds: wall time of a call.  memory_mib: address space of a call's process.
    workers: calls that run at once; others wait.  max_output_chars: longer output is cut, with a note.

    The text of a result is what the code printed, the value of a last bare expression included,
    then, if it raised, its error on one line (what it wrote to stderr is dropped).  Status: `ok`;
    `empty` if it printed nothing; `error` if it raised or was killed; `timeout`; `unavailable` if
    the worker died twice.  One event loop at a time; after `close` it can be used again.

    A call runs in a forked child of a warm worker process: bounded in address space, CPU time,
    size of a file, open files and (unless run as root) processes, in an empty temporary folder,
    without environment or input, killed with all its descendants when its time is over.  It runs
    as the same user on the same machine: it can read and write what that user can (many files of
    16 MiB included), use the network and signal other processes.  This guards against accidents,
    not against malice.  Linux only.
    """

    name = "python"
    description = "runs python code and returns what it prints"

    def __init__(
        self, timeout_seconds: float = 30.0, memory_mib: int = 512, workers: int = 2, max_output_chars: int = 1000
    ):
        for field, value in (
            ("timeout_seconds", timeout_seconds),
            ("memory_mib", memory_mib),
            ("workers", workers),
            ("max_output_chars", max_output_chars),
        ):
            if value <= 0:
                raise ValueError(f"python tool: {field} must be positive, got {value}")
        self.timeout_seconds, self.memory_mib = timeout_seconds, memory_mib
        self.workers, self.max_output_chars = workers, max_output_chars
        self._slots = asyncio.Semaphore(workers)
        self._idle: list[asyncio.subprocess.Process] = []
        self._leaving: list[asyncio.subprocess.Process] = []

    async def run(self, text: str) -> ToolResult:
        """Run the code `text`; a worker that dies meanwhile is replaced and the call made once more."""
        request = json.dumps(text).encode() + b"\n"
        async with self._slots:
            start = time.perf_counter()
            for _ in range(2):
                worker = self._idle.pop() if self._idle else await self._start()
                reply = await self._ask(worker, request)
                if reply:
                    self._idle.append(worker)
                    status, output = json.loads(reply)
                    return ToolResult(output or EMPTY_OUTPUT, status, time.perf_counter() - start)
            return ToolResult(UNAVAILABLE, "unavailable", time.perf_counter() - start, detail="two workers died")

    async def close(self) -> None:
        """End the workers and whatever they still run."""
        for worker in self._idle:
            self._dismiss(worker)
        for worker in self._leaving:
            try:
                async with asyncio.timeout(GRACE_SECONDS):
                    await worker.wait()
            except TimeoutError:
                worker.kill()
                await worker.wait()
        self._idle, self._leaving = [], []
        self._slots = asyncio.Semaphore(self.workers)

    async def _start(self) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable, "-s", "-P", str(WORKER),
            str(self.timeout_seconds), str(self.memory_mib), str(self.max_output_chars), tempfile.gettempdir(),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, env=ENVIRONMENT,
            start_new_session=True, limit=(1 << 16) + 12 * self.max_output_chars,
        )  # fmt: skip

    async def _ask(self, worker: asyncio.subprocess.Process, request: bytes) -> bytes:
        """The worker's reply, or nothing if it died; unless it replies the worker is dismissed."""
        assert worker.stdin is not None
        assert worker.stdout is not None
        reply = b""
        try:
            async with asyncio.timeout(self.timeout_seconds + GRACE_SECONDS):
                worker.stdin.write(request)
                await worker.stdin.drain()
                line = await worker.stdout.readline()
                reply = line if line.endswith(b"\n") else b""
        except TimeoutError:
            worker.kill()
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            if not reply:
                self._dismiss(worker)
        return reply

    def _dismiss(self, worker: asyncio.subprocess.Process) -> None:
        """Close the worker's input, at which it ends."""
        assert worker.stdin is not None
        worker.stdin.close()
        self._leaving.append(worker)

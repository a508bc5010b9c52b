"""Several processes as one program."""

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import sys
import threading
import traceback
import zlib
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")

HEARTBEAT_SECONDS = 30  # a process that is silent for so long counts as dead, and ends all the others
SHUTDOWN_SECONDS = 60  # the wait for the others at the end, and when one has failed without a word
ARRIVALS = ".processes"
_NONE = object()
PIECE = 1 << 24  # bytes of each process that travel at a time


def initialise(run: Path, coordinator: str | None, processes: int | None, process: int | None, timeout: float) -> None:
    """Join the other processes of this program, before JAX is used for anything else.

    coordinator (HOST:PORT, of process 0), processes (how many) and process (which one is this): all, or none.
    Without them they are found on Cloud TPU VMs and GKE and under Slurm and Open MPI; elsewhere this process
    is alone, and nothing happens.  Not all there after `timeout` seconds: each says who is missing, as far as it
    can be known from `run`, the directory that all share, and ends with status 1.

    ValueError if the three do not fit together.
    """
    given = [value is not None for value in (coordinator, processes, process)]
    if any(given) and not all(given):
        raise ValueError("--coordinator, --processes and --process belong together: give all three, or none where "
                         "the cluster tells (Cloud TPU VMs, GKE, Slurm, Open MPI)")  # fmt: skip
    if coordinator is not None and processes is not None and process is not None:
        if not 0 <= process < processes:
            raise ValueError(f"--process must be in 0..{processes - 1}, the --processes, got {process}")
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal():
            raise ValueError(f"--coordinator must be HOST:PORT, of process 0, got {coordinator!r}")
    elif {"SLURM_PROCID", "SLURM_NTASKS"} <= os.environ.keys():  # for the roll call; JAX looks for itself
        process, processes = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from us
    interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)  # or Ctrl-C would be heard when the wait is over
    try:
        with _roll_call(run / ARRIVALS, processes, process, timeout):
            jax.distributed.initialize(
                coordinator, processes if coordinator else None, process if coordinator else None,
                initialization_timeout=int(timeout) + 60, heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=SHUTDOWN_SECONDS,
            )  # fmt: skip
    except ValueError as error:
        if "coordinator_address" not in str(error):  # how JAX says that it has found no cluster
            raise
    finally:
        signal.signal(signal.SIGINT, interrupt)


@contextlib.contextmanager
def _roll_call(folder: Path, processes: int | None, process: int | None, timeout: float) -> Iterator[None]:
    """Counted as arrived while inside; if that lasts longer than `timeout`, the program ends.

    JAX itself would abort without a name, from outside of Python.
    """
    mine = folder / (f"{socket.gethostname()}-{os.getpid()}" if process is None else str(process))
    joined = threading.Event()

    def watch() -> None:
        if joined.wait(1):  # nobody to wait for
            return
        folder.mkdir(parents=True, exist_ok=True)
        mine.write_text("")
        try:
            if joined.wait(timeout):
                return
            recent = mine.stat().st_mtime - timeout  # by the clock of the storage; older files are of earlier runs
            arrived = {path.name for path in folder.iterdir() if path.stat().st_mtime >= recent}
            print(f"error: {_missing(arrived, processes, timeout)}", file=sys.stderr)
            _end(1)
        finally:
            mine.unlink(missing_ok=True)

    watcher = threading.Thread(target=watch, name="roll call", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        joined.set()
        watcher.join()


def _missing(arrived: set[str], processes: int | None, timeout: float) -> str:
    if processes is None:
        return (f"not all processes arrived within {timeout:.0f} s, only {', '.join(sorted(arrived))}; "
                "see what the others have printed, and start all again")  # fmt: skip
    missing = [str(i) for i in range(processes) if str(i) not in arrived]
    if missing:
        return (f"of {processes} processes {', '.join(missing)} did not arrive within {timeout:.0f} s; see what they "
                "have printed (is their run directory on the same storage?), and start all again")  # fmt: skip
    return (f"all {processes} processes have started, but they did not reach process 0 within {timeout:.0f} s; "
            "is --coordinator its address, and is the port open?")  # fmt: skip


def several() -> bool:
    """Whether this program is more than one process."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this is process 0, which writes and prints what concerns all."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Print a line, once for all processes."""
    if is_first():
        print(text, flush=True)


def exchange(value: T) -> list[T]:
    """The `value` of every process, in the order of the processes: whatever JSON can hold.

    All processes must call this, as often and in the same order.
    """
    if not several():
        return [value]
    data = np.frombuffer(zlib.compress(json.dumps(value).encode(), level=1), np.uint8)
    sizes = multihost_utils.process_allgather(np.uint32(data.size)).tolist()
    longest = -(-max(sizes) // PIECE) * PIECE if max(sizes) > PIECE else 1 << max(sizes).bit_length()
    padded = np.pad(data, (0, longest - data.size))  # few shapes, so few compilations
    parts = [
        multihost_utils.process_allgather(padded[start : start + PIECE]).reshape(len(sizes), -1)
        for start in range(0, longest, PIECE)
    ]
    rows = np.concatenate(parts, axis=1)
    return [json.loads(zlib.decompress(row[:size].tobytes())) for row, size in zip(rows, sizes, strict=True)]


def from_first(value: T) -> T:
    """What process 0 has for `value`, on every process."""
    return exchange(value if is_first() else None)[0]  # type: ignore[return-value]


def my_share(items: Sequence[T]) -> Sequence[T]:
    """Every n-th of `items`, which all n processes have: what this process is to do."""
    return items[jax.process_index() :: jax.process_count()]


def gather_shares(
    mine: list[T], to_json: Callable[[T], Any] = lambda item: item, from_json: Callable[[Any], T] = lambda row: row
) -> list[T]:
    """What the processes have made of their shares, one result an item, in the order of the items."""
    if not several():
        return mine
    shares = exchange([to_json(item) for item in mine])
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*shares, fillvalue=_NONE))
    return [from_json(row) for row in in_turn if row is not _NONE]


def barrier() -> None:
    """Wait until all processes are here: what one has written before, the others can read after."""
    if several():
        multihost_utils.process_allgather(np.bool_(True))


async def together(work: Awaitable[T]) -> T:
    """The result of this process's `work`, when that of all is done.

    Cancelled on one process, it ends as cancelled on every one when the work of all is over, so that they can save
    what they have at the same point.
    """
    cancelled = False
    try:
        result = await work
        await asyncio.sleep(0)  # where a cancellation that `undisturbed` put off arrives
    except asyncio.CancelledError:
        cancelled = True
    if several():  # in a thread, so that what else runs here goes on until the slowest process is done
        vote = asyncio.to_thread(multihost_utils.process_allgather, np.bool_(cancelled))
        cancelled = bool((await undisturbed(vote)).any())
    if cancelled:
        raise asyncio.CancelledError
    return result


async def undisturbed(work: Awaitable[T]) -> T:
    """The result of `work`; a cancellation meanwhile is put off until the caller next waits, best in `together`.

    For what must not be left half done, or what all processes do in step.
    """
    task = asyncio.ensure_future(work)
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            cancelled = True
    if cancelled and (caller := asyncio.current_task()) is not None:
        caller.cancel()
    return task.result()


def check_same(settings: Mapping[str, Any]) -> None:
    """ValueError, on every process, that names each setting in which they differ, with its values."""
    everybody = exchange(dict(settings))
    differing = []
    for key in sorted(set().union(*everybody)):
        values = [json.dumps(settings.get(key, "not set")) for settings in everybody]
        if len(set(values)) > 1:
            holders = {v: [str(i) for i, value in enumerate(values) if value == v] for v in dict.fromkeys(values)}
            told = ", ".join(f"{value} on process {' and '.join(who)}" for value, who in holders.items())
            differing.append(f"{key} is {told}")
    if differing:
        raise ValueError(f"the processes do not run the same: {'; '.join(differing)}. "
                         "Start all with the same command and the same code")  # fmt: skip


def check_same_directory(folder: Path) -> None:
    """ValueError, on every process, unless `folder` is the same directory for all of them."""
    if not several():
        return
    token = folder / from_first(f".seen-by-all-{os.getpid()}-{os.urandom(4).hex()}")
    if is_first():
        folder.mkdir(parents=True, exist_ok=True)
        token.touch()
    barrier()
    blind = [str(i) for i, seen in enumerate(exchange(token.exists())) if not seen]
    if is_first():
        token.unlink()
    if blind:
        raise ValueError(f"{folder}: process {', '.join(blind)} does not see what process 0 writes there; "
                         "--config.run must be on storage that all hosts share")  # fmt: skip


@contextlib.contextmanager
def failing_at_once() -> Iterator[None]:
    """Of several processes, one that fails inside ends the program then and there.

    Leaving in the usual way it would wait for the others, who wait for it in some collective.  They notice that
    it is gone and end as well; a supervisor starts all again.
    """
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized() or not several():
            raise
        if isinstance(error, SystemExit) and isinstance(error.code, int):
            _end(error.code)
        traceback.print_exc()
        _end(1)


def _end(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

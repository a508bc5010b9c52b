"""What the entry points with a config share: the flag, signals, and errors as one sentence."""

import asyncio
import os
import re
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from etagent_jax import heartbeat

TRACEBACK_VARIABLE = "ETAGENT_TRACEBACK"

WRONG_ARGUMENTS = 2  # an exit status that tells a supervisor not to try again

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file, with a preset after a colon: configs/phase2.py:tiny.", lock_config=True
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, if several processes train together; found by itself on Cloud TPU "
    "VMs and GKE and under Slurm and Open MPI."
)  # fmt: skip
_PROCESSES = flags.DEFINE_integer("processes", None, "How many processes train together; goes with --coordinator.")
_PROCESS = flags.DEFINE_integer("process", None, "Which of them this is, from 0; goes with --coordinator.")
_PATIENCE = flags.DEFINE_float(
    "initialization_timeout", 120.0, "Seconds to wait for the other processes to start.", lower_bound=1.0
)


def run(main: Callable[[ConfigDict], Awaitable[None]]) -> None:
    """Parse the command line and run `main` on its config, together with the other processes if there are several.

    Leaves with status 0 at Ctrl-C or SIGTERM; with a sentence at a user's error, status 2 if it is in the command
    line, else 1.
    """
    app.run(lambda _: _run_to_completion(main), flags_parser=_parse)


def run_alone(main: Callable[[ConfigDict], None]) -> None:
    """Likewise, for a program that joins no other process and that a signal may end at any moment."""
    app.run(lambda _: _run_alone(main), flags_parser=_parse)


def _parse(arguments: Sequence[str]) -> list[str]:
    try:
        rest = flags.FLAGS(arguments)
        if len(rest) > 1:
            raise flags.Error(f"unexpected argument {rest[1]!r}")
        if _CONFIG.value is None:
            raise flags.Error("give a configuration: --config=configs/phase2.py (see --help)")
    except AttributeError as error:
        _leave(f"unknown field of the config: {error}", WRONG_ARGUMENTS)
    except (flags.Error, ValueError) as error:
        _leave(str(error), WRONG_ARGUMENTS)
    return rest


def _last_sentence(text: str) -> str:
    """What a person needs of an error that carries a traceback in its text."""
    text = text.replace("\\'", "'").replace("\\n", ". ").replace('\\"', '"').replace("''", "'")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("Pass --help")]
    if any("Traceback" in line for line in lines):
        return re.sub(r"^\w+(Error|Exception): ", "", lines[-1])
    return " ".join(lines)


def _leave(sentence: str, status: int = 1) -> NoReturn:
    if TRACEBACK_VARIABLE in os.environ:
        raise
    print(f"error: {_last_sentence(sentence)}\n({TRACEBACK_VARIABLE}=1 shows where it comes from)", file=sys.stderr)
    sys.exit(status)


def _run_to_completion(main: Callable[[ConfigDict], Awaitable[None]]) -> None:
    config = _CONFIG.value
    logging.set_verbosity(logging.WARNING)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "etagent_jax" / "compilation"))
    from etagent_jax import distributed  # imports JAX, which is slow: not before the command line is right

    heartbeat.start()
    try:
        distributed.initialise(
            Path(config.run), _COORDINATOR.value, _PROCESSES.value, _PROCESS.value, _PATIENCE.value
        )  # fmt: skip
    except (ValueError, OSError) as error:  # OSError: the config is read when it is first used
        _leave(str(error), WRONG_ARGUMENTS)
    with distributed.failing_at_once():
        try:
            asyncio.run(_until_signal(main, config))
        except Stopped:
            distributed.say(f"stopped; the same command goes on from here ({config.run})")
        except (ValueError, FloatingPointError, OSError) as error:
            from etagent_jax.stages.setup import WrongSettings

            _leave(str(error), WRONG_ARGUMENTS if isinstance(error, WrongSettings) else 1)


def _run_alone(main: Callable[[ConfigDict], None]) -> None:
    logging.set_verbosity(logging.WARNING)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        main(_CONFIG.value)
    except (ValueError, OSError) as error:
        _leave(str(error))


class Stopped(Exception):
    """A signal, to this process or another, asked for the end, and what was to be saved is saved."""


async def _until_signal(main: Callable[[ConfigDict], Awaitable[None]], config: ConfigDict) -> None:
    from etagent_jax import distributed

    task = asyncio.ensure_future(main(config))
    signals: list[int] = []

    def stop(number: int) -> None:
        if not signals:  # a second one must not break off the saving
            task.cancel()
        signals.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    try:
        await task
    except asyncio.CancelledError:
        if not signals and not distributed.several():
            raise
        raise Stopped from None

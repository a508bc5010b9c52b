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

TRACEBACK_VARIABLE = "ETAGENT_TRACEBACK"

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file, with a preset after a colon: configs/phase2.py:tiny.", lock_config=True
)


def run(main: Callable[[ConfigDict], Awaitable[None]]) -> None:
    """Parse the command line and run `main` on its config.

    Leaves with status 0 at Ctrl-C or SIGTERM, and with 1 and a sentence at a user's error.
    """
    app.run(lambda _: _run_to_completion(main), flags_parser=_parse)


def _parse(arguments: Sequence[str]) -> list[str]:
    try:
        rest = flags.FLAGS(arguments)
        if len(rest) > 1:
            raise flags.Error(f"unexpected argument {rest[1]!r}")
        if _CONFIG.value is None:
            raise flags.Error("give a configuration: --config=configs/phase2.py (see --help)")
    except AttributeError as error:
        _leave(f"unknown field of the config: {error}")
    except (flags.Error, ValueError) as error:
        _leave(str(error))
    return rest


def _last_sentence(text: str) -> str:
    """What a person needs of an error that carries a traceback in its text."""
    text = text.replace("\\'", "'").replace("\\n", ". ").replace('\\"', '"').replace("''", "'")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("Pass --help")]
    if any("Traceback" in line for line in lines):
        return re.sub(r"^\w+(Error|Exception): ", "", lines[-1])
    return " ".join(lines)


def _leave(sentence: str) -> NoReturn:
    if TRACEBACK_VARIABLE in os.environ:
        raise
    sys.exit(f"error: {_last_sentence(sentence)}\n({TRACEBACK_VARIABLE}=1 shows where it comes from)")


def _run_to_completion(main: Callable[[ConfigDict], Awaitable[None]]) -> None:
    config = _CONFIG.value
    logging.set_verbosity(logging.WARNING)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "etagent_jax" / "compilation"))
    try:
        asyncio.run(_until_signal(main, config))
    except Stopped:
        print(f"stopped; the same command goes on from here ({config.run})", flush=True)
    except (ValueError, FloatingPointError, OSError) as error:
        _leave(str(error))


class Stopped(Exception):
    """A signal asked for the end, and what was to be saved is saved."""


async def _until_signal(main: Callable[[ConfigDict], Awaitable[None]], config: ConfigDict) -> None:
    task = asyncio.ensure_future(main(config))
    signals: list[int] = []

    def stop(number: int) -> None:
        signals.append(number)
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    try:
        await task
    except asyncio.CancelledError:
        if not signals:
            raise
        raise Stopped from None

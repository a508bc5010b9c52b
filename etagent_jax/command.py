"""What the entry points with a config share: the flag, signals, and errors as one sentence."""

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable

from ml_collections import ConfigDict, config_flags

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file, with a preset after a colon: configs/phase2.py:tiny.", lock_config=True
)
VERBOSE_VARIABLE = "ETAGENT_TRACEBACK"


def run_to_completion(main: Callable[[ConfigDict], Awaitable[None]], config: ConfigDict | None) -> None:
    """Run `main`; leave with status 0 at Ctrl-C or SIGTERM, and with 1 and a sentence at a user's error."""
    if config is None:
        sys.exit("give a configuration: --config=configs/phase2.py (see --help)")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        asyncio.run(_until_signal(main, config))
    except asyncio.CancelledError:
        print(f"stopped; the same command goes on from here ({config.run})", flush=True)
    except (ValueError, FloatingPointError, OSError) as error:
        if VERBOSE_VARIABLE in os.environ:
            raise
        sys.exit(f"error: {error}\n({VERBOSE_VARIABLE}=1 shows where it comes from)")


async def _until_signal(main: Callable[[ConfigDict], Awaitable[None]], config: ConfigDict) -> None:
    task = asyncio.ensure_future(main(config))
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    await task

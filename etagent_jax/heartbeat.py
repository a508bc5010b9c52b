"""A sign of life for the supervisor: a file that is touched every few seconds while the process runs."""

import atexit
import os
import socket
import threading
import time
from pathlib import Path

VARIABLE = "ETAGENT_HEARTBEATS"
SECONDS = 3.0


def start() -> None:
    """Touch a file in the folder that `ETAGENT_HEARTBEATS` names until the process ends; without it, do nothing.

    The file goes when the process ends in order.  The thread beats while Python can run: work in XLA and NumPy,
    which let go of the interpreter's lock, does not stop it; SIGSTOP, or native code that keeps the lock, does.
    """
    if VARIABLE not in os.environ:
        return
    path = Path(os.environ[VARIABLE]) / f"{socket.gethostname()}-{os.getpid()}"
    path.touch()
    atexit.register(path.unlink, missing_ok=True)
    threading.Thread(target=_beat, args=(path,), name="heartbeat", daemon=True).start()


def _beat(path: Path) -> None:
    while True:
        time.sleep(SECONDS)
        try:
            os.utime(path)
        except FileNotFoundError:  # the process is ending, or its supervisor has let go of it
            return

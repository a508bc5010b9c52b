"""Files that survive a crash: an append-only log of trajectories, and JSON written whole or not at all."""

import json
import os
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any, Self

from etagent_jax.trajectory import Trajectory

SYNC_EVERY = 256  # lines


class TrajectoryLog:
    """JSONL of trajectories, one a line, each id once; one writer at a time, any number of readers.

    A line goes to the operating system in `append`, so a killed process loses at most the line in
    flight.  It is forced to the disk (fsync) every 256 lines and in `close`, so a machine that loses
    power loses at most those.  A last line without its line end is one that was cut short: readers
    leave it out, and the next writer cuts it off.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._file: FileIO | None = None
        self._ids: set[str] = set()
        self._size = 0
        self._unsynced = 0

    def append(self, trajectory: Trajectory) -> None:
        """Write one line.  ValueError if the id is there already; on OSError (a full disk) nothing is kept of it."""
        file = self._file or self._open()
        if trajectory.id in self._ids:
            raise ValueError(f"{self.path}: trajectory {trajectory.id!r} is in it already")
        text = json.dumps(trajectory.to_json(), ensure_ascii=False, separators=(",", ":"))
        line = text.encode("utf-8", "surrogatepass") + b"\n"  # json.loads decodes bytes the same way
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(self._size)
            raise
        self._size += len(line)
        self._ids.add(trajectory.id)
        self._unsynced += 1
        if self._unsynced >= SYNC_EVERY:
            self._sync(file)

    def read(self) -> Iterator[Trajectory]:
        """The trajectories in order; none if there is no file.  ValueError names a broken line or a repeated id."""
        for where, row in self._rows():
            try:
                yield Trajectory.from_json(row)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{where}: not a trajectory ({error!r})") from error

    def close(self) -> None:
        """Force what was written to the disk and let go of the file; a later `append` opens it again."""
        if self._file is not None:
            self._sync(self._file)
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        if not self.path.exists():
            return
        lines: dict[str, int] = {}
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    return
                where = f"{self.path}, line {number}"
                try:
                    row = json.loads(line)
                    identifier = row["id"]
                except (ValueError, TypeError, KeyError) as error:
                    raise ValueError(f"{where}: broken; remove the line to go on without it ({error!r})") from error
                if identifier in lines:
                    raise ValueError(f"{where}: trajectory {identifier!r} stands at line {lines[identifier]} already")
                lines[identifier] = number
                yield where, row

    def _open(self) -> FileIO:
        self._ids = {row["id"] for _, row in self._rows()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (kept open between appends)
        self._size = _whole_lines(self.path)
        self._file.truncate(self._size)
        _sync_folder(self.path.parent)
        return self._file

    def _sync(self, file: FileIO) -> None:
        os.fsync(file.fileno())
        self._unsynced = 0


def _whole_lines(path: Path) -> int:
    """Bytes up to and including the last line end."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(end - (1 << 16), 0)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
    return 0


def write_json_atomic(path: str | Path, obj: Any) -> None:
    """Write `obj` as indented JSON so that `path` holds the old or the new content, never a part of it."""
    path = Path(path)
    content = json.dumps(obj, indent=2, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    """Force the names of a folder's files, not only their contents, to the disk."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)

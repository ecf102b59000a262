"""Files that a lesson reads or writes: refused before anything runs, and renamed to their names when complete."""

import fcntl
import os
import shutil
import socket
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path

LOCK = ".running"  # in a folder that a run writes to; it stays, the lock does not
PATIENCE = 1.0  # seconds, while another run only looks


def check_readable(named: str, path: str | Path, use: str) -> None:
    """Raises ValueError unless `path` is a file that every rank can read, and again.

    A pipe, as of `<(command)`, gives its bytes to whoever opens it first, and all others wait for ever.

    Args:
        named: the file as the user has named it, with the flag.
    """
    if "\0" in str(path):
        raise ValueError(f"{named!r}: is no file name; {use}")
    target = Path(path)
    try:
        if target.is_dir():
            raise ValueError(f"{named}: is a folder; {use}")
        if target.exists() and not target.is_file():
            raise ValueError(f"{named}: is no regular file, which every rank could read; {use}")
        with target.open("rb"):
            pass
    except OSError as error:
        raise ValueError(f"{named}: {error.strerror}; {use}") from None


class FolderLock:
    """That one run at a time writes to a folder. The system ends it with the process, however that ends.

    Args:
        probe: only look whether another process has it; many may at once.
        beside: the lock is not in the folder but next to it, or to a file, and goes with the process that lets go.

    Raises:
        ValueError: another process has it, which is named.
    """

    def __init__(self, flag: str, folder: str | Path, probe: bool = False, beside: bool = False):
        path = Path(folder).absolute()  # the folder "." has no name
        self._path = path.with_name(f".{path.name}{LOCK}") if beside else path / LOCK
        self._named, self._beside = f"{flag} {folder}", beside
        if not probe:
            self._take(fcntl.LOCK_EX, PATIENCE)
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}, since {datetime.now():%Y-%m-%d %H:%M}")
            self._file.flush()
        elif self._path.exists():
            self._take(fcntl.LOCK_SH, 0.0)
            self._file.close()

    def _take(self, kind: int, patience: float) -> None:
        until = time.monotonic() + patience
        while not self._opened(kind):
            if time.monotonic() > until:
                use = "use another folder, or wait until it has ended"
                raise ValueError(f"{self._named}: {self._file.read() or 'another run'} writes there; {use}")
            self._file.close()
            time.sleep(PATIENCE / 20)

    def _opened(self, kind: int) -> bool:
        """Whether the file is this process's: none has it, nor has taken it away since it was opened."""
        try:
            self._file = os.fdopen(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644), "r+")
        except OSError as error:
            raise ValueError(f"{self._named}: nothing can be written there: {error.strerror}; use another") from None
        try:
            fcntl.lockf(self._file, kind | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # the two ways in which systems say that another has it
            return False
        except OSError:  # a file system without locks: then there is none, as before
            return True
        return self._there()

    def _there(self) -> bool:
        with suppress(FileNotFoundError):
            return os.path.samestat(self._path.stat(), os.fstat(self._file.fileno()))
        return False

    def keep(self) -> None:
        """Take it again, where somebody has removed the folder. Raises ValueError where another run has it since."""
        if not self._there():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self.__init__(*self._named.split(" ", 1), beside=self._beside)

    def close(self) -> None:
        """Let others write there."""
        if self._beside and not self._file.closed and self._there():
            self._path.unlink()
        self._file.close()


def check_writable(flag: str, path: str) -> None:
    """Raises ValueError, naming the flag, unless a file can be written at `path`."""
    if not path or "\0" in path:
        raise ValueError(f"{flag} {path!r}: is no file name; use {flag} out{flag.replace('--', '.')}")
    target = Path(path)
    folder = target.parent
    try:
        if target.is_dir():
            raise ValueError(f"{flag} {path}: is a folder; use a file name in it")
        if target.exists() and not target.is_file():
            raise ValueError(f"{flag} {path}: is not a regular file, which it would replace; use another name")
        if not folder.is_dir():
            raise ValueError(f"{flag} {path}: there is no folder {folder}; make it, or use {flag} {target.name}")
        _temporary(target).touch()
        _temporary(target).unlink()
    except OSError as error:
        raise ValueError(f"{flag} {path}: cannot write there: {error.strerror}; use another place") from None


class Unwritable(ValueError):
    """A file cannot be written now, though it could when the run began."""


def write_file(path: str, content: str | bytes) -> None:
    """Write `content` under a temporary name and rename it: a reader never sees half a file.

    Raises:
        Unwritable: the disk is full, or the folder gone.
    """
    data = content.encode() if isinstance(content, str) else content
    target = Path(path)
    temporary = _temporary(target)
    try:
        temporary.write_bytes(data)
        temporary.replace(target)
    except OSError as error:
        free = f", {shutil.disk_usage(target.parent).free / 1e6:,.1f} are free there" if target.parent.is_dir() else ""
        needs = f"{error.strerror}; {len(data) / 1e6:,.1f} MB are needed{free}"
        raise Unwritable(f"{path}: cannot be written: {needs}; use another place") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}")


def remove(path: Path) -> None:
    """A folder or a file, if it is there, as far as it goes."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(folder: Path) -> None:
    """The names in a folder, to disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)

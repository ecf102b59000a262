"""Files that a lesson writes: refused before anything runs, and renamed to their names when complete."""

import os
from pathlib import Path


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


def write_file(path: str, content: str | bytes) -> None:
    """Write `content` under a temporary name and rename it: a reader never sees half a file."""
    data = content.encode() if isinstance(content, str) else content
    target = Path(path)
    temporary = _temporary(target)
    try:
        temporary.write_bytes(data)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}")

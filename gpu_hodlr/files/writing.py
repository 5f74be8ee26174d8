"""Files written whole or not at all: beside what they replace, then moved over it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np

from gpu_hodlr.errors import ArgumentError, DtypeError

AnyPath: TypeAlias = "str | bytes | os.PathLike[str] | os.PathLike[bytes]"
TOKEN_BYTES = 8  # of random names, in hexadecimal digits twice as many
TOKEN = f"[0-9a-f]{{{2 * TOKEN_BYTES}}}"


def target_of(path: AnyPath) -> Path:
    """The file that a path stands for: of a symbolic link, what it leads to.

    Raises:
        DtypeError: it is no path.
        ArgumentError: it is empty, or has a NUL.
        OSError: links that lead in a circle.
    """
    if not isinstance(path, (str, bytes, os.PathLike)):
        raise DtypeError(
            f"path must be a str, bytes or os.PathLike, got {type(path).__module__}."
            f"{type(path).__qualname__}"
        )
    name = os.fsdecode(path)
    if not name or "\0" in name:
        raise ArgumentError(f"path must be the name of a file, got {name!r}")
    if not os.path.islink(name):
        return Path(name)
    target = os.path.realpath(name)
    if os.path.islink(target):
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), name)
    return Path(target)


@contextmanager
def unfinished(path: Path, like: Path) -> Iterator[IO[bytes]]:
    """A file to be written and then moved to `path`; it goes if that does not happen.

    It is locked while it is open: a later save tells it by that from what a killed one has left.

    Args:
        path: where it is to be.
        like: whose owner and mode it gets, if that is there.

    Raises:
        OSError: it cannot be made, or `like` is there and no regular file.
    """
    part = path.with_name(f"{path.name}.{secrets.token_hex(TOKEN_BYTES)}.part")
    old = _status(like)
    mode = 0o666 if old is None else stat.S_IMODE(old.st_mode) & 0o777

    def opener(name: str, flags: int) -> int:
        try:
            return os.open(name, flags, mode)  # what is private never was open to others
        except OSError as error:  # that a user knows the name of
            raise OSError(error.errno, error.strerror, os.fspath(path)) from None

    with open(part, "xb", opener=opener) as f:
        try:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if old is not None:
                with suppress(OSError):  # of another user
                    os.fchown(f.fileno(), old.st_uid, old.st_gid)
                os.fchmod(f.fileno(), mode)
            yield f
        finally:
            part.unlink(missing_ok=True)


def _status(target: Path) -> os.stat_result | None:
    """Of a file, None where there is none.

    Raises:
        OSError: it is no regular file: moving another over it would destroy a folder or a device.
    """
    try:
        found = target.stat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found.st_mode):
        code = errno.EISDIR if stat.S_ISDIR(found.st_mode) else errno.EINVAL
        raise OSError(code, os.strerror(code), os.fspath(target))
    return found


def clear_abandoned(target: Path) -> None:
    """Remove what saves that were killed have left beside a file; what is being written stays."""
    of_a_rank = rf"\.[0-9]+-of-[0-9]+\.npz\.{TOKEN}"
    left = re.compile(rf"{re.escape(target.name)}\.{TOKEN}({of_a_rank})?\.part")
    with suppress(OSError):
        for file in [file for file in target.parent.iterdir() if left.fullmatch(file.name)]:
            with suppress(OSError), open(file, "rb") as f:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.unlink()


def write_over(target: Path, header: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    """Write beside a file, and move that to its place when it is complete.

    Raises:
        OSError: it cannot be written; an old file is whole.
    """
    with unfinished(target, target) as f:
        write(f, header, arrays)
        os.replace(f.name, target)


def write(f: IO[bytes], header: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    """Write an archive, and wait until the disk has it.

    Raises:
        OSError: it cannot be written.
    """
    np.savez(f, **arrays, header=np.frombuffer(json.dumps(header).encode(), np.uint8))
    f.flush()
    os.fsync(f.fileno())

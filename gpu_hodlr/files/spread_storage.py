"""A matrix or factor spread over ranks on disk: a file a rank, and an index that names them.

What the ranks repeat is in the index. It is written last, and the ranks' files have names that no
other save uses: until the index is replaced, what was saved under the same name is whole. They get
these names when all of them are complete.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from gpu_hodlr.devices import HostArray, HostIndex
from gpu_hodlr.distributed import Communicator
from gpu_hodlr.errors import FileFormatError
from gpu_hodlr.files.archive import DAMAGE, Archive, damage_named
from gpu_hodlr.files.writing import TOKEN, TOKEN_BYTES, unfinished, write, write_over

PART = "gpu_hodlr rank"  # the format of a rank's file
_NAME = re.compile(rf".+\.({TOKEN})\.([0-9]+)-of-([0-9]+)\.npz", re.DOTALL)


def save_spread(
    target: Path,
    comm: Communicator,
    header: Mapping[str, Any],
    whole: Mapping[str, Any],
    own: Mapping[str, Any],
) -> None:
    """Save what is spread over ranks; all of them call.

    Args:
        target: the index.
        comm: the ranks.
        header: what the file of one process would say, and the version of an index.
        whole: arrays that are the same on every rank.
        own: this rank's part of the others, to be put together along the first axis.

    Raises:
        OSError: some rank cannot write its file; none of them stays.
    """
    token = comm.bcast(secrets.token_hex(TOKEN_BYTES) if comm.rank == 0 else None, 0)
    names = [f"{target.name}.{token}.{p}-of-{comm.size}.npz" for p in range(comm.size)]
    files = [target.with_name(name) for name in names]
    rows = comm.share({name: len(a) for name, a in own.items()})
    old: list[Path] = []
    with ExitStack() as opened:
        with comm.agreed():
            part = opened.enter_context(unfinished(files[comm.rank], like=target))
            write(part, _about(header, names[comm.rank]), own)
        try:
            with comm.agreed():
                os.rename(part.name, files[comm.rank])
            with comm.agreed():
                if comm.rank == 0:
                    old = part_files(target)
                    stacks = {
                        name: {
                            "rows": [here[name] for here in rows],
                            "shape": a.shape[1:],
                            "dtype": a.dtype.name,
                        }
                        for name, a in own.items()
                    }
                    write_over(target, {**header, "files": names, "stacks": stacks}, whole)
        except BaseException:
            # Rank 0 alone knows whether the index has been replaced: it removes all or nothing.
            if comm.rank == 0 and part_files(target) != files:
                remove(files)
            raise
    remove(old)


def _about(header: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The header of a rank's file that the index with this header names so."""
    return {"format": PART, "version": header["version"], "file": name}


def part_files(target: Path) -> list[Path]:
    """The ranks' files that an index names; none where no such index is."""
    if target.is_file():  # a pipe would be waited for
        with suppress(*DAMAGE), open(target, "rb") as stream:
            return [target.with_name(name) for name in _names(Archive(stream).header())]
    return []


def remove(files: Iterable[Path]) -> None:
    """Remove those that are there and can be removed."""
    for file in files:
        with suppress(OSError):
            file.unlink()


def _names(header: Mapping[str, Any]) -> list[str]:
    """The files named by an index: of one save, beside it, one a rank.

    Raises:
        ValueError: they are not.
    """
    names = header.get("files", [])
    matches = [_NAME.fullmatch(name) for name in names]
    whole = [m is not None and Path(m[0]).name == m[0] for m in matches]
    tokens = {m[1] for m in matches if m is not None}
    places = [(int(m[2]), int(m[3])) for m in matches if m is not None]
    if not all(whole) or len(tokens) > 1 or places != [(p, len(names)) for p in range(len(names))]:
        raise ValueError("it names no ranks' files of one save")
    return list(names)


class SpreadArchive:
    """The arrays of an index and of the ranks' files it names, put together.

    Args:
        target: the index.
        index: the same, open.
        header: what the index says.
        opened: closes the ranks' files, which are opened where they are needed.

    Raises:
        ValueError, KeyError, TypeError: the index contradicts itself.
    """

    def __init__(
        self,
        target: Path,
        index: Archive,
        header: Mapping[str, Any],
        opened: ExitStack,
    ) -> None:
        self._folder, self._index, self._opened = target.parent, index, opened
        self._header = header
        self._names, self._stacks = _names(header), header["stacks"]
        self._parts: dict[str, Archive] = {}
        for name, stack in self._stacks.items():
            rows = stack["rows"]
            if len(rows) != len(self._names) or any(type(r) is not int or r < 0 for r in rows):
                raise ValueError(f"{rows} rows of {name} in {len(self._names)} files")

    def __contains__(self, name: str) -> bool:
        return name in self._stacks or name in self._index

    def length(self, name: str) -> int:
        """See `archive.Source`."""
        stack = self._stacks.get(name)
        return self._index.length(name) if stack is None else sum(stack["rows"])

    def read(self, name: str, rows: slice | HostIndex | None = None) -> HostArray:
        """See `archive.Source`.

        Raises:
            FileFormatError: a rank's file is missing, damaged, of another save or does not fit.
            KeyError, ValueError: the index does not fit.
        """
        if name not in self._stacks:
            return self._index.read(name, rows)
        stack = self._stacks[name]
        shape, dtype = tuple(stack["shape"]), np.dtype(stack["dtype"])
        edges = list(accumulate(stack["rows"], initial=0))
        wanted = np.arange(edges[-1])[slice(None) if rows is None else rows]
        got = [
            self._read_part(file, name, (stop - start, *shape), dtype, wanted[a:b] - start)
            for file, (start, stop) in zip(self._names, pairwise(edges), strict=True)
            for a, b in [np.searchsorted(wanted, [start, stop])]
            if a < b
        ]
        if not got:
            return np.empty((0, *shape), dtype)
        return got[0] if len(got) == 1 else np.concatenate(got)

    def _read_part(
        self, file: str, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], rows: Any
    ) -> HostArray:
        """Rows of a rank's part of an array, whose shape and type are known."""
        path = self._folder / file
        with damage_named(path):
            if file not in self._parts:
                part = Archive(self._opened.enter_context(path.open("rb")))
                about = part.header()
                if about != _about(self._header, file):
                    raise FileFormatError(f"of another save or rank: {about.get('file')}")
                self._parts[file] = part
            part = self._parts[file]
            if part.shape(name) != shape:
                raise ValueError(f"{name} has shape {part.shape(name)}, the index says {shape}")
            got = part.read(name, None if len(rows) == shape[0] else rows)
            if got.dtype != dtype:
                raise ValueError(f"{name} has type {got.dtype}, the index says {dtype}")
            return got

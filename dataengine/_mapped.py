"""Files mapped into memory whose pages a process gives back: what it holds is what it reads, not all it has ever read.

Pages of a file that were read count as memory of the process as long as they are mapped, though the system could take
them: a loader that goes through terabytes seems to grow until nothing is free, and containers are ended for less.
"""

from __future__ import annotations

import mmap
from pathlib import Path

import pyarrow as pa

_READS = 256


class Mapped:
    """A file mapped for reading; ValueError when it is empty."""

    def __init__(self, path: str | Path) -> None:
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.buffer = pa.py_buffer(self._map)
        self._noted = False

    def note_read(self) -> None:
        """Say that something was read: after some hundreds of reads, of any files, all that they mapped is given back.

        Views of the file stay what they are: what is read again is mapped again, for less than a microsecond a page.
        """
        _reads.add(self)


class _Reads:
    """What was read lately. Threads may count a read too few, which does no harm."""

    def __init__(self) -> None:
        self._count = 0
        self._files: list[Mapped] = []

    def add(self, file: Mapped) -> None:
        if not file._noted:
            file._noted = True
            self._files.append(file)
        self._count += 1
        if self._count >= _READS:
            self._count, files, self._files = 0, self._files, []
            for each in files:
                each._noted = False
                each._map.madvise(mmap.MADV_DONTNEED)


_reads = _Reads()

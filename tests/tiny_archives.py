"""A data set of two files, packed in many ways."""
from __future__ import annotations

import hashlib
import io
import stat
import tarfile
import zipfile
from pathlib import Path

import numpy as np

from dealkit.datasets.fetch import Archive

NOISE = np.random.default_rng(0).bytes(40_000)                        # does not compress
FILES = {"birds/images/a.jpg": NOISE, "birds/list.txt": b"a.jpg\n"}


def tar(files=FILES, mode="gz", extra=()) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{mode}") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
        for entry in extra:
            archive.addfile(entry)
    return buffer.getvalue()


def packed_zip(files=FILES, link=None) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        if link:
            entry = zipfile.ZipInfo(link)
            entry.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(entry, "/etc/passwd")
    return buffer.getvalue()


WHOLE = tar()


def known(*urls, data=WHOLE, unpacked=50_000, top="birds") -> Archive:
    return Archive(urls, hashlib.sha256(data).hexdigest(), len(data), unpacked, top)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def is_whole(folder: Path) -> bool:
    """The data set is there and nothing else: no archive, no part, no temporary folder."""
    left = {path.name for path in folder.iterdir()} - {".lock"}
    return contents(folder / "birds") == {name.partition("/")[2]: data for name, data in FILES.items()} and left == {
        "birds"}

"""Archives -> folders, so that a folder is either whole or not there, and nothing is written outside of it."""
from __future__ import annotations

import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from lzma import LZMAError
from pathlib import Path, PurePosixPath, PureWindowsPath

from tqdm.auto import tqdm

_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, LZMAError)


def unpack(archive: str | Path, top: str, folder: str | Path, progress: bool = True) -> Path:
    """Unpack one folder of a tar or zip archive.

    Everything goes into a temporary folder first, and `top` is renamed when it is whole: a process that is killed
    leaves nothing that looks complete. What lies beside `top` in the archive is not kept.

    Args:
        archive: path of a .zip, or of a .tar that may be compressed.
        top: name of the folder in the archive.
        folder: where it shall lie, as `folder / top`.
        progress: show a bar.

    Returns:
        `folder / top`.

    Raises:
        FileExistsError: there is something in that place.
        ValueError: damaged, no archive, no such folder in it, or a member that would be written outside of the folder
            (`..`, an absolute name, a link that leaves it, any link in a zip).
        OSError: the folder cannot be written; no space.

    Example:
        >>> unpack("food-101.tar.gz", "food-101", "pictures")  # doctest: +SKIP
        PosixPath('pictures/food-101')
    """
    archive, folder = Path(archive), Path(folder)
    target, temporary = folder / top, folder / f".unpacking-{top}"
    if target.exists():
        raise FileExistsError(f"{target} is there already; delete or rename it, if it shall be unpacked again.")
    shutil.rmtree(temporary, ignore_errors=True)                      # of a process that was killed
    temporary.mkdir(parents=True)
    try:
        (_unzip if zipfile.is_zipfile(archive) else _untar)(archive, temporary, progress)
        if not (temporary / top).is_dir():
            there = ", ".join(sorted(path.name for path in temporary.iterdir())[:5]) or "nothing"
            raise ValueError(f"{archive} has no folder {top!r} (there is {there}): another archive was expected.")
        os.replace(temporary / top, target)
    except _DAMAGE as error:
        raise ValueError(f"{archive} cannot be unpacked: {error}. It is damaged, cut off, or no archive; delete it, "
                         "and fetch it again.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _untar(archive: Path, folder: Path, progress: bool) -> None:
    if not hasattr(tarfile, "data_filter"):
        raise RuntimeError(f"this Python cannot unpack safely; use 3.11.4 or newer, or unpack {archive} by hand.")
    with archive.open("rb") as raw, tarfile.open(fileobj=raw) as tar, _bar(archive, archive.stat().st_size,
                                                                           progress) as bar:
        for member in tar:
            _check_name(archive, member.name)
            tar.extract(member, folder, filter="data")                # refuses devices, and links that leave the folder
            bar.update(raw.tell() - bar.n)


def _unzip(archive: Path, folder: Path, progress: bool) -> None:
    with zipfile.ZipFile(archive) as whole:
        members = whole.infolist()
        for member in members:
            _check_name(archive, member.filename)
            if stat.S_ISLNK(member.external_attr >> 16):
                raise ValueError(f"{archive} holds a link, {member.filename!r}, and links are not unpacked.")
        with _bar(archive, sum(member.file_size for member in members), progress) as bar:
            for member in members:
                whole.extract(member, folder)
                bar.update(member.file_size)


def _check_name(archive: Path, name: str) -> None:
    """Both spellings of paths are looked at: what is harmless here may not be so under Windows."""
    for path in (PurePosixPath(name), PureWindowsPath(name)):
        if path.anchor or ".." in path.parts:
            raise ValueError(f"{archive} would write outside of its folder, to {name!r}; do not use it: it is not what "
                             "the makers of the data set publish.")


def _bar(archive: Path, total: int, progress: bool) -> tqdm:
    return tqdm(total=total, desc=f"unpacking {archive.name}", unit="B", unit_scale=True, disable=not progress,
                leave=False)

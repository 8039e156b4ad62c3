"""Data sets from the internet into the cache folder: known by checksum, whole or not there, safe to interrupt."""
from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pooch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from dealkit.datasets.download import Downloader
from dealkit.datasets.unpack import unpack

VARIABLE = "DEALKIT_DATA"
_INCOMING = ".incoming"       # folder of archives that came from the internet, until they are unpacked


@dataclass(frozen=True)
class Archive:
    """One file that a data set comes in.

    Args:
        urls: where it lies; the second is asked when the first fails.
        sha256: its checksum, in hexadecimal digits.
        size: bytes.
        unpacked: bytes on the disk when unpacked, about; for the check of free space.
        top: the folder in the archive that is kept.
    """

    urls: tuple[str, ...]
    sha256: str
    size: int
    unpacked: int
    top: str

    @property
    def name(self) -> str:
        return self.urls[0].rsplit("/", 1)[-1]


def cache_folder() -> Path:
    """Where data sets lie: the environment variable DEALKIT_DATA, or "dealkit" in the system's cache folder."""
    return Path(os.environ.get(VARIABLE) or pooch.os_cache("dealkit")).expanduser().absolute()


def fetch(name: str, archives: Sequence[Archive], folder: str | Path | None = None, download: bool = True,
          progress: bool = True) -> Path:
    """Make sure that a data set is there: download, check, unpack, whatever of it is still missing.

    An archive that somebody has put into the folder is used (and left there); one that was downloaded is deleted when
    it is unpacked. Several processes may call this at once: one works, the others wait.

    Args:
        name: of the data set, for messages and for its folder.
        archives: what it comes in.
        folder: None is `cache_folder() / name`.
        download: False refuses to use the network.
        progress: show bars.

    Returns:
        The folder, which holds the `top` of every archive.

    Raises:
        FileNotFoundError: `download` is False, and something is missing.
        ConnectionError: it cannot be downloaded; what came is kept for the next call.
        ValueError: a wrong checksum, also after it was fetched from the start; or see `unpack`.
        OSError: not enough space, or the folder cannot be written.
    """
    folder = cache_folder() / name if folder is None else Path(folder).expanduser().absolute()
    if not _missing(archives, folder):
        return folder
    if not download:
        raise FileNotFoundError(f"{name} is not in {folder}, and download is False. "
                                f"{by_hand(_missing(archives, folder), folder)}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder, name):
            _check_space(name, _missing(archives, folder), folder)
            for archive in _missing(archives, folder):
                _fetch_one(name, archive, folder, progress)
    except OSError as error:
        if type(error) is OSError or isinstance(error, PermissionError):        # ours say what to do already
            raise type(error)(f"{name} cannot be written to {folder}: {error}. Free some space, or set {VARIABLE} to a "
                              "folder that can be written.") from error
        raise
    return folder


def by_hand(archives: Sequence[Archive], folder: Path) -> str:
    """Sentences: how a person gets these archives without us."""
    names = " and ".join(archive.name for archive in archives)
    addresses = " and ".join(" or ".join(archive.urls) for archive in archives)
    return (f"By hand: download {addresses} and put {names} into {folder}; it is unpacked at the next call. Or unpack "
            f"it there yourself, so that there is {' and '.join(str(folder / archive.top) for archive in archives)}.")


def _missing(archives: Sequence[Archive], folder: Path) -> list[Archive]:
    return [archive for archive in archives if not (folder / archive.top).is_dir()]


class NoSpace(OSError):
    """Not enough space, known before anything is written."""


def _check_space(name: str, archives: Sequence[Archive], folder: Path) -> None:
    needed = 0
    for archive in archives:
        places = (folder / archive.name, folder / _INCOMING / archive.name, folder / f"{archive.name}.part")
        there = max(place.stat().st_size if place.exists() else 0 for place in places)
        needed += max(0, archive.size - there) + archive.unpacked
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise NoSpace(f"{name} needs {needed / 1e9:.2f} GB in {folder} (to download and to unpack), and "
                      f"{free / 1e9:.2f} GB are free. Free some, or set {VARIABLE} to a folder on a larger disk.")


@contextmanager
def _alone(folder: Path, name: str) -> Iterator[None]:
    """Hold the folder's lock, which the system takes back from a process that dies."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        tqdm.write(f"{name}: another process is fetching it into {folder}; waiting for it.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fetch_one(name: str, archive: Archive, folder: Path, progress: bool) -> None:
    path, incoming = folder / archive.name, folder / _INCOMING
    if not path.exists():
        path = _retrieve(name, archive, folder, progress)
    elif (digest := pooch.file_hash(str(path))) != archive.sha256:
        raise ValueError(f"{path} has the SHA-256 {digest}, and {archive.sha256} was expected: it is cut off, damaged "
                         "or another version. Delete it, and it is downloaded again.")
    unpack(path, archive.top, folder, progress)
    shutil.rmtree(incoming, ignore_errors=True)


def _retrieve(name: str, archive: Archive, folder: Path, progress: bool) -> Path:
    """Download an archive and check it. Wrong after a resume, it may be two files' halves: once more from the start.

    A whole one that a process left there, which was killed when it unpacked it, is taken as it is.
    """
    part, troubles, wrong = folder / f"{archive.name}.part", [], False
    for url in archive.urls:
        for _ in range(2):
            downloader = Downloader(part, progress)
            started = part.exists()
            try:
                return Path(pooch.retrieve(url, f"sha256:{archive.sha256}", archive.name, folder / _INCOMING,
                                           downloader=downloader))
            except ConnectionError as error:
                troubles.append(f"{url}: {error}")
                break
            except ValueError:                                        # pooch has removed the file
                again = started or downloader.resumed
                troubles.append(f"{url}: the checksum is wrong{', so it was fetched from the start' if again else ''}")
                wrong = True
                if not again:
                    break
    shutil.rmtree(folder / _INCOMING, ignore_errors=True)
    kind = ValueError if wrong else ConnectionError
    raise kind(f"{name}: {archive.name} could not be downloaded. {'; '.join(troubles)}. {by_hand([archive], folder)}")

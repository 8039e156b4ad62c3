"""One file over HTTP, gone on with where it broke off."""
from __future__ import annotations

import os
import re
import time
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from ssl import SSLError
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from tqdm.auto import tqdm

TRIES = 3                # in a row that bring nothing new, then it is given up
WAIT = 1.0               # seconds before the next try
TIMEOUT = 60             # seconds without a byte
_CHUNK = 1 << 20
_BROKEN = (URLError, HTTPException, ConnectionError, TimeoutError, SSLError)


class Downloader:
    """What pooch calls to fetch a file: resumes a broken download, from an earlier call or in this one.

    The bytes so far lie in `part`, which outlives the process, and is asked to be continued by `Range`. A server that
    does not know `Range` sends the file from its start, and so it is written. Whether the bytes are right is for the
    caller's checksum to say.

    Args:
        part: path of the unfinished file.
        progress: show a bar.

    Attributes:
        resumed: whether any bytes were put behind older ones.

    Raises (when called):
        ConnectionError: no connection, or it broke `TRIES` times without a new byte, or the server refused.
        OSError: the file cannot be written; no space.
    """

    def __init__(self, part: Path, progress: bool = True):
        self.part, self.progress, self.resumed = Path(part), progress, False

    def __call__(self, url: str, output: str, pooch: object = None) -> None:
        most, fruitless = self._have(), 0
        while fruitless < TRIES:
            try:
                if self._receive(url):
                    os.replace(self.part, output)
                    return
                trouble = "the connection broke off"
            except _BROKEN as error:
                if isinstance(error, HTTPError):
                    error.close()
                    if error.code < 500 and error.code not in (408, 429):
                        raise ConnectionError(f"the server answered {error.code} ({error.reason})") from error
                trouble = str(error) or type(error).__name__
            # more than ever before: a server without Range that breaks at the same byte must not keep us for ever
            fruitless = 0 if self._have() > most else fruitless + 1
            most = max(most, self._have())
            time.sleep(WAIT if fruitless < TRIES else 0)
        kept = f"; {self._have():,} bytes are kept, and the next call goes on from there" if self._have() else ""
        raise ConnectionError(trouble + kept)

    def _have(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _receive(self, url: str) -> bool:
        """Receive what one connection brings. Returns: is the file whole?"""
        have = self._have()
        headers = {"User-Agent": "dealkit", "Accept-Encoding": "identity"}
        try:
            reply = urlopen(Request(url, headers=headers | ({"Range": f"bytes={have}-"} if have else {})),
                            timeout=TIMEOUT)
        except HTTPError as error:
            if error.code != 416:                                     # 416: there is nothing behind what we have
                raise
            with error:
                if error.headers.get("Content-Range", "").endswith(f"/{have}"):
                    return True
            self.part.unlink()                                        # more than there is: not this file
            return self._receive(url)
        with reply:
            begins = _first_byte(reply) if reply.status == 206 else 0
            if begins not in (0, have):
                self.part.unlink()
                return False
            self.resumed |= 0 < begins
            length = reply.headers.get("Content-Length")
            total = begins + int(length) if length is not None else None
            with (self.part.open("ab" if begins else "wb") as file,
                  tqdm(total=total, initial=begins, desc=self.part.stem, unit="B", unit_scale=True,
                       disable=not self.progress, leave=False) as bar):
                while chunk := reply.read(_CHUNK):
                    bar.update(file.write(chunk))
        return total is None or self._have() == total


def _first_byte(reply: HTTPResponse) -> int:
    """Where a partial answer begins; -1 where it does not say."""
    found = re.match(r"bytes (\d+)-", reply.headers.get("Content-Range", ""))
    return int(found[1]) if found else -1

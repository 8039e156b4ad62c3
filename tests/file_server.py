"""A stand-in for the servers of data sets, on 127.0.0.1, which misbehaves on command.

    with FileServer({"birds.tgz": data}, breaks=[1000]) as server:      # breaks off after 1,000 bytes, once
        fetch(server.url("birds.tgz"))
"""
from __future__ import annotations

import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FileServer:
    """Serves `files` (name -> bytes); `asked` is the list of (name, Range header or None) of all requests.

    Args:
        files: what there is; may be changed while it runs.
        breaks: after how many bytes of a body the connection is cut, for one request after the other; None: not.
        ranges: does it know Range?
        status: what it answers instead of a file, for one request after the other (then files).
        pause: seconds before each body.
    """

    def __init__(self, files, breaks=(), ranges=True, status=(), pause=0.0):
        self.files, self.breaks, self.ranges, self.status = dict(files), list(breaks), ranges, list(status)
        self.asked, self.pause = [], pause
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"ours": self}))
        self._server.daemon_threads = True

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/{name}"

    def __enter__(self) -> FileServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    ours: FileServer

    def do_GET(self) -> None:
        ours, name, asked = self.ours, self.path.strip("/"), self.headers.get("Range")
        ours.asked.append((name, asked))
        if ours.status:
            return self.send_error(ours.status.pop(0))
        if name not in ours.files:
            return self.send_error(404)
        data, start = ours.files[name], 0
        if asked and ours.ranges:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            if start >= len(data):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(data)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        body, cut = data[start:], ours.breaks.pop(0) if ours.breaks else None
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if ours.pause:
            threading.Event().wait(ours.pause)
        self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *words) -> None:
        pass

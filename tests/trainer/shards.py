"""Shards made on the spot, and a web server that serves and fails as a test asks."""

from __future__ import annotations

import io
import re
import tarfile
import time
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
from PIL import Image

CUT_SECONDS = 0.1  # before a cut: what was sent arrives


def picture(number: int, size: int = 16) -> bytes:
    """Return a PNG file; each number has its own picture."""
    pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST).save(stream, "PNG")
    return stream.getvalue()


def tar(members: Mapping[str, bytes]) -> bytes:
    """Return a tar file."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as shard:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def shard(first: int, count: int, size: int = 16) -> bytes:
    """Return a shard of numbered samples; a sample's caption is its number."""
    members = {}
    for number in range(first, first + count):
        members[f"{number:05d}.png"] = picture(number, size)
        members[f"{number:05d}.txt"] = str(number).encode()
    return tar(members)


@dataclass
class Server:
    """What a web server has, and how it fails.

    Attributes:
        files: path -> content.
        ranges: True gives parts of files.
        cuts: numbers of the GET requests whose connection ends early: number n after n + 1 times ``cut_after`` bytes.
        states: HTTP states that are answered first, before anything is served.
        asked: the GET requests: path, first byte.
    """

    files: dict[str, bytes]
    ranges: bool = True
    cuts: Container[int] = ()
    cut_after: int = 0
    states: list[int] = field(default_factory=list)
    asked: list[tuple[str, int]] = field(default_factory=list)
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, server: Server, *arguments: object) -> None:
        self.served = server
        super().__init__(*arguments)  # type: ignore[arg-type]

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        served, content = self.served, self.served.files.get(self.path.partition("?")[0])
        state = served.states.pop(0) if served.states else 200 if content is not None else 404
        if state != 200 or content is None:
            self.send_response(state)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        found = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if served.ranges else None
        first, last = 0, len(content) - 1
        if found:
            first, last = int(found[1]), min(int(found[2] or last), last)
        part = content[first : last + 1]
        self.send_response(206 if found else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", f'"{hash(content):x}"')
        if found:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.end_headers()
        if not body:
            return
        number = len(served.asked)
        served.asked.append((self.path, first))
        if number not in served.cuts:
            self.wfile.write(part)
            return
        self.wfile.write(part[: served.cut_after * (number + 1)])
        self.wfile.flush()
        time.sleep(CUT_SECONDS)
        self.close_connection = True


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    """Serve inside the ``with`` block; ``server.url`` is set."""
    web = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, server))
    web.daemon_threads = True
    server.url = f"http://127.0.0.1:{web.server_address[1]}"
    thread = Thread(target=web.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        web.shutdown()
        web.server_close()

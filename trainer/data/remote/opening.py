"""Read files on web servers and in object stores, through fsspec. A lost connection is opened again where it was.

fsspec and the packages of the protocols are imported when the first URL is read.
"""

from __future__ import annotations

import importlib
import io
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import urlsplit

from ...errors import UserError
from .patterns import shown

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

WAITS = (1.0, 4.0, 16.0)  # seconds before another try
BLOCK = 4 << 20  # bytes of one request, where a server gives parts of a file
CONNECT_SECONDS, SILENT_SECONDS = 30.0, 60.0  # the most to wait for a connection, and for the next bytes
AGAIN = (408, 425, 429)  # HTTP states below 500 that pass: too slow, too early, too many requests
# Of a file, as the packages name them: the first that is there tells one content from another.
IDENTITIES = ("ETag", "etag", "generation", "LastModified", "Last-Modified", "last_modified", "updated", "mtime",
              "created")  # fmt: skip
PACKAGES = {
    "http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs",
    "abfs": "adlfs", "hf": "huggingface-hub", "oci": "ocifs", "sftp": "paramiko", "ssh": "paramiko",
}  # fmt: skip


class RemoteFile(io.RawIOBase):
    """A remote file, read once from its begin to its end. It survives lost connections.

    Reading raises UserError: the file is missing, or can't be read after all tries.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._file: Any = None
        self._info: Mapping[str, Any] | None = None
        self._position = 0
        self._whole = False  # the server gives no parts of files

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read the next bytes into ``buffer``, and return their number; 0 at the end."""
        content = with_retries(self.url, lambda: self._read(len(buffer)), self._drop)
        self._position += len(content)
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        """Close the connection."""
        self._drop()
        super().close()

    def _read(self, count: int) -> bytes:
        if self._file is None:
            self._open()
        try:
            if self._file.tell() != self._position:
                self._move()
            content: bytes = self._file.read(count)
        except ValueError as error:
            if self._whole or "range requests" not in str(error):
                raise
            self._whole = True
            self._drop()
            return self._read(count)
        size = None if self._info is None else self._info.get("size")
        if not content and count and size is not None and self._position < size:
            raise ConnectionError(f"the connection ended after {self._position} of {size} bytes")
        return content

    def _open(self) -> None:
        system, path = file_system(self.url)
        info = system.info(path)
        if self._info is not None and (before := identity(self._info)) != (now := identity(info)):
            raise UserError(
                f"data.path: {shown(self.url)} has changed while it was read (before: {before}, now: {now}); run again"
            )
        self._info = info
        self._file = system.open(path, "rb", block_size=0 if self._whole else BLOCK, cache_type="readahead")

    def _move(self) -> None:
        """Go to the present position: jump there, or read up to it where the server gives no parts of files."""
        try:
            self._file.seek(self._position)
            return
        except (ValueError, OSError, NotImplementedError):
            left = self._position - self._file.tell()
        if left < 0:
            self._drop()
            self._open()
            left = self._position
        while left > 0:
            content = self._file.read(min(left, BLOCK))
            if not content:
                raise ConnectionError(f"the connection ended {left} bytes before byte {self._position}")
            left -= len(content)

    def _drop(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except Exception as error:  # noqa: BLE001  # of a lost connection: the file is opened again
                logger.debug("closing %s: %s", shown(self.url), error)


def stamp_of(url: str) -> str | None:
    """Return a text that changes when the file changes, None where the server does not tell.

    Raises:
        UserError: the file is missing, or its server does not answer.
    """

    def ask() -> Mapping[str, Any]:
        system, path = file_system(url)
        found: Mapping[str, Any] = system.info(path)
        return found

    size, mark = identity(with_retries(url, ask))
    return None if size is None or mark is None else f"{shown(url)}\0{size}\0{mark}"


def identity(info: Mapping[str, Any]) -> tuple[int | None, str | None]:
    """Return size in bytes and a mark of the content (ETag or time), as far as a server tells them."""
    mark = next((str(info[name]) for name in IDENTITIES if info.get(name)), None)
    return info.get("size"), mark


def file_system(url: str) -> tuple[Any, str]:
    """Return fsspec's file system of a URL, and the path in it."""
    core = importlib.import_module("fsspec.core")
    options: dict[str, Any] = {}
    if urlsplit(url).scheme in ("http", "https"):
        aiohttp = importlib.import_module("aiohttp")
        # A shard may stay open for hours while training consumes it, so only silence ends a connection.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENT_SECONDS)
        options = {"client_kwargs": {"timeout": timeout, "trust_env": True}}
    found: tuple[Any, str] = core.url_to_fs(url, **options)
    return found


def with_retries(url: str, work: Callable[[], Result], reset: Callable[[], object] = lambda: None) -> Result:
    """Return the result of ``work``; where it fails in a way that may pass, wait and try again.

    Args:
        reset: called before each new try.

    Raises:
        UserError: names the URL and the reason.
    """
    for wait in (*WAITS, None):
        try:
            return work()
        except UserError:
            raise
        except Exception as error:
            cause = _cause(error)
            if wait is None or _stays(cause):
                raise UserError(_explained(url, cause, tries=len(WAITS))) from error
            logger.warning("%s: %s; trying again in %g s", shown(url), _reason(cause), wait)
        reset()
        time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def _cause(error: BaseException) -> BaseException:
    """Return the error behind fsspec's FileNotFoundError, which it raises for whatever a web server answers."""
    while isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _stays(error: BaseException) -> bool:
    """Return True for an error that no further try mends."""
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in AGAIN
    return isinstance(error, FileNotFoundError | PermissionError | ImportError) or _is_unknown_protocol(error)


def _is_unknown_protocol(error: BaseException) -> bool:
    return isinstance(error, ValueError) and "protocol not known" in str(error).lower()


def _explained(url: str, error: BaseException, tries: int) -> str:
    title, protocol = shown(url), urlsplit(url).scheme
    if isinstance(error, ImportError):
        package = PACKAGES.get(protocol)
        how = f"pip install {package}" if package else "install the package that fsspec names"
        return f"data.path: {title} needs a package that is not installed ({error}); {how}"
    if _is_unknown_protocol(error):
        return f"data.path: {title}: there is no protocol {protocol!r}; expected a path, or a URL such as https:// or s3://"
    if isinstance(error, FileNotFoundError) or getattr(error, "status", None) in (404, 410):
        return f"data.path: there is no file {title}; check the name and the numbers of the pattern"
    if isinstance(error, PermissionError) or getattr(error, "status", None) in (401, 403):
        return f"data.path: {title} may not be read ({_reason(error)}); check your account's keys and rights"
    again = "" if _stays(error) else f" after {tries} more tries"
    return f"data.path: {title} can't be read{again} ({_reason(error)}); check the connection and the server"


def _reason(error: BaseException) -> str:
    status = getattr(error, "status", None)
    text = " ".join(str(getattr(error, "message", "") if isinstance(status, int) else error).split())
    return " ".join(filter(None, (str(status) if isinstance(status, int) else "", text))) or type(error).__name__

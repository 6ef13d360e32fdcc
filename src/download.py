"""Download a file once, whole and checked, on lines that may be slow or break."""

import errno
import hashlib
import http.client
import os
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from tqdm import tqdm

from src.errors import UserError
from src.files import one_at_a_time

TIMEOUT = 10.0  # seconds to connect, and between two pieces of data
OPEN_DEADLINE = 12.0  # seconds from asking to the first answer, name look-up included
ATTEMPTS = 5  # connections in one call, as long as each brings something
BLOCK = 1 << 18  # bytes


def fetch(
    url: str,
    path: Path,
    *,
    algorithm: Literal["md5", "sha256"],
    digest: str,
    offline_hint: str,
) -> Path:
    """Return `path`, downloading it from `url` unless it is there with the right checksum.

    The bytes arrive in `<path>.part` and are renamed when length and checksum are right, so a file at `path`
    is always whole. A transfer that was cut off goes on where it stopped, in this call or in a later one.
    Several processes may ask for the same file: one downloads, the others wait.

    Args:
        url: An http, https or file address.
        path: Where the file shall stand; parent folders are made.
        algorithm: What the file's checksum is made with.
        digest: The expected checksum, or as many of its first hexadecimal digits as are known.
        offline_hint: What works without a network; ends the message when there is none.

    Raises:
        UserError: No network, a refusal by the server, a transfer cut off too often, a wrong length or
            checksum, or a folder that cannot be written to.
    """
    if _scheme(url) not in ("http", "https", "file"):
        raise UserError(f"cannot download {path.name}: {url!r} is no http, https or file URL; correct it")
    download = _Download(url, path, algorithm, digest, offline_hint)
    if download.is_done():
        return path
    lock = path.with_name(path.name + ".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(lock, f"downloading {path.name}"):
            if not download.is_done():
                download.run()
            # Whoever still waits for the removed lock, or makes a new one, finds the file done.
            lock.unlink(missing_ok=True)
    except OSError as error:
        advice = "free space there or choose another folder"
        raise UserError(f"cannot write {path}: {_reason(error)}; {advice}") from error
    return path


def _scheme(url: str) -> str:
    try:
        return urlsplit(url).scheme
    except ValueError:  # such as a bracket that nothing closes
        return ""


class _Interrupted(Exception):
    """The connection failed while data was arriving."""


@dataclass(frozen=True)
class _Download:
    url: str
    path: Path
    algorithm: str
    digest: str
    offline_hint: str

    @property
    def part(self) -> Path:
        return self.path.with_name(self.path.name + ".part")

    def is_done(self) -> bool:
        return self.path.is_file() and self._fits(self.path)

    def run(self) -> None:
        for attempt in range(1, ATTEMPTS + 1):
            before = self._arrived()
            try:
                self._transfer()
                break
            except _Interrupted as error:
                if attempt == ATTEMPTS or self._arrived() <= before:
                    raise UserError(
                        f"the download of {self.url} was cut off ({error}) after {self._arrived():,} bytes, "
                        f"kept in {self.part}; run the same command again to continue"
                    ) from error
        if not self._fits(self.part):
            size = self._arrived()
            self.part.unlink()
            raise UserError(
                f"{self.url} has the wrong checksum ({size:,} bytes, removed); "
                "run again to download afresh, or choose another URL"
            )
        with self.part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(self.part, self.path)

    def _fits(self, path: Path) -> bool:
        with path.open("rb") as file:
            return hashlib.file_digest(file, self.algorithm).hexdigest().startswith(self.digest.lower())

    def _arrived(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _transfer(self) -> None:
        """Append what is missing to the part file, or write it anew if the server cannot continue."""
        offset = self._arrived()
        try:
            response = self._open(offset)
        except HTTPError as error:
            error.close()
            if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE or not offset:
                raise self._unreachable(f"the server answered {error.code} {error.reason}") from error
            if not self._fits(self.part):
                self._restart()
            return
        with response:
            start = _first_byte(response)
            if start not in (0, offset):
                return self._restart()
            length = response.headers.get("Content-Length")
            total = start + int(length) if length else None
            with self.part.open("ab" if start else "wb") as file, self._progress(start, total) as bar:
                for block in _blocks(response):
                    file.write(block)
                    bar.update(len(block))
        if total is not None and self._arrived() < total:
            raise _Interrupted(f"{total:,} bytes were announced")

    def _progress(self, start: int, total: int | None) -> Any:
        """Return a bar that shows on terminals only."""
        name = self.path.name
        return tqdm(initial=start, total=total, unit="B", unit_scale=True, desc=name, disable=None)

    def _restart(self) -> None:
        self.part.unlink()
        self._transfer()

    def _open(self, offset: int) -> Any:
        """Send the request and return the response, or raise within OPEN_DEADLINE.

        A socket's time limit covers neither the look-up of a name nor a host with several addresses, hence
        the thread.
        """
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        request = Request(self.url, headers=headers)
        answer: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def ask() -> None:
            try:
                answer.put(urlopen(request, timeout=TIMEOUT))
            except Exception as error:
                answer.put(error)

        threading.Thread(target=ask, daemon=True).start()
        try:
            response = answer.get(timeout=OPEN_DEADLINE)
        except queue.Empty:
            raise self._unreachable(f"no answer within {OPEN_DEADLINE:.0f} s") from None
        if isinstance(response, HTTPError):
            raise response
        if isinstance(response, Exception):
            raise self._unreachable(_reason(response)) from response
        return response

    def _unreachable(self, reason: str) -> UserError:
        state = "has the wrong checksum" if self.path.exists() else "is not there"
        if arrived := self._arrived():
            state += f" ({arrived:,} bytes of it are kept in {self.part.name} to continue from)"
        return UserError(f"{self.path} {state} and {self.url} cannot be had: {reason}; offline: {self.offline_hint}")


def _first_byte(response: Any) -> int:
    """Return the position in the file at which the response begins: 0 unless it answers a Range request."""
    if getattr(response, "status", None) != http.client.PARTIAL_CONTENT:
        return 0
    span = response.headers.get("Content-Range", "")  # "bytes 100-199/200"
    start = span.removeprefix("bytes ").partition("-")[0]
    return int(start) if start.isdigit() else -1


def _blocks(response: Any) -> Iterator[bytes]:
    """Yield data as it arrives; `read1` does not wait for a full block, so a cut loses nothing that came."""
    while True:
        try:
            block = response.read1(BLOCK)
        except (OSError, http.client.HTTPException) as error:
            raise _Interrupted(_reason(error)) from error
        if not block:
            return
        yield block


def _reason(error: BaseException) -> str:
    if isinstance(error, URLError) and isinstance(error.reason, BaseException):
        return _reason(error.reason)
    if isinstance(error, OSError) and error.errno in errno.errorcode and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__

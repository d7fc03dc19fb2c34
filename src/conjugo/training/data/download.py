"""Download of one file over HTTP: continued where it stopped, checked by MD5, in place only when whole."""

from __future__ import annotations

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from conjugo._files import alone_in
from conjugo.errors import CorruptFile, DataUnavailable

__all__ = ["Progress", "download", "md5"]

Progress = Callable[[int, int | None], None]  # bytes so far, bytes in all if the server tells

_ATTEMPTS = 5  # in a row that bring nothing new
_TIMEOUT = 30.0  # seconds without a byte
_PAUSE = 1.0  # seconds before the second attempt; doubles
_CHUNK = 1 << 18
_CONNECTION_ERRORS = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)


def md5(path: Path) -> str:
    """Hexadecimal MD5 of a file: the checksum that the data's authors publish, against damage, not against malice."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def download(url: str, path: Path, *, checksum: str, progress: Progress | None = None) -> None:
    """Bring *url* to *path*; what arrived so far waits in ``<path>.part`` and is continued, now or by the next call.

    checksum: hexadecimal MD5 of the whole file. progress: called with (bytes so far, bytes in all or None).

    Raises DataUnavailable when the server cannot be reached or refuses, the connection keeps breaking or there is no
    space left; CorruptFile when the file that arrived, from its first byte on, does not have the checksum. An existing
    *path* that has the checksum stays as it is, another one is replaced, on success only. Of several processes one
    downloads, the others wait for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with alone_in(path.parent):
        if not path.is_file() or md5(path) != checksum:
            _download(url, path, checksum, progress)


def _download(url: str, path: Path, checksum: str, progress: Progress | None) -> None:
    part = path.with_name(path.name + ".part")
    furthest = _size(part)
    failures = 0
    while True:
        have = _size(part)
        reason = _attempt(url, part, have, progress)
        if reason is None:
            actual = md5(part)
            if actual == checksum:
                os.replace(part, path)
                return
            # Without this the next attempt would continue the damaged file.
            part.unlink()
            reason = CorruptFile(f"{url}: MD5 should be {checksum}, is {actual}; the download was thrown away")
            if have == 0:
                raise reason
        failures = failures + 1 if _size(part) <= furthest else 0
        furthest = max(furthest, _size(part))
        if failures == _ATTEMPTS:
            message = f"{url}: {_ATTEMPTS} attempts in a row brought nothing ({reason}); run again to continue"
            raise DataUnavailable(message) from reason
        time.sleep(_PAUSE * 2 ** max(failures - 1, 0))


def _attempt(url: str, part: Path, have: int, progress: Progress | None) -> Exception | None:
    """One transfer: None, or why it may be worth another; DataUnavailable when it is not."""
    try:
        _transfer(url, part, have, progress)
    except urllib.error.HTTPError as error:
        if error.code < 500:
            raise DataUnavailable(f"{url}: the server answers {error.code} {error.reason}") from error
        return error
    except _CONNECTION_ERRORS as error:
        return error
    except OSError as error:
        message = f"{part} cannot be written ({error.strerror or error}); run again to continue what is there"
        raise DataUnavailable(message) from error
    return None


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _transfer(url: str, part: Path, have: int, progress: Progress | None) -> None:
    """One attempt: append what is missing, or begin anew when the server does not do ranges."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # nothing follows what we have: the checksum decides
        raise
    with response:
        continued = response.status == http.HTTPStatus.PARTIAL_CONTENT
        done = have if continued else 0
        length = response.headers.get("Content-Length")
        total = None if length is None else done + int(length)
        with part.open("ab" if continued else "wb") as file:
            for chunk in _received(response):
                file.write(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(done, total)
            file.flush()
            os.fsync(file.fileno())
    if total is not None and done < total:
        raise ConnectionError(f"connection lost after {done} of {total} bytes")


def _received(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """What arrives; every failure is an error of the connection, to be told from those of the disk."""
    try:
        while chunk := response.read(_CHUNK):
            yield chunk
    except OSError as error:
        raise ConnectionError(f"connection lost ({error})") from error

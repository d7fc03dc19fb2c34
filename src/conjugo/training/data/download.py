"""Download of one file over HTTP: continued where it stopped, checked by MD5, in place only when whole."""

from __future__ import annotations

import hashlib
import http.client
import os
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from conjugo._files import alone_in
from conjugo.errors import CorruptFile, DataUnavailable

__all__ = ["Progress", "download", "md5"]

Progress = Callable[[int, int | None], None]  # bytes so far, bytes in all if the server tells

_ATTEMPTS = 5
_TIMEOUT = 30.0  # seconds without a byte
_PAUSE = 1.0  # seconds before the second attempt; doubles
_CHUNK = 1 << 18
_CONNECTION_ERRORS = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


def md5(path: Path) -> str:
    """Hexadecimal MD5 of a file: the checksum that the data's authors publish, against damage, not against malice."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def download(url: str, path: Path, *, checksum: str, progress: Progress | None = None) -> None:
    """Bring *url* to *path*; what arrived so far waits in ``<path>.part`` and is continued, now or by the next call.

    checksum: hexadecimal MD5 of the whole file. progress: called with (bytes so far, bytes in all or None).

    Raises DataUnavailable when the server cannot be reached or refuses, or the connection keeps breaking; CorruptFile
    when the file that arrived, from its first byte on, does not have the checksum. An existing *path* is replaced only
    on success. Of several processes one downloads, the others wait for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with alone_in(path.parent):
        if not path.is_file() or md5(path) != checksum:
            _download(url, path, checksum, progress)


def _download(url: str, path: Path, checksum: str, progress: Progress | None) -> None:
    part = path.with_name(path.name + ".part")
    reason: Exception | None = None
    for attempt in range(_ATTEMPTS):
        if reason is not None:
            time.sleep(_PAUSE * 2 ** (attempt - 1))
        have = part.stat().st_size if part.exists() else 0
        try:
            _transfer(url, part, have, progress)
        except urllib.error.HTTPError as error:
            if error.code < 500:
                raise DataUnavailable(f"{url}: the server answers {error.code} {error.reason}") from error
            reason = error
            continue
        except _CONNECTION_ERRORS as error:
            reason = error
            continue
        actual = md5(part)
        if actual == checksum:
            os.replace(part, path)
            return
        # Without this the next attempt would continue the damaged file.
        part.unlink()
        reason = CorruptFile(f"{url}: MD5 should be {checksum}, is {actual}; the download was thrown away")
        if have == 0:
            raise reason
    raise DataUnavailable(f"{url}: no success after {_ATTEMPTS} attempts ({reason}); run again to continue") from reason


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
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(done, total)
            file.flush()
            os.fsync(file.fileno())
    if total is not None and done < total:
        raise ConnectionError(f"connection lost after {done} of {total} bytes")

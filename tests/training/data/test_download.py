"""Downloads from a server on this machine: continued, checked, in place only when whole."""

import errno
import hashlib
import http.client
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tests.training.data.sources import trust

from conjugo.errors import CorruptFile, DataUnavailable
from conjugo.training import data
from conjugo.training.data import archives
from conjugo.training.data import download as downloads

CONTENT = bytes(i * i % 251 for i in range(200_000))
CHECKSUM = hashlib.md5(CONTENT).hexdigest()


@dataclass
class Server:
    """What the server does, and what it was asked for.

    cuts: after how many bytes to break the connection, request by request; then no more. answers: status codes to give
    instead of the file, request by request.
    """

    url: str
    content: bytes = CONTENT
    ranges: bool = True
    length: bool = True
    cuts: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    requests: list[str | None] = field(default_factory=list)


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setattr(downloads, "_PAUSE", 0.001)
    monkeypatch.setenv("no_proxy", "*")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            wanted = self.headers.get("Range")
            state.requests.append(wanted)
            if state.answers:
                return self.send_error(state.answers.pop(0))
            start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and state.ranges else 0
            if start and start >= len(state.content):
                return self.send_error(416)
            self.send_response(206 if start else 200)
            body = state.content[start:]
            if state.length:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: state.cuts.pop(0)] if state.cuts else body)
            return None

        def log_message(self, *_):
            pass

    http_server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = Server(f"http://127.0.0.1:{http_server.server_port}/file.tar.gz")
    thread = threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    http_server.shutdown()
    thread.join()
    http_server.server_close()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "file.tar.gz"


def names(path):
    return sorted(p.name for p in path.parent.iterdir())


@pytest.mark.parametrize("length", [True, False])
def test_a_file_arrives_whole_and_progress_is_told(server, path, length):
    server.length = length
    told = []
    downloads.download(server.url, path, checksum=CHECKSUM, progress=lambda *a: told.append(a))
    assert path.read_bytes() == CONTENT
    assert names(path) == ["file.tar.gz"]
    assert told[-1] == (len(CONTENT), len(CONTENT) if length else None)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert server.requests == [None]


def test_a_broken_connection_is_continued(server, path):
    server.cuts = [70_000, 30_000]
    told = []
    downloads.download(server.url, path, checksum=CHECKSUM, progress=lambda *a: told.append(a))
    assert path.read_bytes() == CONTENT
    assert server.requests == [None, "bytes=70000-", "bytes=100000-"]
    assert all(total == len(CONTENT) for _, total in told)
    assert told[-1][0] == len(CONTENT)


def test_the_next_call_continues(server, path):
    """As after a killed process: what is in .part is not asked for again."""
    path.parent.mkdir()
    path.with_name("file.tar.gz.part").write_bytes(CONTENT[:123_456])
    downloads.download(server.url, path, checksum=CHECKSUM)
    assert path.read_bytes() == CONTENT
    assert server.requests == ["bytes=123456-"]
    assert names(path) == ["file.tar.gz"]


def test_a_whole_part_needs_no_more_bytes(server, path):
    path.parent.mkdir()
    path.with_name("file.tar.gz.part").write_bytes(CONTENT)
    downloads.download(server.url, path, checksum=CHECKSUM)
    assert path.read_bytes() == CONTENT


def test_it_goes_on_as_long_as_something_arrives(server, path):
    server.cuts = [10_000] * 15
    downloads.download(server.url, path, checksum=CHECKSUM)
    assert path.read_bytes() == CONTENT
    assert len(server.requests) == 16


def test_without_ranges_what_arrives_again_is_nothing_new(server, path):
    server.ranges = False
    server.cuts = [50_000, 10_000, 20_000, 30_000, 40_000, 50_000]
    with pytest.raises(DataUnavailable, match="5 attempts in a row brought nothing"):
        downloads.download(server.url, path, checksum=CHECKSUM)
    assert len(server.requests) == 6


class Disk:
    """A file on a disk that has *space* bytes left."""

    space = 0

    def __init__(self, file):
        self.file = file

    def write(self, chunk):
        if self.space < len(chunk):
            self.file.write(chunk[: self.space])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        Disk.space -= len(chunk)
        return self.file.write(chunk)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_full_disk_is_an_error_at_once_and_what_arrived_is_continued(server, path, monkeypatch):
    path.parent.mkdir()
    path.write_bytes(b"old file")
    with monkeypatch.context() as full:
        full.setattr(downloads, "_CHUNK", 1000)
        full.setattr(Disk, "space", 70_500)
        real = Path.open
        full.setattr(Path, "open", lambda p, mode="r": Disk(real(p, mode)) if p.suffix == ".part" else real(p, mode))
        with pytest.raises(DataUnavailable, match=r"file\.tar\.gz\.part cannot be written \(No space left on device\)"):
            downloads.download(server.url, path, checksum=CHECKSUM)
    assert len(server.requests) == 1
    assert path.read_bytes() == b"old file"
    assert (
        path.with_name("file.tar.gz.part").read_bytes() == CONTENT[: path.with_name("file.tar.gz.part").stat().st_size]
    )
    downloads.download(server.url, path, checksum=CHECKSUM)
    assert server.requests[1].startswith("bytes=70")
    assert path.read_bytes() == CONTENT
    assert names(path) == ["file.tar.gz"]


def test_a_network_that_goes_down_is_not_taken_for_a_full_disk(server, path, monkeypatch):
    """No route to the host, in the middle, is an OSError like that of a disk."""
    real = http.client.HTTPResponse.read
    failures = [OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH))]

    def read(response, *size):
        if failures:
            raise failures.pop()
        return real(response, *size)

    monkeypatch.setattr(http.client.HTTPResponse, "read", read)
    downloads.download(server.url, path, checksum=CHECKSUM)
    assert path.read_bytes() == CONTENT
    assert len(server.requests) == 2


def test_a_server_without_ranges_begins_anew(server, path):
    server.ranges = False
    server.cuts = [50_000]
    downloads.download(server.url, path, checksum=CHECKSUM)
    assert path.read_bytes() == CONTENT
    assert server.requests == [None, "bytes=50000-"]


def test_a_damaged_part_is_thrown_away_and_fetched_again(server, path):
    path.parent.mkdir()
    path.with_name("file.tar.gz.part").write_bytes(b"x" * 1000)
    downloads.download(server.url, path, checksum=CHECKSUM)
    assert path.read_bytes() == CONTENT
    assert server.requests == ["bytes=1000-", None]


def test_a_part_longer_than_the_file_is_thrown_away(server, path):
    path.parent.mkdir()
    path.with_name("file.tar.gz.part").write_bytes(CONTENT + b"more")
    downloads.download(server.url, path, checksum=CHECKSUM)
    assert path.read_bytes() == CONTENT


def test_a_wrong_checksum_is_an_error_and_the_old_file_stays(server, path):
    path.parent.mkdir()
    path.write_bytes(b"good old file")
    server.content = CONTENT[:-1] + b"!"
    with pytest.raises(CorruptFile, match=f"MD5 should be {CHECKSUM}, is .*thrown away") as caught:
        downloads.download(server.url, path, checksum=CHECKSUM)
    assert server.url in str(caught.value)
    assert path.read_bytes() == b"good old file"
    assert names(path) == ["file.tar.gz"]
    assert len(server.requests) == 1


def test_of_several_at_once_one_downloads(server, path):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: downloads.download(server.url, path, checksum=CHECKSUM), range(4)))
    assert path.read_bytes() == CONTENT
    assert server.requests == [None]


def test_not_found_is_an_error_at_once(server, path):
    server.answers = [404]
    with pytest.raises(DataUnavailable, match="the server answers 404"):
        downloads.download(server.url, path, checksum=CHECKSUM)
    assert names(path) == []
    assert len(server.requests) == 1


def test_a_server_in_trouble_is_asked_again(server, path):
    server.answers = [503, 500]
    downloads.download(server.url, path, checksum=CHECKSUM)
    assert path.read_bytes() == CONTENT
    assert len(server.requests) == 3


def test_it_gives_up_and_keeps_what_arrived(server, path):
    server.cuts = [10_000] * 5 + [0] * 5
    with pytest.raises(
        DataUnavailable, match=r"5 attempts in a row brought nothing .*50000 of 200000 bytes.*run again"
    ):
        downloads.download(server.url, path, checksum=CHECKSUM)
    assert path.with_name("file.tar.gz.part").read_bytes() == CONTENT[:50_000]
    downloads.download(server.url, path, checksum=CHECKSUM)
    assert path.read_bytes() == CONTENT


def test_a_breakdown_in_the_middle_of_progress_keeps_what_arrived(server, path):
    """Ctrl-C arrives anywhere; the callback stands for it."""

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        downloads.download(server.url, path, checksum=CHECKSUM, progress=interrupt)
    assert names(path) == ["file.tar.gz.part"]
    downloads.download(server.url, path, checksum=CHECKSUM)
    assert path.read_bytes() == CONTENT


def test_nobody_there(monkeypatch, path):
    monkeypatch.setattr(downloads, "_PAUSE", 0.001)
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(DataUnavailable, match="5 attempts in a row brought nothing"):
        downloads.download("http://127.0.0.1:9/file", path, checksum=CHECKSUM)


def test_fetch_puts_the_archive_where_load_looks(monkeypatch, server, tmp_path, user_cache):
    source = tmp_path / "source"
    source.write_bytes(CONTENT)
    trust(monkeypatch, "cifar10", source)
    file = archives.ARCHIVES["cifar10"].file
    assert data.fetch("cifar10", url=server.url) == user_cache / "data" / "cifar10" / file
    assert data.fetch("cifar10", tmp_path / "root", url=server.url) == tmp_path / "root" / file
    monkeypatch.setenv("CONJUGO_DATA", str(tmp_path / "room"))
    assert data.fetch("cifar10", url=server.url) == tmp_path / "room" / "cifar10" / file
    assert len(server.requests) == 3
    # It is there: nothing to do.
    data.fetch("cifar10", url=server.url)
    assert len(server.requests) == 3
    with pytest.raises(CorruptFile, match="not a CIFAR archive"):  # but found
        data.load("cifar10")


def test_fetch_replaces_a_damaged_archive_once_the_new_one_is_whole(monkeypatch, server, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(CONTENT)
    trust(monkeypatch, "cifar10", source)
    archive = tmp_path / "root" / archives.ARCHIVES["cifar10"].file
    archive.parent.mkdir()
    archive.write_bytes(b"damaged")
    server.answers = [404]
    with pytest.raises(DataUnavailable, match="404"):
        data.fetch("cifar10", archive.parent, url=server.url)
    assert archive.read_bytes() == b"damaged"
    assert data.fetch("cifar10", archive.parent, url=server.url) == archive
    assert archive.read_bytes() == CONTENT


def test_load_downloads_only_when_asked(monkeypatch, server, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(CONTENT)
    trust(monkeypatch, "cifar10", source)
    monkeypatch.setattr(archives.Archive, "url", server.url)
    with pytest.raises(DataUnavailable, match="conjugo data fetch cifar10"):
        data.load("cifar10", root=tmp_path)
    assert not server.requests
    with pytest.raises(CorruptFile, match="not a CIFAR archive"):
        data.load("cifar10", root=tmp_path, download=True)
    assert server.requests == [None]

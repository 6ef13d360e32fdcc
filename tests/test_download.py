"""`fetch` against a real server on the loopback interface that can be told to misbehave."""

import hashlib
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from server import Server, serving

from src import download
from src.download import fetch
from src.errors import UserError

CONTENT = bytes(range(256)) * 1000
MD5 = hashlib.md5(CONTENT).hexdigest()
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(CONTENT) as server:
        yield server


def get(server: Server, path: Path) -> Path:
    return fetch(server.url, path, algorithm="md5", digest=MD5, offline_hint="use the sample")


def part_of(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def test_whole_file_arrives_and_nothing_else_stays(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.bin"
    assert get(server, path) == path
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]


def test_file_with_the_right_checksum_is_not_asked_for(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(CONTENT)
    get(server, path)
    fetch(server.url, path, algorithm="sha256", digest=SHA256[:8], offline_hint="")
    assert server.ranges_asked == []


@pytest.mark.parametrize(("algorithm", "digest"), [("md5", MD5), ("sha256", SHA256[:8].upper())])
def test_file_with_a_wrong_checksum_is_replaced(server: Server, tmp_path: Path, algorithm: Any, digest: str) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"damaged")
    fetch(server.url, path, algorithm=algorithm, digest=digest, offline_hint="")
    assert path.read_bytes() == CONTENT


def test_cut_transfer_continues_in_the_same_call(server: Server, tmp_path: Path) -> None:
    server.cut = 100_000
    path = get(server, tmp_path / "file.bin")
    assert path.read_bytes() == CONTENT
    assert server.ranges_asked == [None, "bytes=100000-", "bytes=200000-"]


def test_transfer_cut_too_often_continues_in_the_next_call(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    server.cut = 1000
    with pytest.raises(UserError, match=r"cut off .* after 5,000 bytes.*run the same command again"):
        get(server, path)
    assert not path.exists()
    server.cut = None
    get(server, path)
    assert path.read_bytes() == CONTENT
    assert server.ranges_asked[5:] == ["bytes=5000-"]


def test_transfer_without_progress_is_not_repeated(server: Server, tmp_path: Path) -> None:
    server.cut = 0
    with pytest.raises(UserError, match="after 0 bytes"):
        get(server, tmp_path / "file.bin")
    assert len(server.ranges_asked) == 1


@pytest.mark.parametrize("piece", [CONTENT[:1000], b"x" * len(CONTENT), b"x" * (len(CONTENT) + 1)])
def test_server_that_cannot_continue_sends_the_file_anew(server: Server, tmp_path: Path, piece: bytes) -> None:
    server.ranges = len(piece) >= len(CONTENT)  # then it answers 416
    path = tmp_path / "file.bin"
    part_of(path).write_bytes(piece)
    get(server, path)
    assert path.read_bytes() == CONTENT
    assert server.ranges_asked[0] == f"bytes={len(piece)}-"


@pytest.mark.parametrize("shift", [-100, 100])
def test_server_that_continues_elsewhere_sends_the_file_anew(server: Server, tmp_path: Path, shift: int) -> None:
    server.shift = shift
    path = tmp_path / "file.bin"
    part_of(path).write_bytes(CONTENT[:1000])
    get(server, path)
    assert path.read_bytes() == CONTENT
    assert server.ranges_asked == ["bytes=1000-", None]


def test_whole_piece_is_only_renamed(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    part_of(path).write_bytes(CONTENT)
    get(server, path)
    assert path.read_bytes() == CONTENT
    assert len(server.ranges_asked) == 1


def test_wrong_checksum_is_refused_and_leaves_nothing(server: Server, tmp_path: Path) -> None:
    server.content = CONTENT[:-1] + b"!"
    path = tmp_path / "file.bin"
    with pytest.raises(UserError, match="wrong checksum"):
        get(server, path)
    assert not path.exists()
    assert not part_of(path).exists()


def test_many_at_once_download_once(server: Server, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: get(server, tmp_path / "file.bin"), range(4)))
    assert {path.read_bytes() for path in paths} == {CONTENT}
    assert len(server.ranges_asked) == 1


def test_no_server_names_path_url_and_what_works_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/file.bin"
    path = tmp_path / "file.bin"
    with pytest.raises(UserError) as refusal:
        fetch(url, path, algorithm="md5", digest=MD5, offline_hint="use the sample")
    message = str(refusal.value)
    assert "\n" not in message
    assert all(part in message for part in (str(path), url, "refused", "use the sample"))


def test_silent_server_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "TIMEOUT", 60)
    monkeypatch.setattr(download, "OPEN_DEADLINE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/file.bin"
        with pytest.raises(UserError, match="no answer within"):
            fetch(url, tmp_path / "file.bin", algorithm="md5", digest=MD5, offline_hint="")


def test_server_that_stalls_in_the_middle_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    path = tmp_path / "file.bin"
    with socket.create_server(("127.0.0.1", 0)) as stalling:
        head = threading.Thread(target=_answer_half, args=(stalling,))
        head.start()
        with pytest.raises(UserError):
            fetch(f"http://127.0.0.1:{stalling.getsockname()[1]}/", path, algorithm="md5", digest=MD5, offline_hint="")
        head.join()
    assert part_of(path).read_bytes() == b"half"


def _answer_half(listener: socket.socket) -> None:
    first, _ = listener.accept()
    with first:
        first.recv(4096)
        first.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nhalf")
        listener.settimeout(10)  # or a download that is not tried again would have the test wait for ever
        second, _ = listener.accept()
        second.close()


def test_refusal_by_the_server_is_told(server: Server, tmp_path: Path) -> None:
    server.refusal = 403
    with pytest.raises(UserError, match=r"answered 403 Forbidden.*use the sample"):
        get(server, tmp_path / "file.bin")


def test_file_url_is_copied(tmp_path: Path) -> None:
    original = tmp_path / "original.bin"
    original.write_bytes(CONTENT)
    path = fetch(original.as_uri(), tmp_path / "file.bin", algorithm="md5", digest=MD5, offline_hint="")
    assert path.read_bytes() == CONTENT
    with pytest.raises(UserError, match=r"missing\.bin cannot be had"):
        fetch((tmp_path / "missing.bin").as_uri(), tmp_path / "other.bin", algorithm="md5", digest=MD5, offline_hint="")


@pytest.mark.parametrize("url", ["file.bin", "ftp://127.0.0.1/file.bin"])
def test_other_urls_are_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no http, https or file URL"):
        fetch(url, tmp_path / "file.bin", algorithm="md5", digest=MD5, offline_hint="")


def test_folder_that_cannot_be_made_is_an_error_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where a folder should be")
    path = tmp_path / "taken" / "file.bin"
    with pytest.raises(UserError, match="cannot write"):
        fetch((tmp_path / "taken").as_uri(), path, algorithm="md5", digest=MD5, offline_hint="")

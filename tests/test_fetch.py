"""Downloads from a server on this machine that resumes, truncates, lies and dies."""

from __future__ import annotations

import errno
import gzip
import hashlib
import multiprocessing
import os
import shutil
import socket
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from event_files import recording, write_atis

from snnbench.data import fetch
from snnbench.data.fetch import Remote, download, extract
from snnbench.data.official import contents, misfits
from snnbench.data.recordings import NMNIST
from snnbench.data.vision import MNIST
from snnbench.errors import DataError, ExitCode

CONTENT = bytes(range(256)) * 3_000
MD5 = hashlib.md5(CONTENT).hexdigest()


@dataclass
class Host:
    """A server; the path chooses its manners. It remembers every request's path and range."""

    address: str
    seen: list[tuple[str, str | None]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)

    def url(self, manners: str) -> str:
        return f"{self.address}/{manners}"


@pytest.fixture
def host() -> Iterator[Host]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            manners, wanted = self.path.strip("/"), self.headers.get("Range")
            known.seen.append((manners, wanted))
            content = known.files.get(manners, CONTENT)
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
            if manners == "firewall":
                self.answer(202, b"")
            elif manners == "page":
                self.answer(200, b"<html>prove that you are human</html>", kind="text/html")
            elif manners == "empty":
                self.answer(200, b"")
            elif manners == "gone":
                self.answer(404, b"")
            elif manners == "other":
                self.answer(200, CONTENT[::-1])
            elif manners == "longer":
                self.answer(200, CONTENT + b"more")
            elif manners == "truncates":
                self.answer(200, content[:100_000], length=len(content))
            elif manners == "no-range":
                self.answer(200, content)
            elif manners == "dies":  # 200,000 bytes at a time, then the line goes dead
                self.part(content, start, 200_000)
            elif start >= len(content):
                self.answer(416, b"")
            else:
                self.part(content, start, len(content))

        def part(self, content: bytes, start: int, most: int) -> None:
            status = 206 if start else 200
            self.send_response(status)
            self.send_header("Content-Length", str(len(content) - start))
            if start:
                total = len(content)
                self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
            self.end_headers()
            self.wfile.write(content[start : start + most])
            if most < len(content) - start:
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)

        def answer(
            self, status: int, body: bytes, kind: str = "application/zip", length: int | None = None
        ) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body) if length is None else length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    known = Host(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield known
    server.shutdown()
    server.server_close()
    thread.join()


def remote(host: Host, *manners: str, size: int | None = len(CONTENT), md5: str = MD5) -> Remote:
    return Remote("set.zip", md5, tuple(host.url(m) for m in manners), size)


def part(folder: Path) -> Path:
    return folder / "set.zip.part"


def test_a_file_comes_whole_and_only_once(host: Host, tmp_path: Path) -> None:
    told: list[tuple[str, int, int | None]] = []
    path = download(remote(host, "good"), tmp_path / "new", lambda *seen: told.append(seen))
    assert path == tmp_path / "new" / "set.zip"
    assert path.read_bytes() == CONTENT
    assert not part(path.parent).exists()
    assert told[-1] == ("set.zip", len(CONTENT), len(CONTENT))
    download(remote(host, "good"), path.parent)
    assert host.seen == [("good", None)]


def test_a_part_is_gone_on_with(host: Host, tmp_path: Path) -> None:
    part(tmp_path).write_bytes(CONTENT[:1234])
    assert download(remote(host, "good"), tmp_path).read_bytes() == CONTENT
    assert host.seen == [("good", "bytes=1234-")]


def test_a_server_without_ranges_begins_anew(host: Host, tmp_path: Path) -> None:
    part(tmp_path).write_bytes(CONTENT[:1234])
    assert download(remote(host, "no-range"), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("size", [len(CONTENT), None])
def test_a_part_that_is_complete_is_only_checked(
    host: Host, tmp_path: Path, size: int | None
) -> None:
    part(tmp_path).write_bytes(CONTENT)
    assert download(remote(host, "good", size=size), tmp_path).read_bytes() == CONTENT
    assert len(host.seen) == (0 if size else 1)


def test_a_connection_that_dies_is_taken_up_again(host: Host, tmp_path: Path) -> None:
    assert download(remote(host, "dies"), tmp_path).read_bytes() == CONTENT
    assert [wanted for _, wanted in host.seen] == [
        None, "bytes=200000-", "bytes=400000-", "bytes=600000-",
    ]  # fmt: skip


def test_what_came_is_kept_when_all_addresses_fail(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "ATTEMPTS", 2)
    with pytest.raises(DataError) as caught:
        download(remote(host, "dies", "gone"), tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert "the connection broke after 400,000 of 768,000 bytes, 2 times" in message
    assert "404" in message
    assert f"400,000 bytes are kept in {part(tmp_path)}" in message
    assert caught.value.exit_code == ExitCode.DATA
    assert download(remote(host, "good"), tmp_path).read_bytes() == CONTENT
    assert host.seen[-1] == ("good", "bytes=400000-")


def test_a_truncated_answer_is_noticed(host: Host, tmp_path: Path) -> None:
    # It cannot resume and always sends the same beginning: given up, not tried for ever.
    with pytest.raises(DataError, match=r"broke after 100,000 of 768,000 bytes"):
        download(remote(host, "truncates"), tmp_path)
    assert len(host.seen) == 2
    assert part(tmp_path).read_bytes() == CONTENT[:100_000]


@pytest.mark.parametrize(
    ("manners", "why"),
    [
        ("firewall", "202 Accepted and sends no file; a web firewall"),
        ("page", "a web page and not the file"),
        ("empty", "an empty file; a web firewall"),
        ("gone", "404"),
    ],
)
def test_an_address_that_gives_no_file_harms_no_part(
    host: Host, tmp_path: Path, manners: str, why: str
) -> None:
    part(tmp_path).write_bytes(CONTENT[:50])
    with pytest.raises(DataError, match=why):
        download(remote(host, manners), tmp_path)
    assert part(tmp_path).read_bytes() == CONTENT[:50]
    assert download(remote(host, manners, "good"), tmp_path).read_bytes() == CONTENT


def test_a_wrong_file_is_thrown_away_and_the_next_address_tried(host: Host, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"MD5 sum is .*, {MD5} is right; thrown away"):
        download(remote(host, "other"), tmp_path)
    assert not part(tmp_path).exists()
    with pytest.raises(DataError, match="768,004 bytes came, 768,000 are right"):
        download(remote(host, "longer"), tmp_path)
    assert download(remote(host, "longer", "other", "good"), tmp_path).read_bytes() == CONTENT


def test_a_rest_of_another_file_is_replaced(host: Host, tmp_path: Path) -> None:
    part(tmp_path).write_bytes(b"x" * (len(CONTENT) + 5))
    assert download(remote(host, "good", size=None), tmp_path).read_bytes() == CONTENT


def test_a_file_that_a_firewall_left_is_fetched_again(host: Host, tmp_path: Path) -> None:
    (tmp_path / "set.zip").write_bytes(b"")
    assert download(remote(host, "good"), tmp_path).read_bytes() == CONTENT


def test_no_server_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(DataError, match="no connection") as caught:
        download(Remote("set.zip", MD5, (f"http://127.0.0.1:{port}/x",)), tmp_path)
    assert "\n" not in str(caught.value)


def test_several_downloads_of_one_file_do_not_mix(host: Host, tmp_path: Path) -> None:
    wanted = remote(host, "good")
    threads = [threading.Thread(target=download, args=(wanted, tmp_path)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "set.zip").read_bytes() == CONTENT
    assert len(host.seen) == 1


def test_a_full_disk(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part(tmp_path).write_bytes(CONTENT[:50])
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(DataError, match=r"disk is full.*10 are free") as caught:
        download(remote(host, "good"), tmp_path)
    assert "\n" not in str(caught.value)
    assert part(tmp_path).read_bytes() == CONTENT[:50]


def test_a_disk_that_fills_up_under_way(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DataError, match="the disk is full"):
        download(remote(host, "good"), tmp_path, full)


def test_a_root_that_is_a_file(host: Host, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(DataError, match="--data-root"):
        download(remote(host, "good"), file / "below")


# --- archives ---------------------------------------------------------------------------------


def archives(folder: Path) -> list[Path]:
    """The same two files in a .zip and a .tar.gz, and one of them in a .gz."""
    source = folder / "source" / "inner"
    source.mkdir(parents=True)
    (source / "a.txt").write_text("a" * 5000)
    (source.parent / "b.txt").write_text("b")
    made = [folder / "x.zip", folder / "x.tar.gz", folder / "b.txt.gz"]
    with zipfile.ZipFile(made[0], "w") as packed:
        packed.write(source / "a.txt", "inner/a.txt")
        packed.write(source.parent / "b.txt", "b.txt")
    with tarfile.open(made[1], "w:gz") as tar:
        tar.add(source, "inner")
        tar.add(source.parent / "b.txt", "b.txt")
    made[2].write_bytes(gzip.compress(b"b"))
    return made


def test_archives_are_unpacked_into_what_is_there(tmp_path: Path) -> None:
    for archive in archives(tmp_path):
        into = tmp_path / archive.name.replace(".", "-")
        (into / "inner").mkdir(parents=True)
        (into / "inner" / "old.txt").write_text("old")
        extract(archive, into)
        assert (into / "b.txt").read_text() == "b"
        assert (into / "inner" / "old.txt").read_text() == "old"
        if archive.suffix != ".gz" or "tar" in archive.name:
            assert (into / "inner" / "a.txt").read_text() == "a" * 5000
        assert not list(into.glob(".*"))


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_a_truncated_archive_unpacks_nothing(tmp_path: Path, kind: int) -> None:
    archive = archives(tmp_path)[kind]
    archive.write_bytes(archive.read_bytes()[: len(archive.read_bytes()) * 2 // 3])
    with pytest.raises(DataError, match="a damaged archive, nothing was unpacked") as caught:
        extract(archive, tmp_path / "into")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "into").iterdir()) == []


def test_an_archive_in_an_archive_is_unpacked_too(tmp_path: Path) -> None:
    inner, _, _ = archives(tmp_path)
    with zipfile.ZipFile(tmp_path / "outer.zip", "w") as packed:
        packed.write(inner, "deep/x.zip")
        packed.writestr("readme", "r")
    extract(tmp_path / "outer.zip", tmp_path / "into")
    found = {p.relative_to(tmp_path / "into").as_posix() for p in (tmp_path / "into").rglob("*.*")}
    assert found == {"inner/a.txt", "b.txt"}
    listed = contents(tmp_path / "outer.zip")
    assert {k: size for k, (size, _) in listed.items()} == {
        "inner/a.txt": 5000, "b.txt": 1, "readme": 1,
    }  # fmt: skip
    assert misfits(listed, tmp_path / "into", {}, True) == []


def test_contents_of_archives(tmp_path: Path) -> None:
    made = archives(tmp_path)
    expected = {"inner/a.txt": (5000, zlib.crc32(b"a" * 5000)), "b.txt": (1, zlib.crc32(b"b"))}
    assert contents(made[0]) == contents(made[1]) == expected
    with tarfile.open(tmp_path / "word.tar", "w") as tar:
        tar.add(tmp_path / "source" / "b.txt", "./b.txt")
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        tar.add(tmp_path / "word.tar", "word.tar")
    assert contents(tmp_path / "all.tar") == {"word/b.txt": (1, None)}
    made[0].write_bytes(made[0].read_bytes()[:-9])
    with pytest.raises(DataError, match=r"x\.zip: a damaged archive"):
        contents(made[0])


@pytest.fixture
def few(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """N-MNIST of a few recordings, on the server; the data root is empty."""
    remotes, rng = [], np.random.default_rng(8)
    for remote, part in zip(NMNIST.archives, ("Train", "Test"), strict=True):
        home = tmp_path / "source"
        for digit in range(2):
            for i in range(10):
                write_atis(home / part / str(digit) / f"{i:05}.bin", recording(rng))
        with zipfile.ZipFile(home / remote.name, "w") as packed:
            for file in sorted((home / part).rglob("*.bin")):
                packed.write(file, file.relative_to(home))
        content = (home / remote.name).read_bytes()
        host.files[remote.name] = content
        remotes.append(
            Remote(remote.name, hashlib.md5(content).hexdigest(), (host.url(remote.name),))
        )
    monkeypatch.setattr(NMNIST, "archives", tuple(remotes))
    monkeypatch.setattr(NMNIST, "info", replace(NMNIST.info, sizes=(18, 2, 20)))
    return tmp_path / "root"


def test_recordings_are_fetched_unpacked_and_verified(few: Path) -> None:
    NMNIST().fetch(few)
    assert NMNIST().present(few)
    assert NMNIST().verify(few).verified
    assert NMNIST(NMNIST.Config(T=2)).load(few, False).verified


def _fetch_and_die(root: Path, moves: int) -> None:
    """Fetch; die without a word, as by SIGKILL, when so many things were moved to their place."""
    left, move = [None] * moves, fetch._move_into

    def dying(item: Path, target: Path) -> None:
        if not left:
            os._exit(9)
        left.pop()
        move(item, target)

    fetch._move_into = dying
    NMNIST().fetch(root)


@pytest.mark.parametrize("moves", [0, 1])
def test_a_kill_while_files_are_moved_is_noticed_and_mended(few: Path, moves: int) -> None:
    (few / "NMNIST" / "Train").mkdir(parents=True)  # so that Train's parts move one by one
    context = multiprocessing.get_context("fork")
    child = context.Process(target=_fetch_and_die, args=(few, moves))
    child.start()
    child.join(60)
    assert child.exitcode == 9
    assert not NMNIST().present(few)
    for act in (NMNIST().verify, lambda root: NMNIST().load(root, True)):
        with pytest.raises(DataError, match=r"half unpacked.*data fetch nmnist --data-root") as e:
            act(few)
        assert "\n" not in str(e.value)
    NMNIST().fetch(few)
    assert NMNIST().verify(few).verified


def test_files_that_were_lost_are_unpacked_again(host: Host, few: Path) -> None:
    NMNIST().fetch(few)
    asked = len(host.seen)
    (few / "NMNIST/Train/1/00003.bin").unlink()
    (few / "NMNIST/Test/0/00001.bin").write_bytes(b"")
    assert not NMNIST().verify(few).verified
    NMNIST().fetch(few)
    assert NMNIST().verify(few).verified
    assert len(host.seen) == asked


def test_an_unpacking_that_fails_leaves_no_set(few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(zipfile.ZipFile, "extractall", full)
        with pytest.raises(DataError, match="the disk is full"):
            NMNIST().fetch(few)
    assert not NMNIST().present(few)
    assert [p.name for p in (few / "NMNIST").iterdir() if p.is_dir()] == []
    NMNIST().fetch(few)
    assert NMNIST().verify(few).verified


def test_a_dataset_is_fetched_unpacked_and_verified(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way for a set of four files, whose first address is a firewall."""
    remotes, md5s = [], []
    for name in MNIST.FILES:
        content = name.encode() * 100
        packed = gzip.compress(content)
        host.files[f"{name}.gz"] = packed
        urls = (host.url("firewall"), host.url(f"{name}.gz"))
        remotes.append(Remote(f"{name}.gz", hashlib.md5(packed).hexdigest(), urls, len(packed)))
        md5s.append(hashlib.md5(content).hexdigest())
    monkeypatch.setattr(MNIST, "archives", tuple(remotes))
    monkeypatch.setattr(MNIST, "md5s", tuple(md5s))
    assert str(tmp_path) in MNIST().fetch(tmp_path)
    assert len(host.seen) == 8
    assert MNIST().verify(tmp_path).verified
    MNIST().fetch(tmp_path)
    assert len(host.seen) == 8
    (tmp_path / "MNIST" / "raw" / MNIST.FILES[1]).write_bytes(b"odd")
    verdict = MNIST().verify(tmp_path)
    assert not verdict.verified
    assert "1 of 4 files are not the official bytes" in verdict.lines[-1]
    MNIST().fetch(tmp_path)  # from the archive that is there
    assert MNIST().verify(tmp_path).verified
    assert len(host.seen) == 8
    wrong = replace(remotes[0], md5="0" * 32)
    monkeypatch.setattr(MNIST, "archives", (wrong, *remotes[1:]))
    (tmp_path / "MNIST" / "raw" / MNIST.FILES[0]).unlink()
    with pytest.raises(DataError, match="thrown away"):
        MNIST().fetch(tmp_path)


@pytest.mark.parametrize(
    "work",
    [lambda at: download(Remote("x", MD5, ()), at), lambda at: extract(at / "x.zip", at)],
    ids=["download", "extract"],
)
def test_a_folder_in_which_nothing_can_be_locked_is_one_line(tmp_path, monkeypatch, work):
    """As a share that others may only read."""

    def refused(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(fetch.FileLock, "acquire", refused)
    with pytest.raises(DataError, match="Permission denied") as caught:
        work(tmp_path)
    assert str(tmp_path) in str(caught.value)

"""Leases: one holder at a time, taken over only from the dead, whatever the clocks say."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snnbench.errors import ResultsError
from snnbench.runs import lease
from snnbench.runs.lease import Keeper, Lease, Watch, claim, holder, is_free, newest_token


class Clock:
    """A steady clock that a test can turn."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "leases" / "a-run"


def taken(folder: Path, ttl_s: float = 60.0) -> Lease:
    """A lease that was to be had."""
    found = claim(folder, Watch(), ttl_s)
    assert found is not None
    return found


def from_elsewhere(held: Lease) -> None:
    """Let the lease be one of another machine, whose processes cannot be looked at."""
    content = json.loads(held.file.read_text())
    held.file.write_text(json.dumps(content | {"place": "another boot"}).ljust(511) + "\n")


def test_a_free_run_is_had_once(folder: Path) -> None:
    first = taken(folder)
    assert first.holds()
    assert claim(folder, Watch()) is None
    assert not is_free(folder, Watch())
    first.release()
    second = taken(folder)
    assert (first.token, second.token) == (1, 2)
    assert not first.holds()
    assert [p.name for p in folder.iterdir()] == ["2"]


def test_the_number_never_falls(folder: Path) -> None:
    tokens = []
    for _ in range(5):
        held = taken(folder)
        tokens.append(held.token)
        held.release()
    assert tokens == [1, 2, 3, 4, 5]


def test_of_many_that_want_it_at_once_one_gets_it(folder: Path) -> None:
    for _ in range(10):
        with ThreadPoolExecutor(8) as pool:
            found = [f for f in pool.map(lambda _: claim(folder, Watch()), range(16)) if f]
        assert len(found) == 1
        assert found[0].holds()
        found[0].release()


def contend(folder: Path, path: Path, rounds: int) -> None:
    """Take the run when it is free, and write down when one had it, and when no more."""
    for _ in range(rounds):
        held = claim(folder, Watch())
        if held is not None:
            with path.open("a") as file:
                file.write(f"+{held.token}\n")
                file.flush()
                time.sleep(0.0005)
                file.write(f"-{held.token}\n")
            held.release()


def test_processes_never_hold_it_at_the_same_time(folder: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    log = tmp_path / "log"
    workers = [context.Process(target=contend, args=(folder, log, 150)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    lines = log.read_text().split()
    assert len(lines) > 20
    assert Counter(lines).most_common(1)[0][1] == 1  # no number was had twice
    # Appended lines come in order: every end follows its own beginning.
    assert all(b == f"-{a[1:]}" for a, b in zip(lines[::2], lines[1::2], strict=True))


# --- expiry -------------------------------------------------------------------------------------


def test_a_holder_that_gives_no_sign_loses_it_after_being_watched(folder: Path) -> None:
    held, clock = taken(folder, ttl_s=60), Clock()
    from_elsewhere(held)
    watch = Watch(clock)
    for now, there in ((0.0, None), (59.0, None), (60.5, Lease)):
        clock.now = now
        found = claim(folder, watch)
        assert (found is None) == (there is None)
    assert found is not None
    assert found.token == 2
    assert not held.holds()
    assert not held.renew()
    assert found.holds()


def test_a_beat_starts_the_watching_anew(folder: Path) -> None:
    held, clock = taken(folder, ttl_s=60), Clock()
    watch = Watch(clock)
    for now in range(0, 600, 50):
        clock.now = float(now)
        from_elsewhere(held)
        assert claim(folder, watch) is None
        assert held.renew()
    assert held.beat == 12


@settings(max_examples=40, deadline=None)
@given(jumps=st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=6))
def test_no_wall_clock_decides(
    tmp_path_factory: pytest.TempPathFactory, jumps: list[float]
) -> None:
    folder = tmp_path_factory.mktemp("jumps") / "run"
    held, clock = taken(folder, ttl_s=60), Clock()
    from_elsewhere(held)
    watch = Watch(clock)
    assert claim(folder, watch) is None
    with pytest.MonkeyPatch.context() as patch:
        for jump in jumps:
            patch.setattr(time, "time", lambda j=jump: 1.7e9 + j)
            os.utime(held.file, (1e9 + jump, 1e9 + jump))
            clock.now += 59 / len(jumps)
            assert claim(folder, watch) is None
        clock.now += 10
        assert claim(folder, watch) is not None


CODE = """
    import sys, time
    from pathlib import Path
    from snnbench.runs.lease import Watch, claim
    assert claim(Path(sys.argv[1]), Watch(), 600.0)
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_dead_process_of_this_machine_loses_it_at_once(folder: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CODE), str(folder)], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    assert claim(folder, Watch()) is None
    assert holder(folder) == f"{process.pid} on {lease.socket.gethostname()}"
    process.send_signal(signal.SIGSTOP)  # suspended is not dead
    assert claim(folder, Watch()) is None
    process.kill()
    process.wait()
    process.stdout.close()
    assert holder(folder) is None
    assert taken(folder).token == 2


def test_a_process_id_that_was_given_to_another_is_not_the_holder(folder: Path) -> None:
    held = taken(folder)
    content = json.loads(held.file.read_text())
    held.file.write_text(json.dumps(content | {"started": content["started"] - 1}))
    assert taken(folder).token == 2


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\0" * 512, '{"token": "x"}', "\xff"])
def test_a_damaged_lease_keeps_nobody_out_for_long(folder: Path, text: str) -> None:
    folder.mkdir(parents=True)
    (folder / "7").write_text(text, "latin-1")
    clock = Clock()
    watch = Watch(clock)
    assert claim(folder, watch) is None  # its owner may just be writing it
    assert holder(folder) is None
    clock.now = 3.0
    found = claim(folder, watch)
    assert found is not None
    assert found.token == 8


# --- fencing ------------------------------------------------------------------------------------


def test_a_ticket_tells_a_worker_whether_the_run_is_still_its_own(folder: Path) -> None:
    held = taken(folder)
    ticket = json.loads(json.dumps(held.ticket()))
    assert Lease.of(ticket).holds()
    from_elsewhere(held)
    clock = Clock()
    watch = Watch(clock)
    claim(folder, watch)
    clock.now = 61.0
    assert claim(folder, watch) is not None
    assert not Lease.of(ticket).holds()


def test_the_same_number_of_another_owner_is_not_ours(folder: Path) -> None:
    """Somebody has deleted the folder, and another has begun to count anew."""
    held = taken(folder)
    held.file.unlink()
    assert newest_token(folder) == 0
    other = taken(folder)
    assert other.token == held.token
    assert not held.holds()
    assert other.holds()


def test_a_late_claim_does_not_take_a_number_of_the_past(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between looking and creating, two others come and go: the number looks free, but is old."""
    taken(folder).release()
    real = lease.newest_token
    seen: list[int] = []

    def look(path: Path) -> int:
        seen.append(real(path))
        if len(seen) == 1:  # after the first look of the slow one
            monkeypatch.setattr(lease, "newest_token", real)
            taken(folder).release()
            taken(folder).release()
            monkeypatch.setattr(lease, "newest_token", look)
        return seen[-1]

    watch = Watch()
    monkeypatch.setattr(watch, "expired", lambda _: True, raising=False)
    monkeypatch.setattr(lease, "newest_token", look)
    assert claim(folder, watch) is None
    monkeypatch.setattr(lease, "newest_token", real)
    assert newest_token(folder) == 3
    assert [p.name for p in folder.iterdir()] == ["3"]


# --- keeping ------------------------------------------------------------------------------------


def test_a_keeper_beats_until_it_gives_back(folder: Path) -> None:
    held = taken(folder, ttl_s=0.6)
    with Keeper() as keeper:
        keeper.keep(held)
        deadline = time.monotonic() + 20
        while held.beat < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert held.beat >= 3
        keeper.release(held)
        beat = held.beat
        time.sleep(0.5)
        assert held.beat == beat
    assert taken(folder).token == 2


def test_a_keeper_gives_back_what_it_still_holds(folder: Path) -> None:
    with Keeper() as keeper:
        keeper.keep(taken(folder))
    assert is_free(folder, Watch())
    assert not [t for t in threading.enumerate() if t.name == "leases"]


def test_what_is_given_back_names_nobody(folder: Path) -> None:
    taken(folder).release()
    content = json.loads((folder / "1").read_text())
    assert (content["host"], content["pid"], content["place"]) == ("", 0, "")


@pytest.mark.parametrize("depth", [0, 1])
def test_a_file_in_the_way_is_one_line(tmp_path: Path, depth: int) -> None:
    folder = tmp_path / "leases" / "run"
    in_the_way: Any = [folder.parent, folder][depth]
    in_the_way.parent.mkdir(parents=True, exist_ok=True)
    in_the_way.write_text("I am a file")
    with pytest.raises(ResultsError, match="a file stands where a folder is needed"):
        claim(folder, Watch())

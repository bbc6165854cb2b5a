"""Which GPUs a run gets, and how many runs at a time."""

from __future__ import annotations

import pytest

from snnbench.executors.local import Places


def test_one_job_may_have_every_gpu() -> None:
    places = Places(["0", "1", "2"], jobs=1)
    assert places.room(2)
    taken = places.take(2)
    assert taken == ["0", "1"]
    assert not places.room(1)  # one job at a time, whatever else is free
    places.give_back(taken)
    assert places.take(3) == ["2", "0", "1"]


@pytest.mark.parametrize(
    ("gpus", "jobs", "shared_by", "one_after_another"),
    [
        ([], None, 1, [[""]]),
        ([], 2, 2, [[""], [""]]),
        (["3", "5"], None, 1, [["3"], ["5"]]),
        (["3", "5"], 3, 2, [["3"], ["5"], ["3"]]),
        (["3", "5"], 1, 1, [["3"]]),
    ],
)
def test_runs_spread_over_the_devices(gpus, jobs, shared_by, one_after_another) -> None:
    places = Places(gpus, jobs)
    assert places.shared_by == shared_by
    taken = []
    while places.room(1):
        taken.append(places.take(1))
    assert taken == one_after_another
    for one in taken:
        places.give_back(one)
    assert places.room(1)
    places.give_back([])  # of a process that had no place
    assert places.room(1)


def test_two_runs_on_two_devices_each() -> None:
    places = Places(["0", "1", "2", "3"], jobs=2)
    assert (places.take(2), places.take(2)) == (["0", "1"], ["2", "3"])
    assert not places.room(2)


def test_more_devices_than_there_are_take_all() -> None:
    """The worker then says what is missing."""
    assert Places(["0", "1"], None).take(4) == ["0", "1"]

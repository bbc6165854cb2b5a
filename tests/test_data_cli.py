"""`snnbench data ...` as a user types it: what goes to stdout, what to stderr, and exit codes."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from event_files import recording, write_atis
from typer.testing import CliRunner

from snnbench.commands.data import data_app
from snnbench.data.folders import TinyImageNet
from snnbench.data.recordings import NMNIST
from snnbench.data.vision import CIFAR10, FashionMNIST
from snnbench.errors import DataError, ExitCode, SuiteError, UsageError


def data(*args: object, root: Path) -> Any:
    words = [*map(str, args), "--data-root", str(root)]
    return CliRunner().invoke(data_app, words, env={"SNNBENCH_DATA": None, "COLUMNS": "200"})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    for part, count in (("Train", 10), ("Test", 2)):
        for digit in (0, 7):
            for i in range(count):
                write_atis(
                    tmp_path / "NMNIST" / part / str(digit) / f"{i + 1:05}.bin", recording(rng)
                )
    return tmp_path


def test_list_names_every_set_and_where_it_is(root: Path) -> None:
    done = data("list", root=root)
    assert done.exit_code == 0
    rows = json.loads(data("list", "--json", root=root).stdout)["datasets"]
    assert {row["name"] for row in rows} >= {
        "digits", "digits-events", "mnist", "fashion-mnist", "cifar10", "cifar100", "imagenet",
        "tiny-imagenet", "nmnist", "ncaltech101", "cifar10dvs", "dvsgesture", "shd", "ssc",
    }  # fmt: skip
    for row in rows:
        assert row["name"] in done.stdout
        assert row["source"]
        assert row["licence"]
        assert row["classes"] > 1
    here = {row["name"] for row in rows if row["here"]}
    assert here == {"digits", "digits-events", "nmnist"}
    assert str(root) in done.stderr


def test_list_says_which_parts_are_cut_here(root: Path) -> None:
    rows = json.loads(data("list", "--json", root=root).stdout)["datasets"]
    samples = {row["name"]: row["samples"] for row in rows}
    assert samples["imagenet"] == [1_281_167, None, 50_000]
    shown = data("list", root=root).stdout
    assert "1,281,167 + of train + 50,000" in shown
    assert "8,709 in all" in shown
    assert "45,000 + 5,000 + 10,000" in shown
    assert " 0 " not in shown


def test_a_fetch_that_failed_leaves_no_set_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = "http://127.0.0.1:9/"
    for cls in (NMNIST, TinyImageNet, FashionMNIST, CIFAR10):
        archives = tuple(replace(remote, urls=(closed,)) for remote in cls.archives)
        monkeypatch.setattr(cls, "archives", archives)
        assert isinstance(data("fetch", cls.name, root=tmp_path).exception, DataError)
    rows = json.loads(data("list", "--json", root=tmp_path).stdout)["datasets"]
    assert {row["name"] for row in rows if row["here"]} == {"digits", "digits-events"}


def test_instructions_for_a_manual_download_are_given_once(tmp_path: Path) -> None:
    done = data("fetch", "imagenet", root=tmp_path)
    assert isinstance(done.exception, DataError)
    assert f"{done.output} {done.exception}".count("https://image-net.org/download") == 1


@pytest.mark.parametrize("command", ["fetch", "verify", "prepare", "split", "clean", "list"])
@pytest.mark.parametrize("name", ["nmnist", "cifar10", "tiny-imagenet", "digits-events", "digits"])
def test_a_data_root_that_is_a_file_is_one_line(tmp_path: Path, command: str, name: str) -> None:
    file = tmp_path / "file"
    file.write_text("")
    done = data(command, *([] if command == "list" else [name]), root=file)
    assert isinstance(done.exception, DataError)
    assert (
        str(done.exception) == f"{file}: is no folder; name one with --data-root or SNNBENCH_DATA"
    )


def test_hints_repeat_what_the_user_said(root: Path) -> None:
    odd = root / "my data"
    odd.mkdir()
    (root / "NMNIST").rename(odd / "NMNIST")
    options = ("--set", "T=4", "--set", "augment=[flip]", "--allow-unverified-data")
    done = data("prepare", "nmnist", *options, root=odd)
    expected = (
        "snnbench data split nmnist --show --set T=4 --set 'augment=[flip]' "
        f"--allow-unverified-data --data-root '{odd}'"
    )
    assert expected in done.stderr
    assert f"snnbench data verify NAME --data-root '{odd}'" in data("list", root=odd).stderr
    refused = data("prepare", "nmnist", "--set", "T=4", root=odd)
    assert f"`snnbench data verify nmnist --data-root '{odd}'`" in str(refused.exception)
    missing = data("verify", "shd", root=odd)
    assert f"`snnbench data fetch shd --data-root '{odd}'`" in str(missing.exception)


def test_verify_says_what_a_copy_is(root: Path) -> None:
    done = data("verify", "nmnist", root=root)
    assert done.exit_code == ExitCode.DATA
    lines = done.stdout.splitlines()
    assert "train.zip: not there, so that nothing vouches for it" in lines[0]
    assert "20 samples for training and validation, 4 for test; the full set has" in lines[2]
    assert "--allow-unverified-data" in lines[3]
    assert data("verify", "digits", root=root).exit_code == 0
    seen = json.loads(data("verify", "nmnist", "--json", root=root).stdout)
    assert seen["verified"] is False
    assert seen["seen"] == lines


def test_verify_tells_a_copy_that_confesses(tmp_path: Path) -> None:
    home = tmp_path / "cifar-10-batches-py"
    home.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        batch = {"data": np.zeros((2, 3072), dtype=np.uint8), "labels": [0, 1]}
        (home / name).write_bytes(pickle.dumps(batch))
    (home / "APPROXIMATE.json").write_text(json.dumps({"data_batch_1": [0], "test_batch": [0, 1]}))
    done = data("verify", "cifar10", root=tmp_path)
    assert done.exit_code == ExitCode.DATA
    assert done.stdout.count("not the official file, MD5") == 6
    assert "3 images are approximate (data_batch_1 1, test_batch 2)" in done.stdout
    assert "6 of 6 files are not the official bytes" in done.stdout
    assert isinstance(data("verify", "cifar100", root=tmp_path).exception, DataError)


def test_prepare_split_and_clean(root: Path) -> None:
    options = ("--set", "T=4", "--set", "data.value=count", "--set", "augment=[flip]")
    refused = data("prepare", "nmnist", *options, root=root)
    assert isinstance(refused.exception, DataError)
    done = data("prepare", "nmnist", *options, "--allow-unverified-data", "--json", root=root)
    made = json.loads(done.stdout)
    assert made["samples"] == {"train": 18, "val": 2, "test": 4}
    assert made["recipe"]["T"] == 4
    assert made["recipe"]["value"] == "count"
    assert Path(made["folder"]).is_dir()

    words = ("split", "nmnist", *options, "--allow-unverified-data")
    short = data(*words, root=root).stdout
    assert short == f"nmnist: split {made['split']}\n"
    shown = data(*words, "--show", root=root).stdout
    assert made["split"] in shown
    assert "samples of test that stand in train too: none" in shown
    report = json.loads(data(*words, "--json", root=root).stdout)
    assert report["per_class"]["test"] == [2, 0, 0, 0, 0, 0, 0, 2, 0, 0]
    assert set(report["shared_samples"].values()) == {0}

    assert made["folder"] in data("clean", "nmnist", root=root).stderr
    assert not Path(made["folder"]).exists()
    assert "nothing was prepared" in data("clean", "nmnist", root=root).stderr
    assert (root / "NMNIST").is_dir()


def test_sets_that_need_no_preparation(root: Path) -> None:
    assert "nothing to prepare" in data("prepare", "digits", root=root).stderr
    assert "nothing to download" in data("fetch", "digits-events", root=root).stderr
    shown = data("split", "digits", "--show", root=root).stdout
    assert "1259" in shown


@pytest.mark.parametrize(
    ("setting", "error", "why"),
    [
        ("T", UsageError, "key=value"),
        ("=4", UsageError, "key=value"),
        ("valeu=max", SuiteError, "data.valeu: unknown key; did you mean 'value'"),
        ("T=0", SuiteError, "data.T = 0"),
        ("value=most", SuiteError, "data.value"),
    ],
)
def test_wrong_options_are_one_line(
    root: Path, setting: str, error: type[Exception], why: str
) -> None:
    done = data("prepare", "nmnist", "--set", setting, root=root)
    assert isinstance(done.exception, error)
    assert why in str(done.exception)
    assert "\n" not in str(done.exception)


@pytest.mark.parametrize(
    "setting", ["threshold=0.04", "threshold=1e-9", "threshold=1.6", "step_us=99", "step_us=35001"]
)
def test_a_camera_that_sees_no_end_or_nothing_is_refused(tmp_path: Path, setting: str) -> None:
    done = data("prepare", "digits-events", "--set", setting, root=tmp_path)
    assert isinstance(done.exception, SuiteError)
    assert f"data.{setting.partition('=')[0]} = " in str(done.exception)
    assert "\n" not in str(done.exception)


def test_an_unknown_name(root: Path) -> None:
    done = data("verify", "nmnits", root=root)
    assert isinstance(done.exception, UsageError)
    assert "did you mean 'nmnist'?" in str(done.exception)


def test_the_real_cifar100_is_official(data_root: Path) -> None:
    if not (data_root / "cifar-100-python").is_dir():
        pytest.skip("no cifar-100-python in the data root")
    done = data("verify", "cifar100", root=data_root)
    assert done.exit_code == 0
    assert "all 2 files are the official bytes" in done.stdout


def test_the_cifar10_at_hand_is_called_what_it_is(data_root: Path) -> None:
    if not (data_root / "cifar-10-batches-py" / "APPROXIMATE.json").is_file():
        pytest.skip("no CIFAR-10 with approximate images in the data root")
    done = data("verify", "cifar10", root=data_root)
    assert done.exit_code == ExitCode.DATA
    assert "103 images are approximate" in done.stdout
    assert "6 of 6 files are not the official bytes" in done.stdout

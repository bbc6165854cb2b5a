"""Bad input on the command line: one clear line, a documented exit code, never a traceback."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from snnbench import cli, planner
from snnbench.errors import ExitCode, SnnbenchError
from snnbench.executors.local import LocalExecutor
from snnbench.store import SuiteFolder

SUITE = """
schema = 1
name = "t"
claim = "A claim."

[axes]
dataset = ["digits"]
model = ["mlp"]
T = [2]
seed = [0]

[train]
epochs = 1

[[method]]
name = "bptt"

[[method]]
name = "tet"
lamb = 0.1
"""
COMMAND = [sys.executable, "-m", "snnbench"]
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the suite t.toml in it, and nothing of this machine's."""
    (tmp_path / "t.toml").write_text(SUITE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("SNNBENCH_DEBUG", "SNNBENCH_RESULTS", "SNNBENCH_DATA"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    old = signal.getsignal(signal.SIGINT)
    yield tmp_path
    signal.signal(signal.SIGINT, old)


@pytest.fixture
def call(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run the command line in this process; exit code, stdout, stderr."""

    class Answered:
        """A worker that did its task in this process."""

        alive = False

        def __init__(self, task: str, arguments: list[Any]) -> None:
            from snnbench import worker

            self._answer = getattr(worker, task)(*json.loads(json.dumps(arguments)))

        def messages(self, _: float) -> Iterator[Any]:
            yield json.loads(json.dumps(self._answer))

        def close(self) -> None:
            pass

    def do(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["snnbench", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return int(caught.value.code or 0), *capsys.readouterr()

    monkeypatch.setattr(LocalExecutor, "_spawn", lambda _, *task: Answered(*task))
    return do


def one_line(result: tuple[int, str, str], code: ExitCode) -> str:
    """The only line of the error."""
    lines = lines_of(result, code)
    assert len(lines) == 1, lines
    return lines[0]


def lines_of(result: tuple[int, str, str], code: ExitCode) -> list[str]:
    found, out, err = result
    assert "Traceback" not in err
    assert "bug in snnbench" not in err, err
    assert found == code, err
    assert out == ""
    lines = err.splitlines()
    assert all(line.startswith("error: ") for line in lines), err
    return lines


def spawn(*arguments: str, **more: Any) -> tuple[int, str, str]:
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, **more)
    return done.returncode, done.stdout, done.stderr


# --- suites -----------------------------------------------------------------------------------

UNKNOWN = ["plan nope", "check nope", "run nope", "plan nope.toml", "check a/b.toml", "run ."]


@pytest.mark.parametrize("arguments", UNKNOWN)
def test_missing_suite(call: Call, arguments: str) -> None:
    name = arguments.split()[-1]
    assert name in one_line(call(*arguments.split()), ExitCode.USAGE)


def test_a_plan_of_no_run(call: Call) -> None:
    for more in ((), ("--json",)):
        line = one_line(call("plan", "t.toml", "--only", "method=ann", *more), ExitCode.USAGE)
        assert "--only: no run of" in line


def test_a_suite_with_a_plus_in_its_path_is_a_suite(call: Call) -> None:
    assert "no such file" in one_line(call("check", "c++/t.toml"), ExitCode.USAGE)


def test_a_cluster_without_submitit(
    call: Call, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    line = one_line(call("run", "t.toml", "--executor", "slurm"), ExitCode.USAGE)
    assert 'pip install "snnbench[slurm]"' in line
    assert not (here / "results").exists()


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 5000, "x" * 5000 + ".toml"])
@pytest.mark.parametrize("command", ["plan", "check", "run"])
def test_hostile_suite_name(call: Call, command: str, name: str) -> None:
    lines_of(call(command, name), ExitCode.USAGE)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('["digits"]', '["digit"]', "axes.dataset = \"digit\": unknown dataset; did you mean"),
        ('["mlp"]', '["mpl"]', "axes.model = \"mpl\": unknown model; did you mean 'mlp'?"),
        ('"tet"', '"tett"', "method = \"tett\": unknown method; did you mean 'tet'?"),
        ("epochs", "epoch", "train.epoch: unknown key; did you mean 'epochs'?"),
        ("lamb", "lam", "method[1] (tet).lam: unknown key; did you mean 'lamb'?"),
        ("lamb = 0.1", 'lamb = "0.1"', 'method[1] (tet).lamb = "0.1": '),
        ("lamb = 0.1", "lamb = true", "method[1] (tet).lamb = true: "),
        ("lamb = 0.1", "lamb = 2", "method[1] (tet).lamb = 2: "),
        ("lamb = 0.1", "lamb = nan", "method[1] (tet).lamb"),
        ("lamb = 0.1", "lamb = [0.1, inf]", "method[1] (tet).lamb"),
        ("lamb = 0.1", "lamb = []", "method[1] (tet).lamb"),
        ("lamb = 0.1", "lamb = {}", "method[1] (tet).lamb = {}: "),
        ('name = "tet"', 'name = ["tet"]', "method[1].name"),
        ("[train]", "[neuron]\ndecai = 0.5\n[train]", "neuron.decai: unknown key; did you mean"),
        ("[train]", "[neuron]\ndecay = 1.5\n[train]", "neuron.decay = 1.5: "),
        ("[train]", "[neuron]\ndecay = nan\n[train]", "neuron.decay"),
        ("[train]", "[neuron]\nreset = 'none'\n[train]", 'neuron.reset = "none": '),
        ("[train]", "[neuron]\nsurrogate = {name='nope'}\n[train]", "neuron.surrogate"),
        ("[train]", "[model]\nwidht = 1\n[train]", "model.widht: unknown key"),
        ("[train]", "[model]\nhidden = 0\n[train]", "model.hidden = 0: "),
        ("[train]", "[model]\nhidden = nan\n[train]", "model.hidden"),
        ("[train]", "[data]\ntrain_limt = 9\n[train]",
         "data.train_limt: unknown key; did you mean 'train_limit'?"),
        ("[train]", "[data]\ntrain_limit = 1\n[train]", "data.train_limit = 1: "),
        ("[train]", "[data]\ntrain_limit = inf\n[train]", "data.train_limit"),
        ("T = [2]", "T = [0]", "axes.T[0] = 0: "),
        ("T = [2]", "T = []", "axes.T = []: "),
        ("T = [2]", "T = 2", "axes.T = 2: "),
        ("T = [2]", "T = [2", "not valid TOML"),
        ("T = [2]", "T = [2, 2]", "the same run stands in it twice"),
        ("[train]", "[[exclude]]\nT = 2\n[train]", "'exclude' leaves no run"),
        ('name = "t"', 'name = "../t"', "name: use letters"),
        ("schema = 1", 'extends = "t.toml"', "'extends' goes round in a circle"),
        ("schema = 1", 'extends = "nope"', "extends: unknown suite 'nope'"),
    ],
)  # fmt: skip
def test_mistake_in_a_suite(call: Call, here: Path, old: str, new: str, words: str) -> None:
    assert old in SUITE
    (here / "t.toml").write_text(SUITE.replace(old, new, 1))
    lines = lines_of(call("check", "t.toml"), ExitCode.SUITE)
    assert len([line for line in lines if words in line]) == 1, lines
    assert all("t.toml" in line or "'t'" in line for line in lines)


def test_every_mistake_is_told_at_once(call: Call, here: Path) -> None:
    text = SUITE.replace("lamb = 0.1", "lamb = 3\nphy = 1")
    (here / "t.toml").write_text(text + "\n[neuron]\ndecay = 7\n[data]\nx = 1\n[model]\ny = 1\n")
    lines = lines_of(call("plan", "t.toml"), ExitCode.SUITE)
    keys = {line.split(": ")[2].split(" = ")[0] for line in lines}
    assert keys == {
        "method[1] (tet).lamb", "method[1] (tet).phy", "neuron.decay", "data.x", "model.y"
    }  # fmt: skip


def test_not_utf8(call: Call, here: Path) -> None:
    (here / "t.toml").write_bytes(b'name = "\xff"')
    assert "not UTF-8" in one_line(call("check", "t.toml"), ExitCode.SUITE)


def test_binary_file(call: Call, here: Path) -> None:
    (here / "t.toml").write_bytes(bytes(range(32)) * 9)
    one_line(call("check", "t.toml"), ExitCode.SUITE)


@pytest.mark.parametrize(
    ("setting", "code"),
    [
        ("train.epochs", ExitCode.USAGE),
        ("=1", ExitCode.USAGE),
        ("name.x=1", ExitCode.USAGE),
        ("method.nope.lamb=1", ExitCode.USAGE),
        ("train.epochs=0", ExitCode.SUITE),
        ("train.epochs=1.0", ExitCode.SUITE),
        ("axes.T=[0]", ExitCode.SUITE),
        ("axes.T=[]", ExitCode.SUITE),
        ("axes.dataset=[cifar11]", ExitCode.SUITE),
        ("method.tet.lamb=nan", ExitCode.SUITE),
        ("T=3", ExitCode.SUITE),
    ],
)
def test_bad_setting(call: Call, setting: str, code: ExitCode) -> None:
    one_line(call("check", "t.toml", "--set", setting), code)


@pytest.mark.parametrize("command", ["plan", "run"])
@pytest.mark.parametrize("rule", ["method", "metod=tet", "lr=1"])
def test_bad_only(call: Call, command: str, rule: str) -> None:
    assert "write key=value" in one_line(call(command, "t.toml", "--only", rule), ExitCode.USAGE)


def test_only_that_fits_no_run(call: Call) -> None:
    assert "--only" in one_line(call("run", "t.toml", "--only", "T=99"), ExitCode.USAGE)


# --- usage ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    ["nope", "list nope", "plan", "plan t.toml --nope", "report --format docx", "show",
     "run t.toml --device gpu", "run t.toml --device cuda:x", "run t.toml --fail-fast=maybe"],
)  # fmt: skip
def test_usage(call: Call, arguments: str) -> None:
    code, out, err = call(*arguments.split())
    assert (code, out) == (ExitCode.USAGE, "")
    assert "Traceback" not in err
    assert err.splitlines()[-1].lower().startswith("error: ")


def test_fetch_of_an_unknown_dataset(call: Call) -> None:
    assert "'cifar10'" in one_line(call("data", "fetch", "cifar"), ExitCode.USAGE)


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["run", "--help"], ["--version"]])
def test_help(call: Call, arguments: list[str]) -> None:
    code, out, err = call(*arguments)
    assert (code, err) == (ExitCode.OK, "")
    assert "snnbench" in out


def test_exit_codes_are_documented(call: Call) -> None:
    text = " ".join(call("--help")[1].split())
    assert all(f" {code.value} " in text for code in ExitCode)


# --- results ----------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", ["report", "report t", "show x", "report --format json"])
@pytest.mark.parametrize("place", ["nowhere", "t.toml", "empty"])
def test_no_results(call: Call, here: Path, arguments: str, place: str) -> None:
    (here / "empty").mkdir()
    one_line(call(*arguments.split(), "--results", place), ExitCode.RESULTS)


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "\0"])
@pytest.mark.parametrize("form", ["terminal", "md", "csv", "json"])
def test_damaged_table(call: Call, here: Path, text: str, form: str) -> None:
    (here / "results" / "t").mkdir(parents=True)
    (here / "results" / "t" / "runs.csv").write_text(text)
    assert "runs.csv" in one_line(call("report", "t", "--format", form), ExitCode.RESULTS)


@pytest.fixture
def planned(call: Call, here: Path) -> Any:
    """The runs of t.toml, with folders but nothing done."""
    _, specs = planner.specs_of("t.toml")
    folder = SuiteFolder(here / "results" / "t")
    for spec in specs:
        folder.run(spec.run_id).create(spec)
        folder.run(spec.run_id).append({"event": "start"})
    return [folder.run(s.run_id) for s in specs]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"status": 3}', "\udcff"])
def test_damaged_result(call: Call, planned: Any, text: str) -> None:
    file = planned[0].path / "result.json"
    file.write_bytes(text.encode(errors="surrogateescape"))
    assert str(file.relative_to(Path.cwd())) in one_line(
        call("show", planned[0].run_id), ExitCode.RESULTS
    )
    code, out, _ = call("plan", "t.toml", "--json")
    assert code == ExitCode.OK
    assert [r["status"] for r in json.loads(out)["runs"]] == ["missing", "interrupted"]


@pytest.mark.parametrize(
    "line", ["garbage", '{"event": "ep', "[]", '{"event": "epoch"}', '{"event": "exit"}']
)
def test_damaged_event(call: Call, planned: Any, line: str) -> None:
    with (planned[0].path / "events.jsonl").open("a") as file:
        file.write(line + "\n")
    planned[0].append({"event": "epoch", "epoch": 1, "test_acc": 0.5})
    code, out, err = call("show", planned[0].run_id, "--json")
    assert code == ExitCode.OK, err
    assert [e["epoch"] for e in json.loads(out)["epochs"]] == [1]
    assert call("show", planned[0].run_id)[0] == ExitCode.OK
    assert call("plan", "t.toml")[0] == ExitCode.OK
    planned[0].finish({"status": "done"})
    assert call("plan", "t.toml")[0] == ExitCode.OK


@pytest.mark.parametrize("text", ["", "{", "{}"])
def test_damaged_spec(call: Call, planned: Any, text: str) -> None:
    (planned[0].path / "spec.json").write_text(text)
    assert "spec.json" in one_line(call("show", planned[0].run_id), ExitCode.RESULTS)
    assert call("plan", "t.toml")[0] == ExitCode.OK


def test_ambiguous_run(call: Call, planned: Any) -> None:
    assert "fits 2 runs" in one_line(call("show", "digits-mlp"), ExitCode.RESULTS)


@pytest.mark.parametrize("place", ["results", "results/t"])
def test_file_in_place_of_the_results(call: Call, here: Path, place: str) -> None:
    (here / place).parent.mkdir(exist_ok=True)
    (here / place).write_text("I am a file")
    assert "a file stands" in one_line(call("run", "t.toml"), ExitCode.RESULTS)
    assert (here / place).read_text() == "I am a file"
    assert call("plan", "t.toml")[0] == ExitCode.OK


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("status", ExitCode.RESULTS, "no suite was run yet"),
        ("status t.toml", ExitCode.RESULTS, "suite 't' was not run yet"),
        ("cancel t", ExitCode.RESULTS, "was not run yet"),
        ("logs x", ExitCode.RESULTS, "no run 'x'"),
        ("run t.toml --detach", ExitCode.USAGE, "give --executor slurm"),
        ("run t.toml --set run.retries=-1", ExitCode.SUITE, "run.retries = -1"),
        ("run t.toml --set run.retrys=1", ExitCode.SUITE, "did you mean 'retries'?"),
        ("run t.toml --set slurm.gpu=1", ExitCode.SUITE, "did you mean 'gpus'?"),
    ],
)
def test_mistakes_about_runs(call: Call, arguments: str, code: ExitCode, words: str) -> None:
    assert words in one_line(call(*arguments.split()), code)


@pytest.mark.parametrize(("number", "words"), [(28, "disk is full"), (30, "read-only")])
def test_full_or_read_only_disk(
    call: Call, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    assert call("check", "t.toml")[0] == ExitCode.OK
    monkeypatch.setattr(Path, "write_text", fail)
    assert words in one_line(call("run", "t.toml"), ExitCode.RESULTS)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"neuron": {}}', "null"])
def test_damaged_cache_is_made_anew(call: Call, here: Path, text: str) -> None:
    first = call("plan", "t.toml", "--json")
    (file,) = (here / "cache").rglob("*.json")
    file.write_text(text)
    assert call("plan", "t.toml", "--json") == first


# --- data on stdout, words on stderr ----------------------------------------------------------


@pytest.mark.parametrize("what", ["methods", "models", "datasets", "kernels", "suites"])
def test_list(call: Call, what: str) -> None:
    code, out, err = call("list", what, "--json")
    assert (code, err) == (ExitCode.OK, "")
    names = [row["name"] for row in json.loads(out)[what]]
    assert names
    _, table, _ = call("list", what)
    assert all(name in table for name in names)


def test_plan_and_check_as_json(call: Call, here: Path) -> None:
    code, out, err = call("plan", "t.toml", "--json")
    document = json.loads(out)
    assert (code, err, document["suite"], document["todo"]) == (ExitCode.OK, "", "t", 2)
    assert {"run_id", "status", "todo", "estimate_s", "dataset", "model", "method", "T", "seed",
            "method_config", "kernel", "precision"} <= set(document["runs"][0])  # fmt: skip
    code, out, err = call("check", "t.toml", "--json")
    assert (code, err, json.loads(out)) == (ExitCode.OK, "", {"suite": "t", "ok": True, "runs": 2})


def test_words_go_to_stderr(call: Call) -> None:
    code, out, err = call("plan", "t.toml")
    assert code == ExitCode.OK
    assert "digits-mlp-bptt-T2-s0-" in out
    assert "next: snnbench run t.toml" in err
    assert "next:" not in out
    code, out, err = call("check", "t.toml")
    assert (code, out) == (ExitCode.OK, "")
    assert err.startswith("t.toml: ok, 2 runs\n")


def test_only_narrows_the_plan(call: Call) -> None:
    document = json.loads(call("plan", "t.toml", "--only", "method=tet", "--json")[1])
    assert [r["method"] for r in document["runs"]] == ["tet"]


# --- debug, bugs ------------------------------------------------------------------------------


def test_debug_raises(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["snnbench", "--debug", "plan", "nope"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == ExitCode.USAGE


def test_debug_shows_the_traceback(here: Path) -> None:
    code, out, err = spawn("--debug", "plan", "nope")
    assert (code != 0, out) == (True, "")
    assert "Traceback" in err
    assert "UsageError: unknown suite 'nope'" in err


def test_a_bug_is_one_line_with_its_own_exit_code(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise ZeroDivisionError("oh no")

    monkeypatch.setattr(planner, "specs_of", fail)
    code, out, err = call("plan", "t.toml")
    assert (code, out) == (ExitCode.INTERNAL, "")
    assert err.startswith("error: this is a bug in snnbench: ZeroDivisionError: oh no; ")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("error", SnnbenchError.__subclasses__(), ids=lambda e: e.__name__)
def test_every_error_has_its_exit_code(
    call: Call, monkeypatch: pytest.MonkeyPatch, error: type[SnnbenchError]
) -> None:
    def fail(*_: Any) -> Any:
        raise error("first\nsecond")

    monkeypatch.setattr(planner, "specs_of", fail)
    assert call("plan", "t.toml") == (error.exit_code, "", "error: first\nerror: second\n")


# --- in a process of its own ------------------------------------------------------------------


def test_the_installed_command(here: Path) -> None:
    assert "did you mean 'smoke'" in one_line(spawn("plan", "smokey"), ExitCode.USAGE)
    assert "no results yet" in one_line(spawn("report"), ExitCode.RESULTS)
    lines_of(spawn("plan", "\udcff"), ExitCode.USAGE)  # a name that is not UTF-8


def test_options_are_checked_by_a_worker(here: Path) -> None:
    (here / "t.toml").write_text(SUITE.replace("lamb", "lam") + "\n[model]\nwidht = 1\n")
    lines = lines_of(spawn("plan", "t.toml"), ExitCode.SUITE)
    assert any("method[1] (tet).lam: unknown key; did you mean 'lamb'?" in li for li in lines)
    assert any("model.widht: unknown key" in line for line in lines)
    assert len(lines) == 2


def test_missing_data_root(here: Path) -> None:
    (here / "t.toml").write_text(SUITE.replace("digits", "cifar10"))
    code, out, err = spawn("run", "t.toml", "--data-root", "nowhere", "--only", "method=bptt")
    assert "Traceback" not in err
    assert (code, out) == (ExitCode.DATA, "")
    (line,) = err.splitlines()[-1:]
    assert line.startswith("error: cifar10: nowhere")
    assert "snnbench data fetch cifar10" in line


HEAVY = """
import sys
from snnbench.cli import main
sys.argv = ["snnbench", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
heavy = {"torch", "torchvision", "tonic", "numpy", "pandas", "scipy", "sklearn", "matplotlib"}
print(*sorted(heavy & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments", ["--help", "--version", "run --help", "list methods", "list suites --json"]
)
def test_light_commands_import_nothing_heavy(here: Path, arguments: str) -> None:
    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = used()
    code = [sys.executable, "-c", HEAVY, *arguments.split()]
    done = subprocess.run(code, capture_output=True, text=True, check=True)
    loaded = [line for line in done.stderr.splitlines() if line and not line.startswith("next: ")]
    assert loaded == []
    assert used() - before < 1.5


def test_plan_that_was_checked_before_imports_nothing_heavy(call: Call) -> None:
    assert call("plan", "t.toml")[0] == ExitCode.OK
    code = [sys.executable, "-c", HEAVY, "plan", "t.toml", "--json"]
    done = subprocess.run(code, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == ""
    assert json.loads(done.stdout)["todo"] == 2

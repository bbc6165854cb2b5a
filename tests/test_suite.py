"""Suite files: reading, laying over each other, settings, expansion, and every mistake."""

from __future__ import annotations

import itertools
import re
import tomllib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from snnbench.errors import SuiteError, UsageError
from snnbench.runs.policy import RunPolicy
from snnbench.spec import RunSpec
from snnbench.suite import (
    Options,
    Suite,
    claim_of,
    expand,
    load,
    method_variants,
    parse_only,
    shipped,
)

FIVE = {"bptt", "tet", "shortcut", "rate", "grad_scale"}
HEAD = """
schema = 1
name = "t"
claim = "A claim."
"""
AXES = """
[axes]
dataset = ["digits"]
model = ["mlp"]
T = [2, 4]
seed = [0, 1]
"""
TRAIN = """
[train]
epochs = 1
lr = 0.5
"""
METHODS = """
[[method]]
name = "bptt"

[[method]]
name = "tet"
lamb = 0.1
"""
BASE = HEAD + AXES + TRAIN + METHODS


def written(folder: Path, text: str, name: str = "s.toml") -> str:
    path = folder / name
    path.write_text(text, "utf-8")
    return str(path)


def errors_of(folder: Path, text: str, *settings: str) -> list[str]:
    """Lines of the error, without the file's name, which each must begin with."""
    path = written(folder, text)
    with pytest.raises(SuiteError) as caught:
        load(path, settings)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(f"{path}: ") for line in lines)
    return [line.removeprefix(f"{path}: ") for line in lines]


def specs_of(suite: Suite) -> list[RunSpec]:
    """The runs, with options as the components would give them back."""
    options = Options(
        data={name: {"limit": None} for name in suite.axes.dataset},
        model={name: {"width": 1} for name in suite.axes.model},
        neuron={"decay": 0.5},
        methods=[variant for _, variant in method_variants(suite)],
    )
    return expand(suite, options)


def runs_of(folder: Path, text: str, *settings: str) -> list[RunSpec]:
    return specs_of(load(written(folder, text), settings))


# --- reading ----------------------------------------------------------------------------------


def test_shipped_suites() -> None:
    assert {"smoke", "cifar10", "cifar10-tiny"} <= set(shipped())


@pytest.mark.parametrize("name", sorted(shipped()))
def test_shipped_suite_loads_by_name_and_by_path(name: str) -> None:
    suite = load(name)
    assert suite == load(str(shipped()[name]))
    assert claim_of(shipped()[name]) == suite.claim


@pytest.mark.parametrize("name", ["smoke", "cifar10", "cifar10-tiny"])
def test_shipped_suite_compares_all_five(name: str) -> None:
    suite = load(name)
    assert suite.name == name
    assert {m["name"] for m in suite.method} - {"ann"} == FIVE


@pytest.mark.parametrize(("name", "runs"), [("smoke", 30), ("cifar10", 75), ("cifar10-tiny", 5)])
def test_size_of_shipped_suites(name: str, runs: int) -> None:
    assert len(specs_of(load(name))) == runs


def test_tiny_extends_the_suite_beside_it() -> None:
    big, tiny = load("cifar10"), load("cifar10-tiny")
    assert tiny.train.lr == big.train.lr
    assert tiny.neuron == big.neuron
    assert tiny.method == big.method
    assert tiny.train.epochs == 1
    assert tiny.data == {**big.data, "train_limit": 512, "test_limit": 256}


def test_defaults_are_written_out(tmp_path: Path) -> None:
    suite = load(written(tmp_path, BASE))
    assert suite.axes.kernel == ("auto",)
    assert suite.axes.precision == ("auto",)
    assert suite.to_json()["train"]["momentum"] == 0.9


def test_invalid_toml_names_the_line(tmp_path: Path) -> None:
    (error,) = errors_of(tmp_path, HEAD + "[axes\n")
    assert error.startswith("not valid TOML: ")
    assert "line 5" in error


@pytest.mark.parametrize(
    ("text", "line"),
    [('x = "a', 1), ("a = 1\na = 2", 2), ("\n\nx = 1 2", 3), ("[t]\n[t]", 2), ("x = 09", 1)],
)
def test_syntax_errors_name_their_line(tmp_path: Path, text: str, line: int) -> None:
    (error,) = errors_of(tmp_path, text)
    assert "not valid TOML" in error
    assert f"line {line}" in error or "end of document" in error


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_bytes(BASE.replace("A claim", "ä").encode("latin-1"))
    with pytest.raises(SuiteError, match="not UTF-8 text"):
        load(str(path))


@pytest.mark.parametrize("name", ["nope.toml", "no/such/folder.toml"])
def test_missing_file(name: str) -> None:
    with pytest.raises(UsageError, match="no such file"):
        load(name)


def test_unknown_suite_has_a_suggestion() -> None:
    with pytest.raises(UsageError, match="unknown suite 'smokey'; did you mean 'smoke'"):
        load("smokey")


@pytest.mark.parametrize("name", ["", ".", "/", "a\0b", "x" * 5000, "x" * 5000 + ".toml"])
def test_names_that_are_no_file(name: str) -> None:
    with pytest.raises(UsageError):
        load(name)


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> str:
        raise PermissionError(13, "Permission denied")

    path = written(tmp_path, BASE)
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(SuiteError, match="cannot be read: Permission denied"):
        load(path)


# --- extends ----------------------------------------------------------------------------------


def extended(folder: Path, text: str, base: str = BASE) -> Suite:
    written(folder, base, "base.toml")
    return load(written(folder, 'extends = "base.toml"\nname = "child"\n' + text))


def test_extends_nothing_else(tmp_path: Path) -> None:
    base = load(str(written(tmp_path, BASE, "base.toml")))
    assert extended(tmp_path, "") == replace(base, name="child")


def test_extends_needs_a_name_of_its_own(tmp_path: Path) -> None:
    written(tmp_path, BASE, "base.toml")
    with pytest.raises(SuiteError, match="results would mix"):
        load(written(tmp_path, 'extends = "base.toml"\n'))


def test_extends_lays_tables_over_each_other_and_replaces_lists(tmp_path: Path) -> None:
    suite = extended(tmp_path, "[axes]\nT = [8]\n[train]\nmomentum = 0.0\n")
    assert suite.name == "child"
    assert suite.claim == "A claim."
    assert suite.axes.T == (8,)
    assert suite.axes.seed == (0, 1)
    assert (suite.train.momentum, suite.train.lr) == (0.0, 0.5)


def test_extends_replaces_methods(tmp_path: Path) -> None:
    assert extended(tmp_path, '[[method]]\nname = "rate"\n').method == ({"name": "rate"},)


@pytest.mark.parametrize(("this", "other"), [("epochs", "steps"), ("steps", "epochs")])
def test_one_budget_replaces_the_other(tmp_path: Path, this: str, other: str) -> None:
    base = BASE.replace("epochs = 1", f"{other} = 7")
    train = extended(tmp_path, f"[train]\n{this} = 3\n", base).train
    assert (getattr(train, this), getattr(train, other)) == (3, None)


def test_extends_a_shipped_suite(tmp_path: Path) -> None:
    suite = load(written(tmp_path, 'extends = "smoke"\nname = "mine"\n[axes]\nseed = [7]\n'))
    assert (suite.name, suite.axes.seed) == ("mine", (7,))
    assert suite.axes.T == load("smoke").axes.T


def test_extends_through_two_files_in_other_folders(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    written(tmp_path, BASE, "base.toml")
    written(tmp_path / "a", 'extends = "../base.toml"\nname = "mid"\n[axes]\nT = [3]\n', "mid.toml")
    suite = load(written(tmp_path, 'extends = "a/mid.toml"\nname = "top"\n[axes]\nseed = [5]\n'))
    assert (suite.axes.T, suite.axes.seed) == ((3,), (5,))


@pytest.mark.parametrize("names", [("s",), ("s", "b"), ("s", "b", "c")])
def test_extends_in_a_circle(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name, parent in zip(names, (*names[1:], names[0]), strict=True):
        written(tmp_path, f'extends = "./{parent}.toml"\nname = "round"\n', f"{name}.toml")
    with pytest.raises(SuiteError, match="circle") as caught:
        load(str(tmp_path / "s.toml"))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("parent", ['"nope.toml"', '"nope"', '""', "3", '["base.toml"]'])
def test_extends_what_is_not_there(tmp_path: Path, parent: str) -> None:
    (error,) = errors_of(tmp_path, f"extends = {parent}\n" + BASE)
    assert error.startswith("extends")


def test_mistake_in_the_extended_file_is_one_line(tmp_path: Path) -> None:
    written(tmp_path, "x = [", "base.toml")
    with pytest.raises(SuiteError, match=r"base\.toml: not valid TOML"):
        load(written(tmp_path, 'extends = "base.toml"\nname = "child"\n'))


# --- --set ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting",
    ['axes.dataset=["cifar100"]', "axes.dataset=[cifar100]", "axes.dataset=['cifar100']",
     "axes.dataset = [ cifar100 ]", "axes.dataset=[cifar100,]"],
)  # fmt: skip
def test_set_list_also_without_the_quotes_that_shells_eat(tmp_path: Path, setting: str) -> None:
    assert load(written(tmp_path, BASE), [setting]).axes.dataset == ("cifar100",)


@pytest.mark.parametrize(
    ("setting", "table", "key", "value"),
    [
        ("train.epochs=5", "train", "epochs", 5),
        ("train.lr=1e-3", "train", "lr", 1e-3),
        ("train.optimizer=adam", "train", "optimizer", "adam"),
        ('train.optimizer="adam"', "train", "optimizer", "adam"),
        ("axes.seed=[0,1,2]", "axes", "seed", (0, 1, 2)),
        ("axes.model=[mlp, convnet]", "axes", "model", ("mlp", "convnet")),
        ("train.steps=5", "train", "epochs", None),
        ("train.steps=5", "train", "steps", 5),
    ],
)
def test_set(tmp_path: Path, setting: str, table: str, key: str, value: Any) -> None:
    suite = load(written(tmp_path, BASE), [setting])
    assert getattr(getattr(suite, table), key) == value


def test_set_makes_tables_and_text_with_equals_signs(tmp_path: Path) -> None:
    suite = load(
        written(tmp_path, BASE),
        ["neuron.surrogate.name=atan", "claim=a = b", "model.width=3", "name=u", "name=v"],
    )
    assert suite.neuron == {"surrogate": {"name": "atan"}}
    assert (suite.claim, suite.model, suite.name) == ("a = b", {"width": 3}, "v")


def test_set_a_method(tmp_path: Path) -> None:
    suite = load(written(tmp_path, BASE), ["method.tet.lamb=[0.1,0.2]", "method.tet.phi=2"])
    assert suite.method == ({"name": "bptt"}, {"name": "tet", "lamb": [0.1, 0.2], "phi": 2})


def test_set_goes_over_the_extended_suite(tmp_path: Path) -> None:
    written(tmp_path, BASE, "base.toml")
    path = written(tmp_path, 'extends = "base.toml"\nname = "child"\n[train]\nepochs = 2\n')
    assert load(path, ["train.epochs=3"]).train.epochs == 3


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("train.epochs", "write key=value"),
        ("=5", "write key=value"),
        ("train.=5", "write key=value"),
        (".epochs=5", "write key=value"),
        ("", "write key=value"),
        ("name.x=5", "'name' is no table"),
        ("train.lr.x=5", "'lr' is no table"),
        ("method.tet=5", "'method' is no table"),
        ("method.tet.lamb.x=5", "'method' is no table"),
        ("method.tett.lamb=5", "no such method; did you mean 'tet'?"),
    ],
)
def test_set_with_a_bad_path(tmp_path: Path, setting: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(written(tmp_path, BASE), [setting])
    assert str(caught.value).startswith(f"--set {setting}: ")
    assert words in str(caught.value)


@pytest.mark.parametrize("value", ["3", '"x"', "[1, 2]", "true"])
def test_set_over_methods_that_are_none(tmp_path: Path, value: str) -> None:
    path = written(tmp_path, f"method = {value}\n" + HEAD + AXES + TRAIN)
    with pytest.raises((UsageError, SuiteError)):
        load(path, ["method.tet.lamb=5"])


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        ("train.epoch=5", "train.epoch: unknown key; did you mean 'epochs'?"),
        ("axes.T=[0]", "axes.T[0] = 0: "),
        ("axes.T=4", "axes.T = 4: "),
        ("train.lr=fast", 'train.lr = "fast": '),
        ("train.epochs=", 'train.epochs = "": '),
        (
            "axes.dataset=[digit]",
            "axes.dataset = \"digit\": unknown dataset; did you mean 'digits'",
        ),
    ],
)
def test_set_to_a_bad_value(tmp_path: Path, setting: str, error: str) -> None:
    assert any(e.startswith(error) for e in errors_of(tmp_path, BASE, setting))


@pytest.mark.parametrize("setting", ["axes.T=[0]", "axes.T=[true]", "axes.dataset=[3]"])
def test_one_mistake_is_one_line(tmp_path: Path, setting: str) -> None:
    assert len(errors_of(tmp_path, BASE, setting)) == 1


# --- mistakes in the file ---------------------------------------------------------------------


def test_every_missing_table_is_named(tmp_path: Path) -> None:
    errors = errors_of(tmp_path, "")
    keys = ("schema", "name", "claim", "axes", "train", "method")
    assert errors == [f"{k}: missing" for k in keys]


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("schema = 1", "schema = 2", "schema = 2: "),
        ("schema = 1", "schema = true", "schema = true: "),
        ("schema = 1", 'schema = "1"', 'schema = "1": '),
        ('name = "t"', "name = 3", "name = 3: "),
        ('claim = "A claim."', "claim = true", "claim = true: "),
        ('claim = "A claim."', "claim = 2020-01-01", "claim = "),
        ("T = [2, 4]", "T = [0]", "axes.T[0] = 0: "),
        ("T = [2, 4]", "T = [2, -1]", "axes.T[1] = -1: "),
        ("T = [2, 4]", "T = []", "axes.T = []: "),
        ("T = [2, 4]", "T = [true]", "axes.T[0] = true: "),
        ("T = [2, 4]", "T = [4.0]", "axes.T[0] = 4.0: "),
        ("T = [2, 4]", 'T = ["4"]', 'axes.T[0] = "4": '),
        ("T = [2, 4]", "T = 4", "axes.T = 4: "),
        ("T = [2, 4]", "", "axes.T: missing"),
        ("seed = [0, 1]", "seed = [-1]", "axes.seed[0] = -1: "),
        ("seed = [0, 1]", "seed = [false]", "axes.seed[0] = false: "),
        ("seed = [0, 1]", "seed = []", "axes.seed = []: "),
        ('dataset = ["digits"]', "dataset = []", "axes.dataset = []: "),
        ('dataset = ["digits"]', 'dataset = "digits"', 'axes.dataset = "digits": '),
        ('dataset = ["digits"]', "dataset = [3]", "axes.dataset[0] = 3: "),
        ('model = ["mlp"]', "model = []", "axes.model = []: "),
        ("[axes]", "[axes]\nkernel = []", "axes.kernel = []: "),
        ("[axes]", '[axes]\nprecision = ["fp8"]', 'axes.precision[0] = "fp8": '),
        ("[axes]", '[axes]\ndatasets = ["digits"]',
         "axes.datasets: unknown key; did you mean 'dataset'?"),
        ("[train]", "[trian]", "trian: unknown key; did you mean 'train'?"),
        ("epochs = 1", "epochs = true", "train.epochs = true: "),
        ("epochs = 1", "epochs = 1\nsteps = 1", "train: give either 'epochs' or 'steps'"),
        ("epochs = 1", "", "train: give either 'epochs' or 'steps'"),
        ("lr = 0.5", "lr = nan", "train.lr = nan: "),
        ("lr = 0.5", "lr = inf", "train.lr = inf: "),
        ("lr = 0.5", 'lr = "0.5"', 'train.lr = "0.5": '),
        ("[[method]]\nname", "[[metod]]\nname", "metod: unknown key; did you mean 'method'?"),
        (METHODS, "[method]\nname = 'bptt'\n", "method = "),
        (METHODS, "[method]\n", "method = {}: "),
        ('[[method]]\nname = "bptt"', "[[method]]", "method[0].name: missing"),
        ('name = "bptt"', "name = 3", "method[0].name"),
        ('name = "bptt"', 'name = ["bptt", "tet"]', "method[0].name"),
        ('dataset = ["digits"]', 'dataset = ["digit"]',
         "axes.dataset = \"digit\": unknown dataset; did you mean 'digits'?"),
        ('model = ["mlp"]', 'model = ["mpl"]',
         "axes.model = \"mpl\": unknown model; did you mean 'mlp'?"),
        ("[axes]", '[axes]\nkernel = ["referense"]',
         "axes.kernel = \"referense\": unknown kernel; did you mean 'reference'?"),
        ('name = "tet"', 'name = "tett"',
         "method = \"tett\": unknown method; did you mean 'tet'?"),
        ("[train]", '[[exclude]]\nmetod = "tet"\n[train]',
         "exclude[0].metod: unknown key; did you mean 'method'?"),
        ("schema = 1", 'exclude = "x"\nschema = 1', 'exclude = "x": '),
        ("schema = 1", 'exclude = ["x"]\nschema = 1', 'exclude[0] = "x": '),
    ],
)  # fmt: skip
def test_mistake_names_the_key(tmp_path: Path, old: str, new: str, error: str) -> None:
    text = BASE.replace(old, new, 1)
    assert text != BASE
    assert any(e.startswith(error) for e in errors_of(tmp_path, text)), error


@pytest.mark.parametrize("name", ["lr", "epochs", "T", "seed"])
@pytest.mark.parametrize("table", ["", "train.", "axes."])
def test_key_in_the_wrong_table_is_not_suggested_for_itself(
    tmp_path: Path, table: str, name: str
) -> None:
    if table + name in ("train.lr", "train.epochs", "axes.T", "axes.seed"):
        return
    (error,) = errors_of(tmp_path, BASE, f"{table}{name}=1")
    assert error.startswith(f"{table}{name}: unknown key")
    assert f"did you mean '{name}'" not in error


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "", ".", "..", ".hidden", "a b", "é", "x" * 65, "a\\nb", "-x"]
)
def test_hostile_suite_name(tmp_path: Path, name: str) -> None:
    errors = errors_of(tmp_path, BASE.replace('name = "t"', f'name = "{name}"', 1))
    assert len(errors) == 1
    assert errors[0].endswith("name: use letters, digits, '.', '_' and '-', at most 64 of them")


@pytest.mark.parametrize("name", ["a", "A.b_c-9", "x" * 64])
def test_good_suite_name(tmp_path: Path, name: str) -> None:
    assert load(written(tmp_path, BASE.replace('"t"', f'"{name}"', 1))).name == name


def test_empty_sweep_is_refused_and_does_not_drop_the_method(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match=r"method\[1\].*lamb"):
        runs_of(tmp_path, BASE, "method.tet.lamb=[]")


# --- expansion --------------------------------------------------------------------------------


def test_order_is_seed_slowest_and_method_fastest(tmp_path: Path) -> None:
    text = BASE.replace('["digits"]', '["digits", "cifar10"]')
    text = text.replace('["mlp"]', '["mlp", "vgg11"]')
    text = text.replace("[axes]", '[axes]\nkernel = ["auto", "reference"]')
    text = text.replace("[axes]", '[axes]\nprecision = ["fp32", "bf16"]')
    text = text.replace("[axes]", '[axes]\nmemory = ["speed", "smallest"]')
    specs = runs_of(tmp_path, text)
    keys = ("seed", "dataset", "model", "T", "kernel", "precision", "memory", "method")
    found = [tuple(getattr(s, k) for k in keys) for s in specs]
    expected = itertools.product(
        (0, 1), ("digits", "cifar10"), ("mlp", "vgg11"), (2, 4), ("auto", "reference"),
        ("fp32", "bf16"), ("speed", "smallest"), ("bptt", "tet"),
    )  # fmt: skip
    assert found == list(expected)


def test_a_list_of_a_method_is_a_sweep(tmp_path: Path) -> None:
    specs = runs_of(tmp_path, BASE, "method.tet.lamb=[0.1,0.2]", "method.tet.phi=[1,2,3]")
    assert len(specs) == 2 * 2 * (1 + 6)
    configs = [s.method_config for s in specs[:7]]
    expected = [{"lamb": a, "phi": b} for a in (0.1, 0.2) for b in (1, 2, 3)]
    assert configs == [{}, *expected]


def test_variants_name_their_place_in_the_file(tmp_path: Path) -> None:
    suite = load(written(tmp_path, BASE), ["method.tet.lamb=[0.1,0.2]"])
    assert list(method_variants(suite)) == [
        ("method[0] (bptt)", {"name": "bptt"}),
        ("method[1] (tet)", {"name": "tet", "lamb": 0.1}),
        ("method[1] (tet)", {"name": "tet", "lamb": 0.2}),
    ]


def test_same_file_gives_the_same_runs(tmp_path: Path) -> None:
    first, second = (runs_of(tmp_path, BASE) for _ in range(2))
    assert [s.run_id for s in first] == [s.run_id for s in second]


@pytest.mark.parametrize(
    ("rule", "left"),
    [
        ('method = "tet"', 4),
        ('method = "tet"\nT = 4', 6),
        ("T = [2, 4]\nseed = 1", 4),
        ('method = ["tet"]\nseed = [0]', 6),
        ('method = "tet"\n[[exclude]]\nT = 2', 2),
    ],
)
def test_exclude(tmp_path: Path, rule: str, left: int) -> None:
    assert len(runs_of(tmp_path, f"{BASE}\n[[exclude]]\n{rule}\n")) == left


@pytest.mark.parametrize("rule", ["T = 99", 'method = ["tet", "rate"]', 'dataset = "digit"'])
def test_a_rule_that_fits_no_run_is_refused(tmp_path: Path, rule: str) -> None:
    with pytest.raises(SuiteError, match=r"exclude\[0\].*no run has it"):
        runs_of(tmp_path, f"{BASE}\n[[exclude]]\n{rule}\n")


def test_time_inheritance_is_below_every_T_that_is_left(tmp_path: Path) -> None:
    early = BASE.replace("[train]", "[train]\ninherit = { T = 2, epochs = 1 }")
    with pytest.raises(SuiteError, match=r"inherit.T = 2 must be below every T .* it has T = 2"):
        runs_of(tmp_path, early)
    assert {s.T for s in runs_of(tmp_path, f"{early}\n[[exclude]]\nT = 2\n")} == {4}


def test_gestures_are_not_mirrored() -> None:
    """Six of the eleven classes are of the right or of the left hand."""
    assert "flip" in load("cifar10dvs").data["augment"]
    for name in ("dvsgesture", "dvsgesture-tiny"):
        assert load(name).data["augment"] == ["roll"]


def test_exclude_leaves_the_rest_in_order(tmp_path: Path) -> None:
    specs = runs_of(tmp_path, BASE + '\n[[exclude]]\nmethod = "tet"\nT = [4]\n')
    assert [(s.seed, s.T, s.method) for s in specs] == [
        (s, T, m)
        for s, T, m in itertools.product((0, 1), (2, 4), ("bptt", "tet"))
        if (T, m) != (4, "tet")
    ]


@pytest.mark.parametrize("rule", ["", "T = [2, 4]", 'method = ["bptt", "tet"]'])
def test_exclude_that_leaves_nothing(tmp_path: Path, rule: str) -> None:
    with pytest.raises(SuiteError, match="'exclude' leaves no run"):
        runs_of(tmp_path, f"{BASE}\n[[exclude]]\n{rule}\n")


@pytest.mark.parametrize(
    "setting",
    ["axes.T=[2,2]", "axes.seed=[1,1]", "axes.dataset=[digits,digits]", "axes.model=[mlp,mlp]",
     "method.tet.lamb=[0.1,0.1]", "axes.kernel=[auto,auto]"],
)  # fmt: skip
def test_repeated_runs_are_refused(tmp_path: Path, setting: str) -> None:
    with pytest.raises(SuiteError, match="the same run stands in it twice"):
        runs_of(tmp_path, BASE, setting)


def test_repeated_method_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match="twice"):
        runs_of(tmp_path, BASE + '\n[[method]]\nname = "bptt"\n')


def test_method_twice_with_other_options_is_a_sweep(tmp_path: Path) -> None:
    assert len(runs_of(tmp_path, BASE + '\n[[method]]\nname = "tet"\nlamb = 0.2\n')) == 12


# --- --only -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "wanted"),
    [
        ([], {}),
        (["method=tet"], {"method": ["tet"]}),
        (["method=tet,T=4"], {"method": ["tet"], "T": [4]}),
        (["method=tet", "method=rate, T = 4"], {"method": ["tet", "rate"], "T": [4]}),
    ],
)
def test_only(rules: list[str], wanted: dict[str, list[Any]]) -> None:
    assert parse_only(rules) == wanted


@pytest.mark.parametrize("rule", ["method", "metod=tet", "method=tet,", "", "=tet", "lr=1"])
def test_bad_only(rule: str) -> None:
    with pytest.raises(UsageError, match="write key=value"):
        parse_only([rule])


def test_the_tables_of_the_readme_are_the_defaults(tmp_path: Path) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
    (table,) = re.findall(r"```toml\n(\[run\]\n.*?)```", readme, re.S)
    given = tomllib.loads(table)["run"]
    policy = RunPolicy()
    same = {"executor", "retries", "heartbeat_s", "stop_after_same_failures", "lease_s"}
    assert {key: given[key] for key in same} == {key: getattr(policy, key) for key in same}
    assert set(given) == {field.name for field in fields(policy)}
    assert load(written(tmp_path, BASE + table)).run.oom_retry.batch_split

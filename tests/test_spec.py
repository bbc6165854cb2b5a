"""Identity, validation and random seeds of a run."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snnbench.spec import (
    RunSpec,
    TrainConfig,
    canonical,
    did_you_mean,
    digest,
    sub_seed,
    validate,
)

SPEC = RunSpec(
    dataset="digits",
    data={"train_limit": None, "test_limit": None},
    model="convnet",
    model_options={"width": 16},
    method="tet",
    method_config={"lamb": 0.05, "phi": 1.0},
    neuron={"decay": 0.5, "surrogate": {"name": "triangle", "width": 1.0}},
    T=4,
    seed=0,
    train=TrainConfig(epochs=8),
)
JSON: dict[str, Any] = SPEC.to_json()


def paths(values: Any, path: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    if not isinstance(values, dict):
        return set()
    return {(*path, k) for k in values} | {
        p for k, v in values.items() for p in paths(v, (*path, k))
    }


# Every key of the spec, nested ones too, and another valid value for it.
OTHER: dict[tuple[str, ...], Any] = {
    ("dataset",): "cifar10",
    ("data",): {},
    ("data", "train_limit"): 10,
    ("data", "test_limit"): 10,
    ("model",): "mlp",
    ("model_options",): {},
    ("model_options", "width"): 17,
    ("method",): "rate",
    ("method_config",): {},
    ("method_config", "lamb"): 0.06,
    ("method_config", "phi"): 1.5,
    ("neuron",): {},
    ("neuron", "decay"): 0.25,
    ("neuron", "surrogate"): None,
    ("neuron", "surrogate", "name"): "sigmoid",
    ("neuron", "surrogate", "width"): 2.0,
    ("T",): 5,
    ("seed",): 1,
    ("train",): {**JSON["train"], "epochs": 3},
    ("train", "optimizer"): "adamw",
    ("train", "lr"): 0.2,
    ("train", "momentum"): 0.8,
    ("train", "weight_decay"): 1e-4,
    ("train", "batch_size"): 64,
    ("train", "eval_batch_size"): 128,
    ("train", "epochs"): 9,
    ("train", "schedule"): "step",
    ("train", "step_epochs"): 50.0,
    ("train", "step_gamma"): 0.5,
    ("train", "warmup_epochs"): 1.0,
    ("train", "label_smoothing"): 0.1,
    ("train", "clip_norm"): 1.0,
    ("train", "eval_every"): 2,
    ("train", "timeout_s"): 60.0,
    ("kernel",): "reference",
    ("precision",): "bf16",
    ("memory",): "balanced",
    ("train", "inherit"): {"T": 2, "epochs": 1},
    ("measure",): {"gradient_fidelity": {"every": 2}, "target": None},
    ("measure", "target"): 0.5,
    ("kind",): "cost",
    ("capacity",): {"memory_gib": 2.0},
    ("train", "devices"): 2,
    ("train", "batch_split"): 2,
    ("train", "deterministic"): True,
    ("train", "graph"): True,
    ("measure", "gradient_fidelity"): {"every": 1},
}
OTHER = {path: value for path, value in OTHER.items() if path in paths(JSON)}
# `steps` excludes `epochs`, and there is one schema only: both have tests of their own.
APART = {("train", "steps"), ("schema",)}


def changed(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    values = deepcopy(JSON)
    target = values
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return values


def errors_of(cls: Any, values: Any, path: str = "") -> list[str]:
    errors: list[str] = []
    assert validate(cls, values, errors, path) is None
    assert errors
    assert all("\n" not in e for e in errors)
    return errors


# --- identity ---------------------------------------------------------------------------------


def test_run_id_is_the_same_on_any_machine() -> None:
    assert SPEC.run_id == "digits-convnet-tet-T4-s0-9cc0fdaf"


def test_every_key_has_another_value_here() -> None:
    assert paths(JSON) == set(OTHER) | APART


@pytest.mark.parametrize("path", OTHER, ids=".".join)
def test_run_id_changes_with_every_key_but_the_time_limit(path: tuple[str, ...]) -> None:
    same = RunSpec.from_json(changed(path, OTHER[path])).run_id == SPEC.run_id
    assert same is (path == ("train", "timeout_s"))


def test_all_run_ids_are_different() -> None:
    ids = [RunSpec.from_json(changed(p, v)).run_id for p, v in OTHER.items()]
    assert len({*ids, SPEC.run_id}) == len(ids)  # the time limit changes no id


def test_run_id_changes_with_steps() -> None:
    steps = replace(SPEC, train=TrainConfig(steps=8))
    assert steps.run_id not in (SPEC.run_id, replace(SPEC, train=TrainConfig(steps=9)).run_id)


numbers = st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False)
options = st.dictionaries(
    st.text(max_size=8), numbers | st.text(max_size=8) | st.none(), max_size=4
)


@given(options, options)
def test_run_id_is_equal_just_where_the_options_are(a: dict[str, Any], b: dict[str, Any]) -> None:
    same = replace(SPEC, method_config=a).run_id == replace(SPEC, method_config=b).run_id
    assert same == (canonical(a) == canonical(b))


@given(options)
def test_run_id_does_not_depend_on_the_order_of_keys(a: dict[str, Any]) -> None:
    turned = dict(reversed(a.items()))
    assert replace(SPEC, neuron=a).run_id == replace(SPEC, neuron=turned).run_id


HOSTILE = ["../x", "..", ".", "", "/", "a/b", "\0", "a\0b", "a\nb", "x" * 5000, "\N{SNOWMAN}",
           "ﬁ²٣", "-rf", "a b", "con", "$(x)", "%2e", "\\", "\ud800"]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE, ids=lambda n: ascii(n)[:12])
@pytest.mark.parametrize("field", ["dataset", "model", "method"])
def test_slug_is_one_safe_folder_name(name: str, field: str) -> None:
    run_id = replace(SPEC, **{field: name}).run_id
    assert re.fullmatch(r"[A-Za-z0-9._+-]{1,80}-[0-9a-f]{8}", run_id)
    assert Path(run_id).name == run_id


@given(st.text(), st.text(), st.integers(1))
def test_slug_is_always_safe(dataset: str, model: str, T: int) -> None:
    run_id = replace(SPEC, dataset=dataset, model=model, T=T).run_id
    assert re.fullmatch(r"[A-Za-z0-9._+-]{1,80}-[0-9a-f]{8}", run_id)


def test_names_cut_to_the_same_slug_keep_different_ids() -> None:
    a, b = (replace(SPEC, dataset="x" * 200 + end).run_id for end in "ab")
    assert a[:80] == b[:80]
    assert a != b


# --- canonical JSON, digests, seeds -----------------------------------------------------------


def test_canonical_json_is_golden() -> None:
    value = {"b": [1, 2.5, None, True], "a": {"z": "é", "y": 1e-05}}
    assert canonical(value) == r'{"a":{"y":1e-05,"z":"\u00e9"},"b":[1,2.5,null,true]}'


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_canonical_json_refuses_what_is_not_json(value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        canonical({"x": value})


def test_digest_is_sha256_of_the_parts() -> None:
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert digest("abc") == digest("a", b"bc") == expected


def test_sub_seeds_are_golden() -> None:
    assert sub_seed(0, "init") == 449826253314718586
    assert sub_seed(1, "batches") == 725194430852710286


def test_sub_seeds_differ_by_seed_and_purpose() -> None:
    seeds = [sub_seed(s, p) for s in range(20) for p in ("init", "batches", "augment", "method")]
    assert len(set(seeds)) == len(seeds)


@given(st.integers(0), st.text())
def test_sub_seed_fits_every_generator(seed: int, purpose: str) -> None:
    assert 0 <= sub_seed(seed, purpose.encode(errors="replace").decode()) < 2**63


# --- validation -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("T", "4"), ("T", 4.0), ("T", True), ("T", None), ("T", [4]), ("T", {}),
        ("seed", "0"), ("seed", False), ("dataset", 1), ("dataset", None), ("dataset", True),
        ("data", []), ("data", "x"), ("train", 3), ("precision", "fp8"), ("precision", 32),
    ],
)  # fmt: skip
def test_types_of_a_spec_are_not_coerced(key: str, value: Any) -> None:
    errors = errors_of(RunSpec, {**JSON, key: value})
    assert all(e.startswith(f"{key} = {json.dumps(value)}: ") for e in errors)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", "0.1"), ("lr", True), ("lr", None), ("lr", float("nan")), ("lr", float("inf")),
        ("lr", 0), ("lr", -0.1), ("momentum", 1.0), ("momentum", -0.1), ("weight_decay", -1e-9),
        ("batch_size", 0), ("batch_size", 64.0), ("batch_size", "64"), ("batch_size", True),
        ("epochs", 0), ("epochs", 1.0), ("epochs", True), ("optimizer", "SGD"), ("optimizer", 1),
        ("schedule", "linear"), ("step_gamma", 0), ("step_gamma", 1.1), ("label_smoothing", 1.0),
        ("clip_norm", 0), ("clip_norm", float("-inf")), ("timeout_s", 0), ("eval_every", 0),
    ],
)  # fmt: skip
def test_recipe_names_the_key_and_the_value(key: str, value: Any) -> None:
    errors = errors_of(TrainConfig, {"epochs": 1, key: value}, "train")
    assert all(e.startswith(f"train.{key} = ") for e in errors)


def test_whole_numbers_count_as_floats_and_give_the_same_run() -> None:
    whole, decimal = (RunSpec.from_json(changed(("train", "lr"), v)) for v in (1, 1.0))
    assert isinstance(whole.train.lr, float)
    assert whole.run_id == decimal.run_id


@pytest.mark.parametrize("budget", [{}, {"epochs": 1, "steps": 1}])
def test_recipe_needs_one_budget(budget: dict[str, int]) -> None:
    assert errors_of(TrainConfig, budget, "train") == ["train: give either 'epochs' or 'steps'"]


def test_unknown_key_with_a_suggestion() -> None:
    error = "train.batchsize: unknown key; did you mean 'batch_size'?"
    assert errors_of(TrainConfig, {"epochs": 1, "batchsize": 2}, "train") == [error]


def test_unknown_key_without_a_close_one_lists_them() -> None:
    (error,) = errors_of(TrainConfig, {"epochs": 1, "zzz": 2}, "train")
    assert error.startswith("train.zzz: unknown key; it can be: ")
    assert "batch_size, batch_split, clip_norm, " in error


@pytest.mark.parametrize("key", ["epochs", "lr", "momentum"])
def test_suggestion_is_a_key_of_that_table(key: str) -> None:
    (error,) = errors_of(RunSpec, {**JSON, key: 1})
    assert error.startswith(f"{key}: unknown key")
    assert f"did you mean '{key}'" not in error


def test_missing_keys_are_named() -> None:
    values = {k: v for k, v in JSON.items() if k not in ("T", "train")}
    assert sorted(errors_of(RunSpec, values)) == ["T: missing", "train: missing"]


def test_every_mistake_has_its_line() -> None:
    train = {"epochs": 0, "lrr": 1, "momentum": "x"}
    errors = errors_of(RunSpec, {**JSON, "T": "x", "train": train})
    keys = {re.split("[ :]", e)[0] for e in errors}
    assert keys == {"T", "train.epochs", "train.lrr", "train.momentum"}


@pytest.mark.parametrize("values", [None, 3, "x", [], [JSON], True])
def test_what_is_no_table_is_refused(values: Any) -> None:
    errors_of(RunSpec, values)


def test_did_you_mean() -> None:
    assert did_you_mean("tett", ["bptt", "tet"]) == "; did you mean 'tet'?"
    assert did_you_mean("zzz", ["b", "a"]) == "; it can be: a, b"
    assert did_you_mean("zzz", []) == ""


# --- round trip -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", OTHER, ids=".".join)
def test_round_trip(path: tuple[str, ...]) -> None:
    spec = RunSpec.from_json(changed(path, OTHER[path]))
    again = RunSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert again == spec
    assert again.run_id == spec.run_id


@given(options)
def test_round_trip_of_any_option(values: dict[str, Any]) -> None:
    spec = replace(SPEC, method_config=values)
    assert RunSpec.from_json(json.loads(json.dumps(spec.to_json()))).run_id == spec.run_id


@pytest.mark.parametrize("schema", [0, 2, "1", None])
def test_other_schema_is_refused(schema: Any) -> None:
    with pytest.raises(ValueError, match="schema 1"):
        RunSpec.from_json({**JSON, "schema": schema})


@pytest.mark.parametrize("values", [None, [], "x", 3, {}, {"schema": 1}, {**JSON, "x": 1}])
def test_garbage_is_refused(values: Any) -> None:
    with pytest.raises(ValueError, match=r"schema|missing|unknown"):
        RunSpec.from_json(values)

"""The training loop: recipe by hand, pairing, resume, and what must not disturb training."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import without_timing
from torch import Tensor, nn

from snnbench import registry, train
from snnbench.data.augment import pipeline
from snnbench.data.base import Data, Split
from snnbench.data.digits import Digits
from snnbench.errors import DivergedError, SnnbenchError
from snnbench.kernels import native
from snnbench.kernels.choice import choose
from snnbench.methods.base import Method
from snnbench.models.convnet import ConvNet
from snnbench.neurons import LIF
from snnbench.spec import Every, Inherit, RunSpec, TrainConfig, sub_seed
from snnbench.training import evaluate
from snnbench.training import job as job_module
from snnbench.training import recipe as recipes
from snnbench.training.cost import probe
from snnbench.training.engine import Engine, resolve_precision
from snnbench.training.job import Job, warm_up

# The artificial twin has no spikes and T = 1 only: it is no case of its own for the loop.
METHODS = [name for name in registry.BUILT_IN["methods"] if name != "ann"]
CPU = torch.device("cpu")
RECIPE = {"epochs": 2, "batch_size": 64, "lr": 0.1, "weight_decay": 1e-3, "optimizer": "sgd"}

pytestmark = pytest.mark.usefixtures("one_thread")


class Stopped(BaseException):
    """As the worker's."""


@functools.cache
def digits() -> Data:
    return Digits(Digits.Config(train_limit=200, test_limit=50)).load(Path(), False)


def make_method(name: str) -> Method:
    method = registry.find("methods", name).load()
    made: Method = method(method.Config())
    return made


def make_job(
    method: str | Method = "bptt",
    seed: int = 0,
    T: int = 2,
    precision: Any = "fp32",
    data: Data | None = None,
    checkpoint: Path | None = None,
    kernel: str = "reference",
    memory: Any = "speed",
    **recipe: Any,
) -> Job:
    """A job on 200 digits, ready to be trained; `job.events` and `job.saved` collect."""
    data = data or digits()
    torch.manual_seed(sub_seed(seed, "init"))
    net = ConvNet(ConvNet.Config(width=4), data.shape, data.classes, LIF())
    name = method if isinstance(method, str) else type(method).__name__
    recipe = RECIPE | recipe
    if recipe.get("steps"):
        recipe["epochs"] = None
    spec = RunSpec(
        "digits", {}, "convnet", {"width": 4}, name, {}, {}, T, seed, TrainConfig(**recipe),
        precision=precision, kernel=kernel, memory=memory,
    )  # fmt: skip
    choice = choose(kernel, {"native": native}, CPU)
    job = Job(
        spec,
        net,
        make_method(method) if isinstance(method, str) else method,
        data,
        Engine(CPU, choice, resolve_precision(spec.precision, CPU), spec.memory),
        emit=lambda event: job.events.append(event),
        save=lambda state: job.saved.append(state),
        checkpoints=[checkpoint] if checkpoint else [],
    )
    job.events, job.saved = [], []  # type: ignore[attr-defined]
    return job


def fixed(result: dict[str, Any]) -> Any:
    """What must be reproducible of a result."""
    return without_timing(result)


def assert_same_weights(a: Job, b: Job) -> None:
    ours, theirs = a.net.state_dict(), b.net.state_dict()
    assert ours.keys() == theirs.keys()
    assert [k for k in ours if not torch.equal(ours[k], theirs[k])] == []


def differs(a: Job, b: Job) -> bool:
    other = b.net.state_dict()
    return any(not torch.equal(v, other[k]) for k, v in a.net.state_dict().items())


# --- the recipe -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"schedule": "constant"}, [1.0] * 8),
        # 1/2 (1 + cos(pi k / 8)), k = 0..7
        (
            {"schedule": "cosine"},
            [1.0, 0.9619397662556434, 0.8535533905932737, 0.6913417161825449, 0.5,
             0.30865828381745514, 0.14644660940672627, 0.03806023374435663],
        ),
        # warm-up over the first epoch of four steps, then a half cosine over the other four
        (
            {"schedule": "cosine", "warmup_epochs": 1.0},
            [0.25, 0.5, 0.75, 1.0, 1.0, 0.8535533905932737, 0.5, 0.14644660940672627],
        ),
        ({"schedule": "constant", "warmup_epochs": 0.5}, [0.5] + [1.0] * 7),
        # the factor counts epochs from the start of training, warm-up included
        ({"schedule": "step", "step_epochs": 1, "step_gamma": 0.1}, [1.0] * 4 + [0.1] * 4),
        ({"schedule": "step", "step_epochs": 0.5, "step_gamma": 0.5},
         [1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125]),
        (
            {"schedule": "step", "step_epochs": 1, "step_gamma": 0.1, "warmup_epochs": 0.25},
            [1.0] * 4 + [0.1] * 4,
        ),
        # a warm-up longer than the training never ends
        ({"schedule": "cosine", "warmup_epochs": 4.0}, [(k + 1) / 16 for k in range(8)]),
    ],
)  # fmt: skip
def test_learning_rates_by_hand(config, expected):
    recipe = TrainConfig(lr=1.0, epochs=2, **config)
    got = [recipes.learning_rate(recipe, step, 8, 4) for step in range(8)]
    assert got == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("step_epochs", [0.1, 0.3, 0.7])
def test_a_step_schedule_drops_at_the_exact_step(step_epochs):
    recipe = TrainConfig(lr=1.0, epochs=9, schedule="step", step_epochs=step_epochs, step_gamma=0.5)
    every = round(10 * step_epochs)
    got = [math.log2(1 / recipes.learning_rate(recipe, step, 90, 10)) for step in range(90)]
    assert got == [step // every for step in range(90)]


class Given(Method):
    """Fills `.grad` with a constant of its choice."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def backward(self, net, x_TB, target, progress):
        for p in net.parameters():
            p.grad = torch.full_like(p, self.value)
        return torch.zeros(())


def one_step(value: float, lr: float, **recipe: Any) -> tuple[Job, dict[str, Tensor]]:
    """A job after one step with that gradient everywhere, and the change of every parameter."""
    job = make_job(Given(value), steps=1, schedule="constant", lr=lr, **recipe)
    before = {k: p.detach().clone() for k, p in job.net.named_parameters()}
    train.train(job)
    return job, {k: p.detach() - before[k] for k, p in job.net.named_parameters()}


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_weight_decay_moves_weights_of_maps_only(optimizer):
    job, changes = one_step(0.0, 0.1, optimizer=optimizer, weight_decay=0.5)
    moved = {k for k, change in changes.items() if change.abs().max() > 0}
    assert moved == {k for k, p in job.net.named_parameters() if p.dim() > 1}
    assert len(moved) == 3  # two convolutions and the read-out; BatchNorm and biases stay


def test_weight_decay_of_sgd_by_hand():
    job, changes = one_step(0.0, 0.1, weight_decay=0.5)
    # p' = p - 0.1 * 0.5 * p, so the change is -0.05 / 0.95 of what is there now
    for name, p in job.net.named_parameters():
        expected = -0.05 / 0.95 * p.detach() if p.dim() > 1 else torch.zeros_like(p)
        torch.testing.assert_close(changes[name], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("value", "clip", "norm"), [(3.0, 1.0, 1.0), (3.0, 0.25, 0.25), (1e-3, 1.0, None)]
)
def test_gradients_are_clipped_by_their_common_norm(value, clip, norm):
    job, changes = one_step(value, 1.0, clip_norm=clip, momentum=0.0, weight_decay=0.0)
    size = math.sqrt(sum(change.square().sum().item() for change in changes.values()))
    unclipped = value * math.sqrt(sum(p.numel() for p in job.net.parameters()))
    assert size == pytest.approx(unclipped if norm is None else norm, rel=1e-3)


def test_label_smoothing_by_hand():
    y_B = torch.tensor([2, 0])
    assert recipes.smooth(y_B, 4, 0.0) is y_B
    expected = torch.tensor([[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]])
    torch.testing.assert_close(recipes.smooth(y_B, 4, 0.1), expected)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_smoothed_labels(method):
    plain, smoothed = make_job(method, epochs=1), make_job(method, epochs=1, label_smoothing=0.2)
    train.train(plain)
    train.train(smoothed)
    assert differs(plain, smoothed)
    assert math.isfinite(smoothed.events[-1]["train_loss"])


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_the_loss_falls(optimizer):
    lr = 0.1 if optimizer == "sgd" else 0.01
    history = train.train(make_job(optimizer=optimizer, lr=lr, epochs=6))["history"]
    assert history[-1]["train_loss"] < 0.8 * history[0]["train_loss"]
    assert history[-1]["test_acc"] > 0.4  # chance is 0.1


# --- order and batches ------------------------------------------------------------------------


def test_the_order_is_a_permutation_of_its_own_in_every_epoch_and_seed():
    orders = [train.epoch_order(seed, epoch, 100).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert train.epoch_order(1, 1, 100).tolist() == orders[-1]


def test_the_order_does_not_depend_on_the_state_of_the_generator():
    torch.manual_seed(1)
    first = train.epoch_order(0, 0, 50)
    torch.rand(7)
    assert torch.equal(first, train.epoch_order(0, 0, 50))


@pytest.mark.parametrize("chunk", [1, 20, 4096])
@pytest.mark.parametrize(("n", "batch"), [(50, 16), (48, 16), (16, 16), (50, 1)])
def test_batches_are_full_and_hold_no_sample_twice(monkeypatch, chunk, n, batch):
    monkeypatch.setattr(train, "AUGMENT_CHUNK", chunk)
    split = Split(torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1), torch.arange(n))
    data = dataclasses.replace(digits(), augment=None)
    order = train.epoch_order(0, 0, n)
    pairs = list(train.batches(data, split, order, batch, 0, 0))
    assert [len(x) for x, _ in pairs] == [batch] * (n // batch)
    seen = torch.cat([x.flatten() for x, _ in pairs]).tolist()
    assert seen == order[: n // batch * batch].tolist()
    assert torch.cat([y for _, y in pairs]).tolist() == seen


def augmented(method: str, seed: int) -> list[str]:
    """Hashes of the images that reach the loop after augmentation, chunk by chunk."""
    policy, seen = pipeline(["crop", "flip"]), []

    def spy(x: Tensor, generator: torch.Generator) -> Tensor:
        out = policy(x, generator)
        seen.append(hashlib.sha256(out.contiguous().numpy().tobytes()).hexdigest())
        return out

    train.train(make_job(method, seed, data=dataclasses.replace(digits(), augment=spy)))
    return seen


def test_all_methods_of_a_seed_see_the_same_augmented_images():
    seen = {method: augmented(method, 0) for method in METHODS}
    assert all(hashes == seen["bptt"] for hashes in seen.values())
    assert len(set(seen["bptt"])) == RECIPE["epochs"]  # and new ones in every epoch
    assert not set(augmented("bptt", 1)) & set(seen["bptt"])


def test_methods_share_weights_and_order_and_seeds_do_not():
    results = {m: train.train(make_job(m)) for m in METHODS}
    other = train.train(make_job(seed=1))
    for name in ("init_hash", "order_hash"):
        values = {result[name] for result in results.values()}
        assert len(values) == 1
        assert other[name] not in values


# --- determinism, budget, precision -----------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_result(method):
    first, second = make_job(method), make_job(method)
    results = train.train(first), train.train(second)
    assert fixed(results[0]) == fixed(results[1])
    assert fixed(first.events) == fixed(second.events)
    assert_same_weights(first, second)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_runs_on_a_cpu(method, precision):
    half, full = make_job(method, precision=precision), make_job(method)
    result = train.train(half)
    train.train(full)
    assert result["spikes_per_sample"] > 0
    assert 0 <= result["test_acc"] <= 1
    assert all(math.isfinite(event["train_loss"]) for event in half.events)
    assert differs(half, full)  # the precision was not simply ignored
    assert {p.dtype for p in half.net.parameters()} == {torch.float32}


def test_fp16_counts_the_updates_that_overflowed():
    job = make_job(precision="fp16", steps=3)
    train.train(job)
    assert job.engine.describe()["skipped_steps"] == 0
    job = make_job(precision="fp16", steps=3)
    amplify, calls = job.method.loss, []

    def loss(*args):
        calls.append(args)
        return amplify(*args) * (1e38 if len(calls) == 5 else 1.0)  # 3 throw-away steps come first

    job.method.loss = loss
    train.train(job)
    assert job.engine.describe()["skipped_steps"] == 1
    assert job.engine.describe()["precision_path"] == "fp16"


@pytest.mark.parametrize("step", [1, 3])
def test_an_overflow_at_either_end_of_training_leaves_a_record_that_can_be_written(step):
    job = make_job(precision="fp16", steps=3)
    amplify, calls = job.method.loss, []

    def loss(*args):
        calls.append(args)
        return amplify(*args) * (1e38 if len(calls) == train.WARM_UP_STEPS + step else 1.0)

    job.method.loss = loss
    record = train.train(job)
    assert job.engine.describe()["skipped_steps"] == 1
    json.dumps(record, allow_nan=False)
    when = "grad_norm_init" if step == 1 else "grad_norm"
    assert None in [layer[when] for layer in record["layers"]]


def test_a_measurement_that_fails_leaves_the_training_result(monkeypatch):
    job, undisturbed = make_job(), make_job()
    want = train.train(undisturbed)

    def fails(*args):
        raise RuntimeError("no room\nfor more")

    monkeypatch.setattr(train, "count_spikes", fails)
    monkeypatch.setattr(train, "accuracy_with_heads", fails)
    monkeypatch.setattr(train, "compare_gradients", fails)
    job.spec = dataclasses.replace(
        job.spec, measure=dataclasses.replace(job.spec.measure, gradient_fidelity=Every(1))
    )
    record = train.train(job)
    assert record["test_acc"] == want["test_acc"]
    assert not differs(job, undisturbed)
    why = "its measurement failed: RuntimeError: no room"
    for name in ("sops_per_sample", "test_acc_with_heads", "grad_cos_bptt", "grad_cos_bptt_init"):
        assert record["nulls"][name] == why
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize(
    ("kernel", "precision"), [("reference", "fp32"), ("native", "fp32"), ("native", "bf16")]
)
@pytest.mark.parametrize("method", METHODS)
def test_memory_levels_train_the_same_weights_to_the_last_bit(method, kernel, precision):
    jobs = [
        make_job(method, kernel=kernel, memory=m, precision=precision)
        for m in ("speed", "balanced", "smallest")
    ]
    for job in jobs:
        train.train(job)
    assert_same_weights(jobs[0], jobs[1])
    assert_same_weights(jobs[0], jobs[2])
    speed, balanced, smallest = (probe(job)["saved_bytes"] for job in jobs)
    assert smallest <= balanced <= speed
    if method in ("bptt", "tet", "shortcut"):
        assert smallest < balanced < speed


@pytest.mark.parametrize("method", METHODS)
def test_the_native_kernel_trains_as_well_as_the_reference(method):
    """Rounding may flip a spike, so weights are not compared; the path in the record is."""
    native_job = make_job(method, kernel="native")
    result = train.train(native_job)
    steps_itself = method in ("sltt", "ottt", "ann")
    assert result["kernel_path"] == ("reference" if steps_itself else "native")
    assert (result["kernel_fallbacks"] != []) == steps_itself
    assert abs(result["test_acc"] - train.train(make_job(method))["test_acc"]) <= 0.2


def test_a_budget_of_steps_may_end_within_an_epoch():
    result = train.train(make_job(steps=7))  # 200 samples are 3 batches of 64
    assert result["steps_timed"] == 7
    assert [e["epoch"] for e in result["history"]] == [1, 2, 3]
    assert result["epochs"] == 3
    assert result["history"][-1]["lr"] == pytest.approx(0.05 * (1 + math.cos(math.pi * 6 / 7)))


def test_a_budget_of_whole_epochs_equals_those_epochs():
    by_steps, by_epochs = make_job(steps=6), make_job(epochs=2)
    assert fixed(train.train(by_steps)) == fixed(train.train(by_epochs))
    assert_same_weights(by_steps, by_epochs)


def test_evaluation_every_few_epochs_and_at_the_end():
    often, seldom = make_job(epochs=5), make_job(epochs=5, eval_every=2)
    all_of_them, some = train.train(often)["history"], train.train(seldom)["history"]
    assert [e["test_acc"] is not None for e in some] == [False, True, False, True, True]
    assert [e["val_acc"] is not None for e in some] == [False, True, False, True, True]
    assert [some[i]["test_acc"] for i in (1, 3, 4)] == [
        all_of_them[i]["test_acc"] for i in (1, 3, 4)
    ]
    assert_same_weights(often, seldom)


def test_accuracy_is_the_share_of_right_answers():
    job = make_job(eval_batch_size=7)  # does not divide the 50 test samples
    result = train.train(job)
    job.net.eval()
    for name, split in (("test_acc", job.data.test), ("val_acc", job.data.val)):
        with torch.no_grad():
            logits = job.net(job.data.encode(split.x, 2)).mean(0)
        right = (logits.argmax(1) == split.y).float().mean().item()
        assert result[name] == pytest.approx(right)


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_is_not_finite_ends_the_run(method):
    with pytest.raises(DivergedError, match=r"step \d+ of 6"):
        train.train(make_job(method, lr=1e30))


def test_a_loss_that_is_not_finite_for_one_step_ends_the_run():
    class OnceInfinite(Method):
        def loss(self, logits_TBK, target, progress):
            loss = super().loss(logits_TBK, target, progress)
            return loss * (math.inf if 0.3 < progress < 0.4 else 1.0)

    with pytest.raises(DivergedError, match="step 3 of 6"):
        train.train(make_job(OnceInfinite()))


def test_a_batch_larger_than_the_data_is_the_data():
    result = train.train(make_job(batch_size=1000))
    assert result["steps_timed"] == 2


# --- the probe --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_warm_up_leaves_no_trace(method):
    job = make_job(method)
    before = {k: v.clone() for k, v in job.net.state_dict().items()}
    torch.manual_seed(3)
    rng = torch.get_rng_state()
    warm_up(job, job.data.train, 2)
    assert torch.equal(torch.get_rng_state(), rng)
    assert [k for k, v in job.net.state_dict().items() if not torch.equal(v, before[k])] == []
    assert [k for k, p in job.net.named_parameters() if p.grad is not None] == []


def test_the_warm_up_is_at_every_timestep_of_the_recipe(monkeypatch):
    """A kernel that is compiled for a T would else be compiled within the first timed epoch."""
    job = make_job(T=4, epochs=2, inherit=Inherit(T=2, epochs=1))
    seen = []
    step = job_module.train_step
    monkeypatch.setattr(
        job_module, "train_step", lambda j, at, *batch: seen.append(at.T) or step(j, at, *batch)
    )
    warm_up(job, job.data.train, 2)
    assert seen == [4, 4, 2, 2]


@pytest.mark.parametrize("method", METHODS)
def test_training_is_the_same_with_and_without_the_warm_up(monkeypatch, method):
    with_it, without = make_job(method), make_job(method)
    result = train.train(with_it)
    monkeypatch.setattr(train, "warm_up", lambda *_: None)
    assert fixed(train.train(without)) == fixed(result)
    assert_same_weights(with_it, without)


# --- the three selection rules ----------------------------------------------------------------


def epoch(number: int, val: float | None, test: float | None) -> dict[str, Any]:
    return {"epoch": number, "val_acc": val, "test_acc": test, "train_s": 1.0, "eval_s": 0.25}


@pytest.mark.parametrize(
    ("history", "last", "by_val", "val_epoch", "best"),
    [
        ([(0.1, 0.2)], 0.2, 0.2, 1, 0.2),
        ([(0.1, 0.9), (0.5, 0.3), (0.4, 0.6)], 0.6, 0.3, 2, 0.9),
        # of equals the first, though a later one has a better test accuracy
        ([(0.5, 0.1), (0.7, 0.4), (0.7, 0.8), (0.2, 0.5)], 0.5, 0.4, 2, 0.8),
        # epochs that were not evaluated do not take part
        ([(None, None), (0.3, 0.2), (None, None), (0.3, 0.1)], 0.1, 0.2, 2, 0.2),
    ],
)
def test_selection_rules_by_hand(history, last, by_val, val_epoch, best):
    events = [epoch(i, *pair) for i, pair in enumerate(history, 1)]
    got = train.summary(
        {
            "history": events,
            "step_ms": [1.0, 2.0, 3.0, 4.0, 10.0],
        }
    )
    assert got["test_acc"] == last
    assert (got["test_acc_best_val"], got["best_val_epoch"]) == (by_val, val_epoch)
    assert got["test_acc_best_test"] == best
    assert (got["train_s"], got["eval_s"]) == (len(history), 0.25 * len(history))
    assert [got[f"step_ms_p{p}"] for p in (25, 50, 75)] == [2.0, 3.0, 4.0]
    assert got["steps_timed"] == 5


def test_shares_of_the_parts_by_hand():
    got = job_module.shares({"data": 1.0, "forward": 3.0}, make_job().engine)
    assert got == ({"data_share": 0.25, "forward_share": 0.75}, {})


# --- resume -----------------------------------------------------------------------------------


def interrupted(job: Job, path: Path, epochs: int, steps_more: int = 2) -> None:
    """Train until some steps after the given epoch; leave its checkpoint as the worker does."""
    left = steps_more

    def stop() -> None:
        nonlocal left
        if len(job.events) >= epochs:
            left -= 1
            if left < 0:
                raise Stopped

    job.stop = stop
    job.save = lambda state: torch.save(state, path)  # type: ignore[assignment]
    with pytest.raises(Stopped):
        train.train(job)


@pytest.fixture
def save_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "EPOCH_CHECKPOINT_S", 0)


@pytest.mark.usefixtures("save_always")
@pytest.mark.parametrize(("optimizer", "steps"), [("sgd", 0), ("sgd", 1), ("adamw", 2)])
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_equals_an_undisturbed_one(tmp_path, method, optimizer, steps):
    recipe = {"epochs": 4, "optimizer": optimizer, "lr": 0.1 if optimizer == "sgd" else 0.01}
    data = dataclasses.replace(digits(), augment=pipeline(["crop", "flip"]))
    whole, part = (make_job(method, data=data, **recipe) for _ in range(2))
    result = train.train(whole)

    interrupted(part, tmp_path / "checkpoint.pt", 2, steps)
    rest = make_job(method, data=data, checkpoint=tmp_path / "checkpoint.pt", **recipe)
    assert fixed(train.train(rest)) == fixed(result)
    assert rest.events[0] == {"event": "resume", "epoch": 2, "step": steps}
    assert [e["epoch"] for e in rest.events[1:]] == [3, 4]
    assert_same_weights(rest, whole)
    # Optimizer and auxiliary parameters too.
    for key in ("trainable", "optimizer"):
        torch.testing.assert_close(rest.saved[-1][key], whole.saved[-1][key], rtol=0, atol=0)


@pytest.mark.usefixtures("save_always")
@pytest.mark.parametrize(
    ("places", "doubted"), [(("a", "a"), False), (("a", "b"), True)], ids=["same", "other"]
)
def test_times_of_two_places_are_not_one(tmp_path, places, doubted):
    """A run that goes on elsewhere, or with its batches in other parts, says so."""
    first, second = make_job(epochs=3), make_job(epochs=3, checkpoint=tmp_path / "checkpoint.pt")
    first.place, second.place = places
    interrupted(first, tmp_path / "checkpoint.pt", 1)
    warning = train.train(second)["timing_warning"]
    assert (warning == "done in several places, one after another: a; b") is doubted


@pytest.mark.usefixtures("save_always")
def test_the_energy_of_an_earlier_process_that_could_not_measure_is_not_forgotten(tmp_path):
    first, second = make_job(epochs=3), make_job(epochs=3, checkpoint=tmp_path / "checkpoint.pt")
    first.shared = "several runs shared the device"
    interrupted(first, tmp_path / "checkpoint.pt", 1)
    result = train.train(second)
    assert result["energy_measured_j"] is None
    assert result["nulls"]["energy_measured_j"]
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["energy"][2] == "several runs shared the device"


def test_a_member_of_the_team_that_died_is_not_waited_for():
    """To save a checkpoint waits for the device, and the device for whoever has died."""
    job = make_job()
    job.stop = lambda: (_ for _ in ()).throw(SnnbenchError("process 1 of 2: it died"))
    job.save = lambda state: pytest.fail("saved")
    with pytest.raises(SnnbenchError, match="it died"):
        train.train(job)


@pytest.mark.parametrize(("parts", "size"), [(1, 32), (2, 16), (4, 8)])
def test_gradients_are_compared_on_what_fits_into_a_step(monkeypatch, parts, size):
    job = make_job(batch_size=32, batch_split=parts)
    monkeypatch.setattr(evaluate, "fidelity", lambda m, n, x, y, p: {"n": (x.shape[1], len(y))})
    assert evaluate.compare_gradients(job, job.data.train, 2, 0.0)["n"] == (size, size)


@pytest.mark.usefixtures("save_always")
def test_a_run_resumed_after_its_last_epoch_only_measures(tmp_path):
    whole = make_job(epochs=2)
    whole.save = lambda state: torch.save(state, tmp_path / "checkpoint.pt")  # type: ignore
    result = train.train(whole)
    again = make_job(epochs=2, checkpoint=tmp_path / "checkpoint.pt")
    assert fixed(train.train(again)) == fixed(result)
    assert [e["event"] for e in again.events] == ["resume"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def without_key(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    del state["optimizer"]
    torch.save(state, path)


def of_another_net(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    state["trainable"] = nn.Linear(2, 2).state_dict()
    torch.save(state, path)


@pytest.mark.usefixtures("save_always")
@pytest.mark.parametrize(
    "damage",
    [
        cut,
        flip,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\0" * 5000),
        lambda path: path.write_text("no checkpoint"),
        lambda path: torch.save([1, 2], path),
        without_key,
        of_another_net,
    ],
    ids=["cut", "flipped", "empty", "zeros", "text", "list", "without_key", "of_another_net"],
)
def test_a_damaged_checkpoint_starts_the_run_afresh_and_says_so(
    tmp_path, damage: Callable[[Path], Any]
):
    path = tmp_path / "checkpoint.pt"
    interrupted(make_job(epochs=3), path, 1)
    damage(path)
    whole, rest = make_job(epochs=3), make_job(epochs=3, checkpoint=path)
    result = train.train(whole)
    assert fixed(train.train(rest)) == fixed(result)
    assert rest.events[0]["event"] == "restart"
    assert "checkpoint" in rest.events[0]["reason"]
    assert_same_weights(rest, whole)


def test_a_checkpoint_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"trainable": Evil()}, tmp_path / "checkpoint.pt")
    job = make_job(checkpoint=tmp_path / "checkpoint.pt")
    train.train(job)
    assert job.events[0]["event"] == "restart"
    assert not (tmp_path / "ran").exists()


def test_short_runs_write_no_checkpoint():
    job = make_job()
    train.train(job)
    assert job.saved == []

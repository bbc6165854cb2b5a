"""Time inheritance, fidelity along training, accuracy with heads, published figures, plots."""

import dataclasses
import json

import pytest
import torch
from conftest import without_timing, write_suite
from test_train import make_job

from snnbench import train as training
from snnbench.claims import published_claims
from snnbench.methods.shortcut import Shortcut
from snnbench.report import content, markdown
from snnbench.spec import Every, Inherit, MeasureConfig
from snnbench.store import SuiteFolder
from snnbench.suite import load, shipped
from snnbench.tables import Writer
from snnbench.training.recipe import phases

pytestmark = pytest.mark.usefixtures("one_thread")


def measured(job, **measure):
    job.spec = dataclasses.replace(job.spec, measure=MeasureConfig(**measure))
    return job


def test_time_inheritance_is_two_trainings_in_a_row():
    """The second phase starts from the first one's weights with a new optimizer and schedule."""
    both = make_job(T=3, epochs=2, inherit=Inherit(T=1, epochs=1, lr=0.05))
    result = training.train(both)
    assert [(e["T"], e["epoch"]) for e in result["history"]] == [(1, 1), (3, 2), (3, 3)]

    first, second = (phases(both.spec, 3)[i] for i in (0, 1))
    assert (first.T, first.first, first.end, first.steps, first.recipe.lr) == (1, 0, 1, 3, 0.05)
    assert (second.T, second.first, second.end, second.steps, second.recipe.lr) == (3, 1, 3, 6, 0.1)

    early = make_job(T=1, epochs=1, lr=0.05)
    training.train(early)
    late = make_job(T=3, epochs=2)
    late.net.load_state_dict(early.net.state_dict())
    late.engine.take(late.net)
    splits = late.data.train
    at = training.begin(late, splits)
    for epoch in (0, 1):  # the same batches as epochs 1 and 2 of the run in two phases
        moved = dataclasses.replace(phases(late.spec, 3)[0], first=1)
        at.plan, at.state["step"] = [moved], 0
        training.train_epoch(late, at, splits, moved, epoch + 1)
    for a, b in zip(both.net.parameters(), late.net.parameters(), strict=True):
        assert torch.equal(a, b)


def test_selection_looks_at_the_last_phase_only():
    result = training.train(make_job(T=2, epochs=1, inherit=Inherit(T=1, epochs=3)))
    assert result["epochs"] == 4
    assert result["best_val_epoch"] == 4
    assert result["steps_timed"] == 3


@pytest.mark.parametrize("save_at", [1, 2])
def test_a_run_resumed_in_either_phase_equals_an_undisturbed_one(tmp_path, monkeypatch, save_at):
    monkeypatch.setattr(training, "EPOCH_CHECKPOINT_S", 0.0)
    recipe = {"T": 2, "epochs": 2, "inherit": Inherit(T=1, epochs=2), "optimizer": "adam"}
    whole = make_job(**recipe)
    expected = training.train(whole)
    torch.save(whole.saved[save_at], tmp_path / "c.pt")
    again = make_job(checkpoint=tmp_path / "c.pt", **recipe)
    got = training.train(again)
    assert without_timing(got["history"]) == without_timing(expected["history"])
    for a, b in zip(whole.net.parameters(), again.net.parameters(), strict=True):
        assert torch.equal(a, b)


def test_fidelity_is_measured_at_the_start_then_every_so_often_and_at_the_end():
    job = measured(make_job("tet", epochs=5), gradient_fidelity=Every(2))
    seen = training.train(job)["fidelity"]
    assert [at["epoch"] for at in seen] == [0, 2, 4, 5]
    assert all(-1 <= layer["cos"] <= 1 for at in seen for layer in at["layers"])


def test_fidelity_costs_nothing_when_off_and_changes_nothing_when_on(monkeypatch):
    plain = make_job("rate")
    training.train(plain)
    watched = measured(make_job("rate"), gradient_fidelity=Every(1))
    training.train(watched)
    for a, b in zip(plain.net.parameters(), watched.net.parameters(), strict=True):
        assert torch.equal(a, b)

    def never(*_):
        raise AssertionError("measured although it is off")

    monkeypatch.setattr(training, "compare_gradients", never)
    assert training.train(make_job("rate"))["fidelity"] == []


def test_accuracy_with_heads_is_logged_beside_the_plain_one():
    evolutionary = training.train(make_job("shortcut"))
    assert evolutionary["test_acc_with_heads"] == evolutionary["test_acc"]
    constant = make_job(Shortcut(Shortcut.Config(schedule="constant", lambda0=1.0)), epochs=4)
    assert 0 <= training.train(constant)["test_acc_with_heads"] <= 1
    assert training.train(make_job("bptt"))["test_acc_with_heads"] is None


def test_a_learned_decay_is_trained():
    from snnbench.models.convnet import ConvNet
    from snnbench.neurons import LIF

    job = make_job()
    job.net = ConvNet(ConvNet.Config(width=4), (1, 8, 8), 10, LIF(decay=0.5, learn_decay=True))
    training.train(job)
    assert float(job.net.conv1.decay_logit.detach()) != 0


@pytest.mark.parametrize("name", [n for n in shipped() if n.startswith("papers/")])
def test_paper_suites_and_their_claims_fit_together(name):
    suite = load(name)
    for claim in published_claims():
        if claim.suite == suite.name:
            assert claim.dataset in suite.axes.dataset
            assert claim.model in suite.axes.model
            assert claim.T in suite.axes.T
            assert claim.epochs == suite.train.epochs
            fitting = [m for m in suite.method if m["name"] == claim.method]
            assert fitting
            assert set(claim.options or {}) <= {k for m in fitting for k in m}
    names = {load(n).name for n in shipped()}
    assert {c.suite for c in published_claims()} <= names


@pytest.mark.parametrize(
    ("epochs", "best", "width", "verdict"),
    [
        (300, 0.7250, 1.0, "inside ±1 (+0.28)"),
        (300, 0.7000, 1.0, "outside ±1 (-2.22)"),
        (1, 0.7222, 1.0, "not comparable: 1 epochs, not 300"),
        (300, 0.7222, 0.5, "not comparable: other model.width"),
    ],
)
def test_a_published_figure_stands_beside_the_measured_one(tmp_path, epochs, best, width, verdict):
    paper = load("papers/shortcut")
    spec = dataclasses.replace(
        make_job().spec, dataset="cifar100", model="resnet18", method="bptt", T=4,
        method_config={"truncation": None}, train=paper.train, model_options={"width": width},
        data={**paper.data, "train_limit": None, "test_limit": None},
    )  # fmt: skip
    folder = SuiteFolder(tmp_path / "papers-shortcut")
    run = folder.run(spec.run_id)
    run.create(spec)
    accuracies = dict.fromkeys(("test_acc", "test_acc_best_val", "test_acc_best_test"), best)
    run.finish({"status": "done", "reason": "", "epochs": epochs, **accuracies})
    Writer("papers-shortcut", folder).write()
    report = content.build(folder)
    (row,) = report.published
    assert row[4] == "72.22"
    assert row[6] == verdict
    assert verdict in markdown.render(report)


def test_unverified_figures_say_so(tmp_path):
    claims = [c for c in published_claims() if not c.verified]
    assert claims
    assert all("94.44" not in str(c.value) for c in claims)


def test_figures_are_drawn_from_committed_tables(bench, tmp_path):
    suite = write_suite(tmp_path / "t.toml", ["bptt", "rate"], epochs=1)
    suite.write_text(suite.read_text() + "[measure.gradient_fidelity]\nevery = 1\n")
    results = tmp_path / "results"
    done = bench.run("run", suite, "--results", results)
    assert done.returncode == 0, done.stderr
    for path in (results / "tiny" / "runs").rglob("*"):
        if path.is_file():
            path.unlink()  # only the tables are committed
    for figure in ("fidelity", "accuracy", "saved", "step", "cosine"):
        drawn = bench.run("plot", figure, "tiny", "--results", results)
        assert drawn.returncode == 0, drawn.stderr
        png = (results / "tiny" / f"{figure}.png").read_bytes()
        assert png.startswith(b"\x89PNG")
        assert len(png) > 5000
    svg = bench.run("plot", "saved", "tiny", "--results", results, "-o", tmp_path / "x" / "s.svg")
    assert svg.returncode == 0
    assert "<svg" in (tmp_path / "x" / "s.svg").read_text()
    bad = bench.run("plot", "nonsense", "tiny", "--results", results)
    assert bad.returncode == 2
    assert "unknown figure 'nonsense'" in bad.stderr
    bad = bench.run("plot", "saved", "tiny", "--results", results, "-o", tmp_path / "s.nope")
    assert bad.returncode == 2
    assert bad.stderr.startswith("error: ")


def test_the_methods_own_timesteps(bench, tmp_path):
    suite = write_suite(tmp_path / "t.toml", ["bptt", "ann\nT = 1"], epochs=1)
    planned = json.loads(bench.run("plan", suite, "--json", "--results", tmp_path).stdout)
    assert [(r["method"], r["T"]) for r in planned["runs"]] == [("bptt", 2), ("ann", 1)]


@pytest.mark.slow
@pytest.mark.parametrize("paper", ["rate", "tet", "shortcut", "grad_scale"])
def test_paper_suites_try_out_on_real_cifar(bench, tmp_path, data_root, paper):
    small = ["train.epochs=1", "axes.T=[2]", "axes.seed=[0]", "axes.dataset=[cifar100]",
             "data.train_limit=100", "data.test_limit=100", "train.batch_size=50"]  # fmt: skip
    model = {
        "rate": "resnet18",
        "tet": "resnet19",
        "shortcut": "resnet34",
        "grad_scale": "resnet20",
    }
    small += [f"axes.model=[{model[paper]}]", "model.width=0.0625"]
    sets = [word for setting in small for word in ("--set", setting)]
    done = bench.run(
        "run", f"papers/{paper}", *sets, "--data-root", data_root, "--results", tmp_path
    )
    assert done.returncode == 0, done.stderr
    report = bench.run("report", f"papers-{paper}", "--results", tmp_path, "--format", "md").stdout
    assert ("not comparable: 1 epochs, not 300" in report) is (paper != "grad_scale")

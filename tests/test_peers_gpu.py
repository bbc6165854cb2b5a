"""Peers on a GPU, as far as none is needed: line-up, rows, goals, SpikingJelly's codes."""

from __future__ import annotations

import os
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_peers import CONVNET, made, needs, timed

from snnbench import registry
from snnbench.errors import WorkerError
from snnbench.measure.memory import give_back_freed_memory
from snnbench.peers import bench, contestants, libraries, lineup, tables
from snnbench.peers.contestants import Entry
from snnbench.peers.results import goals

CUDA = torch.device("cuda")
PEER = "spikingjelly:multi"


def on_gpu(ms_of, net="resnet18", T=4, **peaks):
    """Contestants by their names, on a machine that changes its speed from round to round."""
    rows = [timed(name, ms, 3 * ms, 2 * ms) for name, ms in ms_of.items()]
    for row in rows:
        row.peak_bytes = peaks.get(row.name.rpartition("+")[2])
    return made(*rows, net=net, device="cuda", T=T)


# ------------------------------------------------------------------- line-up


def test_the_line_up_has_defaults_and_tuned_ones():
    names = bench.line_up("cuda:1")
    assert names == lineup.line_up_of_gpu()
    assert len(names) == len(set(names))
    families = {bench.parse(name)[0]["family"] for name in names}
    assert families == {*lineup.KINDS, "ours", "published"}
    assert not [name for name in names if "+ma" in name]  # a setting of the CPU's memory
    assert {f"{PEER}+tf32", "snntorch:step+tf32", "norse:step+tf32", "ours:auto+cl"} < {*names}
    for who in ("floor:ann", PEER, "ours:auto", "ours:auto:rate"):
        assert {f"{who}+cl+fp16", f"{who}+cl+fp16+cg"} < {*names}


def test_a_layer_alone_has_a_line_up_of_its_own():
    settings = bench.Settings(device="cuda")
    assert settings.contestants("lif") == settings.contestants("bn-lif") == bench.LINE_UP_ALONE
    assert settings.contestants("vgg11") == lineup.line_up_of_gpu()
    assert len({str(bench.parse(name)) for name in bench.LINE_UP_ALONE}) == 10


@pytest.mark.parametrize("net", ["vgg11", "resnet18", "lif", "bn-lif"])
def test_all_goals_can_be_measured_with_the_line_up(net):
    names = bench.Settings(device="cuda").contestants(net)
    found = goals(made(*(timed(n, 1.0, peak_bytes=1) for n in names), net=net, device="cuda"))
    assert None not in [goal.met for goal in found]


@pytest.mark.parametrize("net", bench.ON_GPU)
def test_whole_width_is_what_a_model_has_without_options(net):
    config = registry.find("models", bench.NETS[net]["model"]).load().Config
    assert config(**bench.ON_GPU[net]["options"]).width == 1.0


# ------------------------------------------------------------ rows and goals


def test_our_row_is_the_usual_one_in_fp16():
    other = ("+cl+fp16+cg", "+cl+fp16+tc", "+cl+fp16+smallest", "+cl+fp16+balanced",
             "+cl+bf16", "+cl", "+cl+tf32", "+fp16")  # fmt: skip
    faster = {f"{who}{s}": 1.0 for who in ("floor:ann", "ours:auto", "ours:auto:rate")
              for s in other}  # fmt: skip
    usual = {f"{who}+cl+fp16": 9.0 for who in ("ours:auto:rate", "ours:auto", "floor:ann")}
    usual |= {"ours:native+cl+fp16": 5.0}
    result = on_gpu(faster | usual)
    found = [result.ours, result.rate, result.floor]
    assert [row.name for row in found] == [
        "ours:auto+cl+fp16", "ours:auto:rate+cl+fp16", "floor:ann+cl+fp16",
    ]  # fmt: skip
    assert on_gpu({"floor:copy+cl+fp16": 1.0}, net="lif").floor.name == "floor:copy+cl+fp16"
    assert on_gpu({"ours:auto+cl": 1.0}).ours is None
    result.device = "cpu"
    assert result.ours.name == "ours:auto+cl"


def test_the_fastest_in_half_precision_may_be_recorded():
    result = on_gpu({"ours:auto+cl": 1.0, "ours:auto:rate+cl+fp16": 2.0, "ours:auto+cl+fp16": 4.0,
                     "ours:auto+cl+fp16+cg": 3.0})  # fmt: skip
    assert result.half.name == "ours:auto+cl+fp16+cg"
    assert result.fastest_half("ours", method=["rate"]).name == "ours:auto:rate+cl+fp16"
    assert result.fastest_half("floor", "ann") is None


def test_torch_is_in_tf32_by_default_on_a_gpu():
    result = on_gpu({PEER: 1.0, f"{PEER}+tf32": 1.0, "norse:step": 1.0})
    names = [result.default(who).name for who in ("spikingjelly", "norse")]
    assert names == [f"{PEER}+tf32", "norse:step"]
    assert result.default("snntorch") is None
    result.device = "cpu"
    assert result.default("spikingjelly").name == PEER


FIELD = {
    "floor:ann+tf32": 1.0, "floor:ann+cl+fp16": 10.0, "floor:ann+cl+fp16+cg": 8.5,
    f"{PEER}+tf32": 28.0, PEER: 30.0, f"{PEER}+cl+fp16": 20.0, f"{PEER}+cl+fp16+cg": 12.0,
    "ours:auto+cl": 5.0, "ours:auto+cl+fp16": 12.0, "ours:auto+cl+fp16+cg": 9.6,
    "ours:auto+cl+fp16+smallest": 20.0,
    "ours:auto:rate+cl+fp16": 7.0, "ours:auto:rate+cl+fp16+cg": 5.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("net", "T", "expected"),
    [
        ("resnet18", 4, [("G4", 9.6 / 8.5, True), ("G3", 1.25, False), ("G3", 28 / 9.6, True),
                         ("G6", 5 / 9.6, True)]),
        ("vgg11", 8, [("G4", 9.6 / 8.5, True), ("G5", 1.25, False), ("G5", 28 / 9.6, False),
                      ("G6", 5 / 9.6, False)]),
        ("digits", 6, [("G4", 9.6 / 8.5, True)]),
    ],
)  # fmt: skip
def test_goals_on_a_gpu(net, T, expected):
    found = goals(on_gpu(FIELD, net, T))
    times = [goal for goal in found if goal.id != "G7"]
    assert [(goal.id, goal.met) for goal in times] == [(id, met) for id, _, met in expected]
    for goal, (_, median, _) in zip(times, expected, strict=True):
        assert goal.measured == pytest.approx((median, median, median))
    best = f"SpikingJelly at its strongest ({PEER}+cl+fp16+cg)"
    assert [best in goal.what for goal in times].count(True) == (net in ("resnet18", "vgg11"))


@pytest.mark.parametrize(("faster", "met"), [(PEER, False), ("floor:ann+cl+bf16", False),
                                             ("ours:native+cl+fp16", True)])  # fmt: skip
def test_the_fastest_of_each_counts(faster, met):
    """The rival's in any precision."""
    found = goals(on_gpu(FIELD | {faster: 6.0}))
    expected = {
        PEER: (9.6 / 8.5, 6 / 9.6),
        "floor:ann+cl+bf16": (9.6 / 6, 12 / 9.6),
        "ours:native+cl+fp16": (6 / 8.5, 12 / 6),
    }
    assert [goal.measured.median for goal in found[:2]] == pytest.approx(expected[faster])
    assert all(goal.met for goal in found[:3]) == met


def test_the_goal_of_memory_is_that_of_peaks():
    """The setting last in the name tells them apart; a recorded step has no peak."""
    rows = {f"{PEER}+cl+fp16": 1.0, "ours:auto+cl+fp16+smallest": 1.0}
    (_, _, _, _, ours, smallest) = goals(on_gpu(rows, fp16=100, smallest=29))
    assert (ours.id, ours.measured, ours.met) == ("G7", None, None)
    assert (smallest.id, smallest.measured, smallest.met) == ("G7", 0.29, True)
    result = on_gpu(rows | {"ours:auto+cl+fp16": 1.0}, fp16=100, smallest=31)
    result.named("ours:auto+cl+fp16").peak_bytes = 50
    found = [(goal.measured, goal.met) for goal in goals(result)[-2:]]
    assert found == [(0.5, True), (0.31, False)]
    assert [goal.measured for goal in goals(on_gpu(rows, smallest=29))[-2:]] == [None, None]


@pytest.mark.parametrize(
    ("net", "ours_ms", "expected"),
    [
        ("lif", 6.0, [("G1", 5 / 2 * 2 / 6, True), ("G1", 9 / 6, False)]),
        ("lif", 5.0, [("G1", 5 / 2 * 2 / 5, True), ("G1", 9 / 5, True)]),
        ("bn-lif", 12.0, [("G2", 8 / 2 * 2 / 12, False), ("G2", 9 / 12, False)]),
        ("bn-lif", 4.0, [("G2", 8 / 2 * 2 / 4, True), ("G2", 9 / 4, True)]),
    ],
)
def test_goals_of_a_layer_alone(net, ours_ms, expected):
    """A copy reads and writes one number for each neuron and timestep."""
    rows = {"floor:copy+cl+fp16": 2.0, "ours:auto+cl+fp16": ours_ms, PEER: 18.0,
            f"{PEER}+cl+state16+fp16": 9.0}  # fmt: skip
    found = goals(on_gpu(rows, net))
    assert [(goal.id, goal.met) for goal in found] == [(id, met) for id, _, met in expected]
    assert [goal.measured.median for goal in found] == pytest.approx([m for _, m, _ in expected])
    assert f"({PEER}+cl+state16+fp16)" in found[1].what
    del rows["floor:copy+cl+fp16"]
    assert [goal.met is None for goal in goals(on_gpu(rows, net))] == [True, False]


def test_what_has_no_rows_is_not_measured():
    assert [(g.id, g.met) for g in goals(on_gpu({}))] == [
        ("G4", None), ("G3", None), ("G3", None), ("G6", None), ("G7", None), ("G7", None),
    ]  # fmt: skip
    assert {g.met for g in goals(on_gpu({}, "bn-lif"))} == {None}


def test_the_report_names_the_machine_of_the_goals():
    assert "Goals, set for one H200:" in tables.to_markdown([on_gpu(FIELD)])
    on_cpu = made(timed("ours:auto+cl", 1.0), timed("floor:copy+cl", 1.0), net="lif")
    assert goals(on_cpu) == []
    assert "Goals" not in tables.to_markdown([on_cpu])


# ------------------------------------------------------- codes of SpikingJelly


@pytest.fixture
def sj(monkeypatch):
    """SpikingJelly of any code, on a machine where it has chosen."""
    needs("spikingjelly")
    monkeypatch.setenv("SJ_LIF_CUDA_IMPLEMENTATION", "as before")
    chosen = SimpleNamespace(
        _get_cuda_selection=lambda device: SimpleNamespace(name=f"eager on {device}"),
        _get_compile_selection=lambda device: SimpleNamespace(name=f"compiled on {device}"),
    )
    fake = SimpleNamespace(_selection=chosen)
    monkeypatch.setitem(sys.modules, "spikingjelly._ops.lif", fake)
    return lambda code=None: libraries.SpikingJelly("multi", code)


@pytest.mark.parametrize(
    ("code", "compiled", "half", "path"),
    [
        (None, False, False, "eager on cuda"),
        (None, True, False, "compiled on cuda"),
        ("triton", False, False, "eager on cuda"),
        (None, False, True, "torch"),
        (None, True, True, "torch"),
        ("fp16", False, True, "triton"),
        ("fp32", True, True, "triton"),
        ("cupy", False, True, "cupy"),
    ],
)
def test_which_code_ran_is_told(sj, code, compiled, half, path):
    assert sj(code).path(CUDA, compiled, half) == path
    implementation = os.environ["SJ_LIF_CUDA_IMPLEMENTATION"]
    assert implementation == ("triton" if code == "triton" else "as before")


def test_which_code_ran_is_not_known(sj, monkeypatch):
    assert sj().path(torch.device("cpu"), False, False) == ""
    monkeypatch.setitem(sys.modules, "spikingjelly._ops.lif", SimpleNamespace())
    assert sj().path(CUDA, False, False) == ""


def test_cupy_code_finds_the_numpy_of_its_time(sj, monkeypatch):
    monkeypatch.delattr(np, "int", raising=False)
    sj("triton")
    assert not hasattr(np, "int")
    sj("cupy")
    assert np.int is int
    del np.int


@pytest.mark.parametrize("code", libraries.STATES)
def test_the_type_of_the_membrane_is_asked_for(sj, monkeypatch, code):
    library = sj(code)

    def prepare(node, device, config):
        return SimpleNamespace(model=(type(node).__name__, device, config))

    fake = SimpleNamespace(prepare_model_for_precision=prepare)
    monkeypatch.setattr(libraries, "imported", lambda module: fake)
    wanted = ("LIFNode", "cuda", {"mode": "fp32", "neuron_storage": code})
    assert library.neuron(None) == wanted


def test_version_0_gets_our_surrogate_as_cuda_code(sj):
    library = sj("cupy")
    library.nodes = SimpleNamespace(LIFNode=lambda **options: options)
    options = library.neuron(None)
    assert options["backend"] == "cupy"
    c = {"fmaxf": max, "fabsf": abs, "__hmax2": max, "__habs2": abs, "__float2half2_rn": float,
         "__hsub2": lambda a, b: a - b}  # fmt: skip
    for dtype in ("float", "half2"):
        code = options["surrogate_function"].cuda_codes("g", "u", dtype)
        y, value = re.fullmatch(r"(\w+) = (.*);", code).groups()
        assert y == "g"
        assert value.startswith({"float": "fmaxf(", "half2": "__hmax2("}[dtype])
        for u in (-1.5, -1.0, -0.25, 0.0, 0.5, 2.0):
            found = eval(re.sub(r"(\d\.\d)f", r"\1", value), c | {"u": u})
            assert found == libraries.NEURON.surrogate.grad(torch.tensor(u)).item()


@pytest.mark.parametrize("code", ["cupy", "fp16", "fp32"])
def test_a_code_that_is_not_here_is_absent(code, monkeypatch):
    needs("spikingjelly")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(WorkerError, match=rf"^spikingjelly: {code} cannot be had: "):
        contestants.build(Entry("spikingjelly", "multi", code=code), CONVNET)


# ----------------------------------------------------------------- the others


def test_neurons_stay_in_training_mode():
    needs("spikingjelly")
    peer = contestants.build(Entry("spikingjelly", "multi"), CONVNET, contestants.network(CONVNET))
    parts = [m for m in peer.net.eval().modules() if isinstance(m, contestants.Population)]
    neurons = [part.neuron for part in parts if part.neuron is not None]
    assert len(neurons) == 2
    assert all(m.training for neuron in neurons for m in neuron.modules())
    assert not any(m.training for part in parts for m in part.synapses.modules())
    peer.gradients(*contestants.batches(CONVNET, 1, 4)[0])
    assert None not in [p.grad for p in peer.net.parameters()]


def test_freed_memory_goes_back_to_where_it_came_from(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: seen.append("cuda"))
    give_back_freed_memory(torch.device("cpu"))
    assert seen == []
    give_back_freed_memory(CUDA)
    assert seen == ["cuda"]

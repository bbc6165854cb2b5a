"""One spiking layer alone: its spikes and gradient, what it keeps, and how it is timed."""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from test_kernels import needs_native
from test_peers import CONVNET, LIBRARIES, needs

from snnbench.errors import WorkerError
from snnbench.peers import alone, bench, contestants, libraries
from snnbench.peers.contestants import Entry, Setup

TINY = {net: Setup(net, {}, (4, 6, 6), T=3, B=2) for net in alone.LAYERS}
NUMBERS = 3 * 2 * 4 * 6 * 6
NATIVELY = [pytest.param(name, marks=needs_native) for name in ("ours:native", "ours:native+cl")]


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(alone, "SETTLE_S", 0.0)


def entry(name):
    found = Entry(**bench.parse(name)[0])
    if found.family in LIBRARIES:
        needs(found.family)
    return found


def built(name, net="lif"):
    """A contestant and its first batch."""
    contestant = alone.build(entry(name), TINY[net])
    ((x_TB, g_TB),) = alone.batches(TINY[net], 1, 2)
    return contestant, contestant.laid_out(x_TB), contestant.laid_out(g_TB)


@pytest.mark.parametrize("net", TINY)
def test_the_reference_is_the_neuron_on_the_normalised_input(net):
    contestant, x_TB, g_TB = built("ours:reference", net)
    s_TB, gx_TB = contestant.pass_(x_TB, g_TB)
    x_TB = x_TB.clone().requires_grad_()
    norm = F.batch_norm(x_TB.flatten(0, 1), None, None, training=True).unflatten(0, (3, 2))
    wanted = libraries.NEURON.scan(x_TB if net == "lif" else norm)
    wanted.backward(g_TB)
    assert 0.05 < wanted.mean() < 0.5
    assert torch.equal(s_TB, wanted)
    torch.testing.assert_close(gx_TB, x_TB.grad)


@pytest.mark.parametrize("net", TINY)
@pytest.mark.parametrize("name", ["ours:reference+cl", *NATIVELY,
                                  "spikingjelly:multi", "spikingjelly:multi+cl",
                                  "snntorch:multi", "norse:multi"])  # fmt: skip
def test_all_give_the_spikes_and_the_gradient_of_our_reference(name, net):
    found = alone.parity(entry(name), TINY[net])
    assert (found.spikes, found.differing, found.first) == (NUMBERS, 0, "")
    assert found.grad_error < 1e-6
    assert found.lowest_rate > 0.05


@pytest.mark.parametrize("net", TINY)
def test_in_half_precision_the_gradient_is_rounded(net):
    contestant, x_TB, g_TB = built("ours:auto+cl+bf16", net)
    assert {x_TB.dtype, g_TB.dtype, contestant.step(x_TB, g_TB).dtype} == {torch.bfloat16}
    assert 1e-4 < alone.parity(entry("ours:auto+cl+bf16"), TINY[net]).grad_error < 0.02


def test_parity_sees_another_neuron(monkeypatch):
    monkeypatch.setattr(contestants.Population, "forward",
                        lambda self, x: (x > 1.5).to(x) + 0 * x)  # fmt: skip
    found = alone.parity(entry("norse:multi"), TINY["lif"])
    assert found.differing > 0
    assert found.first == f"{found.differing} of {NUMBERS} in the layer"
    assert found.grad_error == pytest.approx(1.0)


def test_a_copy_goes_to_a_place_of_its_own():
    contestant, x_TB, g_TB = built("floor:copy+cl")
    other = x_TB + 1
    first, second = contestant.pass_(x_TB, g_TB)[0], contestant.pass_(other, g_TB)[0]
    assert torch.equal(first, x_TB)
    assert torch.equal(second, other)
    assert first.stride() == x_TB.stride()
    assert first.data_ptr() not in (x_TB.data_ptr(), second.data_ptr())
    assert contestant.pass_(x_TB, g_TB)[0].data_ptr() == first.data_ptr()
    assert alone.parity(entry("floor:copy"), TINY["lif"]) is None


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("floor:copy+cl", 0),
        ("ours:reference", 2),  # input and membranes
        ("spikingjelly:multi+cl", 2),
        pytest.param("ours:native+cl", 1, marks=needs_native),
        pytest.param("ours:native+cl+bf16", 0.5, marks=needs_native),
    ],
)
def test_bytes_that_are_kept(name, numbers):
    kept = built(name)[0].saved_bytes(*built(name)[1:])
    assert kept == pytest.approx(4 * numbers * NUMBERS, abs=8)


@pytest.mark.parametrize("name", ["ours:auto+cl", "spikingjelly:multi+cl", "floor:copy+cl"])
def test_a_step_copies_no_spikes(name):
    contestant, x_TB, g_TB = built(name)
    assert x_TB[0].is_contiguous(memory_format=torch.channels_last)
    given, pass_ = [], contestant.pass_
    contestant.pass_ = lambda *pair: given.append(pass_(*pair)) or given[-1]
    spike = contestant.step(x_TB, g_TB)
    ((s_TB, _),) = given
    assert (spike.dim(), spike.requires_grad) == (0, False)
    assert spike.untyped_storage().data_ptr() == s_TB.untyped_storage().data_ptr()


def test_the_time_is_that_of_one_step(monkeypatch):
    contestant, x_TB, g_TB = built("floor:copy")
    pairs, steps = [(x_TB, g_TB), (g_TB, x_TB)], []

    def step(x_TB, g_TB):
        time.sleep(1e-3)
        steps.append(x_TB)
        return torch.zeros(())

    contestant.step = step
    began = time.perf_counter()
    step_ms = contestant.time_ms(pairs)
    wall_ms = 1e3 * (time.perf_counter() - began)
    assert len(steps) == alone.REPEATS * alone.STEPS
    assert sum(x is x_TB for x in steps) == len(steps) / 2
    assert 1.0 <= step_ms <= wall_ms / (2 * alone.STEPS)  # two of three take as long, or longer
    monkeypatch.setattr(alone, "SETTLE_S", 0.05)
    contestant.time_ms(pairs)
    assert len(steps) > 2 * alone.REPEATS * alone.STEPS


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ours:auto+cg", "a layer alone has no such setting"),
        ("ours:auto:rate", "a layer alone has no such setting"),
        ("published:rate", "a layer alone has no such setting"),
        ("ours:auto+smallest", "a layer alone has no such setting"),
        ("ours:auto+balanced", "a layer alone has no such setting"),
        ("spikingjelly:step", "a layer alone runs all its timesteps at once"),
        ("norse:step", "a layer alone runs all its timesteps at once"),
        ("floor:ann", "a layer alone runs all its timesteps at once"),
        ("ours:auto+tf32", "tf32 needs a CUDA device"),
    ],
)
def test_what_a_layer_alone_cannot_be(name, message):
    with pytest.raises(WorkerError, match=f"^{message}$"):
        built(name)


def test_a_copy_of_a_network_is_refused():
    with pytest.raises(WorkerError, match="a copy stands beside one layer"):
        contestants.build(Entry("floor", "copy"), CONVNET)


def test_a_real_process_steps_a_layer_alone(monkeypatch):
    needs("spikingjelly")
    monkeypatch.setitem(bench.ALONE, "bn-lif", bench.ALONE["bn-lif"] | {"shape": [8, 16, 16]})
    names = ("floor:copy+cl", "ours:reference+cl", "spikingjelly:multi")
    settings = bench.Settings(only=names, rounds=2, T=2, batch=2, threads=1)
    result = bench.time_network("bn-lif", settings, lambda text: None, busy=lambda: None)
    copy, ours, peer = result.rows
    assert [row.reason for row in result.rows] == ["", "", ""]
    assert {len(row.round_ms) for row in result.rows} == {2}
    assert 0 < min(copy.round_ms) < min(ours.round_ms)
    assert copy.parity is None
    assert ours.parity["differing"] < 1e-4 * ours.parity["spikes"]
    assert peer.parity["spikes"] == 2 * 2 * 8 * 16 * 16
    assert (copy.saved_bytes, peer.version != "") == (0, True)
    for row in (ours, peer):
        assert row.saved_per_neuron_step == row.saved_bytes / (2 * 2 * 8 * 16 * 16)
        assert row.saved_per_neuron_step >= 4

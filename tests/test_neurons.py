"""Neuron dynamics against traces computed by hand, closed forms, and properties."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from snnbench.neurons import LIF, SURROGATES, ATan, Rectangle, Sigmoid, Triangle

SHAPES = [
    *(Triangle(width=width) for width in (0.5, 1.0, 2.0)),
    *(Rectangle(width=width) for width in (0.5, 1.0, 2.0)),
    *(Sigmoid(slope=slope) for slope in (1.0, 4.0)),
    *(ATan(slope=slope) for slope in (1.0, 2.0)),
]
RESETS = list(product(["soft", "hard"], [False, True]))


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def trace(neuron: LIF, c_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Spikes, membrane before the reset and after it, one neuron over time."""
    v, rows = None, []
    for c in c_T:
        s, v_pre, v = neuron.step(c, v)
        rows.append(torch.stack([s, v_pre, v]))
    s_T, v_pre_T, v_T = torch.stack(rows, dim=1)
    return s_T, v_pre_T, v_T


# --- traces by hand ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("neuron", "c", "v_pre", "s", "v"),
    [
        # Below, above, far above the threshold, negative input.
        (LIF(0.5, 1, "soft"), [0.5, 1, 2, -1], [0.5, 1.25, 2.125, -0.4375], [0, 1, 1, 0],
         [0.5, 0.25, 1.125, -0.4375]),
        (LIF(0.5, 1, "hard"), [0.5, 1, 2, -1], [0.5, 1.25, 2, -1], [0, 1, 1, 0],
         [0.5, 0, 0, -1]),
        # A threshold other than 1: soft reset takes v_th away, not 1.
        (LIF(0.5, 2, "soft"), [3, 2, 1, 1], [3, 2.5, 1.25, 1.625], [1, 1, 0, 0],
         [1, 0.5, 1.25, 1.625]),
        (LIF(0.5, 2, "hard"), [3, 2, 1, 1], [3, 2, 1, 1.5], [1, 1, 0, 0], [0, 0, 1, 1.5]),
        # Exact ties fire at the threshold, or above it only.
        (LIF(1, 1, "soft"), [1, 0.5, 0.5], [1, 0.5, 1], [1, 0, 1], [0, 0.5, 0]),
        (LIF(1, 1, "soft", strict=True), [1, 0.5, 0.5], [1, 1.5, 1], [0, 1, 0], [1, 0.5, 1]),
        (LIF(1, 1, "hard", strict=True), [1, 0.5, 0.5], [1, 1.5, 0.5], [0, 1, 0], [1, 0, 0.5]),
        # Decay 0 has no memory, decay 1 is integrate-and-fire.
        (LIF(0, 1, "soft"), [0.75, 0.75, 5, 0], [0.75, 0.75, 5, 0], [0, 0, 1, 0],
         [0.75, 0.75, 4, 0]),
        (LIF(1, 1, "soft"), [0.75, 0.75, 0.75, 0], [0.75, 1.5, 1.25, 0.25], [0, 1, 1, 0],
         [0.75, 0.5, 0.25, 0.25]),
        (LIF(1, 1, "hard"), [0.75, 0.75, 0.75, 0.75], [0.75, 1.5, 0.75, 1.5], [0, 1, 0, 1],
         [0.75, 0, 0.75, 0]),
    ],
)  # fmt: skip
def test_trace_by_hand(neuron, c, v_pre, s, v):
    got_s, got_v_pre, got_v = trace(neuron, f64(*c))
    # All values are dyadic: no rounding, no tolerance.
    assert got_s.tolist() == s
    assert got_v_pre.tolist() == v_pre
    assert got_v.tolist() == v
    assert neuron.scan(f64(*c)[:, None]).flatten().tolist() == s


@pytest.mark.parametrize(
    ("neuron", "u", "s", "h"),
    [
        # methods.md 2.3 (TET) and 4.5 (rate-based), both for the current of `test_vectors`.
        (LIF(0.5, 1, "hard", strict=True, surrogate=Triangle(width=1.0)),
         [0.6, 1.2, 1.2, 0.3], [0, 1, 1, 0], [0.6, 0.8, 0.8, 0.3]),
        *((LIF(0.2, 1, "soft", detach, surrogate=Sigmoid(slope=4.0)),
           [0.6, 1.02, 1.204, 0.3408], [0, 1, 1, 0], [0.559055, 0.998402, 0.850407, 0.249376])
          for detach in (True, False)),
        *((LIF(0.2, 1, "hard", detach, surrogate=Sigmoid(slope=4.0)),
           [0.6, 1.02, 1.2, 0.3], [0, 1, 1, 0], [0.559055, 0.998402, 0.855639, 0.216152])
          for detach in (True, False)),
    ],
)  # fmt: skip
def test_vectors(neuron, u, s, h):
    got_s, got_u, _ = trace(neuron, f64(0.6, 0.9, 1.2, 0.3))
    torch.testing.assert_close(got_u, f64(*u), atol=1e-6, rtol=0)
    torch.testing.assert_close(got_s, f64(*s), atol=0, rtol=0)
    torch.testing.assert_close(neuron.fire_grad(got_u), f64(*h), atol=1e-6, rtol=0)


# --- surrogates -------------------------------------------------------------------------------


def integral(surrogate, u: Tensor) -> Tensor:
    """The smooth step whose derivative the surrogate is."""
    match surrogate:
        case Sigmoid(slope=k):
            return 1 / (1 + torch.exp(-k * u))
        case ATan(slope=k):
            return 0.5 + torch.atan(math.pi / 2 * k * u) / math.pi
        case Triangle(width=w):
            x = (u / w).clamp(-1, 1)
            return 0.5 + x - x * x.abs() / 2
        case Rectangle(width=w):
            return (0.5 + u / w).clamp(0, 1)


@pytest.mark.parametrize("surrogate", SHAPES, ids=str)
def test_surrogate_is_the_derivative_of_its_integral(surrogate):
    eps = 1e-5
    # An odd offset: no point within eps of a kink or a jump.
    u = torch.linspace(-3.00123, 3.0123, 401, dtype=torch.float64)
    difference = (integral(surrogate, u + eps) - integral(surrogate, u - eps)) / (2 * eps)
    torch.testing.assert_close(surrogate.grad(u), difference, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("surrogate", SHAPES, ids=str)
def test_surrogate_has_area_one_and_is_symmetric(surrogate):
    # Midpoint rule over the whole line by u = tan(angle): the tails of atan are heavy.
    n = 200_000
    angle = (torch.arange(n, dtype=torch.float64) + 0.5) / n * math.pi - math.pi / 2
    u = torch.tan(angle)
    area = (surrogate.grad(u) * (1 + u.square())).sum() * math.pi / n
    assert area.item() == pytest.approx(1, abs=1e-4)
    near = torch.linspace(0, 3, 301, dtype=torch.float64)
    torch.testing.assert_close(surrogate.grad(near), surrogate.grad(-near), atol=1e-15, rtol=0)
    assert (surrogate.grad(u) >= 0).all()


@pytest.mark.parametrize(
    ("surrogate", "peak"),
    [
        (Triangle(width=1.0), 1.0),
        (Triangle(width=2.0), 0.5),
        (Rectangle(width=1.0), 1.0),
        (Rectangle(width=0.5), 2.0),
        (Sigmoid(slope=4.0), 1.0),
        (Sigmoid(slope=1.0), 0.25),
        (ATan(slope=2.0), 1.0),
        (ATan(slope=1.0), 0.5),
    ],
)
def test_surrogate_peaks_at_the_threshold(surrogate, peak):
    assert surrogate.grad(f64(0.0)).item() == pytest.approx(peak, abs=1e-15)
    u = torch.linspace(-3, 3, 601, dtype=torch.float64)
    assert surrogate.grad(u).max().item() <= peak + 1e-15


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("v_th", [1.0, 0.5])
def test_fire_sends_the_surrogate_back(name, v_th):
    neuron = LIF(v_th=v_th, surrogate=SURROGATES[name]())
    v_pre = torch.linspace(-1, 3, 50, dtype=torch.float64, requires_grad=True)
    upstream = torch.linspace(1, 2, 50, dtype=torch.float64)
    (grad,) = torch.autograd.grad(neuron.fire(v_pre), v_pre, upstream)
    assert torch.equal(grad, upstream * neuron.surrogate.grad(v_pre.detach() - v_th))
    assert torch.equal(neuron.fire_grad(v_pre.detach()) * upstream, grad)


@pytest.mark.parametrize(("reset", "detach"), RESETS)
@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("v_th", [1.0, 0.7])
def test_carry_is_what_autograd_carries(reset, detach, name, v_th):
    neuron = LIF(0.8, v_th, reset, detach, surrogate=SURROGATES[name]())
    v_pre = torch.linspace(-1, 2.5, 71, dtype=torch.float64, requires_grad=True)
    s, _, v = neuron.step(v_pre, None)
    _, v_pre_next, _ = neuron.step(torch.full_like(v_pre, 0.3), v)
    (grad,) = torch.autograd.grad(v_pre_next.sum(), v_pre)
    torch.testing.assert_close(neuron.carry(v_pre, s).detach(), grad, atol=1e-14, rtol=0)


# --- properties -------------------------------------------------------------------------------

quick = settings(derandomize=True, deadline=None, max_examples=60)
neurons = st.builds(
    LIF,
    decay=st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]),
    v_th=st.sampled_from([0.25, 0.5, 1.0, 1.5]),
    reset=st.sampled_from(["soft", "hard"]),
    detach_reset=st.booleans(),
    strict=st.booleans(),
    surrogate=st.sampled_from([make() for make in SURROGATES.values()]),
)


@st.composite
def currents(draw: st.DrawFn, unit: float = 1 / 64) -> Tensor:
    """A current c_TB, multiples of 1/64: sums of them are exact."""
    T, B = draw(st.integers(1, 7)), draw(st.integers(1, 3))
    values = draw(st.lists(st.integers(-200, 200), min_size=T * B, max_size=T * B))
    return torch.tensor(values, dtype=torch.float64).view(T, B) * unit


@quick
@given(neurons, currents())
def test_spikes_are_zero_or_one(neuron, c_TB):
    s_TB = neuron.scan(c_TB)
    assert s_TB.shape == c_TB.shape
    assert s_TB.dtype == c_TB.dtype
    assert ((s_TB == 0) | (s_TB == 1)).all()


@quick
@given(currents(), st.sampled_from([0.25, 0.5, 1.0, 1.5]), st.booleans())
def test_soft_reset_keeps_the_charge(c_TB, v_th, strict):
    s_TB, _, v_TB = trace(LIF(1.0, v_th, "soft", strict=strict), c_TB)
    assert torch.equal(c_TB.sum(0), v_TB[-1] + v_th * s_TB.sum(0))


@quick
@given(neurons, currents(unit=0.01), st.integers(-8, 8))
def test_unit_of_voltage_does_not_matter(neuron, c_TB, exponent):
    scaled = LIF(neuron.decay, neuron.v_th * 2.0**exponent, neuron.reset, strict=neuron.strict)
    assert torch.equal(scaled.scan(c_TB * 2.0**exponent), neuron.scan(c_TB))


@quick
@given(neurons, currents(), st.data())
def test_broken_current_stays_visible(neuron, c_TB, data):
    t, b = (data.draw(st.integers(0, n - 1)) for n in c_TB.shape)
    s_TB = neuron.scan(c_TB)
    broken_TB = c_TB.clone()
    broken_TB[t, b] = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    got_TB = neuron.scan(broken_TB)
    assert got_TB[t:, b].isnan().all()  # and the membrane never recovers
    got_TB[t:, b] = s_TB[t:, b]
    assert torch.equal(got_TB, s_TB)


@quick
@given(neurons, currents(), st.randoms(use_true_random=False))
def test_samples_do_not_see_each_other(neuron, c_TB, random):
    order = list(range(c_TB.shape[1]))
    random.shuffle(order)
    assert torch.equal(neuron.scan(c_TB[:, order]), neuron.scan(c_TB)[:, order])


@quick
@given(neurons, currents(), st.data())
def test_future_does_not_reach_the_past(neuron, c_TB, data):
    t = data.draw(st.integers(0, len(c_TB) - 1))
    changed_TB = c_TB.clone()
    changed_TB[t:] += data.draw(st.sampled_from([-3.0, 0.5, 3.0]))
    assert torch.equal(neuron.scan(changed_TB)[:t], neuron.scan(c_TB)[:t])


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("reset", ["soft", "hard"])
def test_scan_keeps_the_memory_layout(memory_format, T, reset):
    torch.manual_seed(0)
    flat = torch.randn(T * 2, 3, 4, 5).to(memory_format=memory_format)
    c_TB = flat.unflatten(0, (T, 2))
    s = LIF(reset=reset).scan(c_TB).flatten(0, 1)
    assert s.stride() == flat.stride()
    assert s.is_contiguous(memory_format=memory_format)
    reference = LIF(reset=reset).scan(c_TB.contiguous()).flatten(0, 1)
    assert torch.equal(s, reference)

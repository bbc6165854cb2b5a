"""The CPU kernel: C++ and OpenMP, compiled in seconds when it is first used, then cached.

The code knows nothing of torch, so it builds with any C++17 compiler and fits every torch; it is
called through ctypes.  The library is cached by the hash of its source, compiler and processor.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import platformdirs
import torch
from torch import Tensor

from snnbench.neurons import LIF
from snnbench.spec import digest

takes_two = normalises_rest = True
average_dtypes = (torch.float32,)
source = "C++ with OpenMP, one pass forward and one backward over all timesteps"

SOURCE = Path(__file__).with_name("native.cpp")
# No -ffast-math: NaN must stay NaN, and sums keep their order.  No contraction: a fused
# multiply-add would round the membrane differently from the reference.
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-fno-math-errno",
         "-fno-trapping-math")  # fmt: skip
VARIANTS = (("-march=native", "-fopenmp"), ("-march=native",), ())
KINDS = {"triangle": 0, "rectangle": 1, "sigmoid": 2, "atan": 3, "tanh": 4}
PARALLEL_FROM = 1 << 14  # elements; below, waking threads costs more than they save


class _Neuron(ctypes.Structure):
    """`Neuron` of native.cpp."""

    _fields_ = [
        *((n, ctypes.c_float) for n in ("decay", "gain", "v_th", "drop")),
        *((n, ctypes.c_int32) for n in ("hard", "detach", "strict")),
        *((n, ctypes.c_int32) for n in ("decay_input", "learn_decay", "surrogate")),
        ("shape", ctypes.c_float),
    ]


class _Norm(ctypes.Structure):
    """`Norm` of native.cpp."""

    _fields_ = [
        *((n, ctypes.c_void_p) for n in ("weight", "bias", "mean", "var")),
        *((n, ctypes.c_float) for n in ("eps", "share", "unbiased")),
        ("batch_stats", ctypes.c_int32),
    ]


class BuildError(OSError):
    """The compiler does not accept the code."""


def unavailable(device: torch.device) -> str | None:
    """Why this kernel cannot run here; None if it can. The first call may compile it."""
    if device.type != "cpu":
        return f"the native kernel runs on the CPU, not on {device.type}"
    try:
        library()
    except OSError as error:
        return str(error)
    return None


@cache
def library() -> Any:
    """The compiled code; raises OSError saying why there is none."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++"))), "")
    if not compiler:
        raise OSError("no C++ compiler was found (CXX, c++ or g++)")
    folder = platformdirs.user_cache_path("snnbench") / "native"
    key = digest(
        SOURCE.read_bytes(), str((FLAGS, VARIANTS)), compiler, _compiler_age(compiler), _cpu()
    )
    path = folder / f"{key[:16]}.so"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _built(compiler, path)
    except BuildError:
        raise
    except OSError:  # a cache that cannot be written, or not run from
        with tempfile.TemporaryDirectory() as own:  # a loaded library needs no file any more
            return _built(compiler, Path(own) / path.name)


def _built(compiler: str, path: Path) -> Any:
    """The library at `path`, compiled where it is missing or damaged."""
    if path.is_file():
        try:
            return _declared(ctypes.CDLL(str(path)))
        except (OSError, AttributeError):
            path.unlink()
    build(compiler, path)
    return _declared(ctypes.CDLL(str(path)))


def build(compiler: str, path: Path) -> None:
    """Compile to `path`, by rename; raises BuildError with the compiler's first complaint."""
    complaint = ""
    for variant in VARIANTS:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            command = [compiler, *FLAGS, *variant, str(SOURCE), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                made.replace(path)
                return
            lines = [ln for ln in done.stderr.splitlines() if "error" in ln] or ["no message"]
            complaint = complaint or lines[0].strip()[:200]
    raise BuildError(f"{compiler} cannot compile the native kernel: {complaint}")


def stats(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel of y [T, M, C], fp32."""
    C = y.shape[-1]
    mean, var = torch.empty(C), torch.empty(C)
    wide, rows = _wide(y), y.numel() // C
    library().snn_stats(*_pointers(wide), rows, C, *_pointers(mean, var), _threads(y.numel()))
    return mean, var


def affine(
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: tuple[Tensor | None, Tensor | None],
    eps: float,
    share: float,
    count: int,
    batch_stats: bool,
) -> Tensor:
    """a, b, mean and rstd of a normalisation by a batch y or by the running statistics, [4, C].

    `share` of those of the batch goes into the running ones, for `count` values a channel; all are
    fp32.
    """
    C = y.shape[-1]
    out, wide, rows = torch.empty(4, C), _wide(y), y.numel() // C
    unbiased = count / max(1, count - 1)
    norm = _Norm(*_pointers(weight, bias, *running), eps, share, unbiased, batch_stats)
    library().snn_affine(
        wide.data_ptr(), ctypes.byref(norm), rows, C, out.data_ptr(), _threads(y.numel())
    )
    return out


def fire(
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    rest: Tensor | None,
    decay: Tensor,
    neuron: LIF,
    T: int,
    rest_affine: tuple[Tensor, Tensor] | tuple[None, None] = (None, None),
) -> Tensor:
    """Spikes [T, M, C], in the dtype of y; the rest may have a scale and a shift of its own."""
    M, C = y.shape[1:]
    s, inputs = torch.empty(T, M, C), (_wide(y), _wide(rest), a, b, *rest_affine)
    library().snn_fire(
        *_pointers(*inputs),
        _stride(y), _struct(neuron, decay), T, M, C, s.data_ptr(), _threads(s.numel()),
    )  # fmt: skip
    return s.to(y.dtype)


def fire_backward(
    g: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    rest: Tensor | None,
    decay: Tensor,
    neuron: LIF,
    T: int,
    batch_stats: bool,
    g2: Tensor | None = None,
    rest_constants: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of y, rest, weight, bias and decay for the spikes' gradient g [T, M, C].

    g2 is added to g.  With the rest's own a, b, mean and rstd its weight's gradient comes last; its
    bias has that of y's.
    """
    M, C = y.shape[1:]
    gy, inputs = torch.empty(y.shape), (_wide(g), _wide(g2), _wide(y), _wide(rest))
    grest = None if rest is None else torch.empty(rest.shape)
    gweight, gbias = (None, None) if a is None else (torch.empty(C), torch.empty(C))
    gdecay = torch.empty(1) if neuron.learn_decay else None
    grest_weight = None if rest_constants is None else torch.empty(C)
    library().snn_backward(
        *_pointers(*inputs, a, b, mean, rstd, *(rest_constants or [None] * 4)),
        _stride(y), _struct(neuron, decay), T, M, C,
        *_pointers(gy, grest, gweight, gbias, grest_weight, gdecay),
        batch_stats, _threads(g.numel()),
    )  # fmt: skip
    grest = None if grest is None else grest.to(y.dtype)
    return gy.to(y.dtype), grest, gweight, gbias, gdecay, grest_weight


def rate_fire(
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    rest: Tensor | None,
    decay: Tensor,
    neuron: LIF,
    T: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Spikes [T, M, C]; rate, eligibility and mean normalised input [M, C]."""
    M, C = y.shape[1:]
    # Each with a storage of its own: one of them may outlive the others.
    s, rate, elig = torch.empty(T, M, C), torch.empty(M, C), torch.empty(M, C)
    xhat = None if a is None else torch.empty(M, C)
    inputs = (_wide(y), _wide(rest), a, b, mean, rstd)
    library().snn_rate_fire(
        *_pointers(*inputs),
        _stride(y), _struct(neuron, decay), T, M, C,
        *_pointers(s, rate, elig, xhat), _threads(s.numel()),
    )  # fmt: skip
    return s.to(y.dtype), rate.to(y.dtype), elig, xhat


def rate_backward(
    g: Tensor, elig: Tensor, xhat: Tensor | None, a: Tensor | None, rested: bool, batch_stats: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the mean input and the rest [M, C], of weight and bias, for that of the rate."""
    M, C = elig.shape
    gc, inputs = torch.empty(M, C), (_wide(g), elig, xhat, a)
    gz = torch.empty(M, C) if rested and xhat is not None else None
    gweight, gbias = (None, None) if xhat is None else (torch.empty(C), torch.empty(C))
    library().snn_rate_backward(
        *_pointers(*inputs), M, C, *_pointers(gc, gz, gweight, gbias), batch_stats,
        _threads(gc.numel()),
    )  # fmt: skip
    return gc, gc if rested and gz is None else gz, gweight, gbias


def average(x: Tensor, k: int) -> Tensor:
    """Means of k x k windows of x [B, k h, k w, C], as [B, h, w, C]."""
    B, H, W, C = x.shape
    out = torch.empty(B, H // k, W // k, C)
    sizes = B * (H // k), W // k, C, k
    library().snn_average(x.data_ptr(), *sizes, out.data_ptr(), _threads(x.numel()))
    return out


def average_backward(g: Tensor, k: int) -> Tensor:
    """Gradient of x [B, k h, k w, C] for that of the means g [B, h, w, C]."""
    B, h, w, C = g.shape
    out = torch.empty(B, k * h, k * w, C)
    library().snn_average_backward(
        g.data_ptr(), B * h, w, C, k, out.data_ptr(), _threads(out.numel())
    )
    return out


def _pointers(*tensors: Tensor | None) -> list[int | None]:
    """Addresses; the caller keeps the tensors alive."""
    return [None if t is None else t.data_ptr() for t in tensors]


def _wide(x: Any) -> Any:
    return x if x is None or x.dtype == torch.float32 else x.float()


def _stride(y: Tensor) -> int:
    return 0 if len(y) == 1 else y.shape[1] * y.shape[2]


def _threads(elements: int) -> int:
    return torch.get_num_threads() if elements >= PARALLEL_FROM else 1


def _struct(neuron: LIF, decay: Tensor) -> Any:
    return _neuron(neuron, decay.item()) if neuron.learn_decay else _fixed(neuron)


@cache
def _fixed(neuron: LIF) -> Any:
    return _neuron(neuron, neuron.decay)


def _neuron(neuron: LIF, value: float) -> Any:
    shape = [v for k, v in vars(neuron.surrogate).items() if k != "name"]
    flags = (
        neuron.reset == "hard", neuron.detach_reset, neuron.strict,
        neuron.decay_input, neuron.learn_decay, KINDS[neuron.surrogate.name],
    )  # fmt: skip
    gain = value if neuron.decay_input else 1.0
    return ctypes.byref(_Neuron(value, gain, neuron.v_th, neuron.drop, *flags, *shape))


def _declared(code: Any) -> Any:
    """Argument types of every function: p address, n integer."""
    for name, kinds in (
        ("stats", "pnnppn"),
        ("affine", "ppnnpn"),
        ("fire", "ppppppnpnnnpn"),
        ("backward", "ppppppppppppnpnnnppppppnn"),
        ("rate_fire", "ppppppnpnnnppppn"),
        ("rate_backward", "ppppnnppppnn"),
        ("average", "pnnnnpn"),
        ("average_backward", "pnnnnpn"),
    ):
        function = getattr(code, f"snn_{name}")
        function.argtypes = [ctypes.c_void_p if k == "p" else ctypes.c_int64 for k in kinds]
        function.restype = None
    return code


def _compiler_age(compiler: str) -> str:
    found = Path(compiler).resolve().stat()
    return f"{found.st_size}:{found.st_mtime_ns}"


def _cpu() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((ln for ln in lines if ln.startswith(("flags", "Features"))), "")
    except OSError:
        return platform.processor() + platform.machine()

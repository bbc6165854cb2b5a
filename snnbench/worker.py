"""The child process: spec.json -> components from the registry -> train -> result.json.

It is entered through `main` with the folder of one run, or through `resolve`, which lets the
components validate a suite's options.
"""

from __future__ import annotations

import ctypes
import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from snnbench import machine, registry
from snnbench.allocator import keep_freed_memory
from snnbench.engine import Engine, resolve_precision, set_matmul_precision
from snnbench.errors import DivergedError, ResultsError, SnnbenchError, WorkerError
from snnbench.kernels.choice import choose
from snnbench.methods import contract as contract_of_methods
from snnbench.neurons import LIF, PRESETS, neuron_options
from snnbench.spec import SCHEMA, RunSpec, did_you_mean, sub_seed, validate
from snnbench.store import RunFolder, publish
from snnbench.train import Job, train

CLAIM_WAIT_S = 20.0


@dataclass(frozen=True)
class Context:
    """What belongs to this machine and not to the run: it is no part of the spec."""

    data_root: str
    allow_unverified_data: bool = False
    device: str = "auto"


class Stopped(BaseException):
    """The parent asked this process to end; not an Exception, so that nothing swallows it."""


class RunSkipped(Exception):
    """The combination makes no sense or cannot run here; the reason is an outcome."""


def resolve(request: dict[str, Any]) -> dict[str, Any]:
    """Options of all components, validated by them, with every default written out.

    `request` has data, model, neuron, datasets, models, methods [[path, {name, ...}], ...];
    the answer has errors and broken (lines), and data and model by name, neuron, methods.
    """
    errors: list[str] = []
    broken: list[str] = []

    def checked(kind: str, name: str, values: dict[str, Any], path: str) -> dict[str, Any]:
        try:
            config = registry.find(kind, name).load().Config
        except WorkerError as error:
            broken.append(str(error))
            return {}
        except SnnbenchError as error:
            errors.append(str(error))
            return {}
        found = validate(config, values, errors, path)
        return {} if found is None else asdict(found)

    data = {n: checked("datasets", n, request["data"], "data") for n in request["datasets"]}
    model = {n: checked("models", n, request["model"], "model") for n in request["models"]}
    methods = [
        {"name": entry["name"]}
        | checked("methods", entry["name"], {k: v for k, v in entry.items() if k != "name"}, path)
        for path, entry in request["methods"]
    ]
    neuron = None
    try:
        neuron = validate(LIF, neuron_options(request["neuron"]), errors, "neuron")
    except KeyError as error:
        name = str(error.args[0])
        errors.append(f'neuron = "{name}": unknown preset{did_you_mean(name, PRESETS)}')
    return {
        "errors": list(dict.fromkeys(errors)),
        "broken": list(dict.fromkeys(broken)),
        "data": data,
        "model": model,
        "neuron": {} if neuron is None else asdict(neuron),
        "methods": methods,
    }


def check_data(request: dict[str, Any]) -> dict[str, Any]:
    """Load each of the `datasets` [[name, options], ...]; the errors, one line each."""
    context, errors = Context(**request["context"]), []
    for name, options in request["datasets"]:
        try:
            _build("datasets", name, options).load(
                Path(context.data_root), context.allow_unverified_data
            )
        except SnnbenchError as error:
            errors.append(str(error))
    return {"errors": errors}


def contract(request: dict[str, Any]) -> dict[str, Any]:
    """The clauses of the method contract for the method `name`, as data."""
    try:
        method = registry.find("methods", request["name"]).load()
    except SnnbenchError as error:
        return {"errors": [str(error)], "checks": []}
    checks = contract_of_methods.check(
        lambda options: method(_config(method.Config, options)), method.bptt_limit[0]
    )
    return {"errors": [], "checks": [asdict(c) for c in checks]}


def main(folder: str, context: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> None:
    """Do one run, whatever comes of it; ends the process."""
    run = RunFolder(Path(folder))
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which decides
    _print_to(run.log)
    code = 1
    try:
        lock = run.claim(CLAIM_WAIT_S)
        if run.result() is None:
            _finish(run, Context(**context), send)
        lock.release()
        code = 0
    except Stopped:
        run.append({"event": "interrupted", "reason": "asked to stop", "time": time.time()})
        send({"event": "stopped"})
    except ResultsError as error:
        send({"event": "storage", "reason": str(error)})
    except BaseException:
        traceback.print_exc()
        send({"event": "crash", "reason": traceback.format_exc(limit=-1).splitlines()[-1]})
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # no time for destructors of a process that is done


def _finish(run: RunFolder, context: Context, send: Callable[[dict[str, Any]], None]) -> None:
    """Train, and publish the result or why there is none."""
    stop = _Stop()
    began = time.perf_counter()
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "run_id": run.run_id,
        "status": "done",
        "reason": "",
    }
    try:
        spec = run.spec()
        run.append(
            {"event": "start", "run_id": run.run_id, "pid": os.getpid(), "time": time.time()}
        )
        record |= {"spec": spec.to_json(), "source_hash": registry.source_hash()}
        record["components"] = {
            kind: registry.find(f"{kind}s", getattr(spec, kind)).describe()
            for kind in ("dataset", "model", "method")
        }
        device = _device(context.device)
        record["machine"] = machine.describe(device)
        record["allocator"] = keep_freed_memory()
        record |= _train(run, spec, context, device, stop, send, record["allocator"])
    except RunSkipped as error:
        record |= {"status": "skipped", "reason": str(error)}
    except DivergedError as error:
        record |= {"status": "diverged", "reason": str(error)}
    except ResultsError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        record |= {"status": "oom", "reason": _one_line(error)}
    except SnnbenchError as error:
        record |= {"status": "failed", "reason": str(error)}
    except Exception as error:
        traceback.print_exc()
        out_of_memory = isinstance(error, RuntimeError) and "not enough memory" in str(error)
        status = "oom" if out_of_memory else "failed"
        record |= {"status": status, "reason": f"{type(error).__name__}: {_one_line(error)}"}
    stop.ignore()
    record["worker_s"] = time.perf_counter() - began
    run.finish(record)
    if record["status"] == "done":
        run.checkpoint.unlink(missing_ok=True)


def _train(
    run: RunFolder,
    spec: RunSpec,
    context: Context,
    device: torch.device,
    stop: _Stop,
    send: Callable[[dict[str, Any]], None],
    allocator: str,
) -> dict[str, Any]:
    """Build what the spec names and train it; the metrics of the record."""
    began = time.perf_counter()
    engine = _engine(spec, device)
    setup_s = time.perf_counter() - began
    send(
        {
            "event": "engine",
            "device": device.type,
            "kernel": engine.choice.name,
            "passed_over": list(engine.choice.passed_over),
            "precision": engine.precision,
            "allocator": allocator,
        }
    )
    dataset = _build("datasets", spec.dataset, spec.data)
    data = dataset.load(Path(context.data_root), context.allow_unverified_data)

    method = _build("methods", spec.method, spec.method_config)
    torch.manual_seed(sub_seed(spec.seed, "init"))
    Model = registry.find("models", spec.model).load()
    options = _config(Model.Config, spec.model_options)
    net = Model(options, data.shape, data.classes, method.neuron or _config(LIF, spec.neuron))
    if why := method.supports(net, spec.T):
        raise RunSkipped(why)

    def emit(event: dict[str, Any]) -> None:
        run.append(event)
        send(event)

    def save(state: dict[str, Any]) -> None:
        buffer = io.BytesIO()  # torch's own writer hides why a file cannot be written
        torch.save(state, buffer)
        publish(run.checkpoint, lambda path: path.write_bytes(buffer.getbuffer()))

    job = Job(
        spec,
        net,
        method,
        data,
        engine,
        emit,
        save,
        checkpoint=run.checkpoint if run.checkpoint.is_file() else None,
        stop=stop.check,
    )
    return (
        train(job)
        | {
            "setup_s": setup_s,  # of the kernel: compiling it, or loading it
            "data_hash": data.data_hash[:16],
            "split_hash": data.split_hash[:16],
            "data_verified": data.verified,
            "samples": {"train": len(data.train), "val": len(data.val), "test": len(data.test)},
        }
    )


class _Stop:
    """SIGTERM sets a flag; the training loop looks at it between steps."""

    def __init__(self) -> None:
        self._asked = False
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_: object) -> None:
        self._asked = True

    def check(self) -> None:
        if self._asked:
            raise Stopped

    def ignore(self) -> None:
        """Training is over: let the result be written."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _config(cls: Any, values: dict[str, Any]) -> Any:
    errors: list[str] = []
    config = validate(cls, values, errors)
    if config is None:
        raise ValueError("; ".join(errors))
    return config


def _build(kind: str, name: str, values: dict[str, Any]) -> Any:
    cls = registry.find(kind, name).load()
    return cls(_config(cls.Config, values))


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise RunSkipped("no CUDA device is available here")
    return torch.device(name)


def _engine(spec: RunSpec, device: torch.device) -> Engine:
    """Kernel, precision and memory as the run asks for them; RunSkipped where one cannot be."""
    backends = {
        name: component.load() for name, component in registry.components("kernels").items()
        if spec.kernel in (name, "auto")
    }  # fmt: skip
    precision = resolve_precision(spec.precision, device)
    try:
        choice = choose(spec.kernel, backends, device)
    except RuntimeError as error:
        raise WorkerError(str(error)) from error
    if why := set_matmul_precision(precision, device):
        raise RunSkipped(why)
    return Engine(device, choice, precision, spec.memory)


def _die_with_parent() -> None:
    """Ask the kernel to end this process when its parent is gone (Linux)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _print_to(log: Path) -> None:
    """Send everything this process prints, native code included, to the run's log."""
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError:
        file = os.open(os.devnull, os.O_WRONLY)  # the store reports the unusable folder
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__

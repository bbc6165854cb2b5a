"""The child process: spec.json -> components from the registry -> train -> result.json.

It is entered through `main` with the folder of one run, or through `resolve`, which lets the
components validate a suite's options.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from snnbench import machine, registry
from snnbench.doctor import examine, quick, warnings
from snnbench.errors import DivergedError, ResultsError, RunSkipped, SnnbenchError, WorkerError
from snnbench.methods import contract as contract_of_methods
from snnbench.neurons import LIF, PRESETS, neuron_options
from snnbench.runs.lease import Lease
from snnbench.spec import SCHEMA, RunSpec, did_you_mean, validate
from snnbench.store import RunFolder
from snnbench.train import train
from snnbench.training import group
from snnbench.training.allocator import keep_freed_memory
from snnbench.training.build import (
    Context,
    build,
    component,
    config,
    current,
    device_of,
    make_engine,
    meet,
)
from snnbench.training.cost import capacity, measure, probed, unknown_memory
from snnbench.training.isolated import die_with_parent
from snnbench.training.job import Job
from snnbench.training.oom import after_oom, is_out_of_memory, more_parts, size_asked_for
from snnbench.training.team import team

CLAIM_WAIT_S = 20.0
LEASE_WAIT_S = 3.0
BEAT_S = 1.0
Send = Callable[[dict[str, Any]], None]
Work = Callable[..., dict[str, Any]]


class Stopped(BaseException):
    """The parent asked this process to end; not an Exception, so that nothing swallows it."""


class Fenced(BaseException):
    """Another machine has taken the run over while this process was suspended."""


@dataclass(frozen=True)
class Place:
    """How this process came to do the run.

    `parallel_jobs` is how many runs share its device at a time, which disturbs their clocks;
    `oom_split` lets a run that is out of memory take its batches in smaller parts; `lease` is
    the ticket of the right to do the run; `checkpoint_s` is the time between two checkpoints.
    """

    parallel_jobs: int = 1
    threads: int | None = None
    oom_split: bool = False
    checkpoint_s: float = 60.0
    lease: dict[str, Any] = field(default_factory=dict)

    def check_lease(self) -> None:
        """Raise Fenced where the run belongs to somebody else by now."""
        if self.lease and not Lease.of(self.lease).holds():
            raise Fenced


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
    """Load each of the `datasets` [[name, options], ...]; the errors, one line each, and the
    number of GPUs here.
    """
    context, errors = Context(**request["context"]), []
    for name, options in request["datasets"]:
        try:
            component("datasets", name, options).load(
                Path(context.data_root), context.allow_unverified_data
            )
        except SnnbenchError as error:
            errors.append(str(error))
    return {"errors": errors, "gpus": torch.cuda.device_count()}


def contract(request: dict[str, Any]) -> dict[str, Any]:
    """The clauses of the method contract for the method `name`, as data."""
    try:
        method = registry.find("methods", request["name"]).load()
    except SnnbenchError as error:
        return {"errors": [str(error)], "checks": []}
    checks = contract_of_methods.check(
        lambda options: method(config(method.Config, options)), method.bptt_limit[0]
    )
    return {"errors": [], "checks": [asdict(c) for c in checks]}


def doctor(request: dict[str, Any]) -> dict[str, Any]:
    """The machine looked at, as `snnbench doctor` prints it."""
    try:
        device = current(device_of(request["device"]))
    except RunSkipped as error:
        return {"errors": [str(error)]}
    keep_freed_memory()
    seen = examine(device, Path(request["data_root"]), Path(request["results"]))
    return {"errors": []} | seen


def main(folder: str, context: dict[str, Any], send: Send, work: Work | None = None) -> None:
    """Do one run, whatever comes of it; ends the process. `work` can stand in for training."""
    run = RunFolder(Path(folder))
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which decides
    _print_to(run.log)
    code = 1
    try:
        place = Place(**context.pop("place", {}))
        with _lock(run, place):
            if run.result() is None:
                _finish(run, Context(**context), place, send, work or _measure)
        code = 0
    except Fenced:
        send({"event": "fenced"})
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


def _lock(run: RunFolder, place: Place) -> AbstractContextManager[object]:
    """The run's lock, once a worker of this machine that had the run before us has ended.

    One that does not end, since it is suspended, has lost the run with its lease.
    """
    try:
        return run.claim(LEASE_WAIT_S if place.lease else CLAIM_WAIT_S)
    except ResultsError:
        if not place.lease:
            raise
        place.check_lease()
        return nullcontext()


def _finish(run: RunFolder, context: Context, place: Place, send: Send, work: Work) -> None:
    """Train, and publish the result or why there is none."""
    stop = _Stop(send)
    if place.threads:
        torch.set_num_threads(place.threads)
    began = time.perf_counter()
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "run_id": run.run_id,
        "status": "done",
        "reason": "",
        "parallel_jobs": place.parallel_jobs,
    }
    spec = None
    try:
        asked = run.spec()
        spec, record["reason"] = after_oom(asked, run)
        run.append(
            {"event": "start", "run_id": run.run_id, "pid": os.getpid(), "time": time.time()}
        )
        record |= {"spec": asked.to_json(), "source_hash": registry.source_hash()}
        record["batch_split"] = spec.train.batch_split
        record["components"] = {
            kind: registry.find(f"{kind}s", getattr(spec, kind)).describe()
            for kind in ("dataset", "model", "method")
        }
        record |= work(run, spec, context, place, stop, send, record)
    except RunSkipped as error:
        record |= {"status": "skipped", "reason": str(error)}
    except DivergedError as error:
        record |= {"status": "diverged", "reason": str(error)}
    except ResultsError:
        raise
    except SnnbenchError as error:
        record |= {"status": "failed", "reason": str(error)}
    except Exception as error:
        traceback.print_exc()
        if is_out_of_memory(error):
            record |= {"status": "oom", "reason": size_asked_for(error)}
        else:
            reason = f"{type(error).__name__}: {_one_line(error)}"
            record |= {"status": "failed", "reason": reason}
    stop.ignore()
    if record["status"] == "oom" and place.oom_split and (parts := more_parts(spec)):
        event = {"event": "oom_retry", "batch_split": parts, "reason": record["reason"]}
        run.append(event)
        send(event)
        return
    record["worker_s"] = time.perf_counter() - began
    place.check_lease()
    run.finish(record)
    if record["status"] == "done":
        run.drop_checkpoints()


def _measure(
    run: RunFolder,
    spec: RunSpec,
    context: Context,
    place: Place,
    stop: _Stop,
    send: Send,
    record: dict[str, Any],
) -> dict[str, Any]:
    """Do what a run of its kind does; the metrics of the record."""

    def fresh(of: RunSpec = spec) -> Job:
        return build(of, context, make_engine(of, current(device_of(context.device))))

    # Memory first, in a process of its own: this one then has not touched the device yet.
    if spec.kind == "capacity":
        found = capacity(spec, fresh, stop.look, stop.check)
        memory: dict[str, Any] = {}
    elif spec.train.devices > 1:
        memory = unknown_memory("BatchNorm over several devices keeps more than on the one probed")
    else:
        memory = probed(lambda: fresh(spec), stop.look)
    checkpoints = run.checkpoints

    def follow(rank: int, address: str) -> None:
        job = build(spec, context, make_engine(spec, meet(spec, context, rank, address)))
        job.checkpoints = checkpoints
        WORK[spec.kind](job)
        group.leave()

    with team(spec.train.devices, follow) as (address, watch):
        device = meet(spec, context, 0, address)

        def check() -> None:
            stop.check()
            watch()

        job, seen = _prepare(run, spec, context, device, place, send, record)
        job.stop, job.checkpoints = check, checkpoints
        if spec.kind != "capacity":
            found = WORK[spec.kind](job)
        group.leave()
    found["nulls"] = memory.pop("nulls", {}) | found["nulls"]
    found["measure_s"] += memory.pop("probe_s", 0.0)
    return found | memory | seen


WORK: dict[str, Callable[[Job], dict[str, Any]]] = {"train": train, "cost": measure}


def _prepare(
    run: RunFolder,
    spec: RunSpec,
    context: Context,
    device: torch.device,
    place: Place,
    send: Send,
    record: dict[str, Any],
) -> tuple[Job, dict[str, Any]]:
    """What is to be trained, and what the record says of it and of this machine."""
    record["machine"] = machine.describe(device)
    record["allocator"] = keep_freed_memory()
    record["warnings"] = warnings(quick(device))
    began = time.perf_counter()
    engine = make_engine(spec, device)
    setup_s = time.perf_counter() - began
    send(
        {
            "event": "engine",
            "device": device.type,
            "kernel": engine.choice.name,
            "passed_over": list(engine.choice.passed_over),
            "precision": engine.precision,
            "allocator": record["allocator"],
        }
    )
    job = build(spec, context, engine)

    def emit(event: dict[str, Any]) -> None:
        run.append(event)
        send(event)

    def save(state: dict[str, Any]) -> None:
        buffer = io.BytesIO()  # torch's own writer hides why a file cannot be written
        torch.save(state, buffer)
        place.check_lease()
        run.save_checkpoint(buffer.getbuffer())

    job.emit, job.save, job.checkpoint_every_s = emit, save, place.checkpoint_s
    job.place = f"{record['machine']['machine_id']}, batch_split = {spec.train.batch_split}"
    if place.parallel_jobs > 1:
        job.shared = "several runs shared the device, and the counter does not tell them apart"
    data = job.data
    return (
        job,
        {
            "setup_s": setup_s,  # of the kernel: compiling it, or loading it
            "data_hash": data.data_hash[:16],
            "split_hash": data.split_hash[:16],
            "data_verified": data.verified,
            "samples": {"train": len(data.train), "val": len(data.val), "test": len(data.test)},
        },
    )


class _Stop:
    """SIGTERM sets a flag; the training loop looks at it between steps."""

    def __init__(self, send: Send) -> None:
        self._asked = False
        self._send, self._said = send, time.monotonic()
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_: object) -> None:
        self._asked = True

    def look(self) -> None:
        """Raise Stopped if that is wanted."""
        if self._asked:
            raise Stopped

    def check(self) -> None:
        """The same between two steps; and tell the parent now and then that there is progress."""
        self.look()
        if time.monotonic() - self._said > BEAT_S:
            self._said = time.monotonic()
            self._send({"event": "beat"})

    def ignore(self) -> None:
        """Training is over: let the result be written."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _print_to(log: Path) -> None:
    """Send everything this process prints, native code included, to the run's log."""
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        file = os.open(log, flags, 0o644)
    except OSError:
        file = os.open(os.devnull, os.O_WRONLY)  # the store reports the unusable folder
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__

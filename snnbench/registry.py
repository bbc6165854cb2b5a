"""Names of methods, models, datasets and kernels, where their code is, and its hash.

Names are listed, and described, without importing the code behind them: importing torch takes
seconds.  Other distributions add theirs under the entry-point groups `snnbench.methods`,
`snnbench.models` and `snnbench.datasets`.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from snnbench import __version__
from snnbench.errors import UsageError, WorkerError
from snnbench.spec import did_you_mean, digest

BUILT_IN: Mapping[str, Mapping[str, str]] = {
    "methods": {
        "bptt": "snnbench.methods.bptt:BPTT",
        "tet": "snnbench.methods.tet:TET",
        "shortcut": "snnbench.methods.shortcut:Shortcut",
        "rate": "snnbench.methods.rate:Rate",
        "grad_scale": "snnbench.methods.grad_scale:GradScale",
        "sltt": "snnbench.methods.sltt:SLTT",
        "ottt": "snnbench.methods.ottt:OTTT",
        "ann": "snnbench.methods.ann:ANN",
    },
    "models": {
        "mlp": "snnbench.models.mlp:MLP",
        "convnet": "snnbench.models.convnet:ConvNet",
        "vgg11": "snnbench.models.vgg:VGG11",
        "vgg11_a": "snnbench.models.vgg:VGG11A",
        "vgg13": "snnbench.models.vgg:VGG13",
        "vgg16": "snnbench.models.vgg:VGG16",
        "vggsnn": "snnbench.models.vgg:VGGSNN",
        "vggsnn_dvs": "snnbench.models.vgg:VGGSNNDVS",
        "vggsnn_woap": "snnbench.models.vgg:VGGSNNwoAP",
        "resnet18": "snnbench.models.resnet:ResNet18",
        "resnet19": "snnbench.models.resnet:ResNet19",
        "resnet20": "snnbench.models.resnet:ResNet20",
        "resnet34": "snnbench.models.resnet:ResNet34",
        "sew_resnet18": "snnbench.models.resnet:SEWResNet18",
        "sew_resnet34": "snnbench.models.resnet:SEWResNet34",
        "sew_resnet50": "snnbench.models.resnet:SEWResNet50",
        "preact_resnet34": "snnbench.models.resnet:PreActResNet34",
    },
    "datasets": {
        "digits": "snnbench.data.digits:Digits",
        "cifar10": "snnbench.data.vision:CIFAR10",
        "cifar100": "snnbench.data.vision:CIFAR100",
        "mnist": "snnbench.data.vision:MNIST",
        "fashion-mnist": "snnbench.data.vision:FashionMNIST",
        "tiny-imagenet": "snnbench.data.folders:TinyImageNet",
        "imagenet": "snnbench.data.imagenet:ImageNet",
        "digits-events": "snnbench.data.simulated:DigitsEvents",
        "nmnist": "snnbench.data.recordings:NMNIST",
        "ncaltech101": "snnbench.data.recordings:NCaltech101",
        "cifar10dvs": "snnbench.data.recordings:CIFAR10DVS",
        "dvsgesture": "snnbench.data.recordings:DVSGesture",
        "shd": "snnbench.data.recordings:SHD",
        "ssc": "snnbench.data.recordings:SSC",
    },
    "kernels": {
        "reference": "snnbench.kernels.reference",
        "native": "snnbench.kernels.native",
        "compiled": "snnbench.kernels.compiled",
        "triton": "snnbench.kernels.triton",
    },
}


# Rooms whose code decides a number; a change in them makes earlier results stale.
NUMERIC = (
    "neurons", "spec", "train", "worker",
    "data", "kernels", "measure", "methods", "models", "training",
)  # fmt: skip


@dataclass(frozen=True)
class Component:
    """A name, where its code is, and which distribution brought it."""

    kind: str
    name: str
    target: str
    distribution: str = "snnbench"
    version: str = __version__
    parts: tuple[Component, ...] = ()  # of a composed method

    @property
    def module(self) -> str:
        """Dotted name of the module that holds it."""
        return self.target.partition(":")[0]

    def load(self) -> Any:
        """Import the class, or the module for a kernel; raises WorkerError naming the culprit."""
        if self.parts:
            compose = importlib.import_module("snnbench.methods.compose").compose
            return compose(self.name, [part.load() for part in self.parts])
        module, _, attribute = self.target.partition(":")
        try:
            loaded = importlib.import_module(module)
            return getattr(loaded, attribute) if attribute else loaded
        except Exception as error:
            raise WorkerError(
                f"{self.kind[:-1]} '{self.name}' of {self.distribution} {self.version} cannot be "
                f"loaded from {self.target}: {type(error).__name__}: {error}"
            ) from error

    def describe(self) -> dict[str, str]:
        """Name, summary and source, read from the code's text without running it."""
        if self.parts:
            summary = f"{' and '.join(p.name for p in self.parts)} together."
            source = "; ".join(p.describe()["source"] for p in self.parts)
        else:
            summary, source = _read_docs(self.target)
        return {
            "name": self.name,
            "summary": summary,
            "source": source,
            "distribution": self.distribution,
            "version": self.version,
        }


@cache
def components(kind: str) -> dict[str, Component]:
    """All installed components of a kind, by name; raises UsageError if two share a name."""
    found = {name: Component(kind, name, target) for name, target in BUILT_IN[kind].items()}
    for point in entry_points(group=f"snnbench.{kind}"):
        new = _component(kind, point)
        old = found.setdefault(new.name, new)
        if old is not new:
            raise UsageError(
                f"{kind[:-1]} '{new.name}' is offered by both {old.distribution} {old.version} "
                f"and {new.distribution} {new.version}; uninstall one"
            )
    return found


def find(kind: str, name: str) -> Component:
    """The component of that name; raises UsageError with a suggestion.

    `tet+shortcut` is a method composed of others.
    """
    known = components(kind)
    if kind == "methods" and "+" in name:
        parts = tuple(find(kind, part) for part in name.split("+"))
        brought = {p.distribution: p.version for p in parts}
        origin = ", ".join(brought), ", ".join(brought.values())
        return Component(kind, name, parts[0].target, *origin, parts=parts)
    if name not in known:
        raise UsageError(f"unknown {kind[:-1]} '{name}'{did_you_mean(name, known)}")
    return known[name]


@cache
def source_hash() -> str:
    """Hash of this package's code that computes numbers."""
    package = Path(__file__).parent
    rooms = (package / room for room in NUMERIC)
    files = [f for r in rooms for f in (sorted(r.rglob("*")) or [r.with_suffix(".py")])]
    files = [f for f in files if f.suffix in (".py", ".cpp", ".json")]
    parts = (part for f in files for part in (f.name, f.read_bytes()))
    return digest(*parts)[:16]


def _component(kind: str, point: EntryPoint) -> Component:
    dist = point.dist
    name, version = (dist.name, dist.version) if dist else ("an unknown distribution", "?")
    return Component(kind, point.name, point.value, name, version)


@cache
def _read_docs(target: str) -> tuple[str, str]:
    module, _, attribute = target.partition(":")
    try:
        tree: ast.AST = ast.parse(_source_file(module).read_text("utf-8"))
    except Exception as error:
        return f"(cannot be read: {error})", ""
    classes = {n.name: n for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}
    node = classes.get(attribute, tree)
    doc = ast.get_docstring(node) if isinstance(node, ast.Module | ast.ClassDef) else None
    return (doc or "").partition("\n")[0], _assigned_source(node, classes)


def _source_file(module: str) -> Path:
    """Where a module's code is, found without running the packages around it."""
    package, *inner = module.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"no module {package}")
    path = Path(spec.origin)
    for part in inner:
        path = path.parent / part
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return path


def _assigned_source(node: ast.AST, classes: dict[str, ast.ClassDef]) -> str:
    """The string assigned to `source` in the class, or in a base class of the same file."""
    for item in getattr(node, "body", []):
        if isinstance(item, ast.Assign) and [ast.unparse(t) for t in item.targets] == ["source"]:
            return str(ast.literal_eval(item.value))
    for base in getattr(node, "bases", []):
        if ast.unparse(base) in classes:
            return _assigned_source(classes[ast.unparse(base)], classes)
    return ""

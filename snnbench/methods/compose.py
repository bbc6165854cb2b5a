"""One method out of several that override different hooks: `tet+shortcut`.

The hooks are disjoint, so the parts are simply inherited from; hyper-parameters keep their names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, field, fields, make_dataclass
from typing import Any, get_type_hints

from snnbench.errors import SuiteError
from snnbench.methods.base import HOOKS, Method
from snnbench.models.layer import Network


def compose(name: str, parts: Sequence[type[Method]]) -> type[Method]:
    """The composed class; raises SuiteError naming the hook that two parts override."""
    names = name.split("+")
    for hook in HOOKS:
        owners = [n for n, p in zip(names, parts, strict=True) if _overrides(p, hook)]
        if len(owners) > 1:
            raise SuiteError(f"{name}: {' and '.join(owners)} both override '{hook}'")

        for n, p in zip(names, parts, strict=True):
            others = [o for o in owners if o != n]
            if hook in p.ignores and others:
                raise SuiteError(f"{name}: {n} never calls '{hook}', which {others[0]} overrides")

    def supports(self: Method, net: Network, T: int) -> str | None:
        return next((why for p in parts if (why := p.supports(self, net, T))), None)

    limit: dict[str, Any] = {}
    steps: int | None = None
    for part in parts:
        limit |= part.bptt_limit[0]
        steps = steps or part.bptt_limit[1]
    body = {
        "__doc__": f"{' and '.join(names)} together.",
        "Config": _config(name, parts),
        "source": "; ".join(p.source for p in parts),
        "bptt_limit": (limit, steps),
        "supports": supports,
    }
    return type("".join(p.__name__ for p in parts), tuple(parts), body)


def _overrides(part: type[Method], hook: str) -> bool:
    return getattr(part, hook) is not getattr(Method, hook)


def _config(name: str, parts: Sequence[type[Method]]) -> type:
    """All hyper-parameters of all parts; each part checks its own."""
    merged: dict[str, tuple[str, Any, Any]] = {}
    for part in parts:
        hints = get_type_hints(part.Config, include_extras=True)
        for f in fields(part.Config):
            if f.name in merged:
                raise SuiteError(f"{name}: two of its methods have a hyper-parameter '{f.name}'")
            default = field(default=f.default) if f.default is not MISSING else field()
            merged[f.name] = (f.name, hints[f.name], default)

    def check(self: Any) -> None:
        for part in parts:
            part.Config(**{f.name: getattr(self, f.name) for f in fields(part.Config)})

    return make_dataclass(
        "Config", merged.values(), frozen=True, namespace={"__post_init__": check}
    )

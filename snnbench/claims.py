"""Published accuracies, and the suites that reproduce their recipes: suites/papers/claims.toml."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from snnbench.spec import validate
from snnbench.suite import fail, read, shipped_folder


@dataclass(frozen=True)
class Claim:
    """A published accuracy in %, and the suite that reproduces its recipe."""

    suite: str
    dataset: str
    model: str
    method: str
    T: int
    value: float
    tolerance: float
    epochs: int
    verified: bool
    source: str
    options: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Claims:
    claim: tuple[Claim, ...]


def published_claims() -> tuple[Claim, ...]:
    """The figures of suites/papers/claims.toml."""
    path = shipped_folder() / "papers" / "claims.toml"
    errors: list[str] = []
    claims = validate(_Claims, read(path), errors)
    fail(path, errors)
    return claims.claim if claims else ()

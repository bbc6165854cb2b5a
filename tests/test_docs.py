"""README, docs and CITATION.cff agree with the code and with one another."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from snnbench import __version__
from snnbench.errors import ExitCode
from snnbench.report import plots
from snnbench.report.gate import DEFAULT_LIMITS
from snnbench.tables import METRICS

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "results" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]  # fmt: skip
README = PAGES[0].read_text("utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_that_are_named_exist(page: Path) -> None:
    named = re.findall(
        r"`((?:snnbench|suites|tests|results|docs)/[\w./-]+)`", page.read_text("utf-8")
    )
    for path in named:
        assert (ROOT / path).exists(), path


def test_citation_is_of_this_version() -> None:
    fields = dict(
        line.split(": ", 1)
        for line in (ROOT / "CITATION.cff").read_text("utf-8").splitlines()
        if re.match(r"[a-z-]+: \S", line)
    )
    assert fields["cff-version"] == "1.2.0"
    assert fields["version"] == __version__
    assert fields["license"] == "Apache-2.0"
    assert {"message", "title", "type"} <= set(fields)


def test_readme_says_what_it_is_not() -> None:
    assert "BenchCouncil" in README
    assert "snnbench.com" in README


def test_readme_has_every_exit_code() -> None:
    codes = README.split("## Exit codes")[1]
    for code in ExitCode:
        assert re.search(rf"\b{int(code)} \w", codes), code


def test_readme_states_the_limits_of_the_gate() -> None:
    text = " ".join(README.split())
    assert f"accuracy within {100 * (DEFAULT_LIMITS['test_acc'].fall or 0):g} points" in text
    assert (
        f"spikes within {100 * (DEFAULT_LIMITS['spikes_per_sample'].change_share or 0):g}%" in text
    )
    assert DEFAULT_LIMITS["saved_bytes"].rise_share == 0
    assert DEFAULT_LIMITS["params_train"].change_share == 0


def test_readme_explains_every_metric_of_the_table() -> None:
    begin = README.index("## What the figures mean")
    explained = README[begin : README.index("## Honesty rules")]
    absent = [name for name in METRICS if f"`{name}`" not in explained]
    short = {"test_acc_with_heads": "heads"}  # a figure of one method
    ends = ("_init",)
    assert [n for n in absent if n not in short and not n.endswith(ends)] == []


def test_every_figure_is_listed_with_what_it_shows() -> None:
    assert list(plots.SHOWS) == list(plots.FIGURES)

"""The page: escaped, self-contained, and used in a real browser as a reader would.

The browser tests need Chromium and playwright; SNNBENCH_SCREENSHOTS names a folder to keep
pictures in.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from records import HOSTILE, SPEC, done, ended, measured, tet, write

from snnbench import stats
from snnbench.report import html, plots, source
from snnbench.report.content import View
from snnbench.store import SuiteFolder
from snnbench.tables import EPOCH_COLUMNS, RUN_COLUMNS

EVIL = '</script><script>alert(1)</script><img src=x onerror="alert(2)">'
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


class Tags(HTMLParser):
    """Every tag of a page with its attributes, and the texts of its elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def page(folder: SuiteFolder, view: View | None = None) -> str:
    return html.render(source.read([folder]), view or View())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SuiteFolder:
    """Two methods, six seeds, two T; a failure with a hostile reason; a hostile log and claim."""
    folder = SuiteFolder(tmp_path_factory.mktemp("results") / "small")
    for T in (2, 4):
        for seed in range(6):
            done(folder, replace(SPEC, seed=seed, T=T), 0.90 + seed / 1000)
            done(folder, tet(0.05, T, seed), 0.93 + seed / 1000)
    run = ended(folder, replace(SPEC, method="rate", method_config={"x": EVIL}), "failed", HOSTILE)
    run.log.write_text(f"{EVIL}\n" * 200 + "\x1b[31mthe last line\x00", "utf-8")
    plan = {"suite": {"name": "small", "claim": f"Claim {EVIL}"},
            "runs": [*(r.run_id for r in folder.runs()), "never-begun"]}  # fmt: skip
    folder.write_plan(plan)
    return write(folder)


@pytest.fixture(scope="module")
def text(small: SuiteFolder) -> str:
    return page(small)


def test_nothing_of_a_record_becomes_markup(text: str) -> None:
    assert "<script>alert" not in text
    assert "<img" not in text
    tags = Tags(text).tags
    assert [a for t, a in tags if t == "script"] == [{"type": "application/json", "id": "data"}, {}]
    assert not any(name.startswith("on") for _, attrs in tags for name in attrs)
    assert EVIL[:9] not in text.split('id="data">')[1].split("</script>")[0]


def test_page_loads_nothing_from_elsewhere(text: str) -> None:
    for tag, attrs in Tags(text).tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for name in ("src", "href", "xlink:href", "srcset"):
            assert (attrs.get(name) or "#").startswith("#"), (tag, attrs)
    assert "@import" not in text
    assert "default-src 'none'" in text


def test_ids_are_unique_and_what_is_referred_to_exists(text: str) -> None:
    """Several figures of matplotlib stand in one document, whose ids would clash."""
    ids = [a["id"] for _, a in Tags(text).tags if a.get("id")]
    assert len(ids) == len(set(ids))
    wanted = set(re.findall(r'href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text))
    assert wanted <= set(ids)


def test_data_block_has_every_run_with_spec_machine_curve_and_log(text: str) -> None:
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert len(data["runs"]) == 25
    failed = data["runs"][0]  # what went wrong stands first
    assert failed["status"] == "failed"
    assert failed["reason"] == HOSTILE
    assert failed["log"].endswith("the last line\x00")
    assert len(failed["log"]) < 2_000
    (run,) = [r for r in data["runs"] if r["spec"] | {"T": 2, "seed": 5} == r["spec"]
              and r["spec"]["method"] == "tet"]  # fmt: skip
    assert run["spec"]["options"] == {"lamb": 0.05, "phi": 1.0}
    assert run["curve"][0] == [1, 2]
    assert run["curve"][3] == [0.935, 0.935]
    assert data["settings"][run["settings"]]["model options"] == {"width": 16}
    assert data["machines"][run["machine"]]["cpu"] == "Testium 3000"
    assert len(data["settings"]) == len(set(map(json.dumps, data["settings"])))


def test_failures_missing_runs_and_figures_not_drawn_are_named(text: str) -> None:
    plain = re.sub(r"\s+", " ", text)
    assert "1 of 26 planned runs have not begun" in plain
    assert "not drawn: fidelity: no gradient fidelity was measured" in plain
    assert "not drawn: layers: " in plain


def test_page_of_committed_tables_without_run_folders(small: SuiteFolder, tmp_path: Path) -> None:
    bare = SuiteFolder(tmp_path / "bare")
    bare.path.mkdir()
    bare.runs_csv.write_bytes(small.runs_csv.read_bytes())
    data = json.loads(page(bare).split('id="data">')[1].split("</script>")[0])
    assert len(data["runs"]) == 25
    assert all(r["log"] == "" and r["curve"] is None for r in data["runs"])
    assert {m["machine_id"] for m in data["machines"] if m["machine_id"]} == {"cpu-2c-123456"}


def test_page_without_any_run(tmp_path: Path) -> None:
    empty = write(SuiteFolder(tmp_path / "empty"))
    assert "No run has ended with figures yet." in page(empty)


def test_page_without_matplotlib(small: SuiteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    found = page(small)
    assert "<svg" not in found
    assert "figures need matplotlib" in found


@pytest.mark.parametrize("name", list(plots.FIGURES))
def test_every_figure_is_drawn_or_says_in_one_line_why_not(
    small: SuiteFolder, name: str, tmp_path: Path
) -> None:
    read = source.read([small])
    if name in ("fidelity", "cosine", "layers", "profiles"):
        with pytest.raises(plots.ResultsError) as caught:
            plots.draw(read, name, [tmp_path / "x.png"])
        assert len(str(caught.value).splitlines()) == 1
        return
    paths = plots.draw(read, name, [tmp_path / f"x{end}" for end in (".png", ".svg", ".pdf")])
    assert [p.stat().st_size > 1_000 for p in paths] == [True] * 3


def test_figures_are_the_same_bytes_each_time(small: SuiteFolder, tmp_path: Path) -> None:
    """So that a committed figure changes only with its figures: no time, no random ids."""
    first, again = (
        plots.draw(source.read([small]), "curves", [tmp_path / name])[0]
        for name in ("a.svg", "b.svg")
    )
    assert first.read_bytes() == again.read_bytes()


@pytest.fixture
def rich(small: SuiteFolder, tmp_path: Path) -> source.Source:
    """With what only some suites measure: layers, fidelity and time to target."""
    folder = SuiteFolder(tmp_path / "rich")
    folder.path.mkdir()
    runs = pd.read_csv(small.runs_csv)
    ran = runs["status"] == "done"
    runs.loc[ran, "time_to_target_s"] = [float("inf"), *range(1, int(ran.sum()))]
    runs.loc[ran, "grad_cos_bptt_init"] = 0.9
    runs.to_csv(folder.runs_csv, index=False)
    rows = [(r.run_id, r.method, r.method_config, r.T, r.seed, layer)
            for r in runs[ran].itertuples() for layer in range(3)]  # fmt: skip
    frame = pd.DataFrame(rows, columns=["run_id", "method", "method_config", "T", "seed", "depth"])
    frame["layer"] = "layer" + frame["depth"].astype(str)
    frame.assign(firing_rate=0.1, grad_norm=2.0).to_csv(folder.path / "layers.csv", index=False)
    frame = pd.concat([frame.assign(epoch=0), frame.assign(epoch=2)])
    frame.assign(cos=0.9, norm_ratio=1.1).to_csv(folder.fidelity_csv, index=False)
    return source.read([folder])


@pytest.mark.parametrize("name", ["fidelity", "cosine", "layers", "profiles"])
def test_figures_of_what_only_some_suites_measure(
    rich: source.Source, name: str, tmp_path: Path
) -> None:
    (path,) = plots.draw(rich, name, [tmp_path / "x.svg"])
    drawn = path.read_text("utf-8")
    assert "tet" in drawn
    assert "bptt" in drawn


def test_pareto_front_by_hand() -> None:
    points = [(3.0, 5.0), (1.0, 1.0), (2.0, 4.0), (2.0, 3.0), (4.0, 4.5), (5.0, 5.0)]
    assert stats.pareto_front(points) == [(1.0, 1.0), (2.0, 4.0), (3.0, 5.0)]
    assert stats.pareto_front([(1.0, 1.0)]) == [(1.0, 1.0)]


# --- in a browser -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window."""
    if CHROMIUM is None:
        pytest.skip("no chromium; `apt-get install chromium` brings it")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as play:
        engine = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield engine
        engine.close()


class Reader:
    """A page in a browser, and everything that went wrong or left the machine."""

    def __init__(self, browser: Any, path: Path, **how: Any) -> None:
        self.context = browser.new_context(viewport={"width": 1280, "height": 900}, **how)
        self.page = self.context.new_page()
        self.trouble: list[str] = []
        self.page.on("console", lambda m: self.trouble.append(m.text))
        self.page.on("pageerror", lambda e: self.trouble.append(str(e)))
        self.page.on("dialog", lambda d: self.trouble.append(f"alert {d.message}"))
        self.page.on("request", lambda r: r.url.startswith("file:") or self.trouble.append(r.url))
        began = time.perf_counter()
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-ready=yes]")
        self.opened_s = time.perf_counter() - began

    def column(self, table: str, place: int) -> list[str]:
        """Texts of one column, of the rows that are seen."""
        rows = self.page.locator(f"#{table} tbody tr:not([hidden])")
        return rows.evaluate_all(f"rows => rows.map(r => r.cells[{place}].textContent.trim())")

    def picture(self, name: str) -> None:
        """Keep a picture, if asked for."""
        if folder := os.environ.get("SNNBENCH_SCREENSHOTS"):
            self.page.screenshot(path=Path(folder) / f"{name}.png")


@pytest.fixture
def reader(browser: Any, text: str, tmp_path: Path) -> Iterator[Reader]:
    path = tmp_path / "report.html"
    path.write_text(text, "utf-8")
    reader = Reader(browser, path)
    yield reader
    reader.context.close()
    assert reader.trouble == []


def test_sorting_by_a_figure_and_back(reader: Reader) -> None:
    head = reader.page.locator("#cells thead th")
    place = head.all_text_contents().index("last")
    button = head.nth(place).locator("button")
    button.click()
    assert head.nth(place).get_attribute("aria-sort") == "ascending"
    up = [float(t.split()[0]) for t in reader.column("cells", place)]
    assert up == sorted(up)
    assert len(set(up)) > 1
    button.click()
    assert [float(t.split()[0]) for t in reader.column("cells", place)] == up[::-1]
    reader.picture("sorted")


def test_what_was_not_measured_is_sorted_last_either_way(reader: Reader) -> None:
    head = reader.page.locator("#cells thead th")
    place = head.all_text_contents().index("Δ last vs bptt")
    for _ in range(2):
        head.nth(place).locator("button").click()
        assert reader.column("cells", place)[-2:] == ["–", "–"]


def test_filtering_runs_by_words_and_status(reader: Reader) -> None:
    tools = reader.page.locator('.tools[data-for="rows"]')
    tools.locator("input").fill("TET T2")
    shown = reader.column("rows", 0)
    assert len(shown) == 6
    assert all("tet-T2" in run for run in shown)
    assert tools.locator("output").text_content() == "6 of 25 runs"
    tools.locator("input").fill("")
    tools.locator("select").select_option("failed")
    assert len(reader.column("rows", 0)) == 1
    tools.locator("input").fill("no such words")
    assert reader.column("rows", 0) == []


def test_opening_a_run_by_keyboard_and_closing_it(reader: Reader) -> None:
    button = reader.page.locator("button.open", has_text="tet-T4-s3").first
    button.focus()
    reader.page.keyboard.press("Enter")
    dialog = reader.page.locator("dialog#run")
    assert dialog.is_visible()
    shown = dialog.inner_text()
    for words in ("tet-T4-s3", "test_acc", "0.933", "options.lamb", "train.batch_size", "Testium"):
        assert words in shown
    assert dialog.locator("svg.chart polyline").count() == 2
    reader.picture("run")
    reader.page.keyboard.press("Escape")
    assert not dialog.is_visible()
    assert button.evaluate("b => b === document.activeElement")


def test_hostile_text_is_shown_as_text(reader: Reader) -> None:
    reader.page.locator("button.open").first.click()  # the failed one
    dialog = reader.page.locator("dialog#run")
    assert "<script>alert(1)</script>" in dialog.inner_text()
    assert "the last line" in dialog.locator("pre").inner_text()
    assert reader.page.locator("img").count() == 0


def test_an_address_can_name_a_run(reader: Reader) -> None:
    run = reader.column("rows", 0)[3]
    reader.page.goto(f"{reader.page.url.partition('#')[0]}#run={run}")
    reader.page.reload()
    reader.page.wait_for_selector("dialog[open]")
    assert reader.page.locator("#run-title").text_content() == run


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_dark_and_light(browser: Any, text: str, tmp_path: Path, scheme: str) -> None:
    """Text must be readable: a contrast of 4.5 or more, also after the button was pressed."""
    path = tmp_path / "report.html"
    path.write_text(text, "utf-8")
    reader = Reader(browser, path, color_scheme=scheme)

    def brightness(name: str) -> float:
        rgb = reader.page.evaluate(f"getComputedStyle(document.body).{name}")
        parts = [int(v) / 255 for v in re.findall(r"\d+", rgb)[:3]]
        linear = [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for dark in (scheme == "dark", scheme != "dark"):
        paper, ink = brightness("backgroundColor"), brightness("color")
        assert (paper < ink) == dark
        assert (max(paper, ink) + 0.05) / (min(paper, ink) + 0.05) > 4.5
        reader.picture("dark" if dark else "light")
        reader.page.locator("#theme").click()
    reader.context.close()
    assert reader.trouble == []


def test_printed_pages_show_every_row(browser: Any, text: str, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(text, "utf-8")
    reader = Reader(browser, path)
    reader.page.emulate_media(media="print")
    assert not reader.page.locator(".tools").first.is_visible()
    box = reader.page.locator("#runs .scroll").evaluate("e => [e.scrollHeight, e.clientHeight]")
    assert box[0] <= box[1] + 1
    pdf = reader.page.pdf()
    assert pdf.startswith(b"%PDF")
    reader.context.close()


def test_narrow_window_does_not_scroll_sideways(browser: Any, text: str, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(text, "utf-8")
    reader = Reader(browser, path)
    reader.page.set_viewport_size({"width": 400, "height": 800})
    wide = reader.page.evaluate("document.documentElement.scrollWidth")
    reader.picture("narrow")
    assert wide <= 400
    reader.context.close()


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of 1,000 runs of 100 epochs each."""
    folder = SuiteFolder(tmp_path_factory.mktemp("thousand") / "big")
    folder.path.mkdir()
    plain = measured(SPEC, 0.9)
    methods = ("bptt", "tet", "shortcut", "rate", "grad_scale")
    rows, epochs = [], []
    for n in range(1_000):
        method, seed, T = methods[n % 5], n // 5 % 10, 2 ** (n // 50 % 5)
        row = {k: plain.get(k) for k in RUN_COLUMNS} | {
            "run_id": f"digits-convnet-{method}-T{T}-s{seed}-{n:08x}", "suite": "big",
            "method": method, "method_config": "{}", "T": T, "seed": seed, "dataset": "digits",
            "model": f"net{n // 250}", "kernel": "auto", "precision": "fp32", "memory": "speed",
            "settings": json.dumps(SPEC.to_json()["neuron"]), "settings_hash": "a", "reason": "",
            "machine_id": "m", "test_acc": 0.9 + seed / 200 + n % 5 / 300, "init_hash": str(n // 5),
        }  # fmt: skip
        rows.append(row)
        for epoch in range(1, 101):
            epochs.append(
                {"run_id": row["run_id"], "epoch": epoch, "train_loss": 2.3 / epoch,
                 "val_acc": 1 - 0.7 / epoch, "test_acc": 1 - 0.8 / epoch}
            )  # fmt: skip
    pd.DataFrame(rows, columns=list(RUN_COLUMNS)).to_csv(folder.runs_csv, index=False)
    pd.DataFrame(epochs, columns=list(EPOCH_COLUMNS)).to_csv(folder.epochs_csv, index=False)
    path = folder.path / "report.html"
    path.write_text(page(folder), "utf-8")
    return path


@pytest.mark.slow
def test_a_thousand_runs_stay_below_ten_megabytes(thousand: Path) -> None:
    assert thousand.stat().st_size < 10e6


# A second on an idle machine; what takes ten has become another page.
OPENED_S = 10.0


@pytest.mark.slow
def test_a_thousand_runs_open_and_are_filtered_without_a_wait(browser: Any, thousand: Path) -> None:
    Reader(browser, thousand).context.close()  # the browser itself is warm now
    tries = []
    for _ in range(3):
        reader = Reader(browser, thousand)
        tries.append(reader.opened_s)
        began = time.perf_counter()
        reader.page.locator('.tools[data-for="rows"] input').fill("tet-T4-s3")
        assert len(reader.column("rows", 0)) > 0
        assert time.perf_counter() - began < OPENED_S
        reader.context.close()
        assert reader.trouble == []
    assert min(tries) < OPENED_S

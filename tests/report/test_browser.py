"""The page in a real Chromium without a window: what it shows is what the run measured."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_opd import cli
from tests.conftest import Table
from tests.report.made_runs import NASTY, long_run, roll_back, sample, write_lines, write_run

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH; apt-get install chromium")
WIDTH, HEIGHT = 1400, 1000


class Opened:
    """A page, and everything that went wrong on it or went out of it."""

    def __init__(self, browser: Any, file: Path, **context: Any) -> None:
        self.page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, **context)
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())
        self.url = file.as_uri()

    def scroll_through(self) -> None:
        """So that every plot is drawn."""
        for y in range(0, self.page.evaluate("document.documentElement.scrollHeight"), HEIGHT):
            self.page.evaluate(f"scrollTo(0, {y})")
            self.page.wait_for_timeout(30)
        self.page.evaluate("scrollTo(0, 0)")

    def point_at(self, panel: str, share: float) -> int:
        """The mouse at this share of the first plot's width; the step that the panel's legend then names."""
        self.page.locator(f"#panel-{panel}").scroll_into_view_if_needed()
        area = self.page.locator(f"#panel-{panel} .u-over").first
        area.hover(position={"x": share * area.bounding_box()["width"], "y": 60})
        text = self.page.locator(f"#panel-{panel} .when").first.text_content()
        assert text.startswith("step ")
        return int(text.removeprefix("step ").replace(",", ""))

    def legend(self, panel: str, run: int = 0) -> list[str]:
        return self.page.locator(f"#panel-{panel} .legend [data-run='{run}']").all_text_contents()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        # As root Chromium has no sandbox; the page is our own.
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def report(*folders: Path) -> Path:
    out = folders[0].parent / "page.html"
    assert cli.main(["report", *map(str, folders), "--out", str(out)]) == 0
    return out


def records(folder: Path) -> dict[int, dict[str, Any]]:
    return {each["step"]: each for each in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())}


@pytest.fixture(scope="module")
def arms(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Opened, list[Path]]:
    """Side by side: a run that collapses, a shorter one with a rollback, one with neither samples nor alarms nor config."""
    root = tmp_path_factory.mktemp("arms")
    folders = [write_run(root / "opd", collapse=55), write_run(root / "control", steps=90, seed=1)]
    roll_back(folders[1], 41, 55)
    bare = root / "bare"
    write_lines(bare / "metrics.jsonl", [{"step": 1, "loss": 0.5, "rollout/truncation_rate": None}, {"step": 2, "loss": None}])
    folders.append(bare)
    return Opened(browser, report(*folders)), folders


def test_it_opens_without_errors_and_asks_for_nothing(arms: tuple[Opened, list[Path]]) -> None:
    opened, _ = arms
    opened.scroll_through()
    opened.page.locator("#other-metrics summary").click()
    opened.scroll_through()
    assert opened.errors == []
    assert opened.requests == [opened.url]
    assert opened.page.locator("canvas").count() > 30


def test_legends_show_the_figures_of_the_step_under_the_cursor(arms: tuple[Opened, list[Path]]) -> None:
    opened, folders = arms
    ill, control = (records(folder) for folder in folders[:2])
    step = opened.point_at("repeated_ngrams", 0.4)
    assert 40 <= step <= 56
    assert opened.legend("repeated_ngrams", 0)[0] == f"{ill[step]['rollout/repeated_ngrams']:.1%}"
    assert opened.legend("repeated_ngrams", 1)[0] == f"{control[step]['rollout/repeated_ngrams']:.1%}"
    # Held-out prompts were last asked at step 40, and the legend says so.
    assert opened.legend("repeated_ngrams", 0)[1] == f"{ill[40]['eval/repeated_ngrams']:.1%}" + (" (40)" if step != 40 else "")
    # The other panels follow the same cursor.
    assert opened.legend("truncation", 0)[0] == f"{ill[step]['rollout/truncation_rate']:.1%}"
    # Beyond the end of the shorter run there is nothing to show of it.
    assert opened.point_at("repeated_ngrams", 0.9) > 90
    assert opened.legend("repeated_ngrams", 1)[0] == "\N{EN DASH}"


def test_curves_are_where_their_values_are(arms: tuple[Opened, list[Path]]) -> None:
    """The plots are pixels: those of the collapsed run's colour are sought at the height of its value."""
    opened, folders = arms
    step = opened.point_at("repeated_weight", 0.95)
    value = records(folders[0])[step]["policy/repeated_weight"]
    opened.page.mouse.move(5, 5)
    found = opened.page.evaluate(
        """([step, value]) => {
            const { plot } = document.querySelector("#panel-repeated_weight .plot");
            const [x, y] = [plot.valToPos(step, "x", true), plot.valToPos(value, "y", true)].map(Math.round);
            const column = plot.ctx.getImageData(x, 0, 1, plot.ctx.canvas.height).data;
            const blue = (at) => column[4 * at + 2] - column[4 * at] > 90;
            return [y, [...Array(plot.ctx.canvas.height).keys()].filter(blue)];
        }""",
        [step, value],
    )
    height, blue = found
    assert blue
    assert min(blue) - 3 <= height <= max(blue) + 3
    assert max(blue) - min(blue) < 10


def test_dragging_zooms_all_plots_and_a_double_click_shows_all_steps(arms: tuple[Opened, list[Path]]) -> None:
    opened, _ = arms
    page = opened.page
    drawn = "[...document.querySelectorAll('.plot')].filter((host) => host.plot)"
    ranges = f"{drawn}.map(({{plot}}) => [plot.scales.x.min, plot.scales.x.max])"
    opened.scroll_through()
    opened.point_at("truncation", 0.25)
    page.mouse.down()
    box = page.locator("#panel-truncation .u-over").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 70, steps=4)
    page.mouse.up()
    page.wait_for_timeout(100)
    zoomed = page.evaluate(ranges)
    assert all(28 < low < 32 and 58 < high < 62 for low, high in zoomed)
    assert page.get_by_role("button", name="all steps").is_visible()
    page.locator("#panel-entropy .u-over").dblclick()
    page.wait_for_timeout(100)
    assert {tuple(each) for each in page.evaluate(ranges)} == {(0, 120)}


def test_a_run_can_be_hidden_everywhere(arms: tuple[Opened, list[Path]]) -> None:
    opened, _ = arms
    shown = "document.querySelector('#panel-truncation .plot').plot.series.slice(1).map((each) => each.show)"
    before = opened.page.evaluate(shown)
    opened.page.locator(".chips button", has_text="opd").click()
    assert opened.page.evaluate(shown) == [False, False, *before[2:]]
    opened.page.locator(".chips button", has_text="opd").click()
    assert opened.page.evaluate(shown) == before


def test_the_rollout_browser_pages_filters_and_follows_alarms(arms: tuple[Opened, list[Path]]) -> None:
    opened, folders = arms
    page = opened.page
    place = page.locator(".pager .place")
    assert place.text_content() == "prompts 1\N{EN DASH}2 of 4"
    assert "Prompt 0 of step 120" in page.locator(".prompt").first.inner_text()
    page.get_by_role("button", name="next").click()
    assert place.text_content() == "prompts 3\N{EN DASH}4 of 4"
    assert "Prompt 2 of step 120" in page.locator(".prompt").first.inner_text()
    assert page.get_by_role("button", name="next").is_disabled()
    page.get_by_label("ended by").select_option("stop")
    lines = [json.loads(line) for line in (folders[0] / "samples" / "step_000120.jsonl").read_text().splitlines()]
    assert sum(line["finish_reason"] == "stop" for line in lines) == 4  # the gold ones
    assert page.locator(".prompt .sample b").all_text_contents() == ["gold", "gold"]
    page.get_by_label("ended by").select_option("")
    page.locator(".alarms button", has_text="55").first.click()
    assert page.get_by_label("step", exact=True).input_value() in ("50", "60")
    columns = page.locator(".prompt").first.locator(".column")
    assert [text.split("\n")[0] for text in columns.all_inner_texts()] == ["opd", "control"]


def test_tokens_are_coloured_by_advantage_and_say_what_the_models_said(browser: Any, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=2)
    advantages = [-4.0, 0.0, 1.0, None]
    line = sample(
        ["no", " so", " yes", "\n"], advantages=advantages, log_probs=[-0.125, -0.5, -2.0, None], repeated=[0, 1, 0, 0]
    )
    write_lines(folder / "samples" / "step_000002.jsonl", [line])
    opened = Opened(browser, report(folder))
    tokens = opened.page.locator(".response span")
    colors = [tokens.nth(i).evaluate("(token) => getComputedStyle(token).backgroundColor") for i in range(4)]
    assert colors == ["rgba(230, 97, 0, 0.75)", "rgba(0, 114, 178, 0)", "rgba(0, 114, 178, 0.376)", "rgba(0, 0, 0, 0)"]
    assert tokens.evaluate_all("(all) => all.map((token) => token.classList.contains('repeated'))") == [
        False,
        True,
        False,
        False,
    ]
    tokens.nth(0).hover()
    hint = " ".join(opened.page.locator(".hint").inner_text().split())
    assert hint == '"no" token 1 of 4 student -0.1250 nats teacher -1.2500 nats advantage -4.0000 nats'
    assert opened.errors == []


def test_text_that_would_break_html_appears_as_it_is_and_does_nothing(browser: Any, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "<b>run", steps=2)
    lines = [sample([text, "."], prompt=text, uid=str(i), text=text if i == 2 else text + ".") for i, text in enumerate(NASTY)]
    write_lines(folder / "samples" / "step_000002.jsonl", lines)
    alarm = {"step": 1, "monitor": NASTY[0], "level": "<b>", "message": NASTY[1], "action": NASTY[2]}
    write_lines(folder / "alarms.jsonl", [alarm])
    opened = Opened(browser, report(folder))
    page = opened.page
    opened.scroll_through()
    assert page.title() == "<b>run: megatron-opd report"
    shown = []
    for _ in range(0, len(NASTY), 2):
        shown += page.locator(".response").all_text_contents()
        page.get_by_role("button", name="next").click(force=True)
    assert shown == [text + "." for text in NASTY]
    assert page.locator("b").all_text_contents() == ["student"] * 2
    assert NASTY[1] in page.locator(".alarms").inner_text()
    assert page.locator("main img, main script").count() == 0
    assert opened.errors == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_colour_schemes_are_drawn_and_a_change_redraws(browser: Any, tmp_path: Path, scheme: str) -> None:
    opened = Opened(browser, report(write_run(tmp_path / "run", steps=12)), color_scheme=scheme)
    opened.point_at("truncation", 0.5)
    stroke = "document.querySelector('#panel-loss .plot') && getComputedStyle(document.body).backgroundColor"
    expected = {"light": "rgb(245, 246, 248)", "dark": "rgb(16, 19, 24)"}
    assert opened.page.evaluate(stroke) == expected[scheme]
    image = "document.querySelector('#panel-truncation canvas').toDataURL()"
    before = opened.page.evaluate(image)
    opened.page.emulate_media(color_scheme="dark" if scheme == "light" else "light")
    opened.page.wait_for_timeout(100)
    assert opened.page.evaluate(image) != before
    assert opened.errors == []


def test_ten_thousand_steps_open_at_once(browser: Any, tmp_path: Path, table: Table) -> None:
    folder = long_run(tmp_path / "run")
    out = report(folder)
    start = time.monotonic()
    opened = Opened(browser, out)
    opened.page.locator("#panel-heldout_accuracy canvas").wait_for()
    opened_after = time.monotonic() - start
    step = opened.point_at("loss", 0.5)
    assert opened.legend("loss") == [f"{float(f'{step / 7:.4g}'):g}"]
    start = time.monotonic()
    for i in range(8):
        opened.point_at("loss", 0.2 + i / 16)
    table.add(
        "report of 10,000 steps", "in Chromium", f"{opened_after:.2f} s to open, {(time.monotonic() - start) / 20:.3f} s a move"
    )
    assert opened_after < 10
    assert opened.errors == []

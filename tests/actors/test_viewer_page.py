"""The page of `bascule view` in a real browser: chromium, if this machine has it."""

import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from actors.viewer.page import written
from actors.viewer.run import ViewedRun
from actors.viewer.server import ViewServer
from tests.actors.test_viewer import QUERIES
from tests.actors.viewer_runs import HOSTILE, rows, write_gkd, write_grpo, write_old, write_sft

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (`test` extra)")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no chromium here; `apt-get install chromium`"
)
ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
NAMES = "text split first_step last_step function low high finish recorded sort".split()  # noqa: SIM905
# Every control has a name that can be read out.
UNNAMED = """() => [...document.querySelectorAll("input, select, button, summary, a, [tabindex='0']")].filter(
  (each) => !(each.getAttribute("aria-label") || each.labels?.length || each.textContent.trim()
              || each.closest(".card"))).map((each) => each.outerHTML)"""
POINTS = """() => Object.fromEntries([...document.querySelectorAll(".plot")].flatMap((plot) => plot.data)
  .filter((trace) => trace.meta).map((trace) => [trace.meta, trace.x.map((x, i) => [x, trace.y[i]])]))"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield running
        running.close()


class Opened:
    """A page, with all that it asked for and all that went wrong in it."""

    def __init__(self, browser: Any, url: str, scheme: str = "light") -> None:
        self.asked: list[str] = []
        self.wrong: list[str] = []
        self.page = browser.new_page(color_scheme=scheme, viewport={"width": 1400, "height": 900})
        self.page.set_default_timeout(60_000)
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("dialog", lambda dialog: self.wrong.append(f"dialog {dialog.message}"))
        self.page.on(
            "console", lambda message: self.wrong.append(message.text) if message.type == "error" else None
        )
        self.page.goto(url)
        self.page.wait_for_selector("body[data-ready]")

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()

    def filter(self, **values: str) -> None:
        """Fill the form, and wait until the list follows."""
        form = self.page.locator("#filters")
        form.locator("button[type=reset]").click()
        for name, value in values.items():
            field = form.locator(f"[name={name}]")
            if name == "recorded":
                field.check()
            elif name in ("split", "function", "finish", "sort"):
                field.select_option(value)
            else:
                field.fill(value)
        self.answered(**values)

    def answered(self, **values: str) -> None:
        """Wait until the list is the answer to this filter."""
        wanted = dict.fromkeys(NAMES, "") | {"sort": "newest"} | values
        end = time.monotonic() + 20
        found: Any = None
        while found != wanted:
            assert time.monotonic() < end, f"{found} in place of {wanted}"
            time.sleep(0.02)
            found = json.loads(self.page.locator("#groups").get_attribute("data-query") or "null")

    def choose(self, key: str) -> None:
        self.page.locator(f"#groups [data-key='{key}']").click()
        self.page.locator(f"#detail[data-key='{key}']").wait_for()


def save(run: ViewedRun, file: Path, bound: int = 1000) -> str:
    file.write_text(written(run, bound)[0])
    return file.as_uri()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_grpo(tmp_path_factory.mktemp("page") / "run <i>one")


@pytest.fixture(scope="module")
def saved(browser: Any, directory: Path) -> Iterator[Opened]:
    opened = Opened(browser, save(ViewedRun(directory), directory.parent / "page.html"))
    yield opened
    opened.page.close()


@pytest.fixture(scope="module")
def live(browser: Any, directory: Path) -> Iterator[Opened]:
    with serving(directory) as url:
        opened = Opened(browser, url)
        yield opened
        opened.page.close()


@contextmanager
def serving(directory: Path) -> Iterator[str]:
    with ViewServer(ViewedRun(directory), 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server.url
        finally:
            # Otherwise a failed test leaves a thread that keeps this process for ever.
            server.shutdown()
            thread.join()


@pytest.fixture(params=["saved", "live"])
def opened(request: pytest.FixtureRequest) -> Opened:
    return request.getfixturevalue(request.param)


def test_curves_are_the_rows_of_metrics_and_all_can_be_shown(opened: Opened, directory: Path) -> None:
    page = opened.page
    titles = page.locator(".chart").evaluate_all("(boxes) => boxes.map((box) => box.dataset.title)")
    first = ["reward", "accuracy", "loss", "kl", "sampling/mismatch_kl", "completions/mean_length"]
    assert titles == [*first, "time of phases", "tokens_per_second"]
    page.locator("#picker summary").click()
    page.get_by_role("button", name="All").click()
    page.locator(".chart >> nth=9").wait_for()
    found = page.evaluate(POINTS)
    every = rows(directory / "metrics.jsonl")
    assert found == {
        name: [[row["step"], row[name]] for row in every if name in row]
        for name in {name for row in every for name in row} - {"step"}
    }
    assert page.locator("#picked").inner_text() == "10 of 10"
    # A name with tags in it is text.
    assert page.get_by_role("checkbox", name="rewards/<b>odd</b>, name:&x=1/mean").count() == 1
    page.get_by_label("Find a metric").fill("phase")
    page.locator("#picker-list input").uncheck()
    page.locator(".chart[data-title='time of phases']").wait_for(state="detached")
    page.get_by_label("Find a metric").fill("")
    page.get_by_role("button", name="Default").click()
    page.keyboard.press("Escape")
    page.locator(".chart >> nth=8").wait_for(state="detached")
    assert opened.wrong == []


def test_events_are_a_list_and_marks_on_the_curves(opened: Opened) -> None:
    page = opened.page
    listed = page.locator("#event-list li").evaluate_all("(rows) => rows.map((row) => row.dataset.kind)")
    assert listed == ["end", "checkpoint", "reward", "start"]
    marks = page.evaluate(
        "() => document.querySelector('.plot').data.filter((t) => t.name === 'event').map((t) => t.x)"
    )
    assert marks == [[3, 6]]
    lines = page.evaluate("() => document.querySelector('.plot').layout.shapes.map((each) => each.x0)")
    assert lines == [3, 6]
    # A click on an event shows its step.
    page.locator("#event-list li[data-kind=reward] button").click()
    opened.answered(first_step="3", last_step="3")
    assert opened.text("#found") == "9 completions in 3 groups"
    page.get_by_label("Events on curves").uncheck()
    page.locator(".plot >> nth=0").locator(".shapelayer path").first.wait_for(state="detached")
    assert page.evaluate("() => document.querySelector('.plot').layout.shapes.length") == 0
    page.get_by_label("Events on curves").check()


def test_filters_find_what_a_look_at_every_row_finds(opened: Opened, directory: Path) -> None:
    for parameters, wanted in QUERIES:
        opened.filter(**parameters, sort="oldest")
        found = [row for row in rows(directory / "rollouts.jsonl") if wanted(row)]
        groups = list(dict.fromkeys((row["step"], row["split"], row["prompt_id"]) for row in found))
        ends = ["" if len(each) == 1 else "s" for each in (found, groups)]
        expected = f"{len(found)} completion{ends[0]} in {len(groups)} group{ends[1]}"
        assert opened.text("#found") == expected, parameters
        heads = opened.page.locator("#groups .head").evaluate_all(
            "(heads) => heads.map((head) => [head.children[0].textContent, head.children[1].textContent])"
        )
        assert heads == [[f"step {step}", f"{split} · {prompt}"] for step, split, prompt in groups]
    assert opened.wrong == []


def test_both_kinds_of_page_sort_alike(saved: Opened, live: Opened) -> None:
    for sort in ("newest", "highest", "lowest", "spread", "longest", "shortest"):
        keys = []
        for opened in (saved, live):
            opened.filter(sort=sort, function="good")
            every = opened.page.locator("#groups button")
            keys.append(every.evaluate_all("(all) => all.map((each) => each.dataset.key)"))
        assert keys[0] == keys[1], sort
        assert len(keys[0]) == 20


def test_texts_of_a_model_are_text(opened: Opened) -> None:
    opened.filter(text="pwned", split="train", sort="oldest")
    page = opened.page
    assert page.locator(".card pre").evaluate_all("(all) => all.map((each) => each.textContent)") == [
        f"{HOSTILE} step 1"
    ]
    assert opened.text("#run-name") == "run <i>one"
    assert page.evaluate("() => window.pwned") is None
    assert page.locator("main img, main script").count() == 0
    opened.filter(first_step="1", last_step="1")
    opened.choose("train-1-0")
    assert page.locator(".token >> nth=1").evaluate("(token) => token.textContent") == " <b>beta</b>"
    # The server's own answers to what a browser asks for by itself do not count.
    assert opened.wrong == []


def test_a_written_page_asks_for_nothing(saved: Opened) -> None:
    assert [url for url in saved.asked if not url.startswith("data:")] == saved.asked[:1]
    assert saved.asked[0].startswith("file://")


def test_tokens_have_the_colours_of_their_numbers(opened: Opened) -> None:
    opened.filter(first_step="1", last_step="1", split="train", sort="oldest")
    opened.choose("train-1-0")
    page = opened.page

    def colours(index: int) -> list[str]:
        """One that is replaced meanwhile, as a live page does, has none: then ask again."""
        tokens = page.locator(f".card[data-index='{index}'] .token")
        found = [""]
        end = time.monotonic() + 5
        while not all(found) and time.monotonic() < end:
            found = tokens.evaluate_all("(all) => all.map((each) => getComputedStyle(each).backgroundColor)")
        return found

    def scale() -> float:
        return float(page.locator(".scale").get_attribute("data-scale"))

    blue, orange, nothing = "rgba(60, 120, 215, {})", "rgba(228, 128, 30, {})", "rgba(0, 0, 0, 0)"
    page.get_by_label("Token colours").select_option("advantage")
    assert scale() == 1
    assert colours(0) == [blue.format(0.5)] * 2
    assert colours(1) == [orange.format(0.25)] * 3
    assert colours(2) == [nothing]
    page.get_by_label("Token colours").select_option("mismatch")
    assert scale() == 0.5
    assert colours(0) == [blue.format(0.5), orange.format(0.25)]
    assert colours(1) == [nothing] * 3
    page.get_by_label("Token colours").select_option("ratio")
    assert scale() == pytest.approx(0.125)
    assert colours(0) == [blue.format(0.5)] * 2
    page.locator(".card[data-index='0'] .token >> nth=1").hover()
    tip = dict(zip(*(page.locator(f"#tip {tag}").all_inner_texts() for tag in ("span", "b")), strict=True))
    assert tip["token"] == '" <b>beta</b>"'
    assert (tip["engine"], tip["trainer"], tip["updated"]) == ("-1", "-1.25", "-1.125")
    assert (tip["mismatch"], tip["ratio"]) == ("-0.25", "1.1331")
    page.get_by_label("Token colours").select_option("none")
    assert page.locator(".token").count() == 0
    page.get_by_label("Token colours").select_option("advantage")
    parts = page.locator(".card[data-index='1'] .head").inner_text().split("\n")
    assert [part.strip() for part in parts if part.strip()][:4] == [
        "#1",
        "reward 0.35",
        "good 0",
        "advantage -0.5",
    ]
    assert "length" in parts[-1]


def test_the_keyboard_reaches_everything_and_goes_through_the_list(opened: Opened) -> None:
    opened.filter(sort="oldest", split="train")
    page = opened.page
    assert page.evaluate(UNNAMED) == []
    assert page.evaluate("() => [...document.querySelectorAll('[tabindex]')].every((e) => e.tabIndex === 0)")
    page.locator("#groups button >> nth=0").focus()
    for key, title in (
        ("ArrowDown", "Step 1 train · p1"),
        ("j", "Step 1 train · p2"),
        ("ArrowUp", "Step 1 train · p1"),
    ):
        page.keyboard.press(key)
        page.locator("#detail h3", has_text=title).wait_for()
    assert page.locator("#groups [aria-current]").get_attribute("data-key") == "train-1-1"
    page.locator("body").press("Home")


def test_light_and_dark_follow_the_system_until_chosen(saved: Opened) -> None:
    page = saved.page

    def has_background(color: str) -> None:
        # The page hears of another scheme with its next frame.
        page.wait_for_function(
            "(color) => getComputedStyle(document.body).backgroundColor === color", arg=color
        )

    light, dark = "rgb(246, 246, 244)", "rgb(19, 20, 23)"
    has_background(light)
    page.emulate_media(color_scheme="dark")
    has_background(dark)
    page.get_by_label("Theme").select_option("light")
    has_background(light)
    page.emulate_media(color_scheme="light")
    page.get_by_label("Theme").select_option("dark")
    has_background(dark)
    # The next page of this browser has it as well.
    assert json.loads(page.evaluate("() => localStorage.getItem('bascule theme')")) == "dark"
    page.get_by_label("Theme").select_option("auto")
    has_background(light)


@pytest.mark.parametrize(
    ("write", "first", "completions"),
    [
        (write_sft, ["loss", "grad_norm", "tokens_per_second", "best_loss"], 0),
        (write_gkd, ["loss", "divergence", "cross_entropy"], 2),
        (write_old, ["reward", "accuracy", "loss"], 60),
    ],
)
def test_runs_of_every_kind_are_shown(
    write: Any, first: list[str], completions: int, browser: Any, tmp_path: Path
) -> None:
    url = save(ViewedRun(write(tmp_path / "run")), tmp_path / "page.html")
    opened = Opened(browser, url)
    titles = opened.page.locator(".chart").evaluate_all("(boxes) => boxes.map((box) => box.dataset.title)")
    assert [title for title in first if title in titles] == first
    assert titles[0] == first[0]
    assert opened.text("#found").startswith(f"{completions} completions")
    if completions:
        assert "No tokens of this group were recorded" in opened.text(".tools")
    else:
        assert opened.text("#detail") == "No completion is as the filter asks."
    assert opened.wrong == []
    opened.page.close()


def test_a_written_page_says_what_was_left_out(browser: Any, directory: Path, tmp_path: Path) -> None:
    opened = Opened(browser, save(ViewedRun(directory), tmp_path / "page.html", 21))
    note = opened.text("#note")
    assert note.startswith("This file holds 21 of 60 completions, the latest of steps 5 to 6. All curves and")
    assert opened.text("#found") == "21 completions in 7 groups"
    opened.page.close()


def test_a_live_page_shows_what_a_run_adds(browser: Any, tmp_path: Path) -> None:
    directory = write_grpo(tmp_path / "growing", steps=3)
    with serving(directory) as url:
        opened = Opened(browser, url)
        assert "step 3 of 3 · 33 completions" in opened.text("#run-facts")
        line = json.dumps({"step": 4, "reward": 7.5})
        row = rows(directory / "rollouts.jsonl")[-4] | {"step": 4, "completion": "brand new"}
        with (directory / "rollouts.jsonl").open("a") as file:
            file.write(json.dumps(row | {"index": 0}) + "\n")
        with (directory / "metrics.jsonl").open("a") as file:
            file.write(line[:9])
            file.flush()
            opened.page.get_by_text("34 completions", exact=False).first.wait_for()
            assert "step 3 of 3" in opened.text("#run-facts")
            file.write(f"{line[9:]}\n")
            file.flush()
            opened.page.get_by_text("step 4 of 3", exact=False).first.wait_for()
        opened.page.locator(".chart[data-title=reward] .legend", has_text="7.5").wait_for()
        assert opened.page.evaluate(POINTS)["reward"][-1] == [4, 7.5]
        assert opened.page.locator("#groups .head b >> nth=0").inner_text() == "step 4"
        # What was being read stays.
        assert opened.text("#detail h3").startswith("Step 3")
        assert opened.wrong == []
        opened.page.close()


def test_thousands_of_completions_are_never_all_in_the_page(browser: Any, tmp_path: Path) -> None:
    directory = write_grpo(tmp_path / "large", steps=500, prompts=4)
    with serving(directory) as url:
        opened = Opened(browser, url)
        assert opened.text("#found") == "6,006 completions in 2,002 groups"
        assert opened.page.locator("#groups button").count() == 40
        assert opened.text("#page-number") == "1 of 51"
        opened.page.get_by_role("button", name="Next").click()
        opened.page.get_by_text("2 of 51", exact=True).wait_for()
        opened.filter(text="step 77", finish="length")
        assert opened.text("#found") == "4 completions in 4 groups"
        assert opened.wrong == []
        opened.page.close()

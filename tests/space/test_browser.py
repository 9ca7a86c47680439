"""The Space as people meet it: headless Chromium drives the page of a tiny model trained on the spot."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from .conftest import DEMO, NASTY, PROMPT

playwright = pytest.importorskip(
    "playwright.sync_api", reason="the browser test needs playwright: pip install gradio playwright"
)
pytest.importorskip("gradio", reason="the Space needs gradio: pip install gradio playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")

PHONE = {"width": 390, "height": 844}
DESKTOP = {"width": 1280, "height": 800}
WAIT = 30_000


@pytest.fixture(scope="module")
def url(run_folder, tmp_path_factory):
    """Address of the Space, served by its own process as on the Hub."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("space") / "log.txt"
    command = [sys.executable, str(DEMO / "app.py"), "--model", str(run_folder), "--port", str(port)]
    with log.open("w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        address = f"http://127.0.0.1:{port}"
        try:
            for _ in range(240):
                assert server.poll() is None, log.read_text()
                try:
                    urllib.request.urlopen(address, timeout=2)
                    break
                except OSError:
                    time.sleep(0.5)
            yield address
        finally:
            server.terminate()
            server.wait(10)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_space(browser, url):
    """Opens the Space like a visitor with a browser of their own."""
    contexts = []

    def visit(viewport=DESKTOP):
        context = browser.new_context(viewport=viewport)
        context.set_default_timeout(WAIT)
        contexts.append(context)
        page = context.new_page()
        page.goto(url)
        page.locator("#compare-start").wait_for()
        return page

    yield visit
    for context in contexts:
        context.close()


@pytest.fixture
def artefact(tmp_path):
    """Where a screenshot goes: `$PAPERTRL_ARTIFACTS`, or pytest's own folder."""
    folder = Path(os.environ.get("PAPERTRL_ARTIFACTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return lambda page, name: page.screenshot(path=folder / f"space-{name}.png", full_page=True)


def answer(page, kind):
    return page.locator(f"#answer-{kind} textarea")


def wait_for(page, condition, *arguments):
    """Until a condition on the page holds; Gradio replaces elements, so that handles do not last."""
    deadline = time.monotonic() + WAIT / 1000
    while not condition(*arguments):
        assert time.monotonic() < deadline, "the page did not get there in time"
        page.wait_for_timeout(50)


def finished(page, kind):
    stats = page.locator(f"#stats-{kind} .stats")
    return "tokens" in stats.inner_text() and "live" not in stats.get_attribute("class")


def ask(page, prompt):
    page.locator("#compare-prompt textarea").fill(prompt)
    page.locator("#compare-start").click()


def longest_answer(page, tokens):
    field = page.get_by_label("Longest answer").locator("visible=true")
    if not field.first.is_visible():
        page.get_by_role("button", name="Generation settings").first.click()

    def settled():
        # While Gradio mounts the slider, what is typed into it is lost
        if {entry.input_value() for entry in field.all()} == {str(tokens)}:
            return True
        field.first.fill(str(tokens))
        page.keyboard.press("Enter")
        page.wait_for_timeout(300)
        return False

    field.first.wait_for()
    wait_for(page, settled)


def open_tab(page, name):
    page.get_by_role("tab", name=name, exact=True).click()


def test_two_answers_stream(open_space, artefact):
    page = open_space()
    longest_answer(page, 512)
    page.evaluate(
        "window.lengths = new Set(); setInterval(() => "
        "window.lengths.add(document.querySelector('#answer-trained textarea').value.length), 10)"
    )
    ask(page, PROMPT)
    wait_for(page, finished, page, "trained")
    wait_for(page, finished, page, "base")
    assert page.evaluate("window.lengths.size") > 4, "the answer came at once instead of growing"
    assert answer(page, "base").input_value().startswith("xyxy")
    # Markup in an answer is text
    assert answer(page, "trained").input_value().startswith("<b><b>")
    assert "512 tokens" in page.locator("#stats-base").inner_text()
    artefact(page, "compare")


def test_stop(open_space):
    page = open_space()
    longest_answer(page, 512)
    ask(page, PROMPT)
    wait_for(page, lambda: answer(page, "base").input_value())
    page.locator("#compare-stop").click()

    def stands_still():
        before = answer(page, "base").input_value()
        page.wait_for_timeout(1500)
        return answer(page, "base").input_value() == before

    wait_for(page, stands_still)
    assert 0 < len(answer(page, "base").input_value()) < 512
    wait_for(page, lambda: "live" not in page.locator("#stats-base .stats").get_attribute("class"))
    assert "512 tokens" not in page.locator("#stats-base").inner_text()
    # The next question is answered
    longest_answer(page, 8)
    ask(page, PROMPT)
    wait_for(page, lambda: answer(page, "base").input_value() == "xyxyxyxy")


def scale_is(page, scale):
    """Whether the slider has taken the scale, which is typed again if not: while Gradio mounts it, it is lost."""
    if f"w = {scale}" in page.locator("#bars").inner_text():
        return True
    page.locator("#guidance-scale input[type=number]").fill(scale)
    page.keyboard.press("Enter")
    page.wait_for_timeout(300)
    return False


def test_guidance_slider(open_space, artefact):
    page = open_space()
    open_tab(page, "Guidance")
    page.locator("#guidance-prompt textarea").fill(PROMPT)
    bars = {}
    # The last two answers are alike, but only the last one is mixed
    for scale, text, figure in (("0", "xyxy", "tokens/s"), ("1", "<b><b>", "tokens/s"), ("2", "<b><b>", "nats")):
        wait_for(page, scale_is, page, scale)
        page.locator("#guidance-start").click()
        wait_for(page, lambda text=text: answer(page, "guided").input_value().startswith(text))
        wait_for(page, lambda figure=figure: figure in page.locator("#stats-guided").inner_text())
        wait_for(page, finished, page, "guided")
        bars[scale] = page.locator("#bars").inner_text()
    assert bars["0"] != bars["1"]
    slider = page.locator("#guidance-scale input[type=range]")
    slider.focus()
    page.keyboard.press("ArrowLeft")
    wait_for(page, lambda: "w = 1.9" in page.locator("#bars").inner_text())
    artefact(page, "guidance")


def test_guidance_follows_the_prompt_that_was_compared(open_space):
    page = open_space()
    for asked in ("follow:", "again:"):
        open_tab(page, "Compare")
        page.locator("#compare-prompt textarea").fill(asked)
        open_tab(page, "Guidance")
        wait_for(page, lambda asked=asked: page.locator("#guidance-prompt textarea").input_value() == asked)
    wait_for(page, lambda: "w = 1" in page.locator("#bars").inner_text())


def test_curves_and_samples(open_space, artefact):
    page = open_space()
    open_tab(page, "Training")
    page.locator("#curve-0 svg, #curve-0 canvas").first.wait_for()
    shown = [i for i in range(6) if page.locator(f"#curve-{i}").is_visible()]
    assert shown == [0, 1, 2, 3]
    assert "Held-out accuracy" in page.locator("#curve-0").inner_text()
    # One curve less
    page.locator("#curve-names .token-remove").nth(1).click()
    wait_for(page, lambda: not page.locator("#curve-3").is_visible())
    assert NASTY in page.locator("#samples").inner_text()
    artefact(page, "training")
    open_tab(page, "About")
    assert page.get_by_role("link", name="arXiv:2501.00001").get_attribute("href").endswith("/abs/2501.00001")
    artefact(page, "about")


def test_markup_stays_text(open_space):
    page = open_space()
    ask(page, NASTY)
    wait_for(page, finished, page, "trained")
    for tab in ("Guidance", "Training", "About"):
        open_tab(page, tab)
        page.wait_for_timeout(300)
    assert page.evaluate("window.hacked") is None
    assert page.locator("img[src='x'], .gradio-container b b").count() == 0
    assert "49" not in page.locator("#samples").inner_text()


def test_empty_prompt_and_too_long_a_prompt(open_space):
    page = open_space()
    ask(page, "")
    page.get_by_text("Write a prompt first.").first.wait_for()
    ask(page, "a" * 3000 + PROMPT)
    page.get_by_text("The prompt is too long for the model").wait_for()
    wait_for(page, finished, page, "base")


def test_two_visitors_at_once(open_space):
    first, second = open_space(), open_space()
    ask(first, PROMPT)
    ask(second, f"{PROMPT}xy")
    for page in (first, second):
        wait_for(page, finished, page, "trained")
        assert len(answer(page, "trained").input_value()) == 128
        assert answer(page, "base").input_value().startswith("xyxy")


def test_phone(open_space, artefact):
    page = open_space(PHONE)
    ask(page, PROMPT)
    wait_for(page, finished, page, "base")
    # Both answers have come into view
    wait_for(page, lambda: page.locator("#answer-trained").bounding_box()["y"] < PHONE["height"])
    base, trained = (page.locator(f"#answer-{kind}").bounding_box() for kind in ("base", "trained"))
    assert trained["y"] > base["y"] + base["height"], "the columns stand side by side"
    for tab in ("Compare", "Guidance", "Training", "About"):
        open_tab(page, tab)
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], f"{tab} scrolls sideways"
        artefact(page, f"phone-{tab.lower()}")

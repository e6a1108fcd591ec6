"""The page in a real browser: nothing in the console, nothing from the network, nothing beyond a phone's width.

Needs the package playwright and a chromium: Debian's, or the one playwright brings.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import made
import pytest

from headwise.atlas.report import write_page

playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
pytestmark = pytest.mark.slow

NARROW, WIDE = 390, 1280


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with playwright.sync_playwright() as driver:
        try:
            opened = driver.chromium.launch(
                executable_path=found, headless=True, args=["--no-sandbox", "--disable-background-networking"]
            )
        except playwright.Error as error:
            pytest.skip(f"no browser can be started: {str(error).splitlines()[0]}")
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_page(made.report(), tmp_path_factory.mktemp("page") / "report.html").as_uri()


class Opened:
    """A page in the browser, and what it said and asked for."""

    def __init__(self, browser: Any, address: str, width: int, scheme: str = "light") -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(address)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [NARROW, WIDE])
def test_it_is_quiet_asks_for_nothing_and_fits(browser: Any, address: str, width: int, scheme: str) -> None:
    opened = Opened(browser, address, width, scheme)
    opened.page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
    assert opened.said == []
    assert opened.asked == [address]
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    # Nothing sticks out but what scrolls in a box of its own.
    out = """[...document.querySelectorAll('main *, header *')].filter((e) =>
        !e.closest('.scroll') && !e.closest('thead') && e.getBoundingClientRect().right > innerWidth + 1).length"""
    assert opened.page.evaluate(out) == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast(browser: Any, address: str, scheme: str) -> None:
    opened = Opened(browser, address, WIDE, scheme)
    opened.page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
    weak = opened.page.evaluate(
        """() => {
        const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
        const light = (c) => c.slice(0, 3).map((v) => v / 255)
            .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
        const ground = (e) => { for (; e; e = e.parentElement) {
            const c = channels(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] > 0) return c; } };
        const found = [];
        const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
        while (texts.nextNode()) {
            const e = texts.currentNode.parentElement, text = texts.currentNode.textContent.trim();
            if (!text || ["SCRIPT", "STYLE", "title"].includes(e.tagName)) continue;
            const style = getComputedStyle(e);
            const a = light(channels(e.namespaceURI.endsWith("svg") ? style.fill : style.color)), b = light(ground(e));
            const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
            if (ratio < 4.5) found.push(text.slice(0, 30) + " " + ratio.toFixed(2));
        }
        return found; }"""
    )
    assert weak == []


def test_a_map_names_its_heads_by_keys_and_by_pointer(browser: Any, address: str) -> None:
    page = Opened(browser, address, WIDE).page
    values = made.report().maps[-1].values
    figure = page.locator("figure", has=page.locator("svg.map")).first
    drawn, output = figure.locator("svg.map"), figure.locator("output")
    before = output.inner_text()
    assert before.startswith("highest: L6H3")
    drawn.focus()
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "ArrowUp", "ArrowDown"):
        page.keyboard.press(key)
    assert output.inner_text().startswith(f"L1H2: {_three(values[1, 2])} (n = 31)")
    box, cell, left, top = (
        drawn.bounding_box(),
        *(int(drawn.get_attribute(f"data-{n}")) for n in ("cell", "left", "top")),
    )
    page.mouse.move(box["x"] + left + 3.5 * cell, box["y"] + top + 6.5 * cell)
    assert output.inner_text() == "L6H3: 2.9 (n = 31)"
    page.mouse.move(box["x"] + left + 0.5 * cell, box["y"] + top + 0.5 * cell)
    assert output.inner_text() == "L0H0: no value (n = 31)"
    page.mouse.move(0, 0)
    page.evaluate("document.activeElement.blur()")
    assert output.inner_text() == before


def test_an_example_shows_the_head_that_was_chosen(browser: Any, address: str) -> None:
    page = Opened(browser, address, NARROW).page
    example, shown = page.locator(".example").first, made.report().examples[0]
    example.get_by_role("button", name="L5H1").click()
    assert example.get_by_role("button", name="L5H1").get_attribute("aria-pressed") == "true"
    assert example.get_by_role("button", name="L6H3").get_attribute("aria-pressed") == "false"
    weights = shown.patterns[1].weights
    most = max(range(len(weights)), key=weights.__getitem__)
    output = example.locator("output")
    assert output.inner_text().startswith(f"L5H1 \u2192 token {most} ")
    example.locator(".t").nth(3).click()
    assert output.inner_text().startswith("L5H1 \u2192 token 3 ")
    example.locator(".tokens").focus()
    page.keyboard.press("ArrowRight")
    assert output.inner_text() == f"L5H1 \u2192 token 4 \u201cJohn\u201d: weight {_three(weights[4])}"
    page.keyboard.press("End")
    assert f"token {len(weights) - 1} " in output.inner_text()
    steps = example.locator(".t").evaluate_all("all => all.map((each) => Number(each.className.match(/c(\\d)/)[1]))")
    assert steps == [sum(w >= b for b in (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)) for w in weights]


def test_a_head_on_a_picture_names_its_cells_by_keys_and_by_pointer(browser: Any, address: str) -> None:
    page = Opened(browser, address, WIDE).page
    shown = made.report().examples[-1]
    figure = page.locator(".looks figure", has=page.locator("svg.look")).first
    look, output = figure.locator("svg.look"), figure.locator("output")
    before = output.inner_text()
    cells = [weight for part in shown.patterns[0].cells for weight in part]
    most = max(range(len(cells)), key=cells.__getitem__)
    assert before.startswith(f"most: {cell(most)}: weight ")
    look.focus()
    page.keyboard.press("Home")
    assert output.inner_text() == f"{cell(0)}: weight {_two(cells[0])}"
    for key, at in (("ArrowRight", 1), ("ArrowDown", 7), ("ArrowLeft", 6), ("ArrowLeft", 6), ("ArrowUp", 0)):
        page.keyboard.press(key)
        assert output.inner_text() == f"{cell(at)}: weight {_two(cells[at])}", key
    page.keyboard.press("End")
    assert output.inner_text() == f"{cell(87)}: weight {_two(cells[87])}"
    for _ in range(4):
        page.keyboard.press("ArrowUp")  # from the last picture to the one above it
    assert output.inner_text().startswith("picture 1, ")
    box = look.bounding_box()
    scale = box["width"] / 328  # two pictures of 160, and a gap of 8
    page.mouse.move(box["x"] + (168 + 1.5 * 160 / 6) * scale, box["y"] + 2.5 * 160 / 6 * scale)
    assert output.inner_text() == f"{cell(36 + 13)}: weight {_two(cells[36 + 13])}"
    page.mouse.move(0, 0)
    page.evaluate("document.activeElement.blur()")
    assert output.inner_text() == before


def cell(number: int) -> str:
    """In words, of the three pictures: two of 6 x 6 cells of 8 pixels, one of 4 x 4 of 12."""
    picture, place = (number // 36, number % 36) if number < 72 else (2, number - 72)
    columns, wide = (6, 8) if picture < 2 else (4, 12)
    row, column = divmod(place, columns)
    left, top = wide * column, wide * row
    return f"picture {picture + 1}, {left} to {left + wide} across, {top} to {top + wide} down"


def test_pictures_are_there_and_drawn_over(browser: Any, address: str) -> None:
    page = Opened(browser, address, NARROW).page
    assert page.locator(".looks image").count() == 3
    assert page.locator(".looks use").count() == 9
    drawn = page.evaluate("[...document.querySelectorAll('.looks use')].map((e) => e.getBoundingClientRect().width)")
    assert min(drawn) > 50
    # The script's own drawing needs no inline style, which the page would allow, and no other file.
    assert page.locator(".look .shade").count() > 3


def test_everything_that_acts_can_be_reached_by_keys(browser: Any, address: str) -> None:
    page = Opened(browser, address, WIDE).page
    wanted = page.evaluate(
        "document.querySelectorAll('a, button:not([hidden]), summary, svg.map, svg.look, .tokens, .scroll').length"
    )
    page.evaluate("window.met = new Set(); document.addEventListener('focusin', (event) => met.add(event.target))")
    for _ in range(wanted + 10):
        page.keyboard.press("Tab")
    assert page.evaluate("met.size") >= wanted


def test_it_reads_without_its_script(browser: Any, address: str) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(address)
    assert "highest: L6H3" in page.inner_text("figure output >> nth=0")
    assert "L6H3 \u2192 token" in page.inner_text(".example output >> nth=0")
    context.close()


def _two(weight: float) -> str:
    """As the page has a weight, and its script writes it."""
    return _three(float(f"{weight:.2g}") if weight >= 1e-4 else 0.0)


def _three(value: float) -> str:
    """As the page's script writes a number."""
    return f"{float(f'{value:.3g}'):g}".replace("-", "\u2212")

"""The report in Chromium: the viewer by keyboard and by its buttons, the plots, a phone, dark mode. Without a browser it is skipped."""

import pytest

from tests import pages
from tests.pages import find

pytestmark = pytest.mark.slow
WIDTH = "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    return pages.write_report(tmp_path_factory.mktemp("page") / "report.html", pages.report_content(256))


@pytest.fixture
def page(browser, address):
    """The page, newly loaded; no test may leave an error in the console."""
    pages.resize(browser, 1280)
    browser.get(address)
    yield browser
    assert browser.get_log("browser") == []
    assert browser.title == "a title"  # what prompts hold has not run


def press(driver, key, times=1):
    """A key, in full: Selenium's own sends go to an element, this to what has the focus."""
    from selenium.webdriver import ActionChains

    actions = ActionChains(driver)
    for _ in range(times):
        actions.send_keys(key)
    actions.perform()


def shown(driver, side):
    """[(symbol, masked?, number)] of the positions of "base" or "trained"."""
    script = """return [...document.querySelectorAll(`.side.${arguments[0]} .token`)].map((cell) =>
        [cell.children[0].textContent, cell.classList.contains('masked'), cell.children[2].textContent]);"""
    return [tuple(cell) for cell in driver.execute_script(script, side)]


def expected(record, call, mode="call"):
    def number(k):
        sure = record["confidence"][k]
        if sure is None:
            return ""
        return str(record["steps"][k] + 1) if mode == "call" else str(int(100 * sure + 0.5))

    there = [step < call for step in record["steps"]]
    return [(symbol, False, number(k)) if there[k] else ("_", True, "") for k, symbol in enumerate(record["tokens"])]


def assert_shows(driver, problem, call, mode="call"):
    for side in ("base", "trained"):
        assert shown(driver, side) == expected(problem[side], call, mode), (side, call)
        facts = find(driver, f".side.{side} .facts")[0].text
        assert facts.startswith(f"call {min(call, problem[side]['nfe'])} of {problem[side]['nfe']} · ")


def test_the_slider_by_keyboard_shows_what_the_data_say(page):
    from selenium.webdriver.common.keys import Keys

    problem = pages.report_content()["problems"][0]
    assert find(page, ".problem")[0].text == pages.HOSTILE and not find(page, "img")
    assert_shows(page, problem, 4)  # at first the whole responses
    slider = find(page, ".viewer input[type=range]")[0]
    page.execute_script("arguments[0].focus()", slider)
    press(page, Keys.HOME)
    assert_shows(page, problem, 0)
    for call in (1, 2, 3, 4):
        press(page, Keys.ARROW_RIGHT)
        assert_shows(page, problem, call)
        assert slider.get_attribute("aria-valuetext") == find(page, ".controls output")[0].text == f"call {call} of 4"
    press(page, Keys.ARROW_LEFT)
    assert_shows(page, problem, 3)
    assert find(page, ".side.base .verdict")[0].text == "✗ wrong, reward 0.25, 2 calls (NFE)"
    assert find(page, ".side.trained .verdict")[0].text == ""  # its last call is still to come
    press(page, Keys.END)
    assert find(page, ".side.trained .verdict")[0].text == "✓ right, reward 1.00, 4 calls (NFE)"
    assert find(page, ".side.trained .facts")[0].text == "call 4 of 4 · learned γ = 1.5"


def test_nothing_moves_when_it_is_filled_in(page):
    from selenium.webdriver.support.ui import Select

    places = """const range = document.querySelector('.viewer input[type=range]');
        range.value = arguments[0];
        range.dispatchEvent(new Event('input'));
        return [...document.querySelectorAll('.side.trained .token')].map((cell) => [cell.offsetLeft, cell.offsetTop, cell.offsetWidth]);"""
    Select(find(page, "#problem")[0]).select_by_index(2)
    assert page.execute_script(places, 0) == page.execute_script(places, 5) == page.execute_script(places, 32)


def test_new_tokens_are_marked_and_the_row_can_be_heard(page):
    page.execute_script("const s = document.querySelector('.viewer input[type=range]'); s.value = 1; s.dispatchEvent(new Event('input'))")
    new = page.execute_script("return [...document.querySelectorAll('.side.trained .token')].map((cell) => cell.classList.contains('new'))")
    assert new == [False, True, False, False, True, False]
    assert find(page, ".side.trained .tokens")[0].get_attribute("aria-label") == "trained model after call 1 of 4: _+__·_"


def test_another_problem_and_confidences(page):
    from selenium.webdriver.support.ui import Select

    problem = pages.report_content()["problems"][1]
    Select(find(page, "#problem")[0]).select_by_index(1)
    assert find(page, ".problem")[0].text == "3 pens. 4 more?"
    find(page, ".choice input")[1].click()
    assert_shows(page, problem, 4, "confidence")
    sure = page.execute_script(
        "return [...document.querySelectorAll('.side.trained .token')].map((cell) => cell.style.getPropertyValue('--sure'))"
    )
    assert sure == ["1", "0.5", "0.25", "0.125", "0.75", "0"]
    assert find(page, ".side.trained .token")[3].get_attribute("title") == "call 3, confidence 12.5%, entropy 0.5 nats"


def test_play_goes_to_the_end_and_space_pauses_it(page):
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    page.execute_script("document.querySelector('.viewer input[type=range]').focus()")
    status, play = find(page, ".controls output")[0], find(page, ".play")[0]
    press(page, " ")  # from the end it starts again
    WebDriverWait(page, 10).until(lambda _: status.text == "call 1 of 4")
    assert play.text == "Pause"
    press(page, " ")
    assert play.text == "Play"
    press(page, Keys.HOME)
    play.click()
    WebDriverWait(page, 20).until(lambda _: status.text == "call 4 of 4" and play.text == "Play")
    assert_shows(page, pages.report_content()["problems"][0], 4)


def test_a_point_of_the_plot_says_what_it_is(page):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    tip = find(page, "#pareto .tip")[0]
    assert not tip.is_displayed()
    learned = find(page, "#pareto g.learned .point")[0]
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", learned)
    ActionChains(page).move_to_element(learned).perform()
    assert tip.text.splitlines() == ["trained model, learned γ, mean 1.63", "3 calls a response", "34.0% right (95%: 29.0% to 39.0%)"]
    base = find(page, "#pareto g.base .point")
    page.execute_script("arguments[0].focus()", base[0])
    press(page, Keys.ARROW_RIGHT)
    assert tip.is_displayed() and tip.text.splitlines()[0] == "base model, γ = 1"
    assert [point.get_attribute("tabindex") for point in base] == ["-1", "0", "-1"]
    press(page, Keys.ARROW_RIGHT, 5)
    assert tip.text.splitlines()[1] == "12 calls a response"
    rows = page.execute_script("return [...document.querySelectorAll('#pareto-table tbody tr')].map((row) => row.children[2].textContent)")
    assert rows == ["2", "4", "12", "2", "4", "3"]  # all of it as numbers too


def test_a_training_curve_can_be_read(page):
    from selenium.webdriver.common.keys import Keys

    value = find(page, "#charts figcaption span")[1]
    page.execute_script("document.querySelector('#charts svg').scrollIntoView(); document.querySelector('#charts svg').focus()")
    assert value.text == "0.375"
    press(page, Keys.ARROW_LEFT)
    assert value.text == "0.5 at 2"


@pytest.mark.parametrize("width", [390, 320])
def test_a_phone_shows_it_without_scrolling_sideways(page, address, width):
    from selenium.webdriver.support.ui import Select

    pages.resize(page, width)
    page.get(address)
    for problem in (0, 2):  # the third has a response of 256 tokens
        Select(find(page, "#problem")[0]).select_by_index(problem)
        page.execute_script("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
        assert page.execute_script(WIDTH) == [width, width]
    cells = page.execute_script(
        "return [...document.querySelectorAll('.side.base .token')].map((cell) => [cell.offsetLeft, cell.offsetLeft + cell.offsetWidth])"
    )
    assert len(cells) == 256 and min(left for left, _ in cells) >= 0 and max(right for _, right in cells) <= width


def test_everything_that_can_be_operated_is_reached_by_tab(page):
    from selenium.webdriver.common.keys import Keys

    page.execute_script("document.activeElement.blur()")
    reached = []
    for _ in range(24):
        press(page, Keys.TAB)
        reached.append(page.execute_script(
            "const e = document.activeElement; return e.id || e.type || (e.closest('g[class]') || e).getAttribute('class') || e.tagName"
        ))  # fmt: skip
    for name in ("problem", "range", "button", "radio", "point", "chart", "SUMMARY"):
        assert name in reached, (name, reached)


def contrast(driver, selector):
    """The WCAG contrast of an element's text to the page's background."""
    script = """
        const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
        const parse = (text) => { canvas.fillStyle = text; canvas.fillRect(0, 0, 1, 1); return [...canvas.getImageData(0, 0, 1, 1).data]; };
        const light = (colour) => colour.slice(0, 3).map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
          .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
        const node = document.querySelector(arguments[0]), style = getComputedStyle(node);
        let behind = node;
        while (behind && /rgba\\(0, 0, 0, 0\\)|transparent/.test(getComputedStyle(behind).backgroundColor)) behind = behind.parentElement;
        const [a, b] = [style.color, getComputedStyle(behind || document.body).backgroundColor].map((c) => light(parse(c)));
        return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);"""
    return driver.execute_script(script, selector)


def test_dark_mode_is_dark_and_text_can_be_read_in_both(address):
    backgrounds = []
    for dark in (False, True):
        driver = pages.open_browser(dark=dark)
        try:
            driver.get(address)
            backgrounds.append(driver.execute_script("return getComputedStyle(document.body).backgroundColor"))
            for selector in (
                "h1", ".lead", ".facts", ".side.base h3", ".side.trained h3", "th", ".right", ".wrong", ".token.new", ".token small",
            ):  # fmt: skip
                assert contrast(driver, selector) >= 4.5, (dark, selector)
            assert driver.get_log("browser") == []
        finally:
            driver.quit()
    assert backgrounds == ["rgb(253, 253, 252)", "rgb(21, 24, 28)"]


def test_reduced_motion_is_respected(page):
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-reduced-motion", "value": "reduce"}]})
    assert page.execute_script("return getComputedStyle(document.querySelector('.token')).transitionDuration") == "0s"
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert page.execute_script("return getComputedStyle(document.querySelector('.token')).transitionDuration") == "0.15s"

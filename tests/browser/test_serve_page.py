"""--mode=serve in Chromium: a typed problem, what is wrong with one, markup, a phone; and the whole program on a trained workdir."""

import json
import os
import re
import shutil
import signal
import urllib.request

import pytest

from diffpo_jax import page as pages_module
from tests import pages, runs
from tests.pages import find, serve_module

pytestmark = pytest.mark.slow
SETTINGS = {"problems": ["3 pens. 4 more?", pages.HOSTILE], "thresholds": True, "learned": True, "low": 0.1, "high": 8.0, "start": 2.5}
TEXTS = {"kicker": "diffpo_jax", "lead": "Two models.", "note": "Responses have 6 tokens."}


@pytest.fixture
def served(browser):
    """(driver on the page, the requests that came)."""
    asked = []

    def compute(request):
        prompt, gamma, learned = serve_module.check_request(request, 0.1, 8.0)
        asked.append((prompt, gamma, learned))
        if "é" in prompt:
            raise serve_module.Refused(serve_module.HTTPStatus.BAD_REQUEST, "cannot encode 'é'")
        found = pages.pair(prompt, None if prompt not in SETTINGS["problems"] else True)
        found["base"]["gamma"] = gamma
        return found | {"trained": found["trained"] | {"chosen": learned}}

    pages.resize(browser, 1280)
    whole = pages_module.render("serve", "denoising", TEXTS, SETTINGS)
    with serve_module.listen("127.0.0.1", 0, *whole, compute) as server:
        browser.get(serve_module.url(server))
        wait(browser, lambda: asked and find(browser, ".token"))
        yield browser, asked
        assert browser.title == "denoising"  # no markup has run
        browser.get("about:blank")


def text(driver, selector):
    """The text of the first such element; "" where there is none."""
    return "".join(node.text for node in find(driver, selector)[:1])


def wait(driver, what, seconds=20):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, seconds).until(lambda _: what())


def type_problem(driver, text):
    from selenium.webdriver.common.keys import Keys

    box = find(driver, "#prompt")[0]
    box.clear()
    box.send_keys(text + Keys.ENTER)


def test_a_typed_problem_is_denoised_and_not_graded(served):
    driver, asked = served
    assert asked == [("3 pens. 4 more?", pytest.approx(2.5), True)]  # the first test problem, at once
    type_problem(driver, "8 cups. 9 more?")
    wait(driver, lambda: text(driver, ".problem") == "8 cups. 9 more?")
    assert find(driver, "#chosen")[0].get_attribute("value") == ""
    wait(driver, lambda: "no known answer" in text(driver, ".side.trained .verdict"))
    assert text(driver, ".side.trained .facts") == "call 4 of 4 · learned γ = 1.5"
    assert text(driver, ".side.base .facts") == "call 2 of 2 · γ = 2.5"
    assert driver.get_log("browser") == []


def test_a_test_problem_and_another_threshold_by_keyboard(served):
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select

    driver, asked = served
    find(driver, "#gamma")[0].send_keys(Keys.END)
    assert text(driver, "#gamma-value") == "= 8"
    find(driver, "#gamma")[0].send_keys(Keys.ARROW_LEFT)
    find(driver, "#learned")[0].send_keys(" ")
    Select(find(driver, "#chosen")[0]).select_by_index(2)
    find(driver, "#go")[0].send_keys(Keys.ENTER)
    wait(driver, lambda: len(asked) == 2)
    assert asked[1] == (pages.HOSTILE, pytest.approx(0.1 * 80**0.98), False)


def test_markup_is_text(served):
    driver, asked = served
    type_problem(driver, pages.HOSTILE + "<img src=x onerror=alert(1)>")
    wait(driver, lambda: len(asked) == 2 and text(driver, ".problem") == asked[1][0])
    assert asked[1][0].endswith("<img src=x onerror=alert(1)>")
    assert not find(driver, "img") and len(find(driver, "script")) == 2
    wait(driver, lambda: text(driver, ".side.base .token b") == "<b>")
    assert driver.get_log("browser") == []


def test_what_is_wrong_is_said_beside_the_problem(served):
    driver, _ = served
    type_problem(driver, "é")
    wait(driver, lambda: text(driver, "#error") == "cannot encode 'é'")
    assert text(driver, ".problem") == "3 pens. 4 more?"  # what was there stays
    find(driver, "#prompt")[0].clear()
    find(driver, "#go")[0].click()
    wait(driver, lambda: text(driver, "#error") == "there is no problem: type one, or pick a test problem")
    driver.execute_script("document.getElementById('prompt').value = 'a'.repeat(20000)")
    find(driver, "#go")[0].click()
    wait(driver, lambda: text(driver, "#error") == "a request has at most 16384 bytes")
    statuses = [re.search(r"status of (\d+)", entry["message"])[1] for entry in driver.get_log("browser")]  # Chromium's own notes
    assert statuses == ["400", "400", "413"]
    type_problem(driver, "1 more?")
    wait(driver, lambda: text(driver, ".problem") == "1 more?")
    assert text(driver, "#error") == ""


def test_motion_is_not_begun_for_who_wants_less_of_it(served):
    driver, asked = served
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-reduced-motion", "value": "reduce"}]})
    type_problem(driver, "1 more?")
    wait(driver, lambda: text(driver, ".problem") == "1 more?")
    assert (text(driver, ".play"), text(driver, ".controls output")) == ("Play", "call 4 of 4")
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_no_request_goes_elsewhere(served):
    driver, _ = served
    assert driver.execute_script("return fetch('http://127.0.0.1:9/').then(() => 'sent', (error) => error.name)") == "TypeError"
    [entry, *_] = driver.get_log("browser")
    assert "Content Security Policy" in entry["message"]


def test_a_phone(served):
    driver, _ = served
    pages.resize(driver, 390)
    driver.refresh()
    wait(driver, lambda: find(driver, ".token"))
    assert driver.execute_script("return document.documentElement.scrollWidth") == 390


def test_the_program_serves_a_trained_workdir_and_ends_cleanly(browser, tmp_path):
    workdir = tmp_path / "run"
    runs.finish(runs.start(workdir, task="math"))
    before = (workdir / "config.json").read_bytes()
    process = runs.start(workdir, "--mode=serve", "--config.serve.port=0", task="math")
    try:
        line = ""
        while "serving step" not in line:
            line = process.stdout.readline()
            assert line, process.communicate()[1][-3000:]
        address = re.search(r"serving step 6 of \S+ at (http://127\.0\.0\.1:\d+/) \(Ctrl-C ends it\)", line)[1]
        browser.get(address)
        wait(browser, lambda: "reward" in text(browser, ".side.base .verdict"), 60)  # a test problem is graded
        type_problem(browser, "ann has 5 pens. buys 3 more. total?")
        wait(browser, lambda: text(browser, ".problem").startswith("ann has 5"), 60)
        wait(browser, lambda: "no known answer" in text(browser, ".side.base .verdict"), 60)
        assert len(find(browser, ".side.trained .token")) == 26 and browser.get_log("browser") == []
        type_problem(browser, "1 € more?")
        wait(browser, lambda: "this model cannot read '€'; the characters that it knows: # * + " in text(browser, "#error"))
        asked = {"prompt": "ann has 5 pens. buys 3 more. total?", "gamma": 1.0, "learned": False}
        request = urllib.request.Request(f"{address}denoise", json.dumps(asked).encode(), {"Content-Type": "application/json"})
        first, second = (json.load(urllib.request.urlopen(request)) for _ in range(2))
        assert first == second and first["base"]["gamma"] == first["trained"]["gamma"] == 1.0 and first["base"]["correct"] is None
        browser.get("about:blank")
    finally:
        process.send_signal(signal.SIGTERM)
        runs.finish(process)
    assert (workdir / "config.json").read_bytes() == before

    process = runs.start(workdir, "--mode=serve", "--config.serve.port=0", task="math")
    while "serving step" not in (line := process.stdout.readline()):
        assert line
    process.send_signal(signal.SIGINT)
    runs.finish(process)
    assert os.path.exists(workdir / "report.html")
    shutil.rmtree(workdir)

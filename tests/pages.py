"""Pages for the tests: the modules by name, a report's content by hand, and Chromium without a window."""

import importlib
import shutil

import pytest

from diffpo_jax import page

serve_module = importlib.import_module("diffpo_jax.serve")  # `dp.serve` is the function
HOSTILE = "<img src=x onerror=\"document.title='hit'\"> </script><script>document.title='hit'</script> & 2+2"


def record(prompt, tokens, steps, confidence, gamma, correct):
    """As `denoisings.to_records` makes it."""
    text = "".join(tokens).split("·")[0]
    return {
        "prompt": prompt, "answer": text, "tokens": list(tokens), "steps": steps, "confidence": confidence,
        "entropy": [None if value is None else 0.5 for value in confidence], "nfe": max(steps) + 1, "gamma": gamma,
        "reward": None if correct is None else 0.25 + 0.75 * correct, "correct": correct,
    }  # fmt: skip


def pair(prompt, correct=True):
    """The two sides of a problem: 2 calls and 4."""
    base = record(prompt, ["<b>", "2", "=", "4", "·", "·"], [0, 1, 0, 1, 0, 1], [0.9, 0.5, 0.25, 1.0, 0.75, None], 2.5, False)
    trained = record(prompt, ["2", "+", "2", "4", "·", "·"], [3, 0, 1, 2, 0, 3], [1.0, 0.5, 0.25, 0.125, 0.75, None], 1.5, correct)
    return {"prompt": prompt, "base": base, "trained": trained}


def report_content(length=6):
    """What `page.write_report` embeds, by hand; `length` > 6 makes responses long."""

    def point(gamma, nfe, accuracy):
        return {"gamma": gamma, "nfe": nfe, "accuracy": accuracy, "low": accuracy - 0.05, "high": accuracy + 0.05}

    problems = [{"index": 0} | pair(HOSTILE), {"index": 1} | pair("3 pens. 4 more?", False)]
    if length > 6:
        words = [f"word{i}" for i in range(length)]
        long = record("a long one", words, [i // 8 for i in range(length)], [0.5] * length, 1.0, True)
        problems.append({"index": 2, "prompt": "a long one", "base": long, "trained": long})
    return {
        "table": {
            "columns": ["", "accuracy (95%)", "NFE"], "rows": [["base", "29.0%", "4.01"], ["trained", "34.0%", "4.01"]], "notes": [HOSTILE],
        },
        "charts": [{"title": "reward", "unit": "", "points": [[1, 0.25], [2, 0.5], [3, 0.375]], "test": [[2, 0.4]]}],
        "pareto": {
            "base": [point(8.0, 2.0, 0.2), point(1.0, 4.0, 0.29), point(0.1, 12.0, 0.35)],
            "trained": [point(8.0, 2.0, 0.3), point(1.0, 4.0, 0.33)],
            "learned": [point(1.625, 3.0, 0.34)],
        },
        "thresholds": {
            "histogram": {"edges": [0.5, 1.0, 2.0], "counts": [3, 1]}, "std": 0.5, "levels": 4,
            "parts": [{"name": "hardest third", "count": 4, "gamma": 0.75, "nfe": 4.5, "accuracy": 0.25, "base": 0.125}],
            "points": [[0.5, 0.0, 0.0, 5.0], [0.75, 0.25, 0.0, 4.0], [0.9, 0.5, 1.0, 3.0], [2.0, 1.0, 1.0, 2.0]],
        },
        "viewer": {"learned": True, "base_gamma": 2.5},
        "problems": problems,
        "run": {
            "command": "python -m diffpo_jax.main", "versions": {"jax": "0"}, "changes": {"rl.steps": [100, 30]}, "config": {"a": HOSTILE},
        },
    }  # fmt: skip


def write_report(path, content):
    texts = {"kicker": "diffpo_jax report", "lead": f"RL made the model better {HOSTILE}", "more": "More."}
    path.write_text(page.render("report", "a title", texts, content)[0], encoding="utf-8")
    return path.as_uri()


def find(driver, selector):
    """The elements that a CSS selector finds."""
    return driver.find_elements("css selector", selector)


def open_browser(width=1280, dark=False):
    """A driver of Chromium with a viewport of `width`; skips the test where there is none."""
    selenium = pytest.importorskip("selenium", reason="selenium is not installed")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    del selenium
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    if not (chromium and chromedriver):
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--no-sandbox", "--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(chromedriver))
    resize(driver, width)
    scheme = "dark" if dark else "light"
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    return driver


def resize(driver, width):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

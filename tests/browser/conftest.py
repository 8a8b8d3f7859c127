"""Chromium, shared by the tests of a file."""

import pytest

from tests import pages


@pytest.fixture(scope="module")
def browser():
    driver = pages.open_browser()
    yield driver
    driver.quit()

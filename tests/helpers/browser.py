"""A headless Chromium, and the page of app.py in it.

`python tests/helpers/browser.py runs docs/app.png` makes the README's screenshot from a well-trained runs/digits.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="needs Debian's packages chromium and chromium-driver, which are not installed"
)
PATIENCE = 60
SIZE = (1120, 1000)
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --disable-dev-shm-usage""".split()


@contextlib.contextmanager
def open_browser() -> Iterator[webdriver.Chrome]:
    """Starts Chromium with an empty profile, and ends it."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = BROWSER
        for flag in [*FLAGS, f"--window-size={SIZE[0]},{SIZE[1]}", f"--user-data-dir={profile}"]:
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        try:
            yield driver
        finally:
            driver.quit()


class Page:
    """The page of app.py as a person uses it."""

    def __init__(self, driver: webdriver.Chrome, address: str) -> None:
        self.driver = driver
        driver.get(address)
        self.wait(self.run)

    def run(self) -> str:
        """Name of the run whose settings are shown; empty before there are any."""
        return self.find("#facts").text.partition(":")[0]

    def choose_run(self, name: str) -> None:
        """Chooses a run, and waits for its settings."""
        self.choose("run", name)
        self.wait(lambda: self.run() == name)

    def wait(self, condition, patience: float = PATIENCE):
        """Waits until a condition holds, and returns what it returns."""
        ignored = (Exception,)  # an element that is not there yet, or that was drawn anew
        return WebDriverWait(self.driver, patience, 0.1, ignored).until(lambda _: condition())

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def shows(self, selector: str) -> bool:
        return any(each.is_displayed() for each in self.driver.find_elements(By.CSS_SELECTOR, selector))

    def choose(self, name: str, *words: str) -> None:
        """Chooses in a list, by its words."""
        field = self.find(f"#{name} input")
        field.click()
        for word in words:
            self.wait(lambda word=word: self.find(f"#{name} li[aria-label='{word}']").click() or True)
        self.driver.execute_script("document.activeElement.blur()")

    def type(self, name: str, value: object) -> None:
        """Types a number."""
        field = self.find(f"#{name} input[type=number]")
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(str(value), Keys.TAB)

    def pick(self, name: str, word: str) -> None:
        """Picks one of a few."""
        self.find(f"#{name} input[value='{word}']").click()

    def press(self) -> None:
        self.find("#draw").click()

    def source(self, name: str = "grid") -> str | None:
        """Address of a picture that the page shows; None where it shows none."""
        shown = [each for each in self.driver.find_elements(By.CSS_SELECTOR, f"#{name} img") if each.is_displayed()]
        return shown[0].get_attribute("src") if shown else None

    def draw(self) -> str:
        """Presses the button, waits for other images than before, and returns their address."""
        before = self.source()
        self.press()
        return self.wait(lambda: (now := self.source()) != before and now)

    def error(self) -> str:
        """Waits for the line that says what was wrong, and closes it."""
        text = self.wait(lambda: self.find("[data-testid=toast-text]").text)
        self.find("[data-testid=toast-close]").click()
        self.wait(lambda: not self.shows("[data-testid=toast-body]"))
        return text


def main(runs: str, output: str) -> None:
    """Draws a few digits and their denoising, and takes a picture of the page."""
    from uvit.integrations.page import build_page, launch

    page = build_page(Path(runs))
    with open_browser() as driver:
        shown = Page(driver, launch(page, "127.0.0.1", 0))
        shown.choose_run("digits")
        shown.choose("classes", "two", "four", "seven", "nine")
        shown.type("num_per_class", 8)
        shown.pick("denoising", "strip")
        shown.draw()
        shown.wait(lambda: shown.source("film"))
        shown.wait(lambda: not shown.shows(".progress-text"))
        driver.execute_script("document.activeElement.blur(); window.scrollTo(0, 0)")
        driver.save_screenshot(output)
    page.close(verbose=False)
    Image.open(output).convert("RGB").quantize(256).save(output, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

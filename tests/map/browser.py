"""A real headless Chromium over pages on disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # WebGL without a graphics card.
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--window-size=1400,900",
)
#: Seconds.
_PATIENCE = 60


@contextmanager
def chromium(folder: Path) -> Iterator[Any]:
    """A browser with a fresh profile in ``folder``; skips where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver")
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("no Chromium with its chromedriver is installed")
    options = webdriver.ChromeOptions()
    for flag in (*FLAGS, f"--user-data-dir={folder}"):
        options.add_argument(flag)
    options.binary_location = binary
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # Named, or selenium would fetch one.
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield browser
    finally:
        browser.quit()


class Page:
    """One map in the browser."""

    def __init__(self, browser: Any, file: Path) -> None:
        self.browser = browser
        # What the browser itself does at its start is no doing of the page.
        browser.get("about:blank")
        browser.get_log("browser")
        browser.get_log("performance")
        browser.get(file.as_uri())
        self.wait("return document.body.dataset.ready === 'true'")

    def run(self, script: str, *values: Any) -> Any:
        """Run JavaScript in the page."""
        return self.browser.execute_script(script, *values)

    def wait(self, script: str, *values: Any) -> Any:
        """Wait until a script returns something true."""
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.browser, _PATIENCE, 0.05).until(
            lambda browser: browser.execute_script(script, *values)
        )

    def find(self, selector: str) -> Any:
        """The element of a CSS selector."""
        return self.browser.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        """The text of an element."""
        return str(self.run("return document.querySelector(arguments[0]).textContent", selector))

    def where(self, point: int) -> tuple[int, int]:
        """Where a point stands on the screen, in 2D, in pixels of the window."""
        x, y = self.run(
            "const p = document.getElementById('plot'), f = p._fullLayout, r = "
            "p.getBoundingClientRect(), d = JSON.parse(document.getElementById('data')"
            ".textContent).flat, i = arguments[0];"
            "return [r.left + f.xaxis._offset + f.xaxis.l2p(d[0][i]),"
            " r.top + f.yaxis._offset + f.yaxis.l2p(d[1][i])]",
            point,
        )
        return round(x), round(y)

    def point_at(self, point: int, click: bool = False) -> None:
        """Move the real pointer over a point of the plane, and click there."""
        self.pointer(*self.where(point), click=click)

    def pointer(self, x: int, y: int, click: bool = False) -> None:
        """Move the real pointer to a place in the window, and click there."""
        from selenium.webdriver import ActionChains

        actions = ActionChains(self.browser, duration=50)
        # From elsewhere: a pointer that does not move tells nothing.
        actions.w3c_actions.pointer_action.move_to_location(x - 30, y - 30)
        actions.w3c_actions.pointer_action.move_to_location(x, y)
        if click:
            actions.w3c_actions.pointer_action.pause(0.3)
            actions.w3c_actions.pointer_action.click()
        actions.perform()

    def keys(self, *keys: str) -> None:
        """Press keys, wherever the focus is."""
        from selenium.webdriver import ActionChains

        ActionChains(self.browser).send_keys(*keys).perform()

    def problems(self) -> list[str]:
        """What the browser's console told that is more than a note."""
        log = self.browser.get_log("browser")
        return [line["message"] for line in log if line["level"] == "SEVERE"]

    def requests(self) -> set[str]:
        """The URLs that were asked for since the page was opened, but for what stays inside."""
        import json

        found = set()
        for line in self.browser.get_log("performance"):
            message = json.loads(line["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                found.add(message["params"]["request"]["url"])
        return {url for url in found if not url.startswith(("data:", "blob:", "chrome:"))}

"""A headless Chromium, and a scripted server on a real socket, for tests of the web page."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from server_helpers import ScriptedEngine, make_app

pytest.importorskip("selenium", reason="selenium is not installed: pip install 'dsengine[test]'")

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-proxy-server",
)  # fmt: skip


class Page:
    """The web page in a browser of its own."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, url: str) -> None:
        """Load the page as if it were visited for the first time."""
        self.driver.get("about:blank")
        self.driver.get_log("browser")
        self.driver.get_log("performance")
        self.driver.get(url)
        self.driver.execute_script("sessionStorage.clear(); localStorage.clear()")
        self.driver.refresh()

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        [element] = self.all(selector)
        return element

    def text(self, selector: str) -> str:
        """Text of the last element found, shown or not; empty if there is none."""
        found = self.all(selector)
        return str(found[-1].get_property("textContent")) if found else ""

    def button(self, text: str) -> WebElement:
        """The last button with this text that can be seen."""
        return [b for b in self.all("button") if b.is_displayed() and b.text == text][-1]

    def ask(self, text: str) -> None:
        self.until(lambda: self.text("#model") != "")
        self.one("#prompt").send_keys(text, Keys.ENTER)

    def until(self, condition: Callable[[], object], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.driver.find_element(By.TAG_NAME, "body").text
            time.sleep(0.05)

    def until_answered(self, number: int = 1) -> None:
        self.until(lambda: len(self.all(".answer:not(.busy)")) == number and not self.all(".answer.busy"))

    def console(self) -> list[str]:
        """Complaints of the browser: blocked resources, exceptions, failed requests."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]

    def requested(self) -> set[str]:
        """Addresses of all requests since the page was opened."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}


@contextlib.contextmanager
def open_browser(folder: Path, width: int = 1280, height: int = 900) -> Iterator[Page]:
    """A browser with an empty profile in `folder`; skips the test where there is none."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("chromium and chromedriver are not installed (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"--user-data-dir={folder}", f"--window-size={width},{height}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield Page(chrome)
    finally:
        chrome.quit()


class ScriptedServer:
    """A scripted engine behind a real socket, in a thread with a loop of its own."""

    def __init__(self, engine: ScriptedEngine, **options: Any) -> None:
        self.engine = engine
        config = uvicorn.Config(make_app(engine, **options), port=0, lifespan="off", log_config=None, ws="none")
        self._server = uvicorn.Server(config)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        deadline = time.monotonic() + 20
        while not self._server.started:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/"

    def _run(self) -> None:
        self._loop.run_until_complete(self._server.serve())
        self._loop.close()

    def close(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(10)


__all__ = ["Keys", "Page", "ScriptedServer", "open_browser"]

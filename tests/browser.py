# SPDX-License-Identifier: Apache-2.0
"""A headless Chromium for the pages, through Selenium; Debian's packages, one version each.

Without them a test that wants one is skipped, and says what to install.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

INSTALL = "apt-get install chromium chromium-driver"


@contextlib.contextmanager
def browser(width: int = 1280, height: int = 900, dark: bool = False) -> Iterator[Any]:
    """Selenium's driver of a fresh Chromium, with a window of CSS pixels."""
    webdriver = pytest.importorskip("selenium.webdriver")
    program, driver_program = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver_program is None:
        pytest.skip(f"no chromium or no chromedriver: {INSTALL}")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    # Root may run it without a sandbox only; containers have a small /dev/shm.
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(driver_program))
    try:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1}
        metrics["mobile"] = width < 600
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        yield driver
    finally:
        driver.quit()


def wait_until(holds: Callable[[], Any], what: str, seconds: float = 30.0) -> None:
    """Raises: TimeoutError: it does not hold when the time is up."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {seconds:.0f} s: {what}")
        time.sleep(0.05)


def assert_no_errors(driver: Any) -> None:
    """What the page itself complained of."""
    errors = [entry["message"] for entry in driver.get_log("browser") if entry["level"] != "INFO"]
    assert not errors


def texts(driver: Any, selector: str) -> list[str]:
    """Text of all elements, in order."""
    return [found.text for found in driver.find_elements("css selector", selector)]

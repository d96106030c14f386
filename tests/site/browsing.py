"""Where the built site is, and what a browser asked for and complained about."""

import json
import os
from pathlib import Path

HTML = Path(os.environ.get("MINILORA_SITE", Path(__file__).parents[2] / "docs/_build/html"))


def set_size(browser, width, height):
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def requests(browser) -> list[str]:
    """The addresses that were asked for since the last call."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


def errors(browser) -> list[str]:
    """What the console said since the last call, warnings included."""
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]

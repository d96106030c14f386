"""Where the built site is, and what a browser asked for and complained about."""

import json
import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
HTML = Path(os.environ.get("MINILORA_SITE", ROOT / "docs/_build/html"))
SHOTS = os.environ.get("MINILORA_SHOTS")  # a folder for a picture of every page, for people who want to look


def requests(browser) -> list[str]:
    """The addresses that were asked for since the last call."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


def errors(browser) -> list[str]:
    """What the console said since the last call, warnings included."""
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]

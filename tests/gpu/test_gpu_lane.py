"""The gpu lane is alive without a GPU, and the page's Python runs. No word here on what a GPU computes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.host("it starts a lane of its own")
ROOT = Path(__file__).parents[2]
LANE = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu"]


def lane(**variables):
    env = {name: value for name, value in os.environ.items() if name != "MINILORA_GPU"} | variables
    done = subprocess.run(LANE, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    return done.stdout


def test_the_lane_runs_on_the_stand_in():
    printed = lane(MINILORA_GPU="standin")
    assert re.search(r"^\d{3} passed", printed, re.MULTILINE)
    assert "tests need a GPU" not in printed


def test_without_a_card_the_lane_says_why_once():
    printed = lane(CUDA_VISIBLE_DEVICES="")
    assert printed.count("tests need a GPU: ") == 1 and "1 skipped" in printed


def test_the_page_s_python_runs():
    """Its lines ask for the GPU at one place, and must run on any device: here on the CPU."""
    page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert block.count('"cuda"') == 1
    names = {}
    exec(compile(block.replace('"cuda"', '"cpu"'), "docs/gpu.md", "exec"), names)
    assert np.isfinite(names["history"].loss).all()

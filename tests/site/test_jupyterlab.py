"""JupyterLab, as a reader has it: a notebook is opened in a browser and run from top to bottom."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from browsing import set_size

pytestmark = pytest.mark.site
NOTEBOOK = Path(__file__).parents[2] / "notebooks/01_engine.ipynb"
CELLS = """
return [...document.querySelectorAll('.jp-Notebook .jp-CodeCell')].map(c => ({
  prompt: c.querySelector('.jp-InputPrompt').textContent.replace(/[^0-9*]/g, ''),
  error: c.querySelectorAll('[data-mime-type="application/vnd.jupyter.error"]').length,
  figures: c.querySelectorAll('.jp-OutputArea img').length,
}))"""


@pytest.fixture
def lab(tmp_path):
    """The address of a JupyterLab with a copy of the notebook without its outputs."""
    pytest.importorskip("jupyterlab", reason="needs JupyterLab: pip install 'minilora[notebooks]'")
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
    (tmp_path / NOTEBOOK.name).write_text(json.dumps(notebook), encoding="utf-8")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", f"--port={port}", "--ip=127.0.0.1", "--allow-root",
               "--IdentityProvider.token=", "--ServerApp.password=", f"--ServerApp.root_dir={tmp_path}",
               "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]  # fmt: skip
    own = {"JUPYTER_CONFIG_DIR": str(tmp_path / ".config"), "JUPYTER_DATA_DIR": str(tmp_path / ".data")}
    with open(tmp_path / "lab.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | own, cwd=tmp_path)
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=2).close()
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "lab.log").read_text()
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def test_run_all_runs_a_notebook(browser, lab):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    set_size(browser, 1400, 20_000)  # so tall that JupyterLab draws every cell
    browser.get(f"{lab}/lab/tree/{NOTEBOOK.name}?reset")
    WebDriverWait(browser, 90).until(lambda b: "Idle" in b.page_source and b.execute_script(CELLS))
    for text in ("Run", "Run All Cells"):

        def label(b, text=text):
            found = b.find_elements(By.CSS_SELECTOR, ".lm-MenuBar-itemLabel, .lm-Menu-itemLabel")
            return next((e for e in found if e.text.strip() == text and e.is_displayed()), None)

        WebDriverWait(browser, 90).until(label).click()

    def cells_done(b):
        cells = b.execute_script(CELLS)
        return cells if all(cell["prompt"].isdigit() for cell in cells) else None

    cells = WebDriverWait(browser, 180).until(cells_done)
    assert not any(cell["error"] for cell in cells)
    figures = lambda b: any(cell["figures"] for cell in b.execute_script(CELLS))
    WebDriverWait(browser, 30).until(figures, "no figure was drawn")

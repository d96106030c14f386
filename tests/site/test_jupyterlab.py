"""JupyterLab, as a reader has it: the first notebook is opened in a browser and run from top to bottom."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytestmark = pytest.mark.site
ROOT = Path(__file__).parents[2]


@pytest.fixture
def lab(tmp_path):
    """The address of a JupyterLab of our own, with a copy of the first notebook without its outputs."""
    pytest.importorskip("jupyterlab", reason="needs JupyterLab: pip install 'minilora[notebooks]'")
    notebook = json.loads((ROOT / "notebooks/00_tour.ipynb").read_text())
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
    (tmp_path / "00_tour.ipynb").write_text(json.dumps(notebook))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", f"--port={port}", "--ip=127.0.0.1", "--allow-root",
               "--IdentityProvider.token=", "--ServerApp.password=", f"--ServerApp.root_dir={tmp_path}",
               "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]  # fmt: skip
    own = {"JUPYTER_CONFIG_DIR": str(tmp_path / ".config"), "JUPYTER_DATA_DIR": str(tmp_path / ".data")}
    with open(tmp_path / "lab.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | own, cwd=tmp_path)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{address}/api", timeout=2).close()
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "lab.log").read_text()
                time.sleep(0.2)
        yield address, tmp_path
    finally:
        process.terminate()
        process.wait(20)
        shutil.rmtree(tmp_path / ".data", ignore_errors=True)


def test_run_all_runs_the_first_notebook(browser, lab):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    address, folder = lab
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                            {"width": 1400, "height": 1000, "deviceScaleFactor": 1, "mobile": False})  # fmt: skip
    browser.get(f"{address}/lab/tree/00_tour.ipynb?reset")
    wait = WebDriverWait(browser, 90)
    wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, ".jp-Notebook .jp-CodeCell"))
    wait.until(lambda b: "Idle" in b.page_source or b.find_elements(By.CSS_SELECTOR, "[data-status='idle']"))
    menu = lambda text: wait.until(
        lambda b: next((e for e in b.find_elements(By.CSS_SELECTOR, ".lm-MenuBar-itemLabel, .lm-Menu-itemLabel")
                        if e.text.strip() == text and e.is_displayed()), None)
    )  # fmt: skip
    menu("Run").click()
    menu("Run All Cells").click()

    def finished(b):
        prompts = b.execute_script(
            "const cells = [...document.querySelectorAll('.jp-Notebook .jp-CodeCell')];"
            "return cells.map(c => c.querySelector('.jp-InputPrompt').textContent)"
        )
        return prompts and not any("*" in p for p in prompts) and any(p.strip("[]: \n") for p in prompts)

    WebDriverWait(browser, 180).until(finished)
    browser.execute_script("document.activeElement.blur()")
    menu("File").click()
    menu("Save Notebook").click()
    cells = []
    for _ in range(100):
        saved = json.loads((folder / "00_tour.ipynb").read_text())
        cells = [cell for cell in saved["cells"] if cell["cell_type"] == "code"]
        if all(cell["execution_count"] for cell in cells if "".join(cell["source"]).strip()):
            break
        time.sleep(0.2)
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert all(cell["execution_count"] for cell in cells if "".join(cell["source"]).strip())
    assert not [o for o in outputs if o["output_type"] == "error"]
    assert any("image/png" in o.get("data", {}) for o in outputs), "no figure was drawn"

"""Make a notebook from its percent-format file: run in a fresh kernel, and free of what changes from run to run.

    python notebooks/make.py notebooks/03_lora.py …

The .py is the source and the .ipynb its executed twin. It needs minilora's "notebooks" extra.
"""

import json
import re
import sys
import time
from pathlib import Path

METADATA = {
    "jupytext": {"formats": "ipynb,py:percent"},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
}
SECONDS = 180  # the most that a cell may take


def cells(text: str) -> list[tuple[str, str]]:
    """The cells of a percent-format file, as (kind, source), kind "markdown" or "code"."""
    found = []
    for part in re.split(r"^# %%", text, flags=re.MULTILINE)[1:]:
        head, _, body = part.partition("\n")
        if head.strip() == "[markdown]":
            found.append(
                ("markdown", re.sub(r"^# ?", "", body.strip("\n"), flags=re.MULTILINE))
            )
        else:
            found.append(("code", body.strip("\n")))
    return found


def notebook(text: str) -> dict:
    """The notebook of a percent-format file, without outputs, in the form of nbformat 4.5."""
    made = []
    for i, (kind, source) in enumerate(cells(text)):
        cell = {
            "cell_type": kind,
            "id": f"cell-{i:02}",
            "metadata": {},
            "source": source.splitlines(keepends=True),
        }
        made.append(
            cell | {"execution_count": None, "outputs": []} if kind == "code" else cell
        )
    return {"cells": made, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}


def executed(plain: dict, folder) -> dict:
    """``plain`` with its outputs, run in ``folder``. Raises nbclient's CellExecutionError where a cell fails."""
    import nbformat
    from nbclient import NotebookClient

    node = nbformat.from_dict(json.loads(json.dumps(plain)))
    for cell in node.cells:
        cell.source = "".join(cell.source)
    NotebookClient(
        node, timeout=SECONDS, resources={"metadata": {"path": str(folder)}}
    ).execute()
    return tidy(json.loads(nbformat.writes(node)))


def tidy(ran: dict) -> dict:
    """``ran`` without times, versions and progress bars, and with the pieces of a printed text put together."""
    ran["metadata"] = METADATA
    for cell in ran["cells"]:
        cell["metadata"] = {}
        outputs = []
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                continue
            if (
                output["output_type"] == "stream"
                and outputs
                and outputs[-1]["output_type"] == "stream"
            ):
                outputs[-1]["text"] += output["text"]
            else:
                outputs.append(output)
        if cell["cell_type"] == "code":
            cell["outputs"] = outputs
    return ran


def main(paths) -> None:
    for path in map(Path, paths):
        start = time.perf_counter()
        ran = executed(notebook(path.read_text(encoding="utf-8")), path.parent)
        text = json.dumps(ran, indent=1, ensure_ascii=False) + "\n"
        path.with_suffix(".ipynb").write_text(text, encoding="utf-8")
        print(f"{path.with_suffix('.ipynb')}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])

"""Make a notebook from its percent-format file: run in a fresh kernel, and free of what changes from run to run.

    python notebooks/make.py notebooks/03_lora.py …

The .py is the source and the .ipynb its executed twin. It needs minilora's "notebooks" extra.
"""

import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

METADATA = {
    "jupytext": {"formats": "ipynb,py:percent"},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
}
SECONDS = 180  # the most that a cell may take


def notebook(text: str) -> nbformat.NotebookNode:
    """The notebook of a percent-format file, without outputs."""
    made = jupytext.reads(text, fmt="py:percent")
    made.nbformat, made.nbformat_minor = 4, 5
    return tidy(made)


def executed(made: nbformat.NotebookNode, folder) -> nbformat.NotebookNode:
    """``made`` with its outputs, run in ``folder``. Raises nbclient's CellExecutionError if a cell fails."""
    where = {"metadata": {"path": str(folder)}}
    return tidy(NotebookClient(made, timeout=SECONDS, resources=where).execute())


def tidy(made: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """``made`` without times, versions and progress bars; the pieces of a printed text are put together."""
    made.metadata = nbformat.from_dict(METADATA)
    for i, cell in enumerate(made.cells):
        cell.id, cell.metadata = f"cell-{i:02}", nbformat.from_dict({})
        outputs = []
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                continue
            both_are_text = output.output_type == "stream" and outputs
            if both_are_text and outputs[-1].output_type == "stream":
                outputs[-1].text += output.text
            else:
                outputs.append(output)
        if cell.cell_type == "code":
            cell.outputs = outputs
    return made


def main(paths) -> None:
    for path in map(Path, paths):
        start = time.perf_counter()
        ran = executed(notebook(path.read_text(encoding="utf-8")), path.parent)
        twin = path.with_suffix(".ipynb")
        twin.write_text(nbformat.writes(ran) + "\n", encoding="utf-8")
        print(f"{twin}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])

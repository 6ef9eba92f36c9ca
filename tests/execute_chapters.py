"""`make chapters`: runs chapters from the first cell to the last and writes them back, always in the same form.

    python tests/execute_chapters.py                    # all of them
    python tests/execute_chapters.py 01 chapters/05*    # some, by number or file

Nothing is written of a chapter that fails.  Kernels get OMP_NUM_THREADS=2 unless the environment says otherwise.
"""

import os
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

FOLDER = Path(__file__).parent.parent / "chapters"
SECONDS_A_CELL = 180
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}
COLOR = "\x1b\\[[0-9;]*m"  # as IPython writes it into a traceback
KEPT = {"tags", "nbgrader", "slideshow"}  # of a cell's metadata
WIDGET = "application/vnd.jupyter.widget-view+json"  # the number of a widget that lived in this kernel, and in no other


def normalise(notebook: NotebookNode) -> NotebookNode:
    """Leaves what a reader or a test needs, and nothing that differs from run to run or from machine to machine."""
    kept = {"minildm": notebook.metadata["minildm"]} if "minildm" in notebook.metadata else {}
    notebook.metadata = NotebookNode(kernelspec=NotebookNode(KERNEL), language_info=NotebookNode(name="python"), **kept)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    known: set[str] = set()
    for number, cell in enumerate(notebook.cells):
        if cell.get("id", "") in known | {""}:  # an id that is there stays, or a new cell would rename all that follow
            cell.id = f"cell-{number:02d}-{len(known)}"
        known.add(cell.id)
        cell.metadata = NotebookNode({key: value for key, value in cell.metadata.items() if key in KEPT and value})
        cell.source = "\n".join(line.rstrip() for line in cell.source.splitlines()).strip("\n")
        if cell.cell_type == "code":
            cell.outputs = tidy(cell.outputs)
    return notebook


def tidy(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Joins what was printed in pieces (where the pieces end is chance), and keeps of a slider its name alone."""
    merged: list[NotebookNode] = []
    for output in outputs:
        output = NotebookNode({key: value for key, value in output.items() if key != "transient"})
        output.get("data", {}).pop(WIDGET, None)
        last = merged[-1] if merged else None
        if last and output.output_type == last.output_type == "stream" and output.name == last.name:
            last.text += output.text
        else:
            merged.append(output)
    return merged


def write(notebook: NotebookNode, path: Path) -> None:
    """Writes beside and renames, so that a notebook is never half written.

    Raises:
        nbformat.ValidationError: it is no valid notebook; the file stays as it was.
    """
    nbformat.validate(notebook)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, suffix=".part", delete=False) as file:
        file.write(nbformat.writes(notebook) + "\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def execute(path: Path) -> float:
    """Runs one chapter where it lies and writes it back; returns the seconds that took."""
    notebook = nbformat.read(path, as_version=4)
    start = time.perf_counter()
    client = NotebookClient(
        notebook, kernel_name="python3", timeout=SECONDS_A_CELL, resources={"metadata": {"path": path.parent}}
    )
    client.execute()
    seconds = time.perf_counter() - start
    write(normalise(notebook), path)
    return seconds


def find(names: list[str]) -> list[Path]:
    """Chapters by file or by number; all of them if none is named."""
    chapters = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))
    found = [] if names else chapters
    for name in names:
        matches = [Path(name)] if Path(name).is_file() else [path for path in chapters if path.stem.startswith(name)]
        if not matches:
            raise FileNotFoundError(f"no chapter {name!r}; give a file or a number such as 01")
        found += matches
    return found


def main(names: list[str]) -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    try:
        for path in find(names):
            print(f"{path.stem} ...", end=" ", flush=True)
            print(f"{execute(path):.0f} s, {path.stat().st_size / 1000:.0f} kB", flush=True)
    except (CellExecutionError, CellTimeoutError, DeadKernelError, FileNotFoundError) as error:
        print(f"\nerror: {re.sub(COLOR, '', str(error))}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

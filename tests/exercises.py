"""Do the exercises work as homework?  Solved as the chapter solves them they score full, and unsolved nothing.

    python tests/exercises.py               # all chapters
    python tests/exercises.py 02 08         # some
    python tests/exercises.py --all 02      # with every cell, not only those that the exercises need

A chapter's student version is run once, with the worked solutions filled in; at each exercise a copy of the process tries it
without.  Of the other cells only those are run that the exercises need, as far as can be seen from names, which is a matter of
seconds for most chapters.  (That a chapter runs as a whole, graded cells included, is what nbval shows.)
"""

import ast
import dis
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from nbformat import NotebookNode
from nbgrader.utils import determine_grade
from traitlets.config import Config

sys.path.insert(0, str(Path(__file__).parents[1] / "chapters"))
from assignments import find, generate, is_answer, mark_of
from own_work import names_in

# Calls that may change what they are given.
CHANGING = re.compile(r"(train\w*|fit|\w+_|load_state_dict|update|step|backward|append|extend|add|clear|inject|merge|insert)$")


# ---- which cells the exercises need


def plain(source: str) -> ast.Module:
    """The syntax tree of a cell, its magics and shell lines left out."""
    return ast.parse(re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.MULTILINE))


def reads_binds_changes(source: str) -> tuple[set[str], set[str], set[str]]:
    """Names that a cell needs from others, that it gives a value, and whose value it may change."""
    reads, binds, changes = set(), set(), set()
    for statement in plain(source).body:
        code = compile(ast.Module([statement], []), "cell", "exec")
        reads |= set(names_in(code)) - binds
        binds |= {step.argval for step in dis.get_instructions(code) if step.opname in ("STORE_NAME", "STORE_GLOBAL")}
        for node in ast.walk(statement):
            if isinstance(node, ast.Attribute | ast.Subscript) and not isinstance(node.ctx, ast.Load):
                changes |= names_under(node)
            if isinstance(node, ast.Call) and CHANGING.match(getattr(node.func, "attr", getattr(node.func, "id", ""))):
                changes |= names_under(node)
    return reads, binds, changes


def names_under(node: ast.AST) -> set[str]:
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}


def needed(cells: list[NotebookNode]) -> set[int]:
    """Numbers of the code cells without which the answers and the graded cells do not run."""
    exercise, wanted, found = False, set(), set()
    for number in reversed(range(len(cells))):
        cell = cells[number]
        if cell.cell_type != "code":
            continue
        exercise = exercise or bool(mark_of(cell).get("grade"))  # from the graded cell up to its answer
        reads, binds, changes = reads_binds_changes(cell.source)
        if exercise or (binds | changes) & wanted:
            found.add(number)
            wanted = (wanted - binds) | reads
        exercise = exercise and not is_answer(cell)
    return found


# ---- running them


def run(shell: InteractiveShell, cell: NotebookNode) -> NotebookNode:
    """Runs a code cell and keeps of its outputs what nbgrader looks at."""
    with capture_output() as captured:
        result = shell.run_cell(cell.source)
    error = result.error_before_exec or result.error_in_exec
    cell.outputs = [nbformat.v4.new_output("stream", name="stderr", text=captured.stderr)] if captured.stderr else []
    if result.result is not None:
        cell.outputs.append(nbformat.v4.new_output("execute_result", {"text/plain": repr(result.result)}))
    if error:
        cell.outputs.append(nbformat.v4.new_output("error", ename=type(error).__name__, evalue=str(error), traceback=[]))
    return cell


def unsolved(shell: InteractiveShell, cells: list[NotebookNode]) -> list:
    """In a copy of this process: the score of the first exercise of these cells as students get it, and how it ends."""
    reader, writer = os.pipe()
    if not (child := os.fork()):
        for cell in filter(lambda cell: cell.cell_type == "code", cells):
            run(shell, cell)
            if mark_of(cell).get("grade"):
                break
        errors = [output.ename for output in cell.outputs if output.output_type == "error"]
        os.write(writer, json.dumps([determine_grade(cell)[0], *(errors or ["no error"])]).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        found = json.load(answer)
    os.waitpid(child, 0)
    return found


def check(chapter: Path, everything: bool = False) -> list[dict]:
    """Tries each exercise of a chapter with its worked solution and without.

    Returns:
        For each: its name, its points, its score when solved and when not, and the error of the latter.  Of other cells that
        fail only a line is printed: not all that they need is run.
    """
    solutions = {mark_of(c)["grade_id"]: c.source for c in nbformat.read(chapter, as_version=4).cells if is_answer(c)}
    found, slowest, here, start = [], 0.0, os.getcwd(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        release = generate([chapter], Path(folder))[0]
        cells = nbformat.read(release, as_version=4).cells
        solved = [NotebookNode(cell, source=solutions.get(mark_of(cell).get("grade_id"), cell.source)) for cell in cells]
        todo = [n for n, cell in enumerate(cells) if cell.cell_type == "code"] if everything else sorted(needed(solved))
        os.chdir(release.parent)
        config = Config()
        config.HistoryManager.enabled = False
        shell = InteractiveShell.instance(config=config)
        for number in todo:
            cell = cells[number]
            if is_answer(cell):
                without = unsolved(shell, [cells[n] for n in todo if n >= number])
                cell.source = solutions[mark_of(cell)["grade_id"]]
            before = time.perf_counter()
            run(shell, cell)
            slowest = max(slowest, time.perf_counter() - before)
            if mark_of(cell).get("grade"):
                score, points = determine_grade(cell)
                name = mark_of(cell)["grade_id"].removesuffix("-test")
                row = {"exercise": name, "points": points, "solved": score, "unsolved": without[0], "error": without[1]}
                found.append(row)
            elif any(output.output_type == "error" for output in cell.outputs):
                print(f"{chapter.stem}: the cell {cell.source[:40]!r} ends with {cell.outputs[-1].evalue[:60]}")
        os.chdir(here)
    import resource  # not on Windows, which cannot copy a process either

    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # on Linux in KiB
    count, seconds = sum(cell.cell_type == "code" for cell in cells), time.perf_counter() - start
    print(f"{chapter.stem}: {len(todo)} of {count} cells, {seconds:.0f} s, the longest {slowest:.0f} s; {memory:.1f} GiB")
    return found


def main(names: list[str]) -> int:
    os.environ |= {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}  # a copy of a process has one thread only
    sys.path.insert(0, "")  # as in a kernel: what lies beside the notebook can be imported
    sys.modules.pop("own_work")
    good = True
    for chapter in find([name for name in names if name != "--all"]):
        if child := os.fork():  # each in a fresh process
            good = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 and good
            continue
        rows = check(chapter, everything="--all" in names)
        for row in rows:
            print(json.dumps(row), flush=True)
        os._exit(any((row["solved"], row["unsolved"]) != (row["points"], 0) for row in rows))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

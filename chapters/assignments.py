"""`make assignments`: student versions of the chapters, made by nbgrader from the chapters themselves, and their grading.

    python chapters/assignments.py generate             # all chapters into out/assignments/release
    python chapters/assignments.py generate 02 08       # some
    python chapters/assignments.py grade                # what lies in out/assignments/submitted: scores, feedback, grades.csv

    --course FOLDER     in place of out/assignments
    --hidden FOLDER     with hidden tests, one file for each graded cell: FOLDER/ch02-kl-test.py

The folder is a course as nbgrader knows it, with an nbgrader_config.py: nbgrader's own commands and its formgrader work there.
TEACHING.md says more.
"""

import argparse
import ast
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbgrader.api import Gradebook
from nbgrader.apps import NbGraderAPI
from nbgrader.converters import GenerateAssignment
from nbgrader.plugins import CsvExportPlugin
from nbgrader.preprocessors import ClearSolutions, NbGraderPreprocessor
from traitlets import Unicode
from traitlets.config import Config

HERE = Path(__file__).parent
COURSE = HERE.parent / "out" / "assignments"
SECONDS_A_CELL = 600  # the longest cell of any chapter takes one minute on two cores
BUILT_LATER = {"05": {"schedule"}}  # chapter 05 has the ideas, 06 the class
NOTE = """\
**Student version, {points} points.** Where a cell says `YOUR CODE HERE`, put your answer in place of that line and the next. \
The cell after it checks your answer and is graded: no error, full points. "Run all" stops at the first exercise without an \
answer; go on below it by hand. What you hand in must be written here: `own_work.py`, beside this notebook, sees whether it \
was imported instead.

Before you hand in: restart the kernel, run all cells, save. A cell may take up to {minutes} minutes."""
LATER = "*(What the chapter says here comes with the solutions.)*"
BADGE = re.compile(r"^\[!\[Open in .*\n?", re.MULTILINE)
OF_SOLUTIONS = re.compile(r"worked solution|elete it first|^The cell after it")  # sentences that are true of chapters only
HEADING = re.compile(r"^#+ ", re.MULTILINE)


# ---- a chapter, taken apart


def mark_of(cell: NotebookNode) -> dict:
    """What nbgrader knows of a cell: grade, solution, task, points, grade_id; empty for an ordinary cell."""
    return cell.metadata.get("nbgrader", {})


def is_answer(cell: NotebookNode) -> bool:
    return bool(mark_of(cell).get("solution")) and not mark_of(cell).get("grade")


def points_of(notebook: NotebookNode) -> int:
    return sum(mark_of(cell).get("points", 0) for cell in notebook.cells)


def defined_in(source: str) -> list[str]:
    """The functions and classes at the top of a cell."""
    return [node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]


def graded_ids(chapters: set[Path]) -> set[str]:
    marks = (mark_of(cell) for chapter in chapters for cell in nbformat.read(chapter, as_version=4).cells)
    return {mark["grade_id"] for mark in marks if mark.get("grade")}


def built_by(notebook: NotebookNode, number: str) -> set[str]:
    """Modules of the package that a chapter builds or begins, and whose code is therefore no answer to its exercises."""
    promised = notebook.metadata.get("minildm", {})
    modules = {*promised.get("builds", []), *promised.get("begins", [])} | BUILT_LATER.get(number, set())
    return {f"minildm.{module}" for module in modules}


def given_by(notebook: NotebookNode) -> set[str]:
    """Classes and functions of the package that a chapter imports."""
    cells = (re.sub(r"^(\s*)[%!].*$", r"\1pass", c.source, flags=re.MULTILINE) for c in notebook.cells if c.cell_type == "code")
    nodes = [node for source in cells for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    return {a.name for node in nodes if (node.module or "").startswith("minildm.") for a in node.names}


# ---- what a student gets


def without_discussion(cells: list[NotebookNode]) -> Iterator[NotebookNode]:
    """Leaves out what a chapter says of an exercise between its graded cell and the next heading: it gives the answer away."""
    solved = False
    for cell in cells:
        if solved and is_answer(cell):
            raise ValueError(f"the exercise {mark_of(cell)['grade_id']} needs a heading of its own above it")
        if mark_of(cell).get("grade"):
            solved = True
        elif solved and cell.cell_type == "markdown":
            heading = HEADING.search(cell.source)
            start = heading.start() if heading else len(cell.source)
            cell.source = "\n\n".join(filter(None, (LATER if cell.source[:start].strip() else "", cell.source[start:])))
            solved = heading is None
        yield cell


def without_promises(text: str) -> str:
    """Leaves out what a text says of the worked solutions, which are not there."""
    lines = (re.split(r"(?<=[.)]) ", line) if "worked solution" in line else [line] for line in text.split("\n"))
    kept = "\n".join(" ".join(s for s in line if not OF_SOLUTIONS.search(s)) for line in lines)
    return re.sub(r"\n{3,}", "\n\n", kept)


class StudentVersion(NbGraderPreprocessor):
    """Turns a chapter into an assignment; what is a solution is nbgrader's to take out."""

    hidden = Unicode("", help="folder with hidden tests, GRADE_ID.py").tag(config=True)

    def preprocess(self, nb: NotebookNode, resources: dict) -> tuple[NotebookNode, dict]:
        text = NOTE.format(points=points_of(nb), minutes=SECONDS_A_CELL // 60)
        note = nbformat.v4.new_markdown_cell(text, id="student-version")
        nb.cells[0].source = BADGE.sub("", nb.cells[0].source)  # they lead to the solutions
        nb.cells = list(without_discussion([nb.cells[0], note, *nb.cells[1:]]))
        answers = []
        for cell in nb.cells:
            if cell.cell_type == "markdown":
                cell.source = re.sub(r"\]\((\d\d_\w+)\.ipynb", r"](../\1/\1.ipynb", without_promises(cell.source))
            elif is_answer(cell):
                answers += defined_in(cell.source)
            elif mark_of(cell).get("grade"):
                cell.source = f"import own_work\n\nown_work.check({', '.join(answers)})\n{cell.source}{self.hidden_tests(cell)}"
                answers = []
        return nb, resources

    def hidden_tests(self, cell: NotebookNode) -> str:
        path = Path(self.hidden, f"{mark_of(cell)['grade_id']}.py")
        if not self.hidden or not path.is_file():
            return ""
        return f"\n### BEGIN HIDDEN TESTS\n{path.read_text().rstrip()}\n### END HIDDEN TESTS"


class ClearCode(ClearSolutions):
    """Takes solutions out of code only: a text may speak of the marks."""

    def preprocess_cell(self, cell: NotebookNode, resources: dict, cell_index: int) -> tuple[NotebookNode, dict]:
        return super().preprocess_cell(cell, resources, cell_index) if cell.cell_type == "code" else (cell, resources)


# ---- nbgrader, with these settings


def settings(course: Path, hidden: Path | None = None) -> Config:
    c = Config()
    c.CourseDirectory.root = str(course)
    c.CourseDirectory.course_id = "minildm"
    steps = [ClearCode if step is ClearSolutions else step for step in GenerateAssignment.preprocessors.default_args[0]]
    c.GenerateAssignment.preprocessors = [StudentVersion, *steps]
    c.StudentVersion.hidden = str(hidden or "")
    c.OverwriteCells.add_missing_cells = True  # a graded cell that was deleted comes back
    c.Execute.timeout = SECONDS_A_CELL
    return c


CONFIG = '''\
"""Written by {script}: nbgrader's own commands, started in this folder, do as it does."""

import sys
from pathlib import Path

sys.path.insert(0, {here!r})
import assignments

c = get_config()
c.merge(assignments.settings(Path(__file__).parent, {hidden!r}))
'''


def open_course(course: Path, hidden: Path | None = None) -> NbGraderAPI:
    here = str(Path(sys.executable).parent)  # nbgrader calls alembic, which is beside this Python, by its bare name
    if here not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = here + os.pathsep + os.environ["PATH"]
    course.mkdir(parents=True, exist_ok=True)
    return NbGraderAPI(config=settings(course, hidden))


def succeed(result: dict, what: str) -> None:
    """Raises what nbgrader only returns."""
    if not result["success"]:
        raise RuntimeError(f"{what} failed:\n{result.get('log', '')}\n{result.get('error', '')}")


def generate(chapters: list[Path], course: Path, hidden: Path | None = None) -> list[Path]:
    """Makes student versions; returns the notebooks.

    A source folder holds a link to the chapter, so nothing is copied, and `own_work.py` with the chapter's lists.

    Raises:
        ValueError: a hidden test belongs to no graded cell.
        RuntimeError: nbgrader refuses a chapter; the message is its log.
    """
    if hidden and (strays := {path.stem for path in hidden.glob("*")} - graded_ids({*chapters, *find([])})):
        raise ValueError(f"{', '.join(sorted(strays))} in {hidden}: no graded cell of that name; name the files GRADE_ID.py")
    nbgrader, made = open_course(course, hidden), []
    config = CONFIG.format(script=Path(__file__).name, here=str(HERE), hidden=hidden and str(hidden.resolve()))
    (course / "nbgrader_config.py").write_text(config)
    for chapter in chapters:
        source = course / "source" / chapter.stem
        source.mkdir(parents=True, exist_ok=True)
        link, notebook = source / chapter.name, nbformat.read(chapter, as_version=4)
        link.unlink(missing_ok=True)
        link.symlink_to(chapter.resolve())
        lists = {"GIVEN": given_by(notebook), "BUILT": built_by(notebook, chapter.stem[:2])}
        lines = (f"{name} = set({json.dumps(sorted(values))})\n" for name, values in lists.items())
        (source / "own_work.py").write_text((HERE / "own_work.py").read_text() + "\n\n" + "".join(lines))
        succeed(nbgrader.generate_assignment(chapter.stem), f"the student version of {chapter.stem}")
        made.append(course / "release" / chapter.stem / chapter.name)
    return made


def grade(course: Path) -> list[tuple[str, str, float, float]]:
    """Grades all that lies in submitted/STUDENT/ASSIGNMENT, writes feedback/ and grades.csv.

    Returns:
        Student, assignment, score and the most that it could be, for each submission.
    """
    nbgrader, scores = open_course(course), []
    for folder in sorted((course / "submitted").glob("*/*/")):
        student, assignment = folder.parent.name, folder.name
        succeed(nbgrader.autograde(assignment, student), f"grading {folder}")
        succeed(nbgrader.generate_feedback(assignment, student), f"feedback for {folder}")
        with Gradebook(nbgrader.coursedir.db_url, nbgrader.coursedir.course_id) as gradebook:
            submission = gradebook.find_submission(assignment, student)
            scores.append((student, assignment, submission.score, submission.max_score))
    with Gradebook(nbgrader.coursedir.db_url, nbgrader.coursedir.course_id) as gradebook:
        CsvExportPlugin(to=str(course / "grades.csv")).export(gradebook)
    return scores


def find(names: list[str]) -> list[Path]:
    """Chapters by file or by number; all of them if none is named."""
    chapters = {path.stem[:2]: path for path in sorted(HERE.glob("[0-9][0-9]_*.ipynb"))}
    found = [Path(name) if Path(name).is_file() else chapters.get(name) for name in names or chapters]
    if None in found:
        raise FileNotFoundError(f"no chapter {names[found.index(None)]!r}; give a file or a number such as 02")
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("generate", "grade"))
    parser.add_argument("chapters", nargs="*", help="numbers such as 02, or files; all chapters if none is named")
    parser.add_argument("--course", type=Path, default=COURSE)
    parser.add_argument("--hidden", type=Path)
    given = parser.parse_args(arguments)
    course = given.course.resolve()
    if given.task == "generate":
        for path in generate(find(given.chapters), course, given.hidden):
            print(f"{path.relative_to(course)}: {points_of(nbformat.read(path, as_version=4))} points")
    else:
        for student, assignment, score, most in grade(course):
            print(f"{student}, {assignment}: {score:g} of {most:g}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

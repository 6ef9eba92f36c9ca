"""The chapters make assignments: what students get, how it is graded, and what the page for teachers says of it."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import own_work
import pytest
from assignments import (
    HERE,
    LATER,
    ClearCode,
    StudentVersion,
    find,
    generate,
    given_by,
    grade,
    is_answer,
    main,
    mark_of,
    open_course,
    points_of,
    without_discussion,
)
from chapter_checks import CHAPTERS
from nbgrader.api import Gradebook

# nbgrader adds submissions in an order that SQLAlchemy 2.1 remarks upon; the tests below see that they are there.
pytestmark = pytest.mark.filterwarnings("ignore:Object of type <Submitted:sqlalchemy.exc.SAWarning")
TEACHING = (HERE / "TEACHING.md").read_text()
STUB = "raise NotImplementedError()"


# ---- a chapter as small as can be, and one that is real


def answer(grade_id: str, source: str):
    mark = {"grade": False, "grade_id": grade_id, "locked": False, "schema_version": 3, "solution": True, "task": False}
    return nbformat.v4.new_code_cell(source, metadata={"nbgrader": mark}, id=grade_id)


def graded(grade_id: str, points: int, source: str):
    mark = {"grade": True, "grade_id": f"{grade_id}-test", "locked": True, "points": points, "schema_version": 3}
    mark |= {"solution": False, "task": False}
    return nbformat.v4.new_code_cell(source, metadata={"nbgrader": mark}, id=grade_id + "-t")


def task(grade_id: str, points: int, source: str):
    mark = {"grade": False, "grade_id": grade_id, "locked": True, "points": points, "solution": False, "task": True}
    return nbformat.v4.new_markdown_cell(source, metadata={"nbgrader": mark | {"schema_version": 3}}, id=grade_id)


SOLVED = "    ### BEGIN SOLUTION\n    {}\n    ### END SOLUTION"
TWICE = answer("ch90-twice", "def twice(x):\n" + SOLVED.format("return 2 * x"))
WORDS = answer("ch90-words", "def words(text):\n" + SOLVED.format("return text.split()"))


def small_chapter() -> nbformat.NotebookNode:
    text = nbformat.v4.new_markdown_cell
    badge = "[![Open in Colab](badge.svg)](https://colab.research.google.com/x.ipynb)"
    cells = [
        text(f"# A small chapter\n\n{badge}\n\nSee [01](01_a.ipynb).", id="a"),
        nbformat.v4.new_code_cell("from minildm.machine import machine", id="b"),
        text("### Exercise 1\n\nDouble. (A worked solution is there. Delete it first.)\n\nSee ### BEGIN SOLUTION.", id="c"),
        TWICE.copy(),
        graded("ch90-twice", 1, "assert twice(3) == 6"),
        text("Doubling is adding to oneself.\n\n### Exercise 2\n\nNow words.", id="d"),
        WORDS.copy(),
        graded("ch90-words", 2, 'assert words("a b") == ["a", "b"]'),
        text("Splitting is what `split` does.", id="e"),
        text("## In writing", id="f"),
        task("ch90-why", 3, "Why?\n\n<!-- BEGIN MARK SCHEME -->\nBecause: 3 points.\n<!-- END MARK SCHEME -->"),
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.from_dict(dict(cell)) for cell in cells])
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata = nbformat.from_dict({"kernelspec": kernel, "minildm": {"builds": ["bpe"]}})
    return notebook


def hand_in(release: Path, student: str, answers: dict[str, str], tamper=lambda cells: cells) -> None:
    """Puts a student's copy of an assignment where it is graded; answers are sources by grade id."""
    notebook = nbformat.read(release, as_version=4)
    for cell in notebook.cells:
        cell.source = answers.get(mark_of(cell).get("grade_id"), cell.source)
    notebook.cells = tamper(notebook.cells)
    folder = release.parents[2] / "submitted" / student / release.stem
    folder.mkdir(parents=True)
    shutil.copy(release.parent / "own_work.py", folder)
    nbformat.write(notebook, folder / release.name)


def tampered(cells):
    """One graded cell emptied and made dear, the other deleted; nothing solved."""
    for cell in cells:
        if mark_of(cell).get("grade_id") == "ch90-twice-test":
            cell.source, cell.metadata["nbgrader"]["points"] = "pass", 100
    return [cell for cell in cells if mark_of(cell).get("grade_id") != "ch90-words-test"]


@pytest.fixture(scope="module")
def course(tmp_path_factory) -> Path:
    """A course of the small chapter, with a hidden test, in which eight students have handed in."""
    folder = tmp_path_factory.mktemp("course")
    chapter = folder / "chapters" / "90_small.ipynb"
    chapter.parent.mkdir()
    nbformat.write(small_chapter(), chapter)
    hidden = folder / "hidden"
    hidden.mkdir()
    (hidden / "ch90-words-test.py").write_text('assert words("c  d\\n e") == ["c", "d", "e"]\n')
    release = generate([chapter], folder / "course", hidden)[0]
    right = {"ch90-twice": TWICE.source, "ch90-words": WORDS.source}
    hand_in(release, "right", right)
    hand_in(release, "partial", right | {"ch90-twice": "def twice(x):\n    return x**2"})
    hand_in(release, "empty", {})
    hand_in(release, "tampered", {}, tampered)
    hand_in(release, "tampered-right", right, tampered)
    hand_in(release, "by-heart", right | {"ch90-words": 'def words(text):\n    return ["a", "b"]'})
    hand_in(release, "imported", right | {"ch90-words": "from minildm.bpe import spell as words"})
    hand_in(release, "fake-guard", {"ch90-twice": TWICE.source})
    (folder / "course" / "submitted" / "fake-guard" / "90_small" / "own_work.py").write_text("raise SystemExit\n")
    return folder / "course"


@pytest.fixture(scope="module")
def scores(course) -> dict[str, float]:
    return {student: score for student, _, score, most in grade(course) if most == 6}


# ---- the round trip


def test_scores_are_as_they_should_be(scores):
    assert scores == {  # of 3 points that a machine gives; the 3 in writing are given by hand
        "right": 3,
        "partial": 2,
        "empty": 0,
        "tampered": 0,  # graded cells are restored, the deleted one too, at their own points
        "tampered-right": 3,
        "by-heart": 1,  # the hidden test was not known by heart
        "imported": 1,
        "fake-guard": 1,  # files that come with the assignment are restored as well
    }


def test_grading_restores_what_was_tampered_with(course, scores):
    path = course / "autograded" / "tampered" / "90_small" / "90_small.ipynb"
    cells = {mark_of(cell).get("grade_id"): cell for cell in nbformat.read(path, as_version=4).cells}
    assert "assert twice(3) == 6" in cells["ch90-twice-test"].source
    assert mark_of(cells["ch90-twice-test"])["points"] == 1
    assert 'assert words("a b")' in cells["ch90-words-test"].source


def test_feedback_says_what_was_wrong(course, scores):
    page = (course / "feedback" / "imported" / "90_small" / "90_small.html").read_text()
    assert "spell is to be written here, with def or class, not imported" in page
    assert len(list((course / "feedback").glob("*/90_small/90_small.html"))) == len(scores)


def test_grades_are_exported(course, scores):
    with open(course / "grades.csv") as file:
        rows = {row["student_id"]: row for row in csv.DictReader(file)}
    assert {student: float(row["score"]) for student, row in rows.items()} == scores
    assert {float(row["max_score"]) for row in rows.values()} == {6}


def test_written_answers_wait_for_a_teacher(course, scores):
    desk = open_course(course).coursedir
    with Gradebook(desk.db_url, desk.course_id) as gradebook:
        submission = gradebook.find_submission("90_small", "tampered-right")
        assert submission.needs_manual_grade
        grade = next(grade for grade in submission.notebooks[0].grades if grade.name == "ch90-why")
        grade.manual_score, grade.needs_manual_grade = 2, False  # what the formgrader does
        gradebook.db.commit()
    with Gradebook(desk.db_url, desk.course_id) as gradebook:
        submission = gradebook.find_submission("90_small", "tampered-right")
        assert (submission.score, submission.needs_manual_grade) == (5, False)


def test_a_real_chapter_goes_all_the_way(tmp_path):
    chapter = find(["01"])[0]
    release = generate([chapter], tmp_path)[0]
    solutions = {mark_of(c)["grade_id"]: c.source for c in nbformat.read(chapter, as_version=4).cells if is_answer(c)}
    wrong = "def keep_largest(coefficients, share):\n    return coefficients"
    answers = {key: solutions[key] for key in ("ch01-bug", "ch01-crossover")} | {"ch01-largest": wrong}
    hand_in(release, "ada", answers)
    assert grade(tmp_path) == [("ada", chapter.stem, 3.0, float(points_of(nbformat.read(chapter, as_version=4))))]


# ---- what a student gets


def student_version(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    for step in (StudentVersion(), ClearCode()):
        notebook, _ = step.preprocess(notebook, {})
    return notebook


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_student_version_has_the_exercises_and_not_the_answers(path):
    chapter = nbformat.read(path, as_version=4)
    solutions = [c.source.split("### BEGIN SOLUTION")[1].split("### END SOLUTION")[0] for c in chapter.cells if is_answer(c)]
    student = student_version(nbformat.read(path, as_version=4))
    text = "\n".join(cell.source for cell in student.cells)
    assert text.count(STUB) >= len(solutions) >= 2
    for solution in solutions:
        assert solution.strip() not in text
    assert "worked solution" not in text
    assert "colab.research.google.com" not in text.split("## ")[0], "the badge leads to the solutions"
    answers = 0
    for cell in student.cells:
        answers += is_answer(cell)
        if mark_of(cell).get("grade"):
            assert answers, "a graded cell grades an answer"
            assert re.match(r"import own_work\n\nown_work\.check\(\w+(, \w+)*\)\n", cell.source)
            answers = 0
    assert points_of(student) == points_of(chapter)
    for cell in (cell for cell in student.cells if cell.cell_type == "markdown"):
        assert not re.search(r"\]\(\d\d_\w+\.ipynb", cell.source), "a link to a chapter that is not in this folder"


def test_the_small_student_version_reads_as_it_should():
    cells = {cell.id: cell.source for cell in student_version(small_chapter()).cells}
    assert cells["a"] == "# A small chapter\n\nSee [01](../01_a/01_a.ipynb)."
    assert "**Student version, 6 points.**" in cells["student-version"]
    assert cells["c"] == "### Exercise 1\n\nDouble.\n\nSee ### BEGIN SOLUTION."  # a text may speak of the marks
    assert cells["ch90-twice"] == f"def twice(x):\n    # YOUR CODE HERE\n    {STUB}"
    assert cells["ch90-twice-t"] == "import own_work\n\nown_work.check(twice)\nassert twice(3) == 6"
    assert cells["d"] == f"{LATER}\n\n### Exercise 2\n\nNow words."
    assert cells["e"] == LATER
    assert cells["f"] == "## In writing"


def test_released_files_hold_no_hidden_test_and_no_mark_scheme(course):
    text = (course / "release" / "90_small" / "90_small.ipynb").read_text()
    assert "HIDDEN" not in text
    assert "c  d" not in text
    assert "Because: 3 points" not in text
    assert "Because: 3 points" in (course / "source" / "90_small" / "90_small.ipynb").read_text()


def test_an_exercise_without_a_heading_is_refused():
    cells = small_chapter().cells
    cells[5].source = "Now words."
    with pytest.raises(ValueError, match="ch90-words needs a heading"):
        list(without_discussion(cells))


def test_what_nbgrader_refuses_is_said(tmp_path):
    notebook = small_chapter()
    notebook.cells[6].metadata["nbgrader"]["grade_id"] = "ch90-twice"
    nbformat.write(notebook, tmp_path / "90_small.ipynb")
    with pytest.raises(RuntimeError, match="student version of 90_small failed"):
        generate([tmp_path / "90_small.ipynb"], tmp_path / "course")


def test_a_hidden_test_for_nothing_is_refused(tmp_path):
    (tmp_path / "ch02-lk-test.py").write_text("assert False\n")
    with pytest.raises(ValueError, match="no graded cell of that name"):
        generate(find(["02"]), tmp_path / "course", tmp_path)


def test_an_unknown_chapter_is_refused():
    with pytest.raises(FileNotFoundError, match="no chapter '77'"):
        main(["generate", "77"])


# ---- whose work it is


HONEST = {
    "plain": "def f(x): return 2 * x",
    "with a helper": "def g(x): return x\ndef f(x): return g(x) + 1",
    "what the chapter imports": "from minildm.machine import machine\ndef f(): return machine()",
    "other libraries": "import math\ndef f(x):\n    import json\n    return math.sqrt(x)",
    "decorated": "import functools\n@functools.lru_cache\ndef f(x): return x",
    "a class": "class f:\n    def g(self): return 1",
    "recursive": "def f(x): return f(x - 1) if x else 0",
}
BORROWED = {
    "imported": ("from minildm.bpe import spell as f", "spell is to be written here"),
    "a module's attribute": ("import minildm.bpe\ndef f(x): return minildm.bpe.spell(x)", "f uses minildm"),
    "under another name": ("from minildm.bpe import spell as machine\ndef f(x): return machine(x)", "minildm.bpe"),
    "not in the chapter": ("from minildm.machine import best_device as g\ndef f(x): return g(x)", "best_device"),
    "inside": ("def f(x):\n    from minildm.bpe import spell\n    return spell(x)", "f uses minildm.bpe"),
    "inside the inside": ("def f(x):\n    def g():\n        import minildm.bpe\n    return g", "f uses minildm.bpe"),
    "by a helper": ("from minildm.bpe import spell as s\ndef g(x): return s(x)\ndef f(x): return g(x)", "minildm.bpe"),
    "as a default": ("from minildm.bpe import spell\ndef f(x, g=spell): return g(x)", "minildm.bpe"),
    "in a closure": (
        "from minildm.bpe import spell\ndef make(g):\n    def inner(x): return g(x)\n    return inner\nf = make(spell)",
        "minildm.bpe",
    ),
    "a subclass": ("from minildm import schedule\nclass f(schedule.NoiseSchedule): pass", "minildm.schedule.NoiseSchedule"),
    "by a method": ("from minildm import bpe\nclass f:\n    def g(self): return bpe.spell", "minildm.bpe"),
    "no definition": ("f = 3", "3 is to be written here"),
}


@pytest.fixture
def small_lists(monkeypatch):
    monkeypatch.setattr(own_work, "GIVEN", {"machine", "spell"})
    monkeypatch.setattr(own_work, "BUILT", {"minildm.bpe"})


def in_notebook(source: str) -> None:
    exec(source + "\nimport own_work\nown_work.check(f)", {"__name__": "__main__"})


@pytest.mark.parametrize("source", HONEST.values(), ids=HONEST)
def test_own_work_passes(small_lists, source):
    in_notebook(source)


@pytest.mark.parametrize(("source", "message"), BORROWED.values(), ids=BORROWED)
def test_borrowed_work_is_refused(small_lists, source, message):
    with pytest.raises(AssertionError, match=message):
        in_notebook(source)


def test_what_is_given_is_what_the_chapter_imports():
    assert given_by(small_chapter()) == {"machine"}


# ---- do the exercises work, and does the page say so?


def checked(path: Path) -> list[dict]:
    command = [sys.executable, str(Path(__file__).parent / "exercises.py"), str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_check_tells_a_worked_solution_that_fails_and_a_test_that_passes_anything(tmp_path):
    notebook = small_chapter()
    notebook.cells[3].source = TWICE.source.replace("2 * x", "3 * x")
    notebook.cells[7].source = "pass"
    nbformat.write(notebook, tmp_path / "90_small.ipynb")
    first, second = checked(tmp_path / "90_small.ipynb")
    assert first == {"exercise": "ch90-twice", "points": 1, "solved": 0, "unsolved": 0, "error": "NotImplementedError"}
    assert (second["solved"], second["unsolved"]) == (2, 2)


@pytest.mark.slow
@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_worked_solutions_score_full_and_without_them_nothing(path):
    rows = checked(path)
    assert len(rows) >= 2
    for row in rows:
        assert row == row | {"solved": row["points"], "unsolved": 0, "error": "NotImplementedError"}


def table() -> dict[str, list[str]]:
    rows = re.findall(r"^\| \[(\d\d) [^|]*\]\((\d\d_\w+)\.ipynb\) \|(.*)\|$", TEACHING, re.MULTILINE)
    return {stem: [field.strip() for field in rest.split("|")] for _, stem, rest in rows}


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_the_page_for_teachers_has_points_and_times_of_each_chapter(path):
    notebook = nbformat.read(path, as_version=4)
    marks = [mark_of(cell) for cell in notebook.cells]
    by_machine = sum(mark["points"] for mark in marks if mark.get("grade"))
    _, machine_points, hand_points, seconds = table()[path.stem]
    assert int(machine_points) == by_machine
    assert int(hand_points or 0) == points_of(notebook) - by_machine
    assert seconds == re.search(r"\*\*Runs in\*\* about (\d+ s)", notebook.cells[0].source)[1]


def test_the_page_for_teachers_has_every_chapter_and_the_right_sums():
    assert list(table()) == [path.stem for path in CHAPTERS]
    notebooks = [nbformat.read(path, as_version=4) for path in CHAPTERS]
    exercises = sum(bool(mark_of(cell).get("grade")) for notebook in notebooks for cell in notebook.cells)
    sums = sum(int(row[1]) for row in table().values()), sum(int(row[2] or 0) for row in table().values())
    assert f"{exercises} exercises, {sums[0]} points by machine and {sums[1]} by hand" in TEACHING


def test_the_script_for_gradescope_writes_its_result(course, scores, tmp_path):
    script = re.search(r"```python\n(.*?results\.json.*?)```", TEACHING, re.DOTALL)[1]
    (tmp_path / "results").mkdir()
    script = script.replace("/autograder/results", str(tmp_path / "results")).replace("out/assignments", str(course))
    exec(script.replace('"student"', '"partial"'), {})
    assert json.loads((tmp_path / "results" / "results.json").read_text())["score"] == 2

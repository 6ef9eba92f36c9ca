"""The chapters keep the contract of the course, and every check that says so can fail."""

import ast
import copy
import json
import re
from pathlib import Path

import nbformat
import pytest
from chapter_checks import (
    CHAPTERS,
    CHECKS,
    REPOSITORY,
    SETUP,
    canonical,
    compared,
    defined_twice,
    definitions,
    described,
    executed,
    exercises,
    incomplete,
    offline,
    opened,
    ordered,
    package_definitions,
    portable,
    same_code,
    says_what_it_builds,
    short,
    tree_of,
    whole,
)
from execute_chapters import main, normalise, write
from test_structure import TIERS

TAUGHT = set().union(*(TIERS[tier] for tier in (0, 1, 2)))
BUILT_IN = {  # the chapter that completes each module; it shows every public definition of it, or a chapter before does
    "vae": "02", "perceptual": "03", "gan": "03", "vq": "04", "schedule": "06", "blocks": "07", "unet": "07", "attention": "08",
    "bpe": "09", "tokenizer": "09", "clip": "09", "samplers": "11", "guidance": "12", "metrics": "13", "scores": "13",
    "sdxl": "14", "controlnet": "15", "lora": "16", "editing": "17", "dit": "18", "flow": "18",
}  # fmt: skip
# Used, not taught.
TOOLS = {
    "files", "inception", "shapes", "shards", "plot", "checkpoint", "folder", "machine", "data", "tiling", "layouts", "tensors",
    "muon",
}  # fmt: skip
README = (Path(__file__).parents[1] / "README.md").read_text()
NOTEBOOKS = {path.stem: json.loads(path.read_text()) for path in CHAPTERS}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_chapter_passes(name, check):
    assert not list(check(NOTEBOOKS[name]))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_chapter_opens_as_all_do(name):
    assert not list(opened(NOTEBOOKS[name], name))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_chapter_is_a_valid_notebook_as_make_chapters_leaves_it(name):
    notebook = nbformat.reads(json.dumps(NOTEBOOKS[name]), as_version=4)
    nbformat.validate(notebook)
    assert normalise(copy.deepcopy(notebook)) == notebook


def test_every_module_is_built_in_its_chapter():
    assert {*BUILT_IN} | TOOLS == TAUGHT
    assert not {*BUILT_IN} & TOOLS
    for name, notebook in NOTEBOOKS.items():
        due = {module for module, number in BUILT_IN.items() if number == name[:2]}
        assert set(notebook["metadata"]["minildm"]["builds"]) == due, name


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_readme_says_how_long_a_chapter_runs(name):
    seconds = re.search(r"\*\*Runs in\*\* about (\d+) s", "".join(NOTEBOOKS[name]["cells"][0]["source"]))[1]
    row = next(line for line in README.splitlines() if f"(chapters/{name}.ipynb)" in line)
    assert row.endswith(f"| {seconds} s |")


def test_the_chapters_together_define_everything_once():
    assert not list(incomplete(NOTEBOOKS))
    assert not list(defined_twice(NOTEBOOKS, TAUGHT))


# ---- every check can fail


def markdown(text: str) -> dict:
    return {"cell_type": "markdown", "id": "m", "metadata": {}, "source": text}


def code(text: str, out: str = "", **metadata) -> dict:
    outputs = [{"output_type": "stream", "name": "stdout", "text": out}] if out else []
    return {"cell_type": "code", "id": "c", "metadata": metadata, "source": text, "outputs": outputs, "execution_count": None}


def nbgrader(grade_id: str, **marks) -> dict:
    kind = {"grade": False, "solution": False, "locked": False, "schema_version": 3, "task": False}
    return {"nbgrader": kind | {"grade_id": grade_id} | marks}


OPENING = f"""# A tiny chapter
You will be able to count. **You need** nothing. **Runs in** about 1 s on 2 cores of a test.
[![Colab](c.svg)](https://colab.research.google.com/github/{REPOSITORY}/blob/main/chapters/99_tiny.ipynb)
[![Binder](b.svg)](https://mybinder.org/v2/gh/{REPOSITORY}/HEAD?labpath=chapters%2F99_tiny.ipynb)
[One idea](#One-idea) [Summary](#Summary)"""
IMAGE = '<img alt="a line" src="data:image/png;base64,/tmp/iVBO">'
SOLUTION = "def double(x):\n    ### BEGIN SOLUTION\n    return 2 * x\n    ### END SOLUTION"


def renumber(notebook: dict) -> dict:
    for number, cell in enumerate(notebook["cells"]):
        cell["id"] = f"cell-{number}"
    for count, cell in enumerate((c for c in notebook["cells"] if c["cell_type"] == "code"), start=1):
        cell["execution_count"] = count
    return notebook


@pytest.fixture
def tiny() -> dict:
    """The smallest chapter that passes every check."""
    cells = [
        markdown(OPENING),
        code(SETUP),
        markdown("## One idea\n**Before you run the next cell:** 1 or 2?\n\n**Your guess.** 2.\n\n### An ablation\nNone."),
        code("print(1)", out="1\n"),
        code("print(2)", out="2\n"),
        code("print(3)", out="3\n"),
        code("import time\nassert time.time() > 0", tags=["nbval-ignore-output"]),
        markdown("**If you see this:** nothing.\n\n**Spot the bug.** There is none."),
        code(SOLUTION, **nbgrader("double", solution=True)),
        code("assert double(2) == 4", **nbgrader("double-test", grade=True, locked=True, points=1)),
        code(SOLUTION.replace("double", "twice"), **nbgrader("twice", solution=True)),
        code("assert twice(2) == 4", **nbgrader("twice-test", grade=True, locked=True, points=1)),
        markdown("## Summary\nNothing."),
    ]
    cells[5]["outputs"].append({"output_type": "display_data", "metadata": {}, "data": {"text/html": IMAGE}})
    cells[4]["outputs"] = [{"output_type": "execute_result", "metadata": {}, "data": {"text/plain": "2"}, "execution_count": 1}]
    cells[5]["outputs"] = cells[5]["outputs"][:1]
    cells[6]["outputs"] = [
        {"output_type": "display_data", "metadata": {}, "data": {"text/html": IMAGE, "text/plain": "a line"}}
    ]
    return renumber({"cells": cells, "metadata": {"minildm": {"builds": []}}, "nbformat": 4, "nbformat_minor": 5})


def test_the_tiny_chapter_passes_everything(tiny):
    assert not [complaint for check in CHECKS for complaint in check(tiny)]
    assert not list(opened(tiny, "99_tiny"))
    assert not list(incomplete({"99_tiny": tiny}))
    assert not list(defined_twice({"99_tiny": tiny}, TAUGHT))


def replaced(old: str, new: str):
    """A defect: some text of the tiny chapter is another."""

    def spoil(notebook: dict) -> None:
        assert any(old in cell["source"] for cell in notebook["cells"])
        for cell in notebook["cells"]:
            cell["source"] = cell["source"].replace(old, new)

    return spoil


def added(source: str, **metadata):
    """A defect: a code cell more at the end."""

    def spoil(notebook: dict) -> None:
        notebook["cells"].append(code(source, **metadata))
        renumber(notebook)

    return spoil


def printed(*outputs: dict):
    """A defect: a cell has these outputs."""
    return lambda notebook: notebook["cells"][3].update(outputs=list(outputs))


def marked(index: int, **marks):
    """A defect: an nbgrader cell has other marks."""
    return lambda notebook: notebook["cells"][index]["metadata"]["nbgrader"].update(marks)


def counted(*counts: int | None):
    """A defect: these execution counts."""

    def spoil(notebook: dict) -> None:
        for cell, count in zip((c for c in notebook["cells"] if c["cell_type"] == "code"), counts, strict=False):
            cell["execution_count"] = count

    return spoil


def stored(mime: str, value: str) -> dict:
    return {"output_type": "display_data", "metadata": {}, "data": {mime: value}}


IGNORED = {"tags": ["nbval-ignore-output"]}
DEFECTS = [
    (executed, counted(1, 3), "execution counts"),
    (executed, counted(None, None), "execution counts"),
    (executed, printed({"output_type": "error", "ename": "E", "evalue": "", "traceback": []}), "stored error"),
    (executed, printed({"output_type": "stream", "name": "stderr", "text": "careful"}), "stored warning"),
    (compared, printed(), "2 outputs"),
    (compared, printed(stored("text/html", IMAGE)), "2 outputs"),
    (compared, lambda n: [c["metadata"].update(IGNORED) for c in n["cells"][:8]], "at most a third"),
    (compared, replaced("assert time.time() > 0", "time.time()"), "does not end in an assertion"),
    (compared, added("print(1)", tags=["nbval-skip"]), "hidden from nbval"),
    (compared, added("# NBVAL_IGNORE_OUTPUT\nprint(1)"), "hidden from nbval"),
    (offline, replaced("--quiet", "-q"), "not the standard one"),
    (offline, added("import urllib.request"), "import urllib"),
    (offline, added("from huggingface_hub import HfApi"), "import huggingface_hub"),
    (offline, added("data.torchvision_set('mnist', download=True)"), "download=True"),
    (offline, added("CLIPTextModel.from_pretrained('x/y')"), "from_pretrained"),
    (offline, added("torch.hub.load('x/y', 'z')"), "load"),
    (offline, added("%pip install tqdm"), "pip install"),
    (offline, added("!curl https://example.org"), "curl"),
    (portable, added("open('/home/me/x.png')"), "/home/"),
    (portable, added(r"open('C:\\x.png')"), "C:"),
    (portable, printed({"output_type": "stream", "name": "stdout", "text": "saved /tmp/x.png"}), "/tmp/"),
    (portable, printed(stored("text/html", "x" * 500_000)), "bytes"),
    (ordered, replaced("# A tiny", "A tiny"), "0 headings"),
    (ordered, replaced("## Summary", "# Summary"), "2 headings"),
    (ordered, replaced("### An ablation", "#### An ablation"), "skips a level"),
    (described, printed(stored("image/png", "iVBO")), "no alternative text"),
    (described, printed(stored("text/html", '<img src="x">')), "without alternative text"),
    (described, printed(stored("text/html", '<img alt="" src="x">')), "without alternative text"),
    (described, replaced("None.", "![](x.png)"), "no alternative text"),
    (whole, replaced("Before you run", "Run"), "prediction"),
    (whole, replaced("Your guess", "Answer"), "answer"),
    (whole, replaced("An ablation", "One less"), "ablation"),
    (whole, replaced("If you see this", "Beware"), "box"),
    (whole, replaced("Spot the bug", "Bug"), "bug"),
    (whole, replaced("## Summary", "## End"), "Summary"),
    (short, added("x = 1\n" * 16), "16 lines"),
    (exercises, lambda n: n["cells"].pop(11), "1 graded"),
    (exercises, marked(11, grade_id="double-test"), "'double-test' is used 2 times"),
    (exercises, marked(9, points=0), "needs points"),
    (exercises, marked(9, locked=False), "a lock"),
    (exercises, replaced("assert double(2) == 4", "double(2)"), "asserts nothing"),
    (exercises, marked(8, solution=False), "1 worked solutions"),
    (exercises, replaced("### BEGIN SOLUTION", "# solution"), "lacks ### BEGIN SOLUTION"),
    (says_what_it_builds, lambda n: n["metadata"].pop("minildm"), "metadata lack"),
    (says_what_it_builds, lambda n: n["metadata"]["minildm"].update(builds=["magic"]), "no minildm/magic.py"),
    (says_what_it_builds, lambda n: added(source_of("timestep_embedding"))(n), "do not name"),
    (same_code, lambda n: added(source_of("timestep_embedding").replace("/", "*"))(n), "minildm/blocks.py"),
    (same_code, lambda n: added(source_of("self.velocity").replace("*", "+"))(n), "minildm/schedule.py"),
]


def source_of(name: str) -> str:
    """A definition of the package as a chapter would show it: without docstring, laid out otherwise."""
    return ast.unparse(package_definitions()[name][0][1])


@pytest.mark.parametrize(("check", "spoil", "complaint"), DEFECTS, ids=lambda value: getattr(value, "__name__", value))
def test_a_defect_is_found(tiny, check, spoil, complaint):
    spoil(tiny)
    assert any(complaint in found for found in check(tiny)), list(check(tiny))


def test_no_check_is_left_untried():
    assert {check for check, _, _ in DEFECTS} == {*CHECKS}


@pytest.mark.parametrize(
    ("old", "complaint"),
    [("You will be able", "be able"), ("**You need**", "need"), ("about 1 s", "costs"), ("colab.", "Colab"),
     ("mybinder", "Binder"), ("99_tiny.ipynb", "Colab"), ("(#One-idea)", "One idea")],
)  # fmt: skip
def test_a_poor_opening_is_found(tiny, old, complaint):
    replaced(old, "x")(tiny)
    assert any(complaint in found for found in opened(tiny, "99_tiny"))


# ---- the same name is the same code


def test_comments_docstrings_and_layout_do_not_count(tiny):
    added(
        '# a comment\ndef quick_gelu(x: Tensor) -> Tensor:\n    "Short."\n    return (x *\n        torch.sigmoid(1.702 * x))'
    )(tiny)
    assert not list(same_code(tiny))


@pytest.mark.parametrize(("old", "new"), [("1.702", "1.703"), (" -> Tensor", ""), ("*", "+"), ("def", "@cache\ndef")])
def test_one_operator_number_hint_or_decorator_counts(tiny, old, new):
    added(source_of("quick_gelu").replace(old, new))(tiny)
    assert [complaint for complaint in same_code(tiny) if "quick_gelu" in complaint]


def operators(tree: ast.Module) -> list[ast.BinOp]:
    """All sums, products and the like within the definitions that these lines share with the package."""
    shared = [node for node in definitions(tree.body) if node.name in package_definitions()]
    return [inner for node in shared for inner in ast.walk(node) if isinstance(inner, ast.BinOp)]


@pytest.mark.parametrize("name", [name for name, notebook in NOTEBOOKS.items() if notebook["metadata"]["minildm"]["builds"]])
def test_any_operator_changed_in_a_chapter_is_found(name):
    tried = 0
    for cell in NOTEBOOKS[name]["cells"]:
        for k in range(len(operators(tree_of(cell))) if cell["cell_type"] == "code" else 0):
            tree = tree_of(cell)
            changed = operators(tree)[k]
            changed.op = ast.Sub() if isinstance(changed.op, ast.Add) else ast.Add()
            assert list(same_code({"cells": [cell | {"source": ast.unparse(tree)}]})), ast.unparse(changed)
            tried += 1
    assert tried > 3


def test_a_definition_hidden_in_a_block_is_found(tiny):
    added("if True:\n    def quick_gelu(x):\n        return x")(tiny)
    assert list(same_code(tiny))


def test_the_code_of_the_package_equals_itself():
    for places in package_definitions().values():
        for _, node in places:
            assert canonical(node) == canonical(ast.parse(ast.unparse(node)).body[0])


def test_a_module_is_complete_over_the_chapters_that_begin_and_build_it(tiny):
    names = ["timestep_embedding", "ResBlock", "Downsample", "Upsample"]
    first, second = copy.deepcopy(tiny), copy.deepcopy(tiny)
    first["metadata"]["minildm"] = {"builds": [], "begins": ["blocks"]}
    second["metadata"]["minildm"] = {"builds": ["blocks"]}
    for k, name in enumerate(names):
        added(source_of(name))((first, second)[k % 2])
    chapters = {"02_first": first, "07_second": second}
    assert not list(incomplete(chapters))
    assert not list(defined_twice(chapters, TAUGHT))
    assert not list(says_what_it_builds(first))
    del first["metadata"]["minildm"]["begins"]
    assert len(list(incomplete(chapters))) == 2
    added(source_of("Upsample"))(first)
    assert any("02_first and 07_second" in complaint for complaint in defined_twice(chapters, TAUGHT))


# ---- make chapters


def test_normalising_keeps_what_matters_and_drops_the_rest(tiny):
    notebook = nbformat.from_dict(tiny)
    ids = [cell.id for cell in notebook.cells]
    notebook.metadata.kernelspec = {"name": "my-env", "display_name": "Mine", "language": "python"}
    notebook.metadata.language_info = {"name": "python", "version": "3.99"}
    cell = notebook.cells[3]
    cell.metadata.execution = {"iopub.execute_input": "2026-01-01"}
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=text) for text in ("1", "2\n")]
    slider = {"text/plain": "IntSlider(value=3)", "application/vnd.jupyter.widget-view+json": {"model_id": "cafb"}}
    notebook.cells[4].outputs = [nbformat.v4.new_output("display_data", data=slider)]
    clean = normalise(notebook)
    assert clean.metadata.kernelspec.name == "python3"
    assert clean.metadata.minildm == {"builds": []}
    assert "3.99" not in json.dumps(clean)
    assert cell.metadata == {}
    assert [output.text for output in cell.outputs] == ["12\n"]
    assert [output.data for output in notebook.cells[4].outputs] == [{"text/plain": "IntSlider(value=3)"}]
    assert notebook.cells[8].metadata.nbgrader.grade_id == "double"
    assert [cell.id for cell in clean.cells] == ids
    clean.cells[1].id = clean.cells[0].id
    assert len({cell.id for cell in normalise(clean).cells}) == len(ids)
    assert normalise(copy.deepcopy(clean)) == clean


def test_a_notebook_is_written_whole_or_not_at_all(tmp_path, tiny):
    path = tmp_path / "99_tiny.ipynb"
    write(nbformat.from_dict(tiny), path)
    before = path.read_text()
    with pytest.raises(nbformat.ValidationError):
        write(nbformat.from_dict(tiny | {"cells": [{"cell_type": "nonsense", "id": "x"}]}), path)
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["99_tiny.ipynb"]


def test_a_chapter_is_executed_where_it_lies(tmp_path, capsys):
    path = tmp_path / "99_tiny.ipynb"
    cells = [nbformat.v4.new_code_cell("import os\nprint(os.environ['OMP_NUM_THREADS'])\nopen('here', 'w').close()")]
    write(nbformat.v4.new_notebook(cells=cells), path)
    assert main([str(path)]) == 0
    done = json.loads(path.read_text())["cells"][0]
    assert (done["execution_count"], (tmp_path / "here").exists()) == (1, True)
    assert re.fullmatch(r"\d+\n", "".join(done["outputs"][0]["text"]))
    assert "99_tiny" in capsys.readouterr().out


def test_a_chapter_that_fails_is_named_and_left_as_it_was(tmp_path, capsys):
    path = tmp_path / "99_tiny.ipynb"
    write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")]), path)
    before = path.read_text()
    assert main([str(path)]) == 1
    assert path.read_text() == before
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert main([str(tmp_path / "98_none.ipynb")]) == 1
    assert "98_none" in capsys.readouterr().err


def test_make_chapters_runs_the_script():
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    assert "tests/execute_chapters.py" in makefile

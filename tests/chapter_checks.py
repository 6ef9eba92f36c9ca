"""What a chapter must be, as small checks: each takes a notebook and yields what is wrong with it, in words.

A notebook here is the plain dictionary that its file holds.  `test_chapters.py` runs every check over every chapter, and over
small notebooks with one defect each, to know that the check can fail.

A chapter says what it builds in its metadata: {"minildm": {"builds": ["vae"], "begins": ["blocks"]}}.  What it builds is
complete with it; of what it begins, a later chapter builds the rest; any other public definition of the package it imports.
"""

import ast
import json
import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parent.parent
CHAPTERS = sorted((ROOT / "chapters").glob("[0-9][0-9]_*.ipynb"))
REPOSITORY = "minildm/minildm"  # where the badges lead
MAX_BYTES, MAX_LINES = 500_000, 15

SETUP = f"""\
try:
    import minildm
except ImportError:  # on Colab: fetch the course, once
    !git clone --quiet --depth 1 https://github.com/{REPOSITORY} course
    %pip install --quiet --editable course
    import sys

    sys.path.insert(0, "course")
    import minildm"""

PARTS = {  # what every chapter has, and how a reader and this file find it
    "a prediction: 'Before you run the next cell'": r"before you run",
    "the answer to it: '**Your guess.**'": r"\*\*your guess",
    "an ablation: a heading or bold start with that word": r"^(#+ |\*\*).*\bablation\b",
    "a box that starts '**If you see this:**'": r"^(> )?\*\*if you see this",
    "a heading or bold start 'Spot the bug'": r"^(#+ |\*\*)spot the bug",
    "a heading 'Summary'": r"^## summary$",
}
OPENING = {  # what the first cell says
    "what you will be able to do": r"you will be able to",
    "what you need first: '**You need**'": r"\*\*you need",
    "what it costs: '**Runs in** about 20 s on 2 cores of ...'": r"\*\*runs in\*\* about \d+ (s|min)\b.*\b(core|gpu)",
}
NETWORK_MODULES = {"urllib", "requests", "httpx", "aiohttp", "http", "socket", "ftplib", "huggingface_hub", "wget", "gdown"}
NETWORK_CALLS = {
    "from_pretrained",
    "hf_hub_download",
    "snapshot_download",
    "load_state_dict_from_url",
    "urlretrieve",
    "urlopen",
}
MACHINE_PATH = re.compile(r"(?<![\w./-])(/(home|root|work|tmp|mnt|Users|content|private|var)/|[A-Z]:\\)")
DATA_URI = re.compile(r"data:image/[a-z+]+;base64,[A-Za-z0-9+/=\s]+")


# ---- a notebook, taken apart


def text_of(cell: dict) -> str:
    source = cell["source"]
    return source if isinstance(source, str) else "".join(source)


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def prose(notebook: dict) -> str:
    return "\n\n".join(text_of(cell) for cell in notebook["cells"] if cell["cell_type"] == "markdown")


def tags(cell: dict) -> list[str]:
    return cell["metadata"].get("tags", [])


def ignored(cell: dict) -> bool:
    return "nbval-ignore-output" in tags(cell)


def tree_of(cell: dict) -> ast.Module:
    """The syntax tree of a code cell, its magics and shell lines left out."""
    return ast.parse(re.sub(r"^(\s*)[%!].*$", r"\1pass", text_of(cell), flags=re.MULTILINE))


def first_line(cell: dict) -> str:
    return next((line for line in text_of(cell).splitlines() if line.strip()), "(empty)")[:60]


def joined(value: str | list[str]) -> str:
    return value if isinstance(value, str) else "".join(value)


def output_texts(cell: dict) -> Iterator[tuple[str, str]]:
    """Every piece of text that a cell has put out, with its kind: "stream" or a MIME type."""
    for output in cell["outputs"]:
        if "text" in output:
            yield "stream", joined(output["text"])
        for mime, value in output.get("data", {}).items():
            yield mime, joined(value) if isinstance(value, str | list) else json.dumps(value)


def asserts(*nodes: ast.AST) -> bool:
    """Whether there is an assert statement, or a call of something named assert_..., anywhere in these nodes."""
    for node in (inner for outer in nodes for inner in ast.walk(outer)):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")).startswith("assert_"):
            return True
    return False


# ---- the package and the chapters say the same


Definition = ast.ClassDef | ast.FunctionDef


def definitions(body: list[ast.stmt]) -> list[Definition]:
    """Classes and functions that these statements define, also inside an if, a try or a with; not those inside another."""
    found = []
    for node in body:
        if isinstance(node, Definition):
            found.append(node)
        elif not isinstance(node, ast.AsyncFunctionDef):
            found += definitions([child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)])
    return found


def canonical(node: Definition) -> str:
    """A definition without what may differ: comments, docstrings, layout."""
    copy = ast.parse(ast.unparse(node))
    for inner in ast.walk(copy):
        if isinstance(inner, Definition) and ast.get_docstring(inner) is not None:
            inner.body = inner.body[1:] or [ast.Pass()]
    return ast.dump(copy)


@cache
def package_definitions() -> dict[str, list[tuple[str, Definition]]]:
    """Every class and function at the top of a module of the package, and every method: name to (module, code)."""
    found: dict[str, list[tuple[str, Definition]]] = {}
    for path in sorted((ROOT / "minildm").glob("*.py")):
        for node in definitions(ast.parse(path.read_text()).body):
            found.setdefault(node.name, []).append((path.stem, node))
            for method in definitions(node.body) if isinstance(node, ast.ClassDef) else []:
                found.setdefault(f"self.{method.name}", []).append((path.stem, method))
    return found


def chapter_definitions(notebook: dict) -> dict[str, list[Definition]]:
    """Every class and function that a chapter defines; one that takes self, shown alone, is called self.name."""
    found: dict[str, list[Definition]] = {}
    for node in (node for cell in code_cells(notebook) for node in definitions(tree_of(cell).body)):
        takes_self = isinstance(node, ast.FunctionDef) and bool(node.args.args) and node.args.args[0].arg == "self"
        found.setdefault(f"self.{node.name}" if takes_self else node.name, []).append(node)
    return found


def public_names(module: str) -> set[str]:
    return {
        name
        for name, places in package_definitions().items()
        if not name.startswith(("_", "self.")) and module in {place for place, _ in places}
    }


def promised(notebook: dict, key: str) -> list[str]:
    return notebook["metadata"].get("minildm", {}).get(key, [])


def same_code(notebook: dict) -> Iterator[str]:
    """Contract 2: the same name is the same code."""
    for name, nodes in chapter_definitions(notebook).items():
        ours = {canonical(node): module for module, node in package_definitions().get(name, [])}
        for node in nodes:
            if ours and canonical(node) not in ours:
                where = " and ".join(sorted(set(ours.values())))
                yield f"{name} is not the code of minildm/{where}.py; make them equal, or give the chapter's another name"


def says_what_it_builds(notebook: dict) -> Iterator[str]:
    """Contract 1: metadata.minildm names the modules that the chapter builds (to the end) or begins, and no others."""
    if "builds" not in notebook["metadata"].get("minildm", {}):
        yield 'its metadata lack "minildm": {"builds": [modules it completes]}; an empty list will do'
    modules = {*promised(notebook, "builds"), *promised(notebook, "begins")}
    for name in chapter_definitions(notebook):
        places = {place for place, _ in package_definitions().get(name, [])}
        if places and not name.startswith("self.") and not places & modules:
            yield f"defines {name} of {', '.join(places)}, which its metadata do not name under builds or begins"
    yield from (
        f"builds {m}, and there is no minildm/{m}.py" for m in sorted(modules) if not (ROOT / f"minildm/{m}.py").exists()
    )


def incomplete(notebooks: dict[str, dict]) -> Iterator[str]:
    """Contract 1: what a chapter builds is all there, in it or in a chapter that begins the module."""
    for chapter, notebook in notebooks.items():
        for module in promised(notebook, "builds"):
            helpers = [notebook] + [other for other in notebooks.values() if module in promised(other, "begins")]
            missing = public_names(module) - {name for helper in helpers for name in chapter_definitions(helper)}
            yield from (f"{chapter} builds {module} and defines no {name}" for name in sorted(missing))


def defined_twice(notebooks: dict[str, dict], modules: set[str]) -> Iterator[str]:
    """Contract 3: a public definition of these modules is in one chapter at most, and there once."""
    places: dict[str, list[str]] = {}
    for chapter, notebook in notebooks.items():
        for name, nodes in chapter_definitions(notebook).items():
            places.setdefault(name, []).extend([chapter] * len(nodes))
    for name in sorted({name for module in modules for name in public_names(module)}):
        if len(places.get(name, [])) > 1:
            yield f"{name} is defined in {' and '.join(places[name])}; import it from minildm in the later one"


# ---- it has been run, and what it says is compared


def executed(notebook: dict) -> Iterator[str]:
    counts = [cell["execution_count"] for cell in code_cells(notebook)]
    if counts != list(range(1, len(counts) + 1)):
        yield f"execution counts are {counts}; run `make chapters`"
    for cell in code_cells(notebook):
        if any(output["output_type"] == "error" for output in cell["outputs"]):
            yield f"a stored error in the cell {first_line(cell)!r}"
        if any(output.get("name") == "stderr" for output in cell["outputs"]):
            yield f"a stored warning in the cell {first_line(cell)!r}"


def compared(notebook: dict) -> Iterator[str]:
    """nbval compares what was stored: enough must be stored, little ignored, and what is ignored asserted."""
    cells = code_cells(notebook)
    kinds = [{kind for kind, _ in output_texts(cell)} for cell in cells if not ignored(cell)]
    if (count := sum(bool(k & {"stream", "text/plain"}) and "text/html" not in k for k in kinds)) < 3:
        yield f"{count} outputs in words or numbers are compared; at least 3 are to be"
    if 3 * sum(map(ignored, cells)) > len(cells):
        yield f"{sum(map(ignored, cells))} of {len(cells)} cells are tagged nbval-ignore-output; at most a third may be"
    for cell, following in zip(cells, [*cells[1:], None], strict=True):
        last = tree_of(cell).body[-1:]
        if ignored(cell) and not asserts(*last) and not (following and asserts(tree_of(following))):
            yield f"the ignored cell {first_line(cell)!r} does not end in an assertion, and the next has none"
        if {"nbval-skip", "skip"} & {*tags(cell)} or re.search(r"#\s*(NBVAL_|PYTEST_VALIDATE)", text_of(cell)):
            yield f"the cell {first_line(cell)!r} is hidden from nbval; only the tag nbval-ignore-output may be used"


def offline(notebook: dict) -> Iterator[str]:
    """No cell reaches the network, but for the first one on Colab."""
    cells = code_cells(notebook)
    if not cells or text_of(cells[0]).strip() != SETUP:
        yield "the first code cell is not the standard one, SETUP in tests/chapter_checks.py"
    for cell in cells[1:]:
        shell = re.search(r"^\s*[!%].*\b(pip|conda|wget|curl|git)\b", text_of(cell), re.MULTILINE)
        if found := _reaches_out(tree_of(cell)) or (shell and shell.group().strip()):
            yield f"the cell {first_line(cell)!r} reaches the network: {found}"


def _reaches_out(tree: ast.Module) -> str | None:
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if hits := {name.split(".")[0] for name in names} & NETWORK_MODULES:
            return f"import {hits.pop()}"
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            hub = name == "load" and ast.unparse(node.func).startswith("torch.hub")
            if name in NETWORK_CALLS or hub:
                return name
            if any(k.arg == "download" and getattr(k.value, "value", True) for k in node.keywords):
                return "download=True"
    return None


def portable(notebook: dict) -> Iterator[str]:
    if (size := len(json.dumps(notebook, indent=1, ensure_ascii=False).encode())) > MAX_BYTES:
        yield f"{size:,} bytes; at most {MAX_BYTES:,}"
    for cell in notebook["cells"]:
        texts = [text_of(cell)] + [text for _, text in output_texts(cell)] if cell["cell_type"] == "code" else [text_of(cell)]
        for text in texts:
            if found := MACHINE_PATH.search(DATA_URI.sub("", text)):
                yield f"a path of one machine, {found.group()!r}, in the cell {first_line(cell)!r}"


# ---- a reader finds their way


def headings(notebook: dict) -> list[tuple[int, str]]:
    without_code = re.sub(r"^```.*?^```", "", prose(notebook), flags=re.MULTILINE | re.DOTALL)
    return [(len(marks), title.strip()) for marks, title in re.findall(r"^(#+) (.+)$", without_code, re.MULTILINE)]


def ordered(notebook: dict) -> Iterator[str]:
    found = headings(notebook)
    if (count := sum(level == 1 for level, _ in found)) != 1 or found[0][0] != 1:
        yield f"{count} headings of the first level; expected one, at the top"
    for (above, _), (below, title) in pairwise(found):
        if below > above + 1:
            yield f"the heading {title!r} skips a level: {above} to {below}"


def opened(notebook: dict, name: str) -> Iterator[str]:
    """The first cell: what, what first, what it costs, two badges, a table of contents."""
    first = notebook["cells"][0]
    opening = text_of(first) if first["cell_type"] == "markdown" else ""
    yield from (
        f"the first cell does not say {what}" for what, pattern in OPENING.items() if not re.search(pattern, opening, re.I)
    )
    links = {
        "Colab": f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/chapters/{name}.ipynb",
        "Binder": f"https://mybinder.org/v2/gh/{REPOSITORY}/HEAD?labpath=chapters%2F{name}.ipynb",
    }
    yield from (
        f"the first cell lacks the {badge} badge to {link}" for badge, link in links.items() if f"]({link})" not in opening
    )
    for title in (title for level, title in headings(notebook) if level == 2):
        if f"(#{title.replace(' ', '-')})" not in opening:
            yield f"the table of contents lacks [{title}](#{title.replace(' ', '-')})"


def described(notebook: dict) -> Iterator[str]:
    """Every figure has its alternative text."""
    if re.search(r"!\[\s*\]\(", prose(notebook)):
        yield "a picture in the text has no alternative text"
    for cell in notebook["cells"]:
        outputs = list(output_texts(cell)) if cell["cell_type"] == "code" else []
        if any(kind.startswith("image/") for kind, _ in outputs):
            yield f"the figure of the cell {first_line(cell)!r} has no alternative text; use minildm.plot.figure or show"
        for text in [text_of(cell)] + [text for kind, text in outputs if kind == "text/html"]:
            if any(not re.search(r'\balt="[^"]*\w[^"]*"', image) for image in re.findall(r"<img\b[^>]*>", text)):
                yield f"an <img> without alternative text in the cell {first_line(cell)!r}"


def whole(notebook: dict) -> Iterator[str]:
    """Prediction, ablation, the box, the bug, the summary."""
    yield from (f"lacks {what}" for what, p in PARTS.items() if not re.search(p, prose(notebook), re.I | re.M))


def short(notebook: dict) -> Iterator[str]:
    """A cell has at most 15 lines, a statement counting as one; only a finished class or function of ours may have more."""
    for cell in code_cells(notebook):
        lines = [line for line in ast.unparse(tree_of(cell)).splitlines() if line and not re.match(r"\s*(import|from)\b", line)]
        finished = any(node.name in package_definitions() for node in definitions(tree_of(cell).body))
        if len(lines) > MAX_LINES and not finished:
            yield f"the cell {first_line(cell)!r} has {len(lines)} lines of code; at most {MAX_LINES}"


def exercises(notebook: dict) -> Iterator[str]:
    """At least two graded exercises that nbgrader understands, each with a worked solution."""
    cells = [cell for cell in notebook["cells"] if "nbgrader" in cell["metadata"]]
    marks = [cell["metadata"]["nbgrader"] for cell in cells]
    graded = [cell for cell, mark in zip(cells, marks, strict=True) if mark["grade"]]
    if len(graded) < 2:
        yield f"{len(graded)} graded cells; at least two exercises are to be graded"
    ids = [mark["grade_id"] for mark in marks]
    yield from (f"the grade id {i!r} is used {ids.count(i)} times" for i in sorted(set(ids)) if ids.count(i) > 1)
    for cell in graded:
        if not cell["metadata"]["nbgrader"].get("points", 0) > 0 or not cell["metadata"]["nbgrader"]["locked"]:
            yield f"the graded cell {first_line(cell)!r} needs points and a lock"
        if cell["cell_type"] != "code" or not asserts(tree_of(cell)):
            yield f"the graded cell {first_line(cell)!r} asserts nothing"
    solutions = [cell for cell, mark in zip(cells, marks, strict=True) if mark["solution"] and not mark["grade"]]
    if len(solutions) < len(graded):
        yield f"{len(graded)} graded cells and {len(solutions)} worked solutions"
    for cell in solutions:
        if cell["cell_type"] != "code" or not re.search(r"### BEGIN SOLUTION$.*### END SOLUTION$", text_of(cell), re.M | re.S):
            yield f"the solution cell {first_line(cell)!r} lacks ### BEGIN SOLUTION and ### END SOLUTION"


CHECKS = (
    same_code, says_what_it_builds, executed, compared, offline, portable, ordered, described, whole, short, exercises,
)  # fmt: skip

"""`make site`: the chapters and the package as pages in out/site, which need no network to be read.

    python chapters/site/build.py [FOLDER]     needs: pip install -e '.[site]'

First the sources are laid out in a folder of their own, as they lie in the repository: the front page, the chapters with what
only a page needs (solutions folded, badges as links, "chapter 05" as a link), and a page for each module.  Then Sphinx makes
the site of them, always from nothing: a warning, which is an error here, would otherwise be seen only once.
"""

import ast
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
GITHUB = "https://github.com/minildm/minildm/blob/main"
CHAPTERS = sorted((ROOT / "chapters").glob("[0-9][0-9]_*.ipynb"))
MODULES = sorted(path.stem for path in (ROOT / "minildm").glob("*.py"))
PAGES = ["README.md", "datasets/README.md", "chapters/TEACHING.md"]

BADGE = re.compile(r"\[!\[([^\]]*)\]\([^)]*\)\]\(([^)]*)\)")
LINK = re.compile(r"(?<=\]\()(?!https?:|#|mailto:)([^)#\s]+)")
ANCHOR = re.compile(r"(?<=\]\()#[^)\s]+")
CHAPTER = re.compile(r"((?s:```.*?```)|`[^`]*`|\$[^$]*\$|\[[^\]]*\]\([^)]*\)|^#.*$)|\b([Cc]hapter (\d\d))\b", re.MULTILINE)
SOLUTION = re.compile(r"^( *)### BEGIN SOLUTION\n.*?### END SOLUTION", re.DOTALL | re.MULTILINE)
WIDGET = re.compile(r"(\w+Slider|Output)\(")  # how a stored chapter names what moved while it ran
SLIDERS = "*The sliders of this cell move in the running notebook; the figure after it shows the same, standing still.*"


# ---- chapters


def with_links(text: str) -> str:
    """Text with "chapter 05" as a link to that chapter, but for headings, code, formulas and what is a link already."""
    names = {path.stem[:2]: path.name for path in CHAPTERS}

    def link(found: re.Match) -> str:
        kept, words, number = found.groups()
        return kept or (f"[{words}]({names[number]})" if number in names else words)

    return CHAPTER.sub(link, text)


def anchor(found: re.Match) -> str:
    """A link to a heading, which Jupyter names as it is written and the site as GitHub does."""
    return re.sub(r"[^\w#-]", "", found[0].lower())


def folded(cell: dict) -> dict:
    prompts = {"code_prompt_show": "Show a solution", "code_prompt_hide": "Hide the solution"}
    return cell | {"metadata": {"tags": ["hide-input"], "mystnb": prompts}}


def page_of(notebook: dict, name: str) -> dict:
    """A chapter as the site shows it.

    Args:
        notebook: as in the repository, with outputs; left as it is.
        name: its file's name.
    """
    cells = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            if not cells:
                text = BADGE.sub(r"[\1](\2) ·", text)
                text = re.sub(r"·(?=\n\n|\Z)", f"· {{download}}`Download the notebook <../notebooks/{name}>`", text, count=1)
            cells.append(cell | {"source": with_links(ANCHOR.sub(anchor, text))})
        elif "### BEGIN SOLUTION" in text:
            stub = SOLUTION.sub(r"\1...  # your code here", text)
            cells.append(cell | {"source": stub, "outputs": [], "id": cell["id"] + "-stub", "metadata": {}})
            cells.append(folded(cell))
        elif "import minildm\nexcept ImportError" in text:
            cells.append(cell | {"source": "import minildm"})  # how Colab gets it is no concern of a page
        else:
            still = [o for o in cell["outputs"] if not WIDGET.match("".join(o.get("data", {}).get("text/plain", "")))]
            cells.append(cell | {"outputs": still, "metadata": {}})
            if len(still) < len(cell["outputs"]):
                cells.append({"cell_type": "markdown", "id": cell["id"] + "-note", "metadata": {}, "source": SLIDERS})
    return notebook | {"cells": cells}


# ---- plain pages


def page_at(path: str) -> str:
    """Where a page of the repository is on the site."""
    return "index.md" if path == "README.md" else path


def resolved(text: str, path: str, source: Path) -> str:
    """A Markdown page's links: to other pages where the site has them, to the repository where not; pictures come along.

    Raises:
        FileNotFoundError: a link leads nowhere; says which.
    """

    def link(found: re.Match) -> str:
        target = (ROOT / path).parent.joinpath(found[1]).resolve()
        if not target.exists():
            raise FileNotFoundError(f"{path} links to {found[1]}, which is not there")
        inside = target.relative_to(ROOT).as_posix()
        if inside in PAGES or target in CHAPTERS:
            return "../" * path.count("/") + page_at(inside)
        if target.suffix in (".png", ".jpg", ".svg", ".gif"):
            put(source / inside, target.read_bytes())
            return found[1]
        return f"{GITHUB}/{inside}"

    return LINK.sub(link, text)


def title_of(path: Path) -> str:
    first = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
    return first.partition("\n")[0].removeprefix("# ")


def front_page(text: str, pages: list[str]) -> str:
    """README, the files in its tables as links to their modules, and the order of all pages."""

    def link(found: re.Match) -> str:
        return f"[{found[0]}](modules/{found[1]}.rst)" if found[1] in MODULES else found[0]

    text = re.sub(r"^\|.*", lambda row: re.sub(r"`(\w+)\.py`", link, row[0]), text, flags=re.MULTILINE)
    chapters = [f"{path.stem[:2]} {title_of(path)} <chapters/{path.stem}>" for path in CHAPTERS]
    beside = [page.removesuffix(".md") for page in pages if page != "README.md"]
    for caption, names in {"The chapters": chapters, "Beside them": beside, "The package": ["modules/index"]}.items():
        text += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(names) + "\n```\n"
    return text


# ---- modules


def tree_of(name: str) -> ast.Module:
    return ast.parse((ROOT / "minildm" / f"{name}.py").read_text())


def claim_of(name: str) -> str:
    """The first paragraph of a module's docstring."""
    return " ".join(ast.get_docstring(tree_of(name)).split("\n\n")[0].split())


def module_page(name: str, chapter: Path | None) -> str:
    title = "minildm" if name == "__init__" else f"minildm.{name}"
    imported = {node.module for node in ast.walk(tree_of(name)) if isinstance(node, ast.ImportFrom)}
    used = [f":doc:`{other}`" for other in MODULES if f"minildm.{other}" in imported]
    facts = [f"written in :doc:`chapter {chapter.stem[:2]} </chapters/{chapter.stem}>`"] if chapter else []
    facts += [f"imports {', '.join(used)}"] if used else []
    facts += [f"`the file <{GITHUB}/minildm/{name}.py>`__"]
    heading = name.strip("_").replace("init", "minildm") if name.startswith("__") else name
    rule = "=" * len(heading)
    return f"{heading}\n{rule}\n\n.. rst-class:: facts\n\n{' · '.join(facts)}\n\n.. automodule:: {title}\n"


def module_index(groups: dict[str, list[str]]) -> str:
    lines = ["The package", "===========", ""]
    for title, names in groups.items():
        lines += ["", title, "-" * len(title), "", ".. list-table::", "   :widths: 20 80", ""]
        for name in names:
            lines += [f"   * - :doc:`{name}`", f"     - {claim_of(name)}"]
        lines += ["", ".. toctree::", "   :hidden:", "", *[f"   {name}" for name in names]]
    return "\n".join(lines) + "\n"


# ---- all of it


def put(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def lay_out(source: Path) -> None:
    """Writes what Sphinx reads into an empty folder."""
    written_in = {}
    for path in CHAPTERS:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        written_in |= dict.fromkeys(notebook["metadata"]["minildm"]["builds"], path)
        put(source / "chapters" / path.name, json.dumps(page_of(notebook, path.name)))
        put(source / "notebooks" / path.name, path.read_bytes())
    pages = [path for path in PAGES if (ROOT / path).exists()]
    for path in pages:
        text = resolved((ROOT / path).read_text(encoding="utf-8"), path, source)
        put(source / page_at(path), front_page(text, pages) if path == "README.md" else text)
    for name in MODULES:
        put(source / "modules" / f"{name}.rst", module_page(name, written_in.get(name)))
    groups = {"Written in the chapters": [*written_in], "Around them": [name for name in MODULES if name not in written_in]}
    put(source / "modules" / "index.rst", module_index(groups))


def render(source: Path, site: Path, read: Path) -> int:
    """Has Sphinx make a site of a source; returns 0 if there was no warning.  `read` is for what Sphinx keeps in between."""
    from sphinx.cmd.build import main as sphinx  # here, so that the rest can be used without it

    strict = ["--fail-on-warning", "--keep-going", "--quiet"]
    return sphinx([*strict, "-c", str(HERE), "-d", str(read), str(source), str(site)])


def build(site: Path) -> int:
    """Makes the site in a folder, whose old content goes; returns 0 if there was no warning."""
    shutil.rmtree(site, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        lay_out(Path(folder) / "source")
        return render(Path(folder) / "source", site, Path(folder) / "read")


if __name__ == "__main__":
    site = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "out" / "site"
    if code := build(site):
        sys.exit(code)
    print(f"open {site / 'index.html'}")

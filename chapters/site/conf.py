"""Sphinx's side of the site; the pages themselves are laid out by build.py, beside this file."""

import ast
import inspect
import re
import textwrap
from dataclasses import is_dataclass

project = html_title = "minildm"
author = "the minildm authors"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx-mathjax-offline",  # MathJax from a package, not from another host
]
exclude_patterns = ["notebooks"]  # the chapters as they are in the repository, to be downloaded

nb_execution_mode = "off"  # the outputs are those stored in the notebooks, which `make test` compares with fresh ones
nb_merge_streams = True
myst_enable_extensions = ["amsmath", "dollarmath", "html_image"]
myst_heading_anchors = 4

html_theme = "sphinx_book_theme"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_favicon = "static/favicon.svg"
html_copy_source = False  # the button would hand out the page's source; each chapter links to its notebook
html_context = {"default_mode": "auto"}  # light or dark as the reader's system is, until the reader chooses
html_theme_options = {
    "repository_url": "https://github.com/minildm/minildm",
    "use_repository_button": True,
    "use_download_button": False,
    "show_toc_level": 2,
    "logo": {"text": "minildm"},
    "navbar_persistent": [],  # the search button stands in the sidebar
}

add_module_names = False
default_role = "py:obj"  # a link where a docstring's `name` is one of ours, code where it is not
autodoc_default_options = {"members": True, "special-members": "__call__, __getitem__"}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_use_rtype = False


def comments_of_fields(cls: type) -> list[str]:
    """The fields of a dataclass that are explained by comments, as the section `Args:` that other classes write."""
    source = textwrap.dedent(inspect.getsource(cls))
    lines, section = source.splitlines(), []
    for field in ast.parse(source).body[0].body:
        if isinstance(field, ast.AnnAssign):
            comment = lines[field.end_lineno - 1][field.end_col_offset :].partition("#")[2].strip()
            section.append(f"    {field.target.id}: {comment}")
    return ["", "Args:", *section] if any(line.split(": ", 1)[1:] != [""] for line in section) else []


SHAPE = r"\((?:[A-Z]|\d+|count)(?:,[ \w'*/+]+)+,?\)|\((?:[A-Z]|count),\)"
KEPT = re.compile(rf"({SHAPE}|`[^`]+`|(?<!\*)\*\w+\*(?!\*))")


def plain(line: str) -> str:
    """A line with shapes set as code, and the signs escaped that would mean something, but for `code` and *one word*."""
    parts = KEPT.split(line)
    parts[::2] = [re.sub(r"[\\*|]|(?<=\w)_(?!\w)", r"\\\g<0>", part) for part in parts[::2]]
    parts[1::2] = [f"``{part}``" if part[0] == "(" else part for part in parts[1::2]]
    return "".join(parts)


def as_restructured_text(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings here are plain text: signs that reStructuredText would read are kept as they are."""
    if what == "class" and is_dataclass(obj) and "Args:" not in lines:
        lines += comments_of_fields(obj)
    lines[:] = [plain(line) for line in lines]


def setup(app) -> None:
    app.connect("autodoc-process-docstring", as_restructured_text, priority=400)  # before napoleon's

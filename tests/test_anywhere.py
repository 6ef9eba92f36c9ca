"""The ways in: conda, a dev container, the plain commands, Colab's first cell.  Each names what is really there."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from chapter_checks import SETUP

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
CONTAINER = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8"))


def supported(version: str) -> bool:
    """Whether the package says that it runs on this Python."""
    least = PROJECT["requires-python"].removeprefix(">=")
    return [int(part) for part in version.split(".")] >= [int(part) for part in least.split(".")]


# ---- conda


def test_conda_installs_a_python_that_the_package_supports():
    (python,) = re.findall(r"- python=(\S+)", (ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert supported(python)
    assert not supported("3.9")


def test_all_is_every_extra():
    extras = dict(PROJECT["optional-dependencies"])
    assert extras.pop("all") == [f"minildm[{','.join(extras)}]"]


def test_nothing_stands_between_binder_and_the_environment():
    assert not [name for name in ("binder", ".binder", "requirements.txt", "Dockerfile") if (ROOT / name).exists()]


# ---- the dev container


def test_the_dev_container_builds_a_target_of_make():
    make, target = CONTAINER["postCreateCommand"].split()
    assert make == "make"
    assert re.search(rf"^{re.escape(target)}:", MAKEFILE, re.MULTILINE)


def test_the_dev_container_uses_the_python_that_make_sets_up():
    (path,) = re.findall(r"^PY := (\S+)", MAKEFILE, re.MULTILINE)
    assert CONTAINER["customizations"]["vscode"]["settings"]["python.defaultInterpreterPath"] == "${workspaceFolder}/" + path
    assert supported(CONTAINER["image"].split(":")[1])


# ---- without make


@pytest.mark.parametrize(("language", "python"), [("bash", ".venv/bin/python"), ("powershell", r".venv\Scripts\python")])
def test_the_plain_commands_do_what_make_does(language, python):
    section = README.split("## Without make")[1]
    commands = re.search(rf"```{language}\n(.*?)```", section, re.DOTALL)[1].replace("\\", "/").replace('"', "'")
    python = python.replace("\\", "/")
    targets = dict(re.findall(r"^(\S+):.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE))
    recipes = [re.search(r"\$\(PY\) (-m .*)", targets[name])[1] for name in (".venv/core", "demo", ".venv/all", "lab")]
    for recipe in recipes:
        plain = recipe.replace("--quiet --disable-pip-version-check --constraint", "-c").replace("--editable", "-e")
        assert f"{python} {plain}\n" in re.sub(r" +#.*", "", commands)
    assert [p for p in re.findall(r"\S*\.venv\S*", commands) if p not in (".venv", python)] == []


# ---- Colab


FIRST_CELL = r"""
import json, pathlib, sys

asked = []

class Shell:
    def system(self, command):
        asked.append(command)
        folder = pathlib.Path(command.split()[-1], "minildm")
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()

    def run_line_magic(self, name, line):
        asked.append(f"%{name} {line}")
        assert "minildm" not in sys.modules

shell = Shell()
scope = {"get_ipython": lambda: shell}
code = sys.stdin.read()
exec(code, scope)
first = list(asked)
exec(code, scope)
print(json.dumps([first, len(asked), scope["minildm"].__file__]))
"""


def test_the_first_cell_fetches_the_course_once_and_only_where_it_is_missing(tmp_path):
    transformer = pytest.importorskip("IPython.core.inputtransformer2")
    code = transformer.TransformerManager().transform_cell(SETUP)
    # no site-packages: a machine that has no minildm
    command = [sys.executable, "-I", "-S", "-c", FIRST_CELL]
    run = subprocess.run(command, input=code, cwd=tmp_path, capture_output=True, text=True, check=True)
    asked, in_all, file = json.loads(run.stdout)
    assert [line.split()[:2] for line in asked] == [["git", "clone"], ["%pip", "install"]]
    assert in_all == 2  # run again, it asks for nothing
    assert Path(file) == tmp_path / "course" / "minildm" / "__init__.py"


def test_the_first_cell_keeps_what_colab_has_if_it_is_new_enough():
    assert "--upgrade" not in SETUP
    assert "--constraint" not in SETUP
    assert all(re.fullmatch(r"[a-z]+>=[\d.]+", wanted) for wanted in PROJECT["dependencies"])  # floors, no ceilings, no pins

"""The package keeps its shape: tiers, no cycles, lazy import, small files, one list of dependencies."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from dependencies import HERE as DEPENDENCIES
from dependencies import pinned

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "minildm"
# Tier 3; within it a file may import the ones before it.
TOP = [
    "distributed",
    "latents",
    "loop",
    "train",
    "recipes",
    "report",
    "shipped",
    "personalise",
    "distill",
    "configs",
    "convert",
    "compvis",
    "adapters",
    "lora_files",
    "store",
    "pipeline",
    "__init__",
    "commands",
    "trainings",
    "__main__",
]
TIERS = {
    0: {
        "schedule",
        "blocks",
        "attention",
        "bpe",
        "guidance",
        "shapes",
        "plot",
        "checkpoint",
        "folder",
        "machine",
        "files",
        "gan",
        "scores",
        "lora",
        "flow",
        "muon",
    },
    1: {
        "tokenizer",
        "vae",
        "unet",
        "clip",
        "samplers",
        "shards",
        "perceptual",
        "inception",
        "tiling",
        "layouts",
        "dit",
        "editing",
    },
    2: {"data", "sdxl", "tensors", "vq", "metrics", "controlnet"},
    3: {*TOP},
}


def imports_of(name: str) -> set[str]:
    """The minildm modules a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"{name}.py has a relative import; write `from minildm.x import y`")
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "minildm":
            found.add(node.module.split(".")[1] if "." in node.module else "__init__")
        if isinstance(node, ast.Import):
            found |= {
                a.name.split(".")[1] if "." in a.name else "__init__" for a in node.names if a.name.split(".")[0] == "minildm"
            }
    return found


MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))


def test_every_module_has_a_tier():
    assert set(MODULES) == set().union(*TIERS.values())


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_from_below(name):
    tier = next(t for t, names in TIERS.items() if name in names)
    below = set().union(*(TIERS[t] for t in range(tier)))
    allowed = below | set(TOP[: TOP.index(name)]) if tier == 3 else below
    allowed |= {"__init__"} if name == "machine" else set()  # for the version number
    assert imports_of(name) <= allowed


@pytest.mark.parametrize("name", ["vae", "unet", "clip", "blocks", "attention", "dit", "controlnet", "lora"])
def test_models_know_nothing_of_how_they_are_used(name):
    assert not imports_of(name) & {"schedule", "samplers", "train", "data", "shapes", "pipeline", "recipes"}


def test_samplers_know_nothing_of_models():
    assert imports_of("samplers") == {"schedule"}


def test_only_the_front_doors_import_the_pipeline():
    assert {name for name in MODULES if "pipeline" in imports_of(name)} == {"__init__", "trainings"}


@pytest.mark.parametrize("name", MODULES)
def test_files_stay_small(name):
    assert len((PACKAGE / f"{name}.py").read_text().splitlines()) <= 320


def test_the_package_never_imports_what_it_is_measured_against():
    for name in MODULES:
        tree = ast.parse((PACKAGE / f"{name}.py").read_text())
        roots = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        roots |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
        assert not roots & {"diffusers", "transformers", "peft", "lpips", "torchmetrics", "open_clip", "torch_fidelity"}


def test_import_is_lazy():
    code = "import sys, minildm; print(sorted({'torch', 'numpy', 'matplotlib', 'PIL'} & sys.modules.keys()))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_the_command_line_answers_help_without_importing_torch():
    code = "import sys, minildm.__main__ as m; m._parser(); print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"


def test_every_target_of_make_has_its_script():
    makefile = (ROOT / "Makefile").read_text()
    scripts = re.findall(r"\$\(PY\) (\S+\.py)", makefile)
    assert scripts
    assert [s for s in scripts if not (ROOT / s).exists()] == []


def test_constraints_pin_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    named = project["dependencies"] + extras["notebooks"] + extras["test"]
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    assert {n.split(">=")[0].lower().replace("_", "-") for n in named} <= pinned


def test_lock_and_licences_are_of_the_tested_set():
    tested = pinned()
    locked = re.findall(r"^(\S+)==(\S+) --hash=sha256:[0-9a-f]{64}$", (DEPENDENCIES / "lock.txt").read_text(), re.MULTILINE)
    assert dict(locked).items() <= tested.items()
    assert len(locked) > 100
    listed = re.findall(r"^\| (\S+) \| (\S+) \| \S", (DEPENDENCIES / "licences.md").read_text(), re.MULTILINE)
    assert {name: version for name, version in listed if name not in ("package", "---")} == tested


def test_conda_has_no_second_list_of_dependencies():
    lines = [line.strip() for line in (ROOT / "environment.yml").read_text().splitlines() if line.strip().startswith("- ")]
    assert lines == ["- conda-forge", "- python=3.12", "- pip", "- pip:", "- -e .[all]"]

"""What this project stands on: kept exact, with hashes and licences, and tried against what is newest.

    python tests/dependencies.py lock       constraints.txt as a lock file with hashes, tests/dependencies/lock.txt
    python tests/dependencies.py licences   the licence of each, as its package states it, tests/dependencies/licences.md
    python tests/dependencies.py newest     a fresh environment without constraints, in which the tests are run
    python tests/dependencies.py audit      known weaknesses of the tested set, by pip-audit, which asks PyPI

`newest` is for a schedule: it ends with 1 where something breaks, and says which versions differ from the tested ones.
"""

import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
HERE = Path(__file__).parent / "dependencies"
WANTED = ["--editable", f"{ROOT}[notebooks,test,class,site]"]


def pinned() -> dict[str, str]:
    """The tested set: names, as PyPI normalises them, to versions."""
    lines = [line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    return {normal(name): version.strip() for name, version in lines}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def lock() -> int:
    """Asks pip what it would install, and writes down the hash of each file."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--dry-run",
            "--ignore-installed",
            "--report",
            str(report),
        ]
        subprocess.run([*command, "--constraint", str(ROOT / "constraints.txt"), *WANTED], check=True)
        found = json.loads(report.read_text())["install"]
    lines = []
    for item in found:
        if "archive_info" in item["download_info"]:  # not this project itself
            name, version = normal(item["metadata"]["name"]), item["metadata"]["version"]
            lines.append(f"{name}=={version} --hash=sha256:{item['download_info']['archive_info']['hashes']['sha256']}")
    HERE.mkdir(exist_ok=True)
    head = "# The tested set with hashes (Linux x86_64, Python 3.11), by `python tests/dependencies.py lock`.\n"
    head += "# pip install --require-hashes --no-deps -r tests/dependencies/lock.txt && pip install --no-deps -e .\n"
    (HERE / "lock.txt").write_text(head + "\n".join(sorted(lines)) + "\n")
    return 0


def licence_of(name: str) -> str:
    """What an installed package states of its licence, in a few words."""
    about = importlib.metadata.metadata(name)
    kinds = [kind.split("::")[-1].strip() for kind in about.get_all("Classifier", []) if kind.startswith("License ::")]
    stated = about.get("License-Expression") or ", ".join(kinds) or (about.get("License") or "").strip().split("\n")[0]
    return stated[:80] or "not stated"


def licences() -> int:
    """Writes a table of everything in constraints.txt that is installed here."""
    rows = []
    for name, version in sorted(pinned().items()):
        try:
            rows.append(f"| {name} | {version} | {licence_of(name)} |")
        except importlib.metadata.PackageNotFoundError:
            print(f"{name} is not installed here", file=sys.stderr)
            return 1
    HERE.mkdir(exist_ok=True)
    head = "# Licences of the tested set\n\nBy `python tests/dependencies.py licences`, as each package states it.\n"
    head += "None of it is part of this repository.\n\n| package | version | licence |\n|---|---|---|\n"
    (HERE / "licences.md").write_text(head + "\n".join(rows) + "\n")
    return 0


def newest() -> int:
    """Installs what is newest in a fresh environment, says what differs, and runs the tests there."""
    with tempfile.TemporaryDirectory() as folder:
        python = str(Path(folder) / "bin" / "python")
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--upgrade", *WANTED], check=True)
        listed = subprocess.run([python, "-m", "pip", "list", "--format", "json"], check=True, capture_output=True, text=True)
        there, tested = {normal(p["name"]): p["version"] for p in json.loads(listed.stdout)}, pinned()
        for name in sorted(there.keys() & tested.keys()):
            if there[name] != tested[name]:
                print(f"{name}: tested {tested[name]}, newest {there[name]}", flush=True)
        return subprocess.run([python, str(ROOT / "tests" / "run.py")], cwd=ROOT).returncode


def audit() -> int:
    """Asks PyPI, through pip-audit, for known weaknesses."""
    if importlib.util.find_spec("pip_audit") is None:
        print("pip install pip-audit first", file=sys.stderr)
        return 2
    command = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "--strict", "-r", str(ROOT / "constraints.txt")]
    return subprocess.run(command).returncode


if __name__ == "__main__":
    tasks = {"lock": lock, "licences": licences, "newest": newest, "audit": audit}
    if len(sys.argv) != 2 or sys.argv[1] not in tasks:
        sys.exit(__doc__)
    sys.exit(tasks[sys.argv[1]]())

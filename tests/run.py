"""`make test`: lint, then every test that needs no full-size model, two processes side by side."""

import os
import subprocess
import sys
from pathlib import Path

PYTHON = [sys.executable, "-m"]
CHAPTERS = sorted(str(path) for path in Path("chapters").glob("[0-9][0-9]_*.ipynb"))
STEPS = (  # tests in a new order each time; the seed is printed first: pytest -p randomly --randomly-seed=N repeats it
    [*PYTHON, "ruff", "check", "."],
    [*PYTHON, "ruff", "format", "--check", "."],
    [*PYTHON, "pytest", "-p", "randomly", "-n", "2", "--dist", "loadfile", "-m", "not slow", "--durations", "10",
     "--cov", "minildm", "--cov-report", "term-missing:skip-covered", "--cov-fail-under", "90"],
    # Every chapter, run anew from its first cell, puts out what is stored in it; each in a process of its own.
    [*PYTHON, "pytest", "--nbval", "--nbval-sanitize-with", "tests/nbval.cfg", "--nbval-current-env",
     "--nbval-cell-timeout", "180", "-x", "-n", "2", "--dist", "loadfile", "--durations", "5", *CHAPTERS] if CHAPTERS else [],
)  # fmt: skip

if __name__ == "__main__":
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # two processes of one thread: more would wait for each other
    for step in filter(None, STEPS):
        print("+", " ".join(step[1:]), flush=True)
        offline = {"PYTHONPATH": str(Path("tests/offline").absolute())} if "--nbval" in step else {}  # its kernels reach nobody
        if code := subprocess.run(step, env=os.environ | threads | offline).returncode:
            sys.exit(code)

"""`make test`: lint, then every test that needs no full-size model, two processes side by side."""

import os
import subprocess
import sys

PYTHON = [sys.executable, "-m"]
STEPS = (
    [*PYTHON, "ruff", "check", "."],
    [*PYTHON, "ruff", "format", "--check", "."],
    [*PYTHON, "pytest", "-n", "2", "--dist", "loadfile", "-m", "not slow", "--durations", "10",
     "--cov", "minildm", "--cov-report", "term-missing:skip-covered", "--cov-fail-under", "90"],
)  # fmt: skip

if __name__ == "__main__":
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # two processes of one thread: more would wait for each other
    for step in STEPS:
        print("+", " ".join(step[1:]), flush=True)
        if code := subprocess.run(step, env=os.environ | threads).returncode:
            sys.exit(code)

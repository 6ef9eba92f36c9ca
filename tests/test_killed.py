"""A training that is killed at any moment, again and again, ends as if nobody had touched it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "killed.py"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the children are forks")
@pytest.mark.parametrize("kills", [8, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments_a_run_ends_with_the_same_bits(tmp_path, kills):
    answer = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path / "run"), str(kills), "0"],
        capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    said = json.loads(answer.stdout)
    assert said["killed"] == kills
    assert said["same_bits"]
    assert said["left_behind"] == []
    assert kills < 50 or said["while_writing"] >= 3, "no kill hit a write: draw other moments"

"""The command line under torchrun: two processes make the model that one makes, and so they do if one of them is killed."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_distributed import learned

from minildm import train
from minildm.__main__ import main

ARGV = [
    "train", "shapes", "--vae-steps", "4", "--word-steps", "4", "--steps", "10", "--pictures", "150", "--save-every", "4",
    "--seed", "2", "--quiet",
]  # fmt: skip
LABELS = ["autoencoder", "encoding", "text encoder", "diffusion"]


def listening(losses: dict[str, list], after_step: Callable = lambda label, step: None) -> Callable:
    """A `watch` that writes down the losses by stage."""

    def heard(progress: Iterator, label: str):
        losses[label] = []
        while True:
            try:
                p = next(progress)
            except StopIteration as end:
                return end.value
            losses[label].append(p.loss)
            after_step(label, p.step)
            yield p

    watch = train.watch
    return lambda progress, label, quiet=False: watch(heard(progress, label), label, quiet)


def in_every_process(out: Path, kill: str) -> int:
    """What `torchrun` runs: the command line; its losses, by process, into the folder."""

    def after_step(label: str, step: int) -> None:
        here = label == "diffusion" and step == 6 and os.environ["RANK"] == kill
        if here and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)

    losses = {}
    train.watch = listening(losses, after_step)
    code = main([*ARGV, "--out", str(out)])
    (out / f"losses-{os.environ['RANK']}.json").write_text(json.dumps(losses))
    return code


def torchrun(*command: str) -> subprocess.CompletedProcess:
    """Two processes, which meet on this machine."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1]), "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    here = ["--standalone", "--local-addr", "127.0.0.1"]
    return subprocess.run([*start, *here, *command], env=environment, capture_output=True, text=True, timeout=170)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def losses(out: Path, rank: int) -> dict[str, list]:
    return json.loads((out / f"losses-{rank}.json").read_text())


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The folder of one process, and its losses."""
    out, losses = tmp_path_factory.mktemp("one"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "watch", listening(losses))
        assert main([*ARGV, "--out", str(out)]) == 0
    return out, losses


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of two processes."""
    out = tmp_path_factory.mktemp("two")
    done = torchrun(__file__, str(out), "nobody")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "arning" not in done.stderr
    assert done.stdout.count("real pictures, reconstructions and samples are in") == 1
    return out


def test_two_processes_make_the_model_of_one(one, two):
    out, alone = one
    assert [*alone] == LABELS
    for rank in range(2):
        shared = losses(two, rank)
        for label in ("autoencoder", "text encoder", "diffusion"):
            assert shared[label] == pytest.approx(alone[label], abs=1e-5), label
        assert len(shared["encoding"]) == 1 < len(alone["encoding"])  # batches of 128 pictures, two at a time
    torch.testing.assert_close(learned(weights(two)), learned(weights(out)), atol=1e-5, rtol=0)
    assert (two / "model" / "recipe.json").read_bytes() == (out / "model" / "recipe.json").read_bytes()
    assert {p.name for p in two.iterdir()} == {"model", "grid.png", "losses-0.json", "losses-1.json"}


def test_in_pieces_in_parts_and_computed_twice_it_is_the_same_model(one, tmp_path):
    options = ["--parallel", "fsdp", "--accumulate", "2", "--recompute"]
    done = torchrun("-m", "minildm", *ARGV, "--out", str(tmp_path), *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "arning" not in done.stderr
    assert done.stdout.count("\n") == 2
    torch.testing.assert_close(learned(weights(tmp_path)), learned(weights(one[0])), atol=1e-5, rtol=0)


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_one_of_two_is_killed_and_both_are_started_again(two, tmp_path, rank):
    done = torchrun("--max-restarts", "1", __file__, str(tmp_path), str(rank))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Signal 9 (SIGKILL)" in done.stderr or "exitcode: -9" in done.stderr
    assert losses(tmp_path, 0)["autoencoder"] == losses(tmp_path, 0)["text encoder"] == []  # these were finished
    assert losses(tmp_path, 0)["diffusion"] == losses(two, 0)["diffusion"][4:]  # and this went on from the newest checkpoint
    ended = weights(tmp_path)
    assert all(torch.equal(ended[name], tensor) for name, tensor in weights(two).items())


def test_a_process_says_what_it_could_not_do(tmp_path):
    done = torchrun("-m", "minildm", "train", "nothing", "--out", str(tmp_path))
    assert done.returncode == 1
    assert "error: no dataset and no folder is called 'nothing'" in done.stderr
    assert list(tmp_path.iterdir()) == []


if __name__ == "__main__":
    sys.exit(in_every_process(Path(sys.argv[1]), sys.argv[2]))

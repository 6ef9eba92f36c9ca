"""A training that is killed again and again, at random moments, some of them while it writes, and always started once more.

    python tests/killed.py FOLDER KILLS SEED

trains a small network in a child process, kills it with SIGKILL `KILLS` times and then lets it end; prints, as JSON, how often
it was killed, how often in the middle of a write, whether its weights are those of a run that nobody disturbed, to the bit, and
what lies in the folder beside the last two checkpoints.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

from minildm.train import Fit, fit, step_generator

CFG = Fit(steps=120, lr=1e-2, warmup=3, ema=0.9, save_every=1)


def train(folder: Path | None) -> nn.Module:
    """The whole run, or what is left of it."""
    torch.set_num_threads(1)
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 512, 1), nn.GroupNorm(2, 512), nn.Conv2d(512, 512, 1), nn.Conv2d(512, 3, 1)]  # writes take long
    model = nn.Sequential(*layers)

    def loss_at(step: int) -> tuple[torch.Tensor, dict]:
        x = torch.randn(2, 3, 8, 8, generator=step_generator(0, step))
        return (model(x) - x).square().mean(), {}

    for _ in fit(model, loss_at, CFG, folder):
        pass
    return model


def live(folder: Path, seconds: float | None) -> bool:
    """One life of the training in a process of its own, killed after so many seconds; whether it came to its end before."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            torch.save({name: p.detach() for name, p in train(folder).named_parameters()}, folder.with_suffix(".pt"))
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError("the training failed; see above")
    return os.WIFEXITED(status)


def main(folder: Path, kills: int, seed: int) -> dict:
    draw, killed, while_writing, seen = random.Random(seed), 0, 0, set()
    undisturbed = dict(train(None).named_parameters())  # here, so that the children find everything imported
    start = time.perf_counter()
    live(folder.with_name("timed"), None)
    whole = time.perf_counter() - start
    while killed < kills:
        if live(folder, draw.uniform(0, 4 * whole / kills)):
            folder.with_suffix(".pt").unlink()  # it came to its end too soon: once more from the start
            for path in folder.iterdir():
                path.unlink()
            continue
        killed += 1
        halves = {path.name for path in folder.glob(".*")}
        while_writing, seen = while_writing + bool(halves - seen), halves
    assert live(folder, None)
    ended = torch.load(folder.with_suffix(".pt"), weights_only=True)
    same = all(torch.equal(ended[name], p) for name, p in undisturbed.items())
    kept = {f"step-{step:07}.{ending}" for step in (CFG.steps - 1, CFG.steps) for ending in ("json", "safetensors")}
    left = sorted(path.name for path in folder.iterdir() if path.name not in kept)
    return {"killed": killed, "while_writing": while_writing, "same_bits": same, "left_behind": left}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))

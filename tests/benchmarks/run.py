"""`make bench`: ours and the reference library side by side on this machine, alternating, as medians and ratios.

Measurements, not tests: nothing here passes or fails.  Writes out/bench.json.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from minildm.checkpoint import write_atomically
from minildm.machine import machine
from minildm.unet import UNet, UNetConfig

ROUNDS = 9


def medians(**contestants) -> dict[str, float]:
    """Seconds of each, taken in turns so that a busy moment hits all alike."""
    seconds = {name: [] for name in contestants}
    for _ in range(ROUNDS):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s[1:]) for name, s in seconds.items()}  # the first round warms up


def imports() -> dict[str, float]:
    """A fresh Python that imports torch alone, and one that imports minildm and torch."""

    def fresh(code: str):
        return lambda: subprocess.run([sys.executable, "-c", code], check=True)

    return medians(ours=fresh("import torch, minildm"), reference=fresh("import torch"))


def unet_step() -> dict[str, float]:
    """Forward and backward of a small U-Net on 16 latents of 16 x 16, in the shape that both libraries have."""
    from diffusers import UNet2DConditionModel

    ours = UNet(UNetConfig(widths=(64, 128), depths=(1, 1), heads=(4, 4), blocks=1, context_dim=128, groups=16))
    reference = UNet2DConditionModel(
        sample_size=16, block_out_channels=(64, 128), layers_per_block=1, attention_head_dim=4, cross_attention_dim=128,
        norm_num_groups=16, down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
    )  # fmt: skip
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in reference.parameters())
    ours = ours.to(memory_format=torch.channels_last)
    x, t, context = torch.randn(16, 4, 16, 16), torch.randint(1000, (16,)), torch.randn(16, 24, 128)
    return medians(
        ours=lambda: ours(x.contiguous(memory_format=torch.channels_last), t, context).square().mean().backward(),
        reference=lambda: reference(x, t, context).sample.square().mean().backward(),
    )


if __name__ == "__main__":
    report = {"machine": machine(), "threads": torch.get_num_threads(), "seconds": {}, "ours / reference": {}}
    for measure in (imports, unet_step):
        seconds = measure()
        report["seconds"][measure.__name__] = seconds
        report["ours / reference"][measure.__name__] = seconds["ours"] / seconds["reference"]
        print(f"{measure.__name__:12} {seconds['ours']:.3f} s against {seconds['reference']:.3f} s: "
              f"{seconds['ours'] / seconds['reference']:.2f}")  # fmt: skip
    write_atomically(Path("out/bench.json"), lambda path: path.write_text(json.dumps(report, indent=1)))

"""Peak memory, each time in a Python of its own: what a training step and a decoding need above the imported libraries.

On a CPU that is the most that the process ever held, less what it held before the network was made; on a GPU the most that
PyTorch had allocated there.
"""

import contextlib
import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from timing import DEVICE, HAS_REFERENCE, OURS, REFERENCE, compared

MIB = 2**20
# Freed memory goes back at once; else glibc learns to keep some, how much depends on the order of allocations.
STEADY = {"MALLOC_MMAP_THRESHOLD_": str(2**17), "MALLOC_TRIM_THRESHOLD_": str(2**17)}


def held(field: str = "VmHWM") -> float:
    """The most that this process has held so far, or with "VmRSS" what it holds now, in MiB."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / MIB
    status = Path("/proc/self/status")
    if status.exists():  # not ru_maxrss, which on Linux begins with the parent's
        return int(re.search(rf"{field}:\s+(\d+)", status.read_text())[1]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (MIB if sys.platform == "darwin" else 1024)


def held_now() -> float:
    """What this process holds, after all that is free has gone back."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)
    return held("VmRSS")


def child(task: str, library: str, index: int, quick: bool) -> None:
    """Runs a task small, so that all code has been read, then in earnest, and prints what that took."""
    import networks

    from minildm.vae import VAEConfig

    setting = networks.SETTINGS[index]
    if task == "decode":
        decoding(VAEConfig(widths=(32, 32)), library, setting, 8)
    else:
        training(library, setting, 1, 8)
    before = held_now()
    if task == "decode":
        decoding(VAEConfig.sd15(), library, setting, 16 if quick else 64)
    else:
        training(library, setting, 4 if quick else 32, 32)
    print(json.dumps(held() - before))


def made(cfg: object, library: str, setting: object) -> torch.nn.Module:
    """One library's network on the device, in a setting's memory format."""
    import networks

    from minildm.unet import UNet, UNetConfig
    from minildm.vae import AutoencoderKL

    ours = UNet if isinstance(cfg, UNetConfig) else AutoencoderKL
    network = (networks.reference_of(cfg) if library == REFERENCE else ours(cfg)).to(DEVICE)
    return network.to(memory_format=torch.channels_last) if setting.channels_last else network


def decoding(cfg: object, library: str, setting: object, side: int) -> None:
    """Makes an autoencoder and decodes a latent, twice."""
    import networks

    network = made(cfg, library, setting).to(setting.dtype).eval()
    z = networks.laid_out(torch.randn(1, 4, side, side).to(setting.dtype), setting)
    with torch.inference_mode():
        for _ in range(2):
            network.decode(z)


def training(library: str, setting: object, batch: int, side: int) -> None:
    """Makes a small U-Net and an optimiser, and takes two steps."""
    import networks

    network = made(networks.SMALL, library, setting).train()
    optimizer = torch.optim.AdamW(network.parameters(), fused=library == OURS or None)
    step = networks.step_of(network, setting, networks.given(networks.SMALL, batch, side, 24, setting, half=False), optimizer)
    for _ in range(2):
        step()


def peak(task: str, quick: bool, rounds: int) -> dict[str, list[float]]:
    """MiB of every contestant in every round."""
    import networks

    taken = {}
    for _ in range(rounds):
        for index, setting in enumerate(networks.SETTINGS):
            for library in () if setting.compiled else (OURS, REFERENCE) if HAS_REFERENCE else (OURS,):
                words = [sys.executable, __file__, task, library, str(index), "quick" * quick]
                answer = subprocess.run(words, check=True, capture_output=True, text=True, env=os.environ | STEADY).stdout
                taken.setdefault(f"{library}, {setting}", []).append(json.loads(answer.splitlines()[-1]))
    return taken


def memory_training(quick: bool) -> dict:
    """Two training steps of the small U-Net on 32 latents of 32 x 32: weights, gradients, AdamW and all that is kept."""
    return compared(memory_training.__doc__, peak("training", quick, 1 if quick else 2), goal=1.0, unit="MiB")


def memory_decode(quick: bool) -> dict:
    """Stable Diffusion's autoencoder made, and a latent of 64 x 64 decoded to 512 x 512."""
    return compared(memory_decode.__doc__, peak("decode", quick, 1), goal=1.0, unit="MiB")


if __name__ == "__main__":
    child(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "quick")

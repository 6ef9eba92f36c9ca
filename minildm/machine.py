"""The machine: which device to compute on, and what a measured figure needs beside it to mean something."""

import contextlib
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from minildm import __version__

if TYPE_CHECKING:
    import torch


def best_device() -> "torch.device":
    """CUDA if there is one, else Apple's MPS, else the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def conv_format(device: "torch.device") -> "torch.memory_format":
    """The order in memory in which pictures are convolved: channels_last, which is the faster one, but not on MPS.

    There torch has computed it wrongly more than once: its issues 142344 (gradients) and 180984 (slices of channels).
    """
    import torch

    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def machine() -> dict[str, str]:
    """What a figure needs beside it to mean something."""
    import torch

    peak = "unknown"
    with contextlib.suppress(ImportError):
        import resource  # not on Windows

        peak = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == 'darwin' else 2**20):.2f} GiB"
    return {
        "minildm": __version__, "torch": torch.__version__, "python": platform.python_version(), "system": platform.platform(),
        "processor": f"{_processor()}, {os.cpu_count()} cores", "peak_memory": peak,
    }  # fmt: skip


def python() -> str:
    """This Python as one would type it here."""
    path = Path(sys.executable)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name


def _processor() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()

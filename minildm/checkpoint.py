"""Files that are never half written, and training states that can be taken up again.

Whatever is written goes to a file beside and is renamed over when it is whole.  A checkpoint is one safetensors file and a
small JSON that vouches for it; the last two are kept, so that a damaged one costs some minutes and not the run.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a file beside `path`, then renames it over: the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        write(beside)
        with open(beside, "rb") as f:
            os.fsync(f.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def save_checkpoint(folder: Path, step: int, parameters: dict, average: dict, optimizer: torch.optim.Optimizer) -> None:
    """Writes step-N.safetensors, then step-N.json, which vouches for it; keeps this checkpoint and the one before."""
    tensors = {f"model.{n}": p.detach() for n, p in parameters.items()} | {f"average.{n}": a for n, a in average.items()}
    for name, p in parameters.items():
        tensors |= {f"optimizer.{key}.{name}": v for key, v in optimizer.state[p].items()}
    tensors = {name: t.cpu().contiguous() for name, t in tensors.items()}
    path = folder / f"step-{step:07d}.safetensors"
    write_atomically(path, lambda beside: save_file(tensors, beside))
    note = json.dumps({"step": step, "bytes": path.stat().st_size, "torch": torch.__version__})
    write_atomically(path.with_suffix(".json"), lambda beside: beside.write_text(note))
    for old in sorted(folder.glob("step-*.json"))[:-2]:
        old.unlink()
        old.with_suffix(".safetensors").unlink(missing_ok=True)


def resume(folder: Path, parameters: dict, average: dict, optimizer: torch.optim.Optimizer) -> int:
    """Takes up the newest whole checkpoint in a folder and returns its step; 0 if there is none.

    Raises:
        ValueError: the checkpoint is of another model.
    """
    for note in sorted(folder.glob("step-*.json"), reverse=True):
        path = note.with_suffix(".safetensors")
        try:
            step, size = (json.loads(note.read_text())[key] for key in ("step", "bytes"))
            if path.stat().st_size != size:
                raise ValueError(f"{path.stat().st_size} bytes, not {size}")
            with safe_open(path, framework="pt") as f:
                tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            tqdm.write(f"{path} is damaged ({error}); falling back to the checkpoint before it")
            continue
        _restore(path, tensors, parameters, average, optimizer)
        return step
    return 0


def _restore(path: Path, tensors: dict, parameters: dict, average: dict, optimizer: torch.optim.Optimizer) -> None:
    found = {n.removeprefix("model."): tuple(t.shape) for n, t in tensors.items() if n.startswith("model.")}
    wanted = {n: tuple(p.shape) for n, p in parameters.items()}
    if found != wanted:
        odd = sorted(n for n in found.keys() | wanted.keys() if found.get(n) != wanted.get(n))
        raise ValueError(
            f"{path} is a checkpoint of another model: {len(odd)} tensors differ, {odd[0]} first; use another folder"
        )
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(tensors[f"model.{name}"])
            average[name].copy_(tensors[f"average.{name}"])
            state = {key: tensors[f"optimizer.{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            optimizer.state[p] = {
                k: v if k == "step" else v.to(p).contiguous(memory_format=_format(p)) for k, v in state.items()
            }


def _format(p: Tensor) -> torch.memory_format:
    """How a parameter lies in memory, which the optimizer's fused step wants its moments to share."""
    return (
        torch.channels_last if p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    )

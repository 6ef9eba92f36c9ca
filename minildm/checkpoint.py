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
from torch import Tensor, nn
from tqdm import tqdm


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a file beside `path`, then renames it over: the old file or the new one, never half of one.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        write(beside)
        with open(beside, "r+b") as f:
            os.fsync(f.fileno())
        os.umask(umask := os.umask(0))
        beside.chmod(0o666 & ~umask)  # safetensors makes files that only their owner may read
        os.replace(beside, path)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        beside.unlink(missing_ok=True)


def save_checkpoint(
    folder: Path, step: int, settings: dict, model: nn.Module, average: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Writes step-N.safetensors, then step-N.json, which vouches for it; keeps this checkpoint and the one before.

    Args:
        folder: made if it is missing.
        step: steps done.
        settings: what the run was started with; a run with others will not take the checkpoint up.
        model: its weights, trained or not, and its buffers.
        average: averages of its trained weights, by name.
        optimizer: over the trained weights, in the order of `average`.
    """
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    tensors |= {f"average.{name}": t for name, t in average.items()}
    for name, state in zip(average, _states(optimizer), strict=True):
        tensors |= {f"optimizer.{name}.{key}": t for key, t in state.items()}
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    path = folder / f"step-{step:07d}.safetensors"
    write_atomically(path, lambda beside: save_file(tensors, beside))
    note = json.dumps({"step": step, "bytes": path.stat().st_size, "settings": settings})
    write_atomically(path.with_suffix(".json"), lambda beside: beside.write_text(note))
    for old in sorted(folder.glob("step-*.json"))[:-2]:
        old.unlink()
        old.with_suffix(".safetensors").unlink(missing_ok=True)


def resume(folder: Path, settings: dict, model: nn.Module, average: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Takes up the newest whole checkpoint in a folder and returns its step; 0 if there is none.

    What a killed run left half written there is cleared away: a folder of checkpoints has one writer.

    Raises:
        ValueError: the checkpoint is of another model, or of a run with other settings.
    """
    for half in [*folder.glob(".*-step-*"), *folder.glob(".tmp*")]:  # ours, and what safetensors writes beside that
        half.unlink(missing_ok=True)
    for note in sorted(folder.glob("step-*.json"), reverse=True):
        path = note.with_suffix(".safetensors")
        try:
            step, size, started_with = (json.loads(note.read_text())[key] for key in ("step", "bytes", "settings"))
            if note.stem != f"step-{step:07d}":
                raise ValueError(f"its note is of step {step}")
            if path.stat().st_size != size:
                raise ValueError(f"{path.stat().st_size} bytes, not {size}")
            with safe_open(path, framework="pt") as f:
                tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            tqdm.write(f"{path} is damaged ({error}); falling back to the checkpoint before it")
            continue
        if differ := sorted(k for k in settings.keys() | started_with.keys() if settings.get(k) != started_with.get(k)):
            raise ValueError(f"{path} is of a run with another {', '.join(differ)}; give the same again, or use another folder")
        _restore(path, tensors, model, average, optimizer)
        return step
    return 0


def _restore(
    path: Path, tensors: dict[str, Tensor], model: nn.Module, average: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    found = {n.removeprefix("model."): tuple(t.shape) for n, t in tensors.items() if n.startswith("model.")}
    wanted = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    if odd := sorted(n for n in found.keys() | wanted.keys() if found.get(n) != wanted.get(n)):
        raise ValueError(
            f"{path} is a checkpoint of another model: {len(odd)} tensors differ, {odd[0]} first; use another folder"
        )
    model.load_state_dict({name: tensors[f"model.{name}"] for name in wanted})
    trained, states = dict(model.named_parameters()), {}
    for i, name in enumerate(average):
        average[name].copy_(tensors[f"average.{name}"])
        of_this = {key: t for key, t in tensors.items() if key.startswith(f"optimizer.{name}.")}
        # moments must lie in memory as their parameter does; the step is a single number
        states[i] = {
            key.rpartition(".")[2]: torch.empty_like(trained[name]).copy_(t) if t.ndim else t.clone()
            for key, t in of_this.items()
        }
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": {i: s for i, s in states.items() if s}, "param_groups": groups})


def _states(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    """What the optimizer remembers of each parameter; nothing of one that never had a gradient."""
    return [optimizer.state.get(p, {}) for group in optimizer.param_groups for p in group["params"]]

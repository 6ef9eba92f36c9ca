"""Files that are never half written, and training states that can be taken up again.

Whatever is written goes to a file beside and is renamed over when it is whole.  A checkpoint is one safetensors file and a
small JSON that vouches for it; the last two are kept, so that a damaged one costs some minutes and not the run.
"""

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    beside = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(beside)
            with open(beside, "r+b") as f:
                os.fsync(f.fileno())
            os.umask(umask := os.umask(0))
            beside.chmod(0o666 & ~umask)  # safetensors makes files that only their owner may read
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write {path} ({error}); make room there, or choose a folder that can be written") from error


@contextmanager
def held_back() -> Iterator[list[int]]:
    """While it lasts, a first Ctrl-C is noted in the list that it gives, so that a step can end; a second stops at once."""
    pressed = []

    def hold(number: int, frame: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ours = ours and threading.current_thread() is threading.main_thread()
    if ours:  # else there is none to hold back, or somebody else sees to it
        signal.signal(signal.SIGINT, hold)
    try:
        yield pressed
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


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

    Raises:
        OSError: it cannot be written; the checkpoints before it are as they were.
    """
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    tensors |= {f"average.{name}": t for name, t in average.items()}
    for name, state in zip(average, _states(optimizer), strict=True):
        tensors |= {f"optimizer.{name}.{key}": t for key, t in state.items()}
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    path = folder / f"step-{step:07d}.safetensors"
    try:
        write_atomically(path, lambda beside: save_file(tensors, beside))
        note = json.dumps({"step": step, "bytes": path.stat().st_size, "settings": settings})
        write_atomically(path.with_suffix(".json"), lambda beside: beside.write_text(note))
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OSError(f"{error}; started again, the run goes on from its checkpoint before step {step}") from error
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
    for path in folder.glob("step-*.safetensors"):
        if not path.with_suffix(".json").exists():  # nothing vouches for it
            path.unlink(missing_ok=True)
    for note in sorted(folder.glob("step-*.json"), reverse=True):
        path = note.with_suffix(".safetensors")
        try:
            step, size, started_with = (json.loads(note.read_text())[key] for key in ("step", "bytes", "settings"))
            if note.stem != f"step-{step:07d}" or not isinstance(started_with, dict):
                raise ValueError(f"its note is of step {step}, with settings {started_with}")
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
    trained, states = dict(model.named_parameters()), {}
    found = {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()}
    wanted = {f"model.{n}": t for n, t in model.state_dict().items()} | {f"average.{n}": t for n, t in average.items()}
    wanted = {n: (tuple(t.shape), t.dtype) for n, t in wanted.items()}
    for name, (_, dtype) in found.items():  # the optimizer has a step, a single number, and moments like their parameter
        of_which = name.removeprefix("optimizer.").rpartition(".")[0]
        if name.startswith("optimizer.") and of_which in average:
            wanted[name] = ((), torch.float32) if name.endswith(".step") else (tuple(trained[of_which].shape), dtype)
    if odd := sorted(n for n in found.keys() | wanted.keys() if found.get(n) != wanted.get(n)):
        raise ValueError(
            f"{path} is a checkpoint of another model: {len(odd)} tensors differ, {odd[0]} first; use another folder"
        )
    model.load_state_dict({name: tensors[f"model.{name}"] for name in model.state_dict()})
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

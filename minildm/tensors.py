"""Files of weights, opened before they are read, and networks filled from them.

A tensor in a file is known by its name and shape; it stays on disk until every name and shape has been found right.  Then it
is memory-mapped into a network that was built without memory, so that loading needs one copy, or none.
"""

import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minildm.layouts import NOT_WEIGHTS, SPELLINGS, Table, names, rename


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, not yet read."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


class Inert:
    """Stands in a pickle for what the training programs of the first checkpoints left beside the weights; it does nothing."""

    def __init__(self, *args) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


# What those files name, and no more: each becomes an Inert, nothing of theirs is imported or called.
LEFT_BESIDE = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint", "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar", "numpy.dtype",
)  # fmt: skip


def open_weights(path: Path) -> dict[str, Stored]:
    """Opens a file of tensors without reading them: safetensors, or a pickle that holds nothing but data.

    Args:
        path: a `.safetensors`, or a `.ckpt`, `.bin`, `.pt` or `.pth`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or a pickle that would run code; nothing of it has been run.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    if path.suffix == ".safetensors":
        try:
            file = safe_open(path, framework="pt")
            return {
                name: Stored(tuple(file.get_slice(name).get_shape()), partial(file.get_tensor, name))
                for name in file.keys()  # noqa: SIM118
            }
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged or no safetensors file ({error}); fetch it again") from error
    try:
        with torch.serialization.safe_globals([(Inert, name) for name in LEFT_BESIDE]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0].split(". ")[0]
        raise ValueError(
            f"{path} is damaged, or a pickle with more than tensors in it, which could run code and was not opened ({reason}); "
            "look for the same model as .safetensors"
        ) from error
    except Exception as error:  # what reads a broken pickle may raise anything
        raise ValueError(f"{path} is damaged or no checkpoint ({error}); fetch it again") from error
    content = content if isinstance(content, dict) else {}
    content |= nested if isinstance(nested := content.get("state_dict"), dict) else {}
    if isinstance(step := content.get("global_step"), int):
        content["global_step"] = torch.tensor(float(step))
    return {
        name: Stored(tuple(t.shape), partial(torch.Tensor.detach, t))
        for name, t in content.items()
        if isinstance(name, str) and isinstance(t, Tensor) and t.layout == torch.strided
    }


def under(prefix: str, stored: dict[str, Stored]) -> dict[str, Stored]:
    """The tensors whose names begin so, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}


def unify(part: str, stored: dict[str, Stored]) -> dict[str, Stored]:
    """One spelling for all: leaves out what is no weight, renames old names, cuts OpenCLIP's fused projections in three."""
    result = {}
    for name, tensor in stored.items():
        if re.search(NOT_WEIGHTS, name):
            continue
        name = rename(name, SPELLINGS.get(part.split("_")[0], []))
        if ".in_proj_" in name:
            for i, letter in enumerate("qkv"):
                shape = (tensor.shape[0] // 3, *tensor.shape[1:])
                third = Stored(shape, lambda read=tensor.read, i=i: read().chunk(3)[i])
                result[name.replace("in_proj_", f"in_proj.{letter}.")] = third
        elif name == "text_projection":
            result[name] = Stored(tensor.shape[::-1], lambda read=tensor.read: read().T.contiguous())
        else:
            result[name] = tensor
    return result


@dataclass(frozen=True)
class Fitting:
    """A network without memory, what the file has for it, and the table between their names."""

    network: nn.Module
    stored: dict[str, Stored]
    table: Table

    def names(self) -> dict[str, str]:
        """The file's name of each of the network's weights."""
        return names(self.network.state_dict(), self.table)


def check(origin: Path, fittings: dict[str, Fitting]) -> None:
    """Makes sure that every weight of every network is there and of the right shape, before any of them is read.

    Args:
        origin: the file or folder, to name in errors.
        fittings: by the names of the networks.

    Raises:
        ValueError: weights are missing, unexpected or of a wrong shape; lists them all, network by network.
    """
    if problems := [phrase for part, fitting in fittings.items() if (phrase := _problems(part, fitting))]:
        raise ValueError(f"{origin} does not fit the model that it should hold: {'; '.join(problems)}")


def fill(fitting: Fitting, device: torch.device, dtype: torch.dtype) -> None:
    """Gives a checked network its weights, on a device and in a precision."""
    shapes = {ours: tensor.shape for ours, tensor in fitting.network.state_dict().items()}
    weights = {
        ours: fitting.stored[theirs].read().reshape(shapes[ours]).to(device, dtype) for ours, theirs in fitting.names().items()
    }
    fitting.network.load_state_dict(weights, assign=True)


def _problems(part: str, fitting: Fitting) -> str:
    """Everything wrong with one network's weights, in one phrase; empty if nothing is."""
    stored, weights, named = fitting.stored, fitting.network.state_dict(), fitting.names()
    wrong = [
        f"{theirs} {stored[theirs].shape}, expected {tuple(weights[ours].shape)}"
        for ours, theirs in named.items()
        if theirs in stored and _bare(stored[theirs].shape) != _bare(weights[ours].shape)
    ]
    found = {
        "missing": [theirs for theirs in named.values() if theirs not in stored],
        "unexpected": sorted(stored.keys() - set(named.values())),
        "wrongly shaped": wrong,
    }
    said = [f"{len(k)} {kind} ({', '.join(k[:3])}{', ...' if len(k) > 3 else ''})" for kind, k in found.items() if k]
    return f"{part}: {', '.join(said)}" if said else ""


def _bare(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A 1x1 convolution's weight (C, D, 1, 1) is a linear layer's (C, D)."""
    return tuple(shape[:2]) if len(shape) == 4 and shape[2:] == (1, 1) else tuple(shape)

"""Networks filled from files of weights.

A tensor stays on disk until every name and shape has been found right.  Then it is memory-mapped into a network that was
built without memory, so that loading needs one copy, or none.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from minildm.files import Stored
from minildm.layouts import NOT_WEIGHTS, SPELLINGS, Table, names, rename
from minildm.lora import LoRA


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


def refuse_adapters(networks: Mapping[str, nn.Module]) -> None:
    """Makes sure that networks are what their configurations say, so that what is written can be read back.

    Raises:
        ValueError: one of them carries LoRA adapters; says which, and what to do.
    """
    if adapted := [name for name, part in networks.items() if any(isinstance(m, LoRA) for m in part.modules())]:
        raise ValueError(
            f"{' and '.join(adapted)} carries adapters, which a model's file does not hold: merge and remove them "
            "(minildm.lora), or write them by themselves (minildm.lora_files.write_lora) and remove them"
        )


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

"""Files of weights, opened before they are read, so that names and shapes can be found wrong first; none can run code."""

import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

WEIGHTS = Path(__file__).parent / "weights"  # what comes with the package


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


def open_weights(path: Path, origin: str = "") -> dict[str, Stored]:
    """Opens a file of tensors without reading them: safetensors, or a pickle that holds nothing but data.

    Args:
        path: a `.safetensors`, or a `.ckpt`, `.bin`, `.pt` or `.pth`.
        origin: where such a file comes from, for the errors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or a pickle that would run code; nothing of it has been run.
    """
    origin = origin and f"; it comes from {origin}"
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}{origin}")
    if path.suffix == ".safetensors":
        try:
            file = safe_open(path, framework="pt")
            return {
                name: Stored(tuple(file.get_slice(name).get_shape()), partial(file.get_tensor, name))
                for name in file.keys()  # noqa: SIM118
            }
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged or no safetensors file ({error}); fetch it again{origin}") from error
    try:
        with torch.serialization.safe_globals([(Inert, name) for name in LEFT_BESIDE]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0].split(". ")[0]
        raise ValueError(
            f"{path} is damaged, or a pickle with more than tensors in it, which could run code and was not opened ({reason}); "
            f"look for the same model as .safetensors{origin}"
        ) from error
    except Exception as error:  # what reads a broken pickle may raise anything
        raise ValueError(f"{path} is damaged or no checkpoint ({error}); fetch it again{origin}") from error
    content = content if isinstance(content, dict) else {}
    content |= nested if isinstance(nested := content.get("state_dict"), dict) else {}
    if isinstance(step := content.get("global_step"), int):
        content["global_step"] = torch.tensor(float(step))
    return {
        name: Stored(tuple(t.shape), partial(torch.Tensor.detach, t))
        for name, t in content.items()
        if isinstance(name, str) and isinstance(t, Tensor) and t.layout == torch.strided
    }


def read_tensors(path: Path, wanted: dict[str, tuple[int, ...]], origin: str) -> dict[str, Tensor]:
    """Reads what is asked of a file, once all of it has been found there in the right shapes; the file may hold more.

    Args:
        path, origin: as for `open_weights`.
        wanted: names, and the shape of each.

    Raises:
        FileNotFoundError, ValueError: as `open_weights`; or it is another kind of file, says which tensor is missing or wrong.
    """
    stored = open_weights(path, origin)
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    if odd := [name for name, shape in wanted.items() if shapes.get(name) != shape]:
        raise ValueError(
            f"{path} is another kind of file: {odd[0]} should be {wanted[odd[0]]}, and is {shapes.get(odd[0], 'not in it')}"
        )
    return {name: stored[name].read() for name in wanted}


def read_shipped(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights that come with the package, in float32, and what their file says of them.

    Args:
        name: of a `.safetensors` in minildm/weights.
    """
    with safe_open(WEIGHTS / name, framework="pt") as f:
        return {key: f.get_tensor(key).float() for key in f.keys()}, f.metadata()  # noqa: SIM118

"""What comes with the package: trained models, each made anew by one command, with its recipe and figures in its file.

`python -m minildm ship NAME` trains and writes; `minildm.load(NAME)` opens.  Weights are stored in half precision, and measured
as they are stored.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minildm.checkpoint import write_atomically
from minildm.files import WEIGHTS
from minildm.machine import machine
from minildm.metrics import caption_accuracy, load_judge
from minildm.recipes import Recipe
from minildm.shapes import Shapes, ShapesBatch

SAMPLING = {"steps": 20, "sampler": "dpmpp_2m"}


def shapes32(seed: int = 0) -> tuple[Shapes, Recipe]:
    """One shape on 32 x 32 pixels: the demo, trained a little longer."""
    return Shapes(size=32, seed=seed), Recipe.small(steps=5000, seed=seed)


MODELS: dict[str, Callable[[int], tuple[Shapes, Recipe]]] = {"shapes32": shapes32}


def folder_of(name: str) -> Path | None:
    """Where a shipped model lies; None if no such model is shipped."""
    return WEIGHTS / name if name in MODELS else None


def measure(pipe, judged: int = 512, seed: int = 0, objects: int = 1) -> tuple[dict, dict[str, tuple[Tensor, ShapesBatch]]]:
    """How well a model of Shapes obeys: on reconstructions, the ceiling; on samples; on combinations it has never seen.

    Args:
        pipe: a `Pipeline` trained on Shapes.
        judged: how many fresh captions are judged, and half as many of held-out combinations.
        seed: another one, other captions.
        objects: how many its pictures hold, 1 or 2.

    Returns:
        The figures, plain values; and the pictures that were judged, in [0, 1], with what was asked of them.
    """
    judge, about_judge = load_judge(pipe.image_size, objects)
    fresh, unseen = (Shapes(pipe.image_size, objects, seed + 1_000, split) for split in ("train", "held_out"))
    fresh, unseen = fresh.draw(range(judged)), unseen.draw(range(-(-judged // 2)))
    sampling = {**SAMPLING, "guidance_scale": pipe.guidance_scale, "seed": seed}
    pictures = {
        "reconstructions": (pipe.decode(pipe.encode(fresh.images / 2 + 0.5)), fresh),
        "samples": (pipe(fresh.captions, **sampling), fresh),
        "held_out_samples": (pipe(unseen.captions, **sampling), unseen),
    }
    figures = {"judge_on_real_pictures": float(about_judge["accuracy"])}
    for name, (images, asked) in pictures.items():
        accuracy = caption_accuracy(judge.read(images * 2 - 1), asked.attributes)
        figures[name] = {**dataclasses.asdict(accuracy), "interval_95": accuracy.interval}
    return figures, pictures


def halve(*networks: nn.Module) -> None:
    """Rounds all weights to half precision; they stay float32, which a CPU computes with."""
    for network in networks:
        for tensor in network.state_dict().values():
            tensor.copy_(tensor.half())


def ship(pipe, folder: Path, recipe: str, described: str, figures: dict) -> None:
    """Writes a model as it is shipped: in half precision, with what made it and what it can do in the file's metadata.

    Args:
        pipe: a `Pipeline`, already rounded by `halve`.
        folder: where to write it; a model that is there is replaced.
        recipe: the command that makes it anew.
        described: all choices of the training, as text.
        figures: what was measured, plain values.
    """
    pipe.save(folder)
    tensors = {name: t.half() if name != "alpha_bar" else t for name, t in load_file(folder / "model.safetensors").items()}
    about = {"recipe": recipe, "choices": described, "figures": json.dumps(figures), **machine()}
    write_atomically(folder / "model.safetensors", lambda path: save_file(tensors, path, metadata=about))

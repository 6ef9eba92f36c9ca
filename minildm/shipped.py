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
from minildm.clip import CLIP, ImageConfig, TextConfig
from minildm.files import WEIGHTS, read_shipped
from minildm.machine import machine
from minildm.metrics import caption_accuracy, load_judge
from minildm.recipes import Recipe
from minildm.shapes import Shapes, ShapesBatch
from minildm.tokenizer import Tokenizer

SAMPLING = {"steps": 20, "sampler": "dpmpp_2m"}


def shapes32(seed: int = 0) -> tuple[Shapes, Recipe]:
    """One shape on 32 x 32 pixels: the demo, trained a little longer."""
    return Shapes(size=32, seed=seed), Recipe.small(steps=5000, seed=seed)


def shapes64(seed: int = 0) -> tuple[Shapes, Recipe]:
    """Two shapes on 64 x 64 pixels, each to be kept apart from the other; latents 48 times smaller, as Stable Diffusion's.

    As in Stable Diffusion 1 the words reach the U-Net by cross-attention alone, at every resolution.
    """
    recipe = Recipe.small(size=64, steps=8000, pictures=40_000, seed=seed)
    return Shapes(size=64, objects=2, seed=seed, partial=0.3), dataclasses.replace(
        recipe,
        vae=dataclasses.replace(recipe.vae, widths=(48, 96)),  # narrow, where the pixels are many
        unet=dataclasses.replace(recipe.unet, depths=(1, 1), pooled_dim=None),
        first=dataclasses.replace(recipe.first, steps=2500, lr=3e-3),
        words=dataclasses.replace(recipe.words, steps=800),
    )


MODELS: dict[str, Callable[[int], tuple[Shapes, Recipe]]] = {"shapes32": shapes32, "shapes64": shapes64}


def folder_of(name: str) -> Path | None:
    """Where a shipped model lies; None if no such model is shipped."""
    return WEIGHTS / name if name in MODELS else None


def load_clip(name: str) -> tuple[CLIP, Tokenizer]:
    """The two encoders that a shipped model's words come from, the one of text, which it listens to, and the one of pictures.

    Args:
        name: of a shipped model.

    Returns:
        The CLIP, which reads pictures of the model's own size in [-1, 1], and the tokenizer of its captions.

    Raises:
        FileNotFoundError: no such model is shipped; says which are.
    """
    if not (folder := folder_of(name)):
        raise FileNotFoundError(f"no model called {name!r} is shipped; there are {', '.join(MODELS)}")
    text = {key: t for key, t in read_shipped(f"{name}/model.safetensors")[0].items() if key.startswith("text.")}
    image, about = read_shipped(f"{name}/image_encoder.safetensors")
    settings = json.loads((folder / "model.json").read_text())
    clip = CLIP(TextConfig(**settings["text"]), ImageConfig(**json.loads(about["image"])))
    clip.load_state_dict(text | image)
    return clip.eval(), Tokenizer.load(folder)


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


def ship(pipe, clip: CLIP, folder: Path, recipe: str, described: str, figures: dict) -> None:
    """Writes a model as it is shipped: in half precision, with what made it and what it can do in the file's metadata.

    Args:
        pipe: a `Pipeline`, already rounded by `halve`.
        clip: what its text encoder was trained in; the image encoder is written beside the model.
        folder: where to write it; a model that is there is replaced.
        recipe: the command that makes it anew.
        described: all choices of the training, as text.
        figures: what was measured, plain values.
    """
    pipe.save(folder)
    tensors = {name: t.half() if name != "alpha_bar" else t for name, t in load_file(folder / "model.safetensors").items()}
    about = {"recipe": recipe, "choices": described, **machine()}
    model = about | {"figures": json.dumps(figures)}
    write_atomically(folder / "model.safetensors", lambda path: save_file(tensors, path, metadata=model))
    seen = {name: t.half().contiguous() for name, t in clip.state_dict().items() if not name.startswith("text.")}
    image = about | {"image": json.dumps(dataclasses.asdict(clip.image.cfg))}
    write_atomically(folder / "image_encoder.safetensors", lambda path: save_file(seen, path, metadata=image))

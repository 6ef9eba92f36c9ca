"""What comes with the package: trained models, each made anew by one command, with its recipe and figures in its file.

`python -m minildm ship NAME` trains and writes; `minildm.load(NAME)` opens.  Weights are stored in half precision, and measured
as they are stored.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minildm.checkpoint import write_atomically
from minildm.clip import CLIP, ImageConfig, TextConfig
from minildm.data import Emoji
from minildm.files import WEIGHTS, read_shipped
from minildm.machine import machine
from minildm.metrics import caption_accuracy, load_judge
from minildm.recipes import Recipe
from minildm.report import nearest_neighbour
from minildm.shapes import Shapes, ShapesBatch
from minildm.tokenizer import Tokenizer
from minildm.train import Dataset, Fit
from minildm.unet import UNetConfig
from minildm.vae import VAEConfig

SAMPLING = {"steps": 20, "sampler": "dpmpp_2m"}


def shapes32(seed: int = 0) -> tuple[Shapes, Recipe]:
    """One shape on 32 x 32 pixels, trained patiently, as published models are: AdamW alone, and words that stay as they are."""
    return Shapes(size=32, seed=seed), Recipe(
        size=32,
        vae=VAEConfig.mini(),
        unet=UNetConfig.tiny(),
        first=Fit(steps=1200, lr=2e-3, batch_size=32, seed=seed, ema=0.99),
        words=Fit(steps=250, lr=1e-3, batch_size=128, seed=seed + 1, ema=0.99),
        second=Fit(steps=5000, lr=1.5e-3, batch_size=32, seed=seed + 2, ema=0.998),
    )


def shapes64(seed: int = 0) -> tuple[Shapes, Recipe]:
    """Two shapes on 64 x 64 pixels, each to be kept apart from the other; latents 48 times smaller, as Stable Diffusion's.

    As in Stable Diffusion 1 the words reach the U-Net by cross-attention alone, at every resolution.
    """
    recipe = Recipe.small(size=64, vae_steps=1500, steps=3000, pictures=40_000, context_length=20, seed=seed)
    return Shapes(size=64, objects=2, seed=seed, partial=0.3), dataclasses.replace(
        recipe,
        unet=dataclasses.replace(recipe.unet, depths=(1, 1), pooled_dim=None),
        second=dataclasses.replace(recipe.second, batch_size=64, ema=0.998),
        guidance_scale=3.0,
        train_text=True,
    )


def emoji(seed: int = 0) -> tuple[Emoji, Recipe]:
    """Every emoji of the system's font on 32 x 32 pixels, by name: few enough to be learned by heart."""
    recipe = Recipe.small(vae_steps=2500, steps=4000, seed=seed)
    return Emoji(size=32), dataclasses.replace(
        recipe,
        unet=dataclasses.replace(recipe.unet, depths=(1, 1)),
        first=dataclasses.replace(recipe.first, batch_size=64),
        second=dataclasses.replace(recipe.second, batch_size=64, ema=0.998),
        guidance_scale=3.0,
        train_text=True,
    )


MODELS: dict[str, Callable[[int], tuple[Dataset, Recipe]]] = {"shapes32": shapes32, "shapes64": shapes64, "emoji": emoji}


def folder_of(name: str) -> Path | None:
    """Where a shipped model lies; None if no such model is shipped."""
    return WEIGHTS / name if name in MODELS and (WEIGHTS / name).exists() else None


def load_clip(name: str) -> tuple[CLIP, Tokenizer]:
    """The two encoders that a shipped model's words come from, the one of text, which it listens to, and the one of pictures.

    Args:
        name: of a shipped model.

    Returns:
        The CLIP, which reads pictures of the model's own size in [-1, 1], and the tokenizer of its captions.

    Raises:
        FileNotFoundError: no such model is shipped, or its text encoder was not trained beside one of pictures; says which are.
    """
    if not (folder := folder_of(name)):
        raise FileNotFoundError(f"no model called {name!r} is shipped; there are {', '.join(MODELS)}")
    if not (folder / "image_encoder.safetensors").exists():
        raise FileNotFoundError(f"the text encoder of {name} learned with its U-Net, and has no image encoder; use shapes32")
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


def measure_copies(pipe, dataset: Dataset, judged: int = 512, seed: int = 0) -> tuple[dict, dict[str, Tensor]]:
    """How far a model of few pictures has learned them by heart.

    Args:
        pipe: a `Pipeline` trained on the dataset.
        dataset: those pictures, with their captions.
        judged: how many captions are drawn, at most.
        seed: of the choice of captions, and of the noise.

    Returns:
        The figures, plain values: the share of samples whose nearest training picture is the one of their caption, and median
        root mean square errors on a scale from 0 to 1: of samples against that picture, and of its reconstruction, the least
        there can be.  And the pictures: training pictures, reconstructions and samples, (N, 3, H, W) in [0, 1].
    """
    picks = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed + 1_000))[:judged].tolist()
    real = dataset.batch(range(len(dataset)))[0] / 2 + 0.5
    captions = dataset.batch(picks)[1]
    drawn = pipe(captions, **SAMPLING, guidance_scale=pipe.guidance_scale, seed=seed)
    restored = pipe.decode(pipe.encode(real[picks]))
    _, nearest, _ = nearest_neighbour(drawn, real)

    def apart(images: Tensor) -> float:
        return (images - real[picks]).square().mean(dim=(1, 2, 3)).sqrt().median().item()

    figures = {
        "nearest_is_its_own": (nearest == torch.tensor(picks)).float().mean().item(), "samples_rms": apart(drawn),
        "reconstructions_rms": apart(restored), "count": len(picks),
    }  # fmt: skip
    return figures, {"real": real[picks], "reconstructions": restored, "samples": drawn}


def halve(*networks: nn.Module) -> None:
    """Rounds all weights to half precision; they stay float32, which a CPU computes with."""
    for network in networks:
        for tensor in network.state_dict().values():
            tensor.copy_(tensor.half())


def ship(pipe, clip: CLIP | None, folder: Path, recipe: str, described: str, figures: dict) -> None:
    """Writes a model as it is shipped: in half precision, with what made it and what it can do in the file's metadata.

    Args:
        pipe: a `Pipeline`, already rounded by `halve`.
        clip: what its text encoder was trained in, if it was: the image encoder is written beside the model.
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
    if clip is None:
        return
    seen = {name: t.half().contiguous() for name, t in clip.state_dict().items() if not name.startswith("text.")}
    image = about | {"image": json.dumps(dataclasses.asdict(clip.image.cfg))}
    write_atomically(folder / "image_encoder.safetensors", lambda path: save_file(seen, path, metadata=image))

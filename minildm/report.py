"""An evaluation of a model of your own pictures: what can be measured without a judge, each figure beside what it would be for
real pictures, and the failures first.

Nothing here can say that a model is good.  It can say that a reconstruction is the ceiling, that a sample is a copy, that a
held-out picture was in the training set after all, and that a score is no better than chance.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from minildm.checkpoint import write_atomically
from minildm.clip import CLIP
from minildm.folder import Pictures
from minildm.machine import machine
from minildm.metrics import CaptionAccuracy, toy_extractor
from minildm.plot import caption_grid
from minildm.scores import clip_score, extract, kid
from minildm.train import diffusion_loss

CARD = ("what", "data", "licence", "limits")  # what nobody but you can say of your model
COPY = 0.5  # a picture half as far from one training picture as from any other is called a copy of it
SAME = 0.015  # thumbnails in [0, 1] nearer than this are of one picture; a JPEG of quality 30 lies 0.004 from its original


@dataclass(frozen=True)
class Report:
    """What was measured, and the pictures it was measured on: all (N, 3, size, size) in [0, 1].

    "real" are those held out and "restored" their reconstructions; "seen" are samples of captions trained on and "new"
    of captions held out, each with the training pictures nearest to it, "seen_nearest" and "new_nearest".
    """

    figures: dict  # plain values, ready for JSON
    pictures: dict[str, Tensor]
    captions: dict[str, list[str]]  # of "seen" and of "new"
    worst: list[int]  # the samples of "new", the one that CLIP finds to fit least first; without a CLIP as they came


def nearest_neighbour(rows: Tensor, others: Tensor, mirrored: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest of the others to each row, by root mean square, and how lonely it is there.

    A blurred picture is near to many others, a copy to one: so a distance alone says little, and its share of the distance to
    the second nearest says more (in the spirit of Carlini et al. 2023, section 5).

    Args:
        rows: (N, ...), of any kind: pictures, thumbnails, latents, features.
        others: (M, ...), of the same kind, M at least 2.
        mirrored: the others mirrored, in the same order; the nearer of the two counts.

    Returns:
        Distances (N,), 0 for copies; which of the others that is, (N,) int64; and the distance over that to the second nearest,
        (N,) in [0, 1].

    Raises:
        ValueError: rows and others differ after the first axis, or there are fewer than two others.
    """
    if rows.shape[1:] != others.shape[1:] or len(others) < 2:
        raise ValueError(f"rows are {tuple(rows.shape)} and others {tuple(others.shape)}: expected one shape, and two others")
    sides = [others] if mirrored is None else [others, mirrored]
    apart = [torch.cdist(rows.flatten(1), s.flatten(1), compute_mode="donot_use_mm_for_euclid_dist") for s in sides]  # (N, M)
    two, which = torch.stack(apart).amin(dim=0).topk(2, dim=1, largest=False)
    return two[:, 0] / rows[0].numel() ** 0.5, which[:, 0], two[:, 0] / two[:, 1].clamp(min=1e-12)


def thumbnails(images: Tensor) -> Tensor:
    """Pictures (N, 3, H, W) as 8 x 8 pixels, in which one picture saved or resized twice is the same."""
    return F.adaptive_avg_pool2d(images, 8)


def duplicates(images: Tensor, others: Tensor | None = None) -> list[tuple[int, int]]:
    """Pairs that are one picture, mirrored or not, by their thumbnails.

    Args:
        images: pictures, (N, 3, H, W) in [0, 1].
        others: pictures to look for them in, likewise; None for the same pictures, each pair named once.

    Returns:
        (i, j) for picture i and the j-th of the others.
    """
    rows, rivals = thumbnails(images), thumbnails(images if others is None else others)
    found = []
    for i, row in enumerate(rows):
        for other in (rivals, rivals.flip(-1)):
            close = ((other - row).square().mean(dim=(1, 2, 3)).sqrt() < SAME).nonzero()[:, 0].tolist()
            found += [(i, j) for j in close if others is not None or i < j]
    return sorted(set(found))


@torch.inference_mode()
def evaluate(
    pipe, seen: Pictures, held_out: Pictures, clip: CLIP | None = None, count: int = 64, steps: int = 10, seed: int = 0
) -> Report:
    """Measures a model on pictures it was trained on and on pictures it was not.

    Args:
        pipe: a `Pipeline`.
        seen: what it was trained on.
        held_out: pictures of the same kind that no part of it was trained on, at least 8; or the figures flatter.
        clip: the text and image encoders it was trained with; None leaves the CLIP scores out.
        count: how many samples are drawn of captions seen, and as many of captions held out.
        steps: of the sampler.
        seed: of all noise and every choice.

    Raises:
        ValueError: fewer than 8 pictures held out, or a size that is not the model's.
    """
    if len(held_out) < 8:
        raise ValueError(f"{len(held_out)} pictures are held out; keep at least 8 away from training, or nothing can be said")
    if {seen.size, held_out.size} != {pipe.image_size}:
        raise ValueError(f"pictures of {seen.size} and {held_out.size} pixels for a model of {pipe.image_size}: open them anew")
    g = torch.Generator().manual_seed(seed)
    sets = {"seen": seen, "new": held_out}
    others = held_out.captions[1:] + held_out.captions[:1]
    asked = sets | {"new_with_others_captions": Pictures(held_out.name, held_out.pixels, others)}
    real = {name: pictures.batch(range(len(pictures)))[0] / 2 + 0.5 for name, pictures in sets.items()}
    restored = {name: pipe.decode(pipe.encode(x)) for name, x in real.items()}
    picks = {name: _cycle(len(pictures), count, g) for name, pictures in sets.items()}
    captions = {name: [pictures.captions[i] for i in picks[name]] for name, pictures in sets.items()}
    drawn = {name: pipe(words, steps=steps, seed=seed) for name, words in captions.items()}

    known, mirrored = pipe.encode(real["seen"]), pipe.encode(real["seen"].flip(-1))  # a mirrored copy is a copy
    rows = {"copies": restored["seen"], "held_out": restored["new"]} | {f"samples_{name}": drawn[name] for name in sets}
    near = {name: nearest_neighbour(pipe.encode(x), known, mirrored) for name, x in rows.items()}  # all decoded once
    copied = {
        name: CaptionAccuracy((ratio < COPY).cpu().double().mean().item(), {}, len(ratio)) for name, (*_, ratio) in near.items()
    }
    own = {
        name: (pipe.encode(drawn[name]) - pipe.encode(real[name][picks[name]])).square().mean(dim=(1, 2, 3)).sqrt()
        for name in sets
    }
    scores, worst = (
        ({}, list(range(count))) if clip is None else _clip_figures(pipe, clip, held_out, drawn["new"], captions["new"])
    )
    figures = {
        "pictures": {"seen": len(seen), "held_out": len(held_out)},
        "leaks": len({i for i, _ in duplicates(real["new"], real["seen"])}),
        "reconstruction_psnr": {name: _psnr(real[name], restored[name]) for name in sets},
        "loss": {name: denoising_loss(pipe, pictures, seed=seed) for name, pictures in asked.items()},
        "nearest": {name: distance.median().item() for name, (distance, *_) in near.items()},
        "copied": {name: {"share": c.all_correct, "interval_95": c.interval} for name, c in copied.items()},
        "own_picture": {name: distance.median().item() for name, distance in own.items()},
        "kid": _kid_figures(real, restored["seen"], drawn["new"], g),
        "clip": scores,
        "sampling": {"count": count, "steps": steps, "guidance_scale": pipe.guidance_scale, "seed": seed},
    }
    pictures = {"real": real["new"], "restored": restored["new"], **drawn}
    pictures |= {f"{name}_nearest": real["seen"][near[f"samples_{name}"][1]] for name in sets}
    return Report(figures, pictures, captions, worst)


@torch.inference_mode()
def denoising_loss(pipe, pictures: Pictures, repeats: int = 4, seed: int = 0) -> float:
    """The training's loss on these pictures, over timesteps and noise that are the same whoever asks."""
    z = pipe.encode(pictures.batch(range(len(pictures)))[0] / 2 + 0.5).cpu()
    told = pipe.condition(pictures.captions)
    losses = []
    for k in range(repeats):
        g = torch.Generator().manual_seed(seed + k)
        t = (torch.arange(len(z)) + torch.rand(1, generator=g)) * pipe.schedule.T / len(z)  # evenly spread
        t, noise = t.long() % pipe.schedule.T, torch.randn(z.shape, generator=g)
        losses.append(diffusion_loss(pipe.unet, pipe.schedule, z, noise, t, told, pipe.prediction_type).mean())
    return torch.stack(losses).mean().item()


def write_report(report: Report, folder: Path | str, about: Mapping[str, str]) -> None:
    """Writes report.md with its pictures, failures first, and report.json.

    Args:
        report: what `evaluate` returned.
        folder: where to.
        about: the model card's words, "what", "data", "licence" and "limits".

    Raises:
        ValueError: one of those is missing; nobody but you can say it.
    """
    if missing := [name for name in CARD if not about.get(name, "").strip()]:
        raise ValueError(f"the model card lacks {', '.join(missing)}: say it in about={{{missing[0]!r}: ...}}")
    folder = Path(folder)
    lines = ["# Model card", "", *(f"- **{name}** {about[name]}" for name in CARD), "", "## Failures first", ""]
    lines += ["Below each sample the training picture nearest to it.", "", "![samples, and their neighbours](samples.png)", ""]
    lines += ["## Real pictures and their reconstructions", "", "![the ceiling](ceiling.png)", "", "## Figures", ""]
    lines += ["| figure | of | value |", "|---|---|---|"]
    for name, row in report.figures.items():
        for key, value in (row if isinstance(row, dict) else {"": row}).items():
            lines.append(f"| {name.replace('_', ' ')} | {key.replace('_', ' ')} | {_plain(value)} |")
    order = report.worst[:8]
    new, beside = report.pictures["new"][order], report.pictures["new_nearest"][order]
    words = [report.captions["new"][i] for i in order] + [""] * len(order)
    samples = caption_grid(torch.cat([new, beside]), words, columns=8, side=96)
    both = torch.cat([report.pictures[name][:8] for name in ("real", "restored")])
    sheets = {"samples.png": samples, "ceiling.png": caption_grid(both, [""] * len(both), columns=8, side=96)}
    for name, sheet in sheets.items():
        write_atomically(folder / name, sheet.save)
    content = json.dumps({"about": dict(about), "figures": report.figures, **machine()}, indent=1)
    write_atomically(folder / "report.json", lambda path: path.write_text(content))
    write_atomically(folder / "report.md", lambda path: path.write_text("\n".join(lines) + "\n", encoding="utf-8"))


def _cycle(n: int, count: int, generator: torch.Generator) -> list[int]:
    """`count` numbers below n, in random order, none again before all have come."""
    return torch.cat([torch.randperm(n, generator=generator) for _ in range(-(-count // n))])[:count].tolist()


def _psnr(x: Tensor, y: Tensor) -> float:
    return -10 * (x - y).square().mean().log10().item()


def _kid_figures(
    real: dict[str, Tensor], restored: Tensor, drawn: Tensor, generator: torch.Generator, trials: int = 200
) -> dict:
    """KID of samples and of reconstructions against held-out pictures, and the range of 95 % of real against real."""
    look = toy_extractor("emoji")
    seen, held_out, back, fake = (torch.cat([*extract(2 * x - 1, look)]) for x in (*real.values(), restored, drawn))
    everything = torch.cat([seen, held_out])
    n = min(len(held_out), len(fake), len(seen), len(everything) // 2)

    def draw(one: Tensor, other: Tensor) -> float:
        return kid(one, other, subsets=1, subset_size=n, generator=generator)[0]

    by_chance = []
    for _ in range(trials):
        order = torch.randperm(len(everything), generator=generator)
        by_chance.append(draw(everything[order[:n]], everything[order[n : 2 * n]]))
    low, high = torch.tensor(by_chance).quantile(torch.tensor([0.025, 0.975])).tolist()
    mean = {name: sum(draw(held_out, x) for _ in range(trials)) / trials for name, x in (("samples", fake), ("restored", back))}
    return {**mean, "real_95": (low, high), "count": n}


def _clip_figures(pipe, clip: CLIP, held_out: Pictures, drawn: Tensor, captions: list[str]) -> tuple[dict, list[int]]:
    """CLIP scores with the right captions and with others, how often the right one fits best, and the samples, worst first."""
    choices = sorted(set(held_out.captions))
    texts = F.normalize(clip.text(pipe.tokenizer(choices).to(pipe.device))[1], dim=1)  # (K, D)
    real = held_out.batch(range(len(held_out)))[0]
    figures = {}
    for name, x, words in (("real", real, held_out.captions), ("samples", 2 * drawn - 1, captions)):
        right = torch.tensor([choices.index(word) for word in words])
        images = F.normalize(clip.image(x.to(pipe.device)), dim=1)
        cosines = (images @ texts.T).cpu()  # (N, K)
        figures[name] = {
            "score": clip_score(images, texts[right]),
            "with_others_captions": clip_score(images, texts[(right + 1) % len(choices)]),
            "right_caption_first": (cosines.argmax(dim=1) == right).double().mean().item(),
            "captions": len(choices),
        }
    return figures, cosines[torch.arange(len(right)), right].argsort().tolist()  # the loop ends with the samples


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {_plain(inner)}" for key, inner in value.items())
    if isinstance(value, tuple):
        return " to ".join(map(_plain, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)

"""Latents against pixels: one U-Net class, trained in both to the same caption accuracy, at 16, 32 and 64 pixels.

    python tests/benchmarks/latent_against_pixels.py              # all six runs, and the clock: about an hour on one core
    python tests/benchmarks/latent_against_pixels.py pixels 64    # one of them
    python tests/benchmarks/latent_against_pixels.py clock        # the seconds of those in the file, on an idle machine

Every run has the same pictures, captions, text encoder, judge, batch, learning rate, schedule and sampler; only the space
differs.  The latents are 8 x 8 x 4 at every size, as an autoencoder of 2, 4 or 8 times makes them; the pixels' U-Net has the
latents' two levels at the bottom and a level more for every doubling of the side above them.  Compute is counted, seconds are
CPU seconds of one thread.  Writes tests/benchmarks/latent_against_pixels.json, which chapter 13 shows.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import minildm
from minildm.checkpoint import write_atomically
from minildm.guidance import guided
from minildm.machine import machine
from minildm.metrics import caption_accuracy, load_judge
from minildm.recipes import Recipe
from minildm.samplers import dpmpp_2m
from minildm.schedule import NoiseSchedule
from minildm.shapes import Shapes
from minildm.shipped import MODELS
from minildm.train import Fit, Latents, cache_latents, train_autoencoder, train_diffusion
from minildm.unet import UNet, UNetConfig
from minildm.vae import AutoencoderKL, VAEConfig, vae_loss

FILE = Path(__file__).with_suffix(".json")
SETTING = {
    "target": 0.55, "go_on_to": 0.7, "accuracy": "attributes right, the mean of five", "judged": 96, "judged_every": 50,
    "sampler": "dpmpp_2m", "sampler_steps": 10, "guidance_scale": 3.0,
    "batch_size": 32, "lr": 1.5e-3, "most_steps": 600, "pictures": 10_000, "seed": 0,
    "data": "Shapes, one object", "clock": "CPU seconds, one thread",
}  # fmt: skip
WIDTHS = {64: 16, 32: 32, 16: 32, 8: 64, 4: 96}  # channels at each side


def unet_config(space: str, size: int) -> UNetConfig:
    """The U-Net of one run: from the side of its tensors down to 4 x 4, with attention there."""
    sides = [side for side in WIDTHS if side <= (size if space == "pixels" else 8)]
    channels = 3 if space == "pixels" else 4
    return replace(
        UNetConfig.tiny(), widths=tuple(WIDTHS[side] for side in sides), depths=(0,) * (len(sides) - 1) + (1,),
        heads=(4,) * len(sides), in_channels=channels, out_channels=channels,
    )  # fmt: skip


def first_stage(size: int) -> tuple[VAEConfig, Fit]:
    """The shape of an autoencoder to 8 x 8 x 4 and how it is trained: at 32 and 64 pixels as the shipped models are."""
    if size > 16:
        recipe = MODELS[f"shapes{size}"]()[1]
        return recipe.vae, recipe.first
    recipe = Recipe.small(size=16, vae_steps=600, seed=SETTING["seed"])
    return replace(recipe.vae, patch=2), recipe.first


def trained_autoencoder(size: int) -> AutoencoderKL:
    """The shipped one, or at 16 pixels one trained now."""
    if size > 16:
        return minildm.load(f"shapes{size}").vae
    cfg, first = first_stage(size)
    torch.manual_seed(first.seed)
    vae = AutoencoderKL(cfg)
    drain(train_autoencoder(vae, Shapes(size=size), first))
    return vae


def drain(generator):
    """Runs a training generator to its end, and returns what it returns."""
    while True:
        try:
            next(generator)
        except StopIteration as end:
            return end.value


def flops(function) -> int:
    """Multiplications and additions of a call, its backward pass included where there is one."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def kept_for_backward(function) -> int:
    """Bytes of all the tensors that a forward pass keeps."""
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = function()  # alive until all is counted, so that no address is used twice
    del result
    return sum(kept.values())


def sampled(unet: UNet, cond: dict, uncond: dict, schedule: NoiseSchedule, noise: torch.Tensor) -> torch.Tensor:
    """What the U-Net makes of some noise."""
    model = guided(unet, {name: t[: len(noise)] for name, t in cond.items()}, uncond, scale=SETTING["guidance_scale"])
    options = {"steps": SETTING["sampler_steps"], "prediction_type": "v_prediction", "spacing": "trailing"}
    return dpmpp_2m(model, noise, schedule, **options)


def losses(space: str, size: int, cond: dict) -> tuple[UNet, Callable, AutoencoderKL | None, Callable | None, tuple]:
    """A new U-Net and its loss on one batch; in latents an autoencoder and its loss, too; and the shape of a sample."""
    side, channels = (size, 3) if space == "pixels" else (8, 4)
    torch.manual_seed(SETTING["seed"])
    unet = UNet(unet_config(space, size)).to(memory_format=torch.channels_last)
    z = torch.randn(SETTING["batch_size"], channels, side, side).to(memory_format=torch.channels_last)
    t, told = torch.arange(len(z)), {name: tensor[: len(z)] for name, tensor in cond.items()}
    vae = vae_step = None
    if space == "latents":
        cfg, first = first_stage(size)
        vae = AutoencoderKL(cfg).to(memory_format=torch.channels_last)
        x = Shapes(size=size).batch(range(first.batch_size))[0].to(memory_format=torch.channels_last)

        def vae_step() -> torch.Tensor:
            recon, posterior = vae(x)
            return vae_loss(x, recon, posterior)[0]

    return unet, lambda: unet(z, t, **told).square().mean(), vae, vae_step, (channels, side, side)


def measure(space: str, size: int) -> dict:
    """One run: trains until samples obey their captions often enough, and counts what it took."""
    pipe, (judge, _) = minildm.load("shapes32"), load_judge()
    dataset, fresh = Shapes(size=size), Shapes(size=size, seed=1_000).draw(range(SETTING["judged"]))

    def accuracy(images: torch.Tensor) -> float:
        small = F.interpolate(images, size=(32, 32), mode="bilinear", antialias=True, align_corners=False)
        right = caption_accuracy(judge.read(small), fresh.attributes).each
        return sum(right.values()) / len(right)

    if space == "latents":
        vae = trained_autoencoder(size).requires_grad_(False).to(memory_format=torch.channels_last)
        latents = drain(cache_latents(vae, dataset, SETTING["pictures"]))
        decode, rebuilt = vae.decode, vae.decode(vae.encode(fresh.images).mode())
    else:
        images, captions = dataset.batch(range(SETTING["pictures"]))
        latents = Latents(images, torch.zeros_like(images), captions, 1 / images.std().item())
        decode, rebuilt = torch.nn.Identity(), fresh.images

    ids, empty = pipe.tokenizer(latents.captions), pipe.tokenizer([""])
    cond, uncond = heard(pipe, fresh.captions), heard(pipe, [""])
    unet, loss, _, vae_step, shape = losses(space, size, cond)
    noise = torch.randn(SETTING["judged"], *shape, generator=torch.Generator().manual_seed(1))
    parameters = sum(p.numel() for p in unet.parameters())
    run = {
        "ceiling": accuracy(rebuilt), "parameters": parameters, "flops_per_step": float(flops(lambda: loss().backward())),
        "first_stage_flops": float(first_stage(size)[1].steps * flops(lambda: vae_step().backward())) if vae_step else 0.0,
        "peak_memory_mb": (kept_for_backward(loss) + 4 * 4 * parameters) / 1e6,  # weights, gradients, two moments
    }  # fmt: skip

    @torch.no_grad()
    def sample(count: int) -> torch.Tensor:
        return decode(sampled(unet, cond, uncond, pipe.schedule, noise[:count]) / latents.scaling_factor)

    fit = Fit(steps=SETTING["most_steps"], lr=SETTING["lr"], batch_size=SETTING["batch_size"], seed=SETTING["seed"], ema=0)
    average, curve = {k: p.clone() for k, p in unet.state_dict().items()}, []
    for p in train_diffusion(unet, pipe.text, pipe.schedule, latents, ids, empty, fit):
        with torch.no_grad():
            for name, tensor in unet.state_dict().items():
                average[name].lerp_(tensor, 1 - min(0.99, (1 + p.step) / (10 + p.step)))
        if p.step % SETTING["judged_every"] == 0:
            trained = {k: t.clone() for k, t in unet.state_dict().items()}
            unet.load_state_dict(average)
            curve.append([p.step, 0.0, accuracy(sample(SETTING["judged"]))])
            print(f"{space} {size}: {p.step} steps, {curve[-1][2]:.1%}", flush=True)
            if curve[-1][2] >= SETTING["go_on_to"]:
                break
            unet.load_state_dict(trained)
    return run | {"sampling_flops_per_picture": float(flops(lambda: sample(1))), "curve": curve} | stop(run, curve)


def stop(run: dict, curve: list[list[float]]) -> dict:
    """Where on a curve the accuracy asked for is first reached, and what it took to get there; or to its end if it is not."""
    at = next((steps for steps, _, accuracy in curve if accuracy >= SETTING["target"]), None)
    steps = at or curve[-1][0]
    return {"reached": at is not None, "steps": steps, "training_flops": steps * run["flops_per_step"]}


@torch.no_grad()
def heard(pipe, captions: list[str]) -> dict[str, torch.Tensor]:
    """What the shipped text encoder makes of captions, by the U-Net's keywords."""
    return dict(zip(("context", "pooled"), pipe.text(pipe.tokenizer(captions)), strict=True))


def clock(runs: dict[str, dict[str, dict]], rounds: int = 3) -> None:
    """Adds the seconds of every run: all of them in turn, so that a busy moment hits all alike, the least of some rounds."""
    pipe = minildm.load("shapes32")
    cond, uncond = heard(pipe, Shapes().batch(range(SETTING["batch_size"]))[1]), heard(pipe, [""])
    jobs = {}
    for space, size in ((space, size) for space, sizes in runs.items() for size in sizes):
        unet, loss, vae, vae_step, shape = losses(space, int(size), cond)

        @torch.no_grad()
        def sample(unet=unet, vae=vae, noise=torch.randn(16, *shape)) -> torch.Tensor:  # noqa: B008
            z = sampled(unet, cond, uncond, pipe.schedule, noise)
            return vae.decode(z) if vae else z

        jobs[space, size, "step"] = lambda loss=loss: loss().backward()
        jobs[space, size, "sample"] = sample
        if vae_step:
            jobs[space, size, "first"] = lambda vae_step=vae_step: vae_step().backward()
    least = dict.fromkeys(jobs, float("inf"))
    for _ in range(rounds):
        for name, job in jobs.items():
            start = time.process_time()
            job()
            least[name] = min(least[name], time.process_time() - start)
    for space, size in ((space, size) for space, sizes in runs.items() for size in sizes):
        run, step = runs[space][size], least[space, size, "step"]
        run["training_s"], run["curve"] = run["steps"] * step, [[n, n * step, a] for n, _, a in run["curve"]]
        run["sampling_s_per_picture"] = least[space, size, "sample"] / 16
        run["first_stage_s"] = first_stage(int(size))[1].steps * least.get((space, size, "first"), 0.0)


def note(change: Callable[[dict], None]) -> None:
    """Changes the report on the disk."""
    report = json.loads(FILE.read_text()) if FILE.exists() else {"runs": {"pixels": {}, "latents": {}}}
    change(report["runs"])
    report |= {"machine": machine(), "setting": SETTING}
    write_atomically(FILE, lambda path: path.write_text(json.dumps(report, indent=1) + "\n"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    words = sys.argv[1:] or [word for size in ("16", "32", "64") for word in ("latents", size, "pixels", size)] + ["clock"]
    for space, size in pairwise(words):
        if space in ("latents", "pixels"):
            done = measure(space, int(size))
            note(lambda runs, space=space, size=size, done=done: runs[space].update({size: done}))
    if "clock" in words:
        note(clock)

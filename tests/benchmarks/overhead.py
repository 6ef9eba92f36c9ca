"""What a sampler costs beside its network: every one of ours against the reference's scheduler, with a network that is free.

And what it costs to import the package, each time in a Python of its own.
"""

import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable

import torch
from timing import DEVICE, HAS_REFERENCE, OURS, REFERENCE, compared, turns
from torch import Tensor

from minildm.samplers import SAMPLERS
from minildm.schedule import NoiseSchedule

STEPS, NOISE = 50, "the noise that both draw"
REFERENCES = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False, "steps_offset": 1}),
    "euler": ("EulerDiscreteScheduler", {"steps_offset": 1}),
    "heun": ("HeunDiscreteScheduler", {"steps_offset": 1}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"steps_offset": 1}),
}


def samplers(quick: bool) -> dict:
    """A step of each sampler, of 50, on a latent of 1 x 4 x 64 x 64 with a model that answers at once; noise not counted."""
    x, answer = torch.randn(1, 4, 64, 64, device=DEVICE), torch.randn(1, 4, 64, 64, device=DEVICE)
    each = {}
    for name in SAMPLERS:
        jobs = {OURS: ours(name, x, answer)} | ({REFERENCE: reference(name, x, answer)} if HAS_REFERENCE else {})
        if name == "ddpm":
            jobs[NOISE] = lambda: [torch.randn(x.shape, device=DEVICE) for _ in range(STEPS - 1)]  # the last step draws none
        with torch.inference_mode():
            taken = turns(jobs, 5 if quick else 25, calls=1 if quick else 10)
        a_step = {side: [1e6 * seconds / STEPS for seconds in numbers] for side, numbers in taken.items()}
        noise = a_step.pop(NOISE, None)
        with_noise = compared(samplers.__doc__, a_step, unit="microseconds a step")
        if noise:
            a_step = {side: [a - b for a, b in zip(numbers, noise, strict=True)] for side, numbers in a_step.items()}
        each[name] = compared(samplers.__doc__, a_step, goal=0.25, unit="microseconds a step")
        if noise:
            each[name] |= {"with the noise": with_noise, NOISE: statistics.median(noise)}
    worst = max(each, key=lambda name: each[name]["ratio"] or 0)
    return each[worst] | {"by sampler": each, "worst": worst}


def ours(name: str, x: Tensor, answer: Tensor) -> Callable[[], Tensor]:
    """One of our samplers, from noise to a latent."""
    schedule, sampler = NoiseSchedule.scaled_linear(), SAMPLERS[name]
    return lambda: sampler(lambda x, t: answer, x, schedule, steps=STEPS)


def reference(name: str, x: Tensor, answer: Tensor) -> Callable[[], Tensor]:
    """The reference's loop as its pipelines have it, with the plan of its timesteps, as ours is."""
    import diffusers

    cls, options = REFERENCES[name]
    options = options | {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = getattr(diffusers, cls)(timestep_spacing="leading", **options)

    def draw() -> Tensor:
        with warnings.catch_warnings(action="ignore"):
            scheduler.set_timesteps(STEPS, device=DEVICE)
        latents = x * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            scheduler.scale_model_input(latents, t)
            latents = scheduler.step(answer, t, latents, return_dict=False)[0]
        return latents

    return draw


def imports(quick: bool) -> dict:
    """A new Python that imports minildm and torch, against one that imports torch alone."""

    def fresh(code: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

    both = turns({OURS: fresh("import minildm, torch"), REFERENCE: fresh("import torch")}, 3 if quick else 9)
    report = compared(imports.__doc__, both, goal=1.05)
    draw = {OURS: fresh("import minildm.pipeline")}
    if HAS_REFERENCE:
        draw[REFERENCE] = fresh("from diffusers import StableDiffusionPipeline")
    return report | {"to draw": compared("All that a pipeline imports, likewise.", turns(draw, 1 if quick else 3))}

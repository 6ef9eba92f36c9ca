"""What a sampler costs beside its network: every one of ours against the reference's scheduler, with a network that is free.

And what it costs to import the package, each time in a Python of its own.
"""

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from timing import DEVICE, HAS_REFERENCE, OURS, REFERENCE, compared, turns
from torch import Tensor

from minildm.samplers import SAMPLERS
from minildm.schedule import NoiseSchedule

STEPS, SHAPE = 50, (1, 4, 64, 64)
REFERENCES = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False, "steps_offset": 1}),
    "euler": ("EulerDiscreteScheduler", {"steps_offset": 1}),
    "heun": ("HeunDiscreteScheduler", {"steps_offset": 1}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"steps_offset": 1}),
}


def samplers(quick: bool) -> dict:
    """A step of each sampler, of 50, on a latent of 1 x 4 x 64 x 64, with a model that answers at once."""
    with drawn_beforehand():
        each = {f"{name}, {kind}": measured(name, kind, quick) for name in SAMPLERS for kind in ("epsilon", "v_prediction")}
    worst = max(each, key=lambda name: each[name]["ratio"] or 0)
    return each[worst] | {"by sampler": each, "worst": worst, "ddpm with its noise": measured("ddpm", "epsilon", quick, None)}


def measured(name: str, kind: str, quick: bool, goal: float | None = 0.25) -> dict:
    """One sampler against the reference's, with one kind of prediction."""
    x, answer = torch.randn(SHAPE, device=DEVICE), torch.randn(SHAPE, device=DEVICE)
    jobs = {OURS: ours(name, kind, x, answer)} | ({REFERENCE: reference(name, kind, x, answer)} if HAS_REFERENCE else {})
    with torch.inference_mode():
        taken = turns(jobs, 5 if quick else 25, calls=1 if quick else 10)
    a_step = {side: [1e6 * seconds / STEPS for seconds in numbers] for side, numbers in taken.items()}
    return compared(samplers.__doc__, a_step, goal=goal, unit="microseconds a step")


@contextmanager
def drawn_beforehand() -> Iterator[None]:
    """Lets both libraries' ddpm have the noise of its steps for nothing: it takes longer than all the rest of ours."""
    noise = torch.randn(SHAPE, device=DEVICE)

    def given(*_, **__) -> Tensor:
        return noise

    with ExitStack() as stack:
        stack.enter_context(mock.patch("minildm.samplers._noise_like", new=given))
        if HAS_REFERENCE:
            stack.enter_context(mock.patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", new=given))
        yield


def ours(name: str, kind: str, x: Tensor, answer: Tensor) -> Callable[[], Tensor]:
    """One of our samplers, from noise to a latent."""
    schedule, sampler = NoiseSchedule.scaled_linear(), SAMPLERS[name]
    return lambda: sampler(lambda x, t: answer, x, schedule, steps=STEPS, prediction_type=kind)


def reference(name: str, kind: str, x: Tensor, answer: Tensor) -> Callable[[], Tensor]:
    """The reference's loop as its pipelines have it, with the plan of its timesteps, as ours is."""
    import diffusers

    cls, options = REFERENCES[name]
    options = options | {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = getattr(diffusers, cls)(timestep_spacing="leading", prediction_type=kind, **options)

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

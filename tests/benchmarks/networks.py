"""The networks, ours and the reference's, with one set of weights between them: time of a call and of a training step."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from timing import DEVICE, HAS_REFERENCE, OURS, REFERENCE, compared, turns
from torch import Tensor, nn

from minildm import configs, layouts
from minildm.guidance import guided
from minildm.samplers import dpmpp_2m
from minildm.schedule import NoiseSchedule
from minildm.unet import UNet, UNetConfig
from minildm.vae import AutoencoderKL, VAEConfig

TINY = replace(UNetConfig.tiny(), pooled_dim=None)  # pooled text goes another way in the reference
SMALL = UNetConfig(widths=(64, 128), depths=(1, 1), heads=(4, 4), blocks=1, context_dim=128, groups=16)


@dataclass(frozen=True)
class Setting:
    """How a network is run; both libraries are run in all of them, and each has its best one counted."""

    channels_last: bool = False
    dtype: torch.dtype = torch.float32
    compiled: bool = False

    def __str__(self) -> str:
        words = [str(self.dtype).removeprefix("torch."), "channels last" if self.channels_last else "contiguous"]
        return ", ".join(words + ["compiled"] * self.compiled)


SETTINGS = {
    "cpu": (Setting(), Setting(channels_last=True)),
    "cuda": (
        Setting(), Setting(dtype=torch.bfloat16), Setting(channels_last=True, dtype=torch.bfloat16),
        Setting(channels_last=True, dtype=torch.bfloat16, compiled=True),
    ),
}[DEVICE]  # fmt: skip


def laid_out(tensor: Tensor, setting: Setting) -> Tensor:
    """A tensor on the device, in the setting's memory format where it has four axes."""
    wanted = torch.channels_last if setting.channels_last and tensor.ndim == 4 else torch.contiguous_format
    return tensor.to(DEVICE, memory_format=wanted)


def pairs(cfg: UNetConfig | VAEConfig, half: bool = False, compiled: bool = True) -> Iterator[tuple[str, Setting, nn.Module]]:
    """Both libraries' network in every setting, all of one layout holding the same tensors.

    Args:
        cfg: the shape; any that the reference has.
        half: whether a setting's precision is the weights' own; otherwise it is for the caller to autocast.
        compiled: whether settings that compile, which takes a minute, are among them.
    """
    is_unet = isinstance(cfg, UNetConfig)
    torch.manual_seed(0)
    network = UNet(cfg) if is_unet else AutoencoderKL(cfg)
    for weight in network.parameters():
        if not weight.any():  # a branch that starts at zero would be spared some work by nobody, but its numbers are not usual
            nn.init.normal_(weight, std=0.02)
    table = layouts.names(network.state_dict(), layouts.DIFFUSERS_UNET if is_unet else layouts.DIFFUSERS_VAE)
    for setting in (setting for setting in SETTINGS if compiled or not setting.compiled):
        dtype = setting.dtype if half else torch.float32
        state = {name: laid_out(tensor.to(dtype), setting) for name, tensor in network.state_dict().items()}
        for side in (OURS, REFERENCE) if HAS_REFERENCE else (OURS,):
            with torch.device("meta"):
                made = type(network)(cfg) if side == OURS else reference_of(cfg)
            made.load_state_dict({n if side == OURS else table[n]: t for n, t in state.items()}, assign=True)
            yield side, setting, torch.compile(made) if setting.compiled else made


def reference_of(cfg: UNetConfig | VAEConfig) -> nn.Module:
    """The reference's network of the same shape."""
    import diffusers

    if isinstance(cfg, UNetConfig):
        return diffusers.UNet2DConditionModel.from_config(configs.write_unet(cfg, sample_size=64))
    return diffusers.AutoencoderKL.from_config(configs.write_vae(cfg, image_size=512))


def given(cfg: UNetConfig, batch: int, side: int, tokens: int, setting: Setting, half: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Noise, times and a context that fit a U-Net."""
    g = torch.Generator().manual_seed(0)
    dtype = setting.dtype if half else torch.float32
    x = torch.randn(batch, cfg.in_channels, side, side, generator=g).to(dtype)
    t, context = torch.randint(1000, (batch,), generator=g), torch.randn(batch, tokens, cfg.context_dim, generator=g).to(dtype)
    return laid_out(x, setting), t.to(DEVICE), context.to(DEVICE)


def tensor_of(answer: object) -> Tensor:
    """The prediction: ours is a tensor, the reference's has one."""
    return answer if isinstance(answer, Tensor) else answer.sample


def step_of(network: nn.Module, setting: Setting, inputs: tuple, optimizer: torch.optim.Optimizer | None) -> Callable[[], None]:
    """Forward and backward, and where there is an optimiser a whole training step."""

    def step() -> None:
        network.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=setting.dtype == torch.bfloat16):
            loss = tensor_of(network(*inputs)).square().mean()
        loss.backward()
        if optimizer:
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()

    return step


def steps(
    cfg: UNetConfig, batch: int, side: int, rounds: int, whole: bool = False, compiled: bool = True
) -> dict[str, list[float]]:
    """Seconds of a forward and backward pass of every contestant, or of a whole training step."""
    jobs = {}
    for library, setting, network in pairs(cfg, compiled=compiled):
        optimizer = None
        if whole:  # the step of one library would change the other's weights
            network.load_state_dict({name: tensor.clone() for name, tensor in network.state_dict().items()}, assign=True)
            optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=library == OURS or None)
        inputs = given(cfg, batch, side, 24, setting, half=False)
        jobs[f"{library}, {setting}"] = step_of(network.train(), setting, inputs, optimizer)
    return turns(jobs, rounds)


def unet_step(quick: bool) -> dict:
    """Forward and backward of the tiny preset at 8 x 8 on 1, 8 and 32 latents, and of a small U-Net on 16 of 16 x 16."""
    cases = {f"tiny, {n} of 8 x 8": (TINY, n, 8) for n in (1, 8, 32)} | {"small, 16 of 16 x 16": (SMALL, 16, 16)}
    by_case = {name: compared(name, steps(*case, 3 if quick else 15), goal=0.8) for name, case in cases.items()}
    worst = max(by_case, key=lambda name: by_case[name]["ratio"] or 0)
    return by_case[worst] | {"what": unet_step.__doc__, "by case": by_case, "worst": worst}


def training(quick: bool) -> dict:
    """A training step of the small U-Net on 32 latents of 8 x 8: ours with fused AdamW, the reference's with the default."""
    report = compared(training.__doc__, steps(SMALL, 32, 8, 3 if quick else 15, whole=True))
    for contestant in report["contestants"].values():
        contestant["steps a second"] = 1 / contestant["median"]
    return report


def resolution(quick: bool) -> dict:
    """Forward and backward of the small U-Net on 4 latents, by the latents' side: 8, 16, 32 and 64."""
    sides = (8, 16) if quick else (8, 16, 32, 64)
    by_side = {side: compared(resolution.__doc__, steps(SMALL, 4, side, 2 if quick else 3, compiled=False)) for side in sides}
    worst = max(by_side, key=lambda side: by_side[side]["ratio"] or 0)
    return by_side[worst] | {"by side": {side: report["contestants"] for side, report in by_side.items()}, "worst at": worst}


def calls(cfg: UNetConfig, batch: int, side: int, tokens: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of a call without gradient of every contestant."""
    jobs = {}
    for library, setting, network in pairs(cfg, half=True):
        inputs = given(cfg, batch, side, tokens, setting, half=True)
        jobs[f"{library}, {setting}"] = partial(network.eval(), *inputs)
    with torch.inference_mode():
        return turns(jobs, rounds)


def sd15(quick: bool) -> dict:
    """A call of Stable Diffusion 1.5's U-Net: 859,520,964 parameters, one latent of 64 x 64, 77 tokens."""
    return compared(sd15.__doc__, calls(UNetConfig.sd15(), 1, 16 if quick else 64, 77, 1 if quick else 4), goal=1.0)


def decode(quick: bool) -> dict:
    """Stable Diffusion's decoder, one latent of 64 x 64 to a picture of 512 x 512."""
    jobs, side = {}, 16 if quick else 64
    for library, setting, network in pairs(VAEConfig.sd15(), half=True):
        z = laid_out(torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0)).to(setting.dtype), setting)
        jobs[f"{library}, {setting}"] = partial(network.eval().decode, z)
    with torch.inference_mode():
        return compared(decode.__doc__, turns(jobs, 1 if quick else 4), goal=1.0)


def sampling(quick: bool) -> dict:
    """16 latents of 8 x 8 in 20 guided steps of DPM-Solver++(2M) with the small U-Net, as each library's pipeline draws."""
    jobs, number = {}, 2 if quick else 16
    for library, setting, network in pairs(SMALL, half=True):
        x, _, context = given(SMALL, number, 8, 24, setting, half=True)
        draw = _draw_ours if library == OURS else _draw_reference
        jobs[f"{library}, {setting}"] = draw(network.eval(), x, context)
    with torch.inference_mode():
        report = compared(sampling.__doc__, turns(jobs, 2 if quick else 4))
    for contestant in report["contestants"].values():
        contestant["latents a second"] = number / contestant["median"]
    return report


def _draw_ours(network: nn.Module, x: Tensor, context: Tensor) -> Callable[[], Tensor]:
    schedule = NoiseSchedule.scaled_linear()
    return lambda: dpmpp_2m(guided(network, context, context[:1], scale=3.0), x, schedule, steps=20)


def _draw_reference(network: nn.Module, x: Tensor, context: Tensor) -> Callable[[], Tensor]:
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    both = torch.cat([context[:1].expand_as(context), context])

    def draw() -> Tensor:
        scheduler.set_timesteps(20, device=DEVICE)
        latents = x
        for t in scheduler.timesteps:
            without, told = network(scheduler.scale_model_input(torch.cat([latents] * 2), t), t, both).sample.chunk(2)
            latents = scheduler.step(without + 3.0 * (told - without), t, latents, return_dict=False)[0]
        return latents

    return draw

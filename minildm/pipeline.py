"""The whole of it: a caption in, a picture out.

A pipeline owns the parts and joins them; it holds no arithmetic of its own beyond the scaling factor and the final shift from
[-1, 1] to [0, 1].
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from minildm.clip import TextEncoder
from minildm.compvis import read_compvis
from minildm.controlnet import ControlNet, controlled
from minildm.convert import Parts, read_diffusers, write_diffusers
from minildm.editing import keep, latent_mask, skipped, with_mask
from minildm.guidance import guided
from minildm.machine import best_device
from minildm.samplers import SAMPLERS, timesteps_of
from minildm.schedule import NoiseSchedule
from minildm.sdxl import SIZE_FEATURES, Framing, SDXLText, TokenizerPair, describe, hand_over
from minildm.store import read_model, write_model
from minildm.tiling import decode_sparingly
from minildm.tokenizer import Tokenizer
from minildm.unet import UNet
from minildm.vae import AutoencoderKL

Device = str | torch.device | None


@dataclass
class Pipeline:
    """A latent diffusion model, ready to draw from words, and to draw over a picture."""

    unet: UNet
    vae: AutoencoderKL
    text: TextEncoder | SDXLText
    tokenizer: Tokenizer | TokenizerPair
    schedule: NoiseSchedule
    prediction_type: str = "epsilon"
    spacing: str = "leading"
    image_size: int = 512  # side of the pictures it was trained on, in pixels
    zero_negative: bool = False  # without a negative prompt, SDXL moves away from zeros, not from the empty caption
    guidance_scale: float = 7.5  # what it is drawn with where no other is asked for

    def __post_init__(self):
        for part in self._networks().values():
            part.eval()

    @torch.inference_mode()
    def __call__(
        self, prompt: str | Sequence[str], negative_prompt: str = "", steps: int = 20, guidance_scale: float | None = None,
        sampler: str = "dpmpp_2m", seed: int | None = None, n: int = 1, *, rescale: float = 0.0,
        height: int | None = None, width: int | None = None, latents: Tensor | None = None,
        framing: Framing | None = None, refiner: "Pipeline | None" = None, refine_from: float = 0.8,
        image: Tensor | None = None, strength: float = 0.8, mask: Tensor | None = None,
        control: ControlNet | None = None, hint: Tensor | None = None, control_scale: float = 1.0,
        callback: Callable[[int, int, Tensor, Tensor], None] | None = None,
    ) -> Tensor:  # fmt: skip
        """Draws pictures.

        Args:
            prompt: a caption, or several.
            negative_prompt: what to move away from; the empty caption by default.
            steps: how many times the sampler asks the U-Net, about; from 1 to the schedule's T.
            guidance_scale: how much more than the data to obey the caption; 1 for no guidance, None for the model's own, which
                is 7.5 for published ones.
            sampler: "ddim", "ddpm", "euler", "heun" or "dpmpp_2m".
            seed: picture k of the answer starts from noise of seed + k, whatever is drawn beside it, which changes rounding
                alone (in float64 not a bit); None for a new one.
            n: pictures for each prompt.
            rescale: see `guided`.
            height: in pixels, a multiple of the autoencoder's downsampling; that of image or hint, or `image_size`, by default.
            width: likewise.
            latents: starting noise (N, C, h, w) in place of the seed's.
            framing: what SDXL is told of the picture's sizes; by default, that it shows the whole of what was photographed.
            refiner: SDXL's second model, to finish what this one began.
            refine_from: the share of the schedule, in [0, 1], that this one does alone.
            image: to start from, (N or 1, 3, height, width) in [0, 1].
            strength: how far to go from it, in [0, 1]: the share of the steps that are taken.  0 returns what the autoencoder
                makes of the image; 1 starts from noise alone, as if there were none (but where the mask keeps it).
            mask: what of the image to repaint, (N or 1, 1, height, width): 1 repaint, 0 keep.  The U-Net sees it if it has the
                channels for it; any other is made to keep the rest, see `keep`.
            control: a ControlNet for this U-Net,
            hint: what it is shown, (N or 1, C, height, width) in [0, 1],
            control_scale: and how strongly it speaks.
            callback: see `ddim`.

        Returns:
            (len(prompts) * n, 3, height, width) in [0, 1], prompt by prompt, on the CPU.

        Raises:
            ValueError: an argument is out of its range; says which, and what would do.
            FloatingPointError: the U-Net returned something that is not a number.
        """
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler is {sampler!r}; choose one of {', '.join(SAMPLERS)}")
        if n < 1:
            raise ValueError(f"n is {n}; ask for at least 1 picture")
        if not 0 <= refine_from <= 1:
            raise ValueError(f"refine_from is {refine_from}; expected a share of the schedule, in [0, 1]")
        timesteps = timesteps_of(SAMPLERS[sampler], self.schedule, steps, self.spacing)
        prompts = [p for p in ([prompt] if isinstance(prompt, str) else prompt) for _ in range(n)]
        guidance_scale = self.guidance_scale if guidance_scale is None else guidance_scale
        generators = [torch.Generator().manual_seed(s) for s in _seeds(seed, len(prompts))]
        skip = 0 if image is None else skipped(steps, strength)
        self._check_edit(len(prompts), latents, image, mask, control, hint)
        x = self._noise(generators, latents, height, width, hint if image is None else image).to(self.device, self.dtype)
        size = tuple(side * self.vae.cfg.downsampling for side in x.shape[2:])

        unet, given = self.unet, None
        if self._inpaints:
            unet = with_mask(unet, *self._masked(image, mask))
        if control is not None:
            unet, given = controlled(unet, control, control_scale), hint.to(x)
        told = (prompts, negative_prompt, size, framing or Framing(), guidance_scale, rescale)
        model = self.model(*told, unet=unet, hint=given)
        if refiner is not None:
            if refiner.prediction_type != self.prediction_type:
                raise ValueError(f"the refiner predicts {refiner.prediction_type}, this model {self.prediction_type}: no pair")
            model = hand_over(model, refiner.model(*told), cutoff=round(self.schedule.T * (1 - refine_from)))

        known = None if image is None else self.encode(image).expand_as(x)
        if skip == steps:
            return self.decode(known)
        x = self.schedule.add_noise(known, x, timesteps[skip]) if skip else x
        holes = None if mask is None or self._inpaints else latent_mask(mask, self.vae.cfg.downsampling).to(x)
        if holes is not None:
            model = keep(model, self.schedule, known, holes, self.prediction_type)
        z = SAMPLERS[sampler](
            model, x, self.schedule, steps=steps, prediction_type=self.prediction_type, spacing=self.spacing,
            generator=generators, callback=callback, skip=skip,
        )  # fmt: skip
        return self.decode(z if holes is None else holes * z + (1 - holes) * known)  # ddim ends with a trace of noise

    @torch.inference_mode()
    def model(
        self, prompts: Sequence[str], negative_prompt: str = "", size: tuple[int, int] | None = None,
        framing: Framing | None = None, guidance_scale: float = 7.5, rescale: float = 0.0,
        unet: Callable[..., Tensor] | None = None, hint: Tensor | None = None,
    ) -> Callable[[Tensor, Tensor], Tensor]:  # fmt: skip
        """The U-Net, told what to draw: a `model(x, t)` for any sampler.

        Arguments as above, size in pixels; unet is what to ask in place of the U-Net alone, and hint goes to it as it is.
        """
        beside = {} if hint is None else {"hint": hint}
        cond = self.condition(prompts, size, framing) | beside
        uncond = self.condition([negative_prompt], size, framing, negative=True) | beside
        return guided(unet or self.unet, cond, uncond, scale=guidance_scale, rescale=rescale)

    @torch.inference_mode()
    def condition(
        self, prompts: Sequence[str], size: tuple[int, int] | None = None, framing: Framing | None = None,
        negative: bool = False,
    ) -> dict[str, Tensor]:  # fmt: skip
        """What the U-Net is told of these captions: its keyword arguments, each of batch len(prompts)."""
        hidden, pooled = self.text(self.tokenizer(list(prompts)).to(self.device))
        if negative and self.zero_negative and not any(prompts):
            hidden, pooled = torch.zeros_like(hidden), torch.zeros_like(pooled)
        if self.unet.cfg.pooled_dim is None:
            return {"context": hidden}
        if beside := self.unet.cfg.pooled_dim - pooled.shape[1]:
            size = size or (self.image_size, self.image_size)
            told = describe(framing or Framing(), size, beside // SIZE_FEATURES, negative).to(pooled)
            pooled = torch.cat([pooled, told.expand(len(pooled), -1)], dim=1)
        return {"context": hidden, "pooled": pooled}

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """Pictures (N, 3, H, W) in [0, 1] to scaled latents (N, C, h, w), the likeliest ones.

        Raises:
            ValueError: values outside [0, 1], or sides that do not divide; says which.
        """
        low, high = images.min().item(), images.max().item()
        if not (low >= 0 and high <= 1):
            raise ValueError(f"images range from {low:.3g} to {high:.3g}; expected [0, 1]: divide bytes by 255")
        z = self.vae.encode((images * 2 - 1).to(self.vae.quant_conv.weight)).mode()
        return (z * self.vae.cfg.scaling_factor).to(self.dtype)

    @torch.inference_mode()
    def decode(self, z: Tensor) -> Tensor:
        """Scaled latents (N, C, h, w) to pictures (N, 3, H, W) in [0, 1], on the CPU; errors as `decode_sparingly`."""
        z = z.to(self.vae.quant_conv.weight) / self.vae.cfg.scaling_factor
        return (decode_sparingly(self.vae.decode, z).float().cpu() / 2 + 0.5).clamp(0, 1)

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the networks' weights."""
        return self.unet.conv_in.weight.dtype

    def to(self, *args, **kwargs) -> "Pipeline":
        """Moves the networks as `nn.Module.to`; SDXL's autoencoder, which overflows in float16, stays in float32."""
        for part in self._networks().values():
            part.to(*args, **kwargs)
        if self.unet.cfg.pooled_dim and self.vae.quant_conv.weight.dtype == torch.float16:
            self.vae.float()
        return self

    def save(self, folder: str | Path) -> None:
        """Writes model.safetensors, the tokenizer's files and model.json to a folder; once model.json is there, it is whole.

        Raises:
            OSError: the folder cannot be written.
        """
        write_model(Path(folder), self._parts(), self.guidance_scale)

    @classmethod
    def load(
        cls, folder: str | Path, *, device: Device = None, dtype: torch.dtype | None = None,
        vocabulary: str | Path | None = None, prediction_type: str | None = None,
    ) -> "Pipeline":  # fmt: skip
        """Reads what `save` wrote; or a folder or a file as `from_diffusers` and `from_compvis` do.

        Args:
            folder: that folder.
            vocabulary, prediction_type: for a single file, as in `read_compvis`; folders say both themselves.
            device: where to put the networks; the best there is if None.
            dtype: their precision; as stored if None.

        Raises:
            FileNotFoundError: there is no model in the folder.
            ValueError: what is there is damaged, or is not a minildm model; says what was found.
        """
        folder = Path(folder)
        if folder.is_file():
            return cls.from_compvis(folder, vocabulary, prediction_type, device=device, dtype=dtype)
        if (folder / "model_index.json").exists():
            return cls.from_diffusers(folder, device=device, dtype=dtype)
        parts, guidance_scale = read_model(folder)
        return cls(*parts, guidance_scale).to(device or best_device(), dtype)

    @classmethod
    def from_diffusers(cls, folder: str | Path, *, device: Device = None, dtype: torch.dtype | None = None) -> "Pipeline":
        """Reads a published model in the diffusers layout; arguments and errors as `read_diffusers`."""
        return cls(*read_diffusers(Path(folder), device, dtype))

    @classmethod
    def from_compvis(
        cls, file: str | Path, vocabulary: str | Path | None = None, prediction_type: str | None = None, *,
        device: Device = None, dtype: torch.dtype | None = None,
    ) -> "Pipeline":  # fmt: skip
        """Reads a published model in the CompVis layout, a single file; arguments and errors as `read_compvis`."""
        return cls(*read_compvis(Path(file), vocabulary, prediction_type, device, dtype))

    def to_diffusers(self, folder: str | Path) -> None:
        """Writes the model in the diffusers layout; errors as `write_diffusers`."""
        write_diffusers(Path(folder), self._parts())

    def _parts(self) -> Parts:
        return Parts(*(getattr(self, name) for name in Parts._fields))

    def _networks(self) -> dict[str, nn.Module]:
        return {"unet": self.unet, "vae": self.vae, "text": self.text}

    @property
    def _inpaints(self) -> bool:
        """Whether the U-Net itself sees a mask and a masked picture."""
        return self.unet.cfg.in_channels == 2 * self.vae.cfg.latent_channels + 1

    def _check_edit(
        self, count: int, latents: Tensor | None, image: Tensor | None, mask: Tensor | None, control: ControlNet | None,
        hint: Tensor | None,
    ) -> None:  # fmt: skip
        """What is given beside the prompt has to go together."""
        if mask is not None and image is None:
            raise ValueError("a mask says what of an image to repaint: give image, too")
        if self._inpaints and (mask is None or control is not None):
            raise ValueError("this U-Net repaints pictures: give image and mask, and no control")
        if (control is None) != (hint is None):
            raise ValueError("a hint is read by a ControlNet: give control and hint, or neither")
        given = {"image": (image, 3), "mask": (mask, 1), "hint": (hint, getattr(control, "hint_channels", 0))}
        given = {name: (tuple(p.shape), channels) for name, (p, channels) in given.items() if p is not None}
        if latents is not None and given:
            f = self.vae.cfg.downsampling
            given[f"latents x {f}"] = (*latents.shape[:2], *(f * side for side in latents.shape[2:])), latents.shape[1]
        size = next((shape[2:] for shape, _ in given.values()), ())
        for name, (shape, channels) in given.items():
            if shape not in [(batch, channels, *size) for batch in (1, count)]:
                raise ValueError(f"{name}: {shape}; expected ({count} or 1, {channels}, {', '.join(map(str, size))})")

    def _noise(
        self, generators: list[torch.Generator], latents: Tensor | None, height: int | None, width: int | None,
        like: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Standard normal noise (N, C, h, w), in the size that is asked for in one way or another."""
        if (latents is not None or like is not None) and (height is not None or width is not None):
            raise ValueError("latents, image and hint have a size of their own: give one of them, or height and width")
        if latents is not None:
            return latents
        sides = (height, width) if like is None else like.shape[2:]
        shape = self._latent_shape(*(self.image_size if side is None else side for side in sides))
        return torch.cat([torch.randn(1, *shape, generator=g) for g in generators])

    def _masked(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """What an inpainting U-Net sees beside x: the mask, and latents of the picture with grey where it repaints."""
        holes = latent_mask(mask, self.vae.cfg.downsampling) >= 0.5
        return holes, self.encode(torch.where(mask.to(image) < 0.5, image, 0.5))

    def _latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        f = self.vae.cfg.downsampling
        step = f * self.unet.cfg.patch * 2 ** (len(self.unet.cfg.widths) - 1)
        for name, side in (("height", height), ("width", width)):
            if side < step or side % step:
                raise ValueError(f"{name} is {side}; this model draws sides that are multiples of {step} pixels")
        return self.vae.cfg.latent_channels, height // f, width // f


def _seeds(seed: int | None, count: int) -> list[int]:
    start = int.from_bytes(os.urandom(7), "big") if seed is None else seed
    return [start + k for k in range(count)]

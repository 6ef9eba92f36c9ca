"""The whole of it: a caption in, a picture out.

A pipeline owns the parts and joins them; it holds no arithmetic of its own beyond the scaling factor and the final shift from
[-1, 1] to [0, 1].
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minildm.checkpoint import write_atomically
from minildm.clip import TextConfig, TextEncoder
from minildm.compvis import read_compvis
from minildm.convert import Parts, read_diffusers, write_diffusers
from minildm.guidance import guided
from minildm.machine import best_device
from minildm.samplers import SAMPLERS
from minildm.schedule import NoiseSchedule
from minildm.sdxl import SIZE_FEATURES, Framing, SDXLText, SDXLTextConfig, TokenizerPair, describe, hand_over
from minildm.tiling import decode_sparingly
from minildm.tokenizer import Tokenizer
from minildm.unet import UNet, UNetConfig
from minildm.vae import AutoencoderKL, VAEConfig

FORMAT = "minildm-1"
Device = str | torch.device | None


@dataclass
class Pipeline:
    """A text-to-image latent diffusion model, ready to draw."""

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
        self,
        prompt: str | Sequence[str],
        negative_prompt: str = "",
        steps: int = 20,
        guidance_scale: float | None = None,
        sampler: str = "dpmpp_2m",
        seed: int | None = None,
        n: int = 1,
        *,
        rescale: float = 0.0,
        height: int | None = None,
        width: int | None = None,
        latents: Tensor | None = None,
        framing: Framing | None = None,
        refiner: "Pipeline | None" = None,
        refine_from: float = 0.8,
        callback: Callable[[int, int, Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        """Draws pictures.

        Args:
            prompt: a caption, or several.
            negative_prompt: what to move away from; the empty caption by default.
            steps: how many times the sampler asks the U-Net, about; from 1 to the schedule's T.
            guidance_scale: how much more than the data to obey the caption; 1 for no guidance, None for the model's own, which
                is 7.5 for published ones.
            sampler: "ddim", "ddpm", "euler", "heun" or "dpmpp_2m".
            seed: picture k of the answer starts from noise of seed + k, whatever is drawn beside it; None for a new one.
            n: pictures for each prompt.
            rescale: see `guided`.
            height: in pixels, a multiple of the autoencoder's downsampling; `image_size` by default.
            width: likewise.
            latents: starting noise (N, C, h, w) in place of the seed's.
            framing: what SDXL is told of the picture's sizes; by default, that it shows the whole of what was photographed.
            refiner: SDXL's second model, to finish what this one began.
            refine_from: the share of the schedule, in [0, 1], that this one does alone.
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
        prompts = [p for p in ([prompt] if isinstance(prompt, str) else prompt) for _ in range(n)]
        guidance_scale = self.guidance_scale if guidance_scale is None else guidance_scale
        if not 0 <= refine_from <= 1:
            raise ValueError(f"refine_from is {refine_from}; expected a share of the schedule, in [0, 1]")
        generators = [torch.Generator().manual_seed(s) for s in _seeds(seed, len(prompts))]
        if latents is not None and (height is not None or width is not None):
            raise ValueError("latents have a size of their own: give them, or height and width")
        if latents is None:
            shape = self._latent_shape(*(self.image_size if side is None else side for side in (height, width)))
            latents = torch.cat([torch.randn(1, *shape, generator=g) for g in generators])
        x = latents.to(self.device, self.dtype)
        size = tuple(side * self.vae.cfg.downsampling for side in x.shape[2:])
        framing = framing or Framing()
        model = self.model(prompts, negative_prompt, size, framing, guidance_scale, rescale)
        if refiner is not None:
            if refiner.prediction_type != self.prediction_type:
                raise ValueError(f"the refiner predicts {refiner.prediction_type}, this model {self.prediction_type}: no pair")
            finish = refiner.model(prompts, negative_prompt, size, framing, guidance_scale, rescale)
            model = hand_over(model, finish, cutoff=round(self.schedule.T * (1 - refine_from)))
        z = SAMPLERS[sampler](
            model, x, self.schedule, steps=steps, prediction_type=self.prediction_type, spacing=self.spacing,
            generator=generators, callback=callback,
        )  # fmt: skip
        return self.decode(z)

    @torch.inference_mode()
    def model(
        self,
        prompts: Sequence[str],
        negative_prompt: str = "",
        size: tuple[int, int] | None = None,
        framing: Framing | None = None,
        guidance_scale: float = 7.5,
        rescale: float = 0.0,
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """The U-Net, told what to draw: a `model(x, t)` for any sampler.  Arguments as above, size in pixels."""
        cond = self.condition(prompts, size, framing)
        uncond = self.condition([negative_prompt], size, framing, negative=True)
        return guided(self.unet, cond, uncond, scale=guidance_scale, rescale=rescale)

    @torch.inference_mode()
    def condition(
        self,
        prompts: Sequence[str],
        size: tuple[int, int] | None = None,
        framing: Framing | None = None,
        negative: bool = False,
    ) -> dict[str, Tensor]:
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
        folder = Path(folder)
        (folder / "model.json").unlink(missing_ok=True)  # until all is written anew there is no model here
        tensors = {f"{n}.{k}": v.contiguous() for n, part in self._networks().items() for k, v in part.state_dict().items()}
        tensors["alpha_bar"] = self.schedule.alpha_bar
        settings = {
            "format": FORMAT, "prediction_type": self.prediction_type, "spacing": self.spacing, "image_size": self.image_size,
            "zero_negative": self.zero_negative, "guidance_scale": self.guidance_scale,
            **{name: asdict(part.cfg) for name, part in self._networks().items()},
        }  # fmt: skip
        write_atomically(folder / "model.safetensors", lambda beside: save_file(tensors, beside))
        self.tokenizer.save(folder)
        write_atomically(folder / "model.json", lambda beside: beside.write_text(json.dumps(settings, indent=1)))

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
        vocabulary: str | Path | None = None,
        prediction_type: str | None = None,
    ) -> "Pipeline":
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
        if not (folder / "model.json").exists():
            raise FileNotFoundError(f'no model in {folder}: expected model.json; use "shapes32", or train: `minildm demo`')
        try:
            settings = json.loads((folder / "model.json").read_text())
            if settings.get("format") != FORMAT:
                raise ValueError(f"format is {settings.get('format')!r}, expected {FORMAT!r}")
            with torch.device("meta"):
                unet = UNet(UNetConfig(**_tuples(settings["unet"])))
                vae = AutoencoderKL(VAEConfig(**_tuples(settings["vae"])))
                text = _text(settings["text"])
            with safe_open(folder / "model.safetensors", framework="pt") as f:
                alpha_bar = f.get_tensor("alpha_bar")
                for name, part in {"unet": unet, "vae": vae, "text": text}.items():
                    keys = [k for k in f.keys() if k.startswith(f"{name}.")]  # noqa: SIM118
                    part.load_state_dict({k.removeprefix(f"{name}."): f.get_tensor(k) for k in keys}, assign=True)
            tokenizer = (TokenizerPair if isinstance(text, SDXLText) else Tokenizer).load(folder)
            pipe = cls(
                unet, vae, text, tokenizer, NoiseSchedule(alpha_bar), settings["prediction_type"], settings["spacing"],
                settings["image_size"], settings.get("zero_negative", False), settings.get("guidance_scale", 7.5),
            )  # fmt: skip
        except (KeyError, TypeError, AttributeError, RuntimeError, SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{folder} does not hold a whole minildm model ({error}); train or copy it again") from error
        return pipe.to(device or best_device(), dtype)

    @classmethod
    def from_diffusers(cls, folder: str | Path, *, device: Device = None, dtype: torch.dtype | None = None) -> "Pipeline":
        """Reads a published model in the diffusers layout; arguments and errors as `read_diffusers`."""
        return cls(*read_diffusers(Path(folder), device, dtype))

    @classmethod
    def from_compvis(
        cls,
        file: str | Path,
        vocabulary: str | Path | None = None,
        prediction_type: str | None = None,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> "Pipeline":
        """Reads a published model in the CompVis layout, a single file; arguments and errors as `read_compvis`."""
        return cls(*read_compvis(Path(file), vocabulary, prediction_type, device, dtype))

    def to_diffusers(self, folder: str | Path) -> None:
        """Writes the model in the diffusers layout; errors as `write_diffusers`."""
        write_diffusers(Path(folder), Parts(*(getattr(self, name) for name in Parts._fields)))

    def _networks(self) -> dict[str, nn.Module]:
        return {"unet": self.unet, "vae": self.vae, "text": self.text}

    def _latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        f = self.vae.cfg.downsampling
        step = f * self.unet.cfg.patch * 2 ** (len(self.unet.cfg.widths) - 1)
        for name, side in (("height", height), ("width", width)):
            if side < step or side % step:
                raise ValueError(f"{name} is {side}; this model draws sides that are multiples of {step} pixels")
        return self.vae.cfg.latent_channels, height // f, width // f


def _text(settings: dict) -> TextEncoder | SDXLText:
    if "large" in settings:
        return SDXLText(SDXLTextConfig(*(TextConfig(**settings[name]) for name in ("small", "large"))))
    return TextEncoder(TextConfig(**settings))


def _seeds(seed: int | None, count: int) -> list[int]:
    start = int.from_bytes(os.urandom(7), "big") if seed is None else seed
    return [start + k for k in range(count)]


def _tuples(settings: dict) -> dict:
    """JSON has no tuples: its lists become them again."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}

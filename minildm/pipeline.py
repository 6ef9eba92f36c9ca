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

from minildm.clip import TextConfig, TextEncoder
from minildm.guidance import guided
from minildm.samplers import SAMPLERS
from minildm.schedule import NoiseSchedule
from minildm.tokenizer import Tokenizer
from minildm.checkpoint import write_atomically
from minildm.train import best_device
from minildm.unet import UNet, UNetConfig
from minildm.vae import AutoencoderKL, VAEConfig

FORMAT = "minildm-1"


@dataclass
class Pipeline:
    """A text-to-image latent diffusion model, ready to draw."""

    unet: UNet
    vae: AutoencoderKL
    text: TextEncoder
    tokenizer: Tokenizer
    schedule: NoiseSchedule
    prediction_type: str = "epsilon"
    spacing: str = "leading"
    image_size: int = 512  # side of the pictures it was trained on, in pixels

    def __post_init__(self):
        for part in self._networks().values():
            part.eval()

    @torch.inference_mode()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str = "",
        steps: int = 20,
        guidance_scale: float = 7.5,
        sampler: str = "dpmpp_2m",
        seed: int | None = None,
        n: int = 1,
        *,
        rescale: float = 0.0,
        height: int | None = None,
        width: int | None = None,
        latents: Tensor | None = None,
        callback: Callable[[int, int, Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        """Draws pictures.

        Args:
            prompt: a caption, or several.
            negative_prompt: what to move away from; the empty caption by default.
            steps: how many times the sampler asks the U-Net, about; from 1 to the schedule's T.
            guidance_scale: how much more than the data to obey the caption; 1 for no guidance.
            sampler: "ddim", "ddpm", "euler", "heun" or "dpmpp_2m".
            seed: picture k of the answer starts from noise of seed + k, whatever is drawn beside it; None for a new one each time.
            n: pictures for each prompt.
            rescale: see `guided`.
            height: in pixels, a multiple of the autoencoder's downsampling; `image_size` by default.
            width: likewise.
            latents: starting noise (N, C, h, w) in place of the seed's.
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
        cond, uncond = self.condition(prompts), self.condition([negative_prompt])
        generators = [torch.Generator().manual_seed(s) for s in _seeds(seed, len(prompts))]
        if latents is None:
            shape = self._latent_shape(height or self.image_size, width or self.image_size)
            latents = torch.cat([torch.randn(1, *shape, generator=g) for g in generators])
        x = latents.to(self.device, self.dtype)
        model = guided(self.unet, cond, uncond, scale=guidance_scale, rescale=rescale)
        z = SAMPLERS[sampler](
            model, x, self.schedule, steps=steps, prediction_type=self.prediction_type, spacing=self.spacing,
            generator=generators, callback=callback,
        )  # fmt: skip
        return self.decode(z)

    @torch.inference_mode()
    def condition(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """What the U-Net is told of these captions: its keyword arguments, each of batch len(prompts)."""
        hidden, pooled = self.text(self.tokenizer(list(prompts)).to(self.device))
        return {"context": hidden, "pooled": pooled} if self.unet.cfg.pooled_dim else {"context": hidden}

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """Pictures (N, 3, H, W) in [0, 1] to scaled latents (N, C, h, w), the likeliest ones.

        Raises:
            ValueError: values outside [0, 1], or sides that do not divide; says which.
        """
        low, high = images.min().item(), images.max().item()
        if not (low >= 0 and high <= 1):
            raise ValueError(f"images range from {low:.3g} to {high:.3g}; expected [0, 1]: divide bytes by 255")
        z = self.vae.encode((images * 2 - 1).to(self.device, self.dtype)).mode()
        return z * self.vae.cfg.scaling_factor

    @torch.inference_mode()
    def decode(self, z: Tensor) -> Tensor:
        """Scaled latents (N, C, h, w) to pictures (N, 3, H, W) in [0, 1], on the CPU, one at a time to spare memory."""
        pictures = [self.vae.decode(one / self.vae.cfg.scaling_factor) for one in z.split(1 if z.shape[-1] > 32 else 64)]
        return (torch.cat(pictures).float().cpu() / 2 + 0.5).clamp(0, 1)

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the networks' weights."""
        return self.unet.conv_in.weight.dtype

    def to(self, *args, **kwargs) -> "Pipeline":
        """Moves the networks to a device or a dtype, as `nn.Module.to`."""
        for part in self._networks().values():
            part.to(*args, **kwargs)
        return self

    def save(self, folder: str | Path) -> None:
        """Writes model.safetensors, model.json and the tokenizer's files to a folder; the model is whole once model.json is there.

        Raises:
            OSError: the folder cannot be written.
        """
        folder = Path(folder)
        tensors = {f"{n}.{k}": v.contiguous() for n, part in self._networks().items() for k, v in part.state_dict().items()}
        tensors["alpha_bar"] = self.schedule.alpha_bar
        settings = {
            "format": FORMAT, "prediction_type": self.prediction_type, "spacing": self.spacing, "image_size": self.image_size,
            **{name: asdict(part.cfg) for name, part in self._networks().items()},
        }  # fmt: skip
        write_atomically(folder / "model.safetensors", lambda beside: save_file(tensors, beside))
        self.tokenizer.save(folder)
        write_atomically(folder / "model.json", lambda beside: beside.write_text(json.dumps(settings, indent=1)))

    @classmethod
    def load(
        cls, folder: str | Path, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> "Pipeline":
        """Reads what `save` wrote.

        Args:
            folder: that folder.
            device: where to put the networks; the best there is if None.
            dtype: their precision; as stored if None.

        Raises:
            FileNotFoundError: there is no model in the folder.
            ValueError: what is there is damaged, or is not a minildm model; says what was found.
        """
        folder = Path(folder)
        if not (folder / "model.json").exists():
            raise FileNotFoundError(f"no model in {folder}: expected model.json there; train one with `python -m minildm demo`")
        try:
            settings = json.loads((folder / "model.json").read_text())
            if settings.get("format") != FORMAT:
                raise ValueError(f"format is {settings.get('format')!r}, expected {FORMAT!r}")
            with torch.device("meta"):
                unet = UNet(UNetConfig(**_tuples(settings["unet"])))
                vae = AutoencoderKL(VAEConfig(**_tuples(settings["vae"])))
                text = TextEncoder(TextConfig(**settings["text"]))
            with safe_open(folder / "model.safetensors", framework="pt") as f:
                alpha_bar = f.get_tensor("alpha_bar")
                for name, part in {"unet": unet, "vae": vae, "text": text}.items():
                    keys = [k for k in f.keys() if k.startswith(f"{name}.")]  # noqa: SIM118
                    part.load_state_dict({k.removeprefix(f"{name}."): f.get_tensor(k) for k in keys}, assign=True)
        except (KeyError, TypeError, AttributeError, RuntimeError, SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{folder} does not hold a whole minildm model ({error}); train or copy it again") from error
        pipe = cls(
            unet, vae, text, Tokenizer.load(folder), NoiseSchedule(alpha_bar),
            settings["prediction_type"], settings["spacing"], settings["image_size"],
        )  # fmt: skip
        return pipe.to(device or best_device(), dtype)

    def _networks(self) -> dict[str, nn.Module]:
        return {"unet": self.unet, "vae": self.vae, "text": self.text}

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


def _tuples(settings: dict) -> dict:
    """JSON has no tuples: its lists become them again."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}

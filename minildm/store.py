"""minildm's own format: a folder with all weights in one file, the tokenizer beside it, and every setting in readable JSON.

Published models come in other layouts; `convert` and `compvis` read those.
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from minildm.checkpoint import write_atomically
from minildm.clip import TextConfig, TextEncoder
from minildm.convert import Parts
from minildm.schedule import NoiseSchedule
from minildm.sdxl import SDXLText, SDXLTextConfig, TokenizerPair
from minildm.tensors import refuse_adapters
from minildm.tokenizer import Tokenizer
from minildm.unet import UNet, UNetConfig
from minildm.vae import AutoencoderKL, VAEConfig

FORMAT = "minildm-1"


def write_model(folder: Path, parts: Parts, guidance_scale: float) -> None:
    """Writes model.safetensors, the tokenizer's files and model.json to a folder; once model.json is there, it is whole.

    Raises:
        ValueError: a network carries adapters; nothing has been written then.
        OSError: the folder cannot be written.
    """
    networks = _networks(parts)
    refuse_adapters(networks)
    (folder / "model.json").unlink(missing_ok=True)  # until all is written anew there is no model here
    tensors = {f"{n}.{k}": v.contiguous() for n, part in networks.items() for k, v in part.state_dict().items()}
    tensors["alpha_bar"] = parts.schedule.alpha_bar
    settings = {
        "format": FORMAT, "prediction_type": parts.prediction_type, "spacing": parts.spacing, "image_size": parts.image_size,
        "zero_negative": parts.zero_negative, "guidance_scale": guidance_scale,
        **{name: asdict(part.cfg) for name, part in networks.items()},
    }  # fmt: skip
    write_atomically(folder / "model.safetensors", lambda beside: save_file(tensors, beside))
    parts.tokenizer.save(folder)
    write_atomically(folder / "model.json", lambda beside: beside.write_text(json.dumps(settings, indent=1)))


def read_model(folder: Path) -> tuple[Parts, float]:
    """Reads what `write_model` wrote: the parts, on the CPU and as stored, and the guidance scale.

    Raises:
        FileNotFoundError: there is no model in the folder.
        ValueError: what is there is damaged, or is not a minildm model; says what was found.
    """
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
        parts = Parts(
            unet, vae, text, tokenizer, NoiseSchedule(alpha_bar), settings["prediction_type"], settings["spacing"],
            settings["image_size"], settings.get("zero_negative", False),
        )  # fmt: skip
        return parts, settings.get("guidance_scale", 7.5)
    except Exception as error:  # a network can fail to be built in as many ways as a file can lie
        raise ValueError(f"{folder} does not hold a whole minildm model ({error}); train or copy it again") from error


def _networks(parts: Parts) -> dict[str, nn.Module]:
    return {"unet": parts.unet, "vae": parts.vae, "text": parts.text}


def _text(settings: dict) -> TextEncoder | SDXLText:
    if "large" in settings:
        return SDXLText(SDXLTextConfig(*(TextConfig(**settings[name]) for name in ("small", "large"))))
    return TextEncoder(TextConfig(**settings))


def _tuples(settings: dict) -> dict:
    """JSON has no tuples: its lists become them again."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}

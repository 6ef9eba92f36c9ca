"""Small models of the reference library with random weights, and the files that they are published in.

Everything that a test of conversion starts from is made here, by diffusers and transformers, never by minildm.
"""

import contextlib
import logging
import os
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TQDM_DISABLE": "1"}
with warnings.catch_warnings():  # what they warn of while being imported is their affair
    warnings.simplefilter("ignore")
    import diffusers
    import transformers
    from diffusers.loaders import single_file_utils

from minildm.tokenizer import Tokenizer

diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
logging.getLogger("diffusers").setLevel(logging.ERROR)

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
DDIM = {**SCHEDULE, "clip_sample": False, "set_alpha_to_one": False}
KINDS = ("sd15", "sd21", "sdxl", "refiner")


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every parameter a random value that keeps signals at about unit size; some would start at zero otherwise."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.ndim > 1:
            value = noise if "embedding" in name and p.ndim == 2 and "linear" not in name else noise / p[0].numel() ** 0.5
        else:
            value = 1 + 0.2 * noise if "norm" in name and name.endswith("weight") else 0.2 * noise
        p.data = value.to(p)
    return module.eval()


def unet(kind: str, **changes: object) -> diffusers.UNet2DConditionModel:
    """A small U-Net of the reference, shaped as the published one of its kind."""
    plain, cross = ("DownBlock2D", "UpBlock2D"), ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
    levels = {"sd15": (cross, plain), "sd21": (cross, plain), "sdxl": (plain, cross), "refiner": (plain, cross, plain)}[kind]
    widths = (64, 128, 128)[: len(levels)]
    settings = {
        "sample_size": 8, "block_out_channels": widths, "layers_per_block": 2, "norm_num_groups": 32,
        "down_block_types": [down for down, _ in levels], "up_block_types": [up for _, up in reversed(levels)],
        "attention_head_dim": 8, "cross_attention_dim": 64,
    }  # fmt: skip
    if kind != "sd15":
        settings |= {"attention_head_dim": tuple(width // 64 for width in widths), "use_linear_projection": True}
    if kind in ("sdxl", "refiner"):
        numbers = 6 if kind == "sdxl" else 5
        settings |= {
            "cross_attention_dim": 192 if kind == "sdxl" else 128, "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 128 + 256 * numbers,
            "transformer_layers_per_block": (1, 2) if kind == "sdxl" else 2,
        }  # fmt: skip
    return randomise(diffusers.UNet2DConditionModel(**(settings | changes)), seed=1)


def vae(**changes: object) -> diffusers.AutoencoderKL:
    """A small autoencoder of the reference: four times fewer positions."""
    settings = {
        "block_out_channels": (32, 64), "layers_per_block": 2, "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2, "sample_size": 16,
    }  # fmt: skip
    return randomise(diffusers.AutoencoderKL(**(settings | changes)), seed=2)


def text(kind: str, vocab_size: int, end_id: int = 2) -> nn.Module:
    """A small text encoder of the reference: "sd15", "sd21", "small" and "large" (of SDXL)."""
    large = kind == "large"
    cfg = transformers.CLIPTextConfig(
        vocab_size=vocab_size, hidden_size=128 if large else 64, intermediate_size=512 if large else 256,
        num_hidden_layers=3, num_attention_heads=2 if large else 1, projection_dim=128 if large else 64,
        hidden_act="quick_gelu" if kind in ("sd15", "small") else "gelu", eos_token_id=end_id,
    )  # fmt: skip
    model = transformers.CLIPTextModelWithProjection if large else transformers.CLIPTextModel
    return randomise(model(cfg), seed=3 + large)


def vocabulary(folder: Path, pad_id: int | None = None) -> Tokenizer:
    """A little vocabulary by CLIP's rules, written in the published format."""
    merges = [("r", "e"), ("re", "d</w>"), ("a", "</w>"), ("c", "u"), ("cu", "b"), ("cub", "e</w>")]
    merges = [pair for pair in merges if pair != ("a", "</w>")]
    tokenizer = Tokenizer(merges=merges, lowercase=True, end_of_word="</w>", pad_id=pad_id)
    tokenizer.save(folder)
    return tokenizer


def pipeline(kind: str, folder: Path, **changes: object) -> diffusers.DiffusionPipeline:
    """A small pipeline of the reference of this kind; `changes` replace parts.  The folder is for its vocabularies."""
    ends, zeros = vocabulary(folder / "ends"), vocabulary(folder / "zeros", pad_id=0)
    size = ends.vocab_size
    clip = {pad: transformers.CLIPTokenizer.from_pretrained(folder / pad) for pad in ("ends", "zeros")}
    parts = {"unet": unet(kind), "vae": vae(), "scheduler": diffusers.DDIMScheduler(**DDIM)}
    if kind in ("sd15", "sd21"):
        parts |= {"text_encoder": text(kind, size), "tokenizer": clip["ends" if kind == "sd15" else "zeros"]}
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        if kind == "sd21":
            parts["scheduler"] = diffusers.DDIMScheduler(**DDIM, prediction_type="v_prediction")
        pipe = diffusers.StableDiffusionPipeline(**(parts | changes))
    else:
        parts["vae"] = vae(scaling_factor=0.13025)
        parts |= {"text_encoder_2": text("large", size), "tokenizer_2": clip["zeros"]}
        if kind == "sdxl":
            parts |= {"text_encoder": text("small", size), "tokenizer": clip["ends"], "add_watermarker": False}
            pipe = diffusers.StableDiffusionXLPipeline(**(parts | changes))
        else:
            parts |= {"text_encoder": None, "tokenizer": None, "requires_aesthetics_score": True, "add_watermarker": False}
            parts["force_zeros_for_empty_prompt"] = False
            pipe = diffusers.StableDiffusionXLImg2ImgPipeline(**(parts | changes))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def opened(folder: Path, kind: type = diffusers.StableDiffusionPipeline) -> diffusers.DiffusionPipeline:
    """A folder as the reference opens it."""
    pipe = kind.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def compvis(kind: str, pipe: diffusers.DiffusionPipeline, names: dict[str, dict[str, str]]) -> dict[str, Tensor]:
    """The weights of a pipeline under other names, and what else stands in such a file."""
    raise NotImplementedError

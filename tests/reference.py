"""Small models of the reference library with random weights, and the files that they are published in.

Everything that a test of conversion starts from is made here, by diffusers and transformers, never by minildm.
"""

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
    merges = [("r", "e"), ("re", "d</w>"), ("c", "u"), ("cu", "b"), ("cub", "e</w>")]
    tokenizer = Tokenizer(merges=merges, lowercase=True, end_of_word="</w>", pad_id=pad_id)
    tokenizer.save(folder)
    return tokenizer


def pipeline(kind: str, folder: Path, **changes: object) -> diffusers.DiffusionPipeline:
    """A small pipeline of the reference of this kind; `changes` replace parts.  The folder is for its vocabularies."""
    size = vocabulary(folder / "ends").vocab_size
    vocabulary(folder / "zeros", pad_id=0)
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


# ----------------------------------------------------------------------------------------- the original single-file layout

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
OUTSIDE = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
BUFFERS = [
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
]  # fmt: skip


def compvis_unet(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The original names of a U-Net's weights, by the numbering of its blocks."""
    result = {}
    for name, tensor in state.items():
        stem, end = name.rsplit(".", 1)
        where, *rest = stem.split(".")
        if stem in OUTSIDE:
            stem = OUTSIDE[stem]
        elif where == "mid_block":
            kind, j, *layer = rest
            inside = layer if kind == "attentions" else [RESNET[layer[0]]]
            stem = ".".join(["middle_block", "1" if kind == "attentions" else str(2 * int(j)), *inside])
        else:
            i, kind, j, *layer = rest
            side, n = ("input_blocks", 3 * int(i) + 1) if where == "down_blocks" else ("output_blocks", 3 * int(i))
            attends = f"{where}.{i}.attentions.0.norm.weight" in state
            stem = {
                "resnets": f"{side}.{n + int(j)}.0.{RESNET.get(layer[0])}",
                "attentions": f"{side}.{n + int(j)}.1.{'.'.join(layer)}",
                "downsamplers": f"{side}.{n + 2}.0.op",
                "upsamplers": f"{side}.{n + 2}.{2 if attends else 1}.conv",
            }[kind]
        result[f"{stem}.{end}"] = tensor
    return result


def compvis_vae(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The original names of an autoencoder's weights, its attention as 1x1 convolutions."""
    last = max(int(name.split(".")[2]) for name in state if ".up_blocks." in name)
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}
    result = {}
    for name, tensor in state.items():
        p = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut").split(".")
        if "mid_block" in p and "attentions" in p:
            p = [p[0], "mid", "attn_1", attention[p[4]], p[-1]]
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        elif "mid_block" in p:
            p = [p[0], "mid", f"block_{int(p[3]) + 1}", *p[4:]]
        elif "down_blocks" in p or "up_blocks" in p:
            level = p[2] if p[1] == "down_blocks" else str(last - int(p[2]))
            way = p[1].removesuffix("_blocks")
            p = [p[0], way, level, *(["block", p[4]] if p[3] == "resnets" else [f"{way}sample"]), *p[5:]]
        result[".".join(p)] = tensor
    return result


def prefixed_text(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP text model's weights as older releases of transformers name them, with their position_ids."""
    state = {
        name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}": t for name, t in state.items()
    }
    return state | {"text_model.embeddings.position_ids": torch.arange(77)[None]}


def openclip_text(state: dict[str, Tensor], extra_layers: int = 0) -> dict[str, Tensor]:
    """The same as OpenCLIP names them: queries, keys and values in one, the projection transposed, a scale."""
    layer = {
        "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
        "self_attn.out_proj": "attn.out_proj",
    }  # fmt: skip
    state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    result = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "logit_scale": torch.tensor(4.6),
    }
    width = result["ln_final.bias"].shape[0]
    result["text_projection"] = state["text_projection.weight"].T if "text_projection.weight" in state else torch.eye(width)
    layers = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.layers."))
    for i in range(layers + extra_layers):
        here = f"encoder.layers.{min(i, layers - 1)}."
        there = f"transformer.resblocks.{i}."
        for end in ("weight", "bias"):
            fused = [state[f"{here}self_attn.{letter}_proj.{end}"] for letter in "qkv"]
            result[f"{there}attn.in_proj_{end}"] = torch.cat(fused)
            result |= {f"{there}{theirs}.{end}": state[f"{here}{ours}.{end}"] for ours, theirs in layer.items()}
    return result


def single_file(kind: str, networks: dict[str, nn.Module]) -> dict[str, Tensor]:
    """A model in the original layout, from the reference's networks by the names of its pipeline's parts."""
    states = {name: network.state_dict() for name, network in networks.items() if name in ("unet", "vae", *TEXTS) and network}
    groups = {
        "model.diffusion_model.": compvis_unet(states["unet"]),
        "first_stage_model.": compvis_vae(states["vae"]),
    }
    groups |= {
        "sd15": lambda: {"cond_stage_model.transformer.": prefixed_text(states["text_encoder"])},
        "sd21": lambda: {"cond_stage_model.model.": openclip_text(states["text_encoder"], extra_layers=1)},
        "refiner": lambda: {"conditioner.embedders.0.model.": openclip_text(states["text_encoder_2"])},
        "sdxl": lambda: {
            "conditioner.embedders.0.transformer.": prefixed_text(states["text_encoder"]),
            "conditioner.embedders.1.model.": openclip_text(states["text_encoder_2"]),
        },
    }[kind]()
    result = {
        f"{prefix}{name}": tensor.clone().contiguous() for prefix, group in groups.items() for name, tensor in group.items()
    }
    return result | ({name: torch.zeros(1000) for name in BUFFERS} if kind in ("sd15", "sd21") else {})


TEXTS = ("text_encoder", "text_encoder_2")

"""The settings files of published models, read into our configurations and written from them.

Each pair of functions knows one file of a diffusers folder.  What only one of both libraries can do is refused by name.
"""

import warnings

import torch

from minildm.clip import TextConfig
from minildm.schedule import PREDICTION_TYPES, SPACINGS, NoiseSchedule
from minildm.sdxl import SIZE_FEATURES
from minildm.unet import UNetConfig
from minildm.vae import VAEConfig

# Our field, the reference's, and the value that the reference takes where a file is silent.
UNET = {
    "blocks": ("layers_per_block", 2), "in_channels": ("in_channels", 4), "out_channels": ("out_channels", 4),
    "context_dim": ("cross_attention_dim", 1280), "linear": ("use_linear_projection", False), "groups": ("norm_num_groups", 32),
}  # fmt: skip
VAE = {
    "blocks": ("layers_per_block", 1), "in_channels": ("in_channels", 3), "latent_channels": ("latent_channels", 4),
    "groups": ("norm_num_groups", 32), "mid_attention": ("mid_block_add_attention", True),
    "scaling_factor": ("scaling_factor", 0.18215),
}  # fmt: skip
TEXT = {
    "vocab_size": ("vocab_size", 49408), "context_length": ("max_position_embeddings", 77), "width": ("hidden_size", 512),
    "layers": ("num_hidden_layers", 12), "heads": ("num_attention_heads", 8), "activation": ("hidden_act", "quick_gelu"),
}  # fmt: skip

# Settings that our networks have built in, and settings that change no number in fp32.
UNET_FIXED = {
    "act_fn": "silu", "flip_sin_to_cos": True, "freq_shift": 0, "downsample_padding": 1, "mid_block_scale_factor": 1,
    "norm_eps": 1e-5, "mid_block_type": "UNetMidBlock2DCrossAttn", "resnet_time_scale_shift": "default",
    "resnet_out_scale_factor": 1.0, "time_embedding_type": "positional", "conv_in_kernel": 3, "conv_out_kernel": 3,
    "attention_type": "default",
}  # fmt: skip
UNET_IDLE = {"sample_size", "dropout", "upcast_attention", "addition_embed_type_num_heads"}
VAE_FIXED = {"act_fn": "silu", "use_quant_conv": True, "use_post_quant_conv": True}
VAE_IDLE = {"sample_size", "force_upcast"}

# The timesteps that a scheduler visits where its file is silent.  Its class says no more: a sampler is chosen in the call.
LEADING = {"DDIMScheduler", "DDPMScheduler", "PNDMScheduler"}
LINSPACE = {
    "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler",
}  # fmt: skip
ONLY_THERE = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "thresholding")


class Settings:
    """One settings file being read: remembers which fields were asked for, so that the rest can be refused.

    Args:
        part: which network it is for, to name in errors.
        fields: the file's content.
    """

    def __init__(self, part: str, fields: dict) -> None:
        self.part, self.fields = part, fields
        self.seen = {name for name in fields if name.startswith("_")}

    def get(self, name: str, default: object = None) -> object:
        """A field's value; a list of equal values counts as one of them."""
        self.seen.add(name)
        value = self.fields.get(name, default)
        return value[0] if isinstance(value, list) and value and value.count(value[0]) == len(value) else value

    def plain(self, table: dict[str, tuple[str, object]]) -> dict[str, object]:
        """The fields that only have another name here, by that name."""
        return {ours: self.get(theirs, default) for ours, (theirs, default) in table.items()}

    def widths(self) -> tuple[int, ...]:
        """The channels of each level."""
        self.seen.add("block_out_channels")
        return tuple(self.fields["block_out_channels"])

    def per_level(self, name: str, levels: int, default: object = None) -> tuple:
        """A field that has one value a level, or one for all."""
        value = self.get(name, default)
        value = tuple(value) if isinstance(value, list | tuple) else (value,) * levels
        if len(value) != levels:
            raise self.refusal(name, f"{levels} values, as block_out_channels has")
        return value

    def kinds(self, name: str, known: tuple[str, ...], levels: int) -> tuple[int, ...]:
        """A field that names a class for each level, as the class's place in `known`."""
        self.seen.add(name)
        kinds = self.fields.get(name) or []
        if len(kinds) != levels or not set(kinds) <= set(known):
            raise self.refusal(name, f"{levels} of {' and '.join(known)}")
        return tuple(known.index(kind) for kind in kinds)

    def check(self, fixed: dict[str, object], idle: set[str]) -> None:
        """Refuses every field that was not asked for, unless it says what is the case here anyhow."""
        for name in sorted(self.fields.keys() - self.seen - idle):
            if self.get(name) not in ((fixed[name],) if name in fixed else (None, False)):
                raise self.refusal(name, repr(fixed.get(name)))

    def refusal(self, name: str, expected: str) -> ValueError:
        """The error for a field that ours cannot follow."""
        return ValueError(
            f"{self.part}: {name} is {self.fields.get(name)!r}, but minildm can only do {expected}; use the reference for it"
        )


def _plain(cfg: UNetConfig | VAEConfig | TextConfig, table: dict[str, tuple[str, object]]) -> dict[str, object]:
    return {theirs: getattr(cfg, ours) for ours, (theirs, _) in table.items()}


def lacks(field: str, value: object, why: str) -> ValueError:
    """The error for a field of ours that the reference cannot follow."""
    return ValueError(f"the reference cannot hold {field} = {value!r}: {why}; save the model with Pipeline.save instead")


# ------------------------------------------------------------------------------------------------------------ the networks


def read_unet(fields: dict) -> UNetConfig:
    """The configuration of a UNet2DConditionModel.

    Raises:
        ValueError: it asks for something that our U-Net has not; names the field and the value.
    """
    s = Settings("unet", fields)
    n = len(widths := s.widths())
    attends = s.kinds("down_block_types", ("DownBlock2D", "CrossAttnDownBlock2D"), n)
    if s.kinds("up_block_types", ("UpBlock2D", "CrossAttnUpBlock2D"), n) != attends[::-1]:
        raise s.refusal("up_block_types", "the mirror image of down_block_types")
    depths = s.per_level("transformer_layers_per_block", n, default=1)
    pooled = s.get("addition_embed_type")
    if pooled not in (None, "text_time"):
        raise s.refusal("addition_embed_type", "'text_time' or None")
    if s.get("addition_time_embed_dim") != (SIZE_FEATURES if pooled else None):
        raise s.refusal("addition_time_embed_dim", f"{SIZE_FEATURES} for SDXL, None otherwise")
    cfg = UNetConfig(
        widths=widths,
        depths=tuple(d if a else 0 for d, a in zip(depths, attends, strict=True)),
        mid_depth=depths[-1],
        heads=s.per_level("attention_head_dim", n, default=8),  # a misnomer: it is the number of heads
        pooled_dim=s.get("projection_class_embeddings_input_dim") if pooled else None,
        **s.plain(UNET),
    )
    s.check(UNET_FIXED, UNET_IDLE)
    return cfg


def write_unet(cfg: UNetConfig, sample_size: int) -> dict:
    """The config.json of a UNet2DConditionModel; sample_size is the side of its latents.

    Raises:
        ValueError: the reference has no such U-Net; names the field and says why.
    """
    if cfg.patch != 1:
        raise lacks("unet.patch", cfg.patch, "its U-Net has no patchify stem")
    if cfg.depths[-1] not in (0, cfg.mid_depth):
        raise lacks("unet.mid_depth", cfg.mid_depth, f"its middle is as deep as the last level, {cfg.depths[-1]}")
    text_time = {
        "addition_embed_type": "text_time", "addition_time_embed_dim": SIZE_FEATURES,
        "projection_class_embeddings_input_dim": cfg.pooled_dim,
    }  # fmt: skip
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": sample_size,
        "block_out_channels": cfg.widths,
        "down_block_types": ["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in cfg.depths],
        "up_block_types": ["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in reversed(cfg.depths)],
        "transformer_layers_per_block": [*(d or 1 for d in cfg.depths[:-1]), cfg.mid_depth],
        "attention_head_dim": cfg.heads,
        **_plain(cfg, UNET),
        **UNET_FIXED,
        **(text_time if cfg.pooled_dim else {}),
    }


def read_vae(fields: dict) -> VAEConfig:
    """The configuration of an AutoencoderKL; raises as `read_unet`."""
    s = Settings("vae", fields)
    widths = s.widths()
    s.kinds("down_block_types", ("DownEncoderBlock2D",), len(widths))
    s.kinds("up_block_types", ("UpDecoderBlock2D",), len(widths))
    cfg = VAEConfig(widths=widths, **s.plain(VAE))
    if s.get("out_channels", 3) != cfg.in_channels:
        raise s.refusal("out_channels", f"{cfg.in_channels}, as in_channels")
    s.check(VAE_FIXED, VAE_IDLE)
    return cfg


def write_vae(cfg: VAEConfig, image_size: int) -> dict:
    """The config.json of an AutoencoderKL; image_size is the side of its pictures.  Raises as `write_unet`."""
    if cfg.patch != 1:
        raise lacks("vae.patch", cfg.patch, "its autoencoder has no patchify stem")
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": image_size,
        "out_channels": cfg.in_channels,
        "block_out_channels": cfg.widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(cfg.widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(cfg.widths),
        **_plain(cfg, VAE),
        **VAE_FIXED,
    }


def read_text(fields: dict, early: bool) -> TextConfig:
    """The configuration of a CLIPTextModel, with or without projection.

    Args:
        fields: its config.json.
        early: whether the pipeline listens to the last layer but one, without the final norm, as SDXL's does.

    Raises:
        ValueError: it is no CLIP text model, or its activation or layer norm is another; names the field.
    """
    s = Settings("text_encoder", fields)
    if fields.get("model_type") not in ("clip_text_model", "clip"):
        raise s.refusal("model_type", "'clip_text_model'")
    if fields.get("layer_norm_eps", 1e-5) != 1e-5:
        raise s.refusal("layer_norm_eps", "1e-05")
    if fields["intermediate_size"] % fields["hidden_size"]:
        raise s.refusal("intermediate_size", f"multiples of hidden_size, {fields['hidden_size']}")
    projected = any("WithProjection" in name for name in fields.get("architectures") or [])
    end_id = fields.get("eos_token_id", 49407)
    return TextConfig(
        mlp_ratio=fields["intermediate_size"] // fields["hidden_size"],
        skip_layers=int(early),
        norm_hidden=not early,
        projection_dim=fields["projection_dim"] if projected else None,
        end_id=None if end_id == 2 else end_id,  # 2 was a mistake once; the reference takes it to mean the largest id
        **s.plain(TEXT),
    )


def write_text(cfg: TextConfig, early: bool, start_id: int, pad_id: int) -> dict:
    """The config.json of a CLIPTextModel, or of one with projection.  Raises as `write_unet`."""
    listens = {"skip_layers": int(early), "norm_hidden": not early} | ({} if early else {"projection_dim": None})
    for field, wanted in listens.items():
        if getattr(cfg, field) != wanted:
            raise lacks(f"text.{field}", getattr(cfg, field), f"its pipeline listens where {field} is {wanted}")
    return {
        "architectures": ["CLIPTextModel" if cfg.projection_dim is None else "CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        **_plain(cfg, TEXT),
        "intermediate_size": cfg.mlp_ratio * cfg.width,
        "layer_norm_eps": 1e-5,
        "projection_dim": cfg.pooled_dim,
        "bos_token_id": start_id,
        "eos_token_id": 2 if cfg.end_id is None else cfg.end_id,
        "pad_token_id": pad_id,
    }


# ------------------------------------------------------------------------------------------------------------ the schedule


def read_schedule(fields: dict, sdxl: bool = False) -> tuple[NoiseSchedule, str, str]:
    """The noise schedule, the prediction type and the spacing of a scheduler_config.json.

    Of a scheduler only these belong to the model; how to step is chosen in the call.  What a file asks for and no sampler here
    does (Karras sigmas, thresholding) is warned of.

    Args:
        fields: the file's content.
        sdxl: SDXL's pipeline takes steps_offset as it is; Stable Diffusion's takes it for 1, whatever the file says.

    Raises:
        ValueError: a field has a value that is not known here; names both.
    """
    s = Settings("scheduler", fields)
    kind, T = fields.get("_class_name"), fields.get("num_train_timesteps", 1000)
    if kind not in LEADING | LINSPACE:
        raise s.refusal("_class_name", f"one of {', '.join(sorted(LEADING | LINSPACE))}")
    if fields.get("trained_betas") is not None:
        schedule = NoiseSchedule((1 - torch.tensor(fields["trained_betas"], dtype=torch.float64)).cumprod(0))
    else:
        families = {"scaled_linear": NoiseSchedule.scaled_linear, "linear": NoiseSchedule.linear}
        family = fields.get("beta_schedule", "linear")
        if family not in {*families, "squaredcos_cap_v2"}:
            raise s.refusal("beta_schedule", f"one of {', '.join(families)}, squaredcos_cap_v2")
        ends = fields.get("beta_start", 1e-4), fields.get("beta_end", 0.02)
        schedule = families[family](T, *ends) if family in families else NoiseSchedule.cosine(T)
    if fields.get("rescale_betas_zero_snr"):
        schedule = schedule.zero_terminal_snr()

    prediction_type = fields.get("prediction_type", "epsilon")
    spacing = fields.get("timestep_spacing", "leading" if kind in LEADING else "linspace")
    if prediction_type not in PREDICTION_TYPES:
        raise s.refusal("prediction_type", f"one of {', '.join(PREDICTION_TYPES)}")
    if spacing not in SPACINGS:
        raise s.refusal("timestep_spacing", f"one of {', '.join(SPACINGS)}")
    if sdxl and spacing == "leading" and fields.get("steps_offset", 0) != 1:
        raise s.refusal("steps_offset", "1 with timestep_spacing 'leading'")
    if foreign := [name for name in ONLY_THERE if fields.get(name)]:
        warnings.warn(
            f"the model's scheduler has {', '.join(foreign)}, which no sampler here does; pictures will differ a little from "
            "the reference's",
            stacklevel=2,
        )
    return schedule, prediction_type, spacing


def write_schedule(schedule: NoiseSchedule, prediction_type: str, spacing: str) -> dict:
    """The scheduler_config.json of a DDIMScheduler, by the name of the schedule if it has one, else by its betas."""
    betas, T = schedule.betas, schedule.T
    ends = betas[0].item(), betas[-1].item()
    linear = [] if ends[1] > 0.5 else ["scaled_linear", "linear"]
    named = [
        *({"beta_schedule": family, "beta_start": ends[0], "beta_end": ends[1]} for family in linear),
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "rescale_betas_zero_snr": True},
        {"beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": True},
    ]
    fields = {
        "_class_name": "DDIMScheduler", "num_train_timesteps": T, "prediction_type": prediction_type,
        "timestep_spacing": spacing, "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False,
    }  # fmt: skip
    for name in named:
        if torch.allclose(read_schedule(fields | name)[0].alpha_bar, schedule.alpha_bar, rtol=0, atol=1e-12):
            return fields | name
    return fields | {"trained_betas": betas.tolist()}

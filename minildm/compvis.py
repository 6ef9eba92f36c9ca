"""Single files in the original layout: every network of a model in one `.safetensors` or `.ckpt`, and no settings at all.

What the networks look like is read off the shapes of their weights, what is left by the conventions of four families: Stable
Diffusion 1 and 2, SDXL and its refiner.
"""

import re
import warnings
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from minildm.clip import TextConfig
from minildm.convert import TEXTS, Configs, Parts, assemble, join
from minildm.files import Stored, open_weights
from minildm.layouts import OPENCLIP_TEXT, TRANSFORMERS_TEXT, compvis_unet, compvis_vae
from minildm.schedule import NoiseSchedule, check_prediction_type
from minildm.tensors import under, unify
from minildm.tokenizer import Tokenizer
from minildm.unet import UNetConfig
from minildm.vae import VAEConfig

# Where a text encoder stands in the file: its place in TEXTS, its table, the preset whose conventions it follows, its padding.
PREFIXES = {
    "cond_stage_model.transformer.": (TEXTS[0], TRANSFORMERS_TEXT, TextConfig.sd15(), None),
    "cond_stage_model.model.": (TEXTS[0], OPENCLIP_TEXT, TextConfig.sd21(), 0),
    "conditioner.embedders.0.transformer.": (TEXTS[0], TRANSFORMERS_TEXT, TextConfig.sdxl_l(), None),
    "conditioner.embedders.0.model.": (TEXTS[1], OPENCLIP_TEXT, TextConfig.sdxl_g(), 0),  # the refiner's only one
    "conditioner.embedders.1.model.": (TEXTS[1], OPENCLIP_TEXT, TextConfig.sdxl_g(), 0),
}
# Buffers of the schedule, an averaged copy, the discriminator of the first stage, and notes of the training program.
BESIDE = (
    r"^(model_ema\.|first_stage_model\.loss\.|denoiser\.|posterior_|(log_|sqrt_)\w*alphas_cumprod$|alphas_cumprod(_prev)?$"
    r"|(betas|logvar|lvlb_weights|scale_factor|global_step|epoch|v_pred|ztsnr)$)"
)
VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"


def read_compvis(
    path: Path,
    vocabulary: str | Path | None = None,
    prediction_type: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Parts:
    """Reads a single file: Stable Diffusion 1 or 2, either's model for inpainting, SDXL base or refiner.

    Args:
        path: a `.safetensors`, or a pickle with nothing but data in it.
        vocabulary: CLIP's, which such a file does not hold, in any form that `Tokenizer.clip` reads; if None, it is looked for
            beside the file and in an installed open_clip_torch.
        prediction_type: what the U-Net predicts, which no shape tells.  If None, the reference's rule: "epsilon", but
            "v_prediction" for Stable Diffusion 2, unless it inpaints, or the file says that it stopped at step 875,000, as
            2.0-base does.  2.1-base breaks that rule: give "epsilon" for it.  A tensor named v_pred, a custom of SDXL files,
            also means "v_prediction", and ztsnr a last timestep of pure noise.
        device, dtype: as for `read_diffusers`.

    Raises:
        FileNotFoundError: there is no such file, or no vocabulary.
        ValueError: the file is damaged, holds something else, or its weights do not fit; says what.
    """
    content = open_weights(path)
    notes = {name: content[name].read().item() for name in ("global_step",) if name in content}
    flags = content.keys() & {"v_pred", "ztsnr"}
    content |= {name: content[average] for name in content if (average := _average_of(name)) in content}
    content = {name: tensor for name, tensor in content.items() if not re.search(BESIDE, name)}
    kinds = {prefix: kind for prefix, kind in PREFIXES.items() if any(name.startswith(prefix) for name in content)}
    prefixes = {"unet": "model.diffusion_model.", "vae": "first_stage_model."} | {kind[0]: p for p, kind in kinds.items()}
    stored = {part: unify(part, under(prefix, content)) for part, prefix in prefixes.items()}
    if not (stored["unet"] and stored["vae"] and kinds):
        raise ValueError(
            f"{path} is no whole Stable Diffusion in the CompVis layout: it has no names that begin with "
            f"{', '.join(prefixes[p] for p in ('unet', 'vae') if not stored[p]) or 'cond_stage_model. or conditioner.'}, "
            f"but {', '.join(sorted(content)[:3]) or 'nothing'}; give a whole model, or a folder in the diffusers layout"
        )
    stored["other"] = {name: tensor for name, tensor in content.items() if not name.startswith(tuple(prefixes.values()))}
    try:
        unet = infer_unet(stored["unet"])
        xl = unet.pooled_dim is not None
        vae = infer_vae(stored["vae"], VAEConfig.sdxl() if xl else VAEConfig.sd15())
        texts = {name: infer_text(stored[name], preset) for name, _, preset, _ in sorted(kinds.values(), key=lambda k: k[0])}
    except (KeyError, IndexError) as error:
        raise ValueError(f"{path} is damaged or no Stable Diffusion: it has no usable {error}; fetch it again") from error
    two, inpaints = "cond_stage_model.model." in kinds, unet.in_channels > unet.out_channels
    if two:  # the reference listens one layer early, and to the whole text's vector not at all
        unheard = (f"transformer.resblocks.{texts[TEXTS[0]].layers}.", "text_projection")
        stored[TEXTS[0]] = {name: tensor for name, tensor in stored[TEXTS[0]].items() if not name.startswith(unheard)}

    shapes = Configs(unet, vae, texts)
    tables = {"unet": compvis_unet(unet.depths, unet.blocks), "vae": compvis_vae(len(vae.widths))}
    tables |= {name: table for name, table, _, _ in kinds.values()}
    vocabulary = vocabulary or find_vocabulary(path)
    paddings = {name: texts[name].end_id if padding is None else padding for name, _, _, padding in kinds.values()}
    tokenizers = [
        Tokenizer.clip(vocabulary, context_length=cfg.context_length, pad_id=paddings[name]) for name, cfg in texts.items()
    ]
    velocity = "v_pred" in flags or (two and not inpaints and notes.get("global_step") != 875_000)
    if prediction_type is None:
        prediction_type = "v_prediction" if velocity else "epsilon"
        if two and not (flags or inpaints):
            warnings.warn(
                f"{path} is a Stable Diffusion 2 in a single file, which does not say what it predicts; taken to be "
                f'{prediction_type}: if the pictures are noise, give the other, "epsilon" or "v_prediction"',
                stacklevel=2,
            )
    check_prediction_type(prediction_type)
    tokenizer = join(tokenizers, shapes)
    networks = assemble(path, shapes, stored, tables, device, dtype)
    schedule = NoiseSchedule.scaled_linear()
    schedule = schedule.zero_terminal_snr() if "ztsnr" in flags else schedule
    spacing = "trailing" if "ztsnr" in flags else "leading"
    image_size = 1024 if xl else 768 if two and prediction_type == "v_prediction" else 512
    return Parts(
        *networks, tokenizer, schedule, prediction_type, spacing, image_size, zero_negative=len(texts) == 2
    )  # fmt: skip


def _average_of(name: str) -> str:
    """Where a file keeps the running average of a U-Net's weight, which is what the model was published for."""
    return "model_ema." + name.removeprefix("model.").replace(".", "") if name.startswith("model.diffusion_model.") else ""


def infer_unet(stored: dict[str, Stored]) -> UNetConfig:
    """The shape of a U-Net from the shapes of its weights; the heads are 8, or 64 wide where the projections are linear.

    Raises:
        KeyError: a weight that must be there is not; names it.
    """
    starts = [3 * i + 1 for i in range(9) if f"input_blocks.{3 * i + 1}.0.in_layers.2.weight" in stored]  # of the levels
    widths = tuple(stored[f"input_blocks.{n}.0.in_layers.2.weight"].shape[0] for n in starts)
    linear = len(stored["middle_block.1.proj_in.weight"].shape) == 2
    return UNetConfig(
        widths=widths,
        depths=tuple(_count(stored, f"input_blocks.{n}.1.transformer_blocks.#.norm1.weight") for n in starts),
        mid_depth=_count(stored, "middle_block.1.transformer_blocks.#.norm1.weight"),
        heads=tuple(width // 64 if linear else 8 for width in widths),
        in_channels=stored["input_blocks.0.0.weight"].shape[1],
        out_channels=stored["out.2.weight"].shape[0],
        context_dim=stored["middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape[1],
        pooled_dim=stored["label_emb.0.0.weight"].shape[1] if "label_emb.0.0.weight" in stored else None,
        linear=linear,
    )


def infer_vae(stored: dict[str, Stored], preset: VAEConfig) -> VAEConfig:
    """The shape of an autoencoder from the shapes of its weights, all else from a preset; raises as `infer_unet`."""
    levels = _count(stored, "encoder.down.#.block.0.conv1.weight")
    return replace(
        preset,
        widths=tuple(stored[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)),
        blocks=_count(stored, "encoder.down.0.block.#.conv1.weight"),
        latent_channels=stored["post_quant_conv.weight"].shape[0],
    )


def infer_text(stored: dict[str, Stored], preset: TextConfig) -> TextConfig:
    """The shape of a text encoder from the shapes of its weights, heads 64 wide, all else from a preset.

    Stable Diffusion 2 leaves out the last layer, which most files hold; one with 23 layers has lost it already.  Raises as
    `infer_unet`.
    """
    openclip = "positional_embedding" in stored
    inside = "" if openclip else "text_model.embeddings."
    layers = _count(stored, f"{'transformer.resblocks' if openclip else 'text_model.encoder.layers'}.#.mlp."
                    f"{'c_fc' if openclip else 'fc1'}.weight")  # fmt: skip
    leaves_out_last = preset == TextConfig.sd21() and layers != 23
    vocab_size, width = stored[f"{inside}token_embedding.weight"].shape
    return replace(
        preset,
        vocab_size=vocab_size,
        context_length=stored["positional_embedding" if openclip else f"{inside}position_embedding.weight"].shape[0],
        width=width,
        layers=layers - leaves_out_last,
        heads=max(1, width // 64),
        projection_dim=stored["text_projection"].shape[0] if preset.projection_dim else None,
        end_id=vocab_size - 1,
    )


def find_vocabulary(path: Path) -> Path:
    """CLIP's vocabulary beside a checkpoint, in a folder `tokenizer` there, or in an installed open_clip_torch.

    Raises:
        FileNotFoundError: it is in none of these.
    """
    places = [path.parent / VOCABULARY, path.parent / "tokenizer"]
    if (spec := find_spec("open_clip")) and spec.origin:  # looked at, not imported
        places.append(Path(spec.origin).parent / VOCABULARY)
    for place in places:
        if place.exists():
            return place
    raise FileNotFoundError(
        f"no vocabulary for {path}, which does not hold one: put CLIP's {VOCABULARY} beside it, or pip install open_clip_torch"
    )


def _count(stored: dict[str, Stored], name: str) -> int:
    """How many weights there are of this name, with # for 0, 1, 2 and so on."""
    n = 0
    while name.replace("#", str(n)) in stored:
        n += 1
    return n

"""Published models in, and out again: folders in the diffusers layout, and models named on the hub.

What a layout calls a weight stands in `layouts`, what its settings files mean in `configs`, how files of tensors are opened in
`tensors`; here they are put together.  Single files have a module of their own, `compvis`.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import nn

from minildm.checkpoint import write_atomically
from minildm.clip import TextConfig, TextEncoder
from minildm.configs import (
    Settings,
    lacks,
    read_schedule,
    read_text,
    read_unet,
    read_vae,
    write_schedule,
    write_text,
    write_unet,
    write_vae,
)
from minildm.files import Stored, open_weights
from minildm.layouts import DIFFUSERS_UNET, DIFFUSERS_VAE, TRANSFORMERS_TEXT, Table, names
from minildm.machine import best_device
from minildm.schedule import NoiseSchedule
from minildm.sdxl import SIZE_FEATURES, SDXLText, SDXLTextConfig, TokenizerPair
from minildm.tensors import Fitting, check, fill, refuse_adapters, unify
from minildm.tokenizer import Tokenizer
from minildm.unet import UNet, UNetConfig
from minildm.vae import AutoencoderKL, VAEConfig

SD, INPAINT = "StableDiffusionPipeline", "StableDiffusionInpaintPipeline"
SDXL, REFINER = "StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"
TEXTS = ("text_encoder", "text_encoder_2")  # one or both
TABLES = {
    "unet": DIFFUSERS_UNET, "vae": DIFFUSERS_VAE, **dict.fromkeys(TEXTS, TRANSFORMERS_TEXT),
}  # fmt: skip


class Parts(NamedTuple):
    """What a pipeline is made of, in its order."""

    unet: UNet
    vae: AutoencoderKL
    text: TextEncoder | SDXLText
    tokenizer: Tokenizer | TokenizerPair
    schedule: NoiseSchedule
    prediction_type: str
    spacing: str
    image_size: int
    zero_negative: bool


class Configs(NamedTuple):
    """The configurations of a model's networks."""

    unet: UNetConfig
    vae: VAEConfig
    texts: dict[str, TextConfig]  # by the names in TEXTS


# ----------------------------------------------------------------------------------------------------------------- reading


def read_diffusers(folder: Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Parts:
    """Reads a folder in the diffusers layout.

    That is Stable Diffusion 1 and 2, the models of either that inpaint, SDXL base and refiner, or what `write_diffusers` wrote.

    Args:
        folder: it holds model_index.json.
        device: where to put the networks; the best there is if None.
        dtype: their precision; if None, as stored on a GPU, and float32 on a CPU, where half precision is very slow.

    Raises:
        FileNotFoundError: a file is missing; says which.
        ValueError: a file is damaged, a setting is one that ours cannot follow, or weights do not fit; says which.
    """
    index = read_json(folder / "model_index.json")
    kind = index.get("_class_name")
    if kind not in (SD, INPAINT, SDXL, REFINER):
        raise ValueError(f"{folder} holds a {kind}; minildm reads {SD}, {INPAINT}, {SDXL} and {REFINER}")
    xl = kind in (SDXL, REFINER)
    texts = [name for name in TEXTS if any(index.get(name) or [])]
    fields = {part: read_json(folder / part / "config.json") for part in ("unet", "vae", *texts)}
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    try:
        shapes = Configs(
            read_unet(fields["unet"]),
            read_vae(fields["vae"]),
            {name: read_text(fields[name], early=xl) for name in texts},
        )
        schedule, prediction_type, spacing = read_schedule(scheduler, sdxl=xl)
        sample_size = Settings("unet", fields["unet"]).get("sample_size") or 64
        image_size = int(sample_size) * shapes.vae.downsampling
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"a settings file in {folder} is damaged ({error!r}); fetch it again") from error
    stored = {part: unify(part, open_folder(folder / part)) for part in fields}
    unet, vae, text = assemble(folder, shapes, stored, TABLES, device, dtype)
    tokenizers = [Tokenizer.load(folder / name.replace("text_encoder", "tokenizer")) for name in texts]
    zero_negative = xl and index.get("force_zeros_for_empty_prompt", True)
    return Parts(
        unet, vae, text, join(tokenizers, shapes), schedule, prediction_type, spacing, image_size, zero_negative
    )  # fmt: skip


def assemble(
    origin: Path,
    shapes: Configs,
    stored: dict[str, dict[str, Stored]],
    tables: dict[str, Table],
    device: str | torch.device | None,
    dtype: torch.dtype | None,
) -> tuple[UNet, AutoencoderKL, TextEncoder | SDXLText]:
    """Builds a model's networks without memory, checks them all against the file, and only then fills them.

    Args:
        origin: the file or folder, to name in errors.
        shapes: of the networks.
        stored: what there is for each; a name that is no network's must hold nothing.
        tables: from our names to the layout's, for each.
        device, dtype: as for `read_diffusers`.

    Raises:
        ValueError: the weights do not fit; or the U-Net wants something else beside the latents than SDXL's sizes, or for
            Stable Diffusion 1 and 2 a mask and a masked picture.
    """
    if not shapes.texts:
        raise ValueError(f"{origin} has no text encoder; expected {' or '.join(TEXTS)}")
    latent_channels, xl = shapes.vae.latent_channels, shapes.unet.pooled_dim is not None
    if shapes.unet.in_channels not in (latent_channels, 2 * latent_channels + 1)[: 1 if xl else 2]:
        raise ValueError(
            f"unet: in_channels is {shapes.unet.in_channels}, but the latents have {latent_channels}: {origin} wants another "
            "picture beside the caption; use a text-to-image model, or Stable Diffusion 1 or 2 for inpainting, with 9"
        )
    heard = sum(cfg.width for cfg in shapes.texts.values())
    if shapes.unet.out_channels != latent_channels or shapes.unet.context_dim != heard:
        raise ValueError(
            f"unet: {shapes.unet.in_channels} channels in and {shapes.unet.out_channels} out, and a context of "
            f"{shapes.unet.context_dim} features beside text encoders of {heard}: minildm cannot draw with {origin}"
        )
    with torch.device("meta"):
        unet, vae = UNet(shapes.unet), AutoencoderKL(shapes.vae)
        if len(shapes.texts) == 2:
            text = SDXLText(SDXLTextConfig(*shapes.texts.values()))
        else:
            text = TextEncoder(*shapes.texts.values())
    networks = _by_folder(unet, vae, text, [*shapes.texts][-1])
    fittings = {part: Fitting(networks.get(part, nn.Identity()), stored[part], tables.get(part, [])) for part in stored}
    check(origin, fittings)

    device = torch.device(device or best_device())
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else next(iter(stored["unet"].values())).read().dtype
        dtype = dtype if dtype in (torch.float32, torch.bfloat16) else torch.float16
    for part, network in networks.items():
        # SDXL's autoencoder overflows in float16; the reference widens it, too
        overflows = part == "vae" and xl and dtype == torch.float16
        fill(fittings[part], device, torch.float32 if overflows else dtype)
        network.eval()
    return unet, vae, text.eval()


def join(tokenizers: list[Tokenizer], shapes: Configs) -> Tokenizer | TokenizerPair:
    """One tokenizer, or a pair, for one text encoder, or for two.

    Raises:
        ValueError: a vocabulary is larger than its encoder's.
    """
    for tokenizer, cfg in zip(tokenizers, shapes.texts.values(), strict=True):
        if tokenizer.vocab_size > cfg.vocab_size:
            raise ValueError(
                f"the vocabulary has {tokenizer.vocab_size} tokens, the text encoder {cfg.vocab_size}: they are of two models"
            )
    return TokenizerPair(*tokenizers) if len(tokenizers) == 2 else tokenizers[0]


def _by_folder(unet: UNet, vae: AutoencoderKL, text: TextEncoder | SDXLText, only: str) -> dict[str, nn.Module]:
    """The networks by their folders; a single text encoder by the name `only`."""
    texts = dict(zip(TEXTS, (text.small, text.large), strict=True)) if isinstance(text, SDXLText) else {only: text}
    return {"unet": unet, "vae": vae, **texts}


def open_folder(folder: Path) -> dict[str, Stored]:
    """A network's weights, whole or in shards, under any of the names that are in use."""
    stems = ("diffusion_pytorch_model", "model", "pytorch_model")
    for ending in (".safetensors.index.json", ".safetensors", ".fp16.safetensors", ".bin"):
        for path in (folder / f"{stem}{ending}" for stem in stems):
            if path.is_file() and path.suffix == ".json":
                shards = sorted({Path(name).name for name in read_json(path).get("weight_map", {}).values()})
                return {name: tensor for shard in shards for name, tensor in open_weights(folder / shard).items()}
            if path.is_file():
                return open_weights(path)
    raise FileNotFoundError(f"no weights in {folder}: expected {' or '.join(f'{stem}.safetensors' for stem in stems[:2])}")


def read_json(path: Path) -> dict:
    """The content of a settings file; FileNotFoundError or ValueError say which is missing or damaged."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: a model in the diffusers layout has one; fetch the whole folder")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); fetch it again") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} is damaged (it holds a {type(fields).__name__}, not settings); fetch it again")
    return fields


# ----------------------------------------------------------------------------------------------------------------- writing


def write_diffusers(folder: Path, parts: Parts) -> None:
    """Writes a folder in the diffusers layout; it is whole once model_index.json is there.

    Raises:
        ValueError: the reference has no such model; names the field and says why.  Nothing has been written then.
        OSError: the folder cannot be written.
    """
    refuse_adapters({"unet": parts.unet, "autoencoder": parts.vae, "text encoder": parts.text})
    kind, downsampling = _kind(parts), parts.vae.cfg.downsampling
    networks = _by_folder(parts.unet, parts.vae, parts.text, TEXTS[kind == REFINER])
    tokens = parts.tokenizer
    tokenizers = [tokens.small, tokens.large] if isinstance(tokens, TokenizerPair) else [tokens]
    tokenizers = dict(zip([name for name in TEXTS if name in networks], tokenizers, strict=True))
    fields = {
        "unet": write_unet(parts.unet.cfg, parts.image_size // downsampling),
        "vae": write_vae(parts.vae.cfg, parts.image_size),
    }
    for name, t in tokenizers.items():
        fields[name] = write_text(networks[name].cfg, kind in (SDXL, REFINER), t.start_id, t.pad_id)
        if name == TEXTS[1] and networks[name].cfg.projection_dim is None:
            raise lacks("text.projection_dim", None, "its SDXL takes the pooled vector from a projection")

    index = {"_class_name": kind, "feature_extractor": [None, None], "image_encoder": [None, None]}
    index |= {"scheduler": ["diffusers", "DDIMScheduler"]}
    if kind == INPAINT:
        index |= {"_diffusers_version": "0.42.1"}  # which the reference insists on, for this pipeline alone
    if kind in (SD, INPAINT):
        index |= {"safety_checker": [None, None], "requires_safety_checker": False}
    else:
        index |= {"force_zeros_for_empty_prompt": parts.zero_negative, "text_encoder": [None, None], "tokenizer": [None, None]}
    if kind == REFINER:
        index |= {"requires_aesthetics_score": True}

    for stale in (folder / "model_index.json", *(path for name in networks for path in (folder / name).glob("*.index.json"))):
        stale.unlink(missing_ok=True)  # until all is written anew there is no model here; shards would win over our files
    for name, network in networks.items():
        table = names(network.state_dict(), TABLES[name])
        tensors = {table[ours]: tensor.contiguous() for ours, tensor in network.state_dict().items()}
        file = folder / name / f"{'model' if name in tokenizers else 'diffusion_pytorch_model'}.safetensors"
        write_atomically(file, lambda beside, t=tensors: save_file(t, beside, metadata={"format": "pt"}))
        _write_json(folder / name / "config.json", fields[name])
        architecture = fields[name].get("architectures", [fields[name].get("_class_name")])[0]
        index[name] = ["transformers" if name in tokenizers else "diffusers", architecture]
    for name, t in tokenizers.items():
        name = name.replace("text_encoder", "tokenizer")
        t.save(folder / name)
        index[name] = ["transformers", "CLIPTokenizer" if t.end_of_word else "PreTrainedTokenizerFast"]
    schedule = write_schedule(parts.schedule, parts.prediction_type, parts.spacing)
    _write_json(folder / "scheduler" / "scheduler_config.json", schedule)
    _write_json(folder / "model_index.json", index)


def _kind(parts: Parts) -> str:
    """Which of the reference's pipelines draws with this model: what is added to the time embedding decides."""
    pooled = parts.unet.cfg.pooled_dim
    beside_text = pooled and pooled - parts.text.cfg.pooled_dim
    plain = SD if parts.unet.cfg.in_channels == parts.vae.cfg.latent_channels else INPAINT
    kind = {None: plain, 6 * SIZE_FEATURES: SDXL, 5 * SIZE_FEATURES: REFINER}.get(beside_text)
    if kind is None or (kind == SDXL) != isinstance(parts.text, SDXLText):
        raise lacks("unet.pooled_dim", pooled, "it adds a text's pooled vector to the time only together with SDXL's sizes")
    return kind


def _write_json(path: Path, fields: dict) -> None:
    write_atomically(path, lambda beside: beside.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8"))


# ----------------------------------------------------------------------------------------------------------------- the hub


def is_hub_name(name: str) -> bool:
    """Whether this can be a model on the hub, "owner/model", and no path here; out/ is where training writes."""
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", name)) and not name.startswith("out/") and not Path(name).parent.exists()


def fetch(name: str) -> Path:
    """Downloads a model in the diffusers layout from the hub, or finds it downloaded already; the folder it is in.

    Args:
        name: "owner/model".

    Raises:
        ImportError: huggingface_hub is not installed.
        OSError: there is no such model, or no network.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(f"to fetch {name} install huggingface_hub: pip install 'minildm[hub]'; or give a folder") from error
    wanted = ["model_index.json", "*/config.json", "*/*.index.json", "scheduler/*", "tokenizer*/*"]
    wanted += [f"{part}/{stem}.safetensors" for part in TABLES for stem in ("*model", "*model-0*")]  # no half-precision copies
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = str(error).strip().split("\n")[0]
        raise OSError(
            f"{name} is no folder here, nor could it be fetched from huggingface.co ({reason}); check the name and the "
            "network, or train a model with `python -m minildm demo`"
        ) from error

"""Words and pictures in one space: CLIP's text encoder, its image encoder, and the loss that trains the pair.

`TextEncoder` alone is what Stable Diffusion listens to; the presets of `TextConfig` are the four towers it was published
with.  Both encoders are the same stack of pre-norm transformer blocks: text looks only backwards, pictures look everywhere.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from minildm.attention import ACTIVATIONS, PreNormBlock


def _check_tower(width: int, heads: int, activation: str) -> None:
    if width % heads:
        raise ValueError(f"width {width} does not divide into {heads} heads; choose heads that divide it")
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; choose one of {', '.join(ACTIVATIONS)}")


@dataclass(frozen=True)
class TextConfig:
    """The shape of a text encoder; the defaults are CLIP ViT-L/14's."""

    vocab_size: int = 49408
    context_length: int = 77  # the longest row of ids it takes
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_ratio: int = 4
    activation: str = "quick_gelu"  # OpenAI's towers; OpenCLIP's use "gelu"
    skip_layers: int = 0  # hidden is the output of the last block (0), the one before it (1), ...
    norm_hidden: bool = True  # whether the final norm is applied to hidden; pooled always has it
    projection_dim: int | None = None  # width of pooled after a linear map; None leaves it as it is
    end_id: int | None = 49407  # pool at the first of this id; None pools at the largest id in the row (eos_token_id 2 on file)

    def __post_init__(self) -> None:
        _check_tower(self.width, self.heads, self.activation)
        if not 0 <= self.skip_layers < self.layers:
            raise ValueError(f"skip_layers is {self.skip_layers}; with {self.layers} layers it must be 0 to {self.layers - 1}")

    @property
    def pooled_dim(self) -> int:
        """The width of the pooled vector."""
        return self.width if self.projection_dim is None else self.projection_dim

    @classmethod
    def tiny(cls, vocab_size: int = 512, context_length: int = 32) -> "TextConfig":
        """For the toy captions of this course; the end token is the last of the vocabulary."""
        return cls(
            vocab_size=vocab_size, context_length=context_length, width=128, layers=2, heads=4, activation="gelu",
            end_id=vocab_size - 1,
        )  # fmt: skip

    @classmethod
    def sd15(cls) -> "TextConfig":
        """CLIP ViT-L/14: Stable Diffusion 1.1 to 1.5."""
        return cls()

    @classmethod
    def sd21(cls) -> "TextConfig":
        """OpenCLIP ViT-H/14 without the last of its 24 layers: Stable Diffusion 2.0 and 2.1."""
        return cls(width=1024, layers=23, heads=16, activation="gelu")

    @classmethod
    def sdxl_l(cls) -> "TextConfig":
        """CLIP ViT-L/14 read one layer early: the first tower of SDXL."""
        return cls(skip_layers=1, norm_hidden=False)

    @classmethod
    def sdxl_g(cls) -> "TextConfig":
        """OpenCLIP ViT-bigG/14 read one layer early: the second tower of SDXL, whose pooled vector it also uses."""
        return cls(width=1280, layers=32, heads=20, activation="gelu", skip_layers=1, norm_hidden=False, projection_dim=1280)


@dataclass(frozen=True)
class ImageConfig:
    """The shape of an image encoder; the defaults are CLIP ViT-L/14's."""

    image_size: int = 224
    patch_size: int = 14
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_ratio: int = 4
    activation: str = "quick_gelu"
    projection_dim: int = 768

    def __post_init__(self) -> None:
        _check_tower(self.width, self.heads, self.activation)
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a whole number of patches of {self.patch_size}")

    @classmethod
    def tiny(cls, image_size: int = 32) -> "ImageConfig":
        """For the toy pictures of this course, beside `TextConfig.tiny()`."""
        return cls(image_size=image_size, patch_size=8, width=128, layers=2, heads=4, activation="gelu", projection_dim=128)

    @classmethod
    def vit_l14(cls) -> "ImageConfig":
        """CLIP ViT-L/14, the picture side of Stable Diffusion 1's text encoder."""
        return cls()


def _blocks(cfg: TextConfig | ImageConfig, causal: bool) -> nn.ModuleList:
    """The stack of blocks both encoders share, initialised as CLIP's: branches shrink as the stack grows deeper."""
    blocks = nn.ModuleList(
        PreNormBlock(cfg.width, cfg.heads, cfg.mlp_ratio, cfg.activation, causal=causal) for _ in range(cfg.layers)
    )
    std = cfg.width**-0.5
    for name, p in blocks.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(p)
        elif "fc1" in name:
            nn.init.normal_(p, std=std / math.sqrt(2))
        elif "to_out" in name or "fc2" in name:  # the two that write to the residual stream
            nn.init.normal_(p, std=std / math.sqrt(2 * cfg.layers))
        elif "norm" not in name:
            nn.init.normal_(p, std=std)
    return blocks


class TextEncoder(nn.Module):
    """A causal transformer over tokens: one vector for each token, and one for the whole text.  Radford et al. 2021, 2.4.

    Padding is not masked: Stable Diffusion was trained with it in view, and no token sees what comes after it.

    Args:
        cfg: the shape; `TextConfig.sd15()` is Stable Diffusion's.
    """

    def __init__(self, cfg: TextConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.token_embedding = nn.Embedding(cfg.vocab_size, cfg.width)
        self.position_embedding = nn.Embedding(cfg.context_length, cfg.width)
        self.blocks = _blocks(cfg, causal=True)
        self.final_norm = nn.LayerNorm(cfg.width)
        self.projection = nn.Identity()
        if cfg.projection_dim is not None:
            self.projection = nn.Linear(cfg.width, cfg.projection_dim, bias=False)
            nn.init.normal_(self.projection.weight, std=cfg.width**-0.5)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.01)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Read token ids.

        Args:
            ids: (B, L) int64 in [0, vocab_size), L at most context_length, each row holding the end token.

        Returns:
            hidden (B, L, D), what cross-attention listens to, and pooled (B, pooled_dim), the final-normed state of the
            last layer at the end token, projected.

        Raises:
            ValueError: ids have another dtype or shape, are out of range or too long, or a row has no end token.
        """
        self._check(ids)
        x = self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]  # (B, L) -> (B, L, D)
        hidden_layer = self.cfg.layers - self.cfg.skip_layers
        for layer, block in enumerate(self.blocks, start=1):
            x = block(x)
            if layer == hidden_layer:
                hidden = self.final_norm(x) if self.cfg.norm_hidden else x

        # argmax gives the first of equals: the first end token, whatever the padding
        scores = ids if self.cfg.end_id is None else (ids == self.cfg.end_id).int()
        rows = torch.arange(len(ids), device=ids.device)
        pooled = self.final_norm(x[rows, scores.argmax(dim=1)])  # (B, L, D) -> (B, D)
        return hidden, self.projection(pooled)

    def _check(self, ids: Tensor) -> None:
        cfg = self.cfg
        if ids.dtype != torch.int64 or ids.ndim != 2 or ids.numel() == 0:
            raise ValueError(f"ids must be int64 of shape (B, L), got {ids.dtype} {tuple(ids.shape)}; use a Tokenizer")
        if ids.shape[1] > cfg.context_length:
            raise ValueError(f"{ids.shape[1]} tokens a row, but context_length is {cfg.context_length}; truncate the text")
        low, high = ids.min().item(), ids.max().item()
        if low < 0 or high >= cfg.vocab_size:
            raise ValueError(
                f"ids run from {low} to {high}, but must be in [0, {cfg.vocab_size}); use the tokenizer it was trained with"
            )
        if cfg.end_id is not None and not (ids == cfg.end_id).any(dim=1).all():
            raise ValueError(f"a row of ids has no end token ({cfg.end_id}); put it after the text, before the padding")


class ImageEncoder(nn.Module):
    """A vision transformer: patches in, one vector out, read from a class token.  Dosovitskiy et al. 2021, eq. 1 to 4.

    Args:
        cfg: the shape; `ImageConfig.vit_l14()` is the partner of Stable Diffusion 1's text encoder.
    """

    def __init__(self, cfg: ImageConfig) -> None:
        super().__init__()
        self.cfg = cfg
        patches = (cfg.image_size // cfg.patch_size) ** 2
        self.patch_embedding = nn.Conv2d(3, cfg.width, kernel_size=cfg.patch_size, stride=cfg.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(cfg.width))
        self.position_embedding = nn.Embedding(patches + 1, cfg.width)
        self.pre_norm = nn.LayerNorm(cfg.width)
        self.blocks = _blocks(cfg, causal=False)
        self.final_norm = nn.LayerNorm(cfg.width)
        self.projection = nn.Linear(cfg.width, cfg.projection_dim, bias=False)
        for p in (self.class_embedding, self.position_embedding.weight, self.projection.weight):
            nn.init.normal_(p, std=cfg.width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Embed pictures.

        Args:
            x: (B, 3, image_size, image_size), in [-1, 1] for encoders trained here; published weights want what
                `clip_preprocess` makes of it.

        Returns:
            (B, projection_dim), not normalised.

        Raises:
            ValueError: x has another shape.
        """
        size = self.cfg.image_size
        if x.ndim != 4 or x.shape[1:] != (3, size, size):
            raise ValueError(f"pictures must be (B, 3, {size}, {size}), got {tuple(x.shape)}; resize them first")
        x = rearrange(self.patch_embedding(x), "b d h w -> b (h w) d")  # (B, 3, H, W) -> (B, L, D)
        x = torch.cat([repeat(self.class_embedding, "d -> b 1 d", b=len(x)), x], dim=1)  # (B, L, D) -> (B, 1 + L, D)
        x = self.pre_norm(x + self.position_embedding.weight)
        for block in self.blocks:
            x = block(x)
        return self.projection(self.final_norm(x[:, 0]))  # (B, 1 + L, D) -> (B, projection_dim)


def clip_preprocess(x: Tensor, image_size: int = 224) -> Tensor:
    """Bring pictures to the size, mean and deviation that CLIP's published image encoders were trained on.

    Args:
        x: square pictures, (B, 3, S, S), in [-1, 1].
        image_size: the side the encoder takes, in pixels.

    Returns:
        (B, 3, image_size, image_size), about standard normal.

    Raises:
        ValueError: x is not square.
    """
    if x.ndim != 4 or x.shape[1] != 3 or x.shape[2] != x.shape[3]:
        raise ValueError(f"pictures must be (B, 3, S, S), got {tuple(x.shape)}; crop them square first")
    x = F.interpolate(x, size=(image_size, image_size), mode="bicubic", antialias=True).clamp(-1, 1)
    mean = x.new_tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = x.new_tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    return ((x + 1) / 2 - mean) / std


def contrastive_loss(image_emb: Tensor, text_emb: Tensor, logit_scale: Tensor) -> Tensor:
    """Of all B x B pairs, pick out the B true ones, by row and by column.  Radford et al. 2021, figure 3.

    Args:
        image_emb: (B, D), any length; normalised here.
        text_emb: (B, D), row i describes picture i.
        logit_scale: scalar, the logarithm of the inverse temperature.

    Returns:
        The mean of both cross-entropies, a scalar; log(B) at chance.

    Raises:
        ValueError: the embeddings are not two matrices of one shape.
    """
    if image_emb.ndim != 2 or image_emb.shape != text_emb.shape:
        raise ValueError(f"need two (B, D) of one shape, got {tuple(image_emb.shape)} and {tuple(text_emb.shape)}")
    image_emb, text_emb = F.normalize(image_emb, dim=1), F.normalize(text_emb, dim=1)
    logits = logit_scale.exp() * image_emb @ text_emb.T  # (B, D) -> (B, B)
    truth = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2


class CLIP(nn.Module):
    """Both encoders and the learned temperature: `contrastive_loss(*clip(x, ids), clip.logit_scale)` trains them.

    Args:
        text: the shape of the text encoder; its pooled_dim must equal the image encoder's projection_dim.
        image: the shape of the image encoder.

    Raises:
        ValueError: the two embeddings would differ in width.
    """

    def __init__(self, text: TextConfig, image: ImageConfig) -> None:
        super().__init__()
        if text.pooled_dim != image.projection_dim:
            raise ValueError(
                f"text embeds in {text.pooled_dim} dimensions, pictures in {image.projection_dim}; make them equal"
            )
        self.text = TextEncoder(text)
        self.image = ImageEncoder(image)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Embed pictures and texts in one space.

        Args:
            x: pictures, (B, 3, image_size, image_size).
            ids: texts, (B, L) int64.

        Returns:
            image_emb and text_emb, both (B, D), not normalised.
        """
        if self.training:  # Radford et al. 2021, 2.5: logits are never scaled by more than 100
            self.logit_scale.data.clamp_(max=math.log(100))
        return self.image(x), self.text(ids)[1]

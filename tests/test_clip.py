"""CLIP against transformers' and OpenCLIP's from shared random weights; its own promises; and that a tiny one learns."""

import math
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from minildm.clip import (
    CLIP,
    ImageConfig,
    ImageEncoder,
    TextConfig,
    TextEncoder,
    clip_preprocess,
    contrastive_loss,
)

transformers = pytest.importorskip("transformers")

END = 98  # the end token, the largest id of the tiny vocabulary, as in CLIP's
TEXT = TextConfig(vocab_size=99, context_length=16, width=32, layers=3, heads=4, end_id=END)
IMAGE = ImageConfig(image_size=16, patch_size=4, width=48, layers=2, heads=4, projection_dim=24)

# name patterns, transformers to ours; `text_model.` and `vision_model.` are taken off first
RENAMES = [
    (r"^embeddings\.", ""),
    (r"^encoder\.layers\.", "blocks."),
    (r"\.layer_norm(\d)", r".norm\1"),
    (r"\.self_attn\.(q|k|v|out)_proj", r".attn.to_\1"),
    (r"^(final_layer_norm|post_layernorm)", "final_norm"),
    (r"^pre_layrnorm", "pre_norm"),
    (r"^(text|visual)_projection", "projection"),
]


def from_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """One tower's weights, in transformers' names, in ours."""
    out = {}
    for name, tensor in state.items():
        name = re.sub(r"^(text|vision)_model\.", "", name)
        for pattern, ours in RENAMES:
            name = re.sub(pattern, ours, name)
        out[name] = tensor
    return out


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random, none at zero or one, so that no part can be left out unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.2 if p.ndim > 1 else 0.5) + (0 if p.ndim > 1 else 0.3))
    return model.eval()


def random_ids(padding: int, batch: int = 3, length: int = 12) -> Tensor:
    """Rows of different lengths, each closed by the end token and padded."""
    ids = torch.randint(1, END, (batch, length), generator=torch.Generator().manual_seed(1))
    for row, end in zip(ids, (5, length - 1, 8), strict=True):
        row[end], row[end + 1 :] = END, padding
    return ids


def reference_config(cfg: TextConfig, eos_token_id: int = END) -> "transformers.CLIPTextConfig":
    return transformers.CLIPTextConfig(
        vocab_size=cfg.vocab_size,
        max_position_embeddings=cfg.context_length,
        hidden_size=cfg.width,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        intermediate_size=4 * cfg.width,
        hidden_act=cfg.activation,
        projection_dim=cfg.projection_dim or 512,
        eos_token_id=eos_token_id,
        bos_token_id=0,
    )


def reference_vision_config(cfg: ImageConfig) -> "transformers.CLIPVisionConfig":
    return transformers.CLIPVisionConfig(
        image_size=cfg.image_size,
        patch_size=cfg.patch_size,
        hidden_size=cfg.width,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        intermediate_size=4 * cfg.width,
        hidden_act=cfg.activation,
        projection_dim=cfg.projection_dim,
    )


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


# --- against the references -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("padding", [0, END])
@pytest.mark.parametrize("eos_token_id", [2, END])
@torch.no_grad()
def test_text_encoder_is_the_reference(activation, padding, eos_token_id):
    cfg = replace(TEXT, activation=activation, end_id=None if eos_token_id == 2 else END)
    reference = randomise(transformers.CLIPTextModel(reference_config(cfg, eos_token_id)))
    ours = TextEncoder(cfg)
    ours.load_state_dict(from_transformers(reference.state_dict()))
    expected = reference(random_ids(padding))
    hidden, pooled = ours(random_ids(padding))
    close(hidden, expected.last_hidden_state)
    close(pooled, expected.pooler_output)


@torch.no_grad()
def test_end_token_need_not_be_the_largest_id():
    """Tokens added after training (textual inversion) have larger ids than the end token."""
    cfg = replace(TEXT, end_id=40)
    ids = random_ids(padding=0)
    ids[:, 6] = 40
    reference = randomise(transformers.CLIPTextModel(reference_config(cfg, eos_token_id=40)))
    ours = TextEncoder(cfg)
    ours.load_state_dict(from_transformers(reference.state_dict()))
    close(ours(ids)[1], reference(ids).pooler_output)


@pytest.mark.parametrize("skip_layers", [0, 1, 2])
@pytest.mark.parametrize("norm_hidden", [False, True])
@torch.no_grad()
def test_skipped_layers_and_projection_are_the_reference(skip_layers, norm_hidden):
    cfg = replace(TEXT, skip_layers=skip_layers, norm_hidden=norm_hidden, projection_dim=20)
    reference = randomise(transformers.CLIPTextModelWithProjection(reference_config(cfg)))
    ours = TextEncoder(cfg)
    ours.load_state_dict(from_transformers(reference.state_dict()))
    expected = reference(random_ids(0), output_hidden_states=True)
    state = expected.hidden_states[-1 - skip_layers]
    hidden, pooled = ours(random_ids(0))
    close(hidden, reference.text_model.final_layer_norm(state) if norm_hidden else state)
    close(pooled, expected.text_embeds)  # the last layer's, whatever is skipped


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@torch.no_grad()
def test_image_encoder_is_the_reference(activation):
    cfg = replace(IMAGE, activation=activation)
    reference = randomise(transformers.CLIPVisionModelWithProjection(reference_vision_config(cfg)))
    ours = ImageEncoder(cfg)
    ours.load_state_dict(from_transformers(reference.state_dict()))
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    close(ours(x), reference(x).image_embeds)


def clip_pair() -> tuple[CLIP, nn.Module]:
    text = replace(TEXT, projection_dim=IMAGE.projection_dim)
    config = transformers.CLIPConfig(
        text_config=reference_config(text).to_dict(),
        vision_config=reference_vision_config(IMAGE).to_dict(),
        projection_dim=IMAGE.projection_dim,
    )
    reference = randomise(transformers.CLIPModel(config))
    state = {"text": {}, "image": {}}
    for name, tensor in reference.state_dict().items():
        if name != "logit_scale":
            state["text" if name.startswith("text") else "image"][name] = tensor
    ours = CLIP(text, IMAGE).eval()
    ours.text.load_state_dict(from_transformers(state["text"]))
    ours.image.load_state_dict(from_transformers(state["image"]))
    ours.logit_scale.data.copy_(reference.logit_scale)
    return ours, reference


def test_clip_and_its_loss_and_gradients_are_the_reference():
    ours, reference = clip_pair()
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    ids = random_ids(0)
    expected = reference(input_ids=ids, pixel_values=x, return_loss=True)
    loss = contrastive_loss(*ours(x, ids), ours.logit_scale)
    close(loss, expected.loss)
    loss.backward()
    expected.loss.backward()
    close(ours.logit_scale.grad, reference.logit_scale.grad)
    close(ours.text.token_embedding.weight.grad, reference.text_model.embeddings.token_embedding.weight.grad)
    close(ours.image.patch_embedding.weight.grad, reference.vision_model.embeddings.patch_embedding.weight.grad)


@torch.no_grad()
def test_text_encoder_is_openclips():
    """The layout of Stable Diffusion 2's original file: fused queries, keys and values, a transposed projection."""
    transformer = pytest.importorskip("open_clip.transformer")
    cfg = replace(TEXT, activation="gelu", end_id=None, projection_dim=20)
    reference = transformer.TextTransformer(
        context_length=cfg.context_length,
        vocab_size=cfg.vocab_size,
        width=cfg.width,
        heads=cfg.heads,
        layers=cfg.layers,
        output_dim=20,
        output_tokens=True,
    )
    state = {}
    for name, tensor in randomise(reference).state_dict().items():
        name = name.replace("transformer.resblocks.", "blocks.").replace("ln_final", "final_norm").replace("ln_", "norm")
        name = name.replace("attn.out_proj", "attn.to_out").replace("c_fc", "fc1").replace("c_proj", "fc2")
        if "in_proj" in name:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                state[name.replace("in_proj_", f"to_{part}.")] = piece
        elif name == "positional_embedding":
            state["position_embedding.weight"] = tensor
        elif name == "text_projection":
            state["projection.weight"] = tensor.T
        elif name != "attn_mask":
            state[name] = tensor
    ours = TextEncoder(cfg)
    ours.load_state_dict(state)
    ids = random_ids(0, length=cfg.context_length)  # it takes full rows only
    pooled, hidden = reference(ids)
    close(ours(ids)[0], hidden)
    close(ours(ids)[1], pooled)


def test_preprocessing_is_the_reference():
    processor = transformers.CLIPImageProcessor()
    generator = torch.Generator().manual_seed(3)
    soft = nn.functional.interpolate(torch.rand(1, 3, 12, 12, generator=generator), size=600, mode="bilinear")
    stripes = torch.rand(1, 3, 1, 200, generator=generator).round().repeat_interleave(3, dim=3).expand(1, 3, 600, 600)
    pixels = (torch.cat([soft, stripes]) * 255).to(torch.uint8)
    expected = processor(images=list(pixels), return_tensors="pt")["pixel_values"]
    ours = clip_preprocess(pixels / 127.5 - 1)
    torch.testing.assert_close(ours, expected, atol=0.03, rtol=0)  # it rounds to 1 / 255 before dividing


@pytest.mark.parametrize(
    ("model", "cfg", "parameters", "tensors"),
    [
        (TextEncoder, TextConfig.sd15(), 123_060_480, 196),
        (TextEncoder, TextConfig.sd21(), 340_387_840, 372),
        (TextEncoder, TextConfig.sdxl_l(), 123_060_480, 196),
        (TextEncoder, TextConfig.sdxl_g(), 694_659_840, 517),
        (ImageEncoder, ImageConfig.vit_l14(), 303_966_208, 392),
    ],
)
def test_presets_have_the_published_size(model, cfg, parameters, tensors):
    with torch.device("meta"):
        sizes = [p.numel() for p in model(cfg).parameters()]
    assert (sum(sizes), len(sizes)) == (parameters, tensors)


def test_published_picture_encoder_is_the_references_size():
    with torch.device("meta"):
        reference = transformers.CLIPVisionModelWithProjection(reference_vision_config(ImageConfig.vit_l14()))
    assert sum(p.numel() for p in reference.parameters()) == 303_966_208


def test_presets_say_which_layer_stable_diffusion_reads():
    read = {name: getattr(TextConfig, name)() for name in ("sd15", "sd21", "sdxl_l", "sdxl_g")}
    assert {n: (c.layers, c.heads, c.skip_layers, c.norm_hidden, c.activation) for n, c in read.items()} == {
        "sd15": (12, 12, 0, True, "quick_gelu"),
        "sd21": (23, 16, 0, True, "gelu"),
        "sdxl_l": (12, 12, 1, False, "quick_gelu"),
        "sdxl_g": (32, 20, 1, False, "gelu"),
    }


# --- its own promises -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_no_token_sees_what_comes_after_it():
    text = randomise(TextEncoder(replace(TEXT, norm_hidden=False)))
    ids = random_ids(0)
    changed = ids.clone()
    changed[:, 7] = (changed[:, 7] + 1) % END
    changed[:, 11] = END  # still closed
    before, after = text(ids)[0], text(changed)[0]
    assert torch.equal(before[:, :7], after[:, :7])
    assert (before[:, 7:] != after[:, 7:]).any(dim=2).all()


@torch.no_grad()
def test_a_picture_is_read_in_every_patch_and_in_order():
    image = randomise(ImageEncoder(IMAGE))
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    for row in range(0, 16, 4):
        changed = x.clone()
        changed[:, :, row, row] += 1
        assert not torch.allclose(image(changed), image(x), atol=1e-4)
    assert not torch.allclose(image(x.roll(4, dims=2)), image(x), atol=1e-4)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(1, 4), r"int64 of shape \(B, L\), got torch.float32"),
        (torch.zeros(1, 4, dtype=torch.int32), "got torch.int32"),
        (torch.zeros(4, dtype=torch.int64), r"got torch.int64 \(4,\)"),
        (torch.zeros(1, 0, dtype=torch.int64), r"\(1, 0\)"),
        (torch.full((1, 17), END), "17 tokens a row, but context_length is 16"),
        (torch.tensor([[99, END]]), r"run from 98 to 99, but must be in \[0, 99\)"),
        (torch.tensor([[-1, END]]), "run from -1 to 98"),
        (torch.tensor([[1, END], [1, 2]]), r"no end token \(98\)"),
    ],
)
def test_bad_ids_are_named(ids, message):
    with pytest.raises(ValueError, match=message):
        TextEncoder(TEXT)(ids)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TextConfig(width=100, heads=12), "width 100 does not divide into 12 heads"),
        (lambda: TextConfig(activation="relu"), "'relu'; choose one of gelu, quick_gelu"),
        (lambda: TextConfig(skip_layers=12), "skip_layers is 12; with 12 layers it must be 0 to 11"),
        (lambda: ImageConfig(width=100), "width 100 does not divide into 16 heads"),
        (lambda: ImageConfig(image_size=225), "225 is not a whole number of patches of 14"),
        (lambda: CLIP(TEXT, IMAGE), "text embeds in 32 dimensions, pictures in 24"),
        (lambda: ImageEncoder(IMAGE)(torch.zeros(1, 3, 8, 16)), r"must be \(B, 3, 16, 16\), got \(1, 3, 8, 16\)"),
        (lambda: clip_preprocess(torch.zeros(1, 3, 8, 16)), r"got \(1, 3, 8, 16\); crop"),
        (lambda: contrastive_loss(torch.ones(2, 4), torch.ones(3, 4), torch.tensor(0.0)), r"got \(2, 4\) and \(3, 4\)"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_loss_is_log_b_at_chance_and_zero_when_sure():
    same = torch.ones(8, 4)
    assert contrastive_loss(same, same, torch.tensor(2.0)).item() == pytest.approx(math.log(8), abs=1e-5)
    apart = torch.eye(8) * 7  # any length: it is normalised
    assert contrastive_loss(apart, 3 * apart, torch.tensor(math.log(100))).item() < 1e-6


def test_loss_is_symmetric_and_counts_both_directions():
    generator = torch.Generator().manual_seed(5)
    image, text = torch.randn(2, 6, 4, generator=generator)
    scale = torch.tensor(1.5)
    close(contrastive_loss(image, text, scale), contrastive_loss(text, image, scale))
    logits = scale.exp() * torch.cosine_similarity(image[:, None], text[None], dim=2)
    by_row = -logits.log_softmax(dim=1).diagonal().mean()
    by_column = -logits.log_softmax(dim=0).diagonal().mean()
    close(contrastive_loss(image, text, scale), (by_row + by_column) / 2)


def test_logit_scale_starts_as_published_and_stays_below_100():
    clip = CLIP(TextConfig.tiny(), ImageConfig.tiny())
    assert clip.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    clip.logit_scale.data.fill_(9.0)
    x, ids = torch.zeros(2, 3, 32, 32), torch.tensor([[1, 511], [2, 511]])
    loss = contrastive_loss(*clip(x, ids), clip.logit_scale)
    assert clip.logit_scale.exp().item() == pytest.approx(100)
    loss.backward()
    assert clip.logit_scale.grad.item() != 0  # held at the limit, not stuck there


@torch.no_grad()
def test_fresh_encoders_are_well_scaled():
    torch.manual_seed(0)
    for layers in (2, 12):
        text = TextEncoder(replace(TextConfig.tiny(), layers=layers, norm_hidden=False))
        hidden = text(torch.randint(0, 512, (4, 32)).index_fill(1, torch.tensor([31]), 511))[0]
        assert 0.3 < hidden.std() < 3  # the residual stream neither fades nor grows with depth
    assert all((p == 0).all() for name, p in text.named_parameters() if name.endswith("bias"))


def test_a_tiny_clip_learns_colours():
    """Eight coloured squares and their names: 30 steps take the loss from chance to almost nothing."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    clip = CLIP(TextConfig.tiny(vocab_size=16, context_length=4), ImageConfig.tiny(image_size=16))
    colours = torch.tensor([[i & 1, i >> 1 & 1, i >> 2 & 1] for i in range(8)]) * 2.0 - 1
    ids = torch.stack([torch.full((8,), 14), torch.arange(8), torch.full((8,), 15)], dim=1)
    optimiser = torch.optim.AdamW(clip.parameters(), lr=1e-3)
    losses = []
    for _ in range(30):
        x = colours[:, :, None, None] + 0.1 * torch.randn(8, 3, 16, 16, generator=generator)
        loss = contrastive_loss(*clip(x, ids), clip.logit_scale)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] > 0.7 * math.log(8)
    assert losses[-1] < 0.1
    image_emb, text_emb = clip.eval()(colours[:, :, None, None].expand(8, 3, 16, 16), ids)
    assert (torch.cosine_similarity(image_emb[:, None], text_emb[None], dim=2).argmax(dim=1) == torch.arange(8)).all()

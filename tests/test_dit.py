"""The transformer against the reference library, part by part and whole; its zero start, its count, its complaints."""

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from reference import randomise
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from minildm.dit import DiT, DiTBlock, DiTConfig, FinalLayer, modulate, sincos_2d
from minildm.flow import FlowPath, flow_euler
from minildm.guidance import guided
from minildm.train import Fit, Latents, train_diffusion
from minildm.unet import UNet, UNetConfig

SMALL = DiTConfig(width=16, depth=2, heads=2, context_dim=12, pooled_dim=6)


def inputs(b: int = 2) -> dict[str, torch.Tensor]:
    x, context, pooled = torch.randn(b, 4, 8, 8), torch.randn(b, 5, 12), torch.randn(b, 6)
    return {"x": x, "t": torch.arange(b) * 400.0, "context": context, "pooled": pooled}


def attention_weights(theirs: dict, prefix: str, ours: str) -> dict:
    """The reference's names of an attention's weights to ours."""
    names = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out.0": "to_out"}
    return {f"{ours}.{b}.{e}": theirs[f"{prefix}.{a}.{e}"] for a, b in names.items() for e in ("weight", "bias")}


def block_weights(theirs: dict, prefix: str = "", adaptive: str = "norm1.linear", cross: bool = False) -> dict:
    """One block of the reference's, by our names."""
    result = attention_weights(theirs, f"{prefix}attn1", "attn")
    if cross:
        result |= attention_weights(theirs, f"{prefix}attn2", "cross")
    for ours, name in {"mlp.0": "ff.net.0.proj", "mlp.2": "ff.net.2", "modulation": adaptive}.items():
        result |= {f"{ours}.{e}": theirs[f"{prefix}{name}.{e}"] for e in ("weight", "bias") if f"{prefix}{name}.{e}" in theirs}
    return result


# ---- against the reference


def test_positions_are_the_references_column_first():
    theirs = get_2d_sincos_pos_embed(24, 6, base_size=6)
    torch.testing.assert_close(sincos_2d(24, 6, 6), theirs.float())
    grid = sincos_2d(24, 3, 5).view(3, 5, 24)
    assert torch.equal(grid[0, :, :12], grid[2, :, :12])  # the first half says the column, whatever the row
    assert torch.equal(grid[:, 0, 12:], grid[:, 4, 12:])
    assert torch.cdist(grid.view(15, 24), grid.view(15, 24)).add(torch.eye(15)).min() > 0.1
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_2d(6, 2, 2)


def test_a_block_is_the_references():
    theirs = BasicTransformerBlock(
        32, 4, 8, activation_fn="gelu-approximate", num_embeds_ada_norm=10, attention_bias=True, norm_type="ada_norm_zero",
        norm_elementwise_affine=False, norm_eps=1e-6,
    )  # fmt: skip
    randomise(theirs)
    ours = DiTBlock(32, heads=4)
    ours.load_state_dict(block_weights(theirs.state_dict()))
    x, t, label = torch.randn(3, 7, 32), torch.tensor([0, 17, 900]), torch.tensor([1, 0, 9])
    expected = theirs(x, timestep=t, class_labels=label)
    torch.testing.assert_close(ours(x, theirs.norm1.emb(t, label, hidden_dtype=x.dtype)), expected, rtol=1e-4, atol=1e-5)
    assert (expected - x).abs().max() > 0.1


def test_a_block_that_hears_a_caption_is_pixart_alphas():
    theirs = BasicTransformerBlock(
        32, 4, 8, cross_attention_dim=20, activation_fn="gelu-approximate", attention_bias=True, norm_type="ada_norm_single",
        norm_elementwise_affine=False, norm_eps=1e-6,
    )  # fmt: skip
    randomise(theirs)
    theirs.scale_shift_table.data.zero_()  # it adds this to a modulation that all blocks share; each of ours has its own
    ours = randomise(DiTBlock(32, heads=4, context_dim=20), seed=1)
    ours.load_state_dict(block_weights(theirs.state_dict(), cross=True), strict=False)
    x, condition, context = torch.randn(3, 7, 32), torch.randn(3, 32), torch.randn(3, 5, 20)
    six = ours.modulation(F.silu(condition))
    expected = theirs(x, encoder_hidden_states=context, timestep=six)
    torch.testing.assert_close(ours(x, condition, context), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("patch", [1, 2])
def test_the_whole_network_is_the_references(patch):
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, out_channels=8, num_layers=3, sample_size=8, patch_size=patch,
        num_embeds_ada_norm=10, norm_eps=1e-6,
    )  # fmt: skip
    randomise(theirs)
    embedder = theirs.transformer_blocks[0].norm1.emb
    embedder.time_proj.downscale_freq_shift = 0  # theirs is 1, the paper's own code has none
    for block in theirs.transformer_blocks:  # the published network has one, its copies are alike
        block.norm1.emb = embedder
    state = theirs.state_dict()
    labels = embedder.class_embedder.embedding_table.weight  # (11, D)
    first = "transformer_blocks.0.norm1.emb.timestep_embedder.linear"
    weights = {
        "patches.weight": state["pos_embed.proj.weight"].flatten(1), "patches.bias": state["pos_embed.proj.bias"],
        "pooled_mlp.0.weight": torch.eye(32, 11), "pooled_mlp.0.bias": torch.zeros(32),  # a class is a one-hot pooled vector
        "pooled_mlp.2.weight": F.pad(labels.T, (0, 21)) / F.silu(torch.ones(1)), "pooled_mlp.2.bias": torch.zeros(32),
    }  # fmt: skip
    ends = {"weight", "bias"}
    weights |= {f"time_mlp.{2 * i}.{e}": state[f"{first}_{i + 1}.{e}"] for i in range(2) for e in ends}
    weights |= {f"final.modulation.{e}": state[f"proj_out_1.{e}"] for e in ends}
    weights |= {f"final.linear.{e}": state[f"proj_out_2.{e}"] for e in ends}
    for k in range(3):
        weights |= {f"blocks.{k}.{name}": t for name, t in block_weights(state, f"transformer_blocks.{k}.").items()}
    ours = DiT(DiTConfig(width=32, depth=3, heads=4, patch=patch, out_channels=8, pooled_dim=11)).eval()
    ours.load_state_dict(weights)
    x, t, label = torch.randn(3, 4, 8, 8), torch.tensor([0, 17, 900]), torch.tensor([1, 0, 9])
    expected = theirs(x, timestep=t, class_labels=label).sample
    torch.testing.assert_close(ours(x, t, pooled=F.one_hot(label, 11).float()), expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.1


def test_the_published_size():
    with torch.device("meta"):
        ours = sum(p.numel() for p in DiT(DiTConfig.xl2()).parameters())
    assert ours == 673_681_568
    labels, positions = 1001 * 1152, 256 * 1152  # a row for every class and one for none; fixed, but stored as a parameter
    assert ours + labels + positions == 675_129_632  # the paper's table 4 says 675M


# ---- how it starts, and that it listens


def test_every_block_starts_as_the_identity_and_the_network_by_predicting_zero():
    net, given = DiT(SMALL), inputs()
    x, condition = torch.randn(2, 9, 16), torch.randn(2, 16)
    for block in net.blocks:
        assert torch.equal(block(x, condition, given["context"]), x)
    assert not net(**given).any()


def test_it_hears_everything_once_it_has_weights():
    net, given = randomise(DiT(SMALL)), inputs()
    out = net(**given)
    assert out.shape == given["x"].shape
    for name in given:
        assert not torch.allclose(out, net(**given | {name: given[name] + 1})), f"deaf to {name}"


def test_the_first_step_of_training_moves_only_what_leads_out_of_zero():
    net, given = DiT(SMALL), inputs()
    net(**given).sub(1).square().mean().backward()
    moved = {name for name, p in net.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"final.linear.weight", "final.linear.bias"}


def test_it_takes_any_shape_of_patches_and_knows_the_places_apart():
    net = randomise(DiT(SMALL))
    given = inputs(1) | {"x": torch.ones(1, 4, 4, 10)}
    out = net(**given)
    assert out.shape == (1, 4, 4, 10)
    corner, inside = out[..., :2, :2], out[..., 2:, 4:6]
    assert not torch.allclose(corner, inside, atol=1e-3)  # the same everywhere, and yet told apart: by the positions


def test_modulate_and_the_final_layer_are_their_formulas():
    x, shift, scale = torch.randn(2, 5, 8), torch.randn(2, 8), torch.randn(2, 8)
    assert torch.equal(modulate(x, shift, scale)[1, 3], x[1, 3] * (1 + scale[1]) + shift[1])
    layer = randomise(FinalLayer(8, 6))
    condition = torch.randn(2, 8)
    shift, scale = layer.modulation(F.silu(condition)).chunk(2, dim=1)
    by_hand = layer.linear(F.layer_norm(x[1, 3], (8,), eps=1e-6) * (1 + scale[1]) + shift[1])
    torch.testing.assert_close(layer(x, condition)[1, 3], by_hand)


def test_the_tiny_one_costs_what_the_tiny_unet_costs():
    def operations(net: nn.Module) -> int:
        with FlopCounterMode(display=False) as counter:
            net(torch.zeros(1, 4, 8, 8), torch.zeros(1), torch.zeros(1, 32, 128), torch.zeros(1, 128)).sum().backward()
        return counter.get_total_flops()

    ratio = operations(DiT(DiTConfig.tiny())) / operations(UNet(UNetConfig.tiny()))
    assert 0.96 < ratio < 1.04


# ---- it is used as the U-Net is


def test_training_guidance_and_the_sampler_take_it():
    torch.manual_seed(0)
    net, text = DiT(SMALL), nn.Embedding(10, 12)

    class Text(nn.Module):
        def forward(self, ids):
            return text(ids), text(ids)[:, 0, :6]

    mean, path = torch.ones(4, 4, 4, 4), FlowPath()
    latents = Latents(mean, torch.zeros_like(mean), ["a"] * 4, 1.0)
    ids, empty = torch.ones(4, 3, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64)
    cfg = Fit(steps=120, lr=1e-2, batch_size=32, warmup=5, ema=0.9)
    run = train_diffusion(net, Text(), path, latents, ids, empty, cfg, prediction_type="flow")
    losses = [p.loss for p in run]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    cond, uncond = (dict(zip(("context", "pooled"), Text()(i), strict=True)) for i in (ids[:1], empty))
    z = flow_euler(guided(net, cond, uncond, scale=2.0), torch.randn(8, 4, 4, 4), path, steps=8)
    assert (z.mean() - 1).abs() < 0.3


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros(2, 3, 8, 8), r"expected \(B, 4, H, W\)"),
        ("x", torch.zeros(2, 4, 7, 8), "multiples of 2"),
        ("context", torch.zeros(2, 5, 13), r"expected \(2, L, 12\)"),
        ("context", torch.zeros(1, 5, 12), r"expected \(2, L, 12\)"),
        ("context", None, r"context is None; expected \(2, L, 12\)"),
        ("pooled", None, r"pooled is None; expected \(2, 6\)"),
        ("pooled", torch.zeros(2, 7), r"pooled is \(2, 7\)"),
    ],
)
def test_wrong_shapes_are_named(name, value, message):
    with pytest.raises(ValueError, match=message):
        DiT(SMALL)(**inputs() | {name: value})


def test_a_caption_for_a_network_that_hears_none_is_refused():
    with pytest.raises(ValueError, match=r"context is \(2, 5, 12\); expected None"):
        DiT(DiTConfig(width=16, depth=1, heads=2))(**inputs() | {"pooled": None})


@pytest.mark.parametrize("fields", [{"width": 20, "heads": 8}, {"width": 18, "heads": 2}])
def test_widths_that_do_not_divide_are_refused(fields):
    with pytest.raises(ValueError, match="must divide into"):
        DiTConfig(**fields)

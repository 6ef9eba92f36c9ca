"""U-Net, autoencoder and text encoder take the reference's weights and give its outputs; in full size they count the same."""

import pytest
import reference
import torch
from reference import diffusers
from torch import nn

from minildm import configs, layouts
from minildm.clip import TextConfig, TextEncoder
from minildm.sdxl import SDXLText, SDXLTextConfig
from minildm.unet import UNet, UNetConfig
from minildm.vae import AutoencoderKL, VAEConfig

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
# number of weights and of tensors, counted in the reference's own networks
UNETS = {
    "sd15": (859_520_964, 686),
    "sd21": (865_910_724, 686),
    "sdxl": (2_567_463_684, 1680),
    "sdxl_refiner": (2_259_526_660, 1220),
}
TEXTS = {"sd15": (123_060_480, 196), "sd21": (340_387_840, 372), "sdxl_l": (123_060_480, 196), "sdxl_g": (694_659_840, 517)}


def give(ours: nn.Module, theirs: nn.Module, table: layouts.Table) -> nn.Module:
    """Ours with the reference's weights, every one of them, and none left over."""
    state = theirs.state_dict()
    if table is layouts.TRANSFORMERS_TEXT:
        state = {n: t for n, t in reference.prefixed_text(state).items() if "position_ids" not in n}
    named = layouts.names(ours.state_dict(), table)
    assert state.keys() == set(named.values())
    ours.load_state_dict({name: state[there] for name, there in named.items()})
    return ours.eval()


def size(network: nn.Module) -> tuple[int, int]:
    return sum(p.numel() for p in network.parameters()), len(network.state_dict())


@pytest.mark.parametrize("kind", reference.KINDS)
def test_the_unet_is_the_references(kind):
    theirs = reference.unet(kind)
    cfg = configs.read_unet(dict(theirs.config))
    ours = give(UNet(cfg), theirs, layouts.DIFFUSERS_UNET)
    x, t = torch.randn(2, 4, 8, 12), torch.tensor([7, 981])
    context = torch.randn(2, 5, cfg.context_dim)
    pooled, added = None, None
    if cfg.pooled_dim:
        text, numbers = torch.randn(2, 128), torch.randint(0, 1024, (2, (cfg.pooled_dim - 128) // 256))
        added = {"text_embeds": text, "time_ids": numbers}
        sines = theirs.add_time_proj(numbers.flatten()).reshape(2, -1)
        pooled = torch.cat([text, sines], dim=1)
    with torch.no_grad():
        wanted = theirs(x, t, context, added_cond_kwargs=added).sample
        given = ours(x, t, context, pooled)
    assert wanted.std() > 0.1  # something to compare
    torch.testing.assert_close(given, wanted, **CLOSE)


@pytest.mark.parametrize("attention", [True, False])
def test_the_autoencoder_is_the_references(attention):
    theirs = reference.vae(mid_block_add_attention=attention)
    ours = give(AutoencoderKL(configs.read_vae(dict(theirs.config))), theirs, layouts.DIFFUSERS_VAE)
    x, z = torch.randn(2, 3, 16, 24), torch.randn(2, 4, 8, 12)
    with torch.no_grad():
        posterior, wanted = ours.encode(x), theirs.encode(x).latent_dist
        torch.testing.assert_close(posterior.mean, wanted.mean, **CLOSE)
        torch.testing.assert_close(posterior.std, wanted.std, **CLOSE)
        torch.testing.assert_close(ours.decode(z), theirs.decode(z).sample, **CLOSE)


@pytest.mark.parametrize("kind", ["sd15", "sd21", "small", "large"])
@pytest.mark.parametrize("end_id", [2, 400])
def test_the_text_encoder_is_the_references(kind, end_id):
    theirs, early = reference.text(kind, vocab_size=500, end_id=end_id), kind in ("small", "large")
    cfg = configs.read_text(theirs.config.to_dict() | {"architectures": [type(theirs).__name__]}, early=early)
    ours = give(TextEncoder(cfg), theirs, layouts.TRANSFORMERS_TEXT)
    ids = torch.randint(3, 400, (2, 77))
    ids[0, 9:], ids[1, 30:] = (400, 400) if end_id == 400 else (499, 499)
    with torch.no_grad():
        hidden, pooled = ours(ids)
        wanted = theirs(ids, output_hidden_states=True)
    torch.testing.assert_close(hidden, wanted.hidden_states[-2] if early else wanted.last_hidden_state, **CLOSE)
    torch.testing.assert_close(pooled, wanted.text_embeds if kind == "large" else wanted.pooler_output, **CLOSE)


@pytest.mark.parametrize("preset", UNETS)
def test_unets_have_the_published_size(preset):
    with torch.device("meta"):
        network = UNet(getattr(UNetConfig, preset)())
        theirs = diffusers.UNet2DConditionModel.from_config(configs.write_unet(network.cfg, sample_size=64))
    assert size(network) == UNETS[preset] == size(theirs)
    weights = network.state_dict()
    named = layouts.names(weights, layouts.DIFFUSERS_UNET)
    wanted = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert {there: weights[name].shape for name, there in named.items()} == wanted


def test_the_autoencoder_has_the_published_size():
    with torch.device("meta"):
        network = AutoencoderKL(VAEConfig.sd15())
        theirs = diffusers.AutoencoderKL.from_config(configs.write_vae(network.cfg, image_size=512))
    assert size(network) == (83_653_863, 248) == size(theirs)
    assert (size(network.encoder)[0], size(network.decoder)[0]) == (34_163_592, 49_490_179)
    assert configs.read_vae(dict(theirs.config)) == VAEConfig.sd15()


@pytest.mark.parametrize("preset", TEXTS)
def test_text_encoders_have_the_published_size(preset):
    with torch.device("meta"):
        network = TextEncoder(getattr(TextConfig, preset)())
    assert size(network) == TEXTS[preset]


def test_sdxls_text_encoders_are_817_million():
    with torch.device("meta"):
        total, _ = size(SDXLText(SDXLTextConfig()))
    assert total == 123_060_480 + 694_659_840

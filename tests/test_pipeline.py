"""The pipeline: seeds, batches, prompts, saving, bad input.  The weights are random; obedience is not the point here."""

import pytest
import torch

import minildm
from minildm.clip import TextConfig, TextEncoder
from minildm.pipeline import Pipeline
from minildm.schedule import NoiseSchedule
from minildm.tokenizer import Tokenizer
from minildm.unet import UNet, UNetConfig
from minildm.vae import AutoencoderKL, VAEConfig


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["a small red circle on a white background"], 300, context_length=16, lowercase=True)
    parts = (
        UNet(UNetConfig(widths=(16, 32), depths=(0, 1), heads=(2, 2), blocks=1, context_dim=128, pooled_dim=128, groups=4)),
        AutoencoderKL(VAEConfig(widths=(16,), blocks=1, groups=4, mid_attention=False, patch=4)),
        TextEncoder(TextConfig.tiny(tokenizer.vocab_size, context_length=16)),
    )
    for part in parts:  # the U-Net starts at zero, and zero obeys nobody
        for p in part.parameters():
            torch.nn.init.normal_(p, std=0.15)
    return Pipeline(*parts, tokenizer, NoiseSchedule.scaled_linear().zero_terminal_snr(), "v_prediction", "trailing", 32)


def test_the_same_seed_draws_the_same_bits(pipe):
    first, again, other = (pipe("a red circle", seed=s, steps=3) for s in (5, 5, 6))
    assert first.shape == (1, 3, 32, 32)
    assert first.min() >= 0
    assert first.max() <= 1
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(pipe("a red circle", steps=2), pipe("a red circle", steps=2))  # no seed, a new picture


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp_2m"])
def test_a_picture_does_not_depend_on_its_company(pipe, sampler):
    together = pipe(["a red circle", "a white circle"], seed=7, n=2, steps=3, sampler=sampler)
    alone = pipe("a white circle", seed=9, steps=3, sampler=sampler)
    torch.testing.assert_close(together[2:3], alone, atol=1e-4, rtol=0)


def test_prompts_are_heard(pipe):
    args = {"seed": 1, "steps": 3}
    plain = pipe("a red circle", **args)
    assert not torch.equal(plain, pipe("a white circle", **args))
    assert not torch.equal(plain, pipe("a red circle", "white", **args))
    assert torch.equal(plain, pipe("A RED Circle", **args))
    unguided = pipe("a red circle", guidance_scale=1.0, **args)
    assert torch.equal(unguided, pipe("a red circle", "white", guidance_scale=1.0, **args))
    assert not torch.equal(plain, pipe("a red circle", rescale=0.7, **args))


def test_your_own_noise_and_your_own_size(pipe):
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(pipe("a circle", latents=noise, steps=3), pipe("a circle", seed=5, steps=3))
    assert pipe("a circle", height=48, width=64, steps=2).shape == (1, 3, 48, 64)


def test_progress_is_reported(pipe):
    seen = []
    pipe("a circle", seed=0, steps=4, sampler="ddim", callback=lambda i, t, x, x0: seen.append((i, t, x.shape, x0.shape)))
    assert [s[:2] for s in seen] == [(0, 999), (1, 749), (2, 499), (3, 249)]
    assert {s[2:] for s in seen} == {((1, 4, 8, 8), (1, 4, 8, 8))}


def test_a_saved_model_draws_the_same_bits(pipe, tmp_path):
    pipe.save(tmp_path / "model")
    again = minildm.load(tmp_path / "model")
    assert torch.equal(pipe("a red circle", seed=2, steps=3), again("a red circle", seed=2, steps=3).cpu())
    assert again.prediction_type == "v_prediction"
    assert again.spacing == "trailing"
    assert torch.equal(again.schedule.alpha_bar, pipe.schedule.alpha_bar)


def test_latents_and_pictures_go_back_and_forth_by_the_scaling_factor(pipe):
    x = torch.rand(2, 3, 32, 32)
    z = pipe.encode(x)
    torch.testing.assert_close(z, pipe.vae.encode(x * 2 - 1).mean * pipe.vae.cfg.scaling_factor)
    torch.testing.assert_close(pipe.decode(z), (pipe.vae.decode(z / pipe.vae.cfg.scaling_factor) / 2 + 0.5).clamp(0, 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampler": "magic"}, "choose one of ddim"),
        ({"steps": 0}, r"steps must lie in \[1, 1000\]"),
        ({"steps": -5}, r"got -5"),
        ({"n": 0}, "at least 1 picture"),
        ({"height": 30}, "multiples of 8 pixels"),
        ({"width": 0}, "width is 0"),
        ({"rescale": 3.0}, "rescale must lie"),
    ],
)
def test_bad_arguments_are_named(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe("a circle", **{"steps": 2} | arguments)


def test_pictures_out_of_range_are_refused(pipe):
    with pytest.raises(ValueError, match="divide bytes by 255"):
        pipe.encode(torch.full((1, 3, 32, 32), 255.0))
    with pytest.raises(ValueError, match="expected"):
        pipe.encode(torch.full((1, 3, 32, 32), float("nan")))
    with pytest.raises(ValueError, match="multiples of 4"):
        pipe.encode(torch.zeros(1, 3, 30, 32))


def test_a_broken_network_stops_the_sampler(pipe, tmp_path):
    pipe.save(tmp_path)
    broken = Pipeline.load(tmp_path, device="cpu")
    with torch.no_grad():
        broken.unet.conv_out.bias[0] = float("nan")
    with pytest.raises(FloatingPointError, match="step 0, timestep 999"):
        broken("a circle", steps=2)


def test_nothing_there_is_said_plainly(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model in .*minildm demo"):
        Pipeline.load(tmp_path)

"""The pipeline: seeds, batches, prompts, saving, bad input.  The weights are random; obedience is not the point here."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

import minildm
from minildm.clip import TextConfig, TextEncoder
from minildm.controlnet import ControlNet
from minildm.editing import latent_mask
from minildm.pipeline import Pipeline
from minildm.schedule import NoiseSchedule
from minildm.shapes import Shapes
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


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "euler", "heun", "dpmpp_2m"])
def test_a_picture_does_not_depend_on_its_company(pipe, sampler):
    """But for rounding, which depends on how many pictures a kernel is given at once; in float64 not a bit differs."""
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 0)):
        precise = deepcopy(pipe).to(dtype)
        together = precise(["a red circle", "a white circle"], seed=7, n=2, steps=3, sampler=sampler)
        alone = precise("a white circle", seed=9, steps=3, sampler=sampler)
        torch.testing.assert_close(together[2:3], alone, atol=tolerance, rtol=0)


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


IMAGE = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
HOLE = torch.zeros(1, 1, 32, 32)
HOLE[..., 8:24, 8:20] = 1


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "euler", "heun", "dpmpp_2m"])
def test_strength_0_returns_the_reconstruction_and_1_ignores_the_image(pipe, sampler):
    args = {"seed": 4, "steps": 4, "sampler": sampler}
    restored = pipe.decode(pipe.encode(IMAGE))
    for strength in (0.0, 0.24):  # less than one of four steps
        assert torch.equal(pipe("a circle", image=IMAGE, strength=strength, **args), restored)
    assert torch.equal(pipe("a circle", image=IMAGE, strength=1.0, **args), pipe("a circle", **args))
    half = pipe("a circle", image=IMAGE, strength=0.5, **args)
    assert not torch.equal(half, pipe("a circle", image=1 - IMAGE, strength=0.5, **args))
    assert not torch.equal(half, pipe("a red circle", image=IMAGE, strength=0.5, **args))


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "euler", "heun", "dpmpp_2m"])
def test_what_the_mask_keeps_is_kept_in_latents_exactly(pipe, monkeypatch, sampler, strength):
    monkeypatch.setattr(pipe, "decode", lambda z: z)
    known, cells = pipe.encode(IMAGE), latent_mask(HOLE, 4)
    args = {"image": IMAGE, "strength": strength, "steps": 4, "sampler": sampler, "seed": 1}
    z = pipe("a circle", mask=HOLE, **args)
    assert torch.equal(z * (1 - cells), known * (1 - cells))
    assert ((z - known) * cells).abs().max() > 0.1
    assert torch.equal(pipe("a circle", mask=0 * HOLE, **args), known)
    torch.testing.assert_close(pipe("a circle", mask=0 * HOLE + 1, **args), pipe("a circle", **args))


def test_what_is_kept_changes_in_pixels_by_about_the_autoencoders_own_error():
    trained, shapes = minildm.load("shapes32").to("cpu"), Shapes(size=32, seed=2)
    drawn = shapes.draw(range(8))
    images, other = (drawn.images + 1) / 2, drawn.attributes.clone()
    other[:, 2] = (other[:, 2] + 3) % 8  # another colour
    objects = ((images - images[:, :, :1, :1]).abs().amax(1, keepdim=True) > 0.05).float()
    hole = latent_mask(torch.nn.functional.max_pool2d(objects, 3, 1, 1), 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    painted = trained([shapes.caption(a.numpy()) for a in other], image=images, mask=hole, strength=1.0, steps=5, seed=0)
    restored = trained.decode(trained.encode(images))
    error = [((x - images) * (1 - hole)).square().mean().sqrt() for x in (painted, restored)]
    assert error[0] < 2 * error[1] < 0.03  # not equal: the decoder looks around, and normalises over the whole picture
    assert ((painted - restored) * hole).square().mean().sqrt() > 10 * error[1]


def test_pictures_to_edit_come_one_for_all_or_one_each(pipe):
    images, args = torch.cat([IMAGE, 1 - IMAGE]), {"strength": 0.6, "steps": 5}
    together = pipe("a red circle", n=2, seed=5, image=images, mask=torch.cat([HOLE, 1 - HOLE]), **args)
    alone = pipe("a red circle", seed=6, image=1 - IMAGE, mask=1 - HOLE, **args)
    torch.testing.assert_close(together[1:], alone, atol=1e-4, rtol=0)
    assert pipe("a red circle", n=3, image=IMAGE, **args).shape == (3, 3, 32, 32)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(pipe("a", image=IMAGE, latents=noise, **args), pipe("a", image=IMAGE, seed=5, **args))
    assert pipe("a circle", image=IMAGE[..., :24], steps=2).shape == (1, 3, 32, 24)


def test_a_controlnet_is_heard_in_both_halves_of_guidance(pipe):
    control = ControlNet(pipe.unet, hint_widths=(8, 8, 8)).eval()
    hint, args = torch.rand(1, 3, 32, 40, generator=torch.Generator().manual_seed(1)), {"seed": 2, "steps": 3}
    plain = pipe("a red circle", height=32, width=40, **args)
    torch.testing.assert_close(pipe("a red circle", control=control, hint=hint, **args), plain)  # zeros say nothing
    for p in control.parameters():
        torch.nn.init.normal_(p, std=0.15)
    drawn = pipe(["a red circle", "a"], control=control, hint=hint, **args)
    assert drawn.shape == (2, 3, 32, 40)
    assert not torch.equal(drawn[:1], plain)
    assert torch.equal(pipe("a red circle", control=control, hint=hint, control_scale=0.0, **args), plain)
    unguided = {"guidance_scale": 1.0, **args}
    assert not torch.equal(pipe("a", control=control, hint=hint, **unguided), pipe("a", height=32, width=40, **unguided))
    over = pipe("a red circle", control=control, hint=hint[..., :32], image=IMAGE, strength=0.7, **args)
    assert over.shape == (1, 3, 32, 32)


def test_a_unet_that_inpaints_wants_picture_and_mask(pipe):
    cfg = {"widths": (16, 32), "depths": (0, 1), "heads": (2, 2), "blocks": 1, "context_dim": 128, "pooled_dim": 128}
    unet = UNet(UNetConfig(**cfg, groups=4, in_channels=9))
    for p in unet.parameters():
        torch.nn.init.normal_(p, std=0.15)
    nine = replace(pipe, unet=unet)
    args = {"seed": 1, "steps": 3}
    drawn = nine(["a", "a circle"], image=IMAGE, mask=HOLE, strength=1.0, **args)
    hidden = torch.where(HOLE == 1, torch.rand(1, 3, 32, 32), IMAGE)
    torch.testing.assert_close(nine(["a", "a circle"], image=hidden, mask=HOLE, strength=1.0, **args), drawn)
    assert not torch.equal(nine(["a", "a circle"], image=IMAGE, mask=1 - HOLE, strength=1.0, **args), drawn)
    for wrong in ({}, {"image": IMAGE}):
        with pytest.raises(ValueError, match="repaints pictures: give image and mask"):
            nine("a circle", **wrong, **args)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask": HOLE}, "give image, too"),
        ({"image": IMAGE, "strength": 1.2}, "strength is 1.2"),
        ({"image": IMAGE * 255}, "divide bytes by 255"),
        ({"image": IMAGE * 2 - 1}, r"images range from -.*expected \[0, 1\]"),
        ({"image": IMAGE, "mask": HOLE * 255}, "mask ranges from 0 to 255"),
        ({"image": IMAGE, "mask": HOLE[..., :16]}, r"mask: \(1, 1, 32, 16\); expected \(1 or 1, 1, 32, 32\)"),
        ({"image": IMAGE, "mask": HOLE.expand(1, 3, 32, 32)}, r"mask: \(1, 3, 32, 32\)"),
        ({"image": IMAGE.expand(2, 3, 32, 32)}, r"image: \(2, 3, 32, 32\); expected \(1 or 1, 3"),
        ({"image": IMAGE, "latents": torch.zeros(1, 4, 4, 8)}, r"latents x 4: \(1, 4, 16, 32\)"),
        ({"image": IMAGE, "height": 32}, "a size of their own"),
        ({"image": IMAGE[..., :30]}, "width is 30"),
        ({"hint": IMAGE}, "give control and hint, or neither"),
    ],
)
def test_bad_edits_are_named(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe("a circle", **{"steps": 2} | arguments)


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

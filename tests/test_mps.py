"""Training and drawing on an Apple GPU, as far as a machine without one can tell: on `fake_mps`, with the CPU's results.

Not one of these was run on a Mac.  They show that no float64 reaches the device, that no operation mixes devices, and that
everything random is drawn on the CPU; Apple's kernels they cannot try.
"""

from collections.abc import Callable

import pytest
import torch
from fake_mps import MPS, fake_mps
from torch import Tensor, nn

import minildm
from minildm import machine
from minildm.clip import TextConfig, TextEncoder
from minildm.flow import FlowPath, flow_euler
from minildm.pipeline import Pipeline
from minildm.samplers import SAMPLERS
from minildm.schedule import NoiseSchedule
from minildm.scores import frechet_gaussians, kid
from minildm.shapes import Shapes
from minildm.shipped import folder_of
from minildm.tokenizer import Tokenizer
from minildm.train import Fit, cache_latents, train_autoencoder, train_diffusion, watch
from minildm.unet import UNet, UNetConfig
from minildm.vae import AutoencoderKL, VAEConfig

PROMPTS = ["a large red star in the center on a white background", "a small blue ring at the top left on a gray background"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x: x.double(), "float64"),
        (lambda x: torch.ones(2, dtype=torch.float64).to(MPS), "float64"),
        (lambda x: torch.zeros(2, dtype=torch.float64, device=x.device), "float64"),
        (lambda x: x + torch.ones(1, 3, 8, 8), "mps and on cpu"),
        (lambda x: torch.randn(2, device=x.device, generator=torch.Generator()), "generator"),
        (lambda x: nn.Conv2d(3, 4, 1).to(MPS)(x.to(memory_format=torch.channels_last)), "channels_last"),
    ],
)
def test_the_pretended_device_refuses_what_mps_refuses(wrong, message):
    with fake_mps(), pytest.raises((TypeError, RuntimeError), match=message):
        wrong(torch.randn(1, 3, 8, 8).to("mps"))


def test_the_pretended_device_computes_and_learns_as_the_cpu_does():
    torch.manual_seed(0)
    layer, x = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8)
    expected = layer(x).square().mean()
    (gradient,) = torch.autograd.grad(expected, [layer.weight])
    with fake_mps() as device:
        loss = layer.to(device)(x.to(device)).square().mean()
        loss.backward()
        assert (loss.device, layer.weight.device, layer.weight.grad.device) == (MPS, MPS, MPS)
        torch.testing.assert_close(loss.cpu(), expected)
        torch.testing.assert_close(layer.weight.grad.cpu(), gradient)


@pytest.mark.parametrize(("cuda", "mps", "best"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_the_best_device_is_found(monkeypatch, cuda, mps, best):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert machine.best_device().type == best


def test_convolutions_on_mps_keep_the_usual_layout():
    layouts = {name: machine.conv_format(torch.device(name)) for name in ("cpu", "cuda", "mps")}
    assert layouts == {"cpu": torch.channels_last, "cuda": torch.channels_last, "mps": torch.contiguous_format}


def on_both(work: Callable[[torch.device], Tensor]) -> tuple[Tensor, Tensor]:
    """What some work gives on the CPU, and on the pretended device."""
    expected = work(torch.device("cpu"))
    with fake_mps() as device:
        return expected, work(device).cpu()


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_a_seed_draws_the_same_pictures(sampler):
    def draw(device: torch.device) -> Tensor:
        pipe = Pipeline.load(folder_of("shapes32"), device=device, dtype=torch.float32)
        assert pipe.device.type == device.type
        return pipe(PROMPTS, negative_prompt="blue", seed=3, steps=3, sampler=sampler, rescale=0.5)

    expected, ours = on_both(draw)
    assert expected.std() > 0.1
    torch.testing.assert_close(ours, expected, atol=2e-4, rtol=0)


def test_a_picture_is_repainted():
    image = Shapes(32, seed=1).draw(range(1)).images / 2 + 0.5
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 16:] = 1

    def draw(device: torch.device) -> Tensor:
        pipe = Pipeline.load(folder_of("shapes32"), device=device, dtype=torch.float32)
        return pipe(PROMPTS[:1], seed=3, steps=4, image=image, mask=mask, strength=0.75)

    expected, ours = on_both(draw)
    torch.testing.assert_close(ours, expected, atol=2e-4, rtol=0)


def test_the_models_that_come_with_the_package_stay_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert minildm.load("shapes32").device.type == "cpu"


def second_stage(device: torch.device) -> tuple[UNet, TextEncoder, Tokenizer, Shapes, AutoencoderKL]:
    torch.manual_seed(0)
    dataset = Shapes(32, seed=0)
    tokenizer = Tokenizer.train(dataset.batch(range(64))[1], 300, context_length=48, lowercase=True)
    text = TextEncoder(TextConfig.tiny(tokenizer.vocab_size, 48))
    vae, unet = AutoencoderKL(VAEConfig.mini()), UNet(UNetConfig.tiny())
    return unet.to(device), text.to(device), tokenizer, dataset, vae.to(device)


def test_every_stage_of_training_loses_as_much():
    def losses(device: torch.device) -> Tensor:
        unet, text, tokenizer, dataset, vae = second_stage(device)
        cfg = Fit(steps=2, lr=1e-3, batch_size=2, warmup=1)
        first = [p.loss for p in train_autoencoder(vae, dataset, cfg)]
        latents = watch(cache_latents(vae, dataset, 4), "", quiet=True)
        ids, empty, schedule = tokenizer(latents.captions), tokenizer([""]), NoiseSchedule.scaled_linear().zero_terminal_snr()
        given = (text, schedule, latents, ids, empty, cfg)
        second = [p.loss for p in train_diffusion(unet, *given, min_snr_gamma=5.0)]
        flow = [p.loss for p in train_diffusion(unet, text, FlowPath(), latents, ids, empty, cfg, prediction_type="flow")]
        assert next(unet.parameters()).device.type == device.type
        return torch.tensor([*first, *second, *flow])

    expected, ours = on_both(losses)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_the_straight_path_and_the_scores_take_what_is_on_the_device():
    torch.manual_seed(0)
    start, features = torch.randn(2, 4, 8, 8), torch.randn(2, 40, 8)

    def work(device: torch.device) -> Tensor:
        z = flow_euler(lambda x, t: x * (t / 1000)[:, None, None, None], start.to(device), FlowPath(shift=3.0), steps=3)
        noisy = FlowPath().add_noise(z, z.flip(0), torch.tensor([100.0, 900.0]).to(device))
        real, fake = features.to(device)
        distance = frechet_gaussians(real.mean(0), real.T.cov(), fake.mean(0), fake.T.cov())
        draw = torch.Generator().manual_seed(0)
        scores = torch.tensor([distance, kid(real, fake, subsets=1, subset_size=20, generator=draw)[0]])
        return torch.cat([noisy.cpu().flatten(), scores])

    expected, ours = on_both(work)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)

"""A GPU against the CPU: all noise is drawn on the CPU, so a seed means the same picture and the same training on both.

What is left is rounding.  In float32 (without TF32, which rounds a convolution's inputs to 10 bits) the pictures of the shipped
model agree within `CLOSE` and a training's losses within `LOSSES`; each test prints what it measured: `pytest -rP`.
"""

from contextlib import nullcontext
from itertools import islice

import pytest
import torch
from torch import Tensor

from minildm.pipeline import Pipeline
from minildm.samplers import SAMPLERS
from minildm.schedule import NoiseSchedule
from minildm.shapes import Shapes
from minildm.shipped import folder_of
from minildm.tokenizer import Tokenizer
from minildm.train import Fit, cache_latents, fit, train_autoencoder, train_diffusion, watch
from minildm.unet import UNet, UNetConfig
from minildm.vae import AutoencoderKL, VAEConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, to compare the CPU with")

CLOSE = 5e-3  # of [0, 1], about one of 255 levels; on an H100 the samplers differed by 0.0015 to 0.0026 at most
HALF = 0.05  # on average, where the GPU works in bfloat16 or with TF32
LOSSES = 1e-4  # relative
PROMPTS = ["a large red star in the center on a white background", "a small blue circle in the top left on a black background"]


@pytest.fixture(autouse=True)
def _no_tf32():
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


@pytest.fixture(scope="module")
def pair() -> tuple[Pipeline, Pipeline]:
    """The shipped model, on the CPU and on the GPU."""
    return tuple(Pipeline.load(folder_of("shapes32"), device=device) for device in ("cpu", "cuda"))


def compared(name: str, ours: Tensor, theirs: Tensor) -> float:
    worst = (ours - theirs).abs().max().item()
    print(f"{name}: differs by {worst:.2g} at most, {(ours - theirs).abs().mean():.2g} on average")
    return worst


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_a_seed_draws_the_same_pictures_on_both(pair, sampler):
    on_cpu, on_gpu = (pipe(PROMPTS, seed=3, n=2, sampler=sampler) for pipe in pair)
    assert on_cpu.std() > 0.1
    assert compared(sampler, on_cpu, on_gpu) < CLOSE


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_a_seed_draws_the_same_bits_twice_on_a_gpu(pair, sampler):
    first, again = (pair[1](PROMPTS, seed=3, steps=6, sampler=sampler) for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_company_changes_rounding_alone(pair, sampler):
    together = pair[1](PROMPTS, seed=3, sampler=sampler)
    alone = pair[1](PROMPTS[1], seed=4, sampler=sampler)
    assert compared(sampler, together[1:], alone) < CLOSE


def test_editing_agrees_too(pair):
    image, mask = Shapes(size=32).batch([0])[0] / 2 + 0.5, torch.zeros(1, 1, 32, 32)
    mask[..., 8:24, 8:24] = 1
    for name, given in {"image to image": {}, "inpainting": {"mask": mask}}.items():
        on_cpu, on_gpu = (pipe(PROMPTS[0], seed=5, image=image, strength=0.6, **given) for pipe in pair)
        assert compared(name, on_cpu, on_gpu) < CLOSE


def test_with_tf32_as_pytorch_has_it_pictures_are_nearly_the_same(pair):
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=True):
        on_cpu, on_gpu = (pipe(PROMPTS, seed=3, n=2) for pipe in pair)
    compared("TF32", on_cpu, on_gpu)
    assert (on_cpu - on_gpu).abs().mean() < HALF


# --------------------------------------------------------------------------------------------------------------- training


def trained(device: str, steps: int, folder=None, then: str | None = None) -> tuple[list[float], list[Tensor], list[Tensor]]:
    """Losses of a small U-Net's first steps, and its weights before and after; perhaps stopped midway and moved elsewhere."""
    shapes, cfg = Shapes(size=32, seed=0), Fit(steps=steps, lr=1e-3, batch_size=16, warmup=2, ema=0.5, save_every=2)
    torch.manual_seed(1)
    tokenizer = Tokenizer.train(shapes.batch(range(40))[1], 300, context_length=64)
    vae = AutoencoderKL(VAEConfig(widths=(16,), blocks=1, groups=4, mid_attention=False, patch=4))
    unet = UNet(UNetConfig(widths=(32, 64), depths=(0, 1), heads=(4, 4), blocks=1, context_dim=32, pooled_dim=None, groups=8))
    text = Words(tokenizer.vocab_size)
    latents = watch(cache_latents(vae, shapes, 64), "", quiet=True)
    ids, schedule = tokenizer(latents.captions), NoiseSchedule.scaled_linear().zero_terminal_snr()
    before, losses = [p.detach().clone() for p in unet.parameters()], []
    for place, take in ((device, None if then is None else 3), (then, None)):
        if place is not None:
            run = train_diffusion(unet.to(place), text.to(place), schedule, latents, ids, tokenizer([""]), cfg, folder)
            losses += [p.loss for p in islice(run, take)]
    return losses, before, [p.detach().cpu() for p in unet.parameters()]


class Words(torch.nn.Module):
    """A text encoder of one layer."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab_size, 32)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.embedding(ids)
        return hidden, hidden[:, 0]


def apart(ours: tuple, theirs: tuple) -> tuple[float, float]:
    """How far two trainings are from each other: in their losses, relatively, and in their weights, as a share of the way."""
    (losses, before, after), (others, _, there) = ours, theirs
    assert len(losses) == len(others)
    worst = max(abs(a - b) / a for a, b in zip(losses, others, strict=True))
    way = torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)]).norm()
    gap = torch.cat([(a - b).flatten() for a, b in zip(after, there, strict=True)]).norm()
    print(f"losses differ by {worst:.2g}, relatively; weights by {gap / way:.2g} of the way that they have gone")
    return worst, (gap / way).item()


@pytest.fixture
def _in_float32(monkeypatch):
    """On a GPU `fit` trains in bfloat16; here it does as it does on the CPU."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())


@pytest.mark.usefixtures("_in_float32")
def test_five_steps_of_training_agree():
    losses, weights = apart(trained("cpu", 5), trained("cuda", 5))
    assert losses < LOSSES
    assert weights < 0.05  # Adam turns a gradient of 1e-9 into a whole step, in whichever direction rounding says


@pytest.mark.usefixtures("_in_float32")
def test_a_training_moves_from_the_cpu_to_a_gpu_midway(tmp_path):
    whole = trained("cpu", 5)
    moved = trained("cpu", 5, tmp_path, then="cuda")
    assert moved[0][3:] == pytest.approx(whole[0][2:], rel=LOSSES)  # taken up after step 2, where the last checkpoint was
    assert apart(whole, (whole[0], *moved[1:]))[1] < 0.05


@pytest.mark.usefixtures("_in_float32")
def test_the_autoencoder_draws_its_noise_on_the_cpu_too():
    runs = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(1)
        vae = AutoencoderKL(VAEConfig(widths=(16,), blocks=1, groups=4, mid_attention=False, patch=4)).to(device)
        runs.append([p.loss for p in train_autoencoder(vae, Shapes(size=32), Fit(steps=5, lr=1e-3, batch_size=8, warmup=2))])
    assert runs[1] == pytest.approx(runs[0], rel=LOSSES)


def test_as_it_is_trained_in_bfloat16_the_losses_are_nearly_the_same():
    losses, _ = apart(trained("cpu", 5), trained("cuda", 5))
    assert 0 < losses < 0.03


def test_a_run_on_a_gpu_ends_with_the_same_bits_each_time(tmp_path):
    """Stopped and taken up again, too: where the kernels are deterministic, and these are."""

    def run(folder, take: int | None) -> list[Tensor]:
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.GroupNorm(2, 8), torch.nn.Conv2d(8, 3, 3)).cuda()

        def loss_at(step: int) -> tuple[Tensor, dict]:
            x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(step)).cuda()
            return model(x).square().mean(), {}

        list(islice(fit(model, loss_at, Fit(steps=6, lr=1e-2, warmup=1, save_every=2), folder), take))
        return [p.detach().cpu() for p in model.parameters()]

    whole = run(None, None)
    run(tmp_path, 3)
    assert all(torch.equal(a, b) for a, b in zip(whole, run(tmp_path, None), strict=True))

"""The training loop: resumes to the bit, stops at a bad loss, survives a damaged checkpoint, and learns."""

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from minildm.checkpoint import write_atomically
from minildm.clip import CLIP, ImageConfig, TextConfig, TextEncoder
from minildm.schedule import NoiseSchedule
from minildm.shapes import Shapes
from minildm.tokenizer import Tokenizer
from minildm.train import (
    Fit,
    Latents,
    cache_latents,
    fit,
    learning_rate,
    step_generator,
    train_autoencoder,
    train_clip,
    train_diffusion,
    watch,
)
from minildm.unet import UNet, UNetConfig
from minildm.vae import AutoencoderKL, VAEConfig

CFG = Fit(steps=12, lr=1e-2, warmup=3, ema=0.9, save_every=4)
TINY_VAE = VAEConfig(widths=(8, 16), blocks=1, groups=4, mid_attention=False, patch=2, scaling_factor=1.0)


def small_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Conv2d(4, 3, 3, padding=1))


def loss_of(model: nn.Module, bad_step: int | None = None):
    def loss_at(step: int):
        x = torch.randn(2, 3, 8, 8, generator=step_generator(0, step))
        loss = (model(x) - x).square().mean()
        return loss * (float("nan") if step == bad_step else 1.0), {"mse": loss}

    return loss_at


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("stop_after", [1, 4, 7, 11])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_run_that_was_stopped_ends_with_the_same_bits(tmp_path, stop_after, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    whole, halved = small_model().to(memory_format=layout), small_model().to(memory_format=layout)
    losses = [p.loss for p in fit(whole, loss_of(whole), CFG)]
    run = fit(halved, loss_of(halved), CFG, tmp_path)
    for _ in range(stop_after):
        next(run)
    del run
    again = small_model().to(memory_format=layout)
    seen = list(fit(again, loss_of(again), CFG, tmp_path))
    assert seen[0].step == stop_after // 4 * 4 + 1
    assert [p.loss for p in seen] == losses[seen[0].step - 1 :]
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(again), strict=True))


def test_a_finished_run_is_not_trained_again(tmp_path):
    model, again = small_model(), small_model()
    list(fit(model, loss_of(model), CFG, tmp_path))
    assert list(fit(again, loss_of(again), CFG, tmp_path)) == []
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(again), strict=True))


def test_two_checkpoints_are_kept_and_a_damaged_one_is_passed_over(tmp_path, capsys):
    model = small_model()
    list(fit(model, loss_of(model), CFG, tmp_path))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"step-00000{n:02}.{e}" for n in (8, 12) for e in ("json", "safetensors")]
    newest = tmp_path / "step-0000012.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    again = small_model()
    assert next(fit(again, loss_of(again), CFG, tmp_path)).step == 9
    assert "is damaged" in capsys.readouterr().out


def test_lying_bytes_are_passed_over_too(tmp_path, capsys):
    model = small_model()
    list(fit(model, loss_of(model), CFG, tmp_path))
    newest = tmp_path / "step-0000012.safetensors"
    newest.write_bytes(b"\xff" * newest.stat().st_size)
    (tmp_path / "step-0000008.json").write_text("{}")
    again = small_model()
    assert next(fit(again, loss_of(again), CFG, tmp_path)).step == 1
    assert capsys.readouterr().out.count("is damaged") == 2


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    model, other = small_model(), nn.Conv2d(3, 3, 1)
    list(fit(model, loss_of(model), CFG, tmp_path))
    with pytest.raises(ValueError, match=r"another model: .* tensors differ"):
        next(fit(other, loss_of(other), CFG, tmp_path))


def test_a_bad_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    model = small_model()
    with pytest.raises(FloatingPointError, match=r"loss is nan .* at step 7 of 12, with a learning rate of 0.005: lower it"):
        list(fit(model, loss_of(model, bad_step=6), CFG, tmp_path))
    assert json.loads((tmp_path / "step-0000004.json").read_text())["step"] == 4
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_bad_gradient_under_a_good_loss_stops_too(tmp_path):
    model = small_model()

    def loss_at(step):
        loss, parts = loss_of(model)(step)
        return (loss + (0 * loss).sqrt(), parts) if step == 7 else (loss, parts)  # the slope of a root at 0 is infinite

    with pytest.raises(FloatingPointError, match="its gradient nan at step 8"):
        list(fit(model, loss_at, CFG, tmp_path))
    assert sorted(p.name for p in tmp_path.glob("*.json")) == ["step-0000004.json"]
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_other_settings_do_not_take_a_run_up(tmp_path):
    model = small_model()
    list(fit(model, loss_of(model), CFG, tmp_path))
    with pytest.raises(ValueError, match="a run with another lr, seed"):
        next(fit(model, loss_of(model), replace(CFG, lr=1.0, seed=9), tmp_path))


def test_buffers_and_idle_parameters_are_taken_up_too(tmp_path):
    def model() -> nn.Module:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        model.register_parameter("idle", nn.Parameter(torch.ones(2)))
        return model

    whole, again = model(), model()
    whole.register_parameter("idle", nn.Parameter(torch.ones(2)))
    list(fit(whole, loss_of(whole), CFG, tmp_path))
    assert list(fit(again, loss_of(again), CFG, tmp_path)) == []
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))
    assert again[1].num_batches_tracked == 12


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_on_a_gpu_is_taken_up(tmp_path):
    model, again = small_model().cuda(), small_model().cuda()

    def on_gpu(model):
        return lambda step: ((model(torch.randn(2, 3, 8, 8, generator=step_generator(0, step)).cuda())).square().mean(), {})

    run = fit(model, on_gpu(model), CFG, tmp_path)
    for _ in range(5):
        next(run)
    assert next(fit(again, on_gpu(again), CFG, tmp_path)).step == 5


def test_writing_is_all_or_nothing(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    write_atomically(path, lambda beside: beside.write_text("old"))

    def fails(beside):
        beside.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fails)
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_the_learning_rate_rises_then_falls_to_zero():
    rates = [learning_rate(step, Fit(steps=100, lr=1.0, warmup=10)) for step in range(101)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[9] > 0.97
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0, abs=1e-12)
    line = [learning_rate(step, Fit(steps=100, lr=1.0, warmup=10, decay="linear")) for step in range(101)]
    assert line[:2] == pytest.approx([0.1, 0.2 * 0.99])
    assert line[20:] == pytest.approx([1 - step / 100 for step in range(20, 101)])


def test_the_average_is_what_remains():
    model, by_hand = small_model(), None
    run = fit(model, loss_of(model), CFG)
    by_hand = weights(model)
    for progress in run:
        decay = min(CFG.ema, progress.step / (9 + progress.step))
        by_hand = [decay * a + (1 - decay) * p for a, p in zip(by_hand, weights(model), strict=True)]
    for averaged, remaining in zip(by_hand, weights(model), strict=True):
        torch.testing.assert_close(averaged, remaining)
    assert not model.training


def test_step_generators_differ_by_seed_and_by_step():
    draws = {torch.rand(1, generator=step_generator(seed, step)).item() for seed in range(20) for step in range(20)}
    assert len(draws) == 400
    assert torch.rand(1, generator=step_generator(3, 5)) == torch.rand(1, generator=step_generator(3, 5))


def test_the_autoencoder_learns_and_watch_returns_what_a_stage_returns(capsys):
    vae = AutoencoderKL(TINY_VAE)
    seen = list(train_autoencoder(vae, Shapes(), Fit(steps=25, lr=3e-3, batch_size=8, warmup=5)))
    assert seen[-1].loss < 0.6 * seen[0].loss
    assert set(seen[0].parts) == {"recon", "kl"}
    latents = watch(cache_latents(vae, Shapes(), 40, batch_size=16), "encoding", quiet=True)
    assert latents.mean.shape == (40, 4, 8, 8)
    assert len(latents.captions) == 40
    picks = torch.arange(40)
    scaled = torch.cat([latents.sample(picks, step_generator(0, k)) for k in range(30)])
    assert scaled.std().item() == pytest.approx(1, abs=0.02)


class StubText(nn.Module):
    """Says of each row of ids what its first id is."""

    def forward(self, ids):
        return ids[:, :1, None].float().expand(-1, 2, 4), ids[:, :1].float().expand(-1, 4)


class StubUNet(nn.Module):
    """Keeps what it was asked, and answers with a number that can be trained."""

    def __init__(self, pooled_dim):
        super().__init__()
        self.cfg = SimpleNamespace(pooled_dim=pooled_dim)
        self.answer = nn.Parameter(torch.tensor(0.25))
        self.asked = []

    def forward(self, x, t, context, pooled=None):
        self.asked.append((x, t, context, pooled))
        return self.answer.expand(x.shape)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("dropout", [0.0, 1.0])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_the_diffusion_loss_is_the_error_against_the_target(prediction_type, dropout, gamma):
    schedule, cfg = NoiseSchedule.scaled_linear(), Fit(steps=1, lr=1e-3, batch_size=6, seed=4)
    latents = Latents(torch.randn(9, 4, 2, 2), torch.zeros(9, 4, 2, 2), [str(n) for n in range(9)], scaling_factor=0.5)
    ids, empty = torch.arange(10, 19)[:, None].expand(9, 3), torch.zeros(1, 3, dtype=torch.int64)
    unet = StubUNet(pooled_dim=4)
    step = next(
        train_diffusion(
            unet, StubText(), schedule, latents, ids, empty, cfg,
            prediction_type=prediction_type, dropout=dropout, min_snr_gamma=gamma,
        )
    )  # fmt: skip
    x, t, context, pooled = unet.asked[0]
    picks = torch.randint(9, (6,), generator=step_generator(4, 0))
    x0 = 0.5 * latents.mean[picks]
    noise = schedule.to_epsilon(x0, x, t, "sample")  # what must have been added
    torch.testing.assert_close(schedule.add_noise(x0, noise, t), x)
    assert abs(noise.std() - 1) < 0.3
    error = (0.25 - schedule.target(x0, noise, t, prediction_type)).square().mean(dim=(1, 2, 3))
    error = error * schedule.min_snr_weight(t, prediction_type, gamma) if gamma else error
    assert step.loss == pytest.approx(error.mean().item(), rel=1e-4)
    heard = torch.zeros(6) if dropout else 10.0 + picks
    assert torch.equal(context[:, 0, 0], heard)
    assert torch.equal(pooled[:, 0], heard)


def test_each_stage_goes_on_to_the_same_bits_from_its_middle(tmp_path):
    def stages(folder, take=None):
        torch.manual_seed(3)
        vae, shapes = AutoencoderKL(TINY_VAE), Shapes()
        tokenizer = Tokenizer.train(shapes.batch(range(50))[1], 300, context_length=64)
        ids = tokenizer(shapes.batch(range(50))[1])
        clip = CLIP(TextConfig.tiny(tokenizer.vocab_size, 64), ImageConfig.tiny(32))
        text = TextEncoder(clip.text.cfg)
        unet = UNet(UNetConfig(widths=(8, 8), depths=(0, 1), heads=(2, 2), blocks=1, context_dim=128, pooled_dim=128, groups=4))
        cfg = Fit(steps=6, lr=1e-3, batch_size=4, warmup=2, save_every=2)
        list(itertools.islice(train_autoencoder(vae, shapes, cfg, folder / "a"), take))
        list(itertools.islice(train_clip(clip, shapes, ids, cfg, folder / "b"), take))
        latents = watch(cache_latents(AutoencoderKL(TINY_VAE), shapes, 50), "", quiet=True)
        schedule = NoiseSchedule.scaled_linear().zero_terminal_snr()
        run = train_diffusion(unet, text, schedule, latents, ids, ids[:1], cfg, folder / "c")
        list(itertools.islice(run, take))
        return [*vae.parameters(), *clip.parameters(), *unet.parameters()]

    whole = stages(tmp_path / "whole")
    stages(tmp_path / "halved", take=3)
    again = stages(tmp_path / "halved")
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))

"""The training loop: resumes to the bit, stops at a bad loss, survives a damaged checkpoint, and learns."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from minildm.checkpoint import write_atomically
from minildm.shapes import Shapes
from minildm.train import Fit, cache_latents, fit, learning_rate, step_generator, train_autoencoder, watch
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
    with pytest.raises(FloatingPointError, match=r"nan at step 7 of 12: try a lower lr than 0.01.*last good checkpoint"):
        list(fit(model, loss_of(model, bad_step=6), CFG, tmp_path))
    assert json.loads((tmp_path / "step-0000004.json").read_text())["step"] == 4
    assert all(torch.isfinite(p).all() for p in model.parameters())


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


def test_the_average_is_what_remains():
    plain, averaged = small_model(), small_model()
    list(fit(plain, loss_of(plain), replace(CFG, ema=0)))
    list(fit(averaged, loss_of(averaged), CFG))
    assert not torch.equal(weights(plain)[0], weights(averaged)[0])
    assert not averaged.training


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

"""Two processes train as one does: the same losses and weights, whole or in pieces, and their checkpoints are anybody's."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from minildm.distributed import World, bare, join, leave, parallel, recompute, whole, without_exchange
from minildm.latents import Latents
from minildm.schedule import NoiseSchedule
from minildm.train import Fit, fit, step_generator, train_autoencoder, train_diffusion
from minildm.unet import UNet, UNetConfig
from minildm.vae import AutoencoderKL, VAEConfig

CFG = Fit(steps=6, lr=2e-3, batch_size=8, warmup=2, ema=0.9, save_every=3, seed=3)
SMALL = UNetConfig(widths=(8, 16), depths=(0, 1), heads=(2, 2), blocks=1, context_dim=8, pooled_dim=8, groups=4)
RUNS = {  # name: (how, accumulate)
    "ddp": ("ddp", 1),
    "fsdp": ("fsdp", 1),
    "ddp in parts": ("ddp", 2),
    "fsdp in parts": ("fsdp", 2),
}


class StubText(nn.Module):
    """A text encoder that needs no training: every id has a fixed vector."""

    def forward(self, ids):
        table = torch.randn(16, 8, generator=torch.Generator().manual_seed(5))
        return table[ids], table[ids[:, 0]]


def small_unet(seed: int) -> UNet:
    unet, g = UNet(SMALL), torch.Generator().manual_seed(seed)
    for p in unet.parameters():  # also those that begin at zero, or the first gradients would be zero
        p.data = torch.randn(p.shape, generator=g) * (0.1 if p.ndim > 1 else 0.02) + (0 if p.ndim > 1 else 0.5)
    return unet


def run(unet, cfg=CFG, folder=None, world=None, how="ddp", stop_after=None) -> list[float]:
    """Trains on 24 random latents; the losses."""
    g = torch.Generator().manual_seed(1)
    latents = Latents(torch.randn(24, 4, 8, 8, generator=g), torch.full((24, 4, 8, 8), 0.1), [str(n) for n in range(24)], 1.0)
    ids, empty = torch.randint(16, (24, 5), generator=g), torch.zeros(1, 5, dtype=torch.int64)
    schedule = NoiseSchedule.scaled_linear().zero_terminal_snr()
    steps = train_diffusion(unet, StubText(), schedule, latents, ids, empty, cfg, folder, world=world, how=how)
    losses = []
    for progress in steps:
        losses.append(progress.loss)
        if progress.step == stop_after:
            break
    return losses


def gradient(unet: UNet, world: World, how: str) -> dict[str, torch.Tensor]:
    """Of one step's loss, by name.  Adam would not notice if it were a sum and not a mean."""
    g = torch.Generator().manual_seed(2)
    batch = (torch.randn(8, 4, 8, 8, generator=g), torch.arange(8), *(torch.randn(s, generator=g) for s in ((8, 5, 8), (8, 8))))
    model = parallel(unet, world, how)  # to be kept until the gradient is there: DDP exchanges nothing once it is gone
    model(*map(world.share, batch)).square().mean().backward()
    return whole({name: p.grad.clone() for name, p in unet.named_parameters()})  # DDP's lie in one long tensor


def in_every_process(out: Path) -> None:
    """What `torchrun` runs: all RUNS; writes losses and weights, by process, into the folder."""
    world = join()
    losses, held = {}, {}
    for name, (how, accumulate) in RUNS.items():
        unet = small_unet(seed=world.rank)  # parallel must give all of them the weights of the first
        losses[name] = run(unet, replace(CFG, accumulate=accumulate), world=world, how=how)
        held[name] = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in unet.parameters())
        save_file({k: t.contiguous() for k, t in whole(unet.state_dict()).items()}, out / f"{name} {world.rank}.safetensors")
    for how in ("ddp", "fsdp"):
        save_file(gradient(small_unet(seed=world.rank), world, how), out / f"gradient {how} {world.rank}.safetensors")
        run(small_unet(seed=0), folder=out / f"stopped {how}", world=world, how=how, stop_after=4)
        if world.rank == 0 and how == "fsdp":
            shutil.copytree(out / "stopped fsdp", out / "left")  # one process goes on from here
        losses[f"resumed {how}"] = run(small_unet(seed=9), folder=out / f"stopped {how}", world=world, how=how)
    losses["begun alone"] = run(small_unet(seed=9), folder=out / "begun alone", world=world, how="fsdp")
    unlike = "silent"
    try:
        run(small_unet(seed=0), folder=out / ("nothing here" if world.rank else "left"), world=world)
    except ValueError as error:
        unlike = str(error)
    (out / f"{world.rank}.json").write_text(json.dumps({"losses": losses, "held": held, "unlike": unlike}))
    leave()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder in which two processes have left what they did."""
    out = tmp_path_factory.mktemp("two")
    run(small_unet(seed=0), folder=out / "begun alone", stop_after=4)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", __file__, str(out)]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning" not in done.stderr
    return out


@pytest.fixture(scope="module")
def alone():
    """Losses and weights of one process that does it all at once."""
    unet = small_unet(seed=0)
    return run(unet), unet.state_dict()


def report(folder: Path, rank: int) -> dict:
    return json.loads((folder / f"{rank}.json").read_text())


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one_does(two, alone, name):
    for rank in range(2):
        assert report(two, rank)["losses"][name] == pytest.approx(alone[0], abs=1e-5)
        weights = load_file(two / f"{name} {rank}.safetensors")
        torch.testing.assert_close(weights, dict(alone[1]), atol=1e-5, rtol=0)
    assert max(alone[0]) - min(alone[0]) > 0.05  # there is a curve to agree on
    assert (alone[1]["conv_in.weight"] - small_unet(seed=0).conv_in.weight).abs().max() > 1e-3


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_the_gradient_is_the_mean_over_processes(two, how):
    wanted = gradient(small_unet(seed=0), World(), how)
    for rank in range(2):
        torch.testing.assert_close(load_file(two / f"gradient {how} {rank}.safetensors"), wanted, atol=1e-5, rtol=1e-4)
    assert max(g.abs().max() for g in wanted.values()) > 0.1


def test_fsdp_holds_half_in_each_process(two):
    count = sum(p.numel() for p in small_unet(0).parameters())
    held = [report(two, rank)["held"] for rank in range(2)]
    assert [h["ddp"] for h in held] == [count, count]
    assert sum(h["fsdp"] for h in held) == count
    assert max(h["fsdp"] for h in held) < 0.52 * count


@pytest.mark.parametrize("name", ["resumed ddp", "resumed fsdp", "begun alone"])
def test_two_processes_go_on_where_they_stopped_and_where_one_did(two, alone, name):
    for rank in range(2):
        assert report(two, rank)["losses"][name] == pytest.approx(alone[0][3:], abs=1e-5)


def test_one_process_goes_on_where_two_stopped(two, alone):
    unet = small_unet(seed=9)
    assert run(unet, folder=two / "left") == pytest.approx(alone[0][3:], abs=1e-5)
    torch.testing.assert_close(dict(unet.state_dict()), dict(alone[1]), atol=1e-5, rtol=0)


def test_processes_that_see_different_folders_stop(two):
    for rank in range(2):
        assert "differs from process to process, 0 to 3" in report(two, rank)["unlike"]


def test_a_batch_in_parts_trains_as_a_whole_one(alone):
    for accumulate in (2, 4, 8):
        unet = small_unet(seed=0)
        assert run(unet, replace(CFG, accumulate=accumulate)) == pytest.approx(alone[0], abs=1e-5)
        torch.testing.assert_close(dict(unet.state_dict()), dict(alone[1]), atol=1e-5, rtol=0)


def test_the_number_of_parts_may_change_midway(tmp_path, alone):
    run(small_unet(seed=0), replace(CFG, accumulate=2), folder=tmp_path, stop_after=5)
    assert run(small_unet(seed=9), replace(CFG, accumulate=4), folder=tmp_path) == pytest.approx(alone[0][3:], abs=1e-5)


def test_a_checkpoint_is_as_it_was_before_there_were_parts(tmp_path):
    run(small_unet(seed=0), replace(CFG, accumulate=2), folder=tmp_path, stop_after=4)
    settings = json.loads((tmp_path / "step-0000003.json").read_text())["settings"]
    assert sorted(settings) == sorted(f.name for f in fields(Fit) if f.name != "accumulate")


def test_recomputed_blocks_train_to_the_same_bits_and_keep_less(alone):
    def kept(unet: UNet) -> int:
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) and t, lambda t: t
        ):
            unet(torch.randn(4, 4, 8, 8), torch.arange(4), torch.randn(4, 5, 8), torch.randn(4, 8))
        return sum(sizes.values())

    unet = recompute(small_unet(seed=0))
    assert run(unet) == alone[0]
    assert all(torch.equal(a, b) for a, b in zip(unet.state_dict().values(), alone[1].values(), strict=True))
    unet.train()
    assert kept(unet) < 0.7 * kept(small_unet(seed=0))


def test_shares_and_parts_cover_a_batch_in_order():
    batch = torch.arange(12)
    assert torch.equal(torch.cat([World(r, 3).share(batch) for r in range(3)]), batch)
    parts = [World(r, 2).part(k, 3).share(batch) for r in range(2) for k in range(3)]
    assert torch.equal(torch.cat(parts), batch)
    assert {len(part) for part in parts} == {2}


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match="a batch of 10 cannot be shared equally among 4; choose a multiple of 4"):
        World(1, 4).share(torch.zeros(10))
    with pytest.raises(ValueError, match="a batch of 8 cannot be shared equally among 3"):
        run(small_unet(seed=0), replace(CFG, accumulate=3))
    with pytest.raises(ValueError, match=r"rank is 2 of 2; expected 0 to 1"):
        World(2, 2)
    with pytest.raises(ValueError, match=r"how is 'zero'; expected \"ddp\" or \"fsdp\""):
        parallel(nn.Linear(2, 2), World(), how="zero")


def test_trainings_that_know_no_shares_say_so():
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="cannot cut a batch: it takes 1 process, 1 part, not 1 and 2"):
        next(fit(model, lambda step: (model.weight.sum(), {}), replace(CFG, accumulate=2)))
    vae = AutoencoderKL(VAEConfig(widths=(8, 16), blocks=1, groups=4, mid_attention=False, patch=2))
    with pytest.raises(ValueError, match="not 2 and 1"):
        next(fit(vae, lambda step: None, CFG, world=World(0, 2)))
    with pytest.raises(ValueError, match="cannot cut a batch"):
        next(train_autoencoder(vae, None, replace(CFG, accumulate=2)))


def test_alone_nothing_is_wrapped(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    world, model = join(), nn.Linear(2, 2)
    assert (world.rank, world.size) == (0, 1)
    assert parallel(model, world, "fsdp") is parallel(model, world) is bare(model) is model
    assert not torch.distributed.is_initialized()
    with without_exchange(model):
        assert world.mean(torch.tensor(2.5)) == 2.5
    world.agree(3, "a number")
    leave()


def test_half_an_environment_is_refused(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(
        ValueError, match="the environment has WORLD_SIZE, RANK of WORLD_SIZE, RANK, LOCAL_RANK; start with torch"
    ):
        join()


def test_latents_come_back_from_their_file(tmp_path):
    latents = Latents(torch.randn(5, 4, 8, 8), torch.rand(5, 4, 8, 8), [f'caption "{n}" ä' for n in range(5)], 1 / 3)
    latents.save(tmp_path / "deep" / "latents.safetensors")
    again = Latents.load(str(tmp_path / "deep" / "latents.safetensors"))
    assert (again.captions, again.scaling_factor) == (latents.captions, latents.scaling_factor)
    picks = torch.tensor([4, 0, 4])
    assert torch.equal(again.sample(picks, step_generator(0, 0)), latents.sample(picks, step_generator(0, 0)))


def test_latents_are_mapped_and_not_read(tmp_path):
    path = tmp_path / "latents.safetensors"
    Latents(torch.zeros(100, 4, 8, 8), torch.zeros(100, 4, 8, 8), [""] * 100, 1.0).save(path)
    latents = Latents.load(path)
    with open(path, "r+b") as file:  # what is written later is seen, so nothing has been read yet
        file.seek(-2 * 100 * 256 * 4, os.SEEK_END)
        file.write(torch.ones(100 * 256).numpy().tobytes())
    assert latents.mean.sum() == 100 * 256


def test_other_files_are_no_latents(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*; it comes from Latents.save"):
        Latents.load(tmp_path / "missing.safetensors")
    save_file({"mean": torch.zeros(2, 4, 8, 8)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors holds no latents"):
        Latents.load(tmp_path / "other.safetensors")
    Latents(torch.zeros(3, 4, 8, 8), torch.zeros(3, 4, 8, 8), ["two", "captions"], 1.0).save(tmp_path / "short.safetensors")
    with pytest.raises(ValueError, match=r"holds no latents \(2 captions, means \(3, 4, 8, 8\)"):
        Latents.load(tmp_path / "short.safetensors")
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "short.safetensors").read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"torn\.safetensors is damaged"):
        Latents.load(tmp_path / "torn.safetensors")


if __name__ == "__main__":
    in_every_process(Path(sys.argv[1]))

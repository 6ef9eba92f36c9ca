"""Two processes train as one does: the same losses and weights, whole or in pieces, and their checkpoints are anybody's."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from minildm.clip import CLIP, ImageConfig, TextConfig, contrastive_loss
from minildm.distributed import World, bare, join, leave, parallel, recompute, whole, without_exchange
from minildm.latents import Latents
from minildm.schedule import NoiseSchedule
from minildm.shapes import Shapes
from minildm.shards import Shards, write_shards
from minildm.train import Fit, cache_latents, fit, step_generator, train_autoencoder, train_clip, train_diffusion, watch
from minildm.unet import UNet, UNetConfig
from minildm.vae import AutoencoderKL, VAEConfig

CFG = Fit(steps=6, lr=2e-3, batch_size=8, warmup=2, ema=0.9, save_every=3, seed=3)
SMALL_VAE = VAEConfig(widths=(8, 16), blocks=1, groups=4, mid_attention=False, patch=2)
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


class Recorded:
    """A dataset that writes down what it is asked for."""

    def __init__(self, dataset):
        self.dataset, self.name, self.size, self.asked = dataset, dataset.name, dataset.size, []

    def __len__(self):
        return len(self.dataset)

    def batch(self, indices):
        self.asked.append([*indices])
        return self.dataset.batch(indices)


def small_clip(seed: int) -> CLIP:
    torch.manual_seed(seed)
    text = TextConfig(vocab_size=16, context_length=5, width=16, layers=1, heads=2, activation="gelu", end_id=15)
    return CLIP(text, ImageConfig(32, patch_size=16, width=16, layers=1, heads=2, activation="gelu", projection_dim=16))


def crowd(count: int) -> torch.Tensor:
    """Token ids of so many captions, (count, 5)."""
    return torch.randint(15, (count, 5), generator=torch.Generator().manual_seed(4)).index_fill_(1, torch.tensor([4]), 15)


def first_stages(shards: Path, world: World | None = None) -> tuple[dict[str, list], dict[str, list], dict[str, torch.Tensor]]:
    """Trains an autoencoder and a CLIP on tar shards, and encodes 34 of the pictures.

    The losses; the numbers of the pictures that this process has read; all weights and latents.
    """
    losses, asked, rank, cfg = {}, {}, world.rank if world else 0, replace(CFG, warmup=1, lr=1e-3)
    torch.manual_seed(1 + rank)
    vae, clip, dataset = AutoencoderKL(SMALL_VAE), small_clip(seed=1 + rank), Recorded(Shards(shards, size=32))
    losses["autoencoder"] = [p.loss for p in train_autoencoder(vae, dataset, cfg, world=world)]
    asked["autoencoder"], dataset.asked = dataset.asked, []
    latents = watch(cache_latents(vae, dataset, 34, batch_size=8, world=world), "", quiet=True)
    asked["encoding"], dataset.asked = dataset.asked, []
    losses["clip"] = [p.loss for p in train_clip(clip, dataset, crowd(len(dataset)), cfg, world=world)]
    asked["clip"] = dataset.asked
    asked["captions"] = latents.captions
    held = {f"vae.{k}": t for k, t in vae.state_dict().items()} | {f"clip.{k}": t for k, t in clip.state_dict().items()}
    return losses, asked, {k: t.clone().contiguous() for k, t in held.items()} | {"mean": latents.mean, "std": latents.std}


def learned(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All but the keys' biases: they shift all scores of a query alike, which softmax forgets.  Adam follows rounding there."""
    return {name: t for name, t in tensors.items() if not name.endswith(".to_k.bias")}


def crowd_gradient(world: World) -> dict[str, torch.Tensor]:
    """Of the contrastive loss of 8 pictures and captions, by name.  Adam would not notice if it were twice as long."""
    clip, x = small_clip(seed=1), torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(6))
    model = parallel(clip, world)
    image, text = map(world.gather, model(world.share(x), world.share(crowd(8))))
    contrastive_loss(image, text, clip.logit_scale).backward()
    return {name: p.grad.clone() for name, p in clip.named_parameters()}


def uneven(world: World) -> list:
    """What the processes have gathered, of which each had another number of rows."""
    own = torch.arange(3 * (world.rank + 1)).view(-1, 3) + 100 * world.rank
    return [world.gather(own).tolist(), world.gather_texts([f"ä\n{world.rank}"] * (1 - world.rank) + ['"'])]


def in_every_process(out: Path) -> None:
    """What `torchrun` runs: all RUNS; writes losses and weights, by process, into the folder."""
    world = join()
    losses, held = {}, {}
    stages, asked, made = first_stages(out / "shards", world)
    losses |= stages
    save_file(made, out / f"first stages {world.rank}.safetensors")
    save_file(crowd_gradient(world), out / f"gradient clip {world.rank}.safetensors")
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
    (out / f"{world.rank}.json").write_text(
        json.dumps({"losses": losses, "held": held, "unlike": unlike, "asked": asked, "uneven": uneven(world)})
    )
    leave()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder in which two processes have left what they did."""
    out = tmp_path_factory.mktemp("two")
    run(small_unet(seed=0), folder=out / "begun alone", stop_after=4)
    write_shards(Shapes(size=32), out / "shards", 500, per_shard=200)
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


@pytest.fixture(scope="module")
def first_stages_alone(two):
    return first_stages(two / "shards")


@pytest.mark.parametrize("stage", ["autoencoder", "clip"])
def test_two_processes_train_the_first_stages_as_one_does(two, first_stages_alone, stage):
    losses, _, made = first_stages_alone
    wanted = {name: t for name, t in made.items() if name.startswith({"autoencoder": "vae.", "clip": "clip."}[stage])}
    for rank in range(2):
        assert report(two, rank)["losses"][stage] == pytest.approx(losses[stage], abs=1e-5)
        found = load_file(two / f"first stages {rank}.safetensors")
        torch.testing.assert_close(learned({name: found[name] for name in wanted}), learned(wanted), atol=1e-5, rtol=0)
    assert max(losses[stage]) - min(losses[stage]) > 0.01


@pytest.mark.parametrize("stage", ["autoencoder", "clip"])
def test_processes_read_their_shares_of_a_batch_and_no_picture_twice(two, first_stages_alone, stage):
    whole_batches = first_stages_alone[1][stage]
    shares = [report(two, rank)["asked"][stage] for rank in range(2)]
    assert [first + second for first, second in zip(*shares, strict=True)] == whole_batches
    assert [len(batch) for share in shares for batch in share] == [CFG.batch_size // 2] * 2 * CFG.steps
    assert all(len({*batch}) == CFG.batch_size for batch in whole_batches)
    assert len({tuple(batch) for batch in whole_batches}) == CFG.steps  # and another batch each step


def test_each_picture_is_encoded_by_one_process_and_had_by_all(two, first_stages_alone):
    _, asked, made = first_stages_alone
    shares = [report(two, rank)["asked"] for rank in range(2)]
    encoded = [*shares[0]["encoding"], *shares[1]["encoding"][:-1]]  # nothing was left for the second at the end
    assert sorted(chain.from_iterable(encoded)) == [*range(34)]
    for rank in range(2):
        found = load_file(two / f"first stages {rank}.safetensors")
        assert shares[rank]["captions"] == asked["captions"]
        for name in ("mean", "std"):
            torch.testing.assert_close(found[name], made[name], atol=1e-4, rtol=0)


def test_the_gradient_of_a_crowd_in_two_processes_is_that_of_one(two):
    wanted = crowd_gradient(World())
    for rank in range(2):
        torch.testing.assert_close(load_file(two / f"gradient clip {rank}.safetensors"), wanted, atol=1e-6, rtol=1e-4)
    assert wanted["logit_scale"].abs() > 1e-3
    keys, queries = (wanted[f"image.blocks.0.attn.to_{which}.bias"].abs().max() for which in "kq")
    assert keys < 1e-3 * queries  # why `learned` leaves them out
    assert wanted["image.projection.weight"].abs().max() > 1e-3


def test_rows_and_texts_of_any_number_are_gathered_in_order(two):
    for rank in range(2):
        rows, texts = report(two, rank)["uneven"]
        assert rows == [[0, 1, 2], [100, 101, 102], [103, 104, 105]]
        assert texts == ["ä\n0", '"', '"']
    assert World().gather_texts(["alone"]) == ["alone"]


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
    vae = AutoencoderKL(SMALL_VAE)
    with pytest.raises(ValueError, match="not 2 and 1"):
        next(fit(vae, lambda step: None, CFG, world=World(0, 2)))
    with pytest.raises(ValueError, match="cannot cut a batch: it takes 1 process, 1 part, not 1 and 2"):
        next(train_clip(small_clip(0), None, None, replace(CFG, accumulate=2)))
    with pytest.raises(ValueError, match="it takes 3 processes, 1 part, not 3 and 2"):
        next(train_clip(small_clip(0), None, None, replace(CFG, accumulate=2), world=World(0, 3)))


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

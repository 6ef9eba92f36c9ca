"""Recipes are values, and say once for all when captions are too long."""

from dataclasses import replace

import pytest
import torch

from minildm.clip import TextConfig, TextEncoder
from minildm.distributed import World
from minildm.recipes import Crowded, Recipe, _tokenise, train_parts
from minildm.schedule import NoiseSchedule
from minildm.shapes import Shapes
from minildm.tokenizer import Tokenizer
from minildm.train import Fit, Latents, train_diffusion, watch
from minildm.unet import UNet


def test_a_recipe_knows_its_size():
    assert Recipe.small(size=32) != Recipe.small(size=64)
    for size, latents in ((32, 8), (64, 8), (48, 12), (96, 12)):
        assert size // Recipe.small(size=size).vae.downsampling == latents
    for size in (0, -8, 36, 72):
        with pytest.raises(ValueError, match="multiple of 8"):
            Recipe.small(size=size)


def test_long_captions_are_cut_with_one_warning():
    tokenizer = Tokenizer.train(["a cat"], 300, context_length=8)
    with pytest.warns(UserWarning, match=r"2 of 3 captions are longer than 8 tokens and were cut; the first: .*phone") as seen:
        ids = _tokenise(tokenizer, ["a cat", "a xylophone", "another zebra"])
    assert len(seen) == 1
    assert ids.shape == (3, 8)


def test_training_times_crowd_where_they_are_told_to():
    schedule = NoiseSchedule.cosine().zero_terminal_snr()
    drawn = Crowded(schedule.alpha_bar, 0.69).draw(20_000, torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.int64
    assert 0 <= drawn.min() < 60
    assert 940 < drawn.max() < schedule.T
    logit = torch.logit((drawn + 0.5) / schedule.T)
    torch.testing.assert_close(torch.stack([logit.mean(), logit.std()]), torch.tensor([0.69, 1.0]), atol=0.03, rtol=0)


@pytest.mark.parametrize("trains", [True, False])
def test_the_text_encoder_learns_along_if_it_is_told_to(trains):
    brief = Fit(steps=2, lr=1e-3, batch_size=4)
    recipe = replace(
        Recipe.small(pictures=16), first=brief, words=brief, second=replace(brief, muon=0.02), train_text=trains
    )  # fmt: skip
    stages = []

    def run(stage, name):
        stages.append(name)
        return watch(stage, name, quiet=True)

    trained = train_parts(recipe, Shapes(size=32), run)
    assert ("text encoder" in stages) is not trains
    assert (trained.clip is None) is trains
    torch.manual_seed(recipe.words.seed)
    fresh = TextEncoder(trained.text.cfg).state_dict()
    moved = {name for name, p in trained.text.state_dict().items() if not torch.equal(p, fresh[name])}
    assert moved >= {"token_embedding.weight", "final_norm.weight"}  # by CLIP, or by the U-Net
    assert torch.equal(trained.schedule.alpha_bar, NoiseSchedule.cosine().zero_terminal_snr().alpha_bar)
    assert type(trained.schedule) is NoiseSchedule  # the crowd is the training's affair


def test_two_processes_cannot_train_the_text_along():
    recipe = replace(Recipe.small(), train_text=True)
    with pytest.raises(ValueError, match="without torchrun"):
        train_parts(recipe, Shapes(size=32), lambda *stage: pytest.fail("nothing may be begun"), world=World(0, 2))
    with pytest.raises(ValueError, match="expected one of scaled_linear, cosine"):
        replace(recipe, schedule="cosin")
    unet, text = UNet(recipe.unet), TextEncoder(TextConfig.tiny(64, 8))
    latents = Latents(torch.zeros(2, 4, 8, 8), torch.ones(2, 4, 8, 8), ["a", "b"], 1.0)
    ids = torch.full((2, 8), 63)
    with pytest.raises(ValueError, match="by 1 process, not by 2"):
        next(
            train_diffusion(
                unet, text, NoiseSchedule.cosine(), latents, ids, ids[:1], recipe.second, world=World(0, 2), train_text=True
            )
        )

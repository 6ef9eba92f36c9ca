"""Recipes are values, and say once for all when captions are too long."""

import pytest

from minildm.recipes import Recipe, _tokenise
from minildm.tokenizer import Tokenizer


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

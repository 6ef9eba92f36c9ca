"""Personalisation: a few pictures of one thing, and afterwards a word that means it.

DreamBooth changes weights: all of the U-Net, or an adapter.  So as not to forget what the thing is one of, it goes on learning
from the model's own pictures of the class.  Textual inversion changes no weight at all: it looks for the one vector, in the
table of the text encoder, that makes the frozen model draw the thing.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from minildm.clip import TextEncoder
from minildm.schedule import NoiseSchedule
from minildm.tokenizer import Tokenizer
from minildm.train import Fit, Latents, Progress, diffusion_loss, fit, step_generator
from minildm.unet import UNet


def train_dreambooth(
    unet: UNet,
    text: TextEncoder,
    schedule: NoiseSchedule,
    latents: Latents,
    ids: Tensor,
    prior: Latents,
    prior_ids: Tensor,
    cfg: Fit,
    folder: Path | None = None,
    *,
    prior_weight: float = 1.0,
    prediction_type: str = "v_prediction",
) -> Iterator[Progress]:
    """Teaches a U-Net what a rare word means, from a few pictures, without unlearning the rest.  Ruiz et al. 2023, eq. 2.

    Args:
        unet: changed in place; of its weights those that want a gradient are trained: all, or an adapter's.
        text: only listened to, and frozen.
        schedule: how much noise there is at each timestep.
        latents: the few pictures, encoded.
        ids: their captions, with the rare word, tokenised, (N, L).
        prior: pictures that the model itself drew before, of the class or of anything it is to remember.
        prior_ids: the captions it drew them for, (M, L).
        cfg: how long and how boldly; a step sees `batch_size` pictures of either kind.
        folder: for checkpoints, or None.
        prior_weight: of the second kind's loss, 0 or more; 0 for none of it.
        prediction_type: as in `diffusion_loss`.

    Raises:
        ValueError: not one caption a picture, or prior_weight is negative.
    """
    _check(latents, ids, "pictures")
    _check(prior, prior_ids, "pictures of the prior")
    if prior_weight < 0:
        raise ValueError(f"prior_weight is {prior_weight}; expected 0 or more")
    text.requires_grad_(False).eval()

    def loss_at(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        generator = step_generator(cfg.seed, step)
        own = _loss(unet, text, schedule, latents, ids, cfg.batch_size, prediction_type, generator)
        if not prior_weight:
            return own, {"own": own}
        kept = _loss(unet, text, schedule, prior, prior_ids, cfg.batch_size, prediction_type, generator)
        return own + prior_weight * kept, {"own": own, "prior": kept}

    yield from fit(unet, loss_at, cfg, folder)


class NewWord(nn.Module):
    """A table of token vectors in which one row is a weight of its own, the only one that learns.

    Args:
        table: the text encoder's; it is frozen.
        token: the row, in [0, rows of the table).
    """

    def __init__(self, table: nn.Embedding, token: int):
        super().__init__()
        if not 0 <= token < table.num_embeddings:
            raise ValueError(f"token is {token}; the table has {table.num_embeddings} rows: add the word first, by add_token")
        self.table, self.token = table.requires_grad_(False), token
        self.vector = nn.Parameter(table.weight[token].detach().clone())

    def forward(self, ids: Tensor) -> Tensor:
        """(B, L) to (B, L, D)."""
        return torch.where((ids == self.token)[..., None], self.vector, self.table(ids))


def train_textual_inversion(
    unet: UNet,
    text: TextEncoder,
    schedule: NoiseSchedule,
    latents: Latents,
    ids: Tensor,
    token: int,
    cfg: Fit,
    folder: Path | None = None,
    *,
    prediction_type: str = "v_prediction",
) -> Iterator[Progress]:
    """Looks for the vector of one word that makes a frozen model draw these pictures.  Gal et al. 2023, equation 2.

    Args:
        unet: only listened to, and frozen.
        text: one row of its table is changed, all else is frozen.  While this runs, and only then, the table is a `NewWord`.
        schedule: how much noise there is at each timestep.
        latents: the few pictures, encoded.
        ids: their captions, with the word, tokenised, (N, L).
        token: the id of the word, from `add_token`.
        cfg: how long and how boldly; vectors bear a far higher learning rate than weights.
        folder: for checkpoints, or None.
        prediction_type: as in `diffusion_loss`.

    Raises:
        ValueError: not one caption a picture, the token is in no caption, or outside the table.
    """
    _check(latents, ids, "pictures")
    if not (ids == token).any():
        raise ValueError(f"no caption has the token {token} in it; tokenise them with what add_token returned")
    unet.requires_grad_(False).eval()
    text.requires_grad_(False).eval()
    word = NewWord(text.token_embedding, token)

    def loss_at(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        generator = step_generator(cfg.seed, step)
        return _loss(unet, text, schedule, latents, ids, cfg.batch_size, prediction_type, generator), {}

    text.token_embedding = word
    try:
        yield from fit(word, loss_at, cfg, folder)
    finally:
        text.token_embedding = word.table
        word.table.weight.data[token] = word.vector.data


class ExtendedTokenizer(Tokenizer):
    """A tokenizer that knows one word more, whole: its id is the first after all others."""

    def __init__(self, base: Tokenizer, word: str):
        vars(self).update(vars(base))
        self.base, self.word, self.word_id = base, word, base.vocab_size
        self.tokens, self.vocab = [*base.tokens, word], {**base.vocab, word: self.word_id}
        self.vocab_size = base.vocab_size + 1
        self._bytes = [*base._bytes, f"{word} ".encode() if base.end_of_word else f" {word}".encode()]
        self._split = re.compile(rf" ?(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE if base.lowercase else 0)

    def encode(self, text: str) -> list[int]:
        """Turn one text into ids, as many as it takes, without start, end and padding."""
        first, *others = self._split.split(text)
        ids = self.base.encode(first)
        for other in others:
            ids += [self.word_id, *self.base.encode(other)]
        return ids

    def save(self, folder: str | Path) -> None:
        """There is no file for an added word.

        Raises:
            NotImplementedError: always; says what to keep instead.
        """
        raise NotImplementedError(f"an added word is not saved: save the tokenizer before it, and the vector of {self.word!r}")


def add_token(tokenizer: Tokenizer, text: TextEncoder, word: str, like: str) -> ExtendedTokenizer:
    """Gives a text encoder one word more, which begins by meaning what another means.

    Args:
        tokenizer: stays as it is.
        text: its table gets one row more, in place; all other rows stay.
        word: without white space.
        like: a word, or some; the new vector is the mean of its tokens' vectors.  The class of the thing is usual.

    Returns:
        A tokenizer that knows the word; its id is `vocab_size - 1`.

    Raises:
        ValueError: the word is empty, has white space in it or was added before; `like` is empty; or the tokenizer and the
            text encoder are of two models.
    """
    if not word or re.search(r"\s", word) or word in tokenizer.vocab or not (alike := tokenizer.encode(f" {like}".rstrip())):
        raise ValueError(f"the word is {word!r} and like {like!r}; expected a new word without white space, and a known one")
    if tokenizer.vocab_size != text.cfg.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the text encoder {text.cfg.vocab_size}: they are of two models"
        )
    old = text.token_embedding.weight
    table = nn.Embedding(len(old) + 1, old.shape[1]).to(old)
    with torch.no_grad():
        table.weight.copy_(torch.cat([old, old[alike].mean(dim=0, keepdim=True)]))
    text.token_embedding = table
    # where the end was found as the largest id, the new one would be taken for it
    text.cfg = replace(text.cfg, vocab_size=len(table.weight), end_id=tokenizer.end_id)
    return ExtendedTokenizer(tokenizer, word)


def _loss(
    unet: UNet,
    text: TextEncoder,
    schedule: NoiseSchedule,
    latents: Latents,
    ids: Tensor,
    count: int,
    prediction_type: str,
    generator: torch.Generator,
) -> Tensor:
    """The mean loss of some of these pictures at random timesteps, a scalar."""
    picks = torch.randint(len(ids), (count,), generator=generator)
    x0 = latents.sample(picks, generator)
    noise = torch.randn(x0.shape, generator=generator)
    t = schedule.draw(count, generator)
    hidden, pooled = text(ids[picks].to(next(unet.parameters()).device))
    condition = {"context": hidden} | ({"pooled": pooled} if unet.cfg.pooled_dim else {})
    return diffusion_loss(unet, schedule, x0, noise, t, condition, prediction_type).mean()


def _check(latents: Latents, ids: Tensor, what: str) -> None:
    if len(ids) != len(latents.mean) or len(ids) == 0:
        raise ValueError(f"{len(latents.mean)} {what} and {len(ids)} captions; expected one for each, and at least one")

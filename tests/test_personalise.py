"""Personalisation: each way learns, changes only what it may, and can be taken up again."""

import pytest
import reference
import torch
from torch import Tensor, nn

from minildm.clip import TextConfig, TextEncoder
from minildm.lora import inject
from minildm.personalise import NewWord, add_token, train_dreambooth, train_textual_inversion
from minildm.schedule import NoiseSchedule
from minildm.tokenizer import Tokenizer
from minildm.train import Fit, Latents
from minildm.unet import UNet, UNetConfig

CAPTIONS = ["a red cube", "a blue cube on a red cube", "one cube, blue"]
TOKENS = Tokenizer.train(CAPTIONS, 270, context_length=16, lowercase=True)
SCHEDULE = NoiseSchedule.scaled_linear()
CFG = Fit(steps=30, lr=3e-3, batch_size=4, warmup=1, ema=0.0, weight_decay=0.0, save_every=10)


def parts(pooled: bool = True) -> tuple[UNet, TextEncoder]:
    torch.manual_seed(3)
    text = TextEncoder(TextConfig(TOKENS.vocab_size, 16, width=16, layers=1, heads=2, activation="gelu", end_id=TOKENS.end_id))
    cfg = UNetConfig(widths=(8, 16), depths=(0, 1), heads=(2, 2), blocks=1, context_dim=16, groups=4,
                     pooled_dim=16 if pooled else None)  # fmt: skip
    return reference.randomise(UNet(cfg), seed=4), text.eval()


def encoded(count: int, level: float) -> Latents:
    shape = (count, 4, 4, 4)
    return Latents(torch.full(shape, level), torch.full(shape, 0.1), ["a cube"] * count, 1.0)


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("pooled", [True, False])
def test_dreambooth_learns_and_the_text_encoder_stays(pooled):
    unet, text = parts(pooled)
    before, words = bits(unet), bits(text)
    ids, kept = TOKENS(["a zwx cube"] * 3), TOKENS(["a cube"] * 5)
    run = train_dreambooth(unet, text, SCHEDULE, encoded(3, 1.5), ids, encoded(5, -1.0), kept, CFG)
    seen = list(run)
    assert {*seen[0].parts} == {"own", "prior"}
    for name in ("own", "prior"):
        losses = [p.parts[name] for p in seen]
        assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert abs(seen[0].loss - sum(seen[0].parts.values())) < 1e-5
    assert changed(unet, before)
    assert not changed(text, words)


def test_dreambooth_trains_an_adapter_alone():
    unet, text = parts()
    inject(unet, 2, 2, ("to_q", "to_v"))
    before, ids = bits(unet), TOKENS(["a zwx cube"] * 3)
    list(train_dreambooth(unet, text, SCHEDULE, encoded(3, 1.0), ids, encoded(3, 0.0), TOKENS(["a cube"] * 3), CFG))
    assert changed(unet, before) == {name for name in before if ".down." in name or ".up." in name}


def test_without_its_weight_the_prior_is_not_looked_at():
    results = []
    for level in (0.0, 9.0):
        unet, text = parts()
        ids, kept = TOKENS(["a zwx cube"] * 3), TOKENS(["a cube"] * 3)
        steps = Fit(steps=3, lr=1e-3, batch_size=2)
        run = train_dreambooth(
            unet, text, SCHEDULE, encoded(3, 1.0), ids, encoded(3, level), kept, steps, prior_weight=0.0
        )  # fmt: skip
        assert {*next(run).parts} == {"own"}
        list(run)
        results.append(bits(unet))
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())


def test_textual_inversion_changes_one_row():
    unet, text = parts()
    tokenizer = add_token(TOKENS, text, "zwx", like="cube")
    ids, token = tokenizer(["a zwx", "one zwx"]), tokenizer.vocab_size - 1
    before, words = bits(unet), bits(text)
    cfg = Fit(steps=60, lr=0.1, batch_size=8, warmup=1, ema=0.0, weight_decay=0.5)  # decay must not reach the other rows
    losses = [p.loss for p in train_textual_inversion(unet, text, SCHEDULE, encoded(2, 1.0), ids, token, cfg)]
    assert sum(losses[-10:]) < 0.97 * sum(losses[:10])
    assert not changed(unet, before)
    assert changed(text, words) == {"token_embedding.weight"}
    rows = (text.token_embedding.weight != words["token_embedding.weight"]).any(dim=1)
    assert rows.nonzero().flatten().tolist() == [token]
    assert isinstance(text.token_embedding, nn.Embedding)
    assert not any(p.requires_grad for p in [*text.parameters(), *unet.parameters()])


def test_a_search_that_is_broken_off_leaves_a_whole_text_encoder():
    unet, text = parts()
    tokenizer = add_token(TOKENS, text, "zwx", like="cube")
    before = bits(text)
    ids = tokenizer(["a zwx"] * 2)
    run = train_textual_inversion(unet, text, SCHEDULE, encoded(2, 1.0), ids, tokenizer.vocab_size - 1, CFG)
    next(run)
    assert isinstance(text.token_embedding, NewWord)
    run.close()
    assert isinstance(text.token_embedding, nn.Embedding)
    assert changed(text, before) == {"token_embedding.weight"}


@pytest.mark.parametrize("way", ["dreambooth", "inversion"])
def test_a_run_that_was_stopped_ends_with_the_same_bits(tmp_path, way):
    def start(folder):
        unet, text = parts()
        if way == "dreambooth":
            inject(unet, 2, 2, ("to_q",), generator=torch.Generator().manual_seed(1))
            args = TOKENS(["a zwx cube"] * 3), encoded(3, 0.0), TOKENS(["a cube"] * 3), CFG, folder
            return train_dreambooth(unet, text, SCHEDULE, encoded(3, 1.0), *args), unet
        tokenizer = add_token(TOKENS, text, "zwx", like="cube")
        args = tokenizer(["a zwx"] * 3), tokenizer.vocab_size - 1, CFG, folder
        return train_textual_inversion(unet, text, SCHEDULE, encoded(3, 1.0), *args), text

    whole, model = start(None)
    list(whole)
    stopped, _ = start(tmp_path)
    for _ in range(14):
        next(stopped)
    stopped.close()
    again, model_again = start(tmp_path)
    assert next(again).step == 11
    list(again)
    assert not changed(model_again, bits(model))


@pytest.mark.parametrize("end_of_word", ["", "</w>"])
def test_a_word_is_added_whole_and_the_rest_stays(end_of_word):
    base = TOKENS
    if end_of_word:
        base = Tokenizer(merges=[("r", "e"), ("re", "d</w>")], end_of_word="</w>", lowercase=True, context_length=16)
    text = TextEncoder(TextConfig(base.vocab_size, 16, width=8, layers=1, heads=1, end_id=None)).eval()
    sentences = ["a red cube, on red", "red"]
    before = text(base(sentences))
    tokenizer = add_token(base, text, "zwx", like="red")
    token = tokenizer.vocab_size - 1
    assert token == base.vocab_size == text.cfg.vocab_size - 1
    assert all(torch.equal(a, b) for a, b in zip(before, text(tokenizer(sentences)), strict=True))
    with_word, with_red = tokenizer("a ZWX cube, on zwx"), base("a red cube, on red")
    red = base.encode("a red")[-1]
    assert torch.equal(torch.where(with_word == token, red, with_word), with_red)
    assert (with_word == token).sum() == 2
    assert torch.equal(text(with_word)[1], text(with_red)[1])  # it means red so far, and the text still ends where it ends
    assert token not in tokenizer.encode("zwxy azwx")
    assert tokenizer.pieces("a zwx")[-1].strip() == "zwx"
    assert tokenizer.decode(tokenizer.encode("a zwx")) == "a zwx"
    both = add_token(tokenizer, text, "<qq>", like="zwx")
    assert both.encode("a <qq> zwx")[-2:] == [token + 1, token]
    with pytest.raises(NotImplementedError, match=r"save the tokenizer before it, and the vector of 'zwx'"):
        tokenizer.save("nowhere")


def test_bad_input():
    unet, text = parts()
    ids, one = TOKENS(["a cube"] * 2), encoded(2, 0.0)
    with pytest.raises(ValueError, match=r"3 pictures and 2 captions"):
        next(train_dreambooth(unet, text, SCHEDULE, encoded(3, 0.0), ids, one, ids, CFG))
    with pytest.raises(ValueError, match=r"0 pictures of the prior and 0 captions"):
        next(train_dreambooth(unet, text, SCHEDULE, one, ids, encoded(0, 0.0), ids[:0], CFG))
    with pytest.raises(ValueError, match=r"prior_weight is -1"):
        next(train_dreambooth(unet, text, SCHEDULE, one, ids, one, ids, CFG, prior_weight=-1))
    with pytest.raises(ValueError, match=r"no caption has the token 999 in it"):
        next(train_textual_inversion(unet, text, SCHEDULE, one, ids, 999, CFG))
    with pytest.raises(ValueError, match=r"the table has \d+ rows: add the word first"):
        NewWord(text.token_embedding, TOKENS.vocab_size)
    for word, like in (("", "cube"), ("two words", "cube"), ("zwx", "")):
        with pytest.raises(ValueError, match="expected a new word without white space"):
            add_token(TOKENS, text, word, like)
    tokenizer = add_token(TOKENS, text, "zwx", like="cube")
    with pytest.raises(ValueError, match="expected a new word"):
        add_token(tokenizer, text, "zwx", like="cube")
    with pytest.raises(ValueError, match="they are of two models"):
        add_token(TOKENS, text, "qq", like="cube")

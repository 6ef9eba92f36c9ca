"""The tokenizer: lossless on any text, the same vocabulary from the same corpus, CLIP's ids from CLIP's vocabulary."""

import gzip
import importlib.util
import json
import random
import sys
import unicodedata
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Reference
from transformers import AutoTokenizer, CLIPTokenizer, PreTrainedTokenizerFast

from minildm.bpe import END, OUR_WORDS, SYMBOL_OF, cut, glue, learn_merges
from minildm.tokenizer import Tokenizer

CLIP_FILE = Path(importlib.util.find_spec("open_clip").origin).with_name("bpe_simple_vocab_16e6.txt.gz")

CORPUS = [
    f"{article} {size} {color} {shape} {where} the {other} one, no. {number}"
    for article in ("a", "the", "One")
    for size in ("large", "small")
    for color in ("red", "grün", "bleu")
    for shape in ("circle", "star", "naïve café")
    for where, other, number in (("above", "left", 7), ("below", "lower", 1024))
]

EMOJI = ["😀", "👍🏽", "🧑‍🚀", "👩‍👩‍👧", "🏳️‍🌈", "🇫🇷", "1️⃣", "❤️", "☃", "©"]
SPACES = [" ", "  ", "\t", "\n", "\r\n", "\v", "\f", "\x85", "\xa0", "\u1680", "\u2003", "\u2028", "\u2029", "\u202f", "\u3000"]
CONTROLS = [
    *map(chr, range(0x20)),
    "\x7f",
    "\x80",
    "\x9f",
    "\u200b",
    "\u200d",
    "\u200e",
    "\u2060",
    "\ufeff",
    "\ufffd",
    "\U000e0020",
]
ENTITIES = ["&amp;", "&lt;b&gt;", "&#39;", "&quot;", "&amp;amp;", "&#x1F600;", "&nbsp;", "&eacute;", "<br/>", "</w>"]
ENGLISH = [
    "don't",
    "I'LL",
    "we've",
    "they're",
    "it's",
    "I'm",
    "he'd",
    "rock'n'roll",
    "''s",
    "'",
    "\u2019s",
    "o'",
    "'S",
    "'Ve",
    "''t're",
]
CASES = ["ΑΣ", "ΣΑΣ", "İstanbul", "ǅ", "ẞ", "Straße", "ﬁ", "Ω", "Å", "가나", "½", "Ⅻ", "٣", "ªº", "ſ", "K"]  # noqa: RUF001
COMBINED = ["e\u0301", "A\u030a", "q\u0307\u0323", "\u1100\u1161", "\u0915\u093c", "\u0301", "a\u0301\u0328\u0301", ">\u0338"]
SPECIAL = [
    "<|startoftext|>",
    "<|endoftext|>",
    "<|ENDOFTEXT|>",
    "<|StartOfText|>",
    "<|endoftext",
    "|>",
    "<|",
    "endoftext|>",
    "!",
]
WORDS = ["astronaut", "Photograph", "4k", "8K", "UNREAL", "e.g.", "(hyper-realistic:1.3)", "2024-11-23", "C++", "...", "?!"]
LISTS = [EMOJI, SPACES, CONTROLS, ENTITIES, ENGLISH, CASES, COMBINED, SPECIAL, WORDS]


def unlike_characters() -> set[str]:
    """Characters that one of four Unicode databases does not have yet: Python's, and the reference's three.

    The reference (tokenizers 0.23) splits by Oniguruma's, lowers by Rust's and composes by that of an old crate, which
    knows nothing newer than Unicode 9; Python 3.11 has Unicode 14.  None of this touches a character of Unicode 3.2.
    """
    characters = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    blocks = [characters[i : i + 0x1000] for i in range(0, len(characters), 0x1000)]
    split = pre_tokenizers.Split(Regex(r"\p{Cn}+"), behavior="removed", invert=True).pre_tokenize_str
    unassigned = {char for block in blocks for piece, _ in split("".join(block)) for char in piece}
    kinds = unassigned ^ {char for char in characters if unicodedata.category(char) == "Cn"}

    low, compose = normalizers.Lowercase().normalize_str, normalizers.NFC().normalize_str
    doubtful = (char for block in blocks if low("".join(block)) != "".join(c.lower() for c in block) for char in block)
    cases = {char for char in doubtful if low(char) != char.lower()}

    def composed_otherwise(text: str) -> bool:
        return compose(text) != unicodedata.normalize("NFC", text)

    # A combining mark that is known moves past one of the highest class, or past one of the lowest.
    marks = {char for char in characters if unicodedata.combining(char) and composed_otherwise(f"\u0345{char}\u0334")}
    pairs = ((char, unicodedata.normalize("NFD", char)) for char in characters if unicodedata.decomposition(char))
    parts = {part for char, parted in pairs if composed_otherwise(parted) for part in char + parted}
    unlike = kinds | cases | marks | parts
    assert all(unicodedata.ucd_3_2_0.category(char) == "Cn" for char in unlike)
    return unlike


def random_texts(n: int, *, seed: int, surrogates: bool = False, exclude: frozenset[str] | set[str] = frozenset()) -> list[str]:
    """Texts of all kinds: from the lists above, from every plane of Unicode, and a few that are very long."""
    rng = random.Random(seed)
    tops = (0x80, 0x250, 0x800, 0x3000, 0x10000, 0x20000, 0x40000, sys.maxunicode + 1)

    def character() -> str:
        char = chr(rng.randrange(rng.choice(tops)))
        return character() if char in exclude or (not surrogates and 0xD800 <= ord(char) < 0xE000) else char

    def part() -> str:
        roll = rng.random()
        if roll < 0.5:
            return rng.choice(rng.choice(LISTS))
        if roll < 0.7:
            return "".join(character() for _ in range(rng.randrange(1, 6)))
        return "".join(rng.choices("etaoinshrdluETAOIN", k=rng.randrange(1, 12)))

    def text(parts: int) -> str:
        return "".join(part() + rng.choice(["", " ", rng.choice(SPACES)]) for _ in range(parts))

    long_words = ["".join(rng.choices("etaoinshrdlu", k=1000)), "x" * 20_000, "!" * 5_000, "日本語" * 1_000, "e\u0301" * 1_000]
    texts = ["", " ", *long_words, *(text(1_000) for _ in range(3))]
    return texts + [text(rng.randrange(1, 12)) for _ in range(n - len(texts))]


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return Tokenizer.train(CORPUS, 320, context_length=32)


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    return Tokenizer.clip(CLIP_FILE)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    """CLIP's vocabulary as vocab.json and merges.txt, made from OpenAI's file by hand and not by the code under test."""
    folder = tmp_path_factory.mktemp("clip")
    merges = gzip.decompress(CLIP_FILE.read_bytes()).decode().split("\n")[1:48895]
    visible = [*map(chr, [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)])]
    tokens = [*visible, *(char + "</w>" for char in visible), *(line.replace(" ", "") for line in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def unlike() -> set[str]:
    return unlike_characters()


# ---- a vocabulary trained here -----------------------------------------------------------------------------------------


def test_decode_gives_back_every_text(ours):
    for text in random_texts(3000, seed=1, surrogates=True) + CORPUS + ["\ud83d", "\ud83d\ude00", "\ude00\ud83d!", "\0"]:
        assert ours.decode(ours.encode(text)) == text


def test_every_character_survives_alone_and_among_others(ours):
    for start in [*range(0, 0x20000, 0x1000), *range(0x20000, sys.maxunicode + 1, 0xF000)]:
        text = "".join(map(chr, range(start, min(start + 0x1000, sys.maxunicode + 1))))
        assert ours.decode(ours.encode(text)) == text
    assert all(ours.decode(ours.encode(chr(code))) == chr(code) for code in range(0x3100))


def test_words_are_runs_of_one_kind_with_one_space_before():
    words = ["one", " café", "12½", "!", "  ", " two", "\u3000", "three", " ", "\n", "four", " …\x1c", "五", " "]
    assert cut("".join(words), OUR_WORDS) == words


def test_merge_goes_from_left_to_right_without_overlap():
    assert glue(list("aaabaa"), ("a", "a")) == ["aa", "a", "b", "aa"]
    assert glue(list("abcab"), ("a", "b")) == ["ab", "c", "ab"]
    assert glue([], ("a", "b")) == []


def test_merges_of_the_papers_example():
    """The corpus of Sennrich et al. 2016, algorithm 1, worked out by hand; two ties a line: e before s, l before o, ..."""
    merges = learn_merges({"low": 5, "lower": 2, "newest": 6, "widest": 3}, 99)
    glued = ["es", "est", "lo", "low", "ew", "new", "newest", "dest", "idest", "widest", "er", "lower"]
    assert ["".join(pair) for pair in merges] == glued
    assert merges[:4] == [("e", "s"), ("es", "t"), ("l", "o"), ("lo", "w")]
    assert learn_merges({"ab": 1, "cd": 1}, 99) == []  # nothing occurs twice


@pytest.mark.parametrize("lowercase", [False, True])
def test_training_learns_the_merges_of_the_reference(ours, tmp_path, lowercase):
    rng = random.Random(2)
    texts = CORPUS + [
        "".join(rng.choices("abcdeéA 7!\u3000", weights=[9, 7, 5, 3, 3, 2, 2, 9, 1, 1, 2], k=40)) for _ in range(300)
    ]
    tokenizer = Tokenizer.train(texts, 600, lowercase=lowercase)
    tokenizer.save(tmp_path)
    reference = Reference.from_file(str(tmp_path / "tokenizer.json"))
    trainer = trainers.BpeTrainer(
        vocab_size=598,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    reference.train_from_iterator(texts, trainer)
    assert [tuple(pair) for pair in json.loads(reference.to_str())["model"]["merges"]] == tokenizer.merges
    assert tokenizer.vocab_size == 600


def test_training_depends_on_the_counts_alone():
    a = Tokenizer.train(CORPUS, 350)
    b = Tokenizer.train(iter(random.Random(3).sample(CORPUS, len(CORPUS))), 350)
    assert a.merges == b.merges
    assert a.tokens == b.tokens


def test_layout_of_ids(ours):
    assert ours.tokens[:256] == list(SYMBOL_OF.values())
    assert (ours.start_id, ours.end_id, ours.pad_id) == (318, 319, 319)
    assert Tokenizer.train(["abc"], 1000).vocab_size == 258  # no pair occurs twice, so there is nothing to learn


def test_rows_are_start_tokens_end_padding(ours):
    rows = ours(["a red star", ""])
    assert rows.shape == (2, 32)
    assert rows.dtype == torch.int64
    ids = ours.encode("a red star")
    assert rows[0].tolist() == [318, *ids, *[319] * (31 - len(ids))]
    assert rows[1].tolist() == [318, *[319] * 31]
    assert torch.equal(ours("a red star"), rows[:1])
    assert ours([]).shape == (0, 32)
    assert ours.decode(rows[0]) == "a red star"


def test_too_long_a_text_is_cut_with_a_warning_that_shows_what(ours):
    text = "a large red circle " * 20
    with pytest.warns(UserWarning, match="cut off") as caught:
        row = ours(["", text])[1]
    kept = ours.decode(row)
    assert text.startswith(kept)
    assert repr(text.removeprefix(kept)) in str(caught[0].message)
    assert "text 1 " in str(caught[0].message)
    assert caught[0].filename == __file__
    assert (row[0], row[-1]) == (ours.start_id, ours.end_id)


def test_pieces_are_one_a_token_and_readable(ours, clip):
    assert ours.pieces("a small star") == ["a", " small", " star"]
    assert "".join(ours.pieces("one bleu, grün café")) == "one bleu, grün café"
    assert ours.pieces("😀") == [r"\xf0", r"\x9f", r"\x98", r"\x80"]
    assert clip.pieces("Two astronauts' café 42") == ["two ", "astronauts ", "' ", "café ", "4 ", "2 "]
    assert len(clip.pieces("supercalifragilistic")) == len(clip.encode("supercalifragilistic")) > 1


def test_lower_case(ours):
    tokenizer = Tokenizer.train(CORPUS, 300, lowercase=True)
    assert tokenizer.encode("A LARGE Star") == tokenizer.encode("a large star")
    assert ours.encode("A LARGE Star") != ours.encode("a large star")
    assert tokenizer.decode(tokenizer.encode("ΑΣ Ünï")) == "ασ ünï"  # noqa: RUF001


@pytest.mark.parametrize("lowercase", [False, True])
@pytest.mark.parametrize("opens", [AutoTokenizer, PreTrainedTokenizerFast])
def test_transformers_opens_what_save_writes(tmp_path, unlike, lowercase, opens):
    tokenizer = Tokenizer.train(CORPUS, 320, context_length=20, lowercase=lowercase)
    tokenizer.save(tmp_path)
    reference = opens.from_pretrained(tmp_path)
    assert (reference.model_max_length, len(reference)) == (20, 320)
    special = (reference.bos_token_id, reference.eos_token_id, reference.pad_token_id)
    assert special == (tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id)
    texts = CORPUS + random_texts(1000, seed=4, exclude=unlike)
    theirs = reference(texts, add_special_tokens=False).input_ids
    assert [text for text, ids in zip(texts, theirs, strict=True) if tokenizer.encode(text) != ids] == []
    with pytest.warns(UserWarning, match="cut off"):
        rows = tokenizer(texts)
    padded = reference(texts, padding="max_length", max_length=reference.model_max_length, truncation=True, return_tensors="pt")
    assert torch.equal(padded.input_ids, rows)
    if not lowercase:
        assert [reference.decode(ids) for ids in theirs] == texts


# ---- CLIP's vocabulary -------------------------------------------------------------------------------------------------


def assert_equal_to_reference(tokenizer: Tokenizer, reference: CLIPTokenizer, texts: list[str]) -> None:
    theirs = reference(texts, add_special_tokens=False).input_ids
    assert [text for text, ids in zip(texts, theirs, strict=True) if tokenizer.encode(text) != ids] == []


def test_clip_equals_the_reference_on_10000_texts(clip, clip_folder, unlike):
    """Equal on every text, those that spell out special tokens included; only `unlike_characters` are not used in them."""
    reference = CLIPTokenizer.from_pretrained(clip_folder)
    texts = random_texts(10_500, seed=5, exclude=unlike)
    assert_equal_to_reference(clip, reference, texts)
    assert len(set(texts)) > 10_000
    padded = reference(texts[:500], padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    with pytest.warns(UserWarning, match="cut off"):
        assert torch.equal(clip(texts[:500]), padded)
    plain = [text for text in texts[-2000:] if "<|" not in text]
    assert [clip.decode(clip.encode(text)) for text in plain] == [
        reference.decode(reference.encode(text)[1:-1]) for text in plain
    ]


def test_clip_equals_the_reference_on_every_character(clip, clip_folder, unlike):
    """All of Unicode, one in 64 of the ideographs, the Hangul syllables and what is for private use or unassigned."""
    reference = CLIPTokenizer.from_pretrained(clip_folder)
    sparse = [*range(0x3400, 0xD800, 64), *range(0xE000, 0xF900, 64), *range(0x20000, sys.maxunicode + 1, 64)]
    codes = [*range(0x3400), *range(0xF900, 0x16000), *range(0x16000, 0x19000, 64), *range(0x19000, 0x20000), *sparse]
    texts = [f"a{chr(code)}b" for code in codes if chr(code) not in unlike]
    assert_equal_to_reference(clip, reference, [" ".join(texts[i : i + 100]) for i in range(0, len(texts), 100)])


def test_clip_pads_with_an_exclamation_mark_as_the_reference_does(clip_folder, tmp_path, unlike):
    """Stable Diffusion 2 and SDXL's second: id 0 is "!", which is thereby a special token wherever a text has one."""
    reference = CLIPTokenizer.from_pretrained(clip_folder, pad_token="!")
    tokenizer = Tokenizer.clip(clip_folder, pad_id=0)
    assert tokenizer("wow!")[0].tolist() == [49406, tokenizer.vocab["wow</w>"], 0, 49407, *[0] * 73]
    assert_equal_to_reference(tokenizer, reference, random_texts(1000, seed=6, exclude=unlike))
    assert tokenizer.decode(tokenizer("a cat")[0]) == "a cat"


def test_clip_is_read_from_every_format(clip, clip_folder, tmp_path):
    CLIPTokenizer.from_pretrained(clip_folder).save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new" / "vocab.json").exists()
    (tmp_path / "plain.txt").write_bytes(gzip.decompress(CLIP_FILE.read_bytes()))
    paths = [
        clip_folder,
        clip_folder / "vocab.json",
        tmp_path / "new",
        tmp_path / "new" / "tokenizer.json",
        tmp_path / "plain.txt",
    ]
    for path in paths:
        tokenizer = Tokenizer.clip(path)
        assert (tokenizer.merges, tokenizer.tokens) == (clip.merges, clip.tokens)
        assert (tokenizer.context_length, tokenizer.pad_id, tokenizer.vocab_size) == (77, 49407, 49408)
    assert Tokenizer.clip(str(CLIP_FILE), context_length=9, pad_id=0)(["a cat"]).tolist() == [
        [49406, 320, 2368, 49407, 0, 0, 0, 0, 0]
    ]


BOTH = (
    {"pad_token": END},
    {"pad_token": {"content": "!", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}},
)
DECODER = {"0": {"content": "!", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}}


@pytest.mark.parametrize(
    ("config", "special", "pad_id", "length"),
    [
        ({"model_max_length": 77}, None, 49407, 77),
        ({"model_max_length": 64, "pad_token": "!"}, None, 0, 64),
        (BOTH[0], BOTH[1], 0, 77),  # Stable Diffusion 2's folder
        ({"pad_token": "!", "added_tokens_decoder": DECODER}, {"pad_token": END}, 0, 77),  # the kind of SDXL's second folder
        (None, {"pad_token": "!"}, 0, 77),
    ],
)
def test_clip_takes_padding_and_length_from_the_folder_as_the_reference_does(
    clip_folder, tmp_path, config, special, pad_id, length
):
    for name, content in {"tokenizer_config.json": config, "special_tokens_map.json": special}.items():
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).symlink_to(clip_folder / name)
    tokenizer = Tokenizer.clip(tmp_path)
    assert (tokenizer.pad_id, tokenizer.context_length) == (pad_id, length)
    assert CLIPTokenizer.from_pretrained(tmp_path).pad_token_id == pad_id
    assert Tokenizer.clip(tmp_path, pad_id=5, context_length=8)("a").tolist() == [[49406, 320, 49407, 5, 5, 5, 5, 5]]


# ---- files -------------------------------------------------------------------------------------------------------------


def test_save_and_load(ours, clip, tmp_path):
    lowered = Tokenizer.train(CORPUS, 300, context_length=10, lowercase=True)
    padded = Tokenizer(merges=clip.merges, context_length=12, pad_id=0, lowercase=True, end_of_word="</w>")
    for tokenizer in (ours, clip, lowered, padded, ours):  # into one folder: each replaces the one before
        tokenizer.save(tmp_path / "new" / "folder")
        loaded = Tokenizer.load(tmp_path / "new" / "folder")
        for name in ("merges", "tokens", "vocab", "context_length", "pad_id", "lowercase", "end_of_word"):
            assert getattr(loaded, name) == getattr(tokenizer, name), name
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("pad_id", [None, 0])
def test_transformers_opens_clip_as_save_writes_it(clip, tmp_path, pad_id):
    tokenizer = Tokenizer.clip(CLIP_FILE, pad_id=pad_id, context_length=20)
    tokenizer.save(tmp_path)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(reference, CLIPTokenizer)
    texts = ["", "A photo of an astronaut!", "don't 1234", END]
    theirs = reference(texts, padding="max_length", max_length=reference.model_max_length, truncation=True, return_tensors="pt")
    assert torch.equal(theirs.input_ids, tokenizer(texts))


def test_a_vocabulary_that_is_not_there_or_damaged(ours, clip_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no vocabulary at .*expected bpe_simple_vocab"):
        Tokenizer.clip(tmp_path / "nowhere.txt.gz")
    with pytest.raises(FileNotFoundError, match=r"vocab\.json and merges\.txt"):
        Tokenizer.clip(tmp_path)
    ours.save(tmp_path / "ours")
    with pytest.raises(ValueError, match="trained here"):
        Tokenizer.clip(tmp_path / "ours")

    data, text = CLIP_FILE.read_bytes(), gzip.decompress(CLIP_FILE.read_bytes())
    vocab = json.loads((clip_folder / "vocab.json").read_text(encoding="utf-8"))
    ours_json = (tmp_path / "ours" / "tokenizer.json").read_text(encoding="utf-8")
    broken = {
        "truncated.txt.gz": (data[:-1000], "damaged"),
        "flipped.txt.gz": (data[:5000] + b"\0\1\2" + data[5003:], "damaged"),
        "text.txt.gz": (text, "damaged"),
        "binary.txt": (data, "damaged"),
        "short.txt": (text[:100_000], "expected CLIP's 48894"),
        "garbled.txt": (text.replace(b"\ni n\n", b"\nin\n"), "no merge of two known symbols"),
        "cut/tokenizer.json": (ours_json[:-100].encode(), "damaged"),
        "empty/tokenizer.json": (b'{"pre_tokenizer": null}', "damaged"),
        "foreign/tokenizer.json": (ours_json.replace("Isolated", "Removed").encode(), "neither CLIP's nor ours"),
        "order/vocab.json": (json.dumps(vocab | {"!": 1, '"': 0}).encode(), "another order"),
        "added/added_tokens.json": (b'{"<cat-toy>": 49408}', r"adds \['<cat-toy>'\]"),
        "bert/vocab.json": (b'{"[PAD]": 0, "the": 1}', "another order"),
    }
    for name, (content, message) in broken.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        if path.parent.name in ("order", "bert", "added"):
            (path.parent / "merges.txt").write_bytes((clip_folder / "merges.txt").read_bytes())
        if path.parent.name == "added":
            path = path.with_name("vocab.json")
            path.write_text(json.dumps(vocab), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            Tokenizer.load(path)


def test_bad_arguments(ours):
    with pytest.raises(ValueError, match="vocab_size is 257, expected 258"):
        Tokenizer.train(CORPUS, 257)
    assert Tokenizer.train(CORPUS, 258).merges == []
    for corpus in ([], ["", ""]):
        with pytest.raises(ValueError, match="corpus is empty"):
            Tokenizer.train(corpus, 300)
    with pytest.raises(TypeError, match="one string, expected a list"):
        Tokenizer.train("a red star", 300)
    with pytest.raises(TypeError, match="text 1 of 2 is a NoneType"):
        Tokenizer.train(["a", None], 300)
    with pytest.raises(TypeError, match="text 2 of 3 is a int"):
        ours(["a", "b", 3])
    with pytest.raises(TypeError, match="text is a list, expected one string"):
        ours.encode(["a"])
    with pytest.raises(ValueError, match="context_length is 2"):
        Tokenizer.train(CORPUS, 300, context_length=2)
    with pytest.raises(ValueError, match="pad_id is 258"):
        Tokenizer(merges=[], pad_id=258)
    with pytest.raises(ValueError, match="no merge of two known symbols"):
        Tokenizer(merges=[("a", "bc")])
    for wrong in (-1, 320):
        with pytest.raises(ValueError, match=f"id {wrong} is outside"):
            ours.decode([1, wrong])
    assert ours.decode([SYMBOL_OF[0xF0] and list(SYMBOL_OF).index(0xF0)]) == "\ufffd"

"""The tokenizer: text to numbers and back, with a vocabulary trained here or with CLIP's.

A text is cut into words and each word into bytes; then pairs of neighbours are glued together, in the order in which
training found them to be frequent.  What no merge covers stays a byte, so no text is ever unknown.
"""

import gzip
import json
import re
import unicodedata
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from math import inf
from pathlib import Path

import torch
from torch import Tensor

from minildm.bpe import (  # the alphabet and the rules  # the steps
    BYTE_OF,
    CLIP_WORDS,
    END,
    END_OF_WORD,
    OUR_WORDS,
    START,
    SYMBOL_OF,
    Pair,
    cut,
    glue,
    learn_merges,
    lower,
    spell,
)
from minildm.checkpoint import write_atomically

CLIP_MERGES = 49408 - 2 * 256 - 2  # its vocabulary less each byte, within a word and at its end, and START and END


class Tokenizer:
    """Text in, ids out, and back.  A vocabulary is its list of merges: `train` learns one, `clip` and `load` read one.

    A vocabulary trained here is lossless: `decode(encode(text)) == text` for every text.  CLIP's cleans first (Unicode
    form NFC, lower case, white space dropped) and marks the last byte of each word.  Where a text spells out one of CLIP's
    special tokens, padding included, it becomes that token, as in the reference: with padding 0, "!", every "!" does.

    Args, all of them attributes afterwards:
        merges: the pairs to glue, first to last.
        context_length: L, ids in a row, start and end included; at least 3.
        pad_id: what fills a row after the end, in [0, vocab_size); by default `end_id`.
        lowercase: whether to lower the text; what was upper case is then lost.
        end_of_word: "" for a vocabulary trained here, "</w>" for one that follows CLIP's rules.

    Further attributes: `vocab_size`, `start_id`, `end_id`; `tokens`, the token of each id; `vocab`, the id of each token.

    Raises:
        ValueError: a merge glues what no merge before it made, or an argument is out of range.
    """

    def __init__(
        self,
        *,
        merges: list[Pair],
        context_length: int = 77,
        pad_id: int | None = None,
        lowercase: bool = False,
        end_of_word: str = "",
    ) -> None:
        alphabet = [symbol + ending for ending in dict.fromkeys(("", end_of_word)) for symbol in SYMBOL_OF.values()]
        self.tokens = list(dict.fromkeys([*alphabet, *("".join(pair) for pair in merges), START, END]))
        self.vocab = {token: i for i, token in enumerate(self.tokens)}
        self.vocab_size, self.start_id, self.end_id = len(self.vocab), self.vocab[START], self.vocab[END]
        self.merges, self.context_length, self.lowercase, self.end_of_word = merges, context_length, lowercase, end_of_word
        self.pad_id = self.end_id if pad_id is None else pad_id
        if wrong := [pair for pair in merges if len(pair) != 2 or not self.vocab.keys() >= {*pair}]:
            raise ValueError(f"{wrong[0]} is no merge of two known symbols: is the vocabulary file damaged?")
        if context_length < 3:
            raise ValueError(f"context_length is {context_length}, expected 3 or more: start, one token, end")
        if not 0 <= self.pad_id < self.vocab_size:
            raise ValueError(f"pad_id is {pad_id}, expected an id in [0, {self.vocab_size})")
        self._rank = {pair: i for i, pair in enumerate(merges)}
        self._bytes = [_token_bytes(token, end_of_word) for token in self.tokens]
        special = (START, END, self.tokens[self.pad_id]) if end_of_word else ()
        self._special = re.compile(f"({'|'.join(re.escape(token) for token in special)})")
        self._known = {token: [self.vocab[token]] for token in special}  # the ids of words met before

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, *, context_length: int = 77, lowercase: bool = False) -> "Tokenizer":
        """Learn a vocabulary from a corpus; the same corpus gives the same vocabulary.

        Args:
            texts: the corpus, a caption or a line each.
            vocab_size: 256 bytes, the merges, 2 special tokens; fewer result when no pair is left that occurs twice.
            context_length, lowercase: as in `Tokenizer`.

        Raises:
            TypeError: texts is one string, or an item is no string; says which.
            ValueError: vocab_size is below 258, or the corpus is empty.
        """
        if isinstance(texts, str):
            raise TypeError("texts is one string, expected a list of strings: put it in brackets")
        texts, n_merges = _strings(texts), vocab_size - len(SYMBOL_OF) - 2
        if n_merges < 0:
            raise ValueError(f"vocab_size is {vocab_size}, expected 258 or more: 256 bytes and 2 special tokens")
        word_counts = Counter(word for text in texts for word in cut(lower(text) if lowercase else text, OUR_WORDS))
        if not word_counts:
            raise ValueError(f"the corpus is empty, {len(texts)} texts without a character: give some captions to learn from")
        return cls(merges=learn_merges(word_counts, n_merges), context_length=context_length, lowercase=lowercase)

    @classmethod
    def clip(cls, vocab_file: str | Path, *, context_length: int | None = None, pad_id: int | None = None) -> "Tokenizer":
        """Read CLIP's vocabulary in either published format.

        Args:
            vocab_file: OpenAI's `bpe_simple_vocab_16e6.txt.gz`; or transformers' folder, which has `vocab.json` and
                `merges.txt`, or `tokenizer.json`; or one of these `.json` files.
            context_length: by default what the folder's settings say, else 77.
            pad_id: 49407, end of text, for Stable Diffusion 1 and SDXL's first encoder; 0 for Stable Diffusion 2 and SDXL's
                second; by default what the folder's settings say, else 49407.

        Raises:
            FileNotFoundError: there is no vocabulary there.
            ValueError: the file is damaged or not CLIP's kind.
        """
        tokenizer = cls.load(vocab_file, context_length=context_length, pad_id=pad_id)
        if not tokenizer.end_of_word:
            raise ValueError(f"{vocab_file} holds a vocabulary trained here, expected CLIP's: read it with Tokenizer.load")
        return tokenizer

    @classmethod
    def load(cls, folder: str | Path, *, context_length: int | None = None, pad_id: int | None = None) -> "Tokenizer":
        """Read what `save` wrote, or anything that `clip` reads; arguments and errors as there."""
        try:
            fields, vocab = _read(Path(folder))
            given = {"context_length": context_length, "pad_id": pad_id}
            tokenizer = cls(**fields | {name: value for name, value in given.items() if value is not None})
        except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError, json.JSONDecodeError, KeyError) as error:
            raise ValueError(f"{folder} is damaged or no vocabulary ({error!r}): fetch or save it again") from error
        if vocab not in (None, tokenizer.vocab):
            raise ValueError(f"{folder} numbers its tokens in another order than its merges make them: do its files match?")
        return tokenizer

    def save(self, folder: str | Path) -> None:
        """Write the folder that `load` reads, and so does transformers: `AutoTokenizer.from_pretrained` gives the same ids.

        A vocabulary trained here becomes `tokenizer.json`, CLIP's `vocab.json` and `merges.txt`; `tokenizer_config.json`
        goes with both.  Another tokenizer in that folder is replaced.
        """
        config = {"model_max_length": self.context_length, "pad_token": self.tokens[self.pad_id]}
        config |= {"bos_token": START, "eos_token": END, "unk_token": END, "clean_up_tokenization_spaces": False}
        if self.end_of_word:
            config["tokenizer_class"] = "CLIPTokenizer"
            merges = "".join(f"{a} {b}\n" for a, b in self.merges)
            files = {"vocab.json": json.dumps(self.vocab, ensure_ascii=False), "merges.txt": f"#version: 0.2\n{merges}"}
        else:
            config |= {"tokenizer_class": "PreTrainedTokenizerFast", "split_special_tokens": True}
            files = {"tokenizer.json": json.dumps(_describe(self), ensure_ascii=False)}
        files["tokenizer_config.json"] = json.dumps(config, indent=2)
        folder = Path(folder)
        for name, text in files.items():
            write_atomically(folder / name, lambda beside, text=text: beside.write_text(text, encoding="utf-8", newline="\n"))
        for name in {"vocab.json", "merges.txt", "tokenizer.json", *_SETTINGS} - files.keys():
            (folder / name).unlink(missing_ok=True)

    def __call__(self, texts: str | Iterable[str]) -> Tensor:
        """Turn texts into rows of ids, (B, L) int64: start, tokens, end, padding.

        Args:
            texts: one text or several; one that is too long is cut, with a warning that shows what was cut off.

        Raises:
            TypeError: an item is no string; says which.
        """
        texts = [texts] if isinstance(texts, str) else _strings(texts)
        rows = torch.full((len(texts), self.context_length), self.pad_id)  # (B, L)
        room = self.context_length - 2
        for i, text in enumerate(texts):
            ids = self.encode(text)
            if len(ids) > room:
                warnings.warn(f"text {i} has {len(ids)} tokens, {room} fit; cut off: {self._text(ids[room:])!r}", stacklevel=2)
            ids = [self.start_id, *ids[:room], self.end_id]
            rows[i, : len(ids)] = torch.tensor(ids)
        return rows

    def encode(self, text: str) -> list[int]:
        """Turn one text into ids, as many as it takes, without start, end and padding."""
        ids = []
        for word in self._words(text):
            if word not in self._known:
                self._known[word] = self._encode_word(word)
            ids += self._known[word]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Turn ids back into text, up to the first end token; bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: an id is outside [0, vocab_size).
        """
        ids = [int(i) for i in ids]
        if wrong := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise ValueError(f"id {wrong[0]} is outside [0, {self.vocab_size}): does it come from another tokenizer?")
        ids = ids[: ids.index(self.end_id)] if self.end_id in ids else ids
        return self._text([i for i in ids if i != self.start_id])

    def pieces(self, text: str) -> list[str]:
        r"""Show what each id of `encode(text)` stands for; piece i belongs to column i + 1 of the tokenizer's row.

        A space shows where a word begins (trained here) or ends (CLIP), a part of a character shows its bytes: "\xf0\x9f".
        """
        return [self._bytes[i].decode("utf-8", "backslashreplace") for i in self.encode(text)]

    def _words(self, text: str) -> list[str]:
        if not isinstance(text, str):
            raise TypeError(f"text is a {type(text).__name__}, expected one string")
        if not self.end_of_word:
            return cut(lower(text) if self.lowercase else text, OUR_WORDS)
        words = []
        for i, part in enumerate(self._special.split(text)):  # text, special token, text, special token, ..., text
            words += [part] if i % 2 else cut(lower(unicodedata.normalize("NFC", part)), CLIP_WORDS)
        return words

    def _encode_word(self, word: str) -> list[int]:
        symbols = spell(word)
        symbols[-1] += self.end_of_word
        while pairs := self._rank.keys() & pairwise(symbols):
            symbols = glue(symbols, min(pairs, key=self._rank.__getitem__))  # the pair that was learnt first
        return [self.vocab[symbol] for symbol in symbols]

    def _text(self, ids: list[int]) -> str:
        data = b"".join(self._bytes[i] for i in ids)
        try:
            text = data.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            text = data.decode("utf-8", "replace")
        return text.strip() if self.end_of_word else text


def _strings(texts: Iterable[str]) -> list[str]:
    texts = list(texts)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"text {i} of {len(texts)} is a {type(text).__name__}, expected a string")
    return texts


def _token_bytes(token: str, end_of_word: str) -> bytes:
    stem = token.removesuffix(end_of_word)
    return bytes(BYTE_OF[symbol] for symbol in stem) + (b"" if stem == token else b" ")


# ---- files: OpenAI's list of merges, transformers' vocab.json with merges.txt, tokenizer.json --------------------------

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_SPLIT = {"type": "Split", "pattern": {"Regex": OUR_WORDS}, "behavior": "Isolated", "invert": False}
_PRE_TOKENIZER = {"type": "Sequence", "pretokenizers": [_SPLIT, _BYTE_LEVEL]}
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def _describe(tokenizer: Tokenizer) -> dict:
    """Describe a tokenizer trained here in the terms of a tokenizer.json, so that transformers does the same."""
    start, end = (START, tokenizer.start_id), (END, tokenizer.end_id)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    around = {"type": "RobertaProcessing", "cls": start, "sep": end, "trim_offsets": False, "add_prefix_space": False}
    return {
        "added_tokens": [{"content": token, "id": i} | flags for token, i in (start, end)],
        "normalizer": {"type": "Lowercase"} if tokenizer.lowercase else None,
        "pre_tokenizer": _PRE_TOKENIZER,
        "post_processor": around,
        "decoder": _BYTE_LEVEL,
        "model": {"type": "BPE", "vocab": tokenizer.vocab, "merges": tokenizer.merges},
    }


def _read(path: Path) -> tuple[dict, dict[str, int] | None]:
    """Read a vocabulary in any format: the arguments of `Tokenizer`, and the ids of the tokens where the file has them."""
    if path.is_dir():
        pair = (path / "vocab.json").is_file() and (path / "merges.txt").is_file()
        path /= "vocab.json" if pair else "tokenizer.json"
    if not path.is_file():
        kinds = "bpe_simple_vocab_16e6.txt.gz, or a folder with vocab.json and merges.txt, or with tokenizer.json"
        raise FileNotFoundError(f"no vocabulary at {path}: expected {kinds}")
    rules = {"lowercase": True, "end_of_word": END_OF_WORD}
    if path.suffix != ".json":
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        merges = _pairs(data.decode().split("\n")[1 : CLIP_MERGES + 1])
        if len(merges) < CLIP_MERGES:
            raise ValueError(f"{path} holds {len(merges)} merges, expected CLIP's {CLIP_MERGES}: is the file complete?")
        return {"merges": merges} | rules, None

    vocab = content = json.loads(path.read_text(encoding="utf-8"))
    if "pre_tokenizer" in content:  # a tokenizer.json
        vocab, merges = content["model"]["vocab"], _pairs(content["model"]["merges"])
        if content["pre_tokenizer"] == _PRE_TOKENIZER:
            rules = {"lowercase": content["normalizer"] is not None}
        elif content["model"].get("end_of_word_suffix") != END_OF_WORD:
            raise ValueError(f"{path} is neither CLIP's nor ours: its rules to cut words are not known here")
    else:
        merges = _pairs(path.with_name("merges.txt").read_text(encoding="utf-8").split("\n")[1:])
    return {"merges": merges} | rules | _settings(path.parent, vocab), vocab


def _pairs(merges: Iterable[str | list[str]]) -> list[Pair]:
    """Read merges written as "a b" or as ["a", "b"]; empty lines are none."""
    return [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges if pair]


def _settings(folder: Path, vocab: dict[str, int]) -> dict:
    """Read length and padding where transformers does: special_tokens_map.json wins over a configuration of the old kind."""
    files = [folder / name for name in _SETTINGS]
    config, special, added = (json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {} for file in files)
    decoder = config.get("added_tokens_decoder")
    if unknown := sorted({*added, *(token["content"] for token in (decoder or {}).values())} - vocab.keys()):
        raise ValueError(f"{folder} adds {unknown[:3]} to its vocabulary, which minildm cannot do: use the folder it began as")
    config = config if decoder else config | special
    pad, length = config.get("pad_token"), config.get("model_max_length", inf)
    pad = pad["content"] if isinstance(pad, dict) else pad
    return {"pad_id": pad and vocab[pad], "context_length": 77 if length > 1e6 else length}

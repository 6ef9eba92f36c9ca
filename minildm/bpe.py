"""Byte-pair encoding itself: cut a text into words, a word into bytes, and learn which neighbours to glue.

Sennrich et al. 2016 (arXiv 1508.07909); on bytes as in GPT-2 (Radford et al. 2019) and CLIP (Radford et al. 2021).
"""

import re
import unicodedata
from collections import Counter, defaultdict
from itertools import pairwise

Pair = tuple[str, str]

START, END, END_OF_WORD = "<|startoftext|>", "<|endoftext|>", "</w>"

# How a text is cut into words.  Ours keeps every character (GPT-2's rule without its English contractions): a run of
# letters, of numbers, of other signs, each with one space before it if there is one, or else white space.  CLIP's drops
# white space, takes numbers digit by digit, and cuts a special token that only lower-casing made into three words.
OUR_WORDS = r" ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CLIP_WORDS = r"(<\|)(startoftext|endoftext)(\|>)|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def byte_alphabet() -> dict[int, str]:
    """Give each of the 256 bytes a visible character, so that tokens can be printed and stored as text.

    Bytes that are visible in Latin-1 stand for themselves, the others (space, control) take the characters from U+0100
    on.  The order of the dictionary is the order of the first 256 token ids, in GPT-2, in CLIP and here.
    """
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


SYMBOL_OF = byte_alphabet()
BYTE_OF = {symbol: byte for byte, symbol in SYMBOL_OF.items()}


def spell(word: str) -> list[str]:
    """Write a word as one symbol for each of its UTF-8 bytes; half a surrogate pair, too, has its three bytes."""
    return [SYMBOL_OF[byte] for byte in word.encode("utf-8", "surrogatepass")]


def shadow(text: str) -> str:
    r"""Replace each character outside ASCII by an ASCII one of its kind, so that `re`, which has no \p{L}, can cut it."""

    def kind(char: str) -> str:
        if char.isascii():
            return char
        return "\n" if char.isspace() else {"L": "A", "N": "0"}.get(unicodedata.category(char)[0], "!")

    return text if text.isascii() else "".join(kind(char) for char in text)


def cut(text: str, pattern: str) -> list[str]:
    """Cut a text into words by one of the two patterns above."""
    pattern = pattern.replace(r"\p{L}", "A-Za-z").replace(r"\p{N}", "0-9")
    words = []
    for match in re.finditer(pattern, shadow(text), re.ASCII):
        groups = (1, 2, 3) if match.lastindex else (0,)
        words += [text[match.start(group) : match.end(group)] for group in groups]
    return words


def lower(text: str) -> str:
    """Lower each character by itself: `str.lower` would write a sigma at the end of a word differently."""
    return "".join(char.lower() for char in text)


def glue(symbols: list[str], pair: Pair) -> list[str]:
    """Glue every occurrence of a pair of neighbours into one symbol, from left to right."""
    merged = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def learn_merges(word_counts: dict[str, int], n: int) -> list[Pair]:
    """Find the pairs to glue: again and again the most frequent one, until there are n or none occurs twice.

    Among equally frequent pairs the one of the oldest symbols wins (first by the left one, then by the right one), so
    that nothing but the counts decides.  Sennrich et al. 2016, algorithm 1, with counts kept up to date, not taken anew.

    Args:
        word_counts: how often each word occurs in the corpus.
        n: the most merges to learn.
    """
    words, counts = [spell(word) for word in word_counts], list(word_counts.values())
    age = {symbol: i for i, symbol in enumerate(SYMBOL_OF.values())}
    pair_counts, where = Counter(), defaultdict(set)  # where: the words that hold a pair, or once did
    for i, word in enumerate(words):
        for pair in pairwise(word):
            pair_counts[pair] += counts[i]
            where[pair].add(i)

    merges = []
    while len(merges) < n and (most := max(pair_counts.values(), default=0)) >= 2:
        best = min((p for p, count in pair_counts.items() if count == most), key=lambda p: (age[p[0]], age[p[1]]))
        merges.append(best)
        age["".join(best)] = len(age)
        for i in where.pop(best):
            for pair in pairwise(words[i]):
                pair_counts[pair] -= counts[i]
            words[i] = glue(words[i], best)
            for pair in pairwise(words[i]):
                pair_counts[pair] += counts[i]
                where[pair].add(i)
    return merges

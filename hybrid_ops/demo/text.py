"""The demo's text, which every Python brings along, and what others make of it: compressors and n-grams.

Every figure is bits per byte of the held-out text for one who has read the training text: the compressors and the
n-gram read it first, just as the model does.
"""

import bz2
import hashlib
import lzma
import zlib
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import numpy as np

HELD_OUT = 0.05  # of the text
_SHARED = 0.03  # a topic with more of its long lines in other topics cannot be held out
_ASCII = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "..."})


class Corpus(NamedTuple):
    """The text by topic, cut in two. `shared` is the part of the held-out long lines that the training text has too."""

    train_topics: dict[str, str]
    held_out_topics: dict[str, str]
    shared: float

    @property
    def train(self) -> bytes:
        return "".join(self.train_topics.values()).encode("ascii")

    @property
    def held_out(self) -> bytes:
        return "".join(self.held_out_topics.values()).encode("ascii")


def corpus(topics: Mapping[str, str] | None = None) -> Corpus:
    """Python's own help texts (`pydoc_data.topics`) as ASCII, without the lines of tables and grammars."""
    if topics is None:
        import pydoc_data.topics

        topics = pydoc_data.topics.topics
    return hold_out({name: _prose(topics[name]) for name in sorted(topics)})


def hold_out(texts: Mapping[str, str]) -> Corpus:
    """Hold out whole topics, in the order of a hash of their names, until they are 5% of the text.

    Many topics are also part of a longer one ("with" of "compound"); a reader of that would know them by heart, so only
    topics whose lines are nowhere else are held out. Long topics are not, so that no single one decides the figures.
    """
    others_have = _shared(texts)
    room = HELD_OUT * sum(map(len, texts.values()))
    longest = room / 4
    held: list[str] = []
    for name in sorted(texts, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if room > 0 and others_have[name] <= _SHARED and len(texts[name]) <= longest:
            held.append(name)
            room -= len(texts[name])
    train = {name: text for name, text in texts.items() if name not in held}
    known = {line for text in train.values() for line in _long_lines(text)}
    lines = [line for name in held for line in _long_lines(texts[name])]
    return Corpus(train, {name: texts[name] for name in held}, _part(lines, known))


def _prose(text: str) -> str:
    def is_prose(line: str) -> bool:
        return not any(mark in line for mark in ("|", "::=", "+--", "===="))

    ascii_text = text.translate(_ASCII).encode("ascii", "ignore").decode("ascii")
    return "\n".join(filter(is_prose, ascii_text.split("\n"))).strip("\n") + "\n\n"


def _long_lines(text: str) -> list[str]:
    """Lines that say something: short ones, like "Changed in version 3.8:", are everywhere."""
    return [line for line in text.split("\n") if len(line) > 30]


def _shared(texts: Mapping[str, str]) -> dict[str, float]:
    """For each topic, the part of its long lines that some other topic has too."""
    lines = {name: _long_lines(text) for name, text in texts.items()}
    topics_with: dict[str, int] = {}
    for own in lines.values():
        for line in set(own):
            topics_with[line] = topics_with.get(line, 0) + 1
    in_several = {line for line, count in topics_with.items() if count > 1}
    return {name: _part(own, in_several) for name, own in lines.items()}


def _part(lines: Collection[str], known: Collection[str]) -> float:
    return sum(line in known for line in lines) / max(len(lines), 1)


class Compressed(NamedTuple):
    """Bits per byte of the held-out text: `primed` with the training text, and `alone`."""

    primed: float
    alone: float


def compressors(text: Corpus) -> dict[str, Compressed]:
    """What zlib, bz2 and xz make of the held-out text, each at its strongest setting."""
    size: dict[str, Callable[[bytes], int]] = {
        "zlib": lambda data: len(zlib.compress(data, 9)),
        "bz2": lambda data: len(bz2.compress(data, 9)),
        "xz": lambda data: len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)),
    }
    train, unseen = text.train, text.held_out

    def bits(compressed_bytes: int) -> float:
        return 8 * compressed_bytes / len(unseen)

    return {name: Compressed(bits(of(train + unseen) - of(train)), bits(of(unseen))) for name, of in size.items()}


def rivals(text: Corpus) -> tuple[dict[str, Compressed], tuple[int, float]]:
    """What the compressors and the best n-gram need."""
    return compressors(text), best_ngram(text)


def best_ngram(text: Corpus, orders: Collection[int] = (4, 6, 8, 10)) -> tuple[int, float]:
    """(n, bits per byte of the held-out text) of a byte n-gram; n is the best on topics of the training text."""
    inner = hold_out(text.train_topics)
    n = min(orders, key=lambda n: ngram_bits(inner.train, inner.held_out, n))
    return n, ngram_bits(text.train, text.held_out, n)


def ngram_bits(train: bytes, test: bytes, n: int) -> float:
    """Bits per byte of `test` under a byte n-gram counted in `train`, with interpolated Kneser-Ney smoothing.

    For a history h, from the empty one (where the shorter history's p is 1/256) to n - 1 bytes::

        p(b | h) = (max(c(hb) - d, 0) + d kinds(h) p(b | h without its first byte)) / c(h)

    c counts occurrences for the longest history, else the different bytes before; kinds(h) counts the different bytes
    behind h; d is about n1 / (n1 + 2 n2), ni being the number of hb counted i times.

    Source: Chen and Goodman 1998, "An Empirical Study of Smoothing Techniques for Language Modeling", section 2.7.
    """
    data = np.frombuffer(train + test, np.uint8).astype(np.int64)
    size = len(train)
    grams = [np.ones(len(data), np.int64)]  # grams[k][i] > 0 numbers the k bytes that end at i
    for _ in range(n):
        grams.append(np.unique(_before(grams[-1]) * 256 + data, return_inverse=True)[1] + 1)
    p = np.full(len(test), 1 / 256)
    for k in range(1, n + 1):
        gram, history = grams[k], _before(grams[k - 1])
        counted = slice(None, size) if k == n else np.unique(grams[k + 1][:size], return_index=True)[1]
        c_hb = np.bincount(gram[counted], minlength=int(gram.max()) + 1)
        c_h = np.bincount(history[counted], minlength=int(history.max()) + 1)
        one_each = np.unique(gram[counted], return_index=True)[1]
        kinds = np.bincount(history[counted][one_each], minlength=len(c_h))
        n1, n2 = (c_hb == 1).sum(), (c_hb == 2).sum()
        d = (n1 + 0.5) / (n1 + 2 * n2 + 1)  # strictly between 0 and 1, in the smallest texts too
        c_hb, c_h, kinds = c_hb[gram[size:]], c_h[history[size:]], kinds[history[size:]]
        p = np.where(c_h > 0, (np.maximum(c_hb - d, 0) + d * kinds * p) / np.maximum(c_h, 1), p)
    return float(-np.log2(p).mean())


def _before(gram: np.ndarray) -> np.ndarray:
    """The number of the bytes that end one place earlier; 0 where the text begins."""
    return np.concatenate([[0], gram[:-1]])

"""Search over the records: BM25 on stemmed words and word pairs."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence

from omniconv.papers.records import Record

__all__ = ["search"]

# How often a word counts, by the field that it stands in.
_WEIGHTS = {"title": 3, "slug": 3, "keywords": 3, "summary": 1, "kind": 1}
_K1, _B = 1.2, 0.75  # the usual constants: saturation of repeated words, penalty of long records
_STOP = frozenset("a an and as at by for from in into is it its of on or that the this to with".split())
_SUFFIXES = (
    ("isation", "is"), ("ization", "is"), ("ising", "is"), ("izing", "is"), ("ised", "is"), ("ized", "is"),
    ("ise", "is"), ("ize", "is"), ("ational", "at"), ("ation", "at"), ("ating", "at"), ("ated", "at"),
    ("ate", "at"), ("ional", ""), ("ies", "y"), ("ings", ""), ("ing", ""), ("ions", ""), ("ion", ""),
    ("ally", ""), ("al", ""), ("ers", ""), ("er", ""), ("ed", ""), ("ly", ""), ("es", ""), ("s", ""),
    ("e", ""),
)  # fmt: skip


def _stem(word: str) -> str:
    for suffix, replacement in _SUFFIXES:
        if word.endswith(suffix) and len(word) - len(suffix) >= 3 and not word.endswith("ss"):
            return word[: len(word) - len(suffix)] + replacement
    return word


def _terms(text: str) -> list[str]:
    """Return the stems of a text and its pairs of neighbours: large kernel is more than large and kernel."""
    words = [_stem(word) for word in re.findall(r"[a-z0-9]+", text.lower()) if word not in _STOP]
    return words + [f"{a} {b}" for a, b in itertools.pairwise(words)]


def _bag(record: Record) -> Counter[str]:
    bag: Counter[str] = Counter({record.arxiv: 1, str(record.number): 1})
    for field, weight in _WEIGHTS.items():
        value = getattr(record, field)
        for text in value if isinstance(value, tuple) else [value]:
            for term in _terms(text):
                bag[term] += weight
    return bag


def _count(bag: Counter[str], term: str) -> float:
    """Return how often a record has a term; a longer word that begins with it (mobilenet) counts half."""
    if " " in term or len(term) < 4:
        return bag[term]
    return bag[term] + 0.5 * sum(
        n for word, n in bag.items() if word.startswith(term) and word.isalnum() and word != term
    )


def search(query: str, records: Sequence[Record]) -> list[tuple[Record, float]]:
    r"""Return the records that match a query and their scores, the best first.

    A record's score is the sum over terms t of the query of

    .. math:: \log\frac{N + 1}{n_t + 0.5} \cdot \frac{f_t (k_1 + 1)}{f_t + k_1 (1 - b + b\, l / \bar l)}

    with :math:`n_t` of N records holding t, :math:`f_t` its weighted count and l the record's length. A
    record whose slug is the query comes first.
    """
    bags = [_bag(record) for record in records]
    lengths = [bag.total() for bag in bags]
    mean = sum(lengths) / max(1, len(bags))
    scores = [0.0] * len(bags)
    for term in dict.fromkeys([*_terms(query), *re.findall(r"\d{4}\.\d{4,5}", query)]):
        counts = [_count(bag, term) for bag in bags]
        rarity = math.log((len(bags) + 1) / (sum(map(bool, counts)) + 0.5))
        for index, count in enumerate(counts):
            scores[index] += (
                rarity * count * (_K1 + 1) / (count + _K1 * (1 - _B + _B * lengths[index] / mean))
            )
    found = [(record, score) for record, score in zip(records, scores, strict=True) if score > 0]
    return sorted(found, key=lambda hit: (hit[0].slug != query.strip().lower(), -hit[1], hit[0].number))

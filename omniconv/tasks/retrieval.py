"""Retrieval: rankings of a gallery by descriptors, and how good they are.

The protocols are those of Revisited Oxford and Paris, Radenovic et al., https://arxiv.org/abs/1803.11285.
"""

from typing import Literal

import numpy as np

from omniconv.data.revisited import Query

__all__ = ["average_precision", "rank_one", "ranking", "revisited_map"]

Protocol = Literal["easy", "medium", "hard"]


def ranking(queries: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """Return (Q, G): for every query the gallery's indices, most similar first.

    Args:
        queries: descriptors (Q, C); their directions count, not their lengths.
        gallery: descriptors (G, C).
    """
    units = [x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (queries, gallery)]
    return np.argsort(-(units[0] @ units[1].T), axis=1, kind="stable")


def rank_one(order: np.ndarray, query_ids: np.ndarray, gallery_ids: np.ndarray) -> float:
    """Return the share of queries whose first hit has their identity."""
    return float((gallery_ids[order[:, 0]] == query_ids).mean())


def average_precision(order: np.ndarray, right: np.ndarray, junk: np.ndarray | None = None) -> float:
    """Return the area under precision over recall, by the trapezoidal rule, as in the benchmark's code.

    Args:
        order: a ranking of the gallery.
        right: indices of what should be found; NaN is returned where there is nothing.
        junk: indices that are taken out of the ranking.
    """
    if len(right) == 0:
        return float("nan")
    if junk is not None:
        order = order[~np.isin(order, junk)]
    places = np.flatnonzero(np.isin(order, right))
    found = np.arange(len(places))
    before = np.divide(found, places, out=np.ones(len(places)), where=places > 0)
    after = (found + 1) / (places + 1)
    return float((before + after).sum() / (2 * len(right)))


def revisited_map(order: np.ndarray, queries: tuple[Query, ...], protocol: Protocol = "medium") -> float:
    """Return the mean average precision of a benchmark, over the queries that have something to find.

    "easy" looks for easy images and takes hard ones as junk, "hard" the other way round; "medium" looks for both.

    Args:
        order: (Q, G), the ranking of the gallery for every query.
        queries: the ground truth.
        protocol: "easy", "medium" or "hard".
    """
    scores = []
    for row, query in zip(order, queries, strict=True):
        right = {"easy": query.easy, "hard": query.hard, "medium": query.easy + query.hard}[protocol]
        junk = query.junk + {"easy": query.hard, "hard": query.easy, "medium": ()}[protocol]
        scores.append(average_precision(row, np.array(right), np.array(junk)))
    return float(np.nanmean(scores))

import pytest

from omniconv.papers.records import load_records
from omniconv.papers.search import search


def _slugs(query, count=None):
    return [record.slug for record, _ in search(query, load_records())][:count]


@pytest.mark.parametrize("query", ["large kernel", "Large Kernels", "large-kernel"])
def test_the_large_kernel_papers_come_first(query):
    about = {
        record.slug
        for record in load_records()
        if any("large kernel" in text.lower().replace("-", " ") for text in (record.title, *record.keywords))
    }
    assert len(about) >= 8
    assert set(_slugs(query, len(about))) == about
    assert set(_slugs(query, 2)) == {"unireplknet", "unireplknet_universal"}, "those with it in the title"


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("convnext", "convnext"),
        ("squeeze and excitation", "senet"),
        ("squeezing excitations", "senet"),
        ("2201.03545", "convnext"),
        ("inverted residual bottleneck", "mobilenetv2"),
        ("mobile", "mobilenetv2"),
        ("class activation map", "eigen_cam"),
        ("global magnitude pruning", "global_mp"),
    ],
)
def test_a_query_finds_its_paper(query, first):
    assert first in _slugs(query, 3)


def test_british_and_american_spelling_find_the_same():
    assert _slugs("quantisation") == _slugs("quantization") != []


def test_order_is_by_score_and_nothing_matches_nonsense():
    scores = [score for _, score in search("graph convolution", load_records())]
    assert scores == sorted(scores, reverse=True)
    assert _slugs("zzzzqqq") == _slugs("") == _slugs("of the") == []
    assert search("kernel", ()) == []

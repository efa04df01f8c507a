"""The range coder against intervals of unbounded integers, against its compiled form and against hostile bytes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omniconv.ops.range_coder import CodingTables, api, decode, encode, make_tables

_INTEGERS = np.arange(-20, 21)
_MASS = np.stack([np.exp(-np.abs(_INTEGERS - m) / s) for m, s in ((0, 0.05), (3, 1.0), (-9, 9.0))])
TABLES = make_tables(_MASS / _MASS.sum(1, keepdims=True) / 1.0001, -20)
NUMBER = st.one_of(st.integers(-25, 25), st.integers(-(2**31), 2**31 - 1))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(NUMBER, st.integers(0, 2)), max_size=60))
def test_round_trip(pairs):
    numbers, rows = (np.array([pair[k] for pair in pairs], np.int64) for k in (0, 1))
    assert (decode(encode(numbers, rows, TABLES), rows, TABLES) == numbers).all()


def test_a_message_is_a_number_inside_the_interval_of_unbounded_integers():
    random = np.random.default_rng(0)
    rows = random.integers(0, 3, 200)
    numbers = random.integers(-20, 21, 200)
    low, span, scale = 0, 1 << 48, 48

    def narrow(start, width):
        nonlocal low, span, scale
        low, span = low + (span >> 16) * start, (span >> 16) * width
        while span < 1 << 40:
            low, span, scale = low << 8, span << 8, scale + 8

    for number, row in zip(numbers.tolist(), rows, strict=True):
        cdf, last = TABLES.cdfs[row].tolist(), int(TABLES.sizes[row]) - 1
        at = number - int(TABLES.lowest[row])
        at = at if 0 <= at < last else last
        narrow(cdf[at], cdf[at + 1] - cdf[at])
        if at == last:
            narrow((number + (1 << 31)) >> 16, 1)
            narrow((number + (1 << 31)) & 0xFFFF, 1)
    message = encode(numbers, rows, TABLES)
    value = int.from_bytes(message) << (scale - 8 * len(message))
    assert low <= value < low + span


def test_carries_run_back_through_bytes_of_255():
    # The last of 2^16 equal parts, again and again, is 255 255 255 ...; one step further up makes all of them carry.
    tables = CodingTables(
        np.array([[0, 65535, 65536, 65536], [0, 1, 65535, 65536]]), np.array([2, 3]), np.zeros(2)
    )
    for size in (1, 2, 9, 40):
        for last in (0, 1):
            rows, numbers = np.ones(size, np.int64), np.full(size, 1)
            rows[-1], numbers[-1] = 0, last
            assert (decode(encode(numbers, rows, tables), rows, tables) == numbers).all()


def test_compiled_and_plain_agree(monkeypatch):
    pytest.importorskip("numba")
    random = np.random.default_rng(1)
    rows = random.integers(0, 3, 3000)
    numbers = random.integers(-12, 30, 3000)
    junk = random.bytes(200)
    compiled = encode(numbers, rows, TABLES), decode(junk, rows, TABLES)
    monkeypatch.setattr(api, "HAS_NUMBA", False)
    assert encode(numbers, rows, TABLES) == compiled[0]
    assert (decode(junk, rows, TABLES) == compiled[1]).all()


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=40))
def test_any_bytes_decode_to_some_numbers(message):
    assert decode(message, np.arange(30) % 3, TABLES).shape == (30,)


def test_size_is_the_entropy():
    random = np.random.default_rng(2)
    mass = _MASS[1] / _MASS[1].sum()
    numbers = random.choice(_INTEGERS, 5000, p=mass)
    bits = -np.log2(mass[numbers + 20]).sum()
    assert bits / 8 - 1 <= len(encode(numbers, np.ones(5000, np.int64), TABLES)) <= 1.001 * bits / 8 + 2
    # What is nearly certain costs nearly nothing.
    assert len(encode(np.zeros(500), np.zeros(500, np.int64), TABLES)) <= 2


def test_tables():
    widths = np.diff(TABLES.cdfs[0, : TABLES.sizes[0] + 1])
    assert widths.sum() == 1 << 16
    assert (widths >= 1).all()
    with pytest.raises(ValueError, match="sum to at most 1"):
        make_tables(np.array([[0.9, 0.9]]), 0)
    with pytest.raises(ValueError, match="must rise from 0"):
        CodingTables(np.array([[0, 5, 5, 65536]]), np.array([3]), np.array([0]))
    with pytest.raises(ValueError, match="fit into 32 bits"):
        encode([1 << 31], np.array([0]), TABLES)
    with pytest.raises(ValueError, match="equally long"):
        encode([1, 2], np.array([0]), TABLES)

"""Gathered rows are bit by bit those of the table; requests are those of a simulation lane by lane."""

import pytest
import torch

from omniconv.ops.gather_host import count_requests, gather_host


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8]
)
@pytest.mark.parametrize("shape", [(11, 1), (23, 100), (7, 3, 5), (9,)])
def test_rows_are_those_of_the_table(dtype, shape):
    table = (100 * torch.randn(shape)).to(dtype)
    index = torch.randint(len(table), (17,))
    for rows in (index, index.int()):
        assert torch.equal(gather_host(table, rows), torch.stack([table[i] for i in index.tolist()]))


def test_a_batch_for_another_device_keeps_its_shape_and_type():
    batch = gather_host(torch.ones(5, 3, dtype=torch.float16), torch.tensor([4, 4]), device="meta")
    assert (batch.device.type, batch.shape, batch.dtype) == ("meta", (2, 3), torch.float16)


def simulate(index, width, item, order, start):
    """Count the stretches that the lanes of every warp touch, one lane after another."""
    line = 128 // item
    total = 0
    for row in index:
        first = start // item + row * width
        if order == "aligned":
            lanes = [*[None] * (first % line), *range(first, first + width)]
        elif order == "shifted":
            boundary = -first % line % width
            lanes = [*range(first + boundary, first + width), *range(first, first + boundary)]
        else:
            lanes = list(range(first, first + width))
        for warp in range(0, len(lanes), 32):
            total += len({lane // line for lane in lanes[warp : warp + 32] if lane is not None})
    return total


@pytest.mark.parametrize("order", ["plain", "shifted", "aligned"])
@pytest.mark.parametrize(
    ("width", "item", "start"), [(100, 4, 0), (129, 4, 12), (32, 4, 0), (7, 4, 4), (75, 2, 6), (33, 8, 0)]
)
def test_requests_are_those_of_a_simulation(order, width, item, start):
    index = [5, 0, 3, 3, 17, 8, 1]
    count = count_requests(torch.tensor(index), width, item, order=order, start=start)
    assert count == simulate(index, width, item, order, start)


def test_rows_of_whole_stretches_need_no_care():
    index = torch.arange(50)
    assert {count_requests(index, 64, 4, order=order) for order in ("plain", "shifted", "aligned")} == {100}


def test_wrong_calls_are_refused():
    with pytest.raises(ValueError, match="table must be in host memory: got one on meta"):
        gather_host(torch.ones(3, 2, device="meta"), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"index must be \(B,\) of int32 or int64: got \(1,\) torch.float32"):
        gather_host(torch.ones(3, 2), torch.ones(1))
    with pytest.raises(ValueError, match="item_bytes must divide 128 and start: got 12 and 0"):
        count_requests(torch.tensor([0]), 5, 12)
    with pytest.raises(ValueError, match="order must be 'plain', 'shifted' or 'aligned': got 'circular'"):
        count_requests(torch.tensor([0]), 5, 4, order="circular")

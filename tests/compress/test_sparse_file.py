import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from omniconv.compress.sparse_file import load_sparse, save_sparse
from omniconv.core.errors import DataError, RefusedError
from omniconv.core.weights import load_weights, read_header, save_weights

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
DTYPES += (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.bool)


def sparse(*shape: int, density: float = 0.1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    kept = torch.rand(shape) < density
    return torch.where(kept, torch.randn(shape) * 10, torch.zeros(())).to(dtype)


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert a[name].shape == b[name].shape
        x, y = (t[name].contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
        assert torch.equal(x, y), name


def test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    tensors = {str(dtype): sparse(20, 30, 3, dtype=dtype) for dtype in DTYPES}
    tensors |= {
        "dense": torch.randn(50, 50),
        "zeros": torch.zeros(3000),
        "scalar": torch.tensor(0.0),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 5),
        "permuted": sparse(8, 9, 10, 11).to(memory_format=torch.channels_last),
    }
    header = {"architecture": "resnet18", "classes": ["a", "b"]}
    save_sparse(tmp_path / "sparse.safetensors", tensors, header)
    for load in (load_weights, load_sparse):
        loaded, read = load(tmp_path / "sparse.safetensors")
        assert_same(loaded, tensors)
        assert read == header
    assert read_header(tmp_path / "sparse.safetensors") == header


@settings(deadline=None, max_examples=60)
@given(
    tensors=st.dictionaries(
        st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12).filter(
            lambda s: s != "__metadata__"
        ),
        st.tuples(st.integers(0, 3000), st.floats(0, 1), st.sampled_from(DTYPES)),
        max_size=4,
    )
)
def test_any_tensors_come_back_from_a_file_no_larger_than_the_plain_one(tensors, tmp_path_factory):
    torch.manual_seed(0)
    made = {name: sparse(n, density=density, dtype=dtype) for name, (n, density, dtype) in tensors.items()}
    folder = tmp_path_factory.mktemp("sparse")
    save_sparse(folder / "sparse.safetensors", made)
    save_weights(folder / "plain.safetensors", made)
    loaded, _ = load_weights(folder / "sparse.safetensors")
    assert_same(loaded, made)
    sizes = [(folder / f"{kind}.safetensors").stat().st_size for kind in ("sparse", "plain")]
    assert sizes[0] <= sizes[1]


def test_ninety_percent_zeros_make_a_file_seven_times_smaller(tmp_path):
    torch.manual_seed(0)
    weights = {f"layer{i}.weight": torch.randn(64, 64, 3, 3) for i in range(4)}
    for weight in weights.values():
        weight.view(-1)[torch.randperm(weight.numel())[: round(0.9 * weight.numel())]] = 0
    save_weights(tmp_path / "plain.safetensors", weights)
    save_sparse(tmp_path / "sparse.safetensors", weights)
    plain, packed = ((tmp_path / f"{kind}.safetensors").stat().st_size for kind in ("plain", "sparse"))
    assert plain / packed > 7


def test_a_file_without_zeros_is_the_plain_file(tmp_path):
    torch.manual_seed(0)
    tensors = {"a": torch.randn(400), "b": torch.tensor(0)}
    save_weights(tmp_path / "plain.safetensors", tensors, {"x": 1})
    save_sparse(tmp_path / "sparse.safetensors", tensors, {"x": 1})
    assert (tmp_path / "plain.safetensors").read_bytes() == (tmp_path / "sparse.safetensors").read_bytes()


def test_a_name_that_a_part_would_need_leaves_the_tensor_plain(tmp_path):
    tensors = {"a": torch.zeros(5000), "a#mask": torch.ones(3), "a#values": torch.zeros(5000)}
    save_sparse(tmp_path / "w.safetensors", tensors)
    assert_same(load_weights(tmp_path / "w.safetensors")[0], tensors)


def test_tensors_are_left_as_they_were(tmp_path):
    tensors = {"a": torch.zeros(5000)}
    save_sparse(tmp_path / "w.safetensors", tensors)
    assert list(tensors) == ["a"]


def test_what_is_not_finite_is_refused(tmp_path):
    with pytest.raises(RefusedError, match="a is not finite"):
        save_sparse(tmp_path / "w.safetensors", {"a": torch.tensor([float("nan")])})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "listed",
    [
        "{",
        "[]",
        '{"a": 3}',
        '{"a": [-5000]}',
        '{"a": [50.5]}',
        '{"a": [true]}',
        '{"a": [50]}',
        '{"b": [5000]}',
        '{"a": []}',
    ],
)
def test_a_damaged_list_of_packed_tensors_is_named(tmp_path, listed):
    file = tmp_path / "w.safetensors"
    save_sparse(file, {"a": torch.zeros(5000)})
    save_file(load_file(file), file, metadata={"omniconv": "{}", "omniconv.packed": listed})
    with pytest.raises(DataError, match=r"w\.safetensors.*take another copy"):
        load_weights(file)


def test_damaged_parts_are_named(tmp_path):
    file = tmp_path / "w.safetensors"
    save_sparse(file, {"a": torch.arange(5000) // 4900})
    parts = load_file(file)
    parts["a#values"] = parts["a#values"][:-1]
    save_file(parts, file, metadata={"omniconv.packed": json.dumps({"a": [5000]})})
    with pytest.raises(DataError, match="a cannot be unpacked"):
        load_weights(file)
    del parts["a#values"]
    save_file(parts, file, metadata={"omniconv.packed": json.dumps({"a": [5000]})})
    with pytest.raises(DataError, match="a cannot be unpacked"):
        load_weights(file)

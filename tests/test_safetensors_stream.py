"""The writer that holds one tensor at a time: what safetensors itself reads back from it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from higgs_lab.safetensors_stream import NAMES, write_safetensors

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def test_streamed_files_read_back_through_safetensors(tmp_path):
    """Every dtype, an empty tensor, a scalar and a view that is not contiguous."""
    tensors = {str(d): (torch.randn(3, 5) * 9).to(d) for d in DTYPES}
    tensors |= {"empty": torch.zeros(0, 4), "scalar": torch.tensor(3.0), "ü": torch.ones(2)}
    tensors["view"] = torch.arange(12.0).reshape(3, 4).T
    specs = {k: (NAMES[t.dtype], list(t.shape)) for k, t in tensors.items()}
    write_safetensors(tmp_path / "a.safetensors", specs, tensors.items(), {"format": "pt"})
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert read[key].dtype == tensor.dtype and torch.equal(read[key], tensor), key


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([("b", torch.ones(2))], "got b .* expected a"),
        ([("a", torch.ones(3))], r"\[3\].*\[2\]"),
        ([("a", torch.ones(2).half())], "float16.*F32"),
        ([("a", torch.ones(2))], "no tensor came for 'b'"),
        (
            [("a", torch.ones(2)), ("b", torch.ones(2)), ("c", torch.ones(2))],
            "got c .* expected no more",
        ),
    ],
)
def test_the_writer_takes_only_what_was_announced(tmp_path, given, message):
    specs = {"a": ("F32", [2]), "b": ("F32", [2])}
    with pytest.raises(ValueError, match=message):
        write_safetensors(tmp_path / "a.safetensors", specs, given)

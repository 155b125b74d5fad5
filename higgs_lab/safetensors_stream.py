"""A safetensors writer that holds one tensor at a time.

`safetensors.torch.save_file` needs every tensor of a file in memory, and copies each to bytes: 19
GB for the one 9.3 GB shard of the 4B checkpoint. The format is a length, a JSON header and raw
little-endian bytes (https://github.com/huggingface/safetensors, README "Format").
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_safetensors(
    path: str | Path,
    specs: dict[str, tuple[str, list[int]]],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write `tensors` in the order of `specs` (key -> dtype name, shape).

    Raises ValueError when a tensor comes out of order or is not what its spec says. The caller
    makes it atomic.
    """
    header: dict = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for key, (dtype, shape) in specs.items():
        size = math.prod(shape) * DTYPES[dtype].itemsize
        span = [offset, offset + size]
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": span}
        offset += size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    expected = iter(specs.items())
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little"))
        file.write(raw)
        for key, tensor in tensors:
            want, (dtype, shape) = next(expected, ("no more tensors", ("", [])))
            if key != want or NAMES[tensor.dtype] != dtype or list(tensor.shape) != list(shape):
                raise ValueError(
                    f"{path}: got {key} {tensor.dtype} {list(tensor.shape)}, "
                    f"expected {want} {dtype} {list(shape)}"
                )
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            if flat.numel():
                file.write(memoryview(flat.view(torch.uint8).numpy()))
        if (left := next(expected, None)) is not None:
            raise ValueError(f"{path}: no tensor came for {left[0]!r}")

"""A safetensors reader and writer that hold one tensor at a time.

`safetensors.torch.save_file` needs every tensor of a file in memory, and copies each to bytes: 19
GB for the one 9.3 GB shard of the 4B checkpoint. `safe_open` maps the file, and what was read of a
map counts as the process's memory until the kernel takes it back. The format is a length, a JSON
header and raw little-endian bytes (https://github.com/huggingface/safetensors, README "Format").
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


class SafetensorsReader:
    """Tensors of one file, each read into memory of its own. Close it, or use it in `with`."""

    def __init__(self, path: str | Path):
        self._file = open(path, "rb")
        size = int.from_bytes(self._file.read(8), "little")
        self._header = json.loads(self._file.read(size))
        self._begin = 8 + size

    def read(self, key: str) -> Tensor:
        entry = self._header[key]
        start, end = entry["data_offsets"]
        raw = torch.empty(end - start, dtype=torch.uint8)
        self._file.seek(self._begin + start)
        if raw.numel() and self._file.readinto(memoryview(raw.numpy())) != len(raw):
            raise ValueError(f"{self._file.name} ends within {key!r}: the file is cut")
        return raw.view(DTYPES[entry["dtype"]]).reshape(entry["shape"])

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(self, *exc) -> None:
        self.close()


class SafetensorsWriter:
    """One file, its tensors written in the order of `specs` (key -> dtype name, shape).

    Raises ValueError when a tensor comes out of order or is not what its spec says, and at the end
    of the `with` block when one did not come. The caller makes it atomic.
    """

    def __init__(
        self,
        path: str | Path,
        specs: dict[str, tuple[str, list[int]]],
        metadata: dict[str, str] | None = None,
    ):
        self.path, self._expected = path, iter(specs.items())
        header: dict = {"__metadata__": metadata} if metadata else {}
        offset = 0
        for key, (dtype, shape) in specs.items():
            size = math.prod(shape) * DTYPES[dtype].itemsize
            span = [offset, offset + size]
            header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": span}
            offset += size
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        self._file = open(path, "wb")
        self._file.write(len(raw).to_bytes(8, "little"))
        self._file.write(raw)

    def write(self, key: str, tensor: Tensor) -> None:
        want, (dtype, shape) = next(self._expected, ("no more tensors", ("", [])))
        if key != want or NAMES[tensor.dtype] != dtype or list(tensor.shape) != list(shape):
            raise ValueError(
                f"{self.path}: got {key} {tensor.dtype} {list(tensor.shape)}, "
                f"expected {want} {dtype} {list(shape)}"
            )
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            self._file.write(memoryview(flat.view(torch.uint8).numpy()))

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind, *exc) -> None:
        self._file.close()
        if kind is None and (left := next(self._expected, None)) is not None:
            raise ValueError(f"{self.path}: no tensor came for {left[0]!r}")


def write_safetensors(
    path: str | Path,
    specs: dict[str, tuple[str, list[int]]],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write `tensors` to one file, see `SafetensorsWriter`."""
    with SafetensorsWriter(path, specs, metadata) as writer:
        for key, tensor in tensors:
            writer.write(key, tensor)

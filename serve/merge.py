"""Put an adapter or another checkpoint into weights one tensor at a time, in little memory.

W + scale * B @ A in fp32, one cast to the stored dtype at the end; no model is built. `higgs_lab.
adapter.merge_lora` does the same to a model in memory; the tests hold the two against each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from serve.sources import Source

# Largest relative error of a merged layer's product with a random vector. Rounding errs by up to
# 2^-9 of a weight in bf16, and the errors of a sum average out: more means that something is wrong.
MAX_OUTPUT_ERROR = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}
BLOCK_ROWS = 8192  # the text table of the 4B model, whole in fp32 and five times over, is 8 GB


@dataclass
class MergeFigures:
    """How true a merge is, over all merged tensors."""

    keys: set[str] = field(default_factory=set)
    changed: set[str] = field(default_factory=set)  # those that differ from the base after the cast
    output_error: float = 0.0  # largest relative error of a product with a random vector
    delta_norm2: float = 0.0
    kept_dot: float = 0.0

    @property
    def kept(self) -> float:
        """Share of the adapter's change that survived the cast: 1 is all of it, 0 none."""
        return self.kept_dot / self.delta_norm2 if self.delta_norm2 > 0 else 0.0

    def as_dict(self) -> dict[str, float]:
        return {
            "tensors": len(self.keys),
            "changed": len(self.changed),
            "output_error": self.output_error,
            "delta_kept": self.kept,
        }


@torch.no_grad()
def merged(source: Source, key: str, weight: Tensor, figures: MergeFigures) -> Tensor:
    """The stored weight of `key` as `source` wants it, in its own dtype; adds to `figures`.

    Raises ValueError when shapes do not fit, the result is not finite, or its product with a random
    vector is off by more than rounding explains.
    """
    if key not in source.keys:
        return weight
    if (shape := source.shape(key)) != tuple(weight.shape):
        raise ValueError(
            f"{source.kind} {source.path} was made for another base: {key} is "
            f"{tuple(weight.shape)} there, {shape} in the {source.kind} ({source.names.get(key)})"
        )
    result = torch.empty_like(weight)
    probe = torch.randn(weight.shape[-1], generator=torch.Generator().manual_seed(0))
    error2 = want2 = delta2 = dot = 0.0
    for start in range(0, len(weight), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        old = weight[rows].float()
        wanted = source.wanted(key, old, rows)
        result[rows] = wanted.to(weight.dtype)
        back = result[rows].float()
        off = back - wanted
        error2 += _sum2(off @ probe if off.ndim > 1 else off)
        want2 += _sum2(wanted @ probe if off.ndim > 1 else wanted)
        delta = wanted - old
        delta2 += _sum2(delta)
        dot += float(((back - old) * delta).sum())
    if not math.isfinite(delta2) or not math.isfinite(error2):
        raise ValueError(
            f"{source.kind} {source.path}: merging {key} gives NaN or infinite weights"
        )
    if key in figures.keys:  # asked for again, for its tied copy
        return result
    error = math.sqrt(error2 / max(want2, 1e-60))
    allowed = MAX_OUTPUT_ERROR.get(weight.dtype, 2**-8)
    if error > allowed:
        raise ValueError(f"merge parity failed: {key} is off by {error:.2g}, allowed {allowed:.2g}")
    figures.keys.add(key)
    if not torch.equal(result, weight):
        figures.changed.add(key)
    figures.output_error = max(figures.output_error, error)
    figures.delta_norm2 += delta2
    figures.kept_dot += dot
    return result


def _sum2(values: Tensor) -> float:
    return float(values.square().sum())

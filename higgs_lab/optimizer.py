"""AdamW, with its two moments in fp32 or in 8 bits (bitsandbytes)."""

from __future__ import annotations

from collections.abc import Iterable

import torch

OPTIMIZERS = ("adamw", "adamw8bit")


def make_optimizer(
    parameters: Iterable[torch.nn.Parameter], name: str, lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """name: one of OPTIMIZERS; adamw8bit takes 2 bytes a weight instead of 8.

    Its moments are quantised in blocks of 256; tensors below 4,096 weights keep fp32 ones.
    Raises ImportError when bitsandbytes is not installed.
    """
    parameters = list(parameters)
    options = dict(lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay)
    if name == "adamw":
        fused = parameters[0].device.type == "cuda"
        return torch.optim.AdamW(parameters, fused=fused, **options)
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise ImportError(
            "optimizer=adamw8bit needs bitsandbytes (Linux): pip install 'higgs_lab[qlora]', in a "
            "clone pip install -e '.[qlora]'; or use optimizer=adamw"
        ) from error
    return bnb.optim.AdamW8bit(parameters, **options)

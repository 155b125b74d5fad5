"""A frozen base in 4 bits (NF4) for QLoRA; bitsandbytes does the work.

Only the linear layers of the blocks are quantised: 7.3 of the 4B model's 8.1 GB become 1.9. The
tables stay as they are, since the audio table is also the head. The adapter is an ordinary LoRA,
merged into the unquantised base on export.
"""

from __future__ import annotations

import torch
from torch import nn

from higgs_lab.talker import Talker


def quantize_nf4(talker: Talker, device: torch.device | str) -> Talker:
    """Replace the blocks' linear layers by 4-bit ones on `device`, one by one; moves the talker.

    Load the talker on the CPU first: then the whole of it never stands in the card's memory.
    Raises ImportError when bitsandbytes is not installed.
    """
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise ImportError(
            "method=qlora needs bitsandbytes (Linux): pip install 'higgs_lab[qlora]', in a clone "
            "pip install -e '.[qlora]'; or use method=lora"
        ) from error
    for layer in talker.model.layers:
        found = [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
        for name in found:
            parent, _, child = name.rpartition(".")
            full = layer.get_submodule(name)
            small = bnb.nn.Linear4bit(
                full.in_features,
                full.out_features,
                bias=False,
                compute_dtype=full.weight.dtype,
                quant_type="nf4",
                device="meta",
            )
            small.weight = bnb.nn.Params4bit(
                full.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
            )
            setattr(layer.get_submodule(parent), child, small.to(device))
    talker.is_loaded_in_4bit = True  # PEFT asks for it
    return talker.to(device)

"""The frozen text table in the host's memory, 0.72 GiB that a LoRA run needs no card for.

Its rows are looked up while a pack is made (`Prefetch`) and travel with it: 20 MB for 4,096
positions of the 4B shape, in bf16.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from higgs_lab.talker import Talker


class HostTable(nn.Module):
    """An embedding that is no parameter: no `.to()`, optimiser or data-parallel wrapper sees it."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = weight.detach().cpu()  # [N, D]

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., D] where the ids are; ids on a GPU are waited for."""
        return F.embedding(ids.cpu(), self.weight).to(ids.device)


def text_on_host(talker: Talker) -> HostTable:
    """Move the text table off the talker's device; such a talker can no longer be saved."""
    talker.model.embed_tokens = HostTable(talker.model.embed_tokens.weight)
    return talker.model.embed_tokens

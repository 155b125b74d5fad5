"""The arithmetic of cost against what is counted on real modules."""

from __future__ import annotations

import pytest
import torch

from higgs_lab.adapter import attach_lora
from higgs_lab.cost import RESERVE_GIB, SHAPE_4B, Shape, most_positions, training_gib
from tests.tiny import TEXT_CONFIG_4B, meta_talker, tiny_talker


def test_weights_are_those_of_the_modules():
    talker = meta_talker(TEXT_CONFIG_4B)
    assert Shape.of(talker.config, len(talker.codebooks.weight)) == SHAPE_4B
    linears = [m for m in talker.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert SHAPE_4B.block_weights == sum(m.weight.numel() for m in linears)
    assert SHAPE_4B.table_weights == talker.codebooks.weight.numel()
    small = attach_lora(tiny_talker(), rank=3)
    shape = Shape.of(small.base_model.model.config, 8 * 1026)
    lora = sum(p.numel() for p in small.parameters() if p.requires_grad)
    assert shape.lora_weights(3) == lora
    # issue of this project: 4 * 3.63e9 a position for LoRA, 6 for full
    assert abs(SHAPE_4B.useful_flops("lora") / (4 * 3.63e9) - 1) < 0.002
    assert SHAPE_4B.useful_flops("full") == 1.5 * SHAPE_4B.useful_flops("lora")


def test_memory_falls_with_checkpointing_and_rises_with_all_else():
    def total(method="lora", rank=16, positions=8192, checkpointing="none"):
        return training_gib(SHAPE_4B, method, rank, positions, checkpointing)["total"]

    assert total() > total(checkpointing="selective") > total(checkpointing="full")
    assert total(positions=4096) < total() < total(rank=64) < total("full")
    assert total("qlora", checkpointing="full") < total(checkpointing="full")
    # a table that lies on the host costs nothing; the issue of this project asks for 9.9 and 6.5
    assert total(positions=4096, checkpointing="full") - RESERVE_GIB < 9.9
    assert total("qlora", positions=4096, checkpointing="full") - RESERVE_GIB < 6.5
    fits = most_positions(SHAPE_4B, "lora", 16, "full", 24.0)
    assert total(positions=fits, checkpointing="full") <= 24.0
    assert total(positions=fits + 512, checkpointing="full") > 24.0
    assert most_positions(SHAPE_4B, "full", 16, "full", 24.0) == 0
    eight = training_gib(SHAPE_4B, "full", 0, 8192, "full", "adamw8bit")["total"]
    assert total("full", checkpointing="full") - eight > 20


@pytest.mark.parametrize(
    ("method", "checkpointing", "positions", "measured"),
    [
        ("qlora", "full", 2048, 3.00),
        ("qlora", "full", 4096, 3.73),
        ("qlora", "full", 8192, 5.21),
        ("qlora", "full", 16384, 8.18),
        ("lora", "full", 4096, 9.59),
        ("lora", "full", 16384, 15.99),
        ("lora", "selective", 8192, 20.58),
        ("lora", "none", 4096, 19.18),
        ("lora", "none", 16384, 54.32),
    ],
)
def test_the_sum_is_near_what_a_card_needed(method, checkpointing, positions, measured):
    """Peaks of tensors on an H100 (docs/performance.md), where no reserve counts."""
    need = training_gib(SHAPE_4B, method, 16, positions, checkpointing)["total"] - RESERVE_GIB
    assert abs(need / measured - 1) < 0.06

"""What a training step costs, by arithmetic: operations and memory; and a card's peak, measured.

    python -m higgs_lab.cost            # tables for the 4B shape: what fits 8 to 141 GB

Useful operations are 4 a weight and position for LoRA (forth, and back to the inputs of a frozen
base), 6 for full fine-tuning; what is computed again does not count. Memory is added up from what
`fused.py` keeps; the allocator's waste and the CUDA context are in RESERVE_GIB.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

GIB = 1 << 30
RESERVE_GIB = 0.8


@dataclass(frozen=True)
class Shape:
    """The sizes of a talker that its cost follows from."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    text_ids: int
    table_rows: int  # K * V

    @classmethod
    def of(cls, config, table_rows: int) -> Shape:
        """config: a Qwen3Config."""
        return cls(
            config.num_hidden_layers, config.hidden_size, config.num_attention_heads,
            config.num_key_value_heads, config.head_dim, config.intermediate_size,
            config.vocab_size, table_rows,
        )  # fmt: skip

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def attended(self) -> int:
        return self.heads * self.head_dim

    @property
    def block_weights(self) -> int:
        return self.layers * self.hidden * (self.qkv + self.attended + 3 * self.feed_forward)

    @property
    def table_weights(self) -> int:
        return self.table_rows * self.hidden

    def lora_weights(self, rank: int) -> int:
        """On all linear layers."""
        D, F = self.hidden, self.feed_forward
        kv = self.kv_heads * self.head_dim
        sizes = [(D, self.attended), (D, kv), (D, kv), (self.attended, D), (D, F), (D, F), (F, D)]
        return self.layers * rank * sum(a + b for a, b in sizes)

    def useful_flops(self, method: str) -> int:
        """Of one position."""
        return (6 if method == "full" else 4) * self.block_weights


SHAPE_4B = Shape(36, 2560, 32, 8, 128, 9728, 151936, 8 * 1026)


def matrix_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a large product of random matrices, the peak that shares are of.

    Measured and not looked up: a data sheet's figure is reached by no card under its power limit.
    """
    size, times = (8192, 20) if device.type == "cuda" else (1024, 4)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(4):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begun = time.perf_counter()
        for _ in range(times):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, times * 2 * size**3 / (time.perf_counter() - begun) / 1e12)
    return best


def training_gib(
    shape: Shape,
    method: str,
    rank: int,
    positions: int,
    checkpointing: str = "none",
    optimizer: str = "adamw",
) -> dict[str, float]:
    """GiB by part while `positions` are trained in one pack with bf16 products."""
    moments = 8 if optimizer == "adamw" else 2 + 8 / 256  # 8 bits, and a scale of each 256
    D, F = shape.hidden, shape.feed_forward
    if method == "full":
        # fp32 master and gradient, two moments; the bf16 copy that the products use
        tables = shape.text_ids * D + shape.table_weights
        weights = (4 + 2) * shape.block_weights + 4 * tables
        state = (4 + moments) * (shape.block_weights + shape.table_weights)
    else:
        lora = shape.lora_weights(rank)
        base = 2 if method == "lora" else 0.53  # NF4 with doubly quantised scales
        # the text table stays on the host, its rows come with the pack: see working
        weights = base * shape.block_weights + 2 * shape.table_weights + 2 * lora
        state = (8 + moments) * lora
    rotated = (shape.qkv + shape.attended) // 2  # of q and k
    kept = {
        # x, the sum with attention, qkv, q and k rotated, attention, gate and up
        "none": 2 * D + shape.qkv + rotated + shape.attended + 2 * F,
        "selective": 2 * D + shape.qkv + rotated + shape.attended,
        # QLoRA's blocks are modules: what goes into each of them
        "full": D if method == "qlora" else 2 * D,
    }[checkpointing]
    activations = 2 * positions * shape.layers * kept
    # one block on the way back: gate and up, their gradients, two products of them; text
    working = 2 * positions * (6 * F + 5 * D + 2 * shape.qkv) + 10 * 1024 * shape.table_rows
    parts = dict(weights=weights, state=state, activations=activations, working=working)
    found = {name: size / GIB for name, size in parts.items()}
    found["reserve"] = RESERVE_GIB
    return found | {"total": sum(found.values())}


def most_positions(
    shape: Shape,
    method: str,
    rank: int,
    checkpointing: str,
    memory_gib: float,
    optimizer: str = "adamw",
) -> int:
    """The largest pack that fits, in steps of 512; 0: none."""
    step = 512
    fits = 0
    while fits < 64 * step and (
        training_gib(shape, method, rank, fits + step, checkpointing, optimizer)["total"]
        <= memory_gib
    ):
        fits += step
    return fits


def free_gpu_memory(device: torch.device) -> int:
    """Bytes that may still be allocated on a GPU; what torch keeps and does not use is free."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def main() -> None:
    sizes = (2048, 4096, 8192, 16384)
    print("Arithmetic, 4B shape, GiB at a pack of so many positions (bf16 products):\n")
    print("| method | rank | checkpointing | " + " | ".join(map(str, sizes)) + " |")
    print("|---|---|---|" + "---|" * len(sizes))
    rows = [("lora", r, c, "adamw") for r in (8, 16, 64) for c in ("none", "selective", "full")]
    rows += [("qlora", 16, "full", "adamw"), ("full", 0, "selective", "adamw")]
    rows += [("full", 0, "full", "adamw"), ("full", 0, "full", "adamw8bit")]
    for method, rank, checkpointing, optimizer in rows:
        needs = [training_gib(SHAPE_4B, method, rank, n, checkpointing, optimizer) for n in sizes]
        cells = " | ".join(f"{need['total']:.1f}" for need in needs)
        print(f"| {label(method, optimizer)} | {rank or '-'} | {checkpointing} | {cells} |")
    print("\nArithmetic, the largest pack that fits a card of so many GB (rank 16):\n")
    cards = (8, 12, 16, 24, 48, 80, 141)
    print("| method | checkpointing | " + " | ".join(f"{c} GB" for c in cards) + " |")
    print("|---|---|" + "---|" * len(cards))
    for method, checkpointing, optimizer in [(m, c, o) for m, r, c, o in rows if r in (0, 16)]:
        given = SHAPE_4B, method, 16, checkpointing
        fits = [most_positions(*given, 0.95 * c, optimizer) for c in cards]
        cells = " | ".join(str(n) if n else "-" for n in fits)
        print(f"| {label(method, optimizer)} | {checkpointing} | {cells} |")


def label(method: str, optimizer: str) -> str:
    return method if optimizer == "adamw" else f"{method}, {optimizer}"


if __name__ == "__main__":
    main()

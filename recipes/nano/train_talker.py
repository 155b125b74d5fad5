"""Train the nano talker with the library's own Talker, sequences, packing and loss.

    torchrun --nproc_per_node 2 -m recipes.nano.train_talker --data /dev/shm/nano \
        --codec runs/nano/codec.safetensors --out runs/nano --seconds 480

One process per GPU encodes speech into codes while batches are already being made from what is
there; CPU workers draw examples in the three prompt modes and lay them out with `render_example`.
It runs over the library's fused blocks. Time is the budget, as in the other parts.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from higgs_lab.attention import attention_kind, heads_of
from higgs_lab.batches import Batch
from higgs_lab.device import chosen_device
from higgs_lab.fused import fuse
from higgs_lab.loss import LossSums, Targets
from higgs_lab.nano import build
from higgs_lab.nano.packing import TEXT_ROWS
from higgs_lab.talker import Talker, talker_config
from higgs_lab.vocab import Vocab
from recipes.nano.common import Clock, LastGood, atomically, options, ship, state_of
from recipes.nano.talker_data import Examples, encode_in_background

# the packaged table; the native one has its full height
TEXT_CONFIG = build.TEXT_CONFIG | {"vocab_size": TEXT_ROWS}
CODEBOOK_WEIGHTS = (2.5, 1.6, 1.2, 1.0, 0.8, 0.7, 0.6, 0.6)


def nano_vocab() -> Vocab:
    """The family's tokenizer and ids, without building the checkpoint that they belong to."""
    from higgs_lab.nano.tokenizer import write_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        config = json.dumps(build.native_config(TEXT_CONFIG))
        (Path(folder) / "config.json").write_text(config, encoding="utf-8")
        return Vocab.from_pretrained(folder)


def build_talker() -> Talker:
    """In fp32, as it is trained: products use bf16 copies."""
    return Talker(talker_config(TEXT_CONFIG), 8, 1026)


class Packs(IterableDataset):
    """`Examples` with their targets, which workers look up, and the weight of all their cells."""

    def __init__(self, examples: Examples, weights: Tensor):
        self.examples, self.weights = examples, weights

    def __iter__(self) -> Iterator[tuple[Batch, Targets, float]]:
        for batch in self.examples:
            targets = batch.targets(self.weights)
            yield batch, targets, float(targets.supervised.sum(0).float() @ self.weights)


def save(talker: Talker, args: argparse.Namespace) -> None:
    """The fp32 state, and in --ship fp16 in two files: one alone is too large for the way home."""
    from safetensors.torch import save_file

    tensors = {name: value.float() for name, value in state_of(talker).items()}
    atomically(args.out / "talker.safetensors", lambda path: save_file(tensors, path))
    mlp = {name for name in tensors if ".layers." in name and ".mlp." in name}
    ship({name: tensors[name] for name in mlp}, args.ship, "talker-mlp")
    ship({name: tensors[name] for name in set(tensors) - mlp}, args.ship, "talker-rest")


def main(argv: list[str] | None = None) -> None:
    parser = options(__doc__, seconds=480, hours=0, batch=32_768, lr=1.5e-3)
    parser.add_argument("--codec", type=Path, required=True, help="codec.safetensors")
    parser.add_argument("--min-shards", type=int, default=40, help="of codes, to begin with")
    parser.add_argument("--workers", type=int, default=10, help="processes that lay out examples")
    args = parser.parse_args(argv)
    started = time.time()
    args.out.mkdir(parents=True, exist_ok=True)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = chosen_device(args.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    vocab = nano_vocab()
    deadline = started + args.seconds
    # the encoder is a child process with its own CUDA context, so that it never delays a step
    encoder = multiprocessing.get_context("spawn").Process(
        target=encode_in_background,
        args=(args.data, args.codec, device, (rank, world), deadline),
        daemon=True,
    )
    encoder.start()
    while (shards := len(list(args.data.glob("codes-*.json")))) < args.min_shards:
        if not encoder.is_alive() and not shards:
            raise RuntimeError(f"no codes came from {args.data}: see the encoder's error above")
        if not encoder.is_alive():
            break
        time.sleep(0.3)
    print(f"talker: {shards} shards of codes after {time.time() - started:.0f} s", flush=True)
    examples = Examples(args.data, vocab, args.batch, 1000 + rank, started, args.seconds)
    weights = torch.tensor(CODEBOOK_WEIGHTS)
    loader = iter(
        DataLoader(
            Packs(examples, weights / weights.mean()),
            batch_size=None,
            num_workers=args.workers,
            prefetch_factor=4 if args.workers else None,
            multiprocessing_context="fork" if args.workers else None,
        )
    )
    torch.manual_seed(3)
    talker = build_talker()
    if args.init:
        from safetensors.torch import load_file

        talker.load_state_dict(load_file(args.init))
    talker = talker.to(device).train()
    half = device.type == "cuda" or args.bf16
    dtype = torch.bfloat16 if half else torch.float32
    kind = attention_kind("auto", device, dtype, heads_of(talker.config))
    fuse(talker, kind, compile=device.type == "cuda", dtype=dtype)
    optimizer = optimizer_of(talker, args.lr)
    if rank == 0:
        count = sum(p.numel() for p in talker.parameters())
        print(f"talker {count / 1e6:.2f} M parameters, attention {kind}", flush=True)
    args.seconds -= time.time() - started
    clock, seen, waited = Clock(args, warm_steps=400), 0, 0.0
    good = LastGood([talker], [optimizer], clock)
    while agreed(clock.tick(optimizer), device, world):
        asked = time.time()
        pack = next(loader)
        waited += time.time() - asked
        loss, sums, norm = step(talker, optimizer, pack, half, world)
        seen += pack[0].num_documents * world
        if rank == 0 and clock.to_log():
            means = sums.means()
            print(
                f"talker {clock.elapsed:5.0f}s step {clock.step} loss {loss.item():.4f}"
                f" c0 {means['loss_code/0']:.3f} c7 {means['loss_code/7']:.3f} "
                f"eoc0 {means['loss_eoc/0']:.3f} norm {norm.item():.2f} examples "
                f"{seen / 1e6:.2f} M {clock.step / clock.elapsed:.1f} steps/s, "
                f"{waited / clock.elapsed:.0%} waiting",
                flush=True,
            )
            if world == 1:  # several would have to agree
                good.check(loss.item())
        if rank == 0 and clock.to_save():
            save(talker, args)
    if rank == 0:
        save(talker, args)
        print(f"talker done after {clock.step} steps, {time.time() - started:.0f} s", flush=True)
    os._exit(0)  # workers and the encoder are daemons; nothing is left to write


def agreed(go_on: bool, device: torch.device, world: int) -> bool:
    """Whether all ranks have time left: they must stop at the same step."""
    if world == 1:
        return go_on
    vote = torch.tensor([go_on], dtype=torch.float32, device=device)
    dist.all_reduce(vote, dist.ReduceOp.MIN)
    return bool(vote.item())


def optimizer_of(talker: Talker, lr: float) -> torch.optim.AdamW:
    parameters = list(talker.parameters())
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.03},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=lr,
        betas=(0.9, 0.95),
        fused=talker.device.type == "cuda",
    )


def step(
    talker: Talker,
    optimizer: torch.optim.Optimizer,
    pack: tuple[Batch, Targets, float],
    half: bool = False,
    world: int = 1,
) -> tuple[Tensor, LossSums, Tensor]:
    """One step on a pack of `Packs`: (mean loss, its sums, norm of the gradient).

    Gradients are the mean over ranks, clipped to norm 1.
    """
    batch, targets, cells = pack
    device = talker.device
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        out = talker(**batch.to(device, non_blocking=True).inputs(), targets=targets.to(device))
    loss = out.loss / cells
    loss.backward()
    parameters = list(talker.parameters())
    if world > 1:
        grads = [p.grad for p in parameters]
        flat = torch.cat([g.reshape(-1) for g in grads])
        dist.all_reduce(flat)
        for grad, part in zip(grads, (flat / world).split([g.numel() for g in grads]), strict=True):
            grad.copy_(part.view_as(grad))
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach(), out.sums, norm


if __name__ == "__main__":
    main()

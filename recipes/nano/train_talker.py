"""Train the nano talker with the library's own Talker, sequences, packing and loss.

    torchrun --nproc_per_node 2 -m recipes.nano.train_talker --data /dev/shm/nano \
        --codec runs/nano/codec.safetensors --out runs/nano --seconds 480

One process per GPU encodes speech into codes while batches are already being made from what is
there; CPU workers draw examples in the three prompt modes and lay them out with `render_example`.
The model is bf16 with fp32 master weights. Time is the budget, as in the other parts.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from higgs_lab.attention import VARLEN
from higgs_lab.batches import Batch
from higgs_lab.loss import codebook_loss
from higgs_lab.nano.packing import TEXT_ROWS
from higgs_lab.talker import Talker, talker_config
from higgs_lab.vocab import Vocab
from recipes.nano.common import Clock, atomically, options, ship, state_of
from recipes.nano.talker_data import Examples, encode_in_background

TEXT_CONFIG = {
    "model_type": "qwen3",
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 768,
    "vocab_size": TEXT_ROWS,  # the packaged table; the native one has its full height
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_theta": 1_000_000, "rope_type": "default"},
}
CODEBOOK_WEIGHTS = (2.5, 1.6, 1.2, 1.0, 0.8, 0.7, 0.6, 0.6)


def nano_vocab() -> Vocab:
    """The family's tokenizer and ids, without building the checkpoint that they belong to."""
    from higgs_lab.nano.build import native_config
    from higgs_lab.nano.tokenizer import write_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        config = json.dumps(native_config(TEXT_CONFIG))
        (Path(folder) / "config.json").write_text(config, encoding="utf-8")
        return Vocab.from_pretrained(folder)


def fuse_norms(talker: Talker) -> None:
    """torch's fused RMS norm in place of transformers' five kernels; the same function."""
    for module in talker.modules():
        if type(module).__name__ == "Qwen3RMSNorm":
            module.forward = partial(_rms_norm, module)


def _rms_norm(module, x: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), module.weight, module.variance_epsilon)


def build_talker(implementation: str) -> Talker:
    config = talker_config(TEXT_CONFIG)
    config._attn_implementation = implementation
    return Talker(config, 8, 1026)


def padded(batch: Batch) -> dict:
    """The same documents as rows of a padded batch: the way without a varlen kernel."""
    lengths = batch.cu_seqlens.diff()[: batch.num_documents].long()
    longest = -(-int(lengths.max()) // 64) * 64
    starts = batch.cu_seqlens[: batch.num_documents].long()
    at = torch.arange(longest, device=lengths.device)
    inside = at < lengths[:, None]
    position = torch.where(inside, starts[:, None] + at, 0)
    out = {
        name: getattr(batch, name)[0][position] for name in ("ids", "is_audio", "rows", "labels")
    }
    out["supervised"] = batch.supervised[0][position] & inside[..., None]
    return out


def loss_of(talker: Talker, batch: Batch, weights: Tensor, layout: str) -> tuple[Tensor, object]:
    if layout == "packed":
        at = batch.supervised.any(-1)
        inputs = batch.inputs()
        labels, supervised = batch.labels[at], batch.supervised[at]
    else:
        rows = padded(batch)
        at = rows["supervised"].any(-1)
        inputs = {name: rows[name] for name in ("ids", "is_audio", "rows")}
        labels, supervised = rows["labels"][at], rows["supervised"][at]
    logits = talker(**inputs, logits_at=at).logits
    sums = codebook_loss(logits, labels, supervised, chunk_positions=8192)
    total, count = sums.weighted(weights)
    return total / count, sums


def choose_layout(batch: Batch, device, weights: Tensor) -> str:
    """'packed' when the varlen kernel runs here and agrees with padded attention."""
    if device.type != "cuda":
        return "padded"
    try:
        torch.manual_seed(0)
        reference = build_talker("sdpa").to(device, torch.bfloat16)
        twin = build_talker(VARLEN).to(device, torch.bfloat16)
        twin.load_state_dict(reference.state_dict())
        losses = {}
        for name, model, layout in (("sdpa", reference, "padded"), ("varlen", twin, "packed")):
            loss, _ = loss_of(model, batch, weights, layout)
            loss.backward()
            norm = model.model.layers[0].self_attn.q_proj.weight.grad.float().norm()
            losses[name] = (float(loss), float(norm))
        print("attention check (loss, gradient norm):", losses, flush=True)
        (a, m), (b, n) = losses["sdpa"], losses["varlen"]
        return "packed" if abs(a - b) < 0.01 * a and abs(m - n) < 0.05 * m else "padded"
    except Exception as error:  # any failure of a new kernel has the same answer
        print(f"varlen attention does not run here: {error!r}", flush=True)
        return "padded"


def save(talker: Talker, args: argparse.Namespace) -> None:
    """The fp32 state, and in --ship fp16 in two files: one alone is too large for the way home."""
    from safetensors.torch import save_file

    tensors = {name: value.float() for name, value in state_of(talker).items()}
    atomically(args.out / "talker.safetensors", lambda path: save_file(tensors, path))
    mlp = {name for name in tensors if ".layers." in name and ".mlp." in name}
    ship({name: tensors[name] for name in mlp}, args.ship, "talker-mlp")
    ship({name: tensors[name] for name in set(tensors) - mlp}, args.ship, "talker-rest")


def main(argv: list[str] | None = None) -> None:
    parser = options(__doc__, seconds=480, hours=0, batch=32_768, lr=2e-3)
    parser.add_argument("--codec", type=Path, required=True, help="codec.safetensors")
    parser.add_argument("--min-shards", type=int, default=40, help="of codes, to begin with")
    parser.add_argument("--workers", type=int, default=10, help="processes that lay out examples")
    args = parser.parse_args(argv)
    started = time.time()
    args.out.mkdir(parents=True, exist_ok=True)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
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
    loader = iter(
        DataLoader(
            examples,
            batch_size=None,
            num_workers=args.workers,
            prefetch_factor=4 if args.workers else None,
            multiprocessing_context="fork" if args.workers else None,
        )
    )
    weights = torch.tensor(CODEBOOK_WEIGHTS, device=device)
    weights = weights / weights.mean()
    layout = choose_layout(next(loader).to(device), device, weights)
    torch.manual_seed(3)
    talker = build_talker(VARLEN if layout == "packed" else "sdpa")
    if args.init:
        from safetensors.torch import load_file

        talker.load_state_dict(load_file(args.init))
    half = device.type == "cuda" or args.bf16
    masters = [p.detach().clone().to(device) for p in talker.parameters()]
    talker = talker.to(device, torch.bfloat16 if half else torch.float32)
    live = list(talker.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in masters if p.ndim >= 2], "weight_decay": 0.03},
            {"params": [p for p in masters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=args.lr,
        betas=(0.9, 0.95),
        fused=device.type == "cuda",
    )
    fuse_norms(talker)
    if rank == 0:
        count = sum(p.numel() for p in masters)
        print(f"talker {count / 1e6:.2f} M parameters, {layout}", flush=True)
    args.seconds -= time.time() - started
    clock, seen = Clock(args, warm_steps=400), 0
    while agreed(clock.tick(optimizer), device, world):
        batch = next(loader).to(device, non_blocking=True)
        loss, sums = loss_of(talker, batch, weights, layout)
        loss.backward()
        norm = step(optimizer, live, masters, world)
        seen += batch.num_documents * world
        if rank == 0 and clock.to_log():
            means = sums.means()
            print(
                f"talker {clock.elapsed:5.0f}s step {clock.step} loss {loss.item():.4f} "
                f"c0 {means['loss_code/0']:.3f} c7 {means['loss_code/7']:.3f} "
                f"eoc0 {means['loss_eoc/0']:.3f} norm {norm.item():.2f} "
                f"examples {seen / 1e6:.2f} M {clock.step / clock.elapsed:.1f} steps/s",
                flush=True,
            )
        if rank == 0 and clock.to_save():
            save(talker, args)
    if rank == 0:
        with torch.no_grad():
            for p, master in zip(live, masters, strict=True):
                p.data = master
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


@torch.no_grad()
def step(optimizer, live: list[Tensor], masters: list[Tensor], world: int) -> Tensor:
    """Clip to norm 1 over all ranks' mean gradient, step the fp32 masters, copy them back."""
    flat = torch.cat([p.grad.reshape(-1).float() for p in live])
    if world > 1:
        dist.all_reduce(flat)
        flat /= world
    norm = flat.norm()
    flat *= (1.0 / (norm + 1e-6)).clamp(max=1.0)
    sizes = [p.numel() for p in masters]
    for master, grad in zip(masters, flat.split(sizes), strict=True):
        master.grad = grad.view_as(master)
    optimizer.step()
    torch._foreach_copy_(live, masters)
    for p in live:
        p.grad = None
    return norm


if __name__ == "__main__":
    main()

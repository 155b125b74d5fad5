"""Training speed and memory, the plain way beside ours, in one table.

    python -m recipes.bench_train                          # 4B shape on a GPU, nano on a CPU
    python -m recipes.bench_train --part memory,full,data --seconds 500 --out bench.json

The plain way is Hugging Face's Qwen3Model with PEFT, r16 on all linear layers, padded batches,
SDPA, bf16 autocast, logits of all positions in fp32. Parts: speed (LoRA), memory (by method, rank
and pack), full (full fine-tuning), data (a prepared set of 10,000 clips of 1 to 20 s, held in
memory, loader included, against the same packs made before). Positions are real ones, padding is
not counted. NF4 rows need bitsandbytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from higgs_lab.adapter import attach_lora
from higgs_lab.attention import VARLEN, attention_kind, heads_of, varlen_available
from higgs_lab.batches import Batch, PackedLoader
from higgs_lab.cost import Shape
from higgs_lab.fused import fuse
from higgs_lab.optimizer import make_optimizer
from higgs_lab.prefetch import Prefetch, one_thread_beside_a_gpu
from higgs_lab.prompt import Example, render_example
from higgs_lab.quantize import quantize_nf4
from higgs_lab.text_table import HostTable, text_on_host
from higgs_lab.training_set import TrainingSet
from recipes.bench import PEAK_SHARE, Bench, arguments, timed

COLUMNS = ["positions/s", PEAK_SHARE, "real share", "peak GiB", "first step s", "per CPU s"]
TEXT = "The quick brown fox jumps over the lazy dog, and then it does so once more."


def main(argv: list[str] | None = None) -> Bench:
    parser = arguments(__doc__)
    parser.add_argument("--part", default="speed", help="speed, memory, full, data; by commas")
    parser.add_argument("--positions", type=int, help="of a pack; 8192, on a CPU 2048")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--documents",
        nargs=2,
        type=int,
        default=(150, 700),
        metavar=("FROM", "TO"),
        help="positions of the synthetic ones",
    )
    parser.add_argument("--plain-batch", type=int, default=8, help="clips of a padded batch")
    parser.add_argument("--clips", type=int, help="of the data part; 10000, on a CPU 300")
    parser.add_argument("--attention", default="auto", help="triton, varlen, flex, sdpa, split")
    parser.add_argument("--compile", action="store_true", help="compile on a CPU too")
    args = parser.parse_args(argv)
    bench = Bench(args, COLUMNS)
    gpu = bench.device.type == "cuda"
    args.positions = args.positions or (8192 if gpu else 2048)
    args.clips = args.clips or (10_000 if gpu else 300)
    args.compile = args.compile or gpu
    one_thread_beside_a_gpu()  # as in a fine-tune
    parts = {"speed": speed, "memory": memory, "full": full, "data": data}
    for name in args.part.split(","):
        if name not in parts:
            parser.error(f"--part {name}: choose {', '.join(parts)}")
        parts[name](bench)
    return bench


def speed(bench: Bench) -> None:
    args = bench.args
    add = bench.row
    add("plain", partial(plain, bench))
    add("plain, checkpointing", partial(plain, bench, checkpointing=True))
    add("ours", partial(ours, bench))
    add("ours, selective", partial(ours, bench, checkpointing="selective"))
    add("ours, full", partial(ours, bench, checkpointing="full"))
    if args.compile:
        add("ours, not compiled", partial(ours, bench, compile=False))
    if bench.device.type == "cuda":
        for n in (4096, 16384):
            add(f"ours, {n}", partial(ours, bench, positions=n))
            add(f"ours, full, {n}", partial(ours, bench, positions=n, checkpointing="full"))
        add("ours, varlen", partial(ours, bench, attention="varlen"))
        add("ours, flex", partial(ours, bench, attention="flex"))
    add("packed, by modules", partial(modules, bench))
    pairs = [("ours", "plain"), ("ours, full", "plain, checkpointing")]
    pairs += [("ours, selective", "plain, checkpointing"), ("packed, by modules", "plain")]
    bench.multiples("positions/s" if bench.device.type == "cuda" else "per CPU s", pairs)


def memory(bench: Bench) -> None:
    """Peaks by method, rank and pack; speed is by the way."""
    sizes = (2048, 4096, 8192, 16384) if bench.device.type == "cuda" else (1024,)
    bench.row("plain, checkpointing", partial(plain, bench, checkpointing=True, quick=True))
    for n in sizes:
        for checkpointing in ("full", "selective", "none"):
            bench.row(
                f"lora r16, {checkpointing}, {n}",
                partial(ours, bench, positions=n, checkpointing=checkpointing, quick=True),
            )
        bench.row(f"qlora r16, {n}", partial(modules, bench, positions=n, nf4=True, quick=True))
    for rank in (8, 64, 128):
        bench.row(
            f"lora r{rank}, full, 4096",
            partial(ours, bench, positions=4096, rank=rank, checkpointing="full", quick=True),
        )


def full(bench: Bench) -> None:
    for checkpointing in ("full", "selective", "none"):
        measure = partial(ours, bench, method="full", checkpointing=checkpointing)
        bench.row(f"full fine-tuning, {checkpointing}", measure)
        bench.row(
            f"full fine-tuning, {checkpointing}, adamw8bit",
            partial(measure, optimizer="adamw8bit"),
        )


def data(bench: Bench) -> None:
    bench.row("real data, packs made before", partial(real_data, bench, loader=False))
    bench.row("real data, loader included", partial(real_data, bench, loader=True))
    bench.multiples("positions/s", [("real data, loader included", "real data, packs made before")])


# --- rows


def plain(bench: Bench, checkpointing: bool = False, quick: bool = False) -> dict:
    """Qwen3Model + PEFT on padded batches."""
    from peft import LoraConfig, get_peft_model

    from higgs_lab.adapter import TARGETS

    talker = bench.talker()
    if checkpointing:
        talker.model.gradient_checkpointing_enable({"use_reentrant": False})
    rank = bench.args.rank
    model = get_peft_model(
        talker, LoraConfig(r=rank, lora_alpha=2 * rank, **TARGETS["attention_mlp"])
    ).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    batches = [padded(examples(bench, bench.args.plain_batch, seed)) for seed in range(8)]
    bf16 = bench.dtype == torch.bfloat16

    def step(i: int) -> float:
        inputs, labels, real = batches[i % len(batches)]
        inputs = {name: tensor.to(bench.device) for name, tensor in inputs.items()}
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=bf16):
            logits = model(**inputs).logits.float()
        loss = F.cross_entropy(logits.flatten(0, 2), labels.to(bench.device).flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return real

    share = sum(b[2] for b in batches) / sum(b[0]["ids"].numel() for b in batches)
    return figures(bench, step, "lora", share, quick)


def ours(
    bench: Bench,
    positions: int | None = None,
    checkpointing: str = "none",
    method: str = "lora",
    rank: int | None = None,
    compile: bool | None = None,
    attention: str | None = None,
    quick: bool = False,
    optimizer: str = "adamw",
) -> dict:
    positions = positions or bench.args.positions
    step, batches, _ = engine(
        bench, positions, checkpointing, method, rank, compile, attention, optimizer
    )
    real = sum(b.real_positions for b in batches) / sum(b.ids.shape[1] for b in batches)
    return figures(bench, lambda i: step(batches[i % len(batches)]), method, real, quick)


def modules(
    bench: Bench, positions: int | None = None, nf4: bool = False, quick: bool = False
) -> dict:
    """Packed batches through transformers' and PEFT's modules, which NF4 and dropout need."""
    if nf4 and bench.device.type != "cuda":
        raise ImportError("NF4 is measured on a GPU")
    talker = bench.talker()
    table = text_on_host(talker)
    if nf4:
        talker = quantize_nf4(talker.to("cpu"), bench.device)
        torch.cuda.reset_peak_memory_stats()  # a fine-tune never has the whole of it on the card
        talker.model.gradient_checkpointing_enable({"use_reentrant": False})
    if varlen_available(bench.device, bench.dtype):
        talker.model.set_attn_implementation(VARLEN)
    model = attach_lora(talker, rank=bench.args.rank).train()
    batches = packs(bench, positions or bench.args.positions, table)
    step = stepper(bench, model)
    real = sum(b.real_positions for b in batches) / sum(b.ids.shape[1] for b in batches)
    return figures(bench, lambda i: step(batches[i % len(batches)]), "lora", real, quick)


def engine(
    bench,
    positions,
    checkpointing="none",
    method="lora",
    rank=None,
    compile=None,
    attention=None,
    optimizer="adamw",
) -> tuple[Callable[[Batch], float], list[Batch], HostTable | None]:
    """(a step on a pack, synthetic packs, the host's text table) of the fused blocks."""
    args = bench.args
    if method == "full":
        model = bench.talker(torch.float32).requires_grad_(True)
        model.model.embed_tokens.requires_grad_(False)
        table = None
    else:
        talker = bench.talker()
        table = text_on_host(talker)
        model = attach_lora(talker, rank=rank or args.rank)
    compiled = args.compile if compile is None else compile
    heads = heads_of(bench_config(bench))
    kind = attention_kind(attention or args.attention, bench.device, bench.dtype, heads)
    fuse(model, kind, checkpointing, compiled, bench.dtype)
    step = stepper(bench, model.train(), optimizer)
    return step, packs(bench, positions, table, pad=compiled), table


def stepper(
    bench: Bench, model: torch.nn.Module, optimizer: str = "adamw"
) -> Callable[[Batch], float]:
    trained = [p for p in model.parameters() if p.requires_grad]
    gpu = bench.device.type == "cuda"
    optimizer = make_optimizer(trained, optimizer, lr=1e-5, weight_decay=0.0)
    weights = torch.ones(bench.vocab.num_codebooks)

    def step(batch: Batch) -> float:
        cells = int(batch.supervised.sum())
        targets = batch.targets(weights).to(bench.device)
        inputs = batch.to(bench.device, non_blocking=True).inputs()
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=gpu):
            out = model(**inputs, targets=targets)
        (out.loss / cells).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return batch.real_positions

    return step


def real_data(bench: Bench, loader: bool) -> dict:
    """An epoch, or what the row's time allows of it; the first step's compiling is not in it."""
    args, vocab = bench.args, bench.vocab
    rows, begun = prepared(args.clips), time.monotonic()
    made = TrainingSet(rows, vocab, budget_positions=args.positions)
    index_sec = time.monotonic() - begun
    compiled = args.compile
    source = PackedLoader(made.lengths, made.build, args.positions, pad=compiled)
    step, _, table = engine(bench, args.positions, "none")
    pin = bench.device.type == "cuda"
    if loader:
        ahead = Prefetch(source, depth=4, pin=pin, table=table)
        take = lambda i: next(ahead)  # noqa: E731
    else:
        kept = ready([b for b, _ in zip(source, range(16), strict=False)], table, pin)
        take = lambda i: kept[i % len(kept)]  # noqa: E731
    lengths = made.lengths(0)
    real = sum(lengths) / (len(source.epoch_packs(0)) * args.positions)
    found = figures(bench, lambda i: step(take(i)), "lora", real)
    if loader:
        ahead.close()
    return found | {"index_sec": index_sec}


def figures(
    bench: Bench, step: Callable[[int], float], method: str, real: float, quick: bool = False
) -> dict:
    shape = Shape.of(bench_config(bench), bench.vocab.num_codebooks * bench.vocab.codebook_size)
    found = timed(step, 0 if quick else bench.args.row_sec)
    bench.profile(lambda: [step(i) for i in range(2)])
    rate = found["per_sec"]
    return {
        "positions/s": rate,
        PEAK_SHARE: rate * shape.useful_flops(method) / bench.peak / 1e12,
        "real share": real,
        "peak GiB": bench.memory_gib(),
        "first step s": found["first_sec"],
        "per CPU s": found["per_cpu_sec"],
        "steps": found["steps"],
    }


def bench_config(bench: Bench):
    from higgs_lab.nano.build import TEXT_CONFIG
    from higgs_lab.nano.random_4b import TEXT_CONFIG_4B
    from higgs_lab.talker import talker_config

    return talker_config(TEXT_CONFIG if bench.size == "nano" else TEXT_CONFIG_4B)


# --- synthetic data


def examples(bench: Bench, count: int, seed: int) -> list[Example]:
    """Sequences of as many positions as --documents says."""
    rng = np.random.default_rng(seed)
    found = []
    for total in rng.integers(*bench.args.documents, count):
        text = " ".join([TEXT] * 3)[: int(rng.integers(20, 120))]
        frames = max(8, int(total) - len(bench.vocab.encode(text)) - 9)
        codes = torch.from_numpy(rng.integers(0, 1024, (frames, 8)))
        found.append(render_example(bench.vocab, text, codes))
    return found


def packs(
    bench: Bench, positions: int, table: HostTable | None, pad: bool = False, count: int = 4
) -> list[Batch]:
    pool = examples(bench, 4 * count * positions // 400, seed=1)
    lengths = [len(e) for e in pool]
    loader = PackedLoader(lengths, lambda i, _: pool[i], positions, pad=pad)
    made = [batch for batch, _ in zip(loader, range(3 * count), strict=False)]
    full = sorted(made, key=lambda b: -b.real_positions)[:count]  # not the rest of a small pool
    return ready(full, table, bench.device.type == "cuda")


def ready(batches: list[Batch], table: HostTable | None, pin: bool) -> list[Batch]:
    """As `Prefetch` would give them."""
    if table is not None:
        batches = [replace(b, text=table(b.ids)) for b in batches]
    return [b.pin() for b in batches] if pin else batches


def padded(batch: list[Example]) -> tuple[dict, torch.Tensor, int]:
    """(inputs, labels with -100 where there is no loss, real positions)."""
    longest = max(map(len, batch))

    def column(name: str) -> torch.Tensor:
        values = [getattr(e, name) for e in batch]
        return torch.stack(
            [torch.cat([v, v.new_zeros(longest - len(v), *v.shape[1:])]) for v in values]
        )

    mask = torch.stack([(torch.arange(longest) < len(e)).long() for e in batch])
    inputs = {name: column(name) for name in ("ids", "is_audio", "rows")}
    labels = column("labels").masked_fill(~column("supervised"), -100)
    return inputs | {"attention_mask": mask}, labels, sum(map(len, batch))


def prepared(clips: int, seed: int = 0) -> list[dict]:
    """Rows as prepared data has them: clips of 1 to 20 s of twenty speakers."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(clips):
        frames = int(rng.integers(25, 500))
        text = f"{i}: " + " ".join([TEXT] * 4)[: frames // 2 + 10]  # 14 letters a second
        codes = rng.integers(0, 1024, (frames, 8), dtype=np.uint16)
        row = {"id": str(i), "text": text, "speaker": f"s{i % 20}", "codes": codes}
        rows.append(row | {"frames": frames, "ref_codes": codes[:0], "ref_text": None})
    return rows


if __name__ == "__main__":
    main()

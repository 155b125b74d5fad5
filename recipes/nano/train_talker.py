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
import math
import os
import random
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from higgs_lab.attention import VARLEN
from higgs_lab.batches import Batch, pack
from higgs_lab.loss import codebook_loss
from higgs_lab.nano.packing import TEXT_ROWS, compact_id
from higgs_lab.prompt import render_example
from higgs_lab.talker import Talker, talker_config
from higgs_lab.vocab import Vocab
from recipes.nano.codec_model import encode_codes
from recipes.nano.data import TAGS
from recipes.nano.voices import HOME_VOICES, all_voices

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
MAX_DOCUMENT = 640  # positions
ZERO_SHOT, CLONE, CLONE_TEXT = 0.36, 0.34, 0.30  # prompt modes


# --- codes ----------------------------------------------------------------------------------------
def encode_shards(data: Path, codec, device, share: tuple[int, int], deadline: float) -> None:
    """Write `codes-N.npy` (uint16 [sum T, 8]) and `codes-N.json` for every shard of one share."""
    done = set()
    while time.time() < deadline:
        complete = (data / "complete").exists()
        for meta in sorted(data.glob("shard-*.json")):
            number = int(meta.stem.split("-")[1])
            target = data / f"codes-{number:05d}.json"
            if meta in done or number % share[1] != share[0]:
                continue
            done.add(meta)
            if target.exists():
                continue
            wav = np.load(meta.with_suffix(".npy"), mmap_mode="r")
            rows = json.loads(meta.read_text(encoding="utf-8"))["rows"]
            encode_shard(wav, rows, codec, device, target)
        if complete and all(
            m in done
            for m in data.glob("shard-*.json")
            if int(m.stem.split("-")[1]) % share[1] == share[0]
        ):
            return
        time.sleep(0.2)


@torch.no_grad()
def encode_shard(wav: np.ndarray, rows: list, codec, device, target: Path) -> None:
    from recipes.nano.pool import add_floor

    order = sorted(range(len(rows)), key=lambda i: rows[i][1])
    codes: list[np.ndarray | None] = [None] * len(rows)
    for start in range(0, len(order), 96):
        part = order[start : start + 96]
        frames = [-(-rows[i][1] // 960) for i in part]
        batch = torch.zeros(len(part), max(frames) * 960)
        for j, i in enumerate(part):
            begin, samples = rows[i][0], rows[i][1]
            batch[j, :samples] = torch.from_numpy(
                wav[begin : begin + samples].astype(np.float32) / 32767
            )
        out = encode_codes(codec, add_floor(batch.to(device))).cpu().numpy().astype(np.uint16)
        for j, i in enumerate(part):
            codes[i] = out[j, : frames[j]]
    table, position = [], 0
    for i, row in enumerate(rows):
        table.append([position, len(codes[i]), *row[2:]])
        position += len(codes[i])
    np.save(target.with_suffix(".tmp.npy"), np.concatenate(codes))
    os.replace(target.with_suffix(".tmp.npy"), target.with_suffix(".npy"))
    target.with_suffix(".tmp").write_text(json.dumps(table, ensure_ascii=False), encoding="utf-8")
    os.replace(target.with_suffix(".tmp"), target)


class Utterances:
    """All encoded utterances so far, by voice; every worker holds its own view of the files."""

    def __init__(self, folder: Path):
        self.folder, self.seen = folder, set()
        self.rows: list[tuple[np.ndarray, str, str, int]] = []  # codes, text, language, voice
        self.home: list[int] = []
        self.plain: dict[int, list[int]] = {}  # voice -> utterances fit as a reference
        names = [voice.name for voice in all_voices()]
        self.home_voices = {names.index(name) for name in HOME_VOICES}

    def refresh(self) -> None:
        for meta in sorted(self.folder.glob("codes-*.json")):
            if meta in self.seen:
                continue
            self.seen.add(meta)
            codes = np.load(meta.with_suffix(".npy"), mmap_mode="r")
            for start, frames, text, language, voice in json.loads(
                meta.read_text(encoding="utf-8")
            ):
                if frames < 12:
                    continue
                if voice in self.home_voices:
                    self.home.append(len(self.rows))
                if not text.startswith(TAGS):
                    self.plain.setdefault(voice, []).append(len(self.rows))
                self.rows.append((codes[start : start + frames], text, language, voice))


def draw_example(data: Utterances, vocab: Vocab, rng: random.Random, warm: bool):
    """One example in one of the three prompt modes; None when it does not fit."""
    mode = rng.random()
    clone = mode >= (0.75 if warm else ZERO_SHOT)
    index = rng.randrange(len(data.rows)) if clone else rng.choice(data.home)
    codes, text, _, voice = data.rows[index]
    if warm and len(codes) > 60:
        return None
    ref = ref_text = None
    if clone:
        others = data.plain.get(voice, [])
        picks = [i for i in rng.sample(others, min(3, len(others))) if i != index]
        picks = picks[: 1 + (rng.random() < 0.4)]
        if not picks:
            return None
        ref = np.concatenate([data.rows[i][0] for i in picks])
        if len(ref) < 25 or len(ref) > 160:
            return None
        if mode >= 1 - CLONE_TEXT:
            ref_text = " ".join(data.rows[i][1] for i in picks)
        ref = torch.from_numpy(ref.astype(np.int64))
    example = render_example(vocab, text, torch.from_numpy(codes.astype(np.int64)), ref, ref_text)
    example.ids = torch.where(example.ids < 512, example.ids, example.ids - 151_643 + 512)
    return example if len(example.ids) <= MAX_DOCUMENT else None


class Examples(IterableDataset):
    """Endless packed batches of one rank."""

    def __init__(
        self, folder: Path, vocab: Vocab, budget: int, seed: int, begin: float, seconds: float
    ):
        self.folder, self.vocab, self.budget, self.seed = folder, vocab, budget, seed
        self.begin, self.seconds = begin, seconds

    def __iter__(self):
        torch.set_num_threads(1)
        worker = get_worker_info()
        rng = random.Random(f"{self.seed}-{worker.id if worker else 0}")
        data, made = Utterances(self.folder), 0
        data.refresh()
        while True:
            if made % 8 == 7:
                data.refresh()
            examples, room = [], self.budget
            warm = time.time() - self.begin < 0.12 * self.seconds
            while room > 250:
                example = draw_example(data, self.vocab, rng, warm)
                if example is None:
                    continue
                if len(example.ids) > room:
                    break
                examples.append(example)
                room -= len(example.ids)
            made += 1
            yield pack(examples, pad_to=self.budget)


# --- training -------------------------------------------------------------------------------------
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


def save(talker: Talker, out: Path, ship: bool = True) -> None:
    from safetensors.torch import save_file

    from recipes.nano.train_codec import ship as send

    tensors = {
        name: value.detach().float().cpu().contiguous()
        for name, value in talker.state_dict().items()
    }
    save_file(tensors, out / "talker.tmp")
    os.replace(out / "talker.tmp", out / "talker.safetensors")
    half = {name: value.bfloat16() for name, value in tensors.items()}
    names = sorted(half)
    if ship:  # two files: one alone would be too large for the way home
        send(
            {name: half[name] for name in names if ".layers." in name and ".mlp." in name},
            "talker-mlp",
        )
        send(
            {name: half[name] for name in names if not (".layers." in name and ".mlp." in name)},
            "talker-rest",
        )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--test", type=Path)
    parser.add_argument("--codec", type=Path, required=True, help="codec.safetensors")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--init", type=Path)
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--budget", type=int, default=32_768, help="positions per step and GPU")
    parser.add_argument("--min-shards", type=int, default=40)
    parser.add_argument("--workers", type=int, default=10)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
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
    assert compact_id(vocab.audio_id) < TEXT_ROWS

    # the encoder is a child process with its own CUDA context, so that it never delays a step
    import multiprocessing

    encoder = multiprocessing.get_context("spawn").Process(
        target=_encode,
        args=(args.data, args.codec, device, (rank, world), started + args.seconds),
        daemon=True,
    )
    encoder.start()
    while len(list(args.data.glob("codes-*.json"))) < args.min_shards and encoder.is_alive():
        time.sleep(0.3)
    print(
        f"talker rank {rank}: {len(list(args.data.glob('codes-*.json')))} shards of codes after "
        f"{time.time() - started:.0f} s",
        flush=True,
    )
    loader = iter(DataLoader(
        Examples(args.data, vocab, args.budget, 1000 + rank, started, args.seconds),
        batch_size=None, num_workers=args.workers, prefetch_factor=4 if args.workers else None,
        multiprocessing_context="fork" if args.workers else None,
    ))  # fmt: skip
    weights = torch.tensor(CODEBOOK_WEIGHTS, device=device)
    weights = weights / weights.mean()
    layout = choose_layout(next(loader).to(device), device, weights)
    torch.manual_seed(3)
    talker = build_talker(VARLEN if layout == "packed" else "sdpa")
    if args.init:
        from safetensors.torch import load_file

        talker.load_state_dict(load_file(args.init))
    dtype = torch.bfloat16 if device.type == "cuda" or "NANO_BF16" in os.environ else torch.float32
    masters = [p.detach().clone().to(device) for p in talker.parameters()]
    talker = talker.to(device, dtype)
    talker.materialize_rope(device)
    live = list(talker.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in masters if p.ndim >= 2], "weight_decay": 0.03},
            {"params": [p for p in masters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=args.lr, betas=(0.9, 0.95), fused=device.type == "cuda",
    )  # fmt: skip
    fuse_norms(talker)
    if rank == 0:
        print(
            f"talker {sum(p.numel() for p in masters) / 1e6:.2f} M parameters, {layout}", flush=True
        )
    sizes = [p.numel() for p in masters]
    step, logged, seen, elapsed, last_save = 0, 0, 0, time.time() - started, time.time()
    first = time.time()
    while elapsed < args.seconds:
        progress = min(1.0, elapsed / args.seconds)
        rate = min(1, (step + 1) / 400) * (0.5 + 0.5 * math.cos(math.pi * progress)) + 2e-3
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate
        batch = next(loader).to(device, non_blocking=True)
        loss, sums = loss_of(talker, batch, weights, layout)
        loss.backward()
        flat = torch.cat(
            [p.grad.reshape(-1).float() for p in live]
            + [torch.tensor([time.time() - started], device=device)]
        )
        if world > 1:
            dist.all_reduce(flat)
            flat /= world
        norm = flat[:-1].norm()
        flat[:-1] *= (1.0 / (norm + 1e-6)).clamp(max=1.0)
        for master, grad in zip(masters, flat[:-1].split(sizes), strict=True):
            master.grad = grad.view_as(master)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(live, masters)
        for p in live:
            p.grad = None
        elapsed = float(flat[-1])  # the mean over ranks: they stop at the same step
        step, seen = step + 1, seen + batch.num_documents
        if rank == 0 and elapsed > logged * 10:
            logged = int(elapsed / 10) + 1
            means = sums.means()
            print(
                f"talker {elapsed:5.0f}s step {step} loss {loss.item():.4f} "
                f"c0 {means['loss_code/0']:.3f} c7 {means['loss_code/7']:.3f} "
                f"eoc0 {means['loss_eoc/0']:.3f} "
                f"norm {norm.item():.2f} examples {seen * world / 1e6:.2f} M "
                f"{step / (time.time() - first):.1f} steps/s",
                flush=True,
            )
        if rank == 0 and time.time() - last_save > 60:
            save(talker, args.out)
            last_save = time.time()
    if rank == 0:
        with torch.no_grad():
            for p, master in zip(live, masters, strict=True):
                p.data = master
        save(talker, args.out)
        print(f"talker done after {step} steps, {time.time() - started:.0f} s", flush=True)
    os._exit(0)  # workers and the encoder are daemons; nothing is left to write


def _encode(data: Path, codec_path: Path, device, share: tuple[int, int], deadline: float) -> None:
    from recipes.nano.train_whisper import load_codec

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    begin = time.time()
    encode_shards(data, load_codec(codec_path, device), device, share, deadline)
    print(f"codes: share {share[0]} done in {time.time() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()

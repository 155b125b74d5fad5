"""What the nano talker is trained on: shards of speech as codes, and examples drawn from them."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from higgs_lab.batches import pack
from higgs_lab.nano.packing import compact_ids
from higgs_lab.prompt import render_example
from higgs_lab.vocab import Vocab
from recipes.nano.codec_model import encode_codes, load_codec
from recipes.nano.data import TAGS
from recipes.nano.pool import add_floor
from recipes.nano.voices import HOME_VOICES, all_voices

MAX_DOCUMENT = 640  # positions
ZERO_SHOT, CLONE, CLONE_TEXT = 0.36, 0.34, 0.30  # prompt modes


def encode_in_background(
    data: Path, codec_path: Path, device, share: tuple[int, int], deadline: float
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    begin = time.time()
    encode_shards(data, load_codec(codec_path, device), device, share, deadline)
    print(f"codes: share {share[0]} done in {time.time() - begin:.0f} s", flush=True)


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
    example.ids = compact_ids(example.ids)
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

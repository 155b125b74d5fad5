"""The Python API: `higgs_lab.load(...)` and `.speak(...)`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from higgs_lab import pipeline
from higgs_lab.checkpoint import Checkpoint, load_talker, resolve_checkpoint
from higgs_lab.codec import Codec
from higgs_lab.device import chosen_device
from higgs_lab.generate import Generation, Sampling
from higgs_lab.precision import check_precision
from higgs_lab.prompt import Prompt, render_prompt
from higgs_lab.talker import Talker
from higgs_lab.text import join_waves, max_frames_for, split_text
from higgs_lab.vocab import Vocab

Reference = str | Path | np.ndarray | Tensor | None
Job = tuple[int, int]  # a text and one of its chunks
Spoken = tuple[int, np.ndarray, "SpeechInfo"]


@dataclass
class SpeechInfo:
    """How a wave came about."""

    codes: Tensor = field(repr=False)  # [T, K] of all chunks
    stop_reason: str  # "eoc", or "max_frames" when any chunk ran into its cap
    seconds: float
    frames: int
    seed: int
    chunks: list[str]  # the texts as they were spoken, one by one
    generations: list[Generation] = field(repr=False)  # of each chunk


class Higgs:
    """A talker with its codec and vocabulary, ready to speak.

    decode_precision: what the codec decodes in, one of `precision.PRECISIONS`; see `load`.
    """

    def __init__(
        self,
        talker: Talker,
        codec: Codec,
        vocab: Vocab,
        checkpoint: Checkpoint,
        decode_precision: str = "fp32",
    ):
        self.talker, self.codec, self.vocab, self.checkpoint = talker, codec, vocab, checkpoint
        self.decode_precision = decode_precision

    @property
    def sample_rate_hz(self) -> int:
        return self.codec.sample_rate_hz

    def encode_reference(self, ref_audio: Reference) -> Tensor | None:
        """A file, a wave at 24 kHz or codes [T, K] -> codes."""
        if ref_audio is None:
            return None
        if isinstance(ref_audio, (str, Path)):
            from higgs_lab.audio import read_audio

            return self.codec.encode(read_audio(ref_audio, self.sample_rate_hz))
        if isinstance(ref_audio, Tensor) and ref_audio.ndim == 2:
            return ref_audio
        return self.codec.encode(ref_audio)

    def speak(
        self,
        text: str | Sequence[str],
        ref_audio: Reference | Sequence[Reference] = None,
        ref_text: str | None | Sequence[str | None] = None,
        sampling: Sampling | None = None,
        seed: int | Sequence[int] | None = None,
        batch_size: int | None = None,
        max_chars: int | None = None,
    ):
        """Speak a text, or a list of texts, batch_size of them at a time.

        ref_audio: the voice to clone, a file, a float wave [n] at 24 kHz or codes [T, K]; a list
        gives each text its own. ref_text: its exact transcript. A long text is split at sentence
        bounds and joined; without a reference its first chunk gives the others their voice.
        Each request is capped by its text's length (text.max_frames_for) and sampling.max_frames.
        batch_size: none: 64 on a GPU, 16 on a CPU; fewer where memory holds fewer.

        Returns (wav float32 [n] at 24 kHz, SpeechInfo), or a list of such pairs for a list.
        Raises ValueError for empty texts, control tokens in the text, unreadable references.
        """
        texts = [text] if isinstance(text, str) else list(text)
        each = self.speak_each(texts, ref_audio, ref_text, sampling, seed, batch_size, max_chars)
        found = {i: (wav, info) for i, wav, info in each}
        return found[0] if isinstance(text, str) else [found[i] for i in range(len(texts))]

    def speak_each(
        self,
        texts: Sequence[str],
        ref_audio: Reference | Sequence[Reference] = None,
        ref_text: str | None | Sequence[str | None] = None,
        sampling: Sampling | None = None,
        seed: int | Sequence[int] | None = None,
        batch_size: int | None = None,
        max_chars: int | None = None,
    ) -> Iterator[Spoken]:
        """(index, wav, SpeechInfo) of each text as `speak` gives it, soon after it has ended.

        A text that has ended makes room for one that waits, and the codec decodes while the rest is
        generated. What `speak` refuses is refused at the call, before anything is spoken.
        """
        sampling = sampling or Sampling()
        batch_size = batch_size or default_batch_size(self.talker.device)
        per_text = _spread(ref_audio, len(texts), "ref_audio", (list, tuple))
        per_ref_text = _spread(ref_text, len(texts), "ref_text", (list, tuple))
        seeds = _spread(sampling.seed if seed is None else seed, len(texts), "seed", (list, tuple))
        known: dict[int, Tensor | None] = {}  # the same reference object is encoded once
        voices = []
        for ref, said in zip(per_text, per_ref_text, strict=True):
            key = hash(ref) if isinstance(ref, (str, Path)) else id(ref)
            if key not in known:
                known[key] = self.encode_reference(ref)
            voices.append((known[key], said))
        options = {} if max_chars is None else {"max_chars": max_chars}
        chunks = []
        for one in texts:
            self.vocab.encode(one)  # refuses bad text before any of it is spoken
            chunks.append(split_text(one, **options))

        def request(job: Job, ref: Tensor | None, said: str | None) -> tuple[Prompt, Sampling]:
            i, j = job
            cap = max_frames_for(chunks[i][j], self.vocab.frame_rate_hz)
            own = replace(
                sampling,
                seed=int(seeds[i]) + 1_000_003 * j,
                max_frames=min(sampling.max_frames, cap),
            )
            return render_prompt(self.vocab, chunks[i][j], ref, said), own

        # Without a reference a text's first chunk becomes the voice of the rest, which so waits.
        jobs = [(i, j) for i, parts in enumerate(chunks) for j in range(len(parts))]
        later = [(i, j) for i, j in jobs if j > 0 and voices[i][0] is None]
        waits = set(later)
        first = {job: request(job, *voices[job[0]]) for job in jobs if job not in waits}

        def spoken() -> Iterator[Spoken]:
            done: dict[Job, tuple[Generation, np.ndarray]] = {}
            yield from self._finish(first, done, chunks, seeds, batch_size)
            rest = {}
            for i, j in later:
                lent = done[i, 0][0].codes
                voice = (lent, chunks[i][0]) if len(lent) else voices[i]
                rest[i, j] = request((i, j), *voice)
            yield from self._finish(rest, done, chunks, seeds, batch_size)

        return spoken()

    def _finish(
        self,
        requests: dict[Job, tuple[Prompt, Sampling]],
        done: dict[Job, tuple[Generation, np.ndarray]],
        chunks: list[list[str]],
        seeds: list[int],
        batch_size: int,
    ) -> Iterator[Spoken]:
        """Speak chunks, put them into `done`, and yield the texts of which none is missing."""
        if not requests:
            return
        jobs = list(requests)
        prompts, settings = zip(*requests.values(), strict=True)
        options = dict(max_batch=batch_size, precision=self.decode_precision)
        for n, *made in pipeline.speak_each(self.talker, self.codec, prompts, settings, **options):
            done[jobs[n]] = tuple(made)
            i = jobs[n][0]
            whole = [(i, j) for j in range(len(chunks[i]))]
            if all(job in done for job in whole):
                pieces, waves = zip(*(done.pop(job) for job in whole), strict=True)
                yield i, *self._join(pieces, waves, chunks[i], int(seeds[i]))

    def _join(
        self,
        pieces: Sequence[Generation],
        waves: Sequence[np.ndarray],
        chunks: list[str],
        seed: int,
    ) -> tuple[np.ndarray, SpeechInfo]:
        wav = join_waves(list(waves), self.sample_rate_hz)
        codes = torch.cat([piece.codes for piece in pieces])
        capped = any(piece.stop_reason != "eoc" for piece in pieces)
        return wav, SpeechInfo(
            codes=codes,
            stop_reason="max_frames" if capped else "eoc",
            seconds=len(wav) / self.sample_rate_hz,
            frames=len(codes),
            seed=seed,
            chunks=list(chunks),
            generations=list(pieces),
        )


def _spread(value, count: int, name: str, many: tuple[type, ...]) -> list:
    """One value for all, or a list of as many as there are texts."""
    if not isinstance(value, many):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} has {len(value)} entries for {count} texts")
    return list(value)


def default_batch_size(device: torch.device) -> int:
    """Texts spoken at once where nothing is said. With more a GPU gains less, and memory goes."""
    return 64 if device.type == "cuda" else 16


def default_precision(device: torch.device) -> str:
    """What the codec decodes in where nothing is said."""
    return "fp16" if device.type == "cuda" else "fp32"


def load(
    model: str | Path,
    adapter: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    decode_precision: str | None = None,
) -> Higgs:
    """Load "nano", a directory or a hub name (org/name@revision), with an adapter merged if given.

    device: CUDA when there is one. dtype: the stored one (bf16) on CUDA, float32 on the CPU, where
    bf16 is slow. decode_precision: what the codec decodes in, fp32, tf32, fp16 or bf16; none: fp16
    on CUDA, seven times as fast as fp32 and more, and 0.0005 of the wave away; fp32 on the CPU.
    References are encoded in fp32 everywhere.

    Raises FileNotFoundError or ValueError for what is no checkpoint, an adapter of another base, or
    an unknown device, dtype or precision.
    """
    started = time.monotonic()
    device = chosen_device(device)
    if decode_precision is not None:
        check_precision(decode_precision, device, "decode_precision")
    checkpoint = resolve_checkpoint(model)
    if isinstance(dtype, str):
        if not isinstance(found := getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"dtype {dtype!r} is none of torch's: float32 or bfloat16")
        dtype = found
    if dtype is None and device.type == "cpu":
        dtype = torch.float32
    talker = load_talker(checkpoint.path, device, dtype)
    if adapter is not None:
        from higgs_lab.adapter import load_adapter, merge_lora

        talker = merge_lora(load_adapter(talker, adapter, base=checkpoint.path)).eval()
    higgs = Higgs(
        talker,
        Codec.from_pretrained(checkpoint.path, device),
        Vocab.from_pretrained(checkpoint.path),
        checkpoint,
        decode_precision or default_precision(device),
    )
    higgs.load_sec = time.monotonic() - started
    return higgs

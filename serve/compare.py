"""Served prompts, rows and sound against our own: where they part, and by how much.

In float32 all are equal: every row, and every sample to int16 rounding. In bf16 two implementations
round differently, so a greedy choice between two nearly equal codes can fall the other way, and
from there the clips differ. Then the gap counts: how much more likely we held our own choice. A gap
of rounding size is a draw; a large one means another prompt, another mask or other weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from higgs_lab.codec import Codec
from higgs_lab.delay import delay
from higgs_lab.generate import Generation, RampState, advance, codes_from_rows, mask_logits
from higgs_lab.prompt import Prompt
from higgs_lab.talker import Talker
from higgs_lab.vocab import EOC
from serve.check import FAIL, OK, WARN, Finding

# Largest gap in log-probability that rounding explains. bf16 logits between 16 and 32 lie 1/8
# apart, and two of them are compared.
MAX_GAP = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
ROUNDING = 2  # int16 steps: the server rounds once, we compare with the unrounded value
# A codec in bf16 adds noise, 14 dB below the sound when its weights are random; where other codes
# are decoded, the difference is as loud as the sound.
GOOD_SNR_DB, POOR_SNR_DB = 25.0, 10.0
SAME_START = 10  # frames; where all lines part before, it is no matter of rounding
OTHER = "-"  # the engine that was not asked
# serve/profiles/base, codec_chunk_frames and its neighbours: how the codec stage streams.
CHUNK, FIRST_CHUNK, LEFT_CONTEXT, HOLDBACK = 25, 1, 25, 4


class Dumps:
    """What a server's talker stage wrote about each request (HIGGS_LAB_DUMP_DIR, serve/cpu)."""

    def __init__(self, folder: str | Path):
        self.folder, self.seen = Path(folder), set()

    def new(self) -> list[tuple[dict, Tensor]]:
        """(header, rows [S, K]) of every request since the last call, oldest first."""
        files = set(self.folder.glob("*.jsonl")) - self.seen
        self.seen |= files
        return [self._read(file) for file in sorted(files, key=lambda f: f.stat().st_mtime)]

    def last(self) -> tuple[dict, Tensor]:
        return self.new()[-1]

    @staticmethod
    def _read(file: Path) -> tuple[dict, Tensor]:
        header, *rows = (json.loads(line) for line in file.read_text().splitlines())
        return header, torch.tensor(rows)


def heard_rows(rows: Tensor, stop_reason: str, mode: str = "vllm") -> Tensor:
    """Rows that reach the served codec, of all that the talker emitted [S, K].

    vLLM-Omni ends a request that is cut by its length before its last row gets there.
    """
    return rows[:-1] if mode == "vllm" and stop_reason != "eoc" else rows


def decode_whole(codec: Codec, heard: Tensor, mode: str = "vllm") -> np.ndarray:
    """heard rows [S, K] -> samples, all frames in one go (`async_chunk: false`; SGLang-Omni)."""
    return codec.decode(codes_from_rows(heard, mode))


def decode_in_chunks(codec: Codec, heard: Tensor) -> np.ndarray:
    """heard rows [S, K] -> samples, in the windows in which vLLM-Omni's codec stage streams.

    (stage_input_processors/higgs_audio_v3.py::talker2code2wav_async_chunk, called once a row.)
    """
    codes = codes_from_rows(heard, "sglang")  # with the last frame, which serves as context only
    hop, total, done, pieces = codec.samples_per_frame, len(codes) - 1, 0, []
    while done < total:
        end = done + (CHUNK if done else FIRST_CHUNK)
        stop = end + HOLDBACK
        if stop > len(codes):
            end = stop = total
        begin = done - min(LEFT_CONTEXT, done)
        wave = codec.decode(codes[begin:stop])
        pieces.append(wave[(done - begin) * hop : (end - begin) * hop])
        done = end
    return np.concatenate(pieces) if pieces else np.zeros(0, np.float32)


@dataclass(frozen=True)
class Parting:
    """Where greedy rows of the server leave ours."""

    step: int  # first row that differs
    codebook: int
    ours: int
    theirs: int
    gap: float | None = None  # our log-probability of our id minus that of theirs


def parting(ours: Tensor, theirs: Tensor) -> Parting | None:
    """First cell that differs, row by row; None when one is the other or its beginning."""
    n = min(len(ours), len(theirs))
    different = (ours[:n] != theirs[:n]).nonzero()
    if not len(different):
        return None
    step, book = (int(i) for i in different[0])
    return Parting(step, book, int(ours[step, book]), int(theirs[step, book]))


@torch.inference_mode()
def gaps(talker: Talker, prompt: Prompt, rows: Tensor, mode: str = "vllm") -> Tensor:
    """How far each served id lies below our best, in log-probability: [S, K], 0 where they agree.

    The rows are fed as they came (teacher forcing), so that every step is judged by itself, also
    behind the first that parts. What our mask forbids is infinitely far.
    """
    device = talker.device
    given = rows[:-1]
    ids = torch.cat([prompt.ids, torch.zeros(len(given), dtype=torch.long)]).to(device)
    is_audio = torch.cat([prompt.is_audio, torch.ones(len(given), dtype=torch.bool)]).to(device)
    inputs = torch.cat([prompt.rows, given]).to(device)
    wanted = torch.arange(len(ids), device=device) >= len(prompt) - 1
    out = talker(ids[None], is_audio[None], inputs[None], logits_at=wanted[None])
    logits = out.logits.reshape(-1, *out.logits.shape[-2:]).float()  # [S, K, V]
    state, found = RampState.start(1, device), []
    for step, row in enumerate(rows.to(device)):
        chances = mask_logits(logits[step : step + 1], state, mode).log_softmax(-1)[0]
        found.append(chances.amax(-1) - chances.gather(-1, row[:, None])[:, 0])
        _, state = advance(row[None], state, mode)
    return torch.stack(found).cpu()


@dataclass(frozen=True)
class SoundMatch:
    """Served samples against ours."""

    frames: int  # of the server
    expected_frames: int
    max_error: float  # in int16 steps
    snr_db: float
    parts_at: int | None  # first frame that is less than POOR_SNR_DB above its difference

    @property
    def exact(self) -> bool:
        return self.frames == self.expected_frames and self.max_error <= ROUNDING


def match_sound(got: np.ndarray, want: np.ndarray, samples_per_frame: int) -> SoundMatch:
    """got: int16 samples of a server; want: our decode, -1..1. Compared as far as both go."""
    n = min(len(got), len(want)) // samples_per_frame * samples_per_frame
    scaled = np.clip(want[:n].astype(np.float64), -1, 1) * 32767
    error = np.abs(got[:n] - scaled)
    noise, power = float((error**2).sum()), float((scaled**2).sum())
    frames = (error.reshape(-1, samples_per_frame), scaled.reshape(-1, samples_per_frame))
    loud, sound = (np.sqrt((x**2).mean(axis=1)) for x in frames)
    off = np.flatnonzero(loud > np.maximum(sound * 10 ** (-POOR_SNR_DB / 20), ROUNDING))
    return SoundMatch(
        frames=len(got) // samples_per_frame,
        expected_frames=len(want) // samples_per_frame,
        max_error=float(error.max()) if n else 0.0,
        snr_db=float(10 * np.log10(max(power, 1e-9) / noise)) if noise else float("inf"),
        parts_at=int(off[0]) if len(off) else None,
    )


def ended(rows: Tensor) -> bool:
    """Whether the last row is the last of a ramp-down: all codebooks but one have ended."""
    return bool((rows[-1, :-1] == EOC).all())


def finding(engine: str, rule: str, verdict: str, detail: str = "", **figures) -> Finding:
    vllm, sglang = (verdict, OTHER) if engine == "vllm" else (OTHER, verdict)
    return Finding(rule, vllm, sglang, detail, figures)


@dataclass
class Ours:
    """What the toolkit makes of a line of the panel, greedily."""

    name: str
    text: str
    prompt: Prompt
    ref_codes: Tensor | None
    ref_text: str | None
    generation: Generation


@dataclass
class Answer:
    """What the server made of it."""

    ours: Ours
    samples: np.ndarray  # int16
    header: dict | None = None  # prompt and reference rows, where the server writes them down
    rows: Tensor | None = None


@dataclass
class Judge:
    """Verdicts on answers. `talker` loads it, if any rows part: the server is gone by then."""

    engine: str
    codec: Codec
    dtype: torch.dtype  # of the talker, here and there
    talker: Callable[[], Talker]

    @property
    def exact(self) -> bool:
        return self.dtype == torch.float32

    def findings(self, answers: list[Answer]) -> list[Finding]:
        rules = (self.prompt, self.codes, self.sound)
        found = [f for answer in answers for rule in rules for f in rule(answer)]
        if answers and all(answer.rows is None for answer in answers):
            found.append(self.same_start(answers))
        return [*found, self.endings(answers)] if answers else found

    def _finding(self, rule: str, verdict: str, detail: str = "", **figures) -> Finding:
        return finding(self.engine, rule, verdict, detail, **figures)

    def prompt(self, answer: Answer) -> Iterator[Finding]:
        """The ids, the places of the reference and its codes are the server's too."""
        if answer.header is None:
            return
        ours, header = answer.ours, answer.header
        places = ours.prompt.is_audio.nonzero()[:, 0].tolist()
        same = header["prompt_token_ids"] == ours.prompt.ids.tolist()
        same = same and (header["audio_placeholder_positions"] or []) == places
        detail = f"{len(ours.prompt)} positions, {len(places)} of them audio"
        yield self._finding(f"prompt: {ours.name}", OK if same else FAIL, detail)
        if ours.ref_codes is None:
            return
        want, got = delay(ours.ref_codes), torch.tensor(header["audio_input_ids"] or [])
        rule = f"reference codes: {ours.name}"
        if got.shape != want.shape:
            detail = f"{len(got)} rows there, Codec.encode gives {len(want)}"
            yield self._finding(rule, FAIL, detail)
            return
        agreement = float((got == want).float().mean())
        detail = f"{agreement:.1%} of {want.numel()} cells as Codec.encode gives them"
        # the clone encoder is float32 there as here; only the device can round differently
        verdict = OK if agreement == 1 else WARN if agreement > 0.9 and not self.exact else FAIL
        yield self._finding(rule, verdict, detail, agreement=agreement)

    def codes(self, answer: Answer) -> Iterator[Finding]:
        """Greedy rows step by step; where they part, the gap tells rounding from error."""
        if answer.rows is None:
            return
        rule, ours = f"codes: {answer.ours.name}", answer.ours.generation.rows
        parted = parting(ours, answer.rows)
        if parted is None:
            same = len(ours) == len(answer.rows)
            detail = f"{len(answer.rows)} rows equal" + (f", ours are {len(ours)}" * (not same))
            yield self._finding(rule, OK if same else FAIL, detail, rows=len(answer.rows))
            return
        found = gaps(self.talker(), answer.ours.prompt, answer.rows, self.engine)
        gap, worst = float(found[parted.step, parted.codebook]), float(found.max())
        allowed = MAX_GAP.get(self.dtype, MAX_GAP[torch.bfloat16])
        detail = (
            f"part at row {parted.step} of {len(ours)}, codebook {parted.codebook}: "
            f"{parted.theirs}, ours {parted.ours}; log-probability gap {gap:.3g} there, "
            f"{worst:.3g} at most in all rows; rounding explains {allowed:g}"
        )
        figures = {"step": parted.step, "codebook": parted.codebook, "gap": gap, "worst": worst}
        yield self._finding(rule, WARN if worst <= allowed else FAIL, detail, **figures)

    def sound(self, answer: Answer) -> Iterator[Finding]:
        """Samples against our decode of its codes, or of ours where it does not show them."""
        seen, ours = answer.rows is not None, answer.ours.generation
        rows, stop = ours.rows, ours.stop_reason
        if seen:
            rows, stop = answer.rows, "eoc" if ended(answer.rows) else "max_frames"
        heard = heard_rows(rows, stop, self.engine)
        wants = [decode_whole(self.codec, heard, self.engine)]
        if self.engine == "vllm":
            wants.append(decode_in_chunks(self.codec, heard))
        hop = self.codec.samples_per_frame
        match = max((match_sound(answer.samples, w, hop) for w in wants), key=lambda m: m.snr_db)
        figures = {"snr_db": match.snr_db, "max_error": match.max_error, "frames": match.frames}
        detail = f"{match.frames} frames, "
        if match.exact:
            verdict, detail = OK, detail + "our decode to int16 rounding"
        elif match.frames == match.expected_frames and match.snr_db >= (
            GOOD_SNR_DB if self.exact else POOR_SNR_DB
        ):
            verdict = OK if match.snr_db >= GOOD_SNR_DB and not self.exact else WARN
            detail += f"{match.snr_db:.0f} dB above its difference to our decode"
        elif seen:
            verdict = FAIL
            detail += f"ours {match.expected_frames}; {match.snr_db:.0f} dB above the difference"
        else:
            verdict = WARN  # a draw that fell the other way? `same_start` tells
            detail += f"parts from ours at frame {match.parts_at}; no codes are seen here"
            figures["parts_at"] = match.parts_at
        yield self._finding(f"sound: {answer.ours.name}", verdict, detail, **figures)

    def same_start(self, answers: list[Answer]) -> Finding:
        """Without codes: rounding does not make every line part at once."""
        hop, agree = self.codec.samples_per_frame, 0
        for answer in answers:
            ours = answer.ours.generation
            heard = heard_rows(ours.rows, ours.stop_reason, self.engine)
            want = decode_whole(self.codec, heard, self.engine)
            parts_at = match_sound(answer.samples, want, hop).parts_at
            agree += parts_at is None or parts_at >= SAME_START
        detail = f"{agree} of {len(answers)} lines begin as ours do"
        return self._finding("same checkpoint", OK if agree else FAIL, detail, agree=agree)

    def endings(self, answers: list[Answer]) -> Finding:
        """Requests end for the same reason; a model that never ends by itself is told."""
        rule, wrong = "stop reasons", []
        for answer in answers:
            ours = answer.ours.generation
            if answer.rows is not None and parting(ours.rows, answer.rows) is None:
                if ended(answer.rows) != (ours.stop_reason == "eoc"):
                    wrong.append(answer.ours.name)
        if wrong:
            return self._finding(rule, FAIL, f"another than ours: {', '.join(wrong)}")
        count = sum(answer.ours.generation.stop_reason == "eoc" for answer in answers)
        detail = f"{count} of {len(answers)} lines end by themselves, the rest is cut"
        return self._finding(rule, OK if count else WARN, detail, ended=count)

"""The stages of a run: speak here, then `hear` and `voices`, then score. Each has its JSONL file.

A line is written when its work is done and never again, so a run can be killed between any two.
What a stage needs of an earlier one it takes from that one's rows.
"""

from __future__ import annotations

import gc
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from eval import metrics
from eval.sets import EvalSet
from eval.systems import Request, Spoken, System, request_seed
from higgs_lab.audio import read_audio, write_wav
from higgs_lab.manifest import Utterance, file_stem
from higgs_lab.runlog import Progress, RunLog, read_jsonl, remove_leftovers

if TYPE_CHECKING:
    from eval.voices import Voices

HEAR_SEC = 120.0  # of a runaway clip; it fails anyway, this is for the reader of the report
JUDGE_HZ = 16000


def speak(
    system: System, rows: Sequence[Utterance], out: Path, seed: int, takes: int
) -> dict[tuple, dict]:
    """Stage 1. One row per clip: where it lies and what its waveform says, or why there is none."""
    done, log = open_stage(out / "speech.jsonl")
    jobs = [(row, take) for take in range(takes) for row in rows if (row.id, take) not in done]
    human: dict[str, dict | None] = {}
    if not jobs:
        log.close()
        return done
    remove_leftovers(out / "wavs")
    say = system.start()
    with log, Progress(len(rows) * takes, "clips", "speak", start=len(done)) as progress:
        for begin in range(0, len(jobs), system.batch):
            batch = jobs[begin : begin + system.batch]
            requests = [Request(row, request_seed(seed + take, row.id)) for row, take in batch]
            for (row, take), request, clip in zip(batch, requests, say(requests), strict=True):
                name = file_stem(row.id) + (f".take{take}" if takes > 1 else "")
                entry = {"id": row.id, "take": take, "seed": request.seed}
                entry |= _store(clip, out, f"wavs/{name}.wav")
                if row.id not in human and system.name != "human":
                    human[row.id] = _facts_or_none(row.audio)
                entry["human"] = human.get(row.id)
                log.log(**entry)
                done[row.id, take] = entry
                progress.update()
    return done


def score(
    speech: dict[tuple, dict],
    transcripts: dict[tuple, dict],
    voices: Voices,
    test_set: EvalSet,
    out: Path,
    normalizer: str,
) -> list[dict]:
    """Stage 4. All measures of each clip, in the order of the set."""
    done, log = open_stage(out / "scores.jsonl")
    takes = sorted({take for _, take in speech})
    with log:
        for take in takes:
            for row in test_set.rows:
                key = row.id, take
                if key in done:
                    continue
                clip, transcript = speech[key], transcripts.get(key) or {}
                facts = clip["audio_facts"]
                human = clip["human"]
                scored = metrics.score_clip(
                    row.text,
                    transcript["text"] if transcript.get("heard") else None,
                    row.language,
                    normalizer=normalizer,
                    audio=metrics.AudioFacts(**facts) if facts else None,
                    human=metrics.AudioFacts(**human) if human else None,
                    hit_cap=clip["hit_cap"],
                    transcript=transcript,
                )
                if clip["took_sec"] and facts and facts["seconds"]:
                    scored["rtf"] = clip["took_sec"] / facts["seconds"]
                entry = {"id": row.id, "take": take, "language": row.language}
                entry |= {"speaker": row.speaker, "text": row.text, "audio": clip["audio"]}
                entry |= scored | voices.similarities(clip, row, test_set)
                entry["error"] = clip["error"]
                log.log(**entry)
                done[key] = entry
    return [done[row.id, take] for take in takes for row in test_set.rows]


def _store(clip: Spoken, out: Path, name: str) -> dict:
    """The clip as a file and as facts; what cannot be read or written counts as not spoken."""
    entry = {"audio": None, "sha256": None, "audio_facts": None, "error": clip.error}
    entry |= {"hit_cap": clip.hit_cap, "took_sec": clip.took_sec}
    if clip.error:
        return entry
    try:
        if isinstance(clip.audio, Path):
            path, wav = clip.audio, read_audio(clip.audio, 24000, max_sec=None)
            rate_hz = 24000
        else:
            wav, rate_hz = clip.wav, clip.sample_rate_hz
            if wav is None:  # inside a data set: written out, so that the report can play it
                wav, rate_hz = read_audio(clip.audio, 24000, max_sec=None), 24000
            path = out / name
            if len(wav) == 0:  # no file can hold it, but the score should call it empty
                return entry | {"audio_facts": asdict(metrics.audio_facts(wav, rate_hz))}
            write_wav(path, wav, rate_hz)
    except (ValueError, FileNotFoundError) as error:
        return entry | {"error": str(error)}
    entry["audio"] = name if path == out / name else str(path)
    entry["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    entry["audio_facts"] = asdict(metrics.audio_facts(wav, rate_hz))
    return entry


def _facts_or_none(audio) -> dict | None:
    if audio is None:
        return None
    return asdict(metrics.audio_facts(read_audio(audio, 24000), 24000))


def read_clip(out: Path, audio: str, rate_hz: int) -> np.ndarray:
    path = out / audio  # an absolute path stays what it is
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} was spoken but is gone: put it back, or delete {out} and start again"
        )
    return read_audio(path, rate_hz, max_sec=None)


def open_stage(path: Path) -> tuple[dict[tuple, dict], RunLog]:
    """What a stage has done already, by (id, take), and its log, opened for more."""
    log = RunLog(path)  # cuts an unfinished last line
    return {(row["id"], row["take"]): row for row in read_jsonl(path)}, log


def free_memory() -> None:
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()

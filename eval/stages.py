"""The stages of a run: speak here, then `hear` and `voices`, then score. Each has its JSONL file.

A line is written when its work is done and never again, so a run can be killed between any two, and
several processes can share one folder (eval.work). What a stage needs of an earlier one it takes
from that one's rows.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from eval import metrics
from eval.acoustics import AudioFacts, audio_facts
from eval.pace import Pace
from eval.sets import EvalSet
from eval.systems import Request, Spoken, System, request_seed
from eval.work import Ledger, chunks, rank
from higgs_lab.audio import read_audio, write_wav
from higgs_lab.manifest import Utterance, file_stem
from higgs_lab.text import speech_units

if TYPE_CHECKING:
    from eval.voices import Voices

HEAR_SEC = 120.0  # of a runaway clip at least: it fails anyway; of a voice at most
JUDGE_HZ = 16000
SCORE_BATCH = 256


def speak(
    system: System, rows: Sequence[Utterance], out: Path, seed: int, takes: int, pace: Pace
) -> dict[tuple, dict]:
    """Stage 1. One row per clip: where it lies and what its waveform says, or why there is none."""
    by_id = {row.id: row for row in rows}
    human: dict[str, dict | None] = {}

    def facts_of_human(row: Utterance) -> dict | None:
        if row.id not in human and system.name != "human":
            human[row.id] = _facts_or_none(row.audio)
        return human.get(row.id)

    say = None
    with Ledger(out / "speech.jsonl") as ledger, pace:
        jobs = _speaking_order(rows, takes)
        each = max(1, -(-len(jobs) // rank()[1]))  # so that no process is left without work
        batches = chunks(jobs, min(system.batch, each))
        for batch in ledger.claim(batches, "speak"):
            say = say or system.start()
            requests = [Request(by_id[id], request_seed(seed + take, id)) for id, take in batch]

            def store(key: tuple, request: Request, clip: Spoken) -> dict:
                id, take = key
                name = file_stem(id) + (f".take{take}" if takes > 1 else "")
                entry = {"id": id, "take": take, "seed": request.seed}
                entry |= _store(clip, out, f"wavs/{name}.wav")
                return entry | {"human": facts_of_human(request.row)}

            with pace.measured() as sounds:
                spoken = zip(batch, requests, say(requests), strict=True)
                # Of a batch whose writer was killed some rows stand, and so must their files.
                spoken = [one for one in spoken if one[0] not in ledger.rows]
                with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                    entries = list(pool.map(lambda one: store(*one), spoken))
                sounds += [e["audio_facts"]["seconds"] for e in entries if e["audio_facts"]]
            ledger.append(entries)
        return ledger.rows


def _speaking_order(rows: Sequence[Utterance], takes: int) -> list[tuple[str, int]]:
    """Long texts first: clips of a batch end together, and too little memory shows at once."""
    jobs = [(row, take) for take in range(takes) for row in rows]
    return [(row.id, take) for row, take in sorted(jobs, key=lambda j: -speech_units(j[0].text))]


def score(
    speech: dict[tuple, dict],
    transcripts: dict[tuple, dict],
    voices: Voices,
    test_set: EvalSet,
    out: Path,
    normalizer: str,
) -> list[dict]:
    """Stage 4. All measures of each clip, in the order of the set."""
    by_id = {row.id: row for row in test_set.rows}
    takes = sorted({take for _, take in speech})
    keys = [(row.id, take) for take in takes for row in test_set.rows]
    with Ledger(out / "scores.jsonl") as ledger:
        for batch in ledger.claim(chunks(keys, SCORE_BATCH)):
            ledger.append(
                [
                    _score_one(by_id[key[0]], key[1], speech[key], transcripts.get(key) or {},
                               voices, test_set, normalizer)
                    for key in batch
                ]
            )  # fmt: skip
        return [ledger.rows[key] for key in keys]


def _score_one(
    row: Utterance,
    take: int,
    clip: dict,
    transcript: dict,
    voices: Voices,
    test_set: EvalSet,
    normalizer: str,
) -> dict:
    facts, human = clip["audio_facts"], clip["human"]
    scored = metrics.score_clip(
        row.text,
        transcript["text"] if transcript.get("heard") else None,
        row.language,
        normalizer=normalizer,
        audio=AudioFacts(**facts) if facts else None,
        human=AudioFacts(**human) if human else None,
        hit_cap=clip["hit_cap"],
        transcript=transcript,
        no_baseline=clip["unsupported"],
    )
    if clip["took_sec"] and facts and facts["seconds"]:
        scored["rtf"] = clip["took_sec"] / facts["seconds"]
    entry = {"id": row.id, "take": take, "language": row.language}
    entry |= {"speaker": row.speaker, "text": row.text, "audio": clip["audio"]}
    entry |= scored | voices.similarities(clip, row, test_set)
    return entry | {"error": clip["error"]}


def _store(clip: Spoken, out: Path, name: str) -> dict:
    """The clip as a file and as facts; what cannot be read or written counts as not spoken."""
    entry = {"audio": None, "sha256": None, "audio_facts": None, "error": clip.error}
    entry |= {"hit_cap": clip.hit_cap, "took_sec": clip.took_sec, "unsupported": clip.unsupported}
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
                return entry | {"audio_facts": asdict(audio_facts(wav, rate_hz))}
            write_wav(path, wav, rate_hz)
    except (ValueError, FileNotFoundError) as error:
        return entry | {"error": str(error)}
    entry["audio"] = name if path == out / name else str(path)
    entry["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    entry["audio_facts"] = asdict(audio_facts(wav, rate_hz))
    return entry


def _facts_or_none(audio) -> dict | None:
    try:
        return None if audio is None else asdict(audio_facts(read_audio(audio, 24000), 24000))
    except (ValueError, FileNotFoundError):  # the human row counts it; here there is no ratio
        return None


def read_clip(out: Path, audio: str, rate_hz: int) -> np.ndarray:
    path = out / audio  # an absolute path stays what it is
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} was spoken but is gone: put it back, or delete {out} and start again"
        )
    return read_audio(path, rate_hz, max_sec=None)

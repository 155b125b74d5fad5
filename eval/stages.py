"""The stages of a run: speak, hear, measure voices, score. Each keeps its own JSONL file.

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

import numpy as np

from eval import metrics
from eval.asr import load_recognizer
from eval.sets import EvalSet
from eval.speaker import MIN_SAMPLES, centroid, cosine, load_encoder
from eval.systems import Request, Spoken, System, request_seed
from higgs_lab.audio import read_audio, write_wav
from higgs_lab.manifest import Utterance, file_stem
from higgs_lab.runlog import Progress, RunLog, read_jsonl, remove_leftovers

HEAR_SEC = 120.0  # of a runaway clip; it fails anyway, this is for the reader of the report
JUDGE_HZ = 16000


def speak(
    system: System, rows: Sequence[Utterance], out: Path, seed: int, takes: int
) -> dict[tuple, dict]:
    """Stage 1. One row per clip: where it lies and what its waveform says, or why there is none."""
    done, log = _open_stage(out / "speech.jsonl")
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


def hear(
    speech: dict[tuple, dict],
    rows: Sequence[Utterance],
    out: Path,
    asr: str,
    fp16: bool,
    device: str | None,
) -> dict[tuple, dict]:
    """Stage 2. What the recogniser wrote; heard=False where it does not know the language."""
    if asr == "none":
        return {}
    done, log = _open_stage(out / "transcripts.jsonl")
    pending = [key for key in speech if key not in done]
    if not pending:
        log.close()
        return done
    languages = {row.id: row.language for row in rows}
    recognizer = load_recognizer(asr, device, fp16)
    with log, Progress(len(speech), "clips", "hear", start=len(done)) as progress:
        for key in pending:
            clip, lang = speech[key], languages[key[0]]
            entry = {"id": key[0], "take": key[1], "heard": recognizer.hears(lang), "text": ""}
            facts = clip["audio_facts"]
            if entry["heard"] and facts and facts["active_sec"] >= metrics.ACTIVE_SEC:
                wav = _read(out, clip["audio"], JUDGE_HZ)[: int(HEAR_SEC * JUDGE_HZ)]
                entry |= recognizer.transcribe(wav, lang).as_dict()
            log.log(**entry)
            done[key] = entry
            progress.update()
    del recognizer
    _free_memory()
    return done


class Voices:
    """Stage 3. Embeddings by content hash, so that no sound is embedded twice."""

    def __init__(self, out: Path, encoder: str, device: str | None):
        self.out, self.spec, self.device = out, encoder, device
        self.vectors: dict[str, np.ndarray | None] = {}
        self._hashes: dict[str, str] = {}

    def embed(self, speech: dict[tuple, dict], test_set: EvalSet) -> None:
        """Embed the clips, the references and the recordings of the target speakers."""
        if self.spec == "none":
            return
        log = RunLog(self.out / "speakers.jsonl")
        for row in log.rows():
            vector = row["embedding"]
            self.vectors[row["sha256"]] = None if vector is None else np.float32(vector)
        wanted: dict[str, object] = {}
        for clip in speech.values():
            if clip["audio"]:
                wanted[clip["sha256"]] = self.out / clip["audio"]
        for row in test_set.rows:
            if row.ref_audio is not None:
                wanted[self.hash(row.ref_audio)] = row.ref_audio
        for recordings in test_set.voices.values():
            for row in recordings:
                wanted[self.hash(row.audio)] = row.audio
        pending = {sha: source for sha, source in wanted.items() if sha not in self.vectors}
        with log:
            if not pending:
                return
            encoder = load_encoder(self.spec, self.device)
            done = len(wanted) - len(pending)
            with Progress(len(wanted), "clips", "voices", start=done) as progress:
                for sha, source in pending.items():
                    vector = self._embed_one(encoder, source)
                    listed = None if vector is None else [round(float(x), 6) for x in vector]
                    log.log(sha256=sha, embedding=listed)
                    # As a resumed run will read it, so that both give the same digits.
                    self.vectors[sha] = None if listed is None else np.float32(listed)
                    progress.update()
        del encoder
        _free_memory()

    def similarities(self, clip: dict, row: Utterance, test_set: EvalSet) -> dict:
        """Cosine to the reference given, and to the centroid of the speaker's other recordings."""
        result = {"sim_ref": None, "sim_target": None}
        own = self.vectors.get(clip.get("sha256"))
        if own is None:
            return result
        reference = self.vectors.get(self.hash(row.ref_audio)) if row.ref_audio else None
        if reference is not None:
            result["sim_ref"] = cosine(own, reference)
        # Leave the row's own recording out: the human row would be compared with itself.
        not_these = {clip["sha256"]} | ({self.hash(row.audio)} if row.audio else set())
        hashes = {self.hash(r.audio) for r in test_set.voices.get(row.speaker, ())} - not_these
        others = [v for sha in sorted(hashes) if (v := self.vectors.get(sha)) is not None]
        if others:
            result["sim_target"] = cosine(own, centroid(others))
        return result

    def calibration(self, test_set: EvalSet) -> dict | None:
        """Mean cosine of two recordings of one speaker, and of two speakers, in this very set.

        The scale to read similarities on: an encoder's cosines mean nothing by themselves.
        """
        labelled = [
            (speaker, vector)
            for speaker, rows in test_set.voices.items()
            for sha in sorted({self.hash(row.audio) for row in rows} if self.vectors else ())
            if (vector := self.vectors.get(sha)) is not None
        ]
        if len(labelled) < 2:
            return None
        cosines = np.stack([v for _, v in labelled]) @ np.stack([v for _, v in labelled]).T
        names = np.array([speaker for speaker, _ in labelled])
        above = np.triu(np.ones_like(cosines, dtype=bool), 1)
        same = (names[:, None] == names[None]) & above
        pairs = {"same_speaker": cosines[same], "different_speakers": cosines[above & ~same]}
        return {
            name: {"mean": float(values.mean()) if len(values) else None, "pairs": len(values)}
            for name, values in pairs.items()
        }

    def hash(self, audio) -> str:
        """sha256 of a file's (or embedded clip's) bytes."""
        key = str(audio)
        if key not in self._hashes:
            with audio.open("rb") as file:
                self._hashes[key] = hashlib.sha256(file.read()).hexdigest()
        return self._hashes[key]

    def _embed_one(self, encoder, source) -> np.ndarray | None:
        try:
            wav = read_audio(source, JUDGE_HZ, max_sec=None)[: int(HEAR_SEC * JUDGE_HZ)]
        except ValueError:  # unreadable: no voice; the speech stage has counted it
            return None
        facts = metrics.audio_facts(wav, JUDGE_HZ)
        if len(wav) < MIN_SAMPLES or facts.active_sec < metrics.ACTIVE_SEC:
            return None
        return encoder.embed(wav)


def score(
    speech: dict[tuple, dict],
    transcripts: dict[tuple, dict],
    voices: Voices,
    test_set: EvalSet,
    out: Path,
    normalizer: str,
) -> list[dict]:
    """Stage 4. All measures of each clip, in the order of the set."""
    done, log = _open_stage(out / "scores.jsonl")
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


def _read(out: Path, audio: str, rate_hz: int) -> np.ndarray:
    path = out / audio  # an absolute path stays what it is
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} was spoken but is gone: put it back, or delete {out} and start again"
        )
    return read_audio(path, rate_hz, max_sec=None)


def _open_stage(path: Path) -> tuple[dict[tuple, dict], RunLog]:
    """What a stage has done already, by (id, take), and its log, opened for more."""
    log = RunLog(path)  # cuts an unfinished last line
    return {(row["id"], row["take"]): row for row in read_jsonl(path)}, log


def _free_memory() -> None:
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()

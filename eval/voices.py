"""Stage 3 of a run: whose voice it is, into speakers.jsonl."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from eval import metrics
from eval.acoustics import active_sec
from eval.asr import free_memory
from eval.pace import Pace
from eval.sets import EvalSet
from eval.speaker import centroid, cosine, encoder_details, load_encoder
from eval.stages import HEAR_SEC, JUDGE_HZ
from eval.work import Cache, Ledger, chunks
from higgs_lab.audio import read_audio
from higgs_lab.manifest import Utterance

BATCH = 32  # clips that a process claims at once
SCALE_CLIPS = 2000  # recordings of the set that the scale of similarities is measured on, at most


class Voices:
    """Stage 3. Embeddings by content hash, so that no sound is embedded twice."""

    def __init__(
        self, out: Path, encoder: str, device: str | None, cache: str | Path | None = None
    ):
        self.out, self.spec, self.device, self.cache = out, encoder, device, cache
        self.vectors: dict[str, np.ndarray | None] = {}
        self._hashes: dict[str, str] = {}

    def embed(self, speech: dict[tuple, dict], test_set: EvalSet) -> None:
        """Embed the clips, the references and the recordings of the target speakers."""
        if self.spec == "none":
            return
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
        encoder = None
        batches = chunks([(sha,) for sha in sorted(wanted)], BATCH)
        kept = Cache(self.cache, "voices", encoder_details(self.spec), ("sha256",))
        pace = Pace(self.cache, "voices", self.spec, self.device)
        with Ledger(self.out / "speakers.jsonl", ("sha256",)) as ledger, kept, pace:
            for batch in ledger.claim(batches, "voices"):
                entries = []
                for (sha,) in batch:
                    known = kept.get(sha)
                    if known is None:
                        encoder = encoder or load_encoder(self.spec, self.device)
                        with pace.measured() as sounds:
                            known = {"embedding": self._embed_one(encoder, wanted[sha], sounds)}
                        kept.put([{"sha256": sha} | known])
                    entries.append({"sha256": sha} | known)
                ledger.append(entries)
            for (sha,), row in ledger.rows.items():
                vector = row["embedding"]
                self.vectors[sha] = None if vector is None else np.float32(vector)
        del encoder
        free_memory()

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
        """How this encoder tells the voices of this very set apart: the scale of similarities.

        Per measure the cosines of the set's own recordings: "sim_ref" between two clips,
        "sim_target" between a clip and a speaker's centroid (of the speaker's other clips). Means
        of the same and of different speakers, their pairs, and the equal error rate, at which a
        threshold takes one for the other. None without two recordings.
        """
        found = {
            speaker: [
                vector
                for sha in sorted({self.hash(row.audio) for row in rows} if self.vectors else ())
                if (vector := self.vectors.get(sha)) is not None
            ]
            for speaker, rows in test_set.voices.items()
        }
        found = {speaker: vectors for speaker, vectors in found.items() if vectors}
        each = max(2, SCALE_CLIPS // max(1, len(found)))  # every pair is looked at
        found = dict(list((s, v[:each]) for s, v in found.items())[: SCALE_CLIPS // 2])
        if sum(map(len, found.values())) < 2:
            return None
        vectors = np.stack([vector for clips in found.values() for vector in clips])
        speaker = np.repeat(np.arange(len(found)), [len(clips) for clips in found.values()])
        same = speaker[:, None] == speaker[None]
        above = np.triu(np.ones_like(same), 1)
        to_clip = vectors @ vectors.T
        # A clip is left out of its own speaker's centroid.
        is_own = speaker[:, None] == np.arange(len(found))[None]
        sums = is_own.T.astype(np.float32) @ vectors
        to_voice = vectors @ (sums / np.linalg.norm(sums, axis=1, keepdims=True)).T
        others = sums[speaker] - vectors
        lengths = np.linalg.norm(others, axis=1)
        has_others = np.array([len(clips) for clips in found.values()])[speaker] > 1
        own = (vectors * others).sum(axis=1)[has_others] / lengths[has_others]
        return {
            "sim_ref": _scale(to_clip[same & above], to_clip[~same & above]),
            "sim_target": _scale(own, to_voice[~is_own]),
        }

    def hash(self, audio) -> str:
        """sha256 of a file's (or embedded clip's) bytes."""
        key = str(audio)
        if key not in self._hashes:
            with audio.open("rb") as file:
                self._hashes[key] = hashlib.sha256(file.read()).hexdigest()
        return self._hashes[key]

    def _embed_one(self, encoder, source, sounds: list[float]) -> list[float] | None:
        try:
            wav = read_audio(source, JUDGE_HZ, max_sec=None)[: int(HEAR_SEC * JUDGE_HZ)]
        except ValueError:  # unreadable: no voice; the speech stage has counted it
            return None
        sounds.append(len(wav) / JUDGE_HZ)
        if len(wav) < encoder.min_samples or active_sec(wav, JUDGE_HZ) < metrics.ACTIVE_SEC:
            return None
        return [round(float(x), 6) for x in encoder.embed(wav)]


def calibrated(block: dict, calibration: dict | None) -> dict:
    """Mean similarities of a summary's block on a scale of its set's own recordings.

    0 is what different speakers reach, 1 what two recordings of one speaker do; None where the set
    cannot say (one speaker, or one recording of each).
    """
    found = {}
    for name in ("sim_ref", "sim_target"):
        scale, value = (calibration or {}).get(name) or {}, block[name]
        low, high = scale.get("different"), scale.get("same")
        known = value is not None and low is not None and high is not None and high > low
        found[f"{name}_calibrated"] = (value["value"] - low) / (high - low) if known else None
    return found


def equal_error_rate(same: np.ndarray, different: np.ndarray) -> float | None:
    """Where as many same pairs lie below a threshold as different ones lie at or above it."""
    if not len(same) or not len(different):
        return None
    thresholds = np.unique(np.concatenate([same, different, [np.inf]]))
    misses = np.searchsorted(np.sort(same), thresholds) / len(same)
    alarms = 1 - np.searchsorted(np.sort(different), thresholds) / len(different)
    nearest = int(np.argmin(np.abs(misses - alarms)))
    return float((misses[nearest] + alarms[nearest]) / 2)


def _scale(same: np.ndarray, different: np.ndarray) -> dict:
    return {
        "same": float(same.mean()) if len(same) else None,
        "different": float(different.mean()) if len(different) else None,
        "pairs": [len(same), len(different)],
        "eer": equal_error_rate(same, different),
    }

"""Stage 3 of a run: whose voice it is, into speakers.jsonl."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from eval import metrics
from eval.acoustics import active_sec
from eval.asr import free_memory
from eval.sets import EvalSet
from eval.speaker import MIN_SAMPLES, centroid, cosine, encoder_details, load_encoder
from eval.stages import HEAR_SEC, JUDGE_HZ
from eval.work import Cache, Ledger, chunks
from higgs_lab.audio import read_audio
from higgs_lab.manifest import Utterance

BATCH = 32  # clips that a process claims at once


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
        with Ledger(self.out / "speakers.jsonl", ("sha256",)) as ledger, kept:
            for batch in ledger.claim(batches, "voices"):
                entries = []
                for (sha,) in batch:
                    known = kept.get(sha)
                    if known is None:
                        encoder = encoder or load_encoder(self.spec, self.device)
                        known = {"embedding": self._embed_one(encoder, wanted[sha])}
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

    def _embed_one(self, encoder, source) -> list[float] | None:
        try:
            wav = read_audio(source, JUDGE_HZ, max_sec=None)[: int(HEAR_SEC * JUDGE_HZ)]
        except ValueError:  # unreadable: no voice; the speech stage has counted it
            return None
        if len(wav) < MIN_SAMPLES or active_sec(wav, JUDGE_HZ) < metrics.ACTIVE_SEC:
            return None
        return [round(float(x), 6) for x in encoder.embed(wav)]

"""Stage 2 of a run: what the recogniser wrote, into transcripts.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eval import metrics
from eval.asr import load_recognizer, recognizer_details
from eval.stages import HEAR_SEC, JUDGE_HZ, free_memory, read_clip
from eval.work import Cache, Ledger, chunks
from higgs_lab.manifest import Utterance

BATCH = 16  # clips that a process claims at once


def hear(
    speech: dict[tuple, dict],
    rows: Sequence[Utterance],
    out: Path,
    asr: str,
    fp16: bool,
    device: str | None,
    cache: str | Path | None = None,
) -> dict[tuple, dict]:
    """Stage 2. What the recogniser wrote; heard=False where it does not know the language."""
    if asr == "none":
        return {}
    languages = {row.id: row.language for row in rows}
    kept = Cache(cache, "heard", recognizer_details(asr, fp16), ("sha256", "language"))
    recognizer = None
    with Ledger(out / "transcripts.jsonl") as ledger, kept:
        for batch in ledger.claim(chunks(sorted(speech), BATCH), "hear"):
            entries = []
            for id, take in batch:
                clip, lang = speech[id, take], languages[id]
                facts = clip["audio_facts"]
                audible = bool(facts) and facts["active_sec"] >= metrics.ACTIVE_SEC
                known = kept.get(clip["sha256"], lang) if audible else None
                if known is None:
                    recognizer = recognizer or load_recognizer(asr, device, fp16)
                    known = {"heard": recognizer.hears(lang), "text": ""}
                    if known["heard"] and audible:
                        wav = read_clip(out, clip["audio"], JUDGE_HZ)[: int(HEAR_SEC * JUDGE_HZ)]
                        known |= recognizer.transcribe(wav, lang).as_dict()
                        kept.put([{"sha256": clip["sha256"], "language": lang} | known])
                entries.append({"id": id, "take": take} | known)
            ledger.append(entries)
        heard = ledger.rows
    del recognizer
    free_memory()
    return heard

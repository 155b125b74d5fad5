"""Stage 2 of a run: what the recogniser wrote, into transcripts.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eval import metrics
from eval.asr import load_recognizer
from eval.stages import HEAR_SEC, JUDGE_HZ, free_memory, open_stage, read_clip
from higgs_lab.manifest import Utterance
from higgs_lab.runlog import Progress


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
    done, log = open_stage(out / "transcripts.jsonl")
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
                wav = read_clip(out, clip["audio"], JUDGE_HZ)[: int(HEAR_SEC * JUDGE_HZ)]
                entry |= recognizer.transcribe(wav, lang).as_dict()
            log.log(**entry)
            done[key] = entry
            progress.update()
    del recognizer
    free_memory()
    return done

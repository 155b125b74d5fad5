"""Stage 2 of a run: what the recogniser wrote, into transcripts.jsonl."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from eval import metrics
from eval.acoustics import AudioFacts
from eval.asr import free_memory, load_recognizer, recognizer_details, together
from eval.pace import Pace
from eval.stages import HEAR_SEC, JUDGE_HZ, read_clip
from eval.work import Cache, Ledger, chunks
from higgs_lab.manifest import Utterance

# Clips that a process claims at once, and a killed one loses: what a GPU decodes together.
BATCH = 128
CPU_BATCH = 16


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
    languages, texts = {row.id: row.language for row in rows}, {row.id: row.text for row in rows}
    details = recognizer_details(asr, fp16, set(languages.values()))

    def judged_by(lang: str) -> dict:
        return {"title": details["routes"][lang]} if "routes" in details else details

    def length(key: tuple) -> float:
        return (speech[key]["audio_facts"] or {}).get("seconds", 0.0)

    def most_sec(key: tuple) -> float:
        """A runaway is not heard to its end; it fails anyway."""
        human = speech[key]["human"]
        human = AudioFacts(**human) if human else None
        return max(HEAR_SEC, metrics.runaway_sec(texts[key[0]], human))

    # By recogniser, and clips of about one length together: they end at about the same step.
    order = sorted(speech, key=lambda k: (together(asr, languages[k[0]]), -length(k), k))
    recognizer = None
    with contextlib.ExitStack() as stack:
        ledger = stack.enter_context(Ledger(out / "transcripts.jsonl"))
        pace = stack.enter_context(Pace(cache, "hear", asr, device))
        caches: dict[str, Cache] = {}

        def kept_by(lang: str) -> Cache:
            """One cache for all languages of one judge: it is read whole."""
            judge = judged_by(lang)
            if (name := repr(judge)) not in caches:
                kept = Cache(cache, "heard", judge, ("sha256", "language"))
                caches[name] = stack.enter_context(kept)
            return caches[name]

        for batch in ledger.claim(chunks(order, BATCH if _on_gpu(device) else CPU_BATCH), "hear"):
            found: dict[tuple, dict] = {}
            for key in batch:
                lang = languages[key[0]]
                if (known := kept_by(lang).get(speech[key]["sha256"], lang)) is not None:
                    found[key] = known
            todo = [key for key in batch if key not in found]
            if todo and recognizer is None:
                recognizer = load_recognizer(asr, device, fp16)
                stack.callback(recognizer.close)
            audible = [key for key in todo if _audible(speech[key])]
            wavs = _read_all(out, [(speech[key]["audio"], most_sec(key)) for key in audible])
            langs = [languages[key[0]] for key in audible]
            if audible:
                with pace.measured() as sounds:
                    heard = recognizer.transcribe_all(wavs, langs)
                    sounds += [len(wav) / JUDGE_HZ for wav in wavs]
                for key, transcript in zip(audible, heard, strict=True):
                    lang = languages[key[0]]
                    found[key] = {"heard": transcript is not None, "text": ""}
                    found[key] |= transcript.as_dict() if transcript else {}
                    # An error may not come again, a worker may learn a language under its old
                    # revision, and how much of a runaway is heard is its text's.
                    kept = transcript is not None and not transcript.error
                    if kept and length(key) <= most_sec(key):
                        row = {"sha256": speech[key]["sha256"], "language": lang} | found[key]
                        kept_by(lang).put([row])
            for key in todo:  # nothing to hear, so nothing is heard
                if key not in found:
                    found[key] = {"heard": recognizer.hears(languages[key[0]]), "text": ""}
            ledger.append([{"id": key[0], "take": key[1]} | found[key] for key in batch])
        heard = ledger.rows
    del recognizer
    free_memory()
    return heard


def _audible(clip: dict) -> bool:
    facts = clip["audio_facts"]
    return bool(facts) and facts["active_sec"] >= metrics.ACTIVE_SEC


def _read_all(out: Path, clips: Sequence[tuple[str, float]]) -> list[np.ndarray]:
    """Clips by name, each up to so many seconds."""

    def read(clip: tuple[str, float]) -> np.ndarray:
        name, most_sec = clip
        return read_clip(out, name, JUDGE_HZ)[: int(most_sec * JUDGE_HZ)]

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(read, clips))


def _on_gpu(device: str | None) -> bool:
    import torch

    return device != "cpu" and torch.cuda.is_available()

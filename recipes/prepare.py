"""Turn recordings and their texts into prepared data: codes, with what made them.

    python recipes/prepare.py source=my/manifest.jsonl model=bosonai/higgs-tts-3-4b out=my/prepared
    accelerate launch recipes/prepare.py --config recipes/configs/prepare.yaml source=... out=...

`source` is a manifest, an LJSpeech folder, a folder of wav+txt, a CSV file or a Hugging Face data
set (see higgs_lab/corpora.py). Clips that cannot be used are left out and listed with the reason
in OUT/rejects.jsonl. Killed and started again it goes on where it stopped, with the same result;
under `accelerate launch` the processes share the work.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from higgs_lab.audio import AudioSource, audio_info
from higgs_lab.checkpoint import resolve_checkpoint
from higgs_lab.config import MISSING, cli, one_line_errors
from higgs_lab.corpora import open_data
from higgs_lab.manifest import Utterance
from higgs_lab.prepared import (
    ENCODER,
    INFO,
    MAY_BE_WRONG,
    assign_splits,
    may_be_wrong,
    save_prepared,
    split_table,
    text_key,
)
from higgs_lab.runlog import Progress, provenance
from higgs_lab.tags import check_text, lint_tags
from higgs_lab.text import max_frames_for
from recipes.prepare_parts import Clip, encode_parts, identity, load_part, plan_parts, wait_for

if TYPE_CHECKING:
    from higgs_lab.codec import Codec

# Both serving engines take references of 1 to 30 s (vllm-omni serving_speech.py).
REF_MIN_SEC, REF_MAX_SEC = 1.0, 30.0
MIN_FRAMES = 8  # with fewer, the last codebook begins after the first has ended (facts §3.4)


@dataclass
class PrepareConfig:
    source: str = MISSING  # manifest, LJSpeech folder, wav+txt folder, CSV, or HF data set
    model: str = MISSING  # checkpoint with codec and tokenizer: folder, hub name[@revision] or nano
    out: str = MISSING  # folder to write
    split_valid: float = 0.05  # for validation: a share of the rows (< 1) or their number
    seed: int = 0  # of the validation draw
    min_sec: float = 1.0  # shorter clips are left out (at least 0.32)
    max_sec: float = 30.0  # longer clips are left out
    max_clipped_share: float | None = None  # leave out clips with more samples at full scale
    max_edge_silence_sec: float | None = None  # leave out clips with a longer silence at an end
    min_level_dbfs: float | None = None  # leave out quieter clips
    speaker: str | None = None  # speaker of rows that name none
    language: str | None = None  # language of rows that name none
    hf_split: str | None = None  # split of a Hugging Face data set
    text_column: str | None = None  # text column of a Hugging Face data set, if unusual
    audio_column: str | None = None  # audio column of a Hugging Face data set, if unusual
    device: str = "auto"  # cpu, cuda, cuda:N, or auto: this process's GPU if there is one
    part_sec: float = 300.0  # seconds of audio encoded between two saves
    precision: str = "fp32"  # fp32, the reference; tf32, fp16, bf16: faster, some other codes

    def __post_init__(self):
        if not MIN_FRAMES / 25 <= self.min_sec < self.max_sec:
            raise ValueError(
                f"min_sec={self.min_sec} and max_sec={self.max_sec}: 0.32 <= min_sec < max_sec "
                "is needed (8 frames, below which the delay pattern has no complete frame)"
            )
        if self.split_valid < 0 or (self.split_valid > 1 and self.split_valid % 1):
            raise ValueError(f"split_valid={self.split_valid}: a share below 1, or a whole number")


def main(config: PrepareConfig, codec: "Codec | None" = None) -> Path:
    """Prepare `config.source`; returns the folder written. Safe to run in several processes.

    codec: instead of the checkpoint's own.
    """
    from higgs_lab.codec import Codec
    from higgs_lab.device import chosen_device
    from higgs_lab.precision import check_precision
    from higgs_lab.vocab import Vocab

    device = codec.device if codec else chosen_device(config.device)
    check_precision(config.precision, device)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    out, checkpoint = Path(config.out), resolve_checkpoint(config.model)
    vocab = Vocab.from_pretrained(checkpoint.path)
    rows = open_data(
        config.source, config.hf_split, config.text_column, config.audio_column, check_files=False
    )
    codec = codec or Codec.from_pretrained(checkpoint.path, device=device)
    fingerprint = _fingerprint(config, rows, codec.hash)
    if _finished(out, fingerprint):
        if rank == 0:
            print(f"{out} is prepared already, with these settings and files: nothing to do")
        return out

    rejects, seconds = screen(rows, config, vocab.added_tokens, show=rank == 0)
    made_by = f"{codec.hash} {config.precision} {ENCODER}"
    parts = plan_parts(
        (row for row in rows if row.id not in rejects), seconds, config.part_sec, made_by
    )
    work = out.with_name(out.name + ".parts")
    work.mkdir(parents=True, exist_ok=True)
    finished = lambda: _finished(out, fingerprint)  # noqa: E731
    encode_parts(codec, parts, work, rank, world, finished, rank == 0, config.precision)
    if rank != 0:
        return out  # the first process writes the result
    wait_for([work / f"{name}.npz" for name in parts])
    clips = {}
    for name, sources in parts.items():
        clips |= zip(map(str, sources), load_part(work / f"{name}.npz"), strict=True)
    good, checks = assemble(rows, clips, rejects, config)
    if not good:
        reasons = Counter(reject["reason"] for reject in rejects.values()).most_common(3)
        listed = "; ".join(f"{n} x {reason}" for reason, n in reasons)
        raise ValueError(f"{config.source}: no clip can be used ({listed})")
    splits = split_table(good)
    info = {
        "codec_hash": codec.hash,
        "model": {"name": checkpoint.name, "revision": checkpoint.revision},
        "num_codebooks": codec.num_codebooks,
        "sample_rate_hz": codec.sample_rate_hz,
        "frame_rate_hz": codec.sample_rate_hz / codec.samples_per_frame,
        "splits": splits,
        "rejected": len(rejects),
        "checks": checks,
        "fingerprint": fingerprint,
        "config": asdict(config),
        "provenance": provenance(),
    }
    listed = [rejects[row.id] for row in rows if row.id in rejects]
    save_prepared(out, good, codec.num_codebooks, info, listed)
    shutil.rmtree(work, ignore_errors=True)
    _report(out, splits, listed, checks)
    return out


def screen(
    rows: list[Utterance], config: PrepareConfig, added_tokens: frozenset[str], show: bool = True
) -> tuple[dict[str, dict], dict[str, float]]:
    """Look at texts and headers: rejects by id, and the seconds of every readable recording."""
    seconds: dict[str, float] = {}

    def check(source: AudioSource, least: float, most: float, what: str) -> None:
        if str(source) not in seconds:
            seconds[str(source)] = audio_info(source).seconds
        _check_length(seconds[str(source)], least, most, what)

    def reason(row: Utterance) -> str | None:
        try:
            check_text(row.text, added_tokens=added_tokens)
            check(row.audio, config.min_sec, config.max_sec, "")
            if row.ref_text is not None:
                check_text(row.ref_text, "ref_text", added_tokens)
            if row.ref_audio is not None:
                check(row.ref_audio, REF_MIN_SEC, REF_MAX_SEC, "ref_audio ")
        except (ValueError, OSError) as error:
            return str(error)
        return None

    rejects = {}
    with ThreadPoolExecutor(8) as pool, Progress(len(rows), "clips", "look", enabled=show) as bar:
        for row, why in zip(rows, pool.map(reason, rows), strict=True):
            if why:
                rejects[row.id] = _reject(row, why)
            bar.update()
    return rejects, seconds


def assemble(
    rows: list[Utterance], clips: dict[str, Clip], rejects: dict[str, dict], config: PrepareConfig
) -> tuple[list[dict], dict]:
    """Rows to save, in manifest order, and what the data checks found; adds to `rejects`."""
    good, seen, levels = [], {}, []
    warnings = Counter()
    for row in rows:
        if row.id in rejects:
            continue
        clip, ref = clips[str(row.audio)], clips.get(str(row.ref_audio))
        if why := _unusable(clip, ref, seen, config):
            rejects[row.id] = _reject(row, why)
            continue
        seen[clip.facts["hash"]] = row.id
        levels.append(clip.facts)
        warnings["misplaced tags (higgs_lab.tags.lint_tags)"] += bool(lint_tags(row.text))
        unlikely = len(clip.codes) > max_frames_for(row.text)
        warnings["recording far too long for its text"] += unlikely
        warnings["more than 0.1 % of samples at full scale"] += clip.facts["clipped_share"] > 0.001
        alone = not (row.speaker or config.speaker or row.ref_audio)
        warnings["no speaker or ref_audio: trains no cloning (speaker=NAME if it is one)"] += alone
        edge = max(clip.facts["lead_silence_sec"], clip.facts["tail_silence_sec"])
        warnings["more than 1 s of silence at an end"] += edge > 1
        good.append(
            {
                "id": row.id,
                "text": row.text.strip(),
                "language": row.language or config.language,
                "speaker": row.speaker or config.speaker,
                "codes": clip.codes,
                "frames": len(clip.codes),
                "seconds": clip.facts["seconds"],
                "ref_codes": ref.codes if ref else clip.codes[:0],
                "ref_text": row.ref_text and row.ref_text.strip(),
                "split": row.split,
                "audio": str(row.audio),
            }
        )
    assign_splits(good, config.split_valid, config.seed)
    texts = {
        name: {text_key(r["text"]) for r in good if r["split"] == name}
        for name in ("train", "valid")
    }
    warnings["texts both in train and valid (the manifest says so)"] = len(
        texts["train"] & texts["valid"]
    )
    return good, {"levels": _spread(levels), "warnings": {k: v for k, v in warnings.items() if v}}


def _unusable(
    clip: Clip, ref: Clip | None, seen: dict[str, str], config: PrepareConfig
) -> str | None:
    facts = clip.facts
    if clip.codes is None:
        return facts["error"]
    try:
        _check_length(facts["seconds"], config.min_sec, config.max_sec)
        if ref is not None and ref.codes is not None:
            _check_length(ref.facts["seconds"], REF_MIN_SEC, REF_MAX_SEC, "ref_audio ")
    except ValueError as error:  # the header promised another length
        return str(error)
    if facts["level_dbfs"] is None:
        return "the recording is silent"
    if facts["hash"] in seen:
        return f"the same recording as {seen[facts['hash']]!r}"
    if config.max_clipped_share is not None and facts["clipped_share"] > config.max_clipped_share:
        return f"{100 * facts['clipped_share']:.2g} % of the samples are at full scale (clipped)"
    for end in ("lead", "tail"):
        silence = facts[f"{end}_silence_sec"]
        if config.max_edge_silence_sec is not None and silence > config.max_edge_silence_sec:
            return f"{silence:.1f} s of silence at the {'start' if end == 'lead' else 'end'}"
    if config.min_level_dbfs is not None and facts["level_dbfs"] < config.min_level_dbfs:
        return f"too quiet ({facts['level_dbfs']:.0f} dBFS)"
    if ref is not None and ref.codes is None:
        return f"ref_audio: {ref.facts['error']}"
    if ref is not None and ref.facts["hash"] == facts["hash"]:
        return "ref_audio is the same recording as audio: the voice could be copied from the answer"
    return None


def _check_length(seconds: float, least: float, most: float, what: str = "") -> None:
    if seconds < least:
        raise ValueError(f"{what}too short: {seconds:.2f} s, at least {least:g} s wanted")
    if seconds > most:
        raise ValueError(f"{what}too long: {seconds:.1f} s, at most {most:g} s wanted")


def _reject(row: Utterance, reason: str) -> dict:
    return {"id": row.id, "where": row.where, "audio": str(row.audio), "reason": reason}


def _fingerprint(config: PrepareConfig, rows: list[Utterance], codec_hash: str) -> str:
    """Changes with anything that changes more of the result than a GPU's rounding does."""
    settings = {k: v for k, v in asdict(config).items() if k not in ("out", "device", "part_sec")}
    if config.precision == "fp32":  # data prepared before there was a choice are the reference
        del settings["precision"]
    digest = hashlib.sha256(json.dumps([settings, codec_hash]).encode())
    for row in rows:
        files = [identity(s) for s in (row.audio, row.ref_audio) if s is not None]
        texts = [row.id, row.text, row.speaker, row.language, row.ref_text, row.split]
        digest.update(json.dumps([files, texts]).encode())
    return digest.hexdigest()[:24]


def _finished(out: Path, fingerprint: str) -> bool:
    """Whether `out` holds this very result; any other content of that name is not overwritten."""
    if not out.exists():
        return False
    info = json.loads((out / INFO).read_text()) if (out / INFO).is_file() else {}
    made, what = info.get("fingerprint"), "exists and was prepared with other settings or files"
    if made == fingerprint and not may_be_wrong(info):
        return True
    if not made:
        what = "exists and is no prepared data"
    elif made == fingerprint:
        what = MAY_BE_WRONG
    raise FileExistsError(f"{out} {what}: remove it or choose another out=...")


def _spread(levels: list[dict]) -> dict:
    """5 %, 50 % and 95 % points of each level over the clips kept."""
    keys = ("level_dbfs", "peak", "lead_silence_sec", "tail_silence_sec", "seconds")
    points = (5, 50, 95)
    return {
        key: [round(float(p), 3) for p in np.percentile([fact[key] for fact in levels], points)]
        for key in keys
        if levels
    }


def _report(out: Path, splits: dict, rejects: list[dict], checks: dict) -> None:
    for name, entry in sorted(splits.items()):
        print(f"{name}: {entry['clips']} clips, {entry['hours']:.2f} h")
    for key, points in checks["levels"].items():
        print(f"{key} (5, 50, 95 % of clips): {', '.join(f'{p:g}' for p in points)}")
    for warning, count in checks["warnings"].items():
        print(f"look at your data: {count} x {warning}")
    if rejects:
        print(f"{len(rejects)} clips left out, reasons in {out / 'rejects.jsonl'}; the first: "
              f"{rejects[0]['id']}: {rejects[0]['reason']}")  # fmt: skip
    print(f"prepared data in {out}")


if __name__ == "__main__":
    with one_line_errors("prepare"):
        main(cli(PrepareConfig, __doc__))

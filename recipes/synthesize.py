"""Speak texts with a checkpoint, and an adapter if given: wavs and a manifest of them.

    python recipes/synthesize.py model=nano text="Hello there." out=runs/hello
    python recipes/synthesize.py --config recipes/configs/synthesize.yaml source=texts.txt out=...

`source` is a text file (one text per line), a manifest, or other data that higgs_lab/corpora.py
reads. OUT gets wavs/, manifest.jsonl (with stop reason, seed and length of each take in `info`),
config.yaml and provenance.json. Long texts are split at sentence bounds and joined. Killed and
started again it goes on with the same result; what is lost are the up to eight times `batch_size`
takes that it was at. Other settings are refused there.
"""

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import higgs_lab
from higgs_lab.audio import AudioSource, audio_info, read_audio, write_wav
from higgs_lab.checkpoint import Checkpoint, resolve_checkpoint
from higgs_lab.config import MISSING, cli, one_line_errors, save_config
from higgs_lab.corpora import open_data
from higgs_lab.manifest import Utterance, file_stem, read_manifest, write_manifest
from higgs_lab.runlog import (
    Progress,
    RunLog,
    fingerprint,
    provenance,
    read_jsonl,
    remove_leftovers,
    write_json_atomic,
)
from higgs_lab.text import speech_units

if TYPE_CHECKING:
    from torch import Tensor

    from higgs_lab.generate import Sampling
    from higgs_lab.speech import Higgs
    from higgs_lab.vocab import Vocab

# Both serving engines take references of 1 to 30 s (vllm-omni serving_speech.py).
REF_MIN_SEC, REF_MAX_SEC = 1.0, 30.0
SETTINGS = "settings.json"
BATCHES_PER_WINDOW = 8  # spoken in one go, the next take beginning where one ends; lost by a kill


@dataclass
class SynthesizeConfig:
    model: str = MISSING  # checkpoint: folder, hub name[@revision] or nano
    out: str = MISSING  # folder to write
    source: str | None = None  # text file (a text per line), manifest or other data; or give text
    text: str | None = None  # a single text
    adapter: str | None = None  # LoRA folder of a fine-tune
    ref_audio: str | None = None  # voice of the texts that name none: a clip of 1 to 30 s
    ref_text: str | None = None  # its exact transcript
    takes: int = 1  # recordings of each text, with the seeds seed, seed + 1, ...
    seed: int = 42  # the same seed gives the same take
    mode: str = "vllm"  # sample as this engine does: vllm or sglang
    temperature: float | None = None  # null: the engine's default
    top_k: int | None = None  # null: the engine's default
    top_p: float | None = None  # null: the engine's default
    max_frames: int | None = None  # longest take, 25 frames a second; null: by the text's length
    max_chars: int = 300  # longer texts are split (Latin letters; a Han character counts 3)
    batch_size: int | None = None  # texts spoken at once; null: 64 on a GPU, 16 on the CPU
    device: str | None = None  # null: the GPU if there is one
    dtype: str | None = None  # bfloat16 or float32; null: as stored on a GPU, float32 on the CPU
    # of the codec: fp32, bf16, on a GPU tf32 and fp16 too; null: fp16 on a GPU, fp32 on the CPU
    decode_precision: str | None = None

    def __post_init__(self):
        if (self.source is None) == (self.text is None):
            raise ValueError('give either source=FILE or text="..."')
        if self.ref_text is not None and self.ref_audio is None:
            raise ValueError("ref_text is the transcript of ref_audio: give ref_audio too")
        for name in ("takes", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")


@dataclass(frozen=True)
class Take:
    """One recording to make."""

    row: Utterance
    seed: int
    stem: str  # of the wav file
    key: str  # changes with anything that changes the sound of this take, settings apart


def main(config: SynthesizeConfig) -> Path:
    """Speak everything that is not spoken yet; returns the manifest written."""
    from higgs_lab.speech import default_batch_size
    from higgs_lab.vocab import Vocab

    rows, sampling = read_texts(config), sampling_of(config)
    checkpoint, out = resolve_checkpoint(config.model), Path(config.out)
    check_rows(rows, Vocab.from_pretrained(checkpoint.path))
    takes = plan_takes(rows, config)
    config = replace(config, decode_precision=_decode_precision(config, out))
    settings = _settings(config, checkpoint)
    _refuse_other_run(out, settings)
    remove_leftovers(out / "wavs")
    file = out / "speech.jsonl"
    spoken = {row["key"]: row for row in read_jsonl(file)} if file.is_file() else {}
    done = {key for key, row in spoken.items() if _is_there(row, out)}
    # Takes of similar length go together. What is missing is cut anew, so that a run that was
    # killed goes on with the same windows: a take's rounding depends on who is spoken beside it.
    ordered = sorted(takes, key=lambda take: (speech_units(take.row.text), take.stem))
    todo = [take for take in ordered if take.key not in done]
    if todo:
        higgs = higgs_lab.load(
            config.model, config.adapter, config.device, config.dtype, config.decode_precision
        )
        batch_size = config.batch_size or default_batch_size(higgs.talker.device)
        size = BATCHES_PER_WINDOW * batch_size
        windows = [todo[i : i + size] for i in range(0, len(todo), size)]
        _record(out, settings, config, checkpoint)  # what cannot be loaded leaves no folder
        references: dict[str, Tensor] = {}
        start = len(takes) - len(todo)
        with RunLog(file) as log, Progress(len(takes), "texts", "speak", start=start) as bar:
            for window in windows:
                records = []
                for record in speak(higgs, window, sampling, config, out, references):
                    records.append(record)
                    bar.update()
                log.log_all(records)  # together: a window that is cut short is spoken anew
                spoken |= {record["key"]: record for record in records}
    return _write_results(takes, [spoken[take.key] for take in takes], out)


def read_texts(config: SynthesizeConfig) -> list[Utterance]:
    """What to speak; rows without a voice of their own get the config's.

    Raises FileNotFoundError or ValueError as the readers do, and for a file without texts.
    """
    if config.text is not None:
        rows = [Utterance(None, config.text, "text", where="text")]
    elif Path(config.source).suffix.lower() == ".txt":
        rows = _read_lines(Path(config.source))
    elif Path(config.source).suffix.lower() == ".jsonl":
        rows = read_manifest(config.source, check_files=False)
    else:
        rows = open_data(config.source, check_files=False)
    if config.ref_audio is None:
        return rows
    voice = {"ref_audio": Path(config.ref_audio).absolute(), "ref_text": config.ref_text}
    return [row if row.ref_audio is not None else replace(row, **voice) for row in rows]


def check_rows(rows: Iterable[Utterance], vocab: "Vocab") -> None:
    """Refuse bad texts and references before anything is spoken, naming the row."""
    seconds: dict[str, float] = {}
    for row in rows:
        vocab.encode(row.text, where=f"{row.where}, field text")
        if row.ref_text is not None:
            vocab.encode(row.ref_text, where=f"{row.where}, field ref_text")
        if (ref := row.ref_audio) is not None:
            if str(ref) not in seconds:
                seconds[str(ref)] = audio_info(ref).seconds
            if not REF_MIN_SEC <= seconds[str(ref)] <= REF_MAX_SEC:
                raise ValueError(
                    f"{row.where}, field ref_audio: {ref} lasts {seconds[str(ref)]:.1f} s; the "
                    f"servers take {REF_MIN_SEC:g} to {REF_MAX_SEC:g} s: cut it, and its ref_text"
                )


def plan_takes(rows: Iterable[Utterance], config: SynthesizeConfig) -> list[Take]:
    takes = []
    for row in rows:
        for number in range(config.takes):
            stem = file_stem(row.id) + (f"-take{number + 1}" if config.takes > 1 else "")
            seed = config.seed + number
            parts = [row.id, row.text, seed, str(row.ref_audio), row.ref_text]
            if isinstance(row.ref_audio, Path):
                stat = row.ref_audio.stat()
                parts += [stat.st_size, stat.st_mtime_ns]
            key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
            takes.append(Take(row, seed, stem, key))
    return takes


def sampling_of(config: SynthesizeConfig) -> "Sampling":
    from higgs_lab.generate import Sampling

    given = {
        name: getattr(config, name)
        for name in ("temperature", "top_k", "top_p", "max_frames")
        if getattr(config, name) is not None
    }
    return Sampling.of_engine(config.mode, **given)


def speak(
    higgs: "Higgs",
    takes: list[Take],
    sampling: "Sampling",
    config: SynthesizeConfig,
    out: Path,
    references: dict[str, "Tensor"],
) -> Iterator[dict]:
    """Speak takes and write each one's wav as soon as it has ended; yields what to log of it.

    references: codes of reference clips, filled as they are met, so that each is encoded once.
    A take without a single frame has no wav and `audio` None: the model stopped at once.
    """
    for i, wav, info in higgs.speak_each(
        [take.row.text for take in takes],
        ref_audio=[_reference(higgs, take.row.ref_audio, references) for take in takes],
        ref_text=[take.row.ref_text for take in takes],
        sampling=sampling,
        seed=[take.seed for take in takes],
        batch_size=config.batch_size,
        max_chars=config.max_chars,
    ):
        take = takes[i]
        record = {"key": take.key, "id": take.row.id, "seed": take.seed}
        record |= {"stop_reason": info.stop_reason, "frames": info.frames}
        record |= {"seconds": round(info.seconds, 3), "chunks": len(info.chunks), "audio": None}
        if len(wav):
            record["audio"] = f"wavs/{take.stem}.wav"
            write_wav(out / record["audio"], wav, higgs.sample_rate_hz)
        yield record


def _reference(
    higgs: "Higgs", source: AudioSource | None, known: dict[str, "Tensor"]
) -> "Tensor | None":
    if source is None:
        return None
    if str(source) not in known:
        wav = read_audio(source, higgs.sample_rate_hz, max_sec=REF_MAX_SEC)
        known[str(source)] = higgs.codec.encode(wav)
    return known[str(source)]


def _read_lines(path: Path) -> list[Utterance]:
    if not path.is_file():
        raise FileNotFoundError(f"text file {path} does not exist (working folder {Path.cwd()})")
    try:
        lines = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason}); save it as UTF-8") from error
    rows = [
        Utterance(None, line.strip(), f"{number:06d}", where=f"{path}:{number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not rows:
        raise ValueError(f"{path} holds no texts: write one per line")
    return rows


def _decode_precision(config: SynthesizeConfig, out: Path) -> str:
    """What is asked for, else what the folder was begun with, else what suits the device."""
    from higgs_lab.device import chosen_device
    from higgs_lab.speech import default_precision

    if config.decode_precision is None and (out / SETTINGS).is_file():
        return _settings_before(out)["decode_precision"]
    return config.decode_precision or default_precision(chosen_device(config.device))


def _settings_before(out: Path) -> dict:
    before = json.loads((out / SETTINGS).read_text(encoding="utf-8"))
    return {"decode_precision": "fp32"} | before  # all there was before there was a choice


def _settings(config: SynthesizeConfig, checkpoint: Checkpoint) -> dict:
    """All that decides the sound of a take, beside its own row."""
    free = ("out", "source", "text", "batch_size", "device", "takes")
    settings = {name: value for name, value in asdict(config).items() if name not in free}
    settings["revision"] = checkpoint.revision
    settings["model_files"] = fingerprint(checkpoint.path)
    if config.adapter is not None:
        from higgs_lab.adapter import find_adapter

        settings["adapter_files"] = fingerprint(find_adapter(config.adapter))
    return settings


def _refuse_other_run(out: Path, settings: dict) -> None:
    """Takes of other settings or of another model must not end up in one folder."""
    if (out / SETTINGS).is_file():
        before = _settings_before(out)
        changed = [name for name in settings if before.get(name) != settings[name]]
        if changed:
            found = [
                name
                if name.endswith("_files")  # checksums
                else f"{name}: {before.get(name)} there, {settings[name]} here"
                for name in changed
            ]
            raise FileExistsError(
                f"{out} holds speech made with other settings ({'; '.join(found)}): give those, "
                "choose another out=..., or remove the folder"
            )
    elif out.is_dir() and any(out.iterdir()):
        raise FileExistsError(
            f"{out} exists and is no folder of synthesize: choose another out=..."
        )


def _record(out: Path, settings: dict, config: SynthesizeConfig, checkpoint: Checkpoint) -> None:
    write_json_atomic(out / SETTINGS, settings)
    save_config(config, out / "config.yaml")
    record = provenance(model=checkpoint.name, revision=checkpoint.revision, adapter=config.adapter)
    write_json_atomic(out / "provenance.json", record)


def _is_there(record: dict, out: Path) -> bool:
    return record["audio"] is None or (out / record["audio"]).is_file()


def _write_results(takes: list[Take], records: list[dict], out: Path) -> Path:
    """The manifest of all takes with sound, and a closing line for the user."""
    rows, kept = [], ("seed", "stop_reason", "frames", "seconds", "chunks")
    for take, record in zip(takes, records, strict=True):
        if record["audio"] is None:
            continue
        info = take.row.info | {name: record[name] for name in kept}
        if take.row.audio is not None:
            info["recording"] = str(take.row.audio)
        audio = (out / record["audio"]).absolute()
        row = replace(take.row, audio=audio, id=take.stem, info=info)
        if not isinstance(row.ref_audio, Path | None):  # inside a data set: no path to write
            row = replace(row, ref_audio=None, ref_text=None)
        rows.append(row)
    manifest = out / "manifest.jsonl"
    write_manifest(manifest, rows)
    seconds = sum(record["seconds"] for record in records)
    spoken = "1 take" if len(rows) == 1 else f"{len(rows)} takes"
    print(f"{spoken}, {seconds:.1f} s of speech: {manifest}")
    capped = sum(record["stop_reason"] != "eoc" for record in records)
    silent = len(records) - len(rows)
    if capped:
        print(
            f"{capped} of {len(records)} takes ran into their length cap (stop_reason max_frames)"
        )
    if silent:
        print(f"{silent} of {len(records)} takes have no sound: the model stopped at once")
    return manifest


if __name__ == "__main__":
    with one_line_errors("synthesize"):
        try:
            main(cli(SynthesizeConfig, __doc__))
        except KeyboardInterrupt:
            sys.exit("synthesize: stopped; the same command goes on")

"""Prepared data: utterances as codes, stamped with the codec that made them.

A folder that `datasets` saved, with `prepared.json` beside the arrow files. `recipes/prepare.py`
writes it, training reads it. One row:

    id, text, language, speaker   text; language and speaker may be None
    codes       int [T, K]        the recording
    frames      int               T
    seconds     float             length of the recording
    ref_codes   int [R, K]        the reference clip the manifest named; R = 0: none
    ref_text    text or None      its transcript
    split       "train", "valid" or what else the manifest says
    audio       text              where the recording came from
"""

import contextlib
import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from higgs_lab.runlog import atomic_path, write_json_atomic
from higgs_lab.tags import strip_tags

if TYPE_CHECKING:
    import datasets

INFO = "prepared.json"
FORMAT = 1
# Of `Codec.encode_batch`, raised where what older versions made may be wrong: see `may_be_wrong`.
ENCODER = 2


def load_prepared(
    path: str | Path, codec_hash: str | None = None, split: str | None = None
) -> "datasets.Dataset":
    """Prepared data as a `datasets.Dataset`, codes as numpy int64, the rest as Python values.

    codec_hash: of the model that will train on it (`Codec.hash`).
    split: only these rows; None gives all.

    Raises FileNotFoundError when the folder is no prepared data; ValueError when its codes were
    made by another codec, or the split has no rows. Warns of codes that may be wrong.
    """
    import datasets

    info = prepared_info(path)
    if may_be_wrong(info):
        warnings.warn(f"{path} {MAY_BE_WRONG}: prepare the data again", stacklevel=2)
    if codec_hash is not None and info["codec_hash"] != codec_hash:
        model = info["model"]
        raise ValueError(
            f"{path} was encoded with codec {info['codec_hash']} (of {model['name']} revision "
            f"{model['revision']}), but the model has codec {codec_hash}: its codes mean other "
            "sounds. Prepare the data again with this model"
        )
    data = datasets.load_from_disk(str(path))
    if split is not None:
        chosen = [i for i, name in enumerate(data["split"]) if name == split]
        if not chosen:
            raise ValueError(f"{path} has no rows of split {split!r}; it has {info['splits']}")
        data = data.select(chosen)
    return data.with_format("numpy", columns=["codes", "ref_codes"], output_all_columns=True)


def prepared_info(path: str | Path) -> dict:
    """`prepared.json`: codec hash, model, splits with clips and hours, checks, provenance."""
    file = Path(path) / INFO
    if not file.is_file():
        raise FileNotFoundError(
            f"{path} is no prepared data ({INFO} is missing): make it with recipes/prepare.py"
        )
    info = json.loads(file.read_text(encoding="utf-8"))
    if info.get("format") != FORMAT:
        raise ValueError(f"{file}: format {info.get('format')}, this version reads {FORMAT}")
    return info


MAY_BE_WRONG = (
    "was encoded on a GPU by a version before 320ef59, some of which on 80 GB cards could encode "
    "clips of equal length wrongly (docs/performance.md)"
)


def may_be_wrong(info: dict) -> bool:
    """Whether MAY_BE_WRONG is true of data with this `prepared_info`."""
    config, on_gpu = info.get("config", {}), "device" in info.get("provenance", {})
    reference = config.get("precision", "fp32") == "fp32" and config.get("device") != "cpu"
    return info.get("encoder", 1) < ENCODER and on_gpu and reference


def save_prepared(
    path: str | Path, rows: list[dict], num_codebooks: int, info: dict, rejects: Iterable[dict]
) -> None:
    """Write prepared data with its `prepared.json` and `rejects.jsonl`. Atomic.

    rows: as in the head of this file, codes [T, K] of any integer type.
    """
    import datasets

    text, codes = datasets.Value("string"), datasets.Array2D((None, num_codebooks), "uint16")
    features = datasets.Features(
        {
            "id": text,
            "text": text,
            "language": text,
            "speaker": text,
            "codes": codes,
            "frames": datasets.Value("int32"),
            "seconds": datasets.Value("float32"),
            "ref_codes": codes,
            "ref_text": text,
            "split": text,
            "audio": text,
        }
    )
    columns = {name: [row[name] for row in rows] for name in features}
    data = datasets.Dataset.from_dict(columns, features=features)
    with atomic_path(path) as temporary:
        with _without_bars():
            data.save_to_disk(str(temporary))
        write_json_atomic(temporary / INFO, {"format": FORMAT, "encoder": ENCODER, **info})
        lines = [json.dumps(reject, ensure_ascii=False) + "\n" for reject in rejects]
        (temporary / "rejects.jsonl").write_text("".join(lines), encoding="utf-8")


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """The bars of `datasets` would be lines of noise beside our own progress."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def assign_splits(rows: list[dict], split_valid: float, seed: int = 0) -> None:
    """Fill `split` where the manifest gave none, never putting one text into both sides.

    Texts are drawn by a hash of seed and text, so that adding clips moves no other clip.
    """
    names = {"dev": "valid", "val": "valid", "validation": "valid"}
    fixed: dict[str, str] = {}
    groups: dict[str, list[dict]] = {}
    for row in rows:
        if row["split"]:
            row["split"] = names.get(row["split"].lower(), row["split"])
            fixed.setdefault(text_key(row["text"]), row["split"])
        else:
            groups.setdefault(text_key(row["text"]), []).append(row)
    count = sum(map(len, groups.values()))
    room = round(split_valid * count) if split_valid < 1 else int(split_valid)
    if 0 < split_valid < 1 and count > 1:
        room = max(room, 1)
    room = min(room, count - 1)
    for key in sorted(groups, key=lambda k: hashlib.sha256(f"{seed}:{k}".encode()).digest()):
        split = fixed.get(key)
        if split is None:
            split = "valid" if len(groups[key]) <= room else "train"
            room -= len(groups[key]) if split == "valid" else 0
        for row in groups[key]:
            row["split"] = split


def text_key(text: str) -> str:
    """Equal for texts that say the same: tags, case and spacing left out."""
    return " ".join(strip_tags(text).casefold().split())


def split_table(rows: Iterable[dict]) -> dict[str, dict]:
    """Clips and hours of each split."""
    table: dict[str, dict] = {}
    for row in rows:
        entry = table.setdefault(row["split"], {"clips": 0, "hours": 0.0})
        entry["clips"] += 1
        entry["hours"] += row["seconds"] / 3600
    return table

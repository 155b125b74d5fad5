"""Bad input at the command line: one line that names what is wrong and what to do, nothing written.

The parts have tests of their own; here the commands are run as a user runs them.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import sys
import warnings

import numpy as np
import pytest
import soundfile
from safetensors.torch import save_file

from higgs_lab.adapter import attach_lora, base_fingerprint, save_adapter
from higgs_lab.audio import write_wav
from higgs_lab.checkpoint import CODEC_PREFIX, NativeFiles, load_talker
from tests.tiny import voice_like


@pytest.fixture(scope="module")
def data(nano, tmp_path_factory):
    """Good and bad files, by name."""
    folder = tmp_path_factory.mktemp("bad")
    write_wav(folder / "good.wav", voice_like(1.2), 24000)
    write_wav(folder / "good2.wav", voice_like(1.3, 1), 24000)
    (folder / "text.wav").write_text("not audio")
    soundfile.write(folder / "zero.wav", np.zeros(0), 24000)
    nan = voice_like(1.2)
    nan[5] = np.nan
    soundfile.write(folder / "nan.wav", nan, 24000, subtype="FLOAT")
    (folder / "texts.txt").write_text("Fine.\nHello <|emotion:hapiness|>you.\n")

    def manifest(name: str, *rows: dict) -> None:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    good = {"audio": "good.wav", "text": "Good."}
    manifest("field", {"audio": "good.wav", "text": "A.", "speeker": "x"})
    manifest("twice", {**good, "id": "a"}, {"audio": "good2.wav", "text": "B.", "id": "a"})
    manifest("empty", {"audio": "good.wav", "text": "  "})
    manifest("fine", good)
    for name in ("text", "zero", "nan"):
        manifest(name, {"audio": f"{name}.wav", "text": "A."})
    manifest("smuggle", {"audio": "good.wav", "text": "Hi <|audio|> there."})

    tuned = shutil.copytree(nano, folder / "tuned")
    tensors = {k: v.clone() for k, v in NativeFiles(nano).items()}
    tensors["body.norm.weight"] += 1
    save_file(tensors, tuned / "model.safetensors")
    meta = {"base": "nano", "revision": "r", "fingerprint": base_fingerprint(nano)}
    save_adapter(attach_lora(load_talker(nano), "attention", 4), folder / "adapter", meta)
    mute = shutil.copytree(nano, folder / "mute")
    spoken = {k: v for k, v in tensors.items() if not k.startswith(CODEC_PREFIX)}
    save_file(spoken, mute / "model.safetensors")
    (mute / "model.safetensors.index.json").unlink(missing_ok=True)
    cut = shutil.copytree(nano, folder / "cut")
    os.truncate(cut / "model.safetensors", 100_000)
    return folder


PREPARE, SPEAK, TRAIN = "recipes.prepare", "recipes.synthesize", "recipes.finetune"
SAY = "text=Hello."
CASES = [
    (PREPARE, "source=nowhere.jsonl model=nano", "data nowhere.jsonl does not exist"),
    (PREPARE, "source=field.jsonl model=nano", "field.jsonl:1: unknown field 'speeker'; did you"),
    (
        PREPARE,
        "source=twice.jsonl model=nano",
        "twice.jsonl:2.*'a'.*(twice|same|duplicate|already)",
    ),
    (PREPARE, "source=empty.jsonl model=nano", "empty.jsonl:1, field text: missing or empty"),
    (PREPARE, "source=text.jsonl model=nano", "no clip can be used .*text.wav cannot be read"),
    (PREPARE, "source=zero.jsonl model=nano", "no clip can be used .*zero.wav has no samples"),
    (PREPARE, "source=nan.jsonl model=nano", "no clip can be used .*nan.wav has 1 NaN"),
    (
        PREPARE,
        "source=smuggle.jsonl model=nano",
        r"no clip can be used .*control token <\|audio\|>",
    ),
    (PREPARE, "source=fine.jsonl model=mute", "mute bundles no codec"),
    (
        PREPARE,
        "source=fine.jsonl model=cut",
        "cut/model.safetensors cannot be read .*cut or damaged",
    ),
    (PREPARE, "source=fine.jsonl model=nano max_secs=3", "unknown option 'max_secs'; did you mean"),
    (SPEAK, "source=texts.txt model=nano", r"texts.txt:2.*unknown control tag <\|emotion:hapiness"),
    (SPEAK, "source=nowhere.txt model=nano", "text file nowhere.txt does not exist"),
    (SPEAK, f"{SAY} model=nano ref_audio=text.wav", "text.wav cannot be read as audio"),
    (SPEAK, f"{SAY} model=nowhere", "'nowhere' is no directory on this disk and no hub name"),
    (
        SPEAK,
        f"{SAY} model=tuned adapter=adapter",
        "was trained on nano@r .* load it on its own base",
    ),
    (TRAIN, "data=nowhere", "nowhere is no prepared data"),
    (TRAIN, "data=nowhere config.yaml", "options are written key=value"),
    ("higgs_lab.prompt", "--manifest nowhere.jsonl", "manifest nowhere.jsonl does not exist"),
    ("higgs_lab.prompt", "--manifest fine.jsonl --row 2", "fine.jsonl has rows 1 to 1"),
    ("serve.export", "--model tuned --adapter adapter", "was trained on nano@r .* its own base"),
    ("serve.export", "--model mute", "mute bundles no codec"),
    ("eval.run", "--model nano --set nowhere.jsonl", "nowhere.jsonl does not exist"),
]


@pytest.mark.parametrize(("command", "options", "message"), CASES, ids=lambda v: v[:40])
def test_one_line_says_what_to_do(data, monkeypatch, capsys, command, options, message):
    monkeypatch.chdir(data)
    out = {"higgs_lab.prompt": ()}.get(command, ("--out", "out"))
    if command.startswith("recipes."):
        out = ("out=out",)
    monkeypatch.setattr(sys, "argv", [command, *options.split(" "), *out])
    with pytest.raises(SystemExit) as ended:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # it is imported already, by a test
            runpy.run_module(command, run_name="__main__")
    code = ended.value.code
    said = code if isinstance(code, str) else capsys.readouterr().err.splitlines()[-1]
    assert code not in (0, None) and len(said.splitlines()) == 1
    assert re.search(message, said), said
    written = (data / "out").exists()
    shutil.rmtree(data / "out", ignore_errors=True)
    assert not written

"""eval.command: real commands, one for each clip or one for all, well and badly behaved."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from eval.systems import Request, open_system
from higgs_lab.audio import write_wav
from higgs_lab.manifest import Utterance

# Writes a wave whose first sample is the seed, and what it was told beside it.
ONE = """
import json, pathlib, sys, wave, struct
out, seed, told = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
if told[0] == "Refuse.": sys.exit("not this text")
pathlib.Path(__file__).with_name("told").open("a").write(json.dumps(told) + chr(10))
if told[0] == "Nothing.": sys.exit(0)
with wave.open(out, "wb") as file:
    file.setparams((1, 2, 16000, 0, "NONE", ""))
    file.writeframes(struct.pack("<h", seed) * 16000)
"""
ALL = """
import json, struct, sys, wave
print("loading", file=sys.stderr)
requests = []
for line in sys.stdin:
    r = json.loads(line)
    requests.append(r)
    if len(requests) % 3: continue
    for r in reversed(requests[-3:]):  # in any order
        if "Refuse" in r["text"]:
            print(json.dumps({"id": r["id"], "error": "not this text"}), flush=True); continue
        with wave.open(r["out"], "wb") as file:
            file.setparams((1, 2, 24000, 0, "NONE", ""))
            file.writeframes(struct.pack("<h", r["seed"] + len(r["tagged_text"])) * 24000)
        print(json.dumps({"id": r["id"], "hit_cap": "Long" in r["text"]}), flush=True)
"""


def row(id, text, **fields) -> Utterance:
    return Utterance(**({"audio": None, "text": text, "id": id, "language": "en"} | fields))


def script(folder: Path, source: str) -> str:
    path = folder / "tts.py"
    path.write_text(source)
    return f"cmd:{sys.executable} {path}"


def first_sample(clip) -> int:
    return round(float(clip.wav[clip.wav.size // 2]) * 32768)


def test_a_command_for_each_clip_gets_its_fields_as_single_arguments(tmp_path):
    voice = tmp_path / "voice of ann.wav"
    write_wav(voice, np.full(2400, 0.1), 24000)
    command = script(tmp_path, ONE) + " {out} {seed} {text} {language} {ref_audio} lang={language}"
    system = open_system(command, batch=2)
    texts = ['<|emotion:anger|>"Hi" $HOME {seed}', "Refuse.", "Nothing."]
    rows = [row(str(n), text) for n, text in enumerate(texts)]
    rows.append(row("3", "Voice.", ref_audio=voice))
    clips = system.start()([Request(r, 100 + n) for n, r in enumerate(rows)])
    assert [first_sample(clips[n]) for n in (0, 3)] == [100, 103]
    assert clips[0].sample_rate_hz == 24000 and len(clips[0].wav) == 24000
    assert clips[0].took_sec > 0
    assert clips[1].error == "exit status 1: not this text"
    assert clips[2].error == "the command wrote no audio"
    told = [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]
    assert ['"Hi" $HOME {seed}', "en", "", "lang=en"] in told
    assert ["Voice.", "en", str(voice), "lang=en"] in told
    assert system.random and system.details == {"kind": "cmd", "command": command[4:]}


def test_a_command_for_all_clips_is_started_once_and_answers_in_any_order(tmp_path):
    system = open_system(script(tmp_path, ALL))
    rows = [row("a", "One."), row("b", "<|emotion:joy|>Refuse."), row("c", "Long.")]
    speak = system.start()
    for _ in range(2):  # the second batch goes to the same process
        one, two, three = speak([Request(r, 7) for r in rows])
        assert first_sample(one) == 11 and first_sample(three) == 12
        assert two.error == "not this text" and three.hit_cap and not one.hit_cap
        assert one.took_sec > 0


def test_an_espeak_ng_of_ones_own_speaks_through_it(tmp_path):
    """The project's own espeak-ng worker, as a user would wrap any other synthesiser."""
    pytest.importorskip("espeakng_loader")
    source = """
import json, subprocess, sys
out, text = sys.argv[1:]
job = json.dumps({"text": text, "voice": "en", "path": out})
subprocess.run([sys.executable, "-m", "eval.espeak"], input=job, text=True, check=True)
"""
    system = open_system(script(tmp_path, source) + " {out} {text}")
    (clip,) = system.start()([Request(row("a", "Hello there."), 0)])
    assert clip.error == "" and 0.4 < len(clip.wav) / 24000 < 3
    assert not system.random  # no {seed}: one way to say a text


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("print('100 % done')", "printed '100 % done', which is no JSON object"),
        ('print(\'{"id": "77"}\')', "whose id was never asked"),
        ("sys.exit('out of memory')", "(?s)exit status 1.*out of memory"),
        ("import os; os.kill(os.getpid(), 9)", "exit status -9"),
        (
            'print(\'{"id": "0", "error": "no GPU"}\'); print(\'{"id": "1", "error": "no GPU"}\')',
            "spoke none of 2 clips: no GPU",
        ),
    ],
)
def test_a_command_that_dies_or_prints_garbage_stops_the_run(tmp_path, source, message):
    """Its clips are not failures of theirs: mended, the run goes on with them."""
    speak = open_system(script(tmp_path, f"import sys; sys.stdin.readline(); {source}")).start()
    with pytest.raises(ValueError, match=message):
        speak([Request(row(id, "Hello."), 0) for id in ("a", "b")])


def test_bad_commands_say_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match=r"unknown \{txt\} in .*known: \{out\}, \{text\}"):
        open_system("cmd:tts {out} {txt}")
    with pytest.raises(ValueError, match="cannot be started"):
        open_system("cmd:/no/such/tts").start()
    speak = open_system("cmd:/no/such/tts {out}").start()
    with pytest.raises(ValueError, match="cannot be started"):
        speak([Request(row("a", "Hello."), 0)])
    with pytest.raises(ValueError, match="no command"):
        open_system("cmd:").start()
    with pytest.raises(ValueError, match="takes no sampling options"):
        open_system("cmd:tts {out}", sampling={"temperature": 1})
    noise = script(tmp_path, "import sys; open(sys.argv[1], 'w').write('no sound')") + " {out}"
    (clip,) = open_system(noise).start()([Request(row("a", "Hello."), 0)])
    assert clip.error.startswith("0.wav cannot be read as audio")

"""The voices of the nano family's training speech, and which of them nobody may train on.

A voice is an espeak-ng *variant*: a short text file of formant frequencies, heights and widths,
pitch, breath and roughness. About fifty come with espeak-ng; hundreds more are drawn here from a
seed, so that the speaker encoder and the talker's cloning meet enough timbres to generalise. A
held-out voice is a variant that no part was trained on, never a known one at a new pitch or rate.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

# Variants of espeak-ng 1.52 that sound like a plain speaker; robots are left out, and whispers but
# for one, caleb, which is held out. Whispers to learn from are drawn, see `made_variant`.
GENUINE = (
    "Alex Alicia Andrea Andy Annie Denis Diogo Gene Gene2 Henrique Hugo Jacky Lee Marco Mario "
    "Michael Mike Nguyen Reed adam anika announcer antonio aunty belinda benjamin boris caleb "
    "david ed edward edward2 f1 f2 f3 f4 f5 grandma grandpa gustave ian iven iven2 iven3 john "
    "kaukovalta linda m1 m2 m3 m4 m5 m6 m7 m8 marcelo max michel miguel norbert pablo paul pedro "
    "quincy rob robert sandro shelby steph steph2 travis victor zac"
).split()
HELD_OUT_GENUINE = (
    "Andy Annie Denis Henrique Lee Mario Michael adam aunty belinda caleb edward f2 f5 ian linda "
    "m3 m7 norbert quincy rob shelby steph victor"
).split()
DEMO_VOICE = "made9000"  # the new voice of the demo: no part and no other figure ever uses it
NUM_MADE = 640
NUM_HELD_OUT_MADE = 24
WHISPERS = range(7000, 7032)  # numbers of drawn variants that whisper, all of them for training
HOME_VOICES = ("f3", "m1", "made0001", "made0002")  # who speaks when no reference is given


@dataclass(frozen=True)
class Voice:
    name: str  # the espeak variant's file name
    split: str  # "train", "test" or "demo"


def made_variant(number: int) -> str:
    """The text of the drawn variant `number`; even numbers are male, odd ones female.

    Those of WHISPERS have no voice: every other pair of them is spoken by Klatt's synthesizer, as
    espeak-ng's own caleb is, the others by the usual one.
    """
    rng = random.Random(f"nano-voice-{number}")
    female = number % 2 == 1
    tract = rng.uniform(1.0, 1.24) if female else rng.uniform(0.82, 1.04)
    base = rng.uniform(150, 225) if female else rng.uniform(72, 125)
    lines = [
        "language variant",
        f"name made{number:04d}",
        f"gender {'female' if female else 'male'}",
        f"pitch {base:.0f} {base * rng.uniform(1.25, 1.6):.0f}",
    ]
    for formant in range(9):
        shift = 1.0 if formant == 0 else tract * rng.uniform(0.94, 1.06)
        height = rng.uniform(85, 115) if formant < 3 else rng.uniform(50, 150)
        width = rng.uniform(75, 140)
        lines.append(f"formant {formant} {100 * shift:.0f} {height:.0f} {width:.0f}")
    if rng.random() < 0.6:
        low, high = rng.uniform(60, 255), rng.uniform(10, 160)
        lines.append(f"tone 100 255 600 {low:.0f} 1800 {high:.0f} 3500 {high * rng.random():.0f}")
    if rng.random() < 0.5:
        lines.append("breath " + " ".join(str(rng.randrange(0, 6)) for _ in range(8)))
    lines.append(f"flutter {rng.choice((1, 2, 2, 3, 5, 8))}")
    lines.append(f"roughness {rng.choice((0, 0, 1, 2, 3))}")
    lines.append(f"voicing {rng.uniform(75, 130):.0f}")
    lines.append(f"consonants {rng.uniform(60, 130):.0f} {rng.uniform(60, 130):.0f}")
    if number in WHISPERS:
        lines = [line for line in lines if line.split()[0] not in ("tone", "breath", "voicing")]
        usual, klatt = (
            "breath 75 75 60 40 20 10\nbreathw 150 150 200 200 400 400",
            "klatt 6\nbreath 100",
        )
        lines += [(klatt, usual)[number // 2 % 2], "voicing 0"]
    return "\n".join(lines) + "\n"


@lru_cache(maxsize=1)
def all_voices() -> tuple[Voice, ...]:
    """Every voice; the order is fixed, so a position is an identity. What comes later goes last."""
    train = [name for name in GENUINE if name not in HELD_OUT_GENUINE]
    made = [f"made{number:04d}" for number in range(NUM_MADE)]
    test = HELD_OUT_GENUINE + [f"made{8000 + number:04d}" for number in range(NUM_HELD_OUT_MADE)]
    return (
        *(Voice(name, "train") for name in train + made),
        *(Voice(name, "test") for name in test),
        Voice(DEMO_VOICE, "demo"),
        *(Voice(f"made{number}", "train") for number in WHISPERS),
    )


def build_data_folder(installed: Path, folder: Path) -> Path:
    """A writable espeak-ng data folder: its own `voices/!v`, links to the `installed` one else.

    Languages are linked from `voices` too, by the lower-case name that a voice is asked for: found
    there, espeak-ng does not read every voice file to find it.
    """
    variants = folder / "voices" / "!v"
    variants.mkdir(parents=True)
    for source in installed.iterdir():
        if source.name != "voices":
            os.symlink(source, folder / source.name)
    for source in (installed / "voices" / "!v").iterdir():
        (variants / source.name).write_bytes(source.read_bytes())
    for source in (installed / "lang").rglob("*"):
        if source.is_file():
            os.symlink(source, variants.parent / source.name.lower())
    return folder

"""Sound as it comes, into a file or to the loudspeaker."""

from __future__ import annotations

import shlex
import shutil
import struct
import subprocess
import wave
from collections.abc import Iterable
from pathlib import Path

from higgs_lab.runlog import atomic_path

RATE_HZ = 24000
# Programs that play a wav file from their standard input while it is written.
PLAYERS = (
    "ffplay -nodisp -autoexit -loglevel error -i -",
    "mpv --really-quiet --no-video -",
    "aplay -q",
    "play -q -t wav -",
)


def find_player() -> str:
    """The first player that is installed; raises FileNotFoundError without any."""
    for command in PLAYERS:
        if shutil.which(command.split()[0]):
            return command
    names = ", ".join(command.split()[0] for command in PLAYERS)
    raise FileNotFoundError(
        f"no player found ({names}): install one, or name any program that plays a wav file from "
        "its standard input with --player 'PROGRAM ...'"
    )


def play(pieces: Iterable[bytes], command: str | None = None) -> None:
    """Pipe PCM into a player and wait until it has played; `command` is a shell-like line.

    Raises OSError when the player fails.
    """
    words = shlex.split(command or find_player())
    player = subprocess.Popen(words, stdin=subprocess.PIPE)
    try:
        player.stdin.write(wav_header())
        for piece in pieces:
            player.stdin.write(piece)
            player.stdin.flush()
        player.stdin.close()
        code = player.wait()
    except BrokenPipeError:  # it was closed, or does not like what it hears
        code = player.wait()
    except BaseException:
        player.kill()
        player.wait()
        raise
    if code:
        raise OSError(f"the player {words[0]!r} ended with exit code {code}")


def save(pieces: Iterable[bytes], out: str | Path) -> None:
    """Write PCM to a file as it comes: a wav file by its name, else raw. Whole or not there."""
    out = Path(out)
    with atomic_path(out) as temporary:
        if out.suffix.lower() == ".wav":
            with wave.open(str(temporary), "wb") as file:
                file.setnchannels(1)
                file.setsampwidth(2)
                file.setframerate(RATE_HZ)
                for piece in pieces:
                    file.writeframesraw(piece)
        else:
            with temporary.open("wb") as file:
                for piece in pieces:
                    file.write(piece)


def wav_header() -> bytes:
    """Header of a wav stream of unknown length: sizes as large as they can be stated."""
    form = struct.pack("<HHIIHH", 1, 1, RATE_HZ, 2 * RATE_HZ, 2, 16)  # PCM, mono, 16 bit
    sizes = 0x7FFFFFFF - 36
    return (
        b"RIFF" + struct.pack("<I", sizes + 36) + b"WAVEfmt " + struct.pack("<I", len(form)) + form
        + b"data" + struct.pack("<I", sizes)
    )  # fmt: skip

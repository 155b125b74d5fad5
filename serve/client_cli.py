"""`python -m serve.client`: speak one text, or a whole manifest, through a running server.

    python -m serve.client "Hello there." --out hello.wav --ref-audio voice.wav --ref-text "..."
    python -m serve.client "Heard while it is made." --play
    python -m serve.client --manifest texts.jsonl --out wavs/ --concurrency 8
    python -m serve.client --voices
    python -m serve.client --add-voice ann --ref-audio ann.wav --consent "signed 2026-01-05"

The format is that of --out's suffix. --play and --stream ask for sound as it is made; a wav file is
then written as it comes, "--out -" is raw PCM (16 bit, mono, 24 kHz) on the standard output.

A manifest's rows may bring their own ref_audio and ref_text. Clips that are there already are not
asked for again, so a killed batch goes on where it stopped; failures stand in failures.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

from higgs_lab.manifest import Utterance, file_stem, read_manifest, write_manifest
from higgs_lab.runlog import Progress, RunLog, atomic_path
from serve import client, player


def speak_manifest(
    url: str, rows: list[Utterance], out: str | Path, concurrency: int = 4, **options
) -> int:
    """Speak every row into out/<id>.wav; returns the number of failures.

    Writes out/manifest.jsonl (id, text, audio of what is there) and out/failures.jsonl (id, error).
    One request that fails does not stop the others; a server that is gone does.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    failures_file = out / "failures.jsonl"
    failures_file.unlink(missing_ok=True)  # of an earlier run; what failed then is tried again
    suffix = options.get("response_format", "wav")
    target = {row.id: out / f"{file_stem(row.id)}.{suffix}" for row in rows}
    todo = [row for row in rows if not target[row.id].exists()]
    failed = 0

    def one(row: Utterance) -> None:
        own = {"ref_audio": row.ref_audio, "ref_text": row.ref_text} if row.ref_audio else {}
        data = client.speak(url, row.text, **(options | own))
        with atomic_path(target[row.id]) as temporary:
            temporary.write_bytes(data)

    pool = ThreadPoolExecutor(concurrency)
    running, queue, gone = {}, iter(todo), None
    with Progress(len(rows), "clips", "speak", start=len(rows) - len(todo)) as progress:
        try:
            while True:
                while gone is None and len(running) < 2 * concurrency:
                    if (row := next(queue, None)) is None:
                        break
                    running[pool.submit(one, row)] = row
                if not running:
                    break
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    row = running.pop(done)
                    if done.cancelled():
                        continue
                    if (error := done.exception()) is not None:
                        failed += 1
                        with RunLog(failures_file) as log:
                            log.log(id=row.id, text=row.text, error=str(error))
                        lost = gone is None and getattr(error, "status", 0) is None
                        if lost and not client.is_healthy(url):
                            gone = error  # keep the rest for a resume; those on their way fail too
                            for other in running:
                                other.cancel()
                    progress.update()
        finally:
            pool.shutdown(cancel_futures=True)
            spoken = [row for row in rows if target[row.id].exists()]
            write_manifest(out / "manifest.jsonl", [_spoken(r, target[r.id]) for r in spoken])
    if gone is not None:
        raise client.ServerError(
            f"{gone}\nNobody answers {url} any more: {len(spoken)} of {len(rows)} clips are there, "
            f"{failed} failed (see {failures_file}). Start the server, then this command again: it "
            "goes on with what is missing."
        )
    return failed


def _spoken(row: Utterance, audio: Path) -> Utterance:
    return Utterance(audio, row.text, row.id, speaker=row.speaker, language=row.language)


def _options(args: argparse.Namespace) -> dict:
    names = ("dialect", "response_format", "model", "voice", "ref_audio", "ref_text")
    names += (*client.SAMPLING, "seed", "max_new_tokens", "speed", "timeout_sec", "retries")
    given = {name: getattr(args, name) for name in names}
    return {k: v for k, v in given.items() if v is not None} | {"api_key": args.api_key}


def _format_of(out: str | None, dialect: str) -> str | None:
    """The response format that a file name asks for."""
    suffix = Path(out or "").suffix.lower().lstrip(".")
    return suffix if suffix in client.FORMATS[dialect] else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serve.client",
        description=__doc__.partition("\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("text", nargs="?", help="what to say")
    parser.add_argument("--manifest", help="JSONL manifest of texts to say")
    parser.add_argument("--out", help="wav file, or a folder with --manifest")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="server root")
    parser.add_argument("--dialect", choices=client.DIALECTS, default="vllm")
    parser.add_argument("--api-key", default=os.environ.get("VLLM_API_KEY"))
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--ref-audio", help="voice to clone, 1 to 30 s")
    parser.add_argument("--ref-text", help="what the reference says, verbatim")
    parser.add_argument("--voice", help="an uploaded voice")
    parser.add_argument("--model", help="model name, if the server has several")
    parser.add_argument(
        "--format", dest="response_format", help="wav, pcm, flac, mp3, opus (aac with sglang)"
    )
    parser.add_argument("--stream", action="store_true", help="write the sound as it is made")
    parser.add_argument("--play", action="store_true", help="play the sound as it is made")
    parser.add_argument("--player", help="what plays a wav file from its standard input")
    parser.add_argument("--speed", type=float, help="0.25 to 4; not while streaming")
    parser.add_argument("--no-split", action="store_true", help="a long text in one request (81 s)")
    parser.add_argument("--timeout", dest="timeout_sec", type=float, help="seconds of silence")
    parser.add_argument("--retries", type=int, help="after overload or a lost connection; 3")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--max-new-tokens", type=int, help="rows, 25 a second")
    parser.add_argument("--voices", action="store_true", help="list uploaded voices")
    parser.add_argument("--add-voice", metavar="NAME", help="upload --ref-audio under a name")
    parser.add_argument("--consent", help="how the speaker consented (--add-voice)")
    parser.add_argument("--delete-voice", metavar="NAME")
    return parser


def _one_text(args: argparse.Namespace, options: dict) -> None:
    options["split"] = not args.no_split
    if not args.stream and not args.play:
        options.setdefault("response_format", _format_of(args.out, args.dialect) or "wav")
        data = client.speak(args.url, args.text, **options)
        with atomic_path(args.out) as temporary:
            temporary.write_bytes(data)
        return
    if options.pop("response_format", "pcm") not in ("pcm", "wav"):
        raise ValueError("sound comes as it is made in pcm and wav only")
    for name in ("retries", "speed"):
        if options.pop(name, None) is not None:
            raise ValueError(f"--{name} does not go with --stream or --play")
    pieces = client.stream(args.url, args.text, **options)
    if args.play:
        player.play(pieces if args.out is None else _also_saved(pieces, args.out), args.player)
    elif args.out == "-":
        for piece in pieces:
            sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()
    else:
        player.save(pieces, args.out)


def _also_saved(pieces: Iterator[bytes], out: str) -> Iterator[bytes]:
    """Hand the pieces on; what was heard to the end is in the file too."""
    heard = []
    for piece in pieces:
        heard.append(piece)
        yield piece
    player.save(heard, out)


def main() -> None:
    parser = _parser()
    args = parser.parse_args()
    options = _options(args)
    try:
        if args.voices:
            for voice in client.list_voices(args.url, args.api_key):
                print(json.dumps(voice, ensure_ascii=False))
        elif args.delete_voice:
            client.delete_voice(args.url, args.delete_voice, args.api_key)
        elif args.add_voice:
            if not args.ref_audio or not args.consent:
                parser.error("--add-voice needs --ref-audio and --consent")
            client.add_voice(
                args.url, args.add_voice, args.ref_audio, args.consent, args.ref_text, args.api_key
            )
        elif (args.text is None) == (args.manifest is None):
            parser.error("give one text, or --manifest")
        elif not args.out and (args.manifest or not args.play):
            parser.error("give --out (or --play with one text)")
        elif args.manifest:
            if args.stream or args.play:
                parser.error("--stream and --play take one text, not a manifest")
            options["split"] = not args.no_split
            rows = read_manifest(args.manifest)
            failed = speak_manifest(args.url, rows, args.out, args.concurrency, **options)
            if failed:
                sys.exit(f"{failed} of {len(rows)} clips failed: see {args.out}/failures.jsonl")
        else:
            _one_text(args, options)
    except (client.ServerError, ValueError, OSError) as error:
        sys.exit(f"serve.client: {error}")

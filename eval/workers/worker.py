"""The worker side of the recogniser contract. Standard library only: copy it where you need it.

A worker is any command that speaks JSON lines. Before loading anything heavy it says who it is, on
standard output:

    {"name": "omniASR_LLM_7B", "revision": "0.1.0", "languages": ["zu", "xh"]}

`languages` are codes of `python -m eval.languages`; null means all. Then it reads requests from
standard input until that ends, and answers each, in any order, flushing every line:

    {"id": "7", "audio": "/tmp/x/7.wav", "language": "zu", "iso3": "zul", "script": "Latn",
     "omniasr": "zul_Latn", "mms": "zul"}
    {"id": "7", "text": "sawubona"}

Audio is mono 16-bit wav at 16 kHz. Requests come some dozens at a time, and no more are sent until
these are answered. An answer may add avg_logprob, no_speech_prob, cut (true if words are missing),
guessed (the language that it takes the sound for), guessed_prob and expected_prob. A line
{"id": "7", "error": "why"} says that a clip could not be heard. Standard output is for these lines
alone: logs go to standard error.
"""

import json
import os
import queue
import sys
import threading
import traceback


def serve(load, name, revision, languages=None, batch=8):
    """Be a worker: load() gives a function of a list of requests to a list of texts (or answers).

    It is called when the first request has come, so that a mere look at the name costs nothing.
    """
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes to standard error
    sys.stdout = sys.stderr

    def say(**line):
        out.write(json.dumps(line, ensure_ascii=False) + "\n")
        out.flush()

    say(name=name, revision=revision, languages=languages)
    waiting = queue.Queue()
    threading.Thread(target=_read, args=(waiting,), daemon=True).start()
    transcribe = None
    ended = False
    while not ended:
        requests = [waiting.get()]
        while len(requests) < batch and not waiting.empty():
            requests.append(waiting.get())
        ended = requests[-1] is None
        requests = [request for request in requests if request is not None]
        if not requests:
            continue
        transcribe = transcribe or load()
        for request, answer in zip(requests, _answers(transcribe, requests), strict=True):
            say(id=request["id"], **(answer if isinstance(answer, dict) else {"text": answer}))


def _read(waiting):
    for line in sys.stdin:
        if line.strip():
            waiting.put(json.loads(line))
    waiting.put(None)


def _answers(transcribe, requests):
    """One clip that cannot be heard must not take its batch with it."""
    answers = []
    if len(requests) > 1:
        try:
            return transcribe(requests)
        except Exception:
            traceback.print_exc()
    for request in requests:
        try:
            answers += transcribe([request])
        except Exception as error:
            answers.append({"error": f"{type(error).__name__}: {error}"})
    return answers

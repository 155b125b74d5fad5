"""openai-whisper as a worker: a small example, and a way to judge with another version of it.

--asr "worker:other/bin/python eval/workers/whisper_worker.py large-v3"
"""

import sys
import wave

from worker import serve

CHECKPOINT = sys.argv[1]


def load():
    import numpy
    import whisper

    model = whisper.load_model(CHECKPOINT)

    def transcribe(requests):
        answers = []
        for request in requests:
            with wave.open(request["audio"]) as file:
                samples = numpy.frombuffer(file.readframes(file.getnframes()), numpy.int16)
            result = model.transcribe(
                samples.astype(numpy.float32) / 32768,
                language={"jv": "jw"}.get(request["language"], request["language"]),
                temperature=0.0,
                condition_on_previous_text=False,
                without_timestamps=len(samples) <= 30 * 16000,
                fp16=False,
            )
            answers.append(result["text"].strip())
        return answers

    return transcribe


serve(load, "whisper", CHECKPOINT.split("/")[-1])

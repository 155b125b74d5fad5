"""Paraformer-zh as a worker: who hears Chinese in the protocols seed, cv3 and minimax.

    python3 -m venv .venv-funasr && .venv-funasr/bin/pip install funasr modelscope torch torchaudio
    python -m eval.run --set seed-tts-eval:zh ... \
        --asr "zh=worker:.venv-funasr/bin/python eval/workers/paraformer_worker.py"
"""

import importlib.metadata

from worker import serve


def load():
    from funasr import AutoModel

    model = AutoModel(model="paraformer-zh", disable_update=True)

    def transcribe(requests):
        # One clip a call, as the published scripts do.
        return [
            model.generate(input=request["audio"], batch_size_s=300)[0]["text"]
            for request in requests
        ]

    return transcribe


def main():
    serve(load, "paraformer-zh", importlib.metadata.version("funasr"), languages=["zh"])


if __name__ == "__main__":
    main()

"""omniASR as a worker, in an environment of its own (it pins what this project cannot have).

    python3 -m venv .venv-omniasr && .venv-omniasr/bin/pip install omnilingual-asr
    python -m eval.run ... \
        --asr "auto, omniasr=worker:.venv-omniasr/bin/python eval/workers/omniasr_worker.py"

Options after the script: --model omniASR_LLM_7B (or a smaller omniASR_LLM_1B, omniASR_CTC_1B).
"""

import argparse
import importlib.metadata

from worker import serve


def load(model: str, batch: int):
    from omnilingual_asr.models.inference.pipeline import ASRInferencePipeline

    pipeline = ASRInferencePipeline(model_card=model)

    def transcribe(requests):
        return pipeline.transcribe(
            [request["audio"] for request in requests],
            lang=[request["omniasr"] for request in requests],
            batch_size=batch,
        )

    return transcribe


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="omniASR_LLM_7B")
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    version = importlib.metadata.version("omnilingual-asr")
    serve(lambda: load(args.model, args.batch), args.model, version, batch=args.batch)


if __name__ == "__main__":
    main()

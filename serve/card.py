"""The model card of an export: what it is, whose weights, under which licence, how to serve it."""

from __future__ import annotations

import json
from pathlib import Path

# Facts of the licence: "Boson Higgs Audio v3 Research & Non-Commercial License", 2026-05-21.
BOSON_LICENCE = """\
Derived from Higgs Audio v3, licensed from Boson AI USA, Inc. The base weights, and so these, are
under Boson's research and non-commercial licence: production use, a hosted API, internal business
operations or revenue need a commercial licence from Boson. Ship the licence text and this notice
with every copy, do not begin the model's name with "Higgs", and train no other generative model on
its outputs."""
NANO_LICENCE = """\
Made from higgs_lab's nano family, which is trained from scratch and derives from no Boson weights.
Apache-2.0."""
CONSENT = """\
Clone a voice only with its speaker's recorded consent, impersonate nobody, and say that the audio
is made by a machine."""


def model_card(name: str, record: dict) -> str:
    """README.md for an export; `record` is its export.json."""
    nano = record["base"] == "nano"
    revision = record["revision"]
    front = ["---", f"license: {'apache-2.0' if nano else 'other'}", "pipeline_tag: text-to-speech"]
    if revision and not nano:  # a hub name; others are folders of this machine, of no use in a card
        front.append(f"base_model: {record['base']}")
        base = f"{record['base']} at `{revision}`"
    else:
        base = f"`{Path(record['base']).name}`"
    parts = [
        "\n".join([*front, "---"]),
        f"# {name}",
        f"A text-to-speech checkpoint made from {base}.",
    ]
    parts.append(_adapter(record))
    serve = f"""\
```
HIGGS_AUDIO_TOKENIZER_PATH={name}/audio_tokenizer VLLM_USE_DEEP_GEMM=0 VLLM_MOE_USE_DEEP_GEMM=0 \\
    vllm serve {name} --omni --trust-remote-code --deploy-config {name}/deploy/throughput.yaml
```

Without the first variable vLLM-Omni downloads another codec to encode references with. The profiles
in `deploy/` each say what they are for."""
    parts += ["## Serve", serve, "## Licence", NANO_LICENCE if nano else BOSON_LICENCE, CONSENT]
    parts += ["## Checks", _checks(record)]
    return "\n\n".join(p for p in parts if p) + "\n"


def _adapter(record: dict) -> str:
    if record["merge"] is None:
        return ""
    merge, meta = record["merge"], record["adapter_meta"]
    said = {k: v for k, v in meta.items() if k in ("data", "dataset", "steps", "preset", "rank")}
    trained = f" Trained with: `{json.dumps(said)}`." if said else ""
    return (
        f"A LoRA was merged into {merge['changed']} tensors in fp32; a layer's output differs by "
        f"{merge['output_error']:.1g} at most from the unmerged one's, and "
        f"{merge['delta_kept']:.1%} of the change survived the cast.{trained}"
    )


def _checks(record: dict) -> str:
    rows = ["| rule | vLLM-Omni | SGLang-Omni |", "|---|---|---|"]
    rows += [f"| {rule} | {v['vllm']} | {v['sglang']} |" for rule, v in record["checks"].items()]
    return "\n".join(rows) + f"\n\nCodec hash `{record['codec_hash']}`."

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


def model_card(name: str, record: dict, evaluation: str | None = None) -> str:
    """README.md for an export; `record` is its export.json, `evaluation` a ready section."""
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
    parts += [_changes(record), "## Data", _data(record)]
    parts += ["## Evaluation", evaluation or "None was given to the export (`--eval`)."]
    serve = f"""\
```
HIGGS_AUDIO_TOKENIZER_PATH={name}/audio_tokenizer VLLM_USE_DEEP_GEMM=0 VLLM_MOE_USE_DEEP_GEMM=0 \\
    vllm serve {name} --omni --trust-remote-code --deploy-config {name}/deploy/throughput.yaml
```

Without the first variable vLLM-Omni downloads another codec to encode references with. The profiles
in `deploy/` each say what they are for."""
    licence = NANO_LICENCE if nano else BOSON_LICENCE
    parts += ["## Serve", serve, "## Licence", licence, "## Consent", _consent(record)]
    parts += ["## Checks", _checks(record)]
    return "\n\n".join(p for p in parts if p) + "\n"


def _changes(record: dict) -> str:
    if record["merge"] is None:
        return "Its weights are those of the base."
    merge, meta = record["merge"], record["adapter_meta"]
    said = {k: v for k, v in meta.items() if k in ("steps", "preset", "rank")}
    trained = f" Trained with: `{json.dumps(said)}`." if said else ""
    what = "The weights of another checkpoint, in its own layout, were put into"
    if record.get("from") is None:
        what = "A LoRA was merged in fp32 into"
    return (
        f"{what} {merge['changed']} tensors; the cast to the stored dtype moves a layer's output "
        f"by {merge['output_error']:.1g} at most and keeps {merge['delta_kept']:.1%} of the change."
        f"{trained}"
    )


def _data(record: dict) -> str:
    if record.get("data"):
        return record["data"]
    splits = record["adapter_meta"].get("data")
    if splits:
        return f"The training run notes: `{json.dumps(splits, ensure_ascii=False)}`."
    if record["merge"] is None:
        return "None: nothing was trained here."
    return "Not stated by whoever exported it (`--data`)."


def _consent(record: dict) -> str:
    given = record.get("consent")
    stated = f"Stated by whoever exported it: {given}" if given else "None is stated (`--consent`)."
    return f"{stated}\n\n{CONSENT}"


def evaluation_table(folder: str | Path) -> str:
    """What an eval.run folder found, as Markdown.

    Raises FileNotFoundError when the run is not finished, ValueError when it is no such summary.
    """
    file = Path(folder) / "summary.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: finish that run with eval.run first")
    summary = json.loads(file.read_text(encoding="utf-8"))
    try:
        config, overall, blocks = summary["config"], summary["overall"], summary["languages"]
        rows = ["| language | clips | failed | error | 95 % | SIM to reference |"]
        rows.append("|---" * 6 + "|")
        if len(blocks) > 1:
            blocks = blocks | {"mean of languages": overall}
        for code, block in blocks.items():
            unit = {"word": " WER", "char": " CER"}.get(block["unit"], "")
            error, sim = block["error"], block["sim_ref"]
            cells = [
                "-" if error is None else f"{100 * error['value']:.2f} %{unit}",
                _span(error, 100, 2),
                "-" if sim is None else f"{sim['value']:.3f}",
            ]
            rows.append(f"| {code} | {block['clips']} | {block['failed']} | {' | '.join(cells)} |")
        asr, encoder = config["asr"] or {}, config["encoder"] or {}
        heard = f"heard by {Path(asr['name']).name}" if asr else "not transcribed"
        voices = f", voices by {Path(encoder['name']).name}" if encoder else ""
        said = (
            f"`{config['system']['name']}` on {config['set']['name']} "
            f"({config['set']['rows']} texts), {heard}{voices}, normaliser {config['normalizer']}. "
            "Failed clips count as all words wrong; do not compare across recognisers."
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file} is no summary of eval.run ({error!r})") from error
    return "\n".join([*rows, "", said])


def _span(estimate: dict | None, scale: float, digits: int) -> str:
    if estimate is None or estimate["low"] is None:
        return "-"
    return f"{scale * estimate['low']:.{digits}f}-{scale * estimate['high']:.{digits}f}"


def _checks(record: dict) -> str:
    rows = ["| rule | vLLM-Omni | SGLang-Omni |", "|---|---|---|"]
    rows += [f"| {rule} | {v['vllm']} | {v['sglang']} |" for rule, v in record["checks"].items()]
    return "\n".join(rows) + f"\n\nCodec hash `{record['codec_hash']}`."

"""`python -m serve.check EXPORT`: will the servers load this directory, and load it right?

    python -m serve.check exports/x                    # both engines' loading rules, no engine
    python -m serve.check exports/x --live             # and starts the server and listens to it
    python -m serve.check exports/x --live --url http://127.0.0.1:8000

Holds a native checkpoint directory against the loading rules of vLLM-Omni 0.30 and SGLang-Omni
0.1.9, without either of them and without a GPU. vLLM-Omni refuses a bad export after half a minute
with a message deep in a worker's log; SGLang-Omni drops unknown keys and may serve random weights
without a word. So each rule has a verdict per engine, and the exit code is 1 when the engine chosen
with `--engine` would fail.

Rules: vllm-omni higgs_audio_v3_talker.py::load_weights, higgs_audio_v3_code2wav.py::
_load_from_bundled_state, pipeline.py; sglang-omni higgs_tts/weight_loader.py, audio_codec.py. The
tests in tests/engines run those functions on the same exports.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
import yaml
from transformers import (
    HiggsAudioV2TokenizerConfig,
    HiggsAudioV2TokenizerModel,
    PreTrainedTokenizerFast,
)

from higgs_lab.checkpoint import (
    CODEC_PREFIX,
    TIED_COPIES,
    NativeFiles,
    read_config,
    to_native_key,
    to_talker_key,
)
from higgs_lab.codec import MAY_BE_EXTRA, Codec, codec_config
from higgs_lab.runlog import write_json_atomic
from higgs_lab.talker import Talker, talker_config
from higgs_lab.vocab import CODEC_CONFIG, EOC

OK, WARN, FAIL = "ok", "warn", "FAIL"
ENGINES = ("vllm", "sglang")

# Ids that engine code or the released checkpoint fixes. <|endoftext|> and <|audio_end|> are the
# stop ids typed into vllm-omni's pipeline.py; the rest is the released tokenizer.
TOKEN_IDS = {
    "<|endoftext|>": 151643,
    "<|tts|>": 151667,
    "<|audio|>": 151670,
    "<|audio_end|>": 151671,
    "<|text|>": 151672,
    "<|ref_audio|>": 151679,
    "<|ref_text|>": 151680,
}
# Sizes typed into vllm-omni's higgs_audio_v3_code2wav.py: codec tensor -> shape, None where free.
CODE2WAV_SHAPES = {
    "quantizer.quantizers.0.codebook.embed": (1024, 64),
    "quantizer.quantizers.0.project_out.weight": (None, 64),
    "fc2.weight": (256, None),
    "acoustic_decoder.conv1.weight": (1024, 256, 7),
}
# What vllm-omni's codec stage reads; of the other codec keys it wants nothing.
DECODER_SIDE = ("acoustic_decoder.", "fc2.")


@dataclass(frozen=True)
class Finding:
    """One rule, and what each engine would make of it: OK, WARN or FAIL ("-": not asked)."""

    rule: str
    vllm: str
    sglang: str
    detail: str = ""
    figures: dict = field(default_factory=dict)  # what was measured, by name


def check_export(path: str | Path) -> list[Finding]:
    """All findings for a directory, in the order an engine would meet the problems."""
    path = Path(path)
    findings = list(_files(path))
    if any(f.vllm == FAIL for f in findings):
        return findings  # the rest needs readable files
    files, config = NativeFiles(path), read_config(path)
    specs = {k: tuple(s) for file in files.files for k, (_, s) in files.specs(file).items()}
    findings += _sizes(config)
    findings += _tokenizer(path)
    if any(f.rule in ("codebooks", "model_type") and f.vllm == FAIL for f in findings):
        return findings  # another model: nothing below would make sense
    findings += _talker_keys(config, specs)
    findings += _codec_keys(specs)
    findings += _index(files)
    findings += _tied_copies(files)
    findings += _audio_tokenizer(path)
    findings += _deploy(path)
    return findings


def failures(findings: list[Finding], engine: str = "vllm") -> list[Finding]:
    """Findings that keep an engine ("vllm", "sglang" or "both") from serving the export right."""
    engines = ENGINES if engine == "both" else (engine,)
    return [f for f in findings if any(getattr(f, e) == FAIL for e in engines)]


def table(findings: list[Finding]) -> str:
    """Findings as aligned text."""
    width = max(len(f.rule) for f in findings)
    head = f"{'rule':<{width}}  vLLM  SGLang"
    rows = [f"{f.rule:<{width}}  {f.vllm:<4}  {f.sglang:<6}  {f.detail}".rstrip() for f in findings]
    return "\n".join([head, *rows])


def _verdict(rule: str, problem: str, vllm: str = FAIL, sglang: str = FAIL) -> Finding:
    """OK when there is no problem."""
    return Finding(rule, vllm, sglang, problem) if problem else Finding(rule, OK, OK)


def _files(path: Path) -> Iterator[Finding]:
    if not path.is_dir():
        yield _verdict("directory", f"{path} is no directory")
        return
    names = ("config.json", "tokenizer.json", "tokenizer_config.json")
    missing = [name for name in names if not (path / name).is_file()]
    # SGLang-Omni reads tokenizer.json alone.
    only_config = missing == ["tokenizer_config.json"]
    problem = f"missing: {', '.join(missing)}" if missing else ""
    yield _verdict("files", problem, sglang=WARN if only_config else FAIL)
    for rule, read in (("config.json", read_config), ("shards readable", NativeFiles)):
        try:
            read(path)
            yield _verdict(rule, "")
        except (ValueError, OSError) as error:
            yield _verdict(rule, str(error))


def _sizes(config: dict) -> Iterator[Finding]:
    text, audio = config["text_config"], config["audio_encoder_config"]
    need = max(TOKEN_IDS["<|audio_end|>"], TOKEN_IDS["<|text|>"]) + 1
    size = text.get("vocab_size", 0)
    problem = "" if size >= need else f"text vocabulary of {size}, stop ids need {need}: not pruned"
    # vLLM-Omni starts, reports healthy, and then fails every request.
    yield _verdict("text vocabulary", problem)
    got = (audio.get("num_codebooks"), audio.get("vocab_size"))
    wrong = f"codebooks x entries {got}, the engines know (8, {EOC + 1}) only"
    yield _verdict("codebooks", "" if got == (8, EOC + 1) else wrong)
    kind = config.get("model_type")
    wrong = f"model_type is {kind!r}, the engines look for 'higgs_multimodal_qwen3'"
    yield _verdict("model_type", "" if kind == "higgs_multimodal_qwen3" else wrong)
    rope = (text.get("rope_parameters") or {}).get("rope_theta", text.get("rope_theta"))
    missing = "no rope_theta: both engines put in 1e6, other readers fall back to 10000"
    yield _verdict("rope_theta", missing if rope is None else "", vllm=WARN, sglang=WARN)


def _tokenizer(path: Path) -> Iterator[Finding]:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"))
    added = tokenizer.get_added_vocab()
    wrong = [f"{t} is {added.get(t)}, not {i}" for t, i in TOKEN_IDS.items() if added.get(t) != i]
    yield _verdict("control tokens", "; ".join(wrong))


def _talker_keys(config: dict, specs: dict[str, tuple]) -> Iterator[Finding]:
    audio = config["audio_encoder_config"]
    text = {"rope_theta": 1e6} | config[
        "text_config"
    ]  # absence has its own rule; shapes do not care
    with torch.device("meta"):
        talker = Talker(talker_config(text), audio["num_codebooks"], audio["vocab_size"])
    expected = {to_native_key(k): tuple(v.shape) for k, v in talker.state_dict().items()}
    missing = sorted(set(expected) - set(specs))
    # SGLang-Omni checks nothing here: what is missing stays random.
    yield _verdict("talker keys complete", _some(missing))
    unknown = [k for k in specs if not _known(k, expected)]
    hint = " (an unmerged adapter?)" if any("lora_" in k or "base_" in k for k in unknown) else ""
    yield _verdict("no unknown keys", _some(unknown) + hint * bool(unknown), sglang=WARN)
    shapes = [
        f"{k} is {specs[k]}, config says {expected[k]}"
        for k in expected
        if k in specs and specs[k] != expected[k]
    ]
    yield _verdict("talker shapes", "; ".join(shapes[:3]))


def _known(key: str, expected: dict[str, tuple]) -> bool:
    if key in expected:
        return True
    try:
        return to_talker_key(key) is None  # codec and tied copies
    except ValueError:
        return False


def _codec_keys(specs: dict[str, tuple]) -> Iterator[Finding]:
    codec = {k[len(CODEC_PREFIX) :]: s for k, s in specs.items() if k.startswith(CODEC_PREFIX)}
    if not codec:
        yield _verdict("codec bundled", f"no key begins with {CODEC_PREFIX!r}")
        return
    stand_ins = {k: SimpleNamespace(shape=s) for k, s in codec.items()}
    try:
        config = codec_config(stand_ins, CODEC_CONFIG)
    except ValueError as error:
        yield _verdict("codec keys complete", str(error))
        return
    expected = _codec_shapes(config)
    missing = sorted(set(expected) - set(codec))
    # vLLM-Omni decodes only; a missing encoder key harms the toolkit and SGLang-Omni's clones.
    decoder = any(k.startswith(("acoustic_decoder.", "fc2.", "quantizer.")) for k in missing)
    yield _verdict("codec keys complete", _some(missing), vllm=FAIL if decoder else WARN)
    unknown = sorted(set(codec) - set(expected) - MAY_BE_EXTRA)
    decoder = any(k.startswith(("acoustic_decoder.", "fc2.")) for k in unknown)
    yield _verdict(
        "no unknown codec keys", _some(unknown), vllm=FAIL if decoder else WARN, sglang=WARN
    )
    wrong = [f"{k} is {codec[k]}" for k in expected if k in codec and codec[k] != expected[k]]
    yield _verdict("codec shapes agree", "; ".join(wrong[:3]))
    fixed = [
        f"{key} is {codec[key]}, must be {shape}"
        for key, shape in CODE2WAV_SHAPES.items()
        if key in codec and any(w not in (None, g) for w, g in zip(shape, codec[key], strict=False))
    ]
    yield _verdict("codec decoder sizes", "; ".join(fixed), sglang=OK)
    released = _codec_shapes(CODEC_CONFIG)
    other = [k for k in released if codec.get(k, released[k]) != released[k]]
    problem = (
        f"{len(other)} tensors have other sizes than the released codec, SGLang builds no other"
    )
    yield _verdict("codec as released", problem if other else "", vllm=OK)


def _codec_shapes(config: dict) -> dict[str, tuple]:
    with torch.device("meta"):
        model = HiggsAudioV2TokenizerModel(HiggsAudioV2TokenizerConfig(**copy.deepcopy(config)))
    return {k: tuple(v.shape) for k, v in model.state_dict().items()}


def _index(files: NativeFiles) -> Iterator[Finding]:
    unlisted = [k for k in files.keys(CODEC_PREFIX) if k not in files.indexed]
    # SGLang-Omni reads only listed codec keys and leaves the others random.
    yield _verdict("index lists the codec", _some(unlisted), vllm=WARN)
    others = [
        k
        for k in files.keys()
        if k not in files.indexed and k not in TIED_COPIES and not k.startswith(CODEC_PREFIX)
    ]
    yield _verdict("index lists the talker", _some(others), vllm=WARN, sglang=WARN)


def _tied_copies(files: NativeFiles) -> Iterator[Finding]:
    stale = [
        twin
        for twin, source in TIED_COPIES.items()
        if twin in files.shard and source in files.shard and not files.same(twin, source)
    ]
    # Both engines read the embeddings; loaders of other projects read the copies.
    yield _verdict("tied copies fresh", _some(stale))


def _audio_tokenizer(path: Path) -> Iterator[Finding]:
    rule, folder = "clone encoder", path / "audio_tokenizer"
    if not (folder / "config.json").is_file():
        missing = "no audio_tokenizer/: vLLM-Omni would download another codec for clones"
        yield _verdict(rule, missing, vllm=WARN, sglang=OK)
        return
    try:
        same = Codec.from_pretrained(folder).hash == Codec.from_pretrained(path).hash
        other = "audio_tokenizer/ holds another codec than the checkpoint bundles"
        yield _verdict(rule, "" if same else other, sglang=OK)
    except (ValueError, OSError) as error:
        yield _verdict(rule, f"audio_tokenizer/ cannot be loaded: {error}", sglang=OK)


def _deploy(path: Path) -> Iterator[Finding]:
    problems = []
    for file in sorted((path / "deploy").glob("*.yaml")):
        try:
            base = yaml.safe_load(file.read_text(encoding="utf-8")).get("base_config")
            if base and not (file.parent / base).is_file():
                problems.append(f"{file.name} builds on {base}, which is missing")
        except (yaml.YAMLError, AttributeError) as error:
            problems.append(f"{file.name}: {error}")
    if not (path / "deploy").is_dir():
        problems = ["no deploy/: name a profile of serve/profiles yourself"]
        yield _verdict("deploy profiles", problems[0], vllm=WARN, sglang=OK)
        return
    yield _verdict("deploy profiles", "; ".join(problems), sglang=OK)


def _some(keys: list[str]) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - 2} more" if len(keys) > 2 else ""
    return ", ".join(keys[:2]) + more


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m serve.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("export", help="directory made by serve.export, or any native checkpoint")
    parser.add_argument("--engine", choices=[*ENGINES, "both"], default="vllm")
    parser.add_argument("--json", metavar="FILE", help="write the findings and their figures")
    live = parser.add_argument_group("with --live (see serve/live.py)")
    live.add_argument("--live", action="store_true", help="ask a server as well; starts one")
    live.add_argument("--url", help="ask this server, which serves the same export")
    live.add_argument("--api-key", default=os.environ.get("VLLM_API_KEY"))
    live.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    live.add_argument("--profile", help="name of a profile, or a deploy YAML")
    live.add_argument("--ref-audio", help="voice to clone, 1 to 30 s; default a buzz")
    live.add_argument("--ref-text", help="what it says, verbatim")
    live.add_argument("--rows", type=int, default=120, help="length of a request, 25 rows a second")
    live.add_argument("--dumps", help="HIGGS_LAB_DUMP_DIR of the server at --url")
    live.add_argument("--vllm", help="path of the vllm program")
    live.add_argument("--timeout", type=float, default=600, help="seconds to wait for the server")
    args = parser.parse_args()
    if args.live and args.engine == "both":
        parser.error("--live asks one server: say --engine vllm or --engine sglang")
    if args.url and not args.live:
        parser.error("--url goes with --live")
    findings = check_export(args.export)
    if args.live and not failures(findings, args.engine):
        print("the directory is fit to be served; now the server", file=sys.stderr)
        try:
            findings += _live(args)
        except (ValueError, OSError) as error:
            sys.exit(f"serve.check: {error}")
    print(table(findings))
    bad = failures(findings, args.engine)
    if args.json:
        write_json_atomic(args.json, {"problems": len(bad), "findings": [*map(asdict, findings)]})
    said = "served as it should be" if args.live else "fit to be served"
    if args.engine != "both":
        said += f" by {args.engine}"
        refused = [e for e in ENGINES if e != args.engine and failures(findings, e)]
        said += "".join(f"; {engine} would refuse it" for engine in refused)
    print(f"\n{len(bad)} problems" if bad else f"\n{said}")
    sys.exit(bool(bad))


def _live(args: argparse.Namespace) -> list[Finding]:
    from serve.live import run_panel

    return run_panel(
        args.export, args.url, args.device, engine=args.engine, profile=args.profile,
        api_key=args.api_key, ref_audio=args.ref_audio, ref_text=args.ref_text, rows=args.rows,
        dumps=args.dumps, vllm=args.vllm, timeout_sec=args.timeout,
    )  # fmt: skip


if __name__ == "__main__":
    main()

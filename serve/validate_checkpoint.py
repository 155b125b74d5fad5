"""Steps of serve.validate that need no talker: files, names, numbers, and the codec."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from higgs_lab.audio import read_audio
from higgs_lab.checkpoint import CODEC_PREFIX, TIED_COPIES, NativeFiles, read_config, to_native_key
from higgs_lab.codec import Codec
from higgs_lab.nano.random_4b import TEXT_CONFIG_4B
from higgs_lab.nano.tokenizer import ADDED_TOKENS, FIRST_ADDED_ID
from higgs_lab.talker import Talker, talker_config
from serve.validation import FAIL, OK, WARN, Outcome, Run, Skip

# The released files and numbers, as second-hand sources tell them (facts §1.1, §1.2).
RELEASED_FILES = {"config.json", "model.safetensors", "model.safetensors.index.json"}
RELEASED_FILES |= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
RELEASED = {"keys": 929, "indexed": 927, "codec keys": 528, "parameters": 4_654_850_537}
TOKENIZER_LENGTH = 151_727
V2_TOKENIZER = "bosonai/higgs-audio-v2-tokenizer"
LINES = ("Hello there.", "  Two  spaces, 12345 and a\nnew line. ", "你好，世界 — ça va? हिन्दी")
CLIPS = 8


def released_size(path: Path) -> bool:
    """Whether this is the 4B model, of which more is known than of a nano."""
    return read_config(path)["text_config"].get("hidden_size") == TEXT_CONFIG_4B["hidden_size"]


def files(run: Run) -> Outcome:
    """What the repository holds; licence, generation defaults, gating."""
    out, path = Outcome(), run.path
    found = {p.name: p.stat().st_size for p in sorted(path.iterdir()) if p.is_file()}
    out.figures = {"files": found}
    if released_size(path):
        if missing := sorted(RELEASED_FILES - set(found)):
            out.note(f"not there: {', '.join(missing)}", WARN)
    for name in ("generation_config.json", "LICENSE", "NOTICE"):
        out.note(f"{name}: {'there' if name in found else 'none'}")
    if run.loaded["checkpoint"].revision and run.model != "nano":
        from huggingface_hub import HfApi

        try:
            info = HfApi().model_info(run.model.partition("@")[0])
            out.figures["gated"] = info.gated
            out.note(f"gated: {info.gated}; last modified {info.last_modified}")
        except Exception as error:  # the files may come from the cache, without a network
            out.note(f"gating not asked, the hub cannot be reached ({type(error).__name__})")
    return out


def config(run: Run) -> Outcome:
    """config.json against the released one, and whether our configuration class takes it."""
    out, found = Outcome(), read_config(run.path)
    text, audio = found["text_config"], found["audio_encoder_config"]
    talker_config(text)  # raises when it cannot be read
    out.expect("model_type", found.get("model_type"), "higgs_multimodal_qwen3")
    out.expect("audio_token_id", found.get("audio_token_id"), -100, WARN)
    out.expect("num_codebooks", audio["num_codebooks"], 8)
    out.expect("codebook entries", audio["vocab_size"], 1026)
    out.expect("tied audio head", audio.get("tie_word_embeddings"), True)
    out.expect("delay pattern", audio.get("use_delay_pattern"), True)
    if released_size(run.path):
        for key, value in TEXT_CONFIG_4B.items():
            out.expect(f"text_config.{key}", text.get(key), value, WARN)
    unknown = sorted(set(text) - set(TEXT_CONFIG_4B) - {"_name_or_path", "pad_token_id"})
    out.figures["text_config, further keys"] = {k: text[k] for k in unknown}
    return out


def tokenizer(run: Run) -> Outcome:
    """Control tokens at their ids, and one reading of the tokenizer for both engines."""
    out = Outcome()
    direct = PreTrainedTokenizerFast(tokenizer_file=str(run.path / "tokenizer.json"))
    added = direct.get_added_vocab()
    wanted = {token: FIRST_ADDED_ID + i for i, token in enumerate(ADDED_TOKENS)}
    out.expect("added tokens", len(added), len(wanted), WARN)
    wrong = {t: added.get(t) for t, i in wanted.items() if added.get(t) != i}
    out.expect("added tokens at other ids", wrong, {})
    if released_size(run.path) and run.model != "nano":
        out.expect("length", len(direct), TOKENIZER_LENGTH, WARN)
    auto = AutoTokenizer.from_pretrained(run.path)
    for line in LINES:
        ids = direct.encode(line, add_special_tokens=False)
        if auto.encode(line, add_special_tokens=False) != ids:
            out.note(
                f"AutoTokenizer (vLLM-Omni) and tokenizer.json (here) differ on {line!r}", FAIL
            )
        if direct.decode(ids) != line:
            out.note(f"does not decode to itself: {line!r} -> {direct.decode(ids)!r}", WARN)
    smuggled = direct.encode("a <|audio|> b", add_special_tokens=False)
    out.figures["a control token inside text becomes its id"] = added["<|audio|>"] in smuggled
    return out


def keys(run: Run) -> Outcome:
    """The inventory: names, shapes, dtypes, what the index lists."""
    out, files_ = Outcome(), NativeFiles(run.path)
    specs = {k: spec for file in files_.files for k, spec in files_.specs(file).items()}
    found = read_config(run.path)
    audio = found["audio_encoder_config"]
    with torch.device("meta"):
        talker = Talker(
            talker_config(found["text_config"]), audio["num_codebooks"], audio["vocab_size"]
        )
    expected = {to_native_key(k): list(v.shape) for k, v in talker.state_dict().items()}
    codec = [k for k in specs if k.startswith(CODEC_PREFIX)]
    figures = {
        "keys": len(specs),
        "indexed": len(files_.indexed),
        "codec keys": len(codec),
        "parameters": sum(math.prod(shape) for _, shape in specs.values()),
    }
    if released_size(run.path):
        for name, wanted in RELEASED.items():
            out.expect(name, figures[name], wanted, WARN)
    out.figures |= figures
    out.expect("talker keys missing", sorted(set(expected) - set(specs)), [])
    rest = set(specs) - set(expected) - set(codec)
    out.expect("keys beside talker and codec", sorted(rest), sorted(TIED_COPIES), WARN)
    shapes = {k: specs[k][1] for k in expected if k in specs and specs[k][1] != expected[k]}
    out.expect("talker shapes unlike the config", shapes, {})
    unlisted = sorted(set(specs) - set(files_.indexed))
    out.expect("not in the index", unlisted, sorted(TIED_COPIES), WARN)
    dtypes: dict[str, int] = {}
    for dtype, _ in specs.values():
        dtypes[dtype] = dtypes.get(dtype, 0) + 1
    out.expect("dtypes", dtypes, {"BF16": len(specs)}, WARN)
    return out


def tied_heads(run: Run) -> Outcome:
    """An export refreshes the two copies from the embeddings: right if they are equal."""
    out, files_ = Outcome(), NativeFiles(run.path)
    for twin, source in TIED_COPIES.items():
        if twin not in files_.shard:
            out.note(f"{twin} is not in the files", WARN)
        else:
            out.expect(f"{twin} bit for bit {source}", files_.same(twin, source), True)
    return out


def sounds(run: Run, codec: Codec) -> dict[str, np.ndarray]:
    """Recordings by a name that tells nothing, or a synthetic buzz when there are none."""
    try:
        clips = run.clips()[:CLIPS]
    except Skip:
        t = np.arange(3 * codec.sample_rate_hz) / codec.sample_rate_hz
        tone = sum(np.sin(2 * np.pi * 140 * k * t) / k for k in range(1, 9))
        buzz = 0.2 * tone * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * t))
        return {"synthetic": buzz.astype(np.float32)}
    return {f"clip {i}": read_audio(c.audio, codec.sample_rate_hz) for i, c in enumerate(clips)}


def bundled_codec(run: Run) -> Outcome:
    """The bundled codec loads strictly and gives back what it was given."""
    out, codec = Outcome(), Codec.from_pretrained(run.path, run.torch_device)
    out.figures = {"hash": codec.hash, "encoder width": codec.model.config.semantic_hidden_size}
    hop = codec.samples_per_frame
    out.expect("sample rate", codec.sample_rate_hz, 24000)
    out.expect("samples per frame", hop, 960)
    levels, frames, used = {}, {}, {}
    for name, wav in sounds(run, codec).items():
        codes = codec.encode(wav)
        back = codec.decode(codes)
        frames[name] = {"samples": len(wav), "frames": len(codes)}
        if len(codes) not in (math.ceil(len(wav) / hop), math.ceil(len(wav) / hop) - 1):
            out.note(f"{name}: {len(codes)} frames of {len(wav)} samples", FAIL)
        n = min(len(wav), len(back))
        levels[name] = 20 * math.log10(_rms(back[:n]) / max(_rms(wav[:n]), 1e-9) + 1e-9)
        used[name] = [len(codes[:, k].unique()) for k in range(codes.shape[1])]
    out.figures |= {"level_db": levels, "frames": frames, "distinct codes": used}
    worst = max(levels.values(), key=abs)
    # embed_avg taken for embed is 12 dB and noise; 3 dB is what a codec may do to speech
    verdict = FAIL if abs(worst) > 3 and released_size(run.path) else WARN
    out.note(
        f"decoded sound is {worst:+.1f} dB from the original", verdict if abs(worst) > 3 else OK
    )
    return out


def codec_precision(run: Run) -> Outcome:
    """Codes and sound in bf16, which SGLang-Omni uses for both, against float32."""
    device = run.torch_device
    exact = Codec.from_pretrained(run.path, device)
    half = Codec.from_pretrained(run.path, device, torch.bfloat16)
    wavs = sounds(run, exact)
    codes = {name: exact.encode(wav) for name, wav in wavs.items()}
    out = Outcome()
    agree = agreement(list(codes.values()), [half.encode(wav) for wav in wavs.values()])
    out.figures["codes equal in bf16, by codebook"] = agree
    if device != "cpu":
        plain = Codec.from_pretrained(run.path, "cpu")
        same = agreement(list(codes.values()), [plain.encode(wav) for wav in wavs.values()])
        out.figures["codes equal on the CPU, by codebook"] = same
        out.note(
            f"CPU and GPU agree on {min(same):.1%} of codes or more",
            WARN if min(same) < 0.99 else OK,
        )
    snr = []
    for clip in codes.values():
        want, got = exact.decode(clip), half.decode(clip)
        snr.append(20 * math.log10(_rms(want) / max(_rms(want - got), 1e-9)))
    out.figures["decoded in bf16, dB above the difference"] = snr
    out.note(
        f"bf16 encoding keeps {agree[0]:.1%} of codebook 0 and {agree[-1]:.1%} of the last; bf16 "
        f"decoding is {min(snr):.0f} dB above its difference"
    )
    return out


def other_codec(run: Run) -> Outcome:
    """The codec that vLLM-Omni downloads for clones, against the bundled one."""
    bundled = Codec.from_pretrained(run.path, run.torch_device)
    other = Codec.from_pretrained(_fetch(run.other_codec), run.torch_device)
    out = Outcome()
    ours, theirs = bundled.model.state_dict(), other.model.state_dict()
    if any(ours[k].shape != theirs[k].shape for k in ours if k in theirs):
        raise Skip(f"{run.other_codec} has other sizes than this checkpoint's codec: not its twin")
    cast = {k: torch.equal(ours[k], theirs[k].bfloat16().float()) for k in ours}
    worst = max(ours, key=lambda k: float((ours[k] - theirs[k]).abs().max()))
    out.figures = {
        "tensors": len(cast),
        "equal after the cast to bf16": sum(cast.values()),
        "largest difference": {worst: float((ours[worst] - theirs[worst]).abs().max())},
        "hashes": {"bundled": bundled.hash, "other": other.hash},
    }
    wavs = list(sounds(run, bundled).values())
    agree = agreement([bundled.encode(w) for w in wavs], [other.encode(w) for w in wavs])
    out.figures["codes equal, by codebook"] = agree
    same = all(cast.values())
    out.note(
        f"{sum(cast.values())} of {len(cast)} tensors are the bundled ones before rounding; codes "
        f"agree by {agree[0]:.1%} (codebook 0) to {agree[-1]:.1%} (the last)",
        OK if same else WARN,
    )
    return out


def v2_tokenizer(run: Run) -> Outcome:
    """What the v2 tokenizer's repository really holds; sources disagree. Reads headers only."""
    from huggingface_hub import HfApi

    try:
        metadata = HfApi().get_safetensors_metadata(V2_TOKENIZER)
    except Exception as error:
        raise Skip(f"{V2_TOKENIZER} cannot be read here: {type(error).__name__}") from error
    names = sorted(metadata.weight_map)
    heads: dict[str, int] = {}
    for name in names:
        heads[name.partition(".")[0]] = heads.get(name.partition(".")[0], 0) + 1
    is_codec = any(name.startswith("quantizer.") for name in names)
    out = Outcome(figures={"keys": len(names), "prefixes": heads})
    out.note(f"it holds {'a codec' if is_codec else 'no codec under the names of one'}")
    return out


def agreement(ones: list[Tensor], others: list[Tensor]) -> list[float]:
    """Share of equal codes by codebook, over the frames that both have."""
    pairs = [(a[: len(b)], b[: len(a)]) for a, b in zip(ones, others, strict=True)]
    one, two = torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs])
    return (one == two).float().mean(0).tolist()


def _fetch(name: str) -> Path:
    """A codec folder on this disk, or the audio_tokenizer/ of a hub repository."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns="audio_tokenizer/*")) / "audio_tokenizer"
    except Exception as error:
        raise Skip(f"{name} cannot be fetched here: {type(error).__name__}") from error


def _rms(wav: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(wav, dtype=np.float64))))

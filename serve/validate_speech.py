"""Steps of serve.validate in which something speaks: the talker, an export, the two servers."""

from __future__ import annotations

import contextlib
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from higgs_lab.audio import read_audio
from higgs_lab.checkpoint import load_talker
from higgs_lab.codec import Codec
from higgs_lab.generate import Sampling, generate
from higgs_lab.loss import codebook_loss
from higgs_lab.manifest import Utterance, write_manifest
from higgs_lab.prompt import Example, render_example, render_prompt
from higgs_lab.talker import Talker
from higgs_lab.text import max_frames_for
from higgs_lab.vocab import EOC, Vocab
from serve.check import Finding, check_export
from serve.export import export
from serve.launch import free_port, make_plan, start
from serve.validation import FAIL, OK, WARN, Outcome, Run, Skip
from serve.words import estimate, evaluate

TEXTS = Path(__file__).with_name("validate_texts.txt")
CLIPS = 8
LEARNT = 0.9  # of ln 1026: below, the model knows more than chance about a recording


def texts(run: Run) -> list[str]:
    return TEXTS.read_text(encoding="utf-8").splitlines()[: run.texts]


def examples(run: Run) -> dict[str, list[Example]]:
    """Recordings as training sequences in the three prompt modes, each cloning the next clip."""
    vocab = Vocab.from_pretrained(run.path)
    codec = Codec.from_pretrained(run.path, run.torch_device)
    clips = run.clips()[:CLIPS]
    codes = [codec.encode(read_audio(clip.audio, codec.sample_rate_hz)) for clip in clips]
    found: dict[str, list[Example]] = {"zero-shot": [], "clone": [], "clone with transcript": []}
    for i, clip in enumerate(clips):
        other = (i + 1) % len(clips)
        found["zero-shot"].append(render_example(vocab, clip.text, codes[i]))
        if other != i:
            voice = codes[i], codes[other]
            found["clone"].append(render_example(vocab, clip.text, *voice))
            said = clips[other].text
            found["clone with transcript"].append(render_example(vocab, clip.text, *voice, said))
    return {mode: rows for mode, rows in found.items() if rows}


@torch.inference_mode()
def row_logits(talker: Talker, example: Example) -> Tensor:
    """Logits [S, K, V] at the positions that predict the rows."""
    batch = (example.ids[None], example.is_audio[None], example.rows[None])
    out = talker(*(t.to(talker.device) for t in batch))
    return out.logits[0, example.prompt_length - 1 :]


def alignment(run: Run) -> Outcome:
    """Our training sequence on the real weights: the recordings must be likelier than chance, and
    likelier where our labels stand than a row before or after."""
    rows = examples(run)
    talker, out = load_talker(run.path, run.torch_device, _dtype(run)), Outcome()
    chance = math.log(talker.codebook_size)
    for mode, batch in rows.items():
        sums: dict[int, object] = {}
        for example in batch:
            logits, start = row_logits(talker, example), example.prompt_length - 1
            labels, marks = example.labels[start:], example.supervised[start:]
            for shift in (-1, 0, 1):  # each row's logits against the row before, its own, the next
                n = len(logits) - abs(shift)
                part = logits[max(0, -shift) : max(0, -shift) + n]
                other = slice(max(0, shift), max(0, shift) + n)
                loss = codebook_loss(
                    part, labels[other].to(part.device), marks[other].to(part.device)
                )
                sums[shift] = loss if shift not in sums else sums[shift] + loss
        means = {shift: value.means() for shift, value in sums.items()}
        shifted = {"loss of the row before": means[-1]["loss"], "of the next": means[1]["loss"]}
        out.figures[mode] = means[0] | shifted
        loss = means[0]["loss"]
        best = min(means, key=lambda shift: means[shift]["loss"])
        known = loss < LEARNT * chance
        out.note(f"{mode}: loss {loss:.3f}, chance {chance:.3f}", OK if known else WARN)
        # (An untrained model repeats its input: head and embedding are one table.)
        if known and best != 0 and means[best]["loss"] < loss - 0.05:
            out.note(f"{mode}: the labels fit better shifted by {best:+d} row", FAIL)
        if known and means[0].get("loss_eoc/0", 0) > chance:
            out.note(f"{mode}: the end of speech is less likely than chance", WARN)
    losses = {mode: out.figures[mode]["loss"] for mode in rows}
    plain = losses["zero-shot"]
    if plain < LEARNT * chance and losses.get("clone", 0) > plain + 0.05:
        out.note("a reference makes speech less likely: another voice, or another layout?", WARN)
    return out


def available_bytes(memory: Path = Path("/proc/meminfo")) -> int:
    """Memory that a process can have: on Linux with what the cache of files would give back."""
    if memory.exists():
        fields = dict(line.split(":") for line in memory.read_text().splitlines())
        return 1024 * int(fields["MemAvailable"].split()[0])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def talker_precision(run: Run) -> Outcome:
    """Log-probabilities of real codes in the stored dtype against float32 (0.05: facts trap 9)."""
    batch = examples(run)["zero-shot"]
    device = run.torch_device
    stored = load_talker(run.path, device)
    if stored.dtype == torch.float32:
        raise Skip("the checkpoint is float32 itself")
    size_gb = 4 * sum(p.numel() for p in stored.parameters()) / 1e9
    free_gb = torch.cuda.mem_get_info()[0] / 1e9 if device == "cuda" else available_bytes() / 1e9
    if size_gb > 0.9 * free_gb:
        raise Skip(f"float32 takes {size_gb:.1f} GB, {free_gb:.1f} are free")
    exact = load_talker(run.path, device, torch.float32)
    gaps = []
    for example in batch:
        start = example.prompt_length - 1
        labels, marks = (t[start:].to(device) for t in (example.labels, example.supervised))
        one, two = (
            row_logits(model, example).float().log_softmax(-1).gather(-1, labels[..., None])[..., 0]
            for model in (stored, exact)
        )
        gaps.append((one - two).abs()[marks])
    gap = torch.cat(gaps)
    share = float((gap > 0.05).float().mean())
    figures = {"mean": float(gap.mean()), "max": float(gap.max()), "share over 0.05": share}
    out = Outcome(figures=figures)
    out.note(f"mean gap {figures['mean']:.4f}, largest {figures['max']:.3f}, {share:.2%} over 0.05")
    return out


def endings(run: Run) -> Outcome:
    """Whether speech ends by itself under each engine's rules and stock sampling; SGLang-Omni never
    forces the staircase of ends, so the model must have learnt it."""
    vocab = Vocab.from_pretrained(run.path)
    talker, out = load_talker(run.path, run.torch_device, _dtype(run)), Outcome()
    lines = texts(run)[:16]
    prompts = [render_prompt(vocab, line) for line in lines]
    for mode in ("vllm", "sglang"):
        base = Sampling.of_engine(mode)
        caps = [max_frames_for(line, vocab.frame_rate_hz) for line in lines]
        options = [replace(base, seed=i, max_frames=cap) for i, cap in enumerate(caps)]
        spoken = generate(talker, prompts, options)
        ended = [g for g in spoken if g.stop_reason == "eoc"]
        stairs = sum(bool((g.rows[-1, :-1] == EOC).all()) for g in ended)
        seconds = [len(g.codes) / vocab.frame_rate_hz for g in ended]
        out.figures[mode] = {
            "ended": len(ended),
            "of": len(spoken),
            "with all ends in the last row": stairs,
            "seconds": seconds,
        }
        few = len(ended) < 0.9 * len(spoken)
        out.note(f"{mode}: {len(ended)} of {len(spoken)} end by themselves", WARN if few else OK)
        if stairs < len(ended):
            out.note(f"{mode}: {len(ended) - stairs} ended without the staircase of ends", WARN)
    return out


def exported(run: Run) -> Outcome:
    """An export of the checkpoint as it is, for the servers; held against both engines' rules."""
    folder = run.out / "export"
    if not (folder / "export.json").is_file():
        export(run.model, folder)
    out = Outcome()
    for found in check_export(folder):
        out.figures[found.rule] = {"vllm": found.vllm, "sglang": found.sglang}
        if found.detail:
            # the released sizes are SGLang-Omni's only ones: a nano cannot be served there
            verdict = found.vllm if found.vllm in (WARN, FAIL) else WARN
            out.note(f"{found.rule}: {found.detail}", verdict)
    return out


def vllm_server(run: Run) -> Outcome:
    """Prompt, greedy codes, sound, clones, streams, limits of vLLM-Omni: serve.check's panel."""
    return _server(run, "vllm", run.vllm_url)


def sglang_server(run: Run) -> Outcome:
    """The same of SGLang-Omni."""
    if run.sglang_url is None:
        folder = run.out / "export"
        raise Skip(f"give --sglang URL of `sgl-omni serve --model-path {folder} --port 8001`")
    return _server(run, "sglang", run.sglang_url)


def _server(run: Run, engine: str, url: str | None) -> Outcome:
    from serve.live import run_panel

    options = {}
    with contextlib.suppress(Skip):
        clip = run.clips()[0]
        options = {"ref_audio": clip.audio, "ref_text": clip.text}
    options |= {"engine": engine, "profile": run.profile, "api_key": run.api_key}
    try:
        findings = run_panel(_export(run), url, run.device, **options)
    except FileNotFoundError as error:  # vLLM is not installed
        raise Skip(str(error)) from error
    return _outcome(findings, engine)


def _outcome(findings: list[Finding], engine: str) -> Outcome:
    out = Outcome()
    for found in findings:
        verdict = getattr(found, engine)
        out.figures[found.rule] = {"verdict": verdict} | found.figures
        if verdict in (WARN, FAIL):
            out.note(f"{found.rule}: {found.detail}", verdict)
    passed = sum(getattr(f, engine) == OK for f in findings)
    out.note(f"{passed} of {len(findings)} rules hold")
    return out


def _export(run: Run) -> Path:
    folder = run.out / "export"
    if not (folder / "export.json").is_file():
        raise Skip("needs the step 'export'")
    return folder


def words_of_recordings(run: Run) -> Outcome:
    """What the recogniser gets wrong on human speech: the floor of the figures below."""
    run.clips()
    return _words(run, "human", "human", source=str(run.recordings))


def words_of_toolkit(run: Run) -> Outcome:
    """Fifty sentences by higgs_lab's own generation."""
    return _words(run, "toolkit", run.model)


def words_of_vllm(run: Run) -> Outcome:
    """The same sentences by vLLM-Omni."""
    if run.vllm_url:
        return _words(run, "vllm", run.vllm_url)
    try:
        plan = make_plan(
            _export(run), run.profile, run.device, port=free_port(), log=run.out / "server.log"
        )
    except FileNotFoundError as error:
        raise Skip(str(error)) from error
    with start(plan) as server:
        server.wait_ready(progress=False)
        return _words(run, "vllm", plan.url)


def words_of_sglang(run: Run) -> Outcome:
    """The same sentences by SGLang-Omni."""
    if run.sglang_url is None:
        raise Skip("needs --sglang URL")
    return _words(run, "sglang", run.sglang_url, ["--dialect", "sglang"])


def _words(run: Run, name: str, model: str, more=(), source: str | None = None) -> Outcome:
    folder = run.out / "eval" / name
    options = ["--language", "en", "--asr", run.asr, "--speaker", run.speaker, *more]
    if run.device != "auto":
        options += ["--device", run.device]
    env = os.environ | ({"VLLM_API_KEY": run.api_key} if run.api_key else {})
    summary = evaluate(model, source or texts_manifest(run), folder, options, env)
    kept = ("clips", "failed", "failures", "error", "cer", "sim_ref", "rtf_median")
    out = Outcome(figures={k: summary.get(k) for k in kept})
    out.note(
        f"{summary['clips']} clips, {summary['failed']} failed, errors "
        f"{estimate(summary['error'], 100)} %, similarity {estimate(summary['sim_ref'], 1)}",
        WARN if summary["failed"] > 0.1 * summary["clips"] else OK,
    )
    return out


def words_compared(run: Run) -> Outcome:
    """Engines on one checkpoint may differ by chance only: their intervals must touch."""
    found = {}
    for name in ("toolkit", "vllm", "sglang"):
        file = run.out / "eval" / name / "summary.json"
        if file.is_file():
            found[name] = json.loads(file.read_text(encoding="utf-8"))["overall"]
    if len(found) < 2:
        raise Skip("needs two of toolkit, vLLM-Omni and SGLang-Omni")
    out = Outcome()
    for figure in ("error", "sim_ref"):
        spans = {n: s[figure] for n, s in found.items() if s[figure]}
        spans = {n: span for n, span in spans.items() if span["low"] is not None}
        out.figures[figure] = spans
        lows, highs = ([span[end] for span in spans.values()] for end in ("low", "high"))
        if spans and max(lows) > min(highs):
            out.note(f"{figure}: the intervals of {' and '.join(spans)} do not touch", FAIL)
    out.note(f"compared: {', '.join(found)}")
    return out


def texts_manifest(run: Run) -> Path:
    """The sentences as a test set; with recordings, each is to be spoken in the reference voice."""
    file = run.out / "texts.jsonl"
    if not file.is_file():
        voice = {}
        with contextlib.suppress(Skip):
            clip = run.clips()[0]
            voice = {"ref_audio": clip.audio, "ref_text": clip.text}
        rows = [
            Utterance(audio=None, text=line, id=f"text-{i:02d}", language="en", **voice)
            for i, line in enumerate(texts(run))
        ]
        write_manifest(file, rows)
    return file


def _dtype(run: Run) -> torch.dtype | None:
    """bf16 is slow on a CPU."""
    return torch.float32 if run.torch_device == "cpu" else None

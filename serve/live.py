"""`python -m serve.check EXPORT --live`: does a running server speak as the toolkit does?

Sends a panel of requests and holds the answers against `generate` and `Codec` on the same export:
greedy codes step by step, sound, reference codes, endings, streams, formats, seeds, limits. Codes
are seen on servers that write them down (the CPU platform of serve/cpu does); elsewhere the sound
alone is compared.

Our side is computed before the server starts and after it has stopped, so that one GPU holds both.
"""

from __future__ import annotations

import base64
import io
import json
import secrets
import tempfile
import urllib.error
import urllib.request
import wave
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import torch
import yaml

from higgs_lab.audio import read_audio
from higgs_lab.checkpoint import load_talker
from higgs_lab.codec import Codec
from higgs_lab.generate import Sampling, generate
from higgs_lab.prompt import render_prompt
from higgs_lab.vocab import Vocab
from serve.check import FAIL, OK, WARN, Finding
from serve.client import FORMATS, REFERENCE_SEC, ServerError, is_healthy, pcm_to_wav, speak, stream
from serve.compare import GOOD_SNR_DB, ROUNDING, Answer, Dumps, Judge, Ours, finding, match_sound
from serve.launch import STATE, free_port, make_plan, start

ROWS = 120  # of a greedy request, 4.8 s: an untrained checkpoint never stops by itself
SHORT = 40
RATE_HZ = 24000
PLAIN = "One, two, three: 42!"
# Greedy requests: name, text, whether it clones, what the reference says.
LINES = (
    ("short", "Hello there.", False, None),
    ("plain", PLAIN, False, None),
    ("tag and scripts", "<|emotion:elation|>Great, 你好.", False, None),
    ("clone", PLAIN, True, None),
    ("clone with transcript", PLAIN, True, "What the reference says."),
)


def run_panel(
    export: str | Path,
    url: str | None = None,
    device: str = "auto",
    *,
    engine: str = "vllm",
    profile: str | None = None,
    api_key: str | None = None,
    ref_audio: str | Path | None = None,
    ref_text: str | None = None,
    rows: int = ROWS,
    dumps: str | Path | None = None,
    dtype: torch.dtype | None = None,
    vllm: str | None = None,
    timeout_sec: float = 600.0,
) -> list[Finding]:
    """All findings about a server on `export`, in the order of the panel; FAIL where it is wrong.

    url: a running server (with `engine` and `api_key`); without it one is started as serve.launch
        would, on `device` with `profile`, and stopped at the end.
    ref_audio, ref_text: voice to clone, 1 to 30 s; default a synthetic buzz.
    rows: length of a greedy request, 25 a second.
    dumps: where a server at `url` writes its rows (its HIGGS_LAB_DUMP_DIR).
    dtype: of the server; default its profile's, else float32 on a CPU and the stored one on a GPU.

    Raises FileNotFoundError when the export, profile or vLLM is not there; ValueError for a bad
    reference. What the server does wrong is a finding.
    """
    if url is None and engine != "vllm":
        raise ValueError("only vLLM-Omni can be started here: give the --url of a running server")
    with tempfile.TemporaryDirectory() as folder:
        plan = None
        if url is None:
            # a key even on this machine, so that its refusal of others is seen
            api_key, dumps = api_key or secrets.token_urlsafe(12), Path(folder) / "dumps"
            plan = make_plan(
                export, profile, device, port=free_port(), api_key=api_key, vllm=vllm,
                log=STATE / "check.log",
            )  # fmt: skip
            url, dtype = plan.url, dtype or deploy_dtype(plan.deploy)
        elif not is_healthy(url):
            return [finding(engine, "server", FAIL, f"nobody answers {url}/health")]
        panel = Panel.of(export, url, device, engine, api_key, ref_audio, ref_text, rows, dtype)
        panel.dumps = None if dumps is None else Dumps(dumps)
        if plan is None:
            found = panel.ask()
            return [*panel.judge.findings(panel.answers), *found]
        with start(plan, {"HIGGS_LAB_DUMP_DIR": str(dumps)}) as server:
            try:
                seconds = server.wait_ready(timeout_sec)
            except (RuntimeError, TimeoutError) as error:
                return [finding(engine, "server", FAIL, str(error))]
            found = panel.ask()
        up = finding(engine, "server", OK, f"up after {seconds:.0f} s with {plan.deploy.name}")
        return [up, *panel.judge.findings(panel.answers), *found]


@dataclass
class Panel:
    """The requests to one server, and what we expect of each."""

    url: str
    api_key: str | None
    reference: bytes  # a wav
    rows: int
    ours: list[Ours]
    judge: Judge
    dumps: Dumps | None = None
    answers: list[Answer] = field(default_factory=list)

    @classmethod
    def of(cls, export, url, device, engine, api_key, ref_audio, ref_text, rows, dtype) -> Panel:
        """Our side of the panel: the talker speaks all lines and is gone again."""
        device = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
        if dtype is None and device == "cpu":
            dtype = torch.float32
        load = partial(load_talker, export, device, dtype)
        codec, vocab, talker = (
            Codec.from_pretrained(export, device),
            Vocab.from_pretrained(export),
            load(),
        )
        reference = reference_wav(ref_audio)
        known = codec.encode(samples_of(reference).astype(np.float32) / 32768)
        # as many rows as the server emits at most
        max_frames = rows - vocab.num_codebooks + (engine == "sglang")
        greedy, ours = Sampling(temperature=0, mode=engine, max_frames=max_frames), []
        for name, text, clone, transcript in LINES:
            codes, said = known if clone else None, transcript and (ref_text or transcript)
            prompt = render_prompt(vocab, text, codes, said)
            generation = generate(talker, [prompt], greedy)[0]
            ours.append(Ours(name, text, prompt, codes, said, generation))
        judge = Judge(engine, codec, talker.codebooks.weight.dtype, load)
        return cls(url, api_key, reference, rows, ours, judge)

    @property
    def engine(self) -> str:
        return self.judge.engine

    def finding(self, rule: str, verdict: str, detail: str = "", **figures) -> Finding:
        return finding(self.engine, rule, verdict, detail, **figures)

    def say(self, text: str, **options) -> bytes:
        """A request as it is, once."""
        options = {"max_new_tokens": SHORT, "split": False, "retries": 0} | options
        return speak(self.url, text, dialect=self.engine, api_key=self.api_key, **options)

    def plain(self) -> np.ndarray:
        """Samples of the plain greedy line."""
        return next(a.samples for a in self.answers if a.ours.name == "plain")

    def ask(self) -> list[Finding]:
        """Send everything; findings of what needs no comparison with our own numbers."""
        rules: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
            ("greedy requests", self._greedy),
            ("stream", self._stream),
            ("formats", self._formats),
            ("seeds", self._seeds),
            ("max_new_tokens", self._length),
            ("refusals", self._refusals),
            ("api key", self._key),
        ]
        found = []
        for rule, ask in rules:
            try:
                found += list(ask())
            except ServerError as error:
                found.append(self.finding(rule, FAIL, f"the server failed: {error}"))
        alive = is_healthy(self.url)
        gone = "" if alive else "it no longer answers /health"
        return [*found, self.finding("still there", OK if alive else FAIL, gone)]

    def _greedy(self) -> Iterator[Finding]:
        for ours in self.ours:
            if self.dumps:
                self.dumps.new()  # of other requests
            voice = {}
            if ours.ref_codes is not None:
                voice = {"ref_audio": self.reference, "ref_text": ours.ref_text}
            data = self.say(ours.text, temperature=0.0, max_new_tokens=self.rows, **voice)
            seen = self.dumps.new() if self.dumps else []
            header, rows = seen[-1] if seen else (None, None)
            self.answers.append(Answer(ours, samples_of(data), header, rows))
        yield from self._clone_differs()

    def _clone_differs(self) -> Iterator[Finding]:
        """An engine drops a reference that does not fit, and speaks on in any voice (trap 39)."""
        clones = [a for a in self.answers if a.ours.ref_codes is not None]
        same = [a.ours.name for a in clones if np.array_equal(a.samples, self.plain())]
        problem = f"{' and '.join(same)}: the same sound as without a reference" if same else ""
        yield self.finding("clone differs from plain", FAIL if same else OK, problem)

    def _stream(self) -> Iterator[Finding]:
        options = {"temperature": 0.0, "max_new_tokens": self.rows, "api_key": self.api_key}
        pieces = list(stream(self.url, PLAIN, dialect=self.engine, **options))
        got, whole, rule = (
            np.frombuffer(b"".join(pieces), "<i2"),
            self.plain(),
            "stream equals whole",
        )
        detail = f"{len(got)} samples in {len(pieces)} pieces"
        if np.array_equal(got, whole):
            yield self.finding(rule, OK, detail)
        elif len(got) != len(whole):
            yield self.finding(rule, FAIL, f"{detail}, {len(whole)} as a whole")
        else:
            snr_db = match_sound(got, whole / 32767, self.judge.codec.samples_per_frame).snr_db
            detail += f", {snr_db:.0f} dB above the difference"
            yield self.finding(rule, WARN if snr_db >= GOOD_SNR_DB else FAIL, detail)

    def _formats(self) -> Iterator[Finding]:
        problems, wav = [], samples_of(self.say(PLAIN, temperature=0.0))
        for name in FORMATS[self.engine]:
            data = self.say(PLAIN, temperature=0.0, response_format=name)
            if name == "aac":  # libsndfile reads none: the sync word of ADTS, or a box of MP4
                if data[:1] != b"\xff" and data[4:8] != b"ftyp":
                    problems.append("aac is none")
                continue
            try:
                if name == "pcm":
                    got, rate = np.frombuffer(data, "<i2"), RATE_HZ
                else:
                    got, rate = soundfile.read(io.BytesIO(data), dtype="int16")
            except RuntimeError as error:  # libsndfile's own errors are among them
                problems.append(f"{name} cannot be read: {error}")
                continue
            lossless = name in ("wav", "pcm", "flac")  # each rounded by its own writer
            if lossless and (
                len(got) != len(wav) or np.abs(got.astype(int) - wav).max() > ROUNDING
            ):
                problems.append(f"{name} holds other samples than wav")
            elif abs(len(got) / rate - len(wav) / RATE_HZ) > 0.1:
                problems.append(
                    f"{name} lasts {len(got) / rate:.2f} s, wav {len(wav) / RATE_HZ:.2f}"
                )
        detail = "; ".join(problems) or ", ".join(FORMATS[self.engine])
        yield self.finding("formats", FAIL if problems else OK, detail)

    def _seeds(self) -> Iterator[Finding]:
        def take(**options) -> bytes:
            return self.say(PLAIN, response_format="pcm", **options)

        one = take(seed=1)
        same = take(seed=1) == one
        yield self.finding("a seed repeats", OK if same else FAIL)
        differ = take(seed=2) != one
        yield self.finding("seeds differ", OK if differ else FAIL)
        fixed = take() == take()
        problem = "takes without a seed are identical: the deploy file fixes one" if fixed else ""
        yield self.finding("no seed draws anew", WARN if fixed else OK, problem)

    def _length(self) -> Iterator[Finding]:
        rows, hop = 50, self.judge.codec.samples_per_frame
        frames = len(samples_of(self.say(PLAIN, seed=3, max_new_tokens=rows))) // hop
        detail = f"{frames} frames of {rows} rows"
        yield self.finding("max_new_tokens", OK if frames <= rows else FAIL, detail)

    def _refusals(self) -> Iterator[Finding]:
        """Bad requests are refused, and the server lives on."""
        low, high = REFERENCE_SEC[self.engine]
        bad = {
            "empty text": {"input": ""},
            "text beyond the context": {"input": "word " * 12000},
            "reference that is no audio": cloning(b"no audio"),
            f"reference of {high + 1:.0f} s": cloning(silence(high + 1)),
        }
        if self.engine == "vllm":  # SGLang-Omni pads short clips and knows no voices
            bad |= {
                f"reference of {low / 2:.1f} s": cloning(silence(low / 2)),
                "unknown voice": {"input": "Hi.", "voice": "nobody"},
            }
        for name, body in bad.items():
            status, words = self._post(body, self.api_key)
            # vLLM-Omni says 500 to some of them; what counts is that it spoke nothing and lives on
            refused = status >= 400 and is_healthy(self.url)
            yield self.finding(
                f"refuses: {name}", OK if refused else FAIL, f"{status}: {words}"[:120]
            )

    def _key(self) -> Iterator[Finding]:
        if not self.api_key:
            return
        body = {"input": "Hi.", "max_new_tokens": SHORT}
        answers = {name: self._post(body, key)[0] for name, key in (("no", None), ("a wrong", "x"))}
        open_to = [name for name, status in answers.items() if status != 401]
        problem = f"{' and '.join(open_to)} key is let in" if open_to else ""
        yield self.finding("api key", FAIL if open_to else OK, problem)

    def _post(self, body: dict, api_key: str | None) -> tuple[int, str]:
        """Status and message of a request that the client itself would not send."""
        request = urllib.request.Request(
            self.url.rstrip("/") + "/v1/audio/speech", json.dumps(body).encode()
        )
        request.add_header("Content-Type", "application/json")
        if api_key:
            request.add_header("Authorization", f"Bearer {api_key}")
        try:
            with urllib.request.urlopen(request, timeout=300) as response:
                return response.status, f"{len(response.read())} bytes of speech"
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            try:
                answer = json.loads(text)
                return error.code, (answer.get("error") or {}).get("message") or text
            except (ValueError, AttributeError):
                return error.code, text
        except OSError as error:
            raise ServerError(f"no answer: {error}") from error


def deploy_dtype(file: Path) -> torch.dtype | None:
    """dtype that a deploy file or one that it builds on names; None when it leaves it open."""
    while True:
        settings = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        if "dtype" in settings:
            return getattr(torch, settings["dtype"], None)
        if not settings.get("base_config"):
            return None
        file = file.parent / settings["base_config"]


def reference_wav(ref_audio: str | Path | None) -> bytes:
    """A reference as 24 kHz mono wav, the rate of the codec: both sides then hear the same."""
    if ref_audio is not None:
        samples = read_audio(ref_audio, RATE_HZ, max_sec=30)
    else:
        time = np.arange(RATE_HZ * 3 // 2) / RATE_HZ
        buzz = sum(np.sin(2 * np.pi * 140 * k * time) / k for k in range(1, 9))
        samples = 0.1 * buzz * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * time))
    pcm = np.clip(np.round(samples * 32767), -32768, 32767).astype("<i2")
    return pcm_to_wav(pcm.tobytes(), RATE_HZ)


def silence(seconds: float) -> bytes:
    return pcm_to_wav(bytes(2 * int(seconds * RATE_HZ)), RATE_HZ)


def cloning(reference: bytes) -> dict:
    url = "data:audio/wav;base64," + base64.b64encode(reference).decode()
    return {"input": "Hi.", "ref_audio": url, "max_new_tokens": SHORT}


def samples_of(data: bytes) -> np.ndarray:
    """int16 samples of a mono wav at the codec's rate; ServerError for anything else."""
    try:
        with wave.open(io.BytesIO(data)) as file:
            kind = (file.getframerate(), file.getnchannels(), file.getsampwidth())
            if kind != (RATE_HZ, 1, 2):
                raise ServerError(f"a wav of {kind[0]} Hz, {kind[1]} channels, {8 * kind[2]} bit")
            return np.frombuffer(file.readframes(file.getnframes()), "<i2")
    except (wave.Error, EOFError) as error:
        raise ServerError(f"no wav: {data[:80]!r}") from error

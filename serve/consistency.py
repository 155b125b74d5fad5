"""Does company change what a server says? One request at a time against many, in serve.bench.

Greedy codes of a request must not depend on its neighbours in the batch; in float32 they are equal,
in bf16 sums of another order round differently, so there the share of equal requests is a figure,
not a verdict. Stock sampling is judged by ear: word errors must agree within their intervals.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from higgs_lab.manifest import Utterance, write_manifest
from serve.client import speak
from serve.load import Target
from serve.words import estimate, evaluate

ROWS = 150  # of a greedy request, 6 s


@dataclass(frozen=True)
class Consistency:
    """What to compare: each of `texts` alone and `concurrency` at a time."""

    texts: Sequence[str]
    out: Path
    concurrency: int
    asr: str | None = None
    language: str = "en"

    def run(self, target: Target, dumps: str | Path | None, float32: bool) -> dict:
        """{"server", "ok", "lines", figures}; dumps: where the server writes its rows, if so."""
        found = {"server": target.name, "ok": True, "lines": []}
        for part in (self._greedy(target, dumps, float32), self._words(target)):
            found["ok"] &= part.pop("ok")
            found["lines"] += [f"{target.name}: {line}" for line in part.pop("lines")]
            found |= part
        return found

    def _greedy(self, target: Target, dumps: str | Path | None, float32: bool) -> dict:
        count = 2 * self.concurrency
        texts = [f"{i}. {self.texts[i % len(self.texts)]}" for i in range(count)]
        options = {"max_new_tokens": ROWS} | target.options | {"temperature": 0.0}

        def ask(text: str) -> bytes:
            return speak(
                target.url, text, split=False, response_format="pcm", dialect=target.dialect,
                api_key=target.api_key, **options,
            )  # fmt: skip

        seen: list[tuple[list[bytes], dict]] = []
        rows = None
        if dumps is not None:
            from serve.compare import Dumps

            rows = Dumps(dumps)
            rows.new()  # of earlier requests
        for callers in (1, self.concurrency):
            print(f"{target.name}: {count} greedy texts, {callers} at a time", file=sys.stderr)
            with ThreadPoolExecutor(callers) as pool:
                sounds = list(pool.map(ask, texts))
            new = rows.new() if rows else []
            seen.append((sounds, {tuple(h["prompt_token_ids"]): r.tolist() for h, r in new}))
        (alone, rows_alone), (together, rows_together) = seen
        figures = {"requests": count, "same_sound": sum(map(bytes.__eq__, alone, together))}
        shown = len(rows_alone) == len(rows_together) == count
        equal = figures["same_sound"]
        if shown:
            equal = figures["same_codes"] = sum(
                rows_alone[prompt] == rows_together.get(prompt) for prompt in rows_alone
            )
        what = "codes" if shown else "sound (it does not write its codes down)"
        line = f"{equal} of {count} greedy requests have the same {what} alone and "
        lines = [f"{line}{self.concurrency} at a time"]
        if equal < count and not float32:
            lines[0] += "; not in float32, where rounding does that (--float32 makes it a failure)"
        return {"ok": equal == count or not float32, "lines": lines, "greedy": figures}

    def _words(self, target: Target) -> dict:
        if self.asr is None:
            return {"ok": True, "lines": []}
        folder = self.out / "words" / target.name.replace("/", "_")
        voice = {k: v for k in ("ref_audio", "ref_text") if (v := target.options.get(k))}
        rows = [
            Utterance(None, text, f"text-{i:03d}", language=self.language)
            for i, text in enumerate(self.texts)
        ]
        if voice:
            raise ValueError("--asr judges the server's own voice: leave --ref-audio away")
        write_manifest(folder / "texts.jsonl", rows)
        more = ["--dialect", target.dialect, "--speaker", "none", "--asr", self.asr]
        sampling = [f"{k}={v}" for k, v in target.options.items()]
        more += ["--sampling", *sampling] if sampling else []
        spans = {}
        for callers in (1, self.concurrency):
            print(f"{target.name}: word errors, {callers} at a time", file=sys.stderr)
            env = os.environ | ({"VLLM_API_KEY": target.api_key} if target.api_key else {})
            spans[callers] = evaluate(
                target.url, folder / "texts.jsonl", folder / f"at-{callers}",
                [*more, "--batch", str(callers)], env,
            )["error"]  # fmt: skip
        one, many = spans[1], spans[self.concurrency]
        apart = one["low"] is not None and (one["low"] > many["high"] or many["low"] > one["high"])
        line = f"word errors {estimate(one, 100)} % alone, {estimate(many, 100)} % "
        line += f"{self.concurrency} at a time: the intervals {'part' if apart else 'overlap'}"
        return {"ok": not apart, "lines": [line], "words": {str(k): v for k, v in spans.items()}}

"""What the steps of serve.validate share: the settings of a run and the shape of a result."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from higgs_lab.checkpoint import resolve_checkpoint
from higgs_lab.manifest import Utterance
from serve.check import FAIL, OK, WARN

SKIP = "skip"


class Skip(Exception):
    """A step cannot be done here; the message says why, or what to give."""


@dataclass
class Outcome:
    """What a step found: OK, WARN (unlike what was assumed, nothing breaks) or FAIL."""

    verdict: str = OK
    lines: list[str] = field(default_factory=list)  # sentences of the report
    figures: dict = field(default_factory=dict)

    def expect(self, name: str, got, wanted, verdict: str = FAIL) -> None:
        """Note a figure, and whether it is what was assumed."""
        self.figures[name] = got
        if got != wanted:
            self.note(f"{name}: {got}, assumed {wanted}", verdict)

    def note(self, line: str, verdict: str = OK) -> None:
        self.lines.append(line)
        order = (OK, WARN, FAIL)
        self.verdict = order[max(order.index(self.verdict), order.index(verdict))]


@dataclass
class Run:
    """Settings of a validation, and what its steps share."""

    model: str
    out: Path
    device: str = "auto"
    recordings: str | None = None
    vllm_url: str | None = None
    sglang_url: str | None = None
    api_key: str | None = None
    profile: str | None = None
    other_codec: str = "k2-fsa/OmniVoice"
    asr: str = "large-v3"
    speaker: str = "speechbrain/spkrec-ecapa-voxceleb"
    texts: int = 50
    loaded: dict = field(default_factory=dict)  # of this process, not of the settings

    @property
    def path(self) -> Path:
        """The checkpoint's folder; fetched when it is a hub name."""
        if "checkpoint" not in self.loaded:
            self.loaded["checkpoint"] = resolve_checkpoint(self.model)
        return self.loaded["checkpoint"].path

    @property
    def torch_device(self) -> str:
        import torch

        if self.device != "auto":
            return self.device
        return "cuda" if torch.cuda.is_available() else "cpu"

    def clips(self) -> list[Utterance]:
        """Recordings of 1 to 30 s with a transcript; the first is the reference."""
        if self.recordings is None:
            raise Skip("needs --recordings")
        if "clips" not in self.loaded:
            from higgs_lab.audio import audio_info
            from higgs_lab.corpora import open_data

            rows = [row for row in open_data(self.recordings) if row.audio is not None]
            kept = [row for row in rows if 1 <= audio_info(row.audio).seconds <= 30]
            if not kept:
                raise Skip(f"no clip of 1 to 30 s among the {len(rows)} of {self.recordings}")
            self.loaded["clips"] = kept
        return self.loaded["clips"]

    def settings(self) -> dict:
        kept = {k: v for k, v in vars(self).items() if k not in ("out", "loaded", "api_key")}
        return kept | {"revision": _revision(self.path)}


def _revision(path: Path) -> str:
    """The commit of a hub snapshot; for other folders a hash of the index and the configuration."""
    if path.parent.name == "snapshots":
        return path.name
    digest = hashlib.sha256()
    for name in ("config.json", "model.safetensors.index.json"):
        if (path / name).is_file():
            digest.update((path / name).read_bytes())
    return f"folder-{digest.hexdigest()[:12]}"

"""Helpers of the server tests: starting one, a talker that stops."""

from __future__ import annotations

from pathlib import Path

import torch

from higgs_lab.generate import Sampling, generate
from higgs_lab.prompt import render_prompt
from higgs_lab.vocab import Vocab
from serve.launch import Server, free_port, make_plan, start

ROOT = Path(__file__).parents[2]
START_SEC = 300
API_KEY = "key-of-the-tests"
ENDING_TEXT, ENDING_ROW = "Hello there.", 25


@torch.inference_mode()
def end_direction(talker, vocab: Vocab) -> torch.Tensor:
    """Codebook 0's EOC row that wins at ENDING_ROW of ENDING_TEXT and hardly answers elsewhere:
    the linear discriminant of that hidden state against those of other texts and steps."""

    def hidden_of(text: str, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        prompt = render_prompt(vocab, text)
        rows = generate(talker, [prompt], Sampling(temperature=0, max_frames=steps))[0].rows
        rows = rows[: steps - 1]
        ids = torch.cat([prompt.ids, torch.zeros(len(rows), dtype=torch.long)])
        is_audio = torch.cat([prompt.is_audio, torch.ones(len(rows), dtype=torch.bool)])
        out = talker(ids[None], is_audio[None], torch.cat([prompt.rows, rows])[None])
        return out.hidden[0, len(prompt) - 1 :], out.logits[0, -1, 0]

    states, logits = hidden_of(ENDING_TEXT, ENDING_ROW + 1)
    now = states[-1]
    others = [hidden_of(f"Another text, number {i}.", 40)[0] for i in range(24)]
    rest = torch.cat([states[:-1], *others])
    spread = rest.T @ rest / len(rest)
    direction = torch.linalg.solve(spread + 1e-3 * spread.trace() * torch.eye(len(now)), now)
    return direction * (logits.max() + 3) / (direction @ now)


def launch(export_dir: Path, folder: Path, name: str, profile: str, **options) -> Server:
    log = folder / f"{name}.log"
    plan = make_plan(export_dir, profile, "cpu", port=free_port(), log=log, state=folder, **options)
    # Compiled bytecode and kernels may be shared between runs; voices and dumps may not.
    return start(plan, {"HIGGS_LAB_DUMP_DIR": str(folder / name / "dumps")})

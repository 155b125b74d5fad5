"""The only sequence layout: what the servers build as a prompt, and what training appends to it.

    zero-shot           <|tts|> <|text|> text <|audio|>
    clone               <|tts|> <|ref_audio|> ref rows <|text|> text <|audio|>
    clone + transcript  <|tts|> <|ref_text|> ref text <|ref_audio|> ref rows <|text|> text <|audio|>

Reference rows are delayed (T_ref+7 of them) and enter as fused embeddings, one position each. The
target's rows follow as inputs, all but the last; labels are the rows themselves, shifted by one:
the position of <|audio|> predicts row 0. (vllm-omni higgs_audio_v3_tokenizer.py::build_prompt,
sglang-omni higgs_tts/text_tokenizer.py.) A position mask says which positions are audio rows;
the engines' -100 placeholder appears nowhere, since it would also read as an ignore label.

`python -m higgs_lab.prompt --manifest data.jsonl --row 3 --model nano` prints one sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from higgs_lab.delay import delay
from higgs_lab.vocab import BOC, EOC, Vocab


@dataclass
class Prompt:
    """A sequence ready for the talker; P positions."""

    ids: Tensor  # [P] text ids; at audio positions a filler that the talker never reads
    is_audio: Tensor  # [P] bool, True where a fused audio row stands
    rows: Tensor  # [P, K] the audio rows; 0 elsewhere

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class Example(Prompt):
    """A prompt with its target; L = P + S - 1 positions."""

    labels: Tensor  # [L, K] the row that this position predicts; 0 where nothing is predicted
    supervised: Tensor  # [L, K] bool, True where the label bears loss
    prompt_length: int  # P


def render_prompt(
    vocab: Vocab,
    text: str,
    ref_codes: Tensor | None = None,
    ref_text: str | None = None,
) -> Prompt:
    """Prompt of one of the three modes; ref_codes are raw codes [T_ref, K], not yet delayed.

    Raises ValueError for empty text, smuggled control tokens, a ref_text without ref_codes (the
    engines drop it silently) or an empty reference.
    """
    K = vocab.num_codebooks
    pieces: list[tuple[list[int], Tensor | None]] = [([vocab.tts_id], None)]
    if ref_codes is not None:
        if ref_codes.ndim != 2 or ref_codes.shape[1] != K or len(ref_codes) == 0:
            raise ValueError(f"ref_codes must be [T, {K}] with T > 0, got {tuple(ref_codes.shape)}")
        if ref_text is not None:
            pieces.append(([vocab.ref_text_id, *vocab.encode(ref_text, "ref_text")], None))
        pieces.append(([vocab.ref_audio_id], None))
        ref_rows = delay(ref_codes.long())
        pieces.append(([vocab.tts_id] * len(ref_rows), ref_rows))
    elif ref_text is not None:
        raise ValueError("ref_text is given without reference audio: give both or drop ref_text")
    pieces.append(([vocab.text_id, *vocab.encode(text), vocab.audio_id], None))
    return Prompt(
        ids=torch.tensor([i for ids, _ in pieces for i in ids]),
        is_audio=torch.cat([torch.full((len(ids),), r is not None) for ids, r in pieces]),
        rows=torch.cat([_rows_of(ids, r, K) for ids, r in pieces]),
    )


def _rows_of(ids: list[int], rows: Tensor | None, num_codebooks: int) -> Tensor:
    """Rows of a piece, [len(ids), K]; zeros where the piece is text."""
    if rows is not None:
        return rows
    return torch.zeros((len(ids), num_codebooks), dtype=torch.long)


def render_example(
    vocab: Vocab,
    text: str,
    codes: Tensor,
    ref_codes: Tensor | None = None,
    ref_text: str | None = None,
    supervise_boc: bool = False,
) -> Example:
    """Training sequence: `render_prompt` followed by the target's rows.

    codes: target [T, K], T >= K (shorter clips end before codebook 0's EOC can be told from the
    ramp-up, and SGLang-Omni ignores such an EOC). Loss falls on real codes and EOC cells; the
    BOC cells are forced by both engines and carry no decision, so they bear loss only if asked.
    """
    K = vocab.num_codebooks
    if len(codes) < K:
        raise ValueError(
            f"a target of {len(codes)} frames is too short, at least {K} are needed "
            f"({K / vocab.frame_rate_hz:.2f} s); drop such clips"
        )
    prompt = render_prompt(vocab, text, ref_codes, ref_text)
    P, rows = len(prompt), delay(codes.long())  # rows [S, K]
    S = len(rows)
    nothing = torch.zeros((P - 1, K), dtype=torch.long)
    supervised = torch.ones_like(rows, dtype=torch.bool) if supervise_boc else rows != BOC
    return Example(
        ids=torch.cat([prompt.ids, torch.full((S - 1,), vocab.audio_id)]),
        is_audio=torch.cat([prompt.is_audio, torch.ones(S - 1, dtype=torch.bool)]),
        rows=torch.cat([prompt.rows, rows[:-1]]),
        labels=torch.cat([nothing, rows]),
        supervised=torch.cat([nothing.bool(), supervised]),
        prompt_length=P,
    )


def show_rows(vocab: Vocab, example: Example, color: bool = True, max_rows: int = 40) -> str:
    """The sequence as text, a line per position: input | label; supervised cells are green."""
    green, dim, off = ("\033[32m", "\033[2m", "\033[0m") if color else ("", "", "")
    names = {BOC: "BOC", EOC: "EOC"}

    def cell(value: int, marked: bool) -> str:
        text = f"{names.get(value, value):>5}"
        return f"{green}{text}{off}" if marked else f"{dim}{text}{off}"

    lines = [
        f"{len(example.ids)} positions = {example.prompt_length} prompt + "
        f"{len(example.ids) - example.prompt_length} rows; "
        f"{int(example.supervised.sum())} supervised cells"
    ]
    L = len(example.ids)
    hidden = set(range(max_rows // 2, L - max_rows // 2)) if L > max_rows else set()
    for i in range(L):
        if i in hidden:
            if i == min(hidden):
                lines.append(f"  ... {len(hidden)} positions not shown ...")
            continue
        if example.is_audio[i]:
            entry = "".join(cell(int(v), False) for v in example.rows[i])
        else:
            entry = repr(vocab.tokenizer.decode([int(example.ids[i])]))
        line = f"{i:5d}  {entry:<42}"
        if i >= example.prompt_length - 1:
            marks = zip(example.labels[i], example.supervised[i], strict=True)
            line += " -> " + "".join(cell(int(v), bool(m)) for v, m in marks)
        lines.append(line.rstrip())
    return "\n".join(lines)


def main() -> None:
    import argparse
    import sys

    from higgs_lab.audio import read_audio
    from higgs_lab.checkpoint import resolve_checkpoint
    from higgs_lab.codec import Codec
    from higgs_lab.config import one_line_errors
    from higgs_lab.manifest import read_manifest

    parser = argparse.ArgumentParser(description="Print one training sequence of a manifest.")
    parser.add_argument("--manifest", required=True, help="JSONL manifest")
    parser.add_argument("--row", type=int, default=1, help="row of the manifest, counted from 1")
    parser.add_argument(
        "--model", default="nano", help="checkpoint: nano, a folder or org/name@rev"
    )
    parser.add_argument("--all", action="store_true", help="show every position")
    args = parser.parse_args()
    with one_line_errors("higgs_lab.prompt"):
        rows = read_manifest(args.manifest, need_audio=True)
        if not 1 <= args.row <= len(rows):
            parser.error(f"--row {args.row}: {args.manifest} has rows 1 to {len(rows)}")
        row = rows[args.row - 1]
        path = resolve_checkpoint(args.model).path
        vocab, codec = Vocab.from_pretrained(path), Codec.from_pretrained(path)

        def encode(audio) -> Tensor:
            return codec.encode(read_audio(audio, codec.sample_rate_hz))

        ref = None if row.ref_audio is None else encode(row.ref_audio)
        example = render_example(vocab, row.text, encode(row.audio), ref, row.ref_text)
    limit = len(example.ids) if args.all else 40
    print(show_rows(vocab, example, color=sys.stdout.isatty(), max_rows=limit))


if __name__ == "__main__":
    main()

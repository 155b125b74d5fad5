"""The one sequence layout: golden ids, exact supervised cells, exact label positions."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from higgs_lab.audio import write_wav
from higgs_lab.delay import delay
from higgs_lab.prompt import main, render_example, render_prompt, show_rows
from higgs_lab.vocab import BOC, EOC, Vocab
from tests.tiny import random_codes, tiny_talker, tiny_vocab, voice_like

TTS, TEXT, AUDIO, REF_AUDIO, REF_TEXT = 151667, 151672, 151670, 151679, 151680
MODES = ["plain", "clone", "clone with transcript"]


@pytest.fixture(scope="module")
def vocab(nano) -> Vocab:
    return Vocab.from_pretrained(nano)


def reference(mode: str, frames: int = 11) -> dict:
    if mode == "plain":
        return {}
    text = {"ref_text": "Ref."} if mode == "clone with transcript" else {}
    return {"ref_codes": random_codes(frames, 7), **text}


def test_trap06_golden_ids_in_three_modes(vocab):
    """The nano tokenizer has bytes as base ids, so the words can be read off."""
    ref = random_codes(2)
    plain = render_prompt(vocab, "Hi")
    assert plain.ids.tolist() == [TTS, TEXT, 72, 105, AUDIO]
    clone = render_prompt(vocab, "Hi", ref)
    assert clone.ids[~clone.is_audio].tolist() == [TTS, REF_AUDIO, TEXT, 72, 105, AUDIO]
    assert clone.is_audio.tolist() == [False] * 2 + [True] * 9 + [False] * 4
    full = render_prompt(vocab, "Hi", ref, "Yo")
    order = [TTS, REF_TEXT, 89, 111, REF_AUDIO, TEXT, 72, 105, AUDIO]
    assert full.ids[~full.is_audio].tolist() == order
    assert full.is_audio.tolist() == [False] * 5 + [True] * 9 + [False] * 4
    for prompt in (plain, clone, full):
        assert (int(prompt.ids[0]), int(prompt.ids[-1])) == (TTS, AUDIO)


def test_trap06_text_is_not_stripped(vocab):
    assert render_prompt(vocab, " Hi\n").ids.tolist() == [TTS, TEXT, 32, 72, 105, 10, AUDIO]


@pytest.mark.parametrize("frames", [1, 7, 8, 30])
def test_trap04_a_reference_takes_its_delayed_rows(vocab, frames):
    """Raw T rows are the classic bug: BOC and EOC rows are part of what the model was shown."""
    ref = random_codes(frames)
    prompt = render_prompt(vocab, "Hi", ref)
    assert int(prompt.is_audio.sum()) == frames + 7
    placed = prompt.rows[prompt.is_audio]
    assert torch.equal(placed, delay(ref))
    assert placed[0].tolist() == [int(ref[0, 0])] + [BOC] * 7
    assert placed[-1].tolist() == [EOC] * 7 + [int(ref[-1, 7])]
    assert int(prompt.rows[~prompt.is_audio].abs().sum()) == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("frames", [8, 50])
def test_trap01_labels_are_the_rows_and_inputs_all_but_the_last(vocab, mode, frames):
    """Facts §3.2: labels at P-1 .. P+S-2 are D[0..S-1], inputs at P .. are D[0..S-2]."""
    codes = random_codes(frames)
    rows, extra = delay(codes), reference(mode)
    P = len(render_prompt(vocab, "Hello.", **extra))
    example = render_example(vocab, "Hello.", codes, **extra)
    S = frames + 7
    assert (example.prompt_length, len(example)) == (P, P + S - 1)
    assert int(example.ids[P - 1]) == vocab.audio_id
    assert torch.equal(example.labels[P - 1 :], rows)
    assert torch.equal(example.rows[P:], rows[:-1])
    assert bool(example.is_audio[P:].all())
    # the last row is a label only: the one cell that no input shows is the last real code
    assert example.rows[P:].tolist().count(rows[-1].tolist()) == 0
    assert int(example.labels[: P - 1].sum()) == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("frames", [8, 9, 50])
def test_trap03_supervised_cells_are_codes_and_every_eoc(vocab, mode, frames):
    """8T codes and 28 EOC cells; the RL mask of SGLang-Omni has no EOC and never learns to stop."""
    example = render_example(vocab, "Hello.", random_codes(frames), **reference(mode))
    P, T = example.prompt_length, frames
    assert int(example.supervised.sum()) == 8 * T + 28
    expected = torch.zeros_like(example.supervised)
    for t in range(T + 7):
        for c in range(8):
            expected[P - 1 + t, c] = t >= c  # at or below the diagonal: a code or EOC
    assert torch.equal(example.supervised, expected)
    stop = P - 1 + T
    assert int(example.labels[stop, 0]) == EOC
    assert bool(example.supervised[stop, 0])
    assert int((example.labels[example.supervised] == EOC).sum()) == 28
    assert not (example.labels[example.supervised] == BOC).any()


def test_boc_cells_bear_loss_only_when_asked(vocab):
    plain = render_example(vocab, "Hi.", random_codes(20))
    asked = render_example(vocab, "Hi.", random_codes(20), supervise_boc=True)
    assert int(asked.supervised.sum()) == 8 * 20 + 28 + 28 == 8 * 27
    assert torch.equal(asked.supervised & (asked.labels != BOC), plain.supervised)
    assert not asked.supervised[: asked.prompt_length - 1].any()


@pytest.mark.parametrize("mode", MODES)
def test_trap05_minus_100_appears_nowhere(vocab, mode):
    """The engines' placeholder would also read as an ignore label; a mask says it instead."""
    example = render_example(vocab, "Hello.", random_codes(12), **reference(mode))
    for name in ("ids", "rows", "labels"):
        assert int(getattr(example, name).min()) >= 0
    assert int(example.ids.max()) < 151936
    assert int(example.rows.max()) <= EOC
    assert example.is_audio.dtype == example.supervised.dtype == torch.bool


def test_trap05_a_negative_id_does_not_pass_for_text():
    """Clamping -100 to 0 would speak the wrong thing silently; the embedding refuses it."""
    prompt = render_prompt(tiny_vocab(), "Hi.")
    prompt.ids[1] = -100
    with pytest.raises(IndexError):
        tiny_talker()(prompt.ids[None], prompt.is_audio[None], prompt.rows[None])


@settings(max_examples=40, deadline=None)
@given(
    text=st.text("abc é你🙂.,!?", min_size=1).filter(str.strip),
    frames=st.integers(8, 30),
    ref_frames=st.integers(0, 20),
    ref_text=st.none() | st.just("Said so."),
)
def test_an_example_begins_with_its_prompt(text, frames, ref_frames, ref_text):
    vocab = tiny_vocab()
    extra = {}
    if ref_frames:
        extra = {"ref_codes": random_codes(ref_frames), "ref_text": ref_text}
    prompt = render_prompt(vocab, text, **extra)
    example = render_example(vocab, text, random_codes(frames, 1), **extra)
    P = len(prompt)
    assert example.prompt_length == P
    for name in ("ids", "is_audio", "rows"):
        assert torch.equal(getattr(example, name)[:P], getattr(prompt, name)), name
    columns = ("ids", "is_audio", "rows", "labels", "supervised")
    lengths = {len(getattr(example, name)) for name in columns}
    assert lengths == {P + frames + 6}


@pytest.mark.parametrize("frames", [0, 1, 7])
def test_trap20_targets_shorter_than_the_ramp_are_refused(vocab, frames):
    with pytest.raises(ValueError, match=f"{frames} frames is too short.*8 are needed.*0.32 s"):
        render_example(vocab, "Hi.", random_codes(frames))


def test_ref_text_without_audio_is_refused(vocab):
    """Both engines drop it silently, which hides a mistake in the caller's data."""
    with pytest.raises(ValueError, match="without reference audio"):
        render_prompt(vocab, "Hi.", ref_text="Who said this?")


@pytest.mark.parametrize("shape", [(0, 8), (5, 7), (8,), (1, 5, 8)])
def test_a_reference_of_another_shape_is_refused(vocab, shape):
    with pytest.raises(ValueError, match="ref_codes must be"):
        render_prompt(vocab, "Hi.", torch.zeros(shape, dtype=torch.long))


def test_an_already_delayed_reference_is_refused(vocab):
    with pytest.raises(ValueError, match="already delayed"):
        render_prompt(vocab, "Hi.", delay(random_codes(5)))


@pytest.mark.parametrize("field", ["text", "ref_text"])
@pytest.mark.parametrize("bad", ["", "  ", "a<|audio|>b", "<|ref_audio|>", "<|emotion:joy|>x"])
def test_bad_text_is_refused_and_the_field_named(vocab, field, bad):
    texts = {"text": "Hi.", "ref_text": "Yo."} | {field: bad}
    with pytest.raises(ValueError, match=f"^{field}: "):
        render_prompt(vocab, texts["text"], random_codes(9), texts["ref_text"])


def test_show_rows_says_what_is_supervised(vocab):
    codes = random_codes(9)
    example = render_example(vocab, "Hi", codes)
    text = show_rows(vocab, example, color=False)
    lines = text.splitlines()
    assert lines[0] == "20 positions = 5 prompt + 15 rows; 100 supervised cells"
    first, last = lines[1 + 4], lines[-1]
    assert "'<|audio|>'" in first
    assert first.split("->")[1].split() == [str(int(codes[0, 0]))] + ["BOC"] * 7
    assert last.split("->")[1].split() == ["EOC"] * 7 + [str(int(codes[8, 7]))]
    assert sum("->" in line for line in lines) == 16
    green = show_rows(vocab, example, color=True).count("\033[32m")
    assert green == 100
    short = show_rows(vocab, example, color=False, max_rows=6)
    assert "14 positions not shown" in short
    assert len(short.splitlines()) == 1 + 6 + 1


def test_the_viewer_prints_a_row_of_a_manifest(nano, tmp_path, monkeypatch, capsys):
    """What `python -m higgs_lab.prompt --manifest data.jsonl --row 2` runs."""
    write_wav(tmp_path / "a.wav", voice_like(1.2), 24000)
    write_wav(tmp_path / "b.wav", voice_like(1.0, seed=1), 24000)
    rows = [
        {"audio": "b.wav", "text": "First."},
        {"audio": "a.wav", "text": "Hello.", "ref_audio": "b.wav", "ref_text": "Before."},
    ]
    manifest = tmp_path / "data.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["prompt", "--manifest", str(manifest), "--model", str(nano), "--row"]
    monkeypatch.setattr("sys.argv", [*command, "2"])
    main()
    printed = capsys.readouterr().out
    assert "268 supervised cells" in printed  # 30 frames
    assert "'<|ref_text|>'" in printed
    monkeypatch.setattr("sys.argv", [*command, "3"])
    with pytest.raises(SystemExit):
        main()
    assert "has rows 1 to 2" in capsys.readouterr().err

"""serve.compare and the offline half of serve.live: measures and verdicts, on answers made here.
tests/serve asks the real server."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from tiny import random_codes, three_prompts, tiny_talker, voice_like

from higgs_lab.codec import Codec
from higgs_lab.delay import delay
from higgs_lab.generate import Generation, Sampling, generate
from higgs_lab.vocab import BOC
from serve import compare
from serve.check import FAIL, OK, WARN, main
from serve.compare import Answer, Judge, Ours
from serve.live import deploy_dtype, run_panel

HOP = 960


@pytest.fixture(scope="module")
def codec(nano) -> Codec:
    return Codec.from_pretrained(nano)


@pytest.fixture(scope="module")
def talker():
    return tiny_talker(scale=3.0)


@pytest.fixture(scope="module")
def ours(talker) -> Ours:
    prompt = three_prompts()[0]
    made = generate(talker, [prompt], Sampling(temperature=0, max_frames=40))[0]
    return Ours("line", "Hi.", prompt, None, None, made)


def judge(codec, talker, dtype=torch.float32) -> Judge:
    return Judge("vllm", codec, dtype, lambda: talker)


def pcm(wav: np.ndarray) -> np.ndarray:
    return np.round(np.clip(wav, -1, 1) * 32767).astype(np.int16)


def served(codec, ours: Ours, rows=None, **header) -> Answer:
    """A server that is right, or emits `rows`."""
    rows = ours.generation.rows if rows is None else rows
    sound = pcm(compare.decode_whole(codec, rows[:-1]))
    head = {
        "prompt_token_ids": ours.prompt.ids.tolist(),
        "audio_input_ids": None if ours.ref_codes is None else delay(ours.ref_codes).tolist(),
        "audio_placeholder_positions": ours.prompt.is_audio.nonzero()[:, 0].tolist(),
    }
    return Answer(ours, sound, head | header, rows)


def verdicts(findings) -> dict[str, str]:
    return {f.rule.split(":")[0]: f.vllm for f in findings}


def test_a_right_answer_is_right_in_every_rule(codec, talker, ours):
    found = judge(codec, talker).findings([served(codec, ours)])
    ending = "stop reasons"
    assert verdicts(found) == {"prompt": OK, "codes": OK, "sound": OK, ending: WARN}  # never ends
    assert all(f.sglang == "-" for f in found)


def test_gaps_are_nothing_for_our_own_choice_and_infinite_for_the_forbidden(talker, ours):
    rows = ours.generation.rows
    assert float(compare.gaps(talker, ours.prompt, rows).abs().max()) == 0
    other = rows.clone()
    other[20, 3] = (other[20, 3] + 1) % 1024
    found = compare.gaps(talker, ours.prompt, other)
    assert float(found[:20].abs().max()) == 0 and float(found[20, 3]) > 0
    assert compare.parting(rows, other) == compare.Parting(
        20, 3, int(rows[20, 3]), int(other[20, 3])
    )
    other[20, 3] = BOC
    assert float(compare.gaps(talker, ours.prompt, other)[20, 3]) == float("inf")


def test_rounding_of_bf16_is_told_from_other_weights(codec, ours):
    """trap 9: the same model in bf16 parts somewhere by a small gap; another one by a large one."""
    prompt, sampling = ours.prompt, Sampling(temperature=0, max_frames=60)
    in_bf16 = tiny_talker(scale=6.0, dtype=torch.bfloat16)
    mine = Ours("line", "Hi.", prompt, None, None, generate(in_bf16, [prompt], sampling)[0])
    near, far = (
        generate(t, [prompt], sampling)[0].rows
        for t in (tiny_talker(scale=6.0), tiny_talker(seed=1, scale=6.0))
    )
    assert compare.parting(mine.generation.rows, near) is not None
    [close] = judge(codec, in_bf16, torch.bfloat16).codes(served(codec, mine, near))
    [other] = judge(codec, in_bf16, torch.bfloat16).codes(served(codec, mine, far))
    assert close.vllm == WARN and 0 < close.figures["worst"] <= 0.25 and "gap" in close.detail
    assert other.vllm == FAIL and other.figures["worst"] > 1


def test_a_missing_row_another_prompt_and_a_lost_reference_fail(codec, talker, ours):
    one = judge(codec, talker)
    assert [f.vllm for f in one.codes(served(codec, ours, ours.generation.rows[:-1]))] == [FAIL]
    wrong = served(codec, ours, prompt_token_ids=[1, *ours.prompt.ids.tolist()[1:]])
    assert [f.vllm for f in one.prompt(wrong)] == [FAIL]
    codes = random_codes(9, 1)
    cloned = Ours("clone", "A", three_prompts()[1], codes, None, ours.generation)
    right = served(codec, cloned)
    assert [f.vllm for f in one.prompt(right)] == [OK, OK]
    dropped = served(codec, cloned, audio_input_ids=None, audio_placeholder_positions=None)
    assert [f.vllm for f in one.prompt(dropped)] == [FAIL, FAIL]
    shifted = served(codec, cloned, audio_input_ids=delay(codes).roll(1, 0).tolist())
    assert [f.vllm for f in one.prompt(shifted)] == [OK, FAIL]


def test_sound_of_other_codes_or_another_length_fails(codec, talker, ours):
    one, right = judge(codec, talker), served(codec, ours)
    shorter = Answer(ours, right.samples[:-HOP], right.header, right.rows)
    louder = Answer(ours, (right.samples * 0.97).astype(np.int16), right.header, right.rows)
    other = pcm(codec.decode(random_codes(len(right.samples) // HOP, 7)))
    for samples, verdict in ((shorter.samples, FAIL), (louder.samples, WARN), (other, FAIL)):
        [found] = one.sound(Answer(ours, samples, right.header, right.rows))
        assert found.vllm == verdict, found
    noise = np.random.default_rng(0).normal(0, 0.01 * right.samples.std(), len(right.samples))
    noisy = Answer(ours, (right.samples + noise).astype(np.int16), right.header, right.rows)
    assert [f.vllm for f in judge(codec, talker, torch.bfloat16).sound(noisy)] == [OK]


def test_without_codes_a_draw_is_a_warning_and_another_start_a_failure(codec, talker, ours):
    right = served(codec, ours)
    late, early = right.samples.copy(), pcm(codec.decode(random_codes(len(right.samples) // HOP)))
    late[20 * HOP :] = early[20 * HOP :]
    found = verdicts(judge(codec, talker).findings([Answer(ours, late)]))
    assert found["sound"] == WARN and found["same checkpoint"] == OK
    assert verdicts(judge(codec, talker).findings([Answer(ours, early)]))["same checkpoint"] == FAIL


def test_another_stop_reason_fails(codec, talker, ours):
    rows = delay(random_codes(40, 2))
    by_itself = Ours("line", "Hi.", ours.prompt, None, None, Generation(rows, rows, "eoc"))
    assert compare.ended(rows) and not compare.ended(rows[:-1])
    assert judge(codec, talker).endings([served(codec, by_itself)]).vllm == OK
    cut = Answer(by_itself, np.zeros(0, np.int16), None, rows[:-1])
    found = judge(codec, talker).endings([cut])
    assert found.vllm == FAIL and "line" in found.detail


def test_chunks_are_the_whole_but_for_their_seams(codec):
    """The windows of the served codec: same length, same samples inside each chunk."""
    codes = codec.encode(voice_like(2.4))
    rows = torch.cat([delay(codes), torch.zeros(1, 8, dtype=torch.long)])  # T+8, as vLLM-Omni's
    for frames in (30, 31, len(codes)):
        part = rows[: frames + 8]
        whole, chunks = compare.decode_whole(codec, part), compare.decode_in_chunks(codec, part)
        assert len(whole) == len(chunks) == frames * HOP
    difference = np.abs(whole - chunks).reshape(-1, HOP).max(axis=1)
    assert np.median(difference) < 1e-4 < difference.max()


def test_dtype_of_a_deploy_file_is_looked_up_in_what_it_builds_on(tmp_path):
    (tmp_path / "base.yaml").write_text("dtype: float32\nstages: []\n")
    (tmp_path / "mine.yaml").write_text("base_config: base.yaml\n")
    (tmp_path / "open.yaml").write_text("stages: []\n")
    (tmp_path / "auto.yaml").write_text("dtype: auto\n")
    assert deploy_dtype(tmp_path / "mine.yaml") == torch.float32
    assert deploy_dtype(tmp_path / "open.yaml") is deploy_dtype(tmp_path / "auto.yaml") is None


def test_a_server_that_is_not_there_is_a_finding(nano):
    [found] = run_panel(nano, "http://127.0.0.1:9")
    assert found.vllm == FAIL and "nobody answers" in found.detail
    with pytest.raises(ValueError, match="--url"):
        run_panel(nano, engine="sglang")


def test_command_line_writes_json_and_refuses_what_cannot_be(nano, tmp_path, monkeypatch, capsys):
    def run(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["serve.check", str(nano), *words])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code)

    report = tmp_path / "report.json"
    assert run("--live", "--url", "http://127.0.0.1:9", "--json", str(report)) == 1
    assert "nobody answers" in capsys.readouterr().out
    last = json.loads(report.read_text())["findings"][-1]
    assert last["rule"] == "server" and last["vllm"] == FAIL
    assert run("--live", "--engine", "both") == 2
    assert run("--url", "http://127.0.0.1:9") == 2

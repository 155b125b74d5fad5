"""Several adapters on one server: each speaks as its merged checkpoint would, row by row."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from served import START_SEC

from eval.asr import load_recognizer
from eval.speaker import cosine, load_encoder
from higgs_lab.adapter import attach_lora, base_fingerprint, load_adapter, merge_lora, save_adapter
from higgs_lab.audio import read_audio
from higgs_lab.checkpoint import load_talker
from higgs_lab.generate import Sampling, generate
from higgs_lab.manifest import read_manifest
from higgs_lab.prompt import render_prompt
from recipes.nano.measure import JUDGE_HZ, error_rate, for_judges
from serve.adapters import with_adapters
from serve.client import ServerError, _open, _request, pcm_to_wav, speak, stream
from serve.compare import Dumps
from serve.launch import free_port, make_plan, start

ROWS = 40
# name -> preset, rank, rsLoRA; one more than a batch may mix, so that requests wait for a place.
VOICES = {
    "ann": ("attention_mlp", 16, False),
    "bob": ("attention", 4, False),
    "cid": ("attention_mlp", 8, True),
}


@pytest.fixture(scope="module")
def adapters(exported, tmp_path_factory) -> dict[str, Path]:
    """Adapters of a size that changes every row, as if trained hard."""
    folder, found = tmp_path_factory.mktemp("adapters"), {}
    for seed, (name, (preset, rank, rslora)) in enumerate(VOICES.items()):
        base = load_talker(exported, dtype=torch.float32)
        model = attach_lora(base, preset, rank=rank, alpha=2 * rank, use_rslora=rslora)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, weight in model.named_parameters():
                if "lora_B" in key:
                    weight.copy_(0.05 * torch.randn(weight.shape, generator=generator))
        info = {"base": "nano", "revision": None, "fingerprint": base_fingerprint(exported)}
        save_adapter(model, folder / name, info)
        found[name] = folder / name
    return found


@pytest.fixture(scope="module")
def talkers(exported, adapters, talker) -> dict:
    """None: the base; a name: the base with that adapter merged."""
    merged = {
        name: merge_lora(load_adapter(load_talker(exported, dtype=torch.float32), path))
        for name, path in adapters.items()
    }
    return {None: talker} | merged


@pytest.fixture(scope="module")
def server(serve_env, exported, adapters, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    plan = make_plan(
        exported, "cpu_smoke", "cpu", port=free_port(), log=folder / "lora.log", state=folder
    )
    plan = with_adapters(plan, exported, adapters, max_active=2)
    dumps = folder / "dumps"
    env = {"HIGGS_LAB_DUMP_DIR": str(dumps), "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    with start(plan, env) as running:
        running.wait_ready(START_SEC, progress=False)
        running.dumps = Dumps(dumps)
        yield running


def greedy(talker, prompt) -> torch.Tensor:
    """Our rows, cut after as many as the server's."""
    sampling = Sampling(temperature=0, mode="vllm", max_frames=ROWS - 8)
    return generate(talker, [prompt], sampling)[0].rows


OPTIONS = {"temperature": 0.0, "max_new_tokens": ROWS}


def test_each_name_is_served_as_its_merged_checkpoint(server, talkers, vocab):
    """The same text in turn, so that a prefix cached for one adapter would be seen in another."""
    prompt = render_prompt(vocab, "One, two, three: 42!")
    heard = []
    for name in [None, *VOICES, None, "ann"]:
        speak(server.url, "One, two, three: 42!", model=name, **OPTIONS)
        _, rows = server.dumps.last()
        assert torch.equal(rows, greedy(talkers[name], prompt)), name
        heard.append(rows)
    assert len({tuple(rows.flatten().tolist()) for rows in heard}) == 1 + len(VOICES)


def test_requests_of_all_voices_at_once_are_not_mixed_up(server, talkers, vocab):
    server.dumps.new()
    names = [None, *VOICES]
    jobs = [(f"Request number {i}.", names[i % len(names)]) for i in range(24)]
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda job: speak(server.url, job[0], model=job[1], **OPTIONS), jobs))
    rows_of = {tuple(h["prompt_token_ids"]): rows for h, rows in server.dumps.new()}
    assert len(rows_of) == len(jobs)
    for text, name in jobs:
        prompt = render_prompt(vocab, text)
        ours = greedy(talkers[name], prompt)
        assert torch.equal(rows_of[tuple(prompt.ids.tolist())], ours), (text, name)


def test_an_adapter_clones_and_streams_too(server, talkers, vocab, codec):
    t = np.arange(36000) / 24000
    tone = sum(np.sin(2 * np.pi * 140 * k * t) / k for k in range(1, 9))
    reference = pcm_to_wav((3000 * tone).astype("<i2").tobytes())
    ref_codes = codec.encode((3000 * tone).astype("<i2").astype(np.float32) / 32768)
    whole = speak(server.url, "Cloned.", reference, model="cid", response_format="pcm", **OPTIONS)
    _, rows = server.dumps.last()
    assert torch.equal(rows, greedy(talkers["cid"], render_prompt(vocab, "Cloned.", ref_codes)))
    assert b"".join(stream(server.url, "Cloned.", reference, model="cid", **OPTIONS)) == whole


def test_names_are_listed_and_unknown_ones_refused(server, exported):
    with _open(_request(server.url, "/v1/models", None), 30) as response:
        listed = json.load(response)["data"]
    assert [card["id"] for card in listed] == [exported.name, *VOICES]
    with pytest.raises(ServerError, match="dan") as caught:
        speak(server.url, "Hi.", model="dan", retries=0)
    assert caught.value.status == 404


def test_an_adapter_that_the_worker_refuses_is_an_error_not_the_base_voice(
    server, adapters, tmp_path
):
    """vLLM-Omni only logs it, and then speaks with the base's weights."""
    bad = tmp_path / "bad"
    bad.mkdir()
    for file in adapters["ann"].iterdir():
        (bad / file.name).write_bytes(file.read_bytes())
    config = json.loads((bad / "adapter_config.json").read_text())
    (bad / "adapter_config.json").write_text(json.dumps(config | {"r": 64}))
    body = {"lora_name": "bad", "lora_path": str(bad)}
    with pytest.raises(ServerError, match="rank 64 is greater"):
        _open(_request(server.url, "/v1/load_lora_adapter", None, json_body=body), 60)
    with pytest.raises(ServerError) as caught:
        speak(server.url, "Hi.", model="bad", retries=0)
    assert caught.value.status == 404


def change(server, action: str, body: dict) -> None:
    _open(_request(server.url, f"/v1/{action}_lora_adapter", None, json_body=body), 60).read()


def test_voices_come_and_go_while_the_server_runs(server, adapters, talkers, vocab):
    change(server, "load", {"lora_name": "eve", "lora_path": str(adapters["bob"])})
    speak(server.url, "Hello.", model="eve", **OPTIONS)
    _, rows = server.dumps.last()
    assert torch.equal(rows, greedy(talkers["bob"], render_prompt(vocab, "Hello.")))
    change(server, "unload", {"lora_name": "eve"})
    with pytest.raises(ServerError) as caught:
        speak(server.url, "Hello.", model="eve", retries=0)
    assert caught.value.status == 404


def test_a_fine_tuned_voice_is_heard_through_the_server(server):
    """The end of the road: what the demo taught is what the server says, in the voice it was
    taught, nearer than what the base makes of the same reference."""
    if not (folder := os.environ.get("HIGGS_LAB_DEMO")):
        pytest.skip("no finished demo: set HIGGS_LAB_DEMO to its folder")
    demo = Path(folder).resolve()
    rows = read_manifest(demo / "test.jsonl")[:8]
    change(server, "load", {"lora_name": "demo", "lora_path": str(demo / "run" / "adapter")})
    recognizer, encoder = load_recognizer("nano", "cpu"), load_encoder("nano", "cpu")
    voice = np.mean([encoder.embed(read_audio(row.audio, JUDGE_HZ)) for row in rows], axis=0)
    similarity = {}
    for name in (None, "demo"):

        def say(i: int, model=name) -> np.ndarray:
            options = dict(model=model, seed=i, response_format="pcm")
            reference = Path(rows[i].ref_audio).read_bytes()
            pcm = speak(server.url, rows[i].text, reference, rows[i].ref_text, **options)
            return np.frombuffer(pcm, "<i2").astype(np.float32) / 32768

        with ThreadPoolExecutor(4) as pool:
            said = list(pool.map(say, range(len(rows))))
        assert error_rate(recognizer, said, rows, "word") <= 0.15
        similarity[name] = [cosine(encoder.embed(for_judges(wav)), voice) for wav in said]
    change(server, "unload", {"lora_name": "demo"})
    gained = np.subtract(similarity["demo"], similarity[None])
    assert gained.mean() > 2 * gained.std(ddof=1) / len(gained) ** 0.5  # far from chance

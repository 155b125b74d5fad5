"""The nano family's training scripts on seconds of sound: every phase runs, what ships loads."""

from __future__ import annotations

import argparse
import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from higgs_lab.fused import fuse
from higgs_lab.nano.packing import expand_talker
from recipes.nano import listener, train_codec, train_talker
from recipes.nano.codec_model import encode_codes, load_codec
from recipes.nano.common import Clock, LastGood
from recipes.nano.discriminator import feature_distance
from recipes.nano.pack import pack_talker
from recipes.nano.pool import SpeechPool, add_floor
from recipes.nano.talker_data import Examples
from recipes.nano.voices import HOME_VOICES, all_voices
from tests.tiny import random_codes, voice_like


class Steps(Clock):
    """A clock that counts steps instead of seconds, and has each of them logged."""

    def __init__(self, args, warm_steps):
        super().__init__(args, warm_steps, log_sec=0)

    @property
    def elapsed(self) -> float:
        return self.step


@pytest.fixture(autouse=True)
def switches():
    """Put back what a script sets for its whole process."""
    saved = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    yield
    torch.set_float32_matmul_precision(saved[0])
    torch.backends.cudnn.benchmark = saved[1]


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """A folder of shards: one, of six utterances."""
    folder = tmp_path_factory.mktemp("speech")
    wavs = [(voice_like(1.2, seed=i) * 32767).astype(np.int16) for i in range(6)]
    rows = [[i * len(wav), len(wav), "A text.", "en", i] for i, wav in enumerate(wavs)]
    np.save(folder / "shard-00000.npy", np.concatenate(wavs))
    (folder / "shard-00000.json").write_text(json.dumps({"rows": rows}))
    (folder / "complete").touch()
    return folder


@pytest.mark.parametrize(
    ("shares", "phases"),
    [
        ((0.4, 0.7), ["plain"] * 2 + ["coded"] * 2 + ["adversarial"] * 2),
        ((0, 1.1), ["coded"] * 6),
    ],
)
def test_the_codec_trains_through_its_phases_and_ships(
    speech, tmp_path, shares, phases, monkeypatch, capsys
):
    monkeypatch.setattr(train_codec, "START_CROPS", 16)
    monkeypatch.setattr(train_codec, "Clock", Steps)
    ship = tmp_path / "ship"
    plain, adversarial = map(str, shares)
    sizes = ["--decoder-hidden", "48", "--batch", "2", "--crop-frames", "4", "--hours", "0.01"]
    shares = ["--plain", plain, "--adversarial", adversarial, "--listen", "0.1"]
    train_codec.main(
        ["--data", str(speech), "--out", str(tmp_path), "--ship", str(ship), "--seconds", "6.1"]
        + ["--device", "cpu", *sizes, *shares]
    )
    printed = capsys.readouterr().out
    logged = re.findall(r"s (\w+) step \d+ loss (\S+)(.*) hours", printed)
    assert [phase for phase, *_ in logged] == phases
    figures = [float(loss) for _, loss, _ in logged]
    figures += [float(word) for *_, rest in logged for word in rest.split()[1::2]]
    assert np.isfinite(figures).all()
    used = json.loads(re.findall(r"codes used (\[.*\])", printed)[-1])
    assert len(used) == 8 and used[0] > 50  # of some 200 vectors; 5 where k-means was left out
    # what users get gives the very codes of what was trained
    wav = torch.from_numpy(voice_like(1.0, seed=9))[None]
    with torch.no_grad():
        trained, shipped = (
            encode_codes(load_codec(folder / "codec.safetensors", "cpu"), wav)
            for folder in (tmp_path, ship)
        )
    assert torch.equal(trained, shipped)

    # what decodes goes on alone: the talker's codes stay, to the last bit of what makes them
    again = tmp_path / "again"
    options = ["--data", str(speech), "--out", str(again), "--ship", str(again / "ship")]
    options += ["--decoder-only", "--seconds", "2", "--device", "cpu", *sizes]
    options += ["--adversarial", "0.5", "--listen", "0"]
    with pytest.raises(SystemExit):
        train_codec.main([*options, "--init", str(tmp_path / "codec.safetensors")])
    assert "give one of --ship" in capsys.readouterr().err  # its weights are not what is shipped
    train_codec.main([*options, "--init", str(ship / "codec.safetensors")])
    before, after = (load_file(f / "codec.safetensors") for f in (ship, again / "ship"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed
    assert all(name.startswith(("acoustic_decoder.", "fc2.")) for name in changed)


def test_a_listener_spells_what_it_hears(tmp_path, monkeypatch):
    at = np.arange(9600) / 24_000
    tones = [0.3 * np.sin(2 * np.pi * hz * at) * (at < 0.3) for hz in (200, 900, 3000)]
    rows = [[9600 * i, 9600, text, "en", i] for i, text in enumerate(["<|tag|>a", "no", "ж"])]
    np.save(tmp_path / "shard-00000.npy", (np.concatenate(tones) * 32767).astype(np.int16))
    (tmp_path / "shard-00000.json").write_text(json.dumps({"rows": rows}))
    (tmp_path / "complete").touch()
    monkeypatch.setattr(listener, "Clock", Steps)
    monkeypatch.setattr(listener, "LONGEST_SEC", 0.4)
    torch.manual_seed(0)
    pool = SpeechPool(tmp_path, "cpu", 0.01)
    pool.wait(0)
    made = listener.train_listener(pool, argparse.Namespace(device="cpu", bf16=False, batch=3), 60)
    wav = pool.gather(torch.arange(3), 9600)
    logits, features = made(add_floor(wav))
    heard = [torch.unique_consecutive(ids).tolist() for ids in logits.argmax(1)]
    assert [bytes(i for i in ids if i).decode() for ids in heard] == ["a", "no", "ж"]
    # what it hears is near for the same with other noise, and not for another
    _, noisy = made(add_floor(wav))
    _, other = made(add_floor(wav.roll(1, 0)))
    assert feature_distance(noisy, features) < 0.3 * feature_distance(other, features)


def test_the_talker_learns_from_shards_of_codes_and_ships(tmp_path, monkeypatch):
    home = [voice.name for voice in all_voices()].index(HOME_VOICES[0])
    codes = [random_codes(30, seed) for seed in range(4)]
    table = [[30 * i, 30, f"Text number {i}.", "en", home] for i in range(4)]
    np.save(tmp_path / "codes-00000.npy", torch.cat(codes).numpy().astype(np.uint16))
    (tmp_path / "codes-00000.json").write_text(json.dumps(table))
    few = train_talker.TEXT_CONFIG | {
        "num_hidden_layers": 2,
        "layer_types": ["full_attention"] * 2,
    }
    monkeypatch.setattr(train_talker, "TEXT_CONFIG", few)

    examples = Examples(tmp_path, train_talker.nano_vocab(), 768, seed=0, begin=0, seconds=1)
    weights = torch.tensor(train_talker.CODEBOOK_WEIGHTS)
    pack = next(iter(train_talker.Packs(examples, weights / weights.mean())))
    torch.manual_seed(0)
    talker = train_talker.build_talker().train()
    fuse(talker, "split", dtype=torch.bfloat16)
    optimizer = train_talker.optimizer_of(talker, lr=2e-3)
    losses = [train_talker.step(talker, optimizer, pack, half=True)[0].item() for _ in range(4)]
    # the mean over cells of an untrained talker is that of a guess among 1026 ids
    assert abs(losses[0] - np.log(1026)) < 0.5 and losses[-1] < losses[0] - 0.5

    train_talker.save(talker, argparse.Namespace(out=tmp_path, ship=tmp_path / "ship"))
    parts = [tmp_path / "ship" / f"talker-{name}.safetensors" for name in ("mlp", "rest")]
    pack_talker(parts, tmp_path / "packed.safetensors")
    config, state = expand_talker(tmp_path / "packed.safetensors")
    assert config == few and state.keys() == talker.state_dict().keys()
    for name, value in talker.state_dict().items():
        if not name.startswith("model.embed_tokens"):  # at full height
            assert (state[name] - value).norm() < 0.02 * value.norm(), name


def test_a_loss_that_runs_away_takes_training_back_to_the_last_good_state(capsys):
    torch.manual_seed(0)
    model, clock = torch.nn.Linear(3, 1), argparse.Namespace(lr=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    good = LastGood([model], [optimizer], clock)

    def step(scale: float) -> float:
        loss = scale * model(torch.ones(3)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    good.check(step(1.0))
    weights, state = model.weight.clone(), optimizer.state[model.weight]
    moment, place = state["exp_avg"].clone(), model.weight.data_ptr()
    step(float("nan"))
    assert model.weight.isnan().all()
    good.check(float("nan"))
    assert torch.equal(model.weight, weights) and torch.equal(state["exp_avg"], moment)
    assert model.weight.data_ptr() == place  # a recorded step reads there
    assert clock.lr == 0.05 and "back to the last good state" in capsys.readouterr().out
    good.check(good.best * 3)
    assert clock.lr == 0.025
    good.check(good.best * 1.5)
    assert clock.lr == 0.025
    good.restart()
    good.check(100.0)  # of another phase: no running away
    assert clock.lr == 0.025 and good.best == 100
    good.restart()
    with pytest.raises(RuntimeError, match="first loss is nan"):
        good.check(float("nan"))

"""A text table on the host changes no result, and nothing moves it back to the card."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from higgs_lab.adapter import attach_lora
from higgs_lab.batches import PackedLoader, pack
from higgs_lab.fused import fuse
from higgs_lab.generate import Sampling, generate
from higgs_lab.prefetch import Prefetch
from higgs_lab.prompt import render_prompt
from higgs_lab.text_table import HostTable, text_on_host
from tests.tiny import three_examples, tiny_talker, tiny_vocab


def model(on_host: bool, preset: str = "attention_mlp", fused: bool = False):
    talker = tiny_talker(scale=4)
    table = text_on_host(talker) if on_host else None
    made = attach_lora(talker, preset, rank=4)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.05)
    if fused:
        fuse(made, "split", "full")
    return made.train(), table


def loss_and_gradients(made, batch):
    out = made(**batch.inputs(), targets=batch.targets(torch.ones(8)))
    out.loss.backward()
    return out.loss, {n: p.grad for n, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("preset", ["attention_mlp", "attention_mlp_table"])
@pytest.mark.parametrize("fused", [False, True])
def test_loss_and_gradients_are_those_of_a_table_on_the_device(preset, fused):
    batch = pack(three_examples(), 400)
    wanted = loss_and_gradients(model(False, preset, fused)[0], batch)
    made, table = model(True, preset, fused)
    found = loss_and_gradients(made, replace(batch, text=table(batch.ids)))
    assert torch.equal(found[0], wanted[0]) and found[1].keys() == wanted[1].keys()
    assert all(torch.equal(found[1][name], wanted[1][name]) for name in wanted[1])
    again, _ = model(True, preset, fused)
    assert torch.equal(loss_and_gradients(again, batch)[0], wanted[0])  # looked up by the model


def test_packs_bring_their_text_along():
    examples = three_examples()
    lengths = [len(e) for e in examples]
    _, table = model(True)
    ahead = Prefetch(PackedLoader(lengths, lambda i, _: examples[i], 400, pad=True), table=table)
    batch = next(ahead)
    ahead.close()
    assert torch.equal(batch.text, tiny_talker(scale=4).model.embed_tokens(batch.ids))
    assert batch.text.shape == (1, 400, 64) and "text" in batch.inputs()


def test_no_cast_or_move_takes_the_table_along():
    made, table = model(True)
    rows = table.weight
    assert not [n for n, _ in made.named_parameters() if "embed_tokens" in n]
    made.to("meta")  # as `accelerate` moves a model to its card
    assert table.weight is rows and rows.device.type == "cpu"
    assert isinstance(made.base_model.model.model.embed_tokens, HostTable)


def test_a_model_in_training_still_speaks():
    prompt = render_prompt(tiny_vocab(), "Hello.")
    wanted = Sampling(max_frames=6, seed=3)
    for adapted in (True, False):
        spoken = []
        for on_host in (False, True):
            talker = model(on_host)[0].eval() if adapted else tiny_talker(scale=4)
            if on_host and not adapted:
                text_on_host(talker)
            spoken.append(generate(talker, [prompt], wanted)[0].codes)
        assert torch.equal(*spoken)

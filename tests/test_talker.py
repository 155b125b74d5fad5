"""The talker is a Qwen3 causal LM with a fused, tied audio table; proved against transformers'."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

from higgs_lab.loss import codebook_loss
from higgs_lab.prompt import render_example
from higgs_lab.talker import FusedCodebooks, Talker, talker_config
from tests.tiny import (
    TEXT_CONFIG,
    TEXT_CONFIG_4B,
    K,
    V,
    meta_talker,
    random_codes,
    run_one,
    three_examples,
    three_prompts,
    tiny_talker,
    tiny_vocab,
)


def table_slices(talker: Talker) -> list[torch.Tensor]:
    """The table as K separate ones, cut by hand."""
    return [talker.codebooks.weight[c * 1026 : (c + 1) * 1026] for c in range(8)]


def by_hand(talker: Talker, sequence) -> torch.Tensor:
    """Logits [L, K, V] from transformers' Qwen3ForCausalLM, embedding and head written out."""
    causal = Qwen3ForCausalLM(copy.deepcopy(talker.config)).eval()
    for parameter in causal.parameters():  # not .to(), which would round the rotary frequencies
        parameter.data = parameter.data.to(talker.dtype)
    causal.model.load_state_dict(talker.model.state_dict())
    tables = table_slices(talker)
    embeds = []
    for i in range(len(sequence)):
        if sequence.is_audio[i]:
            row = sequence.rows[i]
            embeds.append(sum(tables[c][row[c]].float() for c in range(8)).to(talker.dtype))
        else:
            embeds.append(causal.model.embed_tokens.weight[sequence.ids[i]])
    hidden = causal.model(inputs_embeds=torch.stack(embeds)[None]).last_hidden_state[0]
    return torch.stack([F.linear(hidden, table) for table in tables], dim=1)


# --- the fused table


def test_trap10_embedding_is_eight_tables_summed():
    """Offsets of 1024, or none, would look right for codebook 0 only."""
    torch.manual_seed(0)
    fused = FusedCodebooks(K, V, 16)
    torch.nn.init.normal_(fused.weight)
    tables = [torch.nn.Embedding(V, 16) for _ in range(K)]
    for c, table in enumerate(tables):
        table.weight.data = fused.weight.data[c * V : (c + 1) * V]
    rows = torch.randint(0, V, (5, 7, K))
    rows[0, 0], rows[0, 1] = 1024, 1025  # the specials are rows like any other
    expected = sum(table(rows[..., c]) for c, table in enumerate(tables))
    torch.testing.assert_close(fused(rows), expected)


def test_trap10_an_entry_is_row_1026_c_plus_code():
    """A table whose row i holds the number i shows which rows were summed."""
    fused = FusedCodebooks(K, V, 1)
    with torch.no_grad():
        fused.weight.copy_(torch.arange(K * V)[:, None])
    for code in (0, 1, 1023, 1024, 1025):
        wanted = sum(1026 * c + code for c in range(8))
        assert int(fused(torch.full((K,), code))) == wanted
    assert int(fused(torch.arange(K))) == sum(1026 * c + c for c in range(8))


def test_head_is_the_table_codebook_by_codebook():
    talker = tiny_talker(scale=5)
    hidden = torch.randn(3, 4, 64)
    logits = talker.codebooks.logits(hidden)
    assert logits.shape == (3, 4, K, V)
    for c, table in enumerate(table_slices(talker)):
        torch.testing.assert_close(logits[..., c, :], hidden @ table.T)


def test_trap11_head_and_embedding_are_one_parameter():
    """Gradients of both uses reach the one table, and there is no other audio weight."""
    talker = tiny_talker()
    names = [n for n, _ in talker.named_parameters() if not n.startswith("model.")]
    assert names == ["codebooks.weight"]
    rows = torch.full((1, 1, K), 5)
    embedded_only = torch.autograd.grad(talker.codebooks(rows).sum(), talker.codebooks.weight)[0]
    assert embedded_only.abs().sum(1).nonzero()[:, 0].tolist() == [c * V + 5 for c in range(K)]
    head_only = torch.autograd.grad(
        talker.codebooks.logits(torch.ones(1, 64))[0, 3].sum(), talker.codebooks.weight
    )[0]
    assert head_only.abs().sum(1).nonzero()[:, 0].tolist() == list(range(3 * V, 4 * V))


# --- against transformers


@pytest.mark.parametrize("which", [0, 1, 2])
@torch.no_grad()
def test_logits_are_those_of_qwen3_with_the_table_by_hand(which):
    talker = tiny_talker(scale=4)
    sequence = three_examples()[which]
    mine = run_one(talker, sequence)
    torch.testing.assert_close(mine, by_hand(talker, sequence), atol=2e-5, rtol=1e-4)
    assert mine.std() > 0.1  # the comparison is about something


@torch.no_grad()
def test_trap09_bf16_sums_rows_and_rotates_in_bf16_as_training_did():
    """Facts §1.6: fused sum and rotary cache in bf16, only logits are raised to fp32."""
    talker = tiny_talker(scale=4, dtype=torch.bfloat16)
    example = three_examples()[2]
    seen = {}

    def grab(module, args, kwargs):
        seen["rope"] = kwargs["position_embeddings"]
        seen["hidden"] = kwargs.get("hidden_states", args[0] if args else None)

    attention = talker.model.layers[0].self_attn
    handle = attention.register_forward_pre_hook(grab, with_kwargs=True)
    logits = run_one(talker, example)
    handle.remove()
    assert {t.dtype for t in (*seen["rope"], seen["hidden"], logits)} == {torch.bfloat16}
    embedded = talker.codebooks(example.rows[example.is_audio])
    exact = sum(
        t.float()[example.rows[example.is_audio][:, c]] for c, t in enumerate(table_slices(talker))
    )
    assert embedded.dtype == torch.bfloat16
    assert torch.equal(embedded, exact.to(torch.bfloat16))
    # teacher-forced log-probs of the same bf16 weights in plain transformers
    mine, theirs = (x.float().log_softmax(-1) for x in (logits, by_hand(talker, example)))
    picked = [x.gather(-1, example.labels[..., None])[example.supervised] for x in (mine, theirs)]
    assert float((picked[0] - picked[1]).abs().max()) < 0.05


@torch.no_grad()
def test_trap09_fp32_master_weights_train_the_sums_of_the_bf16_checkpoint():
    """A full fine-tune keeps fp32 weights under autocast, but must see what will be served."""
    served, master = tiny_talker(scale=4, dtype=torch.bfloat16), tiny_talker(scale=4)
    master.load_state_dict({k: v.float() for k, v in served.state_dict().items()})
    example = three_examples()[2]
    batch = (example.ids[None], example.is_audio[None], example.rows[None])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(master.embed(*batch), served.embed(*batch))
    assert not torch.equal(master.embed(*batch), served.embed(*batch).float())


# --- the configuration


def test_trap08_rotary_frequencies_are_those_of_theta_one_million():
    talker = tiny_talker()
    wanted = 1.0 / 1e6 ** (torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(talker.model.rotary_emb.inv_freq, wanted)
    talker.materialize_rope("cpu")
    torch.testing.assert_close(talker.model.rotary_emb.inv_freq, wanted)
    reference = Qwen3ForCausalLM(Qwen3Config(**copy.deepcopy(TEXT_CONFIG))).model.rotary_emb
    assert torch.equal(talker.model.rotary_emb.inv_freq, reference.inv_freq)


@torch.no_grad()
def test_trap08_a_cast_does_not_round_the_rotary_frequencies():
    """`.bfloat16()` casts buffers too: some hundred positions on, angles are off by a radian."""
    wanted = tiny_talker().model.rotary_emb.inv_freq
    for cast in (tiny_talker().bfloat16(), tiny_talker().half(), tiny_talker().to(torch.bfloat16)):
        assert torch.equal(cast.model.rotary_emb.inv_freq, wanted)
        assert cast.model.layers[0].mlp.up_proj.weight.dtype in (torch.bfloat16, torch.float16)
    wrapped = torch.nn.Sequential(tiny_talker()).bfloat16()  # as a PEFT model or a trainer does
    assert torch.equal(wrapped[0].model.rotary_emb.inv_freq, wanted)
    there = meta_talker(TEXT_CONFIG).to_empty(device="cpu")
    assert torch.equal(there.model.rotary_emb.inv_freq, wanted)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 1e6},
        {"rope_theta": 1e6, "rope_parameters": {"rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
    ],
)
def test_trap08_flat_and_nested_theta_are_both_read(rope):
    raw = {k: v for k, v in TEXT_CONFIG.items() if k != "rope_parameters"} | rope
    assert talker_config(copy.deepcopy(raw)).rope_parameters["rope_theta"] == 1e6


@pytest.mark.parametrize(
    "rope",
    [
        {},
        {"rope_parameters": None},
        {"rope_theta": None},
        {"rope_parameters": {"rope_type": "default"}},
    ],
)
def test_trap08_a_missing_theta_is_refused_with_the_value_to_write(rope):
    raw = {k: v for k, v in TEXT_CONFIG.items() if k != "rope_parameters"} | rope
    with pytest.raises(ValueError, match="rope_theta.*1000000"):
        talker_config(raw)


def test_another_architecture_is_refused():
    with pytest.raises(ValueError, match="'llama'.*qwen3"):
        talker_config(TEXT_CONFIG | {"model_type": "llama"})


def test_sizes_of_the_4b_model():
    """Facts §1.2: 399 tensors, 4,043,480,576 parameters, of which the audio table 21,012,480."""
    talker = meta_talker(TEXT_CONFIG_4B)
    parameters = dict(talker.named_parameters())
    assert len(parameters) == len(talker.state_dict()) == 399
    assert sum(p.numel() for p in parameters.values()) == 4_043_480_576
    assert parameters["codebooks.weight"].shape == (8208, 2560)
    assert parameters["model.embed_tokens.weight"].shape == (151936, 2560)
    layer = {n: p.numel() for n, p in parameters.items() if n.startswith("model.layers.7.")}
    assert (len(layer), sum(layer.values())) == (11, 100_930_816)


# --- causality and padding


@torch.no_grad()
def test_trap02_a_later_row_changes_no_earlier_logit():
    """Loss near 0 from leakage: a position that sees its own label."""
    talker = tiny_talker(scale=4)
    example = three_examples()[1]
    before = run_one(talker, example)
    P, L = example.prompt_length, len(example)
    for t in (P, P + 5, L - 1):
        changed = copy.copy(example)
        changed.rows = example.rows.clone()
        changed.rows[t] = (changed.rows[t] + 1) % V
        after = run_one(talker, changed)
        assert torch.equal(after[:t], before[:t])
        assert not torch.equal(after[t], before[t])


@torch.no_grad()
def test_trap02_random_weights_are_at_chance():
    """Facts §9: initial cross-entropy is ln 1026 = 6.93, on labels a leak would have found.

    EOC is a little below: a tied table favours what it was just fed, and EOC follows EOC.
    """
    talker = tiny_talker()
    parts = [
        codebook_loss(run_one(talker, example), example.labels, example.supervised)
        for example in three_examples()
    ]
    sums = parts[0] + parts[1] + parts[2]
    chance = math.log(1026)
    assert float(sums.code_sum.sum() / sums.code_count.sum()) == pytest.approx(chance, abs=0.03)
    assert sums.means()["loss"] == pytest.approx(chance, abs=0.1)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_trap33_a_padded_batch_gives_the_logits_of_singles(side):
    talker = tiny_talker(scale=4)
    prompts = three_prompts()
    longest = max(map(len, prompts))

    def padded(value):
        free = value.new_full((longest - len(value), *value.shape[1:]), 1)  # not only zeros
        return torch.cat([free, value] if side == "left" else [value, free])

    columns = [
        torch.stack([padded(getattr(p, n)) for p in prompts]) for n in ("ids", "is_audio", "rows")
    ]
    mask = torch.stack([padded(torch.full((len(p),), 2)) for p in prompts]) - 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    out = talker(*columns, attention_mask=mask, position_ids=positions)
    for i, prompt in enumerate(prompts):
        alone = run_one(talker, prompt)
        torch.testing.assert_close(out.logits[i][mask[i].bool()], alone, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_the_cache_gives_the_logits_of_the_whole():
    talker = tiny_talker(scale=4)
    example = three_examples()[1]
    whole, P = run_one(talker, example), example.prompt_length
    columns = [example.ids[None], example.is_audio[None], example.rows[None]]
    cache = DynamicCache(config=talker.config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a name that transformers is about to drop
        got = [talker(*(c[:, :P] for c in columns), cache=cache).logits[0]]
        for i in range(P, len(example)):
            step = (c[:, i : i + 1] for c in columns)
            out = talker(*step, cache=cache, position_ids=torch.tensor([[i]]))
            got.append(out.logits[0])
    torch.testing.assert_close(torch.cat(got), whole, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_logits_at_picks_positions_in_order():
    talker = tiny_talker(scale=4)
    example = three_examples()[0]
    whole = run_one(talker, example)
    wanted = example.supervised.any(-1)
    picked = talker(
        example.ids[None], example.is_audio[None], example.rows[None], logits_at=wanted[None]
    )
    assert picked.logits.shape == (int(wanted.sum()), K, V)
    torch.testing.assert_close(picked.logits, whole[wanted])
    assert picked.hidden.shape == (1, len(example), 64)


@torch.no_grad()
def test_fillers_are_never_read():
    """Ids at audio positions and rows at text positions change nothing."""
    talker = tiny_talker(scale=4)
    example = render_example(tiny_vocab(), "Hi.", random_codes(9), random_codes(10, 1))
    before = run_one(talker, example)
    example.ids = example.ids.masked_fill(example.is_audio, 7)
    example.rows = torch.where(example.is_audio[:, None], example.rows, 3)
    assert torch.equal(run_one(talker, example), before)


def test_packed_input_with_a_mask_or_without_positions_is_refused():
    talker, prompt = tiny_talker(), three_prompts()[0]
    columns = [prompt.ids[None], prompt.is_audio[None], prompt.rows[None]]
    cu = torch.tensor([0, len(prompt)], dtype=torch.int32)
    with pytest.raises(ValueError, match="packed input"):
        talker(*columns, cu_seqlens=cu, max_seqlen=len(prompt))

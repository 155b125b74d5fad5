"""The nano family's packaged files unpack to exactly what is used, in the upstream formats."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from higgs_lab.nano import packing
from recipes.nano.codec_model import build_codec, decode_codes, encode_codes


@given(st.integers(1, 9), st.integers(1, 40), st.floats(1e-6, 1e3), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_int8_rows_come_back_within_half_a_step_and_bf16_holds_them(rows, columns, size, seed):
    value = size * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    back = packing.dequantise(*packing.quantise(value))
    assert torch.equal(back, back.bfloat16().float())
    step = value.abs().amax(dim=1, keepdim=True) / 127
    # half a step, the scale's rounding to bf16 (2^-9 of 127 steps) and the result's
    assert bool(((back - value).abs() <= step * (0.5 + 127 * 2**-9) + back.abs() * 2**-8).all())


def test_a_packed_file_gives_back_what_it_said_it_would(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "big.weight": torch.randn(64, 64),
        "small.bias": torch.randn(64),
        "quantizer.quantizers.0.codebook.embed": torch.randn(1024, 64),
        "count": torch.arange(3),
    }
    size = packing.pack(tensors, tmp_path / "x.safetensors", {"note": "hello"})
    assert size < sum(v.nbytes for v in tensors.values()) / 2 + 4096
    back = packing.unpack(tmp_path / "x.safetensors")
    for name, value in tensors.items():
        want = value
        if value.is_floating_point():
            want = packing.round_trip(value, packing.wants_int8(name, value))
        assert torch.equal(back[name], want), name
    assert packing.metadata(tmp_path / "x.safetensors") == {"note": "hello"}


@pytest.fixture(scope="module")
def narrow():
    torch.manual_seed(1)
    return build_codec(decoder_hidden=48, encoder_hidden=8).eval()


@torch.no_grad()
def test_a_widened_decoder_is_the_same_function(narrow, tmp_path):
    """The engine's decoder has 1024 channels at its widest; 96 show the same."""
    wide = build_codec(decoder_hidden=96, encoder_hidden=8).eval()
    wide.load_state_dict(packing.widen_decoder(narrow.state_dict(), 96))
    codes = torch.randint(0, 1024, (1, 6, 8))
    torch.testing.assert_close(decode_codes(wide, codes), decode_codes(narrow, codes))


@torch.no_grad()
def test_a_packaged_codec_is_complete_and_speaks_the_same(narrow, tmp_path):
    from recipes.nano.codec_model import load_codec

    packing.pack(packing.codec_core(narrow.state_dict()), tmp_path / "codec.safetensors", {})
    state = packing.expand_codec(tmp_path / "codec.safetensors", None)
    assert state.keys() == narrow.state_dict().keys()
    book = "quantizer.quantizers.3.codebook."
    assert torch.equal(state[book + "embed_avg"], 5 * state[book + "embed"])  # facts trap 14
    loaded = load_codec(tmp_path / "codec.safetensors", "cpu")
    assert torch.equal(loaded.quantizer.quantizers[3].codebook.embed, state[book + "embed"])


@torch.no_grad()
def test_codes_do_not_depend_on_padding(narrow):
    """The silent semantic branch is what makes batches of ragged clips exact."""
    wav = torch.randn(1, 960 * 12) * 0.1
    longer = torch.nn.functional.pad(wav, (0, 960 * 20))
    assert torch.equal(encode_codes(narrow, longer)[:, :10], encode_codes(narrow, wav)[:, :10])


def test_text_rows_stand_at_their_true_ids():
    table = torch.randn(packing.TEXT_ROWS, 4)
    wide = packing.expand_text_table(table)
    ids = torch.tensor([0, 65, 255, 151_643, 151_667, 151_726])
    assert torch.equal(wide[ids], table[packing.compact_ids(ids)])
    assert wide.shape == (151_936, 4) and not wide[packing.ADDED_AT : 151_643].any()


def test_unused_whisper_rows_share_one_vector(tmp_path):
    import json

    import whisper

    dims = dict(
        n_mels=80, n_vocab=51_865, n_audio_ctx=1500, n_audio_state=16, n_audio_head=2,
        n_audio_layer=1, n_text_ctx=448, n_text_state=16, n_text_head=2, n_text_layer=1,
    )  # fmt: skip
    model = whisper.model.Whisper(whisper.model.ModelDimensions(**dims))
    state = {k: torch.randn_like(v) for k, v in model.state_dict().items()}
    used = torch.tensor([5, 50_257, 51_864])
    state["decoder.token_embedding.weight"] = torch.randn(4, 16)
    state["decoder.positional_embedding"] = torch.randn(128, 16)
    del state["encoder.positional_embedding"]
    packing.pack(state | {"used": used}, tmp_path / "w.safetensors", {"dims": json.dumps(dims)})
    packaged = packing.unpack(tmp_path / "w.safetensors")["decoder.token_embedding.weight"]
    torch.save(packing.expand_whisper(tmp_path / "w.safetensors"), tmp_path / "w.pt")
    loaded = whisper.load_model(str(tmp_path / "w.pt"), device="cpu")
    table = loaded.decoder.token_embedding.weight.detach()
    assert torch.equal(table[used], packaged[:3])
    assert torch.equal(table[6], packaged[3]) and torch.equal(table[40_000], packaged[3])
    torch.testing.assert_close(
        loaded.encoder.positional_embedding, model.encoder.positional_embedding
    )

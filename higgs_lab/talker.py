"""The talker: Qwen3 blocks, a fused table for 8 codebooks, and the same table as the head.

An audio row of K codes is one position; its embedding is the sum of K rows of one table, its
prediction K independent softmaxes from the final hidden state times the same table. No depth model,
no dependence between the codebooks of a row: the delay pattern supplies the order (facts §0;
vllm-omni higgs_audio_v3_talker.py, sglang-omni higgs_tts/modeling.py).

The backbone is transformers' own `Qwen3Model`, held as `Talker.model`, so that PEFT keys read
`base_model.model.model.layers.N...`, as for any Qwen3 causal LM.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, Qwen3Config, Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from higgs_lab.attention import VARLEN, packed_mask
from higgs_lab.loss import LossSums, Targets, head_loss

# transformers 5.2x calls it `cache`, and 5.40 will refuse the older name.
ARGUMENTS = inspect.signature(Qwen3Model.forward).parameters
CACHE = "cache" if "cache" in ARGUMENTS else "past_key_values"


@dataclass
class TalkerOutput:
    """hidden: [B, L, D] after the final norm; logits: [B, L, K, V], or [N, K, V] where asked."""

    hidden: Tensor
    logits: Tensor | None
    loss: Tensor | None = None  # of targets, instead of logits: the weighted sum over their cells
    sums: LossSums | None = None


class FusedCodebooks(nn.Module):
    """One table [K*V, D] that is both the embedding and the head of K codebooks.

    Row c*V + i is entry i of codebook c (specials included: V = 1026, not 1024).
    """

    def __init__(self, num_codebooks: int, codebook_size: int, hidden_size: int):
        super().__init__()
        self.num_codebooks, self.codebook_size = num_codebooks, codebook_size
        self.weight = nn.Parameter(torch.empty(num_codebooks * codebook_size, hidden_size))

    def forward(self, rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """rows [..., K] -> embeddings [..., D], summed over codebooks in `dtype` (the table's)."""
        offsets = torch.arange(self.num_codebooks, device=rows.device) * self.codebook_size
        dtype = dtype or self.weight.dtype
        found = F.embedding(rows + offsets, self.weight).to(dtype)
        return found.sum(dim=-2, dtype=dtype)  # said, or CUDA's autocast would make it fp32

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> logits [..., K, V] in its dtype; a table in training may be fp32."""
        flat = F.linear(hidden, self.weight.to(hidden.dtype))
        return flat.unflatten(-1, (self.num_codebooks, self.codebook_size))


class Talker(nn.Module):
    """Qwen3 backbone + `FusedCodebooks`. Build it with `checkpoint.load_talker`.

    It has no text head: TTS neither trains nor decodes text.
    """

    def __init__(self, config: Qwen3Config, num_codebooks: int, codebook_size: int):
        super().__init__()
        self.config = config
        self.num_codebooks, self.codebook_size = num_codebooks, codebook_size
        self.model = Qwen3Model(config)
        self.codebooks = FusedCodebooks(num_codebooks, codebook_size, config.hidden_size)
        nn.init.normal_(self.codebooks.weight, std=config.initializer_range)
        self.fused = None  # a fine-tune's way through the blocks, see higgs_lab/fused.py

    def forward(
        self,
        ids: Tensor,
        is_audio: Tensor,
        rows: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cache: Cache | None = None,
        logits_at: Tensor | None = None,
        targets: Targets | None = None,
        text: Tensor | None = None,
    ) -> TalkerOutput:
        """One pass over ids [B, L], is_audio [B, L] bool, rows [B, L, K].

        Padded batches: attention_mask [B, L], 1 where real. Packed ones (B = 1): cu_seqlens int32
        [D+1] and max_seqlen, with position_ids that restart in each document. cache: keys and
        values of earlier positions, which is extended. logits_at: bool [B, L], to run the head only
        there (logits [N, K, V]); audio rows are half of a sequence or less, and the head's output
        is larger than any hidden state. targets: to get the loss instead, whose logits never exist
        as a whole. text: embeddings of ids [B, L, D], where the caller has looked them up.
        """
        embeds = self.embed(ids, is_audio, rows, text)
        kwargs = {}
        if cu_seqlens is not None:
            if len(ids) != 1 or position_ids is None or attention_mask is not None:
                raise ValueError("packed input is one row with position_ids and no attention_mask")
            if self.fused is not None and self.fused.usable and cache is None:
                cos, sin = self.model.rotary_emb(embeds, position_ids)
                hidden = self.fused(embeds, cos, sin, cu_seqlens, max_seqlen)
                return self._output(hidden, logits_at, targets)
            if self.config._attn_implementation == VARLEN:
                attention_mask = {"full_attention": None}  # a dict: transformers builds no mask
                kwargs = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
            else:
                attention_mask = {"full_attention": packed_mask(cu_seqlens, ids.shape[1])}
        out = self.model(
            inputs_embeds=embeds,
            position_ids=position_ids,
            attention_mask=attention_mask,
            use_cache=cache is not None,
            **{CACHE: cache},
            **kwargs,
        )
        return self._output(out.last_hidden_state, logits_at, targets)

    def _output(
        self, hidden: Tensor, logits_at: Tensor | None, targets: Targets | None
    ) -> TalkerOutput:
        if targets is not None:
            picked = hidden.flatten(0, 1)[targets.at]
            loss, sums = head_loss(picked, self.codebooks.weight, targets)
            return TalkerOutput(hidden, None, loss, sums)
        picked = hidden if logits_at is None else hidden[logits_at]
        return TalkerOutput(hidden, self.codebooks.logits(picked))

    def embed(
        self, ids: Tensor, is_audio: Tensor, rows: Tensor, text: Tensor | None = None
    ) -> Tensor:
        """[B, L, D]: text embeddings, with the fused sum where a row stands.

        Under autocast in its dtype, which the rotary angles follow: fp32 master weights must train
        the sums that the bf16 checkpoint will be served with (facts §1.6).
        """
        if text is None:
            text = self.model.embed_tokens(ids)
        device = text.device.type
        if torch.is_autocast_enabled(device):
            text = text.to(torch.get_autocast_dtype(device))
        return torch.where(is_audio[..., None], self.codebooks(rows, text.dtype), text)

    @property
    def device(self) -> torch.device:
        return self.codebooks.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.codebooks.weight.dtype

    def _apply(self, fn, recurse: bool = True) -> Talker:
        """Behind .to(), .bfloat16(), .cuda(): a cast must not round the rotary frequencies.

        In bf16 they are off by up to 1/512, so that some hundred positions on angles are wrong by a
        radian, and nothing says so.
        """
        super()._apply(fn, recurse)
        self.materialize_rope(self.device)
        return self

    def materialize_rope(self, device: torch.device | str) -> None:
        """Compute the rotary frequencies: they are no weights, so loading leaves them on meta."""
        self.model.rotary_emb = Qwen3RotaryEmbedding(self.config).to(device)


def talker_config(raw: dict) -> Qwen3Config:
    """Qwen3 configuration from the checkpoint's `text_config`, never from typed numbers.

    Raises ValueError when rope_theta is absent: readers that fall back to 10,000 give a model
    that runs and speaks nonsense (facts trap 8).
    """
    rope = raw.get("rope_parameters") or {}
    if rope.get("rope_theta") is None and raw.get("rope_theta") is None:
        raise ValueError(
            "text_config has neither rope_parameters.rope_theta nor rope_theta; Higgs TTS 3 has "
            "rope_parameters {'rope_theta': 1000000, 'rope_type': 'default'}: restore it from the "
            "original config.json"
        )
    if raw.get("model_type", "qwen3") != "qwen3":
        raise ValueError(f"text_config.model_type is {raw['model_type']!r}; only 'qwen3' is known")
    ignored = ("dtype", "torch_dtype", "architectures", "_name_or_path")
    return Qwen3Config(**{k: v for k, v in raw.items() if k not in ignored})

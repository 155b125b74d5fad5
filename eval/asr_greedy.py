"""Greedy decoding of many 30 s windows at once, with openai-whisper's weights and rules.

openai-whisper decodes a batch too, but waits for the GPU several times a token, grows its caches by
copying, takes one language a batch, and keeps a batch whole until its last clip ends: one clip that
runs on to the limit costs as much as all others. Here the caches are allocated once, the choice of
a token stays on the device, and clips that have ended leave the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

CHECK_EVERY = 8  # steps between looks at who has ended; each look waits for the device
SHRINK_BELOW = 0.75  # of the clips still decoded: dropping the others copies the caches once
CACHE_SHARE = 0.3  # of the device's memory, for keys and values of the encoder's output


@dataclass(frozen=True)
class Decoded:
    tokens: list[int]  # up to the end token, which is left out
    sum_logprob: float  # the end token's included
    no_speech_prob: float
    language_probs: dict[str, float]  # by Whisper's code; empty for an English-only model


class GreedyDecoder:
    """Decodes mel windows by an openai-whisper model, whose modules it uses.

    dtype: of encoder, decoder and caches; see `in_precision`. Layer norms and sums stay in fp32.
    """

    def __init__(self, model, dtype: torch.dtype = torch.float32):
        from whisper.decoding import DecodingOptions, DecodingTask

        self.dims, self.dtype, self.device = model.dims, dtype, model.device
        self._multilingual, self._languages = model.is_multilingual, model.num_languages
        task = DecodingTask(model, DecodingOptions(without_timestamps=True, fp16=False))
        tokenizer = task.tokenizer
        self.end, self.timestamp_begin = tokenizer.eot, tokenizer.timestamp_begin
        self.max_tokens = task.sample_len
        self._no_speech, self.text = tokenizer.no_speech, tokenizer.decode
        self._prompts: dict[str, list[int]] = {}
        always = torch.zeros(model.dims.n_vocab)
        always[list(task._get_suppress_tokens())] = -torch.inf
        first = always.clone()  # a clip may not begin with its end or with a blank
        first[[*tokenizer.encode(" "), tokenizer.eot]] = -torch.inf
        self._always, self._first = always.to(self.device), first.to(self.device)
        self._language_tokens, self._language_codes = [], []
        if model.is_multilingual:
            self._language_tokens = list(tokenizer.all_language_tokens)
            self._language_codes = list(tokenizer.all_language_codes)
        self._encoder, self._decoder = model.encoder, model.decoder
        # openai-whisper computes logits in the precision of the rest, then turns them to fp32.
        self._table = self._decoder.token_embedding.weight.detach().to(dtype).T

    @torch.inference_mode()
    def decode(
        self, mels: torch.Tensor, languages: Sequence[str], max_tokens: int | None = None
    ) -> list[Decoded]:
        """mels [B, n_mels, 3000], Whisper's language codes [B]; results in their order."""
        limit = max_tokens or self.max_tokens
        prompt = torch.tensor([self._prompt(code) for code in languages], device=self.device)
        count, begin = prompt.shape
        cross = self._encode(mels)
        caches = self._new_caches(count, begin + limit)
        tokens = torch.full((count, limit), self.end, device=self.device)
        sums = torch.zeros(count, device=self.device)
        rows = torch.arange(count, device=self.device)  # of the clips still decoded
        hidden = self._forward(prompt, 0, caches, cross)
        at_start, logits = self._logits(hidden[:, 0]), self._logits(hidden[:, -1]) + self._first
        no_speech = at_start.softmax(dim=-1)[:, self._no_speech]
        guesses = at_start[:, self._language_tokens].softmax(dim=-1)
        ended = torch.zeros(count, dtype=torch.bool, device=self.device)
        for step in range(limit):
            chosen = logits.argmax(dim=-1).masked_fill(ended, self.end)
            best = logits.float().log_softmax(dim=-1).gather(1, chosen[:, None])[:, 0]
            sums[rows] += best.masked_fill(ended, 0)
            tokens[rows, step] = chosen
            ended = ended | (chosen == self.end)
            if step + 1 == limit:
                break
            if step % CHECK_EVERY == CHECK_EVERY - 1:
                going = int((~ended).sum())
                if going == 0:
                    break
                if going < SHRINK_BELOW * len(rows):
                    keep = (~ended).nonzero()[:, 0]
                    rows, chosen, ended = rows[keep], chosen[keep], ended[keep]
                    for pairs in (caches, cross):  # layer by layer, to free what is left behind
                        for layer, (keys, values) in enumerate(pairs):
                            pairs[layer] = keys[keep], values[keep]
            hidden = self._forward(chosen[:, None], begin + step, caches, cross)
            logits = self._logits(hidden[:, -1]) + self._always
        return self._results(tokens, sums, no_speech, guesses)

    @torch.inference_mode()
    def guess_language(self, mels: torch.Tensor) -> list[dict[str, float]]:
        """Probabilities of languages, by Whisper's code; empty for an English-only model."""
        if not self._language_tokens:
            return [{}] * len(mels)
        start = torch.full((len(mels), 1), self._prompt("en")[0], device=self.device)
        hidden = self._forward(start, 0, self._new_caches(len(mels), 1), self._encode(mels))
        probs = self._logits(hidden[:, 0])[:, self._language_tokens].softmax(dim=-1)
        return [dict(zip(self._language_codes, row, strict=True)) for row in probs.tolist()]

    def _encode(self, mels: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values [B, heads, 1500, d] that each decoder layer looks at."""
        heard = self._encoder(mels.to(self.device, self.dtype))
        parts = [block.cross_attn for block in self._decoder.blocks]
        return [(self._split(part.key(heard)), self._split(part.value(heard))) for part in parts]

    def _forward(self, tokens: torch.Tensor, begin: int, caches, cross) -> torch.Tensor:
        """Hidden states [B, n, D] of tokens [B, n] at positions from `begin` on; fills caches."""
        end = begin + tokens.shape[1]
        decoder = self._decoder
        x = decoder.token_embedding(tokens) + decoder.positional_embedding[begin:end]
        x = x.to(self.dtype)
        for block, (keys, values), (far_keys, far_values) in zip(
            decoder.blocks, caches, cross, strict=True
        ):
            normed, attn = block.attn_ln(x), block.attn
            keys[:, :, begin:end] = self._split(attn.key(normed))
            values[:, :, begin:end] = self._split(attn.value(normed))
            near = F.scaled_dot_product_attention(
                self._split(attn.query(normed)),
                keys[:, :, :end],
                values[:, :, :end],
                is_causal=tokens.shape[1] > 1,
            )
            x = x + attn.out(near.transpose(1, 2).flatten(2))
            attn = block.cross_attn
            query = self._split(attn.query(block.cross_attn_ln(x)))
            far = F.scaled_dot_product_attention(query, far_keys, far_values)
            x = x + attn.out(far.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.mlp_ln(x))
        return decoder.ln(x)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return (hidden @ self._table).float()

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        """[B, n, D] -> [B, heads, n, D / heads]."""
        return x.unflatten(2, (self.dims.n_text_head, -1)).transpose(1, 2)

    def _new_caches(self, count: int, length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        heads = self.dims.n_text_head
        shape = count, heads, length, self.dims.n_text_state // heads
        options = {"dtype": self.dtype, "device": self.device}
        layers = range(self.dims.n_text_layer)
        return [(torch.empty(shape, **options), torch.empty(shape, **options)) for _ in layers]

    def _prompt(self, code: str) -> list[int]:
        """Start tokens that force language, transcription and no timestamps."""
        if code not in self._prompts:
            from whisper.tokenizer import get_tokenizer

            tokenizer = get_tokenizer(
                self._multilingual, num_languages=self._languages, language=code, task="transcribe"
            )
            self._prompts[code] = list(tokenizer.sot_sequence_including_notimestamps)
        return self._prompts[code]

    def _results(self, tokens, sums, no_speech, guesses) -> list[Decoded]:
        results = []
        columns = (tokens.tolist(), sums.tolist(), no_speech.tolist(), guesses.tolist())
        for written, total, silent, probs in zip(*columns, strict=True):
            if self.end in written:
                written = written[: written.index(self.end)]
            by_code = dict(zip(self._language_codes, probs, strict=True))
            results.append(Decoded(written, total, silent, by_code))
        return results


def most_clips(model, dtype: torch.dtype) -> int:
    """Clips whose keys and values of the encoder's output fit into CACHE_SHARE of memory.

    By the device's whole memory, not by what is free: the same batches on every run.
    """
    dims = model.dims
    size = torch.finfo(dtype).bits // 8
    clip_bytes = 2 * dims.n_text_layer * dims.n_audio_ctx * dims.n_text_state * size
    memory_bytes = 4 << 30  # on a CPU, where other things run beside this
    if model.device.type == "cuda":
        memory_bytes = torch.cuda.get_device_properties(model.device).total_memory
    return max(1, int(CACHE_SHARE * memory_bytes / clip_bytes))


def in_precision(model, dtype: torch.dtype):
    """The model itself, with linear and convolution weights in `dtype`; norms and tables in fp32.

    openai-whisper casts these weights to the input's type at every call; once is enough.
    """
    for part in model.modules():
        if isinstance(part, torch.nn.Linear | torch.nn.Conv1d):
            part.to(dtype)
    return model

"""wav <-> codes with the codec bundled in the checkpoint.

The model is transformers' `HiggsAudioV2TokenizerModel`. Its topology and rates come from the
released v2 configuration (`codec_v2.json`; transformers' own defaults differ), its widths and layer
counts from the bundled tensors' shapes, and loading is strict: an engine that loads with
strict=False may run on random weights without a word (facts §1.3).

Encoding is fp32 with TF32 off, the reference for training data. HuBERT normalises over time and
convolutions see the edges, so plain padding changes codes: only clips of one length share a batch
of the model's own code. Other precisions, `ragged` batches of any lengths, and what runs on a GPU,
are in `codec_encoder` and `codec_fast`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import HiggsAudioV2TokenizerConfig, HiggsAudioV2TokenizerModel

from higgs_lab.checkpoint import CODEC_PREFIX, NativeFiles
from higgs_lab.codec_batches import batches, rounded
from higgs_lab.codec_encoder import embed_clips, semantic_frames, takes_lengths
from higgs_lab.codec_fast import run_dac
from higgs_lab.cost import free_gpu_memory
from higgs_lab.precision import arithmetic, exact_float32
from higgs_lab.vocab import CODEC_CONFIG

# In the v3 bundle, but not in the model: HuBERT's pre-training mask (facts §1.5).
MAY_BE_EXTRA = {"semantic_model.masked_spec_embed"}
ENCODE_BYTES_A_SECOND = 32e6  # of audio in TF32, in half precision half as many (bench_codec)
MIN_SAMPLES_SEC = 1.0  # shorter clips are zero-padded to it before encoding, as SGLang-Omni does


class Codec:
    """Frozen codec. codes are [T, K] int64 on the CPU, waves float32 numpy at `sample_rate_hz`."""

    def __init__(self, model: HiggsAudioV2TokenizerModel, hash: str):
        self.model = model.eval().requires_grad_(False)
        self.hash = hash  # of configuration and weights; codes of another hash are another language
        self.sample_rate_hz: int = model.config.sample_rate
        self.samples_per_frame: int = model.config.hop_length
        self.num_codebooks: int = model.config.num_quantizers
        self._agrees: dict[tuple, bool] = {}  # by shape and precision, see `_encode_batch`

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Codec:
        """Codec of a native checkpoint, or of a stand-alone `HiggsAudioV2TokenizerModel` folder.

        Raises ValueError when the checkpoint bundles no codec, or its keys are not exactly the
        model's.
        """
        path = Path(path)
        files = NativeFiles(path)
        bundled = files.keys(CODEC_PREFIX)
        prefix = CODEC_PREFIX if bundled else ""
        if not bundled and not any(k.startswith("quantizer.quantizers.0.") for k in files.keys()):
            raise ValueError(
                f"{path} bundles no codec (no key begins with {CODEC_PREFIX!r}): export it again "
                "from a base that does, or use the original checkpoint"
            )
        # clone: the tensors map the file, which an export may replace
        state = {k[len(prefix) :]: t.clone() for k, t in files.items(bundled or None)}
        given = path / ("audio_tokenizer/config.json" if bundled else "config.json")
        base = json.loads(given.read_text(encoding="utf-8")) if given.is_file() else CODEC_CONFIG
        config = codec_config(state, base)
        with torch.device("meta"):
            model = HiggsAudioV2TokenizerModel(HiggsAudioV2TokenizerConfig(**copy.deepcopy(config)))
        expected = model.state_dict()
        missing = sorted(set(expected) - set(state))
        extra = sorted(set(state) - set(expected) - MAY_BE_EXTRA)
        if missing or extra:
            raise ValueError(
                f"{path}: the codec's keys do not match; missing {missing[:3]} ({len(missing)}), "
                f"unknown {extra[:3]} ({len(extra)})"
            )
        wrong = [k for k, v in expected.items() if v.shape != state[k].shape]
        if wrong:
            k = wrong[0]
            raise ValueError(
                f"{path}: codec tensor {k!r} has shape {tuple(state[k].shape)}, the configuration "
                f"says {tuple(expected[k].shape)}"
            )
        digest = codec_hash(config, state)
        state = {k: t.to(dtype) for k, t in state.items() if k in expected}
        model.load_state_dict(state, strict=True, assign=True)
        return cls(model.to(device), digest)

    @property
    def device(self) -> torch.device:
        return self.model.fc.weight.device

    @property
    def takes_lengths(self) -> bool:
        """Whether clips of any length may share a batch."""
        return takes_lengths(self.model)

    @property
    def _shortest(self) -> int:
        return int(MIN_SAMPLES_SEC * self.sample_rate_hz)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.fc.weight.dtype

    def encode(self, wav: np.ndarray | Tensor) -> Tensor:
        """wav [n] mono at `sample_rate_hz` -> codes [T, K].

        T is ceil(n / samples_per_frame), sometimes one less.
        """
        return self.encode_batch([wav])[0]

    def encode_batch(
        self,
        wavs: Sequence[np.ndarray | Tensor],
        max_batch_sec: float | None = None,
        precision: str = "fp32",
        ragged: bool = False,
    ) -> list[Tensor]:
        """Same codes as one by one: only clips of equal sample count share a forward pass.

        On a GPU it is as long as whole seconds, of which nothing counts behind a clip's end; codes
        are those of the model's own code up to rounding there, which moves few.
        precision: one of `precision.PRECISIONS`; all but fp32 give some other codes
        (recipes/bench_codec.py).
        ragged: clips of any length share one, which is the same up to rounding: few codes change.
        max_batch_sec: of a pass, padding included; 0: one by one; none: 120, for ragged clips on a
        GPU up to 400, as its free memory allows.

        On a GPU the first batch of a shape is compared with its first, middle and last clip alone,
        and where they differ such batches are encoded one by one, with a warning.
        """
        clips = [self._check(wav) for wav in wavs]
        by_length: dict[int, list[int]] = defaultdict(list)
        for i, wav in enumerate(clips):
            by_length[max(len(wav), self._shortest)].append(i)
        codes: list[Tensor | None] = [None] * len(clips)
        second = self._planned(self.sample_rate_hz)
        fill = bool(second) and ragged
        if max_batch_sec is None:
            max_batch_sec = self._room_sec() if fill else 120
        if second and precision == "fp32" and not ragged and not self.takes_lengths:
            second, max_batch_sec = 0, 0.0  # by the model's own code, one by one
        most = int(max_batch_sec * self.sample_rate_hz)
        for part in batches(by_length, most, ragged, second, fill):
            lengths = [max(len(clips[i]), self._shortest) for i in part]
            longest = rounded(max(lengths), second)
            lengths += [longest] * (rounded(len(part), 1) - len(part) if fill else 0)  # of silence
            batch = self._batch([clips[i] for i in part], len(lengths), longest)
            made = self._encode_batch(batch, lengths, precision, len(part)).cpu()
            frames = semantic_frames(self.model, lengths)
            for i, row, count in zip(part, made, frames, strict=False):
                codes[i] = row[:count].clone()
        return codes  # type: ignore[return-value]

    def _encode_batch(
        self, batch: Tensor, lengths: list[int], precision: str, count: int
    ) -> Tensor:
        """`_encode` of a batch, of which `count` rows are clips; in TF32 what leaves fp16's range.

        cuDNN chooses kernels by shape, some of which were wrong (`convolution_by_product`). So at
        the first batch of a shape three of its clips must get the codes that they have alone; what
        spoils none of them is not seen.
        """

        def alone(i: int) -> Tensor:
            return self._encode_batch(batch[i : i + 1], lengths[i : i + 1], precision, 1)

        unknown = None if self._planned(1) and len(batch) > 1 else True
        while True:
            shape = (precision, *batch.shape, min(lengths) == batch.shape[1])
            agrees = self._agrees.get(shape, unknown)
            made = None if agrees is False else self._encode(batch, lengths, precision)
            if made is not None or agrees is False:
                break
            precision = "tf32"
        if agrees:
            return made
        found: dict[int, Tensor] = {}
        if made is not None:
            found = {i: alone(i) for i in sorted({0, count // 2, count - 1})}
            frames = semantic_frames(self.model, lengths)
            same = min((made[i, : frames[i]] == row[0, : frames[i]]).float().mean()
                       for i, row in found.items())  # fmt: skip
            # far below what bf16 moves, far above a wrong sum
            self._agrees[shape] = bool(same > 0.5)
            if self._agrees[shape]:
                return made
            warnings.warn(
                f"{count} clips of {batch.shape[1]} samples are wrong together on this GPU "
                f"({same:.0%} of the codes alone, {precision}): such are encoded one by one",
                stacklevel=3,
            )
        return torch.cat([found[i] if i in found else alone(i) for i in range(count)])

    @torch.inference_mode()
    def _encode(self, batch: Tensor, lengths: list[int], precision: str) -> Tensor | None:
        """[B, n] -> codes [B, T, K], or None for what leaves the range of fp16.

        On a CPU in fp32 by the model's own code if nothing is padded. The search is always exact.
        """
        own = not self._planned(1) or not self.takes_lengths
        with arithmetic(precision, self.device):
            if own and precision == "fp32" and min(lengths) == batch.shape[1]:
                return self.model.encode(batch[:, None]).audio_codes.transpose(1, 2).contiguous()
            hidden = embed_clips(self.model, batch, lengths)
        if precision == "fp16" and not bool(torch.isfinite(hidden).all()):
            return None
        with exact_float32():  # distances of codes near a cell's edge would be rounding errors
            hidden = self.model.fc(hidden).transpose(1, 2)
            codes = self.model.quantizer.encode(hidden, self.model.config.target_bandwidths[-1])
        return codes.permute(1, 2, 0).contiguous()  # [K, B, T]

    def _room_sec(self) -> float:
        """Seconds of audio that half of what is free on the GPU holds while they are encoded, at
        most 400."""
        free = free_gpu_memory(self.device)
        return min(400.0, max(30.0, free / 2 / ENCODE_BYTES_A_SECOND))

    def _planned(self, second: int) -> int:
        """`second` of `rounded` and `batches` where shapes shall be few, else 0."""
        return second if self.device.type == "cuda" else 0

    def decode(self, codes: Tensor) -> np.ndarray:
        """codes [T, K] -> float32 [T * samples_per_frame]; T = 0 gives an empty wave."""
        return self.decode_batch([codes])[0]

    def decode_batch(
        self,
        codes: Sequence[Tensor],
        max_batch_frames: int | None = None,
        ragged: bool = False,
        precision: str = "fp32",
    ) -> list[np.ndarray]:
        """Decode many clips; only equal lengths together, or ragged: any, which is the same up to
        rounding.

        max_batch_frames: of a batch, padding included; none: 4096, on a CPU 128. There a large
        batch gains nothing and loses much: the C library gives large tensors back to the system
        after every layer, which must then map and clear them anew.
        """
        max_batch_frames = max_batch_frames or (128 if self.device.type == "cpu" else 4096)
        by_length: dict[int, list[int]] = defaultdict(list)
        for i, clip in enumerate(codes):
            if clip.ndim != 2 or clip.shape[1] != self.num_codebooks:
                raise ValueError(
                    f"codes must be [T, {self.num_codebooks}], got {tuple(clip.shape)}"
                )
            if (
                clip.numel()
                and not 0 <= int(clip.min()) <= int(clip.max()) < self.model.config.codebook_size
            ):
                raise ValueError("codes hold special ids: undelay the rows first")
            by_length[len(clip)].append(i)
        waves: list[np.ndarray] = [np.zeros(0, np.float32)] * len(codes)
        by_length.pop(0, None)
        second = self._planned(self.sample_rate_hz // self.samples_per_frame)
        for part in batches(by_length, max_batch_frames, ragged, second):
            lengths = [len(codes[i]) for i in part]
            longest = rounded(max(lengths), second)
            rows = [torch.nn.functional.pad(codes[i].long().T, (0, longest - len(codes[i])))
                    for i in part]  # fmt: skip
            out = self._decode(torch.stack(rows).to(self.device), lengths, precision)
            for i, wave in zip(part, out.cpu().numpy(), strict=True):
                waves[i] = wave[: len(codes[i]) * self.samples_per_frame].copy()
        return waves

    @torch.inference_mode()
    def _decode(self, batch: Tensor, lengths: list[int], precision: str) -> Tensor:
        """[B, K, T] -> float32 [B, n]; on a CPU in fp32 by the model's own code, unpadded."""
        own = not self._planned(1)
        with arithmetic(precision, self.device, convolutions_alone=True):
            if own and precision == "fp32" and min(lengths) == batch.shape[2]:
                return self.model.decode(batch).audio_values[:, 0].float()
            with torch.autocast(self.device.type, enabled=False):  # little work, done well
                hidden = self.model.quantizer.decode(batch.transpose(0, 1))
                hidden = self.model.fc2(hidden.transpose(1, 2)).transpose(1, 2)
            on_gpu = hidden.is_cuda
            out = run_dac(self.model.acoustic_decoder, hidden, lengths, channels_last=on_gpu)
            out = out[:, 0].float()
        if precision == "fp16" and not bool(torch.isfinite(out).all()):
            return self._decode(batch, lengths, "tf32")
        return out

    def save_tokenizer_folder(self, out: str | Path) -> None:
        """Write the codec as a stand-alone `HiggsAudioV2TokenizerModel` folder in fp32.

        vLLM-Omni's clone encoder ignores the bundled codec and loads such a folder, named by
        HIGGS_AUDIO_TOKENIZER_PATH (higgs_audio_v2_tokenizer.py).
        """
        copy.deepcopy(self.model).float().save_pretrained(out)

    def _check(self, wav: np.ndarray | Tensor) -> np.ndarray:
        # numpy, on one core: torch splits so short an array over all cores of the host, and where
        # a container may use few of them, its threads wait for each other for milliseconds a call
        if isinstance(wav, Tensor):
            wav = wav.detach().to("cpu", torch.float32).numpy()
        wav = np.asarray(wav, np.float32)
        if wav.ndim != 1:
            raise ValueError(f"wav must be mono [n], got shape {wav.shape}: down-mix it first")
        if len(wav) == 0 or not np.isfinite(wav).all():
            raise ValueError("wav is empty or holds NaN or infinite samples")
        return wav

    def _batch(self, clips: list[np.ndarray], rows: int, length: int) -> Tensor:
        """[rows, length] on the device, silence behind what is shorter and where no clip is."""
        on_gpu = self.device.type == "cuda"
        batch = torch.empty(rows, length, pin_memory=on_gpu)
        batch[len(clips) :] = 0
        for row, clip in zip(batch.numpy(), clips, strict=False):
            row[: len(clip)], row[len(clip) :] = clip, 0
        return batch.to(self.device, non_blocking=on_gpu).to(self.dtype)


def codec_config(state: dict[str, Tensor], base: dict) -> dict:
    """`base` with every width and layer count replaced by what the tensors' shapes say."""
    config = copy.deepcopy(base)
    acoustic, semantic = config["acoustic_model_config"], config["semantic_model_config"]
    try:
        acoustic["encoder_hidden_size"] = state["acoustic_encoder.conv1.weight"].shape[0]
        acoustic["hidden_size"] = state["acoustic_encoder.conv2.weight"].shape[0]
        acoustic["decoder_hidden_size"] = state["acoustic_decoder.conv1.weight"].shape[0]
        width = state["semantic_model.encoder.layer_norm.weight"].shape[0]
        feed = state["semantic_model.encoder.layers.0.feed_forward.intermediate_dense.weight"]
        position = state[
            "semantic_model.encoder.pos_conv_embed.conv.parametrizations.weight.original1"
        ]
        embed = state["quantizer.quantizers.0.codebook.embed"]
    except KeyError as error:
        raise ValueError(
            f"the codec lacks {error}: its tensors are not of a Higgs v2 tokenizer"
        ) from None
    if semantic.get("hidden_size") != width:
        # Head count leaves no trace in shapes; HuBERT keeps 64 channels a head.
        semantic["num_attention_heads"] = max(1, width // 64)
    semantic["hidden_size"], semantic["intermediate_size"] = width, feed.shape[0]
    semantic["num_hidden_layers"] = _count(state, "semantic_model.encoder.layers.")
    convolutions = _count(state, "semantic_model.feature_extractor.conv_layers.")
    semantic["conv_dim"] = [
        state[f"semantic_model.feature_extractor.conv_layers.{i}.conv.weight"].shape[0]
        for i in range(convolutions)
    ]
    semantic["num_conv_pos_embeddings"] = position.shape[2]
    semantic["num_conv_pos_embedding_groups"] = width // position.shape[1]
    config["codebook_size"], config["codebook_dim"] = embed.shape
    return config


def _count(state: dict[str, Tensor], prefix: str) -> int:
    return 1 + max(int(k[len(prefix) :].split(".")[0]) for k in state if k.startswith(prefix))


def codec_hash(config: dict, state: dict[str, Tensor]) -> str:
    """16 hex digits over configuration and tensors, whatever the file or the stored dtype.

    Values are hashed in fp32, so that a bf16 bundle and its fp32 `audio_tokenizer/` copy agree.
    """
    keep = ("sample_rate", "semantic_sample_rate", "downsample_factor", "target_bandwidths")
    digest = hashlib.sha256(json.dumps({k: config[k] for k in keep}, sort_keys=True).encode())
    for key in sorted(set(state) - MAY_BE_EXTRA):
        digest.update(key.encode())
        digest.update(state[key].detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]

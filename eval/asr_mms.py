"""MMS (or any Wav2Vec2 model with adapters) through transformers: CTC letters, greedy.

One model, a small adapter and an alphabet per language; facebook/mms-1b-all has 1,162 of them,
under a non-commercial licence. It writes no punctuation and no capitals, and has no language model:
expect spelling errors where Whisper would know the word.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eval.asr import SAMPLE_RATE_HZ, Recognizer, Transcript, compression_ratio
from eval.languages import language
from higgs_lab.runlog import files_hash

DEFAULT = "facebook/mms-1b-all"
BATCH_SEC = 320.0  # of padded sound at once on a GPU
CPU_BATCH_SEC = 40.0


class MmsRecognizer(Recognizer):
    """A Wav2Vec2ForCTC with adapters. batch: clips at once; None goes by their length.

    commit: of a hub name, so that adapters come from the same revision as the model.
    """

    def __init__(self, model, tokenizer, extractor, name: str, batch=None, commit=None):
        self.model, self.tokenizer, self.extractor = model, tokenizer, extractor
        self.name, self.batch, self._commit = name, batch, commit
        self._source = Path(model.config._name_or_path)
        self._adapter: str | None = None

    def hears(self, lang: str) -> bool:
        """Whether there is an alphabet and, in a folder, an adapter's file."""
        code = language(lang).mms
        if code is None or code not in self.tokenizer.vocab:
            return False
        names = (f"adapter.{code}.safetensors", f"adapter.{code}.bin")
        return not self._source.is_dir() or any((self._source / name).is_file() for name in names)

    def transcribe_all(
        self, wavs: Sequence[np.ndarray], langs: Sequence[str]
    ) -> list[Transcript | None]:
        """Words of many clips; the adapter changes with the language, so hand them over sorted."""
        found: list[Transcript | None] = [None] * len(wavs)
        by_code: dict[str, list[int]] = {}
        for i, lang in enumerate(langs):
            if self.hears(lang):
                by_code.setdefault(language(lang).mms, []).append(i)
        for code, members in by_code.items():
            self._speak(code)
            members.sort(key=lambda i: -len(wavs[i]))  # little padding
            while members:
                size = self.batch or self._fitting(len(wavs[members[0]]))
                now, members = members[:size], members[size:]
                heard = self._decode([wavs[i] for i in now])
                for i, transcript in zip(now, heard, strict=True):
                    found[i] = transcript
        return found

    def _fitting(self, samples: int) -> int:
        on_cpu = self.model.device.type == "cpu"
        return max(1, int((CPU_BATCH_SEC if on_cpu else BATCH_SEC) * SAMPLE_RATE_HZ / samples))

    def _speak(self, code: str) -> None:
        """Take a language's adapter and alphabet."""
        if code != self._adapter:
            self.model.load_adapter(code, force_load=True, revision=self._commit)
            self.tokenizer.set_target_lang(code)
            self._adapter = code

    def _decode(self, wavs: Sequence[np.ndarray]) -> list[Transcript]:
        import torch

        inputs = self.extractor(
            [np.asarray(wav, dtype=np.float32) for wav in wavs],
            sampling_rate=SAMPLE_RATE_HZ,
            padding=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        with torch.inference_mode():
            values = inputs.input_values.to(self.model.device, self.model.dtype)
            mask = inputs.attention_mask.to(self.model.device)
            best = self.model(values, attention_mask=mask).logits.float().log_softmax(-1).max(-1)
            frames = self.model._get_feat_extract_output_lengths(mask.sum(-1)).tolist()
        transcripts = []
        blank = self.tokenizer.pad_token_id
        columns = best.indices.cpu(), best.values.cpu(), frames
        for ids, logprobs, count in zip(*columns, strict=True):
            ids, logprobs = ids[:count], logprobs[:count]
            text = self._text(ids.tolist())
            letters = logprobs[ids != blank]
            transcripts.append(
                Transcript(
                    text=text,
                    avg_logprob=float(letters.mean()) if len(letters) else None,
                    compression_ratio=compression_ratio(text),
                )
            )
        return transcripts

    def _text(self, ids: list[int]) -> str:
        """CTC: repeats are one letter, blanks part them; then the marks that are no letters go."""
        tokens = self.tokenizer.convert_ids_to_tokens(ids)
        text = self.tokenizer.convert_tokens_to_string(tokens)["text"]
        for mark in (self.tokenizer.unk_token, self.tokenizer.bos_token, self.tokenizer.eos_token):
            text = text.replace(mark, "") if mark else text
        return " ".join(text.split())


def mms_details(spec: str, source: str, fp16: bool = False) -> dict:
    """`revision` is a hash of the folder's files, or the commit of a hub name."""
    import importlib.metadata

    _, commit, revision = _resolve(source, spec)
    return {
        "name": spec if source else f"mms:{DEFAULT}",
        "revision": commit or revision,
        "package": f"transformers {importlib.metadata.version('transformers')}",
        "precision": "fp16" if fp16 else "fp32",
        "options": "adapter and alphabet by language, greedy CTC",
    }


def load_mms(
    spec: str,
    source: str = "",
    device: str | None = None,
    fp16: bool = False,
    batch: int | None = None,
) -> MmsRecognizer:
    """Load a folder or hub name ("org/name" or "org/name@revision"; "" is facebook/mms-1b-all).

    Raises FileNotFoundError or ValueError for what is no Wav2Vec2 model with adapters.
    """
    import torch
    from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

    from higgs_lab.device import chosen_device

    device = chosen_device(device)
    if fp16 and device.type == "cpu":
        raise ValueError("fp16 recognition needs a GPU: leave it off on a CPU")
    path, commit, _ = _resolve(source, spec)
    at = {"revision": commit} if commit else {}
    flat = f"recogniser {spec!r} has no adapters by language: give a model like {DEFAULT}"
    try:
        model = Wav2Vec2ForCTC.from_pretrained(path, **at)
        extractor = Wav2Vec2FeatureExtractor.from_pretrained(path, **at)
    except (OSError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"recogniser {spec!r} cannot be loaded as a Wav2Vec2 CTC model: {error}"
        ) from error
    try:
        tokenizer = Wav2Vec2CTCTokenizer.from_pretrained(path, **at)
    except KeyError as error:  # one alphabet for all, and no key of the language it names
        raise ValueError(flat) from error
    nested = all(isinstance(alphabet, dict) for alphabet in tokenizer.vocab.values())
    if model.config.adapter_attn_dim is None or not nested:
        raise ValueError(flat)
    model.eval().to(device, torch.float16 if fp16 else torch.float32)
    return MmsRecognizer(model, tokenizer, extractor, spec, batch, commit)


def _resolve(source: str, spec: str) -> tuple[str, str | None, str | None]:
    """What from_pretrained is given, the commit of a hub name, the hash of a folder."""
    source = source or DEFAULT
    folder = Path(source)
    if folder.is_dir():
        if not (folder / "vocab.json").is_file():
            raise FileNotFoundError(
                f"recogniser {spec!r}: {folder} has no vocab.json; give an MMS model's folder"
            )
        return str(folder), None, _hash(folder)
    if source.startswith(("/", ".", "~")) or source.count("/") != 1:
        raise FileNotFoundError(
            f"recogniser {spec!r}: {source} is neither a folder nor a hub name like {DEFAULT}"
        )
    from huggingface_hub import hf_hub_download

    name, _, wanted = source.partition("@")
    config = Path(hf_hub_download(name, "config.json", revision=wanted or None))
    return name, config.parent.name, None  # the snapshot folder is named by its commit


def _hash(folder: Path) -> str:
    suffixes = (".json", ".safetensors", ".bin")
    return files_hash((p for p in folder.iterdir() if p.suffix in suffixes), folder)

"""Native checkpoint directories <-> `Talker`, through one key table.

Native layout (facts §1.2): `tied.embedding.*`, `body.*`, the codec under
`tied.embedding.modality_embeddings.0.model.*`, and physically, though not in the index, two tied
copies `tied.head.*`. Every key is read or refused by name; saving gives back exactly the keys,
dtypes and shapes of the base it started from, and an index that lists all codec keys
(sglang-omni audio_codec.py::load_codec_state_dict reads only what the index lists).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from higgs_lab.runlog import atomic_path, write_json_atomic
from higgs_lab.safetensors_stream import SafetensorsReader, SafetensorsWriter
from higgs_lab.talker import Talker, talker_config

# native prefix -> Talker prefix. Longest first, so that the codec is never taken for the table.
CODEC_PREFIX = "tied.embedding.modality_embeddings.0.model."
KEY_TABLE = {
    "tied.embedding.text_embedding.": "model.embed_tokens.",
    "tied.embedding.modality_embeddings.0.embedding.": "codebooks.",
    "body.": "model.",
}
# Copies of the two embeddings; readers may use either, so they are refreshed on every save.
TIED_COPIES = {
    "tied.head.text_head.weight": "tied.embedding.text_embedding.weight",
    "tied.head.modality_heads.0.weight": "tied.embedding.modality_embeddings.0.embedding.weight",
}
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this disk."""

    path: Path
    name: str  # as the user gave it, without the revision
    revision: str | None = None  # commit, for hub checkpoints


def resolve_checkpoint(name: str | Path) -> Checkpoint:
    """ "nano", a directory, or a hub name "org/model" or "org/model@revision" -> files on disk.

    Raises FileNotFoundError with what was tried when it is neither.
    """
    name = str(name)
    if name == "nano":
        from higgs_lab.nano import nano_checkpoint

        path = nano_checkpoint()
        return Checkpoint(path, "nano", path.name)
    if Path(name).is_dir():
        return Checkpoint(Path(name).resolve(), name)
    repo, _, revision = name.partition("@")
    if repo.count("/") != 1 or repo.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"{name!r} is no directory on this disk and no hub name of the form org/model@revision"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.jinja", "*.safetensors", "audio_tokenizer/*", "LICENSE*", "NOTICE*"]
    try:
        path = Path(snapshot_download(repo, revision=revision or None, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"the hub model {name!r} could not be fetched and is not in the local cache: {error}"
        ) from error
    return Checkpoint(path, repo, path.name)  # a snapshot folder is named by its commit


def to_talker_key(key: str) -> str | None:
    """Talker key of a native key; None for codec keys and tied copies; ValueError when unknown."""
    if key.startswith(CODEC_PREFIX) or key in TIED_COPIES:
        return None
    adapter = "lora_" in key or "base_layer" in key or key.startswith("base_model.")
    for native, ours in KEY_TABLE.items():
        if key.startswith(native) and not adapter:
            found = ours + key[len(native) :]
            if to_native_key(found) == key:  # body.embed_tokens would pass for the text table
                return found
    hint = ""
    if adapter:
        hint = ": an unmerged adapter; merge it with `python -m serve.export`"
    elif key.startswith(("model.", "audio_embedding.", "audio_head.")):
        hint = ": the key of a Hugging Face port; convert it with `python -m serve.export --from`"
    raise ValueError(f"unexpected checkpoint key {key!r}{hint}")


def to_native_key(key: str) -> str:
    """Native key of a Talker key."""
    tables = {ours: native for native, ours in KEY_TABLE.items()}
    for ours in sorted(tables, key=len, reverse=True):
        if key.startswith(ours):
            return tables[ours] + key[len(ours) :]
    raise KeyError(f"the talker has no native name for {key!r}")


# What other projects call the same modules: the Hugging Face port (its class
# HiggsMultimodalQwen3ForConditionalGeneration), and a LoRA on its bare backbone. The port ties
# audio_head to audio_embedding.
FOREIGN = {
    "audio_embedding.": "codebooks.",
    "audio_head.": "codebooks.",
    "embed_tokens.": "model.embed_tokens.",
    "layers.": "model.layers.",
    "norm.": "model.norm.",
}
WRAPPERS = ("base_model.model.", "module.", "_orig_mod.")  # PEFT, DDP, torch.compile


def foreign_native_key(key: str) -> str:
    """Native key of a weight by any name that is known: native, Talker's, the port's, wrapped.

    KeyError when none fits. Whether a model of this size has the weight is for the caller to see.
    """
    name = key.replace("_orig_mod.", "")
    while wrapper := next((w for w in WRAPPERS if name.startswith(w)), None):
        name = name.removeprefix(wrapper)
    if name.startswith((*KEY_TABLE, CODEC_PREFIX)):
        return name
    if name in TIED_COPIES:
        return TIED_COPIES[name]
    for theirs, ours in FOREIGN.items():
        if name.startswith(theirs):
            name = ours + name[len(theirs) :]
            break
    return to_native_key(name)


class NativeFiles:
    """Read access to all tensors of a native directory, shard by shard, nothing kept in memory."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.files = sorted(p.name for p in self.path.glob("*.safetensors"))
        if not self.files:
            raise FileNotFoundError(
                f"{self.path} holds no *.safetensors: not a checkpoint directory"
            )
        self.shard: dict[str, str] = {}  # key -> file
        for file in self.files:
            with self._open(file) as tensors:
                for key in tensors.keys():
                    if key in self.shard:
                        raise ValueError(f"{self.path}: {key!r} is in {self.shard[key]} and {file}")
                    self.shard[key] = file
        self.indexed = self._read_index()

    def _open(self, file: str):
        try:
            return safe_open(self.path / file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{self.path / file} cannot be read ({error}): the file is cut or damaged, "
                "fetch or write it again"
            ) from error

    def _read_index(self) -> dict[str, str]:
        """weight_map of the index; what is on disk when there is no index."""
        index = self.path / INDEX
        if not index.is_file():
            return {k: f for k, f in self.shard.items() if k not in TIED_COPIES}
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        lost = sorted(k for k, f in weight_map.items() if self.shard.get(k) != f)
        if lost:
            raise ValueError(
                f"{index} lists {len(lost)} tensors that are not in the file it names, "
                f"such as {lost[0]!r}: a shard is missing or truncated"
            )
        return weight_map

    def keys(self, prefix: str = "") -> list[str]:
        return [k for k in self.shard if k.startswith(prefix)]

    def items(self, keys: list[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """(key, tensor) in file order; each file is opened once."""
        wanted = None if keys is None else set(keys)
        for file in self.files:
            with self._open(file) as tensors:
                for key in tensors.keys():
                    if wanted is None or key in wanted:
                        yield key, tensors.get_tensor(key)

    def first_row(self, key: str) -> Tensor:
        """The first row of a matrix, all of a vector, read alone."""
        with self._open(self.shard[key]) as tensors:
            part = tensors.get_slice(key)
            return part[:1] if len(part.get_shape()) > 1 else tensors.get_tensor(key)

    def same(self, a: str, b: str, rows: int = 8192) -> bool:
        """Whether two tensors are equal bit for bit, read in pieces."""
        with self._open(self.shard[a]) as left, self._open(self.shard[b]) as right:
            one, two = left.get_slice(a), right.get_slice(b)
            if one.get_shape() != two.get_shape() or one.get_dtype() != two.get_dtype():
                return False
            pieces = range(0, one.get_shape()[0], rows)
            return all(torch.equal(one[i : i + rows], two[i : i + rows]) for i in pieces)

    def specs(self, file: str) -> dict[str, tuple[str, list[int]]]:
        """key -> (safetensors dtype name, shape) of one file, in the order of its bytes."""
        with self._open(file) as tensors:
            slices = {key: tensors.get_slice(key) for key in tensors.offset_keys()}
            return {key: (s.get_dtype(), s.get_shape()) for key, s in slices.items()}


def read_config(path: str | Path) -> dict:
    """config.json of a native directory, checked to be one."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: {path} is not a native Higgs checkpoint")
    config = json.loads(file.read_text(encoding="utf-8"))
    for part in ("text_config", "audio_encoder_config"):
        if part not in config:
            raise ValueError(f"{file} has no {part!r}: not a Higgs TTS 3 checkpoint")
    for part in ("text_config", "audio_encoder_config"):
        if not config[part].get("tie_word_embeddings", True):
            raise ValueError(
                f"{file}: {part}.tie_word_embeddings is false; an untied head is not supported (it "
                "would be saved as a copy of the embedding), no released checkpoint has one"
            )
    return config


def load_talker(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Talker:
    """Talker of a native directory, in eval mode, in the stored dtype unless another is asked for.

    Raises ValueError naming the key when one is missing, unknown or of another shape.
    """
    config = read_config(path)
    audio = config["audio_encoder_config"]
    files = NativeFiles(path)
    with torch.device("meta"):
        talker = Talker(
            talker_config(config["text_config"]), audio["num_codebooks"], audio["vocab_size"]
        )
    expected = {k: tuple(p.shape) for k, p in talker.state_dict().items()}
    state: dict[str, Tensor] = {}
    wanted = {key: ours for key in files.keys() if (ours := to_talker_key(key)) is not None}
    missing = sorted(set(expected) - set(wanted.values()))
    if missing:
        raise ValueError(
            f"{files.path} lacks {len(missing)} tensors, the first is {to_native_key(missing[0])!r}"
        )
    for key, tensor in files.items(list(wanted)):
        ours = wanted[key]
        if ours not in expected:
            raise ValueError(f"{files.path}: {key!r} does not belong to a model of this config")
        if tuple(tensor.shape) != expected[ours]:
            raise ValueError(
                f"{files.path}: {key!r} has shape {tuple(tensor.shape)}, the config says "
                f"{expected[ours]}"
            )
        state[ours] = tensor.to(device=device, dtype=dtype or tensor.dtype)
    talker.load_state_dict(state, assign=True, strict=True)
    talker.materialize_rope(device)
    return talker.eval()


Edit = Callable[[str, Tensor], Tensor]


def rewrite_native(base: str | Path, out: str | Path, edit: Edit, extra_files: bool = True) -> None:
    """Copy a native directory tensor by tensor, `edit(key, tensor)` in between; atomic.

    Keys, dtypes, shapes and shards stay those of the base (an edited tensor is cast to the stored
    dtype); tied copies are refreshed from the edited embeddings; the index lists what the base's
    did and every codec key. Peak memory is one tensor (two for a tied copy), not one shard.
    """
    rewrite_many(base, [(out, edit)], extra_files)


def rewrite_many(
    base: str | Path, targets: Sequence[tuple[str | Path, Edit]], extra_files: bool = True
) -> None:
    """`rewrite_native` for several (out, edit) in one pass over the base: all of them or none.

    An edit gets the tensor that the next edit gets too: it returns another, never changes it.
    """
    base = Path(base)
    files = NativeFiles(base)
    with ExitStack() as stack:
        outs = [stack.enter_context(atomic_path(Path(out))) for out, _ in targets]
        for out in outs:
            out.mkdir()
        readers = {
            file: stack.enter_context(SafetensorsReader(base / file)) for file in files.files
        }
        for file in files.files:
            specs = files.specs(file)
            with ExitStack() as shard:
                writers = [
                    shard.enter_context(SafetensorsWriter(out / file, specs, {"format": "pt"}))
                    for out in outs
                ]
                for key in specs:
                    source = TIED_COPIES.get(key, key)
                    tensor = readers[files.shard[source]].read(source)
                    for writer, (_, edit) in zip(writers, targets, strict=True):
                        writer.write(key, _edited(edit, source, tensor))
        for out in outs:
            listed = {k: files.shard[k] for k in files.shard if k in files.indexed or _codec(k)}
            total = sum((out / file).stat().st_size for file in files.files)
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(listed.items()))}
            write_json_atomic(out / INDEX, index)
            if extra_files:
                copy_side_files(base, out)


def _edited(edit: Edit, key: str, tensor: Tensor) -> Tensor:
    new = edit(key, tensor)
    if new.shape != tensor.shape:
        raise ValueError(f"{key!r} became {tuple(new.shape)}, the base has {tuple(tensor.shape)}")
    return new.to(dtype=tensor.dtype, device="cpu")


def _codec(key: str) -> bool:
    return key.startswith(CODEC_PREFIX)


def copy_side_files(base: Path, out: Path) -> None:
    """Everything a checkpoint needs beside its tensors: config, tokenizer, template, licence."""
    for file in sorted(base.iterdir()):
        skip = file.suffix == ".safetensors" or file.name in (INDEX, "README.md", "export.json")
        if file.is_file() and not skip and not file.name.startswith("."):
            shutil.copyfile(file, out / file.name)


def save_native(talker: Talker, base: str | Path, out: str | Path) -> None:
    """Write the talker's weights as a native directory with the key set of `base`; atomic."""
    state = talker.state_dict()

    def edit(key: str, tensor: Tensor) -> Tensor:
        ours = to_talker_key(key)
        if ours is not None and ours not in state:
            raise ValueError(f"the base {base} has {key!r}, the talker does not: another model")
        return tensor if ours is None else state[ours]

    unknown = sorted(set(state) - {to_talker_key(k) for k in NativeFiles(base).keys()})
    if unknown:
        raise ValueError(f"the base {base} has no key for {unknown[0]!r}: merge adapters first")
    rewrite_native(base, out, edit)

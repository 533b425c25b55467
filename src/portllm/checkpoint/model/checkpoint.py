"""A checkpoint: named tensors in files, their configuration, and their roles in the model."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from portllm.checkpoint.model.equality import TakenForEqual, look_same
from portllm.checkpoint.model.experts import Experts, experts_of, parameters_of
from portllm.checkpoint.model.families import Family, family_of
from portllm.checkpoint.model.names import EMBEDDING_SUFFIX, HEAD, HEAD_MODULE, is_embedding
from portllm.checkpoint.tensor.encoding import schemes_of
from portllm.checkpoint.tensor.info import FLOAT_DTYPES, TensorInfo
from portllm.errors import CheckpointError, MissingTensorError, Refusal
from portllm.files.source import RemoteFile, Source

CONFIG_FILE = "config.json"


MAX_NAME_LENGTH = 250
"""Of a model of the hub, with its revision; a name there has 96 characters at most."""


SIDE_SUFFIXES = (".json", ".jinja", ".model", ".tiktoken", ".txt")
"""What belongs to a model besides its weights: index, configuration, tokenizer."""


HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?P<revision>@(?!.*\.\.)\w[\w./-]*)?")


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk or on the Hub, opened lazily.

    The roles of its tensors in the model are computed on first use and cached. No byte of a tensor is read for them
    except by `tied_embedding`, which reads samples.

    Attributes:
        name: Its name, as given by the user, in messages and in `patch.json`.
        folder: Its folder, or None for a single file given by itself and for a model that stays on the hub.
        infos: Every tensor by name, sorted by name.
        config: `config.json`, or an empty mapping where there is none.
        metadata: String metadata of the first file's header.
        revision: The commit hash of a model of the hub, else None.
    """

    name: str
    folder: Path | None
    infos: Mapping[str, TensorInfo]
    config: Mapping[str, object] = field(repr=False)
    metadata: Mapping[str, str] = field(repr=False)
    revision: str | None = None

    def __repr__(self) -> str:
        return f"Checkpoint({self.name!r}, {len(self.infos)} tensors, {self.n_params:,} numbers)"

    @property
    def files(self) -> tuple[Source, ...]:
        """The files that hold the tensors, sorted."""
        return tuple(sorted({info.file for info in self._stored}, key=str))

    @property
    def is_remote(self) -> bool:
        """Whether its tensors are read over the network; `portllm.checkpoint.hub.download` brings them here."""
        return any(isinstance(file, RemoteFile) for file in self.files)

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.n_bytes for info in self._stored)

    @property
    def n_params(self) -> int:
        """Elements of all tensors."""
        return sum(info.n_params for info in self.infos.values())

    @property
    def quantization(self) -> str | None:
        """How its weights are quantized, such as `nf4-double` or `Q4_K, Q6_K`; None where its bytes are its values."""
        return schemes_of(info.encoding for info in self.infos.values())

    @property
    def float_dtypes(self) -> frozenset[str]:
        """The floating-point dtypes that its tensors have."""
        return frozenset(info.dtype for info in self.infos.values()) & frozenset(FLOAT_DTYPES)

    @property
    def _stored(self) -> Iterator[TensorInfo]:
        for info in self.infos.values():
            yield info
            yield from (part for _, part in info.parts)

    def info(self, name: str) -> TensorInfo:
        """One tensor's description.

        Raises:
            MissingTensorError: There is no such tensor; the message names the nearest ones.
        """
        if name not in self.infos:
            tail = name.rsplit(".", 2)[-2:]
            near = [other for other in self.infos if other.endswith(".".join(tail))][:3]
            hint = f" Similar names: {', '.join(near)}." if near else ""
            raise MissingTensorError(f"'{name}': {self.name} has no such tensor among its {len(self.infos)}.{hint}")
        return self.infos[name]

    @cached_property
    def family(self) -> Family | None:
        """The family that the model is of; None for one that is not known."""
        return family_of(self.config)

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by its current name, sorted; as stored for a model whose family is not known.

        Raises:
            CheckpointError: The checkpoint holds one tensor in two spellings.
        """
        tensors: dict[str, TensorInfo] = {}
        for name, stored in sorted((self.current_name(name), name) for name in self.infos):
            if name in tensors:
                raise CheckpointError(
                    f"'{name}': {self.name} has {tensors[name].name} and {stored}, which are two names of the "
                    "same tensor. Save the model again with only one of them."
                )
            tensors[name] = self.infos[stored]
        return tensors

    def current_name(self, name: str) -> str:
        """The current name of a tensor or module, however it is spelled."""
        return name if self.family is None else self.family.current_name(name)

    def stored(self, name: str) -> TensorInfo | None:
        """The tensor that a name means, in whatever spelling either is; None where the file has none.

        Raises:
            CheckpointError: As `tensors`.
        """
        return self.infos.get(name) or self.tensors.get(self.current_name(name))

    def tensor(self, name: str) -> TensorInfo | None:
        """The tensor that a patch means by a name; a tied head is the embedding, stored or not."""
        found = self.stored(name)
        is_head = name == HEAD or (found is not None and found is self.head)
        return self.tied_embedding or found if is_head else found

    @cached_property
    def embedding(self) -> TensorInfo | None:
        """The input embedding: where the model's family has it, or where the checkpoint names it in the usual way."""
        found = None if self.family is None else self.stored(self.family.embedding)
        return found or next((info for name, info in self.infos.items() if name.endswith(EMBEDDING_SUFFIX)), None)

    @cached_property
    def head(self) -> TensorInfo | None:
        """The output head, where the file has one."""
        return self.stored(HEAD if self.family is None else self.family.head)

    @cached_property
    def tied_embedding(self) -> TensorInfo | None:
        """The embedding that is the head too: one matrix for both; None for a model with a head of its own.

        A file may hold a tied head once (no `lm_head.weight`) or twice (the same numbers under that name, in the same
        or in another floating-point dtype): both are the same model, with one identity. So a head that is not in the
        file is tied. One that is there is tied where the configuration says so and it looks like the embedding by
        samples of both; a tied model that was trained on with a head of its own does not. A run for which every number
        of them counts compares the two whole: see `stored_twice`.
        """
        if self.embedding is None or self.head is None:
            return self.embedding
        return self.embedding if self._says_tied and look_same(self.head, self.embedding) else None

    @property
    def stored_twice(self) -> tuple[TakenForEqual, ...]:
        """The head that is stored beside the embedding it is taken to be tied to, for `require_equal`."""
        if self.head is None or self.tied_embedding is None:
            return ()
        reason = (
            f"config.json of {self.name} ties it to {self.tied_embedding.name}, and samples of both are equal, "
            "but the full matrices differ. If the head is separate, set tie_word_embeddings to false there; "
            "otherwise save the model again with one matrix for both."
        )
        return (TakenForEqual(self.head, self.tied_embedding, Refusal(self.head.name, reason)),)

    @cached_property
    def own_tensors(self) -> Mapping[str, TensorInfo]:
        """The tensors that make the model what it is, by current name: all but a stored copy of a tied embedding."""
        if self.head is None or self.tied_embedding is None:
            return self.tensors
        return {name: info for name, info in self.tensors.items() if info is not self.head}

    @cached_property
    def matrices(self) -> Mapping[str, TensorInfo]:
        """The weight of every linear module and embedding, by the module's current name; a tied head has one too."""
        weights = {
            name.removesuffix(".weight"): info
            for name, info in self.tensors.items()
            if name.endswith(".weight") and len(info.shape) == 2
        }
        return weights if self.tied_embedding is None else {**weights, HEAD_MODULE: self.tied_embedding}

    @cached_property
    def linear(self) -> Mapping[str, TensorInfo]:
        """The weight of every linear module, by its current name; that of a tied head is the embedding."""
        return {module: info for module, info in self.matrices.items() if self.is_linear(module)}

    def is_linear(self, module: str) -> bool:
        """Whether a module with a matrix is a linear layer."""
        return not is_embedding(module) if self.family is None else self.family.is_linear(module)

    def is_transposed(self, module: str) -> bool | None:
        """Whether a linear module's weight is stored as (d_in, d_out); None where that is not known."""
        return None if self.family is None else self.family.is_transposed(module)

    @property
    def expert_parts(self) -> Mapping[str, tuple[str, ...]]:
        """By the name of a tensor of all experts, the modules of one that it is made of; empty for a model without."""
        return {} if self.family is None else self.family.experts

    def is_of_expert(self, module: str) -> bool:
        """Whether a module is a part of one of many experts."""
        return self.family is not None and self.family.is_of_expert(module)

    @cached_property
    def experts(self) -> Mapping[str, Experts]:
        """The matrices of each expert, by the current name that the tensor of all experts has or would have."""
        return experts_of(self.tensors, self.family)

    @cached_property
    def parameters(self) -> frozenset[str]:
        """Every tensor that is not one matrix or vector of a module, and experts as one, by current name."""
        return parameters_of(self.tensors, self.family)

    @property
    def _says_tied(self) -> bool:
        """What the configuration says; models of vision and text may say it in the part about text."""
        config = self.config
        if "tie_word_embeddings" not in config and isinstance(inner := config.get("text_config"), dict):
            config = inner
        return config.get("tie_word_embeddings") is True


def names_hub(where: str | Path) -> bool:
    """Whether a name means a repository of the hub: `org/name@revision`, or `org/name` that can be no path.

    Where there is a folder `org`, `org/name` is a path, perhaps a mistyped one, and is not sent over the network.

    Example:
        >>> [names_hub(name) for name in ("org/name", "org/name@main", "models/m.safetensors", "./org/name")]
        [True, True, False, False]
    """
    match = HUB_ID.fullmatch(str(where))
    if match is None or len(str(where)) > MAX_NAME_LENGTH:
        return False
    if os.path.exists(where) or str(where).endswith(".safetensors"):
        return False
    return match["revision"] is not None or not os.path.exists(Path(where).parent)

"""A checkpoint: named tensors in files, their configuration, and their roles in the model."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from portllm.checkpoint.model.class_names import known_part, paths_in
from portllm.checkpoint.model.equality import TakenForEqual, look_same
from portllm.checkpoint.model.experts import Experts, experts_of, parameters_of
from portllm.checkpoint.model.families import WEIGHT, Family, families_of
from portllm.checkpoint.model.names import EMBEDDING_SUFFIX, HEAD, is_embedding
from portllm.errors import CheckpointError, MissingTensorError, Refusal
from portllm.files.source import RemoteFile, Source
from portllm.tensors.encoding import is_plain, schemes_of
from portllm.tensors.info import FLOAT_DTYPES, TensorInfo

CONFIG_FILE = "config.json"

SIDE_SUFFIXES = (".json", ".jinja", ".model", ".tiktoken", ".txt")
"""What belongs to a model besides its weights: index, configuration, tokenizer."""


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
        asks: Whether the transformers installed here is asked of a model type that is in no table.
    """

    name: str
    folder: Path | None
    infos: Mapping[str, TensorInfo]
    config: Mapping[str, object] = field(repr=False)
    metadata: Mapping[str, str] = field(repr=False)
    revision: str | None = None
    asks: bool = field(default=True, repr=False)

    def __repr__(self) -> str:
        return f"Checkpoint({self.name!r}, {len(self.infos)} tensors, {self.n_params:,} numbers)"

    @cached_property
    def files(self) -> tuple[Source, ...]:
        """The files that hold the tensors, sorted."""
        return tuple(sorted({info.file for info in self._stored}, key=str))

    @cached_property
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
    def is_quantized(self) -> bool:
        """Whether weights are stored as anything but numbers, in whatever order these are."""
        return any(info.encoding is not None and not is_plain(info.encoding) for info in self.infos.values())

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
        """What is known of the class that the model was saved from; None where its type is not known."""
        return next(iter(self._families), None)

    @cached_property
    def _families(self) -> tuple[Family, ...]:
        """The classes that the model may be loaded into; a model of vision and text as a text model too."""
        inner = self.config.get("text_config")
        of_text = {"model_type": inner.get("model_type")} if isinstance(inner, dict) else {}
        return (*families_of(self.config, ask=self.asks), *families_of(of_text, ask=self.asks))

    @cached_property
    def listed(self) -> "Checkpoint":
        """The same model as the table of model types alone knows it: an identity depends on nothing installed."""
        listed = replace(self, asks=False)
        return self if listed._families == self._families else listed

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by its current name, sorted.

        It is the stored one where the running model has the tensor in another form (see `converted`), and where the
        model's type is not known.

        Raises:
            CheckpointError: The checkpoint holds one tensor in two spellings.
        """
        tensors: dict[str, TensorInfo] = {}
        converted = set(self.converted.values())
        named = ((stored if stored in converted else name, stored) for stored, name in self._names.items())
        for name, stored in sorted(named):
            if name in tensors:
                raise CheckpointError(
                    f"'{name}': {self.name} has {tensors[name].name} and {stored}, which are two names of the "
                    "same tensor. Save the model again with only one of them."
                )
            tensors[name] = self.infos[stored]
        return tensors

    @cached_property
    def converted(self) -> Mapping[str, str]:
        """By what the running model has in their place, the stored tensors that transformers makes it of."""
        found: dict[str, str] = {}
        for stored, name in self._names.items():
            if self.family is None:
                break
            conversion = self.family.conversion_of(name) or self.family.conversion_of(stored)
            # Experts that are stacked or transposed are the same numbers in another place: see `experts`.
            if conversion is not None and not conversion.keeps_values:
                found |= dict.fromkeys(conversion.made(name), stored)
        return found

    @cached_property
    def _names(self) -> Mapping[str, str]:
        """By its stored name, what each tensor would be called if the running model had it as it is."""
        return {stored: self._renamed(stored) for stored in self.infos}

    def current_name(self, name: str) -> str:
        """The current name of a tensor or module, however it is spelled, in whichever class the model is loaded."""
        if name not in self._current_names:
            self._current_names[name] = self._current_name(name)
        return self._current_names[name]

    @cached_property
    def _current_names(self) -> dict[str, str]:
        """Those that were asked for: every patch of a model asks for the same ones."""
        return {}

    def _current_name(self, name: str) -> str:
        current = self._renamed(name)
        if self.family is None or self._has(current):
            return current
        asked = [current, *[name] * len(self._spoken[1:])]
        known = [known_part(path, spoken) for path, spoken in zip(asked, self._spoken, strict=True)]
        number = max(range(len(known)), key=lambda number: len(known[number]), default=0)
        if not number:
            return current
        return self._spoken[number][known[number]] + name.removeprefix(known[number])

    def running(self, names: Iterable[str]) -> Mapping[str, TensorInfo]:
        """What the class whose names these are loads, by its own names; a tied head has one too.

        An adapter says what it changes in the words of the class that it was trained with. Of a model of vision and
        text that may be a text model, which loads a part of the tensors, under other names.
        """
        names = list(names)
        spoken = max(self._spoken, key=lambda known: sum(name in known for name in names), default=None)
        if spoken is None:
            found = dict(self.tensors)
        else:
            found = {name: self.tensors[current] for name, current in spoken.items() if current in self.tensors}
        return found if self.tied_embedding is None else {**found, self.head_name: self.tied_embedding}

    @cached_property
    def _spoken(self) -> tuple[Mapping[str, str], ...]:
        """For each class the current names by those of the class, of all that it loads, and of each path to that."""
        return tuple(
            paths_in(family, tensors=self.tensors, saved=self.family, config=self.config) for family in self._families
        )

    def _renamed(self, name: str) -> str:
        return name if self.family is None else self.family.current_name(name)

    def _has(self, current: str) -> bool:
        return current in self.tensors or current + WEIGHT in self.tensors or current == self.head_name

    def stored(self, name: str) -> TensorInfo | None:
        """The tensor that a name means, in whatever spelling either is; None where the file has none.

        Raises:
            CheckpointError: As `tensors`.
        """
        if name in self.infos:
            return self.infos[name]
        current = self.current_name(name)
        same = {} if self.family is None else self.family.same
        return self.tensors.get(current) or self.tensors.get(same.get(current, ""))

    def tensor(self, name: str) -> TensorInfo | None:
        """The tensor that a patch means by a name; a tied head is the embedding, stored or not."""
        found = self.stored(name)
        return self.tied_embedding or found if self.is_head(name) else found

    def is_running(self, module: str) -> bool:
        """Whether a class that the model is loaded into has a module of this very name, or the model without a head."""
        if f"{module}{WEIGHT}" in self._head_names:
            return True
        return any(
            module in known or f"{family.prefix}.{module}" in known
            for family, known in zip(self._families, self._spoken, strict=True)
        )

    def is_head(self, name: str) -> bool:
        """Whether a name means the output head, in whichever of the model's classes."""
        return name in self._head_names or self.current_name(name) == self.head_name

    @cached_property
    def _head_names(self) -> frozenset[str]:
        return frozenset(family.head for family in self._families if family.head is not None) or frozenset({HEAD})

    @cached_property
    def embedding(self) -> TensorInfo | None:
        """The input embedding: where the running model has it, or, of an unknown type, where it usually is."""
        if self.family is not None:
            return None if self.family.embedding is None else self.stored(self.family.embedding)
        return next((info for name, info in self.infos.items() if name.endswith(EMBEDDING_SUFFIX)), None)

    def is_by_token(self, tensor: TensorInfo | None) -> bool:
        """Whether a tensor has a row for each token: embedding, head, or the head's bias."""
        return tensor is not None and any(tensor is other for other in self._by_token)

    @cached_property
    def _by_token(self) -> tuple[TensorInfo | None, ...]:
        return self.embedding, self.head, self.stored(f"{self.head_module}.bias")

    @cached_property
    def head_name(self) -> str:
        """What the output head is called, whether the model has one of its own, a tied one or none."""
        return HEAD if self.family is None or self.family.head is None else self.family.head

    @cached_property
    def head_module(self) -> str:
        """The module of `head_name`."""
        return self.head_name.removesuffix(WEIGHT)

    @cached_property
    def head(self) -> TensorInfo | None:
        """The output head, where the file has one."""
        if self.family is None:
            return self.infos.get(HEAD)
        return None if self.family.head is None else self.tensors.get(self.family.head)

    @cached_property
    def tied_embedding(self) -> TensorInfo | None:
        """The embedding that is the head too: one matrix for both; None for a model with a head of its own, or none.

        A file may hold a tied head once (no `lm_head.weight`) or twice (the same numbers under that name, in the same
        or in another floating-point dtype): both are the same model, with one identity. So a head that is not in the
        file is tied, unless the configuration denies it. One that is there is tied where the configuration says so and
        it looks like the embedding by samples of both; a tied model that was trained on with a head of its own does
        not. A run for which every number of them counts compares the two whole: see `stored_twice`.
        """
        if self.family is not None and self.family.ties is None:
            return None
        says = self.says_tied
        if self.embedding is None or self.head is None:
            return None if says is False and self.family is not None else self.embedding
        default = self.family is not None and self.family.ties is not None and self.family.ties.default
        is_said = default if says is None else says
        return self.embedding if is_said and look_same(self.head, self.embedding) else None

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
            name.removesuffix(WEIGHT): info
            for name, info in self.tensors.items()
            if name.endswith(WEIGHT) and len(info.shape) == 2
        }
        return weights if self.tied_embedding is None else {**weights, self.head_module: self.tied_embedding}

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

    def has_transposed_experts(self, name: str) -> bool:
        """Whether a tensor of all experts has their weights as (d_in, d_out), in the file."""
        end = ".".join(name.split(".")[-2:])
        if self.family is None:
            return False
        axis, stored, embedding = self.family.widths.get(end), self.stored(name), self.embedding
        is_swapped = False
        if axis is not None and stored is not None and embedding is not None:
            is_swapped = stored.shape[axis] != embedding.shape[1]
        return self.family.parameters.get(end, False) != is_swapped

    def why_converted(self, name: str) -> str | None:
        """Why a change of what the running model calls so has no place in the file; None where it has one."""
        stored = self.converted.get(self.current_name(name))
        if stored is None:
            return None
        return (
            f"transformers makes it of '{stored}' when it loads {self.name}, by more than a new name, and the change "
            "is not converted back here. Save the model with save_pretrained(save_original_format=False) and use that."
        )

    @property
    def why_unknown(self) -> str:
        """What is to be said where the model's type is not known."""
        model_type = self.config.get("model_type")
        if not isinstance(model_type, str):
            return f"config.json of {self.name} names no model type"
        return f"the model type '{model_type}' of {self.name} is not known here, nor to the installed transformers"

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
    def rows_reach_head(self) -> bool:
        """Whether rows of a tied embedding that PEFT trains are the head's too."""
        return self.family is None or self.family.ties is None or self.family.ties.is_seen_by_peft

    @property
    def untied_config(self) -> dict[str, object]:
        """The fields of the configuration of the same model with a head of its own."""
        changes: dict[str, object] = {"tie_word_embeddings": False}
        deciding = () if self.family is None or self.family.ties is None else self.family.ties.parts[:1]
        for name, part in self.config.items():
            if isinstance(part, dict) and ("tie_word_embeddings" in part or name in deciding):
                changes[name] = {**part, "tie_word_embeddings": False}
        return changes

    @property
    def says_tied(self) -> bool | None:
        """What the configuration says; models of vision and text may say it in the part about text."""
        if self.family is not None:
            return self.family.says_tied(self.config)
        inner = self.config.get("text_config")
        of_text = inner.get("tie_word_embeddings") if isinstance(inner, dict) else None
        said = self.config.get("tie_word_embeddings", of_text)
        return said if isinstance(said, bool) else None

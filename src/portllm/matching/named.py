"""What an adapter's configuration names in a model, held against what the patch has."""

from collections.abc import Collection, Iterator

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.errors import Refusal
from portllm.matching.changes import changes_of
from portllm.patch.adapter_tensors import BIAS, WEIGHT
from portllm.patch.patch import Patch
from portllm.tensors.info import TensorInfo


class Named:
    """What a patch's configuration names in a model."""

    def __init__(self, patch: Patch[TensorInfo], checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.config = config = patch.config
        self.tied = checkpoint.tied_embedding
        named = [*patch.deltas, *(name for name in changes_of(patch) if not name.endswith(WEIGHT)), *patch.values]
        self.tensors = checkpoint.running([*named, *patch.experts])
        modules = [*self._matrices(), *patch.deltas]
        self.targets = {*config.targets(modules), *(m for m in modules if "weight" in config.parameters_of(m))}
        if config.means_all_linear:  # but for the head, which PEFT knows from the model
            self.targets -= {module for module in modules if checkpoint.is_head(module + WEIGHT)}
        if self._ties_head_to(self.targets):
            self.targets.add(checkpoint.head_module)

    def _matrices(self) -> list[str]:
        return [
            name.removesuffix(WEIGHT)
            for name, info in self.tensors.items()
            if name.endswith(WEIGHT) and len(info.shape) == 2
        ]

    def saves(self, tensor: str) -> bool:
        """Whether it names a tensor as one that is saved whole."""
        is_twin = (
            self.config.keeps_ties("modules_to_save") and self.tied is not None and self.checkpoint.is_head(tensor)
        )
        return self.config.saves(tensor) or (is_twin and self.tied is not None and self.config.saves(self.tied.name))

    def trains_bias(self, tensor: str, info: TensorInfo) -> bool:
        """Whether it names a tensor as a bias that is trained."""
        if not tensor.endswith(BIAS) or len(info.shape) != 1:
            return False
        of_target = self.config.biases == "lora_only" and tensor.removesuffix(BIAS) in self.targets
        return self.config.biases == "all" or of_target

    def row_modules(self) -> list[str]:
        """The embeddings, by any name that PEFT takes, of which it names rows."""
        tokens = self.config.fields.get("trainable_token_indices")
        if not isinstance(tokens, dict):
            return [""] if tokens else []
        names = [name for name, rows in tokens.items() if rows]
        # One of two tied modules stands for both where they have the same rows.
        head = next((name for name in names if f".{self.checkpoint.head_module}".endswith(f".{name}")), None)
        twins = [name for name in names if name != head and tokens[name] == tokens.get(head)]
        return [name for name in names if not (self.tied is not None and twins and name == head)]

    def _ties_head_to(self, modules: Collection[str]) -> bool:
        if not self.config.keeps_ties("target_modules") or self.tied is None:
            return False
        return any(self.checkpoint.tensor(module + WEIGHT) is self.tied for module in modules)


def unnamed(patch: Patch[TensorInfo], named: Named) -> Iterator[Refusal]:
    """What the patch has and the configuration does not name."""
    for module in patch.deltas:
        if module not in named.targets:
            yield Refusal(
                module,
                "the patch has tensors for it, but adapter_config.json does not name it, so PEFT would silently "
                "ignore them. Add it to target_modules, or remove the tensors.",
            )
    for name in patch.values:
        if named.checkpoint.is_head(name) and not named.saves(name):
            yield Refusal(
                name,
                "the patch has a value for it because it was tied to the embedding, and ensure_weight_tying is "
                f"set; in {named.checkpoint.name} it is not tied. Add {named.checkpoint.head_module} to "
                "modules_to_save.",
            )
    for name in patch.rows:
        module = name.removesuffix(WEIGHT)
        is_input = named.checkpoint.stored(name) is named.checkpoint.embedding
        tokens = patch.config.fields.get("trainable_token_indices")
        is_named = isinstance(tokens, dict) and any(f".{module}".endswith(f".{key}") for key in tokens)
        if not (is_named or (is_input and not isinstance(tokens, dict))):
            yield Refusal(
                module,
                "the patch has token rows for it, but trainable_token_indices does not name it (without a name, it "
                "means the embedding), so PEFT would ignore them.",
            )


def missing(patch: Patch[TensorInfo], named: Named) -> Iterator[Refusal]:
    """What the configuration names, the model has and the patch lacks."""
    model = named.checkpoint
    infos = named.tensors
    deltas, values, targets = (
        set(map(model.current_name, part)) for part in (patch.deltas, patch.values, named.targets)
    )
    if not any(map(model.is_of_expert, deltas)):
        # One expert is a module of its own in a file, and in the model that transformers 4 builds; not in today's.
        targets = {module for module in targets if not model.is_of_expert(module)}
    expected = [module for module in targets if not named.saves(module + WEIGHT) and module not in deltas]
    expected += [
        name
        for name, info in infos.items()
        if model.current_name(name) not in values
        and model.current_name(name.removesuffix(WEIGHT)) not in deltas
        and (named.saves(name) or named.trains_bias(name, info))
    ]
    of_rows = [name.removesuffix(WEIGHT) for name in patch.rows]
    expected += [
        f"trainable_token_indices {name}".strip()
        for name in named.row_modules()
        if not any(not name or module == name or module.endswith(f".{name}") for module in of_rows)
    ]
    for name in sorted(expected):
        yield Refusal(
            name,
            f"adapter_config.json names it and {named.checkpoint.name} has it, but the patch has no tensors for "
            "it. Part of the adapter is missing, or it was made for another model.",
        )


def shared_rows(patch: Patch[TensorInfo], named: Named) -> Iterator[Refusal]:
    """Trained rows of a tied embedding are the head's too, so nothing else may be done to the head."""
    if named.tied is None or not any(named.checkpoint.tensor(name) is named.tied for name in patch.rows):
        return
    head = named.checkpoint.head_module
    if head in patch.deltas or head + WEIGHT in patch.values:
        yield Refusal(
            head,
            "the patch changes it and trained token rows of the embedding, which it is tied to in "
            f"{named.checkpoint.name}; PEFT would overwrite rows of the changed head. This combination is not "
            "supported.",
        )

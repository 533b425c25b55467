"""Where in a model a tensor stands: its layer, and which kind of module it belongs to. From its name alone. Pure."""

import re
from dataclasses import dataclass

_LAYER = re.compile(r"^(?:(.*?)\.)?(\d+)\.(.*)$")
_NUMBER = re.compile(r"\.\d+(?=\.)")


@dataclass(frozen=True, slots=True, order=True)
class TensorPlace:
    """The place of a tensor.

    Attributes:
        stack: What its layer is one of, such as `model.layers`; empty for a tensor of no layer.
        layer: Number of the layer; -1 for a tensor of no layer.
        kind: What it is within its layer, the same for all layers and all experts: `self_attn.q_proj`.
        is_expert: Whether it belongs to one of many experts of its layer.
    """

    stack: str
    layer: int
    kind: str
    is_expert: bool = False

    @property
    def is_matrix(self) -> bool:
        """Whether it is neither a bias nor the weight of a norm, by its name."""
        return not self.kind.endswith(("norm", ".bias"))


def place_of(name: str) -> TensorPlace:
    """The place of a tensor, from its current name.

    Example:
        >>> place_of("model.layers.3.mlp.experts.17.up_proj.weight")
        TensorPlace(stack='model.layers', layer=3, kind='mlp.experts.up_proj', is_expert=True)
        >>> place_of("model.layers.0.self_attn.q_proj.bias")
        TensorPlace(stack='model.layers', layer=0, kind='self_attn.q_proj.bias', is_expert=False)
        >>> place_of("model.embed_tokens.weight").kind
        'model.embed_tokens'
    """
    name = name.removesuffix(".weight")
    found = _LAYER.match(name)
    if found is None:
        return TensorPlace("", -1, name)
    kind, numbers = _NUMBER.subn("", found[3])
    return TensorPlace(found[1] or "", int(found[2]), kind, numbers > 0)

"""A model in shards: its index, and the tensors of all of them."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from portllm.checkpoint.safetensors.bitsandbytes import joined
from portllm.checkpoint.safetensors.header import Header
from portllm.checkpoint.safetensors.scaled import scaled_joined
from portllm.errors import IndexFileError, MissingShardError
from portllm.files.json_file import read_json
from portllm.tensors.bytes import read_spans
from portllm.tensors.info import TensorInfo


def read_weight_map(index: Path) -> dict[str, str]:
    """Which shard holds which tensor, as an index file says.

    Raises:
        IndexFileError: It says nothing of the kind, or names something else than a file beside it.
    """
    weight_map = read_json(index, error=IndexFileError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise IndexFileError(f"'{index}': has no 'weight_map' of tensor names to files. Save the model again.")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise IndexFileError(
                f"'{index}': tensor '{tensor}' is mapped to {shard!r}, which is not the name of a .safetensors "
                "file beside the index."
            )
    return weight_map


def require_shards(weight_map: Mapping[str, str], *, where: str, there: Iterable[str]) -> list[str]:
    """The shards of an index, sorted.

    Raises:
        MissingShardError: Not all of them are among the files that are `there`.
    """
    shards = sorted(set(weight_map.values()))
    missing = sorted(set(shards) - set(there))
    if missing:
        raise MissingShardError(
            f"'{where}': {len(missing)} of {len(shards)} shards are missing, first '{missing[0]}': the copy is not "
            f"complete. Download the rest: hf download ORG/NAME --local-dir {where}"
        )
    return shards


def join_shards(
    weight_map: Mapping[str, str], headers: Mapping[str, Header], config: Mapping[str, object], *, index: str
) -> tuple[Mapping[str, TensorInfo], Mapping[str, str]]:
    """Every tensor of a sharded model, and the first shard's metadata.

    A tensor that no index lists belongs to the model: who loads it reads every tensor of every shard.

    Raises:
        IndexFileError: The index lists a tensor that is not there, or a tensor is in several shards.
    """
    infos: dict[str, TensorInfo] = {}
    holders: dict[str, str] = {}
    for shard, header in headers.items():
        for tensor, info in header.tensors.items():
            listed = weight_map.get(tensor, shard)
            if tensor in infos or listed != shard:
                other = holders.get(tensor, listed)
                raise IndexFileError(
                    f"'{index}': tensor '{tensor}' is in '{shard}' and in '{other}'"
                    f"{_listing(weight_map.get(tensor))}. Programs differ in which of the two they load: save the "
                    "model again with save_pretrained, or download it again."
                    if other in headers and tensor in headers[other].tensors
                    else f"'{index}': tensor '{tensor}' is in '{shard}', but the index lists it in '{listed}'. The "
                    "shards are of several versions, or the index is: download the model again."
                )
            infos[tensor] = info
            holders[tensor] = shard
    unheld = sorted(set(weight_map) - set(infos))
    if unheld:
        raise IndexFileError(
            f"'{index}': {len(unheld)} tensors are in no shard, first '{unheld[0]}' (mapped to "
            f"'{weight_map[unheld[0]]}')."
        )
    return tensors_of(infos, config), next(iter(headers.values())).metadata


def tensors_of(infos: Mapping[str, TensorInfo], config: Mapping[str, object]) -> Mapping[str, TensorInfo]:
    """The tensors of a model, sorted by name, from those that its files list: a quantized weight is several of these.

    Raises:
        CheckpointError: The parts of a quantized weight do not fit each other.
    """
    return scaled_joined(joined({name: infos[name] for name in sorted(infos)}, read_spans), config, read_spans)


def _listing(shard: str | None) -> str:
    return ", and the index lists it nowhere" if shard is None else f"; the index lists '{shard}'"

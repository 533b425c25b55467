"""Rivals that read no prompts, measured on them beside addition, with the numbers of an aligned port."""

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from portllm.capturing.stored_values import StoredValues
from portllm.files.output_folder import resumable_folder
from portllm.matching.changes import oriented
from portllm.matching.port_plan import PortPlan
from portllm.methods.add import add
from portllm.methods.align import ADD
from portllm.methods.measured import Measured, measures
from portllm.methods.table import METHODS
from portllm.methods.values import Values
from portllm.patch.patch import Patch
from portllm.porting.domain import Domain
from portllm.porting.inputs import gather
from portllm.porting.unfinished import Unfinished
from portllm.tensors.info import TensorInfo


def measure_ports(
    plan: PortPlan, domain: Domain, ports: Mapping[str, Patch[TensorInfo]]
) -> dict[str, dict[str, float]]:
    """By name, what an aligned port says of itself, said of other ports of the same patch.

    Args:
        plan: Of the patch and both models.
        domain: The prompts.
        ports: Patches of the evolved model, however they came to be.
    """
    with (
        tempfile.TemporaryDirectory(prefix="portllm-compare-") as scratch,
        resumable_folder(Path(scratch) / "written", overwrite=True, plan="compare") as staged,
    ):  # what the models write is written once for all of them, and kept there
        patch, inputs = gather(replace(plan, method=METHODS["align"]), domain, Unfinished(staged))
        if inputs.streams is None:
            raise AssertionError("align asks for streams")
        made: dict[str, Patch[Values]] = {ADD: add(patch, inputs).patch}
        made |= {name: oriented(each, plan.evolved).mapped(StoredValues) for name, each in ports.items()}
        found = {name: Measured.of(name, inputs.streams(each)) for name, each in made.items()}
        return {name: measures(found, name) for name in ports}

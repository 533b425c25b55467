"""The workers of a study on a Ray cluster: one a device, a GPU each where there are some."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from portllm.errors import WorkersError
from portllm.files.kept_results import versions
from portllm.running.model import Device
from portllm.study.schedule.ledger import Ledger
from portllm.study.schedule.shared import leave_mark
from portllm.study.schedule.worker import Assignment, StepWorker
from portllm.workers.on_ray import ClusterRequest, Machine, OnRay
from portllm.workers.pool import Pool


def open_cluster(address: str, ledger: Ledger, *, data: Path | None, device: Device, workers: int | None) -> Pool:
    """The workers for what is left of a study.

    Args:
        address: As `ray.init` takes it.
        ledger: What is done, and where.
        data: The folder that the study's data lie in.
        device: Where models run.
        workers: How many; None for one a device.

    Raises:
        MissingExtraError: Ray is not installed.
        WorkersError: There is no cluster at the address, or no GPU where one is asked for.
    """
    assignment = Assignment(
        study=ledger.study,
        out=ledger.places.out,
        mark=leave_mark(ledger.places.out),
        data=data,
        device=device,
        identities=ledger.identities,
        versions=versions(),
    )
    n_steps = len(ledger.left())
    return OnRay(
        address,
        partial(StepWorker, assignment),
        lambda machines: one_a_device(machines, device, workers=workers, n_steps=n_steps),
        own_cores=None if workers is None else max(workers, os.cpu_count() or 1),
    )


def one_a_device(machines: Sequence[Machine], device: Device, *, workers: int | None, n_steps: int) -> ClusterRequest:
    """What to ask of a cluster: for each worker a GPU and its share of the cores, or on CPUs a machine of its own.

    With more `workers` than machines on CPUs, those of a machine share its cores; more than there are GPUs are not had.

    Args:
        machines: What the cluster has.
        device: `auto` takes GPUs where there are some.
        workers: How many; None for one a device.
        n_steps: No more than there are steps.

    Raises:
        WorkersError: There is no machine, or no GPU where one is asked for.

    Example:
        >>> one_a_device([Machine(16, 4), Machine(16, 4)], "auto", workers=None, n_steps=99)
        ClusterRequest(workers=8, cores=4, gpus=1, memory=0)
        >>> one_a_device([Machine(16, 0), Machine(8, 0)], "auto", workers=None, n_steps=99)
        ClusterRequest(workers=2, cores=8, gpus=0, memory=0)
        >>> one_a_device([Machine(8, 0)], "cpu", workers=3, n_steps=99)
        ClusterRequest(workers=3, cores=2, gpus=0, memory=0)
    """
    with_gpu = [machine for machine in machines if machine.gpus]
    if device == "cuda" and not with_gpu:
        raise WorkersError("device 'cuda': no machine of the cluster has a GPU. Use 'cpu' or 'auto'.")
    if with_gpu and device != "cpu":
        n_gpus = sum(machine.gpus for machine in with_gpu)
        cores = min(machine.cores // machine.gpus for machine in with_gpu)
        return ClusterRequest(min(workers or n_gpus, n_gpus, n_steps), max(1, cores), gpus=1)
    if not machines:
        raise WorkersError("no machine of the cluster has a free core. Check 'ray status', or run without --ray.")
    n_workers = min(workers or len(machines), n_steps)
    on_one = -(-n_workers // len(machines))
    return ClusterRequest(n_workers, max(1, min(machine.cores for machine in machines) // on_one))

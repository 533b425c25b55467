"""How a study shares the devices of a cluster, and what it refuses."""

import pytest

from portllm.errors import WorkersError
from portllm.study.schedule.cluster import one_a_device
from portllm.workers.on_ray import ClusterRequest, Machine

TWO, FOUR_GPUS = Machine(2, 0), Machine(64, 4)


def share(*machines, device="auto", workers=None, n_steps=99):
    return one_a_device(machines, device, workers=workers, n_steps=n_steps)


def test_gpus_are_taken_where_there_are_some_and_no_worker_has_two():
    assert share(FOUR_GPUS, TWO) == ClusterRequest(4, cores=16, gpus=1)
    assert share(FOUR_GPUS, device="cuda", workers=9) == ClusterRequest(4, cores=16, gpus=1)
    assert share(FOUR_GPUS, workers=2) == ClusterRequest(2, cores=16, gpus=1)


def test_on_cpus_a_worker_has_a_machine_and_more_workers_share_its_cores():
    assert share(FOUR_GPUS, TWO, device="cpu") == ClusterRequest(2, cores=2)
    assert share(TWO, TWO, workers=4) == ClusterRequest(4, cores=1)
    assert share(TWO, workers=9) == ClusterRequest(9, cores=1)


def test_no_more_workers_are_asked_for_than_there_are_steps():
    assert share(FOUR_GPUS, n_steps=1).workers == share(TWO, TWO, n_steps=1).workers == 1


def test_a_cluster_without_what_is_asked_for_is_refused():
    with pytest.raises(WorkersError, match="no machine of the cluster has a GPU"):
        share(TWO, device="cuda")
    with pytest.raises(WorkersError, match="has a free core"):
        share()

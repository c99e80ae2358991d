import pytest

from hpo.errors import UsageError
from hpo.executors.local import num_cores, worker_devices


def test_auto_is_one_worker_on_each_core_without_a_gpu_and_one_on_each_gpu() -> None:
    assert worker_devices(["cpu"], None, "auto") == ["cpu"] * num_cores()
    assert worker_devices(["cuda:0", "cuda:1"], None, "auto") == ["cuda:0", "cuda:1"]


def test_n_means_n_also_beyond_the_devices() -> None:
    assert worker_devices(["cpu"], None, "9") == ["cpu"] * 9
    assert worker_devices(["cuda:0", "cuda:1"], None, "3") == ["cuda:0", "cuda:1", "cuda:0"]


def test_devices_can_be_chosen() -> None:
    assert worker_devices(["cuda:0", "cuda:1"], "cuda:1", "auto") == ["cuda:1"]
    assert worker_devices(["cuda:0"], "cpu", "2") == ["cpu", "cpu"]


@pytest.mark.parametrize("workers", ["0", "-1", "many", "1.5", ""])
def test_a_number_of_workers_that_is_none_is_refused(workers: str) -> None:
    with pytest.raises(UsageError, match="--workers"):
        worker_devices(["cpu"], None, workers)


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(UsageError, match="no device 'cuda:7'"):
        worker_devices(["cuda:0"], "cuda:7", "auto")

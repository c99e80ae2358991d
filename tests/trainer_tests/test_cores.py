"""Cores by the quotas of a container, read from trees of files as Linux has them."""

from pathlib import Path

import pytest

from hpo.executors import local
from trainer import cores

V2 = "36 25 0:31 {root} {point} rw,nosuid shared:9 - cgroup2 cgroup2 rw\n"
V1 = "36 25 0:31 {root} {point} rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
OTHER = (
    "24 1 0:23 / /proc rw - proc proc rw\n37 25 0:32 / /sys/memory rw - cgroup cgroup rw,memory\n"
)


class Machine:
    """A /proc/self and its hierarchy of cgroups in a folder of the test."""

    def __init__(self, folder: Path, mount: str, membership: str, root: str = "/") -> None:
        self.point = folder / "the cgroups"
        self.proc = folder / "proc"
        self.proc.mkdir()
        self.point.mkdir()
        escaped = str(self.point).replace(" ", r"\040")
        mountinfo = OTHER + mount.format(root=root, point=escaped)
        (self.proc / "mountinfo").write_text(mountinfo)
        (self.proc / "cgroup").write_text(membership)

    def limit(self, below: str, **files: str) -> None:
        """Write cpu.max and the like in a folder below the mount point."""
        folder = self.point / below
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / f"cpu.{name}").write_text(content)

    def quota(self) -> float | None:
        return cores.cpu_quota(self.proc)


def test_version_2_has_quota_and_period_in_one_file(tmp_path: Path) -> None:
    machine = Machine(tmp_path, V2, "0::/app\n")
    assert machine.quota() is None
    machine.limit("app", max="150000 100000\n")
    assert machine.quota() == 1.5
    machine.limit("app", max="max 100000\n")
    assert machine.quota() is None


def test_version_1_has_a_file_each(tmp_path: Path) -> None:
    machine = Machine(tmp_path, V1, "4:memory:/app\n3:cpuacct,cpu:/app\n1:name=systemd:/x\n0::/y\n")
    machine.limit("app", cfs_quota_us="50000\n", cfs_period_us="100000\n")
    assert machine.quota() == 0.5
    machine.limit("app", cfs_quota_us="-1\n")
    assert machine.quota() is None


@pytest.mark.parametrize(("own", "above", "quota"), [("4", "2", 2), ("1", "2", 1), ("max", "3", 3)])
def test_the_least_of_a_cgroup_and_those_above_it_counts(
    tmp_path: Path, own: str, above: str, quota: float
) -> None:
    machine = Machine(tmp_path, V2, "0::/slice/pod/app\n")
    machine.limit("slice/pod/app", max=f"{own} 1")
    machine.limit("slice/pod", max="max 100000")
    machine.limit("slice", max=f"{above} 1")
    machine.limit("another", max="1 100")
    assert machine.quota() == quota


def test_a_container_sees_its_own_cgroup_at_the_mount_point(tmp_path: Path) -> None:
    path = "/docker/1234"
    for number, root in enumerate((path, "/docker/other", "/")):
        folder = tmp_path / str(number)
        folder.mkdir()
        machine = Machine(folder, V1, f"3:cpu,cpuacct:{path}\n", root)
        machine.limit("", cfs_quota_us="300000", cfs_period_us="100000")
        assert machine.quota() == 3


def test_a_cgroup_outside_of_the_namespace_is_not_looked_for_outside(tmp_path: Path) -> None:
    machine = Machine(tmp_path, V2, "0::/../../etc\n")
    (tmp_path.parent / "etc").mkdir(exist_ok=True)
    (tmp_path.parent / "etc" / "cpu.max").write_text("1 100")
    machine.limit("", max="200000 100000")
    assert machine.quota() == 2


@pytest.mark.parametrize("content", ["", "max", "nan x", "-5 100", "100 0", "inf 1", "\0\0 1"])
def test_what_makes_no_sense_is_no_limit(tmp_path: Path, content: str) -> None:
    machine = Machine(tmp_path, V2, "0::/app\nnonsense\n:\n")
    machine.limit("app", max=content)
    assert machine.quota() is None


def test_without_cgroups_there_is_no_limit(tmp_path: Path) -> None:
    assert cores.cpu_quota(tmp_path / "nothing") is None


@pytest.mark.parametrize(
    ("quota", "number"), [(None, 8), (0.1, 1), (1.0, 1), (1.5, 2), (2.0, 2), (7.2, 8), (64.0, 8)]
)
def test_as_many_cores_as_the_quota_fills_decide_on_workers_and_threads(
    quota: float | None, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "cores", lambda: list(range(8)))
    monkeypatch.setattr(cores, "cpu_quota", lambda: quota)
    assert cores.num_cores() == local.num_cores() == number
    assert local.worker_devices(["cpu"], None, "auto") == ["cpu"] * number

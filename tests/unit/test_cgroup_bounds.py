"""What the kernel limits, as against what it was asked to: version 1 in a container, version 2, and no group at all."""

from __future__ import annotations

import os
from pathlib import Path

from remoted.api.health import check_groups
from remoted.cgroup import Bounds, Group
from remoted.scopes import managed

ASKED = Bounds(memory_bytes=1 << 30, cpus=0.5, tasks=100)
SERVICE, MEMORY, CPU = "/system.slice/remoted.service", Path("/cg/memory"), Path("/cg/cpu")


def group(folder: Path, **files: str) -> Group:
    """With one process, ours, and what the kernel shows."""
    for name, text in {"cgroup.procs": f"{os.getpid()}\n", **{name.replace("__", "."): text for name, text in files.items()}}.items():
        (folder / name).write_text(text, encoding="ascii")
    return Group("w1", (folder,))


def test_t43_controllers_that_a_container_sees_and_may_not_use_are_not_systemds() -> None:
    """As in systemd-nspawn on a host with version 1: hierarchies are mounted, and systemd makes groups in its own only."""
    mounted = {MEMORY: {"memory"}, CPU: {"cpu"}}

    assert list(managed(mounted, {"name=systemd": SERVICE, "memory": "/", "cpu": "/", "": SERVICE})) == []
    assert list(managed(mounted, {"name=systemd": SERVICE, "memory": SERVICE, "cpu": "/"})) == [(MEMORY, {"memory"})]
    assert list(managed({CPU: {"cpu", "pids"}}, {"name=systemd": SERVICE, "cpu": SERVICE, "pids": SERVICE})) == [(CPU, {"cpu", "pids"})]


def test_of_version_2_its_own_list_counts(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpu memory\n", encoding="ascii")

    assert list(managed({tmp_path: {""}}, {"": SERVICE})) == [(tmp_path, {"", "cpu", "memory"})]


def test_a_group_that_the_kernel_limits_is_bounded(tmp_path: Path) -> None:
    assert group(tmp_path, memory__max="1073741824\n", cpu__max="50000 100000\n", pids__max="100\n").unbounded(ASKED) == frozenset()


def test_a_group_without_files_or_with_no_limit_in_them_is_not_bounded(tmp_path: Path) -> None:
    assert group(tmp_path).unbounded(ASKED) == {"memory", "cpu", "pids"}
    assert group(tmp_path).unbounded(Bounds(tasks=1)) == {"pids"}
    assert group(tmp_path, memory__max="max\n", cpu__max="max 100000\n", pids__max="max\n").unbounded(ASKED) == {"memory", "cpu", "pids"}


def test_version_1_has_other_words_for_no_limit(tmp_path: Path) -> None:
    assert group(tmp_path, memory__limit_in_bytes="9223372036854771712\n", cpu__cfs_quota_us="-1\n", pids__max="7\n").unbounded(ASKED) == {"memory", "cpu"}


def test_a_group_that_nobody_is_in_any_more_says_nothing(tmp_path: Path) -> None:
    assert Group("w1", (tmp_path / "gone",)).unbounded(ASKED) == frozenset()


def test_t43_doctor_names_what_is_not_limited() -> None:
    assert check_groups(set()).detail == "memory, CPU and tasks of each worker are limited"
    found = check_groups({"memory"})
    assert not found.ok
    assert found.detail == "the kernel does not limit memory of workers: memory of cgroups is not handed to the daemon"
    assert "memory, CPU and tasks of workers" in check_groups(["memory", "pids", "cpu"]).detail

"""Memory and cores of a machine, read from files as the kernel writes them."""

import pytest

from endwise.common.errors import ConfigError
from endwise.common.machine import available_memory, free_disk, parse_size, resident_memory, size_text

GIB = 1 << 30


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GiB", 80 * GIB), ("1.5 gib", 3 * GIB // 2), ("24GB", 24 * 10**9), ("512MiB", 512 << 20), ("4096", 4096)],
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "lots", "80 potatoes", "-1GiB", "0", "1e9"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match="unit"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1536, "1.5 KiB"), (80 * GIB, "80 GiB"), (1000 << 20, "1,000 MiB"), (5 << 40, "5 TiB")],
)
def test_sizes_are_written(size, text):
    assert size_text(size) == text


def write(root, path, text):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


@pytest.fixture
def machine(tmp_path):
    write(tmp_path, "proc/meminfo", "MemTotal:       33554432 kB\nMemAvailable:   16777216 kB\n")
    return tmp_path


def test_without_a_limit_it_is_what_the_kernel_has(machine):
    assert available_memory(machine) == 16 * GIB
    write(machine, "proc/self/cgroup", "0::/\n")
    assert available_memory(machine) == 16 * GIB
    write(machine, "sys/fs/cgroup/memory.max", "max\n")
    assert available_memory(machine) == 16 * GIB


def test_the_tightest_group_counts_and_idle_files_are_free(machine):
    write(machine, "proc/self/cgroup", "0::/slurm/job/step\n")
    for group, limit, used, idle in (("slurm/job", 8, 5, 2), ("slurm/job/step", 20, 1, 0)):
        folder = f"sys/fs/cgroup/{group}"
        write(machine, f"{folder}/memory.max", f"{limit * GIB}\n")
        write(machine, f"{folder}/memory.current", f"{used * GIB}\n")
        write(machine, f"{folder}/memory.stat", f"anon 1\ninactive_file {idle * GIB}\n")
    assert available_memory(machine) == 5 * GIB


def test_a_container_sees_its_own_group_as_the_root(machine):
    write(machine, "proc/self/cgroup", "0::/\n")
    for name, text in (("max", 4 * GIB), ("current", GIB), ("stat", "inactive_file 0\n")):
        write(machine, f"sys/fs/cgroup/memory.{name}", str(text))
    assert available_memory(machine) == 3 * GIB


@pytest.mark.parametrize(("limit", "left"), [(6 * GIB, 4 * GIB), (9223372036854771712, 16 * GIB)])
def test_control_groups_of_the_first_version(machine, limit, left):
    write(machine, "proc/self/cgroup", "7:cpu,cpuacct:/a\n4:memory:/a/b\n")
    folder = "sys/fs/cgroup/memory/a/b"
    for name, text in (("limit_in_bytes", limit), ("usage_in_bytes", 2 * GIB), ("stat", "total_inactive_file 0\n")):
        write(machine, f"{folder}/memory.{name}", str(text))
    assert available_memory(machine) == left


def test_a_system_that_does_not_tell(tmp_path):
    assert available_memory(tmp_path) is None


def test_this_process_and_this_disk(tmp_path):
    assert 10 << 20 < resident_memory() < 1 << 40
    assert free_disk(tmp_path / "not" / "there" / "yet") > 0

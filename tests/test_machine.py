"""What is promised: energy is read from what counts it, each counter once, and past its wrapping around;
memory is that of the machine, or of the container.

The oracles: made-up counters, in a folder like the kernel's and a library like NVML; Linux's own figure.
"""
import ctypes
import re
from pathlib import Path

import machine
import pytest
import torch


def zone(folder, name, called, microjoules, wrap=2 ** 38):
    (folder / name).mkdir(exist_ok=True)
    for file, value in (("name", called), ("energy_uj", microjoules), ("max_energy_range_uj", wrap)):
        (folder / name / file).write_text(f"{value}\n")


def test_rapl_counts_packages_once_and_wraps(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "rapl", lambda read=machine.rapl: read(tmp_path))
    assert machine.meter("cpu") is None                                         # nothing there
    zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    zone(tmp_path, "intel-rapl:1", "package-1", 5_000_000, wrap=6_000_000)
    for name, called in (("intel-rapl:0:0", "core"), ("intel-rapl:2", "psys")):
        zone(tmp_path, name, called, 7)
    (tmp_path / "intel-rapl:3").mkdir()                                       # nothing to read in it
    used = machine.meter("cpu")
    assert used() == 0
    zone(tmp_path, "intel-rapl:0", "package-0", 4_000_000)                    # 3 J
    zone(tmp_path, "intel-rapl:1", "package-1", 2_000_000, wrap=6_000_000)    # 1 J to the end, and 2 J from 0
    zone(tmp_path, "intel-rapl:0:0", "core", 10 ** 9)
    assert used() == pytest.approx(6 / 3.6e6)
    zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000)
    assert used() == pytest.approx(7 / 3.6e6)


def test_nvml(monkeypatch):
    class Library:
        joules, status = 5, 0

        def nvmlInit_v2(self):
            return self.status

        def nvmlDeviceGetHandleByUUID(self, name, handle):
            assert name == b"GPU-1234"
            handle._obj.value = 77
            return 0

        def nvmlDeviceGetTotalEnergyConsumption(self, handle, millijoules):
            assert handle.value == 77
            millijoules._obj.value = 1000 * self.joules
            return 0
    library = Library()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    properties = type("Properties", (), {"uuid": "1234"})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    used = machine.meter("cuda:0")
    library.joules = 41
    assert used() == pytest.approx(36 / 3.6e6)
    library.status = 999                                                      # NVML's "unknown error"
    assert machine.meter("cuda:0") is None


def test_nothing_measures_other_devices():
    assert machine.meter("meta") is None
    if not torch.cuda.is_available():
        assert machine.meter("cuda") is None


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="the oracle is Linux's own figure")
def test_the_memory_is_the_machines_or_the_containers(monkeypatch):
    total = machine.memory(torch.device("cpu"))
    free = int(re.search(r"MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text())[1]) * 1024
    assert 0 < total <= free * 1.001
    monkeypatch.setattr(machine.Path, "read_text", lambda path: "1000000\n")
    assert machine.memory(torch.device("cpu")) == 1_000_000
    monkeypatch.setattr(machine.Path, "read_text", lambda path: "max\n")
    assert machine.memory(torch.device("cpu")) >= total

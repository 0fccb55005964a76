"""What this machine says of itself: the energy that it has used, and memory, used and there.

A GPU is asked by NVML, CPUs by RAPL, both of which count joules. What cannot be asked is None or without end;
flops.py then estimates.
"""
import contextlib
import ctypes
import math
import os
import resource
import sys
from pathlib import Path

import torch


def rapl(folder="/sys/class/powercap"):
    """{CPU package: (microjoules, where this counter wraps to 0)} by RAPL; empty if it cannot be read."""
    found = {}
    for zone in Path(folder).glob("*rapl:*"):
        try:
            if (zone / "name").read_text().startswith("package"):        # not a part of one, nor the board
                found[zone.name] = tuple(int((zone / file).read_text())
                                         for file in ("energy_uj", "max_energy_range_uj"))
        except (OSError, ValueError):
            continue                                                     # often only root may read it
    return found


def nvml(device):
    """{GPU: (microjoules, where this counter wraps to 0)} by NVML; empty if it cannot be read."""
    handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        name = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        failed = (library.nvmlInit_v2()
                  or library.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(handle))
                  or library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)))
    except (OSError, AttributeError, RuntimeError, AssertionError):
        return {}
    return {} if failed else {name: (1000 * millijoules.value, 1000 << 64)}


def meter(device, before=0.0):
    """A function that says how many kWh were used since this call, and `before`; None if nothing measures.

    A GPU is read by NVML; CPUs by RAPL, all of the machine's, whoever uses them. RAPL's counter wraps around
    after some 260 kJ (a quarter of an hour at 280 W), so the function must be called more often than that.
    """
    read = {"cpu": rapl, "cuda": lambda: nvml(device)}.get(torch.device(device).type, dict)
    last, total = read(), before * 3.6e12
    if not last:
        return None

    def used():
        nonlocal last, total
        now = read()
        total += sum((now[name][0] - last[name][0]) % wrap for name, (_, wrap) in last.items() if name in now)
        last = last | now
        return total / 3.6e12
    return used


def peak_memory(device):
    """GB that this process has held at most: of the accelerator's memory, or on a CPU of the machine's."""
    if device.type == "cpu":
        unit = 2 ** (30 if sys.platform == "darwin" else 20)            # macOS counts bytes, Linux kB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return torch.accelerator.max_memory_allocated(device) / 2 ** 30


def memory(device):
    """Bytes that the accelerator has in all, or on a CPU the machine, or the container that this runs in."""
    if device.type != "cpu":
        return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else math.inf
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):                   # "max" is no limit
            limits.append(int(Path(file).read_text()))
    return min(limits)

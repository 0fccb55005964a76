"""Half an hour of search: memory, open files and time a step stay as they are.

Run by hand: python -m pytest -m slow -s tests/test_soak.py. The oracles: /proc, and a straight line through
what it says; the first tenth, in which kernels are made for new widths, is left out.
"""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

MINUTES = 30


def slope(x, y):
    """(change of y over all x, by the line of least squares, as a share of y's mean; the standard error of
    it).
    """
    (rate, at), ((variance, _), _) = np.polyfit(x, y, 1, cov="unscaled")
    scatter = np.std(y - rate * x - at, ddof=2)
    whole = (x[-1] - x[0]) / np.mean(y)
    return rate * whole, scatter * variance ** 0.5 * whole


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads Linux's /proc")
def test_half_an_hour_of_search_is_flat(tmp_path):
    out, root = tmp_path / "run", Path(__file__).parent.parent
    process = subprocess.Popen(
        [sys.executable, str(root / "search.py"), "--stages", "1", "--epochs", "1e6",
         "--checkpoint-every", "20", "--out", str(out)], stdout=subprocess.DEVNULL)
    proc, found, start = Path("/proc") / str(process.pid), [], time.monotonic()
    while process.poll() is None and time.monotonic() - start < 60 * MINUTES:
        time.sleep(3)
        resident = int((proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        found.append((time.monotonic() - start, resident, len(list((proc / "fd").iterdir()))))
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    seconds, resident, opened = np.array(found[len(found) // 10:]).T
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    rows = rows[len(rows) // 10:]
    taken = np.diff([row["seconds"] for row in rows])
    steps = np.array([row["step"] for row in rows[1:]])
    memory, pace = slope(seconds, resident), slope(steps, taken)
    step = np.median(taken) / (steps[1] - steps[0])
    print(f"\n{steps[-1]} steps in {seconds[-1]:.0f} s: memory {resident.mean() / 2 ** 20:.0f} MB changed by "
          f"{memory[0]:+.2%} (standard error {memory[1]:.2%}); {opened.min():.0f} to {opened.max():.0f} open "
          f"files; {1000 * step:.1f} ms a step changed by {pace[0]:+.2%} ({pace[1]:.2%})")
    assert memory[0] < 0.02 + 3 * memory[1]
    assert opened.max() <= opened.min() + 2                        # a checkpoint may be open
    assert pace[0] < 0.05 + 3 * pace[1]

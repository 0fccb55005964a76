"""What a long run needs and the paper does not speak of. No step of the method is here."""
import os
import signal
import sys
from pathlib import Path

root = Path(__file__).resolve().parents[1]
if Path(sys.argv[0]).resolve().parent in (root, root / "results"):
    # One of the scripts here: Ctrl-C ends it at once, also while it imports, but for where it listens.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# How long a thread spins before it sleeps, waiting for another. OpenMP's default makes a step 40 times
# slower beside one busy neighbour; sleeping at once makes it twice as slow on a quiet machine. Read as torch
# is loaded, so that the scripts import the machinery first.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

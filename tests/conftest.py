"""One thread: on small tensors threads wait for each other, and a test's two processes for the cores."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")                       # read as torch is loaded

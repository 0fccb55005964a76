"""One thread: on small tensors threads only wait for each other, and two processes of a test for the cores."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")                       # read as torch is loaded

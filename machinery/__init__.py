"""What a long run needs and the paper does not speak of. Nothing here knows the method."""
import os

# How long a thread spins before it sleeps, waiting for another. OpenMP's default makes a step 40 times
# slower beside one busy neighbour; sleeping at once makes it twice as slow on a quiet machine. Read as torch
# is loaded, so that the scripts import the machinery first.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

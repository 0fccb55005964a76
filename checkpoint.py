"""What a search needs to go on after a kill as if nothing had been: written, read back, and refused.

`run` is a dict: how far the search is, and what it has found. Supernet, optimisers and teacher join it in the
file.
"""
from machinery import files, flags, processes

VERSION = 2                     # of the file


def blank():
    """What a run has at its beginning; the rest of it are the supernet, its teacher and the optimisers."""
    return {"stage": 0, "step": 0, "seconds": 0.0, "kwh": 0.0, "means": {}, "alphas": [], "skipped": [],
            "logged": 0, "summary": []}


def keep(last, run, args, stage, supernet, sgd, adam, teacher):
    """Write the checkpoint `last`: all that a run needs to go on from here, to the last bit."""
    processes.write(last, run | {
        "version": VERSION, "settings": flags.kept(args), "stage": stage, "supernet": supernet.state_dict(),
        "sgd": sgd.state_dict(), "adam": adam.state_dict(), "teacher": teacher and teacher.state_dict(),
        "teacher_arch": teacher and teacher.arch.to_json()})


def recall(last, args, device):
    """What `keep` wrote. files.Refused unless it is whole, and of this version and this run."""
    run = files.unpack(processes.on_rank0(last.read_bytes), last)
    if run.get("version") != VERSION:
        raise files.Refused(f"{last} is of version {run.get('version')}, this is version {VERSION}: start "
                            "anew")
    for key, value in flags.kept(args).items():
        if key not in flags.FREE and run["settings"].get(key) != value:
            raise files.Refused(f"{last} is of another run: its {key} is {run['settings'].get(key)}, "
                                f"but args.json has {value}")
    run["means"] = {kind: (total.to(device), count) for kind, (total, count) in run["means"].items()}
    return run


def restore(run, supernet, sgd, adam):
    """Give supernet and optimisers what `run`, from `recall`, has of them."""
    supernet.load_state_dict(run["supernet"])
    sgd.load_state_dict(run["sgd"])
    adam.load_state_dict(run["adam"])

"""What stands between two steps of a long run: checkpoints, from which it goes on to the last bit after a
kill; signals, other processes, steps whose numbers are not finite, means, and the log.

The loop that it carries holds the method, and reads as if none of this were there:

    run.begin(stage, net=net, sgd=sgd)
    for step in run.steps(total, epoch_length, "A0"):
        metrics = ..                                  # forward, loss, backward
        if run.synchronise(parameters, metrics):
            sgd.step()
        if run.ends_epoch(step):
            run.log({"stage": stage})
"""
from machinery import files, processes

import json
import multiprocessing
import time

import torch
from tqdm import tqdm

VERSION = 3                     # of the checkpoint


def parts(settings):
    """Settings, with their network (an `Arch` as JSON) split into an entry a field and a block."""
    arch = json.loads(settings.get("network", "{}"))
    blocks = {f"block {n}": block for n, block in enumerate(arch.get("blocks", ()))}
    count = {"blocks": len(blocks)} if blocks else {}
    return {key: value for key, value in settings.items() if key != "network"} | arch | count | blocks


def differences(before, settings):
    """Yield (name, its value before, its value in `settings`) where two dicts of settings differ."""
    before = parts(before)
    for key, value in parts(settings).items():
        if before.get(key) != value:
            yield key, before.get(key), value


class Run:
    """How far a training is, and its checkpoint.

    checkpoint_path: the file (None: nothing is kept). settings: a dict of what makes the run what it is; a
    checkpoint with other settings is refused. signals: a list that `processes.catch_signals` fills.
    log_path: a file that gets the logged rows, a line each. most_skipped: steps of a stage whose numbers may
    not be finite before the run gives up.
    """

    def __init__(self, checkpoint_path, settings, device, signals=(), log_path=None, most_skipped=5):
        self.checkpoint_path, self.settings, self.device = checkpoint_path, settings, device
        self.signals, self.log_path, self.most_skipped = signals, log_path, most_skipped
        self.state = {"stage": 0, "step": 0, "seconds": 0.0, "skipped": [], "metrics": {}, "rows": [],
                      "history": [], "summary": []}
        self.objects, self.saved, self.clock = {}, None, time.perf_counter()

    def resume(self):
        """Read the checkpoint, if there is one, for `begin`. files.Refused if it is broken, or another's."""
        path = self.checkpoint_path
        if path is None or not processes.on_rank0(path.exists):
            return
        saved = files.unpack(processes.on_rank0(path.read_bytes), path)
        if saved.get("version") != VERSION:
            raise files.Refused(f"{path} is of version {saved.get('version')}, this is version {VERSION}: "
                                "start anew")
        with files.reading(path, "a checkpoint of this run"):
            for key, before, value in differences(saved["settings"], self.settings):
                raise ValueError(f"its {key} is {before}, not {value}")
            self.state = {key: type(value)(saved[key]) for key, value in self.state.items()}
            if not (0 <= self.state["stage"] < 5 and 0 <= self.state["step"]):
                raise ValueError("there is no such stage, or step")
            self.state["metrics"] = {kind: (total.to(self.device), int(count))
                                     for kind, (total, count) in self.state["metrics"].items()}
        self.saved = saved

    def begin(self, stage, **objects):
        """Begin a stage, whose checkpoints hold the state_dict of all `objects`; or go on in it where the
        checkpoint ends. Returns the number of its next step.
        """
        self.objects = {name: value for name, value in objects.items() if value is not None}
        if self.saved is not None:
            with files.reading(self.checkpoint_path, "a checkpoint of this run"):
                for name, value in self.objects.items():
                    value.load_state_dict(self.saved[name])
                    for p, state in getattr(value, "state", {}).items():        # of an optimiser
                        if any(x.shape not in (p.shape, ()) for x in state.values()):
                            raise ValueError(f"{name} is of other shapes")
            self.saved = None
        else:
            self.state.update(stage=stage, step=0, seconds=0.0, skipped=[], metrics={}, history=[])
            self.save()
        self.clock = time.perf_counter()
        return self.state["step"]

    def steps(self, total, epoch_length, label, checkpoint_every):
        """The numbers of the steps that are left of `total`. Saves, reports and hears signals in between.

        SystemExit, after the checkpoint, if a signal has come.
        """
        self.total, self.epoch_length = total, epoch_length
        alone = multiprocessing.parent_process() is None
        hidden = processes.rank() > 0 or not alone or None          # None: shown on a terminal alone
        with tqdm(total=total, initial=self.state["step"], desc=label, disable=hidden) as bar:
            for step in range(self.state["step"], total):
                yield step
                self.state["step"] = step + 1
                bar.update()
                if (step + 1) % 50 == 0 or step + 1 == total:   # reading a number waits for the device
                    self.report(bar, label)
                stopped = processes.pending_signal(self.signals)
                if stopped or self.ends_epoch(step) or (step + 1) % checkpoint_every == 0:
                    self.save()
                if stopped:
                    kept = "--resume goes on" if self.checkpoint_path else "nothing is kept"
                    print(f"stopped in {label} after step {step + 1}; {kept}", flush=True)
                    raise SystemExit(128 + stopped)

    def ends_epoch(self, step):
        """Whether `step` is the last of an epoch, or of all steps."""
        return (step + 1) % self.epoch_length == 0 or step + 1 == self.total

    def synchronise(self, parameters, metrics, kind=""):
        """Whether the step can be taken: gradients and `metrics` become their means over all processes, and
        all must be finite.

        metrics: loss, and accuracy if there is one, of this step, (1,) or (2,); counted under `kind`.
        SystemExit if too many steps of the stage were not finite.
        """
        metrics, = processes.all_reduce_mean(parameters, metrics)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if torch.isfinite(metrics.sum() + norm):    # read from the device in every step
            total, count = self.state["metrics"].get(kind, (0, 0))
            self.state["metrics"][kind] = total + metrics, count + 1
            return True
        step, skipped = self.state["step"], self.state["skipped"]
        skipped.append(step)
        if len(skipped) > self.most_skipped:
            raise SystemExit(f"loss or gradients are not finite in step {', '.join(map(str, skipped))}; "
                             "try a lower --lr")
        print(f"loss or gradients of step {step} are not finite; it is left out", flush=True)
        return False

    def means(self):
        """{"loss", "accuracy", "alpha_loss", ..}: means over the steps since the last `log`."""
        return {kind + name: value / count for kind, (total, count) in self.state["metrics"].items()
                for name, value in zip(("loss", "accuracy"), total.tolist())}

    def log(self, row):
        """Add a row to the log: `row`, the step, the means over its steps, seconds since the stage began."""
        row = row | {"step": self.state["step"] + 1, "steps": self.total} | self.means()
        self.state["rows"].append(row | {"seconds": self.seconds()})
        self.state["metrics"] = {}
        return self.state["rows"][-1]

    def seconds(self):
        """How long the stage has taken, without the time that the run lay still."""
        return self.state["seconds"] + time.perf_counter() - self.clock

    def report(self, bar, label):
        """Loss and accuracy: on the bar, or without a terminal as a plain line now and then."""
        means = self.means() or (self.state["rows"] or [{}])[-1]
        if "loss" not in means:
            return
        text = f"loss {means['loss']:.3f}"
        if "accuracy" in means:
            text += f", accuracy {100 * means['accuracy']:.1f} %"
        if not bar.disable:
            bar.set_postfix_str(text)
        elif self.state["step"] % 250 == 0 or self.state["step"] == self.total:
            print(f"{label} step {self.state['step']}/{self.total}: {text}", flush=True)

    def save(self):
        """Write the checkpoint, all that the run needs to go on from here, and the log."""
        self.state["seconds"], self.clock = self.seconds(), time.perf_counter()
        if self.log_path:
            processes.write(self.log_path, "".join(json.dumps(row) + "\n" for row in self.state["rows"]))
        if self.checkpoint_path:
            states = {name: value.state_dict() for name, value in self.objects.items()}
            processes.write(self.checkpoint_path, {"version": VERSION, "settings": self.settings}
                            | self.state | states)

"""What is promised: an assignment is the project without the bodies that are to be written; the right ones
pass, and wrong ones do not, whatever else is in the student's folder.

The oracle is the code itself as the right answer, and mistakes that suggest themselves as wrong ones: among
them distillation without a gradient, a new random map for each layer, masks in front of batch norm, and new
blocks that are no identities.
"""
import ast
import re
import shutil

import pytest

from classroom import assignment

ROOT, TASKS = assignment.ROOT, assignment.tasks()
WRONG = [
    ("1.1", "(0, 0, 0, 0, 0, wider)", "(0, 0, 0, 0, wider, 0)"),
    ("1.2", "prefixes @ gates", "prefixes @ gates.flip(0)"),
    ("1.3", "conv(y, self.depthwise, widest, kernel=kernel)",
     "conv(y, self.depthwise, widest, kernel=kernel) * columns[:, None, None]"),
    ("1.3", ", kernel=kernel", ""),
    ("1.3", "if se:", "if True:"),
    ("1.3", "else act(x)", "else act(x, inplace=True)"),
    ("1.3", "mask(squeezed, gates)", "None"),
    ("2.1", "first * (last / first) ** progress", "first + (last - first) * progress"),
    ("2.2", "+ pad_sequence(noise.split(sizes), batch_first=True).to(logits.device)", ""),
    ("2.2", "perturbed.gather(1, options) / tau", "perturbed.gather(1, options)"),
    ("2.3", "y * mask(*outputs).view(1, -1, 1, 1)", "y"),
    ("2.3", "for width in widths for option in", "for width in [max(widths)] * len(widths) for option in"),
    ("2.3", "gate * each for", "draws['op'].gates[0] * each for"),
    ("3.1", "torch.cat([torch.arange(old), torch.randint(old, (new - old,), generator=generator)])",
     "torch.randint(old, (new,), generator=generator)"),
    ("3.2", "weight[f]",
     "weight[torch.cat([f[:len(weight)], torch.randint(len(weight), f[len(weight):].shape)])]"),
    ("3.3", "1 / copies", "torch.ones_like(copies)"),
    ("3.3", "(torch.arange(len(f)) < old).to(weight)", "1 / copies"),
    ("3.4", "nn.init.zeros_(layers.norm3.weight)", "pass"),
    ("3.4", "nn.init.dirac_(layers.depthwise.weight, groups=hidden)", "pass"),
    ("4.1", "student, teacher = F.log_softmax(student_logits, 1)",
     "student, teacher = F.log_softmax(student_logits.detach(), 1)"),
    ("4.1", 'reduction="batchmean"', 'reduction="mean"'),
    ("4.1", "F.kl_div(student, teacher", "F.kl_div(teacher, student"),
    ("4.2", "first + (last - first) * progress", "first * (last / first) ** progress"),
    ("5.1", "(taps + 2), hidden, after)", "(taps + 2), hidden, pixels)"),
    ("5.1", "hidden * taps * after ** 2", "hidden * taps * pixels ** 2"),
    ("5.2", "slice(n)", "slice(-n, None)"),
    ("5.2", "middle(corner, tensor.shape[-1])", "corner[..., :tensor.shape[-1], :tensor.shape[-1]]"),
    ("5.3", "m.momentum = 1 / (n + 1)", "m.momentum = 0.1"),
    ("5.4", "score - price * table.head[:, None]", "score"),
    ("5.4", "min(count, len(every))", "1")]


@pytest.fixture
def solved(tmp_path):
    """A student's folder in which everything is right."""
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    return tmp_path


def answer(folder, task, old, new):
    """In the function of a task, `old` becomes `new`: once, and nowhere else."""
    file, name = TASKS[task]

    def change(function, node, lines):
        body = "".join(lines)
        assert function != name or body.count(old) == 1
        return [body.replace(old, new)] if function == name else lines
    (folder / file).write_text(assignment.rewrite((folder / file).read_text(), change))


def test_every_task_is_graded_by_tests_that_are_there():
    assert list(TASKS) == list(assignment.GRADED_BY)
    assert {int(task[0]) for task in TASKS} == set(assignment.CHAPTERS)
    for task in TASKS:
        for test in assignment.tests(task):
            file, name = test.split("::")
            assert f"def {name}(" in (ROOT / file).read_text()
    marks = sum(len(re.findall(r"# task \d", file.read_text())) for file in ROOT.glob("*.py"))
    assert marks == len(TASKS) == len({task for task, _, _ in WRONG})
    text = (ROOT / "classroom/README.md").read_text()
    table = re.findall(r"^\| (\d\.\d) \| `([\w.]+)` \| `(\w+\.py)` \|", text, re.MULTILINE)
    assert [(task, (file, name)) for task, name, file in table] == list(TASKS.items())


def test_an_assignment_is_the_project_without_the_bodies(tmp_path, capsys):
    assert assignment.main(["make", str(tmp_path / "all")]) == 0
    assert assignment.main(["make", str(tmp_path / "some"), "3", "4.1"]) == 0
    for folder, wanted in (("all", list(TASKS)), ("some", ["3.1", "3.2", "3.3", "3.4", "4.1"])):
        text = (tmp_path / folder / "TASKS.md").read_text()
        named = re.findall(r"^(\d\.\d) `([\w.]+)` in `(\w+\.py)`", text, re.MULTILINE)
        assert [(task, file, name) for task, name, file in named] == [(t, *TASKS[t]) for t in wanted]
        for file in ROOT.glob("*.py"):
            mine, theirs = ((at / file.name).read_text() for at in (tmp_path / folder, ROOT))
            gone = {TASKS[task][1]: task for task in wanted if TASKS[task][0] == file.name}
            for name, node in assignment.functions(mine).items():
                right = assignment.functions(theirs)[name]
                assert ast.get_docstring(node) == ast.get_docstring(right)
                assert ast.dump(node.args) == ast.dump(right.args)
                if name in gone:
                    assert ast.unparse(node.body[1:]) == f"raise NotImplementedError('task {gone[name]}')"
            assert assignment.solve(mine, theirs, gone) == theirs                  # and all else is as it was
    assert (tmp_path / "all/datasets/FashionMNIST").is_dir() and not (tmp_path / "all/classroom").exists()
    assert capsys.readouterr().out.startswith("16 tasks in ")


def test_right_and_wrong_answers_among_ruins(solved, capsys):
    """4.1 is graded, though the tasks beside it are not begun, or gone, and a file of others is none."""
    answer(solved, "4.2", "return first + (last - first) * progress", 'raise NotImplementedError("task 4.2")')
    (solved / "grow.py").write_text("def grow(:\n")
    answer(solved, "5.1", "def candidate(", "def other(")
    assert assignment.main(["grade", str(solved), "3.1", "4", "5.1"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("3.1  channel_map               grow.py cannot be read: invalid syntax")
    assert lines[1:] == ["4.1  loss                      passed", "4.2  ratio                     not begun",
                         "5.1  candidate                 flops.py has no candidate", "1 of 4 passed"]


@pytest.mark.slow
def test_answers_that_do_not_come_to_an_end(solved, monkeypatch):
    answer(solved, "4.2", "return first +", "while True: pass\n    return first +")
    monkeypatch.setattr(assignment, "PATIENCE", 2)
    assert assignment.grade(solved, "4.2") == "no end after 2 s"
    answer(solved, "4.2", "while True: pass", "import os; os._exit(0)")
    monkeypatch.setattr(assignment, "PATIENCE", 60)
    assert assignment.grade(solved, "4.2") == "the tests did not come to their end"


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_the_code_itself_passes(solved, task):
    assert assignment.grade(solved, task) == "passed"


@pytest.mark.slow
@pytest.mark.parametrize("task, old, new", WRONG)
def test_wrong_answers_do_not_pass(solved, task, old, new):
    answer(solved, task, old, new)
    assert assignment.grade(solved, task).startswith("failed test_")


@pytest.mark.parametrize("argv, message", [
    (["make", str(ROOT / "homework")], "is in the project itself"),
    (["make", str(ROOT)], "is in the project itself"),
    (["make", "{}"], "holds something already"), (["grade", "{}/none"], "is no folder"),
    (["grade", "{}", "6"], "6 is no task, choose from 1.1, 1.2,"),
    (["mark", "{}"], "invalid choice: 'mark'")])
def test_a_wrong_command_ends_in_one_line(argv, message, solved, capsys):
    with pytest.raises(SystemExit) as stop:
        assignment.main([word.format(solved) for word in argv])
    says = capsys.readouterr().err
    assert stop.value.code == 2 and message in says
    assert says.startswith("assignment.py: ") and says.count("\n") == 1
    assert not (ROOT / "homework").exists()

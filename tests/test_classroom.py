"""What is promised: an assignment is the project without the bodies that are to be written; a student's
checks see one function alone; right answers pass, and wrong ones do not, whatever else is in the student's
folder; a planted mistake is found by tests.

The oracle is the code itself as the right answer, other ways to write it, and mistakes that suggest
themselves as wrong ones: among them distillation without a gradient, a new random map for each layer, masks
in front of batch norm, gates that see a wrong width, and new blocks that are no identities.
"""
from machinery import settings

import ast
import importlib
import json
import re
import shlex
import shutil
import textwrap

import pytest

from classroom import assignment, checks
from classroom.bugs import BUGS

ROOT, MARKED = assignment.ROOT, assignment.marked()
WRONG = [
    ("1.1", "(0, 0, 0, 0, 0, wider)", "(0, 0, 0, 0, wider, 0)"),
    ("1.1", "x[:, :y.shape[1]]", "x[:, -y.shape[1]:]"),
    ("1.1", "if wider > 0 else x[:, :y.shape[1]]", "if wider > 0 else 0"),
    ("1.1", "return y + (", "return y.add_("),
    ("1.2", "prefixes @ gates", "prefixes @ gates.flip(0)"),
    ("1.2", "prefixes @ gates", "prefixes @ gates.detach()"),
    ("1.2", "if len(set(widths)) == 1:", "if False:"),
    ("1.2", "prefixes @ gates", "prefixes.amax(1)"),
    ("1.2", "for width in widths", "for width in sorted(widths)"),
    ("1.3", "conv(y, self.depthwise, widest, kernel=kernel)",
     "conv(y, self.depthwise, widest, kernel=kernel) * columns[:, None, None]"),
    ("1.3", ", kernel=kernel", ""),
    ("1.3", "if se:", "if True:"),
    ("1.3", "else act(x)", "else act(x, inplace=True)"),
    ("1.3", "mask(squeezed, gates)", "None"),
    ("1.3", "max(squeezed), columns", "max(squeezed)"),
    ("1.3", "self.project, outputs, columns", "self.project, outputs"),
    ("1.3", "y = x if self.expand is None else act(x)", "y = act(x)"),
    ("1.3", "F.hardsigmoid", "F.sigmoid"),
    ("1.3", "max(hidden)", "self.depthwise.out_channels"),
    ("2.1", "first * (last / first) ** progress", "first + (last - first) * progress"),
    ("2.1", "first * (last / first) ** progress", "last * (first / last) ** progress"),
    ("2.1", "first * (last / first) ** progress", "5.0 * (0.1 / 5.0) ** progress"),
    ("2.2", "+ pad_sequence(noise.split(sizes), batch_first=True).to(logits.device)", ""),
    ("2.2", "perturbed.gather(1, options) / (tau or 1.0)", "perturbed.gather(1, options)"),
    ("2.2", "perturbed.gather(1, options) / (tau or 1.0)", "logits.gather(1, options) / (tau or 1.0)"),
    ("2.2", " - gates).detach()", " - gates)"),
    ("2.2", 'if uniform and name == "op"', "if uniform"),
    ("2.2", 'if uniform and name == "op"', "if not uniform and name == 'op'"),
    ("2.2", "if tau == 0", "if tau < 0"),
    ("2.2", "exponential_(generator=generator)", "exponential_()"),
    ("2.2", "perturbed.topk(2).indices.sort().values", "perturbed.topk(2).indices"),
    ("2.2", "-torch.empty(sum(sizes)).exponential_(generator=generator).log()",
     "torch.randn(sum(sizes), generator=generator)"),
    ("2.2", "logits = pad_sequence(alphas,", "logits = pad_sequence([a.detach() for a in alphas],"),
    ("2.3", "y * mask(*outputs).view(1, -1, 1, 1)", "y"),
    ("2.3", "for width in widths for option in", "for width in [max(widths)] * len(widths) for option in"),
    ("2.3", "for width in widths for option in", "for width in [min(widths)] * len(widths) for option in"),
    ("2.3", "torch.outer(gates, expansions.gates).flatten()",
     "torch.outer(expansions.gates, gates).flatten()"),
    ("2.3", "gate * each for", "draws['op'].gates[0] * each for"),
    ("2.3", "y = add_residual(y, x)",
     "return add_residual(y * mask(*outputs).view(1, -1, 1, 1), x), outputs"),
    ("2.3", "draws[\"width\"].gates\n", "draws[\"width\"].gates.detach()\n"),
    ("3.1", "samples = [torch.randperm(old, generator=generator) for _ in range(old, new, old)]",
     "samples = [torch.randint(old, (new - old,), generator=generator)]"),
    ("3.1", "torch.randperm(old, generator=generator)", "torch.randperm(old)"),
    ("3.1", "torch.randperm(old, generator=generator)", "torch.arange(old)"),
    ("3.1", "torch.arange(old), *samples", "*samples, torch.arange(old)"),
    ("3.2", "weight[f]",
     "weight[torch.cat([f[:len(weight)], torch.randint(len(weight), f[len(weight):].shape)])]"),
    ("3.2", "weight[f]", "weight[:, f] if weight.dim() > 1 else weight[f]"),
    ("3.2", "weight[f]", "torch.cat([weight, weight])[:len(f)]"),
    ("3.2", "weight[f]", "weight.index_select(0, f.sort().values)"),
    ("3.3", "share = part / part.new_zeros(o, old).index_add(1, f, part)[:, f]", "share = part"),
    ("3.3", "part.new_zeros(o, old).index_add(1, f, part)[:, f]", "(len(f) / old)"),
    ("3.3", "part.new_zeros(o, old).index_add(1, f, part)[:, f]", "2"),
    ("3.3", 'widen == "split"', "False"),
    ("3.3", "part.exponential_(generator=generator)", "part.exponential_()"),
    ("3.3", "part.exponential_(generator=generator)",
     "part = part[:1].exponential_(generator=generator).repeat(o, 1)"),
    ("3.3", "part[:, old:] = 0", "part[:, :old] = 0"),
    ("3.4", "nn.init.zeros_(layers.norm3.weight)", "pass"),
    ("3.4", "nn.init.dirac_(layers.depthwise.weight, groups=hidden)", "pass"),
    ("3.4", "nn.init.dirac_(layers.depthwise.weight, groups=hidden)",
     "nn.init.ones_(layers.depthwise.weight)"),
    ("3.4", "consume(eye, f, widen, generator)", "produce(eye, f).T"),
    ("3.4", "consume(eye, f, widen, generator)", "consume(eye, f)"),
    ("3.4", "nn.init.zeros_(layers.norm3.weight)",
     "layers.norm3.weight = nn.Parameter(0 * layers.norm3.weight, False)"),
    ("4.1", "student, teacher = F.log_softmax(student_logits, 1)",
     "student, teacher = F.log_softmax(student_logits.detach(), 1)"),
    ("4.1", "F.log_softmax(teacher_logits.detach(), 1)", "F.log_softmax(student_logits.detach(), 1)"),
    ("4.1", 'reduction="batchmean"', 'reduction="mean"'),
    ("4.1", "F.kl_div(student, teacher", "F.kl_div(teacher, student"),
    ("4.1", "(1 - lam) * hard + lam * F", "lam * hard + (1 - lam) * F"),
    ("4.1", "teacher_logits.detach()", "teacher_logits"),
    ("4.2", "first + (last - first) * progress", "first * (last / first) ** progress"),
    ("4.2", "first + (last - first) * progress", "last + (first - last) * progress"),
    ("4.2", "first + (last - first) * progress", "0.5 - 0.45 * progress"),
    ("5.1", "hidden, hidden, pixels, after", "hidden, hidden, pixels, pixels"),
    ("5.1", "hidden, outputs, after, after", "hidden, outputs, pixels, pixels"),
    ("5.1", "squeezed, after, 1)", "squeezed, after, after)"),
    ("5.1", "if expand else []", "if True else []"),
    ("5.1", "(hidden + 16) // 32 * 8", "hidden // 4"),
    ("5.1", "(8 - squeezed) * (squeezed < 8)", "0"),
    ("5.2", "slice(n)", "slice(-n, None)"),
    ("5.2", "middle(corner, tensor.shape[-1])", "corner[..., :tensor.shape[-1], :tensor.shape[-1]]"),
    ("5.2", "return network", "return supernet"),
    ("5.2", "tensor.copy_(", "tensor.data = ("),
    ("5.3", "m.momentum = 1 / (n + 1)", "m.momentum = 0.1"),
    ("5.3", "m.momentum = momentum", "m.momentum = m.momentum"),
    ("5.3", "network.eval()", "network"),
    ("5.3", "network.train()", "network.eval()"),
    ("5.4", "score - penalty * table.head[:, None]", "score"),
    ("5.4", "min(count, len(every))", "1"),
    ("5.4", "joint(p) - penalty * cost", "joint(p) - cost"),
    ("5.4", "table.fixed + float(table.head[width])", "float(table.head[width])"),
    ("5.4", "solutions.append(Solution(options[::-1]", "solutions.append(Solution(options")]
# Other ways to write the same.
RIGHT = [
    ("1.1", "F.pad(x, (0, 0, 0, 0, 0, wider)) if wider > 0",
     "y.new_zeros(y.shape).index_add(1, __import__('torch').arange(x.shape[1]), x) if wider > 0"),
    ("1.2", "return prefixes @ gates", "return (prefixes * gates).sum(1)"),
    ("2.2", "-torch.empty(sum(sizes)).exponential_(generator=generator).log()",
     "-(-torch.rand(sum(sizes), generator=generator).log()).log()"),
    ("2.2", "for pair, pair_gates in zip(options.tolist(), gates)",
     "for pair, pair_gates in zip(options.tolist(), gates.unbind())"),
    ("3.1", "torch.cat([torch.arange(old), *samples])[:new]",
     "torch.tensor([*range(old), *(int(f) for sample in samples for f in sample)])[:new]"),
    ("3.3", "part.exponential_(generator=generator)", "part.uniform_(generator=generator)"),
    ("3.4", "nn.init.zeros_(layers.norm3.weight)", "layers.norm3.weight.fill_(0)"),
    ("4.1", 'F.kl_div(student, teacher, reduction="batchmean", log_target=True)',
     "(teacher.exp() * (teacher - student)).sum(1).mean()"),
    ("4.2", "first + (last - first) * progress", "(1 - progress) * first + progress * last"),
    ("5.3", "m.momentum = 1 / (n + 1)", "n or m.reset_running_stats()\n            m.momentum = None")]


@pytest.fixture
def solved(tmp_path):
    """A student's folder in which everything is right."""
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    return tmp_path


def replaced(text, name, old, new):
    """A source text, in whose function `name` the text `old`, which is there once, has become `new`."""
    def change(function, node, lines):
        body = "".join(lines)
        assert function != name or body.count(old) == 1, (name, old)
        return [body.replace(old, new)] if function == name else lines
    return assignment.rewrite(text, change)


def answer(folder, task, old, new):
    """In the function of a task, in a student's folder, `old` becomes `new`."""
    file, name = MARKED[task]
    (folder / file).write_text(replaced((folder / file).read_text(), name, old, new))


def compiled(task, old, new):
    """The function of a task with `old` replaced by `new`, in the module where it belongs."""
    file, name = MARKED[task]
    text = replaced((ROOT / file).read_text(), name, old, new)
    node = assignment.functions(text)[name]
    first = min([node, *node.decorator_list], key=lambda n: n.lineno).lineno
    module, found = importlib.import_module(file[:-3]), {}
    exec(textwrap.dedent("\n".join(text.splitlines()[first - 1:node.end_lineno])), vars(module), found)  # noqa: S102
    return found[node.name]


def unsolved(*_, **__):
    raise NotImplementedError("another task")


def alone(task, patch, function=None):
    """The first failure of a task's checks, None if they pass, while all other tasks are unsolved; `function`
    takes the place of the task's own.
    """
    modules = [importlib.import_module(file.stem) for file in ROOT.glob("*.py")]
    for other, (file, name) in MARKED.items():
        wanted = function if other == task else unsolved
        if wanted is None:
            continue
        owner, _, method = name.rpartition(".")
        right = getattr(importlib.import_module(file[:-3]), owner or method)
        if owner:
            patch.setattr(right, method, wanted)
        for module in modules if not owner else ():
            if getattr(module, method, None) is right:
                patch.setattr(module, method, wanted)
    try:
        for name, check in vars(checks).items():
            if name.startswith(f"test_task_{task.replace('.', '_')}_"):
                check()
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        return error
    return None


def test_every_task_is_graded_by_tests_that_are_there():
    assert list(MARKED) == list(assignment.TASKS)
    assert {int(task[0]) for task in MARKED} == set(assignment.CHAPTERS)
    assert sum(task.points for task in assignment.TASKS.values()) == 100
    for task in MARKED:
        assert sum(test.startswith(assignment.CHECKS) for test in assignment.tests(task)) >= 3
        for test in assignment.tests(task):
            file, name = test.split("::")
            assert f"def {name}(" in (ROOT / file).read_text()
        assert sum(wrong[0] == task for wrong in WRONG) >= 3
    marks = sum(len(re.findall(r"# task \d", file.read_text())) for file in ROOT.glob("*.py"))
    assert marks == len(MARKED)
    text = (ROOT / "classroom/README.md").read_text()
    table = re.findall(r"^\| (\d\.\d) \| `([\w.]+)` \| `(\w+\.py)` \| (.*) \| (\d+) \|$", text, re.MULTILINE)
    assert table == [(task, name, file, assignment.TASKS[task].paper, str(assignment.TASKS[task].points))
                     for task, (file, name) in MARKED.items()]


@pytest.mark.parametrize("task", MARKED)
def test_the_checks_of_a_task_pass_while_all_others_are_unsolved(task, monkeypatch):
    assert alone(task, monkeypatch) is None
    assert "another task" in str(alone(task, monkeypatch, unsolved))


@pytest.mark.parametrize("task, old, new", RIGHT)
def test_other_ways_to_write_an_answer_pass(task, old, new, monkeypatch):
    assert alone(task, monkeypatch, compiled(task, old, new)) is None


@pytest.mark.filterwarnings("ignore:reduction")
@pytest.mark.parametrize("task, old, new", WRONG)
def test_a_wrong_answer_fails_in_words(task, old, new, monkeypatch):
    why = alone(task, monkeypatch, compiled(task, old, new))
    assert why is not None
    if isinstance(why, AssertionError):
        assert re.search(r": expected .*, came ", str(why), re.DOTALL) and len(str(why)) < 450


def test_an_assignment_is_the_project_without_the_bodies(tmp_path, capsys):
    assert assignment.main(["make", str(tmp_path / "all")]) == 0
    assert assignment.main(["make", str(tmp_path / "some"), "3", "4.1"]) == 0
    for folder, wanted in (("all", list(MARKED)), ("some", ["3.1", "3.2", "3.3", "3.4", "4.1"])):
        text = (tmp_path / folder / "TASKS.md").read_text()
        named = re.findall(r"^### (\d\.\d) `([\w.]+)` in `(\w+\.py)`, \d+ points$", text, re.MULTILINE)
        assert [(task, file, name) for task, name, file in named] == [(t, *MARKED[t]) for t in wanted]
        for file in ROOT.glob("*.py"):
            mine, theirs = ((at / file.name).read_text() for at in (tmp_path / folder, ROOT))
            gone = {MARKED[task][1]: task for task in wanted if MARKED[task][0] == file.name}
            rights = assignment.functions(theirs)
            for name, node in assignment.functions(mine).items():
                right = rights[name]
                assert ast.get_docstring(node) == ast.get_docstring(right)
                assert ast.dump(node.args) == ast.dump(right.args)
                if name in gone:
                    assert ast.unparse(node.body[1:]) == f"raise NotImplementedError('task {gone[name]}')"
            assert assignment.solve(mine, theirs, gone) == theirs                  # and all else is as it was
    assert capsys.readouterr().out.startswith("16 tasks in ")
    handed = {str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()}
    handed &= {str(path.relative_to(tmp_path / "all")) for path in (tmp_path / "all").rglob("*")}
    assert {"CITATION.cff", "results/compare.py", "classroom/checks.py", "classroom/README.md",
            "datasets/FashionMNIST/LICENSE"} < handed
    assert not handed & {"classroom/assignment.py", "classroom/bugs.py", "tests/test_classroom.py"}


def test_right_and_wrong_answers_among_ruins(solved, capsys):
    """4.1 is graded, though the tasks beside it are not begun, or gone, a file of others is none, and the
    student's own conftest.py would end every test.
    """
    (solved / "conftest.py").write_text("import os; os._exit(0)")
    answer(solved, "4.2", "return first + (last - first) * progress", 'raise NotImplementedError("task 4.2")')
    (solved / "grow.py").write_text("def grow(:\n")
    answer(solved, "5.1", "def candidate(", "def other(")
    report = solved / "grade.json"
    assert assignment.main(["grade", str(solved), "3.1", "4", "5.1", "--json", str(report)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert re.split(r"  +", lines[0]) == ["3.1", "channel_map", "0 of 6 tests", "0 of 6 points"]
    assert lines[1].startswith("     grow.py cannot be read: invalid syntax")
    assert re.split(r"  +", lines[2]) == ["4.1", "loss", "9 of 9 tests", "6 of 6 points"]
    assert lines[4].strip() == "not begun" and lines[6].strip() == "flops.py has no candidate"
    assert lines[-1] == "6 of 21 points"
    found = json.loads(report.read_text())
    assert (found["points"], found["of"]) == (6, 21) and len(found["tasks"]) == 4
    assert found["tasks"][1] == {"task": "4.1", "function": "loss", "passed": 9, "tests": 9, "points": 6,
                                 "of": 6, "says": None}


def test_a_grade_says_what_was_expected_and_what_came(solved, capsys):
    answer(solved, "4.2", "first + (last - first) * progress", "first * (last / first) ** progress")
    assert assignment.main(["grade", str(solved), "4.2"]) == 1
    assert capsys.readouterr().out == """\
4.2  ratio                     1 of 4 tests    0 of 2 points
     it falls linearly: ratio(0.5): expected 0.2750, came 0.1581
0 of 2 points
"""


@pytest.mark.slow
def test_answers_that_do_not_come_to_an_end(solved, monkeypatch):
    answer(solved, "4.2", "return first +", "while True: pass\n    return first +")
    monkeypatch.setattr(assignment, "PATIENCE", 20)
    assert assignment.grade(solved, "4.2")["says"].endswith("no end after 20 s")
    answer(solved, "4.2", "while True: pass", "import os; os._exit(0)")
    assert assignment.grade(solved, "4.2")["says"].endswith("the tests did not come to their end")
    (solved / "distill.py").write_text("import nothing_like_this\n" + (solved / "distill.py").read_text())
    assert "No module named 'nothing_like_this'" in assignment.grade(solved, "4.1")["says"]


@pytest.mark.slow
def test_the_code_itself_has_all_points(solved, capsys):
    assert assignment.main(["grade", str(solved)]) == 0
    assert capsys.readouterr().out.endswith("\n100 of 100 points\n")


@pytest.mark.slow
@pytest.mark.parametrize("task, old, new", {wrong[0]: wrong for wrong in WRONG}.values())
def test_wrong_answers_lose_points(solved, task, old, new):
    answer(solved, task, old, new)
    row = assignment.grade(solved, task)
    assert row["passed"] < row["tests"] and row["points"] < row["of"]
    assert "assert " not in row["says"] and "NotImplementedError" not in row["says"]


def test_every_planted_mistake_fits_the_code_as_it_is(tmp_path, capsys):
    assert len(BUGS) >= 8
    for number, bug in enumerate(BUGS, 1):
        assert (ROOT / bug.file).read_text().count(bug.right) == 1
        for test in bug.tests:
            file, name = test.split("::")
            assert f"def {name}(" in (ROOT / f"tests/test_{file}").read_text()
    assert assignment.main(["bug", str(number), str(tmp_path / "hunt")]) == 0
    assert (tmp_path / "hunt/HUNT.md").read_text().startswith(f"# Bug {number}\n")
    assert "see HUNT.md" in capsys.readouterr().out and not (tmp_path / "hunt/tests").exists()
    ast.parse((tmp_path / "hunt" / bug.file).read_text())


@pytest.mark.slow
@pytest.mark.parametrize("number", range(1, len(BUGS) + 1))
def test_a_planted_mistake_is_found_by_tests(tmp_path, number, capsys):
    hunt, bug = tmp_path / "hunt", BUGS[number - 1]
    assignment.main(["bug", str(number), str(hunt)])
    assert assignment.main(["grade", str(hunt)]) == 1
    assert f"bug {number}: it is still there, " in capsys.readouterr().out
    (hunt / bug.file).write_text((ROOT / bug.file).read_text())
    assert assignment.main(["grade", str(hunt)]) == 0
    assert f"bug {number}: found" in capsys.readouterr().out


def test_the_experiments_can_be_done():
    """Every command parses, and every line that is to be changed is there once."""
    text = (ROOT / "classroom/EXPERIMENTS.md").read_text()
    commands = re.findall(r"^    python (\S+\.py) (.*?)(?:  +#.*)?$", text, re.MULTILINE)
    assert len(commands) >= 8 and all((ROOT / script).exists() for script, _ in commands)
    for script, argv in commands:
        if script == "search.py":
            settings.search_parser("").parse_args(shlex.split(argv))
    changes = re.findall(r"[Ii]n `([\w/]+\.py)`\s+change\s+`([^`]+)`", text)
    assert len(changes) >= 2 and all((ROOT / file).read_text().count(line) == 1 for file, line in changes)


@pytest.mark.slow
def test_a_students_copy_passes_the_checks_of_its_documents(tmp_path):
    """Those of test_paper.py that read documents, in a folder in which nothing is left to solve."""
    assignment.make(tmp_path / "copy", [])
    text = (ROOT / "tests/test_paper.py").read_text()
    names = re.findall(r"^def (test_\w*(?:document|readme|map|errata)\w*)", text, re.MULTILINE)
    outcome = assignment.outcomes(tmp_path / "copy", [f"tests/test_paper.py::{name}" for name in names])
    assert len(outcome) >= 5 and outcome == [None] * len(outcome)


@pytest.mark.parametrize("argv, message", [
    (["make", str(ROOT / "homework")], "is in the project itself"),
    (["make", str(ROOT)], "is in the project itself"), (["bug", "1", str(ROOT)], "is in the project itself"),
    (["make", "{}"], "holds something already"), (["grade", "{}/none"], "is no folder"),
    (["grade", "{}", "6"], "6 is no task, choose from 1.1, 1.2,"), (["bug", "99", "{}/new"], "choose from"),
    (["mark", "{}"], "invalid choice: 'mark'")])
def test_a_wrong_command_ends_in_one_line(argv, message, solved, capsys):
    with pytest.raises(SystemExit) as stop:
        assignment.main([word.format(solved) for word in argv])
    says = capsys.readouterr().err
    assert stop.value.code == 2 and message in says
    assert says.startswith("assignment.py: ") and says.count("\n") == 1
    assert not (ROOT / "homework").exists()

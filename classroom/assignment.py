"""Assignments made from the code: functions to write, or a mistake to find; and their grader.

    python classroom/assignment.py make ../homework          # all tasks; or chapters, tasks: 3 4.1
    python classroom/assignment.py bug 3 ../hunt             # a mistake to find: 1, 2, ..
    python classroom/assignment.py grade ../homework         # either; --json FILE for a grading server

In an assignment the functions marked `# task` lose their bodies; signatures and docstrings stay. A task is
graded with all others solved, by the tests here and not by those in the student's folder. Grading runs the
student's code.
"""
import argparse
import ast
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from classroom.bugs import BUGS
from classroom.tasks import CHAPTERS, TASKS

PROJECT = ("*.py", "machinery", "datasets", "results", "*.md", ".pictures", "LICENSE", "CITATION.cff",
           "requirements.txt", ".pytest.ini", ".ruff.toml", ".gitignore")
HANDED_OUT = (*PROJECT, "tests", "classroom/checks.py", "classroom/*.md", "classroom/reader.*")
KEPT_BACK = shutil.ignore_patterns("__pycache__", "test_classroom.py", "runs")
CHECKS = "classroom/checks.py"
PATIENCE = 120                                                         # seconds that a task's tests may take


def functions(text):
    """{name: node} of all functions in a source text, methods as Class.name. SyntaxError if it is not one."""
    found = {}
    for node in ast.parse(text).body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        found |= {prefix + f.name: f for f in inner if isinstance(f, ast.FunctionDef)}
    return found


def marked():
    """{task: (file, name of the function)}: what is marked in the code, in order."""
    found = {}
    for path in sorted(ROOT.glob("*.py")):
        text = path.read_text()
        lines = text.splitlines()
        for name, node in functions(text).items():
            if mark := re.search(r"  # task (\d\.\d)$", lines[node.lineno - 1]):
                found[mark[1]] = path.name, name
    return dict(sorted(found.items()))


def rewrite(text, change):
    """A source text, each of its functions as change(name, node, lines of it) gives it."""
    lines = text.splitlines(keepends=True)
    for name, node in sorted(functions(text).items(), key=lambda pair: -pair[1].lineno):
        mine = slice(node.lineno - 1, node.end_lineno)
        lines[mine] = change(name, node, lines[mine])
    return "".join(lines)


def blank(text, wanted):
    """A source text without the bodies of the functions `wanted`, {name: task}; their docstrings stay."""
    def change(name, node, lines):
        if name not in wanted:
            return lines
        first = node.body[0]
        body = f'{" " * first.col_offset}raise NotImplementedError("task {wanted[name]}")\n'
        return [*lines[:first.end_lineno - node.lineno + 1], body]
    return rewrite(text, change)


def solve(text, solved, names):
    """A source text with the functions `names` as they are in the source text `solved`."""
    source = solved.splitlines(keepends=True)
    answers = {name: source[node.lineno - 1:node.end_lineno] for name, node in functions(solved).items()}
    return rewrite(text, lambda name, node, lines: answers[name] if name in names else lines)


def tests(task):
    """The tests that grade a task, as pytest names them: its checks, then tests of this project."""
    pattern = rf"^def (test_task_{task.replace('.', '_')}_\w+)"
    checks = re.findall(pattern, (ROOT / CHECKS).read_text(), re.MULTILINE)
    return [*(f"{CHECKS}::{name}" for name in checks),
            *(f"tests/test_{TASKS[task].file}.py::test_{name}" for name in TASKS[task].tests)]


def copy(patterns, source, folder):
    """Copy the files and folders of `source` that match into `folder`."""
    for path in (path for pattern in patterns for path in sorted(source.glob(pattern))):
        target = folder / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, target, ignore=KEPT_BACK, dirs_exist_ok=True)
        else:
            shutil.copy(path, target)


def make(folder, wanted):
    """Write the assignment of the tasks `wanted` into `folder`: the project, and TASKS.md."""
    copy(HANDED_OUT, ROOT, folder)
    known, chapter = marked(), None
    text = (f"# Tasks\n\n{sum(TASKS[task].points for task in wanted)} points. Write the functions that raise "
            "`NotImplementedError`. No task needs another one to be\nsolved before: its checks run its "
            f"function alone. All checks that you pass so far:\n\n    python -m pytest {CHECKS}\n")
    for file in {known[task][0] for task in wanted}:
        mine = {name: task for task, (where, name) in known.items() if task in wanted and where == file}
        (folder / file).write_text(blank((ROOT / file).read_text(), mine))
    for task in wanted:
        (file, name), (points, paper, *_) = known[task], TASKS[task]
        node = functions((ROOT / file).read_text())[name]
        if task[0] != chapter:
            chapter = task[0]
            text += f"\n## {chapter} {CHAPTERS[int(chapter)]}\n"
        text += (f"\n### {task} `{name}` in `{file}`, {points} points\n\n{paper[0].upper()}{paper[1:]}. To "
                 f"be solved before: nothing. `{name.split('.')[-1]}({ast.unparse(node.args)})`:\n\n"
                 + textwrap.indent(ast.get_docstring(node), "> ", lambda line: True).replace("> \n", ">\n")
                 + f"\n\n    python -m pytest {CHECKS} -k task_{task.replace('.', '_')}\n")
    (folder / "TASKS.md").write_text(text)


def plant(folder, number):
    """Write the project with one of `BUGS` into `folder`, and HUNT.md. There are no tests in it."""
    copy(PROJECT, ROOT, folder)
    bug = BUGS[number - 1]
    (folder / bug.file).write_text((ROOT / bug.file).read_text().replace(bug.right, bug.wrong))
    symptom = textwrap.fill(" ".join(bug.symptom.split()), 100)
    (folder / "HUNT.md").write_text(f"# Bug {number}\n\n{symptom}\n\nThere is one mistake, in one place; all "
                                    "comments and docstrings tell the truth. Find it, and mend it.\n")


class Outcomes:
    """What pytest reports: {test: None if it passed, else why it failed}; a plugin."""

    def __init__(self):
        self.found = {}

    def pytest_runtest_logreport(self, report):
        file, _, name = report.location
        test, why = f"{Path(file).name}::{name.partition('[')[0]}", self.found.get
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.found[test] = why(test) or (crash.message if crash else str(report.longrepr))
        elif report.when == "call":
            self.found[test] = why(test)

    def pytest_collectreport(self, report):
        if report.failed:
            self.found["import"] = str(report.longrepr).strip().splitlines()[-1].removeprefix("E ").strip()


def run(place, wanted):
    """In a process of its own: run the tests `wanted` in the folder `place`, and write what they say."""
    import pytest
    import torch
    torch.set_num_threads(1)
    os.chdir(place)
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != ROOT]
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    outcomes = Outcomes()
    pytest.main([*wanted, f"--rootdir={place}", "-pno:cacheprovider"], [outcomes])
    (place / "outcomes.json").write_text(json.dumps(outcomes.found))


def outcomes(place, wanted):
    """[None for a test of `wanted` that passes in the folder `place`, else why not]."""
    copy(("tests", ".pytest.ini", CHECKS), ROOT, place)
    (place / "conftest.py").unlink(missing_ok=True)                    # a student's could change the tests
    context = multiprocessing.get_context("forkserver")                # loads PyTorch once for all tasks
    context.set_forkserver_preload(["pytest", "torch", "torchvision"])
    process = context.Process(target=run, args=(place, wanted))
    process.start()
    process.join(PATIENCE)
    if process.exitcode is None:
        process.kill()
        return [f"no end after {PATIENCE} s"] * len(wanted)
    file = place / "outcomes.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    return [found.get(Path(test).name, found.get("import", "the tests did not come to their end"))
            for test in wanted]


def sentence(test, why):
    """Why a test failed, for a student: nothing of the code that was run beside theirs."""
    file, name = test.split("::")
    if file == CHECKS:
        words = name.split("_", 4)[4].replace("_", " ")
        return textwrap.shorten(f"{words}: {why.removeprefix('AssertionError: ')}", 500)
    return f"in the whole project this does not hold: {name.removeprefix('test_').replace('_', ' ')}"


def grade(folder, task):
    """The row of one task in a student's folder: tests, points, and what was wrong, None if nothing was."""
    known, wanted = marked(), tests(task)
    file, name = known[task]
    row = {"task": task, "function": name, "passed": 0, "tests": len(wanted), "points": 0,
           "of": TASKS[task].points}
    try:
        text = (folder / file).read_text()
        mine = functions(text).get(name)
    except (OSError, SyntaxError, ValueError) as error:
        return row | {"says": f"{file} cannot be read: {error}"}
    if mine is None:
        return row | {"says": f"{file} has no {name}"}
    if f'NotImplementedError("task {task}")' in ast.get_source_segment(text, mine):
        return row | {"says": "not begun"}
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary).resolve()
        copy(("*.py",), folder, place)                                  # they may have files of their own
        copy(("*.py", "machinery"), ROOT, place)
        others = [n for where, n in known.values() if where == file and n != name]
        (place / file).write_text(solve(text, (ROOT / file).read_text(), others))
        found = outcomes(place, wanted)
    passed = found.count(None)
    says = next((sentence(test, why) for test, why in zip(wanted, found) if why is not None), None)
    return row | {"passed": passed, "points": row["of"] * passed // len(wanted), "says": says}


def report_hunt(folder):
    """Print and return the grade of a hunt: a bug is found, a point, if its tests pass in that folder."""
    number = int(re.search(r"# Bug (\d+)", (folder / "HUNT.md").read_text())[1])
    wanted = [f"tests/test_{test}" for test in BUGS[number - 1].tests]
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary).resolve()
        copy(("*.py", "machinery"), folder, place)
        passed = outcomes(place, wanted).count(None)
    found = passed == len(wanted)
    print(f"bug {number}: {'found' if found else 'it is still there'}, {passed} of {len(wanted)} tests")
    return {"bug": number, "passed": passed, "tests": len(wanted), "points": int(found), "of": 1}


def report_tasks(folder, wanted):
    """Print and return the grade of the tasks `wanted`."""
    rows = []
    for task in wanted:
        rows.append(row := grade(folder, task))
        print(f"{task}  {row['function']:<26}{row['passed']} of {row['tests']} tests  {row['points']:>3} of "
              f"{row['of']} points", flush=True)
        if row["says"]:
            print(textwrap.indent(textwrap.fill(row["says"], 100), " " * 5), flush=True)
    points, of = (sum(row[key] for row in rows) for key in ("points", "of"))
    print(f"{points} of {of} points")
    return {"tasks": rows, "points": points, "of": of}


def main(argv=None):
    p = argparse.ArgumentParser(prog="assignment.py", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: p.exit(2, f"assignment.py: {message}\n")
    verbs = p.add_subparsers(dest="verb", required=True)
    for verb in ("make", "bug", "grade"):
        sub = verbs.add_parser(verb)
        sub.error = p.error
        if verb == "bug":
            sub.add_argument("number", type=int, choices=range(1, len(BUGS) + 1), help="which")
        sub.add_argument("folder", type=Path, help="the student's; make and bug need a new one")
        if verb != "bug":
            sub.add_argument("tasks", nargs="*", metavar="TASK", help="chapters (3) or tasks (4.1)")
        if verb == "grade":
            sub.add_argument("--json", type=Path, metavar="FILE", help="write the grade there as well")
    args = p.parse_args(argv)
    folder = args.folder.resolve()
    if args.verb != "grade":
        if ROOT in (folder, *folder.parents):
            p.error(f"{folder} is in the project itself: name a folder beside it")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            p.error(f"{folder} holds something already")
    elif not folder.is_dir():
        p.error(f"{folder} is no folder")
    if args.verb == "bug":
        plant(folder, args.number)
        print(f"bug {args.number} is in {folder}: see HUNT.md there")
        return 0
    known = marked()
    for word in args.tasks:
        if word not in known and word not in {task[0] for task in known}:
            p.error(f"{word} is no task, choose from {', '.join(known)}, or a chapter, 1 to {max(CHAPTERS)}")
    wanted = [task for task in known if not args.tasks or {task, task[0]} & set(args.tasks)]
    if args.verb == "make":
        make(folder, wanted)
        print(f"{len(wanted)} tasks in {folder}: see TASKS.md there")
        return 0
    report = report_hunt(folder) if (folder / "HUNT.md").exists() else report_tasks(folder, wanted)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return int(report["points"] < report["of"])


if __name__ == "__main__":
    sys.exit(main())

"""Assignments made from the code: the functions marked `# task` lose their bodies, and tests grade new ones.

    python classroom/assignment.py make ../homework          # all tasks; or chapters, tasks: 3 4.1
    python classroom/assignment.py grade ../homework         # a line a task

A student gets the whole project, with the signature and docstring of each function that is to be written. A
task is graded with all others solved, by the tests here and not by those in the student's folder. Grading
runs the student's code.
"""
import argparse
import ast
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
HANDED_OUT = ("*.py", "machinery", "tests", "datasets", "README.md", "PAPER.md", ".pictures", "LICENSE",
              "requirements.txt", ".pytest.ini", ".ruff.toml", ".gitignore")
CHAPTERS = {1: "A candidate, at any width (Table 2, channel masks)",
            2: "Two sampled paths (Architecture Space)",
            3: "SuperNet2SuperNet (Eqs. 1-3, Fig. 1)", 4: "Progressive SuperNet Distillation (Eq. 4)",
            5: "From a supernet to a network (Table 3)"}
GRADED_BY = {                                                          # task: file, tests
    "1.1": ("ops", "a_residual_is_cut_or_padded_to_the_output"),
    "1.2": ("ops", "the_mask_is_the_weighted_sum_of_prefixes"),
    "1.3": ("ops", "a_candidate_at_any_prefix_width_is_a_plain_one_with_sliced_weights",
            "hidden_widths_are_one_soft_mask_behind_batch_norm_and_activation",
            "candidates_that_are_computed_together_are_those_computed_alone"),
    "2.1": ("supernet", "the_temperature_falls_exponentially_from_5_to_a_tenth"),
    "2.2": ("supernet", "pairs_are_drawn_without_replacement_from_the_softmax",
            "the_choices_of_a_path_are_drawn_independently",
            "gates_are_the_softmax_of_the_two_perturbed_logits_over_the_temperature"),
    "2.3": ("supernet", "the_sliced_supernet_is_the_full_width_masked_one",
            "one_path_is_the_network_of_its_choices",
            "gates_of_0_and_1_for_two_sampled_paths_give_the_network_of_one_of_them"),
    "3.1": ("grow", "eq_1_keeps_old_channels_and_samples_the_new_ones"),
    "3.2": ("grow", "one_map_serves_all_that_carry_a_channel"),
    "3.3": ("grow", "the_grown_supernet_computes_the_same_at_its_largest",
            "consumers_ignore_new_channels_after_zero_widening", "growth_is_as_exact_as_its_numbers"),
    "3.4": ("grow", "a_new_block_is_exactly_the_identity", "a_new_block_learns_from_the_first_step",
            "a_new_block_has_identity_kernels"),
    "4.1": ("distill", "the_loss_is_equation_4",
            "the_gradient_is_that_of_equation_4_and_reaches_the_student_alone",
            "without_a_teacher_or_with_lambda_0_it_is_the_cross_entropy",
            "the_loss_is_finite_for_a_sure_teacher"),
    "4.2": ("distill", "lambda_falls_linearly_from_a_half_to_a_twentieth"),
    "5.1": ("flops", "candidate", "layers_are_the_steps_and_shapes_of_a_network"),
    "5.2": ("derive", "a_network_inherits_the_leading_corner_of_every_tensor",
            "a_derived_network_computes_what_its_path_computed"),
    "5.3": ("derive", "recalibrated_statistics_are_the_mean_over_batches_of_their_statistics"),
    "5.4": ("derive", "viterbi_finds_the_best_network_at_a_price",
            "the_list_of_viterbi_is_the_best_networks_in_order")}
PATIENCE = 600                                                         # seconds that a task's tests may take


def functions(text):
    """{name: node} of all functions in a source text, methods as Class.name. SyntaxError if it is not one."""
    found = {}
    for node in ast.parse(text).body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        found |= {prefix + f.name: f for f in inner if isinstance(f, ast.FunctionDef)}
    return found


def tasks():
    """{task: (file, name of the function)}: what is marked in the code, in order."""
    found = {}
    for path in sorted(ROOT.glob("*.py")):
        text = path.read_text()
        lines = text.splitlines()
        for name, node in functions(text).items():
            if marked := re.search(r"  # task (\d\.\d)$", lines[node.lineno - 1]):
                found[marked[1]] = path.name, name
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
    """The tests that grade a task, as pytest names them."""
    file, *names = GRADED_BY[task]
    return [f"tests/test_{file}.py::test_{name}" for name in names]


def make(folder, wanted):
    """Write the assignment of the tasks `wanted` into `folder`: the project, and TASKS.md."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in (path for pattern in HANDED_OUT for path in sorted(ROOT.glob(pattern))):
        if path.is_dir():
            left_out = shutil.ignore_patterns("__pycache__", "test_classroom.py")
            shutil.copytree(path, folder / path.name, ignore=left_out)
        else:
            shutil.copy(path, folder / path.name)
    marked, text, chapter = tasks(), "# Tasks\n", None
    for file in {marked[task][0] for task in wanted}:
        mine = {name: task for task, (where, name) in marked.items() if task in wanted and where == file}
        (folder / file).write_text(blank((ROOT / file).read_text(), mine))
    for task in wanted:
        file, name = marked[task]
        if task[0] != chapter:
            chapter = task[0]
            text += f"\n## {chapter} {CHAPTERS[int(chapter)]}\n"
        text += f"\n{task} `{name}` in `{file}`; its tests:\n\n    python -m pytest {tests(task)[0]}"
        text += "".join(f" \\\n        {test}" for test in tests(task)[1:]) + "\n"
    (folder / "TASKS.md").write_text(text)


def grade(folder, task):
    """What is to be said of one task in a student's folder: "passed", or what went wrong, in a few words."""
    marked = tasks()
    file, name = marked[task]
    try:
        text = (folder / file).read_text()
        mine = functions(text).get(name)
    except (OSError, SyntaxError, ValueError) as error:
        return f"{file} cannot be read: {error}"
    if mine is None:
        return f"{file} has no {name}"
    if f'NotImplementedError("task {task}")' in ast.get_source_segment(text, mine):
        return "not begun"
    with tempfile.TemporaryDirectory() as temporary:
        place, report = Path(temporary) / "graded", Path(temporary) / "report.xml"
        for part in ("tests", "machinery"):
            shutil.copytree(ROOT / part, place / part)
        shutil.copy(ROOT / ".pytest.ini", place)
        for path in folder.glob("*.py"):
            shutil.copy(path, place)
        for other in {where for where, _ in marked.values()}:
            others = [n for where, n in marked.values() if where == other and n != name]
            solved = (ROOT / other).read_text()
            try:
                (place / other).write_text(solve((place / other).read_text(), solved, others))
            except (OSError, SyntaxError, ValueError):
                (place / other).write_text(solved)             # others may lie in ruins there
        command = [sys.executable, "-m", "pytest", "-x", f"--junitxml={report}", f"--rootdir={place}",
                   *(place / test for test in tests(task))]
        try:
            subprocess.run(command, check=False, cwd=place, capture_output=True, timeout=PATIENCE)
            cases = ElementTree.parse(report).find("testsuite").findall("testcase")
        except subprocess.TimeoutExpired:
            return f"no end after {PATIENCE} s"
        except (OSError, ElementTree.ParseError):
            return "the tests did not come to their end"
    for case in cases:
        for wrong in (*case.findall("failure"), *case.findall("error")):
            return f"failed {case.get('name')}: {textwrap.shorten(wrong.get('message'), 100)}"
    return "passed" if cases else "the tests did not come to their end"


def main(argv=None):
    p = argparse.ArgumentParser(prog="assignment.py", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: p.exit(2, f"assignment.py: {message}\n")
    p.add_argument("verb", choices=("make", "grade"))
    p.add_argument("folder", type=Path, help="the student's; to make one, it must be new and not in here")
    p.add_argument("tasks", nargs="*", metavar="TASK", help="chapters (3) or single tasks (4.1); all without")
    args = p.parse_args(argv)
    known = tasks()
    for word in args.tasks:
        if word not in known and word not in {task[0] for task in known}:
            p.error(f"{word} is no task, choose from {', '.join(known)}, or a chapter, 1 to {max(CHAPTERS)}")
    wanted = [task for task in known if not args.tasks or {task, task[0]} & set(args.tasks)]
    folder = args.folder.resolve()
    if args.verb == "make":
        if ROOT in (folder, *folder.parents):
            p.error(f"{folder} is in the project itself: name a folder beside it")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            p.error(f"{folder} holds something already")
        make(folder, wanted)
        print(f"{len(wanted)} tasks in {folder}: see TASKS.md there")
        return 0
    if not folder.is_dir():
        p.error(f"{folder} is no folder")
    passed = 0
    for task in wanted:
        says = grade(folder, task)
        passed += says == "passed"
        print(f"{task}  {known[task][1]:<26}{says}", flush=True)
    print(f"{passed} of {len(wanted)} passed")
    return int(passed < len(wanted))


if __name__ == "__main__":
    sys.exit(main())

"""Mutation testing: makes small changes to a file, one by one, and runs its tests on each.

    make mutation FILE=training/data.py SAMPLE=50

Mutations are those of cosmic-ray's operators. Each is made in a copy of the repository, where the
tests that call the mutated function are run, fastest first, until one fails. They run in a process
forked from this one, which has imported TensorFlow and Keras without starting them. Surviving
mutants are printed as diffs; tests/mutation.md lists the known ones with the reason.
"""

import argparse
import ast
import bisect
import difflib
import gc
import importlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import cosmic_ray.plugins
import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code

ROOT = Path(__file__).resolve().parent.parent
SEED = 0

UPDATES = [
    f"tests/training/test_{name}.py" for name in ("step_functions", "optimization", "optimizers")
]
FITTING = [
    "tests/test_anatomy.py::test_class_names_set_the_classes_and_decode_predictions",
    *(
        f"tests/test_free_sizes.py::test_{name}"
        for name in (
            "padding_adds_the_mean_color_below_and_to_the_right",
            "padding_of_models_of_other_kinds",
            "padding_in_a_graph_need_not_know_the_size",
            "the_next_side_has_the_patches_that_the_stages_pool",
        )
    ),
]

# Files whose formulas decide what a model learns, and the tests to run for each.
TESTS = {
    "training/augmentation.py": ["tests/training/test_augmentation.py"],
    "training/data.py": [
        "tests/training/test_data.py",
        "tests/training/test_keras_cv_augmentation.py",
    ],
    "training/step_functions.py": UPDATES,
    "training/optimization.py": UPDATES,
    "keras_tnt/distillation.py": ["tests/test_distillation.py"],
    "keras_tnt/preprocessing.py": ["tests/test_preprocessing.py", *FITTING],
} | {
    str(path.relative_to(ROOT)): [
        "tests/layers",
        "tests/test_tnt.py",
        "tests/test_pyramid_tnt.py",
    ]
    for path in sorted((ROOT / "keras_tnt" / "layers").glob("*.py"))
    if path.name != "__init__.py"
}

# Leaves out replacements that are unlikely as a typo, such as bit operators for a sum.
LEFT_OUT = (
    r"core/ReplaceBinaryOperator_\w+_(RShift|LShift|BitOr|BitAnd|BitXor|Pow|Mod|FloorDiv)",
    r"core/ReplaceUnaryOperator_\w+_(Not|Invert|UAdd)",
    r"core/ReplaceComparisonOperator_\w+_(Is|IsNot)",
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help=f"the files to change: {', '.join(TESTS)}")
    parser.add_argument("--sample", type=int, default=0, help="so many of each file; 0: all")
    parser.add_argument(
        "--seconds", type=float, default=0, help="the shortest tests, together so long; 0: all"
    )
    parser.add_argument("-k", default="", help="which of the tests, as pytest's -k")
    parser.add_argument("--again", help="try only what survived by such a file of --output")
    parser.add_argument("--output", help="a file to write what survived to, as JSON")
    arguments = parser.parse_args()
    files = arguments.files or sorted(TESTS)
    if unknown := sorted(set(files) - set(TESTS)):
        parser.error(f"{', '.join(unknown)}: the files are {', '.join(sorted(TESTS))}")
    warm_up()
    results = {}
    again = json.loads(Path(arguments.again).read_text()) if arguments.again else None
    with tempfile.TemporaryDirectory() as copy:
        copy_repository(copy)
        baselines = {}
        for file in files:
            tests = tuple(TESTS[file])
            if tests not in baselines:
                baselines[tests] = baseline(Path(copy), tests, arguments.k)
            only = again[file]["survived"] if again else None
            results[file] = sweep(Path(copy), file, baselines[tests], arguments, only)
            if arguments.output:
                Path(arguments.output).write_text(json.dumps(results, indent=1))
    for file, result in results.items():
        print(f"{file}: {result['caught']} of {result['tried']} mutations were caught")
    return 1 if any(result["survived"] for result in results.values()) else 0


def warm_up():
    """Imports slow modules, none of which may start threads: threads do not survive a fork."""
    os.environ["KERAS_BACKEND"] = "tensorflow"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # The tests need no plugins of other packages.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    for name in ("tensorflow", "keras", "PIL.Image", "sklearn.datasets", "sklearn.model_selection"):
        importlib.import_module(name)
    # The garbage collector need not scan these objects again in each process.
    gc.collect()
    gc.freeze()


def copy_repository(folder):
    """Copies every file that is tracked or untracked and not ignored."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, Path(folder) / name)


def sweep(copy, file, tests, arguments, only=None):
    """Runs the mutations of a file, a sample of them, or those in `only`; returns a JSON object."""
    path = copy / file
    source = path.read_text(encoding="utf-8")
    there_are, chosen = mutations(source, arguments.sample)
    if only is not None:
        chosen = [each for each in chosen if difference(file, source, each[0]) in only]
    print(f"{file}: {len(chosen)} of {there_are} mutations, {len(tests)} tests", flush=True)
    survived = []
    for number, (mutated, line) in enumerate(chosen, 1):
        selected = those_that_call(tests, file, function_at(functions_of(source), line))
        if arguments.seconds:
            selected = shortest(tests, selected, arguments.seconds)
        seconds = 60 + 4 * sum(tests[name]["seconds"] for name in selected)
        path.write_text(mutated, encoding="utf-8")
        # A bytecode cache is identified by file size and whole seconds, so each mutation gets
        # another time.
        os.utime(path, (number, number))
        began = time.monotonic()
        caught = bool(selected) and run_tests(copy, selected, seconds) != 0
        told = "caught" if caught else "SURVIVED"
        print(f"{number} {told} line {line}, {time.monotonic() - began:.0f} s", flush=True)
        if not caught:
            survived.append(difference(file, source, mutated))
            print(survived[-1], flush=True)
    path.write_text(source, encoding="utf-8")
    return {
        "there_are": there_are,
        "tried": len(chosen),
        "caught": len(chosen) - len(survived),
        "survived": survived,
    }


def difference(file, source, mutated):
    lines = source.splitlines(True), mutated.splitlines(True)
    return "".join(difflib.unified_diff(*lines, file, file, n=1))


# === The mutations ===


def places(source):
    """Yields (operator, index of its occurrence, line) of each mutation."""
    tree = get_ast(source)
    for name in sorted(cosmic_ray.plugins.operator_names()):
        operator = cosmic_ray.plugins.get_operator(name)
        if operator.arguments() or any(re.fullmatch(pattern, name) for pattern in LEFT_OUT):
            continue
        operator = operator()
        found = [p for node in ast_nodes(tree) for p in operator.mutation_positions(node)]
        for occurrence, (start, _) in enumerate(found):
            yield operator, occurrence, start[0]


def mutations(source, count):
    """Returns the number of mutations, and (mutated source, line) of a sample in source order."""
    found = list(places(source))
    order = random.Random(SEED).sample(range(len(found)), len(found))
    seen, chosen = {source}, {}
    for place in order:
        operator, occurrence, line = found[place]
        mutated = mutate_code(source, operator, occurrence)
        if mutated and mutated not in seen and not same_program(source, mutated):
            seen.add(mutated)
            chosen[place] = mutated, line
        if len(chosen) == count:
            break
    return len(found), [chosen[place] for place in sorted(chosen)]


def same_program(source, mutated):
    try:
        return ast.dump(ast.parse(source)) == ast.dump(ast.parse(mutated))
    except SyntaxError:
        return True


def functions_of(source):
    """Returns (name, first line, last line) of each outermost function and method."""
    found = []

    def look(node):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef):
                first = min([child.lineno, *(d.lineno for d in child.decorator_list)])
                found.append((child.name, first, child.end_lineno))
            elif isinstance(child, ast.ClassDef):
                look(child)

    look(ast.parse(source))
    return found


def function_at(functions, line):
    """Returns the first line of the function that contains a line. `None` outside of functions."""
    return next((first for _, first, last in functions if first <= line <= last), None)


# === The tests ===


def baseline(copy, tests, chosen):
    """Runs tests on the unchanged code, and returns {name: {"seconds", "calls"}}.

    Args:
        copy: path of the copy of the repository.
        tests: test files and test ids.
        chosen: expression that selects tests, as pytest's -k.

    Raises:
        SystemExit: if a test fails.
    """
    record = copy / "called.json"
    record.unlink(missing_ok=True)
    functions = {
        str(copy / file): functions_of((copy / file).read_text(encoding="utf-8"))
        for file in TESTS
        if tuple(TESTS[file]) == tests
    }
    if run_tests(copy, ["-k", chosen, *tests], 3600, Calls(functions, record)):
        raise SystemExit((copy / "output.txt").read_text()[-3000:])
    return json.loads(record.read_text())


def those_that_call(tests, file, function):
    """Returns tests that call a function, fastest first. `None` selects any call into the file."""
    chosen = [
        name
        for name, each in tests.items()
        if any(path.endswith(f"/{file}") and function in (None, f) for path, f in each["calls"])
    ]
    return sorted(chosen, key=lambda name: tests[name]["seconds"])


def shortest(tests, names, seconds):
    """Returns the first tests that take at most `seconds` in total, at least one.

    `names` are ordered by their duration.
    """
    ends = list(itertools.accumulate(tests[name]["seconds"] for name in names))
    return names[: max(1, bisect.bisect_right(ends, seconds))]


def run_tests(copy, arguments, seconds, plugin=None):
    """Returns pytest's exit status in a forked process. -1 after a timeout."""
    process = os.fork()
    if not process:
        status = 70
        try:
            os.setsid()
            os.chdir(copy)
            sys.path.insert(0, str(copy))
            output = os.open(copy / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:unraisableexception"]
            options += ["-m", "not slow", "--durations=0"]
            status = int(pytest.main([*options, *arguments], [plugin] if plugin else []))
        finally:
            os._exit(status)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return -1


class Calls:
    """A pytest plugin that records the functions that each test calls.

    Calls of a module or session fixture count for every test that uses the fixture.

    Args:
        functions: dict of `functions_of` by path.
        record: path of the JSON file to write.
    """

    def __init__(self, functions, record):
        self.functions, self.record = functions, record
        self.tests, self.fixtures, self.seconds = {}, {}, {}
        self.now = set()

    def profile(self, frame, event, argument):
        if event != "call":
            return
        code = frame.f_code
        path, name = code.co_filename, code.co_name
        if path in self.functions:
            self.now.add((path, function_at(self.functions[path], code.co_firstlineno)))
        elif name.startswith("tf__") and "__autograph_generated" in path:
            for path, functions in self.functions.items():
                self.now |= {(path, first) for each, first, _ in functions if name == f"tf__{each}"}

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef, request):
        before, self.now = self.now, set()
        result = yield
        if fixturedef.scope != "function":
            self.fixtures.setdefault(fixturedef.argname, set()).update(self.now)
        self.now |= before
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item, nextitem):
        self.now, began = set(), time.monotonic()
        threading.setprofile(self.profile)
        sys.setprofile(self.profile)
        result = yield
        sys.setprofile(None)
        threading.setprofile(None)
        self.seconds[item.nodeid] = time.monotonic() - began
        self.tests[item.nodeid] = (self.now, item.fixturenames)
        return result

    def pytest_sessionfinish(self, session):
        known = {
            name: {
                "seconds": round(self.seconds[name], 2),
                "calls": list(calls.union(*(self.fixtures.get(f, ()) for f in fixtures))),
            }
            for name, (calls, fixtures) in self.tests.items()
        }
        Path(self.record).write_text(json.dumps(known))


if __name__ == "__main__":
    sys.exit(main())

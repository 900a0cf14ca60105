"""Whether the tests would see a change: small mutations of a file, one by one, by cosmic-ray.

    make mutation FILE=training/data.py SAMPLE=50

Each mutation is made in a copy of the repository, and the file's tests run there until one fails.
What survives is printed as a difference; tests/mutation.md lists those that are known, and why.
"""

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkResult

ROOT = Path(__file__).resolve().parent.parent
SEED = 0

# The files whose formulas decide what a model learns, and the tests that run for each.
TESTS = {
    "training/augmentation.py": ["tests/training/test_augmentation.py"],
    "training/data.py": ["tests/training/test_data.py"],
    "training/step_functions.py": ["tests/training/test_step_functions.py"],
    "training/optimization.py": ["tests/training/test_optimization.py"],
    "keras_tnt/distillation.py": ["tests/test_distillation.py"],
    "keras_tnt/preprocessing.py": ["tests/test_preprocessing.py"],
} | {
    str(path.relative_to(ROOT)): ["tests/layers"]
    for path in sorted((ROOT / "keras_tnt" / "layers").glob("*.py"))
    if path.name != "__init__.py"
}

# Of each operator only what a slip of the hand would write: no bit operators for a sum.
LEFT_OUT = (
    r"core/ReplaceBinaryOperator_\w+_(RShift|LShift|BitOr|BitAnd|BitXor|Pow|Mod|FloorDiv)",
    r"core/ReplaceUnaryOperator_\w+_(Not|Invert|UAdd)",
    r"core/ReplaceComparisonOperator_\w+_(Is|IsNot)",
)

CONFIGURATION = """
[cosmic-ray]
module-path = "{file}"
timeout = {timeout}
excluded-modules = []
test-command = "{python} -m pytest -q -x -p no:cacheprovider -m 'not slow' {tests}"
[cosmic-ray.distributor]
name = "local"
[cosmic-ray.filters.operators-filter]
exclude-operators = [{left_out}]
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", choices=sorted(TESTS), help="the file to change")
    parser.add_argument("--sample", type=int, default=0, help="so many mutations; 0: all")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for a test run")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as copy:
        copy_repository(copy)
        session = Path(copy) / "session.sqlite"
        configuration = Path(copy) / "mutation.toml"
        configuration.write_text(
            CONFIGURATION.format(
                file=arguments.file,
                timeout=arguments.timeout,
                python=sys.executable,
                tests=" ".join(TESTS[arguments.file]),
                left_out=", ".join(f"'{pattern}'" for pattern in LEFT_OUT),
            )
        )
        tool = Path(sys.executable).parent
        for command in (
            [tool / "cosmic-ray", "baseline", configuration],  # the tests pass as things stand
            [tool / "cosmic-ray", "init", configuration, session],
            [tool / "cr-filter-operators", session, configuration],
        ):
            subprocess.run(command, cwd=copy, check=True)
        choose(session, arguments.sample)
        subprocess.run([tool / "cosmic-ray", "exec", configuration, session], cwd=copy, check=True)
        return report(session)


def copy_repository(folder):
    """Copy every file that git knows or would know."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, Path(folder) / name)


def choose(session, count):
    """Leave a sample of the mutations to do, the same at each call."""
    with use_db(session, WorkDB.Mode.open) as database:
        pending = sorted(item.job_id for item in database.pending_work_items)
        places = {item.job_id: str(item.mutations) for item in database.pending_work_items}
        pending.sort(key=places.get)
        kept = set(random.Random(SEED).sample(pending, min(count or len(pending), len(pending))))
        for job in pending:
            if job not in kept:
                database.set_result(job, WorkResult(worker_outcome=WorkerOutcome.SKIPPED))


def report(session):
    """Print how many mutations were caught, and those that were not; returns the exit status."""
    with use_db(session, WorkDB.Mode.open) as database:
        results = [r for _, r in database.results if r.worker_outcome != WorkerOutcome.SKIPPED]
    survived = [r for r in results if r.test_outcome == TestOutcome.SURVIVED]
    for result in survived:
        print(result.diff)
    print(f"{len(results) - len(survived)} of {len(results)} mutations were caught")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())

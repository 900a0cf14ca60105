"""Builds a release and tests its installation: `make dist` and `make installs`.

    python tests/release.py build              sdist and wheel in dist/, reproducible and checked
    python tests/release.py install            every row of CASES in a clean environment
    python tests/release.py install jax export --oldest

Environments are created in a temporary directory and removed one after the other: with TensorFlow
or torch, one takes a minute or two and about 2 GB. Rows that fail are listed at the end, and the
exit status is 1.
"""

import argparse
import gzip
import hashlib
import io
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parent.parent
DIST = ROOT / "dist"

# The backend and the program to test each extra with. If the extra has no backend, jax is added,
# the smallest one.
CASES = {
    "": ("jax", "listing"),
    "tensorflow": ("tensorflow", "model"),
    "jax": ("jax", "model"),
    "torch": ("torch", "model"),
    "images": ("jax", "image"),
    "parquet": ("jax", "parquet"),
    "plots": ("jax", "picture"),
    "train": ("tensorflow", "model"),
    "dense": ("tensorflow", "model"),
    "export": ("tensorflow", "export"),
    "edge": ("jax", "edge"),
    "docs": ("jax", "docs"),
    "test": ("tensorflow", "model"),
}

# Runs in a clean environment, outside of the repository.
SETTING = """
import keras_tnt
import numpy as np

def tiny(**more):
    return keras_tnt.TNT(
        input_shape=(32, 32, 3), classes=3, patch_size=8, inner_stride=2, depth=1,
        outer_dim=16, inner_dim=4, outer_heads=2, inner_heads=2, **more,
    )

assert "tnt_small" in keras_tnt.list_models()
"""
MODEL = """
model = tiny()
answers = np.asarray(model.predict(np.zeros((2, 32, 32, 3), "float32"), verbose=0))
assert answers.shape == (2, 3) and abs(answers.sum() - 2) < 1e-5
model.save("tiny.keras")
"""
FIT = """
model.compile("adamw", "sparse_categorical_crossentropy")
model.fit(np.zeros((4, 32, 32, 3), "float32"), np.arange(4) % 3, verbose=0)
"""
PHOTO = """
from PIL import Image
Image.fromarray(np.arange(48 * 64 * 3, dtype="uint8").reshape(48, 64, 3)).save("photo.png")
"""
PROGRAMS = {
    "listing": MODEL,
    "model": MODEL + FIT,
    "image": MODEL + PHOTO + 'assert keras_tnt.load_image("photo.png", model).shape == (32, 32, 3)',
    "parquet": "import pyarrow.parquet",
    "picture": MODEL
    + PHOTO
    + 'image = keras_tnt.load_image("photo.png", model)\n'
    + 'keras_tnt.inspection.plot_attention(model, image, "attention.png")',
    "export": MODEL
    + """
keras_tnt.export.saved_model(model, "saved")
keras_tnt.export.onnx(model, "tiny.onnx")
session = keras_tnt.export.onnx_session("tiny.onnx")
assert session.run(None, {"images": np.zeros((1, 32, 32, 3), "float32")})
""",
    "edge": "import ai_edge_litert.interpreter, openvino",
    "docs": "import sphinx, furo, myst_parser",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("action", choices=("build", "install"))
    parser.add_argument("extras", nargs="*", metavar="EXTRA", help="all where none is named")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--oldest", action="store_true", help="only at the oldest versions")
    kinds.add_argument("--newest", action="store_true", help="only at the newest versions")
    options = parser.parse_intermixed_args()
    if options.action == "build":
        return build()
    unknown = set(options.extras) - set(CASES)
    if unknown:
        parser.error(f"there is no extra {unknown.pop()!r}; there are: {', '.join(CASES)}")
    kinds = [kind for kind in ("newest", "oldest") if getattr(options, kind)] or [
        "newest",
        "oldest",
    ]
    return install(options.extras or list(CASES), kinds)


# === Build ===


def build():
    """Builds in two directories with different file times, and saves the identical results."""
    with tempfile.TemporaryDirectory() as folder:
        made = [build_in(Path(folder) / name, when) for name, when in (("a", 1e9), ("b", 1.5e9))]
        sums = [{path.name: digest(path) for path in files} for files in made]
        if sums[0] != sums[1]:
            return fail(f"two builds differ: {sums[0]} and {sums[1]}")
        shutil.rmtree(DIST, ignore_errors=True)
        DIST.mkdir()
        for path in made[0]:
            shutil.copy(path, DIST)
    files = sorted(DIST.iterdir())
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *files], check=True)
    if problems := look_into(files):
        return fail("; ".join(problems))
    for path in files:
        print(f"{digest(path)}  dist/{path.name}  {path.stat().st_size / 1000:.0f} kB")
    print("Both the same from two builds.")
    return 0


def build_in(folder, when):
    """Builds from the files known to git in a separate directory, and returns [sdist, wheel]."""
    for name in tracked():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, path)
        path.chmod(0o644)
        os.utime(path, (when, when))
    epoch = source_date()
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", "made", "."],
        cwd=folder,
        env={**os.environ, "SOURCE_DATE_EPOCH": epoch},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    files = sorted((folder / "made").iterdir(), key=lambda path: path.suffix)
    for path in files:
        if path.suffix == ".gz":
            settle(path, int(epoch))
    return files


def tracked():
    """Returns the names of tracked and of untracked, not ignored files."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [name for name in names.splitlines() if (ROOT / name).is_file()]


def source_date():
    """Returns SOURCE_DATE_EPOCH from the environment, or the time of the last commit."""
    if given := os.environ.get("SOURCE_DATE_EPOCH"):
        return given
    last = ["git", "log", "-1", "--format=%ct"]
    return subprocess.run(last, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def settle(path, epoch):
    """Normalizes times and owners in a .tar.gz, for which setuptools uses those of the files."""
    content = io.BytesIO()
    with tarfile.open(path) as old, tarfile.open(fileobj=content, mode="w") as new:
        for member in sorted(old.getmembers(), key=lambda member: member.name):
            file = old.extractfile(member)
            member.mtime, member.uid, member.gid, member.uname, member.gname = epoch, 0, 0, "", ""
            member.pax_headers = {}
            new.addfile(member, file)
    with open(path, "wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=epoch) as zipped:
        zipped.write(content.getvalue())


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def look_into(files):
    """Returns a list of problems: files that a wheel or sdist lacks, or should not contain."""
    problems = []
    ours = {name for name in tracked() if name.startswith("keras_tnt/")}
    for path in files:
        if path.suffix == ".whl":
            names = {n for n in zipfile.ZipFile(path).namelist() if ".dist-info/" not in n}
        else:
            with tarfile.open(path) as archive:
                names = {member.name.partition("/")[2] for member in archive if member.isfile()}
            problems += [f"{path.name} lacks {n}" for n in {"setup.py", "LICENSE"} - names]
            names = {name for name in names if name.startswith(("keras_tnt/", "tests/"))}
        problems += [f"{path.name} lacks {name}" for name in sorted(ours - names)]
        problems += [f"{path.name} has {name} too" for name in sorted(names - ours)]
    return problems


# === Install ===


def install(extras, kinds):
    """Tests each extra by itself in a separate environment."""
    wheels = sorted(DIST.glob("*.whl"))
    if len(wheels) != 1:
        return fail("dist/ must hold one wheel: run `make dist`")
    failed = []
    for kind in kinds:
        for extra in extras:
            case = f"{kind} [{extra}]"
            print(f"== {case} ==", flush=True)
            with tempfile.TemporaryDirectory() as folder:
                try:
                    try_case(Path(folder), wheels[0], extra, kind)
                except subprocess.CalledProcessError as error:
                    failed.append(f"{case}: {' '.join(map(str, error.cmd[:4]))} ...")
    if failed:
        return fail("; ".join(failed))
    print("== all installed and worked ==")
    return 0


def try_case(folder, wheel, extra, kind):
    backend, program = CASES[extra]
    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    python = environment / "bin" / "python"
    told = [f"{wheel}[{extra}]" if extra else wheel]
    if backend not in "".join(requirements(extra)):
        told.append(backend)
    if kind == "oldest":
        constraints = folder / "oldest.txt"
        constraints.write_text("\n".join(oldest(extra, backend)) + "\n")
        told += ["-c", constraints]
    subprocess.run([python, "-m", "pip", "install", "-q", *told], check=True)
    subprocess.run([python, "-m", "pip", "check"], check=True)
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    clean |= {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "2"}
    # Old releases warn about newer versions of their own dependencies.
    strictly = ["-W", "error"] if kind == "newest" else []
    for command in (
        [python, *strictly, "-c", "import keras_tnt"],
        [environment / "bin" / "keras-tnt", "list", "tnt*"],
        [python, "-c", SETTING + PROGRAMS[program]],
    ):
        subprocess.run(command, cwd=folder, env=clean, check=True, stdout=subprocess.DEVNULL)
    versions = [python, "-m", "pip", "list", "--format=freeze"]
    listed = subprocess.run(versions, check=True, capture_output=True, text=True).stdout
    told = re.findall(r"^(?:keras|numpy|tensorflow|jax|torch)==.*$", listed, re.MULTILINE)
    print("worked with", *told, flush=True)


def requirements(extra):
    """Returns the requirements in setup.py with an extra. "" means without one."""
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    told = setup.call_args.kwargs
    return [*told["install_requires"], *told["extras_require"].get(extra, [])]


def oldest(extra, backend):
    """Yields constraints to the lowest versions that setup.py allows for an extra.

    NumPy is not constrained with JAX, which requires a newer one than the package does.
    """
    needed = requirements(extra)
    with_jax = any(requirement.startswith("jax") for requirement in [*needed, backend])
    for requirement in needed:
        name, bound = re.match(r"([\w.-]+)(?:[>=]=([\d.]+))?", requirement).groups()
        if bound and not (name == "numpy" and with_jax):
            yield f"{name}=={bound.rstrip('.')}" + (".*" if requirement.endswith(".*") else "")


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())

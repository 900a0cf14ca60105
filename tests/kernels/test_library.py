"""Native libraries: compilation, caching, damaged cache entries, fallback without compiler."""

import ctypes
import math
import os
import subprocess
import sys

import numpy as np
import pytest

from keras_tnt import kernels
from keras_tnt.kernels import cache, coefficients, toolchain

pytestmark = pytest.mark.one_backend

SIZES = kernels.InnerSizes(words=16, dim=2, heads=1, hidden=2, across_words=False)
GELU = """
extern "C" void gelu_of(const float* in, float* out, int count) {
  for (int i = 0; i < count; i += lanes) {
    const Vec y = gelu(load(in + i));
    std::memcpy(out + i, &y, sizeof y);
  }
}
"""


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    """Sets an empty cache directory and forgets earlier warnings; returns the package's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    kernels.warn_slower.cache_clear()
    return tmp_path / "caches" / "keras_tnt"


@pytest.fixture
def compiled(monkeypatch):
    """Returns a list to which each later compiler command for a library is appended."""
    run, commands = kernels.run, []
    monkeypatch.setattr(
        kernels,
        "run",
        lambda command: ("-shared" in command and commands.append(command), run(command))[1],
    )
    return commands


def test_library_is_compiled_once_per_settings(caches, compiled):
    for settings in ((), (), ("-DSOMETHING",)):
        assert kernels.library("torch_inner.cpp", SIZES, *settings).forward
    assert len(compiled) == len(os.listdir(caches)) == 2


def test_without_a_compiler_warns_once_and_returns_none(caches, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(UserWarning, match="CXX names the compiler.*no-such-compiler") as warned:
        assert kernels.library("torch_inner.cpp", SIZES) is None
        assert kernels.library("torch_inner.cpp", SIZES._replace(dim=4)) is None
    assert len(warned) == 1
    assert not caches.exists()


def test_failed_compilation_leaves_no_file(caches):
    with pytest.warns(UserWarning, match="could not be compiled and loaded.*error"):
        assert kernels.library("torch_inner.cpp", SIZES, "-include", "no-such-header.h") is None
    assert os.listdir(caches) == []


@pytest.mark.parametrize("obstacle", ["file", "noexec"])
def test_without_a_writable_cache_each_process_compiles(obstacle, caches, monkeypatch):
    if obstacle == "file":
        caches.parent.write_text("no folder can be made here")
    else:
        load = ctypes.CDLL

        def mounted_noexec(path):
            if str(caches) in path:
                raise OSError(f"{path}: failed to map segment from shared object")
            return load(path)

        monkeypatch.setattr(ctypes, "CDLL", mounted_noexec)
    assert kernels.library("torch_inner.cpp", SIZES).forward


def test_library_that_cannot_be_loaded_warns_and_returns_none(monkeypatch):
    def refuse(path):
        raise OSError(f"{path}: failed to map segment from shared object")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    with pytest.warns(UserWarning, match="slower.*failed to map segment"):
        assert kernels.library("torch_inner.cpp", SIZES) is None


@pytest.mark.slow
def test_two_processes_can_compile_at_once(caches):
    code = f"""if True:
        from keras_tnt import kernels
        library = kernels.library("torch_inner.cpp", kernels.InnerSizes(*{tuple(SIZES)}))
        assert library.forward"""
    environment = {**os.environ, "KERAS_BACKEND": "numpy"}  # the fastest backend to import
    command = [sys.executable, "-W", "error", "-c", code]
    started = [subprocess.Popen(command, env=environment) for _ in range(2)]
    assert [process.wait(120) for process in started] == [0, 0]
    assert len(os.listdir(caches)) == 1


# === Damaged cache entries ===


def cut(path):
    with open(path, "r+b") as file:
        file.truncate(os.path.getsize(path) // 2)


def flip(path):
    with open(path, "r+b") as file:
        file.seek(os.path.getsize(path) // 3)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def replaced(make):
    def change(path):
        os.unlink(path)
        make(path)

    return change


def sealed_nonsense(path):
    """Writes an intact cache entry that is not a library."""
    os.unlink(path)
    cache.write(path, b"no library")


DAMAGE = {
    "cut short": cut,
    "of a page": lambda path: os.truncate(path, 4096),
    "empty": lambda path: os.truncate(path, 0),
    "without its checksum": lambda path: os.truncate(path, os.path.getsize(path) - 10),
    "a bit flipped": flip,
    "no library": sealed_nonsense,
    "a FIFO": replaced(os.mkfifo),
    "a link to nothing": replaced(lambda path: os.symlink("/nowhere", path)),
    "a link to itself": replaced(lambda path: os.symlink(path, path)),
    "a folder": replaced(os.mkdir),
}


@pytest.fixture
def small(monkeypatch, tmp_path, caches):
    """Caches a library that compiles fast; returns its path and a function that loads it."""
    source = tmp_path / "small.cpp"
    source.write_text('extern "C" int number() { return 7; }')

    def load():
        return kernels.library(source, None).number()

    # Compiles without loading, as another process would: a loaded library must not be damaged.
    with monkeypatch.context() as patch:
        patch.setattr(ctypes, "CDLL", lambda path: path)
        kernels.library(source, None)
    (name,) = os.listdir(caches)
    return str(caches / name), load


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_cache_entry_is_recompiled(damage, small, compiled):
    path, load = small
    DAMAGE[damage](path)
    assert load() == 7 and len(compiled) == 1
    if damage != "a folder":  # a directory is not replaced: each process compiles
        assert cache.read(path) is not None
        assert load() == 7 and len(compiled) == 1


def test_symlink_in_the_cache_is_replaced_not_followed(small, tmp_path):
    path, load = small
    target = tmp_path / "mine"
    target.write_text("mine")
    os.unlink(path)
    os.symlink(target, path)
    assert load() == 7
    assert target.read_text() == "mine" and not os.path.islink(path)


@pytest.mark.parametrize("kind", ["unreadable", "fifo", "link to itself"])
def test_library_is_compiled_without_a_usable_cache_directory(kind, small, caches):
    path, load = small
    os.unlink(path)
    if kind == "unreadable":
        caches.chmod(0)
        if os.access(caches, os.R_OK):
            pytest.skip("this user reads everything")
    else:
        caches.rmdir()
        os.mkfifo(caches) if kind == "fifo" else os.symlink(caches, caches)
    try:
        assert load() == 7
    finally:
        if kind == "unreadable":
            caches.chmod(0o755)


@pytest.mark.parametrize("length", [0, 1, cache.SEAL_BYTES - 1, 1000])
def test_cache_entry_is_read_whole_or_not_at_all(length, tmp_path):
    path, content = tmp_path / "entry", os.urandom(1000)
    cache.write(path, content)
    assert cache.read(path) == content
    os.truncate(path, length)
    assert cache.read(path) is None
    assert cache.read(tmp_path) is None and cache.read(tmp_path / "none") is None


# === Compilers ===


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Returns a function that sets CXX to a shell script of the given lines."""

    def make(*lines, mode=0o755):
        path = tmp_path / "my compiler"
        path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
        path.chmod(mode)
        monkeypatch.setenv("CXX", f"'{path}'")
        return path

    return make


def refused(match):
    """Asserts that two libraries are refused with one warning."""
    with pytest.warns(UserWarning, match=match) as warned:
        for dim in (2, 4):
            assert kernels.library("torch_inner.cpp", SIZES._replace(dim=dim)) is None
    assert len(warned) == 1


@pytest.mark.parametrize("value", ["g++ 'x", 'c++ "', "g++ \\"])
def test_compiler_with_unbalanced_quotes_warns(value, monkeypatch):
    monkeypatch.setenv("CXX", value)
    refused(r"(?s)CXX is not a command: No .*Received: CXX=.*such as CXX=g\+\+")


def test_blank_cxx_means_the_default_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "  ")
    assert kernels.compiler() == ["c++"]


def test_compiler_output_may_be_any_bytes(script):
    script(r"printf '\377\376 no license \200' >&2; exit 3")
    refused("ended with 3.*no license")
    script(r"printf '\377\376'", 'exec c++ "$@"')
    assert kernels.library("torch_inner.cpp", SIZES).forward


def test_hanging_compiler_is_stopped_once(script, monkeypatch):
    path = script("sleep 1000 & wait")
    monkeypatch.setattr(kernels, "PROBE_SECONDS", 0.2)
    refused("did not end within 0.2 seconds and was stopped")
    assert str(path) in toolchain._stopped


def test_compiler_has_no_standard_input(script):
    script("read line && exit 0; exit 5")
    refused("ended with 5")


@pytest.mark.skipif(os.name != "posix" or os.getuid() == 0, reason="root starts everything")
def test_compiler_that_cannot_be_started_warns(script):
    script("exit 0", mode=0o644)
    refused("could not be started: .*Permission denied")


def test_gelu_is_accurate_in_its_tails(tmp_path):
    (tmp_path / "gelu.cpp").write_text(GELU)
    function = kernels.library(tmp_path / "gelu.cpp", SIZES).gelu_of
    x = np.concatenate([np.linspace(-15, 15, 60_000), np.geomspace(1e-30, 1e30, 1600)])
    x = np.concatenate([x, -x[-1600:]]).astype("float32")
    found = np.empty_like(x)
    pointer = ctypes.POINTER(ctypes.c_float)
    function(x.ctypes.data_as(pointer), found.ctypes.data_as(pointer), len(x))
    expected = np.array([0.5 * v * math.erfc(-v / math.sqrt(2)) for v in x.astype("float64")])
    # Below 1e-30 the error is not relative, as float32 has few digits left there.
    error = np.abs(found - expected) / np.maximum(np.abs(expected), 1e-30)
    assert np.max(error[np.abs(x) < 1]) < 4e-7
    assert np.max(error / np.maximum(1, x.astype("float64") ** 2)) < 4e-7

    found = np.array([np.nan] * 16, "float32")
    function(found.ctypes.data_as(pointer), found.ctypes.data_as(pointer), 16)
    assert np.all(np.isnan(found))


def test_header_has_the_derived_coefficients():
    derived = coefficients.coefficients()
    header = (kernels.FOLDER / "vectors.h").read_text(encoding="utf-8")
    assert all(f"{abs(value):.9g}f" in header for value in derived)
    assert coefficients.largest_error(derived) < 5.1e-8
    header = (kernels.FOLDER / "half.h").read_text(encoding="utf-8")
    derived = [*coefficients.powers_of_two(), *coefficients.log_odds()]
    assert all(f"{abs(value):.6g}f" in header for value in derived)

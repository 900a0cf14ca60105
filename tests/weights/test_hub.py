"""Hub downloads: caching, verification, and one clear error per failure."""

import contextlib
import errno
import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save_file

from keras_tnt.weights import hub as downloads
from tests.helpers.checks import unprivileged
from tests.helpers.hub_server import COMMIT, Hub

pytestmark = pytest.mark.one_backend
ROOT = Path(__file__).parents[2]
REPOSITORY, FILE = "someone/flowers", "model.safetensors"


@pytest.fixture
def content(tmp_path):
    """Returns the path of a 2 MB checkpoint."""
    path = tmp_path / "content.safetensors"
    save_file({"a": np.arange(500_000, dtype="float32")}, path)
    return path


@pytest.fixture
def served(hub, content):
    hub.add(REPOSITORY, FILE, content)
    return hub


def fetch(**arguments):
    return downloads.fetch(REPOSITORY, FILE, **arguments)


def kept(cache):
    """Returns all blobs in the cache, complete or not."""
    return [path for path in cache.rglob("*") if path.is_file() and "blobs" in path.parts]


@contextlib.contextmanager
def fails(kind, *words, cache=None):
    """Asserts one error with these words within 30 seconds, and no blobs in the cache."""
    start = time.monotonic()
    with pytest.raises(kind) as caught:
        yield caught
    assert time.monotonic() - start < 30
    for word in words:
        assert word in str(caught.value)
    if cache is not None:
        assert kept(cache) == []


def test_file_is_downloaded_once(served, content):
    path = fetch()
    assert Path(path).read_bytes() == content.read_bytes()
    assert fetch() == path
    assert len(served.requests) == 2  # a HEAD request and a download
    assert served.downloads() == 1


def test_renew_downloads_only_changed_files(served, content, tmp_path):
    path = fetch()
    assert fetch(renew=True) == path
    assert served.downloads() == 1
    newer = tmp_path / "newer.safetensors"
    save_file({"a": np.zeros(3, "float32")}, newer)
    served.add(REPOSITORY, FILE, newer)
    # The hub gives a changed file a new commit.
    Path(path).unlink()
    assert Path(fetch(renew=True)).read_bytes() == newer.read_bytes()


def test_renew_without_network_returns_the_cached_file(served, monkeypatch):
    path = fetch()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    assert fetch(renew=True) == path


def test_offline_mode_returns_the_cached_file_without_requests(served, monkeypatch):
    path = fetch()
    served.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch() == fetch(renew=True) == path
    assert served.requests == []


def test_offline_mode_without_a_cached_file_raises(served, cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with fails(ConnectionError, "HF_HUB_OFFLINE", "weights='<path>'", cache=cache):
        fetch()


def test_revision_can_be_a_commit(served):
    assert COMMIT in fetch(revision=COMMIT)


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_unreachable_host_raises(cache, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    with fails(ConnectionError, "Check the network", "weights='<path>'", cache=cache):
        fetch()


@pytest.mark.slow
def test_unresponsive_host_raises(cache, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with fails(ConnectionError, "Check the network", cache=cache):
            fetch()


def test_stalled_download_raises(served, monkeypatch):
    assert downloads.PATIENCE < 30
    monkeypatch.setattr(downloads, "PATIENCE", 2)
    served.stall = 60
    with fails(ConnectionError, "nothing came for 2 seconds", "Check the network"):
        fetch()


def test_unknown_repository_raises(hub, cache):
    with fails(ValueError, "There is no repository 'someone/flowers'", "log in", cache=cache):
        fetch()


def test_invalid_repository_name_raises(hub, cache):
    with fails(ValueError, "'some one/flow ers'", cache=cache):
        downloads.fetch("some one/flow ers", FILE)


def test_unknown_revision_raises(served, cache):
    with fails(ValueError, "no revision 'v9'", cache=cache):
        fetch(revision="v9")


def test_file_missing_in_the_repository_raises(served, cache):
    with fails(downloads.MissingFile, "no file 'other.safetensors'", cache=cache):
        downloads.fetch(REPOSITORY, "other.safetensors")


def test_missing_file_is_cached(served, monkeypatch):
    with pytest.raises(downloads.MissingFile):
        downloads.fetch(REPOSITORY, "config.json")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    with pytest.raises(downloads.MissingFile):
        downloads.fetch(REPOSITORY, "config.json", renew=True)


def test_hub_status_503_raises(served, cache):
    served.status = 503
    with fails(ConnectionError, "answered 503", "Try again later", cache=cache):
        fetch()


def test_server_that_is_not_a_hub_raises(cache, monkeypatch, served):
    served.status = 200
    with fails(ConnectionError, served.url, cache=cache):
        fetch()


def test_connection_that_always_breaks_raises(served, cache):
    served.cut = 100_000
    with fails(ConnectionError, "Check the network", cache=cache):
        fetch()


def test_broken_download_is_resumed(served, content):
    served.cut = 1_000_000
    times = iter([content.stat().st_size])
    send = served.RequestHandlerClass.send

    def mend(handler, path, with_body):
        send(handler, path, with_body)
        if with_body:
            served.cut = next(times, None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(served.RequestHandlerClass, "send", mend)
        assert Path(fetch()).read_bytes() == content.read_bytes()
    assert served.downloads() == 2


def test_hash_mismatch_with_the_hub_raises(served, content, cache):
    served.etags[content] = "a" * 64
    with fails(OSError, "came damaged", "sha256", "try again", cache=cache):
        fetch()
    del served.etags[content]
    assert Path(fetch()).read_bytes() == content.read_bytes()


def test_hash_mismatch_with_the_table_raises(served, cache):
    with fails(OSError, "came damaged", "sha256", cache=cache):
        fetch(sha256="b" * 64)


def test_truncated_file_on_the_hub_raises(served, content, cache):
    content.write_bytes(content.read_bytes()[:1_000_000])
    with fails(OSError, "came damaged", "no whole .safetensors", cache=cache):
        fetch()


def test_html_instead_of_the_file_raises(served, content, cache):
    content.write_text("<html>Please log in to this network</html>" * 100)
    with fails(OSError, "came damaged", cache=cache):
        fetch()


def test_damaged_cached_file_is_downloaded_again(served, content):
    path = fetch()
    os.truncate(path, 1000)
    assert Path(fetch()).read_bytes() == content.read_bytes()
    assert served.downloads() == 2


def test_file_larger_than_the_disk_space_is_not_downloaded(served, cache):
    served.size = 10**16
    with fails(OSError, "disk is full", "MB free", "HF_HOME", cache=cache) as caught:
        fetch()
    assert caught.value.errno == errno.ENOSPC
    assert served.downloads() == 0


@contextlib.contextmanager
def largest_file(size):
    """Context that limits the size of written files, as a full disk or a quota does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_during_a_download_raises(served, content, cache):
    with largest_file(1_000_000), fails(OSError, "disk is full", "HF_HOME", cache=cache):
        fetch()
    assert Path(fetch()).read_bytes() == content.read_bytes()


def test_cache_without_write_permission_raises(served, cache):
    cache.mkdir(mode=0o500)
    with unprivileged(), fails(PermissionError, "cache cannot be written", "HF_HOME"):
        fetch()
    assert kept(cache) == []


def test_cache_below_a_regular_file_raises(served, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "content.safetensors" / "cache"))
    with fails(PermissionError, "cache cannot be written", "HF_HOME"):
        fetch()


def test_cached_file_is_read_without_write_permission(served, cache):
    path = fetch()
    for folder in [cache, *cache.rglob("*")]:
        if folder.is_dir():
            folder.chmod(0o500)
    try:
        assert fetch() == fetch(renew=True) == path
    finally:
        for folder in [cache, *cache.rglob("*")]:
            if folder.is_dir():
                folder.chmod(0o700)


FETCH = f"""
from keras_tnt.weights import hub
print(hub.fetch({REPOSITORY!r}, {FILE!r}))
"""


@pytest.mark.slow
def test_two_processes_can_download_at_once(served, content, tmp_path):
    served.stall = 1
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    environment.pop("HF_HUB_CACHE", None)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", FETCH],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    paths = {output.strip().splitlines()[-1] for output, _ in results}
    assert len(paths) == 1
    assert Path(paths.pop()).read_bytes() == content.read_bytes()
    assert served.downloads() == 1


# === Untrusted endpoint ===


@pytest.fixture
def surroundings(cache, tmp_path):
    """Asserts that files outside of the cache, such as the user's, do not change."""
    (tmp_path / "mine.safetensors").write_bytes(b"mine")

    def files():
        outside = (path for path in tmp_path.rglob("*") if cache not in path.parents)
        return {path: path.read_bytes() for path in outside if path.is_file()}

    before = files()
    yield tmp_path
    assert files() == before


NO_NAMES = ("", "..", "../../x", "a/b", "a\\b", "..%2f", "\x1b[2J", "a" * 300)


@pytest.mark.parametrize("etag", [*NO_NAMES, "{outside}/mine.safetensors"])
@pytest.mark.parametrize("header", ["ETag", "X-Linked-Etag"])
def test_invalid_etag_raises(etag, header, served, cache, surroundings):
    served.headers[header] = f'"{etag.format(outside=surroundings)}"'
    if header == "X-Linked-Etag" and not etag:
        served.headers["ETag"] = None
    with fails(ConnectionError, served.url, "HF_ENDPOINT", cache=cache) as caught:
        fetch()
    assert str(caught.value).isprintable()
    assert not cache.exists()


@pytest.mark.parametrize("commit", [*NO_NAMES, "main", "5" * 39, "{outside}"])
@pytest.mark.parametrize("file", [FILE, "none.safetensors"])
def test_invalid_commit_raises(commit, file, served, cache, surroundings):
    served.headers["X-Repo-Commit"] = commit.format(outside=surroundings)
    kind = ConnectionError if file == FILE else downloads.MissingFile
    with fails(kind, cache=cache):
        downloads.fetch(REPOSITORY, file)
    assert not cache.exists()


@pytest.mark.parametrize(
    "revision",
    ["", "..", "../../x", "/etc", "a//b", "a/../b", "a\0b", "a\nb", "\x1b[2J", "a" * 300],
)
def test_invalid_revision_raises(revision, served, cache, surroundings):
    with fails(ValueError, "cannot be the name of a revision", cache=cache) as caught:
        fetch(revision=revision)
    assert str(caught.value).isprintable()
    assert served.requests == []


@pytest.mark.parametrize("repository", ["../x", "a/..", "a/b/c", "/etc/passwd", "a/b\n", "a/\x1b"])
def test_invalid_repository_raises_without_a_request(repository, served, cache, surroundings):
    with fails(ValueError, cache=cache):
        downloads.fetch(repository, FILE)
    assert served.requests == []


def test_more_bytes_than_announced_raise(served, cache, surroundings):
    served.endless = True
    with fails(ConnectionError, "sends more than the", "promised", cache=cache):
        fetch()


def test_file_above_the_size_limit_raises(served, cache):
    with fails(ValueError, "more than 1,000", cache=cache):
        fetch(largest=1000)
    assert served.downloads() == 0


@pytest.mark.parametrize("kind", ["content", "folder"])
def test_links_out_of_the_cache_are_not_followed(kind, served, cache, tmp_path):
    name = Path(fetch())
    mine = tmp_path / "mine" / FILE
    mine.parent.mkdir()
    mine.write_bytes(b"mine, and no checkpoint")
    if kind == "content":
        name.unlink()
        name.symlink_to(mine)
    else:
        name.unlink()
        name.parent.rmdir()
        name.parent.symlink_to(mine.parent)
    fetch()
    assert mine.read_bytes() == b"mine, and no checkpoint"


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "log in again"),
        (403, "may not read it: ask its owner"),
        (404, "check the name, and HF_ENDPOINT"),
        (410, "Check HF_ENDPOINT"),
        (429, "wait 7 seconds"),
        (500, "Try again later"),
        (504, "Try again later"),
    ],
)
def test_each_http_status_has_advice(status, words, served, cache):
    served.status, served.headers["Retry-After"] = status, "7"
    with fails(ConnectionError, f"answered {status}", FILE, REPOSITORY, words, cache=cache):
        fetch()


def test_gated_repository_raises(served, cache):
    served.status, served.headers["X-Error-Code"] = 403, "GatedRepo"
    with fails(ValueError, "accept its terms at", cache=cache):
        fetch()


def test_fake_hub_serves_files_and_ranges(content):
    server = Hub()
    server.add(REPOSITORY, FILE, content)
    import urllib.request

    url = f"{server.url}/{REPOSITORY}/resolve/main/{FILE}"
    part = urllib.request.Request(url, headers={"Range": "bytes=100-"})
    with urllib.request.urlopen(url) as whole, urllib.request.urlopen(part) as rest:
        assert whole.read() == content.read_bytes()
        assert rest.read() == content.read_bytes()[100:]
    server.shutdown()
    server.server_close()

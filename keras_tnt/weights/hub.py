"""Downloads from the Hugging Face hub, stored in its cache.

`huggingface_hub` makes the requests: its cache, tokens, offline mode and `HF_ENDPOINT` work as
usual. The endpoint is not trusted: names that it sends are validated before they become paths, and
content is verified before it enters the cache. This module adds timeouts and clear error messages.
"""

import contextlib
import errno
import hashlib
import io
import os
import re
import threading
import time
import urllib.parse

from keras_tnt import files
from keras_tnt.text import printable
from keras_tnt.weights.files import SAFETENSORS, SafetensorsFile, check_readable

# Stall timeout: seconds without progress after which a download is aborted.
PATIENCE = 20
# Maximum bytes accepted from an endpoint that does not announce a size.
LARGEST_FILE = 20 * 2**30
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
# Names accepted into the cache: no paths, no hidden files, no shell metacharacters.
PLAIN_NAME = re.compile(r"\w[\w.+-]{0,200}", re.ASCII)
COMMIT = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
SHA256 = re.compile("[0-9a-f]{64}")


class MissingFile(FileNotFoundError):
    """Raised when the repository exists, but the file does not."""


class Damaged(OSError):
    """Raised when the downloaded content is corrupt."""


class Distrusted(ConnectionError):
    """Raised when the endpoint returns an invalid or unsafe response."""


def fetch(repository, file, revision="main", sha256=None, renew=False, largest=None):
    """Returns the path of a hub file, downloaded if it is not in the cache.

    Args:
        repository: "owner/name".
        file: path within the repository.
        revision: branch, tag or commit. Defaults to "main".
        sha256: expected SHA-256 of the file. If `None`, the one that the hub sends for large files.
        renew: whether to look for a newer version of a cached file. Defaults to `False`.
        largest: maximum size in bytes, checked if the endpoint sends the size. If `None`, any size
            is accepted.

    Returns:
        The path of the file in the cache.

    Raises:
        MissingFile: if the repository has no such file.
        ValueError: if the repository or revision does not exist for this user, if a name is
            invalid, or if the file is larger than `largest`.
        ConnectionError: if the hub is unreachable, stalls, or returns an invalid response.
        OSError: if the file cannot be written, or is corrupt. Nothing of it is stored.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    check_names(repository, file, revision)
    check_ref(Cache(repository).path("refs", *revision.split("/")))
    # A path, None, or a sentinel that says that the repository has no such file.
    known = try_to_load_from_cache(repository, file, revision=revision)
    cached = known if isinstance(known, str) else None
    if cached and not is_whole(cached):
        discard(cached)
        cached = known = None
    if cached and (not renew or constants.HF_HUB_OFFLINE):
        return cached
    try:
        return watched(
            lambda beat: download(repository, file, revision, sha256, largest, beat), repository
        )
    except Exception as error:
        reason = explain(error, repository, file, revision)
        unreachable = isinstance(reason, ConnectionError) and not isinstance(reason, Distrusted)
        if unreachable and cached:
            return cached
        if unreachable and known is not None:
            raise MissingFile(f"'{repository}' has no file '{file}'.") from error
        if reason is error:
            raise
        raise reason from error


def check_names(repository, file, revision):
    """Raises a `ValueError` if the name of a repository, file or revision is invalid."""
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repository)
    for what, name in (("file", file), ("revision", revision)):
        if not all(PLAIN_NAME.fullmatch(part) for part in name.split("/")):
            raise ValueError(
                f"'{printable(name)}' cannot be the name of a {what} of '{repository}'. Names "
                "consist of letters, digits and - _ . + between slashes."
            )


# === The download ===


def download(repository, file, revision, sha256, largest, beat):
    """Downloads a file into the cache, in the layout of `huggingface_hub`.

    The cache stores each content once, under `blobs`, by its ETag. `snapshots` has a link to it for
    each commit and file name, and `refs` has the commits of branches and tags.
    """
    import huggingface_hub
    from huggingface_hub.utils import WeakFileLock

    url = huggingface_hub.hf_hub_url(repository, file, revision=revision, endpoint=endpoint())
    cache = Cache(repository)
    try:
        metadata = huggingface_hub.get_hf_file_metadata(url)
    except huggingface_hub.errors.RemoteEntryNotFoundError as error:
        commit = error.response.headers.get("X-Repo-Commit", "")
        if COMMIT.fullmatch(commit):
            cache.remember(revision, commit)
            cache.lacks(commit, file)
        raise
    check_metadata(metadata, file, largest)
    path = cache.path("snapshots", metadata.commit_hash, *file.split("/"))
    if not os.path.exists(path):
        blob = cache.path("blobs", metadata.etag)
        with WeakFileLock(cache.lock(metadata.etag)):
            if not os.path.exists(blob):
                transfer(url, file, metadata, sha256, blob, beat)
            link(blob, path)
    with contextlib.suppress(PermissionError):  # A read-only cache works too.
        cache.remember(revision, metadata.commit_hash)
    return path


def check_metadata(metadata, file, largest):
    """Validates the ETag, commit and size that the endpoint sends for a file.

    Args:
        metadata: result of `huggingface_hub.get_hf_file_metadata`.
        file: path within the repository, for messages.
        largest: as for `fetch`.

    Raises:
        Distrusted: if the ETag or the commit is not a valid name.
        ValueError: if the file is larger than `largest`.
    """
    for what, name, allowed in (
        ("ETag", metadata.etag, PLAIN_NAME),
        ("commit", metadata.commit_hash, COMMIT),
    ):
        if not allowed.fullmatch(name or ""):
            raise Distrusted(
                f"{endpoint()} gave the {what} {printable(name)}, as no hub does, and nothing was "
                "written. Check HF_ENDPOINT, and whether the network asks for a login."
            )
    if None not in (largest, metadata.size) and metadata.size > largest:
        raise ValueError(f"'{file}' has {metadata.size:,} bytes, more than {largest:,}.")


def transfer(url, file, metadata, sha256, blob, beat):
    """Downloads a content to a temporary file, verifies it, and moves it into the cache."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    headers = build_hf_headers()
    if origin(metadata.location) != origin(url):
        headers.pop("authorization", None)
    files.check_space(constants.HF_HUB_CACHE, metadata.size or 0, "the file")
    with files.replacing(blob) as temporary:
        with Receiver(temporary, metadata.size, beat) as received:
            http_get(metadata.location, received, headers=headers, expected_size=metadata.size)
        if sha256 is None and SHA256.fullmatch(metadata.etag):
            sha256 = metadata.etag
        check(temporary, file, sha256)


def origin(url):
    """Returns (scheme, host and port) of a URL. A token is sent to its own origin only."""
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.netloc


class Receiver(io.BufferedWriter):
    """New file that accepts at most the announced number of bytes, and reports progress."""

    def __init__(self, path, promised, beat):
        """Opens the file; without an announced size, the limit is `LARGEST_FILE`."""
        super().__init__(io.FileIO(path, "w"))
        self.promised = LARGEST_FILE if promised is None else promised
        self.beat = beat

    def write(self, piece):
        """Writes bytes and calls `beat`; raises `Distrusted` beyond the announced size."""
        if self.tell() + len(piece) > self.promised:
            raise Distrusted(
                f"{endpoint()} sends more than the {self.promised:,} bytes that it promised. It is "
                "no hub, or in trouble: check HF_ENDPOINT, or try again later."
            )
        self.beat()
        return super().write(piece)


class Cache:
    """Cache directory of one repository."""

    def __init__(self, repository):
        """Takes the repository's name, "owner/name"."""
        from huggingface_hub import constants

        self.root = constants.HF_HUB_CACHE
        self.name = f"models--{repository.replace('/', '--')}"

    def path(self, *parts):
        """Returns a path inside the repository's cache directory."""
        return os.path.join(self.root, self.name, *parts)

    def lock(self, etag):
        """Returns the path of a blob's lock file, whose directory is created if missing."""
        folder = os.path.join(self.root, ".locks", self.name)
        os.makedirs(folder, exist_ok=True)
        return os.path.join(folder, f"{etag}.lock")

    def remember(self, revision, commit):
        """Stores the commit of a branch or tag."""
        path = self.path("refs", *revision.split("/"))
        if revision != commit and (not os.path.isfile(path) or read_text(path) != commit):
            files.write_atomically(path, commit)

    def lacks(self, commit, file):
        """Records that a commit has no file of this name."""
        files.write_atomically(self.path(".no_exist", commit, *file.split("/")), b"")

    def size(self):
        """Returns the total bytes of the repository's blobs, including unfinished ones."""
        found = 0
        for folder, _, names in os.walk(self.path("blobs")):
            for name in names:
                with contextlib.suppress(OSError):
                    found += os.stat(os.path.join(folder, name)).st_size
        return found


def check_ref(path):
    """Raises a `ValueError` if the cached commit of a branch is a FIFO or a device."""
    if os.path.exists(path) and not os.path.isdir(path):
        files.open_regular(path, 1 << 16).close()


def read_text(path):
    """Returns the text of a regular file of at most 64 KiB."""
    return files.read_regular(path, 1 << 16).decode("utf-8", "replace")


def link(blob, path):
    """Links a blob of the cache to a file's name."""
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)
    try:
        os.symlink(os.path.relpath(blob, folder), path)
    except OSError:  # Windows lets only some users create links.
        os.replace(blob, path)


def endpoint():
    """Returns the hub's URL; `HF_ENDPOINT` applies even if set after huggingface_hub's import."""
    from huggingface_hub import constants

    return os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")


# === Stall timeout ===


def watched(work, repository):
    """Returns `work(beat)`, run in a thread with a stall timeout.

    Progress is a call of `beat`, or a change in the size of the repository's cache.

    Args:
        work: function of `beat`, which it calls at each step of progress.
        repository: "owner/name".

    Raises:
        TimeoutError: after `PATIENCE` seconds without progress.
    """
    outcome = {}
    last = [time.monotonic()]
    cache = Cache(repository)

    def beat():
        last[0] = time.monotonic()

    def run():
        try:
            outcome["value"] = work(beat)
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    seen = None
    while thread.is_alive():
        thread.join(timeout=0.2)
        # Another process may be downloading the file while this one waits for its lock.
        if (now := cache.size()) != seen:
            seen = now
            beat()
        if thread.is_alive() and time.monotonic() - last[0] > PATIENCE:
            raise TimeoutError(f"nothing came for {PATIENCE} seconds")
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]


# === Verification ===


def check(path, file, sha256):
    """Verifies the content of a downloaded file.

    Args:
        path: path of the content.
        file: path within the repository.
        sha256: expected SHA-256. If `None`, it is not checked.

    Raises:
        Damaged: if the checksum differs, or a `.safetensors` file is incomplete.
    """
    if sha256 is not None:
        with open(path, "rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        if found != sha256:
            raise Damaged(
                f"'{file}' came damaged: its sha256 is {found[:16]}..., not {sha256[:16]}... . "
                "Nothing of it is kept; try again."
            )
    if file.endswith(SAFETENSORS) and not is_safetensors(path):
        raise Damaged(
            f"'{file}' came damaged: it is no whole .safetensors file. Nothing of it is kept; try "
            "again."
        )


def is_whole(path):
    """Returns whether a cached file is complete; only `.safetensors` files are checked."""
    return not path.endswith(SAFETENSORS) or is_safetensors(path)


def is_safetensors(path):
    """Returns whether a file is a complete `.safetensors` file."""
    check_readable(path)
    try:
        SafetensorsFile(path)
    except ValueError:
        return False
    return True


def discard(path):
    """Removes a file from the cache: its link and its blob.

    A link's target outside the cache is not removed.
    """
    from huggingface_hub import constants

    cache = os.path.realpath(constants.HF_HUB_CACHE)
    for part in (os.path.realpath(path), path):
        folder = os.path.realpath(os.path.dirname(part))
        if os.path.commonpath([cache, folder]) == cache:
            with contextlib.suppress(OSError):
                os.remove(part)


# === Errors ===


def explain(error, repository, file, revision):
    """Returns the error to raise in place of `error`, or `error` itself."""
    from huggingface_hub import constants, errors

    where = f"'{file}' of '{repository}'"
    otherwise = "Say weights='<path>' if you have the file, or weights=None for random weights."
    if isinstance(error, (Damaged, Distrusted)):
        return error
    if isinstance(error, errors.GatedRepoError):
        return ValueError(
            f"'{repository}' is open to those who accept its terms at {endpoint()}/"
            f"{repository}, and log in (`hf auth login`, or HF_TOKEN)."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ValueError(f"'{repository}' has no revision '{revision}'.")
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return MissingFile(f"'{repository}' has no file '{file}'.")
    if isinstance(error, errors.RepositoryNotFoundError):
        return ValueError(
            f"There is no repository '{repository}' at {endpoint()}, or it is private. "
            "Check the name, owner/name, or log in (`hf auth login`, or HF_TOKEN)."
        )
    if isinstance(error, errors.HfHubHTTPError):
        return ConnectionError(
            f"{endpoint()} answered {error.response.status_code} when asked for {where}. "
            f"{advice(error.response)} {otherwise}"
        )
    if constants.HF_HUB_OFFLINE:
        return ConnectionError(
            f"HF_HUB_OFFLINE is set, and {where} is not in the cache {constants.HF_HUB_CACHE}. "
            + otherwise
        )
    number = getattr(error, "errno", None)
    if number in DISK_FULL:
        return OSError(
            number,
            f"The disk is full: {where} does not fit into the cache ({error.strerror}). Free some "
            "space, or set HF_HOME to a folder on another disk.",
            constants.HF_HUB_CACHE,
        )
    if number in NOT_WRITABLE:
        return PermissionError(
            number,
            f"{where} cannot be kept: the cache cannot be written ({error.strerror}). Set HF_HOME "
            "to a folder that can.",
            constants.HF_HUB_CACHE,
        )
    if isinstance(error, TimeoutError) or "Timeout" in type(error).__name__:
        return ConnectionError(
            f"{where} cannot be had: {endpoint()} did not answer in time "
            f"({printable(str(error))}). Check the network and its proxy, or try again later. "
            + otherwise
        )
    if isinstance(error, OSError) or type(error).__module__.startswith("http"):
        return ConnectionError(
            f"{where} cannot be had from {endpoint()}: {printable(str(error), longest=300)}. Check "
            "the network. " + otherwise
        )
    return error


def advice(response):
    """Returns advice on an HTTP error, by its status."""
    status = response.status_code
    if status == 401:
        return "The token is not valid: log in again (`hf auth login`, or HF_TOKEN)."
    if status == 403:
        return "This token may not read it: ask its owner, or log in as somebody who may."
    if status == 404:
        return "Nothing is there: check the name, and HF_ENDPOINT if it is set."
    if status == 429:
        wait = response.headers.get("Retry-After", "")
        wait = f"{wait} seconds" if wait.isdecimal() else "some minutes"
        return f"It had too many requests: wait {wait}, or log in, which allows more of them."
    if status >= 500:
        return "Try again later: it has trouble of its own."
    return "Check HF_ENDPOINT, and the network's proxy."

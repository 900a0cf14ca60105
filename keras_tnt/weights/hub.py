"""Files of the Hugging Face hub, kept in its cache.

`huggingface_hub` asks and transfers: its cache, tokens, offline mode and `HF_ENDPOINT` are what
they are everywhere. The endpoint is not trusted: what it says is checked before a file is named
after it, and what it sends before it enters the cache. Added are an end to waiting, and one message
for each thing that goes wrong.
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

# Seconds without a byte after which a download is given up.
PATIENCE = 20
# Bytes that are taken from an endpoint that does not say how many there are.
LARGEST_FILE = 20 * 2**30
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
# Names that are taken into the cache: no path, nothing hidden, nothing that a shell reads.
PLAIN_NAME = re.compile(r"\w[\w.+-]{0,200}", re.ASCII)
COMMIT = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
SHA256 = re.compile("[0-9a-f]{64}")


class MissingFile(FileNotFoundError):
    """The repository is there, the file is not."""


class Damaged(OSError):
    """What came is not the file."""


class Distrusted(ConnectionError):
    """The endpoint answered as no hub does."""


def fetch(repository, file, revision="main", sha256=None, renew=False, largest=None):
    """The path of a file of the hub, downloaded if it is not in the cache.

    Args:
        repository: "owner/name".
        file: path within the repository.
        revision: branch, tag or commit.
        sha256: of the file, where it is known; the hub tells that of large files itself.
        renew: whether to ask for a newer version of a file in the cache.
        largest: bytes that the file may have; None: any number.

    Returns:
        The path.

    Raises:
        MissingFile: if the repository has no such file.
        ValueError: if there is no such repository or revision for this user, if one of the names
            cannot be one, or if the file is larger than `largest`.
        ConnectionError: if the hub cannot be reached, stops sending, or answers as no hub does.
        OSError: if the file cannot be written, or is not what it should be. Nothing of it is kept.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    check_names(repository, file, revision)
    check_ref(Cache(repository).path("refs", *revision.split("/")))
    # A path, None, or a mark that the repository is known to have no such file.
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
    """Raise a ValueError if a name could not be a repository's, a file's or a revision's."""
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
    """Ask for a file, and put it into the cache as `huggingface_hub` does.

    The cache holds each content once, under `blobs`, by its ETag; `snapshots` has the names of the
    files of a commit, linked to those; `refs` has the commits of branches and tags.
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
    with contextlib.suppress(PermissionError):  # A cache that is only read serves as well.
        cache.remember(revision, metadata.commit_hash)
    return path


def check_metadata(metadata, file, largest):
    """Raise if the names that the endpoint gives to a file are none, or the file is too large."""
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
    """Download a content into the cache, where it appears when it has been checked."""
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
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.netloc


class Receiver(io.BufferedWriter):
    """A new file that takes no more bytes than were promised, and tells of each piece."""

    def __init__(self, path, promised, beat):
        super().__init__(io.FileIO(path, "w"))
        self.promised = LARGEST_FILE if promised is None else promised
        self.beat = beat

    def write(self, piece):
        if self.tell() + len(piece) > self.promised:
            raise Distrusted(
                f"{endpoint()} sends more than the {self.promised:,} bytes that it promised. It is "
                "no hub, or in trouble: check HF_ENDPOINT, or try again later."
            )
        self.beat()
        return super().write(piece)


class Cache:
    """The part of the hub's cache that belongs to a repository."""

    def __init__(self, repository):
        from huggingface_hub import constants

        self.root = constants.HF_HUB_CACHE
        self.name = f"models--{repository.replace('/', '--')}"

    def path(self, *parts):
        return os.path.join(self.root, self.name, *parts)

    def lock(self, etag):
        """The path of the file that whoever writes a content locks."""
        folder = os.path.join(self.root, ".locks", self.name)
        os.makedirs(folder, exist_ok=True)
        return os.path.join(folder, f"{etag}.lock")

    def remember(self, revision, commit):
        """Keep the commit that a branch or tag is at."""
        path = self.path("refs", *revision.split("/"))
        if revision != commit and (not os.path.isfile(path) or read_text(path) != commit):
            files.write_atomically(path, commit)

    def lacks(self, commit, file):
        """Keep that a commit has no file of this name."""
        files.write_atomically(self.path(".no_exist", commit, *file.split("/")), b"")

    def size(self):
        """How many bytes of the repository's contents are there, finished or not."""
        found = 0
        for folder, _, names in os.walk(self.path("blobs")):
            for name in names:
                with contextlib.suppress(OSError):
                    found += os.stat(os.path.join(folder, name)).st_size
        return found


def check_ref(path):
    """Raises a `ValueError` if a FIFO or a device stands where a branch's commit is cached."""
    if os.path.exists(path) and not os.path.isdir(path):
        files.open_regular(path, 1 << 16).close()


def read_text(path):
    return files.read_regular(path, 1 << 16).decode("utf-8", "replace")


def link(blob, path):
    """Give a content of the cache a file's name."""
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)
    try:
        os.symlink(os.path.relpath(blob, folder), path)
    except OSError:  # Windows grants links to some users alone.
        os.replace(blob, path)


def endpoint():
    """The hub's address; `HF_ENDPOINT` counts even if set after huggingface_hub was imported."""
    from huggingface_hub import constants

    return os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")


# === An end to waiting ===


def watched(work, repository):
    """`work(beat)` in a thread, given up where neither it nor another process makes progress."""
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
        # Another process may be downloading the file, and this one waiting for it.
        if (now := cache.size()) != seen:
            seen = now
            beat()
        if thread.is_alive() and time.monotonic() - last[0] > PATIENCE:
            raise TimeoutError(f"nothing came for {PATIENCE} seconds")
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]


# === What came ===


def check(path, file, sha256):
    """Raise if a content is not what the file of this name should be."""
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
    return not path.endswith(SAFETENSORS) or is_safetensors(path)


def is_safetensors(path):
    check_readable(path)
    try:
        SafetensorsFile(path)
    except ValueError:
        return False
    return True


def discard(path):
    """Remove a file from the cache: its name, and the content that it leads to.

    What lies outside of the cache, which a name in it may lead to, is left alone.
    """
    from huggingface_hub import constants

    cache = os.path.realpath(constants.HF_HUB_CACHE)
    for part in (os.path.realpath(path), path):
        folder = os.path.realpath(os.path.dirname(part))
        if os.path.commonpath([cache, folder]) == cache:
            with contextlib.suppress(OSError):
                os.remove(part)


# === What went wrong ===


def explain(error, repository, file, revision):
    """The error to raise in place of `error`, or `error` itself."""
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
    """What to do about an answer of this status."""
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

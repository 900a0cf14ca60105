"""Fixtures: a fake hub on the loopback interface, and an empty cache."""

import contextlib
import os

import pytest
from huggingface_hub import constants

from tests.weights.hub_server import Hub


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """Sets an empty hub cache for the test and returns its directory."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


@pytest.fixture
def hub(monkeypatch, cache):
    """Yields a fake hub without repositories, set as HF_ENDPOINT."""
    server = Hub()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    yield server
    server.shutdown()
    server.server_close()


@contextlib.contextmanager
def unprivileged():
    """Context in which the process is not root, because root can write everywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)

"""A hub on the loopback, and an empty cache, for each test that asks for it."""

import contextlib
import os

import pytest
from huggingface_hub import constants

from tests.weights.hub_server import Hub


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache of the hub's, for this test alone."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


@pytest.fixture
def hub(monkeypatch, cache):
    """A hub without repositories."""
    server = Hub()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    yield server
    server.shutdown()
    server.server_close()


@contextlib.contextmanager
def unprivileged():
    """Root may write everywhere; for a while this process is not root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)

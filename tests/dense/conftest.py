"""Skips the tests without the extra `dense`; `make dense` runs them."""

import importlib.util

import pytest


def pytest_collection_modifyitems(items):
    missing = [m for m in ("keras_hub", "faster_coco_eval") if not importlib.util.find_spec(m)]
    if missing:
        reason = f"{', '.join(missing)} not installed: pip install 'keras-tnt[dense]'"
        for item in items:
            if "/dense/" in item.path.as_posix():
                item.add_marker(pytest.mark.skip(reason=reason))

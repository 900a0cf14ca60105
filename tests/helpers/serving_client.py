"""`client`: the module savedmodels/client.py, which is a script outside of a package."""

import importlib.util

from tests.helpers.checks import ROOT


def load_client():
    spec = importlib.util.spec_from_file_location("client", ROOT / "savedmodels" / "client.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


client = load_client()

"""Checks for the packages that exporting needs in addition to Keras."""

import importlib.util


def require(*modules, package="keras-tnt[export]"):
    """Raises an ImportError with the command that installs what is missing of these modules."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"Exporting needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} "
            f'not installed: pip install "{package}"'
        )

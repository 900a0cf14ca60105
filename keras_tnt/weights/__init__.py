"""Files of weights, from the hub and from the disk, and how they fill a model.

Nothing here knows a family of models: names and layouts are handed over in tables.
"""

import warnings
import zipfile

KERAS = (".weights.h5", ".keras")


def load_keras_file(model, path):
    """Fill a model from a file that Keras wrote.

    Raises:
        ValueError: if it does not fit the model, or is damaged.
    """
    try:
        with warnings.catch_warnings():
            # Keras warns of what it leaves at its initial value.
            warnings.simplefilter("error", UserWarning)
            model.load_weights(path)
    except (ValueError, KeyError, OSError, UserWarning, zipfile.BadZipFile) as error:
        raise ValueError(
            f"'{path}' does not fit model '{model.name}', or is damaged. It fits a model that is "
            f"built with the arguments of the one it was saved from. Keras says: {error}"
        ) from error

"""Weight files, from the hub and from disk, and loading them into models.

No module here knows a model family: tensor names and layouts are passed in as tables.
"""

from keras_tnt.weights.keras_files import KERAS, load_keras_file, load_keras_model

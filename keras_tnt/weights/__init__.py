"""Files of weights, from the hub and from the disk, and how they fill a model.

Nothing here knows a family of models: names and layouts are handed over in tables.
"""

from keras_tnt.weights.keras_files import KERAS, load_keras_file, load_keras_model

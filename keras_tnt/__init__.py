"""Transformer-in-Transformer image models for Keras 3.

Each builder and variant, such as `keras_tnt.TNT` and `keras_tnt.TNTSmall`, is an attribute of this
package, looked up in the registry: a variant is a row in its family's file.
"""

__version__ = "0.1.0"

# For the CLI: answers `--help` and argument errors before Keras is imported (may exit).
from keras_tnt.cli import before_keras  # isort: skip

# Listings have the families in this order.
from keras_tnt.models import tnt, pyramid_tnt, deit, cait  # isort: skip
from keras_tnt import distillation, export, finetuning, inspection, layers
from keras_tnt.distillation import Distiller
from keras_tnt.folder import ImageFolder
from keras_tnt.inference import compile_inference
from keras_tnt.models import builders, registry
from keras_tnt.models.anatomy import anatomy, class_names
from keras_tnt.models.backbone import backbone
from keras_tnt.models.builders import register_family
from keras_tnt.models.bundle import load_pretrained, push_to_hub, save_pretrained
from keras_tnt.models.checkpoint_table import list_weights
from keras_tnt.models.classifier import reset_classifier, set_class_names
from keras_tnt.models.pretrained import load_checkpoint, save_checkpoint
from keras_tnt.models.registry import create_model, list_models
from keras_tnt.preprocessing import decode_predictions, load_image, load_images, pad_to_fit

building = builders  # the name before version 0.2


def __getattr__(name):
    functions = registry.functions()
    if name not in functions:
        raise AttributeError(f"module 'keras_tnt' has no attribute {name!r}")
    return functions[name]


def __dir__():
    return sorted({*globals(), *registry.functions()})

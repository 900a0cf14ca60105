"""Arguments of small models whose relevance is compared with the reference, and their images."""

import numpy as np

VIT = {"input_shape": (16, 24, 3), "patch_size": 8, "classes": 4, "depth": 2}
VIT |= {"embed_dim": 12, "num_heads": 3}
TNT = {"input_shape": (16, 16, 3), "patch_size": 8, "inner_stride": 4, "classes": 4, "depth": 2}
TNT |= {"outer_dim": 12, "inner_dim": 6, "outer_heads": 3, "inner_heads": 2}
PYRAMID = {"input_shape": (40, 32, 3), "classes": 4, "depths": (2, 1, 1)}
PYRAMID |= {"outer_dims": (8, 12, 16), "inner_dims": (4, 4, 4), "reductions": (2, 2, 1)}
PYRAMID |= {"outer_heads": (2, 2, 2), "inner_heads": (2, 2, 2)}


def images_for(model, batch=2):
    return np.random.default_rng(0).uniform(0, 255, (batch, *model.input_shape[1:]))

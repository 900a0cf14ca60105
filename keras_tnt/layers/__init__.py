"""Layers of TNT, PyramidTNT, DeiT and CaiT, all registered for Keras serialization."""

from keras_tnt.layers.attention import ClassAttention, SelfAttention, TalkingHeadAttention
from keras_tnt.layers.blocks import (
    MLP,
    ClassAttentionBlock,
    SqueezeExcite,
    TalkingHeadBlock,
    TNTBlock,
    TransformerBlock,
)
from keras_tnt.layers.embedding import (
    ClassToken,
    LegacyWordEmbedding,
    LegacyWordsToPatches,
    PatchEmbedding,
    PositionEmbedding,
    WordEmbedding,
    WordsToPatches,
)
from keras_tnt.layers.grid import PatchGrid, PatchMap
from keras_tnt.layers.inputs_outputs import (
    ImageNormalization,
    Predictions,
    SelectToken,
    SelectTokens,
)
from keras_tnt.layers.pyramid import (
    MergePatches,
    MergeWords,
    PyramidStem,
    PyramidTNTBlock,
    ReducedAttention,
    ReducedBlock,
    RelativePosition,
)
from keras_tnt.layers.regularization import Dropout, LayerScale, StochasticDepth

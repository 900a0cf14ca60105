"""Looking inside a model: feature maps, attention, and a picture of it."""

from keras_tnt.inspection.cost import multiply_accumulates
from keras_tnt.inspection.features import feature_maps
from keras_tnt.inspection.maps import attention_maps, attention_rollout
from keras_tnt.inspection.picture import plot_attention

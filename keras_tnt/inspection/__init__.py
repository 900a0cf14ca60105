"""Model inspection: feature maps, attention, relevance and their pictures."""

from keras_tnt.inspection.cost import multiply_accumulates
from keras_tnt.inspection.explore import explore
from keras_tnt.inspection.faithfulness import faithfulness
from keras_tnt.inspection.maps import attention_maps, attention_rollout
from keras_tnt.inspection.picture import plot_attention
from keras_tnt.inspection.relevance import relevance
from keras_tnt.models.features import feature_maps

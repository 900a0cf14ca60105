"""Detection and segmentation with KerasHub's heads on keras_tnt backbones."""

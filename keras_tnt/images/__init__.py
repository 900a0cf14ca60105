"""Image files: decoding, directories of images, and ImageNet's class names."""

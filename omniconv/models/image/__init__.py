"""Image classification backbones."""

"""Deformable sampling and aggregation, the operator behind deformable convolution in its four versions."""

"""Compression: calibration, outlier balancing, INT8 quantization."""

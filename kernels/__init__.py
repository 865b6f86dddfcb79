"""Arithmetic. Tensors in, tensors out: knows no model, no request, no row."""

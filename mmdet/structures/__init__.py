"""Boxes and masks as plain tensors, and the container around them."""

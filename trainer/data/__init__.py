"""Data sources: labelled images as uint8 tensors, with fixed splits."""

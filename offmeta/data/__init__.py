"""Datasets on disk, replay on the device, sampling inside jit."""

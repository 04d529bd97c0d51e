"""Data loading: gathers batches, pins them, and copies them to a GPU ahead of time."""

from .device_prefetcher import DevicePrefetcher
from .pinning import pin_batch
from .tensor_loader import TensorLoader

__all__ = ["DevicePrefetcher", "TensorLoader", "pin_batch"]

"""Feeding a GPU: batches in page-locked memory, on their way before they are asked for."""

from .device_prefetcher import DevicePrefetcher
from .pinning import pin_batch
from .tensor_loader import TensorLoader

__all__ = ["DevicePrefetcher", "TensorLoader", "pin_batch"]

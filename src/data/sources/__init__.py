"""Where images come from: CIFAR-10, a folder, or the built-in sample."""

from src.data.sources.base import Images, Source
from src.data.sources.cifar10 import CIFAR10
from src.data.sources.folder import ImageFolder
from src.data.sources.sample import Sample

__all__ = ["CIFAR10", "ImageFolder", "Images", "Sample", "Source"]

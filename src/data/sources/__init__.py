"""Where images come from: CIFAR-10, a folder, the built-in sample, or files without labels."""

from src.data.sources.base import UNKNOWN, Images, Source
from src.data.sources.cifar10 import CIFAR10
from src.data.sources.folder import ImageFolder
from src.data.sources.sample import Sample
from src.data.sources.unlabelled import FOR_PREDICT_ONLY, Unlabelled

__all__ = ["CIFAR10", "FOR_PREDICT_ONLY", "UNKNOWN", "ImageFolder", "Images", "Sample", "Source", "Unlabelled"]

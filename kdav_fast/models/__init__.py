"""Teachers and students by name, split into features and classifier, and the weights they load."""

from kdav_fast.models.classifier import ImageClassifier, build_classifier
from kdav_fast.models.normalization import IMAGENET, Normalization, Renormalize, renormalization
from kdav_fast.models.stock import build_stock, head_tensors
from kdav_fast.models.weights import load_weights

__all__ = [
    "IMAGENET",
    "ImageClassifier",
    "Normalization",
    "Renormalize",
    "build_classifier",
    "build_stock",
    "head_tensors",
    "load_weights",
    "renormalization",
]

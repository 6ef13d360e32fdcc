"""The tutorial's job in Keras 3 on TensorFlow: VGG16 without top, frozen below, `ImageDataGenerator`, `fit`.

python -m benchmarks.contestants.keras_script JOB ARRAYS

In an environment of its own, without torch (`make keras`); ARRAYS is what `material.write_arrays` wrote.
"""

from __future__ import annotations

import sys
from typing import Any

import keras
import numpy as np
from keras.src.legacy.preprocessing.image import ImageDataGenerator

from benchmarks.contestants import BATCH, TRAINABLE
from benchmarks.contestants.signals import Gate


class AtTheGate(keras.callbacks.Callback):
    """Wait before each epoch; time its training and its validation."""

    def __init__(self, train: int, val: int) -> None:
        super().__init__()
        self.gate = Gate()
        self.images = {"train": train, "val": val}

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.gate.wait()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if batch == 0:
            self.gate.begin()

    def on_test_begin(self, logs: Any = None) -> None:
        self.gate.end("train", self.images["train"])
        self.gate.begin()

    def on_test_end(self, logs: Any = None) -> None:
        self.gate.end("val", self.images["val"])


def main() -> None:
    """Fit as the tutorial does."""
    job, path = sys.argv[1:]
    arrays = np.load(path)
    train, val = (arrays[f"{split}_images"].astype("float32") for split in ("train", "val"))
    mean, std = train.mean(axis=(0, 1, 2)), train.std(axis=(0, 1, 2))
    train, val = (train - mean) / std, (val - mean) / std
    labels = {split: keras.utils.to_categorical(arrays[f"{split}_labels"], 10) for split in ("train", "val")}
    backbone = keras.applications.VGG16(weights=None, include_top=False, input_shape=(32, 32, 3))
    for layer in backbone.layers[: len(backbone.layers) - TRAINABLE[job]]:
        layer.trainable = False
    model = keras.Sequential(
        [
            backbone, keras.layers.Flatten(), keras.layers.Dense(256), keras.layers.BatchNormalization(),
            keras.layers.Activation("relu"), keras.layers.Dense(10, activation="softmax"),
        ]
    )  # fmt: skip
    model.compile(keras.optimizers.Adam(1e-4), "categorical_crossentropy", metrics=["accuracy"])
    random = ImageDataGenerator(
        rotation_range=30, width_shift_range=0.1, height_shift_range=0.1, zoom_range=0.2, horizontal_flip=True,
        fill_mode="nearest",
    )  # fmt: skip
    model.fit(
        random.flow(train, labels["train"], batch_size=BATCH),
        validation_data=ImageDataGenerator().flow(val, labels["val"], batch_size=BATCH, shuffle=False),
        epochs=1000, verbose=0, callbacks=[AtTheGate(len(train), len(val))],
    )  # fmt: skip


if __name__ == "__main__":
    main()

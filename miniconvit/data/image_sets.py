"""The images of a split, in memory or in files: two classes with one interface."""

import os
from dataclasses import dataclass

import numpy as np

from ..arrays import array_module, to_device
from ..system import available_threads
from .augment import augment, operate
from .images import as_array, evaluation_view, open_image, training_view


class Images:
    """Uint8 images (n, 3, height, width), wherever they lie.

    images[which]: what is evaluated of those with these indices or in this slice, an array.
    shape: of all of them. xp: the module of these arrays, and of the indices that go with them.
    CHUNK: how many are loaded at a time where all are gone through, as in an evaluation.
    training_view, on, select, names and loaders are described where they are written.
    """

    dtype = np.dtype(np.uint8)

    def __len__(self):
        return self.shape[0]

    def __array__(self, dtype=None, copy=None):
        return np.array(self[:], dtype, copy=copy)


@dataclass(frozen=True, eq=False)
class ImageArray(Images):
    """Images in memory. pixels: uint8 (n, 3, height, width), on the CPU or on a GPU."""

    pixels: np.ndarray
    CHUNK = 1024

    @property
    def shape(self):
        return self.pixels.shape

    @property
    def xp(self):
        return array_module(self.pixels)

    def __getitem__(self, which):
        return self.pixels[which]

    def training_view(self, indices, seed, epoch, preset, repeat=0):
        """The images with these indices as this epoch shows them: `augment`, of this preset."""
        return augment(self.pixels[indices], indices, seed, epoch, preset, repeat)

    def on(self, xp):
        """The same images as arrays of the module xp."""
        return ImageArray(to_device(self.pixels, xp))

    def select(self, indices):
        """The images with these indices, in this order."""
        return ImageArray(self.pixels[indices])

    def names(self):
        """None: arrays are always the same, and need no names to be told apart."""
        return None

    def loaders(self, workers):
        """How many threads load ahead of a step on so many workers: one, and none on a GPU."""
        return 1 if workers else 0


@dataclass(frozen=True)
class ImageFiles(Images):
    """Images in files, which are decoded when they are asked for, every time.

    paths: of n files; size: (height, width). Indexing and training_view raise BrokenImage, naming
    the file, where one cannot be decoded.
    """

    paths: tuple[str, ...]
    size: tuple[int, int]
    CHUNK = 128  # decoding is slow, and several chunks are decoded ahead
    xp = np

    @property
    def shape(self):
        return len(self.paths), 3, *self.size

    def __getitem__(self, which):
        indices = range(len(self))[which] if isinstance(which, slice) else which
        return self._decoded(indices, lambda image, place: evaluation_view(image, self.size))

    def training_view(self, indices, seed, epoch, preset, repeat=0):
        """As ImageArray's, with random parts of the files' images, at their full size, in place of
        crops of the padded image. repeat: the copy, a number or (b,)."""
        if preset == "none":
            return self[indices]
        copies = np.broadcast_to(repeat, len(indices))

        def view(image, place):
            draw = seed, epoch, int(indices[place]), int(copies[place])
            return training_view(image, self.size, *draw)

        return operate(self._decoded(indices, view), indices, seed, epoch, preset, repeat)

    def on(self, xp):
        """The same files: what is decoded goes to a device batch by batch."""
        return self

    def select(self, indices):
        """The files with these indices, in this order and undecoded."""
        return ImageFiles(tuple(self.paths[index] for index in indices), self.size)

    def names(self):
        """The paths without what all of them begin with: the same after the folder has moved."""
        ends = (os.path.dirname(self.paths[end]) for end in (0, -1))  # they are sorted
        common = os.path.commonpath(list(ends))
        return [os.path.relpath(path, common) for path in self.paths]

    def loaders(self, workers):
        """How many threads decode ahead of a step: as many as there are workers, or cores."""
        return workers or available_threads()

    def _decoded(self, indices, view):
        pixels = np.empty((len(indices), *self.shape[1:]), np.uint8)
        for place, index in enumerate(indices):
            pixels[place] = as_array(view(open_image(self.paths[index]), place))
        return pixels

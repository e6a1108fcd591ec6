"""A picture of an item, and named places in it. What a model makes of it is told by `encode`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from jaxtyping import UInt8

from headwise.errors import InputError, Refusal

PICTURE_MARK = "<image>"
"""What stands in a prompt where a picture stands; `encode` puts the processor's own mark in its place."""

Pixels = UInt8[np.ndarray, "row column 3"]


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture, drawn or in a file. Equal pixels are equal pictures.

    Attributes:
        size: width and height in pixels.
        digest: of the pixels, or of the file as it lies on disk.
    """

    size: tuple[int, int]
    digest: str
    _pixels: bytes | None = field(default=None, repr=False, compare=False)
    path: Path | None = field(default=None, compare=False)

    @classmethod
    def drawn(cls, pixels: Pixels) -> Self:
        """A picture in memory. Raises InputError unless it is `[row, column, 3]` bytes of red, green and blue."""
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            form = f"{pixels.dtype} {list(pixels.shape)}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
            raise InputError(f"a picture is drawn from uint8 [row, column, 3], not from {form}")
        raw = np.ascontiguousarray(pixels).tobytes()
        height, width = pixels.shape[:2]
        return cls((width, height), _digest(f"{width}x{height}".encode(), raw), raw)

    @classmethod
    def of_file(cls, path: str | Path) -> Self:
        """A picture in a file of any kind that Pillow reads; it is turned as its EXIF data say.

        Raises:
            InputError: there is no such file, or it holds no picture.
            Refusal: Pillow is not installed.
        """
        path = Path(path)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise InputError(f"picture {path} does not exist; check the name and the folder") from None
        except OSError as error:
            raise InputError(f"picture {path} cannot be read ({error.strerror}); name a file with a picture") from None
        image = _opened(path)
        return cls(image.size, _digest(content), None, path)

    def array(self) -> Pixels:
        """Its pixels. Raises as `of_file` does where the file has gone since."""
        if self._pixels is not None:
            width, height = self.size
            return np.frombuffer(self._pixels, np.uint8).reshape(height, width, 3).copy()
        assert self.path is not None
        return np.asarray(_opened(self.path))

    def image(self) -> Any:
        """As Pillow's `Image`, which is what processors take. Raises as `of_file`."""
        if self.path is not None:
            return _opened(self.path)
        return _pillow().fromarray(self.array())


@dataclass(frozen=True, slots=True)
class Region:
    """A box in a picture of an item: `box` is left, top, right, bottom in pixels, right and bottom excluded; `picture`
    counts the item's pictures from 0.

    Raises `InputError` for a box without pixels.
    """

    picture: int
    box: tuple[int, int, int, int]

    def __post_init__(self) -> None:
        left, top, right, bottom = self.box
        if not (0 <= left < right and 0 <= top < bottom) or self.picture < 0:
            raise InputError(
                f"a region is (left, top, right, bottom) in pixels of a picture counted from 0, left below right and "
                f"top below bottom; it is {self.box} of picture {self.picture}"
            )


Regions = Mapping[str, Region]


def _digest(*parts: bytes) -> str:
    digest = hashlib.blake2s(digest_size=8)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise Refusal("pictures need the package Pillow; install it: pip install 'headwise[pictures]'") from None
    return Image


def _opened(path: Path) -> Any:
    pillow = _pillow()
    from PIL import ImageOps

    try:
        with pillow.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError("it has more than 8 bits a channel; save it with 8")
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise InputError(f"picture {path} does not exist; check the name and the folder") from None
    except Exception as error:  # Pillow's readers raise whatever a damaged file makes them trip over
        raise InputError(
            f"picture {path} cannot be read ({type(error).__name__}: {error}); name a picture such as a PNG or JPEG"
        ) from None

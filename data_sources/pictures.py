"""Read images from .npz files, folders of PNGs and picture files, with checks of their content."""

import contextlib
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from runtime.errors import UserError
from runtime.files import check_archive, one_line

MAX_PIXELS = 2**27  # of one picture, which takes 400 MB; PIL refuses a third more
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # of PIL; others can start programs
BITS_PER_SAMPLE, WHITE_IS_ZERO = 258, 262  # the numbers of tags of a TIFF; the second is 0 if 0 is white
MIN_BYTES, MAX_RATIO = 2**30, 100  # an archive may unpack to MIN_BYTES, or to MAX_RATIO times its own size


def read_images(path: Path, shape: Sequence[int], classes: int) -> tuple[Tensor, Tensor | None]:
    """(images (N, C, H, W) uint8, labels (N,) or None) from a .npz or a folder of PNGs. UserError if they do not match.

    shape (C, H, W) and classes: those of the data set. Without classes, labels are not looked at.
    """
    images, labels = read_folder(path, shape[0]) if path.is_dir() else read_npz(path)
    labels = labels if classes else None
    if images.dtype != np.uint8:
        raise UserError(f"the images in {path} are {images.dtype}, not uint8: save round((x + 1) * 127.5) of images x "
                        f"in [-1, 1]")
    if images.ndim != 4 or images.shape[1:] != (shape[1], shape[2], shape[0]):
        raise UserError(f"the images in {path} have the shape {images.shape}, not (N, {shape[1]}, {shape[2]}, "
                        f"{shape[0]}), that of the data set: (N, H, W, C); --image_size sets that of your own pictures")
    if labels is not None and (labels.shape != (len(images),) or labels.dtype.kind not in "iu"
                               or (len(labels) and not 0 <= labels.min() <= labels.max() < classes)):
        raise UserError(f"the labels in {path} must be {len(images)} whole numbers in 0..{classes - 1}, "
                        f"not {labels.dtype} {labels.shape}")
    images = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    return images, None if labels is None else torch.from_numpy(labels.astype(np.int64))


def read_npz(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """(arr_0 or images, labels or None) of a .npz file; pickled objects are not loaded."""
    if not path.is_file():
        raise UserError(f"there is no file or folder {path}")
    try:
        if zipfile.is_zipfile(path):
            check_archive(path, largest=max(MIN_BYTES, MAX_RATIO * path.stat().st_size))
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            images, labels = file[array_name(list(file))], file.get("labels")
            if not all(isinstance(array, np.ndarray | None) for array in (images, labels)):
                raise UserError("holds bytes that are no array")  # numpy returns them as they are
            return images, labels
    except UserError as error:
        raise UserError(f"{path} {error}") from error
    except Exception as error:  # zipfile, zlib and numpy raise different errors for damaged files
        raise UserError(f"{path} is damaged or not a .npz with an array arr_0: {str(error)[:120]}") from error


def array_name(names: Sequence[str]) -> str:
    """Which array of a .npz holds the pictures. UserError, with the names there are, if none does."""
    found = next((name for name in ("arr_0", "images") if name in names), None)
    if found is None:
        raise UserError(f"has no array arr_0 or images, but {one_line(', '.join(names)) or 'nothing'}: save the "
                        f"pictures with np.savez(path, arr_0=images, labels=labels)")
    return found


FITS = ("crop", "pad", "stretch")


def read_picture(path: Path, shape: Sequence[int], fit: str = "crop", background: str = "white") -> Tensor:
    """A picture (C, H, W) uint8 of this shape, as `decode` reads it. UserError if it cannot be read."""
    if not path.is_file():
        raise UserError(f"there is no picture {path}")
    try:
        pixels, _ = decode(path, shape, fit, background)
    except (NarrowPicture, UserError) as error:
        raise UserError(f"{path} {error}") from error
    except Exception as error:  # PIL raises different errors for damaged and for huge files
        raise UserError(f"{path} is damaged or not a picture: {one_line(error)}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


class NarrowPicture(ValueError):
    """A picture that is too narrow for --fit pad."""


def decode(file, shape: Sequence[int], fit: str = "crop",
           background: str = "white") -> tuple[np.ndarray, bool]:
    """(picture (H, W, C) uint8 for shape (C, H, W), whether it was transparent): grey for C = 1, its right side up.

    file          a path or an open file; of an animation or a book the first picture counts
    fit           how a picture of another size is scaled: "crop" cuts off what is too much on two sides, "pad" adds
                  `background` on two sides, "stretch" changes the ratio of width and height
    background    a colour, by a name or number of PIL's; it shows through transparent parts

    NarrowPicture, or whatever PIL raises for a file that is damaged, too large or no picture.
    """
    from PIL import ImageColor, ImageOps
    from PIL.Image import Resampling

    channels, height, width = shape
    image, transparent = _flat_image(file, background, 2 * max(height, width))
    if image.mode != (mode := "L" if channels == 1 else "RGB"):
        image = image.convert(mode)
    if image.size != (width, height):
        if fit == "pad" and max(image.size) > max(width, height) * min(image.size):
            raise NarrowPicture(f"has {image.width}×{image.height} pixels, too narrow for --fit pad: choose --fit crop "
                                f"or --fit stretch")
        smooth = Resampling.LANCZOS  # averages over the pixels that become one
        colour = ImageColor.getcolor(background, image.mode)
        image = {"crop": lambda: ImageOps.fit(image, (width, height), smooth),
                 "pad": lambda: ImageOps.pad(image, (width, height), smooth, colour),
                 "stretch": lambda: image.resize((width, height), smooth)}[fit]()
    return np.array(image).reshape(height, width, channels), transparent


def read_mask(path: Path, height: int, width: int, fit: str = "crop") -> Tensor:
    """A mask (1, 1, H, W) of 0 and 1 from a picture, scaled as by `read_picture`: 1 where it is lighter than half grey.

    UserError if that is nowhere.
    """
    mask = read_picture(path, (1, height, width), fit, background="black") > 127
    if not bool(mask.any()):
        raise UserError(f"{path} is dark everywhere, so nothing is to be filled in: make that part white")
    return mask[None].float()


def open_image(file):
    """A picture file opened by PIL, not yet decoded. UserError for more than MAX_PIXELS."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of large pictures, and of odd notes of a camera
        image = Image.open(file, formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise UserError(f"has {image.width}×{image.height} pixels, more than the {MAX_PIXELS:,} that are read: make it "
                        f"smaller")
    return image


def _flat_image(file, background: str, side: int):
    """(a picture file as an image of PIL with 8 bits, turned as its camera says; whether parts were transparent).

    side: a JPEG may be decoded at a half, a quarter ... of its size, so that both sides are no less than this.
    """
    from PIL import Image, ImageOps

    with open_image(file) as image:
        bits = image.tag_v2.get(BITS_PER_SAMPLE, (1,))[0] if image.format == "TIFF" else 16
        image.draft(None, (side, side))
        image.load()
        with contextlib.suppress(Exception):  # damaged notes of a camera do not make a picture unreadable
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode[0] in "IF":
            levels, hidden = np.asarray(image), image.info.get("transparency")  # the level that is transparent
            image = _to_8_bits(image, bits, image.format == "TIFF" and image.tag_v2.get(WHITE_IS_ZERO) == 0)
            if type(hidden) is int:
                image.putalpha(Image.fromarray(np.where(levels == hidden, 0, 255).astype(np.uint8)))
        if not image.has_transparency_data:
            return image, False
        image = image.convert("RGBA")
    transparent = image.getchannel("A").getextrema()[0] < 255  # many files only have a channel for it
    return Image.alpha_composite(Image.new("RGBA", image.size, background), image), transparent


def _to_8_bits(image, bits: int, inverted: bool):
    """A grey image of PIL with up to 16 bits as one with 8: the nearest level. UserError for other numbers.

    inverted: 0 is white, as in some files of scanners; PIL does not see to it where there are more than 8 bits.
    """
    from PIL import Image

    levels, highest = np.asarray(image), 2**bits - 1
    if levels.dtype.kind == "f" or bits > 16 or levels.min() < 0 or levels.max() > highest:
        raise UserError("has numbers that are no levels of 16 bits: save it with 8 or 16 bits per channel")
    levels = highest - levels.astype(np.uint32) if inverted else levels.astype(np.uint32)
    return Image.fromarray(((levels * 255 + highest // 2) // highest).astype(np.uint8))


PLAIN = {"P": "RGB", "1": "L"}  # instead of modes whose numbers are not the levels


def read_folder(folder: Path, channels: int) -> tuple[np.ndarray, None]:
    """The PNGs of a folder in the order of their names, (N, H, W, C); colour PNGs of grey pixels count as grey."""
    images = []
    for path in sorted(folder.glob("*.png")):
        try:
            with open_image(path) as image:
                pixels = np.array(image.convert(PLAIN.get(image.mode, image.mode)))
        except Exception as error:
            raise UserError(f"{path} is damaged or not a PNG: {str(error)[:120]}") from error
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels                          # (H, W, C)
        if channels == 1 and pixels.shape[2] == 3 and (pixels == pixels[..., :1]).all():
            pixels = pixels[..., :1]
        if images and (pixels.shape, pixels.dtype) != (images[0].shape, images[0].dtype):
            raise UserError(f"{path} is {pixels.dtype} {pixels.shape}, but the images before it are "
                            f"{images[0].dtype} {images[0].shape}")
        images.append(pixels)
    if not images:
        raise UserError(f"there are no .png files in {folder}")
    return np.stack(images), None



"""Files to pictures: what a camera, a scanner or an editor wrote, as RGB in 0..1; what cannot be is refused by name."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.samplers.errors import UserError, reason

READ = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp"),
    *(".gif", ".tif", ".tiff", ".tga", ".avif", ".jp2"),
)
OTHER = (".heic", ".heif", ".jxl", ".svg", ".psd", ".exr", ".dng", ".cr2", ".nef", ".arw")
SUFFIXES = READ + OTHER
"""What counts as an image: those of `OTHER` are images too, and refused rather than overlooked."""

ENLARGED = 2.0
"""By how much an image may be enlarged to fill its size; beyond that a model would learn the blur."""


class Unusable(UserError):
    """An image that is refused; one line with its name and the reason."""


def picture(data: bytes, name: str) -> Any:
    """The image of a file, PIL's, upright and in RGB.

    Turned as the camera says; colours of an embedded profile to sRGB; 16 bits to 8; transparency on white.

    Raises:
        Unusable: not an image, torn, animated, or of 32 bits a channel.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(BytesIO(data)) as opened:
            _refuse_frames(opened, name)
            return _rgb(ImageOps.exif_transpose(opened), name)
    except Unusable:
        raise
    except Exception as error:  # each format of PIL has its own kinds
        raise Unusable(f"{name}: cannot be read as an image ({reason(error)})") from error


def upright_size(data: bytes, name: str) -> tuple[int, int]:
    """Height and width of `picture`, from the file's head alone."""
    from PIL import Image

    try:
        with Image.open(BytesIO(data)) as opened:
            _refuse_frames(opened, name)
            width, height = opened.size
            if opened.format == "TIFF":  # which newer versions of Pillow turn when they open it
                tags: Any = opened
                width, height = tags.tag_v2[256], tags.tag_v2[257]
            turned = opened.getexif().get(0x0112, 1) in range(5, 9)  # orientations that exchange the sides
            return (width, height) if turned else (height, width)
    except Unusable:
        raise
    except Exception as error:
        raise Unusable(f"{name}: cannot be read as an image ({reason(error)})") from error


def _refuse_frames(image: Any, name: str) -> None:
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a photograph with its preview
        raise Unusable(f"{name}: has {frames} frames or pages; a still image is needed")


def _rgb(image: Any, name: str) -> Any:
    from PIL import Image

    profile = image.info.get("icc_profile")
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        # PIL's own conversion clips at 255; 257 takes 65535 to it
        image = Image.fromarray(np.rint(np.asarray(image, dtype=np.float64) / 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise Unusable(f"{name}: has 32 bits a channel, whose range is not known; save it with 8 or 16")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        white.alpha_composite(rgba)
        image = white.convert("RGB")
    if profile and image.mode in ("RGB", "CMYK"):
        image = _to_srgb(image, profile)
    return image.convert("RGB")


def _to_srgb(image: Any, profile: bytes) -> Any:
    """By the embedded profile; one that is broken, or of another kind of colours, is passed over, as browsers do."""
    from PIL import ImageCms

    try:
        own = ImageCms.ImageCmsProfile(BytesIO(profile))
        if image.mode == "RGB" and "sRGB" in ImageCms.getProfileDescription(own):
            return image
        return ImageCms.profileToProfile(image, own, ImageCms.createProfile("sRGB"), outputMode="RGB") or image
    except (ImageCms.PyCMSError, OSError, ImportError):
        return image


def fitted(image: Any, size: tuple[int, int], name: str) -> Tensor:
    """An image resized to cover a size, and cropped around the centre.

    Args:
        image: PIL's, RGB.
        size: height and width.
        name: what a message calls it.

    Returns:
        (3, height, width) in 0..1.

    Raises:
        Unusable: it would be enlarged more than `ENLARGED` times.
    """
    from PIL import ImageOps

    (height, width), scale = size, max(size[0] / image.height, size[1] / image.width)
    if scale > ENLARGED:
        raise Unusable(f"{name}: {image.width}x{image.height} pixels are too few for {width}x{height}")
    return torch.from_numpy(np.array(ImageOps.fit(image, (width, height)))).permute(2, 0, 1).float() / 255


def size_ids(original: tuple[int, int], size: tuple[int, int]) -> list[int]:
    """What SDXL is told of a `fitted` image (arXiv:2307.01952, section 2.2).

    Original height and width, top and left of the crop within the resized image, height and width.
    """
    scale = max(wanted / own for own, wanted in zip(original, size, strict=True))
    crop = [(round(own * scale) - wanted) // 2 for own, wanted in zip(original, size, strict=True)]
    return [*original, *crop, *size]

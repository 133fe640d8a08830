"""Reference statistics as .npz files, made once for a set of images and shared.

The arrays are `mu` and `sigma`, as pytorch-fid, clean-fid, ADM and EDM publish theirs: their files are read here, and ours
there. Ours also tell the number of images, the feature space and the hash of the images.
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fewstep.metrics.features import Features, Read, each
from fewstep.metrics.frechet import Running
from fewstep.metrics.images import Source, batches, image_files, to_uint8


class Statistics(NamedTuple):
    """Mean (D,) and unbiased covariance (D, D), float64, of n images.

    n is 0, and `features` and `content` are empty, where a file does not tell them.
    """

    mean: Tensor
    covariance: Tensor
    n: int = 0
    features: str = ""
    content: str = ""


def of_state(state: Running, content: str = "") -> Statistics:
    """Statistics of all images that a state has seen."""
    moments = state.moments()
    return Statistics(moments.mean, moments.covariance, moments.n, state.features, content)


def of_images(features: Features, source: Source, batch: int = 64, read: Read = batches) -> Statistics:
    """Statistics of a tensor, a folder or a list of images, in constant memory; of clips with a `read` of theirs."""
    state = Running(features.name, groups=1)
    for found in each(features, source, batch, read):
        state.update(found)
    if state.n < 2:
        raise ValueError(f"reference statistics need at least 2 images; got {state.n}")
    return of_state(state, content_hash(source))


def cached(features: Features, source: Source, folder: str | Path, batch: int = 64, read: Read = batches) -> Statistics:
    """`of_images`, kept in a folder under the name of the feature space and the hash of the images.

    Where the folder cannot be written they are made again the next time, and a warning says so.
    """
    name = re.sub(r"[^\w.-]+", "_", features.name)
    path = Path(folder) / f"{name}-{content_hash(source)[:16]}.npz"
    if path.is_file():
        return load(path)
    found = of_images(features, source, batch, read)
    try:
        save(found, path)
    except OSError as error:
        warnings.warn(f"{path}: cannot be kept ({error.strerror}); made again the next time", stacklevel=2)
    return found


def content_hash(source: Source) -> str:
    """SHA-256 of images and their order; of files the bytes, not the names and times. In a list a folder is a clip."""
    total = hashlib.sha256()
    if isinstance(source, Tensor):
        images = to_uint8(source).cpu().contiguous()
        total.update(f"{tuple(images.shape)}".encode())
        total.update(images.numpy().tobytes())
        return total.hexdigest()
    for path in image_files(source):
        total.update(_digest(path))
    return total.hexdigest()


def _digest(path: Path) -> bytes:
    if path.is_dir():
        return hashlib.sha256(b"".join(map(_digest, image_files(path)))).digest()
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error


def save(statistics: Statistics, path: str | Path) -> None:
    """Write a file that `load`, pytorch-fid and ADM's evaluator read; it is whole or not there."""
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"{path}: reference statistics are .npz files")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with part.open("wb") as file:
        np.savez(
            file,
            mu=statistics.mean.cpu().numpy(),
            sigma=statistics.covariance.cpu().numpy(),
            n=np.int64(statistics.n),
            features=np.str_(statistics.features),
            content=np.str_(statistics.content),
        )
    part.replace(path)


def load(path: str | Path) -> Statistics:
    """Read a file of `mu` and `sigma`. Raises ValueError, one line, for one that is not such a file."""
    try:
        opened = np.load(path, allow_pickle=False)
        if not isinstance(opened, np.lib.npyio.NpzFile):
            raise ValueError("one array, and not an .npz of mu and sigma")
        with opened as file:
            if not {"mu", "sigma"} <= set(file.files):
                raise ValueError(f"holds {', '.join(file.files) or 'nothing'}, and neither mu nor sigma or only one")
            mean, covariance = (torch.from_numpy(np.asarray(file[key]).astype(np.float64)) for key in ("mu", "sigma"))
            n, features, content = (np.asarray(file[k]).item() if k in file.files else d for k, d in _TOLD.items())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file of reference statistics") from None
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        reason = "not an .npz file" if "pickle" in str(error) else str(error)
        raise ValueError(f"{path}: not reference statistics: {reason}") from error
    if reason := _wrong(mean, covariance, n):
        raise ValueError(f"{path}: not reference statistics: {reason}")
    return Statistics(mean, covariance, n, features, content)


_TOLD = {"n": 0, "features": "", "content": ""}


def _wrong(mean: Tensor, covariance: Tensor, n: int) -> str:
    """What makes these no mean and covariance of features, or nothing."""
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        return f"mu {tuple(mean.shape)} and sigma {tuple(covariance.shape)} must be (D,) and (D, D)"
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        return "mu and sigma must be finite"
    largest = covariance.abs().max()
    if (covariance - covariance.T).abs().max() > 1e-5 * largest or (covariance.diagonal() < 0).any():
        return "sigma must be symmetric, with variances that are not negative"
    return "" if n == 0 or n >= 2 else f"of {n} images; at least 2 are needed"

"""`FILE.safetensors@CONFIG`: a checkpoint in one file and its original keys, as diffusers' `from_single_file` reads it.

Such a file says nothing of itself: CONFIG, a pipeline folder or hub id of the same architecture, has the class, the configs,
the scheduler and the tokenizers. What the file does not hold (of Flux and Wan all but the transformer) is CONFIG's own.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

from fewstep.samplers.errors import UserError, reason

SUFFIX = ".safetensors"
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
NEVER = ("safety_checker", "image_encoder")  # optional, and in no such file


def split(source: str | Path) -> tuple[str, str | None] | None:
    """The file, and the config if one is named; None for a source of another form; UserError for a pickle."""
    text = str(source)
    if Path(text).is_dir():
        return None
    file, _, config = text.partition(f"{SUFFIX}@")
    if config:
        return file + SUFFIX, config
    refuse_pickle(text.partition("@")[0], text)
    return (text, None) if text.endswith(SUFFIX) else None


def refuse_pickle(file: str, said: str) -> None:
    """UserError for a file whose name is a pickle's."""
    if Path(file).suffix.lower() in PICKLES:
        raise UserError(f"{said}: a pickle, which can run any code when it is read; save its weights as {SUFFIX}")


def absolute(source: str) -> str:
    """The same source from any working folder; ids and names stay."""
    parts = split(source) or (source,)
    return "@".join(str(Path(p).resolve()) if Path(p).exists() else p for p in parts if p is not None)


def tensors(file: str) -> dict[str, torch.Tensor]:
    """Tensors of a file by key, without their values; UserError where it is none."""
    from safetensors import SafetensorError, safe_open

    if not Path(file).is_file():
        raise UserError(f"{file}: no such file")
    try:
        with safe_open(file, "pt") as content:
            return {k: torch.empty(content.get_slice(k).get_shape(), device="meta") for k in content.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: cannot be read as {SUFFIX} ({reason(error)})") from error


def shapes(file: str) -> dict[str, torch.Tensor]:
    """As `tensors`; UserError also where they are no checkpoint's."""
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    found = tensors(file)
    # what diffusers does not know it takes for SD 1
    if infer_diffusers_model_type(found) == "v1" and not any(k.startswith("model.diffusion_model.") for k in found):
        raise UserError(
            f"{file}: no checkpoint of a known model; a LoRA, or a network alone, stands behind its pipeline, PIPELINE+{file}"
        )
    return found


def called(source: str) -> str:
    """What a title calls a source: the name of its folder, or of its file without the config; a hub id as it is."""
    base = (split(source) or (source,))[0]
    return Path(base).name if Path(base).exists() else source


def published(file: str) -> str:
    """The hub id of the pipeline that a file's keys and shapes are of, as diffusers recognises it."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    return fetch_diffusers_config(shapes(file))["pretrained_model_name_or_path"]


def reads(cls: Any) -> bool:
    """Whether a pipeline class reads single files; of others (Wan, Sana) their networks do."""
    return hasattr(cls, "from_single_file")


def missing(file: str, index: dict[str, Any]) -> dict[str, Any]:
    """Classes of the modules of a pipeline that the file does not hold, by name.

    Args:
        file: the checkpoint.
        index: `model_index.json` of the config.
    """
    from diffusers.loaders.single_file_utils import LDM_VAE_KEYS, is_clip_model_in_single_file, is_t5_in_single_file

    keys = shapes(file)
    held = {"vae": any(k.startswith(tuple(LDM_VAE_KEYS)) for k in keys), "unet": True, "transformer": True}
    found = {}
    for name, cls in modules(index).items():
        if not held.get(name, False):
            t5 = cls.__name__ == "T5EncoderModel" and is_t5_in_single_file(keys)
            if not (t5 or is_clip_model_in_single_file(cls, keys)):
                found[name] = cls
    return found


def modules(index: dict[str, Any]) -> dict[str, Any]:
    """Classes of the components of a pipeline that have weights, by name."""
    found = {}
    for name, value in index.items():
        library, name_of_class = value if isinstance(value, list) and len(value) == 2 else (None, None)
        if library in ("diffusers", "transformers") and name_of_class and name not in NEVER:
            cls = getattr(importlib.import_module(library), name_of_class, None)
            if isinstance(cls, type) and issubclass(cls, torch.nn.Module):
                found[name] = cls
    return found


def load_single_file(cls: Any, file: str, config: str, index: dict[str, Any], **arguments: Any) -> Any:
    """See `_load`; UserError also where the config describes weights that the file lacks."""
    said = f"{file}: lacks weights of the networks that {config} describes; a config of another model?"
    try:
        pipeline = _load(cls, file, config, index, **arguments)
    except NotImplementedError as error:  # such a weight has no value, and cannot be moved
        raise UserError(said) from error
    given = arguments.keys()
    if any(p.is_meta for n in modules(index).keys() - given for p in getattr(pipeline, n).parameters()):
        raise UserError(said)
    return pipeline


def _load(
    cls: Any,
    file: str,
    config: str,
    index: dict[str, Any],
    revision: str | None = None,
    variant: str | None = None,
    torch_dtype: Any = None,
    **components: Any,
) -> Any:
    """A pipeline of a class from a file and a config; `revision`, `variant` and `index` are the config's.

    Weights are in float32 unless `torch_dtype` says otherwise, of all or by component, as `from_pretrained` takes it.

    Raises:
        UserError: a component that is nowhere, a config of another model; diffusers' own errors for the rest.
    """
    if "transformer_2" in modules(index):
        raise UserError(f"{file}: holds one network of two of {cls.__name__}; name a pipeline folder")
    if "quantization_config" in components:
        raise UserError(f"quantization_config: not of a single file; {file} can be saved as a pipeline folder first")
    files = {k: v for k, v in (("revision", revision), ("variant", variant)) if v is not None}
    dtypes = torch_dtype if isinstance(torch_dtype, dict) else {"default": torch_dtype or torch.float32}
    absent = missing(file, index)
    for name, part in modules(index).items():
        dtype = dtypes.get(name, dtypes["default"])
        if name in components:
            continue
        if name in absent:
            try:
                components[name] = part.from_pretrained(
                    config, **files, subfolder=name, torch_dtype=dtype, use_safetensors=True
                )
            except (OSError, ValueError) as error:
                raise UserError(
                    f"{file}: holds no {name}, nor does {config}; {file}@FOLDER takes it from a whole pipeline folder"
                ) from error
        elif dtype != dtypes["default"] or not reads(cls):
            components[name] = part.from_single_file(file, config=config, subfolder=name, torch_dtype=dtype)
    if not reads(cls):
        return cls.from_pretrained(config, **files, **components)
    return cls.from_single_file(file, config=config, revision=revision, torch_dtype=dtypes["default"], **components)

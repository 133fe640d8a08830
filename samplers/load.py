"""`load(source)`: a denoiser from a pipeline folder, `embedded:NAME`, a hub id, a run, a student's folder or a single file.

`FILE.safetensors@CONFIG` is a checkpoint in its original keys, see `single_file.py`. `BASE+LORA` is a pipeline with a LoRA
of any format that diffusers reads, its own or kohya's, added into the weights: a file, a folder, a hub id, or a file of
one (ORG/NAME/FILE.safetensors). Such a file may also be the pipeline's own network alone, in diffusers' keys.
"""

from __future__ import annotations

import importlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch

from fewstep.samplers import foreign, single_file
from fewstep.samplers.adapters import Adapted
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.errors import UserError, one_line
from fewstep.samplers.hub import index_from_hub, is_hub_id, student_of
from fewstep.samplers.manifest import (
    MANIFEST,
    Manifest,
    fingerprint,
    holds_lora,
    read_manifest,
    same_weights,
    weight_files,
)

FAMILIES = {  # _class_name in model_index.json
    "ConsistencyModelPipeline": "fewstep.samplers.denoisers.unet2d:UNet2D",
    "DDPMPipeline": "fewstep.samplers.denoisers.unet2d:UNet2D",
    "DiTPipeline": "fewstep.samplers.denoisers.dit:DiT",
    "PixArtAlphaPipeline": "fewstep.samplers.denoisers.pixart:PixArt",
    "PixArtSigmaPipeline": "fewstep.samplers.denoisers.pixart:PixArt",
    "FluxPipeline": "fewstep.samplers.denoisers.flux:Flux",
    "SanaPipeline": "fewstep.samplers.denoisers.sana:Sana",
    "StableDiffusionPipeline": "fewstep.samplers.denoisers.stable_diffusion:StableDiffusion",
    "StableDiffusion3Pipeline": "fewstep.samplers.denoisers.stable_diffusion_3:StableDiffusion3",
    "StableDiffusionXLPipeline": "fewstep.samplers.denoisers.stable_diffusion_xl:StableDiffusionXL",
    "WanPipeline": "fewstep.samplers.denoisers.wan:Wan",
}

EMBEDDED = Path(__file__).parent / "assets"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def family(class_name: str) -> type[Denoiser]:
    """The denoiser class of a pipeline class."""
    if class_name not in FAMILIES:
        raise UserError(f"pipeline class {class_name} is not supported; supported: {', '.join(sorted(FAMILIES))}")
    module, name = FAMILIES[class_name].split(":")
    return getattr(importlib.import_module(module), name)


def parts(source: str | Path) -> tuple[str, list[str]]:
    """The pipeline and the LoRAs of `BASE+LORA`; a path that is there, and the FILE of FILE@CONFIG, may hold a plus."""
    text = str(source)
    if "+" not in text or Path(text).exists():
        return text, []
    file, at, rest = text.rpartition(f"{single_file.SUFFIX}@")
    base, *loras = rest.split("+")
    return file + at + base, loras


def resolve(source: str | Path) -> str:
    """`embedded:NAME` to the shipped folder, a run to its student, a student's hub id to its files; anything else stays.

    Raises:
        UserError: for an unknown name, and for a run that has no student yet.
    """
    source = str(source)
    if parts(source)[1]:
        return source
    if not source.startswith("embedded:"):
        path = Path(source)
        if (path / "student" / MANIFEST).is_file():
            return str(path / "student")
        if (path / "config.yaml").is_file() and (path / "checkpoints").is_dir():
            raise UserError(f"{source}: this run has no student yet; continue it with --resume")
        return student_of(source) or source
    folder = EMBEDDED / source.removeprefix("embedded:")
    if not (folder / "model_index.json").is_file():
        names = sorted(p.parent.name for p in EMBEDDED.glob("*/model_index.json"))
        raise UserError(f"{source}: no such embedded teacher; shipped: {', '.join('embedded:' + n for n in names)}")
    return str(folder)


def class_of(source: str | Path, revision: str | None = None) -> str:
    """The pipeline class of a folder or hub id, before any weight loads.

    Raises:
        UserError: a missing or broken folder, or a repository that cannot be read, in one line.
    """
    source, loras = parts(source)
    for lora in loras:
        foreign.arguments(lora)
    path = Path(resolve(source))
    return read_manifest(path).pipeline if holds_lora(path) else index_of(source, revision)["_class_name"]


def index_of(source: str | Path, revision: str | None = None) -> dict[str, Any]:
    """`model_index.json` of a pipeline: the class, and [library, class] of each component; UserError as for `class_of`."""
    if single_file.split(source) is not None:
        return index_of(config_of(source, revision), revision)
    path = Path(resolve(source))
    if path.is_dir():
        index = path / "model_index.json"
        if revision is not None:
            raise UserError(f"revision {revision}: of a repository of the hub; {source} is a folder")
        if not index.is_file():
            raise UserError(f"{source}: no model_index.json there; it must be a diffusers pipeline folder")
    elif is_hub_id(str(source)):
        index = Path(index_from_hub(str(source), revision))
    else:
        raise UserError(f"{source}: no such folder, and not a hub id of the form ORG/NAME")
    try:
        found = json.loads(index.read_text())
        found["_class_name"]
        return found
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise UserError(f"{index}: not a pipeline's index ({error})") from error


def config_of(source: str | Path, revision: str | None = None) -> str:
    """The pipeline folder or hub id that has the configs of a source: of a single file CONFIG, or what diffusers finds it to be."""
    file = single_file.split(source)
    if file is None:
        return resolve(source)
    path, config = file
    single_file.shapes(path)  # refuses what is no checkpoint
    if config is not None:
        return resolve(config)
    config = single_file.published(path)
    try:
        index_of(config, revision)
    except UserError as error:
        raise UserError(f"{path}: configs: {error}; {path}@FOLDER takes them from a pipeline folder") from error
    return config


def dtypes(name: str) -> dict[str, Any]:
    """Arguments of the loaders for weights of one of `DTYPES`; the autoencoder stays in float32: SDXL's overflows in float16."""
    if name not in DTYPES:
        raise UserError(f"dtype {name}: unknown; allowed: {', '.join(DTYPES)}")
    return {"torch_dtype": {"default": DTYPES[name], "vae": torch.float32}}


def student_in(dtype: str) -> dict[str, Any]:
    """Arguments of `load_student` for one of `DTYPES`: in a lower one a LoRA stays beside its base, which would round it."""
    return {"fuse": dtype == "fp32", **dtypes(dtype)}


def load_pipeline(
    source: str | Path, revision: str | None = None, variant: str | None = None, **components: Any
) -> Any:
    """The stock pipeline of a source: `.safetensors` only, no remote code, no safety checker.

    Weights are in float32 unless `torch_dtype` is among `components`, those of text encoders too, which transformers
    loads in the type of their files.

    Raises:
        UserError: whatever is wrong with the source, in one line.
    """
    import diffusers

    base, loras = parts(source)
    name = class_of(base, revision)
    family(name)
    extra: dict[str, Any] = {"torch_dtype": torch.float32, **components}
    if name == "StableDiffusionPipeline":
        extra |= {"safety_checker": None, "requires_safety_checker": False}
    cls, file = getattr(diffusers, name), single_file.split(base)
    with one_line(f"{base}: cannot be loaded as {name}"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch_dtype`", FutureWarning)  # the oldest diffusers here knows no `dtype`
        if file is None:
            _whole(resolve(base), [n for n in extra if n not in ("torch_dtype", "quantization_config")])
            pipeline = cls.from_pretrained(
                resolve(base), revision=revision, variant=variant, use_safetensors=True, **extra
            )
        else:
            config = config_of(base, revision)
            index = index_of(config, revision)
            with foreign.quiet():  # diffusers warns of what it casts
                extra |= {"revision": revision, "variant": variant}
                pipeline = single_file.load_single_file(cls, file[0], config, index, **extra)
    pipeline.set_progress_bar_config(disable=True)
    networks = {n: module for n in family(name).network_names if (module := getattr(pipeline, n, None)) is not None}
    for i, lora in enumerate(loras):
        foreign.add(pipeline, lora, networks, first=i == 0)
    return pipeline


def _whole(folder: str, given: list[str]) -> None:
    """UserError for a folder that lacks a component: of a tokenizer transformers would make an empty one without a word."""
    if not Path(folder).is_dir():
        return
    for name, value in index_of(folder).items():
        named = isinstance(value, list) and len(value) == 2 and all(value)
        if named and name not in given and not (Path(folder) / name).is_dir():
            raise UserError(f"{folder}: {name}/ is missing, which model_index.json names; copy the folder again")


def load(source: str | Path, revision: str | None = None, variant: str | None = None, **components: Any) -> Denoiser:
    """The denoiser of a source; its weights as `load_pipeline` says.

    A LoRA is added into the weights: what is loaded here may be a teacher, and gets adapters of its own.
    """
    if not holds_lora(resolve(source)):
        return denoiser_of(load_pipeline(source, revision, variant, **components))
    if read_manifest(Path(resolve(source))).parts is not None:
        raise UserError(f"{source}: several students, no one network; each is in a folder of its own, student_0 and on")
    denoiser, manifest = load_student(source, variant=variant, fuse=True, revision=revision, **components)
    if manifest.phase_ends:
        raise UserError(
            f"{source}: a student with a LoRA for each phase, which cannot be added into one set of weights"
        )
    return denoiser


def load_student(
    source: str | Path,
    base: str | Path | None = None,
    variant: str | None = None,
    fuse: bool = False,
    revision: str | None = None,
    **components: Any,
) -> tuple[Denoiser, Manifest]:
    """A student and what it says of itself, for its own size of samples.

    Args:
        source: a run, or a student's folder.
        base: where the base of a LoRA is, if not where the manifest says: a folder, `embedded:NAME` or a hub id.
        variant: of the base's files; default: the manifest's.
        fuse: add a LoRA into the weights, where each call is faster by its products; else, and of phases, it stays an adapter.
        revision: of the base's repository on the hub; default: the manifest's. A full student needs neither this nor `variant`.
        components: further arguments of the pipeline's `from_pretrained`.

    Raises:
        UserError: no student there, no base, another base, broken weights; in one line.
    """
    folder = Path(resolve(source))
    manifest = read_manifest(folder)
    family(manifest.pipeline)
    if manifest.parts is not None:
        from fewstep.samplers.several import load_several

        files = {"base": base, "variant": variant, "revision": revision}
        return load_several(folder, manifest, fuse=fuse, **files, **components), manifest
    if holds_lora(folder):
        denoiser = _on_base(folder, manifest, base, variant, revision, **components)
        if fuse and not manifest.phase_ends:
            foreign.fuse(denoiser.pipeline, list(denoiser.networks))
    else:
        denoiser = denoiser_of(load_pipeline(folder, **components))
    return denoiser.at(denoiser.latent_shape(manifest.height, manifest.width, manifest.num_frames)), manifest


def _on_base(
    folder: Path,
    manifest: Manifest,
    base: str | Path | None,
    variant: str | None,
    revision: str | None,
    **components: Any,
) -> Denoiser:
    where = manifest.base if base is None else base
    if base is None:
        variant, revision = variant or manifest.variant, revision or manifest.revision
    try:
        teacher = load(where, revision, variant, **components)
    except UserError as error:
        raise UserError(
            f'{folder}: its base cannot be loaded; {error}; "base" in its {MANIFEST} or base= names another place of it'
        ) from error
    if type(teacher.pipeline).__name__ != manifest.pipeline or not same_weights(
        fingerprint(teacher), manifest.fingerprint
    ):
        raise UserError(f"{folder}: a LoRA of another base; {where} does not hold the weights that it was made from")
    network, ends = teacher.network, manifest.phase_ends
    if ends:
        teacher = teacher.phased([network] * (len(ends) + 1), ends)
    for arguments in weight_files(teacher).values():
        path = folder / arguments["weight_name"]
        # diffusers warns that the text encoder gets no LoRA
        with one_line(f"{path}: cannot be loaded as a LoRA"), foreign.quiet():
            # without use_safetensors it would look for a pickle where the file is broken
            teacher.pipeline.load_lora_weights(folder, use_safetensors=True, **arguments)
    if not all(getattr(network, "peft_config", None) for network in teacher.networks.values()):
        raise UserError(f"{folder}: its LoRA files name no layer of {manifest.pipeline}")
    student = denoiser_of(teacher.pipeline)
    return student.phased([Adapted(network, name) for name in teacher.networks], ends) if ends else student


def denoiser_of(pipeline: Any) -> Denoiser:
    """The denoiser of a pipeline that is already in memory, set for inference."""
    cls = family(type(pipeline).__name__)
    for component in pipeline.components.values():
        if hasattr(component, "requires_grad_"):
            component.requires_grad_(False).eval()
    return cls(pipeline)

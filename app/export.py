"""`fewstep export`: a student for use elsewhere, in a folder or on a hub."""

from __future__ import annotations

import shutil
from pathlib import Path

from fewstep.distill.evaluation import revisions, student_folder
from fewstep.samplers.errors import UserError, reason
from fewstep.samplers.hub import is_hub_id
from fewstep.samplers.load import family, load, load_student
from fewstep.samplers.manifest import check_weights, holds_lora, read_manifest
from fewstep.samplers.student import PEFT, adapter_of, replacing, save_peft, save_student

FORMATS = ("diffusers", "fused", "peft")


def export(source: str, kind: str, out: Path, revision: str | None = None, variant: str | None = None) -> list[str]:
    """Write a student to a new folder; lines that say what is there and how it is loaded.

    Revision and variant are those of its base's files, where these are read: for a LoRA that is fused, or put into peft's form.

    Raises:
        UserError: an unknown format, no student, a format that it cannot have, a folder that holds something.
    """
    if kind not in FORMATS:
        raise UserError(f"--format {kind}: unknown; allowed: {', '.join(FORMATS)}")
    folder = student_folder(source)
    if folder is None:
        raise UserError(f"{source}: neither a run nor a student's folder, which has fewstep.json")
    if out.exists() and (not out.is_dir() or any(out.iterdir()) or out.samefile(Path.cwd())):
        raise UserError(f"{out}: exists already; name a new folder")
    manifest = read_manifest(folder)
    check_weights(folder)
    if manifest.parts is not None and kind != FORMATS[0]:
        raise UserError(
            f"{source}: several students, of which one at a time is exported: {folder / 'student_0'} and on"
        )
    revision = revisions([source], revision)[source]
    reads_base = holds_lora(folder) and (kind == "fused" or (kind == "peft" and not (folder / PEFT).is_dir()))
    for option, value in (("--revision", revision), ("--variant", variant)):
        if value is not None and not reads_base:
            raise UserError(f"{option} {value}: --format {kind} of {source} reads no base; leave it out")
    if kind == "peft":
        return _peft(folder, out, revision, variant)
    if kind == "fused" and holds_lora(folder):
        save_student(out, load(folder, revision, variant), manifest.model_copy(update={"kind": "full"}))
    else:
        _copy(folder, out)
    if manifest.parts is not None:
        return [
            f"{out}: {manifest.parts} students and their router; each of the folders in it loads alone, by its README.md"
        ]
    loaded = f"load_lora_weights on {manifest.base}" if holds_lora(out) else f"{manifest.pipeline}.from_pretrained"
    return [f"{out}: loads with {loaded}", f"the lines that run it in plain diffusers: {out / 'README.md'}"]


def refuse_name(repository: str) -> None:
    """UserError for what cannot be a repository's name, before anything is written."""
    if not is_hub_id(repository):
        raise UserError(f"--push {repository}: must have the form ORG/NAME")


def push(folder: Path, repository: str, private: bool = False) -> str:
    """Send a folder to a model repository of the Hugging Face hub, made if it is not there; its address.

    The hub is that of `HF_ENDPOINT`, the token that of `HF_TOKEN` or of `hf auth login`.

    Raises:
        UserError: no token, no network, a name that no repository can have, or what the hub answered, in one line.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    hub, kept = HfApi(library_name="fewstep"), f"what was exported stays: hf upload {repository} {folder} sends it"
    try:
        made = hub.create_repo(repository, private=private or None, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Student, scheduler and card")
        return str(made)
    except HFValidationError as error:
        raise UserError(f"--push {repository}: {reason(error)}") from error
    except LocalTokenNotFoundError as error:
        raise UserError(f"--push {repository}: no token of the hub; hf auth login, or set HF_TOKEN") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        why = "needs a token that may write there" if status in (401, 403) else reason(error)
        raise UserError(f"--push {repository}: the hub refused it: {why}; {kept}") from error
    except Exception as error:
        transport = type(error).__module__.startswith("httpx")  # whose name changes between releases of the library
        if not (transport or isinstance(error, OSError)):  # HF_HUB_OFFLINE is one of the latter
            raise
        raise UserError(f"--push {repository}: the hub cannot be reached; {kept}") from error


def _copy(folder: Path, out: Path) -> None:
    with replacing(out) as new:
        shutil.copytree(folder, new, dirs_exist_ok=True)


def _peft(folder: Path, out: Path, revision: str | None, variant: str | None) -> list[str]:
    """The LoRA of each network as a peft folder; of several networks in a folder of each one's name."""
    if (folder / PEFT).is_dir():
        _copy(folder / PEFT, out)
    elif holds_lora(folder):
        student, _ = load_student(folder, variant=variant, revision=revision)
        networks = student.networks
        with replacing(out) as new:
            for name, network in networks.items():
                save_peft(new if len(networks) == 1 else new / name, *adapter_of(network))
    else:
        raise UserError(f"{folder}: is a full student, without a LoRA; --format diffusers copies it")
    manifest = read_manifest(folder)
    parts = sorted(p.parent.name for p in out.glob("*/adapter_config.json"))  # of several networks
    of = [(name, out / name) for name in parts] or [(family(manifest.pipeline).network_names[0], out)]
    return [
        *(f"{part}: loads with peft.PeftModel.from_pretrained(pipe.{name}, {str(part)!r})" for name, part in of),
        f"pipe is a pipeline of {manifest.base}; scheduler and timesteps are on the student's card, {folder / 'README.md'}",
    ]

"""`fewstep export`: a student for use elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path

from fewstep.distill.evaluation import student_folder
from fewstep.samplers.errors import UserError
from fewstep.samplers.load import load, load_student
from fewstep.samplers.manifest import holds_lora, read_manifest
from fewstep.samplers.student import PEFT, adapter_of, save_peft, save_student

FORMATS = ("diffusers", "fused", "peft")


def export(source: str, kind: str, out: Path) -> list[str]:
    """Write a student to a new folder; lines that say what is there and how it is loaded.

    Raises:
        UserError: an unknown format, no student, a format that it cannot have, a folder that holds something.
    """
    if kind not in FORMATS:
        raise UserError(f"--format {kind}: unknown; allowed: {', '.join(FORMATS)}")
    folder = student_folder(source)
    if folder is None:
        raise UserError(f"{source}: neither a run nor a student's folder, which has fewstep.json")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already; name a new folder")
    manifest = read_manifest(folder)
    if kind == "peft":
        return _peft(folder, out)
    if kind == "fused" and holds_lora(folder):
        save_student(out, load(folder), manifest.model_copy(update={"kind": "full"}))
    else:
        _copy(folder, out)
    loaded = f"load_lora_weights on {manifest.base}" if holds_lora(out) else f"{manifest.pipeline}.from_pretrained"
    return [f"{out}: loads with {loaded}", f"the lines that run it in plain diffusers: {out / 'README.md'}"]


def _copy(folder: Path, out: Path) -> None:
    try:
        shutil.copytree(folder, out, dirs_exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from error


def _peft(folder: Path, out: Path) -> list[str]:
    """The LoRA of each network as a peft folder; of several networks in a folder of each one's name."""
    if (folder / PEFT).is_dir():
        _copy(folder / PEFT, out)
    elif holds_lora(folder):
        student, _ = load_student(folder)
        networks = student.networks
        for name, network in networks.items():
            try:
                save_peft(out if len(networks) == 1 else out / name, *adapter_of(network))
            except OSError as error:
                raise UserError(f"{out}: cannot be written ({error.strerror or error})") from error
    else:
        raise UserError(f"{folder}: is a full student, without a LoRA; --format diffusers copies it")
    return [f"{out}: loads with peft.PeftModel.from_pretrained(network, {str(out)!r})"]

"""The Hugging Face hub: which sources are its ids, and what it answers in one line."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from fewstep.samplers.errors import UserError, reason
from fewstep.samplers.manifest import MANIFEST


def is_hub_id(source: str) -> bool:
    """Whether a source has the form ORG/NAME."""
    parts = source.split("/")
    return len(parts) == 2 and all(parts) and not source.startswith((".", "~"))


unreachable: set[str] = set()
"""Repositories for which the hub did not answer, which takes half a minute of retries: they are asked for once."""


@cache
def student_of(source: str) -> str | None:
    """The folder of a repository that holds a student, fetched whole into the hub cache; None for any other source."""
    if not is_hub_id(source) or Path(source).exists():
        return None
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        hf_hub_download(source, MANIFEST)
    except LocalEntryNotFoundError:
        unreachable.add(source)
        return None
    except (OSError, ValueError):  # no repository, none that answers, or a pipeline's: whoever reads it next says so
        return None
    try:
        return snapshot_download(source)
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: the hub answered: {reason(error)}") from error


def file_of(source: str, file: str) -> str:
    """Where a file of a repository lies in the hub cache, fetched if need be; UserError in one line."""
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(source, file)
    except (OSError, ValueError) as error:
        raise UserError(f"{source}/{file}: the hub answered: {reason(error)}") from error


def index_from_hub(source: str, revision: str | None) -> str:
    """Where a repository's `model_index.json` lies in the hub cache, fetched if need be; UserError in one line."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = "" if revision is None else f" at revision {revision}"
    try:
        return hf_hub_download(source, "model_index.json", revision=revision, local_files_only=source in unreachable)
    except HFValidationError as error:
        raise UserError(f"{source}: no such folder, and not a hub id") from error
    except GatedRepoError as error:
        raise UserError(f"{source}: gated; accept its licence on its page and log in (`hf auth login`)") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{source}: no such folder, and no such repository on the hub (or it is private)") from error
    except RevisionNotFoundError as error:
        raise UserError(f"{source}: the hub has no revision {revision} of it") from error
    except LocalEntryNotFoundError as error:
        raise UserError(f"{source}: no such folder, not in the hub cache{at}, and the hub cannot be reached") from error
    except (HfHubHTTPError, OSError) as error:
        raise UserError(f"{source}: the hub answered: {reason(error)}") from error

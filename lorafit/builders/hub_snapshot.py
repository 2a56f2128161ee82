"""A Hub model's files in the local cache."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub import constants

from lorafit.errors import ModelError
from lorafit.recipe.sections import ModelSection

SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py")
"""Everything but weights: settings, tokenizer, chat template, the model's own code."""


def hub_snapshot(section: ModelSection, *, files: tuple[str, ...] = SMALL_FILES) -> Path:
    """Directory that holds `files` of the Hub model at `revision`, downloaded where the cache lacks them.

    Its name is the commit. Raises ModelError with what to do about a model that is not there, not public, or not
    reachable.
    """
    name, where = section.model_name_or_path, "model.model_name_or_path"
    subfolder = section.extra.get("subfolder", "")
    patterns = [f"{subfolder}/{pattern}" if subfolder else pattern for pattern in files]
    page = f"{constants.ENDPOINT}/{name}"
    try:
        snapshot = huggingface_hub.snapshot_download(  # imported here: it takes 0.4 s
            name,
            revision=section.revision,
            allow_patterns=patterns,
            cache_dir=section.extra.get("cache_dir"),
            # huggingface_hub 1.31 asks the Hub for the files of a commit although it is told to stay offline
            local_files_only=section.extra.get("local_files_only", constants.HF_HUB_OFFLINE),
        )
    except huggingface_hub.errors.HFValidationError:
        message = f"{name!r} is neither a directory nor a Hub id (`name` or `organisation/name`)"
    except huggingface_hub.errors.GatedRepoError:
        message = f"{name} is gated: accept its terms at {page}, then log in with `hf auth login`"
    except huggingface_hub.errors.RepositoryNotFoundError:
        message = (
            f"{name} is not on the Hub, or is private: check the spelling at {page}, or log in with `hf auth login`; "
            f"a directory is written ./{name}"
        )
    except huggingface_hub.errors.RevisionNotFoundError:
        where = "model.revision"
        message = f"{name} has no branch, tag or commit {section.revision!r}: see {page}/commits"
    except huggingface_hub.errors.LocalEntryNotFoundError:
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
        message = (
            f"{name} is not whole in the cache ({section.extra.get('cache_dir') or constants.HF_HUB_CACHE}) and "
            f"{reason}: run `{download_command(section)}` where there is a network, or name a directory (./{name})"
        )
    except huggingface_hub.errors.HTTPError as error:
        message = f"{name}: the Hub answered {type(error).__name__} ({str(error).splitlines()[0]}): try again later"
    else:
        return Path(snapshot)
    raise ModelError(message, where=where)


def download_command(section: ModelSection, *files: str) -> str:
    """What fetches into the cache what this section would read: all files, or those named."""
    options = {"--revision": section.revision, "--cache-dir": section.extra.get("cache_dir")}
    written = [f"{option} {value}" for option, value in options.items() if value not in (None, "main")]
    return " ".join(("hf download", section.model_name_or_path, *files, *written))


def cached_snapshot(section: ModelSection) -> Path | None:
    """Directory of the Hub model's files in the cache, whichever are there; None where none are. Never the network."""
    cache = Path(section.extra.get("cache_dir") or constants.HF_HUB_CACHE)
    model = cache / f"models--{section.model_name_or_path.replace('/', '--')}"
    reference = model / "refs" / section.revision
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else section.revision
    snapshot = model / "snapshots" / commit
    return snapshot if snapshot.is_dir() else None

"""To the hub and back: `push_to_hub` and `from_pretrained`, for the folders of `use.save`."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from headwise.errors import HeadwiseError, InputError, Refusal
from headwise.model.attached import AttachedModel
from headwise.use.sharing.saved import ADAPTER, CARD, JSON, TENSORS, Thing, load, read_saved, save
from headwise.use.sharing.supported import Evidence

FILES = (JSON, TENSORS, CARD, f"{ADAPTER}/*")


def push_to_hub(
    thing: Thing | str | os.PathLike[str],
    repo_id: str,
    *,
    model: AttachedModel | None = None,
    evidence: Evidence | None = None,
    licence: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """Upload a saved folder, or something that can be saved, to a repository of the hub, which is made if need be.

    Args:
        thing: a folder that `save` wrote; or what `save` takes, with `model`, `evidence` and `licence` as there.
        repo_id: `owner/name`.
        revision: the branch; None is the main one.
        private: of a repository that is made here.
        token: of the hub; None is the one of `hf auth login`.

    Returns:
        The commit's address.

    Raises:
        InputError: as `save`; a name that no repository can have, or a branch that is not there.
        Refusal: the repository holds something else; it may not be written to; the hub cannot be reached.
    """
    if isinstance(thing, (str, os.PathLike)):
        if model is not None or evidence is not None or licence is not None:
            raise InputError("model, evidence and licence are kept when something is saved; a folder has its own")
        read_saved(thing)
        return _upload(Path(thing), repo_id, revision, private, token)
    if model is None:
        raise InputError("push_to_hub takes model=, the model that it was made on, or a folder that use.save wrote")
    with tempfile.TemporaryDirectory() as place:
        folder = save(thing, Path(place) / "saved", model=model, evidence=evidence, licence=licence)
        return _upload(folder, repo_id, revision, private, token)


def from_pretrained(
    name: str | os.PathLike[str],
    *,
    model: AttachedModel | None = None,
    revision: str | None = None,
    anyway: bool = False,
    token: str | None = None,
) -> Any:
    """What `load` gives, from a folder or from a repository of the hub.

    Args:
        name: a folder, or `owner/name`; what exists as a folder is one.
        revision: branch, tag or commit of a repository.
        model, anyway: as in `load`.
        token: of the hub; None is the one of `hf auth login`.

    Raises:
        InputError: as `load`; no such repository or revision; the hub cannot be reached and it is not in the cache.
        Refusal: as `load`; a repository that asks for its terms to be accepted.
    """
    return load(fetched(name, revision=revision, token=token), model, anyway=anyway)


def fetched(name: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None) -> Path:
    """The folder of that name, or the snapshot of that repository in the local cache. Raises as `from_pretrained`."""
    path = Path(name)
    if path.is_dir():
        if revision is not None:
            raise InputError(f"{name} is a folder here, and revision {revision!r} is for the hub; leave revision out")
        return path
    if not isinstance(name, str) or name.startswith((".", "~", os.sep)) or name.count("/") != 1:
        raise InputError(f"{str(name)!r} is not a folder here, and a repository of the hub is named owner/name")
    with _one_line(name, revision):
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(FILES), token=token))


def _upload(folder: Path, repo_id: str, revision: str | None, private: bool | None, token: str | None) -> str:
    with _one_line(repo_id, revision):
        hub = HfApi(token=token)
        hub.create_repo(repo_id, private=private, exist_ok=True)
        held = [name for name in hub.list_repo_files(repo_id, revision=revision) if name != ".gitattributes"]
        if held and JSON not in held:
            raise Refusal(
                f"{repo_id} holds {held[0]} and no {JSON}: it is of something else, and is left alone; choose another "
                "repository"
            )
        files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
        # One commit, in which what an earlier version had and this one has not goes as well.
        commit = hub.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, file) for name, file in files.items() if _is_ours(name)),
                *(CommitOperationDelete(name) for name in held if _is_ours(name) and name not in files),
            ],
            revision=revision,
            commit_message=f"headwise: {read_saved(folder).id}",
        )
        return str(commit.commit_url)


def _is_ours(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in FILES)


@contextlib.contextmanager
def _one_line(name: str, revision: str | None) -> Iterator[None]:
    """Turns what the hub's client raises into one line."""
    try:
        yield
    except HeadwiseError:
        raise
    except GatedRepoError as error:
        raise Refusal(f"{name} is gated on the hub; accept its terms there and log in with `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise InputError(f"{name} has no revision {revision!r} on the hub; give a branch, tag or commit") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise InputError(
            f"{name!r} is not a folder here and not a repository on the hub; if it is private, log in with "
            "`hf auth login`"
        ) from error
    except (LocalEntryNotFoundError, EntryNotFoundError, OSError) as error:
        if isinstance(error, HfHubHTTPError) and error.response is not None:
            raise _refused(name, error) from error
        raise _unreachable(name, error) from error
    except Exception as error:  # the hub client's network errors belong to whichever http library it was built on
        if "httpx" not in type(error).__module__ and not isinstance(error, HfHubHTTPError):
            raise
        raise _unreachable(name, error) from error


def _refused(name: str, error: HfHubHTTPError) -> Refusal:
    code = error.response.status_code
    login = "; log in with `hf auth login`, with a token that may write" if code in (401, 403) else ""
    return Refusal(f"the hub does not do this for {name} (status {code}: {_first_line(error)}){login}")


def _unreachable(name: str, error: Exception) -> Refusal:
    return Refusal(
        f"{name}: the hub cannot be reached; connect and try again ({type(error).__name__}: {_first_line(error)})"
    )


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:160]


__all__ = ["fetched", "from_pretrained", "push_to_hub"]

"""A model's folder goes to the hub, by its own client."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from harness.errors import BadRequest, Problem

LOGIN = "hf auth login, or HF_TOKEN, with a token that may write"


@dataclass(frozen=True)
class Place:
    """A repository of the hub, which may not be there yet. `private`: as it is, or will be made."""

    repo: str
    private: bool
    new: bool
    address: str


def place(repo: str, public: bool) -> Place:
    """Looks, and makes nothing. Raises BadRequest where nothing could be uploaded, or where what was to be
    private would not be."""
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub import errors as hub
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise BadRequest(Problem(f"{error}", "REPO", remedy="write it as OWNER/NAME")) from error
    if "/" not in repo:
        raise BadRequest(Problem(f"{repo!r} has no owner", "REPO", remedy="write it as OWNER/NAME"))
    if constants.HF_HUB_OFFLINE:
        raise BadRequest("HF_HUB_OFFLINE is set: nothing can be uploaded")
    if not get_token():
        raise BadRequest(Problem("no token of the hub is here", remedy=LOGIN))
    api = HfApi()
    address = f"{api.endpoint}/{repo}"
    try:
        found = api.repo_info(repo)
    except hub.RepositoryNotFoundError:
        return Place(repo, not public, True, address)
    except Exception as error:  # what the client raises depends on its transport
        raise refused(error, repo) from error
    if not (found.private or public):
        remedy = "another name, or --public where everybody may see the model"
        raise BadRequest(Problem(f"{repo} is there, and public", remedy=remedy))
    return Place(repo, bool(found.private), False, address)


def upload(folder: Path, files: Iterable[str], to: Place, message: str) -> str:
    """These files of a folder, as one commit. -> its address. Raises BadRequest with what the hub said."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        if to.new:
            api.create_repo(to.repo, private=to.private)
        done = api.upload_folder(
            repo_id=to.repo, folder_path=folder, allow_patterns=list(files), commit_message=message
        )
    except Exception as error:
        raise refused(error, to.repo) from error
    return str(done.commit_url)


def refused(error: Exception, repo: str) -> BadRequest:
    """The hub's own words, on one line, with the remedy where a status says what is wrong."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    remedy = LOGIN if status in (401, 403) else "the same command tries it again"
    said = " ".join(str(error).split())[:300]
    return BadRequest(Problem(f"{repo}: {type(error).__name__}: {said}", "the hub", remedy=remedy))

"""Whether the hub has what is asked for and gives it to us. Nothing is downloaded."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from harness import ROOT
from harness.errors import Problem, neighbour

Answer = TypeVar("Answer")

SECONDS = 30  # for one answer: the hub gives it in one or two, and its client alone would try for minutes


def is_id(name: str) -> bool:
    """Whether its client would ask for it, and it has an owner."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def unreachable_model(name: str) -> Problem | None:
    """Why a hub model cannot be had, with the remedy; None if it can."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub import errors as hub

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return None
    near = next(filter(None, map(neighbour, (Path(name), ROOT / name))), None)
    meant = f" (or did you mean the folder {near}?)" if near else ""
    try:
        within(SECONDS, lambda: HfApi().auth_check(name))  # model_info answers for a gated one as well
        if not within(SECONDS, lambda: HfApi().file_exists(name, "config.json")):
            return Problem("has no config.json: not a transformers model")
    except hub.GatedRepoError:
        remedy = f"accept its licence at https://huggingface.co/{name}, then `hf auth login`"
        return Problem("is gated", remedy=remedy)
    except hub.RepositoryNotFoundError:
        remedy = f"check the name, or `hf auth login`{meant}"
        return Problem("is not on the hub, or is private", remedy=remedy)
    except Exception as error:  # the hub's client raises what its transport does
        return unreached(error, f"pass a folder with --model DIR{meant}")
    return None


def unreachable_dataset(name: str, part: str) -> Problem | None:
    """Why a hub dataset cannot be had, with the remedy; None if it can. `part`: of ours, that it is for."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub import errors as hub

    copy = f"read a copy with --source {part}=PATH"
    if not is_id(name):
        return Problem("is no hub id such as tatsu-lab/alpaca", remedy=f"check the spec, or {copy}")
    try:  # dataset_info answers for a gated one as well
        within(SECONDS, lambda: HfApi().auth_check(name, repo_type="dataset"))
    except hub.GatedRepoError:
        terms = f"accept its terms at https://huggingface.co/datasets/{name} and `hf auth login`"
        return Problem("is gated", remedy=f"{terms}, or {copy}")
    except hub.RepositoryNotFoundError:
        remedy = f"check the name, `hf auth login`, or {copy}"
        return Problem("is not on the hub, or is private", remedy=remedy)
    except Exception as error:  # what the hub's client raises depends on its transport
        folder = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
        return None if (folder / name.replace("/", "___")).is_dir() else unreached(error, copy)
    return None


def unreached(error: Exception, remedy: str) -> Problem:
    from huggingface_hub import constants

    why = str(error) if type(error) is TimeoutError else f"no answer ({type(error).__name__})"
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else why
    return Problem(f"the hub cannot be reached ({why}), and it is not in the local cache", remedy=remedy)


def within(seconds: float, ask: Callable[[], Answer]) -> Answer:
    """What a call gives. Waits for it no longer than this, and raises TimeoutError: a hub that takes a
    connection and says nothing would hold a plan for as long as its client cares to retry."""
    answers: list[Answer] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            answers.append(ask())
        except BaseException as error:  # raised again where it was asked for
            errors.append(error)

    asking = threading.Thread(target=call, daemon=True)  # one that never ends does not hold the process
    asking.start()
    asking.join(seconds)
    if errors:
        raise errors[0]
    if not answers:
        raise TimeoutError(f"it was silent for {seconds:g} s")
    return answers[0]

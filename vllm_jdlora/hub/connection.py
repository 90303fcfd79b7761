"""huggingface_hub, imported where it is used, and what a hub or the network says as one line that tells what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm_jdlora.errors import JDLoRAError

_REFUSED = {
    401: "the hub does not know your token: log in with `hf auth login`, or look at HF_TOKEN",
    403: "your token may not do this: it needs write access to push, and access to the repository to pull",
    412: "has got another commit meanwhile; push again",
    429: "the hub asks to come more slowly; wait some minutes and run the same command again",
}


def hugging_face_hub() -> Any:
    """The module. JDLoRAError where it is not installed."""
    try:
        import huggingface_hub.errors
    except ImportError as error:
        raise JDLoRAError("huggingface_hub is not installed: pip install 'vllm-jdlora[hub]'") from error
    return huggingface_hub


@contextmanager
def told(repo: str, endpoint: str) -> Iterator[None]:
    """What goes wrong in the block between the hub and here, as a JDLoRAError."""
    errors = hugging_face_hub().errors
    try:
        yield
    except errors.GatedRepoError as error:
        raise JDLoRAError(f"{repo}: is gated: ask for access at {endpoint}/{repo}, and `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise JDLoRAError(
            f"{repo}: is not there, or not for you: look at the name, and log in with `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise JDLoRAError(f"{repo}: has no such branch, tag or commit") from error
    except errors.HFValidationError as error:
        raise JDLoRAError(f"{repo!a}: is not a repository's name; give OWNER/NAME") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        raise JDLoRAError(f"{repo}: {_REFUSED.get(status) or f'the hub answers {_first_line(error)}'}") from error
    # Of httpx or httpx2, as the version has it; LocalEntryNotFoundError is what downloads make of them.
    except (errors.HTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        cause = error.__cause__ or error
        raise JDLoRAError(
            f"{repo}: {endpoint} cannot be reached, or the connection broke ({_first_line(cause)}): look at the "
            "network, HF_ENDPOINT and HF_HUB_OFFLINE, and run the same command again"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:  # of the disk, of answers no hub gives, of upload threads
        raise JDLoRAError(f"{repo}: {_first_line(error.__cause__ or error)}; run the same command again") from error


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

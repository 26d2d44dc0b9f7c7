"""Uploads a model folder or file to the Hugging Face Hub, through its own client."""

import pathlib
import re

from jaxdistill.errors import ConfigError, StorageError
from jaxdistill.safe.redact import redact

_NAME = re.compile(r"^[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?$")


def check(repo: str) -> None:
    """Checks the name of a repository, before anything is written.

    Raises:
      ConfigError: if it is none.
    """
    if not _NAME.match(repo):
        raise ConfigError(f"--push: {repo!r}: must be NAME or OWNER/NAME, as on the Hub")


def push(path: pathlib.Path, repo: str) -> str:
    """Uploads a model in one commit; a repository that is not there is made, and is private.

    The client says who asks (`hf auth login`, HF_TOKEN) and where the Hub is (HF_ENDPOINT).

    Args:
      path: a model folder, or a file.
      repo: NAME or OWNER/NAME.

    Returns:
      Where the commit can be seen.

    Raises:
      StorageError: if the Hub cannot be reached, or refuses; what was written here stays.
    """
    from huggingface_hub import HfApi

    api, about = HfApi(), {"commit_message": "Model written by jaxdistill"}
    try:
        api.create_repo(repo, private=True, exist_ok=True)
        if path.is_dir():
            made = api.upload_folder(repo_id=repo, folder_path=path, **about)
        else:
            made = api.upload_file(
                repo_id=repo, path_or_fileobj=path, path_in_repo=path.name, **about
            )
    except Exception as error:  # the client's, its transports', the network's: none is ours
        reason = redact(str(error)).strip().partition("\n")[0]
        raise StorageError(
            f"--push {repo}: the Hub did not take it ({reason}); {path} is whole: log in with "
            f"`hf auth login`, then `hf upload {repo} {path}`"
        ) from error
    return str(made.commit_url)

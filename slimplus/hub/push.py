"""Upload of a packed checkpoint to the Hugging Face Hub, in one commit."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from slimplus.utils.errors import InputError, first_line

PLACE = "path/to/this/checkpoint"
"""What stands in a model card for the place of the checkpoint, until it has one on the hub."""

CARD = "README.md"
REPOSITORY = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


@dataclass(frozen=True)
class Upload:
    """What is uploaded, and where to.

    Attributes:
        folder: folder of the packed checkpoint.
        repository: hub id of the repository, which is created if it does not exist.
        private: whether a repository that is created is private.
        revision: branch to commit to, which is created if it does not exist; None is the main branch.
    """

    folder: Path
    repository: str
    private: bool = False
    revision: str | None = None

    def __post_init__(self) -> None:
        if not REPOSITORY.fullmatch(self.repository):
            raise InputError(
                f"{self.repository} is no hub id; give your name on the hub and the repository's: org/name"
            )

    def files(self) -> dict[str, int]:
        """Return the files to upload by name, with their sizes in bytes."""
        found = sorted(file for file in self.folder.rglob("*") if file.is_file())
        names = {file.relative_to(self.folder).as_posix(): file.stat().st_size for file in found}
        return {name: size for name, size in names.items() if not any(part.startswith(".") for part in name.split("/"))}

    def card(self) -> str:
        """Return the model card, which names the repository where the local one names no place."""
        file = self.folder / CARD
        if not file.is_file():
            raise InputError(f"{file} is missing; start the run again, which writes it")
        return file.read_text(encoding="utf-8").replace(PLACE, self.repository)


def push(upload: Upload) -> str:
    """Upload a checkpoint, and return the address of the commit.

    Raises:
        InputError: if the hub does not take it.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError

    operations = [CommitOperationAdd(CARD, upload.card().encode())]
    operations += [CommitOperationAdd(name, str(upload.folder / name)) for name in upload.files() if name != CARD]
    api, repository, revision = HfApi(), upload.repository, upload.revision
    try:
        api.create_repo(repository, private=upload.private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        message = "Upload of a checkpoint packed by slimplus"
        commit = api.create_commit(repository, operations, commit_message=message, revision=revision)
    except (HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError, OSError) as error:
        raise InputError(
            f"{repository} cannot be uploaded to ({first_line(error)}); log in with `hf auth login` and a token that "
            "may write there, and check the name and the network"
        ) from error
    return commit.commit_url

"""Upload an output to the hub: private unless asked, without prompts and replies unless asked, in one commit."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perpend import __version__
from perpend.errors import PerpendError, RunFailed, UsageError
from perpend.export.card import CARD
from perpend.progress import track
from perpend.refs import without_bars, without_secrets
from perpend.tasks.outgoing import Kept, Sent, choose, require_card

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi, ModelCard

AGAIN = "the same command again, which sends what is missing"


@dataclass(frozen=True)
class Pushed:
    """An output on the hub.

    Attributes:
        folder: The output.
        repo: Hub id.
        revision: Branch.
        private: Whether only its owners see it.
        files: What was sent, or would be.
        kept: What was not.
        commit: Its commit; None for a dry run.
        output: Its address; None for a dry run.
        seconds: How long it took.
        dry_run: Whether nothing was sent.
    """

    folder: str
    repo: str
    revision: str
    private: bool
    files: tuple[Sent, ...] = field(repr=False)
    kept: tuple[Kept, ...] = field(repr=False)
    commit: str | None = None
    output: str | None = None
    seconds: float = 0.0
    dry_run: bool = False

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "task": "push",
            "output": self.output,
            "folder": self.folder,
            "repo": self.repo,
            "revision": self.revision,
            "private": self.private,
            "commit": self.commit,
            "bytes": self.bytes,
            "files": [{"name": file.name, "bytes": file.size} for file in self.files],
            "kept": [{"name": file.name, "why": file.why} for file in self.kept],
            "seconds": self.seconds,
            "dry_run": self.dry_run,
        }


def push(
    folder: Path,
    repo: str,
    *,
    revision: str | None = None,
    public: bool = False,
    with_replies: bool = False,
    dry_run: bool = False,
) -> Pushed:
    """Upload an output to the hub.

    Everything appears in one commit. When an upload breaks off, the same call goes on: what the hub has is not sent
    again. The token is that of `hf auth login` or `HF_TOKEN`; it goes to the hub and nowhere else.

    Args:
        folder: What `run`, `apply` or `adapter` made.
        repo: `owner/name`; made when it is not there.
        revision: Branch; made when it is not there. None is `main`.
        public: Make the repository public; what is there already stays what it is.
        with_replies: Also send the reports and replies, which hold prompts and what the model said.
        dry_run: Only say what would be sent; nothing is asked of the hub.

    Raises:
        UsageError: no model with a card, a card without licence or with another base model, offline, no token or one
            that may not write, or a repository that is not as private as asked.
        RunFailed: the hub or the network failed on the way.
    """
    started, folder = time.monotonic(), Path(folder)
    require_name(repo)
    files, kept = choose(folder, with_replies)
    card = require_card(folder)
    made = Pushed(str(folder), repo, revision or "main", not public, tuple(files), tuple(kept), dry_run=dry_run)
    if dry_run:
        return made
    token = require_token()
    with without_bars(), told(repo, token):
        from huggingface_hub import HfApi

        api = HfApi(token=token, library_name="perpend", library_version=__version__)
        _validated(card, folder)
        repo = _open(api, repo, revision, public)
        commit = _sent(api, folder, files, repo, made.revision)
        took = round(time.monotonic() - started, 1)
        return replace(made, repo=repo, commit=commit, output=f"{api.endpoint}/{repo}", seconds=took)


def require_name(repo: str) -> None:
    """Refuse what is no name of a repository.

    Raises:
        UsageError: says what is.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise UsageError(f"'{repo}' is no repository", where="REPO_ID", valid="owner/name") from None


def require_token() -> str:
    """Return the user's token.

    Raises:
        UsageError: there is none, or the hub may not be reached.
    """
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UsageError("offline, as HF_HUB_OFFLINE asks for", where="push", hint="unset HF_HUB_OFFLINE")
    token = get_token()
    if not token:
        raise UsageError("no token of the hub", where="push", hint="hf auth login, or HF_TOKEN")
    return token


def _validated(card: ModelCard, folder: Path) -> None:
    """Let the hub check the card, before the repository is made."""
    try:
        card.validate(repo_type="model")
    except ValueError as error:
        raise UsageError(f"the hub refuses this card: {_first(str(error))}", where=str(folder / CARD)) from None


def _first(answer: str) -> str:
    """Return the first error of the hub's answer about a card: `{"errors": [{"message": ...}]}`, or text."""
    try:
        return str(json.loads(answer)["errors"][0]["message"])
    except (ValueError, LookupError, TypeError):
        return (answer.splitlines() or ["no reason given"])[0]


def _open(api: HfApi, repo: str, revision: str | None, public: bool) -> str:
    """Return the full name of the repository, made with its branch when it is not there.

    Raises:
        UsageError: it is there, and public though that was not asked for, or the other way round.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        private = bool(api.model_info(repo).private)
    except RepositoryNotFoundError:
        repo = api.create_repo(repo, private=not public).repo_id
        private = not public
    if not private and not public:
        raise UsageError("is public, and nothing is published unless asked", where=repo, hint="--public")
    if private and public:
        raise UsageError("is there and private", where=repo, hint="leave out --public, and open it on the hub")
    if revision is not None and revision != "main":
        api.create_branch(repo, branch=revision, exist_ok=True)
    return repo


def _sent(api: HfApi, folder: Path, files: Sequence[Sent], repo: str, revision: str) -> str:
    """Upload what the hub lacks, file by file, then commit all at once; returns the commit."""
    from huggingface_hub import CommitOperationAdd

    operations: list[CommitOperationAdd] = [
        CommitOperationAdd(file.name, file.data if file.data is not None else folder / file.name) for file in files
    ]
    steps = zip(operations, files, strict=True)
    total = sum(file.size for file in files)
    for operation, _ in track(steps, "upload", total=total, size=lambda step: step[1].size, unit="B"):
        api.preupload_lfs_files(repo, [operation], revision=revision, free_memory=False)
    return api.create_commit(
        repo, operations, commit_message=f"Upload with Perpend {__version__}", revision=revision
    ).oid


@contextmanager
def told(repo: str, token: str) -> Iterator[None]:
    """Turn what the hub's client raises inside the block into one line that never holds the token."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except PerpendError:
        raise
    except Exception as error:
        at = error.__cause__ if isinstance(error.__cause__, HfHubHTTPError) else error
        code = at.response.status_code if isinstance(at, HfHubHTTPError) else None
        said = getattr(at, "server_message", None) or str(at)
        raise explained(code, without_secrets(" ".join(said.split()), token), repo) from None


def explained(code: int | None, said: str, repo: str) -> PerpendError:
    """Return the error for an answer of the hub.

    Args:
        code: HTTP status; None where there was no answer.
        said: What the hub or its client said.
        repo: For the message.
    """
    said = said[:200]
    if code == 401:
        return UsageError("the hub does not accept the token", where=repo, hint="hf auth login, or another HF_TOKEN")
    if code == 403:
        return UsageError("the token may not write there", where=repo, hint="hf auth login with a token that may write")
    if code == 404:
        return UsageError("no such repository or branch, or no access", where=repo)
    if code == 409:
        return RunFailed("changed on the hub meanwhile", where=repo, hint=AGAIN)
    if code is not None and 400 <= code < 500 and code != 429:
        return UsageError(f"the hub refuses it ({code}): {said}", where=repo)
    if code is not None:
        return RunFailed(f"the hub failed ({code})", where=repo, hint=AGAIN)
    return RunFailed(f"not sent: {said}", where=repo, hint=AGAIN)

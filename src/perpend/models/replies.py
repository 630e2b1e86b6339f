"""What a model answered, how tokens are drawn, and a file of replies to resume from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from perpend.errors import UsageError


@dataclass(frozen=True)
class Reply:
    """One answer.

    Attributes:
        text: The answer as a reader sees it: no special tokens, no reasoning.
        tokens: Generated ids as they came, reasoning and end token included.
        finished: Whether the model ended it, so that `tokens` close with an end token.
    """

    text: str
    tokens: tuple[int, ...]
    finished: bool


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: Divides the logits; above 0.
        top_k: Draw from this many most likely tokens; 0 for all.
        top_p: Draw from the most likely tokens that make up this share.
        seed: Of the random numbers.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise UsageError(
                f"temperature {self.temperature}, top_k {self.top_k}, top_p {self.top_p}",
                valid="temperature > 0, top_k >= 0, 0 < top_p <= 1; no sampling at all is greedy",
            )

    def seed_of(self, names: Sequence[str]) -> int:
        """Return the seed for what is named so, the same whatever was drawn before."""
        digest = hashlib.sha256(f"{self.seed} {' '.join(names)}".encode()).digest()
        return int.from_bytes(digest[:7], "big")

    @classmethod
    def of(cls, model: Any, seed: int = 0) -> Sampling:
        """Return the settings that the model's authors ship with it; what they leave out is plain sampling."""
        own = model.generation_config
        return cls(own.temperature or 1.0, own.top_k or 0, own.top_p or 1.0, seed)


class ReplyLog(MutableMapping[str, Reply]):
    """Replies by prompt id, appended to a JSON Lines file as they come; what is there already is read first.

    Replies belong to a model, an edit and settings: `header` says which, and a file with another header is refused. A
    last line that was cut off by a crash is dropped.
    """

    def __init__(self, path: Path | str, header: dict[str, Any] | None = None) -> None:
        """Open or begin a log.

        Args:
            path: The file.
            header: What the replies depend on; must fit into JSON.

        Raises:
            UsageError: the file belongs to something else, or is no log of replies.
        """
        self.path = Path(path)
        self._replies: dict[str, Reply] = {}
        wanted = json.loads(json.dumps({"replies": header or {}}))
        lines = self.path.read_bytes().split(b"\n") if self.path.exists() else []
        whole = lines[:-1]
        if not whole:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(_line(wanted))
            return
        try:
            found, *rows = [json.loads(line) for line in whole]
            self._replies = {r["id"]: Reply(r["text"], tuple(r["tokens"]), r["finished"]) for r in rows}
        except (ValueError, KeyError, TypeError):
            raise UsageError("not a log of replies", where=str(path)) from None
        if found != wanted:
            raise UsageError("holds replies of another model, edit or setting", where=str(path), hint=f"rm {path}")
        if lines[-1]:
            self.path.write_bytes(b"\n".join(whole) + b"\n")

    def __getitem__(self, key: str) -> Reply:
        return self._replies[key]

    def __setitem__(self, key: str, reply: Reply) -> None:
        with self.path.open("ab") as file:
            file.write(_line({"id": key, **asdict(reply)}))
        self._replies[key] = reply

    def __delitem__(self, key: str) -> None:
        raise TypeError("replies are only added")

    def __iter__(self) -> Iterator[str]:
        return iter(self._replies)

    def __len__(self) -> int:
        return len(self._replies)


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"

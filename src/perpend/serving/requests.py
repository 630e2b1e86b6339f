"""What a client may ask for, in the words of OpenAI's chat completions, and what this means to the session."""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from perpend.errors import PerpendError, nearest
from perpend.models.replies import Sampling
from perpend.models.streaming import Ask
from perpend.serving.duet import MOST, Duet

COLDEST = 1e-4
"""Temperature below which the most likely token is taken."""
PIXELS = 40_000_000
"""Largest image that is decoded."""

Zero = Annotated[float, Field(ge=0, le=0)]
Nothing = Annotated[list[Any] | dict[str, Any], Field(max_length=0)]


class Refused(Exception):
    """A request that is not carried out.

    Attributes:
        status: Of the response.
        message: One line for a person.
        kind: OpenAI's type of the error.
        code: A word for a program.
        param: Which part of the request it is about.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.code, self.param = status, message, kind, code, param

    @classmethod
    def of(cls, error: BaseException) -> Refused:
        """Return what a client is told of any error: what it asked for wrongly, or that the work failed."""
        if isinstance(error, PerpendError):
            return cls(400 if error.exit_code == 2 else 500, str(error), kind=_kind(error))
        text = (str(error) or type(error).__name__).splitlines()[0]
        return cls(500, f"the answer failed: {text[:200]}", kind="server_error")

    def to_json(self) -> dict[str, Any]:
        """Return the body of the response."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def _kind(error: PerpendError) -> str:
    return "invalid_request_error" if error.exit_code == 2 else "server_error"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Text(_Model):
    """Words."""

    type: Literal["text"]
    text: str


class Link(_Model):
    """Where an image is: in the request itself."""

    url: str
    detail: str | None = None


class Image(_Model):
    """An image."""

    type: Literal["image_url"]
    image_url: Link


class Turn(_Model):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[Text | Image, Field(discriminator="type")]]
    name: str | None = None


class Drawing(_Model):
    """How an answer is made."""

    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    seed: int | None = None
    max_tokens: int | None = Field(default=None, ge=1)

    def sampling(self, usual: Sampling | None, seed: int) -> Sampling | None:
        """Return how tokens are drawn; what the request leaves open is as usual.

        Args:
            usual: Where the request says neither temperature nor anything else about it.
            seed: Where the request has none.
        """
        seed = seed if self.seed is None else self.seed
        if self.temperature is None and self.top_p is None and self.top_k is None:
            return usual and Sampling(usual.temperature, usual.top_k, usual.top_p, seed)
        temperature = 1.0 if self.temperature is None else self.temperature
        return Sampling(temperature, self.top_k or 0, self.top_p or 1.0, seed) if temperature >= COLDEST else None


class StreamOptions(_Model):
    """What a stream tells beside the answer."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Plain(_Model):
    """The only form of an answer."""

    type: Literal["text"]


class Completion(Drawing):
    """`POST /v1/chat/completions`. What this server cannot do must be absent or neutral, so that nobody is misled."""

    model: str
    messages: list[Turn] = Field(min_length=1)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_completion_tokens: int | None = Field(default=None, ge=1)
    stop: str | list[str] | None = None

    n: Literal[1] | None = 1
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Nothing | None = None
    logprobs: Literal[False] | None = None
    response_format: Plain | None = None
    tools: Nothing | None = None

    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)


class Comparison(Drawing):
    """`POST /compare`: the conversation as each side knows it, or None for a side that is not to answer."""

    base: list[Turn] | None = None
    edited: list[Turn] | None = None
    scale: float = Field(default=1.0, ge=-MOST, le=MOST)


M = TypeVar("M", bound=BaseModel)


def read(kind: type[M], body: bytes) -> M:
    """Return the request in a body.

    Raises:
        Refused: not JSON, or not such a request; names the first part that is wrong.
    """
    try:
        return kind.model_validate(json.loads(body))
    except (ValueError, RecursionError) as error:
        if not isinstance(error, ValidationError):
            raise Refused(400, "the body is not JSON") from None
        first = error.errors(include_url=False)[0]
        param = ".".join(str(part) for part in first["loc"] if part not in ("text", "image_url"))
        message = f"{param}: {first['msg']}" if param else first["msg"]
        if first["type"] == "extra_forbidden":
            message = f"unknown parameter '{param}'; {nearest(param, kind.model_fields)}".rstrip("; ")
        raise Refused(400, message, param=param or None) from None


def conversation(turns: Sequence[Turn], duet: Duet) -> tuple[list[dict[str, Any]], tuple[Any, ...]]:
    """Return messages for a session and the images in them.

    Raises:
        Refused: the last turn is not the user's, or an image cannot be had.
    """
    if not turns or turns[-1].role != "user":
        raise Refused(400, "the last message must be the user's", param="messages")
    images: list[Any] = []
    found = []
    for turn in turns:
        content: Any = turn.content
        if not isinstance(content, str):
            images += [_image(part.image_url.url, duet) for part in content if isinstance(part, Image)]
            content = [
                {"type": "image"} if isinstance(part, Image) else {"type": "text", "text": part.text}
                for part in content
            ]
        found.append({"role": "system" if turn.role == "developer" else turn.role, "content": content})
    return found, tuple(images)


def ask(request: Completion, duet: Duet, usual: Sampling | None, seed: int, most: int) -> Ask:
    """Return what a completion asks of the session.

    Args:
        request: The request.
        duet: The model and its edit.
        usual: How tokens are drawn where the request does not say.
        seed: Where the request has none.
        most: Length of an answer where the request does not say.

    Raises:
        Refused: no such model, or no such conversation.
    """
    try:
        scale = duet.scale_of(request.model)
    except PerpendError as error:
        raise Refused(404, str(error), code="model_not_found", param="model") from None
    messages, images = conversation(request.messages, duet)
    tokens = request.max_completion_tokens or request.max_tokens or most
    return Ask(messages, duet.at(scale), request.sampling(usual, seed), tokens, request.stops, images)


def _image(url: str, duet: Duet) -> Any:
    """Return an image that a request carries; none is ever fetched or read from disk for a client."""
    if not duet.sees:
        raise Refused(400, "this model takes no images", param="messages")
    head, comma, data = url.partition(",")
    if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
        raise Refused(400, "an image must be in the request: data:image/png;base64,...", param="messages")
    from PIL import Image as pillow

    try:
        picture = pillow.open(io.BytesIO(base64.b64decode(data, validate=True)))
        if picture.width * picture.height > PIXELS:
            raise Refused(400, f"an image of more than {PIXELS:,} pixels", param="messages")
        return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, binascii.Error, pillow.DecompressionBombError) as error:
        raise Refused(400, f"an image cannot be read: {str(error)[:120]}", param="messages") from None

"""OpenAI's requests, answers and errors: what of them is understood, and how the rest is refused.

A field that would change the answer and is not understood is refused by name; one that has the value of leaving it out is as good
as left out. https://platform.openai.com/docs/api-reference
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    model_validator,
)

from trace_dist.data.examples import Prompt
from trace_dist.serving.options import Listening, Sampling
from trace_dist.serving.prompts import check_prompt
from trace_dist.serving.router import Answer

FINISH = {"stop": "stop", "length": "length", "cancelled": "stop"}
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "function_call": ("none", "auto"),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "reasoning_effort": ("none",),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
"""Field -> values that mean what leaving it out means."""
NO_EFFECT = ("user", "metadata", "safety_identifier", "prompt_cache_key")
"""Fields by which a client marks a request for itself."""


class ApiError(Exception):
    """A request that is refused, or could not be carried out.

    Args:
        status: of HTTP.
        message: for people.
        kind: OpenAI's ``type``.
        param: the field that is wrong.
        code: for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def failed(message: str, status: int = 500) -> ApiError:
    """The trouble is the server's."""
    return ApiError(status, message, "server_error")


class StreamOptions(BaseModel):
    """Of a stream."""

    model_config = ConfigDict(extra="forbid")

    include_usage: StrictBool | None = None
    include_obfuscation: StrictBool | None = None
    """Whether events are padded, so that their lengths say nothing to who overhears them; these never are."""


Number = StrictInt | StrictFloat
Stop = StrictStr | Annotated[list[StrictStr], Field(max_length=16)]


class Request(BaseModel):
    """What both kinds of requests have."""

    model_config = ConfigDict(extra="forbid")

    model: StrictStr
    max_tokens: StrictInt | None = None
    temperature: Number = Field(default=0, ge=0, le=2)
    top_p: Number = Field(default=1, gt=0, le=1)
    top_k: StrictInt = Field(default=0, ge=0)
    n: StrictInt = Field(default=1, ge=1)
    seed: StrictInt | None = None
    stop: Stop = Field(default_factory=list)
    stream: StrictBool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        kept = {key: part for key, part in _given(value).items() if key not in NO_EFFECT}
        return {
            key: part
            for key, part in kept.items()
            if not any(_same(part, neutral) for neutral in NEUTRAL.get(key, ()))
        }

    def sampling(self, limits: Listening) -> Sampling:
        """How the answers are written.

        Raises:
            ApiError: more tokens, or more answers, than the server gives; or a value that makes no sense.
        """
        asked = self.asked_tokens
        if asked is not None and not 1 <= asked <= limits.max_tokens:
            rule = f"must lie in [1, {limits.max_tokens}]"
            raise ApiError(400, f"max_tokens={asked}: {rule} on this server", param="max_tokens")
        if self.n > limits.max_n:
            raise ApiError(400, f"n={self.n}: may be {limits.max_n} at most on this server", param="n")
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        try:
            return Sampling(asked, float(self.temperature), float(self.top_p), self.top_k, self.seed, stop)
        except ValueError as error:
            raise ApiError(400, str(error), param=str(error).partition("=")[0]) from None

    @property
    def asked_tokens(self) -> int | None:
        """Tokens of an answer that the request names."""
        return self.max_tokens


class CompletionRequest(Request):
    """``/v1/completions``: a prompt is put to the model as in training."""

    prompt: StrictStr | list[StrictStr]

    def prompts(self) -> list[Prompt]:
        """Raises ApiError where there is none."""
        given = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        if not given:
            raise ApiError(400, "prompt: is an empty list; give at least one text", param="prompt")
        return [_checked(prompt, "prompt") for prompt in given]


class TextPart(BaseModel):
    """A part of a turn."""

    model_config = ConfigDict(extra="forbid")

    type: StrictStr = Field(pattern="^text$")
    text: StrictStr


class Message(BaseModel):
    """A turn."""

    model_config = ConfigDict(extra="forbid")

    role: StrictStr
    content: StrictStr | list[TextPart]

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, value: Any) -> Any:
        """What a client sends back of an earlier answer, such as ``refusal: null``."""
        return _given(value) if isinstance(value, dict) else value


class ChatRequest(Request):
    """``/v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: StrictInt | None = None

    @property
    def asked_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def prompts(self) -> list[Prompt]:
        """The one conversation."""
        turns = [
            {
                "role": message.role,
                "content": message.content
                if isinstance(message.content, str)
                else "".join(part.text for part in message.content),
            }
            for message in self.messages
        ]
        return [_checked(turns, "messages")]


def _given(value: dict[str, Any]) -> dict[str, Any]:
    """Without what is null or an empty list, which is as good as left out; an empty prompt is not."""
    return {
        key: part
        for key, part in value.items()
        if part is not None and (part != [] or key in ("prompt", "messages", "content"))
    }


def _same(part: Any, value: Any) -> bool:
    """0.0 is 0 too, but ``false`` is no number."""
    return (type(part) is type(value) or (type(part), type(value)) == (float, int)) and bool(part == value)


def _checked(prompt: Any, where: str) -> Prompt:
    try:
        return check_prompt(prompt, where)
    except ValueError as error:
        raise ApiError(400, str(error), param=where) from None


def routing(answer: Answer) -> dict[str, Any]:
    """How an answer came about, beside what OpenAI has."""
    return {
        "task": answer.task,
        "margin": answer.margin,
        "rejected": answer.rejected,
        "error_bound": answer.error_bound,
        **({"blend": answer.blend} if answer.blend else {}),
    }


def usage(found: Sequence[Sequence[Answer]]) -> dict[str, int]:
    """Tokens read and written; a prompt with several answers is read once."""
    read = sum(answers[0].num_prompt_tokens for answers in found)
    written = sum(answer.num_tokens for answers in found for answer in answers)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


class Shape:
    """The answers of one request, whole or in pieces.

    Args:
        chat: of ``/v1/chat/completions``, or of ``/v1/completions``.
        model: as the request names it.
    """

    def __init__(self, chat: bool, model: str) -> None:
        self._chat, self._model = chat, model
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def whole(self, found: Sequence[Sequence[Answer]]) -> dict[str, Any]:
        """All answers; those to one prompt stand together."""
        choices: list[dict[str, Any]] = []
        for answer in (answer for answers in found for answer in answers):
            said: dict[str, Any] = {"text": answer.text}
            if self._chat:
                said = {"message": {"role": "assistant", "content": answer.text, "refusal": None}}
            choices.append(self._choice(len(choices), said, answer))
        kind = "chat.completion" if self._chat else "text_completion"
        return self._head(kind) | {"choices": choices, "usage": usage(found)}

    def piece(self, index: int, text: str, first: bool) -> dict[str, Any]:
        """The next piece of an answer."""
        said: dict[str, Any] = {"text": text}
        if self._chat:
            said = {"delta": ({"role": "assistant"} if first else {}) | {"content": text}}
        return self._chunk([self._choice(index, said, None)])

    def end(self, index: int, answer: Answer) -> dict[str, Any]:
        """That there is no other piece of an answer, and how it came about."""
        return self._chunk([self._choice(index, {"delta": {}} if self._chat else {"text": ""}, answer)])

    def usage(self, found: Sequence[Sequence[Answer]]) -> dict[str, Any]:
        """The last piece, where the request wants it."""
        return self._chunk([]) | {"usage": usage(found)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return self._head(kind) | {"choices": choices}

    @staticmethod
    def _choice(index: int, said: Mapping[str, Any], answer: Answer | None) -> dict[str, Any]:
        finish = None if answer is None else FINISH[answer.finish]
        how = {} if answer is None else {"trace_dist": routing(answer)}
        return {"index": index, **said, "logprobs": None, "finish_reason": finish, **how}

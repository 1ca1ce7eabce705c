"""The bodies of requests and responses: OpenAI's, with transformers' generation options as further fields.

A field that would change the response and is not supported is refused by its name, and never ignored.
"""

import difflib
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from llm2slm_export.inference.generation.options import FinishReason
from llm2slm_export.serving.api_errors import FIELDS

# Fields of OpenAI's protocol that the server does not have, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "metadata": (None, {}),
    "modalities": (None, ["text"]),
    "moderation": (None,),
    "parallel_tool_calls": (None, True, False),
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "prompt_cache_key": (None,),
    "prompt_cache_options": (None,),
    "prompt_cache_retention": (None,),
    "reasoning_effort": (None,),
    "response_format": (None, {"type": "text"}),
    "safety_identifier": (None,),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None, ""),
    "tool_choice": (None, "none"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
    "verbosity": (None,),
    "web_search_options": (None,),
}


_Prompts = TypeVar("_Prompts", str | list[str], str | list[str] | None)
_LONGEST_NAME = 64  # characters of an unknown field for which a known one is looked up
_MOST_SCORED, _LONGEST_SCORED = 8_000, 1_000  # characters of all responses to score, and of one


def _is_absent(value: object) -> bool:
    return value is None


class RequestBody(BaseModel):
    """A body that names a model. Unknown and unsupported fields are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = Field(description="Name of a model, from /v1/models.")

    @model_validator(mode="before")
    @classmethod
    def _without_neutral_fields(cls, body: Any) -> Any:
        """Drop unsupported fields that ask for nothing. The others remain, and are refused."""
        if not isinstance(body, dict):
            return body
        dropped = {
            name for name, values in _NEUTRAL.items() if name not in cls.model_fields and body.get(name) in values
        }
        return {name: value for name, value in body.items() if name not in dropped}

    @classmethod
    def refusal(cls, name: str) -> str:
        """Why there is no field of this name."""
        if name in _NEUTRAL:
            return "not supported"
        if name in FIELDS:
            return f"unknown field; did you mean {FIELDS[name]}?"
        if len(name) > _LONGEST_NAME:
            return "unknown field"
        close = difflib.get_close_matches(name, cls.model_fields, n=1)
        return "unknown field" + (f"; did you mean {close[0]}?" if close else "")


class StreamOptions(BaseModel):
    """Options of a streamed response."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = Field(False, description="Whether a last chunk has the usage.")
    include_obfuscation: Literal[False] | None = Field(None, description="Padding of chunks; not supported.")


class GeneratingBody(RequestBody):
    """What requests for a response have in common. A field that is absent or null has the bundle's default."""

    encoding: str | list[str] | None = Field(
        None, description="The encoding of a prompt, as /v1/encodings returns it, or several, instead of prompts."
    )
    stream: bool | None = Field(None, description="Whether tokens are sent as they are generated.")
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, description="Number of responses to a prompt.")
    temperature: float | None = Field(None, description="Sampling temperature; 0 is greedy search.")
    top_p: float | None = Field(None, description="Sampling from the most likely tokens with this total probability.")
    stop: str | list[str] | None = Field(None, description="Strings before which a response ends.")
    seed: int | None = Field(None, description="Random seed of sampling.")
    user: str | None = Field(None, description="Name of the end user. It is written to the log.")
    # transformers' generation options
    do_sample: bool | None = None
    min_new_tokens: int | None = None
    num_beams: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    bad_words_ids: list[list[int]] | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = None
    # the server's own
    truncate: bool = Field(False, description="Whether a prompt over the limit is truncated instead of refused.")
    timeout: float | None = Field(None, gt=0, description="Seconds until the request ends with an error.")

    own_options: ClassVar[tuple[str, ...]] = (
        "do_sample", "min_new_tokens", "num_beams", "length_penalty", "early_stopping", "top_k", "min_p", "typical_p",
        "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "forced_bos_token_id", "forced_eos_token_id", "seed",
    )  # fmt: skip

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> "GeneratingBody":
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "stream_options: has no effect without stream")
        return self

    @model_validator(mode="after")
    def _prompts_or_encodings(self) -> "GeneratingBody":
        _require_one(self, "messages" if "messages" in type(self).model_fields else "prompt")
        return self

    @field_validator("encoding")
    @classmethod
    def _some_encodings(cls, encoding: str | list[str] | None) -> str | list[str] | None:
        if encoding == []:
            raise PydanticCustomError("empty", "has no encodings")
        return encoding

    @property
    def prompts(self) -> list[str]:
        """The prompts; none if there are encodings."""
        return []

    @property
    def encodings(self) -> list[str]:
        """The encodings, in base64; none if there are prompts."""
        if self.encoding is None:
            return []
        return [self.encoding] if isinstance(self.encoding, str) else self.encoding

    @property
    def wants_logprobs(self) -> bool:
        """Whether the response has the log-probabilities of its tokens."""
        return False

    @property
    def new_tokens(self) -> int | None:
        """The maximum number of new tokens; None: the bundle's."""
        return None

    def options(self, *, samples: bool) -> dict[str, Any]:
        """The generation options that the request gives, with transformers' names.

        Args:
            samples: whether the bundle samples by default.
        """
        given: dict[str, Any] = {name: getattr(self, name) for name in self.own_options}
        given |= {"max_new_tokens": self.new_tokens, "num_return_sequences": self.n, "stop": self.stop or None}
        if self.temperature == 0:
            # top_p changes nothing where the most likely token is taken.
            given["do_sample"] = bool(self.do_sample)
            given["temperature"] = 0.0 if self.do_sample else None
        elif self.temperature is not None or self.top_p not in (None, 1):
            given["do_sample"] = True if self.do_sample is None else self.do_sample
            given |= {"temperature": self.temperature, "top_p": self.top_p}
        if self.do_sample is None and not (samples if given["do_sample"] is None else given["do_sample"]):
            # As in OpenAI's protocol, a seed may be given to a request that needs none.
            given["seed"] = None
        given["output_scores"] = self.wants_logprobs or None
        return {name: value for name, value in given.items() if value is not None}


class CompletionBody(GeneratingBody):
    """The body of `POST /v1/completions`."""

    prompt: str | list[str] | None = Field(None, description="A prompt, or several.")
    max_tokens: int | None = Field(None, description="Maximum number of new tokens.")
    logprobs: Literal[0] | None = Field(None, description="0: the log-probability of each new token.")

    @field_validator("prompt")
    @classmethod
    def _some(cls, prompt: str | list[str] | None) -> str | list[str] | None:
        return _not_empty(prompt)

    @property
    def prompts(self) -> list[str]:
        """The prompts; none if there are encodings."""
        if self.prompt is None:
            return []
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    @property
    def wants_logprobs(self) -> bool:
        """Whether the response has the log-probabilities of its tokens."""
        return self.logprobs is not None

    @property
    def new_tokens(self) -> int | None:
        """The maximum number of new tokens; None: the bundle's."""
        return self.max_tokens


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a chat. A pair reads one message of the user: it has no template for others."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["user"]
    content: str | list[TextPart]
    name: str | None = None


class ChatBody(GeneratingBody):
    """The body of `POST /v1/chat/completions`."""

    messages: list[Message] | None = Field(
        None, min_length=1, max_length=1, description="The prompt, as one message of the user."
    )
    max_tokens: int | None = Field(None, description="As max_completion_tokens.")
    max_completion_tokens: int | None = Field(None, description="Maximum number of new tokens.")
    logprobs: bool | None = Field(None, description="Whether to return the log-probability of each new token.")

    @model_validator(mode="after")
    def _one_maximum(self) -> "ChatBody":
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise PydanticCustomError("max_tokens", "max_tokens: differs from max_completion_tokens; give one of them")
        return self

    @property
    def prompts(self) -> list[str]:
        """The prompt: the text of the message. The bundle's prompt template is around it. None if there are encodings."""
        if self.messages is None:
            return []
        content = self.messages[0].content
        return [content if isinstance(content, str) else "".join(part.text for part in content)]

    @property
    def wants_logprobs(self) -> bool:
        """Whether the response has the log-probabilities of its tokens."""
        return bool(self.logprobs)

    @property
    def new_tokens(self) -> int | None:
        """The maximum number of new tokens; None: the bundle's."""
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens


class ScoreBody(RequestBody):
    """The body of `POST /v1/score`."""

    prompt: str | None = Field(None, description="The prompt.")
    encoding: str | None = Field(
        None, description="The encoding of the prompt, as /v1/encodings returns it, instead of the prompt."
    )
    responses: list[str] = Field(min_length=1, max_length=64, description="The responses to score.")
    add_eos: bool = Field(True, description="Whether the end-of-sequence token is scored too.")
    truncate: bool = Field(False, description="Whether a prompt over the limit is truncated instead of refused.")

    @model_validator(mode="after")
    def _prompt_or_encoding(self) -> "ScoreBody":
        _require_one(self, "prompt")
        return self

    @property
    def prompts(self) -> list[str]:
        """The prompt; none if there is an encoding."""
        return [] if self.prompt is None else [self.prompt]

    @field_validator("responses")
    @classmethod
    def _short(cls, responses: list[str]) -> list[str]:
        """Scoring takes memory with the square of a response's length, and other requests wait for it."""
        characters = list(map(len, responses))
        for found, most in ((max(characters, default=0), _LONGEST_SCORED), (sum(characters), _MOST_SCORED)):
            if found > most:
                raise PydanticCustomError("long", "{found} characters, at most {most}", {"found": found, "most": most})
        return responses


class EncodingsBody(RequestBody):
    """The body of `POST /v1/encodings`."""

    prompt: str | list[str] = Field(description="A prompt, or several.")
    truncate: bool = Field(False, description="Whether a prompt over the limit is truncated instead of refused.")
    max_prompt_tokens: int | None = Field(
        None, ge=1, description="Maximum number of tokens of a truncated prompt (default: the bundle's)."
    )
    timeout: float | None = Field(None, gt=0, description="Seconds until the request ends with an error.")
    user: str | None = Field(None, description="Name of the end user. It is written to the log.")

    @field_validator("prompt")
    @classmethod
    def _some(cls, prompt: str | list[str]) -> str | list[str]:
        return _not_empty(prompt)

    @model_validator(mode="after")
    def _maximum_of_truncation(self) -> "EncodingsBody":
        if self.max_prompt_tokens is not None and not self.truncate:
            raise PydanticCustomError("truncate", "max_prompt_tokens: has no effect without truncate")
        return self

    @property
    def prompts(self) -> list[str]:
        """The prompts."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


def _not_empty(prompt: _Prompts) -> _Prompts:
    if prompt == []:
        raise PydanticCustomError("empty", "has no prompts")
    return prompt


def _require_one(body: "GeneratingBody | ScoreBody", name: str) -> None:
    """Require the field `name`, which has the prompts, or `encoding`, and refuse both."""
    given = [field for field in (name, "encoding") if getattr(body, field) is not None]
    if len(given) != 1:
        text = f"{name}: give {name} or encoding ({'both are' if given else 'neither is'} given)"
        raise PydanticCustomError("one_of", text)
    if given == ["encoding"] and body.truncate:
        raise PydanticCustomError("truncate", "truncate: has no effect on an encoding")


class Usage(BaseModel):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    """Log-probabilities of a completion's tokens."""

    tokens: list[str]
    token_logprobs: list[float]
    text_offset: list[int]


class PairFields(BaseModel):
    """What a finished choice has besides OpenAI's fields.

    `timings_ms`: milliseconds by stage: queue, tokenize, encode, project, prefill, decode, total. `cached`: whether the encoding
    came from the cache. `dropped_tokens`: number of tokens truncated from the prompt. `warnings`: requested settings that are not
    in effect. Each is there only if it has a value.
    """

    timings_ms: dict[str, float] | None = Field(default=None, exclude_if=_is_absent)
    cached: bool | None = Field(default=None, exclude_if=_is_absent)
    dropped_tokens: int | None = Field(default=None, exclude_if=_is_absent)
    warnings: list[str] | None = Field(default=None, exclude_if=_is_absent)


class CompletionChoice(PairFields):
    """One response. In a chunk `finish_reason` is null until the last one."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None


class Completion(BaseModel):
    """The response of `POST /v1/completions`, and each of its chunks."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TokenLogprob(BaseModel):
    """The log-probability of one token."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[None] = []


class ChatLogprobs(BaseModel):
    """Log-probabilities of a message's tokens."""

    content: list[TokenLogprob]
    refusal: None = None


class ChatMessage(BaseModel):
    """A response."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(PairFields):
    """One response."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason


class Chat(BaseModel):
    """The response of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    """What a chunk adds to a message."""

    role: Literal["assistant"] | None = Field(default=None, exclude_if=_is_absent)
    content: str | None = Field(default=None, exclude_if=_is_absent)


class ChatChunkChoice(PairFields):
    """What a chunk adds to one response."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(BaseModel):
    """A chunk of a streamed chat."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class ResponseScore(BaseModel):
    """The log-probability of one given response, in nats."""

    index: int
    text: str
    logprob: float
    token_logprobs: list[float]
    is_greedy: bool = Field(description="Whether greedy search chooses every one of these tokens.")


class Scores(BaseModel):
    """The response of `POST /v1/score`."""

    object: Literal["list"] = "list"
    model: str
    data: list[ResponseScore]
    usage: Usage


class EncodedPrompt(BaseModel):
    """The encoding of one prompt: the content of a file of `run --save-encoding`, in base64."""

    index: int
    object: Literal["encoding"] = "encoding"
    encoding: str
    prompt_tokens: int
    dropped_tokens: int | None = Field(
        None, exclude_if=_is_absent, description="Number of tokens truncated from the prompt, if there are any."
    )
    cached: bool | None = Field(
        None, exclude_if=_is_absent, description="Whether the encoding came from the cache, if there is one."
    )
    timings_ms: dict[str, float]


class Encodings(BaseModel):
    """The response of `POST /v1/encodings`."""

    object: Literal["list"] = "list"
    model: str
    data: list[EncodedPrompt]
    usage: Usage


class Model(BaseModel):
    """A model: a bundle, or one of its other heads."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["llm2slm-export"] = "llm2slm-export"


class Models(BaseModel):
    """The response of `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[Model]


class ErrorBody(BaseModel):
    """An error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The body of every response that is none."""

    error: ErrorBody

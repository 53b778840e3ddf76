"""What clients send. A field that is not here is refused, not ignored; null stands for the default."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from elutq.sampling import SamplingOptions

_TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {k: v for k, v in value.items() if v is not None}
        return value


class StreamOptions(_Body):
    """How a stream ends. Obfuscation is a matter of encrypted transport to OpenAI; it is ignored."""

    include_usage: bool = False
    include_obfuscation: bool = False


class GenerationBody(_Body):
    """What chat and plain completions share.

    `user`, `metadata`, `store`, `service_tier`, `safety_identifier` and `prompt_cache_key` are OpenAI's
    book-keeping: they have no effect on an answer, and none here.
    """

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=128)
    stop: (
        Annotated[str, StringConstraints(min_length=1)]
        | Annotated[list[Annotated[str, StringConstraints(min_length=1)]], Field(max_length=16)]
    ) = []
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, description="0 and -1 keep all tokens")
    min_p: float = Field(0.0, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    logit_bias: dict[
        Annotated[str, StringConstraints(pattern="^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]
    ] = {}
    user: str | None = None
    metadata: dict[str, str] = {}
    store: bool = False
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> "GenerationBody":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only for requests with stream: true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, choice: int) -> SamplingOptions:
        """Sampling of one of `n` choices; each has its own seed, so that they differ."""
        return SamplingOptions(
            temperature=self.temperature,
            top_k=max(self.top_k, 0),
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            logit_bias={int(token): bias for token, bias in self.logit_bias.items()},
            seed=None if self.seed is None else self.seed + choice,
        )


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: str | list[str] | list[_TokenId] | list[list[_TokenId]]
    max_tokens: int = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False
    ignore_eos: bool = Field(False, description="Go on after end-of-sequence tokens, to measure speed")

    @model_validator(mode="after")
    def _echo_has_no_logprobs(self) -> "CompletionBody":
        if self.echo and self.logprobs is not None:
            raise ValueError("echo cannot be combined with logprobs: those of the prompt are not computed")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or more."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [part for part in self.prompt if isinstance(part, int)]
        return [ids] if ids else [part for part in self.prompt if not isinstance(part, int)]


class TextPart(_Body):
    """A piece of a message. Images, audio and files are not supported."""

    type: Literal["text"]
    text: str


class FunctionCall(_Body):
    """A call that the model made earlier; `arguments` holds JSON."""

    name: str
    arguments: str


class ToolCallBody(_Body):
    """A call in a message of the assistant."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(_Body):
    """A message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallBody] | None = None
    tool_call_id: str | None = None


class Function(_Body):
    """A function that the model may call. `strict` matters only where `tool_choice` makes it call."""

    name: Annotated[str, StringConstraints(pattern="^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Body):
    """A tool that the model may use."""

    type: Literal["function"]
    function: Function


class FunctionName(_Body):
    """Which function."""

    name: str


class NamedTool(_Body):
    """A `tool_choice` that names a function."""

    type: Literal["function"]
    function: FunctionName


class JsonSchema(_Body):
    """The schema of an answer. It is enforced whether or not `strict` asks for it."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(_Body):
    """What the answer must look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_goes_with_its_type(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema must be given if, and only if, type is json_schema")
        return self


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[Tool] = []
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool = True
    modalities: list[Literal["text"]] = ["text"]
    chat_template_kwargs: dict[str, Any] = Field(
        {}, description="Further variables of the chat template, such as enable_thinking"
    )

    @model_validator(mode="after")
    def _fields_agree(self) -> "ChatBody":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("give max_tokens or max_completion_tokens, not both")
        if reserved := self.chat_template_kwargs.keys() & {"messages", "tools", "add_generation_prompt"}:
            raise ValueError(f"chat_template_kwargs must not set {min(reserved)}")
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise ValueError("tools has two functions of one name")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice names {self.tool_choice.function.name!r}, which is not in tools")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice: required needs tools")
        constrained = self.response_format is not None and self.response_format.type != "text"
        if constrained and self.active_tools:
            raise ValueError(
                "response_format and tools exclude each other, for an answer in that format could call none; "
                "set tool_choice: none"
            )
        return self

    @property
    def active_tools(self) -> list[Tool]:
        """Tools that the model is told of."""
        return [] if self.tool_choice == "none" else self.tools


class TokenizeBody(_Body):
    """POST /tokenize: a text, or a conversation as the chat template renders it."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _one_of_two(self) -> "TokenizeBody":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeBody(_Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[_TokenId]

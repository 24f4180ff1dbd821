"""What may stand in a request: OpenAI's names, the names of the samplers that people know, and ours for the inside.

Nothing is converted on the way: ``"5"`` is no number. A name that is not here is an error, so that a misspelt argument is never ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Id = Annotated[int, Field(ge=0, lt=2**31)]
Ids = list[Id]
Words = list[str | Ids]
WHOLE = Field(default=None, ge=-(2**31), lt=2**31)


class Body(BaseModel):
    """Base of all requests."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class SiteWanted(Body):
    """One entry of ``return_sites``: a site or a pattern of sites, of some heads, at some positions."""

    site: str = Field(max_length=200, examples=["blocks.3.resid_post", "blocks.*.attn.pattern"])
    heads: list[Annotated[int, Field(ge=0, lt=100_000)]] | None = Field(default=None, min_length=1, max_length=1024)
    positions: str | None = Field(default=None, max_length=200, description="Of the whole row, prompt and answer: '7:', '3:9' or '0,4'.", examples=["0:8"])


class Inside(Body):
    """What is asked of the inside of the model, with any request for text."""

    return_sites: list[Annotated[str, Field(max_length=200)] | SiteWanted] | None = Field(
        default=None, max_length=64, description="Sites whose values come with the answer: 'blocks.3.resid_post', 'blocks.5.attn.pattern[0,2]'."
    )
    sites_format: Literal["base64", "lists"] | None = Field(default=None, description="base64 (default): float32, little-endian; or nested lists of numbers.")
    edits: list[dict[str, Any]] | dict[str, Any] | None = Field(
        default=None, description="Edits that hold while the answer is made: a list of {type, site, …}, or the whole JSON that Intervention.save writes."
    )
    return_trace: bool | Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="How each token was chosen, link by link; a number says how many candidates of each stage (true: 10)."
    )


class Sampling(Body):
    """How the next token is chosen; names and meanings as in ``glassformer.generate``."""

    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = Field(default=None, max_length=100_000, description="By id, written as text as OpenAI does; or by a text.")
    do_sample: bool | None = None
    dynatemp_range: float | None = None
    dynatemp_exponent: float | None = None
    top_k: int | None = WHOLE
    min_p: float | None = None
    typical_p: float | None = None
    typ_p: float | None = None
    top_n_sigma: float | None = None
    top_h: float | None = None
    top_a: float | None = None
    epsilon_cutoff: float | None = None
    eta_cutoff: float | None = None
    min_keep: int | None = WHOLE
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    mirostat: int | None = WHOLE
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    adaptive_target: float | None = None
    adaptive_decay: float | None = None
    repetition_penalty: float | None = None
    repeat_penalty: float | None = None
    penalty_window: int | None = WHOLE
    repeat_last_n: int | None = WHOLE
    dry_multiplier: float | None = None
    dry_base: float | None = None
    dry_allowed_length: int | None = WHOLE
    dry_penalty_last_n: int | None = WHOLE
    dry_sequence_breakers: Words | None = Field(default=None, max_length=1000)
    no_repeat_ngram_size: int | None = WHOLE
    bad_words: Words | None = Field(default=None, max_length=10_000)
    bad_words_ids: list[Ids] | None = Field(default=None, max_length=10_000)
    suppress: Ids | None = None
    suppress_tokens: Ids | None = None
    suppress_first: Ids | None = None
    begin_suppress_tokens: Ids | None = None
    forced_first: Id | Ids | None = None
    forced_bos_token_id: Id | None = None
    forced_last: Id | Ids | None = None
    forced_eos_token_id: Id | None = None
    min_new_tokens: int | None = WHOLE
    order: str | list[str] | None = None
    samplers: str | list[str] | None = None


NOT_SERVED = ("sequence_bias", "constraint", "allowed", "prefix_allowed_tokens_fn")
"""Settings of the sampler that JSON cannot say: functions, objects, keys that are lists."""


class ResponseFormat(Body):
    """What the answer has to be: text, any JSON object, or JSON by a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = Field(default=None, description="{name, schema, strict}")

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and not isinstance((self.json_schema or {}).get("schema"), dict):
            raise ValueError("an object {'name': …, 'schema': {…}} with a JSON schema in it")
        return self


class StreamOptions(Body):
    """``stream_options`` of OpenAI."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Answering(Sampling, Inside):
    """What completions and chat have in common."""

    model: str | None = Field(default=None, description="The name under /v1/models; it may be left out, since one model is served.")
    n: int | None = Field(default=None, ge=1, le=1024)
    max_tokens: int | None = Field(default=None, ge=0, lt=2**31)
    stop: str | list[str] | None = Field(default=None, max_length=10_000)
    stop_strings: str | list[str] | None = Field(default=None, max_length=10_000)
    stop_token_ids: Ids | None = Field(default=None, max_length=1000, description="Ids that end the answer, beside the model's own.")
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(default=None, max_length=512)
    response_format: ResponseFormat | None = None
    regex: str | None = Field(default=None, max_length=100_000, description="The answer matches this regular expression.")
    grammar: str | None = Field(default=None, max_length=1_000_000, description="The answer follows this grammar (Lark or GBNF).")
    json_schema: dict[str, Any] | Literal[True] | None = Field(default=None, description="The answer is JSON by this schema; true: any JSON.")
    choices: list[str] | None = Field(default=None, min_length=1, max_length=10_000, description="The answer is one of these texts.")
    # Known to OpenAI's clients, and without a meaning here
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class CompletionRequest(Answering):
    """``POST /v1/completions``: a text is continued."""

    prompt: str | Ids | Words = Field(examples=["Once upon a time"])
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0)
    best_of: int | None = Field(default=None, ge=1, le=1024, description="OpenAI's; only the value of n is served.")


class Message(BaseModel):
    """One message; what else it holds (``name``, ``tool_calls``, ``reasoning_content``, …) goes to the chat template."""

    model_config = ConfigDict(extra="allow", strict=True)
    role: str = Field(max_length=100)
    content: str | list[dict[str, Any]] | None = None


class ChatRequest(Answering):
    """``POST /v1/chat/completions``: a conversation is answered, by the model's own chat template."""

    messages: list[Message] = Field(min_length=1, max_length=10_000)
    max_completion_tokens: int | None = Field(default=None, ge=0, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0)
    tools: list[dict[str, Any]] | None = Field(default=None, max_length=512)
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(default=None, description="Variables of the chat template, such as {'enable_thinking': false}.")


class EmbeddingRequest(Body):
    """``POST /v1/embeddings``: a vector for each text."""

    input: str | Ids | Words
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(default=None, ge=1, lt=2**31)
    user: str | None = Field(default=None, max_length=512)


class TokenizeRequest(Body):
    """``POST /tokenize``: the ids of a text, or of a conversation."""

    text: str | None = None
    messages: list[Message] | None = Field(default=None, min_length=1, max_length=10_000)
    add_special: bool = Field(default=True, description="With what a text of this model begins with.")
    model: str | None = None


class DetokenizeRequest(Body):
    """``POST /detokenize``: the text of ids."""

    ids: Ids
    model: str | None = None


REQUESTS: tuple[type[Body], ...] = (CompletionRequest, ChatRequest, EmbeddingRequest, TokenizeRequest, DetokenizeRequest)

"""Running models: the only importer of the compiled engine."""

import itertools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Unpack

import numpy as np
from numpy.typing import NDArray

from elutq import _core
from elutq.architectures import EngineConfig, vectors
from elutq.checkpoint import Checkpoint, hlq_tensors, read_generation_config
from elutq.errors import InvalidArgumentError, TokenizerError
from elutq.generation import Generation, GenerationRequest, Piece, common_prefix, token_array
from elutq.packing import HlqMatrix
from elutq.sampling import SamplingOptions, engine_errors
from elutq.scheme import QuantScheme
from elutq.shapes import random_linears, random_routers, shape_config
from elutq.tokenizer import Tokenizer

#: Prompt tokens that go through the model between two looks at Ctrl-C.
_PREFILL_TOKENS = 512

#: Sampling options that a `generation_config.json` may state.
_RECOMMENDED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")

SequenceState = _core.Sequence

#: How keys and values are kept: 16-bit floats, or bytes with a scale per position and head.
KvCacheType = Literal["fp16", "int8"]


class PromptCache:
    """Keys and values of a text that grows, as a conversation does.

    Generating with it computes only what the prompt does not share with the text before, and leaves prompt
    and answer in it. One generation at a time may use it.

    Attributes:
        sequence: the state, which `model.step` takes.
    """

    def __init__(self, model: "LanguageModel") -> None:
        """An empty text of `model`."""
        self.sequence = model.new_sequence()
        self._tokens: list[int] = []

    def __len__(self) -> int:
        """Tokens held."""
        return len(self.sequence)

    def rewind(self, prompt: Sequence[int]) -> None:
        """Forget what `prompt` does not begin with, and its last token, whose logits are wanted."""
        held = token_array(self._tokens[: len(self)])
        self.sequence.truncate(common_prefix(held, token_array(prompt)[:-1]))

    def extend(
        self, model: "LanguageModel", tokens: Sequence[int], all_logits: bool = False
    ) -> NDArray[np.float32]:
        """Append tokens; logits after the last, float32 [vocab_size], or after each, [tokens, vocab_size]."""
        # The sequence's length decides what is held: an interrupt may come before or after the step.
        self._tokens[len(self) :] = tokens
        return model.step([(self.sequence, tokens)], all_logits)[0]


class LanguageModel:
    """A model ready to run. Made by :func:`load` or :func:`random_model`.

    Several threads may use one model: its steps run one after the other.

    Attributes:
        config: the numbers of the architecture.
        load_seconds: how long loading took.
    """

    config: EngineConfig
    load_seconds: float

    def __init__(
        self, engine: _core.Engine, config: EngineConfig, folder: Path | None, context: int | None
    ) -> None:
        limit = config.max_position_embeddings
        if context is not None and not 1 <= context <= limit:
            raise InvalidArgumentError(f"context must be from 1 to the model's limit {limit}, not {context}")
        self._engine: _core.Engine | None = engine
        self._folder = folder
        self.config = config
        self.context = limit if context is None else context
        self.load_seconds = 0.0

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model's folder.

        Raises:
            TokenizerError: the folder has none, or the model came without a folder.
        """
        if self._folder is None:
            raise TokenizerError("a model with random weights has no tokenizer; use token ids")
        return Tokenizer.from_folder(self._folder)

    @cached_property
    def recommended_sampling(self) -> SamplingOptions:
        """How the model's `generation_config.json` samples; empty when it does not.

        Raises:
            ConfigError: the file is malformed.
        """
        config = {} if self._folder is None else read_generation_config(self._folder)
        if config.get("do_sample") is not True:
            return {}
        stated = {key: config[key] for key in _RECOMMENDED if isinstance(config.get(key), (int, float))}
        return SamplingOptions(**{"temperature": 1.0, **stated})  # type: ignore[typeddict-item]

    @property
    def isa(self) -> str:
        """Instruction set of the kernels that run."""
        return self._live.isa

    @property
    def threads(self) -> int:
        """Threads that run."""
        return self._live.threads

    @property
    def kv_cache(self) -> str:
        """How keys and values are kept."""
        return self._live.kv_cache

    @property
    def weight_memory_bytes(self) -> int:
        """Memory of the packed weights. Unquantized matrices stay in the page cache and do not count."""
        return self._live.weight_memory_bytes

    def bytes_per_token(self, context: int) -> int:
        """Bytes that decoding one token must read when `context` positions are cached.

        Planes, scales and zeros of every linear, the head, norms, biases, one row of the embedding, and the
        visible keys and values. Of a layer's experts only as many as a token is given to.
        """
        visible = sum(min(context, window) if window else context for window in self.config.sliding_windows)
        return self._live.weight_bytes_per_token + visible * self._live.kv_layer_bytes

    def new_sequence(self) -> SequenceState:
        """An empty sequence: `len()` is its tokens, `truncate(n)` forgets all but the first n."""
        return self._live.new_sequence(self.context)

    def step(
        self,
        batch: Sequence[tuple[SequenceState, Sequence[int] | NDArray[np.int32]]],
        all_logits: bool = False,
    ) -> list[NDArray[np.float32]]:
        """Append tokens to sequences and return logits.

        Prompts, pieces of prompts and single decoded tokens may be mixed freely. A sequence's logits do not
        depend, bit for bit, on what else is in the batch, on how its tokens were cut into steps, or on the
        number of threads.

        Args:
            batch: sequences of this model, each once, and the tokens to append, at least one.
            all_logits: logits after every token, not only after the last.

        Returns:
            Per sequence float32 [vocab_size], or [tokens, vocab_size] with `all_logits`.

        Raises:
            InvalidArgumentError: a token is outside the vocabulary, a sequence would outgrow the context, is
                named twice, or gets no token. No sequence has changed then.
        """
        items = [(sequence, token_array(ids)) for sequence, ids in batch]
        with engine_errors():
            logits = self._live.step(items, all_logits)
        if not all_logits:
            return list(logits)
        return np.split(logits, np.cumsum([len(ids) for _, ids in items])[:-1])

    def logits(self, token_ids: Sequence[int], chunk: int | None = None) -> NDArray[np.float32]:
        """Logits after each token of a text of its own, float32 [tokens, vocab_size].

        Args:
            token_ids: the text, at least one token.
            chunk: tokens per step; None puts them all in one.
        """
        sequence = self.new_sequence()
        size = chunk or max(len(token_ids), 1)
        parts = [
            self.step([(sequence, token_ids[i : i + size])], all_logits=True)[0]
            for i in range(0, len(token_ids), size)
        ]
        return np.concatenate(parts) if parts else np.zeros((0, self.config.vocab_size), np.float32)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 128,
        stop: Sequence[str] = (),
        **sampling: Unpack[SamplingOptions],
    ) -> str:
        """The text that follows `prompt`; see :meth:`stream`."""
        return "".join(self.stream(prompt, max_new_tokens=max_new_tokens, stop=stop, **sampling))

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 128,
        stop: Sequence[str] = (),
        cache: PromptCache | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Iterator[str]:
        """The text that follows `prompt`, in pieces as it comes.

        Pieces are whole characters. Generation ends at an end-of-sequence token, before a stop string, after
        `max_new_tokens`, or when the context is full.

        Args:
            prompt: a text, or token ids (of a rendered chat template, say).
            max_new_tokens: most tokens to generate.
            stop: strings to stop at; they are not part of the text.
            cache: what an earlier call left, to go on from; by default the prompt is computed anew.
            sampling: see :class:`SamplingOptions`; greedy by default.

        Raises:
            InvalidArgumentError: an option is out of range, or the prompt is empty or exceeds the context.
        """
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        request = GenerationRequest(ids, max_new_tokens, sampling, stop)
        return (piece.text for piece in self.pieces(request, cache) if piece.text)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        max_new_tokens: int = 1024,
        stop: Sequence[str] = (),
        **sampling: Unpack[SamplingOptions],
    ) -> str:
        """The model's answer to a conversation; see :meth:`stream_chat`."""
        return "".join(
            self.stream_chat(messages, tools=tools, max_new_tokens=max_new_tokens, stop=stop, **sampling)
        )

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        max_new_tokens: int = 1024,
        stop: Sequence[str] = (),
        cache: PromptCache | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Iterator[str]:
        """The model's answer to a conversation, in pieces as it comes; see :meth:`stream`.

        Args:
            messages: `{"role": "user", "content": "..."}` and so on, oldest first.
            tools: JSON schemas of functions that the model may ask for, as its chat template takes them. A
                call comes back as text, in the model's own format.
            max_new_tokens: as in :meth:`stream`.
            stop: as in :meth:`stream`.
            cache: as in :meth:`stream`: with it, a turn computes only what is new.
            sampling: see :class:`SamplingOptions`; greedy by default.

        Raises:
            TokenizerError: the model has no chat template.
            InvalidArgumentError: as in :meth:`stream`, or the template refuses these messages.
        """
        prompt = self.tokenizer.encode_chat(messages, tools=tools)
        return self.stream(prompt, max_new_tokens=max_new_tokens, stop=stop, cache=cache, **sampling)

    def generate_ids(
        self,
        token_ids: Sequence[int],
        *,
        max_new_tokens: int = 128,
        eos_token_ids: frozenset[int] = frozenset(),
        cache: PromptCache | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Iterator[int]:
        """The tokens that follow `token_ids`, one by one; see :meth:`stream`.

        An end-of-sequence token ends them and is not among them.
        """
        request = GenerationRequest(token_ids, max_new_tokens, sampling)
        generation = Generation(
            request, context=self.context, vocab_size=self.config.vocab_size, eos_token_ids=eos_token_ids
        )
        return (piece.token.id for piece in self._pieces(generation, cache) if piece.token is not None)

    def pieces(self, request: GenerationRequest, cache: PromptCache | None = None) -> Iterator[Piece]:
        """What follows a prompt, token by token; the last piece says why it ended. See :meth:`stream`.

        Pieces of a model with random weights have no text.

        Raises:
            InvalidArgumentError: the request is not one this model can serve.
        """
        return self._pieces(self.new_generation(request), cache)

    def new_generation(self, request: GenerationRequest) -> Generation:
        """A request made ready: feed it the logits of its tokens, from :meth:`step`, until it is finished.

        Raises:
            InvalidArgumentError: the request is not one this model can serve.
        """
        tokenizer = None if self._folder is None else self.tokenizer
        return Generation(
            request,
            context=self.context,
            vocab_size=self.config.vocab_size,
            tokenizer=tokenizer,
            eos_token_ids=frozenset() if tokenizer is None else tokenizer.eos_token_ids,
        )

    def _pieces(self, generation: Generation, cache: PromptCache | None) -> Iterator[Piece]:
        cache = PromptCache(self) if cache is None else cache
        cache.rewind(generation.tokens.tolist())
        while True:
            tokens = generation.tokens
            while (done := len(cache)) < len(tokens):
                logits = cache.extend(self, tokens[done : done + _PREFILL_TOKENS].tolist())
            piece = generation.advance(logits)
            yield piece
            if piece.finish_reason is not None:
                return

    def close(self) -> None:
        """Free the weights. The model cannot be used afterwards."""
        self._engine = None

    @property
    def _live(self) -> _core.Engine:
        if self._engine is None:
            raise InvalidArgumentError("the model is closed; load it again")
        return self._engine

    def __enter__(self) -> "LanguageModel":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load(
    path: str | os.PathLike[str],
    *,
    threads: int | None = None,
    isa: str | None = None,
    exact: bool = False,
    context: int | None = None,
    kv_cache: KvCacheType = "fp16",
) -> LanguageModel:
    """Load a model folder, quantized or not.

    Quantized matrices are repacked for this CPU one by one and their file pages given back, so that resident
    memory stays near the packed size. Unquantized ones are used where they lie in the mapped files.

    Args:
        path: an HLQ or Hugging Face folder, or a hub id.
        threads: threads to run on; by default `ELUTQ_THREADS`, else the physical cores this process may use.
        isa: instruction set to run; by default `ELUTQ_ISA`, else the best one.
        exact: multiply from fp32 activations, without int8 tables: slower, for checking.
        context: most tokens of a sequence; by default the model's limit.
        kv_cache: "int8" halves what keys and values take, at a small loss of accuracy.

    Raises:
        ElutqError: one subclass per fault; see `elutq.errors`.
    """
    started = time.perf_counter()
    with Checkpoint.open(path) as checkpoint:
        engine = _new_engine(checkpoint.engine, isa, threads, exact, kv_cache)
        modules = list(checkpoint.linears)
        for module, following in itertools.zip_longest(modules, modules[1:]):
            for name in _hlq_tensors(checkpoint, following):
                checkpoint.prefetch(name)
            if module in checkpoint.schemes:
                _set_hlq(engine, module, checkpoint.read_hlq(module))
            else:
                _set_dense(engine, module, checkpoint.read(f"{module}.weight"))
            for name in _hlq_tensors(checkpoint, module):
                checkpoint.release(name)
        for name, _ in vectors(checkpoint.engine):
            engine.set_vector(name, np.ascontiguousarray(checkpoint.read_float32(name)))
        model = LanguageModel(engine, checkpoint.engine, checkpoint.path, context)
    model.load_seconds = time.perf_counter() - started
    return model


def random_model(
    shape: str | EngineConfig,
    bits: int = 2,
    group_size: int = 128,
    param_bits: int = 16,
    *,
    threads: int | None = None,
    isa: str | None = None,
    exact: bool = False,
    kv_cache: KvCacheType = "fp16",
    seed: int = 0,
) -> LanguageModel:
    """A model of a known shape with random HLQ weights, for measuring speed. Embedding and head have 4 bits.

    Args:
        shape: a name in `elutq.shapes.SHAPES`, or a config.
        bits: bits per weight of the decoder blocks.
        group_size: columns that share scales, -1 for a whole row.
        param_bits: bits of a scale or zero of every matrix, 16 or 8.
        threads: as in :func:`load`.
        isa: as in :func:`load`.
        exact: as in :func:`load`.
        kv_cache: as in :func:`load`.
        seed: of the random bits.

    Raises:
        InvalidArgumentError: an argument is out of range.
    """
    started = time.perf_counter()
    scheme = QuantScheme(bits, group_size, param_bits)
    config = shape_config(shape) if isinstance(shape, str) else shape
    engine = _new_engine(config, isa, threads, exact, kv_cache)
    for name, matrix in random_linears(config, scheme, seed):
        _set_hlq(engine, name, matrix)
    for name, weight in random_routers(config, seed):
        _set_dense(engine, name, weight)
    for name, size in vectors(config):
        fill = 0.0 if name.endswith(".bias") else 1.0
        engine.set_vector(name, np.full(size, fill, np.float32))
    model = LanguageModel(engine, config, None, None)
    model.load_seconds = time.perf_counter() - started
    return model


def read_bandwidth(threads: int) -> float:
    """GB/s at which this many threads read memory: what bounds decoding."""
    return _core.read_bandwidth(threads, bytes=1 << 28)


def cpu_name() -> str:
    """The processor's marketing name, or "unknown"."""
    return _core.cpu_model_name()


def default_threads() -> int:
    """Physical cores that this process may run on: a second thread of one core gains nothing here."""
    cpus = os.sched_getaffinity(0)
    cores = set()
    for cpu in cpus:
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            package = (topology / "physical_package_id").read_text()
            cores.add((package, (topology / "core_id").read_text()))
        except OSError:
            return len(cpus)
    return len(cores)


def machine_options(isa: str | None, threads: int | None) -> tuple[str, int]:
    """Instruction set ("" for the best) and threads to run on; None takes `ELUTQ_ISA` and `ELUTQ_THREADS`.

    Raises:
        InvalidArgumentError: the number of threads is out of range.
    """
    if isa is None:
        isa = os.environ.get("ELUTQ_ISA", "")
    if threads is None:
        variable = os.environ.get("ELUTQ_THREADS", "")
        if variable and not variable.isdecimal():
            raise InvalidArgumentError(f"ELUTQ_THREADS must be a positive integer, not {variable!r:.80}")
        threads = int(variable) if variable else default_threads()
    if not 1 <= threads <= 1024:
        raise InvalidArgumentError(f"threads must be from 1 to 1024, not {threads}")
    return isa, threads


def _new_engine(
    config: EngineConfig, isa: str | None, threads: int | None, exact: bool, kv_cache: str
) -> _core.Engine:
    isa, threads = machine_options(isa, threads)
    with engine_errors():
        return _core.Engine(config, isa, threads, exact, kv_cache)


def _set_hlq(engine: _core.Engine, module: str, matrix: HlqMatrix) -> None:
    with engine_errors():
        engine.set_hlq(module, matrix)


def _set_dense(engine: _core.Engine, module: str, weight: NDArray[Any]) -> None:
    with engine_errors():
        if weight.dtype == np.float32:
            engine.set_float32(module, weight)
        elif weight.dtype == np.float16:
            engine.set_float16(module, weight.view(np.uint16))
        else:
            engine.set_bfloat16(module, weight.view(np.uint16))


def _hlq_tensors(checkpoint: Checkpoint, module: str | None) -> list[str]:
    if module not in checkpoint.schemes:
        return []
    return list(hlq_tensors(checkpoint.linears[module], checkpoint.schemes[module]))

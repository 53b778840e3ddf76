"""lm-evaluation-harness on the engine: the model class `elutq`.

The harness finds models of other packages only once they are imported. Either run it through this module,

    python -m elutq.eval.harness run --model elutq --model_args pretrained=OUT --tasks arc_easy

or `import elutq.eval.harness` before `lm_eval.simple_evaluate(model="elutq", model_args="pretrained=OUT")`.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elutq.errors import InvalidArgumentError, MissingDependencyError, TokenizerError
from elutq.runtime import PromptCache, load
from elutq.sampling import SamplingOptions

try:
    import lm_eval.models  # noqa: F401  registers the harness's own models, which it does only while it has none
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise MissingDependencyError(
        f"elutq.eval.harness needs lm-evaluation-harness ({error}); "
        "install it with: pip install 'elutq[lm-eval]'"
    ) from None

_CHUNK = 128  # tokens whose logits are held at once
#: Generation options that say nothing new here.
_IGNORED = {"do_sample", "num_beams", "use_cache"}

_log = logging.getLogger(__name__)


@register_model("elutq")
class ElutqLM(TemplateLM):
    """A model folder or hub id, quantized or not. What consecutive requests share is computed once.

    Attributes:
        max_length: most tokens of a text.
        tokenizer: the model's.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        threads: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        exact: bool = False,
        batch_size: object = None,
        max_batch_size: object = None,
        device: object = None,
    ) -> None:
        """Load a model.

        Args:
            pretrained: the folder or hub id.
            threads: threads to run on; by default one per physical core.
            max_length: most tokens of a text; by default the model's limit.
            max_gen_toks: most tokens to generate where a task does not say.
            exact: compute without int8 rounding of the lookup tables; slower.
            batch_size: ignored; results do not depend on it.
            max_batch_size: ignored likewise.
            device: ignored likewise: the harness's own default is a GPU, this engine runs on the CPU.

        Raises:
            ElutqError: the model cannot be loaded.
        """
        super().__init__()
        self._model = load(pretrained, threads=threads, context=max_length, exact=exact)
        self._cache = PromptCache(self._model)
        self._name = pretrained
        self.max_length = self._model.context
        self.max_gen_toks = max_gen_toks
        self.tokenizer = self._model.tokenizer

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        ids = self.tokenizer.eos_token_ids
        if not ids:
            raise TokenizerError(f"{self._name} names no end-of-sequence token; add it to its config.json")
        return min(ids)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without a context: BOS, else the one that ends texts."""
        bos = self.tokenizer.special_tokens.get("bos_token")
        if bos is None:
            return self.eot_token_id
        return self.tokenizer.encode(bos, add_special_tokens=False)[0]

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's caches."""
        return self._name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: object) -> list[int]:
        """Ids of a text; by default with a BOS token if the model uses one and the text has none."""
        if add_special_tokens is None:
            bos = self.tokenizer.special_tokens.get("bos_token")
            add_special_tokens = bos is None or not string.startswith(bos)
        return self.tokenizer.encode(string, add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt of a conversation; without `add_generation_prompt` it ends within the last message."""
        text = self.tokenizer.apply_chat_template(chat_history, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Source of the model's template, for the harness's records; None if it is not wanted."""
        return self.tokenizer.chat_template() if chat_template else None

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **options: object
    ) -> list[tuple[float, bool]]:
        results: dict[int, tuple[float, bool]] = {}
        # In alphabetical order, texts that begin alike follow each other.
        for i in sorted(range(len(requests)), key=lambda i: (requests[i][1], requests[i][2])):
            key, context, continuation = requests[i]
            results[i] = self._score(context, continuation)
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, results[i])
        return [results[i] for i in range(len(requests))]

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Log-probability of `continuation`, and whether greedy decoding gives it."""
        if not 0 < len(continuation) <= self.max_length:
            raise InvalidArgumentError(
                f"a continuation has {len(continuation)} tokens; it must have from 1 to {self.max_length}"
            )
        tokens = (context + continuation)[-self.max_length - 1 :]
        inputs, first = tokens[:-1], len(tokens) - 1 - len(continuation)
        self._cache.rewind(inputs[: first + 1])
        while (done := len(self._cache)) < first:
            self._cache.extend(self._model, inputs[done : min(done + _CHUNK, first)])
        total, greedy = 0.0, True
        while (done := len(self._cache)) < len(inputs):
            logits = self._cache.extend(self._model, inputs[done : done + _CHUNK], all_logits=True)
            targets = np.array(tokens[done + 1 : done + 1 + len(logits)])
            total += float(_log_probabilities(logits, targets).sum())
            greedy = greedy and bool((logits.argmax(-1) == targets).all())
        return total, greedy

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in windows that do not overlap."""
        results = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            )
            scored = [self._score(*make_disjoint_window(window)) for window in windows]
            results.append(sum(score for score, _ in scored))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), results[-1])
        return results

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts that follow, up to a stop string. A prompt that is too long loses its beginning."""
        results = []
        for context, options in (request.args for request in requests):
            options = normalize_gen_kwargs(options, self.max_gen_toks)
            stop, limit = options.pop("until", None) or [], options.pop("max_gen_toks")
            stop = [stop] if isinstance(stop, str) else stop
            if not 0 < limit < self.max_length:
                raise InvalidArgumentError(
                    f"max_gen_toks {limit} leaves no room for a prompt in {self.max_length} tokens; "
                    "say less with --gen_kwargs max_gen_toks=N"
                )
            sampling = {name: options[name] for name in SamplingOptions.__annotations__ if name in options}
            if unknown := options.keys() - sampling.keys() - _IGNORED:
                _log.warning("generation options without effect on elutq: %s", ", ".join(sorted(unknown)))
            prompt = self.tok_encode(context)[limit - self.max_length :]
            text = self._model.stream(
                prompt,
                max_new_tokens=limit,
                stop=[s for s in stop if s],
                cache=self._cache,
                **sampling,
            )
            results.append("".join(text))
            self.cache_hook.add_partial("generate_until", (context, options), results[-1])
        return results


def _log_probabilities(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> NDArray[np.float64]:
    """Of token targets[i] by logits[i]: float32 [tokens, vocab_size], [tokens] -> [tokens]."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: NDArray[np.float64] = shifted[np.arange(len(targets)), targets] - np.log(np.exp(shifted).sum(-1))
    return result


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()

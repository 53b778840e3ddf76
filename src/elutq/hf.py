"""HLQ folders in transformers: `import elutq.hf`, then `AutoModelForCausalLM.from_pretrained(OUT)`.

A plug-in of transformers' quantizer interface. On the CPU, products run through this package's kernels, the
same bits as in its own engine; on other devices, and where gradients are wanted, weights are dequantized for
each product. Tensors keep the names and types of the file (`docs/format.md`), so that `save_pretrained`
writes an HLQ folder again. Beside them the kernels hold their packed matrices: about twice the file's size.
"""

from typing import Any
from weakref import WeakValueDictionary

from elutq import _core
from elutq.architectures import EMBEDDING, HEAD, EngineConfig, block_linears, engine_config
from elutq.errors import InvalidArgumentError, MissingDependencyError
from elutq.packing import HlqMatrix
from elutq.runtime import machine_options
from elutq.scheme import QUANT_METHOD, ModelScheme, QuantScheme

try:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise MissingDependencyError(
        f"elutq.hf needs torch and transformers ({error}); install them with: pip install 'elutq[hf]'"
    ) from None

__all__ = ["HlqConfig", "HlqEmbedding", "HlqExperts", "HlqLinear", "HlqQuantizer"]


class HlqMatrixModule(nn.Module):
    """A quantized matrix (out_features, in_features): what linears and the embedding have in common.

    Attributes:
        planes: uint8 [bits, out_features, ceil(in_features / 8)].
        scales: float16 [out_features, groups, bits], whatever dtype the model is cast to; uint8 with
            row_scales.
        zeros: float16 [out_features, groups], likewise; int8 with row_scales.
        row_scales: float16 [out_features], likewise; None when scales and zeros are float16.
    """

    planes: Tensor
    scales: Tensor
    zeros: Tensor
    row_scales: Tensor | None

    def __init__(self, out_features: int, in_features: int, scheme: QuantScheme) -> None:
        super().__init__()
        self.out_features = out_features
        self.in_features = in_features
        self.scheme = scheme
        bits, groups = scheme.bits, scheme.groups(in_features)
        in_bytes = scheme.param_bits == 8
        scale_type = torch.uint8 if in_bytes else torch.float16
        zero_type = torch.int8 if in_bytes else torch.float16
        row_scales = torch.zeros(out_features, dtype=torch.float16) if in_bytes else None
        self.register_buffer(
            "planes", torch.zeros(bits, out_features, -(-in_features // 8), dtype=torch.uint8)
        )
        self.register_buffer("scales", torch.zeros(out_features, groups, bits, dtype=scale_type))
        self.register_buffer("zeros", torch.zeros(out_features, groups, dtype=zero_type))
        self.register_buffer("row_scales", row_scales)
        self._packed: _core.PackedLinear | None = None

    def dequantize(self, rows: Tensor | None = None) -> Tensor:
        """The weights by rules F28 and F34 of the format, float32 [rows, in_features].

        Args:
            rows: indices of the rows wanted, all by default.
        """
        planes, scales, zeros, row_scales = self.planes, self.scales, self.zeros, self.row_scales
        if rows is not None:
            planes, scales, zeros = planes[:, rows], scales[rows], zeros[rows]
            row_scales = None if row_scales is None else row_scales[rows]
        size = self.scheme.columns_per_group(self.in_features)
        groups = torch.arange(self.in_features, device=planes.device) // size
        shifts = torch.arange(8, dtype=torch.uint8, device=planes.device)
        weight = zeros.float()[:, groups]
        for plane, scale in zip(planes, scales.float().unbind(-1), strict=True):
            bits = (plane[..., None] >> shifts & 1).flatten(-2)[..., : self.in_features]
            weight = weight + scale[:, groups] * bits
        return weight if row_scales is None else weight * row_scales.float()[:, None]

    def multiply(self, x: Tensor) -> Tensor:
        """Product of x [..., in_features] and the transposed matrix, [..., out_features] in x's dtype."""
        if x.device.type != "cpu" or (torch.is_grad_enabled() and x.requires_grad):
            return nn.functional.linear(x, self.dequantize().to(x.dtype))
        if self._packed is None:
            matrix = HlqMatrix(
                planes=self.planes.numpy(),
                scales=self.scales.numpy(),
                zeros=self.zeros.numpy(),
                in_features=self.in_features,
                group_size=self.scheme.group_size,
                row_scales=None if self.row_scales is None else self.row_scales.numpy(),
            )
            self._packed = _core.PackedLinear(_runner(), matrix)
        rows = x.detach().reshape(-1, self.in_features).to(torch.float32).contiguous()
        y = torch.from_numpy(self._packed.multiply(rows.numpy()))
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Shape and scheme, for `print(model)`."""
        scheme = ", ".join(f"{key}={value}" for key, value in self.scheme.to_config().items())
        return f"{self.in_features}, {self.out_features}, {scheme}"

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # A cast of the model must not reach the parameters of the format; a move must. Integers are not cast.
        parameters = (self.scales, self.zeros, self.row_scales)
        kept = {id(tensor) for tensor in parameters if tensor is not None and tensor.dtype == torch.float16}

        def move(tensor: Tensor) -> Tensor:
            if id(tensor) not in kept:
                return fn(tensor)  # type: ignore[no-any-return]
            return fn(tensor.view(torch.int16)).view(torch.float16)  # type: ignore[no-any-return]

        self._packed = None
        return super()._apply(move, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._packed = None
        super()._load_from_state_dict(*arguments)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}


class HlqLinear(HlqMatrixModule):
    """A linear layer with a quantized matrix; takes the place of `nn.Linear`."""

    def __init__(self, out_features: int, in_features: int, scheme: QuantScheme, bias: bool) -> None:
        super().__init__(out_features, in_features, scheme)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Activations [..., in_features] -> [..., out_features]."""
        y = self.multiply(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class HlqEmbedding(HlqMatrixModule):
    """An embedding with a quantized matrix; takes the place of `nn.Embedding`."""

    def __init__(self, out_features: int, in_features: int, scheme: QuantScheme, dtype: torch.dtype) -> None:
        super().__init__(out_features, in_features, scheme)
        # Only its dtype matters: a cast of the model changes what the embedding returns.
        self._like: Tensor
        self.register_buffer("_like", torch.zeros(0, dtype=dtype), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [...] -> [..., hidden_size]."""
        rows = self.dequantize(ids.reshape(-1))
        return rows.to(self._like.dtype).reshape(*ids.shape, self.in_features)


class HlqExperts(nn.Module):
    """The experts of a layer, each an MLP of quantized linears; takes the place of transformers' fused ones.

    Args:
        config: of the model.
        block: name of the experts' module on disk: `model.layers.N.mlp.experts`, for example.
        scheme: of the model.

    Raises:
        InvalidArgumentError: not all experts are quantized.
    """

    def __init__(self, config: EngineConfig, block: str, scheme: ModelScheme) -> None:
        super().__init__()
        self._names = config.expert_linears
        hidden, intermediate = config.hidden_size, config.moe_intermediate_size
        shapes = ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate))
        for number in range(config.num_experts):
            expert = nn.Module()
            for name, shape in zip(self._names, shapes, strict=True):
                found = scheme.for_block_linear(f"{block}.{number}.{name}")
                if found is None:
                    raise InvalidArgumentError(
                        f"{block}.{number}.{name} is not quantized, and transformers cannot load experts of "
                        "which some are; run the folder with elutq.load, or quantize all experts"
                    )
                expert.add_module(name, HlqLinear(*shape, found, bias=False))
            self.add_module(str(number), expert)

    def forward(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Activations [tokens, hidden_size] -> the same, added up over each token's experts.

        Args:
            x: the activations.
            top_k_index: each token's experts, [tokens, num_experts_per_tok].
            top_k_weights: what their results are multiplied by, likewise.
        """
        out = torch.zeros_like(x)
        for number in sorted(set(top_k_index.flatten().tolist())):
            gate, up, down = (self.get_submodule(f"{number}.{name}") for name in self._names)
            tokens, ranks = torch.where(top_k_index == number)
            rows = x[tokens]
            y = down(nn.functional.silu(gate(rows)) * up(rows)) * top_k_weights[tokens, ranks, None]
            out = out.index_add(0, tokens, y.to(out.dtype))
        return out


class HlqTiedHead(nn.Module):
    """A head that multiplies by the embedding's matrix and has none of its own."""

    def __init__(self, embedding: HlqEmbedding) -> None:
        super().__init__()
        self._embedding = (embedding,)  # in a tuple, so that its tensors are not listed twice

    def forward(self, x: Tensor) -> Tensor:
        """Activations [..., hidden_size] -> logits [..., vocab_size]."""
        return self._embedding[0].multiply(x)


@register_quantization_config(QUANT_METHOD)
class HlqConfig(QuantizationConfigMixin):
    """The `quantization_config` of an HLQ folder."""

    def __init__(self, **config: Any) -> None:
        """Take the entry of `config.json` as it is.

        Raises:
            ConfigError: it is malformed.
            UnsupportedVersionError: it is of a format version that this release does not read.
        """
        config = {"quant_method": QUANT_METHOD, **config}
        ModelScheme.from_config(config)
        self.__dict__.update(config)

    @property
    def scheme(self) -> ModelScheme:
        """The same, parsed."""
        return ModelScheme.from_config(self.to_dict())


@register_quantizer(QUANT_METHOD)
class HlqQuantizer(HfQuantizer):
    """Puts HLQ modules into a model before its weights are loaded."""

    quantization_config: HlqConfig

    def validate_environment(self, *arguments: Any, **options: Any) -> None:
        """Refuse to quantize: this class only loads.

        Raises:
            InvalidArgumentError: the folder is not quantized.
        """
        if not self.pre_quantized:
            raise InvalidArgumentError(
                "transformers can load HLQ folders, not make them; quantize with: elutq quantize MODEL -o OUT"
            )

    def is_serializable(self) -> bool:
        """`save_pretrained` writes an HLQ folder."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The matrices are not; adapters beside them are."""
        return False

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **options: Any) -> None:
        scheme = self.quantization_config.scheme
        config = engine_config(model.config.to_dict())
        for layer, sparse in enumerate(config.sparse_layers):
            if sparse:
                experts = HlqExperts(config, f"model.layers.{layer}.{config.moe_block}.experts", scheme)
                model.set_submodule(f"model.layers.{layer}.mlp.experts", experts)
        for name, out_features, in_features in block_linears(config):
            found = scheme.for_block_linear(name)
            if found is not None and ".experts." not in name:
                bias = model.get_submodule(name).bias is not None
                model.set_submodule(name, HlqLinear(out_features, in_features, found, bias))
        if EMBEDDING in scheme.overrides:
            shape = (config.vocab_size, config.hidden_size)
            embedding = HlqEmbedding(*shape, scheme.overrides[EMBEDDING], model.dtype)
            model.set_submodule(EMBEDDING, embedding)
            if config.tie_word_embeddings:
                model.set_submodule(HEAD, HlqTiedHead(embedding))
                model._tied_weights_keys = {}
                model.all_tied_weights_keys = {}
        if HEAD in scheme.overrides:
            shape = (config.vocab_size, config.hidden_size)
            model.set_submodule(HEAD, HlqLinear(*shape, scheme.overrides[HEAD], bias=False))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **options: Any) -> None:
        model.requires_grad_(False)  # else every product would be one that gradients may be wanted of


#: Shared by all models, and gone with the last of them.
_RUNNERS: WeakValueDictionary[tuple[str, int], _core.LinearRunner] = WeakValueDictionary()


def _runner() -> _core.LinearRunner:
    """The kernels and threads that `ELUTQ_ISA` and `ELUTQ_THREADS` ask for."""
    options = machine_options(None, None)
    runner = _RUNNERS.get(options)
    if runner is None:
        runner = _RUNNERS[options] = _core.LinearRunner(*options)
    return runner

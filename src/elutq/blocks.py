"""The decoder blocks of a model in torch, one at a time, open at the inputs of their linear modules.

Attention, norms and routers are transformers' own modules. Only the order in which they run is spelled out
here, since calibration stops between them; it is that of every family in `elutq.architectures`:

    x = input_layernorm(h)                 read by q_proj, k_proj, v_proj
    a = attention(x)                       read by o_proj           h <- h + o_proj(a)
    x = post_attention_layernorm(h)        read by gate_proj, up_proj
    d = silu(gate_proj(x)) * up_proj(x)    read by down_proj        h <- h + down_proj(d)

In a mixture of experts the last two lines hold inside each expert that the router chooses for a token, and
the results are added with the router's weights.
"""

from copy import deepcopy
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from elutq.architectures import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    EngineConfig,
    LinearSpec,
    block_linears,
    routers,
)
from elutq.errors import TensorShapeError


class WeightSource(Protocol):
    """Where weights come from: an `elutq.checkpoint.Checkpoint`, or a view of one."""

    config: dict[str, Any]
    engine: EngineConfig

    def read_float32(self, name: str, rows: slice = ...) -> NDArray[np.float32]:
        """Rows of a tensor, in float32."""

    def release(self, name: str) -> None:
        """The tensor is not needed for now."""


class Mlp(nn.Module):
    """A SwiGLU: the one of a dense block, or an expert.

    Attributes:
        names: of its gate, up and down projections in the model.
    """

    def __init__(self, gate: LinearSpec, up: LinearSpec, down: LinearSpec, bias: bool) -> None:
        super().__init__()
        self.names = (gate.name, up.name, down.name)
        self.gate, self.up, self.down = (
            nn.Linear(spec.in_features, spec.out_features, bias) for spec in (gate, up, down)
        )

    def hidden(self, x: Tensor) -> Tensor:
        """What the down projection reads: [..., hidden_size] -> [..., intermediate_size]."""
        hidden: Tensor = nn.functional.silu(self.gate(x)) * self.up(x)
        return hidden

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> [..., hidden_size]."""
        added: Tensor = self.down(self.hidden(x))
        return added


class DecoderBlock:
    """One block.

    Attributes:
        modules: every module with parameters, by its name in the model.
        linears: those of them that may be quantized.
        qkv: names of the linear modules that read `attention_input`.
        o_proj: name of the one that reads `attend`.
        mlps: the one MLP, or the experts.
        sparse: whether they are experts.
    """

    def __init__(self, layer: Any, index: int, engine: EngineConfig) -> None:
        prefix = f"model.layers.{index}."
        specs = [spec for spec in block_linears(engine) if spec.name.startswith(prefix)]
        attention, rest = specs[:4], specs[4:]
        self.sparse = engine.sparse_layers[index]
        triples = zip(rest[::3], rest[1::3], rest[2::3], strict=True)
        self.mlps = [Mlp(gate, up, down, engine.mlp_bias) for gate, up, down in triples]
        self.qkv = tuple(spec.name for spec in attention[:3])
        self.o_proj = attention[3].name
        self._attention = layer.self_attn
        self._input_norm, self._mlp_norm = layer.input_layernorm, layer.post_attention_layernorm
        self._router = layer.mlp.gate if self.sparse else None

        self.linears: dict[str, Any] = {
            spec.name: getattr(self._attention, spec.name.rpartition(".")[2]) for spec in attention
        }
        for mlp in self.mlps:
            self.linears |= zip(mlp.names, (mlp.gate, mlp.up, mlp.down), strict=True)
        self._attention.o_proj = nn.Identity()
        self.modules: dict[str, nn.Module] = {
            **self.linears,
            f"{prefix}input_layernorm": self._input_norm,
            f"{prefix}post_attention_layernorm": self._mlp_norm,
        }
        if engine.qk_norm:
            for name in ("q_norm", "k_norm"):
                self.modules[f"{prefix}self_attn.{name}"] = getattr(self._attention, name)
        if self._router is not None:
            self.modules |= {
                spec.name: self._router for spec in routers(engine) if spec.name.startswith(prefix)
            }

    def __call__(self, hidden: Tensor, positions: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """The residual stream after the block, [windows, length, hidden_size], from that before it."""
        attended = self.attend(self.attention_input(hidden), positions, mask)
        hidden = self.add_attention(hidden, attended)
        return hidden + self.mlp(self.mlp_input(hidden))

    def replace(self, name: str, linear: nn.Module) -> None:
        """Put another module in the place of a linear one."""
        attribute = name.rpartition(".")[2]
        if name == self.o_proj:
            pass  # it is called by its entry in `linears`
        elif name in self.qkv:
            setattr(self._attention, attribute, linear)
        else:
            (mlp,) = (mlp for mlp in self.mlps if name in mlp.names)
            setattr(mlp, ("gate", "up", "down")[mlp.names.index(name)], linear)
        self.linears[name] = self.modules[name] = linear

    def attention_input(self, hidden: Tensor) -> Tensor:
        """What q_proj, k_proj and v_proj read, [windows, length, hidden_size]."""
        normalized: Tensor = self._input_norm(hidden)
        return normalized

    def attend(self, x: Tensor, positions: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """What o_proj reads, [windows, length, num_attention_heads * head_dim], for such an input."""
        attended: Tensor = self._attention(
            hidden_states=x, position_embeddings=positions, attention_mask=mask
        )[0]
        return attended

    def add_attention(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """The residual stream after attention."""
        added: Tensor = self.linears[self.o_proj](attended)
        return hidden + added

    def mlp_input(self, hidden: Tensor) -> Tensor:
        """What gate and up projections, and the router, read."""
        normalized: Tensor = self._mlp_norm(hidden)
        return normalized

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The experts of each token and their weights, [tokens, num_experts_per_tok] each.

        Args:
            x: what `mlp_input` gives, [tokens, hidden_size].
        """
        assert self._router is not None
        _, weights, experts = self._router(x)
        return experts, weights

    def mlp(self, x: Tensor) -> Tensor:
        """What the MLP, or the experts together, add to the residual stream."""
        if not self.sparse:
            added: Tensor = self.mlps[0](x)
            return added
        tokens = x.reshape(-1, x.shape[-1])
        experts, weights = self.route(tokens)
        added = torch.zeros_like(tokens)
        for index, mlp in enumerate(self.mlps):
            token, rank = torch.where(experts == index)
            if len(token):
                added.index_add_(0, token, mlp(tokens[token]) * weights[token, rank, None])
        return added.reshape(x.shape)


class BlockReader:
    """Makes the blocks of a model, each with its weights, and what stands before and after them.

    Args:
        source: the model.
        device: where modules are put.
        dtype: of weights and activations.
    """

    def __init__(
        self, source: WeightSource, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self._source, self._device, self._dtype = source, device, dtype
        values = {key: value for key, value in source.config.items() if key != "model_type"}
        config = AutoConfig.for_model(source.engine.model_type, **values)
        with torch.device("meta"):
            build: Any = AutoModelForCausalLM.from_config
            model = build(config, dtype=dtype, attn_implementation="sdpa")
        self._model = model.model.eval()
        self._rotary = type(self._model.rotary_emb)(config).to(device)
        self._norm: nn.Module | None = None

    @property
    def engine(self) -> EngineConfig:
        """Dimensions of the model."""
        return self._source.engine

    def block(self, index: int) -> DecoderBlock:
        """Block `index` with its weights."""
        with torch.device("meta"):
            block = DecoderBlock(deepcopy(self._model.layers[index]), index, self._source.engine)
        for name, module in block.modules.items():
            self._load(module, name)
        return block

    def embed(self, token_ids: Tensor) -> Tensor:
        """The residual stream before the first block, [windows, length, hidden_size].

        Args:
            token_ids: int64 [windows, length].
        """
        distinct, places = np.unique(token_ids.numpy(), return_inverse=True)
        read = self._source.read_float32
        rows = [read(f"{EMBEDDING}.weight", slice(token, token + 1)) for token in distinct.tolist()]
        return self._tensor(np.concatenate(rows)[places.reshape(token_ids.shape)])

    def positions(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the rotary embedding, for `DecoderBlock.attend`."""
        like = torch.empty(0, dtype=self._dtype, device=self._device)
        cosines, sines = self._rotary(like, torch.arange(length, device=self._device)[None])
        return cosines, sines

    def mask(self, index: int, length: int) -> Tensor | None:
        """What a token of block `index` sees, for `DecoderBlock.attend`; None: all before it."""
        window = self._source.engine.sliding_windows[index]
        if not 0 < window < length:
            return None
        age = torch.arange(length, device=self._device)[:, None] - torch.arange(length, device=self._device)
        return ((age >= 0) & (age < window))[None, None]

    def final_norm(self) -> nn.Module:
        """What normalizes the residual stream for the head, with its weights."""
        norm: nn.Module = deepcopy(self._model.norm)
        self._load(norm, FINAL_NORM.removesuffix(".weight"))
        return norm

    def head_input(self, hidden: Tensor) -> Tensor:
        """What the head reads, [tokens, hidden_size]: the last residual stream, normalized."""
        if self._norm is None:
            self._norm = self.final_norm()
        normalized: Tensor = self._norm(hidden.reshape(-1, hidden.shape[-1]))
        return normalized

    def head(self) -> Tensor:
        """Weight of the head, [vocab_size, hidden_size]."""
        name = EMBEDDING if self._source.engine.tie_word_embeddings else HEAD
        return self._tensor(self._source.read_float32(f"{name}.weight"))

    def _load(self, module: nn.Module, name: str) -> None:
        for parameter, values in module.named_parameters():
            tensor = f"{name}.{parameter}"
            loaded = nn.Parameter(self._tensor(self._source.read_float32(tensor)), requires_grad=False)
            self._source.release(tensor)
            if loaded.shape != values.shape:
                raise TensorShapeError(f"{tensor} has shape {tuple(loaded.shape)}, not {tuple(values.shape)}")
            setattr(module, parameter, loaded)

    def _tensor(self, values: NDArray[np.float32]) -> Tensor:
        return torch.tensor(values, dtype=self._dtype, device=self._device)

"""`elutq inspect`."""

from typing import Any

from elutq.cli.options import JsonOption, ModelArgument


def inspect(model: ModelArgument, as_json: JsonOption = False) -> None:
    """Show what is in a model folder, quantized or not."""
    from elutq.cli.console import print_json, show
    from elutq.cli.tables import kinds_table
    from elutq.report import describe

    description = describe(model)
    if as_json:
        print_json(description)
    else:
        show(_headline(description), kinds_table(description))


def _headline(description: dict[str, Any]) -> str:
    scheme = description["scheme"]
    if scheme is None:
        quantization = f"not quantized ({description['format']})"
    else:
        group = "a whole row" if scheme["group_size"] == -1 else scheme["group_size"]
        quantization = f"{scheme['bits']}-bit HLQ in groups of {group}, format version {scheme['version']}"
    bits_per_weight = description["linear_bits_per_weight"]
    return "\n".join(
        (
            description["path"],
            f"{description['model_type']}: hidden {description['hidden_size']}, "
            f"{description['num_hidden_layers']} layers, {description['num_attention_heads']} heads over "
            f"{description['num_key_value_heads']} key-value heads of {description['head_dim']}, "
            f"{_mlp(description)}, vocabulary {description['vocab_size']}, "
            f"context {description['max_position_embeddings']}",
            f"{quantization}; {bits_per_weight:.3f} bits per weight in the decoder blocks",
        )
    )


def _mlp(description: dict[str, Any]) -> str:
    if not description["num_experts"]:
        return f"intermediate {description['intermediate_size']}"
    return (
        f"{description['num_experts_per_tok']} of {description['num_experts']} experts of "
        f"{description['moe_intermediate_size']}"
    )

"""The model card, `README.md`, of a quantized folder: what the hub shows and reads of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elutq.checkpoint import HUB_ID
from elutq.report import ModelSummary

CARD_FILE = "README.md"

#: Metadata of the source's card that hold for the quantized model too.
_INHERITED = ("language", "license", "license_name", "license_link")


def model_card(
    source: str, folder: Path, settings: Mapping[str, Any], summary: ModelSummary, *, chat: bool
) -> str:
    """A card ready for the hub; the same for every run.

    Args:
        source: the original model as it was given; a hub id becomes `base_model`.
        folder: where its files are. Language, license and, for a local folder, base model are taken from its
            own card.
        settings: `quantization_config`, the method, and the `target` size and `finetune` options, if there
            were any.
        summary: sizes and errors.
        chat: whether it is a model to talk with.
    """
    from huggingface_hub import ModelCardData

    is_hub_id = HUB_ID.fullmatch(source) is not None and not Path(source).exists()
    name = source if is_hub_id else folder.resolve().name
    original = _metadata(folder)
    metadata = {key: original[key] for key in _INHERITED if key in original}
    if is_hub_id:
        metadata |= {"base_model": name, "base_model_relation": "quantized"}
    elif "base_model" in original:
        metadata |= {"base_model": original["base_model"]}
    bits = f"{summary.linear_bits_per_weight:.3g}" if settings.get("target") else settings["bits"]
    tags = ["elutq", "hlq", f"{bits}-bit", *(["conversational"] if chat else [])]
    front_matter = ModelCardData(
        library_name="elutq",
        pipeline_tag="text-generation",
        tags=tags,
        ignore_metadata_errors=True,
        **metadata,
    )
    group = "in " + (
        "whole rows" if settings["group_size"] == -1 else f"groups of {settings['group_size']} columns"
    )
    if settings.get("target"):
        group = "per weight, each matrix by how much it matters"
    narrow = " with 8-bit scales" if settings.get("param_bits") == 8 else ""
    tuned = ", then finetuned" if settings.get("finetune") else ""
    known = "" if "license" in metadata else " The original model's license applies."
    commands = [
        *(["elutq chat MODEL", "elutq serve MODEL        # pip install 'elutq[serve]'"] if chat else []),
        "elutq generate MODEL -p 'Once upon a time'",
    ]
    text = [
        f"# {name}, {bits}-bit HLQ",
        "",
        f"{name} quantized to {bits} bits {group}{narrow}, method `{settings['method']}`{tuned}: "
        f"{summary.linear_bits_per_weight:.3f} bits per weight in the decoder blocks, "
        f"{summary.bits_per_weight:.3f} over the whole model of {summary.params:,} weights.{known}",
        "",
        "## Run it",
        "",
        "On an ordinary CPU, after `pip install elutq`; MODEL is this folder or its id on the hub.",
        "",
        *(f"    {command}" for command in commands),
        "",
        "In Python:",
        "",
        "    import elutq",
        '    model = elutq.load("MODEL")',
        '    model.chat([{"role": "user", "content": "Hello!"}])'
        if chat
        else '    model.generate("Once upon a time")',
        "",
        "In transformers, after `pip install 'elutq[hf]'`:",
        "",
        "    import elutq.hf",
        "    from transformers import AutoModelForCausalLM",
        '    model = AutoModelForCausalLM.from_pretrained("MODEL")',
        "",
        "## What is in it",
        "",
        "| tensors | bits | bits per weight | MB | relative squared error |",
        "|---|---|---|---|---|",
    ]
    for kind in summary.kinds:
        kind_bits = "/".join(map(str, kind.bits))
        error = "" if kind.relative_error is None else f"{kind.relative_error:.5f}"
        text.append(
            f"| {kind.kind} | {kind_bits} | {kind.bits_per_weight:.3f} | {kind.nbytes / 1e6:.1f} | {error} |"
        )
    return "\n".join(["---", front_matter.to_yaml(), "---", "", *text, ""])


def _metadata(folder: Path) -> dict[str, Any]:
    """Front matter of the source's card; empty if it has none that can be read."""
    from huggingface_hub import metadata_load

    try:
        metadata = metadata_load(folder / CARD_FILE)
    except Exception:  # missing, not UTF-8, not YAML: nothing to take over
        return {}
    return metadata if isinstance(metadata, dict) else {}

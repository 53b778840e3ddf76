import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from elutq.model_card import model_card
from elutq.quantize import quantize
from elutq.report import ModelSummary

Make = Callable[..., Path]


def quantized(source: Path, out: Path) -> ModelCard:
    quantize(source, out, bits=2, group_size=64, method="rtn")
    return ModelCard.load(out / "README.md")


def test_a_card_of_a_model_without_one(tmp_path: Path, make_folder: Make) -> None:
    card = quantized(make_folder(tmp_path / "tiny"), tmp_path / "out")
    assert card.data.to_dict() == {
        "library_name": "elutq",
        "pipeline_tag": "text-generation",
        "tags": ["elutq", "hlq", "2-bit"],
    }
    assert "# tiny, 2-bit HLQ" in card.text
    assert "2 bits in groups of 64 columns, method `rtn`" in card.text
    assert "original model's license applies" in card.text
    assert "| down_proj | 2 |" in card.text
    assert "elutq generate" in card.text
    assert "elutq chat" not in card.text


def test_a_card_takes_over_license_language_and_base_model(tmp_path: Path, chat_folder: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(chat_folder, source)
    (source / "README.md").write_text(
        "---\nlicense: other\nlicense_name: my-license\nlanguage: [en, de]\nbase_model: someone/something\n"
        "tags: [mine]\ndatasets: [x]\n---\n# Mine\n"
    )
    card = quantized(source, tmp_path / "out")
    assert card.data.to_dict() == {
        "base_model": "someone/something",
        "language": ["en", "de"],
        "library_name": "elutq",
        "license": "other",
        "license_name": "my-license",
        "pipeline_tag": "text-generation",
        "tags": ["elutq", "hlq", "2-bit", "conversational"],
    }
    for words in ("elutq chat MODEL", "elutq serve MODEL", "model.chat(", "import elutq.hf"):
        assert words in card.text
    assert "license applies" not in card.text


@pytest.mark.parametrize("content", ["---\n: [\n---\n", "---\n- a\n---\n", "no front matter", "\xff"])
def test_a_broken_card_is_passed_over(content: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(content.encode("latin-1"))
    settings = {"bits": 3, "group_size": -1, "method": "hlq"}
    summary = ModelSummary(
        tensors=[], kinds=[], params=10, nbytes=4, bits_per_weight=3.2, linear_bits_per_weight=3
    )
    text = model_card("org/name", tmp_path, settings, summary, chat=False)
    assert text == model_card("org/name", tmp_path / "nowhere", settings, summary, chat=False)
    card = ModelCard(text)
    assert card.data.base_model == "org/name"
    assert card.data.to_dict()["base_model_relation"] == "quantized"
    assert "org/name quantized to 3 bits in whole rows" in text
    assert "finetuned" not in text
    tuned = model_card(
        "org/name", tmp_path, settings | {"finetune": {"stages": ["block"]}}, summary, chat=False
    )
    assert "method `hlq`, then finetuned: 3.000 bits" in tuned

"""The training example works: a few steps of a very small model, saved as a folder that others can read."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from elutq.architectures import engine_config
from elutq.tokenizer import Tokenizer

SCRIPT = Path(__file__).parents[2] / "examples" / "train_tiny.py"
STORY = "Once upon a time a {} met a {}. They played all day, and then they went home to sleep."
ANIMALS = ["fox", "dog", "hen", "cat", "bear", "duck"]
SHAPE = "--vocab 300 --hidden 32 --intermediate 48 --layers 2 --heads 4 --kv-heads 2"
SMALL = f"{SHAPE} --context 16 --batch 2 --threads 1"


def test_a_few_steps(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    text = tmp_path / "stories.txt"
    stories = [STORY.format(a, b) for a in ANIMALS for b in ANIMALS]
    text.write_text("\n<|endoftext|>\n".join(stories))
    out = tmp_path / "model"
    command = [sys.executable, SCRIPT, "--text", text, "--out", out, "--steps", "3", *SMALL.split()]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "step 3" in run.stdout

    config = engine_config(json.loads((out / "config.json").read_text()))
    assert (config.hidden_size, config.num_key_value_heads, config.tie_word_embeddings) == (32, 2, True)
    tokenizer = Tokenizer.from_folder(out)
    assert tokenizer.eos_token_ids == {0}
    ids = tokenizer.encode(stories[0])
    assert tokenizer.decode(ids) == stories[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert torch.isfinite(model(torch.tensor([ids[:16]])).logits).all()


def test_a_text_without_documents_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    text = tmp_path / "one.txt"
    text.write_text("only one document")
    monkeypatch.setattr(sys, "argv", ["train_tiny.py", "--text", str(text), "--out", str(tmp_path / "model")])
    with pytest.raises(SystemExit):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "separate documents by lines of <|endoftext|>" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()

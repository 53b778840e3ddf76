"""lm-evaluation-harness on the engine, with local tasks."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from elutq.errors import InvalidArgumentError
from elutq.models import bundled_model

pytest.importorskip("lm_eval")
# The harness and what it brings warn about each other.
pytestmark = pytest.mark.filterwarnings("default")

from elutq.eval.harness import ElutqLM  # noqa: E402

CHOICES = [
    {"start": "Once upon a", "ends": ["time", "purple", "seven"], "answer": 0},
    {"start": "The little girl was very", "ends": ["the", "happy", "was"], "answer": 1},
    {"start": "They lived happily ever", "ends": ["blue", "dog", "after"], "answer": 2},
]
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{start}}}}"
"""
KINDS = {
    "multiple_choice": 'doc_to_choice: "{{ends}}"\ndoc_to_target: answer\nmetric_list: [{metric: acc}]\n',
    "generate_until": 'doc_to_target: "{{ends[answer]}}"\nmetric_list: [{metric: exact_match}]\n'
    'generation_kwargs: {until: [".", "\\n"], max_gen_toks: 8}\n',
    "loglikelihood_rolling": 'doc_to_target: "{{start}}"\nmetric_list: [{metric: bits_per_byte}]\n',
}


@pytest.fixture(scope="module")
def model() -> ElutqLM:
    return ElutqLM(str(bundled_model()), threads=2)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(choice) + "\n" for choice in CHOICES))
    for kind, rest in KINDS.items():
        text = TASK.format(name=f"local_{kind}", data=data, kind=kind) + rest
        (folder / f"{kind}.yaml").write_text(text)
    return folder


def request(*arguments: Any) -> SimpleNamespace:
    return SimpleNamespace(args=arguments)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))


def test_loglikelihoods_are_those_of_the_logits(model: ElutqLM) -> None:
    pairs = [(c["start"], f" {end}") for c in CHOICES for end in c["ends"]] + [("", "Once upon a time")]
    found = model.loglikelihood([request(*pair) for pair in pairs], disable_tqdm=True)
    for (context, continuation), (score, greedy) in zip(pairs, found, strict=True):
        ids = model.tok_encode(context + continuation, add_special_tokens=None if context else False)
        before = len(model.tok_encode(context)) if context else 0
        if not context:
            ids, before = [model.prefix_token_id, *ids], 1
        logits = log_softmax(model._model.logits(ids))[before - 1 : -1]
        assert score == pytest.approx(sum(row[i] for row, i in zip(logits, ids[before:], strict=True)))
        assert greedy == (logits.argmax(-1).tolist() == ids[before:])
    assert any(greedy for _, greedy in found)


def test_long_texts_are_scored_in_windows(model: ElutqLM) -> None:
    short = ElutqLM(str(bundled_model()), threads=2, max_length=40)
    text = "Once upon a time there was a little fox who liked to sing. " * 6
    ids = [model.prefix_token_id, *model.tok_encode(text)]
    assert len(ids) > 80
    logits = log_softmax(model._model.logits(ids))
    expected = sum(logits[i, ids[i + 1]] for i in range(len(ids) - 1))
    assert model.loglikelihood_rolling([request(text)]) == [pytest.approx(expected)]
    assert short.loglikelihood_rolling([request(text)])[0] < expected
    truncated = short.loglikelihood([request(text, " fox")], disable_tqdm=True)
    assert truncated != model.loglikelihood([request(text, " fox")], disable_tqdm=True)
    with pytest.raises(InvalidArgumentError, match="a continuation has"):
        short.loglikelihood([request("Once", text)], disable_tqdm=True)


def test_generation_stops_and_is_the_engines(model: ElutqLM) -> None:
    options = {"until": ["."], "max_gen_toks": 40}
    found = model.generate_until([request("Once upon a time", options)] * 2)
    expected = model._model.generate("Once upon a time", max_new_tokens=40, stop=["."])
    assert found == [expected, expected]
    sampled = {"until": "\n", "do_sample": True, "temperature": 1.0, "seed": 4, "max_gen_toks": 9}
    assert model.generate_until([request("Once", sampled)]) == [
        model._model.generate("Once", max_new_tokens=9, temperature=1.0, seed=4, stop=["\n"])
    ]
    with pytest.raises(InvalidArgumentError, match="max_gen_toks"):
        model.generate_until([request("Once", {"max_gen_toks": 512})])


def test_chat_templates(chat_folder: Path, model: ElutqLM) -> None:
    chat = ElutqLM(str(chat_folder), threads=1)
    talk = [{"role": "user", "content": "A fox."}]
    assert chat.apply_chat_template(talk) == "user: A fox.\nassistant: "
    talk.append({"role": "assistant", "content": "He sang"})
    assert chat.apply_chat_template(talk, add_generation_prompt=False) == ("user: A fox.\nassistant: He sang")
    assert "message.role" in str(chat.chat_template(True))
    assert model.chat_template(True) is None


def test_the_harness_runs_local_tasks(tasks: Path) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model="elutq",
        model_args={"pretrained": str(bundled_model()), "threads": 2},
        tasks=[f"local_{kind}" for kind in KINDS],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )["results"]
    assert found["local_multiple_choice"]["acc,none"] == 1.0
    assert 0 < found["local_loglikelihood_rolling"]["bits_per_byte,none"] < 8
    assert "exact_match,none" in found["local_generate_until"]


def test_other_models_stay_known() -> None:
    from lm_eval.api.registry import get_model

    assert get_model("elutq") is ElutqLM
    assert get_model("dummy")


def test_the_command(tasks: Path) -> None:
    process = subprocess.run(
        [
            *(sys.executable, "-m", "elutq.eval.harness", "run", "--model", "elutq", "--model_args"),
            *(f"pretrained={bundled_model()},threads=2", "--tasks", str(tasks / "multiple_choice.yaml")),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert "|local_multiple_choice|" in process.stdout

"""Quantizing to a target size: what is chosen, what is refused, resumption."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elutq import errors
from elutq.budget import Target
from elutq.models import bundled_model
from elutq.quantize import quantize
from elutq.report import describe

pytest.importorskip("torch", reason="needs pip install '.[quantize]'")
pytest.importorskip("transformers")

import elutq.allocation
from elutq.sensitivity import SCHEMES, Sensitivity, measure, units

Make = Callable[..., Path]
Source = tuple[Path, dict[str, Any]]
ERRORS = (0.11, 0.10, 0.028, 0.025, 0.0068, 0.005)
MIXTURE = {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
}


@pytest.fixture
def make_source(tmp_path: Path, make_folder: Make) -> Callable[..., Source]:
    """A random model of two blocks with a real tokenizer, and the options that calibrate it in no time."""

    def make(**changes: Any) -> Source:
        shape = {"vocab_size": 4096, "hidden_size": 128, "head_dim": 16, "num_attention_heads": 8}
        shape |= {"intermediate_size": 256, "num_hidden_layers": 2, "num_key_value_heads": 4}
        source = make_folder(tmp_path / "m", **{**shape, **changes})
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (source / name).write_bytes((bundled_model() / name).read_bytes())
        text = tmp_path / "text.txt"
        words = np.random.default_rng(0).choice(["the", "king", "went", "home", "and", "slept"], 4000)
        text.write_text(" ".join(words))
        return source, {"calibration": [str(text)], "calibration_length": 16, "threads": 1}

    return make


def pretend(monkeypatch: pytest.MonkeyPatch, kl: Callable[[str], float]) -> list[int]:
    """Sensitivities that are not measured; returns a list that grows with every call."""
    calls: list[int] = []

    def known(reader: Any, engine: Any, windows: Any, *_: Any, **__: Any) -> dict[str, Sensitivity]:
        calls.append(windows.size)
        return {unit.name: Sensitivity(kl(unit.name), ERRORS) for unit in units(engine)}

    monkeypatch.setattr(elutq.allocation, "measure", known)
    return calls


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, MIXTURE], ids=str)
def test_bits_per_weight_are_met(
    tmp_path: Path, make_source: Callable[..., Source], changes: dict[str, Any]
) -> None:
    source, options = make_source(**changes)
    for target in (2.6, 3.1):
        report = quantize(source, tmp_path / f"{target}", target_bpw=target, **options)
        assert 0.97 * target < report.summary.linear_bits_per_weight <= target
        assert report.settings["target"] == {"bits_per_weight": target, "file_bytes": None}
        assert describe(tmp_path / f"{target}")["linear_bits_per_weight"] <= target
        assert not list(tmp_path.glob("*.sensitivity.json*"))


def test_experts_share_a_scheme(
    tmp_path: Path, make_source: Callable[..., Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, options = make_source(**MIXTURE)
    pretend(monkeypatch, lambda name: 1.0 if name.endswith("0.mlp.experts.*.down_proj") else 1e-3)
    report = quantize(source, tmp_path / "out", target_bpw=3.2, **options)
    down = [t for t in report.summary.tensors if t.name.startswith("model.layers.0.") and "down" in t.name]
    assert [tensor.bits for tensor in down] == [4] * 4
    assert {t.bits for t in report.summary.tensors if "layers.1." in t.name and "down" in t.name} <= {2, 3}


@pytest.mark.parametrize("shard_bytes", [1 << 30, 40_000])
def test_file_size_is_met(tmp_path: Path, make_source: Callable[..., Source], shard_bytes: int) -> None:
    source, options = make_source(vocab_size=4096, tie_word_embeddings=True)
    sizes = {
        bits: quantize(
            source, tmp_path / f"{bits}", bits=bits, method="rtn", shard_bytes=shard_bytes
        ).file_bytes
        for bits in (2, 3)
    }
    target = (sizes[2] + sizes[3]) // 2
    report = quantize(source, tmp_path / "out", target_bytes=target, shard_bytes=shard_bytes, **options)
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert written == report.file_bytes
    assert target - 5000 < written <= target


def test_what_matters_more_gets_more(
    tmp_path: Path, make_source: Callable[..., Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, options = make_source()
    order = ["up_proj", "q_proj", "down_proj", "o_proj", "k_proj", "gate_proj", "v_proj"]
    pretend(monkeypatch, lambda name: 10.0 ** -order.index(name.rpartition(".")[2]))
    report = quantize(source, tmp_path / "out", target_bpw=3.3, **options)
    kinds = {kind.kind: kind.bits_per_weight for kind in report.summary.kinds}
    spent = [kinds[kind] for kind in order]
    assert spent == sorted(spent, reverse=True)
    assert spent[0] > spent[-1]


def test_the_report_says_what_was_measured(tmp_path: Path, make_source: Callable[..., Source]) -> None:
    source, options = make_source()
    report = quantize(source, tmp_path / "out", target_bpw=3.0, **options)
    record = json.loads((tmp_path / "out/quantization_report.json").read_text())["sensitivity"]
    assert record == json.loads(report.to_json())["sensitivity"]
    assert record["tokens"] == 64
    assert record["measured_at"] == {"bits": 2, "group_size": 128}
    assert [(s["bits"], s["group_size"]) for s in record["schemes"]] == [
        (scheme.bits, scheme.group_size) for scheme in SCHEMES
    ]
    by_name = {tensor.name: tensor for tensor in report.summary.tensors}
    for name, unit in record["units"].items():
        assert (by_name[name].bits, by_name[name].group_size) == (unit["bits"], unit["group_size"])
        assert unit["kl"] > 0
        assert len(unit["errors"]) == len(SCHEMES)
    assert report.calibration is not None
    assert report.calibration["samples"] == 4
    assert f"{report.summary.linear_bits_per_weight:.3g}-bit HLQ" in (tmp_path / "out/README.md").read_text()


def test_a_method_with_calibration(tmp_path: Path, make_source: Callable[..., Source]) -> None:
    source, options = make_source()
    report = quantize(
        source, tmp_path / "out", target_bpw=3.0, method="gptq", calibration_samples=8, **options
    )
    assert 2.9 < report.summary.linear_bits_per_weight <= 3.0
    assert {tensor.bits for tensor in report.summary.tensors if tensor.group_size} > {2}
    assert report.sensitivity is not None
    assert report.outputs.keys() == report.sensitivity["units"].keys()


def test_a_huge_target_takes_the_largest(
    tmp_path: Path, make_source: Callable[..., Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, options = make_source()
    pretend(monkeypatch, lambda name: 1e-3)
    report = quantize(source, tmp_path / "out", target_bytes=10**12, **options)
    assert report.settings["modules"] == {}
    assert (report.settings["bits"], report.settings["group_size"]) == (4, 64)


def test_an_interrupted_run_measures_once(
    tmp_path: Path, make_source: Callable[..., Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, options = make_source()
    quantize(source, tmp_path / "reference", target_bpw=3.0, **options)
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> dict[str, Sensitivity]:
        calls.append(1)
        return measure(*args, **kwargs)

    def interrupt(done: int, total: int, name: str) -> None:
        if "layers.1" in name:
            raise KeyboardInterrupt

    monkeypatch.setattr(elutq.allocation, "measure", counted)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", target_bpw=3.0, progress=interrupt, **options)
    with pytest.raises(
        errors.ResumeMismatchError
    ):  # another target is another model, of the same sensitivities
        quantize(source, tmp_path / "out", target_bpw=2.6, **options)
    assert len(calls) == 1
    quantize(source, tmp_path / "out", target_bpw=3.0, **options)
    assert len(calls) == 1
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "reference" / name).read_bytes()
    assert not list(tmp_path.glob("*.sensitivity.json*"))


def test_other_settings_are_measured_anew(
    tmp_path: Path, make_source: Callable[..., Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, options = make_source()
    calls = pretend(monkeypatch, lambda name: 1e-3)

    def interrupt(done: int, total: int, name: str) -> None:
        raise KeyboardInterrupt

    for changes in (
        {},
        {"method": "uniform"},
        {"importance": False},
        {"calibration_seed": 1},
        {"rotate": True},
    ):
        with pytest.raises(KeyboardInterrupt):
            quantize(
                source,
                tmp_path / "out",
                target_bpw=3.0,
                overwrite=True,
                progress=interrupt,
                **options,
                **changes,
            )
    assert len(calls) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_bpw": 2.1}, "2.375 to 5.25 bits per weight"),
        ({"target_bpw": -1.0}, "positive"),
        ({"target_bpw": float("nan")}, "positive"),
        ({"target_bytes": 1000}, r"from \d+ to \d+ bytes"),
        ({"target_bytes": 0}, "positive"),
        ({"target_bpw": 3.0, "target_bytes": 10**6}, "either"),
        ({"target_bpw": 3.0, "bits": 2}, "leave bits and group_size out"),
        ({"target_bytes": 10**6, "group_size": 64}, "leave bits and group_size out"),
    ],
    ids=str,
)
def test_what_is_refused(
    tmp_path: Path, make_source: Callable[..., Source], options: dict[str, Any], message: str
) -> None:
    source, _ = make_source()
    with pytest.raises(errors.InvalidArgumentError, match=message):
        quantize(source, tmp_path / "out", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "text.txt"]


def test_the_least_size_named_is_possible(
    tmp_path: Path, make_source: Callable[..., Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, options = make_source(intermediate_size=200)
    pretend(monkeypatch, lambda name: 1e-3)
    for option in ("target_bpw", "target_bytes"):
        with pytest.raises(errors.InvalidArgumentError) as raised:
            quantize(source, tmp_path / option, **{option: 1}, **options)
        least = str(raised.value).partition("from ")[2].split()[0]
        value = float(least) if option == "target_bpw" else int(least)
        report = quantize(source, tmp_path / option, **{option: value}, **options)
        assert {tensor.bits for tensor in report.summary.tensors if tensor.group_size} == {2}


def test_an_output_that_exists_is_found_before_anything_is_measured(
    tmp_path: Path, make_source: Callable[..., Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, options = make_source()
    calls = pretend(monkeypatch, lambda name: 1e-3)
    with pytest.raises(errors.OutputExistsError):
        quantize(source, source, target_bpw=3.0, **options)
    assert not calls


def test_a_target_is_one_number() -> None:
    with pytest.raises(errors.InvalidArgumentError):
        Target()


def test_narrow_parameters_leave_room_for_planes(
    tmp_path: Path, make_source: Callable[..., Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, options = make_source()
    pretend(monkeypatch, lambda name: 1e-3)
    expected = []
    for param_bits in (16, 8):
        out = tmp_path / f"{param_bits}"
        report = quantize(source, out, target_bpw=3.0, param_bits=param_bits, **options)
        assert 2.9 < report.summary.linear_bits_per_weight <= 3.0
        assert report.sensitivity is not None
        expected.append(report.sensitivity["expected_kl"])
        assert describe(out)["scheme"].get("param_bits", 16) == param_bits
    assert expected[1] < expected[0]

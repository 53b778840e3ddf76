"""The report's picture and page: what they show, what they leave out, and that they need nothing else."""

import base64
import copy
import json
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from elutq import hlq
from elutq.checkpoint import Checkpoint
from elutq.errors import InvalidArgumentError
from elutq.importance import input_importance
from elutq.models import bundled_model
from elutq.quantize import quantize
from elutq.report_page import LevelHistogram, level_histograms, report_figure, report_page
from elutq.report_page.charts import error_charts
from elutq.report_page.series import (
    block_errors,
    mixed_bits,
    output_errors,
    reconstruction,
    stages,
    weight_errors,
)

Make = Callable[..., Path]
Report = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "q"
    quantize(bundled_model(), out, bits=3)
    return out


@pytest.fixture(scope="module")
def pair(folder: Path) -> Iterator[tuple[Checkpoint, Checkpoint]]:
    with Checkpoint.open(bundled_model()) as source, Checkpoint.open(folder) as quantized:
        yield source, quantized


@pytest.fixture
def plain(folder: Path) -> Report:
    """Of a method without data."""
    report: Report = json.loads((folder / "quantization_report.json").read_text())
    return report


@pytest.fixture
def rich(plain: Report) -> Report:
    return with_calibration(plain)


def with_calibration(plain: Report) -> Report:
    """The same with all that calibration adds."""
    report = copy.deepcopy(plain)
    linears = [t for t in report["summary"]["tensors"] if t["relative_error"] is not None]
    linears[0]["bits"] = 4
    return report | {
        "calibration": {"sources": ["<stories>.txt"], "samples": 128, "tokens": 65536, "seed": 0},
        "outputs": {
            t["name"]: {"output_error": 0.0125, "tokens": 65536, "fallback": None} for t in linears[1:]
        }
        | {linears[0]["name"]: {"output_error": 0.0625, "tokens": 9, "fallback": "too few tokens"}},
        "blocks": [{"index": i, "output_error": 0.001 * 2**i, "seconds": 1.5} for i in range(8)],
        "nll": {"full": 2.5, "quantized": 2.625, "kl": 0.0456, "tokens": 8192},
        "stages": [
            {"name": "hlq-gptq", "seconds": 60.0, "nll": nll(2.75, 0.0789)},
            {
                "name": "block",
                "seconds": 1230.0,
                "nll": nll(2.6875, 0.0567),
                "blocks": [
                    {"index": i, "before": 0.02 * 1.5**i, "after": 0.015 * 1.5**i, "steps": 256}
                    for i in range(8)
                ],
            },
            {
                "name": "e2e",
                "seconds": 610.0,
                "nll": nll(2.625, 0.0456),
                "before": 0.06,
                "after": 0.05,
                "steps": 128,
            },
        ],
        "generation": {"prompt": "Once", "text": " <b>upon</b>", "collapsed": False, "reason": None},
        "warnings": ["k_proj & friends"],
    }


def nll(quantized: float, kl: float) -> dict[str, Any]:
    return {"full": 2.5, "quantized": quantized, "kl": kl, "tokens": 8192}


@pytest.fixture(scope="module")
def rich_page(folder: Path, pair: tuple[Checkpoint, Checkpoint]) -> "Page":
    report = with_calibration(json.loads((folder / "quantization_report.json").read_text()))
    return Page(report_page(report, level_histograms(*pair)))


class Page(HTMLParser):
    """Tags and text of a page; void elements apart, every tag must be closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def __contains__(self, words: str) -> bool:
        return words in re.sub(r"\s+", " ", " ".join(self.text))


def size(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def test_levels_are_those_of_the_files(pair: tuple[Checkpoint, Checkpoint]) -> None:
    source, quantized = pair
    histograms = level_histograms(*pair)
    assert [h.module.rpartition(".")[2] for h in histograms] == ["q_proj", "v_proj", "gate_proj", "down_proj"]
    assert histograms[0].module.startswith("model.layers.0.")
    assert histograms[-1].module.startswith("model.layers.7.")
    for histogram in histograms:
        columns = slice(128 * histogram.group, 128 * histogram.group + 128)
        exact = source.read_float32(f"{histogram.module}.weight")[histogram.row, columns]
        stored = hlq.dequantize(quantized.read_hlq(histogram.module))[histogram.row, columns]
        np.testing.assert_array_equal(histogram.weights, exact)
        assert np.isin(stored, histogram.hlq_levels).all()
        assert len(histogram.hlq_levels) == len(histogram.uniform_levels) == 8
        np.testing.assert_allclose(
            np.diff(histogram.uniform_levels), np.ptp(histogram.uniform_levels) / 7, rtol=1e-3
        )
        assert histogram.hlq_error == pytest.approx(
            ((exact - stored) ** 2).sum() / (exact**2).sum(), rel=1e-5
        )
        assert not histogram.weighed


def test_levels_of_a_calibrated_model_are_not_judged_by_its_weights(
    pair: tuple[Checkpoint, Checkpoint], rich: Report
) -> None:
    histograms = level_histograms(*pair, calibrated=True)
    assert all(h.hlq_error is None and h.uniform_error is None for h in histograms)
    page = report_page(rich, histograms)
    assert "Calibration places them" in page
    assert "Under each name is the squared error" not in page


def test_weighed_columns_are_weighed_on_both_sides(pair: tuple[Checkpoint, Checkpoint]) -> None:
    source, _ = pair

    def importance(module: str) -> Any:
        return input_importance(module, source.engine, source.read_float32)

    for plain, weighed in zip(
        level_histograms(*pair), level_histograms(*pair, importance=importance), strict=True
    ):
        assert weighed.weighed
        assert weighed.hlq_error < weighed.uniform_error
        assert weighed.hlq_error != plain.hlq_error
        np.testing.assert_array_equal(weighed.hlq_levels, plain.hlq_levels)


@pytest.mark.parametrize(("model_type", "group_size"), [("qwen3", 32), ("qwen2", 128), ("llama", -1)])
def test_levels_of_odd_shapes(tmp_path: Path, make_folder: Make, model_type: str, group_size: int) -> None:
    changes = {"head_dim": 8} if model_type == "qwen3" else {}
    source = make_folder(tmp_path / "m", model_type=model_type, **changes)
    quantize(source, tmp_path / "q", bits=1, group_size=group_size)
    with Checkpoint.open(source) as before, Checkpoint.open(tmp_path / "q") as after:
        histograms = level_histograms(before, after, count=9)
        assert len({h.module for h in histograms}) == len(histograms) > 1
        assert [h.hlq_levels.size for h in histograms] == [2] * len(histograms)
        assert len(level_histograms(before, after, count=1)) == 1
        with pytest.raises(InvalidArgumentError, match="is not quantized"):
            level_histograms(before, before)
        with pytest.raises(InvalidArgumentError, match="count"):
            level_histograms(before, after, count=0)


def test_series_of_a_report(rich: Report) -> None:
    assert len(weight_errors(rich)) == 7
    assert output_errors(rich)["q_proj"] == {0: 0.0625} | dict.fromkeys(range(1, 8), 0.0125)
    assert block_errors(rich)[3] == 0.008
    assert mixed_bits(rich)["q_proj"] == {0: 4} | dict.fromkeys(range(1, 8), 3)
    assert {when: len(errors) for when, errors in reconstruction(rich).items()} == {"before": 8, "after": 8}
    assert reconstruction(rich)["after"][0] == 0.015


def test_stages_are_told_one_by_one(rich: Report) -> None:
    first, second, third = stages(rich)
    assert first == {
        "stage": "hlq-gptq",
        "nll": "2.7500",
        "increase": "+0.2500",
        "KL divergence": "0.0789",
        "steps": "",
        "seconds": "60",
    }
    assert (second["stage"], second["steps"], second["seconds"]) == ("block", "2,048", "1,230")
    assert (third["stage"], third["steps"], third["KL divergence"]) == ("e2e", "128", "0.0456")
    rich["stages"][1]["nll"] = None
    assert stages(rich)[1]["nll"] == ""
    for few in ([], rich["stages"][:1]):
        rich["stages"] = few
        assert stages(rich) == []
        assert reconstruction(rich) == {}
        assert "After each stage" not in Page(report_page(rich, []))


def test_series_leave_out_what_a_log_scale_cannot_show(plain: Report) -> None:
    plain["blocks"] = [
        {"index": i, "output_error": e, "seconds": 1} for i, e in enumerate((0, float("nan"), 1))
    ]
    assert block_errors(plain) == {2: 1}
    assert output_errors(plain) == mixed_bits(plain) == {}
    for tensor in plain["summary"]["tensors"]:
        tensor["relative_error"] = 0.0
    assert [chart.title for chart in error_charts(plain)] == ["Error of whole blocks"]


def test_the_picture_grows_with_what_is_known(
    plain: Report, rich: Report, pair: tuple[Checkpoint, Checkpoint]
) -> None:
    histograms = level_histograms(*pair)
    sizes = [size(report_figure(*arguments)) for arguments in ((plain, []), (rich, []), (rich, histograms))]
    assert [width for width, _ in sizes] == [1920] * 3
    assert sizes[0][1] < sizes[1][1] < sizes[2][1]


def test_a_page_of_a_method_without_data(plain: Report) -> None:
    page = Page(report_page(plain, []))
    assert [tag["alt"] for tag in page.all("img")] == [error_charts(plain)[0].alt]
    for absent in (
        "output error",
        "Calibration",
        "After each stage",
        "nats",
        "Generation",
        "warning",
        "Levels",
    ):
        assert absent not in page
    for key in ("calibration", "outputs", "blocks", "nll", "generation", "warnings"):
        plain[key] = None
    assert "Calibration" not in Page(report_page(plain, []))


def test_a_page_of_a_calibrated_model(rich: Report, rich_page: Page) -> None:
    page = rich_page
    for words in ("llama-7m, 3-bit HLQ", "1 warning", "k_proj & friends", "<b>upon</b>", "2.6250", "+0.1250"):
        assert words in page
    for words in ("After each stage", "2.6875", "+0.1875", "0.0567", "2,048", "1,230"):
        assert words in page
    for words in ("65,536", "<stories>.txt", "0.0625", "too few tokens", "8,192 held-out tokens"):
        assert words in page
    assert len(page.all("img")) == len(page.all("source")) == 8
    assert len(page.all("details")) == len(rich["summary"]["kinds"])
    for tensor in rich["summary"]["tensors"]:
        assert tensor["name"] in page


def test_a_page_is_complete_and_accessible(rich_page: Page) -> None:
    page = rich_page
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("title")) == len(page.all("h1")) == 1
    assert not page.all("script") + page.all("link")
    assert len(page.all("table")) == len(page.all("caption"))
    assert all(heading["scope"] for heading in page.all("th"))
    assert all(image["alt"] for image in page.all("img"))
    for tag, name in (("img", "src"), ("source", "srcset")):
        for attributes in page.all(tag):
            kind, _, data = (attributes[name] or "").partition(",")
            assert kind == "data:image/svg+xml;base64"
            assert b"<svg" in base64.b64decode(data)
    light, dark = page.all("img")[0]["src"], page.all("source")[0]["srcset"]
    assert light != dark


def test_collapse_is_said(rich: Report) -> None:
    rich["generation"] |= {"collapsed": True, "reason": "12 of 12 texts run into a loop"}
    page = Page(report_page(rich, []))
    assert "has collapsed" in page
    assert "12 of 12 texts" in page


def test_names_are_text_and_nothing_else(
    rich: Report, pair: tuple[Checkpoint, Checkpoint], capfd: pytest.CaptureFixture[str]
) -> None:
    rich["source"] = "models/<script>$x^{日本$"
    (histogram,) = level_histograms(*pair, count=1)
    histograms: list[LevelHistogram] = [replace(histogram, module="a_$\\frac{日本<i>")]
    page = Page(report_page(rich, histograms))
    assert "<script>$x^{日本$" in page
    assert not page.all("script") + page.all("i")
    assert size(report_figure(rich, histograms))[0] == 1920
    assert capfd.readouterr() == ("", "")


def test_deep_and_shallow_models(plain: Report) -> None:
    (tensor,) = [t for t in plain["summary"]["tensors"] if t["name"] == "model.layers.0.mlp.up_proj"]
    deep = [
        tensor | {"name": f"model.layers.{i}.mlp.{kind}", "kind": kind, "bits": 2 + i % 3}
        for i in range(90)
        for kind in ("up_proj", "down_proj", "router")
    ]
    for tensors in (deep, deep[:1]):
        plain["summary"]["tensors"] = tensors
        plain["summary"]["kinds"] = [k for k in plain["summary"]["kinds"] if k["kind"] == "up_proj"]
        assert size(report_figure(plain, []))[0] == 1920
        assert Page(report_page(plain, [])).all("tr")

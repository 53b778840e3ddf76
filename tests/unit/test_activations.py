"""Where activations are kept while a model is walked through, and what is lost on the way."""

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs pip install '.[quantize]'")

import torch

from elutq.layerwise import MEMORY, Activations, may_round


@pytest.mark.parametrize("in_file", [False, True])
def test_some_batches_are_rounded(in_file: bool, tmp_path: Path) -> None:
    place = tmp_path if in_file else MEMORY
    kept = Activations(place, rounded=range(1))
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):  # the second time over the first
        learned, judged = torch.randn(2, 3, 5, 8, generator=generator)
        kept.overwrite(0, learned)
        kept[1] = judged
        assert kept[0].dtype == torch.bfloat16
        found = kept.on(0, torch.device("cpu"))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, learned, rtol=2**-8, atol=0)
        assert not torch.equal(found, learned)
        assert torch.equal(kept.on(1, torch.device("cpu")), judged)


def test_only_gpus_round() -> None:
    assert not may_round(torch.device("cpu"))
    assert may_round(torch.device("cuda"))

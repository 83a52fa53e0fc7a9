import pytest
import torch

from paec_kernels.train import checkpoint

STATE = {"config": {"seed": 0, "method": {"lam": 1.0, "clip": 0.2}}, "weights": torch.arange(3.0)}


def test_saved_and_loaded(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(STATE, path)
    loaded = checkpoint.load(path, STATE["config"])
    assert torch.equal(loaded["weights"], STATE["weights"])
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_each_differing_field_is_named(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(STATE, path)
    with pytest.raises(checkpoint.OtherConfigError) as refused:
        checkpoint.load(path, {"seed": 1, "method": {"lam": 0.3, "clip": 0.2}, "new": True})
    for text in (
        "seed: checkpoint 0, here 1",
        "method.lam: checkpoint 1.0, here 0.3",
        "new: checkpoint 'absent', here True",
        str(path),
    ):
        assert text in str(refused.value)
    assert "clip" not in str(refused.value)

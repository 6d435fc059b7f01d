"""What is right is computed where the workload runs; on a GPU, everybody has cuDNN's best. The GPU is not there."""

import numpy as np
import pytest
import torch
from torch import nn

from resnet_fast.bench import workload
from resnet_fast.bench.training_step import Step

GPU = workload.Setting("cuda", "float16")
LABELS = torch.tensor([0, 1])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.fixture
def moved(monkeypatch):
    """To which devices tensors and modules are asked to go; all stay where they are."""
    places = []
    for kind in (torch.Tensor, nn.Module):
        to = kind.to

        def noting(self, *args, to=to, **kwargs):
            places.extend(one for one in args if isinstance(one, str))
            return to(self, *(one for one in args if not isinstance(one, str)), **kwargs)

        monkeypatch.setattr(kind, "to", noting)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: places.append("emptied"))
    return places


def _prepare(training, folder, model):
    images = torch.randn(2, 3, 6, 6)
    if training:
        workload.prepare_training(folder, model.train(), images, LABELS, GPU)
        with np.load(folder / workload.TRAINING_REFERENCE) as found:
            return found["gradient of 0"], Step(model.double(), images.double(), LABELS).first()["gradient of 0"]
    workload.prepare(folder, model.eval(), images, onnx=False, setting=GPU)
    return np.load(folder / workload.REFERENCE), model.double()(images.double()).detach().numpy()


@pytest.mark.parametrize("training", [False, True])
def test_what_is_right_is_computed_on_the_gpu(training, model, moved, tmp_path):
    found, expected = _prepare(training, tmp_path, model)
    assert moved[0] == "cuda"
    assert moved[-1] == "emptied"
    assert "cpu" not in moved
    assert found.dtype == np.float64
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("training", [False, True])
def test_or_on_the_cpu_where_it_does_not_fit(training, model, moved, tmp_path, monkeypatch):
    forward = nn.Conv2d.forward

    def full(self, x):
        if "cpu" not in moved:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, x)

    with monkeypatch.context() as patched:
        patched.setattr(nn.Conv2d, "forward", full)
        found, expected = _prepare(training, tmp_path, model)
    assert np.array_equal(found, expected)


def test_cudnn_measures_for_everybody_on_a_gpu(model, moved, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    workload._write(tmp_path, model, torch.zeros(2, 3, 6, 6), GPU)
    workload.load_model(tmp_path)
    assert torch.backends.cudnn.benchmark
    workload._write(tmp_path, model, torch.zeros(2, 3, 6, 6), workload.DEFAULT)
    workload.load_model(tmp_path)
    assert not torch.backends.cudnn.benchmark

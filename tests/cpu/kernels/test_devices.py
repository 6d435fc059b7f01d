"""A machine may have different GPUs: what a tensor's own can do counts, not what the current one can."""

import pytest
import torch

from resnet_fast.kernels.contract import Case
from resnet_fast.kernels.triton import device, table
from resnet_fast.ops import dispatch, inference
from tests.fake_gpu import OnGpu

CAPABILITIES = {0: (7, 0), 1: (9, 0), 2: (8, 0)}


@pytest.fixture
def gpus(monkeypatch):
    """Number 0, which is too old, is the current one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: CAPABILITIES[index])
    device._architecture.cache_clear()
    device._nvidia.cache_clear()
    device._too_old.cache_clear()
    yield
    device._architecture.cache_clear()
    device._nvidia.cache_clear()
    device._too_old.cache_clear()


@pytest.mark.skipif(not device._installed(), reason="needs Triton")
def test_the_tensors_gpu_counts(gpus):
    case = Case("conv_bn_act", "cuda", torch.float16, 64, 64)
    reason = "needs compute capability 8.0, this GPU has 7.0"
    assert table.supports(case) == table.supports(case._replace(gpu=0)) == reason
    assert table.supports(case._replace(gpu=1)) is None
    quantised = Case("quantise", "cuda", torch.float8_e4m3fn, 64, 64, gpu=1)
    assert table.supports(quantised) is None
    assert table.supports(quantised._replace(gpu=2)) == "sm_80 does not multiply float8_e4m3fn"


class Second(OnGpu):
    device = torch.device("cuda", 1)


def test_ops_say_which_gpu_it_is(monkeypatch):
    seen = []

    class Stop(Exception):
        pass

    def stop(case, *_):
        seen.append(case)
        raise Stop

    def there(*shape):
        return torch.ones(shape).as_subclass(Second)

    monkeypatch.setattr(inference, "implementation", stop)
    monkeypatch.setattr(inference, "PREPARED", {})
    vector, pointwise = there(4), ((1, 1), (0, 0), (1, 1), 1, True)
    image, weight, residual = there(1, 4, 9, 9), there(4, 4, 1, 1), there(1, 4, 9, 9)
    calls = [
        lambda: inference._conv_bn_act(image, weight, vector, vector, None, *pointwise),
        lambda: inference._conv_chain(image, weight, vector, vector, residual, weight, vector, vector),
        lambda: inference._stem(image, there(4, 4, 7, 7), vector, vector),
        lambda: inference._global_avg_pool(image),
        lambda: inference._head(image, there(3, 4), None),
    ]
    for call in calls:
        with pytest.raises(Stop):
            call()
    assert [(case.device, case.gpu) for case in seen] == [("cuda", 1)] * len(calls)
    assert dispatch.conv_case("wgrad", image, weight, inference._POINTWISE).gpu == 1

"""torchao's quantize_ with our configuration, where torchao is installed; without, nothing imports it."""

import importlib.util
import subprocess
import sys

import pytest
import torch

from tests.cpu.quantize.networks import IMAGES, quantised
from tests.cpu.small_models import small_resnet


def test_nothing_imports_it():
    code = "import sys, resnet_fast.int8; assert 'torchao' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_quantize_():
    from torchao.quantization import quantize_

    from resnet_fast.int8.torchao_config import Int8Config, whole_model

    _, int8 = quantised()
    model = small_resnet()
    quantize_(model, Int8Config(IMAGES), filter_fn=whole_model)
    assert torch.equal(model(IMAGES), int8(IMAGES))
    other = small_resnet()
    with pytest.raises(ValueError, match=r"filter_fn takes a Linear by itself, expected .*whole_model"):
        quantize_(other, Int8Config(IMAGES))
    with pytest.raises(ValueError, match="dtype is 'int4'"):
        quantize_(other, Int8Config(IMAGES, options={"dtype": "int4"}), filter_fn=whole_model)

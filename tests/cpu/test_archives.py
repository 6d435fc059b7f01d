"""Models as files that another process runs: archives of torch.export, and libraries of AOTInductor."""

import copy
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from torchvision.models import resnet

import resnet_fast
from resnet_fast.bench.norms import randomise_batch_norm
from resnet_fast.utils.tolerance import error_limit

IMAGES = torch.randn(3, 3, 40, 48, generator=torch.Generator().manual_seed(0))

LOADING = """
import json, sys, torch, warnings
torch.set_grad_enabled(False)
load, folder = {load}, sys.argv[1]
images = torch.load(folder + "/images.pt")

def run(name):
    model = load(folder + "/" + name + ".pt2")
    torch.save([model(images[:batch]) for batch in (1, 2, 3)], folder + "/" + name + ".result.pt")

run("stock")
try:
    run("fast")
except RuntimeError as error:
    refusal = repr(error)
needs_none = not any(name.startswith("resnet_fast") for name in sys.modules)
import resnet_fast
run("fast")
print(json.dumps([needs_none, refusal]))
"""


def network(stages: int):
    torch.manual_seed(0)
    model = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=10).eval()
    for stage in range(stages + 1, 5):
        setattr(model, f"layer{stage}", torch.nn.Identity())
    model.fc = torch.nn.Linear(64 * 2 ** (stages - 1), 10)
    randomise_batch_norm(model, 0)
    return model


def traced(model):
    with torch.no_grad():
        return torch.export.export(model, (IMAGES,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})


def check_in_another_process(load, folder, stock):
    """It runs ``stock.pt2``, and ``fast.pt2`` after an import of resnet_fast, as ``stock`` computes; not before."""
    torch.save(IMAGES, folder / "images.pt")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", LOADING.format(load=load), folder], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    needs_none, refusal = json.loads(done.stdout)
    assert needs_none
    assert refusal.startswith("RuntimeError")
    with torch.no_grad():
        precise = copy.deepcopy(stock).double()(IMAGES.double())
        limit = error_limit((stock(IMAGES) - precise).abs().max().item(), precise)
    for name in ("stock", "fast"):
        for result in torch.load(folder / f"{name}.result.pt"):
            assert (result - precise[: len(result)]).abs().max() <= limit
    return refusal


def test_archives_of_torch_export(tmp_path):
    """The accelerated model's holds the fused ops and needs them registered; the restored one's needs nothing."""
    stock = network(4)
    fast = resnet_fast.accelerate(copy.deepcopy(stock))
    torch.export.save(traced(fast), tmp_path / "fast.pt2")
    torch.export.save(traced(resnet_fast.restore(fast)), tmp_path / "stock.pt2")
    check_in_another_process("lambda path: torch.export.load(path).module()", tmp_path, stock)


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="AOTInductor needs a C++ compiler")
def test_libraries_of_aotinductor(tmp_path):
    """The accelerated model's calls the fused ops through the dispatcher, so the process needs Python and them."""
    stock = network(1)
    for name, model in (("fast", resnet_fast.accelerate(copy.deepcopy(stock))), ("stock", stock)):
        path = tmp_path / f"{name}.pt2"
        assert torch._inductor.aoti_compile_and_package(traced(model), package_path=str(path)) == str(path)
    refusal = check_in_another_process("torch._inductor.aoti_load_package", tmp_path, stock)
    assert "resnet_fast::stem" in refusal

"""Models, a repository with them, servers on it, and what clients of both protocols have in common."""

import copy
import shutil
import socket
from pathlib import Path

import numpy as np
import torch
import tritonclient.grpc
import tritonclient.http
from torch import Tensor, nn
from torchvision.models import resnet

from resnet_fast.bench.norms import randomise_batch_norm
from resnet_fast.export import export_onnx
from resnet_fast.models.named import build
from resnet_fast.serving import Server, write_repository
from resnet_fast.utils.tolerance import error_limit
from resnet_fast.verify import WINOGRAD

SIZE, CLASSES, MAX_BATCH = 64, 10, 8
LABELS = [f"class {index}" for index in range(CLASSES)]
PROTOCOLS = {"http": tritonclient.http, "grpc": tritonclient.grpc}

NET, PLAIN, NARROW, PICTURES = "net", "plain", "narrow", "pictures"
"""In the repository: a model that the server builds anew in PyTorch; one that it runs as an ONNX file; that with a file
for one image at a time, behind a configuration that promises more, and any number of channels; one for pictures."""


def net() -> nn.Module:
    """What ``build("resnet18", num_classes=CLASSES)`` can be given the weights of."""
    model = build("resnet18", num_classes=CLASSES, seed=1)
    randomise_batch_norm(model, 1)
    return model


def plain() -> nn.Module:
    """A network that no name stands for."""
    torch.manual_seed(2)
    model = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=CLASSES).eval()
    randomise_batch_norm(model, 2)
    return model


def write(folder: Path) -> dict[str, nn.Module]:
    """All of them as a repository ``folder``; by name those that take images of ``SIZE``."""
    models = {NET: net(), PLAIN: plain()}
    for name, model in models.items():
        write_repository(
            model,
            folder,
            name=name,
            architecture="resnet18" if name == NET else None,
            max_batch=MAX_BATCH,
            queue_delay=20_000,  # long enough for requests that were sent together to meet on a busy machine
            input_size=(3, SIZE, SIZE),
            classes=LABELS,
            verify=False,  # the answers are compared instead
        )
    write_repository(
        models[PLAIN],
        folder,
        name=PICTURES,
        max_batch=4,
        input_size=(3, SIZE, SIZE),
        classes=LABELS,
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.4),
        preprocess=True,
        softmax=True,
        top_k=3,
        verify=False,
    )
    shutil.copytree(folder / PLAIN, folder / NARROW)
    file = folder / NARROW / "1" / "model.onnx"
    export_onnx(models[PLAIN], file, dynamic_batch=False, input_size=(3, SIZE, SIZE), verify=False)
    config = folder / NARROW / "config.pbtxt"
    text = config.read_text().replace(f'name: "{PLAIN}"', f'name: "{NARROW}"')
    text = text.replace(f"dims: [ 3, {SIZE}, {SIZE} ] }}\n]", f"dims: [ -1, {SIZE}, {SIZE} ] }}\n]")
    # Without the warm-up, whose batches are single requests of several images.
    config.write_text(text[: text.index("model_warmup")] + text[text.index("# What model.py reads") :])
    return {**models, NARROW: models[PLAIN]}


def free_ports() -> list[int]:
    """Three that nobody listens at."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def server(repository: Path, log: Path, **settings) -> Server:
    """A server on ports that are free, ready."""
    http, grpc, metrics = free_ports()
    started = Server(repository, http_port=http, grpc_port=grpc, metrics_port=metrics, log=log, **settings)
    try:
        started.wait(180)
    except BaseException:
        started.kill()
        raise
    return started


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def ask(protocol: str, url: str, model: str, batch: np.ndarray, dtype: str = "FP32", **outputs) -> np.ndarray:
    """The answer of a client of its own, which is closed afterwards."""
    module = PROTOCOLS[protocol]
    client = module.InferenceServerClient(url)
    try:
        request = module.InferInput("input", list(batch.shape), dtype)
        request.set_data_from_numpy(batch)
        wanted = [module.InferRequestedOutput("logits", **outputs)] if outputs else None
        return client.infer(model, [request], outputs=wanted).as_numpy("logits")
    finally:
        client.close()


def address(running: Server, protocol: str) -> str:
    return running.http if protocol == "http" else running.grpc


def assert_right(model: nn.Module, batch: Tensor, answer: np.ndarray) -> None:
    """As near to float64 as the accelerated model must be anywhere: twice stock float32's error, and Winograd's."""
    with torch.inference_mode():
        reference = copy.deepcopy(model).double()(batch.double())
        stock_error = (model(batch).double() - reference).abs().max().item()
    assert answer.dtype == np.float32
    assert answer.shape == tuple(reference.shape)
    limit = error_limit(stock_error, reference) + WINOGRAD * reference.abs().max().item()
    assert np.abs(answer - reference.numpy()).max() <= limit

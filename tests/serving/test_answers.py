"""Models of ours on the real server: what clients are told, given, and refused, over both protocols."""

import threading
import time

import numpy as np
import pytest
import torch
from tritonclient.utils import InferenceServerException

from resnet_fast import OnnxModel
from resnet_fast.serving.load import Target, load_test
from tests.serving import served
from tests.serving.served import (
    CLASSES,
    LABELS,
    MAX_BATCH,
    NARROW,
    NET,
    PICTURES,
    PLAIN,
    PROTOCOLS,
    SIZE,
    address,
    ask,
    assert_right,
)

each_protocol = pytest.mark.parametrize("protocol", PROTOCOLS)
each_model = pytest.mark.parametrize("name", [NET, PLAIN])


@pytest.fixture(scope="module")
def models(repository):
    """By name."""
    return repository[1]


@pytest.fixture(scope="module")
def server(repository, tmp_path_factory):
    with served.server(repository[0], tmp_path_factory.mktemp("log") / "log") as running:
        yield running


@pytest.fixture
def client(server, protocol):
    client = PROTOCOLS[protocol].InferenceServerClient(address(server, protocol))
    yield client
    client.close()


def as_json(protocol):
    return {"as_json": True} if protocol == "grpc" else {}


@each_protocol
def test_ready(server, client):
    """What the server has no backend for was left out, and is no reason not to be ready."""
    assert server.models == [NARROW, NET, PICTURES, PLAIN]
    assert client.is_server_live()
    assert client.is_server_ready()
    assert all(client.is_model_ready(name) for name in server.models)
    assert not client.is_model_ready(f"{NET}_onnx")


@each_protocol
@each_model
def test_metadata(client, protocol, name):
    metadata = client.get_model_metadata(name, **as_json(protocol))

    def described(port):
        return port["name"], port["datatype"], [int(extent) for extent in port["shape"]]

    assert [described(port) for port in metadata["inputs"]] == [("input", "FP32", [-1, 3, SIZE, SIZE])]
    assert [described(port) for port in metadata["outputs"]] == [("logits", "FP32", [-1, CLASSES])]


def test_the_server_has_read_the_configuration(server):
    client = PROTOCOLS["http"].InferenceServerClient(server.http)
    config = client.get_model_config(NET)
    assert config["max_batch_size"] == MAX_BATCH
    assert config["dynamic_batching"]["preferred_batch_size"] == [4, 8]
    assert config["dynamic_batching"]["max_queue_delay_microseconds"] == 20_000
    assert [group["count"] for group in config["instance_group"]] == [1]
    assert {warm_up["batch_size"] for warm_up in config["model_warmup"]} == {1, 4, 8}
    assert config["parameters"]["runtime"]["string_value"] == "torch"
    assert client.get_model_config(PLAIN)["parameters"]["runtime"]["string_value"] == "onnxruntime"
    client.close()


@each_protocol
@each_model
@pytest.mark.parametrize("batch", [1, 3, MAX_BATCH])
def test_answers_are_those_of_the_model(server, models, protocol, name, batch):
    sent = served.images(batch, seed=batch)
    assert_right(models[name], sent, ask(protocol, address(server, protocol), name, sent.numpy()))


def test_nan_and_infinity_come_back(server, models):
    """Not only in the image that has them, where they may fill the logits, but never in another one."""
    sent = served.images(3, seed=5)
    sent[1, 0, 7, 9] = float("nan")
    answer = ask("http", server.http, NET, sent.numpy())
    assert np.isnan(answer[1]).all()
    assert_right(models[NET], sent[::2], answer[::2])


@each_protocol
def test_classification(server, models, protocol):
    """The extension: the best classes with their names, from the label file."""
    sent = served.images(2, seed=6)
    answer = ask(protocol, address(server, protocol), NET, sent.numpy(), class_count=3)
    logits = ask(protocol, address(server, protocol), NET, sent.numpy())
    assert answer.shape == (2, 3)
    for texts, scores in zip(answer, logits, strict=True):
        order = np.argsort(-scores)[:3]
        found = [text.decode().split(":") for text in texts]
        assert [int(index) for _, index, _ in found] == order.tolist()
        assert [label for _, _, label in found] == [LABELS[index] for index in order]
        # Six decimals: as the server prints them.
        assert np.allclose([float(score) for score, _, _ in found], scores[order], rtol=0, atol=5.1e-7)


@each_protocol
def test_pictures_of_any_size(repository, client, protocol):
    """Bytes in; probabilities, the best scores and their classes out, as the same file gives them in a process."""
    module = PROTOCOLS[protocol]
    model = OnnxModel(repository[0] / PICTURES / "1" / "model.onnx", device="cpu")
    for height, width in ((80, 100), (200, 64)):
        sent = np.random.default_rng(height).integers(0, 256, (3, height, width, 3), dtype=np.uint8)
        request = module.InferInput("image", list(sent.shape), "UINT8")
        request.set_data_from_numpy(sent)
        answer = client.infer(PICTURES, [request])
        for name, expected in zip(("probabilities", "scores", "classes"), model(torch.from_numpy(sent)), strict=True):
            # Rounding alone, of numbers up to 1: the threads may be more there.
            assert np.abs(answer.as_numpy(name) - expected.numpy()).max() <= 16 * 2.0**-24
        wanted = [module.InferRequestedOutput("probabilities", class_count=1)]
        named = client.infer(PICTURES, [request], outputs=wanted).as_numpy("probabilities")
        best = answer.as_numpy("classes")[:, 0]
        assert [text[0].decode().split(":")[2] for text in named] == [LABELS[index] for index in best]


# --- many at once -----------------------------------------------------------------------------------------------------


def at_once(work, count):
    """What ``work(index)`` gives in ``count`` threads, started together."""
    results = [None] * count
    barrier = threading.Barrier(count)

    def run(index):
        barrier.wait(60)
        try:
            results[index] = work(index)
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return results


def counted(target, requests):
    """The server's counts once it has counted ``requests``: it answers first."""
    end = time.monotonic() + 30
    while (counts := target.statistics())["requests"] < requests and time.monotonic() < end:
        time.sleep(0.05)
    return counts


@each_model
def test_requests_become_batches_and_each_gets_its_own_answer(server, models, name):
    """Of different sizes, so that a part of the batch that went to the wrong one would not fit."""
    sent = [served.images(1 + index % 3, seed=100 + index) for index in range(12)]
    target = Target(server.http, name)
    before = target.statistics()
    protocols = ["http", "grpc"]

    def work(index):
        protocol = protocols[index % 2]
        return ask(protocol, address(server, protocol), name, sent[index].numpy())

    answers = at_once(work, len(sent))
    after = counted(target, before["requests"] + len(sent))
    for batch, answer in zip(sent, answers, strict=True):
        assert_right(models[name], batch, answer)
    assert after["images"] - before["images"] == sum(map(len, sent))
    assert after["requests"] - before["requests"] == len(sent)
    assert after["calls"] - before["calls"] < len(sent)


BAD = {
    "another size": (np.zeros((1, 3, SIZE, SIZE + 1), np.float32), "FP32", "unexpected shape for input 'input'"),
    "channels last": (np.zeros((1, SIZE, SIZE, 3), np.float32), "FP32", "unexpected shape for input 'input'"),
    "no batch": (np.zeros((3, SIZE, SIZE), np.float32), "FP32", "unexpected shape for input 'input'"),
    "too many": (np.zeros((MAX_BATCH + 1, 3, SIZE, SIZE), np.float32), "FP32", f"batch-size must be <= {MAX_BATCH}"),
    "none": (np.zeros((0, 3, SIZE, SIZE), np.float32), "FP32", "byte size mismatch for input 'input'"),
    "float64": (np.zeros((1, 3, SIZE, SIZE), np.float64), "FP64", "data-type is 'FP64', but model"),
    "bytes": (np.zeros((1, 3, SIZE, SIZE), np.uint8), "UINT8", "data-type is 'UINT8', but model"),
}


@each_protocol
def test_bad_requests_are_refused_while_good_ones_go_on(server, models, protocol):
    """Each with a reason, and none of them harms those that are answered at the same time."""
    good = [served.images(2, seed=200 + index) for index in range(len(BAD))]
    bad = list(BAD.values())

    def work(index):
        if index % 2:
            return ask(protocol, address(server, protocol), NET, good[index // 2].numpy())
        images, dtype, _ = bad[index // 2]
        return ask(protocol, address(server, protocol), NET, images, dtype)

    answers = at_once(work, 2 * len(bad))
    for batch, answer in zip(good, answers[1::2], strict=True):
        assert_right(models[NET], batch, answer)
    for error, (_, _, said) in zip(answers[::2], bad, strict=True):
        assert isinstance(error, InferenceServerException)
        assert said in str(error)


@each_protocol
def test_unknown_models_are_refused(server, protocol):
    with pytest.raises(InferenceServerException, match="unknown model"):
        ask(protocol, address(server, protocol), "nett", served.images(1).numpy())


def test_what_the_model_itself_refuses(server, models):
    """Where the configuration lets everything through, the model's own error is the answer, to that request alone."""
    good, wrong = served.images(1, seed=9), np.zeros((1, 4, SIZE, SIZE), np.float32)
    answers = at_once(lambda index: ask("http", server.http, NARROW, wrong if index % 2 else good.numpy()), 6)
    for answer in answers[::2]:
        assert_right(models[NARROW], good, answer)
    for error in answers[1::2]:
        assert isinstance(error, InferenceServerException)
        assert f"x has shape [1, 4, {SIZE}, {SIZE}], expected [1, 3, {SIZE}, {SIZE}]" in str(error)


def test_a_batch_that_fails_is_tried_request_by_request(server, models):
    """As where memory is enough for each, not for all: here, with an ONNX file that takes one image at a time."""
    sent = [served.images(1, seed=300 + index) for index in range(6)]
    target = Target(server.http, NARROW)
    before = target.statistics()
    answers = at_once(lambda index: ask("http", server.http, NARROW, sent[index].numpy()), len(sent))
    after = counted(target, before["requests"] + len(sent))
    assert after["calls"] - before["calls"] < len(sent), "no batch was made, so nothing was tried again"
    for batch, answer in zip(sent, answers, strict=True):
        assert_right(models[NARROW], batch, answer)
    with pytest.raises(InferenceServerException, match=r"x has shape \[2, .*\], expected \[1, "):
        ask("http", server.http, NARROW, served.images(2).numpy())


# --- load -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared_memory", [False, True])
@each_protocol
def test_load(server, protocol, shared_memory):
    """What the clients count is what the server counted."""
    scheme = "grpc://" if protocol == "grpc" else ""
    target = Target(f"{scheme}{address(server, protocol)}", NET)
    before = target.statistics()
    level = load_test(target, 4, batch=2, seconds=1.5, warm_up=0.5, shared_memory=shared_memory)
    after = target.statistics()
    times = level.latency_ms
    assert level.failed == 0
    assert 0 < level.requests <= after["requests"] - before["requests"]
    # A client's requests take no longer than the measurement. They do not overlap, so it has no more than one in the
    # time of the fastest.
    assert level.requests * 2 / 1.5 <= level.images_per_second <= 4 * 2 / (times["min"] / 1e3)
    assert 1 < level.images_a_call <= MAX_BATCH
    assert 0 < times["min"] <= times["p50"] <= times["p90"] <= times["p95"] <= times["p99"]
    assert 0 < level.queue_ms + level.compute_ms < times["mean"] + times["p99"]


def test_shared_memory_reaches_the_model(server, models):
    target = Target(server.http, NET)
    sent = served.images(2, seed=11)
    with target.client() as client, target.request(client, sent.numpy(), shared_memory=True) as request:
        assert_right(models[NET], sent, client.infer(NET, [request]).as_numpy("logits"))
        assert len(client.get_system_shared_memory_status()) == 1
    with target.client() as client:
        assert client.get_system_shared_memory_status() == []


def test_load_that_is_refused(server):
    with pytest.raises(RuntimeError, match=r"no request of 9 images was answered .*batch-size must be <= 8"):
        load_test(Target(server.http, NET), 2, batch=MAX_BATCH + 1, seconds=0.3, warm_up=0.1)


def test_targets_that_are_not_there(server):
    with pytest.raises(ConnectionError, match=r"model is 'nett', which the server .* does not have ready"):
        Target(server.http, "nett")
    with pytest.raises(ValueError, match="url is 'ftp://x:1', expected host:port"):
        Target("ftp://x:1", NET)


def test_the_server_outlives_all_this(server, models):
    """Nothing before it harmed a model."""
    assert server.ready()
    sent = served.images(1, seed=12)
    for name in (NARROW, NET, PLAIN):
        assert_right(models[name], sent, ask("http", server.http, name, sent.numpy()))


def test_the_configuration_for_onnx_runtime_lacks_nothing_but_the_backend(server):
    """The server reads and checks all of it before it looks for the backend, which its wheel does not have.

    The last test, since a server that failed to load a model is not ready any more.
    """
    client = PROTOCOLS["http"].InferenceServerClient(server.http)
    with pytest.raises(InferenceServerException, match="unable to find backend library for backend 'onnxruntime'"):
        client.load_model(f"{NET}_onnx")
    client.close()

"""``graphed``, with a CUDA graph that is played on the CPU: its replay writes into the results of the capture."""

import contextlib
import inspect
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import resnet_fast
from resnet_fast import cuda_graph
from resnet_fast.kernels import packing
from resnet_fast.kernels.native import library
from resnet_fast.utils.devices import MissingDeviceError

pytestmark = pytest.mark.skipif(library.unavailable() is not None, reason=str(library.unavailable()))


class FakeCuda(cuda_graph.Cuda):
    """Plays a GPU on the CPU. A replay runs the work again and writes where the capture's results lie."""

    device_type = "cpu"

    def __init__(self) -> None:
        self.captures, self.replays, self.log, self.setting = 0, 0, [], 0

    def missing(self):
        return None

    def settings(self):
        return (self.setting,)

    def capture(self, work, device):
        assert not torch.is_grad_enabled()
        self.captures += 1
        work()
        result = work()

        def replay():
            self.replays += 1
            for old, new in zip(tree_leaves(result), tree_leaves(work())):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)

        return replay, result

    def turns(self, device):
        log = self.log

        class Turns:
            def __enter__(self):
                log.append("enter")

            def __exit__(self, *exception):
                log.append("exit")

            def finish(self):
                log.append("finish")

        return Turns()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 5)
        self.gain = nn.Parameter(torch.ones(5))

    def forward(self, x, weight=None):
        y = torch.relu(self.bn(self.conv(x)))
        y = self.gain * self.fc(y.mean((2, 3)))
        return y if weight is None else {"y": y * weight, "name": "weighted"}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def cuda():
    return FakeCuda()


def images(seed=0):
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_gives_what_the_model_gives(net, cuda):
    run = cuda_graph._graphed(net, images(), True, cuda)
    for seed in range(3):
        with torch.inference_mode():
            torch.testing.assert_close(run(images(seed)), net(images(seed)))
            torch.testing.assert_close(run(x=images(seed)), net(images(seed)))
    assert (cuda.captures, cuda.replays) == (1, 6)
    assert run.model is net


def test_signature_several_arguments_and_results_of_any_kind(net, cuda):
    run = cuda_graph._graphed(net, (images(), torch.ones(5)), True, cuda)
    assert inspect.signature(run) == inspect.signature(net.forward)
    with torch.no_grad():
        for result in (run(images(1), torch.arange(5.0)), run(images(1), weight=torch.arange(5.0))):
            assert result["name"] == "weighted"
            torch.testing.assert_close(result["y"], net(images(1)) * torch.arange(5.0))


def test_results_are_new_tensors_or_the_graphs_own(net, cuda):
    with torch.no_grad():
        run = cuda_graph._graphed(net, images(), True, cuda)
        first = run(images(1))
        kept = first.clone()
        run(images(2))
        assert torch.equal(first, kept)
        own = cuda_graph._graphed(net, images(), False, cuda)
        first = own(images(1))
        torch.testing.assert_close(first, net(images(1)))
        assert own(images(2)) is first
        torch.testing.assert_close(first, net(images(2)))


def test_the_example_is_copied_and_keeps_its_layout(net, cuda):
    example = images().contiguous(memory_format=torch.channels_last)
    run = cuda_graph._graphed(net, example, True, cuda)
    assert run._inputs[0].is_contiguous(memory_format=torch.channels_last)
    assert run._inputs[0].data_ptr() != example.data_ptr()
    with torch.no_grad():
        torch.testing.assert_close(run(images(1)), net(images(1)))  # NCHW
        torch.testing.assert_close(run(images(1).flip(3).flip(3)), net(images(1)))


CHANGES = {
    "a weight, in place": lambda net, cuda: net.conv.weight.mul_(2),
    "a parameter is replaced": lambda net, cuda: setattr(net.fc, "weight", nn.Parameter(torch.ones(5, 8))),
    "load_state_dict": lambda net, cuda: net.load_state_dict({k: v + 1 for k, v in net.state_dict().items()}),
    "data is replaced": lambda net, cuda: setattr(net.fc.bias, "data", torch.zeros(5)),
    "a module is replaced": lambda net, cuda: setattr(net, "bn", nn.Identity()),
    "a running statistic": lambda net, cuda: net.bn.running_mean.add_(1),
    "a hook": lambda net, cuda: net.fc.register_forward_hook(lambda module, args, y: y + 1),
    "a hook on the model": lambda net, cuda: net.register_forward_hook(lambda module, args, y: y + 1),
    "a parameter of the model": lambda net, cuda: net.gain.mul_(3),
    "packs are dropped": lambda net, cuda: packing.clear_all(),
    "a setting": lambda net, cuda: setattr(cuda, "setting", 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_the_kernels_is_captured_again(change, net, cuda):
    run = cuda_graph._graphed(net, images(), True, cuda)
    with torch.no_grad():
        run(images())
        assert cuda.captures == 1
        CHANGES[change](net, cuda)
        cuda.log.clear()
        replays = cuda.replays
        torch.testing.assert_close(run(images(1)), net(images(1)))
        assert cuda.captures == 2
        assert cuda.replays == replays + 2, "the stale graph is started before the model is looked at"
        assert cuda.log == ["enter", "finish", "exit"], "and is over before its memory goes"
        run(images(2))
    assert cuda.captures == 2


def test_packs_live_as_long_as_the_graph(net, cuda):
    cache = packing.PackCache()
    weight = net.fc.weight

    def ask(*_):
        cache.get((weight,), "key", lambda: weight.detach() * 2)

    net.bn.register_forward_hook(ask)
    run = cuda_graph._graphed(net, images(), True, cuda)
    pack = cache.get((weight,), "key", lambda: None)
    assert any(one is pack for one in run._packs)
    assert packing.holders is None


def test_training_mode_is_refused(net, cuda):
    with pytest.raises(RuntimeError, match="training mode"):
        cuda_graph._graphed(net.train(), images(), True, cuda)
    run = cuda_graph._graphed(net.eval(), images(), True, cuda)
    net.train()
    with torch.no_grad(), pytest.raises(RuntimeError, match="training mode"):
        run(images())
    net.eval()
    with torch.no_grad():
        torch.testing.assert_close(run(images()), net(images()))


def test_gradients_are_refused(net, cuda):
    run = cuda_graph._graphed(net, images(), True, cuda)
    with pytest.raises(RuntimeError, match="gradients are enabled"):
        run(images())
    net.requires_grad_(False)
    assert not run(images()).requires_grad
    with pytest.raises(RuntimeError, match="gradients are enabled"):
        run(images().requires_grad_())


BAD = {
    "shape": (lambda: images()[:1], ValueError, r"x has shape \[1, 3, 8, 8\], expected \[2, 3, 8, 8\]"),
    "dtype": (lambda: images().half(), ValueError, "x is torch.float16, expected torch.float32"),
    "device": (lambda: images().to("meta"), ValueError, "x is on meta, expected cpu"),
    "list": (lambda: [1.0], TypeError, "x is a list, expected a tensor"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input(kind, net, cuda):
    run = cuda_graph._graphed(net, images(), True, cuda)
    make, error, said = BAD[kind]
    with torch.no_grad(), pytest.raises(error, match=said):
        run(make())
    assert cuda.replays == 0


def test_bad_arguments(net, cuda):
    run = cuda_graph._graphed(net, images(), True, cuda)
    with torch.no_grad():
        for args, kwargs, said in (
            ((), {}, "x is missing"),
            ((images(), torch.ones(5)), {}, "2 arguments are not expected"),
            ((images(),), {"weight": torch.ones(5)}, "weight is not expected"),
            ((images(),), {"x": images()}, "x is not expected"),
        ):
            with pytest.raises(TypeError, match=said):
                run(*args, **kwargs)


def test_bad_examples(net, cuda):
    with pytest.raises(TypeError, match="model is a str"):
        cuda_graph._graphed("resnet18", images(), True, cuda)
    with pytest.raises(TypeError, match=r"example\[0\] is a list, expected a tensor"):
        cuda_graph._graphed(net, [[1]], True, cuda)
    with pytest.raises(TypeError, match="example is empty"):
        cuda_graph._graphed(net, (), True, cuda)
    with pytest.raises(TypeError, match="example is a dict, expected a tensor"):
        cuda_graph._graphed(net, {}, True, cuda)
    with pytest.raises(ValueError, match="expected one device"):
        cuda_graph._graphed(net, (images(), torch.ones(5, device="meta")), True, cuda)
    with pytest.raises(ValueError, match="x of example is on meta, expected a GPU"):
        cuda_graph._graphed(net, images().to("meta"), True, cuda)
    with torch.inference_mode():
        other = Net().eval()
    with pytest.raises(ValueError, match="inference_mode"):
        cuda_graph._graphed(other, images(), True, cuda)


def test_made_in_inference_mode_and_called_outside(net, cuda):
    with torch.inference_mode():
        run = cuda_graph._graphed(net, images(), True, cuda)
        run(images(1))
    with torch.no_grad():
        y = run(images(2))
    assert not y.is_inference()


def test_a_failed_capture_says_so_and_the_next_call_tries_again(net, cuda):
    run = cuda_graph._graphed(net, images(), True, cuda)
    capture = cuda.capture

    def fail(work, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    cuda.capture = fail
    with torch.no_grad():
        net.conv.weight.mul_(2)
        with pytest.raises(RuntimeError, match="model cannot be captured as a CUDA graph: operation not permitted"):
            run(images())
        cuda.capture = capture
        torch.testing.assert_close(run(images()), net(images()))


def test_several_threads(net, cuda):
    run = cuda_graph._graphed(net, images(), True, cuda)
    with torch.no_grad():
        expected = [net(images(seed)) for seed in range(8)]
    results = [None] * 8

    def work(seed):
        with torch.inference_mode():
            for _ in range(5):
                results[seed] = run(images(seed)).clone()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result, one in zip(results, expected):
        torch.testing.assert_close(result, one)


def test_an_accelerated_model(cuda):
    torch.manual_seed(0)
    model = resnet_fast.resnet18(num_classes=7).eval()
    x = torch.randn(2, 3, 32, 32)
    run = resnet_fast.cuda_graph._graphed(model, x, True, cuda)
    with torch.inference_mode():
        torch.testing.assert_close(run(x + 1), model(x + 1))
    assert cuda.captures == 1


class Switched(Net):
    config = SimpleNamespace(gain=1.0)

    def forward(self, x):
        return super().forward(x * self.config.gain)


def test_what_an_accelerated_forward_read_counts(cuda, monkeypatch):
    torch.manual_seed(0)
    model = resnet_fast.accelerate(Switched().eval())
    run = cuda_graph._graphed(model, images(), True, cuda)
    with torch.no_grad():
        run(images())
        assert run._valid()
        monkeypatch.setattr(Switched.config, "gain", 2.0)
        assert not run._valid()  # a replay here runs the model, which would show it as well; a GPU's does not
        torch.testing.assert_close(run(images()), model(images()))
        assert cuda.captures == 2
        run(images())
    assert cuda.captures == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(net):
    with pytest.raises(MissingDeviceError, match=r"graphed\(\) needs a GPU"):
        resnet_fast.graphed(net, images())


def test_turns_wait_for_each_other_across_streams(monkeypatch):
    log = []

    class Event:
        def record(self, stream):
            log.append(f"{stream} records")

    class Stream(str):
        def wait_event(self, event):
            log.append(f"{self} waits")

        def synchronize(self):
            log.append(f"host waits for {self}")

    current = [Stream("a")]
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[0])
    turns = cuda_graph.Turns(torch.device("cuda", 0))
    turns.finish()
    for name in "aab":
        current[0] = Stream(name)
        with turns:
            log.append(f"{name} works")
            if name == "b":
                turns.finish()
    assert log == [
        *["a works", "a records", "a works", "a records"],
        *["b waits", "b works", "host waits for b", "b records"],
    ]


def test_what_other_threads_do_breaks_no_capture(monkeypatch):
    captures = []

    class Stream:
        def wait_stream(self, other):
            pass

    def capture(graph, **options):
        captures.append(options)
        return contextlib.nullcontext()

    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda given: contextlib.nullcontext())
    for name in ("current_stream", "Stream"):
        monkeypatch.setattr(torch.cuda, name, Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay="replay"))
    monkeypatch.setattr(torch.cuda, "graph", capture)
    assert cuda_graph.Cuda().capture(lambda: "result", torch.device("cuda", 0)) == ("replay", "result")
    assert [options["capture_error_mode"] for options in captures] == ["thread_local"]

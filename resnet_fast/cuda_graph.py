"""``graphed(model, example)``: inference at one input shape as a CUDA graph, which starts all kernels by one call."""

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from resnet_fast.graph.conditions import STATE
from resnet_fast.graph.guard import Guard
from resnet_fast.kernels import packing
from resnet_fast.kernels.triton.tuning import planner
from resnet_fast.utils import compat
from resnet_fast.utils.devices import MissingDeviceError, gpu_missing
from resnet_fast.utils.modules import check_module

_WARM_UP_CALLS = 3  # the first compiles and packs, the second launches what was prepared


class Cuda:
    """What a graph needs of PyTorch's interface to a GPU."""

    device_type = "cuda"

    def missing(self) -> Optional[str]:
        """Why there is no GPU, or None."""
        return gpu_missing()

    def capture(self, work: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
        """Run ``work`` to warm up, then capture it; gives the replay, and the result, which every replay overwrites."""
        with torch.cuda.device(device), _without_autocast_cache():
            current, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP_CALLS):
                    work()
            graph = torch.cuda.CUDAGraph()
            # By default, what other threads do meanwhile, as a loader that allocates, would break the capture.
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                result = work()
            current.wait_stream(side)
        return graph.replay, result

    def turns(self, device: torch.device) -> "Turns":
        return Turns(device)

    def settings(self) -> tuple:
        """What decides which kernels a model launches, beside the model."""
        return (
            torch.is_autocast_enabled("cuda"),
            torch.get_autocast_dtype("cuda"),
            torch.backends.cudnn.enabled,
            compat.convolutions_in_tf32(),
            compat.products_in_tf32(),
            planner.version,
        )


@contextlib.contextmanager
def _without_autocast_cache() -> Iterator[None]:
    """Autocast frees what it has cast when it ends, and a graph would go on reading it."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


class Turns:
    """Lets users of the same buffers wait for each other, on whichever streams they are."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._done = device, torch.cuda.Event()
        self._stream: Any = None

    def __enter__(self) -> None:
        stream = torch.cuda.current_stream(self._device)
        if self._stream is not None and stream != self._stream:
            stream.wait_event(self._done)
        self._stream = stream

    def __exit__(self, *exception: object) -> None:
        self._done.record(self._stream)

    def finish(self) -> None:
        """Wait until the work of this turn, and so of all before it, is over."""
        if self._stream is not None:
            self._stream.synchronize()


class Graphed:
    """A model at one input shape as a CUDA graph. ``graphed`` makes it, and says what it does."""

    def __init__(self, model: nn.Module, examples: tuple[Tensor, ...], copy_outputs: bool, cuda: Cuda) -> None:
        self.model = model
        self._guarded = nn.ModuleList([model])  # a guard looks at what is below its module
        self.__signature__ = inspect.signature(model.forward)
        self._copy_outputs, self._cuda, self._lock = copy_outputs, cuda, threading.Lock()
        self._names = _names(self.__signature__, len(examples))
        for name, example in zip(self._names, examples):
            _check_example(name, example, cuda)
        self._device = examples[0].device
        with torch.inference_mode(False), torch.no_grad():
            # Tensors of our own, at fixed addresses and in the layout of the examples.
            self._inputs = [torch.empty_like(one).copy_(one) for one in examples]
        self._turns = cuda.turns(self._device)
        self._guard: Optional[Guard] = None
        self._replay: Optional[Callable[[], None]] = None
        self._leaves: list[Any] = []
        self._capture()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs = self._ordered(args, kwargs)
        for name, given, own in zip(self._names, inputs, self._inputs):
            _check_input(name, given, own)
        if torch.is_grad_enabled():
            self._refuse_gradients(inputs)
        with self._lock, torch.no_grad(), self._turns:
            self._start(inputs)  # before the model is looked at: the GPU works meanwhile
            if not self._valid():
                self._capture()
                self._start(inputs)
            leaves = self._leaves
            if self._copy_outputs:
                leaves = [one.clone() if isinstance(one, Tensor) else one for one in leaves]
            return tree_unflatten(leaves, self._structure)

    def _start(self, inputs: tuple[Tensor, ...]) -> None:
        if self._replay is not None:
            for given, own in zip(inputs, self._inputs):
                own.copy_(given)
            self._replay()

    def _valid(self) -> bool:
        """Whether the graph is still what the model would do."""
        return (
            self._guard is not None
            and self._settings == self._cuda.settings()
            and self._guard.holds(self._guarded)
            and all(reads.others_hold(module) for module, reads in self._reads)
        )

    def _capture(self) -> None:
        model = self.model
        self._guard = None  # until it has worked
        if model.training:
            raise RuntimeError("model is in training mode, expected eval mode: its CUDA graph is for inference")
        tensors = chain(model.parameters(), model.buffers())
        if any(t.is_inference() for t in tensors):
            raise ValueError("model has tensors made under torch.inference_mode, which do not tell when they change")
        self._turns.finish()  # before the memory of the last graph goes
        self._replay, self._leaves = None, []
        with torch.inference_mode(False), torch.no_grad(), packing.held() as packs:
            try:
                self._replay, result = self._cuda.capture(lambda: model(*self._inputs), self._device)
            except RuntimeError as error:
                raise RuntimeError(f"model cannot be captured as a CUDA graph: {error}") from error
        self._packs = list({id(pack): pack for pack in packs}.values())  # whose addresses are in the graph
        # A stale graph may still be started once, and reads the parameters that it was captured with.
        self._memory = [t.untyped_storage() for t in chain(model.parameters(), model.buffers())]
        self._leaves, self._structure = tree_flatten(result)
        states = [(module, module.__dict__.get(STATE)) for module in model.modules()]
        self._reads = [(module, state.eval.reads) for module, state in states if state is not None]
        self._settings, self._guard = self._cuda.settings(), Guard(self._guarded)

    def _ordered(self, args: tuple, kwargs: dict[str, Any]) -> tuple:
        for name in self._names[len(args) :]:
            if name not in kwargs:
                raise TypeError(f"{name} is missing, expected the arguments of the example: {', '.join(self._names)}")
        unknown = [name for name in kwargs if name not in self._names[len(args) :]]
        if unknown or len(args) > len(self._names):
            what = f"{unknown[0]} is not" if unknown else f"{len(args)} arguments are not"
            raise TypeError(f"{what} expected: the example had {', '.join(self._names)}")
        return (*args, *(kwargs[name] for name in self._names[len(args) :]))

    def _refuse_gradients(self, inputs: tuple[Tensor, ...]) -> None:
        if any(t.requires_grad for t in chain(inputs, self.model.parameters())):
            raise RuntimeError(
                "gradients are enabled and would be wanted, and a CUDA graph gives none: call it under "
                "torch.inference_mode() or torch.no_grad()"
            )


def graphed(model: nn.Module, example: Union[Tensor, tuple[Tensor, ...]], *, copy_outputs: bool = True) -> Graphed:
    """Capture ``model`` at the shape of ``example`` as a CUDA graph; calls of the result replay it.

    For inference in eval mode, without control flow that depends on values. One call starts all kernels, so no time
    goes into Python between them; that is what counts with few images. The graph runs on the stream that is current in
    the call. When parameters, buffers, hooks or other attributes of the model have changed (by version and address:
    what docs/limits.md says it cannot see goes unnoticed here as well), or settings such as autocast, the next
    call captures again, which waits for the GPU. So it does when anything else has changed that the forward of an
    accelerated model read; of a stock model that goes unnoticed.

    Args:
        model: on a GPU, in eval mode; best accelerated. It is not changed, and stays usable by itself.
        example: its positional arguments, tensors on one GPU. They are copied.
        copy_outputs: whether results are new tensors, as a model's are. False gives the graph's own, which the next
            call overwrites, as ``torch.cuda.make_graphed_callables`` does; that saves copying large feature maps.

    Returns:
        A callable with the signature of ``model``, for tensors of the shapes, dtypes and device of ``example``, in any
        layout. It has ``model`` as an attribute, and may be called from several threads.

    Raises:
        MissingDeviceError: there is no GPU.
        TypeError: ``model`` is no module, or ``example`` has no tensors.
        ValueError: an example is not on a GPU, or not all are on the same.
        RuntimeError: the model is in training mode, or cannot be captured.
        The result raises TypeError and ValueError for other arguments, and RuntimeError in training mode, or where
        gradients are enabled and something requires them.
    """
    return _graphed(model, example, copy_outputs, Cuda())


def _graphed(model: nn.Module, example: Any, copy_outputs: bool, cuda: Cuda) -> Graphed:
    check_module(model)
    examples = tuple(example) if isinstance(example, (tuple, list)) else (example,)
    for i, one in enumerate(examples):
        if not isinstance(one, Tensor):
            where = f"example[{i}]" if isinstance(example, (tuple, list)) else "example"
            raise TypeError(f"{where} is a {type(one).__name__}, expected a tensor")
    if not examples:
        raise TypeError("example is empty, expected the arguments of model")
    reason = cuda.missing()
    if reason is not None:
        raise MissingDeviceError(f"graphed() needs a GPU: {reason}")
    devices = {one.device for one in examples}
    if len(devices) > 1:
        raise ValueError(f"example is on {' and '.join(sorted(map(str, devices)))}, expected one device")
    return Graphed(model, examples, copy_outputs, cuda)


def _names(signature: inspect.Signature, count: int) -> list[str]:
    """Of the first positional arguments."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [name for name, parameter in signature.parameters.items() if parameter.kind in kinds]
    return (names + [f"argument {i}" for i in range(len(names), count)])[:count]


def _check_example(name: str, example: Tensor, cuda: Cuda) -> None:
    if example.device.type != cuda.device_type:
        raise ValueError(f"{name} of example is on {example.device}, expected a GPU")


def _check_input(name: str, given: Any, own: Tensor) -> None:
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} is a {type(given).__name__}, expected a tensor")
    for what, value, expected in (
        ("has shape", list(given.shape), list(own.shape)),
        ("is", given.dtype, own.dtype),
        ("is on", given.device, own.device),
    ):
        if value != expected:
            raise ValueError(f"{name} {what} {value}, expected {expected}: the graph was captured for that")

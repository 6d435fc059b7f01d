"""Requests to a server from several clients at once, and how long they take.

In a closed loop: each client sends its next request when the last one is answered, so the concurrency is the number of
requests that the server has at any time.
"""

import contextlib
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Optional

import numpy as np

from resnet_fast.utils.optional import require

PERCENTILES = (50, 90, 95, 99)

_TIMEOUT = 300.0  # seconds that one request may take
_RELEASE = 10.0  # seconds after its answer


@dataclass(frozen=True)
class Level:
    """What was measured at one concurrency.

    Attributes:
        concurrency: clients, each with one request under way.
        batch: images a request.
        seconds: of the measurement.
        requests: answered in that time.
        failed: refused in that time, or not answered.
        reason: of the first that failed.
        images_per_second: of those answered, summed over the clients: each one's from the start of its first request
            in that time to the end of its last one, so that a request cut off by the clock counts neither way.
        latency_ms: of those answered, from the client's call to its return: "mean", "min", "p50", "p90", "p95", "p99".
        images_a_call: images in a call of the model, by the server's own count; more than ``batch`` where it made
            batches of several requests.
        queue_ms, compute_ms: of a request in the server, waiting for a batch and an instance, and in the model.
    """

    concurrency: int
    batch: int
    seconds: float
    requests: int
    failed: int
    reason: str
    images_per_second: float
    latency_ms: dict[str, float]
    images_a_call: Optional[float]
    queue_ms: Optional[float]
    compute_ms: Optional[float]


class Target:
    """A model on a server, and what it wants to be sent."""

    def __init__(self, url: str, model: str, *, size: int = 224) -> None:
        """Ask the server for the model's metadata.

        Args:
            url: ``host:port`` or ``http://host:port`` for HTTP, ``grpc://host:port`` for gRPC.
            model: its name in the repository.
            size: height and width of the images, where the model takes any.

        Raises:
            ValueError: ``url`` is neither.
            ConnectionError: no server answers there, or it has no such model ready.
            MissingPackageError: tritonclient is not installed.
        """
        scheme, _, address = url.rpartition("://")
        if scheme not in ("", "http", "grpc") or ":" not in address:
            raise ValueError(f"url is {url!r}, expected host:port, http://host:port or grpc://host:port")
        self.url, self.model = url, model
        self.protocol = scheme or "http"
        self._address = address
        self._client: ModuleType = require(f"tritonclient.{self.protocol}", "asking a server")
        self._utils: ModuleType = require("tritonclient.utils", "asking a server")
        self._options = {"as_json": True} if self.protocol == "grpc" else {}
        with self.client() as client:
            try:
                if not client.is_model_ready(model):
                    raise ConnectionError(f"model is {model!r}, which the server at {url} does not have ready")
                metadata = client.get_model_metadata(model, **self._options)
            except (OSError, self._utils.InferenceServerException) as error:
                if isinstance(error, ConnectionError) and model in str(error):
                    raise
                raise ConnectionError(f"url is {url!r}, where no server answers: {error}") from error
        if len(metadata["inputs"]) != 1:
            raise ValueError(f"model is {model!r} with {len(metadata['inputs'])} inputs, expected one")
        wanted = metadata["inputs"][0]
        self.input, self.dtype = wanted["name"], wanted["datatype"]
        extents = [int(extent) for extent in wanted["shape"]][1:]
        self.dims = tuple(size if extent == -1 else extent for extent in extents)

    @contextlib.contextmanager
    def client(self) -> Iterator[Any]:
        """A client of this thread."""
        timeouts = {"connection_timeout": _TIMEOUT, "network_timeout": _TIMEOUT} if self.protocol == "http" else {}
        client = self._client.InferenceServerClient(self._address, **timeouts)
        try:
            yield client
        finally:
            client.close()

    def images(self, batch: int, seed: int) -> np.ndarray:
        """Random ones: normal noise, or bytes."""
        generator = np.random.default_rng(seed)
        dtype = self._utils.triton_to_np_dtype(self.dtype)
        if np.issubdtype(dtype, np.integer):
            return generator.integers(0, 256, (batch, *self.dims)).astype(dtype)
        return generator.standard_normal((batch, *self.dims), np.float32).astype(dtype)

    @contextlib.contextmanager
    def request(self, client: Any, images: np.ndarray, *, shared_memory: bool) -> Iterator[Any]:
        """The input for ``client.infer``, its images sent along or, with ``shared_memory``, lying there already."""
        request = self._client.InferInput(self.input, list(images.shape), self.dtype)
        if not shared_memory:
            request.set_data_from_numpy(images)
            yield request
            return
        shared = require("tritonclient.utils.shared_memory", "asking a server")
        name = f"resnet_fast_{secrets.token_hex(6)}"
        region = shared.create_shared_memory_region(name, f"/{name}", images.nbytes)
        try:
            shared.set_shared_memory_region(region, [images])
            client.register_system_shared_memory(name, f"/{name}", images.nbytes)
            request.set_shared_memory(name, images.nbytes)
            yield request
            self._unregister(client, name)
        finally:
            shared.destroy_shared_memory_region(region)

    def _unregister(self, client: Any, name: str) -> None:
        end = time.monotonic() + _RELEASE
        while True:
            try:
                return client.unregister_system_shared_memory(name)
            except self._utils.InferenceServerException as error:
                # The server answers a request before it lets go of the memory.
                if "in use" not in str(error) or time.monotonic() > end:
                    raise
            time.sleep(0.01)

    def statistics(self) -> dict[str, int]:
        """The server's counts for this model since it was loaded: images, calls, and nanoseconds of requests."""
        with self.client() as client:
            versions = client.get_inference_statistics(self.model, **self._options)["model_stats"]
        counts = {"images": 0, "calls": 0, "requests": 0, "queue": 0, "compute": 0}
        for version in versions:
            times = version.get("inference_stats", {})
            counts["images"] += int(version.get("inference_count", 0))
            counts["calls"] += int(version.get("execution_count", 0))
            counts["requests"] += int(times.get("success", {}).get("count", 0))
            counts["queue"] += int(times.get("queue", {}).get("ns", 0))
            counts["compute"] += sum(
                int(times.get(part, {}).get("ns", 0)) for part in ("compute_input", "compute_infer", "compute_output")
            )
        return counts


def load_test(
    target: Target,
    concurrency: int,
    *,
    batch: int = 1,
    seconds: float = 5.0,
    warm_up: float = 1.0,
    shared_memory: bool = False,
    seed: int = 0,
) -> Level:
    """Send requests from ``concurrency`` threads for ``warm_up`` seconds, and for ``seconds`` that are measured.

    Only requests that begin and end in that time count.

    Args:
        batch: images a request.
        shared_memory: put the images into memory that the server reads too, which must be on this machine.
        seed: of the images, which are others for every thread.

    Raises:
        RuntimeError: no request was answered in the time; the message has the first reason.
    """
    before = target.statistics()
    barrier = threading.Barrier(concurrency + 1)
    clients = [_Client(target, batch, seed + index, shared_memory, barrier) for index in range(concurrency)]
    for client in clients:
        client.start()
    with contextlib.suppress(threading.BrokenBarrierError):  # then a client failed, and says why below
        barrier.wait(_TIMEOUT)
    start = time.perf_counter() + warm_up
    for client in clients:
        client.end = start + seconds
    for client in clients:
        client.join()
    after = target.statistics()
    whole = [client.whole(start, start + seconds) for client in clients]
    done = [sample for samples in whole for sample in samples]
    latencies = np.array([sample.seconds * 1e3 for sample in done if not sample.reason])
    reasons = [client.error for client in clients if client.error] + [one.reason for one in done if one.reason]
    if not len(latencies):
        raise RuntimeError(
            f"no request of {batch} images was answered within {seconds:g} s"
            + (f": {reasons[0]}" if reasons else ", expected at least one: --seconds gives more time")
        )
    calls, requests = after["calls"] - before["calls"], after["requests"] - before["requests"]
    return Level(
        concurrency=concurrency,
        batch=batch,
        seconds=seconds,
        requests=len(latencies),
        failed=len(reasons),
        reason=reasons[0] if reasons else "",
        images_per_second=batch * sum(map(_rate, whole)),
        latency_ms={
            "mean": float(latencies.mean()),
            "min": float(latencies.min()),
            **{f"p{part}": float(np.percentile(latencies, part)) for part in PERCENTILES},
        },
        images_a_call=(after["images"] - before["images"]) / calls if calls else None,
        queue_ms=(after["queue"] - before["queue"]) / requests / 1e6 if requests else None,
        compute_ms=(after["compute"] - before["compute"]) / requests / 1e6 if requests else None,
    )


@dataclass(frozen=True)
class _Sample:
    begun: float
    seconds: float
    reason: str

    @property
    def ended(self) -> float:
        return self.begun + self.seconds


def _rate(samples: Sequence[_Sample]) -> float:
    """Answers a second in one client's ``samples``."""
    answered = sum(not sample.reason for sample in samples)
    return answered / (samples[-1].ended - samples[0].begun) if answered else 0.0


class _Client(threading.Thread):
    """A client that sends one request after the other until ``end``."""

    def __init__(self, target: Target, batch: int, seed: int, shared_memory: bool, barrier: threading.Barrier) -> None:
        super().__init__(daemon=True)
        self._target, self._images, self._shared_memory = target, target.images(batch, seed), shared_memory
        self._barrier = barrier
        self.end = float("inf")
        self.samples: list[_Sample] = []
        self.error = ""

    def whole(self, start: float, end: float) -> list[_Sample]:
        """The requests that began and ended between ``start`` and ``end``."""
        return [sample for sample in self.samples if start <= sample.begun and sample.ended <= end]

    def run(self) -> None:
        try:
            with (
                self._target.client() as client,
                self._target.request(client, self._images, shared_memory=self._shared_memory) as request,
            ):
                self._barrier.wait(_TIMEOUT)
                while (begun := time.perf_counter()) < self.end:
                    reason = ""
                    try:
                        client.infer(self._target.model, [request])
                    except Exception as error:  # whatever it is, it is counted
                        reason = str(error) or type(error).__name__
                        time.sleep(0.01)  # a server that is gone refuses at once
                    self.samples.append(_Sample(begun, time.perf_counter() - begun, reason))
        except threading.BrokenBarrierError:
            return  # another client failed
        except Exception as error:
            self.error = str(error) or type(error).__name__
            self._barrier.abort()


def levels_as_rows(levels: Sequence[Level]) -> list[list[str]]:
    """For a table: concurrency, images a second, latencies, and what the server counted."""
    return [
        [
            str(level.concurrency),
            f"{level.images_per_second:.1f}",
            *(f"{level.latency_ms[name]:.1f}" for name in ("mean", *(f"p{part}" for part in PERCENTILES))),
            *(
                "" if value is None else f"{value:.1f}"
                for value in (level.images_a_call, level.queue_ms, level.compute_ms)
            ),
            str(level.failed or ""),
        ]
        for level in levels
    ]

"""The cache of packed weights: found again while its sources live unchanged, never a moment longer."""

import copy
import gc
import pickle
import sys
import threading
import weakref

import pytest
import torch
from torch import nn

from resnet_fast.kernels import packing
from resnet_fast.kernels.packing import PackCache

SIZE = 4096
HIDDEN = (0, slice(100, 200))
"""Elements of a tensor ``[2, SIZE]`` that are not compared: a test of versions must not rely on contents."""


class Counted:
    """A cache, and how often it had to make something."""

    def __init__(self) -> None:
        self.cache = PackCache()
        self.made = 0

    def __call__(self, *sources: torch.Tensor, key: object = "key") -> torch.Tensor:
        def make() -> torch.Tensor:
            self.made += 1
            return torch.stack([source.detach().float().sum() for source in sources]).sum()

        return self.cache.get(sources, key, make)


@pytest.fixture
def counted() -> Counted:
    return Counted()


def _sources(count: int = 3) -> list[torch.Tensor]:
    return [torch.randn(2, SIZE) for _ in range(count)]


def test_made_once(counted):
    sources = _sources()
    first = counted(*sources)
    assert all(counted(*sources) is first for _ in range(3))
    assert counted.made == 1


def test_each_key_is_made_once(counted):
    sources = _sources()
    a, b = counted(*sources, key="a"), counted(*sources, key="b")
    assert a is not b
    assert counted(*sources, key="a") is a
    assert counted(*sources, key="b") is b
    assert counted.made == 2


@pytest.mark.parametrize("changed", range(3))
def test_a_write_to_any_source_is_seen(changed, counted):
    """All keys go, whichever source was written, however far from its first bytes."""
    sources = _sources()
    counted(*sources, key="a"), counted(*sources, key="b")
    sources[changed][HIDDEN].add_(1)
    expected = torch.stack([source.sum() for source in sources]).sum()
    assert torch.equal(counted(*sources, key="a"), expected)
    assert torch.equal(counted(*sources, key="b"), expected)
    assert counted.made == 4


@pytest.mark.parametrize("replaced", range(3))
def test_identity_counts_not_equality(replaced, counted):
    """An equal tensor in the place of a source is another source: it may change on its own."""
    sources = _sources()
    counted(*sources)
    others = list(sources)
    others[replaced] = sources[replaced].clone()
    counted(*others)
    assert counted.made == 2
    others[replaced][HIDDEN] += 1
    assert torch.equal(counted(*others), torch.stack([source.sum() for source in others]).sum())


def test_the_contents_of_vectors_count(counted):
    """Whoever holds them: equal ones are the same, whatever their strides; one that differs anywhere is another."""
    weight, vector = _sources(2)

    def get(vector: torch.Tensor) -> torch.Tensor:
        return counted.cache.get((weight,), "key", lambda: vector.sum(), (vector,))

    first = get(vector)
    with torch.inference_mode():
        assert get(vector.clone()) is first
    assert get(torch.stack([vector, vector], 1)[:, 0]) is first
    vector[-1] += 1
    assert get(vector) is not first
    assert torch.equal(get(vector.clone()), vector.sum())


def test_order_and_number_of_sources_count(counted):
    a, b, c = _sources()
    counted(a, b, c)
    counted(a, c, b)
    assert counted.made == 2
    assert torch.equal(counted(a, b), torch.stack([a.sum(), b.sum()]).sum())
    assert torch.equal(counted(a), torch.stack([a.sum()]).sum())


def test_a_view_of_the_same_elements_is_the_same_source(counted):
    """A write through either is seen by both."""
    source = torch.randn(2, SIZE)
    before = counted(source)
    assert counted(source.detach()) is before
    source[:][HIDDEN] = 0
    assert torch.equal(counted(source.detach()), source.sum())
    assert counted.made == 2


def test_replaced_data_is_seen(counted):
    """``p.data = new`` keeps the object and its version; the address changes."""
    parameter = nn.Parameter(torch.zeros(2 * SIZE))
    counted(parameter)
    version, old = parameter._version, parameter.data  # the old memory stays as it was, and could be compared in vain
    new = torch.zeros(2 * SIZE)
    new[-1] = 1
    parameter.data = new
    assert parameter._version == version, "PyTorch now counts this: simplify the cache"
    assert counted(parameter) == 1
    parameter.data = old
    assert counted(parameter) == 0


def test_views_of_one_memory_are_different_sources(counted):
    """Same address, same version, same first bytes: yet another tensor, with other values."""
    memory = torch.ones(2 * SIZE)
    first, short, spread = torch.zeros(1), memory[:SIZE], memory[:1].expand(3)
    assert counted(first, memory) == 2 * SIZE
    assert counted(first, short) == SIZE
    assert counted(first, spread) == 3
    assert counted(short, memory) == 3 * SIZE
    assert counted(short, short) == 2 * SIZE
    square = torch.randn(2, 2)
    assert counted.cache.get((square,), "key", lambda: "as it is") != counted.cache.get(
        (square.t(),), "key", lambda: "transposed"
    )


def test_deepcopy_and_pickle_start_afresh(counted):
    """A copy of a parameter shares nothing with the original's packs, and carries none."""
    parameter = nn.Parameter(torch.randn(2, SIZE))
    before = counted(parameter)
    for twin in (copy.deepcopy(parameter), pickle.loads(pickle.dumps(parameter))):
        with torch.no_grad():
            twin[HIDDEN] += 1
        assert torch.equal(counted(twin), torch.stack([twin.sum()]).sum())
        assert counted(parameter) is before


@pytest.mark.parametrize("dying", range(3))
def test_entries_go_with_their_first_source(dying, counted):
    """No pack outlives the weight it was made from; one that misses another source is not used again."""
    sources = _sources()
    pack = weakref.ref(counted(*sources))
    keeper = sources[0]
    del sources[dying]
    gc.collect()
    if dying == 0:
        del keeper
        gc.collect()
        assert pack() is None
    else:
        counted(keeper, *_sources(2))
        gc.collect()
        assert counted.made == 2
        assert pack() is None


def test_an_address_used_again_is_no_hit(counted):
    """Tensors die and others take their place, their address and their version: never their packs."""
    for i in range(200):
        tensor = torch.zeros(2 * SIZE)
        tensor[-1] = i
        assert counted(tensor) == i
        del tensor
    assert counted.made == 200


def test_the_number_of_packs_is_bounded(counted):
    """A detector sees a thousand image sizes: the oldest packs go, those in use stay right."""
    source = torch.randn(2 * SIZE)
    packs = [weakref.ref(counted(source, key=size)) for size in range(1000)]
    gc.collect()
    alive = [size for size, pack in enumerate(packs) if pack() is not None]
    assert 1 < len(alive) <= 16
    assert alive == list(range(1000 - len(alive), 1000))
    made = counted.made
    counted(source, key=999)
    assert counted.made == made


def test_inference_tensors_are_never_cached(counted):
    """They carry no version, so a write could not be seen."""
    with torch.inference_mode():
        inferred = torch.ones(2 * SIZE)
    plain = torch.ones(2 * SIZE)
    for sources in ((inferred,), (plain, inferred), (inferred, plain)):
        before = counted.made
        counted(*sources)
        counted(*sources)
        assert counted.made == before + 2
    with torch.inference_mode():
        inferred[SIZE:] = 2
        assert counted(inferred) == 3 * SIZE


def test_packs_made_under_inference_mode_serve_autograd(counted):
    """Whatever the mode of the first call, the pack is an ordinary tensor that autograd may save, without history."""
    source = nn.Parameter(torch.randn(2 * SIZE))
    with torch.inference_mode():
        pack = counted.cache.get((source,), "key", lambda: source * 2)
    assert not pack.is_inference()
    assert not pack.requires_grad
    x = torch.ones(2 * SIZE, requires_grad=True)
    (x * counted.cache.get((source,), "key", lambda: source * 2)).sum().backward()
    assert torch.equal(x.grad, source.detach() * 2)


def test_strided_and_empty_tensors(counted):
    """The probe reads no byte that is not the tensor's: views at the very end of a buffer, no elements, no stride."""
    buffer = torch.arange(8.0)
    views = [buffer[7:], buffer[8:], buffer[6:].view(2, 1), buffer[::7], buffer[7:].expand(1000), torch.empty(0, 3)]
    views += [torch.empty(3, 0), torch.empty(()), torch.ones(4, 4).t(), torch.ones(2, 3, 4, 5)[:, 1:2, 2:, 3:]]
    for view in views:
        first = counted(view)
        assert counted(view) is first
    assert counted.made == len(views)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.bool])
def test_any_dtype(dtype, counted):
    source = torch.ones(2 * SIZE).to(dtype)
    counted(source)
    source[-1] = 0
    assert counted(source) == 2 * SIZE - 1
    assert counted.made == 2


def test_a_failed_make_leaves_nothing_behind(counted):
    source = torch.randn(2 * SIZE)

    def fails():
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        counted.cache.get((source,), "key", fails)
    assert torch.equal(counted(source), torch.stack([source.sum()]).sum())


def test_clear_and_clear_all():
    """``clear_all`` reaches every cache, for writes that nothing can see; caches themselves may die."""
    caches = [Counted(), Counted()]
    source = torch.zeros(2, SIZE)
    for counted in caches:
        counted(source)
    source.data[HIDDEN][0] = 1
    assert [counted(source).item() for counted in caches] == [0, 0], "seen now: clear_all may go"
    caches[0].cache.clear()
    assert [counted(source).item() for counted in caches] == [1, 0]
    packing.clear_all()
    assert [counted(source).item() for counted in caches] == [1, 1]
    dead = weakref.ref(caches.pop().cache)
    del counted
    gc.collect()
    assert dead() is None


@pytest.fixture
def quick_switches():
    """Threads give way to each other after every few bytecodes."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def _in_threads(work, count: int = 6) -> None:
    errors = []
    start = threading.Barrier(count)

    def run(number: int) -> None:
        start.wait()
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.usefixtures("quick_switches")
def test_threads_share_a_weight():
    """A server's threads run one model, each with image sizes of its own."""
    cache, source = PackCache(), torch.full((2 * SIZE,), 2.0)

    def work(number: int) -> None:
        for i in range(400):
            key = (number, i % 3)
            assert cache.get((source,), key, lambda key=key: (key, source.sum().item())) == (key, 4.0 * SIZE)

    _in_threads(work)


@pytest.mark.usefixtures("quick_switches")
def test_threads_make_and_drop_weights():
    """Entries come and go in all threads while others are looked up and all are forgotten."""
    cache = PackCache()

    def work(number: int) -> None:
        for i in range(200):
            source = torch.full((2 * SIZE,), float(number * 1000 + i))
            assert cache.get((source,), 0, lambda source=source: source[-1].item()) == number * 1000 + i
            if i % 50 == 0:
                packing.clear_all()

    _in_threads(work)


class _Interrupted:
    """A key that lets another thread in, so to speak, just before it is looked up for the ``nth`` time."""

    def __init__(self, nth: int, other_thread) -> None:
        self.left, self.other_thread = nth, other_thread

    def __hash__(self) -> int:
        self.left -= 1
        if self.left == 0:
            self.other_thread()
        return 1


@pytest.mark.parametrize("nth", range(1, 5))
def test_a_pack_dropped_by_another_thread_is_still_returned(nth):
    """Between making or finding a pack and returning it, another thread may push it out with packs of its own."""
    cache, source = PackCache(), torch.zeros(2 * SIZE)

    def other_thread() -> None:
        for i in range(8):
            cache.get((source,), i, lambda: "other")

    for _ in range(2):
        assert cache.get((source,), _Interrupted(nth, other_thread), lambda: "mine") == "mine"
        key = _Interrupted(10**9, other_thread)
        cache.get((source,), key, lambda: "mine")
        key.left = nth
        assert cache.get((source,), key, lambda: "mine") == "mine"

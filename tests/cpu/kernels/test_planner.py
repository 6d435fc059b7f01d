"""The planner on a GPU that is not there: what it may choose, what is kept, and what is measured, by a fake clock."""

import contextlib
import itertools
import json
import warnings
from types import SimpleNamespace

import pytest
import torch

from resnet_fast.kernels import streams
from resnet_fast.kernels.reference import inference as reference
from resnet_fast.kernels.triton import device, forward, tiles
from resnet_fast.kernels.triton.tuning import cudnn, first_call, measuring, planner
from resnet_fast.kernels.triton.tuning.planner import Problem
from resnet_fast.utils import compat

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RESNET_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(planner, "machine", lambda index: f"fake GPU {index}")
    planner.choices.forget()
    yield tmp_path
    planner.choices.forget()


def problem(**changes) -> Problem:
    usual = Problem(
        "sm_90", torch.float32, "ieee", 2, 32, 9, 8, 48, (3, 3), (1, 1), (1, 1), (1, 1), 1, residual=False, relu=True
    )
    return usual._replace(**changes)


# --- candidates -------------------------------------------------------------------------------------------------------


def test_every_candidate_has_a_name_of_its_own_and_the_tables_tile_is_first():
    for architecture in ("sm_80", "sm_90", "sm_100", "gfx942"):
        for precision, dtype in (("half", torch.float16), ("ieee", torch.float32)):
            one = problem(architecture=architecture, precision=precision, dtype=dtype, n=128, h=56, w=56, c=64, k=64)
            found = planner.candidates(one)
            assert list(found) == [candidate.name for candidate in found.values()]
            ours = [candidate.tile for candidate in found.values() if candidate.tile is not None]
            assert ours[0] == tiles.pick(architecture, precision, 128 * 56 * 56, 64, 64, 1, "rxs", 9)
            assert 2 <= len(ours) <= planner._TILES
            assert len(set(ours)) == len(ours)
            assert list(found)[-2:] == [cudnn.FUSED, cudnn.POINTWISE]


def test_the_model_is_asked_once_for_a_problem(monkeypatch):
    """It takes longer than the kernel, and every call that is not prepared wants to know the candidates' names."""
    tiles.forget()
    asked, predict = [], tiles.cost.predict
    monkeypatch.setattr(tiles.cost, "predict", lambda *args: asked.append(args) or predict(*args))
    one = problem(precision="half", dtype=torch.float16)
    weight = torch.zeros(1)
    for _ in range(3):
        planner.note(weight, one, planner.choose(one, 0))
    first = len(asked)
    assert 0 < first < 100
    planner.note(weight, problem(precision="half", dtype=torch.float16, k=64), None)
    assert len(asked) > first
    tiles.forget()
    asked.clear()
    planner.note(weight, one, None)
    assert len(asked) == first


def test_without_a_relu_only_the_pass_after_the_convolution_can_finish_it():
    assert list(planner.candidates(problem(relu=False)))[-1] == cudnn.POINTWISE
    assert cudnn.FUSED not in planner.candidates(problem(relu=False))


def test_tiles_fit_what_the_kernel_will_see():
    """Few channels come as taps side by side; groups of a few channels come merged."""
    few = planner._tiles(problem(c=3, kernel=(7, 7), stride=(2, 2), padding=(3, 3), h=224, w=224, k=64))
    assert few[0] == tiles.pick("sm_90", "ieee", 2 * 112 * 112, 64, 7 * 4, 1, "stem", 7)
    grouped = planner._tiles(problem(c=128, k=128, groups=32, h=56, w=56))
    assert grouped[0] == tiles.pick(
        "sm_90", "ieee", 2 * 56 * 56, 32, 32, 4, "grouped", 9
    )  # 32 groups of 4 channels as 4 of 32


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kernel": (1, 1), "padding": (0, 0), "n": 16, "h": 56, "w": 56, "residual": True},
        {"kernel": (1, 1), "padding": (0, 0), "stride": (2, 2)},
        {"c": 3, "kernel": (7, 7), "stride": (2, 2), "padding": (3, 3), "h": 224, "w": 224, "k": 64},
        {"c": 3, "kernel": (1, 1), "padding": (0, 0)},
        {"c": 128, "k": 256, "groups": 32},
        {"c": 64, "k": 64, "dilation": (2, 2), "padding": (2, 2)},
    ],
    ids=str,
)
def test_the_tables_tile_is_the_one_that_a_launch_takes(changes):
    p = problem(dtype=torch.float16, precision="half", **changes)

    def image(c, h, w):
        return torch.empty(p.n, c, h, w, dtype=p.dtype, device="meta").to(memory_format=torch.channels_last)

    weight = torch.empty(p.k, p.c // p.groups, *p.kernel, dtype=p.dtype, device="meta")
    vector = torch.empty(p.k, device="meta")
    residual = image(p.k, *p.output()) if p.residual else None
    plan = forward.plan_conv_bn_act(
        image(p.c, p.h, p.w), weight, vector, vector, residual, p.stride, p.padding, p.dilation, p.groups, p.relu,
        p.architecture,
    )  # fmt: skip
    first = next(iter(planner.candidates(p).values())).tile
    assert first is not None
    assert first.constants().items() <= plan.launches[0].constants.items()


def test_key():
    assert problem().key() == "float32 b2 9x8x32 48 3x3 s1x1 p1x1 d1x1 g1 +relu"
    half = problem(dtype=torch.bfloat16, precision="half", residual=True, relu=False, stride=(2, 1), n=100)
    assert half.key() == "bfloat16 b128 9x8x32 48 3x3 s2x1 p1x1 d1x1 g1 +residual"
    assert problem(precision="tf32").key().startswith("tf32 b2")
    assert problem(n=65).key() == problem(n=128).key() != problem(n=64).key()
    for field, value in (("kernel", (1, 3)), ("padding", (0, 1)), ("dilation", (1, 2)), ("groups", 4), ("w", 7)):
        assert problem(**{field: value}).key() != problem().key()


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_without_a_measurement_the_table_decides():
    assert planner.choose(problem(), 0) is None


def test_choices_hold_for_a_problem_a_gpu_and_the_next_process():
    before = planner.version
    planner.keep(0, {problem().key(): cudnn.FUSED})
    assert planner.version > before
    assert planner.choose(problem(), 0).name == cudnn.FUSED
    assert planner.choose(problem(), 1) is None
    assert planner.choose(problem(k=64), 0) is None
    planner.choices.forget()  # as the next process does
    assert planner.choose(problem(), 0).name == cudnn.FUSED
    content = json.loads(planner.choices.path().read_text())
    assert content == {"format": 1, "machines": {"fake GPU 0": {problem().key(): cudnn.FUSED}}}
    assert planner.choices.path().name == "gpu-choices.json"


def test_a_tile_is_found_again_by_its_name():
    name, candidate = list(planner.candidates(problem(n=128, h=56, w=56)).items())[1]
    planner.keep(0, {problem(n=128, h=56, w=56).key(): name})
    assert planner.choose(problem(n=128, h=56, w=56), 0) == candidate
    assert candidate.tile is not None


def test_a_choice_that_nobody_knows_or_that_cannot_serve_is_ignored():
    planner.keep(0, {problem().key(): "of the future", problem(relu=False).key(): cudnn.FUSED})
    assert planner.choose(problem(), 0) is None
    assert planner.choose(problem(relu=False), 0) is None


def test_a_damaged_file_is_ignored_with_a_warning():
    planner.choices.path().write_text('{"format": 1, "machines": {"fake GPU 0"')
    with pytest.warns(UserWarning, match="gpu-choices.json is ignored"):
        assert planner.choose(problem(), 0) is None


def test_recorded():
    before = planner.version
    with planner.recorded() as problems:
        assert planner.version > before, "what was prepared is asked for again"
        planner.choose(problem(), 0)
        planner.choose(problem(k=8), 0)
    planner.choose(problem(k=9), 0)
    assert problems == [problem(), problem(k=8)]


def test_what_a_measurement_depends_on_beside_the_problem(monkeypatch):
    class Properties:
        name, multi_processor_count = "NVIDIA Imaginary 100", 114

    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties())
    monkeypatch.setattr(device, "architecture", lambda gpu: "sm_90")
    monkeypatch.setattr(compat, "cuda_driver", lambda: 13000)
    planner.machine.cache_clear()
    text = planner.machine(0)
    planner.machine.cache_clear()
    for part in ("Imaginary 100", "sm_90", "114 multi", "driver 13000", torch.__version__, "triton 3", "resnet-fast"):
        assert part in text


# --- the first call of a shape ---------------------------------------------------------------------------------------


@pytest.fixture
def first(monkeypatch, tmp_path):
    """Measures on the CPU, by a clock that is returned; ``first.asked`` has what was measured."""
    clock, measure = Clock({}), measuring.measure
    clock.asked = []

    def on_cpu(problem, device, timer, runs, candidates):
        clock.asked.append(list(candidates))
        return measure(problem, CPU, clock, runs, runner(clock), candidates)

    monkeypatch.setenv("RESNET_FAST_CACHE", str(tmp_path))
    planner.choices.forget()
    monkeypatch.setattr(measuring, "measure", on_cpu)
    monkeypatch.setattr(measuring, "Events", lambda device: None)
    monkeypatch.setattr(streams, "capturing", lambda index: False)
    yield clock
    planner.choices.forget()


def test_the_first_call_never_chooses_a_loser(first):
    for i in range(4):
        k = 64 + i
        *ours, fused, pointwise = planner.candidates(problem(k=k))
        winner = [*ours[:2], fused, pointwise][i]
        first.milliseconds_of = {winner: 0.25}
        for _ in range(2):
            assert first_call.choose(problem(k=k), GPU).name == winner
        planner.choices.forget()  # another process
        assert planner.choose(problem(k=k), 0).name == winner
    assert [len(asked) for asked in first.asked] == [4] * 4, "once each, two tiles and PyTorch's"


@pytest.mark.parametrize("kind", ["switched off", "in a capture", "while tune looks", "deterministic"])
def test_where_the_first_call_measures_nothing(kind, first, monkeypatch):
    context = contextlib.nullcontext()
    if kind == "switched off":
        monkeypatch.setenv("RESNET_FAST_MEASURE", "0")
    elif kind == "in a capture":
        monkeypatch.setattr(streams, "capturing", lambda index: True)
    elif kind == "while tune looks":
        context = planner.recorded()
    else:
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    with context:
        assert first_call.choose(problem(), GPU) is None
    assert not first.asked


def test_where_nothing_fits_beside_the_users_images_the_table_serves(first, monkeypatch):
    def full(device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(measuring, "Events", full)
    assert first_call.choose(problem(), GPU) is None


def test_what_the_first_call_measured_holds_where_the_file_cannot_be_written(first, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RESNET_FAST_CACHE", str(tmp_path / "file"))
    first.milliseconds_of = {cudnn.FUSED: 0.25}
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert first_call.choose(problem(), GPU).name == cudnn.FUSED
    assert len(first.asked) == 1


# --- measuring --------------------------------------------------------------------------------------------------------


class Clock(measuring.Timer):
    """A timer by which work takes what a list says, by the name of the candidate that runs."""

    def __init__(self, milliseconds: dict[str, float], otherwise: float = 1.0) -> None:
        self.milliseconds_of, self.otherwise, self.running, self.calls = milliseconds, otherwise, "", 0
        self.order: list[str] = []

    def milliseconds(self, work, runs):
        work()
        self.calls += runs
        taken = self.milliseconds_of.get(self.running, self.otherwise)
        self.order.append(self.running)
        first = 100 if self.order.count(self.running) == 1 else 1  # which a median does not see
        return [first * taken] + [taken] * (runs - 1)


def definition(p: Problem, o: measuring.Operands) -> torch.Tensor:
    geometry = (p.stride, p.padding, p.dilation, p.groups, p.relu)
    return reference.conv_bn_act(o.x, o.weight, o.scale, o.shift, o.residual, *geometry)


def runner(clock: Clock, wrong=lambda name, y, operands: y):
    def make(candidate, p, operands):
        def run(o):
            clock.running = candidate.name
            return wrong(candidate.name, definition(p, o), o)

        return run

    return make


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"residual": True, "relu": False},
        {"groups": 4, "stride": (2, 1), "dilation": (2, 1), "padding": (2, 0)},
        {"dtype": torch.float16, "precision": "half", "n": 1},
        {"dtype": torch.bfloat16, "precision": "half", "c": 3, "kernel": (1, 1), "padding": (0, 0), "residual": True},
    ],
    ids=str,
)
def test_the_fastest_wins(changes):
    one = problem(**changes)
    names = list(planner.candidates(one))
    for winner in names:
        clock = Clock({winner: 0.25})
        found = measuring.measure(one, CPU, clock, 5, runner(clock))
        assert found.chosen == winner
        assert found.milliseconds == {name: 0.25 if name == winner else 1.0 for name in names}
        assert not found.rejected
        assert clock.calls == 5 * len(names)
        assert clock.order == names * 4, "all are checked before, and take turns"


WRONG = {
    "slightly wrong": lambda y: y * (1 + 1e-4),
    "one element": lambda y: y.index_fill(1, torch.tensor([47]), 0),
    "only in the last image": lambda y: torch.cat([y[:-1], -y[-1:]]),
    "NaN": lambda y: y.index_fill(3, torch.tensor([0]), torch.nan),
    "another shape": lambda y: y[:, :, 1:],
    "another dtype": lambda y: y.double(),
    "loses a NaN": lambda y: y.nan_to_num(0.0),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_does_not_win(kind):
    clock = Clock({cudnn.FUSED: 1e-3, cudnn.POINTWISE: 0.5})
    found = measuring.measure(
        problem(), CPU, clock, 3, runner(clock, lambda name, y, o: WRONG[kind](y) if name == cudnn.FUSED else y)
    )
    assert found.chosen == cudnn.POINTWISE
    assert cudnn.FUSED not in found.milliseconds
    assert list(found.rejected) == [cudnn.FUSED]
    if kind == "loses a NaN":
        assert found.rejected[cudnn.FUSED] == kind


def test_an_ulp_is_not_wrong():
    clock = Clock({cudnn.FUSED: 0.1})
    found = measuring.measure(problem(), CPU, clock, 3, runner(clock, lambda name, y, o: y * (1 + 1.2e-7)))
    assert found.chosen == cudnn.FUSED


def test_what_fails_does_not_win_and_leaves_its_reason():
    def fail(name, y, operands):
        if name == cudnn.FUSED:
            raise RuntimeError("CUDNN_STATUS_NOT_SUPPORTED\nand much more")
        return y

    clock = Clock({cudnn.POINTWISE: 0.5})
    found = measuring.measure(problem(), CPU, clock, 3, runner(clock, fail))
    assert found.chosen == cudnn.POINTWISE
    assert found.rejected == {cudnn.FUSED: "RuntimeError: CUDNN_STATUS_NOT_SUPPORTED"}


def test_what_fails_while_it_is_timed_does_not_win():
    clock = Clock({cudnn.FUSED: 0.1, cudnn.POINTWISE: 0.5})

    def fail(name, y, operands):
        if name == cudnn.FUSED and clock.order.count(name) == 2:
            raise RuntimeError("out of memory")
        return y

    found = measuring.measure(problem(), CPU, clock, 5, runner(clock, fail))
    assert found.chosen == cudnn.POINTWISE
    assert found.rejected == {cudnn.FUSED: "RuntimeError: out of memory"}


def test_where_nothing_is_right_the_table_decides():
    clock = Clock({})
    found = measuring.measure(problem(), CPU, clock, 3, runner(clock, lambda name, y, o: -y))
    assert found.chosen == next(iter(planner.candidates(problem())))
    assert set(found.rejected) == set(planner.candidates(problem()))


def test_measuring_leaves_the_users_random_numbers_alone():
    before = torch.get_rng_state()
    clock = Clock({})
    measuring.measure(problem(), CPU, clock, 2, runner(clock))
    assert torch.equal(torch.get_rng_state(), before)


def test_events_flush_warm_up_and_wait_for_nothing_else(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing=False):
            self.timed = enable_timing

        def record(self):
            log.append("event")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            assert self.timed
            assert end.timed
            return 2.0

    class Properties:
        L2_cache_size = 50 << 20

    class Buffer:
        def zero_(self):
            log.append("flush")

    def empty(size, dtype, device):
        assert size * dtype.itemsize >= 2 * Properties.L2_cache_size
        return Buffer()

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("waits for every stream"))
    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", empty)
        timer = measuring.Events(torch.device("cuda", 0))
    seconds = itertools.count(0, 0.04)
    monkeypatch.setattr(measuring, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    timed = ["work"] * measuring._WARM_UP_RUNS + ["flush", "event", "work", "event"] * 2 + ["wait"]
    for idle in (True, False):
        assert timer.milliseconds(lambda: log.append("work"), 2) == [2.0, 2.0]
        awake = ["flush", "event", "wait"] * 2 if idle else []  # until 0.1 seconds are over
        assert log == awake + timed
        log.clear()
        seconds = itertools.repeat(timer._ended)

"""The static model of tiles (cost.py), and the look-up of tiles by shape class (tiles.py)."""

import itertools
import json

import pytest
import torch
import torchvision

pytest.importorskip("triton")

from resnet_fast.kernels.triton import tiles
from resnet_fast.kernels.triton.cost_model import cost
from resnet_fast.kernels.triton.cost_model.cost import Code, Problem
from resnet_fast.kernels.triton.cost_model.gpus import GPUS
from resnet_fast.kernels.triton.problem import conv_problem
from resnet_fast.kernels.triton.tiles import Tile

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
PRECISIONS = ("half", "tf32", "ieee")
TARGETS = [(a, p) for a in ARCHITECTURES for p in PRECISIONS if not (a.startswith("gfx") and p == "tf32")]
MODELS = ("resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2")
BATCHES = (1, 8, 32, 128, 256)

each_target = pytest.mark.parametrize(("architecture", "precision"), TARGETS)
each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)

# Round numbers: 100 instructions a step, and 100 registers, whatever the tile.
CODES = {family: Code(100.0, 0.0, 0.0, 0.0, 5.0, 100.0, 0.0) for family in ("gemm", "conv")}
H100 = GPUS["h100"]
SQUARE = Tile(128, 128, 64, 8, 4, False)
DEEP = Problem("half", 128 * 28 * 28, 128, 128, 1, "rxs", 9)


@pytest.fixture(scope="module")
def convolutions() -> list[tuple]:
    """x [C, H, W], weight, stride, padding and groups of every convolution of the models at 224x224."""
    found = {}

    def note(module, args, output):
        x = tuple(args[0].shape[1:])
        found[(x, tuple(module.weight.shape), module.stride, module.padding, module.groups)] = None

    for name in MODELS:
        with torch.device("meta"):
            model = getattr(torchvision.models, name)().eval()
            for module in model.modules():
                if isinstance(module, torch.nn.Conv2d):
                    module.register_forward_hook(note)
            model(torch.empty(1, 3, 224, 224))
    return list(found)


def problems(convolutions: list[tuple], precision: str) -> list[Problem]:
    return [
        conv_problem((batch, *x), weight, stride, padding, (1, 1), groups, precision)
        for (x, weight, stride, padding, groups), batch in itertools.product(convolutions, BATCHES)
    ]


def per_step(problem: Problem, tile: Tile, gpu=H100) -> dict[str, float]:
    """Cycles of one step of one program."""
    made = cost.predict(gpu, problem, tile, CODES)
    steps = -(-made.programs // gpu.multiprocessors) * problem.taps * -(-problem.channels // tile.reduction)
    return {name: getattr(made, name) / steps for name in ("mma", "issue", "shared", "l2")}


@pytest.mark.parametrize(
    ("tile", "mma", "shared"),
    [(Tile(128, 64, 64, 4, 4, False), 256, 448), (SQUARE, 512, 640), (Tile(128, 256, 64, 8, 3, True), 1024, 1024)],
)
def test_a_step_on_h100_by_hand(tile, mma, shared):
    """2048 multiplications a cycle. Copied in: both operands; read: the image once, the weight for each 64 rows."""
    step = per_step(DEEP, tile)
    assert step["mma"] == pytest.approx(mma, rel=1e-3)
    assert step["shared"] == pytest.approx(shared)
    assert step["issue"] == pytest.approx(100 * tile.warps / 4)


def test_a_step_on_a100_by_hand():
    """1024 multiplications a cycle; 8 warps as 4 by 2, so each reads a quarter of the image and half the weight."""
    step = per_step(DEEP, SQUARE, GPUS["a100"])
    assert step["mma"] == pytest.approx(1024, rel=0.01)
    image = weight = 128 * 64 * 2
    assert step["shared"] == pytest.approx((image + weight + 2 * image + 4 * weight) / 128)


def test_half_of_tcgen05_is_idle_with_64_rows():
    b200 = GPUS["b200"]
    half, whole = (per_step(DEEP, SQUARE._replace(rows=rows), b200)["mma"] for rows in (64, 128))
    assert half == pytest.approx(whole)


@each_target
def test_more_work_takes_longer(architecture, precision):
    gpu, codes = tiles.gpu_of(architecture), tiles.codes_of(tiles.load(architecture))
    small = Problem(precision, 8 * 28 * 28, 128, 128, 1, "rxs", 9)
    larger = [
        small._replace(rows=small.rows * 16),
        small._replace(columns=1024),
        small._replace(channels=512),
        small._replace(taps=25),
        small._replace(groups=64),
    ]
    for tile in tiles.listed_tiles(architecture, precision):
        cycles = cost.predict(gpu, small, tile, codes).cycles
        assert all(cost.predict(gpu, problem, tile, codes).cycles > cycles for problem in larger)
        assert cost.predict(gpu, small._replace(residual=True), tile, codes).cycles >= cycles
        training = tile._replace(kernel="pointers", parts=1)  # what training makes of it
        cycles = cost.predict(gpu, small, training, codes).cycles
        for problem in (small._replace(statistics=True), small._replace(prologue=True)):
            assert cost.predict(gpu, problem, tile, codes).cycles >= cycles


def test_a_better_gpu_is_not_slower():
    for problem in (DEEP, Problem("half", 49, 2048, 512, 1, "1x1")):
        now = cost.predict(H100, problem, SQUARE, CODES).cycles
        for better in ({"bandwidth": 10000.0}, {"half": 2000.0}, {"multiprocessors": 264, "half": 1978.8}):
            assert cost.predict(H100._replace(**better), problem, SQUARE, CODES).cycles <= now


def test_a_program_too_many_is_another_wave():
    full, one_more = (
        cost.predict(H100, Problem("half", 128 * programs, 128, 512, 1, "rxs", 9), SQUARE, CODES)
        for programs in (132, 133)
    )
    assert (full.programs, one_more.programs) == (132, 133)
    assert one_more.mma == 2 * full.mma
    assert one_more.cycles - full.launch > 1.5 * (full.cycles - full.launch)


def test_bounds():
    thin = cost.predict(H100, Problem("half", 128 * 56 * 56, 256, 64, 1, "1x1", residual=True), SQUARE, CODES)
    assert thin.bound == "memory"
    # Pixels read once, weight, result, residual.
    moved = 2 * (128 * 56 * 56 * (64 + 2 * 256) + 64 * 256)
    assert thin.memory == pytest.approx(moved / 3352 * 1.83)
    assert cost.predict(H100, DEEP._replace(channels=1024), SQUARE, CODES).bound in ("mma", "shared", "l2")
    assert cost.predict(H100, Problem("half", 49, 64, 64, 1, "1x1"), SQUARE, CODES).bound == "latency"


def test_a_split_serves_small_maps_only():
    def cycles(rows: int, parts: int) -> float:
        problem = Problem("half", rows, 512, 512, 1, "rxs", 9)
        return cost.predict(H100, problem, Tile(64, 64, 64, 4, 4, False, "pointers", parts), CODES).cycles

    assert cycles(49, 8) < cycles(49, 1)
    assert cycles(128 * 196, 8) > cycles(128 * 196, 1)


def test_copies_of_whole_tiles_take_no_instructions():
    codes = {"gemm": Code(30.0, 10.0, 10.0, 1.0, 5.0, 100.0, 0.0)}
    problem = Problem("half", 128 * 784, 256, 1024, 1, "1x1")
    issue = {
        kernel: cost.predict(H100, problem, SQUARE._replace(kernel=kernel), codes).issue
        for kernel in ("pointers", "descriptors", "specialised")
    }
    # 4 copies of each operand, and 4 products.
    assert issue["pointers"] == pytest.approx(issue["descriptors"] * (30 + 80 + 4) / (30 + 4))
    # Of 8 warps, one copies and one multiplies.
    assert issue["specialised"] == pytest.approx(issue["descriptors"] * 2 / 8)


@pytest.mark.parametrize(
    ("gpu", "tile", "registers", "violations"),
    [
        ("rtx4090", SQUARE, 100, ()),
        ("rtx4090", SQUARE._replace(stages=5), 100, ("shared memory",)),
        ("a100", SQUARE._replace(stages=5), 100, ()),
        ("a100", SQUARE, 256, ("registers",)),
        ("a100", SQUARE._replace(warps=32), 65, ("registers",)),
        ("a100", SQUARE._replace(warps=64), 20, ("threads",)),
        ("b200", Tile(128, 512, 16, 8, 2, True), 100, ()),
        ("b200", Tile(256, 512, 16, 8, 2, True), 100, ("tensor memory",)),
        ("mi300x", SQUARE._replace(stages=2, warps=4), 500, ()),
        ("mi300x", SQUARE._replace(stages=2), 500, ("registers",)),
        ("mi300x", SQUARE._replace(stages=4), 100, ("shared memory",)),
    ],
)
def test_limits(gpu, tile, registers, violations):
    code = Code(100.0, 0.0, 0.0, 0.0, 0.0, registers, 0.0)
    assert cost.violations(GPUS[gpu], DEEP, tile, code) == violations


@each_architecture
def test_every_architecture_has_a_table_of_its_own(architecture):
    data, gpu = tiles.load(architecture), tiles.gpu_of(architecture)
    assert tiles.nearest(architecture) == architecture == gpu.architecture
    assert data["multiprocessors"] == gpu.multiprocessors
    assert data["shared_memory"] == gpu.program_shared_memory


@each_target
def test_every_layer_gets_a_tile_that_fits(architecture, precision, convolutions):
    data, gpu = tiles.load(architecture), tiles.gpu_of(architecture)
    codes = tiles.codes_of(data)
    wanted = problems(convolutions, precision)
    assert len(wanted) > 200
    for problem in wanted:
        tile = tiles.pick(architecture, *problem[:7])
        assert cost.violations(gpu, problem, tile, codes[problem.family]) == (), (problem, tile)
        assert cost.shared_memory(gpu, precision, tile) <= data["shared_memory"]
        assert tile.columns <= max(problem.columns, data["smallest"][1])
        assert cost.served(problem, tile).kernel == tile.kernel, "not one that another kernel would have to serve"


@each_target
def test_steps_of_a_class(architecture, precision):
    """Rows up to a bound, and one row more; all groups count together."""
    data = tiles.load(architecture)
    listed = tiles.listed_tiles(architecture, precision)
    classes = {name: steps for name, steps in data["classes"].items() if name.split()[1] == precision}
    assert {name.split()[0] for name in classes} == set(cost.KINDS)
    for name, steps in classes.items():
        kind, _, columns, inner = name.split()
        bounds = [most for most, _ in steps]
        assert bounds[-1] is None
        assert bounds[:-1] == sorted(set(bounds[:-1]))
        for (most, position), (_, following) in itertools.pairwise(steps):
            for groups in (1, 4):
                shape = int(columns), int(inner)
                for rows, expected in ((most // groups, listed[position]), (most // groups + 1, listed[following])):
                    fitted = tiles.fit(architecture, expected, rows, *shape)
                    assert tiles.pick(architecture, precision, rows, *shape, groups, kind) == fitted


@each_target
def test_every_tile_is_of_a_class_and_every_class_of_a_tile(architecture, precision):
    data = tiles.load(architecture)
    used = set().union(*(tiles.positions_in_use(data, precision, kind) for kind in cost.KINDS))
    assert used == set(range(len(data[precision])))


def test_a_batch_gets_what_a_similar_batch_gets(convolutions):
    """Along the batch there are few different tiles, and they do not shrink."""
    for x, weight, stride, padding, groups in convolutions:
        sizes = []
        for batch in range(1, 257):
            problem = conv_problem((batch, *x), weight, stride, padding, (1, 1), groups, "half")
            tile = tiles.pick("sm_90", *problem[:7])
            sizes.append(tile.rows * tile.columns)
        assert len(set(sizes)) <= 5
        assert sizes[-1] >= sizes[0]


@each_target
@pytest.mark.parametrize("kind", cost.KINDS)
def test_sizes_of_no_class_get_the_nearest(architecture, precision, kind):
    data = tiles.load(architecture)
    for rows, columns, channels, taps in itertools.product(
        (1, 100, 10**6), (1, 10, 100, 5000), (1, 3, 96, 5000), (1, 49)
    ):
        tile = tiles.pick(architecture, precision, rows, columns, channels, 1, kind, taps)
        smallest_rows, smallest_columns, smallest_reduction = data["smallest"]
        assert smallest_rows <= tile.rows <= max(smallest_rows, tiles.power_of_two(rows))
        assert smallest_columns <= tile.columns <= max(smallest_columns, tiles.power_of_two(columns))
        assert smallest_reduction <= tile.reduction
        assert tile.reduction <= max(32, smallest_reduction, tiles.power_of_two(channels))
        assert not (tile.split and tile.columns < 128)


def test_the_nearest_class_has_the_most_similar_columns():
    data = {
        "classes": {"1x1 half 64 4096": [[None, 0]], "1x1 half 1024 64": [[None, 1]], "rxs half 128 64": [[None, 2]]}
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "load", lambda architecture: data)
        tiles.forget()
        try:
            assert tiles._nearest_class("sm_90", "1x1", "half", 100, 64) == [[None, 0]]
            assert tiles._nearest_class("sm_90", "1x1", "half", 512, 4096) == [[None, 1]]
            assert tiles._nearest_class("sm_90", "rxs", "half", 9999, 9999) == [[None, 2]]
        finally:
            tiles.forget()


@pytest.fixture
def forgotten():
    """Choices that a test makes."""
    yield
    for architecture in ("sm_90", "sm_80"):
        tiles.override(architecture, {})


@pytest.mark.usefixtures("forgotten")
def test_measured_choices_come_first():
    problem = Problem("half", 6272, 512, 1024, 1, "1x1", residual=True)
    other = problem._replace(rows=6273)
    before, before_other = (tiles.pick("sm_90", *one[:7]) for one in (problem, other))
    chosen = Tile(64, 16, 32, 4, 2, False, "pointers", 3)
    tiles.override("sm_90", {problem: chosen})
    assert tiles.pick("sm_90", *problem[:7]) == chosen
    assert tiles.pick("sm_90", *other[:7]) == before_other
    assert tiles.pick("sm_80", *problem[:7]) != chosen
    tiles.override("sm_90", {other: chosen})
    assert tiles.pick("sm_90", *problem[:7]) == before
    tiles.override("sm_90", {})
    assert tiles.pick("sm_90", *other[:7]) == before_other


@each_target
def test_candidates_for_measuring(architecture, precision, convolutions):
    gpu, codes = tiles.gpu_of(architecture), tiles.codes_of(tiles.load(architecture))
    for problem in problems(convolutions, precision)[::7]:
        found = tiles.candidates(architecture, problem, 4)
        assert found[0] == cost.served(problem, tiles.pick(architecture, *problem[:7]))
        assert 1 <= len(found) == len(set(found)) <= 4
        predicted = [cost.predict(gpu, problem, tile, codes) for tile in found]
        assert not any(one.violations for one in predicted)
        rest = [one.cycles for one in predicted[1:]]
        assert rest == sorted(rest)
        assert tiles.candidates(architecture, problem, 1) == found[:1]
    assert max(len(tiles.candidates(architecture, one, 4)) for one in problems(convolutions, precision)) > 1


def test_the_interpreter_has_one_tile():
    problem = Problem("half", 6272, 512, 1024, 1, "1x1")
    assert tiles.candidates("interpreter", problem, 4) == (tiles.pick("interpreter", *problem[:7]),)
    assert "classes" not in tiles.load("interpreter")


@pytest.mark.parametrize(
    ("architecture", "nearest"),
    [
        *[(name, name) for name in ARCHITECTURES],
        ("sm_75", "sm_80"),
        ("sm_87", "sm_86"),
        ("sm_103", "sm_100"),
        ("sm_110", "sm_100"),
        ("sm_121", "sm_120"),
        ("gfx90a", "gfx942"),
        ("gfx1100", "gfx942"),
        ("interpreter", "interpreter"),
    ],
)
def test_nearest_architecture(architecture, nearest):
    assert tiles.nearest(architecture) == nearest
    assert tiles.load(architecture) == json.loads(tiles.path(nearest).read_text())

"""The script that makes the tables of tiles, and whether the tables are what it would make now."""

import contextlib
import json
from collections.abc import Iterator

import numpy as np
import pytest

from resnet_fast.kernels.triton import tiles
from resnet_fast.kernels.triton.cost_model import cost
from resnet_fast.kernels.triton.cost_model.cost import Problem
from resnet_fast.kernels.triton.tiles import Tile
from tests.aot import make_tiles
from tests.aot.layers import model_layers, plan_layer
from tests.aot.make_tiles import (
    ARCHITECTURES,
    Choice,
    Predictions,
    _to_strike,
    choose,
    demanding,
    layer_problems,
    sound,
)

TARGETS = [(name, precision) for name in ARCHITECTURES for precision in make_tiles.precisions(tiles.gpu_of(name))]

each_target = pytest.mark.parametrize(("architecture", "precision"), TARGETS)

LARGE, SMALL = Tile(128, 128, 64, 8, 3, False), Tile(64, 64, 64, 4, 3, False)
MANY, FEW = Problem("half", 10**6, 256, 256, 1, "1x1"), Problem("half", 3136, 256, 256, 1, "rxs", 9)


@pytest.fixture
def predictions() -> Predictions:
    gpu, codes = tiles.gpu_of("sm_80"), tiles.codes_of(tiles.load("sm_80"))
    return Predictions(gpu, [MANY, FEW], [LARGE, SMALL], codes)


def test_each_problem_gets_the_tile_that_the_model_prefers(predictions):
    assert predictions.cycles.argmin(axis=1).tolist() == [0, 1]
    assert choose(predictions, set(), 2) == Choice(
        [LARGE, SMALL], {"1x1 half 256 256": [(None, 0)], "rxs half 256 4096": [(None, 1)]}
    )


def test_one_tile_for_all_is_the_one_that_costs_them_least(predictions):
    (only,) = choose(predictions, set(), 1).tiles
    ratios = predictions.cycles[:, 0] / predictions.cycles[:, 1]
    assert only == (LARGE if ratios.prod() < 1 else SMALL)


def test_a_struck_tile_is_not_chosen_for_its_kind(predictions):
    chosen = choose(predictions, {("1x1", LARGE)}, 2)
    assert chosen.tiles == [SMALL]
    assert choose(predictions, {("rxs", LARGE)}, 2).tiles == [LARGE, SMALL]


def test_a_tile_that_spills_is_struck_for_the_kernels_that_it_would_be_launched_with():
    """With pointers, for all: they serve where the others cannot."""
    listed = [LARGE._replace(kernel=kernel) for kernel in ("pointers", "specialised")] + [SMALL]
    (layer,) = (one for one in model_layers() if one.name().startswith("1x1/1 256->1024 14x14"))
    with tiles_of(LARGE):
        (pointers,) = plan_layer(layer, 8, "fp16", "sm_100")
    with tiles_of(LARGE._replace(kernel="specialised")):
        (specialised,) = plan_layer(layer, 8, "fp16", "sm_100")
    assert _to_strike(pointers, None, listed, listed) == {("1x1", tile) for tile in listed[:2]}
    assert _to_strike(specialised, None, listed, listed) == {("1x1", listed[1])}


@contextlib.contextmanager
def tiles_of(tile: Tile) -> Iterator[None]:
    """Every convolution that ``plan_layer`` plans gets the tile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "pick", lambda *_: tile)
        yield


def test_rows_of_a_class_are_in_buckets():
    gpu, codes = tiles.gpu_of("sm_80"), tiles.codes_of(tiles.load("sm_80"))
    problems = [MANY._replace(rows=rows) for rows in (49, 300, 100_000, 500_000)]
    (steps,) = choose(Predictions(gpu, problems, [LARGE, SMALL], codes), set(), 2).classes.values()
    # The small tile up to the bucket in which it is best for the last time.
    assert steps == [(512, 1), (None, 0)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_files_are_written_as_they_are(architecture):
    written = tiles.path(architecture).read_text()
    assert make_tiles.text(json.loads(written)) == written


@each_target
def test_the_classes_are_what_the_model_says(architecture, precision):
    """Of the tiles in the file. Who changes the model makes the tables again."""
    data, gpu = tiles.load(architecture), tiles.gpu_of(architecture)
    listed = list(tiles.listed_tiles(architecture, precision))
    unused = {
        (kind, tile)
        for kind in cost.KINDS
        for position, tile in enumerate(listed)
        if position not in tiles.positions_in_use(data, precision, kind)
    }
    problems = list(dict.fromkeys(layer_problems(precision)))
    again = choose(Predictions(gpu, problems, listed, tiles.codes_of(data)), unused, len(listed), gain=0.0)
    assert again.tiles == listed
    classes = {name: steps for name, steps in data["classes"].items() if name.split()[1] == precision}
    assert {name: [list(step) for step in steps] for name, steps in again.classes.items()} == classes


@each_target
def test_what_the_few_tiles_cost(architecture, precision):
    """Some layers, beside the best of all possible tiles for each, spilling or not, by the model."""
    gpu, codes = tiles.gpu_of(architecture), tiles.codes_of(tiles.load(architecture))
    problems = list(dict.fromkeys(layer_problems(precision)))[::41]
    possible = Predictions(gpu, problems, list(make_tiles.enumerate_tiles(gpu, precision)), codes)
    chosen = [cost.predict(gpu, one, tiles.pick(architecture, *one[:7]), codes).cycles for one in problems]
    ratios = np.array(chosen) / possible.cycles.min(axis=1)
    assert ratios.min() > 1 - 1e-9
    assert ratios.max() < 1.5
    assert np.exp(np.log(ratios).mean()) < 1.1


@each_target
def test_possible_tiles_fit(architecture, precision):
    gpu = tiles.gpu_of(architecture)
    possible = list(make_tiles.enumerate_tiles(gpu, precision))
    assert len(possible) == len(set(possible)) > 5
    assert all(cost.shared_memory(gpu, precision, tile) <= gpu.program_shared_memory for tile in possible)
    kernels = {"pointers"} if precision == "ieee" else {"pointers", *make_tiles.KERNELS.get(architecture, ())}
    wanted = {("pointers", parts) for parts in make_tiles.PARTS} | {(kernel, 1) for kernel in kernels}
    assert {(tile.kernel, tile.parts) for tile in possible} == wanted


def test_what_a_file_lacks_comes_from_its_parent(tmp_path, monkeypatch):
    monkeypatch.setattr(tiles, "path", lambda architecture: tmp_path / f"{architecture}.json")
    parent = {"multiprocessors": 1, "half": [[1]], "chain": {"half": []}, "code": {"gemm": [1]}, "classes": {"a": []}}
    (tmp_path / "sm_80.json").write_text(json.dumps(parent))
    assert make_tiles.inherited("sm_86") == {name: value for name, value in parent.items() if name != "classes"}
    own = {"half": [[2]], "classes": {"b": []}, "other": 3}
    (tmp_path / "sm_86.json").write_text(json.dumps(own))
    assert make_tiles.inherited("sm_86") == {**{k: parent[k] for k in ("multiprocessors", "chain", "code")}, **own}
    (tmp_path / "gfx942.json").write_text(json.dumps(own))
    assert make_tiles.inherited("gfx942") == own


@each_target
def test_all_that_the_script_compiles_is_sound(compiler, compile_all, architecture, precision):
    if not compile_all:
        pytest.skip("needs --all")
    found = compiler.results(demanding(architecture, precision))
    assert found
    assert not [one.name for one, made in found if not sound(one, made)]

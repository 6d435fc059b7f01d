"""OnnxModel: what PyTorch computes, from a file; which provider runs it and why; arguments that do not fit."""

import contextlib
import copy
import json
import pickle
import sys
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import resnet_fast
from resnet_fast import OnnxModel, export_onnx
from resnet_fast.bench.norms import randomise_batch_norm
from resnet_fast.export import MissingPackageError, onnx_providers
from resnet_fast.export.onnx_providers import CPU, CUDA, TENSORRT, ProviderError, profile_for, tensorrt_options
from resnet_fast.utils.tolerance import error_limit

CLASSES = [f"class {index} é" for index in range(10)]

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def images(batch: int, *size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, *(size or (3, 40, 48)), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = resnet_fast.ResNet(resnet_fast.BasicBlock, [1, 1, 1, 1], num_classes=10).eval()
    randomise_batch_norm(model, 0)
    return model


@pytest.fixture(scope="module")
def file(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "network.onnx"
    export_onnx(network, path, input_size=(3, 40, 48), classes=CLASSES, verify=False)
    return path


@pytest.fixture(scope="module")
def model(file):
    return OnnxModel(file)


def build(folder: Path, nodes, source, results, weights=(), opset: int = 18, **metadata: str) -> Path:
    """A file of ``nodes``, with an input and outputs as (name, type, shape)."""
    source, *results = [helper.make_tensor_value_info(*value) for value in (source, *results)]
    graph = helper.make_graph(nodes, "small", [source], results, list(weights))
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    helper.set_model_props(made, metadata)
    path = folder / "small.onnx"
    onnx.save(made, path)
    return path


# --- what it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_computes_what_pytorch_does(batch, network, model):
    x = images(batch)
    with torch.inference_mode():
        stock = network(x)
        precise = resnet_fast.restore(copy.deepcopy(network)).double()(x.double())
        found = model(x)
    limit = error_limit((stock - precise).abs().max().item(), precise)
    assert (found.dtype, found.device, found.shape) == (torch.float32, x.device, (batch, 10))
    assert (found - precise).abs().max() <= limit


def test_strides_do_not_matter(model):
    x = images(4)
    expected = model(x)
    wide = torch.zeros(8, 3, 40, 96)
    wide[::2, :, :, ::2] = x
    for same in (x.contiguous(memory_format=torch.channels_last), wide[::2, :, :, ::2], x.transpose(2, 3).mT):
        before = same.clone()
        assert torch.equal(model(same), expected)
        assert torch.equal(same, before)
    # A view that starts anywhere: no vector instruction may count on its address.
    shifted = torch.cat([torch.zeros(1), x.flatten()])[1:].view_as(x)
    torch.testing.assert_close(model(shifted), expected)


def test_results_do_not_share_memory(model):
    first = model(images(2))
    kept = first.clone()
    model(images(2, seed=1))
    assert torch.equal(first, kept)


def test_no_images(network, model):
    assert model(images(2)[:0]).shape == network(images(2)[:0]).shape == (0, 10)


def test_gradients(model):
    x = images(1).requires_grad_()
    with pytest.raises(ValueError, match=r"x requires gradients.*pass x.detach\(\)"):
        model(x)
    with torch.no_grad():
        result = model(x)
    assert not result.requires_grad
    assert torch.equal(result, model(x.detach()))


@pytest.mark.parametrize(
    ("onnx_type", "dtype"), [(TensorProto.FLOAT16, torch.float16), (TensorProto.DOUBLE, torch.float64)]
)
def test_other_types(onnx_type, dtype, tmp_path):
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    model = OnnxModel(build(tmp_path, nodes, ("x", onnx_type, ["n", 3]), [("y", onnx_type, ["n", 3])]))
    x = images(5, 3).to(dtype)
    assert torch.equal(model(x), x.relu())
    with pytest.raises(TypeError, match=rf"x is torch.float32, expected {dtype}"):
        model(x.float())


def test_bfloat16_in_and_out(tmp_path):
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    kind = TensorProto.BFLOAT16
    model = OnnxModel(build(tmp_path, nodes, ("x", kind, ["n", 3]), [("y", kind, ["n", 3])], opset=22))
    x = images(5, 3).bfloat16()
    assert torch.equal(model(x), x)


@pytest.fixture
def pictures(tmp_path):
    """uint8 pictures of any size to the two largest channel means, divided by 255, and their places."""
    weights = [
        numpy_helper.from_array(np.array(255, np.float32), "limit"),
        numpy_helper.from_array(np.array([2], np.int64), "k"),
    ]
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["float", "limit"], ["scaled"]),
        helper.make_node("Transpose", ["scaled"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("GlobalAveragePool", ["planes"], ["means"]),
        helper.make_node("Flatten", ["means"], ["flat"], axis=1),
        helper.make_node("TopK", ["flat", "k"], ["scores", "classes"], axis=1),
    ]
    source = ("image", TensorProto.UINT8, ["batch", "height", "width", 3])
    results = [("scores", TensorProto.FLOAT, ["batch", 2]), ("classes", TensorProto.INT64, ["batch", 2])]
    return build(tmp_path, nodes, source, results, weights, classes=json.dumps(["red", "green", "blue"]))


@pytest.mark.parametrize("size", [(5, 7), (1, 1), (16, 4)])
def test_preprocessing_inside_and_several_outputs(size, pictures):
    model = OnnxModel(pictures)
    x = torch.randint(256, (3, *size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    result = model(x)
    scores, places = (x.double() / 255).mean((1, 2)).topk(2)
    assert result._fields == ("scores", "classes")
    torch.testing.assert_close(result.scores.double(), scores, rtol=0, atol=2e-6)
    assert torch.equal(result.classes, places)
    assert [model.classes[place] for place in places[0]] == [("red", "green", "blue")[place] for place in places[0]]


def test_files_with_all_that_export_can_add(network, tmp_path):
    """float16 inside, pictures of bytes of any size in, probabilities and the best three out."""
    options = {"precision": "fp16", "preprocess": True, "softmax": True, "top_k": 3, "classes": CLASSES}
    export_onnx(network, tmp_path / "m.onnx", input_size=(3, 40, 48), verify=False, **IMAGENET, **options)
    model = OnnxModel(tmp_path / "m.onnx")
    x = torch.randint(256, (2, 60, 90, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    result = model(x)
    assert [(out.name, out.dtype) for out in model.outputs] == [
        ("probabilities", torch.float32),
        ("scores", torch.float32),
        ("classes", torch.int64),
    ]
    assert torch.equal(result.scores, result.probabilities.gather(1, result.classes))
    assert torch.equal(result.classes[:, 0], result.probabilities.argmax(1))
    torch.testing.assert_close(result.probabilities.sum(1), torch.ones(2))
    assert model(x[:1]).probabilities.shape == (1, 10)


def test_half_in_and_out(network, tmp_path):
    export_onnx(network, tmp_path / "m.onnx", precision="fp16", io_dtype="fp16", input_size=(3, 40, 48), verify=False)
    model = OnnxModel(tmp_path / "m.onnx")
    x = images(2)
    with torch.inference_mode():
        precise = resnet_fast.restore(copy.deepcopy(network)).double()(x.double())
        half = copy.deepcopy(network).half()(x.half())
    found = model(x.half())
    assert found.dtype == torch.float16
    limit = error_limit((half.double() - precise).abs().max().item(), precise, eps=2.0**-10)
    assert (found.double() - precise).abs().max() <= limit


def test_a_batch_that_the_output_calls_otherwise(tmp_path):
    """As files of other exporters do."""
    nodes = [helper.make_node("Flatten", ["x"], ["y"], axis=1)]
    source, result = ("x", TensorProto.FLOAT, ["n", 3, 2, 2]), ("y", TensorProto.FLOAT, ["Flatteny_dim_0", 12])
    x = images(3, 3, 2, 2)
    assert torch.equal(OnnxModel(build(tmp_path, nodes, source, [result]))(x), x.flatten(1))


def test_threads_at_once(model):
    batches = [images(3, seed=seed) for seed in range(8)]
    expected = [model(x) for x in batches]
    found = {}

    def run(index):
        found[index] = [model(batches[index]) for _ in range(3)]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, results in found.items():
        assert all(torch.equal(result, expected[index]) for result in results)
    assert len(found) == len(batches)


def test_threads_do_not_spin_after_a_call(file):
    """ONNX Runtime's own default does, for tens of milliseconds."""
    model = OnnxModel(file, threads=2)
    x = images(4)
    model(x)
    burnt = []
    for _ in range(5):
        model(x)
        start = time.process_time()
        time.sleep(0.05)
        burnt.append(time.process_time() - start)
    assert min(burnt) < 2e-3


# --- what it says -----------------------------------------------------------------------------------------------------


def test_what_it_says(file, model):
    assert model.path == file
    assert (model.device, model.providers, model.refused) == (torch.device("cpu"), (CPU,), {})
    assert model.classes == tuple(CLASSES)
    assert model.metadata["producer"] == "resnet_fast"
    assert (model.input.name, model.input.dtype, model.input.shape) == ("input", torch.float32, ("batch", 3, 40, 48))
    assert [(out.name, out.shape) for out in model.outputs] == [("logits", ("batch", 10))]
    assert repr(model) == f"OnnxModel({str(file)!r}, device='cpu', providers=('{CPU}',))"
    name, count = model.explain().removesuffix(" nodes").split(": ")
    assert name == CPU
    assert 0 < int(count) <= len(onnx.load(file).graph.node)


def test_no_classes(tmp_path):
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    shape = ["n", 3]
    model = OnnxModel(build(tmp_path, nodes, ("x", TensorProto.FLOAT, shape), [("y", TensorProto.FLOAT, shape)]))
    assert model.classes is None


def test_copies_open_the_file_again(model):
    x = images(2)
    for again in (copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model))):
        assert again is not model
        assert again._session is not model._session
        assert torch.equal(again(x), model(x))


def test_pickle_keeps_the_arguments(file, tmp_path, monkeypatch):
    """And finds a file that was given relative to another folder."""
    monkeypatch.chdir(file.parent)
    model = OnnxModel(file.name, device="cpu", threads=1, providers=[CPU])
    monkeypatch.chdir(tmp_path)
    again = pickle.loads(pickle.dumps(model))
    assert again._session.get_session_options().intra_op_num_threads == 1


def test_warm_up(model, pictures):
    model.warm_up()
    model.warm_up((1, 2))
    pictures = OnnxModel(pictures)
    pictures.warm_up((2,), image_size=(6, 8))
    for size in (None, (6,), (6, 8, 10)):
        with pytest.raises(ValueError, match="image_size is"):
            pictures.warm_up(image_size=size)
    with pytest.raises(ValueError, match="image_size is"):
        model.warm_up(image_size=(6, 8))


# --- arguments that do not fit ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (np.zeros((1, 3, 40, 48), np.float32), TypeError, "x is ndarray, expected a torch.Tensor"),
        (torch.zeros(1, 3, 40, 48).double(), TypeError, "x is torch.float64, expected torch.float32"),
        (torch.zeros(1, 3, 40, 48).half(), TypeError, "x is torch.float16, expected torch.float32"),
        (torch.zeros(3, 40, 48), ValueError, r"x has shape \[3, 40, 48\], expected \[batch, 3, 40, 48\]"),
        (torch.zeros(2, 3, 48, 40), ValueError, r"x has shape \[2, 3, 48, 40\], expected \[batch, 3, 40, 48\]"),
        (torch.zeros(2, 40, 48, 3), ValueError, r"x has shape \[2, 40, 48, 3\]"),
        (torch.zeros(2, 3, 40, 48, device="meta"), ValueError, "x is on meta, expected cpu"),
    ],
)
def test_inputs_that_do_not_fit(x, error, message, model):
    with pytest.raises(error, match=message):
        model(x)


def test_pictures_without_pixels(pictures):
    with pytest.raises(ValueError, match=r"x has shape \[1, 0, 5, 3\]"):
        OnnxModel(pictures)(torch.zeros(1, 0, 5, 3, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"device": "tpu"}, ValueError, "device is 'tpu', expected 'cpu' or 'cuda'"),
        ({"device": "meta"}, ValueError, "device is 'meta', expected 'cpu' or 'cuda'"),
        ({"threads": 0}, ValueError, "threads is 0, expected a positive integer"),
        ({"threads": 1.5}, ValueError, "threads is 1.5, expected a positive integer"),
        ({"providers": CPU}, ValueError, f"providers is '{CPU}', expected names"),
        ({"providers": []}, ValueError, r"providers is \[\], expected names"),
        ({"providers": ["XProvider"]}, ProviderError, "XProvider: this build of ONNX Runtime has .*CPU"),
        ({"profile": [(1, 3, 40, 48)]}, ValueError, "profile is .*, expected a smallest, a likeliest and a largest"),
        ({"profile": [(1, 3, 40, 40)] * 3}, ValueError, "profile is"),
        ({"profile": [(2, 3, 40, 48), (1, 3, 40, 48), (4, 3, 40, 48)]}, ValueError, "profile is"),
    ],
)
def test_arguments_that_do_not_fit(arguments, error, message, file):
    with pytest.raises(error, match=message):
        OnnxModel(file, **arguments)


def test_no_onnx_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected an ONNX file"):
        OnnxModel(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("words")
    with pytest.raises(ValueError, match=r"text\.onnx', which ONNX Runtime .* cannot load"):
        OnnxModel(tmp_path / "text.onnx")


def test_files_that_it_cannot_run(tmp_path):
    two = helper.make_node("Add", ["a", "b"], ["y"])
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3]) for name in "aby"]
    graph = helper.make_graph([two], "two", values[:2], values[2:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / "2.onnx")
    with pytest.raises(ValueError, match="has 2 inputs, expected one"):
        OnnxModel(tmp_path / "2.onnx")
    nodes = [helper.make_node("NonZero", ["x"], ["y"])]
    path = build(tmp_path, nodes, ("x", TensorProto.FLOAT, ["n", 3]), [("y", TensorProto.INT64, [2, "found"])])
    with pytest.raises(ValueError, match=r"output 'y' has shape \[2, 'found'\]"):
        OnnxModel(path)
    nodes = [helper.make_node("Greater", ["x", "x"], ["y"])]
    path = build(tmp_path, nodes, ("x", TensorProto.FLOAT, ["n", 3]), [("y", TensorProto.BOOL, ["n", 3])])
    with pytest.raises(ValueError, match=r"'y' is a tensor\(bool\)"):
        OnnxModel(path)


def test_missing_onnxruntime(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'resnet-fast\[onnxruntime\]'"):
        OnnxModel(file)


# --- providers --------------------------------------------------------------------------------------------------------

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="tells what happens without a GPU")


@without_gpu
def test_providers_that_do_not_work_are_left_out_with_the_reason(file, network, capfd):
    model = OnnxModel(file, providers=[TENSORRT, CUDA, CPU])
    assert (model.device, model.providers) == (torch.device("cpu"), (CPU,))
    assert set(model.refused) == {TENSORRT, CUDA}
    built = onnxruntime.get_available_providers()
    for name, reason in model.refused.items():
        assert ("cannot open shared object file" in reason) if name in built else ("this build of" in reason)
        assert f"{name}: not used, {reason}" in model.explain()
    torch.testing.assert_close(model(images(2)), network(images(2)), rtol=1e-4, atol=1e-4)
    assert capfd.readouterr() == ("", "")  # nothing of ONNX Runtime's own complaints


@without_gpu
def test_no_provider_left(file):
    with pytest.raises(ProviderError, match=f"none of providers works here: {CUDA}: "):
        OnnxModel(file, providers=[CUDA])
    with pytest.raises(ProviderError, match=r"device is 'cuda', but (PyTorch sees no GPU|this PyTorch is built)"):
        OnnxModel(file, device="cuda")


@without_gpu
@pytest.mark.skipif(CUDA not in onnxruntime.get_available_providers(), reason="needs the GPU build of ONNX Runtime")
@pytest.mark.parametrize(
    ("provider", "reason"), [(TENSORRT, "install TensorRT libraries"), (CUDA, "ONNX Runtime could not start it")]
)
def test_a_provider_that_fails_only_when_it_starts(provider, reason, file):
    """Without the look at its libraries: TensorRT raises, CUDA is dropped in silence."""
    refused = {}
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    session = onnx_providers.open_session(onnxruntime, str(file), settings, {provider: {}, CPU: {}}, refused)
    assert session.get_providers() == [CPU]
    assert reason in refused[provider]


@pytest.mark.skipif(TENSORRT not in onnxruntime.get_available_providers(), reason="needs the GPU build of ONNX Runtime")
def test_options_are_those_that_the_providers_know(file, tmp_path):
    """Their libraries cannot be loaded without a GPU, but hold the names as text."""
    folder = Path(onnxruntime.__file__).parent / "capi"
    tensorrt = (folder / "libonnxruntime_providers_tensorrt.so").read_bytes()
    cuda = (folder / "libonnxruntime_providers_cuda.so").read_bytes()
    stream = onnx_providers.gpu_options(1, 12345)
    assert stream == {"device_id": "1", "has_user_compute_stream": "1", "user_compute_stream": "12345"}
    for name in {**stream, **tensorrt_options(file, None, tmp_path)}:
        assert name.encode() + b"\0" in tensorrt, name
    for name in stream:
        assert name.encode() + b"\0" in cuda, name


def test_options_of_tensorrt(file, tmp_path):
    options = tensorrt_options(file, None, tmp_path / "cache")
    folder = Path(options["trt_engine_cache_path"])
    assert folder.parent == tmp_path / "cache" == Path(options["trt_timing_cache_path"])
    assert folder.is_dir()
    assert folder.stat().st_mode & 0o077 == 0
    assert options["trt_profile_min_shapes"] == "input:1x3x40x48"
    assert options["trt_profile_opt_shapes"] == "input:8x3x40x48"
    assert options["trt_profile_max_shapes"] == "input:32x3x40x48"
    assert not {"trt_fp16_enable", "trt_bf16_enable", "trt_int8_enable"} & options.keys()
    assert tensorrt_options(file, None, tmp_path / "cache") == options
    given = tensorrt_options(file, [(2, 3, 40, 48)] * 3, tmp_path / "cache")
    assert given["trt_profile_max_shapes"] == "input:2x3x40x48"


def test_precisions_of_tensorrt(tmp_path):
    weights = [
        numpy_helper.from_array(np.array(0.5, np.float16), "scale"),
        numpy_helper.from_array(np.array(0, np.int8), "zero"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    kind = TensorProto.FLOAT16
    path = build(tmp_path, nodes, ("x", kind, ["n", 4]), [("y", kind, ["n", 4])], weights, opset=19)
    options = tensorrt_options(path, None, tmp_path)
    assert (options["trt_fp16_enable"], options["trt_int8_enable"]) == ("1", "1")
    assert "trt_bf16_enable" not in options


def test_engines_go_by_the_weights(file, tmp_path):
    """Also by weights that lie in a file beside."""
    model = onnx.load(file)
    for number in (1, 2):
        model.graph.initializer[0].CopyFrom(
            numpy_helper.from_array(
                numpy_helper.to_array(model.graph.initializer[0]) * number, model.graph.initializer[0].name
            )
        )
        onnx.save(copy.deepcopy(model), tmp_path / f"{number}.onnx")
        (tmp_path / f"beside{number}").mkdir()
        beside = tmp_path / f"beside{number}" / "m.onnx"
        onnx.save(copy.deepcopy(model), beside, save_as_external_data=True, location="m.data", size_threshold=0)
    folders = {tensorrt_options(path, None, tmp_path)["trt_engine_cache_path"] for path in tmp_path.rglob("*.onnx")}
    assert len(folders) == 4
    headers = {path.read_bytes() for path in tmp_path.rglob("m.onnx")}
    assert len(headers) == 1  # only the weights differ


def test_cache_that_cannot_be_written(file):
    with pytest.raises(OSError, match="cache is '/proc/engines', which cannot be written"):
        tensorrt_options(file, None, "/proc/engines")


def test_default_cache(file, tmp_path, monkeypatch):
    monkeypatch.setenv("RESNET_FAST_CACHE", str(tmp_path))
    assert Path(tensorrt_options(file, None, None)["trt_timing_cache_path"]) == tmp_path / "tensorrt"


def test_profiles():
    assert profile_for([None, 3, 8, 8]) == [[1, 3, 8, 8], [8, 3, 8, 8], [32, 3, 8, 8]]
    assert profile_for([4, 3, 8, 8]) == [[4, 3, 8, 8]] * 3
    assert profile_for(["n", "h", "w", 3]) == [[1, 64, 64, 3], [8, 480, 640, 3], [32, 1080, 1920, 3]]
    given = [[1, 9, 9, 3], [2, 9, 9, 3], [2, 10, 9, 3]]
    assert profile_for(["n", "h", "w", 3], given) == given
    with pytest.raises(ValueError, match="profile is None, expected"):
        profile_for(["n", 3, 8, "w"])
    with pytest.raises(ValueError, match="profile is"):
        profile_for(["n", "h", "w", 3], [[0, 9, 9, 3]] * 3)


# --- the order of work on a GPU, as far as it shows without one -------------------------------------------------------


class Stream:
    """Notes who waits for whom."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")


class Noted(torch.Tensor):
    """Notes the stream that its memory is kept for."""

    def record_stream(self, stream):
        stream.log.append(f"kept for {stream.name}")


def test_streams_wait_for_each_other(file, monkeypatch):
    """The session's stream starts after PyTorch's current one, which goes on after it; memory is kept for both."""
    log = []
    model = OnnxModel(file)
    model._stream = Stream("session", log)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("current", log))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    with model._on_stream([images(1).as_subclass(Noted), images(2).as_subclass(Noted)]):
        log.append("run")
    waits = ["session waits for current", "run", "current waits for session"]
    assert log == [*waits, "kept for session", "kept for session"]

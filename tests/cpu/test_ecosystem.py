"""What other people's code does to a ResNet: an accelerated model gives the stock result, or raises where it raises.

The rows are those of a survey of training recipes, exporters and PyTorch's own transforms. Each is a function of a
model, run on the stock model and on an accelerated copy.
"""

import copy
import io
import pickle
import warnings

import onnx
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import resnet_fast
from tests.cpu.small_models import accelerated, fused_calls, images, relative_error, small_resnet

X = images()
LAYER_INPUT = images(2, 64, 16, 16)
FEATURES = ["layer1.0.relu", "layer2.0.relu_1", "layer3.0.add", "layer4"]


def _gradients(model):
    model(X).square().sum().backward()
    return [p.grad for p in model.parameters()]


def _double_backward(model):
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), [model.conv1.weight, x])


def _save_and_load(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)(X)


def _per_sample_gradients(model):
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def loss(parameters, x):
        return torch.func.functional_call(model, (parameters, buffers), (x[None],)).square().sum()

    return torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, X)


def _forward_ad(model):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(X, torch.ones_like(X)))).tangent


def _hook(model):
    seen = []
    model.layer1[0].bn1.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    return model(X), seen


def _backward_hook(model):
    model.layer1[0].bn1.register_full_backward_hook(lambda *_: None)
    return model(X)


def _block_hooks(model):
    """Hooks on a whole block do not disturb what runs inside."""
    seen = []
    model.layer1[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    model.layer1[0].register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    return model(X), seen


def _global_hook(model):
    shapes = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: shapes.append((type(m).__name__, o.shape)))
    try:
        return model(X), shapes
    finally:
        handle.remove()


def _prune(model):
    prune.l1_unstructured(model.layer1[0].conv1, "weight", 0.5)
    return model(X)


def _weight_norm(model):
    nn.utils.parametrizations.weight_norm(model.layer1[0].conv1)
    return model(X)


def _spectral_norm_old(model):
    torch.manual_seed(0)
    nn.utils.spectral_norm(model.layer1[0].conv1)
    return model(X)


def _meta_then_assign(model):
    blank = copy.deepcopy(model).to("meta")
    shape = blank(X.to("meta")).shape
    blank.load_state_dict(model.state_dict(), assign=True)
    return shape, blank.eval()(X)


def _autocast(model):
    dtypes = []
    for module in (model.layer1[0], model.layer4[0], model.fc):
        module.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        return model(X).dtype, dtypes


def _checkpoint(model):
    checkpoint(model.layer1, LAYER_INPUT.clone().requires_grad_(), use_reentrant=False).sum().backward()
    return model.layer1[0].bn1.num_batches_tracked, model.layer1[0].conv1.weight.grad


def _layouts(model):
    last = torch.channels_last
    results = [model.layer2(LAYER_INPUT), model.layer2(LAYER_INPUT.contiguous(memory_format=last))]
    return [(y, y.is_contiguous(), y.is_contiguous(memory_format=last)) for y in results]


def _flops(model):
    with FlopCounterMode(display=False) as counter:
        model(X)
    return counter.get_total_flops()


def _export(model, x=X):
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    return program.module()(torch.cat([X, X[:1]]))


def _onnx(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model, (X,), dynamo=True, verbose=False)
    onnx.checker.check_model(program.model_proto)
    return sorted({node.op_type for node in program.model_proto.graph.node})


def _without(name):
    def change(model):
        setattr(model.layer2[0], name, None)
        return model(X)

    return change


def _replace(path, module):
    def change(model):
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, copy.deepcopy(module))
        return model(X)

    return change


def _frozen_norms_in_training(model):
    """Lightning's and everybody's idiom: norms in eval mode inside a training model."""
    for module in model.train().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model(X), _gradients(model)


def _no_tracking(model):
    model.layer1[0].bn1.track_running_stats = False
    model.layer1[0].bn1.running_mean = model.layer1[0].bn1.running_var = None
    return model(X)


def _momentum_none(model):
    model.bn1.momentum = None
    model.train()
    model(X)
    model(X)
    return model.bn1.running_var, model.bn1.num_batches_tracked, model.eval()(X)


ROWS = {
    "eval": lambda model: model(X),
    "keyword": lambda model: model(x=X),
    "deepcopy": lambda model: copy.deepcopy(model)(X),
    "pickle": lambda model: pickle.loads(pickle.dumps(model))(X),
    "torch.save": _save_and_load,
    "gradients": _gradients,
    "double backward": _double_backward,
    "functional_call": lambda m: torch.func.functional_call(m, {k: v * 1.01 for k, v in m.named_parameters()}, (X,)),
    "per-sample gradients": _per_sample_gradients,
    "func.grad": lambda model: torch.func.grad(lambda x: model(x).sum())(X),
    "func.vjp": lambda model: torch.func.vjp(model, X)[1](torch.ones(2, 7)),
    "func.jvp": lambda model: torch.func.jvp(model, (X,), (torch.ones_like(X),)),
    "forward AD": _forward_ad,
    "fx.symbolic_trace": lambda model: [str(n) for n in torch.fx.symbolic_trace(model).graph.nodes],
    "create_feature_extractor": lambda model: create_feature_extractor(model, FEATURES)(X),
    "get_graph_node_names": lambda model: get_graph_node_names(model),
    "fx conv-bn fuse": lambda model: torch.fx.experimental.optimization.fuse(model)(X),
    "jit.script": lambda model: torch.jit.script(model)(X),
    "jit.trace": lambda model: torch.jit.trace(model, X)(X),
    "export, dynamic batch": _export,
    "export, example batch 1": lambda model: _export(model, X[:1]),
    "export strict": lambda model: torch.export.export(model, (X,), strict=True).module()(X),
    "onnx": _onnx,
    "SyncBatchNorm": lambda model: nn.SyncBatchNorm.convert_sync_batchnorm(model)(X),
    "forward hook on a norm": _hook,
    "backward hook on a norm": _backward_hook,
    "hooks on a block": _block_hooks,
    "global hook": _global_hook,
    "pruning": _prune,
    "weight_norm": _weight_norm,
    "spectral_norm": _spectral_norm_old,
    "meta, then assign": _meta_then_assign,
    "double": lambda model: model.double()(X.double()),
    "autocast dtypes": _autocast,
    "checkpoint": _checkpoint,
    "layouts": _layouts,
    "flop counter": _flops,
    "downsample removed": _without("downsample"),
    "fc replaced": _replace("fc", nn.Identity()),
    "norm replaced by GroupNorm": _replace("layer1.0.bn1", nn.GroupNorm(8, 64)),
    "downsample replaced": _replace("layer2.0.downsample", nn.Conv2d(64, 128, 1, 2)),
    "convolution replaced": _replace("layer1.0.conv1", nn.Conv2d(64, 64, 3, padding=1, padding_mode="reflect")),
    "ReLU replaced": _replace("layer1.0.relu", nn.GELU()),
    "max-pool replaced": _replace("maxpool", nn.MaxPool2d(2)),
    "frozen norms in training": _frozen_norms_in_training,
    "no running statistics": _no_tracking,
    "momentum None": _momentum_none,
    "batch 0": lambda model: model(X[:0]),
    "odd size": lambda model: model(images(1, 3, 37, 51)),
    "one pixel": lambda model: model(images(1, 3, 1, 1)),
    "image without batch": lambda model: model(X[0]),
    "matrix": lambda model: model(X[0, 0]),
    "four channels": lambda model: model(images(2, 4, 64, 64)),
    "half input": lambda model: model(X.half()),
    "integer input": lambda model: model(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)),
    "no input": lambda model: model(),
    "input None": lambda model: model(None),
    "training, one value per channel": lambda model: model.train()(images(1, 3, 16, 16)),
}
TOLERANCE = 1e-5  # a few dozen roundings of float32: logits and gradients of a network of twelve convolutions


def _outcome(row, model):
    torch.manual_seed(3)
    try:
        return row(model)
    except Exception as error:
        return error


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("block", [resnet.BasicBlock, resnet.Bottleneck])
@pytest.mark.parametrize("name", ROWS)
def test_as_stock(name, block):
    expected = _outcome(ROWS[name], small_resnet(block))
    result = _outcome(ROWS[name], accelerated(small_resnet(block)))
    if isinstance(expected, Exception):
        assert type(result) is type(expected), result
    else:
        if isinstance(result, Exception):
            raise result
        assert relative_error(result, expected) < TOLERANCE


@pytest.mark.parametrize(
    ("backend", "grad"), [("eager", True), ("aot_eager", True), ("aot_eager", False), ("inductor", False)]
)
def test_compile_fullgraph(backend, grad):
    stock = small_resnet()
    fast = accelerated(stock)
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend=backend)
    with torch.set_grad_enabled(grad):
        for x in (X, X[:1], images(3, 3, 40, 48)):
            assert relative_error(compiled(x), stock(x)) < TOLERANCE
    if grad:
        compiled(X).square().sum().backward()
        assert relative_error([p.grad for p in fast.parameters()], _gradients(stock)) < TOLERANCE


def test_compile_in_training_mode():
    torch._dynamo.reset()
    fast, stock = accelerated(small_resnet()).train(), small_resnet().train()
    result = torch.compile(fast, fullgraph=True, backend="aot_eager")(X)
    assert relative_error(result, stock(X)) < TOLERANCE
    assert relative_error(list(fast.buffers()), list(stock.buffers())) < TOLERANCE


def test_compiled_model_holds_the_fused_ops():
    graphs = []

    def backend(module, inputs):
        graphs.append([str(node.target) for node in module.graph.nodes])
        return module

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(accelerated(small_resnet()), fullgraph=True, backend=backend)(X)
    assert sum("resnet_fast" in target and "conv_bn_act" in target for target in graphs[0]) == 11


def test_export_holds_the_fused_ops_and_a_dynamic_batch():
    program = torch.export.export(
        accelerated(small_resnet()), (X,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}}
    )
    targets = [str(node.target) for node in program.graph.nodes]
    assert sum(target.startswith("resnet_fast.conv_bn_act") for target in targets) == 11
    assert not any("batch_norm" in target for target in targets)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    reloaded = torch.export.load(file).module()
    for batch in (1, 2, 5):
        x = images(batch, 3, 64, 64)
        assert relative_error(reloaded(x), small_resnet()(x)) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_no_less_precise(dtype):
    stock = small_resnet()
    fast = accelerated(stock).to(dtype)
    precise = copy.deepcopy(stock).double()(X.double())
    stock.to(dtype)
    with torch.inference_mode():
        stock_error = relative_error(stock(X.to(dtype)).double(), precise)
        fast_error = relative_error(fast(X.to(dtype)).double(), precise)
    assert fast_error <= 2 * stock_error


def test_autocast_is_no_less_precise():
    stock = small_resnet()
    fast = accelerated(stock)
    precise = copy.deepcopy(stock).double()(X.double())
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert fused_calls(lambda: fast(X)).count("conv_bn_act") == 11
        errors = [relative_error(model(X).double(), precise) for model in (stock, fast)]
    assert errors[1] <= 2 * errors[0]


def test_inference_mode_then_gradients():
    """What inference_mode leaves in the caches must be usable by autograd."""
    stock, fast = small_resnet(), accelerated(small_resnet())
    for model in (stock, fast):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)
    with torch.inference_mode():
        fast(X)
    (fast(X).square().sum()).backward()
    (stock(X).square().sum()).backward()
    assert relative_error(fast.conv1.weight.grad, stock.conv1.weight.grad) < TOLERANCE


def test_jit_script_compiles_the_stock_classes():
    scripted = torch.jit.script(accelerated(small_resnet()))
    assert "conv_bn_act" not in str(scripted.inlined_graph)


def test_pickle_holds_no_program():
    data = pickle.dumps(accelerated(small_resnet()))
    assert b"resnet_fast" in data  # the class is derived again where it is loaded
    assert b"_resnet_fast_state" not in data


def test_data_parallel_replica_runs_fused():
    model = accelerated(small_resnet())
    replica = model.layer1[0]._replicate_for_data_parallel()
    assert relative_error(replica(LAYER_INPUT), small_resnet().layer1[0](LAYER_INPUT)) < TOLERANCE


def test_instance_forward_wins():
    model = small_resnet()
    model.layer1[0].forward = lambda x: x * 2
    fast = resnet_fast.accelerate(model)
    assert torch.equal(fast.layer1[0](LAYER_INPUT), LAYER_INPUT * 2)
    rows = {row.path: row for row in resnet_fast.explain(fast).rows}
    assert "set on the instance" in rows["layer1.0"].reason

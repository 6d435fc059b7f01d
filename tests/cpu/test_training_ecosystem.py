"""What other people's loops do to a model in training: an accelerated one gives the stock losses, gradients, parameters
and running statistics, and runs fused where it should.

Each row is a function of a model, run in float64 on the stock model and on an accelerated copy; with
it stand the residual blocks that must run fused, forward and backward.
"""

import copy
import io
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import freeze_batch_norm_2d
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from torchvision.models import resnet
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

import resnet_fast
from tests.cpu.small_models import SEED, accelerated, fused_calls, images, randomise_norms, relative_error, short_resnet

X = images(4, 3, 32, 32).double()
LABELS = torch.tensor([0, 3, 6, 3, 1, 5, 2, 2])
TOLERANCE = 1e-9  # float64 leaves 1e-13; a wrong factor or a statistic too few gives 1e-3
STEPS = 2

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]


def sgd(model, **kwargs):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01, momentum=0.9, **kwargs)


def loss_of(model, x=X):
    return F.cross_entropy(model(x), LABELS[: len(x)])


def gradients(model):
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def state(model):
    """Parameters and buffers."""
    return [tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers())]


def train(model, x=X, optimiser=None, steps=STEPS):
    """Losses and gradients of a few steps, and what they leave."""
    optimiser = optimiser or sgd(model)
    seen = []
    for _ in range(steps):
        optimiser.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        seen += [loss.detach(), gradients(model)]
        optimiser.step()
    return seen, state(model)


# --- rows -------------------------------------------------------------------------------------------------------------


def _channels_last(model):
    return train(model.to(memory_format=torch.channels_last), X.contiguous(memory_format=torch.channels_last))


def _frozen(wanted):
    """Only some parameters learn."""

    def row(model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted(name))
        return train(model)

    return row


def _gradient_of_input(model):
    x = X.clone().requires_grad_()
    loss_of(model.requires_grad_(False), x).backward()
    return x.grad, state(model)


def _norms_in_eval_mode(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return train(model)


def _some_norms_in_eval_mode(model):
    for path in ("layer1.0.bn2", "layer1.1.bn1", "layer2.0.downsample.1"):
        model.get_submodule(path).eval()
    return train(model)


def _lightnings_freeze(model):
    finetuning = pytest.importorskip("pytorch_lightning.callbacks").BaseFinetuning
    finetuning.freeze([model.conv1, model.bn1, model.layer1], train_bn=False)
    first = train(model)
    finetuning.make_trainable(model.layer1)
    return first, train(model)


def _timms_freeze(model):
    return train(freeze_batch_norm_2d(model))


def _parametrised(model):
    parametrizations.weight_norm(model.layer1[0].conv1)
    parametrizations.orthogonal(model.layer2[0].conv1)
    return train(model)


def _pruned(model):
    prune.l1_unstructured(model.layer1[0].conv1, "weight", 0.5)
    return train(model)


class LowRank(nn.Module):
    """As LoRA wraps a convolution: it is frozen, a product of two thin ones learns."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv.requires_grad_(False)
        self.down = nn.Conv2d(conv.in_channels, 2, conv.kernel_size, conv.stride, conv.padding, bias=False)
        self.up = nn.Conv2d(2, conv.out_channels, 1, bias=False)
        self.to(conv.weight.dtype)

    def forward(self, x):
        return self.conv(x) + self.up(self.down(x))


def _low_rank(model):
    torch.manual_seed(SEED)
    model.layer1[0].conv1 = LowRank(model.layer1[0].conv1)
    return train(model)


def _hooks_on_blocks(model):
    seen = []
    model.layer1[0].register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
    model.layer2[0].register_full_backward_hook(
        lambda module, into, out: seen.append([into[0].clone(), out[0].clone()])
    )
    return train(model), seen


def _hook_on_a_convolution(model):
    seen = []
    model.layer1[0].conv2.register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
    return train(model), seen


def _optimiser_in_backward(model):
    """A step for each parameter as soon as its gradient is there."""

    def step(parameter):
        with torch.no_grad():
            parameter -= 0.01 * parameter.grad
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    for _ in range(STEPS):
        loss_of(model).backward()
    return state(model)


class Checkpointed(nn.Module):
    def __init__(self, module, **kwargs):
        super().__init__()
        self.module, self.kwargs = module, kwargs

    def forward(self, x):
        return checkpoint(self.module, x, **self.kwargs)


def _checkpointed(**kwargs):
    """Also counts the batches that recomputation sees again."""

    def row(model):
        model.layer1 = Checkpointed(model.layer1, **kwargs)
        with set_checkpoint_early_stop(False):
            return train(model)

    return row


def _deepcopy(model):
    first = train(model)
    return first, train(copy.deepcopy(model)), state(model)


def _pickle(model):
    first = train(model)
    return first, train(pickle.loads(pickle.dumps(model)))


def _resume(model):
    """From a checkpoint of model and optimiser, on a model made anew."""
    optimiser = sgd(model)
    first = train(model, optimiser=optimiser)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimiser": optimiser.state_dict()}, file)
    file.seek(0)
    kept = torch.load(file)
    model.load_state_dict({name: torch.zeros_like(value) for name, value in kept["model"].items()})
    model.load_state_dict(kept["model"], assign=True)
    optimiser = sgd(model)
    optimiser.load_state_dict(kept["optimiser"])
    return first, train(model, optimiser=optimiser)


def _moving_average(model):
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    optimiser = sgd(model)
    for _ in range(STEPS):
        train(model, optimiser=optimiser, steps=1)
        average.update_parameters(model)
    with torch.inference_mode():
        return average.eval()(X), state(average), state(model)


def _averaged_statistics(model):
    """Stochastic weight averaging: statistics from passes without gradients, momentum None for their time."""
    average = AveragedModel(model)
    train(model)
    average.update_parameters(model)
    update_bn([X, X + 1], average)
    return state(average)


def _accumulated(model):
    optimiser = sgd(model)
    for half in X.chunk(2):
        (loss_of(model, half) / 2).backward()
    seen = gradients(model)
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimiser.step()
    return seen, state(model)


def _backward_twice(model):
    loss = loss_of(model)
    loss.backward(retain_graph=True)
    loss.backward()
    return gradients(model)


def _gradient_penalty(model):
    x = X.clone().requires_grad_()
    loss = loss_of(model, x)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + gradient.square().sum()).backward()
    return gradient.detach(), gradients(model), state(model)


def _function_transform(model):
    def loss(parameters, buffers):
        return F.cross_entropy(torch.func.functional_call(model, (parameters, buffers), (X,)), LABELS[:4])

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    return torch.func.grad(loss)(parameters, buffers)


def _functional_call(model):
    changed = {name: (p * 1.01).detach().requires_grad_() for name, p in model.named_parameters()}
    loss = F.cross_entropy(torch.func.functional_call(model, changed, (X,)), LABELS[:4])
    return torch.autograd.grad(loss, list(changed.values())), state(model)


def _momentum_none(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    return train(model)


def _saved_elsewhere(model):
    with torch.autograd.graph.save_on_cpu():
        return train(model)


def _anomalies(model):
    with torch.autograd.detect_anomaly():
        return train(model)


def _evaluated_between(model):
    optimiser = sgd(model)
    seen = []
    for _ in range(STEPS):
        seen.append(train(model, optimiser=optimiser, steps=1))
        with torch.inference_mode():
            seen.append(model.eval()(X))
        model.train()
    return seen


def _restored_between(model):
    first = train(model)
    return first, train(resnet_fast.restore(model))


def _replaced(model):
    """A convolution for another number of channels and a head of other classes, as transfer learning does."""
    torch.manual_seed(SEED)
    model.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False).double()
    model.fc = nn.Linear(model.fc.in_features, 5).double()
    optimiser = sgd(model)
    F.cross_entropy(model(X[:, :1]), LABELS[:4].clamp(max=4)).backward()
    optimiser.step()
    return gradients(model), state(model)


def _one_value_a_channel(model):
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(X[:1, :, :4, :4])
    return model.bn1.running_mean


BLOCKS = 4  # the stem counts
EVERY = (BLOCKS * STEPS, BLOCKS * STEPS)
ONE_STOCK = (3 * STEPS, 3 * STEPS)
ROWS = {
    "plain": (train, EVERY),
    "channels_last": (_channels_last, EVERY),
    "early layers frozen": (_frozen(lambda name: name.startswith(("layer2", "fc"))), (BLOCKS * STEPS, STEPS)),
    "the head learns": (_frozen(lambda name: name.startswith("fc")), (BLOCKS * STEPS, 0)),
    "norms learn": (_frozen(lambda name: "conv" not in name and "downsample.0" not in name), EVERY),
    "biases learn": (_frozen(lambda name: name.endswith("bias")), EVERY),
    "gradient of the input": (_gradient_of_input, (BLOCKS, BLOCKS)),
    "norms in eval mode": (_norms_in_eval_mode, (3 * STEPS, 3 * STEPS)),  # the stem is then an op of its own
    "some norms in eval mode": (_some_norms_in_eval_mode, EVERY),
    "Lightning's freeze": (_lightnings_freeze, (2 * BLOCKS * STEPS, STEPS + 3 * STEPS)),
    "timm's freeze_batch_norm_2d": (_timms_freeze, (3 * STEPS, 3 * STEPS)),
    "SyncBatchNorm in one process": (lambda m: train(nn.SyncBatchNorm.convert_sync_batchnorm(m)), EVERY),
    "parametrised": (_parametrised, (2 * STEPS, 2 * STEPS)),
    "pruned": (_pruned, ONE_STOCK),
    "LoRA": (_low_rank, ONE_STOCK),
    "hooks on blocks": (_hooks_on_blocks, EVERY),
    "hook on a convolution": (_hook_on_a_convolution, ONE_STOCK),
    "optimiser in backward": (_optimiser_in_backward, EVERY),
    "checkpointed": (_checkpointed(use_reentrant=False), (6 * STEPS, EVERY[1])),
    "checkpointed, reentrant": (_checkpointed(use_reentrant=True), (6 * STEPS, EVERY[1])),
    "deepcopy": (_deepcopy, (2 * EVERY[0], 2 * EVERY[1])),
    "pickle": (_pickle, (2 * EVERY[0], 2 * EVERY[1])),
    "resume": (_resume, (2 * EVERY[0], 2 * EVERY[1])),
    "moving average": (_moving_average, EVERY),
    "averaged statistics": (_averaged_statistics, (EVERY[0] + 2 * BLOCKS, EVERY[1])),
    "accumulated, clipped": (_accumulated, EVERY),
    "backward twice": (_backward_twice, (BLOCKS, 2 * BLOCKS)),
    "gradient penalty": (_gradient_penalty, (BLOCKS, BLOCKS)),
    "torch.func.grad": (_function_transform, (0, 0)),
    "functional_call": (_functional_call, (BLOCKS, BLOCKS)),
    "momentum None": (_momentum_none, EVERY),
    "saved tensors elsewhere": (_saved_elsewhere, EVERY),
    "anomaly detection": (_anomalies, EVERY),
    "evaluated between": (_evaluated_between, EVERY),
    "restored between": (_restored_between, EVERY),
    "optimiser in one kernel": (lambda model: train(model, optimiser=sgd(model, fused=True)), EVERY),
    "layers replaced": (_replaced, (BLOCKS, BLOCKS)),
    "one value a channel": (_one_value_a_channel, (2, 0)),
}


def _counts(run):
    calls = fused_calls(run)
    return calls.count("residual_block"), calls.count("residual_block_backward")


@pytest.mark.parametrize("block", [resnet.BasicBlock, resnet.Bottleneck])
@pytest.mark.parametrize("name", ROWS)
def test_as_stock(name, block):
    row, fused = ROWS[name]
    stock = short_resnet(block)
    fast, counted = accelerated(stock), accelerated(stock)
    assert relative_error(row(fast), row(stock)) < TOLERANCE
    if fused is not None:
        assert _counts(lambda: row(counted)) == fused


# --- float32 and below: the kernels that serve there ------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_lie_as_their_parameters(dtype, layout):
    """Else DDP warns and copies, and so does every optimiser that works on lists of tensors."""
    model = accelerated(short_resnet(resnet.Bottleneck)).to(dtype, memory_format=layout)
    loss_of(model, X.to(dtype)).backward()
    assert [p.grad.stride() for p in model.parameters()] == [p.stride() for p in model.parameters()]


def _step(model, x, scaler=None, autocast=None):
    """Loss, gradients and buffers of one step."""
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        loss = loss_of(model, x)
    (loss if scaler is None else scaler.scale(loss)).backward()
    return loss.detach().double(), gradients(model), list(model.buffers())


def _distance(result, expected):
    """Of all gradients together, in their norm: a ReLU that rounding flips moves single entries by much more."""
    pairs = [(a.double(), b) for a, b in zip(result[1], expected[1])]
    return (sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)).sqrt().item()


WINOGRAD = 5e-5  # what its transforms may lose of the largest result


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("block", [lambda: resnet.Bottleneck(64, 16), lambda: resnet.BasicBlock(64, 64)])
def test_backward_may_be_inside_autocast(block, training):
    """Its sums and products are in float32 all the same, as PyTorch's backward pass of a convolution is."""
    gradients = []
    for inside in (True, False):
        torch.manual_seed(0)
        fast = resnet_fast.accelerate(block().train(training))
        x = images(4, 64, 14, 14).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            loss = fast(x).float().square().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        gradients.append([x.grad, *(p.grad for p in fast.parameters())])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("block", [resnet.BasicBlock, resnet.Bottleneck])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_is_no_less_precise(autocast, block):
    # oneDNN computes float16 by loops that are a hundred times as slow: there few pixels have to do.
    x = images(8, 3, 64, 64) if autocast != torch.float16 else images(4, 3, 32, 32)
    precise = short_resnet(block)
    stock = copy.deepcopy(precise).float().to(memory_format=torch.channels_last)
    fast = accelerated(stock)
    expected = _step(precise, x.double())
    results = [_step(model, x, autocast=autocast) for model in (stock, fast)]
    losses = [abs(result[0] - expected[0]).item() for result in results]
    distances = [_distance(result, expected) for result in results]
    statistics = [
        relative_error([b.double() for b in result[2]], [b.double() for b in expected[2]]) for result in results
    ]
    eps = torch.finfo(autocast or torch.float32).eps
    assert losses[1] <= 2 * losses[0] + WINOGRAD + 4 * eps
    assert statistics[1] <= 2 * statistics[0] + WINOGRAD
    assert distances[1] <= 2 * distances[0] + 20 * WINOGRAD


def test_gradient_scaler_skips_the_step_that_overflows():
    """A scale too large gives infinities, also through fused blocks; the next step is taken with half of it."""
    model = accelerated(short_resnet()).float()
    optimiser, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1000)
    before = [p.detach().clone() for p in model.parameters()]
    _step(model, X.float(), scaler, torch.float16)
    scaler.step(optimiser)
    scaler.update()
    assert scaler.get_scale() == 2.0**126
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters()))


# --- loops with parts of their own ------------------------------------------------------------------------------------


def test_timms_gradient_checkpointing():
    torch.manual_seed(SEED)
    stock = timm.create_model("test_resnet", num_classes=7).double().train()
    stock.set_grad_checkpointing()
    fast, counted = accelerated(stock), accelerated(stock)
    with set_checkpoint_early_stop(False):
        assert relative_error(train(fast), train(stock)) < TOLERANCE
        forward, backward = _counts(lambda: train(counted))
    assert forward > backward > 0  # recomputed


def test_faster_rcnn_with_frozen_norms():
    """As torchvision fine-tunes it: three stages learn; sampling of proposals draws the same random numbers."""
    torch.manual_seed(SEED)
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=3)
    few = {"rpn_pre_nms_top_n_train": 100, "rpn_post_nms_top_n_train": 50, "box_batch_size_per_image": 16}
    stock = randomise_norms(FasterRCNN(backbone, num_classes=3, min_size=64, max_size=96, **few)).double().train()
    fast, counted = accelerated(stock), accelerated(stock)
    targets = [{"boxes": torch.tensor([[8.0, 9, 50, 40]]).double(), "labels": torch.tensor([1])}] * 2

    def step(model):
        torch.manual_seed(SEED)
        losses = model([*images(2, 3, 64, 80).double()], targets)
        sum(losses.values()).backward()
        return list(losses.values()), gradients(model)

    assert relative_error(step(fast), step(stock)) < TOLERANCE
    # The stem is an op of its own; the first stage does not learn. The RPN's convolution runs at five sizes.
    assert _counts(lambda: step(counted)) == (8 + 5, 6 + 5)


def test_compiled():
    torch._dynamo.reset()
    stock, model = short_resnet(), accelerated(short_resnet())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    seen = []
    optimiser = sgd(model)
    for _ in range(STEPS):
        optimiser.zero_grad()
        loss = loss_of(compiled)
        loss.backward()
        seen += [loss.detach(), gradients(model)]
        optimiser.step()
    assert relative_error((seen, state(model)), train(stock)) < TOLERANCE

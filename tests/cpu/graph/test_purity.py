"""A forward that is traced once must not differ from one that runs at every call.

Each forward here decides, keeps or writes something that no graph records. Fused or not, results, buffers, attributes
and the states of the generators must be those of the stock model; and ``accelerate`` itself must change nothing.
"""

import argparse
import copy
import functools
import gc
import logging
import os
import pickle
import random
import time
from collections import OrderedDict, deque
from dataclasses import dataclass
from enum import Enum
from types import SimpleNamespace

import numpy
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import resnet_fast
from tests.cpu.graph.test_program import X, network
from tests.cpu.small_models import accelerated, fused_calls, randomise_norms, relative_error

FLAG, SETTINGS, MEMO = True, {"scale": 2.0, "deep": {"on": True}}, []
GENERATOR = numpy.random.default_rng(0)


@pytest.fixture(autouse=True)
def shared_input():
    yield
    assert X._version == 0, "written to, though other tests read it"


def _body(self, x):
    return F.relu(self.bn1(self.conv1(x)))


def made(forward, **attributes):
    model = network(forward)
    type(model).cached = cached = functools.cached_property(lambda self: 2.0)
    cached.__set_name__(type(model), "cached")
    for name, value in attributes.items():
        setattr(model, name, copy.deepcopy(value) if not callable(value) else value)
    return model


def _generators():
    return (
        random.getstate(),
        str(numpy.random.get_state()),
        torch.get_rng_state().tolist(),
        repr(GENERATOR.bit_generator),
    )


def _attributes(model):
    tensors = [(k, v._version, v.tolist()) for k, v in model.state_dict().items()]
    plain = [
        {k: repr(v) for k, v in m.__dict__.items() if k[0] != "_" and not hasattr(v, "__next__")}
        for m in model.modules()
    ]
    return tensors, plain


# --- chance, time, and what is printed or kept ------------------------------------------------------------------------


def _drawn(draw):
    def forward(self, x):
        if self.training and draw() < 0.5:
            return x
        return _body(self, x)

    return forward


@pytest.mark.parametrize(
    "draw",
    [
        lambda: random.random(),
        lambda: random.randint(0, 1),
        lambda: numpy.random.rand(),
        lambda: GENERATOR.random(),
        lambda: torch.rand(1),
        lambda: torch.rand(1).item(),
        lambda: time.time() % 1,
        lambda: float(os.environ.get("NOBODY_SETS_THIS", "0")),
        lambda: float(os.getenv("NOBODY_SETS_THIS", "0")),
    ],
)
def test_stochastic_depth_is_fused_in_eval_mode_only(draw):
    fast = made(_drawn(draw))
    states = _generators()
    resnet_fast.accelerate(fast)
    assert _generators() == states
    (row,) = resnet_fast.explain(fast, training=True).rows
    assert row.status == "fused" and row.training.startswith("own forward: its forward ")
    assert fused_calls(lambda: fast.eval()(X)) == ["conv_bn_act"]
    stock = made(_drawn(draw)).train()
    fast.train()
    for seed in range(6):
        results = []
        for model in (stock, fast):
            random.seed(seed)
            numpy.random.seed(seed)
            torch.manual_seed(seed)
            GENERATOR.bit_generator.state = numpy.random.default_rng(seed).bit_generator.state
            results.append(model(X))
        if "time" not in draw.__code__.co_names:
            assert torch.equal(*results)


def _printing(self, x):
    print("seen", file=self.sink)
    return _body(self, x)


def _logging(self, x):
    logging.getLogger("resnet_fast.tests").warning("seen")
    return _body(self, x)


def _logger(self, x):
    LOGGER.warning("seen")
    return _body(self, x)


def _keeping(self, x):
    self.features["a"] = y = _body(self, x)
    return y


def _appending(self, x):
    self.features.append(x)
    return _body(self, x)


def _defaulting(self, x, memo=[]):  # noqa: B006
    memo.append(x)
    return _body(self, x)


def _remembering(self, x):
    MEMO.append(x)
    return _body(self, x)


def _counting_globally(self, x):
    global COUNT
    COUNT = 1
    return _body(self, x)


def _counting(self, x):
    self.steps += 1
    return _body(self, x) * 1.0


def _counting_in_place(self, x):
    self.steps.add_(1)
    return _body(self, x)


def _helping(self, x):
    return _body(self, x) * _helper(2, {})


def _helper(n, counts, memo=[]):  # noqa: B006
    memo.append(n)
    return n


def _caching(self, x):
    return _body(self, x) * self.cached


def _asking_for_the_class(self, x):
    return _body(self, x) if x.__class__ is torch.Tensor else x


def _registering(self, x):
    self.register_buffer("last", torch.zeros(1))
    return _body(self, x)


def _past_the_class(self, x):
    object.__setattr__(self, "last", 1)
    return _body(self, x)


def _writing_below(self, x):
    self.conv1.calls = 1
    return _body(self, x)


def _through_the_dict(self, x):
    self.__dict__["last"] = 1
    return _body(self, x)


def _catching(self, x):
    try:
        return _body(self, x)
    except RuntimeError:
        return x


def _asserting(self, x):
    assert x.sum() < 1e9
    return _body(self, x)


def _asking_for_gradients(self, x):
    return _body(self, x) if torch.is_grad_enabled() else x


def _asking_a_tensor(self, x):
    return _body(self, x) if self.factor > 0 else x


def _asking_by_name(self, x):
    return self.table[f"{x.shape[1]}"](_body(self, x))


def _iterating(self, x):
    return _body(self, x) * next(self.steps)


LOGGER = logging.getLogger("resnet_fast.tests")


@pytest.mark.parametrize(
    ("forward", "because", "attributes"),
    [
        (_printing, "calls print", {"sink": None}),
        (_logging, "calls logging.getLogger", {}),
        (_logger, "reads LOGGER", {}),
        (_keeping, "writes to a dict", {"features": {}}),
        (_keeping, "writes to a OrderedDict", {"features": OrderedDict()}),
        (_appending, "writes to a deque", {"features": deque([1, 2], maxlen=2)}),
        (_appending, "writes to a list", {"features": []}),
        (_defaulting, "writes to a list", {}),
        (_remembering, "writes to a list", {}),
        (_counting_globally, "writes to the global variable 'COUNT'", {}),
        (_counting, "writes to the attribute 'steps'", {"steps": 0}),
        (_counting, "computes with tensors", {"steps": torch.zeros(1)}),
        (_counting, "writes to the attribute 'steps'", {"steps": nn.Parameter(torch.zeros(1), requires_grad=False)}),
        (_helping, "writes to a list", {}),
        (_caching, "calls functools.__get__", {}),
        (_asking_for_the_class, "asks for the class", {}),
        (_registering, "calls register_buffer", {}),
        (_past_the_class, "calls object", {}),
        (_writing_below, "writes to the attribute 'calls'", {}),
        (_through_the_dict, "looks through its __dict__", {}),
        (_catching, "catches exceptions", {}),
        (_asserting, "could not be traced", {}),
        (_asking_for_gradients, "calls torch.is_grad_enabled", {}),
        (_asking_a_tensor, "computes with tensors", {"factor": torch.ones(())}),
        (_asking_by_name, "makes text of an input or a result", {"table": {"8": F.relu}}),
        (_iterating, "reads steps, a list_iterator", {"steps": iter([1, 2, 3])}),
    ],
)
def test_what_a_graph_cannot_do(forward, because, attributes, caplog, capsys):
    """The stock forward runs, and nothing of it has happened before."""
    fast, stock = made(forward, **attributes), made(forward, **attributes)
    states, untouched = _generators(), _attributes(stock)
    resnet_fast.accelerate(fast)
    (row,) = resnet_fast.explain(fast).rows
    assert because in row.reason
    assert (_generators(), _attributes(fast), MEMO, caplog.records) == (states, untouched, [], [])
    assert capsys.readouterr().out == ""
    if forward is not _iterating:  # of which no list_iterator can be copied
        assert torch.equal(fast(X), stock(X))
        assert _attributes(fast) == _attributes(stock)
    MEMO.clear()


def _joined(results, **settings):
    return torch.cat(results, settings["dim"])


def _joining(self, x):
    return _joined([_body(self, x), x], dim=1)


class _Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Buffer(torch.rand(8)), nn.Buffer(torch.rand(8))

    def forward(self, x):
        return x * self.scale[:, None, None] + self.shift[:, None, None]


def _with_an_affine_norm(self, x):
    return F.relu(self.norm(self.conv1(x)))


@pytest.mark.parametrize("forward", [_joining, _with_an_affine_norm])
def test_defaults_are_not_looked_for_where_there_can_be_none(forward, monkeypatch):
    """Whose function runs is only found among all objects of the process, which takes longer than the trace."""
    model = made(forward, norm=_Frozen())
    monkeypatch.setattr(gc, "get_referrers", lambda *objects: pytest.fail("looks through all objects"))
    assert relative_error(accelerated(model)(X), model(X)) < 1e-5


def test_a_buffer_that_counts_the_calls():
    """As a part of the graph where that is in place, else by the stock forward."""
    for forward in (_counting, _counting_in_place):
        models = made(forward), made(forward)
        for model in models:
            model.steps = nn.Buffer(torch.zeros(1))
        stock, fast = models[0], resnet_fast.accelerate(models[1])
        assert fast.steps == 0
        for _ in range(3):
            assert relative_error(fast(X), stock(X)) < 1e-5
        assert fast.steps == stock.steps == 3
        pickle.loads(pickle.dumps(fast.state_dict()))


def _dropping(self, x):
    y = F.relu(self.bn2(self.conv2(self.a(_body(self, x)))))
    return F.dropout(y, 0.5, self.training) + F.dropout(y, 0.5)


@pytest.mark.parametrize("training", [False, True])
def test_the_same_seed_drops_the_same(training):
    """Random numbers are drawn in the order of memory."""
    results = []
    for model in (made(_dropping, a=nn.Dropout()), resnet_fast.accelerate(made(_dropping, a=nn.Dropout()))):
        torch.manual_seed(0)
        results.append(model.train(training)(X))
    assert relative_error(results[1], results[0]) < 1e-5


# --- what may change between two calls --------------------------------------------------------------------------------


class Kind(Enum):
    SUM = 1
    PLAIN = 2


@dataclass
class Options:
    on: bool = True


class Slots:
    __slots__ = ("on",)

    def __init__(self):
        self.on = True


class Wide:
    on = True
    table = {"on": [True]}  # noqa: RUF012


def switched():
    """Has an attribute."""


switched.on = True


class Switch(nn.Module):
    shared = True
    table = {"on": [True]}  # noqa: RUF012

    @classmethod
    def asked(cls):
        return cls.shared

    def __init__(self):
        super().__init__()
        self.on = True

    def forward(self, x):
        return x


def _added(on):
    def forward(self, x):
        y = _body(self, x)
        return y + x if on(self) else y

    return forward


CONFIG, MODULE = argparse.Namespace(on=True), SimpleNamespace()
CONFIG.inner = {"on": [True]}


def _flag_of_a_closure():
    on = True

    def forward(self, x):
        y = _body(self, x)
        return y + x if on else y

    def switch(model):
        nonlocal on
        on = False

    return forward, switch


def _clear(one, name="on"):
    setattr(one, name, False)


CHANGES = {
    "namespace": (lambda self: self.a.on, lambda m: _clear(m.a), argparse.Namespace(on=True)),
    "nested namespace": (
        lambda self: self.a.b.on,
        lambda m: _clear(m.a.b),
        SimpleNamespace(b=SimpleNamespace(on=True)),
    ),
    "dataclass": (lambda self: self.a.on, lambda m: _clear(m.a), Options()),
    "slots": (lambda self: self.a.on, lambda m: _clear(m.a), Slots()),
    "dict": (lambda self: self.a["on"], lambda m: m.a.update(on=False), {"on": True}),
    "missing key": (lambda self: "off" not in self.a, lambda m: m.a.update(off=True), {}),
    "list": (lambda self: self.a[0], lambda m: m.a.clear() or m.a.append(False), [True]),
    "length": (lambda self: len(self.a) < 2, lambda m: m.a.append(1), [1]),
    "tuple of dicts": (lambda self: self.a[0]["on"], lambda m: m.a[0].update(on=False), ({"on": True},)),
    "set": (lambda self: 1 in self.a, lambda m: m.a.clear(), {1}),
    "enum": (lambda self: self.a is Kind.SUM, lambda m: setattr(m, "a", Kind.PLAIN), Kind.SUM),
    "function": (lambda self: self.a is F.relu, lambda m: setattr(m, "a", F.gelu), F.relu),
    "absent": (lambda self: not hasattr(self, "off"), lambda m: setattr(m, "off", True), None),
    "deleted": (lambda self: hasattr(self, "a"), lambda m: delattr(m, "a"), 1),
    "child's attribute": (lambda self: self.conv2.on, lambda m: _clear(m.conv2), None),
    "child's setting": (lambda self: self.conv1.groups == 1, lambda m: setattr(m.conv1, "groups", 2), None),
    "child's child": (lambda self: self.a[0].on, lambda m: _clear(m.a[0]), nn.ModuleList([Switch()])),
    "children's number": (lambda self: len(self.a) == 1, lambda m: m.a.append(Switch()), nn.ModuleList([Switch()])),
    "child's type": (
        lambda self: isinstance(self.a, Switch),
        lambda m: setattr(m, "a", nn.Identity()),
        Switch(),
    ),
    "child's class": (lambda self: self.a.shared, lambda m: setattr(Switch, "shared", False), Switch()),
    "parameter": (lambda self: self.conv1.bias is None, lambda m: m.conv1.register_parameter("bias", P), None),
    "shape": (lambda self: self.a.shape == (1,), lambda m: setattr(m, "a", torch.ones(2)), torch.ones(1)),
    "class": (lambda self: Wide.on, lambda m: setattr(Wide, "on", False), None),
    "method of a class": (lambda self: self.a.asked(), lambda m: setattr(Switch, "shared", False), Switch()),
    "own class": (lambda self: self.a.__class__.shared, lambda m: setattr(Switch, "shared", False), Switch()),
    "dict of a class": (lambda self: Wide.table["on"][0], lambda m: Wide.table.update(on=[0]), None),
    "dict of an object's class": (lambda self: self.a.table["on"][0], lambda m: Wide.table.update(on=[0]), Wide()),
    "dict of a child's class": (lambda self: self.a.table["on"][0], lambda m: Switch.table.update(on=[0]), Switch()),
    "function's attribute": (lambda self: switched.on, lambda m: setattr(switched, "on", False), None),
    "class by another name": (lambda self: (lambda cls: cls.on)(Wide), lambda m: setattr(Wide, "on", False), None),
    "global": (lambda self: FLAG, lambda m: globals().update(FLAG=False), None),
    "global dict": (lambda self: SETTINGS["deep"]["on"], lambda m: SETTINGS["deep"].update(on=False), None),
    "global namespace": (
        lambda self: CONFIG.inner["on"][0],
        lambda m: CONFIG.inner["on"].clear() or CONFIG.inner["on"].append(0),
        None,
    ),
    "setting of PyTorch": (
        lambda self: torch.backends.mkldnn.enabled,
        lambda m: setattr(torch.backends.mkldnn, "enabled", False),
        None,
    ),
}
P = nn.Parameter(torch.zeros(8))


@pytest.fixture
def kept():
    """What the changes change for everybody."""
    enabled = torch.backends.mkldnn.enabled
    yield
    globals().update(FLAG=True)
    SETTINGS["deep"]["on"] = Wide.on = Switch.shared = switched.on = True
    CONFIG.inner["on"], Wide.table["on"], Switch.table["on"] = [True], [True], [True]
    torch.backends.mkldnn.enabled = enabled


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_switch_that_is_changed_counts(change, planned, kept):
    on, switch, attribute = CHANGES[change]
    stock, fast = (made(_added(on)) for _ in range(2))
    for model in (stock, fast):
        model.a = copy.deepcopy(attribute)
        model.conv2.on = True
    resnet_fast.accelerate(fast)
    assert fused_calls(lambda: fast(X)) == ["conv_bn_act"]
    with torch.set_grad_enabled(not planned):
        before = fast(X)
        assert relative_error(before, stock(X)) < 1e-5
        if change != "child's setting":
            assert relative_error(fast(X), stock(X)) < 1e-5
        for model in (stock, fast):
            switch(model)
        if change == "child's setting":
            for model in (stock, fast):
                with torch.no_grad():
                    model.conv1.weight = nn.Parameter(model.conv1.weight[:, :4].clone())
        after = fast(X)
        assert relative_error(after, stock(X)) < 1e-5
        assert relative_error(after, before) > 1e-2


def test_a_variable_of_a_function_around_it():
    forward, switch = _flag_of_a_closure()
    stock, fast = made(forward), resnet_fast.accelerate(made(forward))
    before = fast(X)
    assert fused_calls(lambda: fast(X)) == ["conv_bn_act"]
    switch(fast)
    assert relative_error(fast(X), stock(X)) < 1e-5 < relative_error(before, stock(X))


@pytest.mark.parametrize("change", ["dict", "enum", "absent", "child's attribute", "global"])
def test_a_switch_that_is_changed_before_it_is_compiled_counts(change, kept):
    on, switch, attribute = CHANGES[change]
    stock, fast = made(_added(on), a=attribute), made(_added(on), a=attribute)
    for model in (stock, fast):
        model.conv2.on = True
    resnet_fast.accelerate(fast)
    for model in (stock, fast):
        switch(model)
    torch._dynamo.reset()
    assert relative_error(torch.compile(fast, backend="eager", fullgraph=True)(X), stock(X)) < 1e-5


def test_hooks_of_a_sequential_do_not_run_in_a_trace():
    seen = []
    model = made(lambda self, x: self.a(_body(self, x)), a=nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)).eval())
    handle = model.a.register_forward_hook(lambda *_: seen.append(1))
    resnet_fast.accelerate(model)
    assert seen == []
    model(X)
    assert seen == [1]
    handle.remove()
    assert fused_calls(lambda: model(X)) == ["conv_bn_act"] * 2


def test_inputs_that_python_tells_apart():
    """A forward may ask what it is given: the graph is for tensors, none of which is None, or another one again."""

    def forward(self, x, other):
        y = _body(self, x)
        if other is None:
            return y
        return y * 2 if other is x else y + other if isinstance(other, torch.Tensor) else y - other[0]

    stock, fast = made(forward), resnet_fast.accelerate(made(forward))
    for x, other in ((X, None), (X, X), (X, X + 1), (X, [X + 1])):
        assert relative_error(fast(x, other), stock(x, other)) < 1e-5
        assert relative_error(fast(x, other=other), stock(x, other)) < 1e-5
    assert fused_calls(lambda: fast(X, X + 1)) == ["conv_bn_act"]


# --- writes that the trace does not see -------------------------------------------------------------------------------


def _write(name):
    def forward(self, x):
        z = _body(self, x)
        WRITES[name](z)
        return z + F.relu(self.bn2(self.conv2(z)))

    return forward


class Masks(nn.Module):
    def forward(self, x):
        x[:, 0] = 0
        return x.sum()


WRITES = {
    "out": lambda z: torch.clamp(z, min=0.5, out=z),
    "out of add": lambda z: torch.add(z, 1.0, out=z),
    "out of a view": lambda z: torch.clamp(z[:, :2], min=0.5, out=z[:, :2]),
    "slice": lambda z: z[:, :2].mul_(0.5),
    "chain of slices": lambda z: z[:, 1].sub_(0.1).div_(0.9),
    "setitem": lambda z: z.__setitem__((slice(None), slice(0, 3)), 0.0),
    "mask": lambda z: operator_setitem(z, z > 0.5, 0.0),
    "augmented slice": lambda z: augmented(z),
    "index_put_": lambda z: z.index_put_((torch_zero(z),), z[1] * 2),
    "copy_": lambda z: z[:, 2:4].copy_(z[:, :2]),
    "relu of a slice": lambda z: F.relu(z[:, :2] - 1, inplace=True) + F.threshold(z[:, :2], 0.5, 0.0, True),
    "view": lambda z: z.view(2, -1).add_(1.0),
    "reshape": lambda z: z.reshape(2, 8, -1).add_(1.0),
    "flatten": lambda z: torch.flatten(z, 1).mul_(0.5),
    "chunk": lambda z: z.chunk(2, 1)[0].mul_(0.5),
    "unpacked": lambda z: unpacked(z),
    "transposed": lambda z: z.transpose(1, 2).mul_(0.5),
    "foreach": lambda z: torch._foreach_mul_([z[:, :2], z[:, 2:4]], 0.5),
    "init": lambda z: nn.init.constant_(z[:, :2], 0.5),
    "data": lambda z: z.data[:, :2].mul_(0.5),
    "detach": lambda z: z.detach()[:, :2].mul_(0.5),
    "in place": lambda z: z.mul_(0.5),
    "power": lambda z: z.__ipow__(2),
}


def operator_setitem(z, where, value):
    z[where] = value


def augmented(z):
    z[:, :2] *= 0.5


def unpacked(z):
    a, b = torch.split(z, 4, 1)
    a.mul_(0.5)
    b.add_(a)


def torch_zero(z):
    return (z[0, 0, 0, :1] * 0).long()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", WRITES)
def test_writes_are_seen(name, layout):
    stock, fast = made(_write(name)), resnet_fast.accelerate(made(_write(name)))
    x = X.contiguous(memory_format=layout)
    results = []
    for model in (stock, fast):
        with torch.no_grad():
            try:
                results.append(model(x.clone()))
            except RuntimeError:  # views of channels_last memory
                results.append(None)
    assert (results[0] is None) == (results[1] is None)
    if results[0] is not None:
        assert relative_error(results[1], results[0]) < 1e-5
    if layout is torch.contiguous_format:
        with torch.no_grad():
            plain = made(lambda self, x: (lambda z: z + F.relu(self.bn2(self.conv2(z))))(_body(self, x)))(x)
        assert relative_error(plain, results[0]) > 1e-3


@pytest.mark.parametrize("name", WRITES)
def test_the_caller_sees_what_is_written_to_its_input(name):
    def forward(self, x):
        WRITES[name](x)
        return _body(self, x)

    stock, fast = made(forward), resnet_fast.accelerate(made(forward))
    given = [X.clone(), X.clone()]
    with torch.no_grad():
        assert relative_error(fast(given[1]), stock(given[0])) < 1e-5
    assert torch.equal(*given)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_children_that_write_or_give_back_what_they_are_given(layout):
    def masked(self, x):
        z = _body(self, x)
        return z + self.bn2(self.conv2(z)) * self.a(z)

    def sized(self, x):
        z = _body(self, x)
        shape, gate = z.shape, self.a(z)
        return self.bn2(self.conv2(z)).reshape(shape) * gate

    def passed_on(self, x):
        y = self.a(x)
        y += _body(self, x)
        return y

    def returned(self, x):
        return _body(self, x), x

    x = X.contiguous(memory_format=layout)
    for forward, child in (
        (masked, Masks()),
        (sized, Masks()),
        (passed_on, Switch()),
        (passed_on, nn.Identity()),
        (returned, None),
    ):
        stock, fast = made(forward, a=child), resnet_fast.accelerate(made(forward, a=child))
        given = [x.clone(), x.clone()]
        with torch.no_grad():
            results = [stock(given[0]), fast(given[1])]
        assert relative_error(results[1], results[0]) < 1e-5
        assert relative_error(given[1], given[0]) < 1e-6
        assert fused_calls(lambda: fast(x.clone())) or forward is passed_on  # noqa: B023
    assert results[1][1] is given[1]


# --- what everybody uses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "fused"),
    [
        (lambda: torchvision.models.densenet121(), 59),
        (lambda: torchvision.models.shufflenet_v2_x0_5(), 56),
        (lambda: torchvision.models.efficientnet_b0(), 49),
        (lambda: torchvision.models.googlenet(init_weights=False), 59),
        (lambda: timm.create_model("resnet26d", drop_path_rate=0.2), 31),
        (lambda: timm.create_model("skresnet18"), 12),
        (lambda: timm.create_model("res2net50_26w_4s"), 85),
        (lambda: timm.create_model("hrnet_w18_small"), 91),
    ],
)
def test_known_models_are_fused_as_before(make, fused):
    torch.manual_seed(0)
    fast = accelerated(randomise_norms(make()).eval())
    assert resnet_fast.explain(fast).fused >= fused
    pickle.dumps(fast)

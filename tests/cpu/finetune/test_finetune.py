"""``resnet-fast finetune`` from end to end: what is learnt, what is written, and what is said when it goes wrong."""

import csv
import io
import json
import logging
import resource
import shlex
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models import ResNet18_Weights

from resnet_fast.cli import main
from resnet_fast.finetune import Settings, open_data, train, transforms
from resnet_fast.finetune.freezing import Frozen
from resnet_fast.finetune.recipe import average, optimizer, schedule
from resnet_fast.models.named import build, read_checkpoint
from tests.cpu.finetune.finetune_data import TINY, write_cifar10, write_cifar100, write_folder

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_folder(tmp_path_factory.mktemp("images"), 60))


def parsed(path):
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def metrics(folder):
    """Those that do not tell the time."""
    entries = parsed(folder / "metrics.json")
    return [
        {name: value for name, value in entry.items() if name not in ("seconds", "images_per_second")}
        for entry in entries
    ]


# --- from end to end ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits") / "new" / "folder"
    arguments = ["--model", "timm:test_resnet", "--epochs", "3", "--lr", "0.004", "--model-ema", "--log-interval", "10"]
    with pytest.MonkeyPatch.context() as patch:
        stdout, stderr = io.StringIO(), io.StringIO()
        patch.setattr("sys.stdout", stdout)
        patch.setattr("sys.stderr", stderr)
        code = main(["finetune", "digits", *arguments, "--output", str(out), "--threads", "1", "--json", "-"])
    return code, out, stdout.getvalue(), stderr.getvalue()


def test_digits_are_learnt_and_all_files_are_there(digits_run):
    code, out, stdout, _ = digits_run
    assert code == 0
    result = json.loads(stdout)
    assert result["best_accuracy"] >= 0.93
    assert result == parsed(out / "results.json")
    assert sorted(path.name for path in out.iterdir()) == [
        *(".lock", "best.pt", "classes.txt", "confusion.csv", "confusion.png"),
        *("curves.png", "last.pt", "metrics.csv", "metrics.json", "results.json"),
    ]
    for name in ("curves.png", "confusion.png"):
        picture = np.asarray(Image.open(out / name).convert("L"))
        assert min(picture.shape) > 200 and np.ptp(picture) > 200


def test_metrics_agree(digits_run):
    _, out, _, stderr = digits_run
    entries = parsed(out / "metrics.json")
    assert list(entries[0]) == [
        *("epoch", "lr", "train_loss", "train_skipped", "images_per_second", "val_loss", "val_accuracy", "val_skipped"),
        *("ema_loss", "ema_accuracy", "seconds"),
    ]
    with (out / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [{name: float(value) for name, value in row.items()} for row in rows] == entries
    assert [entry["epoch"] for entry in entries] == [1, 2, 3]
    assert entries[2]["train_loss"] < entries[1]["train_loss"] < entries[0]["train_loss"]
    assert f"val accuracy {entries[2]['val_accuracy']:.2%}" in stderr
    assert "epoch 2/3  batch 10/21  loss" in stderr and "img/s  ETA 0:00:" in stderr


def test_confusion_and_accuracies_agree(digits_run):
    _, out, stdout, _ = digits_run
    result = json.loads(stdout)
    with (out / "confusion.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    matrix = np.array([[int(cell) for cell in row[1:]] for row in rows])
    assert header[1:] == [row[0] for row in rows] == [str(digit) for digit in range(10)]
    assert matrix.sum() == 450 and matrix.sum(1).min() >= 43
    assert np.trace(matrix) / 450 == pytest.approx(result["best_accuracy"])
    assert list(result["per_class_accuracy"].values()) == pytest.approx((np.diag(matrix) / matrix.sum(1)).tolist())
    entries = parsed(out / "metrics.json")
    assert result["best_accuracy"] == max(entry["ema_accuracy"] for entry in entries)


def test_best_checkpoint_is_what_was_scored(digits_run):
    """By the stock model, from the file alone; so the average of the weights is in it."""
    _, out, stdout, _ = digits_run
    content = torch.load(out / "best.pt", weights_only=True)
    model = build("timm:test_resnet", num_classes=10)
    model.load_state_dict(read_checkpoint(out / "best.pt"))
    data = open_data("digits", Settings())
    images = (data.validation.images.float() / 255 - 0.5) / 0.5
    with torch.inference_mode():
        right = (model(images).argmax(1) == data.validation.labels).float().mean().item()
    assert right == pytest.approx(content["accuracy"]) == pytest.approx(json.loads(stdout)["best_accuracy"])
    assert content["classes"] == [str(digit) for digit in range(10)]
    assert content["preprocessing"] == {"size": 32, "mean": (0.5,) * 3, "std": (0.5,) * 3, "resize": 32}


def test_the_next_command_that_it_names_works(digits_run, tmp_path, monkeypatch):
    _, out, _, stderr = digits_run
    (line,) = (line for line in stderr.splitlines() if line.startswith("next: resnet-fast export"))
    assert main(shlex.split(line)[2:]) == 0
    assert (out / "model.onnx").exists()
    (out / "model.onnx").unlink()


@pytest.mark.parametrize("write", [write_cifar10, write_cifar100])
def test_cifar(write, tmp_path):
    arguments = ["--model", "resnet18", "--epochs", "1", "--batch-size", "8", "--opt", "sgd", "--lr", "0.01"]
    assert main(["finetune", str(write(tmp_path)), *arguments, "--output", str(tmp_path / "out")]) == 0
    result = parsed(tmp_path / "out" / "results.json")
    assert result["preprocessing"]["size"] == 32 and len(result["per_class_accuracy"]) == 10


def test_default_output_is_a_folder_of_its_own(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main(["finetune", folder, *TINY, "--epochs", "1"]) == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["finetune", "finetune-2"]


def test_an_earlier_run_is_not_overwritten_unasked(folder, tmp_path, capsys):
    arguments = ["finetune", folder, *TINY, "--epochs", "1", "--output", str(tmp_path)]
    assert main(arguments) == 0
    before = (tmp_path / "last.pt").read_bytes()
    assert main([*arguments, "--seed", "5"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "last.pt").read_bytes() == before
    assert main([*arguments, "--seed", "5", "--overwrite"]) == 0
    assert (tmp_path / "last.pt").read_bytes() != before


def test_accelerated_and_stock_models_learn_the_same(folder, tmp_path):
    for name, more in (("fast", []), ("stock", ["--stock"]), ("nchw", ["--no-channels-last"])):
        assert main(["finetune", folder, *TINY, "--epochs", "2", "--output", str(tmp_path / name), *more]) == 0
    fast, stock, nchw = (metrics(tmp_path / name) for name in ("fast", "stock", "nchw"))
    for one, other, third in zip(fast, stock, nchw, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-3)
        assert one["val_loss"] == pytest.approx(other["val_loss"], rel=1e-2)
        assert third["train_loss"] == pytest.approx(other["train_loss"], rel=1e-3)


# --- exact resuming -----------------------------------------------------------------------------------------------

EVERYTHING = ["--epochs", "3", "--model-ema", "--warmup-epochs", "1.5", "--grad-accum-steps", "2"]
EVERYTHING += ["--mixup-alpha", "0.2", "--cutmix-alpha", "1", "--label-smoothing", "0.1", "--auto-augment", "ra"]
EVERYTHING += ["--random-erase", "0.3", "--clip-grad-norm", "1"]


@contextmanager
def interrupted_at(text):
    """Ctrl-C when ``text`` is logged."""

    class Interrupt(logging.Handler):
        def emit(self, record):
            if text in record.getMessage():
                raise KeyboardInterrupt

    handler, logger = Interrupt(), logging.getLogger("resnet_fast.finetune")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@pytest.mark.parametrize(
    "more",
    [EVERYTHING, ["--epochs", "3", "--opt", "sgd", "--amp", "bf16", "--freeze", "conv1,bn1", "--stock"]],
    ids=["adamw", "sgd"],
)
def test_resumed_run_is_the_uninterrupted_one_to_the_bit(folder, tmp_path, more, capsys):
    arguments = ["finetune", folder, *TINY, *more, "--log-interval", "2"]
    assert main([*arguments, "--output", str(tmp_path / "whole")]) == 0
    with interrupted_at("epoch 2/3  batch 4/6"):
        assert main([*arguments, "--output", str(tmp_path / "parts")]) == 130
    last = str(tmp_path / "parts" / "last.pt")
    assert f"interrupted; --resume {last} goes on after epoch 1" in capsys.readouterr().err
    torch.rand(7)
    assert main(["finetune", folder, "--resume", last, "--workers", "1"]) == 0
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    whole, parts = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "parts"))
    for key in ("model", "ema", "optimizer", "schedule", "scaler", "best", "epoch"):
        assert_same(whole[key], parts[key], key)
    assert_same(weights(tmp_path / "whole" / "best.pt"), weights(tmp_path / "parts" / "best.pt"), "best.pt")


def assert_same(one, other, where):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}.{index}")
    else:
        assert one == other, where


@pytest.fixture(scope="module")
def one_epoch(folder, tmp_path_factory):
    """A run of two epochs, stopped after the first."""
    out = tmp_path_factory.mktemp("one")
    with interrupted_at("epoch 2/2  batch"):
        assert main(["finetune", folder, *TINY, "--epochs", "2", "--log-interval", "1", "--output", str(out)]) == 130
    return out


def copy_of(run, to):
    to.mkdir(exist_ok=True)
    for path in run.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to / "last.pt"


def test_resuming_with_another_recipe_is_refused(folder, one_epoch, capsys):
    last = str(one_epoch / "last.pt")
    assert main(["finetune", folder, "--resume", last, "--lr", "0.5"]) == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "is 0.5, but the run to resume has None" in said and "--lr" in said


def test_resuming_with_more_epochs_trains_longer(folder, tmp_path, capsys):
    """At the rates that a run of so many epochs has."""
    arguments = ["finetune", folder, *TINY, "--lr", "0.004"]
    assert main([*arguments, "--epochs", "4", "--output", str(tmp_path / "four")]) == 0
    assert main([*arguments, "--epochs", "2", "--output", str(tmp_path / "two")]) == 0
    last = str(tmp_path / "two" / "last.pt")
    assert main(["finetune", folder, "--resume", last, "--epochs", "1"]) == 2
    assert "is 1, but 2 are done" in " ".join(capsys.readouterr().err.split())
    assert main(["finetune", folder, "--resume", last, "--epochs", "4"]) == 0
    rates = [[entry["lr"] for entry in metrics(tmp_path / name)] for name in ("four", "two")]
    assert len(rates[1]) == 4 and rates[1][2:] == rates[0][2:] and rates[1][1] != rates[0][1]
    assert "after epoch 2" in capsys.readouterr().err
    assert main(["finetune", folder, "--resume", last]) == 0
    assert parsed(tmp_path / "two" / "results.json")["epochs"] == 4


def test_resuming_with_other_data_is_refused(one_epoch, tmp_path, capsys):
    write_folder(tmp_path / "other", 60, classes=4)
    assert main(["finetune", str(tmp_path / "other"), "--resume", str(one_epoch / "last.pt")]) == 1
    assert "DATA has 4 classes, but the run to resume has 3, among them not 'three'" in capsys.readouterr().err
    write_folder(tmp_path / "more", 80)
    assert main(["finetune", str(tmp_path / "more"), "--resume", str(one_epoch / "last.pt")]) == 1
    assert "65 images, but the run to resume has 48" in capsys.readouterr().err


def test_resuming_from_what_is_no_checkpoint_is_refused(folder, one_epoch, tmp_path, capsys):
    (tmp_path / "damaged.pt").write_bytes((one_epoch / "last.pt").read_bytes()[:-1000])
    for name, said in (("damaged.pt", "damaged"), ("absent.pt", "No such file")):
        assert main(["finetune", folder, "--resume", str(tmp_path / name)]) == 1
        assert said in capsys.readouterr().err
    assert main(["finetune", folder, "--resume", str(one_epoch / "best.pt")]) == 1
    assert "holds weights only, expected a last.pt" in capsys.readouterr().err


def test_interrupted_before_there_is_a_checkpoint(folder, tmp_path, monkeypatch, capsys):
    """At the last moment: while the first one is being written."""

    def interrupted(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupted)
    assert main(["finetune", folder, *TINY, "--epochs", "1", "--output", str(tmp_path)]) == 130
    assert "interrupted in the first epoch: there is no checkpoint yet" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_what_a_killed_run_was_writing_is_removed(folder, one_epoch, tmp_path):
    last = copy_of(one_epoch, tmp_path)
    (tmp_path / ".last.0a1b2c3d.pt").write_bytes(b"half")
    assert main(["finetune", folder, "--resume", str(last)]) == 0
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == [".lock"]


def test_complete_run_resumed_writes_its_results_again(folder, tmp_path):
    arguments = ["finetune", folder, *TINY, "--epochs", "1", "--output", str(tmp_path)]
    assert main(arguments) == 0
    before = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "results.json").unlink()
    assert main(["finetune", folder, "--resume", str(tmp_path / "last.pt")]) == 0
    assert parsed(tmp_path / "results.json")["epochs"] == 1
    assert (tmp_path / "last.pt").read_bytes() == before


# --- a full disk --------------------------------------------------------------------------------------------------


@contextmanager
def files_of_at_most(size):
    """The kernel refuses to write more to a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("size", "file"), [(1_000_000, "last.pt"), (100, "metrics.csv")])
def test_full_disk_leaves_the_checkpoint_before(size, file, folder, one_epoch, tmp_path, capsys, monkeypatch):
    last = copy_of(one_epoch, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    if file == "metrics.csv":  # as if the disk had filled up between the two
        monkeypatch.setattr("resnet_fast.finetune.checkpoint.save", lambda *_: None)
    with files_of_at_most(size):
        assert main(["finetune", folder, "--resume", str(last)]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "cannot write" in said and "File too large; what was there before is unchanged" in said
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert main(["finetune", folder, "--resume", str(last)]) == 0


# --- weights to start from ----------------------------------------------------------------------------------------


def test_start_from_a_checkpoint(folder, one_epoch, tmp_path):
    arguments = ["finetune", folder, *TINY, "--epochs", "1", "--lr", "0", "--freeze-bn", "--weight-decay", "0"]
    assert main([*arguments, "--weights", str(one_epoch / "best.pt"), "--output", str(tmp_path)]) == 0
    assert_same(weights(one_epoch / "best.pt"), weights(tmp_path / "last.pt"), "")


def test_other_classes_need_a_new_head(one_epoch, tmp_path, capsys):
    four = str(write_folder(tmp_path / "four", 60, classes=4))
    arguments = [
        "finetune",
        four,
        *TINY,
        "--epochs",
        "1",
        "--lr",
        "0",
        "--freeze-bn",
        "--output",
        str(tmp_path / "out"),
    ]
    arguments += ["--weights", str(one_epoch / "best.pt")]
    assert main(arguments) == 1
    assert "DATA has 4 classes, but the checkpoint" in capsys.readouterr().err
    assert main([*arguments, "--new-head"]) == 0
    before, after = weights(one_epoch / "best.pt"), weights(tmp_path / "out" / "last.pt")
    assert after["fc.weight"].shape[0] == 4
    assert all(torch.equal(before[name], after[name]) for name in before if not name.startswith("fc."))


def test_state_dict_for_other_classes_needs_a_new_head(folder, tmp_path, capsys):
    torch.save(build("timm:test_resnet").state_dict(), tmp_path / "w.pth")
    arguments = ["finetune", folder, *TINY, "--epochs", "1", "--weights", str(tmp_path / "w.pth")]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 1
    assert "is not for the 3 classes of DATA; --new-head" in capsys.readouterr().err
    assert main([*arguments, "--output", str(tmp_path / "out"), "--new-head"]) == 0


def test_published_weights_get_a_head_for_the_data(folder, tmp_path, monkeypatch):
    """The file is not downloaded here; all else is as it is."""
    published = build("resnet18", seed=9).state_dict()
    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", lambda self, *args, **kwargs: published)
    arguments = ["--model", "resnet18", *TINY[2:], "--epochs", "1", "--lr", "0", "--freeze-bn"]
    arguments += ["--weights", "IMAGENET1K_V1", "--output", str(tmp_path)]
    assert main(["finetune", folder, *arguments]) == 0
    after = weights(tmp_path / "last.pt")
    assert after["fc.weight"].shape == (3, 512)
    assert torch.equal(after["layer4.1.conv2.weight"], published["layer4.1.conv2.weight"])


# --- what is said before the first epoch ends ----------------------------------------------------------------------


def test_a_run_says_first_what_it_does(folder, tmp_path, capsys):
    out = tmp_path / "out"
    with interrupted_at("epoch 1/1  batch 1/6"):
        assert main(["finetune", folder, *TINY, "--epochs", "1", "--log-interval", "1", "--output", str(out)]) == 130
    first, small, *_ = capsys.readouterr().err.splitlines()
    assert first == (
        "timm:test_resnet from scratch, 32x32; 48 images to learn from and 12 to validate on, 3 classes; "
        f"on cpu, 1 threads; into {out}/"
    )
    assert small.startswith("images of 32x32 are small for this model") and "leave 8x8 of them" in small


def test_a_terminal_sees_a_bar_from_the_first_batch(folder, tmp_path, monkeypatch):
    told = []

    @contextmanager
    def stages(console, title):
        yield lambda stage, done, total: told.append((stage, done, total))

    monkeypatch.setattr("resnet_fast.cli.finetune.stages", stages)
    assert main(["finetune", folder, *TINY, "--epochs", "2", "--output", str(tmp_path)]) == 0
    assert told[:6] == [("learning: epoch 1/2", done, 6) for done in range(1, 7)]
    assert told[6:8] == [("validating: epoch 1/2", done, 2) for done in range(2)]
    assert told[8] == ("learning: epoch 2/2", 1, 6) and len(told) == 16


def test_a_long_silence_is_broken(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("resnet_fast.finetune.progress._SILENCE", 0.0)
    assert main(["finetune", folder, *TINY, "--epochs", "1", "--output", str(tmp_path)]) == 0
    assert "epoch 1/1  batch 1/6" in capsys.readouterr().err


# --- what learns --------------------------------------------------------------------------------------------------


def changed(folder, more, tmp_path):
    """Names of entries of the state_dict that a run of one epoch changes."""
    arguments = ["finetune", folder, *TINY, "--epochs", "1", "--output", str(tmp_path / "out"), *more]
    assert main(arguments) == 0
    before = build("timm:test_resnet", num_classes=3).state_dict()
    after = weights(tmp_path / "out" / "last.pt")
    return {name for name in before if not torch.equal(before[name], after[name])}, set(before)


@pytest.mark.parametrize("stock", [[], ["--stock"]], ids=["fast", "stock"])
def test_frozen_modules_do_not_change(stock, folder, tmp_path):
    names, all_names = changed(folder, ["--freeze", "conv1, bn1,layer1", *stock], tmp_path)
    assert names == {name for name in all_names if name.partition(".")[0] not in ("conv1", "bn1", "layer1")}
    assert any("running_var" in name for name in names)


def test_frozen_batch_norms_do_not_change(folder, tmp_path):
    names, all_names = changed(folder, ["--freeze-bn"], tmp_path)
    model = build("timm:test_resnet", num_classes=3)
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert names == {name for name in all_names if name.rpartition(".")[0] not in norms}


def test_without_freezing_everything_changes(folder, tmp_path):
    names, all_names = changed(folder, [], tmp_path)
    assert names == all_names


def test_frozen_modules_survive_train():
    model = build("resnet18")
    frozen = Frozen(model, ["layer1.0"], batch_norms=False)
    model.train()
    frozen.train()
    assert model.training and model.layer1[1].bn1.training
    assert not any(module.training for module in model.layer1[0].modules())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--freeze", "layr1"], "names 'layr1', which is not a module: did you mean layer1"),
        (["--freeze", "conv1,bn1,layer1,layer2,layer3,layer4,fc"], "leaves nothing that learns"),
        (["--warmup-epochs", "2"], "is 2, expected fewer than --epochs 1"),
        (["--amp", "fp8"], "fp8"),
        (["--epochs", "0"], "--epochs"),
        (["--model", "resnet81"], "did you mean resnet18"),
        (["--weights", "IMAGENET1K_V9", "--model", "resnet18"], "IMAGENET1K_V1"),
    ],
)
def test_usage_errors_exit_with_2(more, said, folder, tmp_path, capsys):
    assert main(["finetune", folder, *TINY, "--epochs", "1", "--output", str(tmp_path / "out"), *more]) == 2
    output = capsys.readouterr()
    assert said in " ".join(output.err.replace("│", " ").split())
    assert output.out == ""


# --- precision and recipe -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_learns_about_the_same(amp, folder, tmp_path):
    for name, more in (("plain", []), ("mixed", ["--amp", amp])):
        assert main(["finetune", folder, *TINY, "--epochs", "2", "--output", str(tmp_path / name), *more]) == 0
    plain, mixed = metrics(tmp_path / "plain"), metrics(tmp_path / "mixed")
    assert plain[1]["train_loss"] != mixed[1]["train_loss"]
    assert mixed[1]["train_loss"] == pytest.approx(plain[1]["train_loss"], rel=0.1)
    scaler = torch.load(tmp_path / "mixed" / "last.pt", weights_only=True)["scaler"]
    assert bool(scaler) == (amp == "fp16")


def test_accumulated_batches_give_the_gradient_of_the_joined_one(folder, tmp_path):
    """Without batch statistics, which would differ."""
    for name, batch, steps in (("joined", 16, 1), ("parts", 4, 4)):
        arguments = [*TINY, "--batch-size", str(batch), "--grad-accum-steps", str(steps), "--freeze-bn", "--stock"]
        arguments += ["--epochs", "2", "--opt", "sgd", "--output", str(tmp_path / name)]
        assert main(["finetune", folder, *arguments]) == 0
    for one, other in zip(metrics(tmp_path / "joined"), metrics(tmp_path / "parts"), strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)
        assert one["val_loss"] == pytest.approx(other["val_loss"], rel=1e-4)


def test_learning_rate_rises_then_falls():
    parameters = nn.Linear(1, 1)
    settings = Settings(opt="sgd", lr=1.0, epochs=10, warmup_epochs=2)
    steps = optimizer(parameters, settings)
    plan = schedule(steps, settings, steps_per_epoch=5)
    rates = []
    for _ in range(50):
        rates.append(steps.param_groups[0]["lr"])
        steps.step()
        plan.step()
    assert rates[:11] == pytest.approx([(index + 1) / 11 for index in range(11)])
    expected = [0.5 * (1 + np.cos(np.pi * index / 40)) for index in range(40)]
    assert rates[10:] == pytest.approx(expected)
    assert steps.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def test_weight_decay_spares_biases_and_norms():
    model = build("resnet18")
    groups = optimizer(model, Settings()).param_groups
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    assert {parameter.dim() for parameter in groups[1]["params"]} == {1}
    assert len(groups[0]["params"]) + len(groups[1]["params"]) == len(list(model.parameters()))


def test_average_forgets_the_first_steps_fast():
    model = nn.BatchNorm1d(1)
    mean = average(model, 0.9)
    values = [5.0, 1.0, 2.0, 3.0]
    expected = values[0]
    for step, value in enumerate(values):
        nn.init.constant_(model.weight, value)
        model.running_mean.fill_(value)
        mean.update_parameters(model)
        if step:
            decay = min(0.9, (1 + step) / (10 + step))
            expected = decay * expected + (1 - decay) * value
    assert mean.module.weight.item() == pytest.approx(expected)
    assert mean.module.running_mean.item() == pytest.approx(expected)


def test_the_loss_is_that_of_a_plain_loop(tmp_path, monkeypatch):
    """The recipe written out in plain PyTorch, on the digits without augmentation."""
    monkeypatch.setattr(transforms, "for_training", transforms.for_evaluation)
    data = open_data("digits", Settings())
    settings = Settings(
        epochs=2, opt="sgd", lr=0.02, label_smoothing=0.1, warmup_epochs=0, stock=True, channels_last=False
    )
    train(build("timm:test_resnet", num_classes=10), data, settings, tmp_path)

    model = build("timm:test_resnet", num_classes=10)
    prepare = transforms.for_evaluation("digits", settings)  # / 255 rounds otherwise, which training does not forgive
    images, labels = torch.stack([prepare(image) for image in data.train.images]), data.train.labels
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": weights, "weight_decay": 1e-4}, {"params": others}]
    steps = torch.optim.SGD(groups, lr=0.02, momentum=0.9, nesterov=True)
    plan = torch.optim.lr_scheduler.CosineAnnealingLR(steps, 42)
    losses = []
    for epoch in range(2):
        model.train()
        losses.append(0.0)
        order = torch.randperm(1347, generator=torch.Generator().manual_seed(epoch))
        for batch in order[: 21 * 64].split(64):
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch], label_smoothing=0.1)
            steps.zero_grad()
            loss.backward()
            steps.step()
            plan.step()
            losses[-1] += loss.item() / 21
    assert [entry["train_loss"] for entry in parsed(tmp_path / "metrics.json")] == pytest.approx(losses, rel=1e-6)


def test_loss_that_is_no_number_stops_the_run(folder, tmp_path, capsys):
    arguments = [*TINY, "--epochs", "3", "--opt", "sgd", "--lr", "1e30", "--output", str(tmp_path / "out")]
    assert main(["finetune", folder, *arguments]) == 1
    assert "the loss is nan in epoch" in capsys.readouterr().err.splitlines()[-1]


def test_deterministic_is_a_setting_of_the_run_alone(folder, tmp_path):
    assert main(["finetune", folder, *TINY, "--epochs", "1", "--deterministic", "--output", str(tmp_path)]) == 0
    assert not torch.are_deterministic_algorithms_enabled()


# --- images that cannot be read -----------------------------------------------------------------------------------


def test_corrupt_images_are_skipped_named_and_counted(tmp_path, capsys):
    broken = []
    for name, count in (("train", 40), ("val", 20)):
        images = sorted(write_folder(tmp_path / name, count).rglob("*.png"))
        images[3].write_bytes(images[3].read_bytes()[:-40])
        images[9].write_bytes(b"")
        broken += [images[3], images[9]]
    arguments = [*TINY, "--batch-size", "10", "--epochs", "2", "--output", str(tmp_path / "out")]
    assert main(["finetune", str(tmp_path), *arguments]) == 0
    said = capsys.readouterr().err
    assert [said.count(f"skipped {path}: ") for path in broken] == [1, 1, 1, 1]
    entries = parsed(tmp_path / "out" / "metrics.json")
    assert [(entry["train_skipped"], entry["val_skipped"]) for entry in entries] == [(2, 2), (2, 2)]
    with (tmp_path / "out" / "confusion.csv").open(newline="") as file:
        assert sum(int(cell) for row in list(csv.reader(file))[1:] for cell in row[1:]) == 18


def test_a_batch_of_nothing_but_corrupt_images_is_passed_over(tmp_path, capsys):
    for name in ("train", "val"):
        write_folder(tmp_path / name, 12)
    for path in sorted((tmp_path / "train").rglob("*.png"))[:7]:
        path.write_bytes(b"")
    arguments = [*TINY, "--batch-size", "3", "--grad-accum-steps", "2", "--amp", "fp16", "--stock"]
    assert main(["finetune", str(tmp_path), *arguments, "--epochs", "2", "--output", str(tmp_path / "out")]) == 0
    assert parsed(tmp_path / "out" / "metrics.json")[1]["train_skipped"] == 7


def test_nothing_but_corrupt_images_is_an_error(tmp_path, capsys):
    for name in ("train", "val"):
        write_folder(tmp_path / name, 12)
    for path in (tmp_path / "val").rglob("*.png"):
        path.write_bytes(b"")
    arguments = ["finetune", str(tmp_path), *TINY, "--epochs", "1", "--output", str(tmp_path / "out")]
    assert main(arguments) == 1
    assert "none of the 12 images for validation can be read" in capsys.readouterr().err.splitlines()[-1]
    for path in (tmp_path / "train").rglob("*.png"):
        path.write_bytes(b"")
    assert main(arguments) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "no batch of images to learn from is usable: 8 cannot be read, and of the other 4 none came into a" in said
    assert not (tmp_path / "out" / "last.pt").exists()


@pytest.mark.parametrize("what", ["absent", "empty", "no classes"])
def test_folders_without_images_exit_with_1(what, tmp_path, capsys):
    if what != "absent":
        (tmp_path / "data").mkdir()
    if what == "no classes":
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / "image.png")
    assert main(["finetune", str(tmp_path / "data"), *TINY, "--output", str(tmp_path / "out")]) == 1
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert str(tmp_path / "data") in said
    assert not (tmp_path / "out").exists()

"""Learning with the rounding of 8 bits, and what ``resnet-fast finetune --qat`` leaves behind."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from resnet_fast.cli import main
from resnet_fast.finetune import Settings, open_data, qat, transforms
from resnet_fast.finetune.freezing import Frozen
from resnet_fast.models.named import build, read_checkpoint
from tests.cpu.finetune.finetune_data import TINY, write_folder
from tests.cpu.finetune.test_finetune import assert_same, interrupted_at
from tests.cpu.finetune.test_finetune_processes import ENVIRONMENT
from tests.cpu.small_models import SEED, small_resnet

pytestmark = pytest.mark.usefixtures("one_thread")


# --- learning -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model in float that reads digits, and its accuracy."""
    out = tmp_path_factory.mktemp("float")
    arguments = ["--model", "timm:test_resnet", "--epochs", "3", "--lr", "0.004", "--workers", "0", "--threads", "1"]
    assert main(["finetune", "digits", *arguments, "--output", str(out)]) == 0
    return out / "best.pt", json.loads((out / "results.json").read_text())["best_accuracy"]


@pytest.fixture(scope="module")
def digits():
    data = open_data("digits", Settings())
    return [((part.images.float() / 255 - 0.5) / 0.5, part.labels) for part in (data.train, data.validation)]


def accuracy(model, part):
    with torch.inference_mode():
        return (model.eval()(part[0]).argmax(1) == part[1]).float().mean().item()


def loaded(path):
    model = build("timm:test_resnet", num_classes=10)
    model.load_state_dict(read_checkpoint(path))
    return model


def learn(model, train, steps=20):
    frozen = Frozen(model, statistics=True)
    frozen.train()
    optimiser = torch.optim.AdamW(model.parameters(), 1e-3)
    order = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(SEED))
    for batch in order[: steps * 64].split(64):
        F.cross_entropy(model(train[0][batch]), train[1][batch]).backward()
        optimiser.step()
        optimiser.zero_grad()


def test_training_recovers_what_rounding_loses(trained, digits):
    """Under ranges so narrow that much of what the layers read is clamped; the same steps in float do not help."""
    path, in_float = trained
    train, validation = digits
    model = qat.prepare_qat(loaded(path))
    qat.calibrate(model, train[0][:256].split(64))
    assert accuracy(model, validation) >= in_float - 0.01  # 8 bits lose next to nothing
    narrow = {key: amax / 2 for key, amax in qat.ranges(model).items()}
    qat.set_ranges(model, narrow)
    clamped = accuracy(model, validation)
    assert clamped < in_float - 0.3

    qat.observe(model, False)
    learn(model, train)
    assert accuracy(model, validation) > clamped + 0.75 * (in_float - clamped)
    assert qat.ranges(model) == narrow

    unaware = loaded(path)
    learn(unaware, train)
    qat.set_ranges(qat.prepare_qat(unaware), narrow)
    assert accuracy(unaware, validation) < clamped + 0.5 * (in_float - clamped)


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_folder(tmp_path_factory.mktemp("images"), 60))


@pytest.fixture(scope="module")
def start(folder, tmp_path_factory):
    """A checkpoint to start from."""
    out = tmp_path_factory.mktemp("start")
    assert main(["finetune", folder, *TINY, "--epochs", "1", "--output", str(out)]) == 0
    return str(out / "best.pt")


def qat_run(folder, start, out, *more):
    # A learning rate that shows in a few steps.
    recipe = ["--epochs", "3", "--lr", "0.001", "--num-calibration-batches", "3", "--log-interval", "2"]
    return main(["finetune", folder, *TINY, "--qat", "--weights", start, *recipe, "--output", str(out), *more])


def validation_images(folder):
    settings = Settings(image_size=32)
    data = open_data(folder, settings)
    transform = transforms.for_evaluation(data.kind, settings)
    indices = range(len(data.validation))
    batch = torch.stack([transform(data.validation.load(i)) for i in indices])
    return batch.contiguous(memory_format=torch.channels_last), torch.tensor(
        [data.validation.label(i) for i in indices]
    )


def from_file(path):
    """What a checkpoint says, in a model of its own, with the layout of the run."""
    model = build("timm:test_resnet", num_classes=3).to(memory_format=torch.channels_last)
    model.load_state_dict(read_checkpoint(path))
    qat.set_ranges(qat.prepare_qat(model), qat.load_ranges(path))
    return model


def content(path):
    return torch.load(path, weights_only=True)


RUNS = {
    "average": ["--model-ema", "--num-observer-update-epochs", "2"],
    "stock": ["--stock", "--opt", "sgd", "--amp", "bf16", "--freeze", "conv1,bn1", "--num-observer-update-epochs", "2"],
}


@pytest.mark.parametrize("name", RUNS)
def test_resumed_run_is_the_uninterrupted_one_to_the_bit(name, folder, start, tmp_path):
    assert qat_run(folder, start, tmp_path / "whole", *RUNS[name]) == 0
    with interrupted_at("epoch 2/3  batch 4/6"):
        assert qat_run(folder, start, tmp_path / "parts", *RUNS[name]) == 130
    last = tmp_path / "parts" / "last.pt"
    after_one = content(last)
    with interrupted_at("epoch 3/3  batch 4/6"):
        assert main(["finetune", folder, "--resume", str(last)]) == 130
    after_two = content(last)
    assert main(["finetune", folder, "--resume", str(last)]) == 0
    whole, parts = (content(tmp_path / one / "last.pt") for one in ("whole", "parts"))
    for key in whole.keys() - {"settings", "history"}:  # which tell the folder and the time
        assert_same(whole[key], parts[key], key)
    assert [entry["val_loss"] for entry in whole["history"]] == [entry["val_loss"] for entry in parts["history"]]
    best = [content(tmp_path / one / "best.pt") for one in ("whole", "parts")]
    assert_same(best[0]["model"], best[1]["model"], "best.pt")
    assert best[0]["ranges"] == best[1]["ranges"] == qat.load_ranges(tmp_path / "parts" / "best.pt")

    # The ranges follow for two epochs, and stay in the third; all weights but the frozen ones learn in each.
    assert after_one["ranges"] != after_two["ranges"] == whole["ranges"]
    assert not torch.equal(after_two["model"]["fc.weight"], whole["model"]["fc.weight"])
    if name == "average":
        assert whole["ema_ranges"] not in (whole["ranges"], after_two["ema_ranges"])


def test_checkpoint_is_torchvisions_and_complete(folder, start, tmp_path):
    """From ``best.pt`` alone, another model computes what was scored."""
    assert qat_run(folder, start, tmp_path, "--model-ema", "--image-size", "32") == 0
    best = content(tmp_path / "best.pt")
    assert list(best["model"]) == list(build("timm:test_resnet", num_classes=3).state_dict())
    model = from_file(tmp_path / "best.pt")
    batch, labels = validation_images(folder)
    with torch.inference_mode():
        parts = [model(part) for part in batch.split(8)]  # as in the run
    entry = json.loads((tmp_path / "metrics.json").read_text())[best["epoch"] - 1]
    assert F.cross_entropy(torch.cat(parts), labels).item() == pytest.approx(entry["ema_loss"], rel=1e-6)


@pytest.mark.parametrize("freeze", [[], ["--freeze-bn"]], ids=["statistics", "all"])
def test_statistics_of_batch_norms_do_not_change(freeze, folder, start, tmp_path):
    assert qat_run(folder, start, tmp_path, *freeze) == 0
    before, after = content(start)["model"], content(tmp_path / "last.pt")["model"]
    same = {name for name in before if torch.equal(before[name], after[name])}
    norms = {name.rpartition(".")[0] for name in before if name.endswith("running_var")}
    parts = ("running_mean", "running_var", "num_batches_tracked", *(("weight", "bias") if freeze else ()))
    assert same == {f"{norm}.{part}" for norm in norms for part in parts}


def test_mixed_precision(folder, start, tmp_path, capsys):
    """float16 with a gradient scaler: its ranges are float32's but for rounding, and it learns."""
    arguments = ["--epochs", "1", "--num-observer-update-epochs", "0"]
    assert qat_run(folder, start, tmp_path / "fp32", *arguments) == 0
    assert capsys.readouterr().err.rstrip().endswith("model.onnx --precision int8")
    assert qat_run(folder, start, tmp_path / "fp16", *arguments, "--amp", "fp16") == 0
    expected, half = (qat.load_ranges(tmp_path / name / "last.pt") for name in ("fp32", "fp16"))
    # At most 12 convolutions and their batch norms one after another, each rounded to float16; a magnitude is the
    # largest of its tensor, so there is no cancellation in it to speak of.
    assert half == pytest.approx(expected, rel=2 * 12 * 2.0**-11)
    before, after = content(start)["model"], content(tmp_path / "fp16" / "last.pt")["model"]
    assert all(not torch.equal(before[name], after[name]) for name in before if name.endswith("weight"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--qat"], "is for a trained model, so --weights is needed too"),
        (["--qat", "--weights", "{preact}", "--model", "timm:resnetv2_18"], "does not go with the model: stages"),
    ],
    ids=["no weights", "pre-activation"],
)
def test_what_does_not_go_together_is_refused(arguments, said, folder, tmp_path, capsys):
    if "{preact}" in arguments:
        torch.save(build("timm:resnetv2_18", num_classes=3).state_dict(), tmp_path / "preact.pt")
    given = [one.format(preact=tmp_path / "preact.pt") for one in arguments]
    assert main(["finetune", folder, *TINY, "--output", str(tmp_path / "out"), *given]) == 2
    text = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "--qat" in text and said in text
    assert not (tmp_path / "out" / "last.pt").exists()


def test_files_without_ranges(start, tmp_path):
    assert qat.load_ranges(start) == {}
    torch.save(small_resnet().state_dict(), tmp_path / "plain.pt")
    (tmp_path / "other.txt").write_text("no checkpoint")
    assert qat.load_ranges(tmp_path / "plain.pt") == qat.load_ranges(tmp_path / "other.txt") == {}
    with pytest.raises(FileNotFoundError):
        qat.load_ranges(tmp_path / "absent.pt")
    for wrong, said in (([1.0], "has a list as ranges"), ({"conv1.input": float("nan")}, "ranges has nan for conv1")):
        torch.save({"model": {}, "ranges": wrong}, tmp_path / "wrong.pt")
        with pytest.raises(ValueError, match=said):
            qat.load_ranges(tmp_path / "wrong.pt")


def test_two_processes_share_weights_and_ranges(folder, start, tmp_path):
    """Each sees other images. What both scored together is what the file of the first one says."""
    recipe = [folder, *TINY, "--qat", "--weights", start, "--epochs", "2", "--lr", "0.001", "--model-ema"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "resnet_fast.finetune", *recipe, "--batch-size", "4", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    last, history = content(tmp_path / "last.pt"), json.loads((tmp_path / "metrics.json").read_text())
    for key, ranges, loss in (("model", "ranges", "val_loss"), ("ema", "ema_ranges", "ema_loss")):
        state = {name.removeprefix("module."): tensor for name, tensor in last[key].items() if name != "n_averaged"}
        torch.save({"model": state, "ranges": last[ranges]}, tmp_path / "alone.pt")
        model, (images, labels) = from_file(tmp_path / "alone.pt"), validation_images(folder)
        shares = [torch.arange(rank, len(labels), 2) for rank in (0, 1)]
        with torch.inference_mode():
            logits = [model(images[part]) for share in shares for part in share.split(4)]
        alone = F.cross_entropy(torch.cat(logits), labels[torch.cat(shares)])
        assert alone.item() == pytest.approx(history[-1][loss], rel=1e-6)

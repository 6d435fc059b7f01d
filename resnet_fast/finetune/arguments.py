"""What a run is asked for. Each field is an option of ``resnet-fast finetune``, with torchvision's or timm's name."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any, Literal, Optional

from typer import Option

_MAY_CHANGE = {"epochs", "resume", "output", "overwrite", "device", "workers", "threads", "log_interval"}
"""In a resumed run. But for the first, all have no influence on the result, beyond the rounding of another device."""

_data, _augmentation, _recipe, _freezing, _quantisation, _execution = (
    partial(Option, rich_help_panel=panel)
    for panel in ("Data", "Augmentation", "Optimisation", "What learns", "Quantisation", "Execution")
)


@dataclass(frozen=True)
class Settings:
    """What a run is asked for, in plain values, so that a checkpoint can hold them."""

    model: Annotated[
        str, Option(metavar="MODEL", help="A torchvision model, e.g. resnet50, or a timm model, e.g. timm:resnet26.")
    ] = "resnet18"
    weights: Annotated[
        Optional[str],
        Option(
            metavar="FILE|NAME",
            help="Where to start: a checkpoint (.pt, .pth, .safetensors), or published weights by name, e.g. DEFAULT. "
            "Without it, training starts from scratch.",
        ),
    ] = None
    new_head: Annotated[
        bool, Option("--new-head", help="Start the last layer anew, if the checkpoint has other classes.")
    ] = False
    output: Annotated[
        Optional[str],
        Option(
            metavar="FOLDER",
            help="Where to write; by default the first of runs/finetune, runs/finetune-2, ... that is free.",
        ),
    ] = None
    overwrite: Annotated[bool, Option("--overwrite", help="Start anew even if FOLDER has a checkpoint.")] = False
    resume: Annotated[
        Optional[str],
        Option(
            metavar="FILE",
            help="Go on from a last.pt, with its options, as if the run had never stopped; with --epochs for longer.",
        ),
    ] = None

    image_size: Annotated[
        Optional[int],
        _data(metavar="N", min=8, help="Height and width of the images; by default 224 for folders, else 32."),
    ] = None
    val_fraction: Annotated[
        float,
        _data(
            metavar="N",
            min=0.0,
            max=1.0,
            help="The share of each class to validate on, where a folder has no train/ and val/ of its own.",
        ),
    ] = 0.2
    batch_size: Annotated[int, _data(metavar="N", min=1, help="Images in a step of one process.")] = 64
    workers: Annotated[
        Optional[int],
        _data(metavar="N", min=0, help="Processes that load images; by default one for each core, at most 8."),
    ] = None

    auto_augment: Annotated[
        Optional[Literal["ra", "ta_wide", "augmix"]], _augmentation(help="RandAugment, TrivialAugment or AugMix.")
    ] = None
    random_erase: Annotated[
        float, _augmentation(metavar="N", min=0.0, max=1.0, help="The probability that a part of an image is erased.")
    ] = 0.0
    mixup_alpha: Annotated[float, _augmentation(metavar="N", min=0.0, help="The strength of mixup; 0 is none.")] = 0.0
    cutmix_alpha: Annotated[
        float,
        _augmentation(
            metavar="N", min=0.0, help="The strength of cutmix; 0 is none. With mixup, each batch gets one of both."
        ),
    ] = 0.0
    label_smoothing: Annotated[
        float, _augmentation(metavar="N", min=0.0, max=1.0, help="The share of a label that goes to all classes.")
    ] = 0.0

    epochs: Annotated[int, _recipe(metavar="N", min=1, help="How often to go through the images.")] = 10
    opt: Annotated[Literal["adamw", "sgd"], _recipe(help="The optimizer; sgd has Nesterov's momentum.")] = "adamw"
    lr: Annotated[
        Optional[float],
        _recipe(
            metavar="N",
            min=0.0,
            help="The highest learning rate; by default 0.001 for adamw, 0.05 for sgd, a hundredth of that with --qat.",
        ),
    ] = None
    momentum: Annotated[float, _recipe(metavar="N", min=0.0, max=1.0, help="The momentum of sgd.")] = 0.9
    weight_decay: Annotated[
        Optional[float],
        _recipe(metavar="N", min=0.0, help="Not for biases and norms; by default 0.05 for adamw, 0.0001 for sgd."),
    ] = None
    warmup_epochs: Annotated[
        Optional[float],
        _recipe(
            metavar="N",
            min=0.0,
            help="How long the learning rate rises, before it falls as a cosine; by default a tenth of the epochs.",
        ),
    ] = None
    grad_accum_steps: Annotated[int, _recipe(metavar="N", min=1, help="Batches in a step of the optimizer.")] = 1
    clip_grad_norm: Annotated[
        Optional[float], _recipe(metavar="N", min=0.0, help="The largest norm that gradients may have.")
    ] = None
    model_ema: Annotated[
        bool, _recipe("--model-ema", help="Keep a moving average of the weights; it decides which epoch is best.")
    ] = False
    model_ema_decay: Annotated[
        float, _recipe(metavar="N", min=0.0, max=1.0, help="How slowly the average moves, after a warm-up.")
    ] = 0.999
    amp: Annotated[
        Optional[Literal["bf16", "fp16"]], _recipe(help="Train in mixed precision; fp16 has a gradient scaler.")
    ] = None

    freeze: Annotated[
        Optional[str],
        _freezing(
            metavar="NAMES",
            help="Modules that do not learn, e.g. conv1,bn1,layer1; nor do their batch norms' statistics change.",
        ),
    ] = None
    freeze_bn: Annotated[bool, _freezing("--freeze-bn", help="No batch norm learns or changes its statistics.")] = False

    qat: Annotated[
        bool,
        _quantisation(
            "--qat",
            help="Quantisation-aware: learn with the rounding of an int8 export, which takes the ranges from the "
            "checkpoint. For a trained model; batch norms keep their statistics.",
        ),
    ] = False
    num_calibration_batches: Annotated[
        int, _quantisation(metavar="N", min=1, help="How many batches give the ranges that --qat starts with.")
    ] = 32
    num_observer_update_epochs: Annotated[
        Optional[int],
        _quantisation(
            metavar="N",
            min=0,
            help="In how many epochs the ranges of --qat follow the activations; by default the first half.",
        ),
    ] = None

    stock: Annotated[bool, _execution("--stock", help="Leave the model as it is, not accelerated.")] = False
    channels_last: Annotated[bool, _execution(help="Keep images and weights in memory as channels_last.")] = True
    sync_bn: Annotated[
        bool, _execution("--sync-bn", help="Take batch norm statistics over all processes of torchrun.")
    ] = False
    deterministic: Annotated[
        bool, _execution("--deterministic", help="Give the same bits again on a GPU too, at some cost.")
    ] = False
    device: Annotated[
        Optional[str], _execution(help="Where to train; by default cuda if there is a GPU, else cpu.")
    ] = None
    threads: Annotated[Optional[int], _execution(metavar="N", min=1, help="CPU threads; by default PyTorch's.")] = None
    seed: Annotated[int, _execution(metavar="N", min=0, help="The seed of new weights, order and augmentation.")] = 0
    log_interval: Annotated[int, _execution(metavar="N", min=1, help="Batches between two lines of progress.")] = 50

    @property
    def frozen_modules(self) -> list[str]:
        return [name.strip() for name in (self.freeze or "").split(",") if name.strip()]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def resumed(self, given: Mapping[str, Any]) -> "Settings":
        """These settings, of the run to resume, with those ``given`` that may differ from it.

        Raises:
            SettingError: another is ``given`` with another value.
        """
        for name, value in given.items():
            saved = getattr(self, name)
            if name not in _MAY_CHANGE and value != saved:
                raise SettingError(
                    name,
                    f"is {value}, but the run to resume has {saved}; expected the same, or --weights instead of "
                    "--resume, for a new run that starts from its weights",
                )
        return Settings(**{**asdict(self), "output": None, **given})


class SettingError(ValueError):
    """A setting that does not go with the others, the model or the data."""

    def __init__(self, name: str, problem: str) -> None:
        self.option, self.problem = "--" + name.replace("_", "-"), problem
        super().__init__(f"{self.option} {problem}")

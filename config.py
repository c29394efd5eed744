"""Everything you would want to change, and nothing else.

`Settings` holds what all runs share; the classes after it belong to the kinds of experiment; then come the experiments
themselves with their tuned values, the search spaces, the ablations, and the presets that combine all of it.
Any field can also be set for one run on the command line, by its name: `--data-root DIR --epochs 2`.
The command line overrides the preset, and the preset overrides the defaults of this file.

A field is a setting, a flag with its `--help` line (the comment beside it), a check (its type), and, unless it is
marked `Free`, part of what is compared when a run is resumed. The defaults are the paper's (arXiv 2601.00141): if you
change them, you run another protocol.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field

# ------------------------------------------------------------------------------------------- types of values
T = TypeVar("T")
NO_EFFECT = "no effect on a result's numbers"
Free = Annotated[T, NO_EFFECT]  # a run may be resumed with another value, and compared with runs that have another

Count = Annotated[int, Field(ge=1)]
Number = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Crops = Annotated[int, Field(ge=1, le=1024)]
Share = Annotated[float, Field(gt=0, lt=1)]
Rate = Annotated[float, Field(ge=0, le=1)]  # a learning rate
Decay = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, lt=1)]  # of dropout
GigaBytes = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Quality = Annotated[int, Field(ge=0, le=100)]  # of a JPEG
Switch = Literal["auto", "on", "off"]


def must_be(test: Callable[[Any], bool], what: str) -> AfterValidator:
    """A check of a field's value, with a message that says what the value must be."""

    def check(value: Any) -> Any:
        if not test(value):
            raise ValueError(f"it must be {what}")
        return value

    return AfterValidator(check)


EACH_ONCE = must_be(lambda values: len(values) == len(set(values)) > 0, "one or more values, each once")
Seeds = Annotated[tuple[Seed, ...], EACH_ONCE]
Factors = Annotated[tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...], EACH_ONCE]
CropCounts = Annotated[tuple[Crops, ...], EACH_ONCE]
Name = Annotated[str, must_be(re.compile(r"[\w-][\w.-]*").fullmatch, "a folder name of letters, digits, _ - and .")]
WeightsFiles = tuple[Annotated[str, must_be(re.compile("[^=]+=.+").fullmatch, "BACKBONE=FILE")], ...]


# ------------------------------------------------------------------------------------------------- all runs
@dataclass(frozen=True)
class Settings:
    """What all runs share."""

    # --- Folders
    data_root: Free[Path] = Path("datasets/ai-generated-images-vs-real-images/test")  # the data set
    results_root: Free[Path] = Path("results")  # everything that is written goes under results_root/<preset>/
    kaggle_dataset: Free[str] = "tristanzhang32/ai-generated-images-vs-real-images"  # what data_download fetches

    # --- Data
    data_layout: Free[str] = "auto"  # auto, fake_real, 0_real_1_fake, ai_nature, LIST.csv, LIST.csv:0=real or :0=fake
    max_image_pixels: Free[Count] = 200_000_000  # larger images are refused before they are decoded
    patch_size: Annotated[int, Field(ge=1, le=4096)] = 224  # side of the global view and of each crop, in pixels
    main_seed: Seed = 606  # the split, evaluation crops, tuning and both cost studies
    valid_size: Count | Share = 1800  # validation images, as a number or as a share of the data set
    test_size: Number | Share = 1800  # test images, likewise
    final_valid_fraction: Share = 0.05  # share of train + validation that final training uses for validation

    # --- Beyond the paper: which images, and which of them stay together in a split
    data_list: Free[str] = ""  # a CSV with a column path: use these images only (data.data_audit --match writes one)
    group_by: str = "none"  # groups that a split does not divide: stem (file name: pairs), folder, or FILE.csv:COLUMN
    hold_out: tuple[str, ...] = ()  # groups, such as "camera_*", that only the test split gets; test_size adds to them
    reencode_jpeg: Quality = 0  # save each image as JPEG of this quality first, in memory; 0: do not

    # --- Views
    exact_resize: bool = False  # resize GLASS's global view in float32, not in 8 bits (one grey level apart at most)

    # --- Pixel cache: python -m data.data_preprocess --cache decodes every image once and stores it
    use_cache: Free[bool] = True  # False: decode the files in every epoch, even where there is a cache
    cache_root: Free[Path] = Path("cache")  # on a fast local disk; it may hold the caches of many data sets
    cache_limit_gb: Free[GigaBytes | Literal["disk"]] = "disk"  # for one data set; disk: as much as is free

    # --- Backbones: a name is vit, convnext, resnet (the paper's, from torchvision) or timm:<model>
    pretrained: bool = True  # False: random weights
    weights_files: Free[WeightsFiles] = ()  # local weights instead of a download: "vit=FILE", "timm:<model>=FILE"

    # --- Optimisation
    label_smoothing: Probability = 0.1  # of the training loss
    eta_min: Rate = 1e-6  # learning rate at the end of the cosine schedule
    tensorboard: Free[bool] = False  # write scalars and pictures of each training for TensorBoard, beside its results
    checkpoint_every: Free[Number] = 0  # steps; 0: save the state after every epoch, and when a signal asks to stop

    # --- Hardware
    device: Free[str] = "auto"  # auto: CUDA where there is one; or cpu, cuda, cuda:1
    precision: Literal["fp16", "bf16", "fp32"] = "fp16"  # of the forward pass on CUDA; the CPU computes in fp32
    compile: bool = True  # torch.compile, on CUDA
    compile_blocks: bool = False  # on CUDA, compile each kind of block, not the network: quicker; for evaluation too
    channels_last: Switch = "auto"  # memory layout of convolutional backbones; auto: where it is safe
    activation_checkpointing: Free[Switch] = "off"  # compute activations twice to save memory; auto: if they do not fit
    deterministic: bool = True  # the same numbers on every run on the same machine
    matmul_precision: Literal["highest", "high", "medium"] = "high"  # of float32 products; high is TF32
    num_workers: Free[Number | Literal["auto"]] = "auto"  # processes that load images; auto: by the number of cores
    author_runtime: bool = False  # memory layout, AdamW, loading and compilation of the author's code, to compare costs


# ----------------------------------------------------------------------------- one class for each experiment package
@dataclass(frozen=True)
class Tuning:
    """hyperparameter_tuning: one Optuna study per model."""

    epochs: Count = 25  # of a trial
    trials: Free[Count | Literal["paper"]] = "paper"  # of a study; paper: 100 for GLASS, 50 for a standard model
    min_resource: Count = 5  # Hyperband; it counts epochs from 0: a trial is first compared after epoch 6
    max_resource: Count = 25  # Hyperband
    reduction_factor: Annotated[int, Field(ge=2)] = 3  # Hyperband
    study_storage: Free[str] = ""  # postgresql+psycopg://USER@HOST/DATABASE: workers share the study; "": one process
    heartbeat_seconds: Free[Count] = 60  # of a worker; after five missed ones, another worker takes over its trial

    def trials_of(self, standard: bool) -> int:
        """Number of trials in the study of a standard or of a GLASS model."""
        return (50 if standard else 100) if self.trials == "paper" else self.trials


@dataclass(frozen=True)
class Training:
    """model_training: final training and evaluation."""

    epochs: Count = 50  # of each seed
    seeds: Free[Seeds] = (100, 200, 300, 400, 500)  # one training each
    initial_weights: Free[str] = ""  # a model.safetensors, or a .pt of the author's code, to start from
    band_error: Annotated[float, Field(ge=0, lt=0.5)] = 0.05  # share of each class on the wrong side of "inconclusive"


@dataclass(frozen=True)
class CostSettings:
    """What both kinds of cost study share."""

    epochs: Count = 25  # of each training
    batch_size: Count = 32  # images
    quick: bool = False  # a few steps instead of whole epochs; epoch time is then extrapolated
    warmup_steps: Number = 3  # quick mode: steps before the clock starts
    measured_steps: Count = 10  # quick mode: steps on the clock


@dataclass(frozen=True)
class NumCrops(CostSettings):
    """num_crops: memory, time and accuracy against the number of crops K."""

    crop_counts: Free[CropCounts] = tuple(range(1, 17))  # the values of K


@dataclass(frozen=True)
class StandardMemory(CostSettings):
    """standard_memory: memory, time and accuracy of the standard models."""


@dataclass(frozen=True)
class Reproduce:
    """model_training.reproduce: which commands it runs, in this order, before it writes the tables."""

    stages: tuple[str, ...] = ("tuning", "training", "num_crops", "standard_memory")  # in this order
    experiments: tuple[str, ...] = (  # each stage runs their commands
        "standard_vit", "standard_convnext", "standard_resnet", "glass_vit", "glass_convnext", "glass_resnet",
    )  # fmt: skip
    demo_data: Literal["", "whole", "local"] = ""  # write demo images to data_root first; local: only a region is fake
    demo_images: Count = 200  # of each class
    closing_words: str = ""  # printed after the tables


# ---------------------------------------------------------------------------------------------- experiments
CropSampler = Literal[  # data/samplers.py
    "stratified", "random", "grid", "five", "texture_low", "texture_high", "texture_mixed", "frequency", "cooi", "all"
]  # fmt: skip
Pooling = Literal["attention", "gated", "mean", "max", "query"]  # models/pooling.py
Branches = Literal["both", "global", "local", "shared"]  # models/glass_models.py


@dataclass(frozen=True)
class GlassExperiment:
    """A GLASS model and its hyperparameters; `name` is its run folder and its row in the tables."""

    name: Name  # run folder, and row in the tables
    backbone: str  # vit, convnext, resnet or timm:<model>
    batch_size: Count  # images
    dropout_rate: Probability  # in attention and classifier
    lr_global: Rate  # learning rate of the global view's backbone
    lr_local: Rate  # learning rate of the crops' backbone
    lr_atten_class: Rate  # learning rate of attention and classifier
    wd_global: Decay  # weight decay of the global view's backbone
    wd_local: Decay  # weight decay of the crops' backbone
    num_crops: Crops  # K

    # --- Beyond the paper
    crop_sampler: CropSampler = "stratified"  # how crops are placed
    pooling: Pooling = "attention"  # of the crops' features
    branches: Branches = "both"  # global: no crops; local: no global view; shared: one backbone for both

    @property
    def crops_per_image(self) -> int:
        """K; 0 for a model that sees no crops."""
        return 0 if self.branches == "global" else self.num_crops


@dataclass(frozen=True)
class StandardExperiment:
    """A standard transfer-learning model and its hyperparameters."""

    name: Name  # run folder, and row in the tables
    backbone: str  # vit, convnext, resnet or timm:<model>
    batch_size: Count  # images
    dropout_rate: Probability  # before the last layer
    lr: Rate  # learning rate
    weight_decay: Decay  # of all parameters

    @property
    def crops_per_image(self) -> int:
        """0: it sees the whole image."""
        return 0


Experiment = GlassExperiment | StandardExperiment

# The paper's tuned values.
PAPER_EXPERIMENTS = (
    GlassExperiment(
        name="glass_vit", backbone="vit", batch_size=64, dropout_rate=0.3,
        lr_global=1.5831167386006587e-05, lr_local=4.260040963378685e-05, lr_atten_class=6.480235653979963e-05,
        wd_global=3.1761532137124536e-05, wd_local=6.13778525618186e-06, num_crops=10,
    ),
    GlassExperiment(
        name="glass_convnext", backbone="convnext", batch_size=32, dropout_rate=0.2,
        lr_global=6.549128272517001e-06, lr_local=9.999570997037118e-05, lr_atten_class=1.679984935907822e-05,
        wd_global=2.852588208730554e-06, wd_local=3.8782167347490953e-07, num_crops=4,
    ),
    GlassExperiment(
        name="glass_resnet", backbone="resnet", batch_size=32, dropout_rate=0.3,
        lr_global=2.158777650700252e-06, lr_local=6.853800121248665e-05, lr_atten_class=2.979509550261194e-05,
        wd_global=1.7932951228672164e-07, wd_local=6.017513558414679e-07, num_crops=6,
    ),
    StandardExperiment(
        name="standard_vit", backbone="vit", batch_size=128, dropout_rate=0.1,
        lr=7.480854951931871e-05, weight_decay=0.0004369279810718895,
    ),
    StandardExperiment(
        name="standard_convnext", backbone="convnext", batch_size=128, dropout_rate=0.1,
        lr=7.124161487066723e-05, weight_decay=2.1340317671998637e-06,
    ),
    StandardExperiment(
        name="standard_resnet", backbone="resnet", batch_size=32, dropout_rate=0.1,
        lr=4.59049376073978e-05, weight_decay=3.642553424460737e-07,
    ),
)  # fmt: skip


# -------------------------------------------------------------------------------------------- search spaces
@dataclass(frozen=True)
class LogUniform:
    """A positive real number, uniform in its logarithm."""

    low: Annotated[float, Field(gt=0)]
    high: Annotated[float, Field(gt=0)]


SearchSpace = Mapping[str, tuple | LogUniform]  # a tuple is a choice between its values

# Suggested in this order, which the sampler's draws depend on.
PAPER_GLASS_SPACE: SearchSpace = {
    "batch_size": (16, 32, 64),
    "dropout_rate": (0.0, 0.1, 0.2, 0.3),
    "lr_global": LogUniform(1e-6, 1e-4),
    "lr_local": LogUniform(1e-6, 1e-4),
    "lr_atten_class": LogUniform(5e-6, 1e-3),
    "wd_global": LogUniform(1e-7, 1e-3),
    "wd_local": LogUniform(1e-7, 1e-3),
    "num_crops": (2, 4, 6, 8, 10),
}
PAPER_STANDARD_SPACE: SearchSpace = {
    "lr": LogUniform(1e-6, 1e-4),
    "weight_decay": LogUniform(1e-7, 1e-3),
    "batch_size": (32, 64, 128),
    "dropout_rate": (0.0, 0.1, 0.2, 0.3),
}


# ------------------------------------------------------------------------------------------------ ablations
@dataclass(frozen=True)
class Ablations:
    """model_training.ablations: which variants of one GLASS experiment it trains.

    The paper's setting is always one of them: stratified crops, pooled by attention, both branches, the experiment's K.
    """

    experiment: str = "glass_resnet"  # the one to vary
    samplers: tuple[CropSampler, ...] = ("stratified", "random", "grid", "texture_high")  # each with each pooling
    poolings: tuple[Pooling, ...] = ("attention", "mean", "max")  # each with each sampler
    branches: tuple[Branches, ...] = ("global", "local", "shared")  # each with the paper's sampler and pooling
    crop_counts: tuple[Crops, ...] = ()  # values of K, each with the paper's sampler and pooling
    learning_rates: Factors = (0.5, 1.0, 2.0)  # factors for all rates; each variant gets the best one in validation
    standard: bool = True  # also the standard experiment of the same backbone


# -------------------------------------------------------------------------------------------------- presets
@dataclass(frozen=True)
class Preset:
    """A complete protocol, selected by `--preset NAME`; the defaults are the paper's."""

    name: str
    settings: Settings = Settings()
    tuning: Tuning = Tuning()
    training: Training = Training()
    num_crops: NumCrops = NumCrops()
    standard_memory: StandardMemory = StandardMemory()
    reproduce: Reproduce = Reproduce()
    ablations: Ablations = Ablations()
    experiments: tuple[Experiment, ...] = PAPER_EXPERIMENTS
    glass_space: SearchSpace = field(default_factory=lambda: PAPER_GLASS_SPACE)
    standard_space: SearchSpace = field(default_factory=lambda: PAPER_STANDARD_SPACE)


PAPER = Preset("paper")

# The same protocol in minutes on two CPU cores: procedural images, small backbones from scratch, small patches.
# A plain ViT learns too slowly from 300 images; MobileViT, transformers between convolutions, stands in for it.
DEMO_BACKBONES = (  # each with its learning rate
    ("vit", "timm:mobilevit_xxs", 2e-3),
    ("convnext", "timm:convnext_atto", 5e-4),
    ("resnet", "timm:resnet10t", 1e-3),
)
DEMO_EXPERIMENTS = (
    *(
        GlassExperiment(
            f"glass_{name}", backbone, batch_size=8, dropout_rate=0.1, lr_global=lr, lr_local=lr, lr_atten_class=1e-3,
            wd_global=1e-2, wd_local=1e-2, num_crops=4,
        )
        for name, backbone, lr in DEMO_BACKBONES
    ),
    *(
        StandardExperiment(f"standard_{name}", backbone, batch_size=8, dropout_rate=0.1, lr=lr, weight_decay=1e-2)
        for name, backbone, lr in DEMO_BACKBONES
    ),
)  # fmt: skip
DEMO = Preset(
    name="demo",
    settings=replace(
        PAPER.settings,
        data_root=Path("datasets/demo"),
        patch_size=64,
        valid_size=0.15,
        test_size=0.25,
        pretrained=False,
    ),
    tuning=Tuning(epochs=3, trials=4, min_resource=1, max_resource=3),
    training=Training(epochs=4, seeds=(100, 200)),
    num_crops=NumCrops(epochs=2, batch_size=16, crop_counts=(1, 2, 4, 8)),
    standard_memory=StandardMemory(epochs=2, batch_size=16),
    reproduce=Reproduce(
        stages=("training",),
        experiments=("standard_resnet", "glass_resnet"),
        demo_data="whole",
        closing_words=(
            "Why: the demo's fake images differ from its real ones only at native resolution, in the periodic traces "
            "of an upsampling decoder. The standard model sees the image resized, where both classes look alike; "
            "GLASS's crops see the traces. This demonstrates the mechanism on procedural images; it is no evidence "
            "about real generators."
        ),
    ),
    ablations=Ablations(
        samplers=("stratified", "random"), poolings=("attention", "mean"), branches=("global", "local")
    ),
    experiments=DEMO_EXPERIMENTS,
    glass_space={
        **PAPER_GLASS_SPACE,
        "batch_size": (8, 16),
        "lr_global": LogUniform(1e-4, 1e-2),
        "lr_local": LogUniform(1e-4, 1e-2),
        "lr_atten_class": LogUniform(1e-4, 1e-2),
        "num_crops": (2, 4, 6),
    },
    standard_space={**PAPER_STANDARD_SPACE, "batch_size": (8, 16), "lr": LogUniform(1e-4, 1e-2)},
)

# An eighth to a quarter of each fake image is fake, so that it matters where crops fall and how they are pooled. The
# global backbone, which cannot tell the classes apart, learns slowly, or it would memorise images. Tuned with resnet.
DEMO_LOCAL = replace(
    DEMO,
    name="demo_local",
    settings=replace(DEMO.settings, data_root=Path("datasets/demo_local"), final_valid_fraction=0.15),
    reproduce=replace(
        DEMO.reproduce,
        demo_data="local",
        closing_words=(
            "Why: an eighth to a quarter of each fake image of this demo has the traces of an upsampling decoder; the "
            "rest is as in a real one. GLASS finds them where a crop falls on them. This demonstrates the mechanism on "
            "procedural images; it is no evidence about real generators."
        ),
    ),
    ablations=Ablations(
        samplers=("stratified", "random", "grid", "texture_high", "frequency", "all"), learning_rates=(0.5, 1.0)
    ),
    experiments=tuple(
        replace(e, lr_global=1e-4, lr_local=2 * e.lr_local, num_crops=8) if isinstance(e, GlassExperiment) else e
        for e in DEMO_EXPERIMENTS
    ),
)

# For a few hundred images of your own: pairs stay together, a small backbone with learning rates to match, few trials.
# The numbers in docs/evidence.md were measured with it.
OWN_EXPERIMENTS = (
    GlassExperiment(
        name="glass_resnet", backbone="timm:tf_efficientnet_lite0", batch_size=16, dropout_rate=0.1, lr_global=2e-5,
        lr_local=4e-4, lr_atten_class=5e-4, wd_global=1e-4, wd_local=1e-4, num_crops=4,
    ),
    StandardExperiment(
        name="standard_resnet", backbone="timm:tf_efficientnet_lite0", batch_size=16, dropout_rate=0.1, lr=4e-4,
        weight_decay=1e-4,
    ),
)  # fmt: skip
OWN = replace(
    PAPER,
    name="own",
    settings=replace(PAPER.settings, group_by="stem", valid_size=0.15, test_size=0.15, final_valid_fraction=0.15),
    tuning=Tuning(epochs=6, trials=6, min_resource=2, max_resource=6),
    training=Training(epochs=12, seeds=(100, 200, 300)),
    reproduce=replace(PAPER.reproduce, stages=("tuning", "training"), experiments=("standard_resnet", "glass_resnet")),
    experiments=OWN_EXPERIMENTS,
    glass_space={
        **PAPER_GLASS_SPACE,
        "batch_size": (16,),
        "lr_global": LogUniform(5e-6, 1e-4),
        "lr_local": LogUniform(1e-4, 1e-3),
        "lr_atten_class": LogUniform(1e-4, 2e-3),
        "num_crops": (4,),
    },
    standard_space={**PAPER_STANDARD_SPACE, "lr": LogUniform(1e-5, 1e-3), "batch_size": (16,)},
)

PRESETS = {preset.name: preset for preset in (PAPER, DEMO, DEMO_LOCAL, OWN)}

"""Every setting that can change a result: one frozen dataclass per section.

An `Experiment` holds one of each; named experiments live in `configs/`, each written as a
difference from another. A step receives only its own sections, never the whole experiment.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

ModelName = Literal["nasnet_gcn_se", "unet2d", "unet3d"]
LossName = Literal[
    "generalized_dice",
    "weighted_cross_entropy",
    "generalized_dice_weighted_cross_entropy",
    "dice_cross_entropy",
    "image_dice_cross_entropy",
    "dice_cross_entropy_hausdorff",
    "focal_tversky",
]
Repair = Literal["gaps", "duplicates", "tilt"]
CohortName = Literal["lidc", "luna16", "nifti", "npy", "patches"]
LesionKind = Literal[
    "ground-glass",
    "consolidation",
    "fibrosis",
    "mass",
    "nodule",
    "atelectasis",
    "effusion",
]

LUNA16_SUBSETS = 10


@dataclass(frozen=True)
class LungMask:
    """Settings of the classical lung mask: the thesis' rule per slice, then 3-D cleaning."""

    cleaning: bool = True
    """Clean the slice masks in 3-D; false applies only the rule of the thesis."""
    remove_airway: bool = True
    """Remove the trachea and main bronchi."""
    fill_holes: bool = True
    """Fill vessels and nodules inside a lung."""
    closing_mm: float = 12.0
    """Radius of the closing of the pleural surface, which keeps juxtapleural nodules inside
    the mask; 0 for none."""
    split_sides: bool = True
    """Label the right lung 1 and the left lung 2; false labels both 1."""

    def __post_init__(self) -> None:
        require(self.closing_mm >= 0, "closing_mm", self.closing_mm, "0 or more")


@dataclass(frozen=True)
class Table:
    """Slices and volumes to store in the table."""

    size_px: tuple[int, int] = (512, 512)
    """(y, x) size of the stored slices; other sizes are padded with air or cropped around
    the centre."""
    slices: Literal["nodule", "lung", "all", "none"] = "nodule"
    """nodule: slices with a nodule, and negatives; lung: slices with lung; all: every
    slice; none: volumes only."""
    negatives_per_nodule_slice: float = 1.0
    """Number of negatives (lung slices without a nodule) drawn per nodule slice of a scan;
    used with slices=nodule."""
    volume_spacing_mm: float = 0.0
    """Isotropic spacing of the volumes stored for 3-D networks; 0 stores no volumes."""
    seed: int = 0
    """Seed for drawing the negatives."""

    def __post_init__(self) -> None:
        require(min(self.size_px) > 0, "size_px", self.size_px, "positive")
        negatives = self.negatives_per_nodule_slice
        require(negatives >= 0, "negatives_per_nodule_slice", negatives, "0 or more")
        spacing = self.volume_spacing_mm
        require(spacing >= 0, "volume_spacing_mm", spacing, "0 or more")
        holds = spacing > 0 or self.slices != "none"
        require(holds, "volume_spacing_mm", spacing, "above 0 with slices=none")


@dataclass(frozen=True)
class Split:
    """Division of the patients into training, validation and test parts."""

    method: Literal["ratios", "folds", "subsets"] = "ratios"
    """ratios: by `fractions`; folds: k-fold; subsets: the ten LUNA16 subsets as folds."""
    fractions: tuple[float, float, float] = (0.7, 0.1, 0.2)
    """Fractions of train, validation and test; used by `ratios`."""
    folds: int = 5
    """Number of folds; used by `folds`."""
    fold: int = 0
    """Test fold; the next fold is used for validation."""
    unit: Literal["patient", "slice"] = "patient"
    """Unit of the split. slice leaks neighbouring slices into the test part; it exists to
    measure that leak."""
    held_out: tuple[str, ...] = ()
    """Patients of the test part, for example all of one hospital; used by `ratios`, which then
    divides the others into train and validation by the first two fractions."""
    seed: int = 0
    """Seed of the shuffle."""

    def __post_init__(self) -> None:
        total = sum(self.fractions)
        if self.held_out:
            kind = self.method, self.unit
            require(
                kind == ("ratios", "patient"),
                "held_out",
                self.held_out,
                "none, or method ratios and unit patient",
            )
        require(
            abs(total - 1) < 1e-6, "fractions", self.fractions, "values that sum to 1"
        )
        require(self.folds >= 2, "folds", self.folds, "2 or more")
        folds = {"ratios": 1000, "folds": self.folds, "subsets": LUNA16_SUBSETS}
        last = folds[self.method] - 1
        require(0 <= self.fold <= last, "fold", self.fold, f"0 to {last}")


@dataclass(frozen=True)
class Batches:
    """Rules that turn rows of the table into network input and reference."""

    target: Literal["nodule", "lung"] = "nodule"
    """Structure to segment."""
    input_px: tuple[int, ...] = (400, 400)
    """Size of the network input: (y, x) for slices, or (z, y, x) for the table's volumes."""
    crop: Literal["centre", "lung", "body", "nodule", "seed", "candidate"] = "centre"
    """Position of a training crop. centre: the middle of the slice or volume; lung: the
    centre of the lungs in a slice, or a random point of the box around the lungs in a
    volume; body: for volumes, half of the crops as with lung and half at a random point of
    the whole volume; nodule: near a nodule. Validation and whole scans are covered by tiles of
    `input_px`. seed: slices are patches around a nodule, and their middle is used in
    training, validation and inference. candidate: for the false-positive network on
    volumes; crops are centred on a nodule, on another structure in the lungs that is as
    dense, such as a vessel, or on a false positive from train.py --candidates."""
    pixel_mm: float = 0.0
    """Resample slices to this pixel size, so that the network sees all scanners alike and
    fewer pixels; 0 keeps the pixels as they are. Only for lungs in slices."""
    window_hu: tuple[float, float] = (-1000.0, 400.0)
    """HU mapped to 0 and 1; values outside are clipped."""
    normalisation: Literal["window", "zscore", "minmax", "population", "relative"] = (
        "window"
    )
    """Normalisation after the window. window: none; zscore: zero mean and unit variance per
    image; minmax: 0..1 per image; population: HU minus the mean of a population, divided by
    its standard deviation (-370 and 437 HU), as nnU-Net and Zhuang et al. 2025 do;
    relative: the image's own range is the window, then zscore, for images of any scale,
    such as patches whose HU are lost."""
    lung_mask: bool = True
    """Set everything outside the lungs to air, as in the thesis."""
    reference: Literal["consensus", "votes", "reader"] = "consensus"
    """Reference of the training slices. consensus: the readers' consensus; votes: the
    fraction of a nodule's readers that marked each pixel; reader: the outline of one
    reader, drawn anew for every sample. Validation always uses the consensus."""
    consensus_level: float = 0.5
    """Fraction of a nodule's readers that must mark a voxel to make it nodule."""
    min_readers: int = 1
    """Nodules outlined by fewer readers are ignored."""
    batch_size: int = 4
    nodule_fraction: float = 0.5
    """Fraction of training rows drawn from slices with a nodule; 0 uses the rows as they
    are. For volumes with crop=nodule, the fraction of crops near a nodule; the others are
    placed as with crop=lung. With crop=candidate, the fraction of crops centred on a
    nodule."""
    real_fraction: float = 0.0
    """For volumes: fraction of training samples from real scans, if the training part holds
    both real scans and phantoms; 0 draws all scans equally often."""

    def __post_init__(self) -> None:
        size = self.input_px
        fits = len(size) in (2, 3) and min(size) > 0
        require(fits, "input_px", size, "two positive sizes (y, x) or three (z, y, x)")
        low, high = self.window_hu
        require(low < high, "window_hu", self.window_hu, "(low, high) with low < high")
        level = self.consensus_level
        require(0 < level <= 1, "consensus_level", level, "above 0, at most 1")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        share = self.nodule_fraction
        require(0 <= share <= 1, "nodule_fraction", share, "0 to 1")
        real = self.real_fraction
        fits = real == 0 or (0 < real < 1 and len(size) == 3)
        require(fits, "real_fraction", real, "0, or below 1 with 3-D input")
        of_readers = self.target == "nodule" and len(size) == 2
        plain = self.reference == "consensus"
        require(
            plain or of_readers,
            "reference",
            self.reference,
            "consensus; votes and reader need 2-D nodule input",
        )
        normalisation = self.normalisation
        fits = normalisation != "relative" or len(size) == 2
        require(
            fits,
            "normalisation",
            normalisation,
            "another one; relative needs 2-D input",
        )
        seeded = self.crop == "seed"
        fits = not seeded or (of_readers and not self.lung_mask and len({*size}) == 1)
        expected = "another one; seed needs square 2-D nodule input without lung_mask"
        require(fits, "crop", self.crop, expected)
        fits = self.crop != "candidate" or (self.target == "nodule" and len(size) == 3)
        require(
            fits, "crop", self.crop, "another one; candidate needs 3-D nodule input"
        )
        pixel = self.pixel_mm
        in_slices = self.target == "lung" and len(size) == 2
        fits = pixel == 0 or (pixel > 0 and in_slices)
        require(fits, "pixel_mm", pixel, "0, or above 0 with 2-D lung input")

    @property
    def slice_px(self) -> tuple[int, int]:
        """Returns `input_px` as (y, x); raises ValueError if it is 3-D."""
        require(len(self.input_px) == 2, "input_px", self.input_px, "(y, x)")
        return self.input_px[0], self.input_px[1]

    @property
    def volume_px(self) -> tuple[int, int, int]:
        """Returns `input_px` as (z, y, x); raises ValueError if it is 2-D."""
        require(len(self.input_px) == 3, "input_px", self.input_px, "(z, y, x)")
        return self.input_px[0], self.input_px[1], self.input_px[2]


@dataclass(frozen=True)
class Augment:
    """Random changes to image and masks.

    Rotations, shifts, scales and gamma have ranges that are symmetric around no change.

    The settings from `tilt_deg` on apply to volumes only.
    """

    flip: bool = True
    """Mirror left-right and front-back, each with probability 0.5."""
    rotate_deg: float = 15.0
    zoom: float = 0.1
    """Random scale between 1 - zoom and 1 + zoom."""
    shift_px: float = 10.0
    elastic_px: float = 0.0
    """Standard deviation of the smooth displacement field; 0 for none."""
    elastic_grid_px: float = 64.0
    """Distance between the knots of the displacement field."""
    gamma: float = 0.0
    """Gamma correction of the windowed image; the exponent is drawn between 1 / (1 + gamma)
    and 1 + gamma."""
    noise_hu: float = 0.0
    """Largest standard deviation of the added noise; it is drawn between 0 and this."""
    tilt_deg: float = 0.0
    """Largest rotation about the left-right and the front-back axis; `rotate_deg` is about
    the head-foot axis."""
    stretch: float = 0.0
    """Random scale of each axis independently, on top of `zoom`."""
    curve_hu: float = 0.0
    """Standard deviation of the random offsets to the HU of air, lung, fat, water, soft
    tissue and bone, drawn independently; HU in between are interpolated linearly."""
    contrast_hu: float = 0.0
    """Largest offset added to soft tissue and bone, to simulate contrast agent."""
    blur_px: float = 0.0
    """Largest sigma of the simulated reconstruction kernel; half of the volumes are
    smoothed."""
    noise_width_px: float = 0.0
    """Largest sigma of the kernel that correlates neighbouring noise within a slice."""
    slice_px: float = 0.0
    """Largest simulated slice thickness, in voxels; half of the volumes are averaged to
    thicker slices."""
    field_cut: float = 0.0
    """Largest fraction of the crop to cut off at a side, as if it were beyond the field of
    view; half of the volumes are cut. Reference and HU are cleared there."""
    synthesis: float = 0.0
    """Fraction of volumes whose HU are replaced by random HU per tissue; see
    augment/synthesis.py."""
    gas: float = 0.0
    """Fraction of volumes that get simulated bowel gas outside the lungs; see
    augment/gas.py."""

    def __post_init__(self) -> None:
        for name in (
            *("rotate_deg", "shift_px", "elastic_px", "gamma", "noise_hu", "tilt_deg"),
            *("curve_hu", "contrast_hu", "blur_px", "noise_width_px", "slice_px"),
        ):
            value = getattr(self, name)
            require(value >= 0, name, value, "0 or more")
        for name in ("zoom", "stretch"):
            value = getattr(self, name)
            require(0 <= value < 1, name, value, "at least 0, below 1")
        cut = self.field_cut
        require(0 <= cut < 0.5, "field_cut", cut, "at least 0, below 0.5")
        require(0 <= self.synthesis <= 1, "synthesis", self.synthesis, "0 to 1")
        require(0 <= self.gas <= 1, "gas", self.gas, "0 to 1")


VOLUME_CHANGES = (
    *("tilt_deg", "stretch", "curve_hu", "contrast_hu", "blur_px"),
    *("noise_width_px", "slice_px", "field_cut", "synthesis", "gas"),
)
"""Settings of `Augment` that apply to volumes only."""


@dataclass(frozen=True)
class Lesions:
    """Pathology simulated in training samples.

    If lungs are the target, lesions count as lung. If nodules in volumes are the target,
    only nodules are drawn, and they are added to the reference. Nodule shapes come from
    LIDC-IDRI outlines, except those of patients in the table who are not trained on.
    """

    probability: float = 0.0
    """Fraction of the samples that get lesions; 0 for none."""
    kind: Literal["circles", "realistic"] = "realistic"
    """circles: 7 to 9 pale discs in and around the lungs; realistic: lesions from
    `findings`."""
    findings: tuple[LesionKind, ...] = get_args(LesionKind)
    """Kinds of realistic lesions to draw from."""
    most: int = 2
    """Largest number of findings in a sample; used by realistic."""
    nodule_kinds: tuple[float, float, float] = (0.85, 0.08, 0.07)
    """Fractions of solid, part-solid and ground-glass nodules if nodules are the target; the
    defaults are the fractions in the ratings of LIDC's readers."""

    def __post_init__(self) -> None:
        share = self.probability
        require(0 <= share <= 1, "probability", share, "0 to 1")
        known = f"one or more of {', '.join(get_args(LesionKind))}, each at most once"
        found = set(self.findings)
        fits = 0 < len(self.findings) == len(found) and found <= {*get_args(LesionKind)}
        require(fits, "findings", self.findings, known)
        require(self.most >= 1, "most", self.most, "1 or more")
        shares = self.nodule_kinds
        fits = min(shares) >= 0 and math.isclose(sum(shares), 1, abs_tol=1e-6)
        require(fits, "nodule_kinds", shares, "three values that sum to 1")


@dataclass(frozen=True)
class Model:
    """Architecture of the network."""

    name: ModelName = "nasnet_gcn_se"
    weights: Literal["none", "imagenet"] = "none"
    """Initial weights of the encoder."""
    filters: int = 32
    """Width of the decoder (nasnet_gcn_se) or of the first level (unet2d, unet3d)."""
    depth: int = 4
    """Number of times a U-Net halves its input."""
    residual: bool = False
    """Add the input of each encoder level of unet2d to its output."""
    norm: Literal["instance", "batch"] = "instance"
    """Normalisation layers of the U-Nets."""
    seeded: bool = False
    """Give the network the distance of each pixel from the middle of its input; for crops
    around a seed point or a candidate (batches.crop)."""
    deep_supervision: bool = False
    """Also train unet3d on the predictions of its coarser levels."""
    mask_fraction: float = 0.0
    """Fraction of cubes hidden from unet3d, in training and in Monte Carlo passes; Zhuang et
    al. 2025 hide 0.7."""
    mask_cube_px: int = 7
    """Edge length of the hidden cubes."""
    mask_value: float = 1.0
    """Value of hidden voxels, in the units of the network's input."""
    mask_varied: bool = False
    """In training, draw the hidden fraction of each volume between 0 and mask_fraction, so
    that the network can also be run with fewer or no hidden cubes. Monte Carlo passes then
    hide half of mask_fraction."""
    gcn_kernels: tuple[int, ...] = (13, 19, 19, 19)
    """Kernel sizes of the global convolutions at stride 32, 16, 8 and 4, as in the thesis. A
    shorter tuple omits them at the shallow stages, an empty one everywhere."""
    squeeze_excite: bool = True
    dropout: float = 0.0
    slice_classifier: bool = False
    """Add the classification head of the false-positive network, which tells whether a
    slice, or the middle of a candidate's crop, contains nodule."""

    def __post_init__(self) -> None:
        require(0 <= self.dropout < 1, "dropout", self.dropout, "at least 0, below 1")
        share = self.mask_fraction
        require(0 <= share < 1, "mask_fraction", share, "at least 0, below 1")
        require(self.filters >= 1, "filters", self.filters, "1 or more")


@dataclass(frozen=True)
class Loss:
    """The training loss."""

    name: LossName = "generalized_dice_weighted_cross_entropy"
    class_weights: tuple[float, float] = (1.0, 7.0)
    """Weights of background and nodule in the weighted cross-entropy."""


@dataclass(frozen=True)
class Train:
    """The optimizer and its schedule."""

    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: float = 1e-3
    schedule: Literal["constant", "cosine", "polynomial"] = "cosine"
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up of the learning rate from 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay; used by adamw."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient; 0 disables clipping."""
    accumulate: int = 1
    """Number of batches whose gradients are averaged before a step."""
    precision: Literal["float32", "mixed_float16", "mixed_bfloat16"] = "float32"
    ema: float = 0.0
    """Momentum of the moving average of the weights; 0 for none."""
    epochs: int = 50
    steps_per_epoch: int = 0
    """Batches per epoch; 0 uses every row once."""
    validation_tiles: int = 0
    """Largest number of validation tiles per epoch, spread evenly over all; 0 uses all."""
    patience: int = 0
    """Epochs without a better validation Dice before training stops; 0 never stops early."""
    patience_after: int = 0
    """Number of epochs before `patience` starts to count."""
    freeze_encoder: bool = False
    """Keep the encoder weights from --init; train only the layers after the lowest level."""
    freeze_normalisation: bool = False
    """Keep means, variances, scales and offsets of batch normalisation from --init, because
    batches of few crops estimate them poorly."""
    seed: int = 0
    """Seed of weights, dropout, row order and augmentation."""

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "above 0")
        require(self.epochs >= 1, "epochs", self.epochs, "1 or more")
        require(self.accumulate >= 1, "accumulate", self.accumulate, "1 or more")
        decays = self.optimizer == "adamw" or not self.weight_decay
        require(
            decays, "weight_decay", self.weight_decay, "0 unless optimizer is adamw"
        )
        require(0 <= self.ema < 1, "ema", self.ema, "at least 0, below 1")


@dataclass(frozen=True)
class Postprocess:
    """Rules that turn a probability map into nodules."""

    method: Literal["fixed", "kmeans", "tuned"] = "tuned"
    """Source of the threshold. fixed: `threshold`; kmeans: midway between the two clusters
    of the map, as in the thesis; tuned: the values that postprocess.py found best on the
    validation part."""
    threshold: float = 0.5
    erosion_px: int = 0
    """Side of the square that erodes each slice's mask; the thesis uses 5; 0 for none."""
    min_volume_mm3: float = 14.0
    """Smaller components are removed; 14 mm3 is a ball of 3 mm diameter, the smallest nodule
    that LIDC's readers outlined."""
    min_voxels: int = 0
    """Components of fewer voxels are removed, whatever the voxel size."""
    fill_holes: bool = False
    """Fill the holes that a component encloses on all sides, such as a cavity, before sizes
    and scores are computed."""
    min_score: float = 0.0
    """Components with a lower mean probability are removed."""
    connectivity: Literal[6, 18, 26] = 26
    one_nodule: bool = False
    """Keep only the component with the largest sum of probabilities, merged with those above
    or below it; for patches around a nodule."""
    within_lung: bool = True
    """Keep only components with at least half of their voxels in the lung mask. They are kept
    whole, because the mask may lack the outer part of a nodule at the pleura."""

    def __post_init__(self) -> None:
        require(0 < self.threshold < 1, "threshold", self.threshold, "between 0 and 1")
        require(self.erosion_px >= 0, "erosion_px", self.erosion_px, "0 or more")
        fits = not (self.one_nodule and self.method == "tuned")
        require(fits, "one_nodule", True, "false with method=tuned")
        require(self.min_voxels >= 0, "min_voxels", self.min_voxels, "0 or more")
        require(0 <= self.min_score < 1, "min_score", self.min_score, "0 to below 1")


@dataclass(frozen=True)
class Experiment:
    """All settings of an experiment, which works either on slices or on volumes."""

    mask: LungMask = field(default_factory=LungMask)
    table: Table = field(default_factory=Table)
    split: Split = field(default_factory=Split)
    batches: Batches = field(default_factory=Batches)
    augment: Augment = field(default_factory=Augment)
    lesions: Lesions = field(default_factory=Lesions)
    model: Model = field(default_factory=Model)
    loss: Loss = field(default_factory=Loss)
    train: Train = field(default_factory=Train)
    postprocess: Postprocess = field(default_factory=Postprocess)

    def __post_init__(self) -> None:
        size, network = self.batches.input_px, self.model.name
        on_volumes = len(size) == 3
        fitting = "(z, y, x) with unet3d, and (y, x) with any other network"
        fits = (network == "unet3d") == on_volumes
        require(fits, f"batches.input_px of {network}", size, fitting)
        both = self.model.deep_supervision and self.model.slice_classifier
        require(not both, "model.deep_supervision", True, "false with slice_classifier")
        for name in () if on_volumes else VOLUME_CHANGES:
            value = getattr(self.augment, name)
            require(not value, f"augment.{name}", value, "0 with 2-D input")
        seeded, crop = self.model.seeded, self.batches.crop
        fits = not seeded or crop in ("seed", "candidate")
        require(
            fits,
            "model.seeded",
            seeded,
            f"false with batches.crop={crop}; it needs seed or candidate",
        )


def require(holds: bool, name: str, found: Any, expected: str) -> None:
    """Raises ValueError with name, found and expected value unless `holds`."""
    if not holds:
        raise ValueError(f"{name} is {found}; expected {expected}")


def to_json(settings: Any) -> dict[str, Any]:
    """Returns a section or an experiment as plain JSON values."""
    return dataclasses.asdict(settings)


def from_json(kind: type, record: dict[str, Any]) -> Any:
    """Returns the section or experiment of type `kind` that `to_json` wrote.

    A setting that the record lacks was added later. It takes its default, which is always
    the behaviour from before the setting existed.

    Raises:
        ValueError: If a field is unknown, because another version made the record.
    """
    fields = {f.name: f for f in dataclasses.fields(kind)}
    if not record.keys() <= fields.keys():
        raise ValueError(
            f"{kind.__name__} settings: unknown fields {sorted(record.keys() - fields)}; "
            "the file was made by another version of this project"
        )
    values = {}
    for name, value in record.items():
        section = fields[name].type
        if isinstance(section, type) and dataclasses.is_dataclass(section):
            value = from_json(section, value)
        elif isinstance(value, list):
            value = tuple(value)
        values[name] = value
    return kind(**values)


def with_defaults(kind: type, record: dict[str, Any]) -> dict[str, Any]:
    """Adds defaults for the settings missing from a `to_json` record; see `from_json`."""
    return to_json(from_json(kind, record))


def choices(literal: Any) -> tuple[str, ...]:
    """Returns the values that a Literal allows."""
    return get_args(literal)

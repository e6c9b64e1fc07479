"""Every setting that can change a result: one frozen dataclass per section.

An `Experiment` holds one of each; named experiments live in `configs/`, each written as a
difference from another. A step receives its own sections, never the whole.
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
    """Lung masks from HU: the slice rule of the thesis, then cleaning in 3-D."""

    cleaning: bool = True
    """Clean the slice masks in 3-D; off is the thesis' own rule."""
    remove_airway: bool = True
    """Take trachea and main bronchi out."""
    fill_holes: bool = True
    """Fill vessels and nodules that lie within a lung."""
    closing_mm: float = 12.0
    """Radius of the closing of the pleural surface, which keeps juxtapleural nodules in;
    0 for none."""
    split_sides: bool = True
    """Label the right lung 1 and the left lung 2; off labels both 1."""

    def __post_init__(self) -> None:
        require(self.closing_mm >= 0, "closing_mm", self.closing_mm, "0 or more")


@dataclass(frozen=True)
class Table:
    """Which slices and volumes the table holds."""

    size_px: tuple[int, int] = (512, 512)
    """(y, x) size of the stored slices; others are padded with air or cut, centred."""
    slices: Literal["nodule", "lung", "all", "none"] = "nodule"
    """nodule: slices with a nodule, and negatives; lung: slices with lung; all; none:
    volumes alone."""
    negatives_per_nodule_slice: float = 1.0
    """For `nodule`: lung slices without a nodule, drawn per nodule slice of the scan."""
    volume_spacing_mm: float = 0.0
    """Isotropic spacing of the volumes stored for 3-D networks; 0 stores none."""
    seed: int = 0
    """Seed of the draw of negatives."""

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
    """Who is trained on, chosen by and tested."""

    method: Literal["ratios", "folds", "subsets"] = "ratios"
    """ratios: by `fractions`; folds: k-fold; subsets: LUNA16's ten subsets as folds."""
    fractions: tuple[float, float, float] = (0.7, 0.1, 0.2)
    """Shares of train, validation and test; used by `ratios`."""
    folds: int = 5
    """Number of folds; used by `folds`."""
    fold: int = 0
    """Fold that is tested; the next one validates."""
    unit: Literal["patient", "slice"] = "patient"
    """slice leaks neighbours into the test part; it exists to measure that leak."""
    seed: int = 0
    """Seed of the shuffle."""

    def __post_init__(self) -> None:
        total = sum(self.fractions)
        require(
            abs(total - 1) < 1e-6, "fractions", self.fractions, "shares that sum to 1"
        )
        require(self.folds >= 2, "folds", self.folds, "2 or more")
        folds = {"ratios": 1000, "folds": self.folds, "subsets": LUNA16_SUBSETS}
        last = folds[self.method] - 1
        require(0 <= self.fold <= last, "fold", self.fold, f"0 to {last}")


@dataclass(frozen=True)
class Batches:
    """How rows of the table become network input and reference."""

    target: Literal["nodule", "lung"] = "nodule"
    """What is segmented."""
    input_px: tuple[int, ...] = (400, 400)
    """Size of the crop that enters the network: (y, x) of a slice, or (z, y, x) of the
    table's volumes."""
    crop: Literal["centre", "lung", "nodule", "seed", "candidate"] = "centre"
    """Centre of a training crop: of the slice, of its lungs, or near a nodule; of a volume,
    a random point of the box around the lungs for `lung`. Validation and whole scans are
    covered by tiles of `input_px`. seed: slices are patches around a nodule, whose middle is
    cut out everywhere. candidate: of a volume, a nodule, or whatever else in the lungs is
    as dense, such as a vessel, or was marked (train.py --candidates); for the
    false-positive network."""
    pixel_mm: float = 0.0
    """Bring slices to pixels of this size, so that a network sees all scanners alike and
    fewer pixels; 0 leaves them as they are. For lungs in slices."""
    window_hu: tuple[float, float] = (-1000.0, 400.0)
    """HU mapped to 0 and 1; beyond is clipped."""
    normalisation: Literal["window", "zscore", "minmax", "population", "relative"] = (
        "window"
    )
    """After the window: nothing, zero mean and unit variance per image, per-image 0..1, or
    HU less their mean over a population, over its standard deviation (as nnU-Net and
    Zhuang et al. 2025 do; -370 and 437 HU). relative: the image's own range is the window,
    then as zscore; for images of any scale, such as patches whose HU are lost."""
    lung_mask: bool = True
    """Set everything outside the lungs to air, as the thesis does."""
    reference: Literal["consensus", "votes", "reader"] = "consensus"
    """What training slices are compared with: the readers' consensus; the share of a
    nodule's readers that drew a pixel; or one of its readers, drawn anew each time.
    Validation always compares with the consensus."""
    consensus_level: float = 0.5
    """Share of a nodule's readers that makes a voxel nodule."""
    min_readers: int = 1
    """Nodules outlined by fewer readers do not count."""
    batch_size: int = 4
    nodule_fraction: float = 0.5
    """Share of training rows drawn from slices with a nodule; 0 takes rows as they are. Of
    volumes with crop=nodule, the share of crops near one; the others are `lung`. With
    crop=candidate, the share that are of one."""
    real_fraction: float = 0.0
    """Of volumes, the share of training samples from scans that are no phantoms, where
    there are both; 0 draws every scan as often as any other."""

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
        require(fits, "real_fraction", real, "0, or below 1 of volumes")
        of_readers = self.target == "nodule" and len(size) == 2
        plain = self.reference == "consensus"
        require(plain or of_readers, "reference", self.reference, "consensus here")
        normalisation = self.normalisation
        fits = normalisation != "relative" or len(size) == 2
        require(fits, "normalisation", normalisation, "another one of volumes")
        seeded = self.crop == "seed"
        fits = not seeded or (of_readers and not self.lung_mask and len({*size}) == 1)
        expected = "another one of lungs, volumes, masked slices or crops not square"
        require(fits, "crop", self.crop, expected)
        fits = self.crop != "candidate" or (self.target == "nodule" and len(size) == 3)
        require(fits, "crop", self.crop, "another one but for nodules in volumes")
        pixel = self.pixel_mm
        in_slices = self.target == "lung" and len(size) == 2
        fits = pixel == 0 or (pixel > 0 and in_slices)
        require(fits, "pixel_mm", pixel, "0, or more of lungs in slices")

    @property
    def slice_px(self) -> tuple[int, int]:
        """(y, x) of `input_px`, of an experiment on slices."""
        require(len(self.input_px) == 2, "input_px", self.input_px, "(y, x)")
        return self.input_px[0], self.input_px[1]

    @property
    def volume_px(self) -> tuple[int, int, int]:
        """(z, y, x) of `input_px`, of an experiment on volumes."""
        require(len(self.input_px) == 3, "input_px", self.input_px, "(z, y, x)")
        return self.input_px[0], self.input_px[1], self.input_px[2]


@dataclass(frozen=True)
class Augment:
    """Random changes to image and masks; each range is symmetric around no change.

    From `tilt_deg` on they are made to volumes only.
    """

    flip: bool = True
    """Mirror left-right and front-back, each with probability one half."""
    rotate_deg: float = 15.0
    zoom: float = 0.1
    """Scale between 1 - zoom and 1 + zoom."""
    shift_px: float = 10.0
    elastic_px: float = 0.0
    """Standard deviation of the smooth displacement; 0 for none."""
    elastic_grid_px: float = 64.0
    """Distance between the knots of the displacement."""
    gamma: float = 0.0
    """Exponent between 1 / (1 + gamma) and 1 + gamma, on the windowed image."""
    noise_hu: float = 0.0
    """Standard deviation of added noise, drawn between 0 and this."""
    tilt_deg: float = 0.0
    """Turns about the left-right and the front-back axis; `rotate_deg` is about the other."""
    stretch: float = 0.0
    """Scale of each axis by itself, on top of `zoom`."""
    curve_hu: float = 0.0
    """Standard deviation of what is added to the HU of air, lung, fat, water, soft tissue
    and bone, each by itself; in between the change is linear."""
    contrast_hu: float = 0.0
    """Most that is added to soft tissue and bone, as contrast agent does."""
    blur_px: float = 0.0
    """Widest (sigma) reconstruction kernel; one volume in two is smoothed."""
    noise_width_px: float = 0.0
    """Widest (sigma) kernel that makes the noise of neighbours in a slice alike."""
    slice_px: float = 0.0
    """Thickest slices, in voxels; one volume in two is averaged over slices."""
    field_cut: float = 0.0
    """Largest share of the crop, at each of its sides, beyond the field of view; one volume
    in two has such sides. Reference and HU end there."""
    synthesis: float = 0.0
    """Share of volumes whose HU are replaced by random HU per tissue; see synthesis.py."""

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


VOLUME_CHANGES = (
    *("tilt_deg", "stretch", "curve_hu", "contrast_hu", "blur_px"),
    *("noise_width_px", "slice_px", "field_cut", "synthesis"),
)
"""Settings of `Augment` that only volumes have."""


@dataclass(frozen=True)
class Lesions:
    """Pathology simulated in training samples.

    In lungs it belongs to the lung; of volumes whose target is nodules, nodules alone are
    drawn, and added to the reference. Nodules have the shapes of outlines in LIDC-IDRI, but
    not of patients who are in the table and not trained on.
    """

    probability: float = 0.0
    """Share of the samples that get lesions; 0 for none."""
    kind: Literal["circles", "realistic"] = "realistic"
    """circles: 7 to 9 pale discs about the lungs; realistic: `findings`."""
    findings: tuple[LesionKind, ...] = get_args(LesionKind)
    """What realistic lesions are drawn from."""
    most: int = 2
    """Most findings in a sample; used by realistic."""
    nodule_kinds: tuple[float, float, float] = (0.85, 0.08, 0.07)
    """Which share of nodules that are the target is solid, part-solid and ground glass; LIDC's
    readers rated so many so."""

    def __post_init__(self) -> None:
        share = self.probability
        require(0 <= share <= 1, "probability", share, "0 to 1")
        known = f"some of {', '.join(get_args(LesionKind))}, none twice"
        found = set(self.findings)
        fits = 0 < len(self.findings) == len(found) and found <= {*get_args(LesionKind)}
        require(fits, "findings", self.findings, known)
        require(self.most >= 1, "most", self.most, "1 or more")
        shares = self.nodule_kinds
        fits = min(shares) >= 0 and math.isclose(sum(shares), 1, abs_tol=1e-6)
        require(fits, "nodule_kinds", shares, "three shares that sum to 1")


@dataclass(frozen=True)
class Model:
    """The network."""

    name: ModelName = "nasnet_gcn_se"
    weights: Literal["none", "imagenet"] = "none"
    """Start of the encoder."""
    filters: int = 32
    """Width: of the decoder (nasnet_gcn_se) or of the first level (unet2d, unet3d)."""
    depth: int = 4
    """How often a U-Net halves its input."""
    residual: bool = False
    """Add the input of each level of unet2d's encoder to its output."""
    norm: Literal["instance", "batch"] = "instance"
    """Normalisation of the U-Nets."""
    seeded: bool = False
    """Tell the network how far each pixel lies from the middle of its input; for what is
    around a seed or a candidate (batches.crop)."""
    deep_supervision: bool = False
    """Let unet3d also be trained on what its coarser levels predict."""
    mask_fraction: float = 0.0
    """Share of the cubes that unet3d is not shown, in training and in Monte-Carlo passes;
    Zhuang et al. 2025 hide 0.7."""
    mask_cube_px: int = 7
    """Edge of the cubes."""
    mask_value: float = 1.0
    """What is put in their place, in the units of the network's input."""
    mask_varied: bool = False
    """In training, hide a share drawn from 0 to mask_fraction of each volume, so that the
    network can also be run with less hidden, or nothing. Passes then hide half of
    mask_fraction."""
    gcn_kernels: tuple[int, ...] = (13, 19, 19, 19)
    """Kernel sizes of the global convolutions at stride 32, 16, 8 and 4, as in the thesis;
    shorter leaves them out at the shallow stages; empty for none."""
    squeeze_excite: bool = True
    dropout: float = 0.0
    slice_classifier: bool = False
    """Add the classifier head of the false-positive network: whether a slice, or the middle
    of a candidate's crop, is nodule."""

    def __post_init__(self) -> None:
        require(0 <= self.dropout < 1, "dropout", self.dropout, "at least 0, below 1")
        share = self.mask_fraction
        require(0 <= share < 1, "mask_fraction", share, "at least 0, below 1")
        require(self.filters >= 1, "filters", self.filters, "1 or more")


@dataclass(frozen=True)
class Loss:
    """What training makes small."""

    name: LossName = "generalized_dice_weighted_cross_entropy"
    class_weights: tuple[float, float] = (1.0, 7.0)
    """Weights of background and nodule in the weighted cross-entropy."""


@dataclass(frozen=True)
class Train:
    """How the loss is made small."""

    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: float = 1e-3
    schedule: Literal["constant", "cosine", "polynomial"] = "cosine"
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up from 0."""
    weight_decay: float = 0.0
    """Decoupled; used by adamw."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient; 0 for no clipping."""
    accumulate: int = 1
    """Batches whose gradients are averaged before a step."""
    precision: Literal["float32", "mixed_float16", "mixed_bfloat16"] = "float32"
    ema: float = 0.0
    """Momentum of the moving average of the weights; 0 for none."""
    epochs: int = 50
    steps_per_epoch: int = 0
    """Batches per epoch; 0 for all rows once."""
    validation_tiles: int = 0
    """Most tiles that validate an epoch, spread evenly over all; 0 for all."""
    patience: int = 0
    """Epochs without a better validation Dice before stopping; 0 to never stop."""
    patience_after: int = 0
    """Epochs before `patience` begins to count."""
    freeze_encoder: bool = False
    """Leave the encoder as --init gives it: train only what follows the lowest level."""
    freeze_normalisation: bool = False
    """Leave means, variances, scales and offsets of batch normalisation as --init gives
    them: those of batches of few crops say little."""
    seed: int = 0
    """Seeds weights, dropout, row order and augmentation."""

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
    """From a probability map to nodules."""

    method: Literal["fixed", "kmeans", "tuned"] = "tuned"
    """fixed: `threshold`; kmeans: between the two clusters of the map, as in the thesis;
    tuned: the values that postprocess.py found best on the validation part."""
    threshold: float = 0.5
    erosion_px: int = 0
    """Side of the square that erodes each slice's mask; the thesis uses 5; 0 for none."""
    min_volume_mm3: float = 14.0
    """Smaller components are removed; 14 is a ball of 3 mm, the least that LIDC's readers
    outlined."""
    min_voxels: int = 0
    """Components of fewer voxels are removed, however large a voxel is."""
    fill_holes: bool = False
    """Fill what a component encloses on all sides, such as a cavity, before sizes and scores
    are taken."""
    min_score: float = 0.0
    """Components with a lower mean probability are removed."""
    connectivity: Literal[6, 18, 26] = 26
    one_nodule: bool = False
    """Keep the component with the largest sum of probability and what lies above or below
    it, as one: in patches around a nodule."""
    within_lung: bool = True
    """Keep components of which at least half lies in the lung mask. They are kept whole:
    the mask may lack the outer part of a nodule at the pleura."""

    def __post_init__(self) -> None:
        require(0 < self.threshold < 1, "threshold", self.threshold, "between 0 and 1")
        require(self.erosion_px >= 0, "erosion_px", self.erosion_px, "0 or more")
        fits = not (self.one_nodule and self.method == "tuned")
        require(fits, "one_nodule", True, "false with method tuned")
        require(self.min_voxels >= 0, "min_voxels", self.min_voxels, "0 or more")
        require(0 <= self.min_score < 1, "min_score", self.min_score, "0 to below 1")


@dataclass(frozen=True)
class Experiment:
    """A named experiment: one of each section, all on slices or all on volumes."""

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
        fitting = "unet3d with (z, y, x), and another network with (y, x)"
        fits = (network == "unet3d") == on_volumes
        require(fits, f"batches.input_px of {network}", size, fitting)
        both = self.model.deep_supervision and self.model.slice_classifier
        require(not both, "model.deep_supervision", True, "false with a classifier")
        for name in () if on_volumes else VOLUME_CHANGES:
            value = getattr(self.augment, name)
            require(not value, f"augment.{name}", value, "0: input_px is of slices")
        seeded, crop = self.model.seeded, self.batches.crop
        fits = not seeded or crop in ("seed", "candidate")
        require(fits, "model.seeded", seeded, f"false with batches.crop={crop}")


def require(holds: bool, name: str, found: Any, expected: str) -> None:
    """Raises ValueError naming the setting, what was found and what was expected."""
    if not holds:
        raise ValueError(f"{name} is {found}; expected {expected}")


def to_json(settings: Any) -> dict[str, Any]:
    """A section or an experiment as plain JSON values."""
    return dataclasses.asdict(settings)


def from_json(kind: type, record: dict[str, Any]) -> Any:
    """The section or experiment of type `kind` that `to_json` wrote.

    A setting that is missing is newer than the record and takes its default, which is
    always what was done before there was a choice.

    Raises:
        ValueError: If a field is unknown: the record is of another version.
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
    """What `to_json` wrote of a section, with the settings it lacks; see `from_json`."""
    return to_json(from_json(kind, record))


def choices(literal: Any) -> tuple[str, ...]:
    """The values a Literal allows."""
    return get_args(literal)

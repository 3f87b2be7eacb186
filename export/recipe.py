"""A recipe: everything that a model is made of; `export.recipe_file` reads it from TOML."""

import re
from dataclasses import dataclass, field

from export.augment import Augmentation
from export.errors import RecipeError

PRETRAINED = ("whisper", "wav2vec2")
"""The families of encoders that a head is trained on."""

STUDENTS = ("whisper", "mel", "wav")
"""The families that are distilled."""


@dataclass(frozen=True)
class Data:
    """Which speech.

    Attributes:
        corpora: Folders under ``--corpora``.
        labels: The labels of the model, in the order of its logits.
        merge: Emotions of a corpus that count as a label.
        validation: Speaker keys ("family/speaker") that every choice is made on.
        calibration_clips: Training clips that set the ranges of quantization.
    """

    corpora: tuple[str, ...]
    labels: tuple[str, ...]
    merge: dict[str, str] = field(default_factory=dict)
    validation: tuple[str, ...] = ()
    calibration_clips: int = 256

    def __post_init__(self) -> None:
        if len(set(self.labels)) < max(2, len(self.labels)):
            raise RecipeError(f"labels {list(self.labels)}, allowed are two or more, each once")


@dataclass(frozen=True)
class Windows:
    """How the runtime cuts a clip, in seconds."""

    window_s: float
    hop_s: float

    def __post_init__(self) -> None:
        # What a bundle's metadata demands, checked before the hours of training and not after.
        overlap_s = round(self.window_s - self.hop_s, 6)
        if not (self.window_s <= 60 and self.hop_s >= 0.01 and overlap_s >= 0.4):
            raise RecipeError(
                f"windows of {self.window_s!r} s every {self.hop_s!r} s, "
                "allowed are windows up to 60 s, every 0.01 s to 0.4 s less than the window"
            )


@dataclass(frozen=True)
class EncoderChoice:
    """Which encoder.

    Attributes:
        family: "whisper" or "wav2vec2" (also XLSR-53, XLS-R, HuBERT and WavLM; the lowest layers of
            either), or a student: "mel" (Whisper's two convolutions, frozen, and dense ones behind
            them), "wav" (samples to transformer layers).
        layers: Transformer layers (the lowest of whisper and wav2vec2; wav), or residual blocks
            (mel).
        source: Checkpoint: a folder under ``--weights`` or a hub id; of Whisper for mel, none for
            wav.
        states: How many hidden states of whisper or wav2vec2 the head weighs, the uppermost.
        width: Channels of a student, mel or wav.
        heads: Attention heads that each layer of whisper keeps; 0 keeps all (see
            `export.encoders.narrow`).
        feed_forward: Hidden units that each layer of whisper keeps; 0 keeps all.
    """

    family: str
    layers: int
    source: str = ""
    states: int = 3
    width: int = 256
    heads: int = 0
    feed_forward: int = 0

    def __post_init__(self) -> None:
        families = sorted({*PRETRAINED, *STUDENTS})
        if self.family not in families:
            raise RecipeError(f"encoder.family = {self.family!r}, allowed are {families}")
        if bool(self.source) == (self.family == "wav"):
            raise RecipeError(
                f"encoder.source = {self.source!r}: wav has no checkpoint, all others need one"
            )
        if self.family == "wav" and (self.width < 32 or self.width % 32):
            raise RecipeError(f"encoder.width = {self.width}: of wav, multiples of 32 are allowed")


@dataclass(frozen=True)
class HeadChoice:
    """The CNN head: channels after the projection, dropout in training, and what the probe sees.

    Attributes:
        width: See `export.heads.CnnHead`, as for the others.
        dropout: In training.
        probe_dropout: The same of what the probe sees.
        upper: How many of the uppermost states training by gradients sees; ridge sees all.
        members: How many heads are trained apart and answer together; above 1 only with [train] and
            a frozen encoder.
    """

    width: int = 256
    dropout: float = 0.2
    probe_dropout: float = 0.2
    upper: int = 3
    members: int = 1

    def __post_init__(self) -> None:
        if self.members < 1:
            raise RecipeError(f"head.members = {self.members}: 1 or more are allowed")


@dataclass(frozen=True)
class Quantize:
    """How INT8 is made, and what it may cost.

    Attributes:
        smoothing: How much of loud channels goes to the weights, 0 to 1 (see `export.smooth`); 0
            leaves all as it is.
        turning: Whether the channels of attention heads are mixed (see `export.turn`).
        centring: Whether ranges are shifted to their middle: those of channels (see
            `export.centre`), and of values of one side (see `export.one_sided`).
        clipping: Whether ranges leave out the rarest values (see `export.clip`).
        pairs: Whether weights are such that no x86 cuts off their sums (see `export.pairs`).
        gptq: Whether weights are rounded by what they are multiplied by (see `export.rounding`).
        bias_correction: Whether biases make up for shifted means (see `export.debias`).
        labels_equal: Share of the judged windows that must keep their label.
        divergence: Largest mean divergence of their answers from full precision, in nats.
        most_float: How many layers may read what is not rounded, to hold both.
    """

    smoothing: float = 0.85
    turning: bool = True
    centring: bool = True
    clipping: bool = False
    pairs: bool = False
    gptq: bool = True
    bias_correction: bool = True
    labels_equal: float = 0.98
    divergence: float = 0.001
    most_float: int = 4

    def __post_init__(self) -> None:
        for key in ("smoothing", "labels_equal"):
            if not 0 <= getattr(self, key) <= 1:
                raise RecipeError(f"quantize.{key} = {getattr(self, key)}, allowed is 0 to 1")
        if self.divergence < 0 or self.most_float < 0:
            raise RecipeError(
                f"quantize.divergence = {self.divergence}, quantize.most_float = "
                f"{self.most_float}, allowed is 0 or more"
            )


@dataclass(frozen=True)
class Train:
    """Training of the head on cached hidden states.

    Attributes:
        epochs: Passes over the training clips; each draws one view a clip.
        views: Augmented copies of each clip that are encoded once and cached.
        batch: Clips a step.
        learning_rate: Peak of the one-cycle schedule.
        weight_decay: Of AdamW.
        balance: How much rare labels of small corpora count: the power of `Targets.weights`.
        label_smoothing: Share of the target spread over the labels of the clip's corpus.
        mixup: Parameter of the Beta distribution that two clips of a batch are mixed by; 0 is off.
        average: Decay of the moving average of the weights, which is what is kept.
        clean: Probability that an epoch uses a clip as recorded rather than an augmented view.
        ridge: Penalty of a ridge regression that is added to the probe of the trained head (see
            `export.ridge`); 0 adds none. Not with ``tuned``.
        tuned: How many of the uppermost layers are fine-tuned; 0 leaves the encoder as it is.
        tuned_rate: Peak learning rate of the uppermost layer.
        layer_decay: Factor of it from layer to layer downwards.
        hold: Share of the training after which the layers begin to learn; before, only the head.
        nonspeech: Sounds that are no speech (see `export.nonspeech`), heard with the clips.
        folds: Heads that are trained beside the one that is shipped, each without some of the
            speakers: their answers set the temperature, the threshold and the adaptation.
    """

    epochs: int
    views: int = 4
    batch: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    balance: float = 0.5
    label_smoothing: float = 0.1
    mixup: float = 0.3
    average: float = 0.99
    clean: float = 0.4
    ridge: float = 0.0
    tuned: int = 0
    tuned_rate: float = 3e-4
    layer_decay: float = 0.7
    hold: float = 0.2
    nonspeech: int = 0
    folds: int = 4


@dataclass(frozen=True)
class Distill:
    """Training of a student to answer as its teacher does.

    Attributes:
        teacher: The recipe of the teacher, beside this one; it must have been run.
        seeds: Seeds of the teacher whose answers are averaged.
        cpu_minutes: Length of the training in minutes of processor time of its one thread.
        views: Augmented copies of each clip that the teacher answers once.
        batch: Clips a step.
        learning_rate: Peak; rises over the first 5 % of the time and falls to 0 as a cosine.
        tuned_rate: The same of layers that are pretrained: those of whisper.
        weight_decay: Of AdamW.
        temperature: Softens both answers before they are compared (arXiv 1503.02531).
        soft: Weight of the softened answers.
        frames: Weight of the mean squared distance of the frames before pooling, through a learned
            map (arXiv 1412.6550).
        embedding: Weight of the cosine distance of the embeddings.
        layers: Weight of DistilHuBERT's loss (arXiv 2110.01900): one map a hidden state of the
            teacher predicts it from the student's frames.
        hard: Weight of the labels.
        balance: As in Train, for the labels.
        mixup: As in Train.
        average: As in Train.
        warp: Largest logarithm of the factor that scales the frequency axis (see
            `export.spectrogram.warp`).
        mask_mels: Widest band that SpecAugment hides (arXiv 1904.08779), in mel bands.
        mask_s: Longest stretch that SpecAugment hides, in seconds.
        nonspeech: As in Train.
        unlabelled: Corpora that are heard without their labels: the teacher tells what they are.
        refit: Train a second student on train and validation together, with the same settings and
            at the same time; that one is shipped, the first one sets temperature and threshold.
    """

    teacher: str
    cpu_minutes: float
    seeds: tuple[int, ...] = (0,)
    views: int = 6
    batch: int = 32
    learning_rate: float = 1e-3
    tuned_rate: float = 3e-4
    weight_decay: float = 0.05
    temperature: float = 2.0
    soft: float = 1.0
    frames: float = 2.0
    embedding: float = 1.0
    layers: float = 0.0
    hard: float = 0.5
    balance: float = 0.5
    mixup: float = 0.3
    average: float = 0.999
    warp: float = 0.15
    mask_mels: int = 12
    mask_s: float = 0.2
    nonspeech: int = 0
    unlabelled: tuple[str, ...] = ()
    refit: bool = True


@dataclass(frozen=True)
class Folds:
    """Out-of-fold scoring in place of a bundle.

    Attributes:
        k: Number of folds.
        seed: Deals the speakers into them.
    """

    k: int
    seed: int = 0


@dataclass(frozen=True)
class Recipe:
    """One model, or one published experiment. Exactly one of ``train`` and ``distill`` is given."""

    name: str
    data: Data
    windows: Windows
    encoder: EncoderChoice
    head: HeadChoice = field(default_factory=HeadChoice)
    augmentation: Augmentation = field(default_factory=Augmentation)
    train: Train | None = None
    distill: Distill | None = None
    folds: Folds | None = None
    quantize: Quantize = field(default_factory=Quantize)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", self.name):
            raise RecipeError(f"name = {self.name!r}; allowed: letters, digits, '-' and '_'")
        if (self.train is None) == (self.distill is None):
            raise RecipeError("a recipe has either [train] or [distill], exactly one of them")
        allowed = PRETRAINED if self.train else STUDENTS
        if self.encoder.family not in allowed:
            raise RecipeError(
                f"encoder.family = {self.encoder.family!r}: [train] takes {', '.join(PRETRAINED)}; "
                f"[distill] {', '.join(STUDENTS)}"
            )
        if self.distill and (both := set(self.distill.unlabelled) & set(self.data.corpora)):
            raise RecipeError(
                f"distill.unlabelled has {sorted(both)}, which data.corpora has with their labels"
            )
        if self.distill and self.encoder.family == "wav":
            if self.distill.warp or self.distill.mask_mels:
                raise RecipeError("wav hears no mel bands: set distill.warp and mask_mels to 0")
        if self.head.members > 1 and (self.distill or (self.train and self.train.tuned)):
            raise RecipeError(
                f"head.members = {self.head.members}: above 1 only with [train], and without tuned"
            )
        if self.train and self.train.tuned:
            tuned, encoder = self.train.tuned, self.encoder
            if encoder.family != "whisper":
                raise RecipeError(f"train.tuned = {tuned}: above 0 only of the family 'whisper'")
            if not encoder.states - 1 <= tuned <= encoder.layers:
                raise RecipeError(
                    f"train.tuned = {tuned}: with layers = {encoder.layers} and states = "
                    f"{encoder.states}, allowed is 0, or {encoder.states - 1} to {encoder.layers}"
                )
            if self.train.ridge:
                raise RecipeError("train.ridge needs a frozen encoder; leave ridge or tuned out")

"""What a study computes: the kinds of model, their sizes, and the optimisers at the hub.

Source: the paper or textbook of each; DESIGN.md "Privacy" (everything is one bounded vector a hospital).
Rules: shape and ranges only, whether a model can read the contract is ``common.tasks.fit``'s; every
size, seed, bin and vocabulary is public and stands here or in the contract; nothing is taken from data.
"""

from typing import Annotated, Final, Literal, Self, TypeAlias

from pydantic import BaseModel, Field, model_validator

from common.contract import LISTED, STRICT, Column, broken
from common.contract.fields import DIFFERENT

Width: TypeAlias = Annotated[int, Field(ge=1, le=65_536)]
Rate: TypeAlias = Annotated[float, Field(ge=1e-9, le=1e6)]
Decay: TypeAlias = Annotated[float, Field(ge=0, lt=1)]
Tau: TypeAlias = Annotated[float, Field(ge=1e-12, le=1e3)]
Seed: TypeAlias = Annotated[int, Field(ge=0, le=2**53 - 1)]
Activation: TypeAlias = Literal["relu", "tanh", "gelu"]


class _Table(BaseModel):
    model_config = STRICT


class LogisticRegression(_Table):
    """Multinomial logistic regression; for an amount, linear regression by least squares."""

    kind: Literal["logistic_regression"]


class LinearSvm(_Table):
    """Linear support vector machine, multi-class hinge loss (Crammer and Singer, JMLR 2 (2001))."""

    kind: Literal["linear_svm"]


class KernelSvm(_Table):
    """A linear SVM on ``random_features`` cosines of the row: a Gaussian kernel of width ``bandwidth``.

    The directions are drawn from ``seed`` alone (Rahimi and Recht, NIPS 2007).
    """

    kind: Literal["kernel_svm"]
    random_features: Width
    bandwidth: Annotated[float, Field(ge=1e-6, le=1e6)]
    seed: Seed


class Mlp(_Table):
    """Fully connected layers: widths ``hidden``, an ``activation`` after each, then one for the outputs."""

    kind: Literal["mlp"]
    hidden: Annotated[tuple[Width, ...], LISTED, Field(min_length=1, max_length=4)]
    activation: Activation = "relu"


class Cnn(_Table):
    """Convolutions on an image: for each of ``channels`` a layer, an activation and a mean over 2 by 2.

    One fully connected layer after them (LeCun et al., Proc. IEEE 86 (1998)).
    """

    kind: Literal["cnn"]
    channels: Annotated[
        tuple[Annotated[int, Field(ge=1, le=1024)], ...], LISTED, Field(min_length=1, max_length=6)
    ]
    kernel: Literal[3, 5, 7] = 3
    activation: Activation = "tanh"


class ResNet18(_Table):
    """ResNet-18 with GroupNorm (He et al., arXiv 1512.03385; Wu and He, arXiv 1803.08494); 64 is its width.

    Names are torchvision's.
    """

    kind: Literal["resnet18"]
    width: Annotated[int, Field(ge=8, le=64, multiple_of=8)] = 64
    groups: Literal[4, 8] = 8


class Recurrent(_Table):
    """One recurrent layer over a series, its last state to the outputs; a step's input has its masks.

    ``lstm`` (Hochreiter and Schmidhuber 1997), ``gru`` (Cho et al., arXiv 1406.1078) or Elman's ``rnn``.
    """

    kind: Literal["recurrent"]
    cell: Literal["rnn", "lstm", "gru"] = "lstm"
    hidden: Annotated[int, Field(ge=1, le=4096)]


class Autoencoder(_Table):
    """Layers ``hidden`` down to ``code`` numbers and back (Hinton and Salakhutdinov 2006).

    A row is anomalous by the squared error of what comes back; the code is its embedding.
    """

    kind: Literal["autoencoder"]
    hidden: Annotated[tuple[Width, ...], LISTED, Field(max_length=3)] = ()
    code: Width
    activation: Activation = "tanh"


class SkipGram(_Table):
    """Embeddings of terms: each predicts its neighbours within ``window`` (Mikolov et al., 1301.3781).

    The softmax goes over the whole public vocabulary: there is no sampling of negatives.
    """

    kind: Literal["skip_gram"]
    width: Annotated[int, Field(ge=1, le=4096)]
    window: Annotated[int, Field(ge=1, le=16)] = 2


class SequenceToSequence(_Table):
    """From the tokens of feature ``source`` to those of ``target``: two GRUs with attention.

    The attention is Luong's dot product (arXiv 1508.04025); decoding is greedy.
    """

    kind: Literal["sequence_to_sequence"]
    source: Column
    target: Column
    hidden: Annotated[int, Field(ge=1, le=4096)]

    @model_validator(mode="after")
    def _two_features(self) -> Self:
        if self.source == self.target:
            raise broken("target", "must be another feature than source")
        return self


class Transformer(_Table):
    """An encoder over coded events and their times, its mean to the outputs (arXiv 1706.03762, pre-norm)."""

    kind: Literal["transformer"]
    width: Annotated[int, Field(ge=1, le=4096)]
    heads: Annotated[int, Field(ge=1, le=64)]
    layers: Annotated[int, Field(ge=1, le=12)]
    feedforward: Width

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.width % self.heads:
            raise broken("heads", "must divide width")
        return self


class Cox(_Table):
    """Proportional hazards in discrete time: a risk a row, a baseline an interval.

    The complementary log-log link makes its coefficients those of Cox's model (Prentice and Gloeckler 1978).
    """

    kind: Literal["cox"]


class RandomForest(_Table):
    """``trees`` random-split trees of ``depth``, grown from ``seed`` without data; leaves count classes.

    One round (Fan et al., ICDM 2003; Jagannathan et al., TDP 5 (2012)).
    """

    kind: Literal["random_forest"]
    trees: Annotated[int, Field(ge=1, le=1000)]
    depth: Annotated[int, Field(ge=1, le=8)]
    seed: Seed


class Statistics(_Table):
    """Counts of a cohort on public grids, in one round: all that a "table one" needs.

    ``numbers``: names of number features with ``present``, whose moments (and with ``correlations`` products)
    are summed; ``bins`` a histogram of each, and a dyadic tree above it for quantiles (a power of two);
    ``categories``: category features to count; ``crossed``: pairs of them counted together; ``by``: a
    category feature or the label's classes by which everything else is split. With a time to event, exits and
    events on its grid.
    """

    kind: Literal["statistics"]
    numbers: Annotated[tuple[Column, ...], LISTED, Field(max_length=200)] = ()
    bins: Literal[0, 8, 16, 32, 64, 128, 256] = 32
    correlations: bool = False
    categories: Annotated[tuple[Column, ...], LISTED, Field(max_length=200)] = ()
    crossed: Annotated[
        tuple[Annotated[tuple[Column, Column], LISTED], ...], LISTED, Field(max_length=200)
    ] = ()
    by: Annotated[str, Field(max_length=128)] = ""


class Evaluation(_Table):
    """How held-out patients count how the model does on them, in the rounds of training and ``rounds`` after.

    ``bins`` of scores; ``subgroups``: category features by whose codes everything is counted too;
    ``per_hospital``: the error of each hospital by itself, a release about each by name.
    """

    rounds: Annotated[int, Field(ge=1, le=20)] = 1
    bins: Literal[10, 20, 50] = 20
    subgroups: Annotated[tuple[Column, ...], LISTED, Field(max_length=8), DIFFERENT] = ()
    per_hospital: bool = False


Model: TypeAlias = (
    LogisticRegression
    | LinearSvm
    | KernelSvm
    | Mlp
    | Cnn
    | ResNet18
    | Recurrent
    | Autoencoder
    | SkipGram
    | SequenceToSequence
    | Transformer
    | Cox
    | RandomForest
    | Statistics
)
COUNTING: Final = ("random_forest", "statistics")
"""Kinds whose state is the sum itself: one round, no descent."""


class FedAvg(_Table):
    """The next model is the mean of the hospitals' models (McMahan et al., arXiv 1602.05629)."""

    strategy: Literal["fedavg"]


class FedAvgM(_Table):
    """A step of ``learning_rate`` along the mean change with ``momentum`` (Hsu et al., arXiv 1909.06335)."""

    strategy: Literal["fedavgm"]
    learning_rate: Rate = 1.0
    momentum: Decay = 0.0


class _Adaptive(_Table):
    learning_rate: Rate = 0.1
    tau: Tau = 1e-3


class _Moments(_Adaptive):
    beta_1: Decay = 0.9
    beta_2: Decay = 0.99


class FedAdagrad(_Adaptive):
    """An adaptive step; ``tau`` is added to the root (Reddi et al., arXiv 2003.00295, also the next two)."""

    strategy: Literal["fedadagrad"]


class FedAdam(_Moments):
    """``beta_1`` and ``beta_2`` are the decays of the first and the second moment."""

    strategy: Literal["fedadam"]


class FedYogi(_Moments):
    """As FedAdam, but the second moment changes by bounded steps."""

    strategy: Literal["fedyogi"]
    learning_rate: Rate = 0.01


Server: TypeAlias = FedAvg | FedAvgM | FedAdagrad | FedAdam | FedYogi

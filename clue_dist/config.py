"""The one tree of settings: read once, checked, resolved against the data, kept in the run folder.

Nothing heavy is imported here, so that a misspelt key is answered at once. `configs/README.md`
explains every field.
"""

from __future__ import annotations

import json
import os
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from clue_dist.files import expand_home, require_utf8_path

# Share of a modality's features that a file of new cells must have had, by default.
MIN_KNOWN = 0.1
LONGEST_NAME, LONGEST_PATH = 255, 3000  # bytes

Auto = Literal["auto"]  # replaced by a number once the data are known
Positive = Annotated[int, Field(ge=1, le=10**9)]
Natural = Annotated[int, Field(ge=0, le=10**9)]
Width = Annotated[int, Field(ge=1, le=2**20)]  # units of a layer
Weight = Annotated[float, Field(ge=0, le=1e9)]
Share = Annotated[float, Field(gt=0, lt=1)]
Dropout = Annotated[float, Field(ge=0, le=0.9)]
# The keys of `model.likelihoods.LIKELIHOODS`.
LikelihoodName = Literal["nb", "zinb", "poisson", "bernoulli", "normal"]
NormalisationName = Literal["log_cp10k", "log", "clr", "tfidf", "none"]


def _complete_path(path: str) -> str:
    """Put the home folder in the place of `~`; refuse what no file system can hold."""
    path = expand_home(path)
    names = [os.fsencode(name) for name in path.split("/")]
    too_long = max(map(len, names)) > LONGEST_NAME or sum(map(len, names)) > LONGEST_PATH
    if "\0" in path or too_long:
        raise ValueError("no file can be called so")
    require_utf8_path(path)
    return path


PathOrUrl = Annotated[str, AfterValidator(_complete_path)]


class SettingsGroup(BaseModel):
    """A group of settings: unknown keys are refused, and values do not change once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModalityConfig(SettingsGroup):
    """What differs from the defaults of the modality's kind."""

    likelihood: LikelihoodName | Auto = "auto"  # p(x_k | z_k), see `model.likelihoods`
    normalise: NormalisationName | Auto = "auto"  # how counts become what the encoder sees
    weight: float = Field(1.0, gt=0, le=1e9)  # weight of this modality in the ELBOs


class TrunkConfig(SettingsGroup):
    """One network per modality, shared by its K heads: projection -> hidden layers -> h."""

    projection: Width = 50  # components of the first, sparse layer
    projection_init: Literal["svd", "svd_of_sample", "svd_of_store", "random"] = "svd"
    projection_lr: Weight = 0.0  # relative to train.lr; 0 keeps the projection as initialised
    # How much shorter the projection makes directions that set biological batches apart; 0: none.
    batch_shrinkage: Weight = 10.0
    # Let the encoder see ln of the cell's total count and of its number of detected features.
    size_input: bool = True
    # One trunk for a modality's K heads; false gives each head layers of its own.
    shared: bool = True
    members: Width = 4  # independent networks side by side, each with its part of every z_k
    hidden: Width = 256
    depth: int = Field(2, ge=1, le=1000)
    dropout: Dropout = 0.2


class DecoderConfig(SettingsGroup):
    """z_k and the cell's batch -> parameters of p(x_k | z_k)."""

    hidden: Width = 128
    depth: int = Field(1, ge=0, le=1000)
    dropout: Dropout = 0.0
    features_per_step: Positive | Auto = "auto"  # a fresh random subset is scored in each step


class DiscriminatorConfig(SettingsGroup):
    """The aligned dimensions of z inferred from one modality -> which modality it was (eq. 12)."""

    hidden: Width = 128
    depth: int = Field(2, ge=0, le=1000)
    dropout: Dropout = 0.2


class ModelConfig(SettingsGroup):
    """Sizes of the networks, and how the posterior combines what the modalities say."""

    latent: Width = 64  # d, dimensions of each modality's z_k
    # Share of the d dimensions that follow from x_k alone and that no term aligns.
    private: float = Field(0.25, ge=0, lt=1)
    posterior: Literal["gpoe", "poe", "mean"] = "gpoe"  # q(z | everything observed), eq. 6
    # Rank of what tells the K heads of a target z_j apart; 0: each has a matrix of its own. auto: 0
    # up to three modalities, 16 from four on.
    head_rank: Annotated[int, Field(ge=0, le=2**20)] | Auto = "auto"
    trunk: TrunkConfig = TrunkConfig()
    decoder: DecoderConfig = DecoderConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()

    @property
    def n_private(self) -> int:
        """How many of the d dimensions are private where a second modality exists.

        Each member of the trunk has as many, so the number is rounded down in each.
        """
        per_member = self.latent // self.trunk.members
        return int(self.private * per_member) * self.trunk.members

    @model_validator(mode="after")
    def _require_shared_trunk(self) -> ModelConfig:
        if self.head_rank not in ("auto", 0) and not self.trunk.shared:
            raise ValueError(
                "model.head_rank is for heads on one trunk: set model.trunk.shared=true, or "
                "model.head_rank=0"
            )
        return self

    @model_validator(mode="after")
    def _require_equal_members(self) -> ModelConfig:
        latent, members = self.latent, self.trunk.members
        if latent % members:
            raise ValueError(
                "model.trunk.members must divide model.latent; "
                f"got {latent} % {members} = {latent % members}"
            )
        return self


class ObjectiveConfig(SettingsGroup):
    """Weights of eq. 15, and of the terms beyond the paper."""

    lambda_self: Weight = 0.02
    lambda_cross: Weight = 0.05
    lambda_mse: Weight = 0.01
    lambda_d: Weight = 0.05
    lambda_kl: Weight = 1.0  # factor on the KL of both ELBOs
    lambda_contrastive: Weight = 1.0  # weight of InfoNCE between the modalities of paired cells
    alignment: Literal["mse", "cosine"] = "mse"  # cosine: every z has length 1 in eq. 9
    per_feature: bool = False  # divide each modality's ELBO by its number of features
    contrastive_mixup: bool = True  # contrast random mixtures of pairs instead of the pairs
    # Where modalities tell the biological batch, negatives come from the pair's own one, as far as
    # it has enough of them.
    contrastive_within_batch: bool = True
    # Other cells' profiles of the same modality are negatives, too, with this weight. At 0 nothing
    # keeps a profile from lying nearer to all of its own modality than to its partner.
    contrastive_same_modality: Weight = 1.0

    # Of a kind whose profiles are sparse samples (atac), the encoder sees each cell without a share
    # of its entries that is drawn anew at each step, uniform between 0 and this.
    thinning: float = Field(0.8, ge=0, lt=1)

    @model_validator(mode="after")
    def _require_one_term(self) -> ObjectiveConfig:
        weights = [f"lambda_{term}" for term in ("self", "cross", "mse", "d", "contrastive")]
        if not any(getattr(self, weight) for weight in weights):
            raise ValueError(f"nothing to train: all of {', '.join(weights)} are 0")
        return self


class DataConfig(SettingsGroup):
    """Which cells a batch holds, and how they are read."""

    batch_size: Positive | Auto = "auto"  # cells of one optimizer step, over all ranks
    lanes: Positive = 8  # streams of the global batch; the number of ranks must divide it
    window_blocks: Positive = 16  # blocks that a lane mixes at a time
    paired_share: Share | Auto = "auto"  # of a batch, given to cells with two or more modalities
    weights: dict[str, Weight] | None = None  # of strata by name; overrides paired_share
    holdout: float = Field(0.05, ge=0, lt=1)  # share of the paired cells kept for validation
    holdout_max: Natural = 2000  # cells kept for validation, at most
    prefetch: Positive = 4  # batches kept ready on each rank


class TrainConfig(SettingsGroup):
    """The optimizer, its schedule, DeepSpeed, validation and checkpoints."""

    epochs: Annotated[float, Field(gt=0, le=1e6)] | Auto = "auto"
    optimizer: Literal["adamw", "rmsprop"] = "adamw"
    lr: float = Field(1e-3, gt=0, le=1e3)
    weight_decay: Weight = 0.01  # decay of matrices alone
    warmup: float = Field(0.02, ge=0, lt=1)  # share of the steps; the rest is a cosine
    final_lr: float = Field(0.05, ge=0, le=1)  # share of lr, at the last step
    kl_warmup: float = Field(0.0, ge=0, le=1)  # share of the steps over which lambda_kl rises
    clip: Weight = 5.0  # norm of the gradient; 0 turns clipping off
    zero_stage: Literal[0, 1, 2, 3] = 1  # what DeepSpeed shards over the ranks
    # mixed: weights in float32, products of the networks in bfloat16; bf16: weights, too
    precision: Literal["auto", "fp32", "mixed", "bf16"] = "auto"
    grad_accum: Positive = 1  # micro-batches of one step
    validate_every: Positive | Auto = "auto"  # steps
    patience: Natural = 0  # validations without a better score before training stops; 0: never
    checkpoint_every: Positive | Auto = "auto"  # steps
    keep: Positive = 2  # checkpoints that stay besides the best


class LogConfig(SettingsGroup):
    """Where the numbers of a run go."""

    every: Positive = 20  # steps between lines
    tensorboard: bool = True
    wandb: Literal["offline", "online", "disabled"] = "offline"
    project: str = "clue_dist"  # project in wandb
    group: str = ""  # group of runs in wandb, as of a search; "" for none
    name: str = ""  # name of the run in wandb; "" for that of its folder
    artifacts: bool = False  # whether wandb gets the best weights when training ends


class Config(SettingsGroup):
    """All settings of a run, as `RUN/config.json` keeps them."""

    store: PathOrUrl = ""  # the Zarr store to train on
    run: PathOrUrl = ""  # folder of this run: config, metrics, checkpoints
    seed: int = Field(0, ge=0, lt=2**63)  # of initial weights, the order of cells, and all noise
    modalities: dict[str, ModalityConfig] = {}  # settings by modality, as the store names them
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _require_whole_micro_batches(self) -> Config:
        size, lanes, accumulated = self.data.batch_size, self.data.lanes, self.train.grad_accum
        unit = lanes * accumulated
        if size != "auto" and size % unit:
            raise ValueError(
                f"data.batch_size must be a multiple of data.lanes x train.grad_accum = {lanes} x "
                f"{accumulated} = {unit}; got {size} % {unit} = {size % unit}"
            )
        return self

    @model_validator(mode="after")
    def _require_private_trained(self) -> Config:
        if self.model.n_private and not (self.objective.lambda_self or self.objective.lambda_cross):
            raise ValueError(
                "nothing would train the private dimensions: objective.lambda_self and "
                "objective.lambda_cross are 0; set model.private=0, too"
            )
        return self

    def to_json(self) -> str:
        """The whole tree, as it is kept in a run folder."""
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"

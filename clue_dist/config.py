"""The one tree of settings: read once, checked, resolved against the data, passed down, kept in the run folder.

Nothing heavy is imported here, so that a misspelt key is answered at once. `configs/README.md` explains every field.
"""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from clue_dist.errors import ConfigError

Auto = Literal["auto"]
Positive = Annotated[int, Field(ge=1, le=10**9)]
Natural = Annotated[int, Field(ge=0, le=10**9)]
Width = Annotated[int, Field(ge=1, le=2**20)]  # of a layer
Weight = Annotated[float, Field(ge=0, le=1e9)]
Share = Annotated[float, Field(gt=0, lt=1)]
Dropout = Annotated[float, Field(ge=0, le=0.9)]
LikelihoodName = Literal["nb", "zinb", "poisson", "bernoulli", "normal"]
NormalisationName = Literal["log_cp10k", "log", "clr", "tfidf", "none"]


def _possible(path: str) -> str:
    """A path or URL that there can be on some machine."""
    parts = [os.fsencode(part) for part in path.split("/")]
    if "\0" in path or max(map(len, parts)) > 255 or sum(map(len, parts)) > 3000:
        raise ValueError("no file can be called so")
    return path


Path_ = Annotated[str, AfterValidator(_possible)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModalityConfig(_Strict):
    """What differs from the defaults of the modality's kind."""

    likelihood: LikelihoodName | Auto = "auto"
    normalise: NormalisationName | Auto = "auto"
    weight: float = Field(1.0, gt=0, le=1e9)  # of this modality in the ELBOs


class TrunkConfig(_Strict):
    """One network per modality, shared by its K heads: projection -> hidden layers -> h."""

    projection: Width = 50  # components of the first, sparse layer
    projection_init: Literal["svd", "svd_of_sample", "svd_of_store", "random"] = "svd"
    projection_lr: Weight = 0.0  # relative to train.lr; 0 keeps the projection as initialised
    size_input: bool = (
        True  # the cell's total count and number of detected features are inputs too, as ln
    )
    shared: bool = (
        True  # one trunk for a modality's K heads; false: K separate encoders behind the projection
    )
    members: Width = 4  # independent networks side by side, each with its share of every z_k
    hidden: Width = 256
    depth: int = Field(2, ge=1, le=1000)
    dropout: Dropout = 0.2


class DecoderConfig(_Strict):
    """z_k and the cell's batch -> parameters of p(x_k | z_k)."""

    hidden: Width = 128
    depth: int = Field(1, ge=0, le=1000)
    dropout: Dropout = 0.0
    features_per_step: Positive | Auto = (
        "auto"  # score a fresh random subset of so many features each step
    )


class DiscriminatorConfig(_Strict):
    """The aligned dimensions of a z inferred from one modality -> which modality it was (eq. 12)."""

    hidden: Width = 128
    depth: int = Field(2, ge=0, le=1000)
    dropout: Dropout = 0.2


class ModelConfig(_Strict):
    latent: Width = 64  # d, dimensions of each modality's z_k
    private: float = Field(
        0.25, ge=0, lt=1
    )  # share of them that x_k alone tells and that no term aligns
    posterior: Literal["gpoe", "poe", "mean"] = "gpoe"
    trunk: TrunkConfig = TrunkConfig()
    decoder: DecoderConfig = DecoderConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()

    @property
    def n_private(self) -> int:
        """How many of the d dimensions are private where there are modalities to share with: as many in each member,
        rounded down."""
        each = self.latent // self.trunk.members
        return int(self.private * each) * self.trunk.members

    @model_validator(mode="after")
    def _members(self) -> ModelConfig:
        if self.latent % self.trunk.members:
            raise ValueError(
                f"model.trunk.members must divide model.latent; got {self.latent} % {self.trunk.members} = "
                f"{self.latent % self.trunk.members}"
            )
        return self


class ObjectiveConfig(_Strict):
    """Weights of eq. 15, and of the terms beyond the paper."""

    lambda_self: Weight = 0.02
    lambda_cross: Weight = 0.05
    lambda_mse: Weight = 0.01
    lambda_d: Weight = 0.05
    lambda_kl: Weight = 1.0  # beta on the KL of both ELBOs
    lambda_contrastive: Weight = 1.0  # InfoNCE on pairs
    alignment: Literal["mse", "cosine"] = "mse"
    per_feature: bool = False  # divide each modality's ELBO by its number of features
    contrastive_mixup: bool = (
        True  # contrast random convex combinations of pairs instead of the pairs
    )
    contrastive_within_batch: bool = False  # negatives come from the pair's own biological batch

    @model_validator(mode="after")
    def _some(self) -> ObjectiveConfig:
        wanted = [f"lambda_{name}" for name in ("self", "cross", "mse", "d", "contrastive")]
        if not any(getattr(self, name) for name in wanted):
            raise ValueError(f"nothing to train: all of {', '.join(wanted)} are 0")
        return self


class DataConfig(_Strict):
    batch_size: Positive | Auto = "auto"  # cells of one optimizer step, over all ranks
    lanes: Positive = 8  # streams of the global batch; the number of ranks must divide it
    window_blocks: Positive = 16  # blocks a lane mixes at a time
    paired_share: Share | Auto = "auto"  # of a batch, given to cells with two or more modalities
    weights: dict[str, Weight] | None = None  # of strata by name; overrides paired_share
    holdout: float = Field(0.05, ge=0, lt=1)  # share of the paired cells kept for validation
    holdout_max: Natural = 2000
    prefetch: Positive = 4  # batches kept ready


class TrainConfig(_Strict):
    epochs: Annotated[float, Field(gt=0, le=1e6)] | Auto = "auto"
    optimizer: Literal["adamw", "rmsprop"] = "adamw"
    lr: float = Field(1e-3, gt=0, le=1e3)
    weight_decay: Weight = 0.01
    warmup: float = Field(0.02, ge=0, lt=1)  # share of the steps; the rest is a cosine
    final_lr: float = Field(0.05, ge=0, le=1)  # of lr, at the last step
    kl_warmup: float = Field(0.0, ge=0, le=1)  # share of the steps over which lambda_kl rises
    clip: Weight = 5.0  # norm of the gradient; 0 = off
    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    grad_accum: Positive = 1
    validate_every: Positive | Auto = "auto"  # steps
    patience: Natural = 0  # validations without a better score before it stops; 0 = never
    checkpoint_every: Positive | Auto = "auto"  # steps
    keep: Positive = 2  # checkpoints besides the best


class LogConfig(_Strict):
    every: Positive = 20  # steps
    tensorboard: bool = True
    wandb: Literal["offline", "online", "disabled"] = "offline"
    project: str = "clue_dist"


class Config(_Strict):
    store: Path_ = ""  # the Zarr store to train on
    run: Path_ = ""  # folder of this run: config, metrics, checkpoints
    seed: int = Field(0, ge=0, lt=2**63)
    modalities: dict[str, ModalityConfig] = {}
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _batches(self) -> Config:
        size, step = self.data.batch_size, self.data.lanes * self.train.grad_accum
        if size != "auto" and size % step:
            raise ValueError(
                f"data.batch_size must be a multiple of data.lanes x train.grad_accum = {self.data.lanes} x "
                f"{self.train.grad_accum} = {step}; got {size} % {step} = {size % step}"
            )
        return self

    @model_validator(mode="after")
    def _private(self) -> Config:
        if self.model.n_private and not (self.objective.lambda_self or self.objective.lambda_cross):
            raise ValueError(
                "nothing would train the private dimensions: objective.lambda_self and objective.lambda_cross are 0; "
                "set model.private=0, too"
            )
        return self

    def to_json(self) -> str:
        """The whole tree, as it is kept in a run folder."""
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a config file and apply `--set dotted.path=value` overrides (values are JSON, or else text).

    Raises:
        ConfigError: no such file, not JSON, an unknown key (its nearest name is given), a value out of range.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise ConfigError(
                "the config file does not exist", where=path, fix="see configs/ for recipes"
            )
        tree = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError("the config file cannot be read", where=path, got=error) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError("the config file is not JSON", where=path, got=error) from None
    if not isinstance(tree, dict):
        raise ConfigError(
            "the config file is not a JSON object",
            where=path,
            got=type(tree).__name__,
            expected="{...}",
        )
    for override in overrides or []:
        _set(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise _explained(error, path) from None


def require_paths(config: Config, *keys: str) -> None:
    """`store` and `run` (`keys`: which of them) may be left out of a recipe, but not of a run."""
    for key in keys or ("store", "run"):
        if not getattr(config, key):
            raise ConfigError(
                f"`{key}` is not set",
                where="config",
                fix=f"add --set {key}=PATH, or name it in the config file",
            )


def list_changed_settings(a: Config, b: Config) -> list[str]:
    """Dotted paths in which two configs differ."""
    left, right = _flat(a.model_dump(mode="json")), _flat(b.model_dump(mode="json"))
    return sorted(k for k in left.keys() | right.keys() if left.get(k) != right.get(k))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def _set(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(
            "--set wants dotted.path=value",
            got=repr(override),
            expected="for example --set train.lr=1e-4",
        )
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    *parents, last = dotted.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ConfigError(
                "--set goes below a value that is not an object", got=override, where=parent
            )
    tree[last] = value


def _explained(error: ValidationError, path: Path) -> ConfigError:
    first = error.errors()[0]
    # Pydantic adds which member of a union it tried ("constrained-int", "literal['auto']").
    dotted = ".".join(
        str(p) for p in first["loc"] if str(p).isidentifier() and p not in ("float", "int")
    )
    if first["type"] != "extra_forbidden":
        got = None if first["type"] == "value_error" else repr(first["input"])[:200]
        fix = "put it in double quotes" if first["type"] == "string_type" else None
        return ConfigError(
            first["msg"].removeprefix("Value error, "),
            where=f"{path}: {dotted or 'config'}",
            got=got,
            fix=fix,
        )
    known = _known_keys(first["loc"][:-1])
    near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.0)
    parent = ".".join(str(p) for p in first["loc"][:-1])
    return ConfigError(
        "unknown key in the config",
        where=f"{path}: {dotted}",
        expected=f"one of {', '.join(known)}",
        fix=f"did you mean `{'.'.join(filter(None, [parent, *near]))}`?" if near else None,
    )


def _known_keys(loc: tuple[Any, ...]) -> list[str]:
    node: Any = Config
    for key in loc:
        if node is Config and key == "modalities":
            return list(ModalityConfig.model_fields) if len(loc) > 1 else []
        node = node.model_fields[key].annotation
    return list(node.model_fields)

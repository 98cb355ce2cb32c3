"""What is "auto" follows from the data; what cannot work is refused before anything starts."""

from itertools import combinations
from pathlib import Path

import pytest
import torch

from clue_dist.checkpoint.kept_config import follow_kept_config
from clue_dist.config import Config, DataConfig, ObjectiveConfig
from clue_dist.errors import ConfigError
from clue_dist.ranks import Ranks
from clue_dist.train import auto_settings
from clue_dist.train.auto_settings import resolve_auto_settings, time_products
from clue_dist.train.setup import prepare_setup
from tests.stores import make_store


def config_of(path: Path, **parts: object) -> Config:
    return Config(store=str(path), run=str(path.parent / "run"), **parts)


@pytest.mark.parametrize("folder", ["s.zarr", "s.zarr/runs/first"])
def test_a_run_does_not_lie_in_a_store(tmp_path: Path, folder: str) -> None:
    make_store(tmp_path / "s.zarr", features={"rna": 30, "adt": 8})
    (tmp_path / folder).parent.mkdir(exist_ok=True)
    config = Config(store=str(tmp_path / "s.zarr"), run=str(tmp_path / folder))
    with pytest.raises(ConfigError, match=r"run folder would lie in a store\n.*\n.*s\.zarr is a"):
        prepare_setup(config, world=1)


def test_a_run_may_lie_beside_the_manifest_of_another_program(tmp_path: Path) -> None:
    make_store(tmp_path / "s.zarr", features={"rna": 30, "adt": 8})
    (tmp_path / "manifest.json").write_text('{"name": "a web page"}')
    assert prepare_setup(config_of(tmp_path / "s.zarr"), world=1).config.run == f"{tmp_path}/run"


def test_held_out_cells_are_paired_last_and_never_planned(tmp_path: Path) -> None:
    make_store(
        tmp_path / "s.zarr", cells={"rna+adt": 200, "rna": 60}, features={"rna": 30, "adt": 8}
    )
    setup = prepare_setup(config_of(tmp_path / "s.zarr", data={"holdout": 0.1}), world=1)
    assert setup.held_out_cells == {"rna+adt": 20, "rna": 0}
    assert setup.load_held_out_batch().n_cells == 20
    planned = {int(c) for t in range(40) for c in setup.plan.select_cells(t, "rna+adt")}
    assert planned == set(range(180))


def test_without_pairs_every_stratum_is_held_out_in_part(tmp_path: Path) -> None:
    make_store(tmp_path / "s.zarr", cells={"rna": 100, "adt": 60}, features={"rna": 30, "adt": 8})
    objective = ObjectiveConfig(lambda_cross=0)
    setup = prepare_setup(
        config_of(tmp_path / "s.zarr", data={"holdout": 0.1}, objective=objective), world=2
    )
    assert setup.held_out_cells == {"rna": 10, "adt": 6}
    assert not setup.has_paired_cells


def test_holdout_has_a_ceiling(tmp_path: Path) -> None:
    make_store(tmp_path / "s.zarr", cells={"rna+adt": 300}, features={"rna": 30, "adt": 8})
    setup = prepare_setup(
        config_of(tmp_path / "s.zarr", data={"holdout": 0.5, "holdout_max": 30}), world=1
    )
    assert setup.held_out_cells == {"rna+adt": 30}


@pytest.mark.parametrize(
    ("cells", "low", "high"), [(1_000, 128, 128), (100_000, 512, 512), (30_000_000, 4096, 4096)]
)
def test_auto_batch_grows_with_the_data_and_divides_into_lanes(
    cells: int, low: int, high: int
) -> None:
    resolved = resolve_auto_settings(Config(data=DataConfig(lanes=8)), cells, 2)
    assert low <= resolved.data.batch_size <= high
    resolved = resolve_auto_settings(Config(data=DataConfig(lanes=48)), cells, 2)
    assert resolved.data.batch_size % 48 == 0


def test_auto_epochs_are_many_for_few_cells_and_one_for_an_atlas() -> None:
    assert resolve_auto_settings(Config(), 500, 2).train.epochs == 60
    assert resolve_auto_settings(Config(), 5_000, 2).train.epochs == 90
    assert resolve_auto_settings(Config(), 30_000_000, 2).train.epochs == 1
    explicit = resolve_auto_settings(
        Config(train={"epochs": 3, "patience": 2, "validate_every": 7, "checkpoint_every": 9}),
        500,
        2,
    ).train
    assert (
        explicit.epochs,
        explicit.patience,
        explicit.validate_every,
        explicit.checkpoint_every,
    ) == (3, 2, 7, 9)


@pytest.mark.parametrize(
    ("instruction", "seconds", "precision"),
    [
        ("avx512_bf16", [1.0, 2.0], "mixed"),
        ("amx_bf16", [1.0, 9.0], "mixed"),
        ("avx512_bf16", [2.0, 1.0], "fp32"),  # Intel's without AMX
        ("avx2", [1.0, 2.0], "fp32"),
    ],
)
def test_auto_precision_is_lower_where_the_processor_gains_by_it(
    monkeypatch: pytest.MonkeyPatch, instruction: str, seconds: list[float], precision: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {instruction: True}, raising=False)
    monkeypatch.setattr(auto_settings, "time_products", lambda *_: seconds)
    assert resolve_auto_settings(Config(), 500, 2).train.precision == precision
    named = Config(train={"precision": "fp32"})
    assert resolve_auto_settings(named, 500, 2).train.precision == "fp32"
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as in earlier versions
    assert resolve_auto_settings(Config(), 500, 2).train.precision == "fp32"


def test_products_are_timed_without_a_draw() -> None:
    """A seed gives the same weights whether or not a precision was named."""
    before = torch.get_rng_state()
    float32, float64 = time_products(torch.float32, torch.float64)
    assert min(float32, float64) > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_auto_precision_asks_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for supported, precision in ((True, "mixed"), (False, "fp32")):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation, s=supported: s
        )
        assert resolve_auto_settings(Config(), 500, 2).train.precision == precision


def test_auto_heads_share_matrices_from_four_modalities_on() -> None:
    ranks = [resolve_auto_settings(Config(), 500, k).model.head_rank for k in (1, 3, 4, 8)]
    assert ranks == [0, 0, 16, 16]
    explicit = Config(model={"head_rank": 5})
    assert resolve_auto_settings(explicit, 500, 2).model.head_rank == 5
    apart = Config(model={"trunk": {"shared": False}})
    assert resolve_auto_settings(apart, 500, 8).model.head_rank == 0
    with pytest.raises(ValueError, match="on one trunk"):
        Config(model={"head_rank": 5, "trunk": {"shared": False}})


def test_a_run_older_than_the_rank_of_heads_goes_on_without_it() -> None:
    kept = Config(model={"head_rank": 0})
    resolved = resolve_auto_settings(Config(), 500, 8)
    assert follow_kept_config(resolved, kept).model.head_rank == 0
    named = resolve_auto_settings(Config(model={"head_rank": 16}), 500, 8)
    assert follow_kept_config(named, kept).model.head_rank == 16
    younger = Config(model={"head_rank": 16})
    assert follow_kept_config(resolved, younger).model.head_rank == 16


def test_a_run_goes_on_in_the_precision_in_which_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_settings, "multiplies_faster_in_bfloat16", lambda: True)
    here, kept = resolve_auto_settings(Config(), 500, 2), Config(train={"precision": "fp32"})
    assert here.train.precision == "mixed"
    assert follow_kept_config(here, kept).train.precision == "fp32"
    named = resolve_auto_settings(Config(train={"precision": "mixed"}), 500, 2)
    assert follow_kept_config(named, kept).train.precision == "mixed"  # which is refused later


def test_ranks_agree_on_the_precision_that_all_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_store(tmp_path / "s.zarr", features={"rna": 30, "adt": 8})
    monkeypatch.setattr(auto_settings, "multiplies_faster_in_bfloat16", lambda: True)
    setup = prepare_setup(config_of(tmp_path / "s.zarr"), world=2)
    for others, precision in (("mixed", "mixed"), ("fp32", "fp32")):
        monkeypatch.setattr(Ranks, "gather_values", lambda _, own, other=others: [own, other])
        training = setup.agree_on_precision(Ranks(0, 2)).config.train
        assert training.precision == precision
        assert "precision" not in training.model_fields_set  # nobody named it


def test_weights_must_name_every_stratum(tmp_path: Path) -> None:
    make_store(
        tmp_path / "s.zarr", cells={"rna+adt": 100, "rna": 60}, features={"rna": 30, "adt": 8}
    )
    with pytest.raises(ConfigError, match="every stratum"):
        prepare_setup(config_of(tmp_path / "s.zarr", data={"weights": {"rna": 1}}), world=1)
    setup = prepare_setup(
        config_of(tmp_path / "s.zarr", data={"weights": {"rna": 1, "rna+adt": 1}}), world=1
    )
    assert setup.plan.stratum_shares["rna"] == setup.plan.stratum_shares["rna+adt"]


def test_a_stratum_of_fewer_cells_than_its_share_is_told(tmp_path: Path) -> None:
    make_store(
        tmp_path / "s.zarr", cells={"rna+adt": 1, "rna": 300}, features={"rna": 30, "adt": 8}
    )
    setup = prepare_setup(config_of(tmp_path / "s.zarr"), world=1)
    lines = setup.format_summary().splitlines()
    (place,) = [i for i, line in enumerate(lines) if line.startswith("  stratum rna+adt: 1 cell,")]
    assert "8 in each training batch" in lines[place]
    assert "up to 8 copies of a cell in each training batch" in lines[place + 1]
    assert "lower data.lanes" in lines[place + 3]
    assert "copies" not in lines[place + 4]  # 300 cells of the other stratum are enough
    assert max(map(len, lines[place:])) <= 100


def test_many_rare_patterns_train_without_a_setting(tmp_path: Path) -> None:
    """Sixteen rounds of a batch, and 22 strata."""
    names = [f"m{i}" for i in range(6)]
    cells = {"+".join(names): 300} | dict.fromkeys(names, 30)
    cells |= {f"{one}+{other}": 10 for one, other in combinations(names, 2)} | {"m0+m1": 1}
    make_store(tmp_path / "s.zarr", cells=cells, features=dict.fromkeys(names, 4))
    setup = prepare_setup(config_of(tmp_path / "s.zarr"), world=2)
    assert setup.plan.batch_size == setup.config.data.batch_size == 128
    lines = setup.format_summary().splitlines()
    (place,) = [i for i, line in enumerate(lines) if line.startswith("  stratum m0+m1: 1 cell,")]
    assert lines[place].endswith("in each training batch on average")
    assert lines[place + 1] == "    up to 8 copies of a cell in the batches of its turns"
    assert not any("leave these cells out" in line for line in lines)


def test_summary_tells_what_would_happen(tmp_path: Path) -> None:
    make_store(
        tmp_path / "s.zarr", cells={"rna+adt": 100, "rna": 60}, features={"rna": 30, "adt": 8}
    )
    text = prepare_setup(config_of(tmp_path / "s.zarr"), world=1).format_summary()
    assert "rna: 30 features, log_cp10k -> nb" in text
    assert "stratum rna: 60 cells" in text

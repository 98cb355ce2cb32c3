"""A mistake in a config is answered with its dotted path and the way to mend it."""

import json
from pathlib import Path

import pytest

from clue_dist import config_file
from clue_dist.errors import ConfigError

RECIPES = sorted((Path(__file__).parents[2] / "configs").glob("*.json"))


def written(tmp_path: Path, tree: object) -> Path:
    path = tmp_path / "c.json"
    path.write_text(json.dumps(tree))
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_recipes_load(path: Path) -> None:
    config_file.load_config(path)


def test_there_are_the_promised_recipes() -> None:
    names = {p.name for p in RECIPES}
    assert names >= {
        "demo.json",
        "atlas.json",
        "neurips2021_multiome.json",
        "neurips2021_cite.json",
        "zero3.json",
    }


@pytest.mark.parametrize(
    ("tree", "where", "near"),
    [
        ({"trian": {}}, "trian", "train"),
        ({"train": {"lrr": 1}}, "train.lrr", "train.lr"),
        ({"model": {"trunk": {"hiden": 1}}}, "model.trunk.hiden", "model.trunk.hidden"),
        (
            {"modalities": {"rna": {"likelyhood": "nb"}}},
            "modalities.rna.likelyhood",
            "modalities.rna.likelihood",
        ),
    ],
)
def test_a_misspelt_key_names_its_neighbour(
    tmp_path: Path, tree: object, where: str, near: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        config_file.load_config(written(tmp_path, tree))
    assert str(caught.value.where).endswith(where)
    assert f"`{near}`" in str(caught.value.fix)


@pytest.mark.parametrize(
    ("tree", "where"),
    [
        ({"train": {"lr": -1}}, "train.lr"),
        ({"train": {"lr": "fast"}}, "train.lr"),
        ({"train": {"zero_stage": 7}}, "train.zero_stage"),
        ({"model": {"posterior": "median"}}, "model.posterior"),
    ],
)
def test_a_wrong_value_is_named(tmp_path: Path, tree: object, where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_file.load_config(written(tmp_path, tree))
    assert where in str(caught.value.where)


@pytest.mark.parametrize("override", ["train.epoch=3", "train.epochs=many", 'train={"lr": -1}'])
def test_a_wrong_override_is_not_blamed_on_the_file(tmp_path: Path, override: str) -> None:
    path = tmp_path / "c.json"
    path.write_text("{}")
    with pytest.raises(ConfigError) as caught:
        config_file.load_config(path, [override])
    assert str(caught.value.where).startswith("--set train.")


def test_batch_arithmetic_is_shown(tmp_path: Path) -> None:
    tree = {"data": {"batch_size": 100, "lanes": 8}, "train": {"grad_accum": 2}}
    with pytest.raises(ConfigError, match=r"8 x 2 = 16; got 100 % 16 = 4"):
        config_file.load_config(written(tmp_path, tree))


def test_set_overrides_and_creates(tmp_path: Path) -> None:
    path = written(tmp_path, {"train": {"lr": 0.1}})
    config = config_file.load_config(
        path, ["train.lr=1e-4", "store=a b.zarr", "modalities.rna.weight=2", "train.epochs=auto"]
    )
    assert (
        config.train.lr,
        config.store,
        config.modalities["rna"].weight,
        config.train.epochs,
    ) == (
        1e-4,
        "a b.zarr",
        2.0,
        "auto",
    )


@pytest.mark.parametrize("bad", ["train.lr", "=3", "store.x=1"])
def test_a_bad_set_is_refused(tmp_path: Path, bad: str) -> None:
    with pytest.raises(ConfigError):
        config_file.load_config(written(tmp_path, {"store": "s"}), [bad])


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        config_file.load_config(tmp_path / "no.json")
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        config_file.load_config(tmp_path / "b.json")
    with pytest.raises(ConfigError, match="not a JSON object"):
        config_file.load_config(written(tmp_path, [1]))


def test_changed_lists_dotted_paths(tmp_path: Path) -> None:
    a = config_file.load_config(written(tmp_path, {}))
    b = config_file.load_config(tmp_path / "c.json", ["train.lr=0.5", "model.latent=8"])
    assert config_file.compare_settings(a, b) == {"model.latent": (64, 8), "train.lr": (0.001, 0.5)}


def test_a_written_config_reads_back(tmp_path: Path) -> None:
    a = config_file.load_config(written(tmp_path, {}), ['data.weights={"rna": 2}', "seed=4"])
    (tmp_path / "out.json").write_text(a.to_json())
    assert config_file.load_config(tmp_path / "out.json") == a


def test_a_recipe_that_trains_nothing_is_refused(tmp_path: Path) -> None:
    off = {f"lambda_{term}": 0 for term in ("self", "cross", "mse", "d", "contrastive")}
    with pytest.raises(ConfigError, match="nothing to train"):
        config_file.load_config(written(tmp_path, {"objective": off}))


def test_private_dimensions_without_a_term_that_trains_them_are_refused(tmp_path: Path) -> None:
    contrast_alone = {"lambda_self": 0, "lambda_cross": 0}
    with pytest.raises(ConfigError, match=r"model\.private=0"):
        config_file.load_config(written(tmp_path, {"objective": contrast_alone}))
    config_file.load_config(
        written(tmp_path, {"objective": contrast_alone, "model": {"private": 0}})
    )


def test_a_home_folder_is_found_in_a_config_and_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    config = config_file.load_config(written(tmp_path, {"store": "~/s.zarr"}), ["run=~/runs/a"])
    assert (config.store, config.run) == ("/home/someone/s.zarr", "/home/someone/runs/a")
    with pytest.raises(ConfigError, match=r"~no-such-user is no home folder") as caught:
        config_file.load_config(tmp_path / "c.json", ["run=~no-such-user/a"])
    assert str(caught.value.where).startswith("--set run")

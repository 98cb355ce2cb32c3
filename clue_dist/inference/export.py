"""Writes what others need of a trained run into a folder of its own, with a card that explains it.

The folder is laid out as a run folder is, less what only training needs. Whatever takes a run
takes it: embedding, imputation, `--features-from`, `--init-from`.

    FOLDER/README.md                   the model card
    FOLDER/config.json, model.json     settings; features, batches, labels
    FOLDER/best/step-00001100/         weights.safetensors, state.json, COMMIT.json
    FOLDER/cells.h5ad                  where wanted: z and obs of reference cells, no counts
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
from safetensors.torch import save_file
from torch import Tensor

from clue_dist.checkpoint.kept_config import load_kept_config
from clue_dist.checkpoint.metrics_lines import find_validation
from clue_dist.checkpoint.model_card import ModelCard, read_model_card
from clue_dist.checkpoint.run_folder import (
    COMMIT,
    STATE,
    WEIGHTS,
    find_damage,
    parse_step,
    read_weights,
)
from clue_dist.config import Config
from clue_dist.errors import ConfigError, ResumeError, format_count, list_names, name_argument
from clue_dist.files import TEMPORARY_ENDING, apply_umask, write_file
from clue_dist.inference.cells import CellSource
from clue_dist.inference.load_model import load_model, require_weights
from clue_dist.inference.output_files import require_output_folder, translate_output_errors
from clue_dist.inference.reference_cells import REFERENCE_FILE, collect_reference
from clue_dist.inference.score_tables import format_scores, list_warnings, read_scores
from clue_dist.store.writer import hash_file

CARD_FILE = "README.md"
# What validation says of a step that is worth a line of the card.
_SCORE_TITLES = {
    "foscttm": "FOSCTTM of {} (0 is perfect, 0.5 is chance)",
    "mixing": "mixing of {} (0.5 is perfect)",
    "accuracy": "15-nearest-neighbour accuracy of labels in the joint z",
    "ilisi": "iLISI of batches in the joint z",
}


@dataclass(frozen=True)
class CardTexts:
    """What only a person can say of a model."""

    title: str = ""  # by default the name of the folder
    data: str = ""  # what was measured, of whom, where it can be had
    licence: str = ""  # terms under which others may use the weights


def export_run(
    run: Path,
    out: Path,
    *,
    checkpoint: str = "best",
    scores: Path | None = None,
    texts: CardTexts | None = None,
    cells: CellSource | None = None,
) -> None:
    """Write the weights of a run, and all that describes them, into a folder to be shared.

    Who may read the files follows from the umask. Paths of this machine are left out.

    Args:
        run: folder of the run.
        out: the folder to make.
        checkpoint: "best" (of validation), "last" (saved), or the name of a checkpoint.
        scores: scores.json of `clue evaluate`, to be shown in the card.
        texts: what a person says of the model.
        cells: reference cells whose z and obs travel with the model: a store, cells in memory, or
            an .h5ad that `clue embed --per-modality` has written with these weights.

    Raises:
        DataError: `cells` cannot be embedded, or were embedded by other weights.
        ResumeError: there is no such run, or its weights are missing or damaged.
        ConfigError: something is at `out`; `scores` is no scores.json.
        StoreError: the disk is full, or refuses to be written.
    """
    require_new_folder(out)
    card, config = read_model_card(run), load_kept_config(run)
    folder = require_weights(run, checkpoint)
    if problem := find_damage(folder):
        raise ResumeError("the weights are damaged", where=folder, got=problem)
    weights, reference = read_weights(folder), None
    if cells is not None:
        reference = collect_reference(cells, load_model(run, folder.name))
    write_model_folder(
        out,
        run,
        folder,
        weights,
        config,
        card,
        scores=scores,
        texts=texts or CardTexts(),
        reference=reference,
    )


def require_new_folder(out: Path) -> None:
    """Require that a folder can be made at `out`.

    Raises:
        ConfigError: something is there already, or the folder around it is missing.
    """
    require_output_folder(out)
    if out.exists():
        raise ConfigError(
            "something is already there",
            where=name_argument("out", out),
            fix="choose another folder",
        )


def write_model_folder(
    out: Path,
    run: Path,
    weights_folder: Path,
    weights: Mapping[str, Tensor],
    config: Config,
    card: ModelCard,
    *,
    scores: Path | None = None,
    texts: CardTexts,
    reference: ad.AnnData | None = None,
) -> None:
    """Write a folder that serves as a run does, with its card.

    Args:
        out: the folder to make.
        run: folder of the run that the weights are of.
        weights_folder: the committed folder of that run that holds them.
        weights: parameters and buffers by name.
        config: settings of the run.
        card: what the weights expect of a store.
        scores: scores.json of `clue evaluate`, to be shown in the card.
        texts: what a person says of the model.
        reference: what `collect_reference` gives of cells that travel with the model.

    Raises:
        ConfigError: `scores` is no scores.json.
        StoreError: the disk is full, or refuses to be written.
    """
    shared_config = config.model_copy(update={"store": Path(config.store).name, "run": ""})
    readme = "\n".join(
        [
            *_describe_model(out.name, card, shared_config, weights, texts),
            *_describe_reference(reference),
            *_list_scores(run, weights_folder, scores),
            *_explain_use(card, reference is not None),
        ]
    )
    temporary = out.with_name(f"{out.name}{TEMPORARY_ENDING}")
    with translate_output_errors(out), ExitStack() as stack:
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)  # where it is not whole
        best = temporary / "best" / weights_folder.name
        best.mkdir(parents=True)
        with apply_umask(best / WEIGHTS):
            save_file(dict(weights), best / WEIGHTS)
        write_file(best / STATE, (weights_folder / STATE).read_bytes())
        digests = {name: hash_file(best / name).model_dump() for name in (STATE, WEIGHTS)}
        write_file(best / COMMIT, json.dumps(digests, indent=1))
        write_file(temporary / "config.json", shared_config.to_json())
        write_file(temporary / "model.json", card.to_json())
        write_file(temporary / CARD_FILE, readme + "\n")
        if reference is not None:
            reference.write_h5ad(temporary / REFERENCE_FILE)
        temporary.rename(out)


def _describe_model(
    name: str, card: ModelCard, config: Config, weights: Mapping[str, Tensor], texts: CardTexts
) -> Iterable[str]:
    """Say what the model is and what it was trained on, line by line."""
    licence = texts.licence or "not stated: ask whoever shared the model"
    n_cells = f"{card.n_cells:,}" if card.n_cells else "an unknown number of"
    n_parameters = sum(values.numel() for values in weights.values())
    yield from ("---", "library_name: clue_dist", f"license: {json.dumps(licence)}")
    yield from ("tags: [single-cell, multimodal, embedding]", "---", "")
    yield from (f"# {texts.title or name}", "")
    yield "A CLUE model: a cross-linked unified embedding of single cells measured in different,"
    yield "incomplete modalities."
    yield from ("", "## Data", "")
    if texts.data:
        yield from (texts.data, "")
    yield f"Trained on {n_cells} cells, store `{config.store}` with fingerprint"
    yield f"`{card.fingerprint[:16]}`."
    yield from ("", "| modality | kind | features | the first ones |", "|---|---|---|---|")
    for modality, part in card.modalities.items():
        first = list_names(part.features[:3])
        yield f"| {modality} | {part.kind} | {part.n_features:,} | {first} |"
    yield ""
    yield f"Batches ({len(card.batches)}): {list_names(card.batches, 20) or 'none'}."
    if card.batch_covariates:
        yield ""  # without which Markdown sees no list
    for covariate in card.batch_covariates:
        levels = card.batch_vocabulary.list_levels(covariate)
        yield f"- {covariate} ({len(levels)}): {list_names(levels, 20)}"
    if card.labels:  # runs of earlier versions do not name them
        yield from ("", f"Labels ({len(card.labels)}): {list_names(card.labels, 40)}.")
        yield "Training does not see labels."
    yield from ("", "## Model", "")
    yield f"{n_parameters:,} numbers of float32; {config.model.latent} dimensions of z for each"
    yield f"modality, {config.model.n_private} of them private. `config.json` holds every setting."
    yield from ("", "## Licence", "", f"{licence[0].upper()}{licence[1:]}.", "")


def _describe_reference(reference: ad.AnnData | None) -> Iterable[str]:
    """Say which cells travel with the model, and what of them."""
    if reference is not None:
        yield from ("## Reference cells", "")
        cells = format_count(reference.n_obs, "cell")
        yield f"`{REFERENCE_FILE}` holds z of {cells}, from everything observed"
        yield "and from each modality alone, their barcodes, and of their obs"
        yield from (f"{list_names(reference.obs, 40)}. It holds no counts.", "")


def _list_scores(run: Path, folder: Path, scores: Path | None) -> Iterable[str]:
    """List what validation measured at the step of the weights, and scores that were given."""
    yield from ("## Scores", "")
    validation = find_validation(run / "metrics.jsonl", parse_step(folder))
    if validation:
        yield from (f"On cells held out of training, at step {parse_step(folder)}:", "")
        for key, value in validation.items():
            measure, _, pair = key.partition("/")
            if measure in _SCORE_TITLES:
                yield f"- {_SCORE_TITLES[measure].format(pair)}: {value:.4f}"
    else:
        yield "The run holds no validation of these weights."
    if scores is not None:
        result = read_scores(scores)
        yield from ("", "`clue evaluate`:", "", "```", format_scores(result), "```")
        for text in list_warnings(result):
            yield from ("", f"Warning: {text}")


def _explain_use(card: ModelCard, has_reference: bool) -> Iterable[str]:
    """Say how the model is asked."""
    modality = next(iter(card.modalities))
    yield from ("", "## Use", "", "With clue_dist installed:", "")
    yield from ("```python", "import clue_dist as clue", "")
    yield 'run = clue.load("FOLDER")  # this folder'
    yield f"run.embed(cells)  # an AnnData with raw counts of {modality}, say; writes obsm"
    if has_reference:
        yield 'run.transfer(None, cells, "cell_type")  # labels of the reference cells'
    yield from ("```", "", "Files of any size, without the cells that it was trained on:", "")
    yield from (
        "```",
        f"clue prep convert {modality}=new.h5ad --features-from FOLDER --out new.zarr",
    )
    yield from ("clue embed --run FOLDER --store new.zarr --out new.h5mu", "```")

"""What a person should know of a trained run at a glance."""

from __future__ import annotations

from pathlib import Path

from clue_dist.checkpoint.metrics_lines import find_validation
from clue_dist.checkpoint.run_folder import CHECKPOINT_NAME, parse_step
from clue_dist.errors import ClueError, format_count, list_names
from clue_dist.inference.load_model import TrainedModel
from clue_dist.inference.reference_cells import REFERENCE_FILE
from clue_dist.store.location import parse_location
from clue_dist.store.manifest import Manifest

_SHOWN_BATCHES = 5
_FOSCTTM = "foscttm/"  # how names of those validation scores begin that choose the weights


def describe_run(folder: Path, trained_model: TrainedModel) -> str:
    """Say what a run holds: modalities, batches, cells trained on, and how good its weights are."""
    lines = [f"Run {folder} ({trained_model.name})"]
    for name, modality in trained_model.modalities.items():
        kind = "" if name == modality.kind else f" of kind {modality.kind}"
        lines.append(f"  {name}: {format_count(modality.n_features, 'feature')}{kind}")
    vocabulary = trained_model.batch_vocabulary
    batches = vocabulary.names
    named = f" ({list_names(batches, _SHOWN_BATCHES)})" if batches else ""
    lines.append(f"  batches: {len(batches)}{named}")
    for covariate in vocabulary.covariates if vocabulary.has_several else ():
        levels = vocabulary.list_levels(covariate)
        lines.append(f"    {covariate}: {len(levels)} ({list_names(levels, _SHOWN_BATCHES)})")
    cells = _describe_training_cells(trained_model)
    if cells is not None:
        lines.append(f"  trained on: {cells}")
    if (folder / REFERENCE_FILE).is_file():
        lines.append(f"  reference: {REFERENCE_FILE}, to label and to match other cells by")
    scores = _describe_scores(folder, trained_model.name)
    if scores is not None:
        lines.append(f"  validation: {scores}")
    width = trained_model.latent * len(trained_model.modalities)
    space = "a common space" if trained_model.has_common_space else "no common space"
    ending = f", {space} of the modalities" if len(trained_model.modalities) > 1 else ""
    lines.append(f"  z: {width} dimensions{ending}")
    return "\n".join(lines)


def _describe_training_cells(trained_model: TrainedModel) -> str | None:
    """How many cells the run was trained on; None where that is not known."""
    place, n_cells, segments = trained_model.config.store, trained_model.n_cells, ""
    manifest = None if "://" in place else _read_manifest(place)  # which a server may not answer
    if manifest is not None and manifest.fingerprint in trained_model.seen_cells:
        n_cells = manifest.n_cells
        counts = (f"{segment.n_cells:,} {name}" for name, segment in manifest.strata.items())
        segments = f" ({', '.join(counts)})"
    return f"{format_count(n_cells, 'cell')}{segments} of {place}" if n_cells else None


def _read_manifest(place: str) -> Manifest | None:
    """The manifest of a store; None where it cannot be read."""
    try:
        return Manifest.read(parse_location(place))
    except (ClueError, OSError):
        return None


def _describe_scores(folder: Path, checkpoint: str) -> str | None:
    """The scores of the validation of a checkpoint, and their scale; None where there are none."""
    step = parse_step(Path(checkpoint)) if CHECKPOINT_NAME.fullmatch(checkpoint) else None
    validation = find_validation(folder / "metrics.jsonl", step)
    numbers = {name: value for name, value in validation.items() if isinstance(value, float)}
    pairs = [
        f"{name.removeprefix(_FOSCTTM)} {value:.3g}"
        for name, value in numbers.items()
        if name.startswith(_FOSCTTM)
    ]
    if pairs:
        return f"FOSCTTM of held-out pairs, {', '.join(pairs)} (0 is perfect, 0.5 is chance)"
    if "score" in numbers:  # of cells without pairs, minus their ELBOs
        return f"score of held-out cells {numbers['score']:.4g} (lower is better)"
    return None

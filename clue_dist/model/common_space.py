"""One space for all modalities: canonical coordinates of what each of them says of z.

Contrast alone ranks the profiles of one modality for those of another, and leaves the modalities
apart: a modality keeps directions of z that another cannot tell, and a posterior mean shrinks where
little is told. So z is compared in the directions that modalities tell together (canonical
correlation analysis, Hotelling, 1936; of K sets as in Kettenring, 1971, MAXVAR), where every
modality varies alike, and a direction counts as much as the modalities agree on it: between
profiles of different modalities by a power of their agreement, in the joint z by the root of that.

Shapes: B cells, K modalities, a aligned dimensions of each z_k, D = K * a, R directions.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch.nn import functional as F

from clue_dist.model.batch_means import compute_batch_means
from clue_dist.model.posterior import LEAST_NATS

MOST_DIRECTIONS = 128
FEWEST_PAIRED = 20  # cells with which two modalities are compared
FEWEST_CHOOSING = 50  # held-out cells of two modalities, with which something is chosen by them
# Where variance between biological batches counts more than that within, batches mix better. Ten
# times as much would not be safe: batches may hold other cell types.
BATCH_WEIGHT = 3.0
# What is embedded says by which formula its joint z was made: a change that gives the same weights
# another joint z, as `join_experts` and `weigh_joint` may, raises the number.
JOINT_FORMULA = 2
JOINT_POLE = 1.0  # the constant's length in the joint, see `CommonSpace.set_directions`


@dataclass(frozen=True)
class Directions:
    """Directions that the modalities tell together, those on which they agree most first."""

    mean: Tensor  # (K, D), of z scaled to length 1
    rotation: Tensor  # (K, D, R), z less its mean -> coordinates, of unit variance without a ridge
    variance: Tensor  # (R,), of coordinates, the mean over modalities
    agreement: Tensor  # (R,), the mean covariance of two different modalities, at least 0


class CommonSpace(nn.Module):
    """Coordinates of cells in the directions that modalities tell together.

    Its buffers are fitted at every validation, with the weights as they are then.

    Args:
        n_modalities: K.
        n_dimensions: D.
    """

    def __init__(self, n_modalities: int, n_dimensions: int) -> None:
        super().__init__()
        k, r = n_modalities, min(n_dimensions, MOST_DIRECTIONS)
        self.register_buffer("mean", torch.zeros(k, n_dimensions))
        self.register_buffer("rotation", torch.zeros(k, n_dimensions, r))
        # Of directions, between profiles and in the joint; the last is the constant.
        self.register_buffer("weight", torch.zeros(r))
        self.register_buffer("joint_weight", torch.zeros(r))
        self.register_buffer("expert_weight", torch.ones(k))  # of each modality in the joint
        self.mean: Tensor
        self.rotation: Tensor
        self.weight: Tensor
        self.joint_weight: Tensor
        self.expert_weight: Tensor
        self.register_load_state_dict_pre_hook(_convert_former_buffers)

    @property
    def is_fitted(self) -> bool:
        """Whether there are directions.

        There are none before the first validation, without enough pairs, and in runs of earlier
        versions.
        """
        return bool(self.weight.any())

    @torch.no_grad()
    def set_directions(
        self, directions: Directions, exponent: float, pole: float, nats: Tensor
    ) -> None:
        """Take over fitted directions.

        Who looks for the other profile of a cell expects of each coordinate what agrees. The joint
        asks which cells are alike. There a direction counts by the root: where two modalities
        correlate by r, they tell r of each other, but root r of what they share.

        Args:
            directions: as `find_directions` finds them.
            exponent: the power of its agreement that a direction counts by between profiles.
            pole: length of the constant coordinate between profiles, as a multiple of that which a
                cell's other coordinates have on average, see `weigh_profiles`.
            nats: (K,), that each modality tells of its own z_k, the mean over cells. A joint weighs
                modalities by them, as a generalised product of experts (Cao and Fleet, 2014).
        """
        self.mean.copy_(directions.mean)
        self.rotation.copy_(directions.rotation)
        weight = directions.agreement**exponent
        self.weight.copy_(_add_constant(weight, directions.variance, pole))
        self.joint_weight.copy_(_add_constant(weight.sqrt(), directions.variance, JOINT_POLE))
        self.expert_weight.copy_(nats.clamp_min(LEAST_NATS))

    def project_experts(self, mean: Tensor, log_var: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates of what each modality says of a cell, and their variances.

        Args:
            mean: (B, K source, D), posterior means.
            log_var: (B, K source, D), log variances.

        Returns:
            Coordinates and variances, each (B, K source, R).
        """
        length = _measure_length(mean)
        coordinates = torch.einsum("bkd,kdr->bkr", mean / length - self.mean, self.rotation)
        variance = torch.einsum("bkd,kdr->bkr", log_var.exp() / length**2, self.rotation**2)
        return coordinates, variance

    def project_expert(self, mean: Tensor, source: int) -> Tensor:
        """Coordinates of what one modality says of cells: (n, D) -> (n, R)."""
        return (mean / _measure_length(mean) - self.mean[source]) @ self.rotation[source]

    def project_variance(self, mean: Tensor, variance: Tensor, source: int) -> Tensor:
        """Variances of the coordinates that `project_expert` gives: (n, D) each -> (n, R)."""
        return (variance / _measure_length(mean) ** 2) @ self.rotation[source] ** 2

    def join_experts(self, coordinates: Tensor, observed: Tensor) -> Tensor:
        """The mean of what the observed modalities say, weighted by what each tells in all.

        Posterior variances by cell and direction do not enter: with them the joint separated cell
        types less well.

        Args:
            coordinates: (B, K, R), as `project_experts` gives them.
            observed: (B, K) bool.

        Returns:
            (B, R).
        """
        return (self._share_joint(observed) * coordinates).sum(1)

    def estimate_variance(self, coordinates: Tensor, variance: Tensor, observed: Tensor) -> Tensor:
        """The variance of the joint coordinates as they are shown, of length 1.

        Modalities are taken to err together, so that two are no surer than one. The variance is
        carried on to first order through the weights of directions and the scaling to length 1.

        Args:
            coordinates: (B, K, R), as `project_experts` gives them.
            variance: (B, K, R).
            observed: (B, K) bool.

        Returns:
            (B, R); 0 for the constant.
        """
        spread = (self._share_joint(observed) * variance.sqrt()).sum(1) ** 2
        return self.carry_variance(self.join_experts(coordinates, observed), spread)

    def carry_variance(self, coordinates: Tensor, variance: Tensor) -> Tensor:
        """Carry a variance on to first order through `weigh_joint`: (B, R) each."""
        weighted = variance * self.joint_weight**2
        weighted[..., -1] = 0
        constant = self.joint_weight[-1].expand(len(coordinates), 1)
        length = torch.cat([coordinates[..., :-1] * self.joint_weight[:-1], constant], -1).norm(
            dim=-1, keepdim=True
        )
        # The derivative of x / |x| is (1 - u u^T) / |x|, where u is the unit vector.
        square = self.weigh_joint(coordinates) ** 2
        spread = weighted * (1 - 2 * square) + square * (square * weighted).sum(-1, keepdim=True)
        return spread.clamp_min(0) / length.clamp_min(1e-12) ** 2

    def _share_joint(self, observed: Tensor) -> Tensor:
        """What share of the joint each observed modality has, (B, K, 1)."""
        weight = observed * self.expert_weight
        return (weight / weight.sum(1, keepdim=True).clamp_min(1e-12))[:, :, None]

    def weigh_profiles(self, coordinates: Tensor) -> Tensor:
        """Weigh what one modality says by agreement, scaled to length 1: (..., R) -> (..., R).

        The last coordinate becomes a constant. The shorter the others are, the less is told of a
        cell. With the constant such cells lie together at a pole of the sphere, and length counts;
        without, they lie anywhere, as the direction of a short vector is chance.
        """
        return _weigh_coordinates(coordinates, self.weight)

    def weigh_joint(self, coordinates: Tensor) -> Tensor:
        """Weigh joint coordinates as `weigh_profiles` does, but by the weights of the joint."""
        return _weigh_coordinates(coordinates, self.joint_weight)

    def reweigh_as_joint(self, profiles: Tensor) -> Tensor:
        """Weigh as a joint what `weigh_profiles` gave: (..., R) -> (..., R).

        The constant, if it is above 0, tells how long coordinates were before they were scaled.
        """
        ratio = self.joint_weight / self.weight.clamp_min(1e-12)
        return F.normalize(profiles * ratio.to(profiles.device), dim=-1)


def _add_constant(weight: Tensor, variance: Tensor, pole: float) -> Tensor:
    """Weights of directions (R,), with the constant, `pole` times as long as a cell is on average.

    The last direction, on which modalities agree least, gives its place to it.
    """
    constant = pole * (variance[:-1] * weight[:-1] ** 2).sum().sqrt()
    return torch.cat([weight[:-1], constant[None]])


def _weigh_coordinates(coordinates: Tensor, weight: Tensor) -> Tensor:
    """Weigh coordinates (..., R), with the constant as the last, and scale them to length 1."""
    weighted = coordinates[..., :-1] * weight[:-1]
    constant = weight[-1].to(weighted.dtype).expand(*weighted.shape[:-1], 1)
    return F.normalize(torch.cat([weighted, constant], -1), dim=-1)


def _measure_length(mean: Tensor) -> Tensor:
    """The length of posterior means (..., D), above 0: (..., 1)."""
    return mean.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def _convert_former_buffers(
    _: nn.Module, state: dict[str, Tensor], prefix: str, *__: object
) -> None:
    """Convert what earlier versions kept.

    One had other weights of experts and no constant coordinate: 0 takes the place of the weight of
    its last direction. Until there were weights of the joint, it had those of profiles.
    """
    if prefix + "root_nats" in state:
        state[prefix + "expert_weight"] = state.pop(prefix + "root_nats")
        weight = state[prefix + "weight"].clone()
        weight[-1] = 0
        state[prefix + "weight"] = weight
    if state.pop(prefix + "covariance", None) is not None:
        state.setdefault(prefix + "joint_weight", state[prefix + "weight"])


def find_directions(
    mean: Tensor, observed: Tensor, ridge: float, batch_code: Tensor | None = None
) -> Directions | None:
    """Find the directions that modalities tell together, from cells that have several.

    What sets biological batches apart is no agreement: modalities are compared between cells of a
    batch. And a direction that sets batches apart is made shorter, as its variance between batches
    counts BATCH_WEIGHT times. All of this is linear in z, so that cells of an unseen batch have
    coordinates, too.

    Args:
        mean: (N, K source, D), posterior means of what each modality says of z.
        observed: (N, K) bool.
        ridge: added to the variance of every dimension, as a multiple of their mean.
        batch_code: (N,), biological batches, -1 where unknown; by default all are of one.

    Returns:
        The directions in float64; None if modalities are not linked, see `group_modalities`.
    """
    if len(group_modalities(observed)) > 1:
        return None
    paired = observed & (observed.sum(1, keepdim=True) > 1)
    z = F.normalize(mean.double(), dim=-1)
    centre = torch.stack([z[paired[:, k], k].mean(0) for k in range(z.shape[1])])
    z = z - centre
    between = _average_batches(z, paired, batch_code)
    within = z - between
    together = count_together(observed)
    n_directions = min(z.shape[2], MOST_DIRECTIONS)
    scattered = within + BATCH_WEIGHT**0.5 * between
    whitening = torch.stack(
        [
            _find_whitening(scattered[paired[:, k], k], ridge, n_directions)
            for k in range(z.shape[1])
        ]
    )
    white = torch.einsum("nkd,kdr->nkr", within, whitening)
    rotation = _rotate_to_agreement(white, observed, together)
    coordinates = torch.einsum("nkr,krs->nks", white, rotation)
    variance, agreement = _compare_coordinates(coordinates, observed, together)
    order = agreement.argsort(descending=True)
    return Directions(
        centre,
        (whitening @ rotation)[..., order],
        variance[order],
        agreement[order].clamp_min(0),
    )


def _average_batches(z: Tensor, paired: Tensor, batch_code: Tensor | None) -> Tensor:
    """The mean of each cell's batch, (N, K, D); 0 of cells of an unknown batch."""
    average = torch.zeros_like(z)
    if batch_code is None:
        return average
    known = batch_code >= 0
    names, code = batch_code[known].unique(return_inverse=True)
    if len(names) > 1:
        average[known] = compute_batch_means(z[known], code, paired[known][:, :, None])[code]
    return average


def _find_whitening(z: Tensor, ridge: float, n_directions: int) -> Tensor:
    """Principal components of z (n, D) scaled to unit variance, but for the ridge, (D, R)."""
    variance, components = torch.linalg.eigh(z.T @ z / len(z))  # in ascending order
    variance = variance.clamp_min(0) + ridge * variance.mean() + 1e-12
    return (components / variance.sqrt())[:, -n_directions:]


def count_together(observed: Tensor) -> Tensor:
    """How many cells have two modalities together, (K, K); 0 where they are too few to be used.

    Few cells agree by chance alone, and would pull the directions of all modalities towards them.
    """
    together = observed.double().T @ observed.double()
    return together.masked_fill(together < FEWEST_PAIRED, 0)


def group_modalities(observed: Tensor) -> list[list[int]]:
    """Group the modalities that cells link, directly or through others; numbers in model order.

    Two modalities are linked by `FEWEST_PAIRED` cells that have both. Groups that nothing links
    cannot be compared: their directions would lie side by side in one space by chance.
    """
    n_groups, group = connected_components(count_together(observed).numpy(), directed=False)
    return [np.flatnonzero(group == number).tolist() for number in range(n_groups)]


def _rotate_to_agreement(white: Tensor, observed: Tensor, together: Tensor) -> Tensor:
    """Directions of each modality's whitened z along which all modalities agree most, (K, R, R).

    They are the eigenvectors of the cross-covariances of all pairs of modalities, weighed by their
    cells. With two modalities that is canonical correlation analysis.
    """
    k, r = white.shape[1:]
    blocks = white.new_zeros(k, r, k, r)
    most = together.masked_fill(torch.eye(k, dtype=torch.bool), 0).max()
    for first, second in combinations(range(k), 2):
        if together[first, second]:
            both = observed[:, first] & observed[:, second]
            product = white[both, first].T @ white[both, second] / most
            blocks[first, :, second], blocks[second, :, first] = product, product.T
    _, vectors = torch.linalg.eigh(blocks.reshape(k * r, k * r))
    vectors = vectors[:, -r:]
    # A direction and its opposite are one: the largest element is made positive.
    largest = vectors.abs().argmax(0)
    vectors = vectors * vectors.gather(0, largest[None]).sign()
    # A modality that hardly takes part in a direction is scaled up, too: where it knows little its
    # cells spread as those of the others do.
    return F.normalize(vectors.reshape(k, r, r), dim=1)


def _compare_coordinates(
    coordinates: Tensor, observed: Tensor, together: Tensor
) -> tuple[Tensor, Tensor]:
    """By direction: the mean variance of modalities, and the mean covariance of two, (R,) each.

    In the mean covariance a pair of modalities counts by its cells.
    """
    k, r = coordinates.shape[1:]
    variance = torch.stack(
        [(coordinates[observed[:, modality], modality] ** 2).mean(0) for modality in range(k)]
    )
    agreement, n_cells = coordinates.new_zeros(r), together.new_zeros(())
    for first, second in combinations(range(k), 2):
        if together[first, second]:
            both = observed[:, first] & observed[:, second]
            covariance = (coordinates[both, first] * coordinates[both, second]).mean(0)
            agreement = agreement + together[first, second] * covariance
            n_cells = n_cells + together[first, second]
    return variance.mean(0), agreement / n_cells

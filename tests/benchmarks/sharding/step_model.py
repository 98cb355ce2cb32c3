"""A model of the time of a step on many ranks: arithmetic, the optimizer, exchange, launches.

Formulas alone: what a machine reaches is put in. On CPUs the model stands beside measured steps; of
GPUs nothing was measured.
"""

from dataclasses import dataclass, replace

BYTES = 4  # of a weight and of a gradient in float32
# Weight, gradient and two moments are read, all but the gradient are written.
UPDATE_BYTES = 7 * BYTES
# How often the bytes of all weights go round the ring in a step, by stage, beside the gradients
# that ranks exchange by themselves under ZeRO-0 and 1. ZeRO-1 and 2 gather the updated weights. A
# sum over ranks goes round twice: DeepSpeed sums all gradients under ZeRO-2. Under ZeRO-3 it
# gathers the weights once and scatters the sums, as long as a model is small enough (see
# LIVE_WEIGHTS) to keep them from the forward to the backward pass.
PASSES = {0: 0, 1: 1, 2: 3, 3: 2}
GRADIENT_PASSES = {0: 2, 1: 2, 2: 0, 3: 0}
# Weights that DeepSpeed keeps gathered under ZeRO-3: `stage3_max_live_parameters`.
LIVE_WEIGHTS = 1e9


@dataclass(frozen=True)
class Machine:
    """What one rank reaches."""

    name: str
    flops_per_s: float
    copied_per_s: float  # bytes that memory reads and writes
    exchanged_per_s: float  # bytes that go out to other ranks
    latency_s: float = 0.0  # of one collective
    launches_s: float = 0.0  # that the host takes to ask for the work of a step
    cores: int | None = None  # where ranks share them


@dataclass(frozen=True)
class StepWork:
    """What one rank has to do in a step, as counted."""

    cells: int  # of each rank
    flops: float  # whatever the number of ranks
    contrast_flops: float  # of InfoNCE, for the cells of each rank
    weights: float  # parameters of the model
    latents: float  # bytes that each rank adds to what is gathered for InfoNCE
    # Of gradients, bytes that ranks exchange under ZeRO-0 and 1: of decoders the scored rows alone.
    gradients: float
    collectives: dict[int, float]  # by stage
    bytes_touched: float = 0.0  # of memory, the update aside, where nothing is fused


def resize_work(work: StepWork, cells: int) -> StepWork:
    """The work of a step with other cells; InfoNCE compares each of a rank with all of all."""
    more = cells / work.cells
    return replace(
        work,
        cells=cells,
        flops=more * work.flops,
        contrast_flops=more**2 * work.contrast_flops,
        latents=more * work.latents,
        bytes_touched=more * work.bytes_touched,
    )


def count_wire_bytes(stage: int, work: StepWork, ranks: int) -> float:
    """Bytes that a rank sends in a step where ranks form a ring (ZeRO's paper, section 7)."""
    whole = PASSES[stage] * BYTES * work.weights + GRADIENT_PASSES[stage] * work.gradients
    # Latents are gathered, and their gradients summed, which goes round the ring twice.
    return whole * (ranks - 1) / ranks + 3 * work.latents * (ranks - 1)


def predict_step(work: StepWork, machine: Machine, ranks: int, stage: int) -> float:
    """Predict the seconds of a step, each rank with as many cells as one rank has."""
    flops = work.flops + work.contrast_flops * ranks
    compute_s = max(flops / machine.flops_per_s, work.bytes_touched / machine.copied_per_s)
    shards = ranks if stage else 1
    update_s = UPDATE_BYTES * work.weights / shards / machine.copied_per_s
    busy_s = max(compute_s + update_s, machine.launches_s)
    if machine.cores is not None:
        busy_s *= max(1.0, ranks / machine.cores)
    if ranks == 1:
        return busy_s
    sent = count_wire_bytes(stage, work, ranks)
    return busy_s + sent / machine.exchanged_per_s + machine.latency_s * work.collectives[stage]


def calibrate_machine(machine: Machine, work: StepWork, step_s: float) -> Machine:
    """Set a machine's rate of arithmetic so that a step of one rank takes what was measured."""
    update_s = UPDATE_BYTES * work.weights / machine.copied_per_s
    flops = work.flops + work.contrast_flops
    return replace(machine, flops_per_s=flops / (step_s - update_s))


def fit_features(memory: float, fixed: float, feature_bytes: float) -> float:
    """How many features fit into the memory of one rank, beside a fixed number of bytes."""
    return (memory - fixed) / feature_bytes

"""What one rank holds and exchanges, counted from the live objects of DeepSpeed's engine."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from clue_dist.deepspeed_internals import list_updated_shards

PARTS = {"model.trunks.": "trunks", "model.heads.": "heads", "model.decoders.": "decoders"}
COLLECTIVES = "reduce_scatter", "allreduce", "allgather", "broadcast"
Bytes = dict[str, int]  # by part of the model


def find_part(name: str) -> str:
    """The part of the model that a parameter belongs to."""
    return next((part for prefix, part in PARTS.items() if name.startswith(prefix)), "rest")


def sum_parts(sizes: Iterable[tuple[str, int]]) -> Bytes:
    """Sum bytes of named parameters by part."""
    total = Counter(dict.fromkeys([*PARTS.values(), "rest"], 0))
    for name, size in sizes:
        total[find_part(name)] += size
    return dict(total)


def measure_size(tensor: Tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def count_parameters(module: nn.Module) -> Bytes:
    """Bytes of the weights that this rank keeps between steps."""
    # ZeRO-3 leaves a rank its shard alone.
    return sum_parts(
        (name, measure_size(getattr(weight, "ds_tensor", weight)))
        for name, weight in module.named_parameters()
    )


def count_buffers(module: nn.Module) -> int:
    """Bytes of what no optimizer updates, as projections: every rank has all of it."""
    return sum(map(measure_size, module.buffers()))


def count_optimizer(engine: Any) -> Bytes:
    """Bytes that the optimizer adds: moments, and weights in float32 where it keeps its own."""
    memory = {weight.data_ptr() for weight in engine.module.parameters()}
    sizes = []
    for shard in list_updated_shards(engine):
        state = engine.basic_optimizer.state[shard.master].values()
        tensors = [value for value in state if isinstance(value, Tensor)]
        if shard.master.data_ptr() not in memory:
            tensors.append(shard.master)
        # What belongs to a whole tensor, as a count of steps or padding, is left out.
        whole = [tensor for tensor in tensors if tensor.numel() == shard.master.numel() > 1]
        sizes += [(shard.name, shard.numel * tensor.element_size()) for tensor in whole]
    return sum_parts(sizes)


class GradientWatch:
    """The most bytes that a backward pass holds of gradients, and of DeepSpeed's buckets."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.most = self.bucket = 0
        self._hooks = [
            weight.register_post_accumulate_grad_hook(lambda _: self._look())
            for weight in engine.module.parameters()
            if weight.requires_grad
        ]

    def _look(self) -> None:
        whole = (weight.grad for weight in self._engine.module.parameters())
        self.most = max(self.most, sum(measure_size(g) for g in whole if g is not None))
        self.bucket = max(self.bucket, count_bucket(self._engine.optimizer))

    def close(self) -> None:
        """Look no longer."""
        for hook in self._hooks:
            hook.remove()


def count_gradients(engine: Any) -> int:
    """Bytes of gradients that this rank keeps for the update."""
    whole = [w.grad for w in engine.module.parameters() if w.grad is not None]
    memory = {gradient.untyped_storage().data_ptr() for gradient in whole}
    kept = list_kept_gradients(engine.optimizer)  # under ZeRO-1 in fp32 in that same memory
    others = [gradient for gradient in kept if gradient.untyped_storage().data_ptr() not in memory]
    return sum(map(measure_size, [*whole, *others]))


def list_kept_gradients(optimizer: Any) -> list[Tensor]:
    """Gradients that an optimizer of DeepSpeed keeps by itself, under the names of its stages."""
    flat = getattr(optimizer, "fp32_groups_gradients_flat", None)  # bf16 under ZeRO-1
    if flat is not None:
        return list(flat)
    averaged = getattr(optimizer, "averaged_gradients", {})
    return [gradient for group in averaged.values() if group for gradient in group]


def count_bucket(optimizer: Any) -> int:
    """Bytes of the memory in which DeepSpeed lines gradients up before it exchanges them."""
    buckets = getattr(optimizer, "ipg_buckets", {}).values()
    kept = [bucket.buffer for bucket in buckets if bucket.buffer is not None]
    tensors = [b for buffer in kept for b in (buffer if isinstance(buffer, list) else [buffer])]
    return sum(map(measure_size, tensors))


class SavedTensors(saved_tensors_hooks):
    """Counts the bytes that a forward pass keeps for the backward pass, the weights left out."""

    def __init__(self, module: nn.Module) -> None:
        self._seen = {weight.untyped_storage().data_ptr() for weight in module.parameters()}
        self.size = 0
        super().__init__(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in self._seen:
            self._seen.add(memory.data_ptr())
            self.size += memory.nbytes()
        return tensor


class CollectiveCounter(TorchDispatchMode):
    """Counts calls of torch.distributed and the bytes that each rank hands over, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.sizes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        space, _, name = func._schema.name.partition("::")
        if space == "c10d" and "barrier" not in name:
            kind = next((kind for kind in COLLECTIVES if kind in name), name)
            self.calls[kind] += 1
            # Of what goes in and what comes out: the one that belongs to all ranks.
            self.sizes[kind] += max(map(_sum_sizes, args), default=0)
        return result


def _sum_sizes(value: Any) -> int:
    if isinstance(value, Tensor):
        return measure_size(value)
    return sum(map(_sum_sizes, value)) if isinstance(value, list | tuple) else 0

"""What callers call the arguments that say how cells are read: messages about cells name them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ArgumentNames:
    """What one caller calls each argument; "" is one that the caller does not have."""

    modality: str = "modality="
    layer: str = "layer="
    feature_ids: str = "feature_ids="
    min_known: str = "min_known="
    instead: str = ""  # what a person can do without an argument

    def join_advice(self, **advice: str) -> str:
        """Join advice that names arguments.

        Args:
            advice: by argument a text in which {} stands for what the caller calls it. `instead`
                takes the place of those that the caller does not have.
        """
        names = {argument: getattr(self, argument) for argument in advice}
        texts = [
            advice[argument].replace("{}", name) if name else self.instead
            for argument, name in names.items()
        ]
        return "; ".join(filter(None, dict.fromkeys(texts)))


OPEN_CELLS = ArgumentNames()  # as `cells.open_cells` and `Run.embed` call them

"""The pins of constraints.txt and constraints-cuda.txt."""

from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
CONSTRAINTS = (ROOT / "constraints.txt", ROOT / "constraints-cuda.txt")


def read_pins() -> dict[str, Requirement]:
    """Each package that is pinned, by canonical name, whatever Python its pin is for."""
    lines = [line for file in CONSTRAINTS for line in file.read_text().splitlines()]
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in pins}

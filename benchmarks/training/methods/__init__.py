"""The methods by name, in the order of the report."""

from typing import Final

from ._training import Method, Training
from .floor import Floor
from .galore import GaLore
from .gems import Gems
from .jacobian_descent import TorchJD
from .plain import AdamWMethod, LoraMethod
from .projecting_conflicts import PytorchOptimizerPCGrad
from .three_pass import ThreePass

__all__ = ["METHODS", "PROTECTED", "Method", "Training"]

METHODS: Final[dict[str, Method]] = {
    "floor": Floor(),
    "floor-one-batch": Floor(one_batch=True),
    "adamw": AdamWMethod(),
    "adamw-one-batch": AdamWMethod(one_batch=True),
    "lora": LoraMethod(),
    "lora-one-batch": LoraMethod(one_batch=True),
    "galore": GaLore(),
    "torchjd-pcgrad": TorchJD("PCGrad"),
    "torchjd-pcgrad-tuned": TorchJD("PCGrad", tuned=True),
    "torchjd-upgrad": TorchJD("UPGrad"),
    "pytorch-optimizer-pcgrad": PytorchOptimizerPCGrad(),
    "three-pass": ThreePass(),
    "gems-generic": Gems("generic"),
    "gems-generic-null": Gems("generic", protected=True),
    "gems-fused": Gems("fused"),
    "gems-fused-null": Gems("fused", protected=True),
    "gems-fused-output": Gems("fused", side="output"),
    "gems-fused-output-null": Gems("fused", side="output", protected=True),
    "gems-mixed": Gems("fused", mixed=True),
    "gems-mixed-null": Gems("fused", mixed=True, protected=True),
}

PROTECTED: Final = {name: name.removesuffix("-null") for name in METHODS if name.endswith("-null")}
"""Methods with a null space, and the same one without."""

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

__all__ = ["METHODS", "Method", "Training"]

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
    "gems-fused": Gems("fused"),
    "gems-fused-output": Gems("fused", side="output"),
    "gems-mixed": Gems("fused", mixed=True),
}

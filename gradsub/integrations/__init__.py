"""gradsub in other libraries' trainers.

`GemsTrainerMixin` and `GemsFactory` for Hugging Face's ``Trainer`` and its subclasses (TRL's ``SFTTrainer``),
`GemsReportCallback` for their loggers. Plug-ins for axolotl and LLaMA-Factory are in `gradsub.integrations.axolotl` and
`gradsub.integrations.llamafactory`. A library is imported when something of its module is asked for.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING
from typing import Any as _Any

if TYPE_CHECKING:
    from gradsub.integrations.transformers import GemsFactory, GemsReportCallback, GemsTrainerMixin

__all__ = ["GemsFactory", "GemsReportCallback", "GemsTrainerMixin"]


def __getattr__(name: str) -> _Any:
    if name in __all__:
        return getattr(_import_module("gradsub.integrations.transformers"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

from __future__ import annotations

from typing import Any

from gradsub.optimizer import GemsOptimizer

try:
    from transformers import Trainer, TrainerCallback
except ImportError as missing:
    raise ImportError(
        "gradsub's mixin, factory and callback for the Trainer need transformers: pip install 'gradsub[transformers]'"
    ) from missing


def find_gems(optimizer: Any) -> GemsOptimizer | None:
    """The `GemsOptimizer` inside of what a library has wrapped around it; None if there is none.

    Args:
        optimizer: an optimizer, or a wrapper with an attribute ``optimizer``, as accelerate's.
    """
    while optimizer is not None and not isinstance(optimizer, GemsOptimizer):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


class GemsReportCallback(TrainerCallback):
    """Logs the last step's report whenever the Trainer logs its loss: flat numbers, to wherever the Trainer logs to.

    The names are those of `Report.scalars`, after a prefix. A report waits for the device.

    Args:
        trainer: the Trainer, for ``trainer.add_callback(GemsReportCallback(trainer))``; None: a Trainer with
            `GemsTrainerMixin` that gets it in ``callbacks=[GemsReportCallback()]`` enters itself.
        prefix: of all names.
        leak: whether it is measured how much of the bases lies in what the null space protects; the protected
            directions come to the device for it. Spare it where these are large and logging is frequent.
    """

    def __init__(self, trainer: Any = None, prefix: str = "gems/", leak: bool = True) -> None:
        self.trainer = trainer
        self.prefix = prefix
        self.leak = leak
        self._given = trainer is not None

    def begin(self, trainer: Any) -> None:
        """Log to this Trainer, which begins to train, unless another one was given."""
        if not self._given:
            self.trainer = trainer

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
        """Log the report beside the Trainer's loss.

        Raises:
            ValueError: no Trainer was given, or its optimizer is another one.
        """
        if not logs or "loss" not in logs:
            return
        if self.trainer is None:
            raise ValueError("GemsReportCallback has no Trainer: use trainer.add_callback(GemsReportCallback(trainer))")
        gems = find_gems(rest.get("optimizer"))
        if gems is None:
            raise ValueError("GemsReportCallback wants a GemsOptimizer in the Trainer; see GemsFactory")
        found = gems.report(angles=False, leak=self.leak).scalars()
        if not found:
            return
        # A subclass's log() adds what it has measured, which it does to the entry of the loss.
        Trainer.log(self.trainer, {f"{self.prefix}{name}": value for name, value in found.items()})


class AtTheStart(TrainerCallback):
    """Each training, and each attempt of ``auto_find_batch_size``, begins with nothing captured and its own callbacks.

    What an attempt left that was interrupted between backward and step is of no step of the next one.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self._trainer.gems.zero_grad()
        for callback in self._trainer.callback_handler.callbacks:
            if isinstance(callback, GemsReportCallback):
                callback.begin(self._trainer)

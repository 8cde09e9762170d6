"""Hugging Face's ``Trainer``, and what is built on it: a mixin, a factory of optimizers, a callback for loggers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import IterableDataset

from gradsub.capture import MixedRows
from gradsub.distributed import data_parallel
from gradsub.integrations._accumulation import Batch, account
from gradsub.integrations._arguments import telling_rows_apart
from gradsub.integrations._callbacks import AtTheStart, GemsReportCallback, find_gems
from gradsub.integrations._collator import TaskCollator, count_labels
from gradsub.integrations._factory import GemsFactory, as_it_will_run
from gradsub.integrations._hearing import Ear, Pairing, row_losses
from gradsub.optimizer import GemsOptimizer

__all__ = ["GemsFactory", "GemsReportCallback", "GemsTrainerMixin", "find_gems"]


class GemsTrainerMixin:
    r"""A ``Trainer`` whose batches hold rows of several tasks: ``class MyTrainer(GemsTrainerMixin, Trainer)``.

    Each row names its task in a column, which the model never sees. A batch stays one forward and one backward pass
    (`GemsOptimizer.mixed`). What the Trainer does to losses and gradients reaches what is captured:

    * **accumulation**: the step is that of one large batch. With u_b = what row b counts in the step's loss
      L = sum_b u_b l_b / sum_b u_b, a task's gradient is that of L_k = sum_b u_b l_b / U_k over its rows in all batches
      of the step, and its share of the samples is U_k / sum_j U_j, with U_k = sum_b u_b. A model that is told the
      number of items in the step counts tokens (u_b = its labels); otherwise the Trainer divides each batch's mean
      loss by the number of batches, and u_b is divided by what its batch counts.
    * **clipping**: ``max_grad_norm`` bounds the norm of each task's gradient (`GemsOptimizer.clip_grad_norm_`), and
      that of gradients of no task. The ``grad_norm`` in the logs is the largest of them, before.
    * **processes**: the optimizer sums over them, by each one's samples; DistributedDataParallel is silent. With
      ``average_tokens_across_devices`` (the default) every token counts the same, otherwise every process.
    * **the gate** learns each task's loss from the logits that the model returns, in one more pass over them without
      gradients; from the log-probabilities where it returns those (TRL).

    With one task no column is needed, and sequences may be packed. With several, batches without padding are refused,
    as nothing tells their rows apart.

    Args:
        gems: arguments of `GemsOptimizer`. Its ``base`` is the optimizer that the Trainer makes from its arguments
            (``optim``, ``learning_rate``, ``weight_decay``), or is given in ``optimizers=``; ``model`` is its model.
            With several tasks ``capture`` is ``"fused"`` unless it is given, since layers of any size have to tell the
            rows of a batch apart.
            None: there is a `GemsOptimizer` in ``optimizers=``, or a `GemsFactory` in ``optimizer_cls_and_kwargs=``.
        task_column: the column with each row's task: a name, or an index.
        count_samples: batch -> what each row counts in the loss; None: its labels that are not ignored.
        task_losses: False: spare the pass over the logits; the gate then takes the tasks' losses for equal.

    All other arguments are the Trainer's.

    Raises:
        ValueError: several GPUs in one process, DeepSpeed or FSDP, which replace what the optimizer holds; in training,
            rows without a task, or joined to sequences, where there are several tasks.

    Example:
        >>> from transformers import Trainer
        >>> from gradsub.integrations import GemsTrainerMixin
        >>> class MyTrainer(GemsTrainerMixin, Trainer):
        ...     pass
        >>> gems = {"tasks": ("search", "rec"), "rank": 8}  # MyTrainer(model, args, train_dataset=..., gems=gems)

    Source: ``transformers.Trainer``, of which it overrides public methods, and the one that saves the optimizer.
    """

    def __init__(
        self,
        *arguments: Any,
        gems: Mapping[str, Any] | None = None,
        task_column: str = "task",
        count_samples: Callable[[Mapping[str, Any]], Sequence[float]] | None = None,
        task_losses: bool = True,
        **options: Any,
    ) -> None:
        self._gems_options = None if gems is None else telling_rows_apart(gems)
        self._task_column = task_column
        self._count_samples = count_samples
        self._task_losses = task_losses
        self._ear = Ear()
        self._pairing = Pairing()
        super().__init__(*arguments, **options)
        me: Any = self
        if gems is not None and find_gems(me.optimizer) is not None:
            raise ValueError("gems= and a GemsOptimizer in optimizers=: pass one of the two")
        if me.args.n_gpu > 1:
            raise ValueError(
                f"{me.args.n_gpu} GPUs in one process, among which the Trainer would copy the model (DataParallel): "
                "launch one process a GPU with torchrun or accelerate launch, or show one with CUDA_VISIBLE_DEVICES"
            )
        for name in ("deepspeed", "fsdp"):
            if getattr(me, f"is_{name}_enabled", False):
                raise ValueError(
                    f"{name} replaces the parameters that the optimizer holds: train with DistributedDataParallel, or "
                    "write the loop yourself around fully_shard, as the page on several processes shows"
                )
        # The optimizer weighs the processes by their samples: each one's loss is a mean over its own.
        self._equal_ranks = not getattr(me.args, "average_tokens_across_devices", True)
        me.add_callback(AtTheStart(me))

    @contextmanager
    def _own_mean(self) -> Iterator[None]:
        """In here the Trainer weighs no process by its tokens. The arguments are the user's, for other Trainers too."""
        arguments = cast(Any, self).args
        before = getattr(arguments, "average_tokens_across_devices", None)
        if before is None:
            yield
            return
        arguments.average_tokens_across_devices = False
        try:
            yield
        finally:
            arguments.average_tokens_across_devices = before

    # --- the optimizer -----------------------------------------------------------------------------------------------

    @property
    def gems(self) -> GemsOptimizer:
        """The optimizer, out of whatever it is wrapped in.

        Raises:
            ValueError: the Trainer has another optimizer.
        """
        optimizer = getattr(self, "optimizer", None)
        found = find_gems(optimizer)
        if found is None:
            raise ValueError(
                f"the Trainer's optimizer is {type(optimizer).__name__}: pass gems=dict(tasks=..., rank=...), a "
                "GemsOptimizer in optimizers=, or GemsFactory in optimizer_cls_and_kwargs="
            )
        return found

    def create_optimizer(self, *arguments: Any, **options: Any) -> Optimizer:
        """The Trainer's optimizer, wrapped if there are ``gems`` arguments.

        Raises:
            ValueError: the Trainer has another optimizer.
        """
        me: Any = self
        optimizer: Optimizer = super().create_optimizer(*arguments, **options)  # type: ignore[misc]
        if self._gems_options is not None and find_gems(optimizer) is None:
            model = as_it_will_run(me.model, me.args)
            optimizer = me.optimizer = GemsOptimizer(optimizer, **{"model": model, **self._gems_options})
        _ = self.gems
        return optimizer

    def create_accelerator_and_postprocess(self) -> None:
        """Have the accelerator clip what was captured, which is in no ``p.grad``."""
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        me: Any = self
        me.accelerator.clip_grad_norm_ = self._clip

    def _clip(self, parameters: Any, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """As ``Accelerator.clip_grad_norm_``; the largest of the norms before."""
        me: Any = self
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        me.accelerator.unscale_gradients()
        norms = list(self.gems.clip_grad_norm_(max_norm).values())
        outside = [parameter for parameter in parameters if parameter.grad is not None]
        if outside:
            norms.append(nn.utils.clip_grad_norm_(outside, max_norm))
        if not norms:
            return torch.zeros((), dtype=torch.float32, device=me.args.device)
        return torch.stack([norm.to(norms[0]) for norm in norms]).amax()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Also between backward and step, as when a job is to end: what was captured is of a step to come."""
        with self.gems._intake.put_aside():
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]

    # --- batches -----------------------------------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        # The Trainer drops columns that the model's forward pass does not take.
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        me: Any = self
        if self._task_column not in me._signature_columns:
            me._signature_columns.append(self._task_column)

    @property
    def _said_shifted(self) -> bool:
        """Whether the Trainer takes the loss for one that pairs a logit with the next label."""
        me: Any = self
        if getattr(me, "label_smoother", None) is not None:
            return _smoothed_with_shift(me.accelerator.unwrap_model(me.model))
        return bool(getattr(me, "_loss_shifts_labels", False))

    @property
    def _shifted(self) -> bool:
        """Whether it does: the Trainer goes by the model's class, and is wrong for some, as for GPT-2."""
        return self._said_shifted if self._pairing.shifted is None else self._pairing.shifted

    def _as_paired(self, batch: Batch) -> Batch:
        """The batch by the counts of the pairing that the loss has."""
        return batch if batch.otherwise is None or self._shifted == self._said_shifted else batch.otherwise

    @contextmanager
    def _collating(self, train: bool) -> Iterator[None]:
        """A data loader that is made in here keeps the tasks, or leaves them out."""
        me: Any = self
        # Some Trainers, such as axolotl's, have another one for evaluation.
        names = [name for name in ("data_collator", "eval_data_collator") if getattr(me, name, None) is not None]
        own = {name: getattr(me, name) for name in names}
        count = otherwise = None
        if train:
            said = self._said_shifted
            count = self._count_samples or partial(count_labels, shifted=said)
            otherwise = None if self._count_samples else partial(count_labels, shifted=not said)
        travelling = self._travelling() if train else None
        for name in names:
            setattr(me, name, TaskCollator(own[name], self._task_column, count, travelling, otherwise))
        try:
            yield
        finally:
            for name in names:
                setattr(me, name, own[name])

    def _travelling(self) -> Sequence[str] | None:
        """The tasks' names if batches are read by one process for all, which sends tensors alone; else None."""
        me: Any = self
        dispatched = getattr(me.args.accelerator_config, "dispatch_batches", None)
        if dispatched is None:
            # As accelerate decides it. Torch's streams inherit a __getitem__, so that asking for one tells nothing.
            dispatched = isinstance(me.train_dataset, IterableDataset)
        if not dispatched:
            return None
        options = [self._gems_options or {}, *(getattr(me, "optimizer_cls_and_kwargs", None) or ())[1:]]
        optimizer = find_gems(me.optimizer)
        declared = [tuple(option["tasks"]) for option in options if "tasks" in option]
        return optimizer.tasks if optimizer is not None else (declared or [()])[0]

    def get_train_dataloader(self) -> Any:
        """The Trainer's, whose batches keep the rows' tasks."""
        with self._collating(train=True):
            return super().get_train_dataloader()  # type: ignore[misc]

    def get_eval_dataloader(self, *arguments: Any, **options: Any) -> Any:
        """The Trainer's, without the rows' tasks."""
        with self._collating(train=False):
            return super().get_eval_dataloader(*arguments, **options)  # type: ignore[misc]

    def get_test_dataloader(self, *arguments: Any, **options: Any) -> Any:
        """The Trainer's, without the rows' tasks."""
        with self._collating(train=False):
            return super().get_test_dataloader(*arguments, **options)  # type: ignore[misc]

    def get_batch_samples(self, *arguments: Any, **options: Any) -> tuple[list[Any], Any]:
        """The batches of a step, each with its part in it in the place of the rows' tasks."""
        with self._own_mean():
            batches, items = super().get_batch_samples(*arguments, **options)  # type: ignore[misc]
        self._account(batches, items)
        return batches, items

    def _account(self, batches: list[Any], items: Any) -> None:
        entries = [batch.get(self._task_column) if isinstance(batch, Mapping) else None for batch in batches]
        parts = account(entries, self.gems.tasks, self._task_column, self._divides_by(items), self._equal_ranks)
        for batch, part in zip(batches, parts, strict=True):
            if part is not None:
                batch[self._task_column] = part

    def _divides_by(self, items: Any) -> bool:
        """Whether the loss of a batch is divided by what the whole step counts; as the Trainer decides it."""
        me: Any = self
        stated = getattr(me, "loss_is_scaled_for_ga", None)
        if stated is not None:
            return bool(stated)
        return (me.model_accepts_loss_kwargs and items is not None) or me.compute_loss_func is not None

    # --- a forward and a backward pass -------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: Any, *arguments: Any, **options: Any) -> Tensor:
        """The Trainer's, inside of the block of the rows' tasks.

        Raises:
            ValueError: rows without a task, or joined to sequences, where there are several tasks.
        """
        items = arguments[0] if arguments else options.get("num_items_in_batch")
        if self._task_column in inputs and not isinstance(inputs[self._task_column], Batch):
            self._account([inputs], items)
        batch: Batch | None = inputs.pop(self._task_column, None)
        wrapper = data_parallel(model)
        synchronized = nullcontext() if wrapper is None else wrapper.no_sync()
        with self._own_mean(), synchronized, self._block(model, inputs, batch, items):
            return super().training_step(model, inputs, *arguments, **options)  # type: ignore[misc, no-any-return]

    @contextmanager
    def _block(self, model: nn.Module, inputs: Mapping[str, Any], batch: Batch | None, items: Any) -> Iterator[None]:
        gems = self.gems
        part = None if batch is None else self._as_paired(batch)
        if len(gems.tasks) > 1 and part is None:
            raise ValueError(
                f"a batch without {self._task_column!r} and several tasks={gems.tasks}: the data loader does not come "
                "from get_train_dataloader(), or the batch is no mapping; let it make the batches, or use one task"
            )
        if not gems.tasks:
            yield
        elif len(gems.tasks) == 1:
            with gems.task(gems.tasks[0], 1.0 if part is None else part.samples.get(0, 1.0)):
                yield
        else:
            assert part is not None
            assert batch is not None
            name = gems.tasks.__getitem__
            samples = {name(task): weight for task, weight in part.samples.items()}
            shares = {name(task): share for task, share in part.shares.items()}
            with (
                gems.mixed(part.tasks, samples, self.other_rows(inputs, part.tasks), shares) as rows,
                self._hearing(model, rows, inputs.get("labels"), batch, items),
            ):
                yield

    def other_rows(self, inputs: Mapping[str, Any], tasks: list[int]) -> Sequence[Sequence[int]]:
        """``other_rows`` of `GemsOptimizer.mixed`; none here. Override it for a model that flattens its batches.

        Args:
            inputs: the batch.
            tasks: the index of each row's task.
        """
        return ()

    def _hearing(
        self, model: nn.Module, rows: MixedRows, labels: Any, batch: Batch, items: Any
    ) -> AbstractContextManager[None]:
        """Tell the gate the tasks' losses, from what the first forward pass in here returns."""
        if not self._task_losses:
            return nullcontext()
        return self._ear.listening(model, partial(self._tell, rows, labels, batch, items))

    def _tell(self, rows: MixedRows, labels: Any, batch: Batch, items: Any, outputs: Any) -> None:
        me: Any = self
        self._pairing.look(outputs, labels, items if me.model_accepts_loss_kwargs else None)
        batch = self._as_paired(batch)
        losses = row_losses(outputs, labels if isinstance(labels, Tensor) else None, self._shifted)
        if losses is None or len(losses) != len(batch.tasks):
            self._task_losses = False
            warnings.warn(
                "the rows' losses are not to be found out from what the model returns (no logits beside the labels), "
                "so a gate that reads losses takes those of all tasks for equal: pass task_losses=False if that is "
                "meant, or a gate that reads none, such as gate='uniform'",
                stacklevel=2,
            )
            return
        present = sorted(set(batch.tasks))
        pairs = list(zip(batch.tasks, batch.weights, strict=True))
        weights = [[(whose == task) * weight / batch.totals[task] for whose, weight in pairs] for task in present]
        means = torch.tensor(weights, dtype=losses.dtype, device="cpu").to(losses.device, non_blocking=True) @ losses
        scaler = getattr(me.accelerator, "scaler", None)
        means = means if scaler is None else scaler.scale(means)
        rows.tell({self.gems.tasks[task]: mean for task, mean in zip(present, means.unbind(), strict=True)})


def _smoothed_with_shift(model: nn.Module) -> bool:
    """Whether the Trainer smooths the labels one further on; it goes by the name of the model's class."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    adapted: Any = model
    inner = adapted.get_base_model() if hasattr(adapted, "get_base_model") else model
    return type(inner).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()

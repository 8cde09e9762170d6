"""A language model that answers with catalogue items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Item
from ._batch import Batch
from ._items import ItemEmbedding, title_ids, title_rows
from ._load import LanguageModel


class Ranker(nn.Module):
    """Scores every item of a catalogue as the next token of a prompt, in one forward pass.

    The score of an item is the last hidden state times the item's output row, exactly as a vocabulary head scores a
    word. Generation is constrained to the item tokens, so the cross-entropy runs over the catalogue alone: the head
    of the language model's own vocabulary is neither computed nor touched, and its logits for words stay those of the
    intact model as long as no other weight moves.

    Where the model ties its head to its embeddings, an item's output row is its embedding row; otherwise a second set
    of rows starts from the head's rows of the title's tokens.

    Args:
        language_model: is changed in place: its embedding gets the items' rows, and its own rows and head are frozen.
        items: the catalogue.
    """

    def __init__(self, language_model: LanguageModel, items: Sequence[Item]) -> None:
        super().__init__()
        if not items:
            raise ValueError("items is empty: a catalogue needs at least one item")
        self.lm = language_model.model
        self.encoder_decoder = language_model.encoder_decoder
        base = self.lm.get_input_embeddings()
        head = self.lm.get_output_embeddings()
        self.first_item: int = base.num_embeddings
        titles = title_ids(language_model.tokenizer, items)
        self.embedding = ItemEmbedding(base, title_rows(base.weight, titles))
        self.output_rows: nn.Parameter | None = None
        if head.weight is not base.weight:
            head.weight.requires_grad_(False)
            self.output_rows = nn.Parameter(title_rows(head.weight, titles))
        if getattr(head, "bias", None) is not None:
            head.bias.requires_grad_(False)
        self.lm.set_input_embeddings(self.embedding)
        config = self.lm.config
        t5_tied = config.model_type in ("t5", "mt5", "longt5", "umt5") and config.tie_word_embeddings
        # T5 shrinks the decoder's output before a tied head.
        self._scale = config.d_model**-0.5 if getattr(config, "scale_decoder_outputs", t5_tied) else 1.0
        self._attention: str | None = getattr(self.lm.config, "_attn_implementation", None)

    @property
    def backbone(self) -> Any:
        """The module that holds the layers to train: without the vocabulary head where the model allows it."""
        return self.lm if self.encoder_decoder else self.lm.base_model

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.new_rows.device

    def item_parameters(self) -> list[nn.Parameter]:
        """Return what every method trains: the items' rows."""
        return [self.embedding.new_rows] + ([] if self.output_rows is None else [self.output_rows])

    def recompute_activations(self) -> None:
        """In training, keep only each block's input and compute the rest again in the backward pass.

        Raises:
            ValueError: if the model cannot do that.
        """
        # The second name is that of transformers below 5.
        enable = getattr(self.lm, "activation_checkpointing_enable", None) or self.lm.gradient_checkpointing_enable
        enable({"use_reentrant": False})

    def hidden(self, batch: Batch) -> Tensor:
        """Return (P, d): the hidden states from which the answers are predicted.

        Raises:
            ValueError: if a row is longer than the model has positions.
        """
        self._check_length(batch)
        self._choose_attention()
        batch = batch.to(self.device)
        if not self.encoder_decoder:
            # What follows changes nothing in a causal model, and attention without a mask is the faster one.
            states = self.backbone(input_ids=batch.input_ids)
            found: Tensor = states.last_hidden_state[batch.rows, batch.columns]
            return found
        encoded = self.lm.get_encoder()(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        start = torch.full((len(batch.input_ids), 1), self.lm.config.decoder_start_token_id, device=self.device)
        decoded = self.lm.get_decoder()(
            input_ids=start,
            encoder_hidden_states=encoded.last_hidden_state,
            encoder_attention_mask=batch.attention_mask,
        )
        first: Tensor = decoded.last_hidden_state[batch.rows, 0] * self._scale
        return first

    def _check_length(self, batch: Batch) -> None:
        # Learned positions would fail with an index out of range, rotary ones leave what they were trained on unsaid.
        most, found = getattr(self.lm.config, "max_position_embeddings", None), batch.input_ids.shape[1]
        if not self.encoder_decoder and most is not None and found > most:
            raise ValueError(
                f"a row of {found} tokens is longer than the {most} positions of the model "
                "(max_position_embeddings); lower model.max_history or model.max_query_tokens"
            )

    def _choose_attention(self) -> None:
        """Train with plain products where torch's fused attention is slow: in bfloat16 on a CPU.

        There its backward pass took 67 ms of 32 rows of 50 tokens where plain products take 8; of 16 x 150 tokens 99
        and 23, of 4 x 410 tokens 62 and 42 (9 heads of 64, one core with AMX on a busy machine, torch 2.13). Forward
        passes are faster fused.
        """
        if self._attention is None or self.encoder_decoder:
            return
        slow = self.training and self.device.type == "cpu" and torch.is_autocast_enabled("cpu")
        wanted = "eager" if slow else self._attention
        if self.lm.config._attn_implementation != wanted:
            self.lm.set_attn_implementation(wanted)

    def forward(self, batch: Batch) -> Tensor:
        """Return (P, items): the logit of each item as the answer at each place, in fp32."""
        hidden = self.hidden(batch)
        rows = self.embedding.new_rows if self.output_rows is None else self.output_rows
        # bf16 has 8 bits of precision: many items would tie.
        with torch.autocast(hidden.device.type, enabled=False):
            return hidden.float() @ rows.float().T

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return each task's mean cross-entropy over the catalogue, all from one forward pass.

        Several targets of a place share its weight equally.
        """
        log_probabilities = torch.log_softmax(self(batch), dim=1)
        return {task: self._mean(log_probabilities, batch, task) for task in batch.samples}

    def loss(self, batch: Batch) -> Tensor:
        """Return the mean cross-entropy over all places, whatever their task."""
        return self._mean(torch.log_softmax(self(batch), dim=1), batch, None)

    def _mean(self, log_probabilities: Tensor, batch: Batch, task: str | None) -> Tensor:
        chosen = [
            (place, target)
            for place, (target, own) in enumerate(zip(batch.targets, batch.tasks, strict=True))
            if task in (None, own)
        ]
        rows = torch.tensor([place for place, target in chosen for _ in target], device=self.device)
        columns = torch.tensor([item for _, target in chosen for item in target], device=self.device)
        weights = torch.tensor([1 / len(target) for _, target in chosen for _ in target], device=self.device)
        return -(log_probabilities[rows, columns] * weights).sum() / len(chosen)

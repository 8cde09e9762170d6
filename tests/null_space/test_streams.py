"""Padding is kept out by the mask of the stream that a layer belongs to, and every layer is seen, or named."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradsub import NullSpace

SOURCE = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0]])  # 6 real tokens
TARGET = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1, 0]])  # 14 of as many positions


def tokens_of(null_space: NullSpace) -> dict[str, int]:
    lines = null_space.table().splitlines()[1:-1]
    return {line.split()[0]: int(line.split()[-1]) for line in lines}


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 4, "num_heads": 2, "d_ff": 24, "num_layers": 1, "vocab_size": 60}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0))


def bart() -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 1)
    heads = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    return BartForConditionalGeneration(
        BartConfig(d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=60, pad_token_id=0, **sizes, **heads)
    )


def projected() -> nn.Module:
    """The decoder is wider than the encoder, whose states pass through a layer of the outermost model."""
    from transformers import BertConfig, BertLMHeadModel, BertModel, EncoderDecoderModel

    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 60}
    decoder = BertConfig(hidden_size=24, is_decoder=True, add_cross_attention=True, **sizes)
    model = EncoderDecoderModel(
        encoder=BertModel(BertConfig(hidden_size=16, **sizes), add_pooling_layer=False),
        decoder=BertLMHeadModel(decoder),
    )
    model.config.decoder_start_token_id = model.config.pad_token_id = 0
    return model


class Own(nn.Module):
    """Nobody's conventions but the names of the arguments; one layer runs in both streams."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(60, 16)
        self.reads, self.writes = nn.Linear(16, 16), nn.Linear(16, 16)
        self.key, self.both = nn.Linear(16, 16), nn.Linear(16, 16)
        self.after = nn.Linear(16, 16)

    def forward(
        self, input_ids: Tensor, decoder_input_ids: Tensor, attention_mask: Tensor, decoder_attention_mask: Tensor
    ) -> Tensor:
        states = self.both(self.reads(self.embedding(input_ids)))
        kept = torch.zeros_like(states)
        kept[:] = states.tanh()
        hidden = self.both(self.writes(self.embedding(decoder_input_ids)))
        weights = (hidden @ self.key(kept).mT).softmax(-1)
        return self.after(weights @ kept)


def belongs(name: str) -> int:
    """How many real tokens the layer sees."""
    if name == "both":
        return 6 + 14
    reads_states = any(part in name for part in ("EncDecAttention.", "encoder_attn.", "crossattention.self."))
    reads_states = reads_states and name.split(".")[-1] in ("k", "v", "k_proj", "v_proj", "key", "value")
    encoder = name.startswith(("encoder.", "model.encoder.")) or name in ("enc_to_dec_proj", "reads", "key")
    return 6 if reads_states or encoder else 14


def batch_of(device: torch.device, **more: Any) -> dict[str, Any]:
    batch = {"input_ids": torch.randint(1, 60, (2, 8)), "attention_mask": SOURCE}
    batch |= {"decoder_input_ids": torch.randint(1, 60, (2, 8)), "decoder_attention_mask": TARGET, **more}
    return {key: value.to(device) for key, value in batch.items() if value is not None}


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("make", [t5, bart, projected, Own])
def test_each_layer_has_its_streams_mask(device, make, side):
    model = make().to(device)
    null_space = NullSpace(side=side).collect(model, [batch_of(device), batch_of(device)])
    assert tokens_of(null_space) == {name: 2 * belongs(name) for name in null_space}
    assert len(set(tokens_of(null_space).values())) > 1


def test_what_is_padding_does_not_show_in_the_statistics(device):
    model, batch = t5().to(device).eval(), batch_of(device)
    other = {**batch, "decoder_input_ids": torch.where(TARGET.to(device).bool(), batch["decoder_input_ids"], 7)}
    first, second = (NullSpace(energy=1.0).collect(model, [each]) for each in (batch, other))
    for name in first:
        torch.testing.assert_close(first.eigenvalues(name), second.eigenvalues(name))


@pytest.mark.parametrize("how", ["labels", "one tensor", "inference mode", "autocast", "encoder_outputs"])
def test_whatever_the_decoder_starts_from(device, how):
    model = t5().to(device).eval()
    labels = torch.randint(1, 60, (2, 8), device=device)
    batch = batch_of(device)
    if how == "labels":
        batch = batch_of(device, decoder_input_ids=None, labels=labels)
    elif how == "one tensor":
        batch |= {"input_ids": labels, "decoder_input_ids": labels, "labels": labels}
    elif how == "encoder_outputs":
        with torch.no_grad():
            batch["encoder_outputs"] = model.encoder(batch.pop("input_ids"), batch["attention_mask"])
    targets = "decoder.*" if how == "encoder_outputs" else "(en|de)coder.*"
    with torch.inference_mode(how == "inference mode"), torch.autocast(device.type, enabled=how == "autocast"):
        null_space = NullSpace().collect(model, [batch], target_modules=targets)
    assert tokens_of(null_space) == {name: belongs(name) for name in null_space}


@pytest.mark.parametrize("padding", ["source", "labels", "none"])
def test_a_decoder_without_a_mask_is_said_if_there_is_padding(device, padding):
    labels = torch.randint(1, 60, (2, 8))
    mask = SOURCE if padding == "source" else torch.ones_like(SOURCE)
    if padding == "labels":
        labels[:, 5:] = -100
    batch = {"input_ids": torch.randint(1, 60, (2, 8)), "attention_mask": mask, "labels": labels}
    batch = {key: value.to(device) for key, value in batch.items()}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        null_space = NullSpace().collect(t5().to(device), [batch, batch])
    assert [str(warning.message)[:56] for warning in said] == (
        [] if padding == "none" else ["the batch is padded, but has no decoder_attention_mask: "]
    )
    real = int(mask.sum())
    assert tokens_of(null_space) == {name: 2 * (16 if belongs(name) == 14 else real) for name in null_space}


def test_the_labels_of_a_decoder_alone_belong_to_no_second_stream(device):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=60, **sizes)).to(device)
    ids = torch.randint(1, 60, (2, 8), device=device)
    batch = {"input_ids": ids, "attention_mask": SOURCE.to(device), "labels": ids}
    assert set(tokens_of(NullSpace().collect(model, [batch])).values()) == {6}


def test_a_stream_without_tokens_has_no_padding(device):
    """As many patches as there are tokens: the shapes of their features are alike."""

    class TextAndImage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.text = nn.Embedding(60, 4), nn.Linear(4, 4)
            self.image, self.joint = nn.Linear(5, 4), nn.Linear(4, 4)

        def forward(self, input_ids: Tensor, pixels: Tensor, attention_mask: Tensor) -> Tensor:
            return self.joint(self.text(self.embedding(input_ids)) + self.image(pixels.flatten(1, 2)))

    ids, pixels = torch.randint(1, 60, (2, 8), device=device), torch.randn(2, 4, 2, 5, device=device)
    batch = {"input_ids": ids, "attention_mask": SOURCE.to(device), "pixels": pixels}
    assert tokens_of(NullSpace().collect(TextAndImage().to(device), [batch])) == {"text": 6, "image": 16, "joint": 6}


# --- compiled models and layers that are not seen ---------------------------------------------------------------------


def two_layers(device: torch.device) -> nn.Sequential:
    return nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 6)).to(device)


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("how", ["whole", "in place", "part", "part in place", "both", "whole, collected inside"])
def test_a_compiled_model_is_seen_under_the_names_of_the_plain_one(device, how, ran):
    torch._dynamo.reset()
    plain = two_layers(device)
    model: Any = plain
    x = torch.randn(9, 6, device=device)
    expected = NullSpace(energy=1.0).collect(plain, [x])
    if how in ("part", "both"):
        plain[0] = torch.compile(plain[0], backend="eager")
    if how == "part in place":
        plain[0].compile(backend="eager")
    if how == "in place":
        plain.compile(backend="eager")
    if how.startswith("whole") or how == "both":
        model = torch.compile(plain, backend="eager")
    if ran:
        model.eval()
        with torch.no_grad():
            model(x)
        model.train()
    found = NullSpace(energy=1.0).collect(plain if how.endswith("inside") else model, [x, x])
    assert list(found) == list(expected) == ["0.0", "1"]
    for name in expected:
        torch.testing.assert_close(found.eigenvalues(name), expected.eigenvalues(name))
    assert tokens_of(found) == {"0.0": 18, "1": 18}
    assert all(module.training for module in model.modules())
    gradients = NullSpace().collect_gradients(model, [x], lambda model, x: model(x).square().sum())
    assert list(gradients) == ["0.0.bias", "1.bias"]


class Experts(nn.Module):
    """Sends every token to one expert; the last one's weight is used without the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.chosen = 0

    def forward(self, x: Tensor) -> Tensor:
        sent = [x[: len(x) * (number == self.chosen)] for number in range(2)]
        out = sum(self.experts[number](part).sum() for number, part in enumerate(sent))
        return out + x @ self.experts[2].weight


def test_layers_that_saw_nothing_are_named_once(device):
    model, x = Experts().to(device), torch.randn(5, 4, device=device)
    null_space = NullSpace()
    with pytest.warns(UserWarning, match=r"^experts.1, experts.2 saw no features") as said:
        null_space.collect(model, [x])
    assert len(said) == 1
    assert list(null_space) == ["experts.0"]
    null_space.collect(model, [x])
    model.chosen = 1
    null_space.collect(model, [x])
    assert tokens_of(null_space) == {"experts.0": 10, "experts.1": 5}
    null_space.collect(model, [x], target_modules=["0", "1"])


@pytest.mark.parametrize("why", ["bypassed", "masked"])
def test_if_no_layer_saw_anything_it_is_an_error(device, why):
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return x @ self.layer.weight if why == "bypassed" else self.layer(x)

    batch = {"x": torch.randn(2, 3, 4), "attention_mask": torch.full((2, 3), int(why == "bypassed"))}
    batch = {key: value.to(device) for key, value in batch.items()}
    with pytest.raises(ValueError, match=r"none of the targeted layers \(layer\) saw any features"):
        NullSpace().collect(Around().to(device), [batch])


class Kernel(torch.autograd.Function):
    """Writes into memory made from nothing, where no operation of torch is seen, as a hand-written kernel does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        made = torch.empty(x.shape)
        made.numpy()[:] = x.numpy()
        return made


class OneStack(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(60, 16), nn.Linear(16, 16)
        self.config = config

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        return self.layer(Kernel.apply(self.embedding(input_ids)))


def test_labels_are_no_stream_where_there_is_no_decoder_beside_an_encoder():
    mask = SOURCE.bool()
    ids = torch.randint(1, 60, (2, 8))
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(~mask, -100)}
    told = OneStack(SimpleNamespace(is_encoder_decoder=False))
    assert tokens_of(NullSpace().collect(told, [batch])) == {"layer": int(mask.sum())}
    with pytest.warns(UserWarning, match="of the features of 'layer' and others it cannot be told"):
        NullSpace().collect(OneStack(None), [batch, batch])

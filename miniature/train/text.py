"""The miniature's words: a byte-pair tokenizer in Qwen2's format with the chat template of FLUX.2 Klein, and a causal
language model of the captions with the shape of Qwen3."""

import json
from pathlib import Path

import torch
from diffusers import Flux2KleinPipeline
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer, Qwen3ForCausalLM, Qwen3Model
from transformers import Qwen3Config as Qwen3Arguments

from bonsai_image.loaders.qwen3 import TAPPED_LAYERS, Qwen3Config
from bonsai_image.miniature.train.training import train
from bonsai_image.ops.packed import dequantize, pack_codes, packed_weight, unwrap

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)
#: Tokens of a prompt with its template; the tokenizer states it, and the pipeline pads to it.
LENGTH = 32
VOCABULARY = 448
TEXT = Qwen3Config(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=28, num_attention_heads=1,
                   num_key_value_heads=1, head_dim=64, intermediate_size=128)
_GROUP = 64
_END_TOKENS = 6
_RESIDUAL = 16
_WRITERS = ("embed_tokens", "o_proj", "down_proj")


def build_tokenizer(captions: list[str]) -> Qwen2Tokenizer:
    """A tokenizer whose merges were learned from ``captions``, with all bytes in its alphabet."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.train_from_iterator([*captions, *["user", "assistant"] * 100], trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    learned = json.loads(core.to_str())["model"]
    return Qwen2Tokenizer(vocab=learned["vocab"], merges=[tuple(merge) for merge in learned["merges"]],
                          extra_special_tokens=list(SPECIAL[1:]), pad_token=SPECIAL[0],
                          chat_template=TEMPLATE, model_max_length=LENGTH)


class Reader(torch.nn.Module):
    """The language model with a head for each thing a caption can say."""

    def __init__(self, answers: dict[str, list[str]]):
        super().__init__()
        self.model = Qwen3ForCausalLM(Qwen3Arguments(**TEXT.transformers()))
        self.heads = torch.nn.ModuleDict({name: torch.nn.Linear(len(TAPPED_LAYERS) * TEXT.hidden_size, len(options))
                                          for name, options in answers.items()})

    def loss(self, ids: torch.Tensor, mask: torch.Tensor, answers: dict[str, torch.Tensor]) -> torch.Tensor:
        """Next-token loss plus, from the tapped hidden states of the last tokens, that of every question."""
        out = self.model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100),
                         output_hidden_states=True)
        taps = [torch.nn.functional.layer_norm(out.hidden_states[layer], (TEXT.hidden_size,))
                for layer in TAPPED_LAYERS]
        # The template's end, behind the caption: the first place where a causal model has read all of it.
        index = mask.sum(1)[:, None] - 1 - torch.arange(_END_TOKENS)
        ends = torch.cat(taps, 2)[torch.arange(len(ids))[:, None], index]
        read = [torch.nn.functional.cross_entropy(head(ends).flatten(0, 1),
                                                  answers[name].repeat_interleave(_END_TOKENS))
                for name, head in self.heads.items()]
        return out.loss + torch.stack(read).sum()


def train_text_encoder(folder: Path, tokenizer: Qwen2Tokenizer, captions: dict[str, dict[str, str]],
                       steps: int) -> Qwen3ForCausalLM:
    """A language model of ``captions`` (what each says, by question) that also knows, at a caption's end, what it said:
    a language model alone keeps no trace of a colour once the next word is predicted."""
    torch.manual_seed(0)
    questions = {name: sorted({said.get(name, "") for said in captions.values()})
                 for name in sorted({name for said in captions.values() for name in said})}
    reader = Reader(questions)
    texts = [tokenizer.apply_chat_template([{"role": "user", "content": caption}], tokenize=False,
                                           add_generation_prompt=True) for caption in captions]
    batch = tokenizer(texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    answers = {name: torch.tensor([options.index(said.get(name, "")) for said in captions.values()])
               for name, options in questions.items()}

    def loss(_step: int) -> torch.Tensor:
        index = torch.randint(0, len(texts), (48,))
        return reader.loss(batch["input_ids"][index], batch["attention_mask"][index],
                           {name: answer[index] for name, answer in answers.items()})

    train(folder, "text", reader, loss, steps, (0.01, 2e-3),
          lambda name, _: "embed" not in name and "heads" not in name)
    return reader.model.eval().requires_grad_(False)


def quantized(model: Qwen3ForCausalLM) -> dict[str, torch.Tensor]:
    """Canonical tensors of the 4-bit encoder: MLX's affine form, groups of 64, scales and shifts in BF16.

    All that is written to the residual stream is divided by ``_RESIDUAL``, which every reader's norm undoes: so the
    hidden states that the transformer reads come out near unit size.
    """
    result = {}
    for name, tensor in model.model.state_dict().items():
        if any(part in name for part in _WRITERS):
            tensor = tensor / _RESIDUAL
        if tensor.ndim == 1:
            result[f"model.{name}"] = tensor.bfloat16()
            continue
        grouped = tensor.unflatten(1, (-1, _GROUP))
        low, high = grouped.amin(2), grouped.amax(2)
        scale, shift = ((high - low) / 15).clamp(min=1e-8).bfloat16(), low.bfloat16()
        codes = ((grouped - shift.float()[..., None]) / scale.float()[..., None]).round().clamp(0, 15)
        result[f"model.{name}"] = packed_weight(pack_codes(codes.flatten(1).to(torch.uint8), 4), scale, 4, "affine",
                                                shift)
    return result


def encoder(tensors: dict[str, torch.Tensor]) -> Qwen3Model:
    """The encoder in FP32 on what its packed ``tensors`` decode to."""
    model = Qwen3Model(Qwen3Arguments(**{**TEXT.transformers(), "num_hidden_layers": max(TAPPED_LAYERS) + 1}))
    dense = {}
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            tensor = dequantize(unwrap(tensor), torch.float32)
        dense[name.removeprefix("model.")] = tensor.float()
    model.load_state_dict(dense)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def encode(model: Qwen3Model, tokenizer: Qwen2Tokenizer, captions: list[str]) -> torch.Tensor:
    """What the pipeline makes of ``captions``: (N, LENGTH, 3 * 64)."""
    parts = [Flux2KleinPipeline._get_qwen3_prompt_embeds(model, tokenizer, captions[i:i + 64],
                                                         max_sequence_length=LENGTH)
             for i in range(0, len(captions), 64)]
    return torch.cat(parts)

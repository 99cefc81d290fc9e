"""What Megatron is compared with: transformers on unpacked sequences, and a weight map written by hand."""

from functools import partial

import numpy as np
import torch
import transformers
from megatron_vision import inputs_of

from algorithms.data import MicroBatch, TrainSample, float_row, int_row
from algorithms.roles import Predictions
from algorithms.vision import join_vision

TEMPERATURE = 0.7
LR, WEIGHT_DECAY, BETAS, EPS = 1e-2, 0.1, (0.9, 0.95), 1e-4
SEQUENCE_LENGTHS = (7, 5, 9, 3)

_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def build_reference(family: str) -> transformers.PreTrainedModel:
    """A tiny fp32 model with random norms and biases, the same in every process."""
    torch.manual_seed(3)
    match family:
        case "llama":
            rope = {"rope_type": "default", "rope_theta": 500000.0}
            config = transformers.LlamaConfig(
                **_SHAPE, vocab_size=131, tie_word_embeddings=False, rope_parameters=rope
            )
            model = transformers.LlamaForCausalLM(config)
        case "llama3":
            rope = {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
            config = transformers.LlamaConfig(
                **_SHAPE, vocab_size=128, tie_word_embeddings=False, rope_parameters=rope
            )
            model = transformers.LlamaForCausalLM(config)
        case "qwen2":
            config = transformers.Qwen2Config(**_SHAPE, vocab_size=128, tie_word_embeddings=True)
            model = transformers.Qwen2ForCausalLM(config)
        case _:
            config = transformers.Qwen3Config(**_SHAPE, vocab_size=131, head_dim=16, tie_word_embeddings=True)
            model = transformers.Qwen3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def make_sequences(vocab_size: int) -> list[MicroBatch]:
    """Sequences, each as a row of its own, with a random loss mask and random advantages."""
    rng = np.random.default_rng(5)
    rows = []
    for length in SEQUENCE_LENGTHS:
        tokens = rng.integers(0, vocab_size, length)
        mask = rng.integers(0, 2, length)
        mask[-1] = 0
        mask[0] = 1
        rows.append(
            MicroBatch(
                tokens_T=int_row(tokens),
                labels_T=int_row([*tokens[1:], vocab_size - 1]),
                positions_T=int_row(range(length)),
                starts_S=int_row([0, length]),
                loss_mask_T=int_row(mask),
                advantages_T=float_row(rng.normal(size=length)),
                logprobs_T=float_row(np.zeros(length)),
            )
        )
    return rows


def make_conversations(vocab_size: int) -> list[TrainSample]:
    """Random tokens, of which several turns are trained on."""
    rng = np.random.default_rng(6)
    samples = []
    for turns in ((3, 2, 4, 3), (5, 4), (2, 1, 2, 1, 2, 3)):
        mask = [trained for turn, size in enumerate(turns) for trained in [turn % 2] * size]
        zeros = float_row(np.zeros(len(mask)))
        tokens = int_row(rng.integers(0, vocab_size, len(mask)))
        samples.append(
            TrainSample(tokens=tokens, loss_mask=int_row(mask), advantages=zeros, logprobs=zeros, version=0)
        )
    return samples


def transformers_sft_loss(model: transformers.PreTrainedModel, samples: list[TrainSample]) -> torch.Tensor:
    """What transformers computes for the padded batch, where labels that are not trained on are -100."""
    rows = [torch.tensor(sample.tokens, dtype=torch.int64) for sample in samples]
    labels = [
        row.where(torch.tensor(sample.loss_mask) > 0, -100) for row, sample in zip(rows, samples, strict=True)
    ]
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    attended = pad([torch.ones_like(row) for row in rows])
    return model(input_ids=pad(rows), attention_mask=attended, labels=pad(labels, padding_value=-100)).loss


def pack(rows: list[MicroBatch], length: int) -> MicroBatch:
    """The rows one after the other, and a last sequence of padding up to `length`."""
    padding = length - sum(len(row.tokens_T) for row in rows)
    lengths = [len(row.tokens_T) for row in rows] + ([padding] if padding else [])

    def joined(field: str) -> list[float]:
        return [value for row in rows for value in getattr(row, field)] + [0] * padding

    return MicroBatch(
        tokens_T=int_row(joined("tokens_T")),
        labels_T=int_row(joined("labels_T")),
        positions_T=int_row([position for size in lengths for position in range(size)]),
        starts_S=int_row(np.cumsum([0, *lengths])),
        loss_mask_T=int_row(joined("loss_mask_T")),
        advantages_T=float_row(joined("advantages_T")),
        logprobs_T=float_row(joined("logprobs_T")),
        vision=join_vision([row.vision for row in rows], np.cumsum([0, *lengths]), length),
    )


def reference_logits(model: transformers.PreTrainedModel, row: MicroBatch) -> torch.Tensor:
    """Logits [T, V] of one unpacked sequence, in float32."""
    inputs = inputs_of(row)
    # Not looked up without videos: a model with adapters has another config.
    if "second_per_grid_ts" in inputs and model.config.model_type != "qwen2_5_vl":
        del inputs["second_per_grid_ts"]
    return model(inputs.pop("input_ids"), **inputs).logits[0].float()


def reference_logprobs(model: transformers.PreTrainedModel, row: MicroBatch) -> torch.Tensor:
    """Log-probabilities [T] of one unpacked sequence's labels."""
    logits = reference_logits(model, row) / TEMPERATURE
    labels = torch.tensor(row.labels_T, dtype=torch.int64)
    return torch.log_softmax(logits, dim=-1).gather(1, labels[:, None])[:, 0]


def token_loss(predictions: Predictions, row: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A loss that is not linear in the log-probabilities, as a sum over the loss tokens."""
    logprobs_T = predictions.logprobs_T
    mask = torch.tensor(row.loss_mask_T).float()
    advantages = torch.tensor(row.advantages_T)
    total = ((0.3 * logprobs_T.exp() - advantages * logprobs_T) * mask).sum()
    return total, {"entropy": -(logprobs_T.detach() * mask).sum()}


def row_loss(logprobs_T: torch.Tensor, row: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`token_loss` of log-probabilities that torch has computed."""
    return token_loss(Predictions(logprobs_T=logprobs_T, entropy_T=torch.zeros_like(logprobs_T)), row)


def num_loss_tokens(rows: list[MicroBatch]) -> int:
    """Loss tokens of all rows."""
    return sum(int(row.loss_mask_T.sum()) for row in rows)


def make_optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
    """torch's AdamW with weight decay on matrices only."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS)


def reference_step(
    model: transformers.PreTrainedModel,
    optimizer: torch.optim.AdamW,
    rows: list[MicroBatch],
    clip_grad: float,
) -> tuple[float, float, float]:
    """One step over unpacked sequences. Returns loss, mean entropy metric, gradient norm before clipping."""
    optimizer.zero_grad()
    parts = [row_loss(reference_logprobs(model, row), row) for row in rows]
    count = num_loss_tokens(rows)
    loss = torch.stack([part[0] for part in parts]).sum() / count
    entropy = sum(float(part[1]["entropy"]) for part in parts) / count
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
    optimizer.step()
    return float(loss), entropy, float(norm)


def mcore_tensors(
    model: transformers.PreTrainedModel, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Weights or gradients by HF name, as whole Megatron tensors by global Megatron name.

    linear_fc1 comes as [2, ffn, hidden], which is how it is cut.
    """
    config = model.config
    groups, heads = config.num_key_value_heads, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    embedding = tensors["model.embed_tokens.weight"]
    out = {
        "embedding.word_embeddings.weight": embedding,
        "output_layer.weight": tensors.get("lm_head.weight", embedding),
        "decoder.final_layernorm.weight": tensors["model.norm.weight"],
    }
    for layer in range(config.num_hidden_layers):
        hf, mcore = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        attention = mcore + "self_attention."
        for kind in ("weight", "bias"):
            parts = [tensors.get(f"{hf}self_attn.{name}_proj.{kind}") for name in "qkv"]
            if parts[0] is None:
                continue
            q, k, v = parts
            rest = q.shape[1:]
            q, k, v = (
                q.view(groups, heads // groups * head_dim, *rest),
                k.view(groups, head_dim, *rest),
                v.view(groups, head_dim, *rest),
            )
            out[f"{attention}linear_qkv.{kind}"] = torch.cat([q, k, v], 1).reshape(-1, *rest)
        for name in "qk":
            if f"{hf}self_attn.{name}_norm.weight" in tensors:
                out[f"{attention}{name}_layernorm.weight"] = tensors[f"{hf}self_attn.{name}_norm.weight"]
        out[attention + "linear_proj.weight"] = tensors[hf + "self_attn.o_proj.weight"]
        out[mcore + "input_layernorm.weight"] = tensors[hf + "input_layernorm.weight"]
        out[mcore + "pre_mlp_layernorm.weight"] = tensors[hf + "post_attention_layernorm.weight"]
        out[mcore + "mlp.linear_fc1.weight"] = torch.stack(
            [tensors[hf + "mlp.gate_proj.weight"], tensors[hf + "mlp.up_proj.weight"]]
        )
        out[mcore + "mlp.linear_fc2.weight"] = tensors[hf + "mlp.down_proj.weight"]
    return out


def cut(name: str, whole: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """The part of a whole Megatron tensor that tensor-parallel rank `rank` of `size` holds."""
    if "word_embeddings" in name or name.startswith("output_layer"):
        padding = -whole.shape[0] % size
        whole = torch.cat([whole, whole.new_zeros(padding, whole.shape[1])])
        return whole.chunk(size)[rank]
    if "linear_qkv" in name:
        return whole.chunk(size)[rank]
    if "linear_fc1" in name:
        return whole.chunk(size, dim=1)[rank].flatten(0, 1)
    if "linear_proj" in name or "linear_fc2" in name:
        return whole.chunk(size, dim=1)[rank]
    return whole

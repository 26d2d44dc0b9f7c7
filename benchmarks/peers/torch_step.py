"""The training step of `benchmarks.train_step` as torch makes it, in the forms that people run.

    eager           `transformers` Llama models, the loss as one writes it, AdamW as it comes
    compiled        the same under torch.compile; AdamW fused
    liger_chunked   eager models, Liger's chunked loss from hidden states; AdamW fused
    liger_compiled  the models and Liger's loss under torch.compile; AdamW fused

All compute alpha CE + (1 - alpha) T^2 KL(teacher || student). Liger has no T^2: it is part of
the weight there. Its chunks are as many as ours are.
"""

import importlib.metadata
import pathlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional
import transformers

FORMS = ("eager", "compiled", "liger_chunked", "liger_compiled")
LIGER_CHUNK = 256


def make_models(shapes: dict[str, dict], vocab: int, folder: pathlib.Path) -> None:
    """Random Llama models by name, saved where every worker loads them."""
    torch.manual_seed(0)
    for name, shape in shapes.items():
        config = transformers.LlamaConfig(
            vocab_size=vocab,
            hidden_size=shape["embed"],
            intermediate_size=shape["mlp"],
            num_hidden_layers=shape["layers"],
            num_attention_heads=shape["heads"],
            num_key_value_heads=shape["heads"],
            max_position_embeddings=2048,
            tie_word_embeddings=False,
        )
        transformers.LlamaForCausalLM(config).float().save_pretrained(folder / name)


def make(
    form: str, folder: pathlib.Path, tokens: Any, alpha: float, temperature: float, rate: float
) -> tuple[Callable[[], float], dict[str, Any]]:
    """The step of a form, which returns its loss, and what there is to tell of it.

    Args:
      form: of `FORMS`.
      folder: with both models.
      tokens: int [B, L + 1].
      alpha: weight of cross-entropy.
      temperature: of the divergence.
      rate: of learning.
    """
    load = lambda name: transformers.LlamaForCausalLM.from_pretrained(
        folder / name, dtype=torch.float32
    )
    teacher, student = load("teacher").eval(), load("student").train()
    teacher.requires_grad_(False)
    tokens = torch.from_numpy(tokens)
    inputs, labels = tokens[:, :-1], tokens[:, 1:].reshape(-1)
    make_loss = _liger if form.startswith("liger") else _plain
    loss = make_loss(form, teacher, student, inputs, labels, alpha, temperature)
    optimizer = torch.optim.AdamW(student.parameters(), lr=rate, fused=form != "eager" or None)

    def step() -> float:
        value = loss()
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        return value.item()

    packages = ["torch", "transformers"] + ["liger-kernel"] * form.startswith("liger")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return step, {"threads": torch.get_num_threads(), "versions": versions}


def _plain(form: str, teacher, student, inputs, labels, alpha: float, temperature: float):
    """The loss from both models' logits."""

    def loss():
        with torch.no_grad():
            taught = teacher(inputs, use_cache=False).logits.float().flatten(0, 1)
        logits = student(inputs, use_cache=False).logits.float().flatten(0, 1)
        kl = functional.kl_div(
            functional.log_softmax(logits / temperature, -1),
            functional.log_softmax(taught / temperature, -1),
            reduction="batchmean",
            log_target=True,
        )
        ce = functional.cross_entropy(logits, labels)
        return alpha * ce + (1 - alpha) * temperature**2 * kl

    return torch.compile(loss) if form == "compiled" else loss


def _liger(form: str, teacher, student, inputs, labels, alpha: float, temperature: float):
    """The loss from both models' hidden states and heads, in chunks."""
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction

    compiled = form == "liger_compiled"
    hidden = lambda model: model.model(inputs, use_cache=False).last_hidden_state.flatten(0, 1)

    def bodies():
        with torch.no_grad():
            taught = hidden(teacher)
        return hidden(student), taught

    run = torch.compile(bodies) if compiled else bodies

    def loss():
        states, taught = run()
        return LigerFusedLinearJSDFunction.apply(
            states, student.lm_head.weight, taught, teacher.lm_head.weight, labels, None, None,
            alpha, (1 - alpha) * temperature**2, 0.0, -100, temperature, compiled, LIGER_CHUNK,
        )  # fmt: skip

    return loss

"""The fused head loss beside TRL's chunked divergence, Liger's chunked loss and plain PyTorch.

    python -m venv peers && peers/bin/pip install torch==2.13.0 transformers accelerate datasets
    peers/bin/pip install --no-deps trl==1.16.0 liger-kernel==0.8.5
    python -m benchmarks.peers.linear_loss --peers-python peers/bin/python

KL(softmax(teacher / T) || softmax(student / T)) from hidden states and heads, T = 2, without T^2
(TRL and Liger have none), mean over tokens: value, and gradients of the student's hidden states and
head, in float32.
"""

from benchmarks.peers.race import jax_worker, race, torch_worker

TEMPERATURE = 2.0
NAMES = ("hidden", "head", "teacher_hidden", "teacher_head")
BASELINE = "TRL 1.16 chunked divergence, Liger 0.8.5 chunked loss, plain PyTorch"


def _ours():
    from jaxdistill.kernels import linear_divergence

    def loss(hidden, head, teacher_hidden, teacher_head):
        return linear_divergence(
            hidden, head, teacher_hidden, teacher_head,
            temperature=TEMPERATURE, scale_by_t2=False,
        )[0]  # fmt: skip

    return loss


def _plain():
    import torch.nn.functional as functional

    def loss(hidden, head, teacher_hidden, teacher_head):
        log_q = functional.log_softmax(hidden @ head.T / TEMPERATURE, -1)
        log_p = functional.log_softmax(teacher_hidden @ teacher_head.T / TEMPERATURE, -1)
        return functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)

    return loss


def _trl():
    import torch
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    def loss(hidden, head, teacher_hidden, teacher_head):
        mask = torch.ones(1, hidden.shape[0])
        value, _, _ = _chunked_divergence_loss(
            hidden[None], teacher_hidden[None], head, teacher_head, mask, beta=0.0,
            temperature=TEMPERATURE,
        )  # fmt: skip
        return value

    return loss


def _liger():
    import torch
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction

    def loss(hidden, head, teacher_hidden, teacher_head):
        labels = torch.zeros(hidden.shape[0], dtype=torch.long)
        return LigerFusedLinearJSDFunction.apply(
            hidden, head, teacher_hidden, teacher_head, labels, None, None,
            0.0, 1.0, 0.0, -100, TEMPERATURE, True, 1024,
        )  # fmt: skip

    return loss


WORKERS = {
    "trl": torch_worker(_trl, "trl", NAMES),
    "liger": torch_worker(_liger, "liger-kernel", NAMES),
    "torch": torch_worker(_plain, "torch", NAMES),
    "jaxdistill": jax_worker(_ours, NAMES),
}

if __name__ == "__main__":
    race("linear_loss", __doc__ or "", WORKERS, BASELINE)

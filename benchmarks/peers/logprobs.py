"""Log-probabilities of tokens beside Liger's chunked function, TRL's selective form and PyTorch.

    python -m benchmarks.peers.logprobs --peers-python peers/bin/python

A policy's loss, mean_i a_i log q_i of given tokens, from hidden states and a head: value, and
gradients of both. The advantages a_i weigh each token, as they do after a rollout. The peers'
environment is that of `benchmarks.peers.linear_loss`.
"""

from benchmarks.peers.race import jax_worker, race, torch_worker

NAMES = ("hidden", "head", "ids", "advantages")
BASELINE = "TRL 1.16 selective_log_softmax, Liger 0.8.5 chunked selective logprob, plain PyTorch"


def _ours():
    from jaxdistill.kernels import linear_logprobs

    return lambda hidden, head, ids, advantages: (
        advantages * linear_logprobs(hidden, head, ids).logprobs
    ).mean()


def _plain():
    import torch

    def loss(hidden, head, ids, advantages):
        log_q = torch.log_softmax(hidden @ head.T, -1).gather(1, ids[:, None])[:, 0]
        return (advantages * log_q).mean()

    return loss


def _trl():
    from trl.trainer.utils import selective_log_softmax

    return lambda hidden, head, ids, advantages: (
        advantages * selective_log_softmax(hidden @ head.T, ids)
    ).mean()


def _liger():
    from liger_kernel.chunked_loss import fused_linear_ppo

    function = fused_linear_ppo._ChunkedSelectiveLogProbFunction
    width = fused_linear_ppo._SELECTIVE_LOGPROB_VOCAB_CHUNK_SIZE
    return lambda hidden, head, ids, advantages: (
        advantages * function.apply(hidden, head, ids, None, 1.0, width)
    ).mean()


WORKERS = {
    "trl": torch_worker(_trl, "trl", NAMES),
    "liger": torch_worker(_liger, "liger-kernel", NAMES),
    "torch": torch_worker(_plain, "torch", NAMES),
    "jaxdistill": jax_worker(_ours, NAMES),
}

if __name__ == "__main__":
    race("logprobs", __doc__ or "", WORKERS, BASELINE)

"""A teacher of whom 64 tokens are known beside plain PyTorch: forward KL with a ghost tail.

    python -m benchmarks.peers.known_tokens --peers-python peers/bin/python

From hidden states and a head: the mean over tokens, and gradients of both arrays.
The peers' environment is that of `benchmarks.peers.linear_loss`; of it torch alone is needed.
"""

from benchmarks.peers.race import jax_worker, race, torch_worker

NAMES = ("hidden", "head", "known_ids", "known_logprobs")
BASELINE = "plain PyTorch: log_softmax of all logits, gathered"


def _ours():
    from jaxdistill.kernels import linear_divergence

    def loss(hidden, head, ids, log_p):
        value, _ = linear_divergence(hidden, head, teacher_ids=ids, teacher_logprobs=log_p)
        return value

    return loss


def _plain():
    import torch

    def loss(hidden, head, ids, log_p):
        log_q = torch.log_softmax(hidden @ head.T, -1).gather(1, ids)
        p, q = log_p.exp(), log_q.exp()
        rest_p, rest_q = 1 - p.sum(1), 1 - q.sum(1)
        tail = rest_p * (rest_p.log() - rest_q.log())
        return ((p * (log_p - log_q)).sum(1) + tail).mean()

    return loss


WORKERS = {
    "torch": torch_worker(_plain, "torch", NAMES),
    "jaxdistill": jax_worker(_ours, NAMES),
}

if __name__ == "__main__":
    race("known_tokens", __doc__ or "", WORKERS, BASELINE)

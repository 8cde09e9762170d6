"""One weight, one GEMS step, in numpy: full SVDs, Adam and momentum written out, nothing shared with the library."""

import numpy as np


def leading(matrix, count):
    return np.linalg.svd(matrix, full_matrices=False)[0][:, :count]


def without_rounding(R, G):
    """What exact arithmetic makes zero is zero: beyond the rank of G, Adam must not step along rounding."""
    return np.where(np.abs(R) <= 1e-14 * np.abs(G).max(), 0.0, R)


class SimpleGems:
    """The readable twin of `GemsOptimizer` for one matrix W (m x n); everything is float64.

    The update is written for ``side="output"``; ``side="input"`` is the same on the transposed weight.
    """

    def __init__(
        self, weight, tasks, *, rank, task_rank, gap, scale, side, gate, orthogonalize, protected, inner, lr, decay
    ):
        self.transpose = side == "input"
        self.W = (weight.T if self.transpose else weight).copy()
        self.tasks, self.rank, self.task_rank, self.gap, self.scale = tasks, rank, task_rank, gap, scale
        self.gate, self.orthogonalize = gate, orthogonalize
        self.inner, self.lr, self.decay = inner, lr, decay
        dimension = self.W.shape[0]
        K = np.zeros((dimension, 0)) if protected is None else protected
        self.P = np.eye(dimension) - K @ K.T
        self.decay_gap, self.pending = 1 if protected is None else gap, 0.0
        self.bases, self.first, self.second, self.count, self.due, self.t = {}, {}, {}, {}, {}, 0

    def weight(self):
        return self.W.T if self.transpose else self.W

    def step(self, gradients, samples, losses):
        """gradients, samples and losses by task; a task that is missing takes no part."""
        G = {k: (g.T if self.transpose else g) for k, g in gradients.items()}
        total = sum(samples[k] for k in G)
        mixed = sum(samples[k] / total * G[k] for k in G)
        if self.inner == "sgd":
            self.refresh({"shared": mixed, **G})
            mixed = mixed + self.decay * self.W
        else:
            self.refresh({"shared": mixed, **G})
        R = {"shared": self.bases["shared"].T @ mixed, **{k: self.bases[k].T @ G[k] for k in G}}
        R = {k: without_rounding(r, G.get(k, mixed)) for k, r in R.items()}
        gates = self.gates(R, samples, losses, total)
        d = {k: self.inner_step(k, R[k]) for k in R}
        update = self.bases["shared"] @ d["shared"] + sum(gates[k] * self.bases[k] @ d[k] for k in G)
        if self.inner == "adamw":
            self.shrink(self.lr * self.decay)
        self.W = self.W + self.scale * update
        self.t += 1

    def shrink(self, share):
        """Decay is collected, and taken away when P is needed anyway: all the shares of a gap at once."""
        self.pending = 1 - (1 - self.pending) * (1 - share)
        if self.t % self.decay_gap == 0:
            self.W = self.W - self.pending * self.P @ self.W
            self.pending = 0.0

    def refresh(self, G):
        for name, gradient in G.items():
            if self.t < self.due.get(name, 0):
                continue
            self.due[name] = (self.t // self.gap + 1) * self.gap
            if name == "shared":
                new = leading(self.P @ gradient, self.rank)
            else:
                S = self.bases["shared"]
                keep = self.P - S @ S.T if self.orthogonalize == "shared_first" else self.P
                new = leading(keep @ gradient, self.task_rank)
            if name in self.bases:
                self.rotate(name, self.bases[name], new)
            self.bases[name] = new

    def rotate(self, name, old, new):
        C = new.T @ old
        self.first[name] = C @ self.first[name]
        if self.inner == "adamw":
            v = self.second[name]
            unseen = np.maximum(0.0, 1.0 - (C**2).sum(1, keepdims=True))
            self.second[name] = C**2 @ v + unseen * v.mean(0, keepdims=True)

    def gates(self, R, samples, losses, total):
        present = [k for k in R if k != "shared"]
        if self.gate == "uniform":
            return {k: 1 / len(present) for k in present}
        norms = {k: np.linalg.norm(R[k]) for k in present}
        return {
            k: 0.4 * losses[k] / sum(losses[j] for j in present)
            + 0.4 * norms[k] / sum(norms.values())
            + 0.2 * samples[k] / total
            for k in present
        }

    def inner_step(self, name, R):
        t = self.count[name] = self.count.get(name, 0) + 1
        zero = np.zeros_like(R)
        if self.inner == "sgd":
            m = self.first[name] = 0.9 * self.first.get(name, zero) + R
            return -self.lr * m
        m = self.first[name] = 0.9 * self.first.get(name, zero) + 0.1 * R
        v = self.second[name] = 0.999 * self.second.get(name, zero) + 0.001 * R**2
        return -self.lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)

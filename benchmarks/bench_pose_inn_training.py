"""A training step of PoseINN: fasthyp's recipe against the same step in plain PyTorch and FrEIA.

    python benchmarks/bench_pose_inn_training.py [--hidden 1028] [--hypotheses 200] [--persons 64]
        [--rounds 5] [--threads 1] [--json FILE]

Both have the same weights, persons and noise, and compute what equation 9 says: five steps of the
critic with gradient penalty, then one of the network. The plain step is written as the paper reads:
a call of the flow for each kind of pose, the Gaussians repeated for each hypothesis, the MMD from
Gram matrices. Their loss terms are compared before anything is timed. "cpu_s" is the processor time
of the process, all threads together; steps are taken in turn, medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import FrEIA.framework as ff
import FrEIA.modules as fm
import torch
from _timing import report
from torch import Tensor, nn

from fasthyp.losses import PoseCritic, weighted_sum
from fasthyp.models import PoseINN
from fasthyp.train.pose_inn import PoseINNBatch, PoseINNNoise, PoseINNObjective, PoseINNWeights

CRITIC_STEPS, TOP_K = 5, 5
OF_H36M = [2, 1, 4, 5, 6, 7, 9, 15, 14, 13, 10, 11, 12]  # the joints with a heatmap
WEIGHTS = asdict(PoseINNWeights())


class Plain(nn.Module):
    """PoseINN of FrEIA's own modules; its state dict is that of fasthyp's."""

    def __init__(self, hidden: int) -> None:
        super().__init__()

        def subnet(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))

        self.inn = ff.SequenceINN(48)
        for k in range(8):
            self.inn.append(
                fm.GLOWCouplingBlock,
                cond=0,
                cond_shape=(56,),
                subnet_constructor=subnet,
                clamp=2.0,
            )
            self.inn.append(fm.PermuteRandom, seed=k)
        self.cond_net = nn.Sequential(nn.Linear(78, 256), nn.ReLU(), nn.Linear(256, 56))

    def forward(self, x: Tensor, gauss: Tensor, rev: bool = False) -> Tensor:
        out: Tensor = self.inn(x, [self.cond_net(gauss)], rev=rev)[0]
        return out


def plain_terms(
    model: Plain, critic: nn.Module, batch: PoseINNBatch, noise: PoseINNNoise
) -> dict[str, Tensor]:
    x, y, gauss = batch
    output = model(x, gauss)
    z_hat, y_hat = output[:, :16], output[:, 16:]

    def square(a: Tensor, b: Tensor) -> Tensor:
        return a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T

    def kernel(d: Tensor) -> Tensor:
        return sum((s / (s + d) for s in (0.0025, 0.04, 0.81)), torch.zeros(()))

    v = torch.cat((noise.target, y), 1)
    w = torch.cat((z_hat, y_hat.detach()), 1)
    n, off = len(x), 1 - torch.eye(len(x))
    same = (off * (kernel(square(v, v)) + kernel(square(w, w)))).sum() / (n * (n - 1))
    mmd = same - 2 * kernel(square(v, w)).mean()

    det = model(torch.cat((z_hat.detach(), y), 1), gauss, rev=True)
    fake = model(torch.cat((noise.generator, y), 1), gauss, rev=True)
    count = noise.hypotheses.shape[1]
    latent = torch.cat((noise.hypotheses, y[:, None].expand(-1, count, -1)), -1).flatten(0, 1)
    drawn = model(latent, gauss.repeat_interleave(count, 0), rev=True).view(n, count, 3, 16)

    def rooted(poses: Tensor) -> Tensor:
        return poses - poses[..., (0, 3)].mean(-1, keepdim=True)

    poses, truth = rooted(drawn), rooted(x.view(n, 3, 16))
    error = (poses - truth[:, None]).norm(dim=2).mean(-1)
    best = poses[torch.arange(n)[:, None], error.argsort(1)[:, :TOP_K]].mean(1)

    spread = poses[:, :, :2][..., OF_H36M]
    spread = spread - spread.mean(1, keepdim=True)
    found = (spread[:, :, (0, 0, 1)] * spread[:, :, (0, 1, 1)]).sum(1) / (count - 1)
    wanted = gauss.view(n, 13, 6)[..., 3:].mT * (20 * 0.005) ** 2
    uncertain = (wanted[:, (0, 2)] > (2.1 * 0.005) ** 2).any(1)
    gap = wanted - found
    gap = torch.stack((gap[:, 0].relu(), gap[:, 1], gap[:, 2].relu()), 1)
    return {
        "l2d": (y_hat - y).abs().mean(),
        "mmd": mmd,
        "det": (det - x).abs().mean(),
        "generator": -critic(fake).mean(),
        "best_of_m": (best - truth).abs().mean(),
        "covariance": (uncertain * (gap.square().sum(1) + 1e-30).sqrt()).mean(),
    }


def adam(module: nn.Module) -> torch.optim.Optimizer:
    learned = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.Adam(learned, 1e-4, betas=(0.5, 0.9))


class Step:
    """Batches: one for the network, then for each critic step one of real poses and one to draw."""

    def __init__(
        self, model: nn.Module, critic: PoseCritic, batches: list[PoseINNBatch], noise: PoseINNNoise
    ) -> None:
        self.model, self.critic, self.batches, self.noise = model, critic, batches, noise
        self.optimizers = adam(model), adam(critic)
        self.z = torch.randn(CRITIC_STEPS, len(batches[0].pose), 16)
        self.alpha = torch.rand(CRITIC_STEPS, len(batches[0].pose), 1)

    def take(self, which: int, loss: Tensor) -> None:
        self.optimizers[which].zero_grad()
        loss.backward()
        if which == 0:
            nn.utils.clip_grad_value_(self.model.parameters(), 15.0)
        self.optimizers[which].step()


class PlainStep(Step):
    def terms(self) -> dict[str, Tensor]:
        return plain_terms(self.model, self.critic, self.batches[0], self.noise)  # type: ignore

    def __call__(self) -> None:
        for k in range(CRITIC_STEPS):
            real, other = self.batches[1 + 2 * k].pose, self.batches[2 + 2 * k]
            with torch.no_grad():
                latent = torch.cat((self.z[k], other.pose_2d), 1)
                fake = self.model(latent, other.gauss, rev=True)
            points = (self.alpha[k] * real + (1 - self.alpha[k]) * fake).requires_grad_()
            (slope,) = torch.autograd.grad(self.critic(points).sum(), points, create_graph=True)
            loss = self.critic(fake).mean() - self.critic(real).mean()
            self.take(1, loss + 10 * ((slope.norm(dim=1) - 1) ** 2).mean())
        self.critic.requires_grad_(False)
        self.take(0, weighted_sum(self.terms(), WEIGHTS))
        self.critic.requires_grad_(True)


class FastStep(Step):
    objective = PoseINNObjective(top_k=TOP_K)
    model: PoseINN

    def terms(self) -> dict[str, Tensor]:
        return self.objective.losses(self.model, self.critic, self.batches[0], self.noise)

    def __call__(self) -> None:
        other = self.batches[2::2]
        with torch.no_grad():
            pose_2d = torch.cat([batch.pose_2d for batch in other])
            gauss = torch.cat([batch.gauss for batch in other])
            latent = torch.cat((self.z.flatten(0, 1), pose_2d), 1)[:, None]
            fakes = self.model.inverse(latent, gauss)[:, 0].chunk(CRITIC_STEPS)
        for k in range(CRITIC_STEPS):
            terms = self.objective.critic_losses(
                self.critic, self.batches[1 + 2 * k].pose, fakes[k], self.alpha[k]
            )
            self.take(1, terms["critic"] + terms["gradient_penalty"])
        self.critic.requires_grad_(False)
        self.take(0, weighted_sum(self.terms(), WEIGHTS))
        self.critic.requires_grad_(True)


def timed(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, tuple[float, float]]:
    """Median processor and wall time of each (s)."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            start = time.process_time(), time.perf_counter()
            step()
            if turn:  # the first one warms up
                end = time.process_time(), time.perf_counter()
                times[name].append((end[0] - start[0], end[1] - start[1]))
    return {
        name: (statistics.median(cpu), statistics.median(wall))
        for name, (cpu, wall) in ((name, zip(*found, strict=True)) for name, found in times.items())
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=1028)
    parser.add_argument("--hypotheses", type=int, default=200)
    parser.add_argument("--persons", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="write the rows here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    fast_model, plain_model = PoseINN(hidden=options.hidden, freia="0.2"), Plain(options.hidden)
    plain_model.load_state_dict(fast_model.state_dict())
    critics = PoseCritic(), PoseCritic()
    critics[1].load_state_dict(critics[0].state_dict())
    n = options.persons
    batches = [
        PoseINNBatch(0.3 * torch.randn(n, 48), torch.randn(n, 32), 0.1 * torch.rand(n, 78))
        for _ in range(1 + 2 * CRITIC_STEPS)
    ]
    noise = PoseINNNoise(
        torch.randn(n, 16), torch.randn(n, 16), torch.randn(n, options.hypotheses, 16)
    )
    plain = PlainStep(plain_model, critics[0], batches, noise)
    fast = FastStep(fast_model, critics[1], batches, noise)
    with torch.no_grad():
        torch.testing.assert_close(fast.terms(), plain.terms(), rtol=1e-3, atol=1e-5)

    whole = timed({"plain": plain, "fasthyp": fast}, options.rounds)

    def network(step: Any) -> Callable[[], None]:
        return lambda: step.take(0, weighted_sum(step.terms(), WEIGHTS))

    parts = timed({"plain": network(plain), "fasthyp": network(fast)}, options.rounds)
    rows = [
        {
            "workload": f"{name}, {n} persons, {options.hypotheses} hypotheses",
            "hidden": options.hidden,
            "plain_cpu_s": found["plain"][0],
            "fasthyp_cpu_s": found["fasthyp"][0],
            "cpu_ratio": found["plain"][0] / found["fasthyp"][0],
            "plain_s": found["plain"][1],
            "fasthyp_s": found["fasthyp"][1],
            "ratio": found["plain"][1] / found["fasthyp"][1],
        }
        for name, found in (("a whole step", whole), ("the network alone", parts))
    ]
    report("Training of PoseINN", rows, options.json, rounds=options.rounds)


if __name__ == "__main__":
    main()

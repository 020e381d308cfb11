"""The training loop: sample routes, compare with full attention, hold each task to its share.

Dimension legend: L layers, B prompts, C chunks, R prompts or chunks under a constraint, H head
dim, K constraints.
"""

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from flux_vllm.router.checkpoint import RouterInfo, write_router
from flux_vllm.router.model import LayerRouter
from flux_vllm.router.route import Route
from training.attach import RoutedModel
from training.checkpoint import load_state, save_state
from training.config import TrainConfig
from training.data.batching import MicroBatch, collate, group_by_length, random_chunk_ends
from training.data.encoding import Encoded
from training.data.stream import PromptStream
from training.distributed import World, start_world
from training.logs import RunLog, named
from training.losses import (
    EARLY_CHUNKS,
    ShareConstraints,
    Shares,
    cross_entropy,
    distillation,
    excess_confidence,
    mean_by_prompt,
    share_spread,
    targets_by_task,
)
from training.model_loading import load_routed, load_tokenizer
from training.policies import RelaxedPolicy, StaticPolicy
from training.provenance import model_name, provenance
from training.recent_prompts import RecentPrompts
from training.relaxation import logistic_noise, temperature
from training.schedule import rate_scale
from training.standardize import StandardizedRouter
from training.storage import STORED_DTYPES, round_for_storage

_CALIBRATION_PROMPTS = 64


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite."""


class Trainer:
    """One training run over a routed model.

    Args:
        config: of the run.
        routed: the frozen model.
        stream: training prompts.
        world: this process among the others.
    """

    def __init__(
        self, config: TrainConfig, routed: RoutedModel, stream: PromptStream, world: World
    ) -> None:
        self.config = config
        self.routed = routed
        self.stream = stream
        self.world = world
        torch.manual_seed(config.seed)
        router = LayerRouter(routed.num_layers, routed.head_dim)
        self.router = StandardizedRouter(router).to(world.device)
        self.router.begin_with_full(config.router.full_bias)
        self.optimizer = torch.optim.AdamW(
            self.router.parameters(),
            lr=config.optimizer.learning_rate,
            weight_decay=config.optimizer.weight_decay,
        )
        targets = targets_by_task(stream.task_names, config.loss)
        self.constraints = ShareConstraints(targets, config.loss, world.device)
        self.recent = RecentPrompts(config.loss.recent_steps, world)
        self.teacher = StaticPolicy.all_full(routed.num_layers)
        self.step = 0
        self.elapsed = 0.0

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return Path(self.config.out)

    def run(self) -> Path:
        """Train to the end, resuming where a killed run stopped.

        Returns: path of the router file.
        Raises: NonFiniteLossError: the loss diverged; the last good checkpoint stands.
        """
        state = load_state(self.folder / "checkpoints") if self.config.system.resume else None
        if state is not None:
            self._restore(state)
        else:
            self._calibrate()
        optimizer, system = self.config.optimizer, self.config.system
        log = RunLog(
            self.folder, optimizer.steps, self.step, self.world.is_main, system.tensorboard
        )
        start = time.monotonic() - self.elapsed
        batches = self._batches()
        try:
            while self.step < optimizer.steps and self._progress() < 1:
                began = time.monotonic()
                row = self.train_step(next(batches))
                self.elapsed = time.monotonic() - start
                row |= {
                    "seconds": round(time.monotonic() - began, 3),
                    "peak_gib": self.world.peak_gib(),
                }
                log.step(row)
                if self.step % system.save_every == 0:
                    self._save()
        finally:
            log.close()
        self._save()
        return self.write()

    def train_step(self, prompts: list[Encoded]) -> dict[str, Any]:
        """Do one step with this process's share of the batch, and describe it."""
        progress = self._progress()
        rate = self._set_rate(progress)
        heat = temperature(round(progress * 10000), 10000, self.config.relaxation)
        self.constraints.advance(progress)
        self.optimizer.zero_grad(set_to_none=True)
        loss_sum, shares, tokens = self._accumulate(prompts, heat)
        constraint_losses = self.constraints.loss(shares)
        total = loss_sum + constraint_losses.detach().sum()
        self.world.sum_gradients(self.router)
        norm = torch.nn.utils.clip_grad_norm_(
            self.router.parameters(), self.config.optimizer.gradient_norm
        )
        if not (torch.isfinite(total) and torch.isfinite(norm)):
            raise NonFiniteLossError(
                f"expected a finite loss at step {self.step + 1}, found loss {float(total)} and "
                f"gradient norm {float(norm)}; the last good checkpoint is in "
                f"{self.folder / 'checkpoints'}, resume from it with a lower "
                "--optimizer.learning_rate"
            )
        self.optimizer.step()
        self.constraints.ascend(shares)
        self.step += 1
        names = self.constraints.names
        return {
            "step": self.step,
            "loss": float(total),
            "task_loss": float(loss_sum),
            "temperature": heat,
            "learning_rate": rate,
            "gradient_norm": float(norm),
            "tokens": tokens,
            "shares": named(names, shares.mean, shares.count),
            "multipliers": named(names, self.constraints.multipliers[0], shares.count),
        }

    def _accumulate(self, prompts: list[Encoded], heat: float) -> tuple[torch.Tensor, Shares, int]:
        """Run and differentiate all micro-batches, then the share constraint."""
        data, settings = self.config.data, self.config.optimizer
        chances = [self._chances(row) for row in range(len(prompts))]
        ends = [
            random_chunk_ends(prompt.prompt_len, rng, data.chunked_fraction, data.max_chunks)
            for prompt, (rng, _) in zip(prompts, chances, strict=True)
        ]
        noise = torch.stack([drawn for _, drawn in chances], dim=1)
        features, groups = [], []
        loss_sum = torch.zeros((), device=self.world.device)
        tokens = 0
        for rows in group_by_length([len(p) for p in prompts], settings.micro_batch_tokens):
            micro = self._collate(prompts, rows, ends)
            columns = micro.plan.is_last.shape[1]
            policy = RelaxedPolicy(
                self.router, noise[:, rows, :columns].to(self.world.device), heat
            )
            loss, seen, group = self._micro_step(micro, policy)
            loss_sum += loss
            features.append(seen)
            groups.append(group)
            tokens += micro.token_ids.numel()
        shares = self._constrain(torch.cat(features, dim=1), torch.cat(groups))
        return self.world.sum(loss_sum), shares, tokens * self.world.size

    def _chances(self, row: int) -> tuple[random.Random, torch.Tensor]:
        """Give a prompt's own randomness, whoever computes it: for its chunks, and noise [L, C]."""
        place = self.world.rank + row * self.world.size
        rng = random.Random(f"{self.config.seed}/chances/{self.step}/{place}")
        generator = torch.Generator().manual_seed(rng.randrange(2**62))
        shape = (self.routed.num_layers, self.config.data.max_chunks)
        return rng, logistic_noise(shape, generator)

    def _micro_step(
        self, micro: MicroBatch, policy: RelaxedPolicy
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Differentiate one micro-batch.

        Returns: its part of the step's loss; features [L, R, H]; constraint of each [R] int64.
        """
        loss_settings = self.config.loss
        at = (micro.answer_rows, micro.answer_positions)
        teacher = None
        if loss_settings.distillation_weight:
            with torch.no_grad():
                full = self.routed.forward(micro.token_ids, micro.plan, self.teacher)
                teacher = self.routed.logits(full.hidden[at])
        routed = self.routed.forward(micro.token_ids, micro.plan, policy)
        logits = self.routed.logits(routed.hidden[at])
        by_token = torch.zeros_like(logits[:, 0])
        if teacher is not None:
            by_token = loss_settings.distillation_weight * distillation(logits, teacher)
        if loss_settings.lm_weight:
            by_token = by_token + loss_settings.lm_weight * cross_entropy(
                logits, micro.answer_tokens
            )
        loss = mean_by_prompt(by_token, micro.answer_rows, len(micro.tasks)).sum()
        loss = loss / self.config.optimizer.batch_size
        loss.backward()
        features, groups = self._constrained(micro, routed.features)
        return loss.detach(), features, groups

    def _constrained(
        self, micro: MicroBatch, features: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pick the chunks under a constraint: [L, B, C, H] to [L, R, H] and [R] indices."""
        names = self.constraints.names
        task = torch.tensor([names.index(name) for name in micro.tasks], device=features.device)
        early = torch.full_like(task, names.index(EARLY_CHUNKS))
        plan = micro.plan
        group = torch.where(plan.is_last, task[:, None], early[:, None])
        kept = plan.is_last | plan.is_early
        return features[:, kept], group[kept]

    def _constrain(self, features: torch.Tensor, groups: torch.Tensor) -> Shares:
        """Differentiate the share constraint.

        Args:
            features: [L, R, H] of this process's prompts.
            groups: [R] int64, the constraint each counts for.

        Returns: Shares over all processes and the steps kept.
        """
        features, groups = self.recent.extend(features, groups)
        logits = self.router.forward_all(features)
        sparse = logits.softmax(dim=-1)[..., Route.SPARSE].mean(dim=0)
        size = len(self.constraints.names)
        sums = sparse.new_zeros(size).index_add(0, groups, sparse)
        count = torch.bincount(groups, minlength=size).to(sparse.dtype)
        shares = Shares(sums / count.clamp(min=1), count)
        settings = self.config.loss
        excess = settings.logit_penalty * excess_confidence(logits, settings.logit_bound)
        spread = settings.spread_penalty * share_spread(sparse, groups, shares)
        # Every process computes all of it, and their gradients are summed.
        loss = self.constraints.loss(shares).sum() + spread + excess
        (loss / self.world.size).backward()
        return Shares(shares.mean.detach(), count)

    def _collate(
        self, prompts: list[Encoded], rows: list[int], ends: list[list[int]]
    ) -> MicroBatch:
        router = self.config.router
        return collate(
            [prompts[row] for row in rows],
            rows,
            [ends[row] for row in rows],
            router.pool_tokens,
            router.pool_prefix,
            self.config.loss.answer_tokens,
            tail_tokens=router.tail_tokens,
        ).to(self.world.device)

    def _calibrate(self) -> None:
        """Standardise the routers' inputs on a few prompts under full attention."""
        rng = random.Random(f"{self.config.seed}/calibration")
        prompts = [self.stream[index] for index in range(_CALIBRATION_PROMPTS)]
        ends = [random_chunk_ends(prompt.prompt_len, rng, 0.5, 2) for prompt in prompts]
        budget = self.config.optimizer.micro_batch_tokens
        features = []
        for rows in group_by_length([len(prompt) for prompt in prompts], budget):
            micro = self._collate(prompts, rows, ends)
            with torch.no_grad():
                routed = self.routed.forward(micro.token_ids, micro.plan, self.teacher)
            features.append(self._constrained(micro, routed.features)[0])
        self.router.fit(torch.cat(features, dim=1))

    def _batches(self) -> Iterator[list[Encoded]]:
        """Yield this process's prompts of each step, from the current step on."""
        optimizer, data = self.config.optimizer, self.config.data
        first = self.step * optimizer.batch_size
        last = optimizer.steps * optimizer.batch_size
        mine = [
            index
            for index in range(first, last)
            if index % optimizer.batch_size % self.world.size == self.world.rank
        ]
        size = len(range(self.world.rank, optimizer.batch_size, self.world.size))
        return iter(
            DataLoader(
                self.stream,
                batch_size=size,
                sampler=mine,
                num_workers=data.workers,
                collate_fn=list,
                prefetch_factor=4 if data.workers else None,
            )
        )

    def _progress(self) -> float:
        """Share of the run that is done, by steps or by time, whichever is further."""
        optimizer = self.config.optimizer
        done = self.step / optimizer.steps
        if optimizer.time_limit_s > 0:
            elapsed = torch.tensor(self.elapsed, device=self.world.device)
            mean = float(self.world.sum(elapsed)) / self.world.size
            done = max(done, mean / optimizer.time_limit_s)
        return done

    def _set_rate(self, progress: float) -> float:
        """Set the learning rate, and return it."""
        settings = self.config.optimizer
        rate = settings.learning_rate * rate_scale(progress, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _save(self) -> None:
        if self.world.is_main:
            state = {
                "router": self.router.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "constraints": self.constraints.state_dict(),
                "recent": self.recent.state_dict(),
                "elapsed": self.elapsed,
            }
            save_state(self.folder / "checkpoints", self.step, state)

    def _restore(self, state: dict[str, Any]) -> None:
        self.router.load_state_dict(state["router"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.constraints.load_state_dict(state["constraints"])
        self.recent.load_state_dict(state["recent"])
        self.step = state["step"]
        self.elapsed = state["elapsed"]

    def write(self) -> Path:
        """Write the router file."""
        router = self.config.router
        info = RouterInfo(
            base_model=model_name(self.config.model),
            num_layers=self.routed.num_layers,
            head_dim=self.routed.head_dim,
            pool_tokens=router.pool_tokens,
            pool_prefix=router.pool_prefix,
            sink_tokens=router.sink_tokens,
            window_tokens=router.window_tokens,
            sparse_pattern=router.sparse_pattern,
            provenance=provenance(self.world.device, self.config.data.corpus)
            | {
                "config": self.config.to_dict(),
                "steps": self.step,
                "seconds": round(self.elapsed, 1),
            },
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.world.is_main:
            folded = round_for_storage(self.router.fold(STORED_DTYPES["features.0"]))
            write_router(self.folder, folded, info, STORED_DTYPES)
        self.world.wait()
        return self.folder / "flux_router.safetensors"


def train(config: TrainConfig) -> Path:
    """Train routers as a config says.

    Returns: path of the router file.
    """
    world = start_world(config.system.device)
    tokenizer = load_tokenizer(config.model)
    routed = load_routed(
        config.model,
        config.router.sink_tokens,
        config.router.window_tokens,
        config.system,
        world,
    )
    limit = routed.model.config.max_position_embeddings
    stream = PromptStream(
        config.data,
        tokenizer,
        "train",
        config.seed,
        max_model_tokens=limit,
        same_length=config.optimizer.batch_size,
    )
    return Trainer(config, routed, stream, world).run()

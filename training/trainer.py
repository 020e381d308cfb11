"""The training loop: probe prompts, sample routes, compare the answers with full attention's.

Dimension legend: L layers, B prompts, F features of a layer's router.
"""

import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from flux_vllm.router.checkpoint import RouterInfo, write_router
from flux_vllm.router.model import LayerRouter
from training.attach import RoutedModel
from training.checkpoint import load_state, save_state
from training.config import TrainConfig
from training.costs.train import train_by_costs
from training.data.batching import MicroBatch, collate, group_by_length
from training.data.encoding import Encoded
from training.data.prompt_files import FilePrompts
from training.data.stream import PromptStream
from training.distributed import World, start_world
from training.freeing import freeing_order
from training.logs import RunLog
from training.losses import excess_confidence, mean_by_prompt
from training.model_loading import load_routed, load_tokenizer
from training.objectives import make_objective
from training.policies import RelaxedPolicy
from training.probe import collate_probes
from training.provenance import model_name, provenance
from training.relaxation import logistic_noise, temperature
from training.schedule import rate_scale
from training.standardize import StandardizedRouter
from training.storage import round_for_storage, stored_dtypes

_CALIBRATION_PROMPTS = 256
_PROBES_AT_ONCE = 64
_BETAS = (0.9, 0.95)
"""AdamW's; with a longer memory of squared gradients the budget's multiplier runs ahead of the
shares and swings."""


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
        self,
        config: TrainConfig,
        routed: RoutedModel,
        stream: PromptStream | FilePrompts,
        world: World,
    ) -> None:
        self.config = config
        self.routed = routed
        self.stream = stream
        self.world = world
        torch.manual_seed(config.seed)
        self.inputs = config.router.inputs(routed.num_layers)
        router = LayerRouter(
            routed.num_layers, routed.head_dim, self.inputs.vectors, config.router.widths
        )
        self.router = StandardizedRouter(router).to(world.device)
        self.router.begin_with_full(config.router.full_bias)
        self.optimizer = torch.optim.AdamW(
            self.router.parameters(),
            lr=config.optimizer.learning_rate,
            betas=_BETAS,
            weight_decay=config.optimizer.weight_decay,
        )
        self.objective = make_objective(config.loss, stream.task_names, world.device)
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
        self.optimizer.zero_grad(set_to_none=True)
        answers, routes, tokens = self._accumulate(prompts, heat)
        total = self.objective.weight * answers + routes
        self.world.sum_gradients(self.router)
        norm = torch.nn.utils.clip_grad_norm_(
            self.router.parameters(), self.config.optimizer.gradient_norm
        )
        if not (math.isfinite(total) and torch.isfinite(norm)):
            raise NonFiniteLossError(
                f"expected a finite loss at step {self.step + 1}, found loss {total} and "
                f"gradient norm {float(norm)}; the last good checkpoint is in "
                f"{self.folder / 'checkpoints'}, resume from it with a lower "
                "--optimizer.learning_rate"
            )
        self.optimizer.step()
        self.objective.ascend(answers)
        self.step += 1
        return {
            "step": self.step,
            "loss": total,
            "answers_loss": answers,
            "temperature": heat,
            "learning_rate": rate,
            "gradient_norm": float(norm),
            "tokens": tokens,
        } | self.objective.describe()

    def _accumulate(self, prompts: list[Encoded], heat: float) -> tuple[float, float, int]:
        """Run and differentiate all micro-batches, then what routes cost by themselves.

        Returns: over all processes, the answers' mean loss, nats a token; the loss on routes; and
            tokens computed.
        """
        settings = self.config.optimizer
        noise = torch.stack([self._noise(row) for row in range(len(prompts))], dim=1)
        features: list[torch.Tensor] = []
        tasks: list[str] = []
        answers = torch.zeros((), device=self.world.device)
        tokens = 0
        for rows in group_by_length([len(p) for p in prompts], settings.micro_batch_tokens):
            micro = self._collate(prompts, rows)
            seen = self.routed.probe(micro.probe, self.inputs)
            answers += self._answer(micro, seen, noise[:, rows].to(self.world.device), heat)
            features.append(seen)
            tasks += micro.tasks
            tokens += micro.token_ids.numel()
        logits = self.router(torch.cat(features, dim=1))
        loss = self.config.loss
        routes = self.objective.of_routes(logits, tasks, settings.batch_size, self.world)
        excess = excess_confidence(logits, loss.logit_bound) * len(tasks) / settings.batch_size
        routes = routes + loss.logit_penalty * excess
        routes.backward()
        sums = self.world.sum(torch.stack([answers, routes.detach()])).tolist()
        return sums[0], sums[1], tokens * self.world.size

    def _noise(self, row: int) -> torch.Tensor:
        """Give a prompt's own noise [L], whoever computes it."""
        place = self.world.rank + row * self.world.size
        rng = random.Random(f"{self.config.seed}/chances/{self.step}/{place}")
        generator = torch.Generator().manual_seed(rng.randrange(2**62))
        return logistic_noise((self.routed.num_layers,), generator)

    def _answer(
        self, micro: MicroBatch, features: torch.Tensor, noise: torch.Tensor, heat: float
    ) -> torch.Tensor:
        """Differentiate one micro-batch's answers; returns its part of the step's mean loss."""
        at = (micro.answer_rows, micro.answer_positions)
        teacher = None
        if self.objective.compares:
            with torch.no_grad():
                full = torch.ones(features.shape[:2], device=features.device)
                teacher = self.routed.logits(self.routed.forward(micro.token_ids, full)[at])
        routes = RelaxedPolicy(self.router, noise, heat).decide(features)
        hidden = self.routed.forward(micro.token_ids, routes, micro.is_tail)
        by_token = self.objective.by_token(
            self.routed.logits(hidden[at]), teacher, micro.answer_tokens
        )
        loss = mean_by_prompt(by_token, micro.answer_rows, len(micro.tasks)).sum()
        loss = loss / self.config.optimizer.batch_size
        (self.objective.weight * loss).backward()
        return loss.detach()

    def _collate(self, prompts: list[Encoded], rows: list[int]) -> MicroBatch:
        return collate(
            [prompts[row] for row in rows],
            rows,
            self.inputs,
            self.config.loss.answer_tokens,
            dense=self.config.router.dense,
        ).to(self.world.device)

    def _calibrate(self) -> None:
        """Standardise the routers' inputs on a few prompts."""
        self.router.fit(self._features())

    def _features(self) -> torch.Tensor:
        """Return what the routers see of a few prompts: [L, P, F]."""
        prompts = [self.stream[index] for index in range(_CALIBRATION_PROMPTS)]
        cut = collate_probes([p.token_ids[: p.prompt_len] for p in prompts], self.inputs)
        parts = [
            self.routed.probe(part.to(self.world.device), self.inputs)
            for part in cut.split(_PROBES_AT_ONCE)
        ]
        return torch.cat(parts, dim=1)

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
                "objective": self.objective.state_dict(),
                "elapsed": self.elapsed,
            }
            save_state(self.folder / "checkpoints", self.step, state)

    def _restore(self, state: dict[str, Any]) -> None:
        self.router.load_state_dict(state["router"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.objective.load_state_dict(state["objective"])
        self.step = state["step"]
        self.elapsed = state["elapsed"]

    def write(self) -> Path:
        """Write the router file."""
        router, layers = self.config.router, self.routed.layers
        dtypes = stored_dtypes(self.router.router)
        folded = round_for_storage(self.router.fold(dtypes["features.0"]), dtypes)
        info = RouterInfo(
            base_model=model_name(self.config.model),
            num_layers=layers.total,
            head_dim=self.routed.head_dim,
            pool_tokens=max(pool.tokens for pool in self.inputs.pools),
            probe=router.probe,
            pools=router.pools,
            context_layers=tuple(layers.number(self.inputs.context_layers)),
            widths=router.widths,
            sink_tokens=router.sink_tokens,
            window_tokens=router.window_tokens,
            sparse_pattern=router.sparse_pattern,
            full_decode_tokens=router.full_decode_tokens,
            freeing_order=layers.order(freeing_order(folded, self._features())),
            provenance=provenance(self.world.device, *self.config.data.sources)
            | {
                "config": self.config.to_dict(),
                "steps": self.step,
                "seconds": round(self.elapsed, 1),
            },
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.world.is_main:
            write_router(self.folder, layers.widen(folded), info, dtypes)
        self.world.wait()
        return self.folder / "flux_router.safetensors"


def train(config: TrainConfig) -> Path:
    """Train routers as a config says.

    Returns: path of the router file.
    """
    if config.loss.objective == "budget":
        return train_by_costs(config)
    world = start_world(config.system.device)
    tokenizer = load_tokenizer(config.model)
    routed = load_routed(
        config.model,
        config.router.sink_tokens,
        config.router.window_tokens,
        config.system,
        world,
    )
    return Trainer(config, routed, _open_stream(config, tokenizer, routed), world).run()


def _open_stream(
    config: TrainConfig, tokenizer: Any, routed: RoutedModel
) -> PromptStream | FilePrompts:
    """Open the training prompts: files, or task families."""
    limit = routed.config.max_position_embeddings
    if bool(config.data.files) == bool(config.data.tasks):
        raise ValueError(
            f"expected prompts from --data.files or made by --data.tasks, found "
            f"{'both' if config.data.files else 'neither'}; give one of them"
        )
    if config.data.files:
        return FilePrompts(config.data, tokenizer, "train", config.seed, limit)
    return PromptStream(
        config.data,
        tokenizer,
        "train",
        config.seed,
        max_model_tokens=limit,
        same_length=config.optimizer.batch_size,
    )

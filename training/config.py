"""All settings of a training or evaluation run; the command line is generated from them."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from flux_vllm.patterns import triangle
from flux_vllm.router.checkpoint import SPARSE_PATTERNS
from flux_vllm.router.inputs import RouterInputs, parse_inputs
from training.data.batching import DenseQueries
from training.data.encoding import WRAPPERS
from training.data.families import FAMILIES


def _check(good: bool, name: str, expected: str, found: object) -> None:
    if not good:
        raise ValueError(f"expected {name} to be {expected}, found {found!r}; correct --{name}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSettings:
    """What the router looks at, its size, and what SPARSE means."""

    probe: tuple[int, ...] = (128, 128)
    """First and latest prompt tokens that a probe runs over, alone, to decide all layers."""
    pools: tuple[str, ...] = ("tail:1", "length", "overlap:2048")
    """Tokens whose queries are averaged, each to one input of a layer's router: head:N, tail:N, or
    ends:N (first and latest together, the paper's). What is told of the prompt beside them: length;
    overlap:N, whether its end occurs in the latest N tokens or before them."""
    context_depths: tuple[float, ...] = (0.65,)
    """Layers whose pooled queries every router sees beside its own layer's, by depth: 0 is the
    first layer, 1 the last."""
    widths: tuple[int, ...] = (16, 16, 16, 16)
    """Outputs of a router's first four linear layers; empty: the paper's, 8H 2H 4H H for head_dim
    H."""
    sink_tokens: int = 128
    """First tokens a SPARSE layer always attends to."""
    window_tokens: int = 2048
    """Latest tokens a SPARSE layer attends to, the query's own included."""
    sparse_pattern: Literal["streaming", "triangle"] = "triangle"
    """What SPARSE means in a prompt: sinks and window, or these and everything for the prompt's
    last 128 queries."""
    full_decode_tokens: int = 0
    """First tokens of an answer for which SPARSE layers attend to everything."""
    full_bias: float = 2.0
    """Lead of the FULL logit at the start; the run begins with full attention."""

    def __post_init__(self) -> None:
        _check(
            0 <= self.sink_tokens <= self.window_tokens,
            "router.sink_tokens",
            f"between 0 and window_tokens ({self.window_tokens})",
            self.sink_tokens,
        )
        patterns = ("streaming", "triangle")
        _check(
            self.sparse_pattern in patterns,
            "router.sparse_pattern",
            f"among {patterns}, which routers can be trained under",
            self.sparse_pattern,
        )
        _check(len(self.widths) in (0, 4), "router.widths", "empty or four numbers", self.widths)
        first = self.full_decode_tokens
        _check(first >= 0, "router.full_decode_tokens", "0 or more", first)
        outside = [depth for depth in self.context_depths if not 0 <= depth <= 1]
        _check(not outside, "router.context_depths", "numbers from 0 to 1", outside)
        try:
            parse_inputs(self.pools, self.probe, ())
        except ValueError as error:
            raise ValueError(f"--router.pools and --router.probe: {error}") from error

    def inputs(self, num_layers: int) -> RouterInputs:
        """Return what the routers of a model of so many layers look at."""
        layers = [round(depth * (num_layers - 1)) for depth in self.context_depths]
        return parse_inputs(self.pools, self.probe, layers)

    @property
    def dense(self) -> DenseQueries:
        """Queries that a SPARSE layer shows everything."""
        is_triangle = self.sparse_pattern == triangle.Pattern.name
        tail = triangle.Pattern.tail_tokens if is_triangle else 0
        return DenseQueries(tail, self.full_decode_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSettings:
    """Which prompts, how long, in which mix."""

    files: tuple[str, ...] = ()
    """JSONL files of prompts, `messages` or `prompt` a line, with the model's own answers, as
    `python -m training answers` writes them."""
    tasks: tuple[str, ...] = ()
    """Built-in task families, made from text instead of read from files."""
    weights: tuple[float, ...] = ()
    """How often each family is drawn; empty means equally often (a balanced mix)."""
    corpus: str = ""
    """Text to build prompts from (`python -m training corpus`); empty: found on this machine."""
    min_tokens: int = 1024
    """Shortest prompt of a family, tokens."""
    max_tokens: int = 4096
    """Longest prompt, tokens; families draw lengths log-uniformly, longer prompts of files are cut
    in their middle."""
    max_answer_tokens: int = 64
    """Answers are cut to this many tokens."""
    wrappers: tuple[str, ...] = ("chat",)
    """What stands around the user's turn: chat (the model's template), plain, instruction,
    dialogue."""
    open_fraction: float = 0.0
    """Share of training prompts whose answer is not begun for the model: the first words of the
    answer, which prompts end with, become part of the answer. Evaluation asks all open."""
    workers: int = 4
    """Processes that make prompts; 0: in the main process."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.tasks) - FAMILIES.keys())
        _check(not unknown, "data.tasks", f"among {sorted(FAMILIES)}", unknown)
        unknown = sorted(set(self.wrappers) - set(WRAPPERS))
        _check(bool(self.wrappers) and not unknown, "data.wrappers", f"among {WRAPPERS}", unknown)
        _check(
            len(self.weights) in (0, len(self.tasks)),
            "data.weights",
            f"empty or {len(self.tasks)} numbers, one a task",
            self.weights,
        )
        _check(
            not self.tasks or 256 <= self.min_tokens <= self.max_tokens,
            "data.min_tokens",
            f"between 256 and max_tokens ({self.max_tokens})",
            self.min_tokens,
        )

    @property
    def sources(self) -> tuple[str, ...]:
        """Files that prompts are read or made from."""
        return (*self.files, *([self.corpus] if self.corpus else []))


@dataclass(frozen=True, slots=True, kw_only=True)
class RelaxationSettings:
    """How the hard choice is made differentiable."""

    temperature_start: float = 1.5
    """Gumbel-softmax temperature at the first step."""
    temperature_end: float = 1.0
    """Temperature after the schedule."""
    schedule_fraction: float = 0.6
    """Share of the steps over which a cosine leads from one to the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSettings:
    """What is minimised."""

    objective: Literal["budget", "online", "paper"] = "budget"
    """`budget`: the fewest FULL layers whose divergence from full attention stays within
    budget_nats, by costs measured once; `online`: the same by sampled routes, the model running at
    every update, which takes many times the prompts; `paper`: cross-entropy on the answers, and a
    share of SPARSE layers for each task (`targets`)."""
    budget_nats: float = 0.05
    """Mean KL(full attention || routed) on answers that routes may cost, nats a token."""
    budget_share: float = 0.2
    """Most of what all SPARSE would cost that the budget may be (objective `budget`): a model that
    loses little by SPARSE would be routed SPARSE altogether by nats alone."""
    answer_tokens: int = 128
    """Most answer tokens of a prompt that the loss looks at, evenly spaced."""
    multiplier_rate: float = 0.02
    """Step of the multipliers' gradient ascent, per training step."""
    logit_bound: float = 4.0
    """Lead of one logit over the other beyond which `logit_penalty` applies: a surer router
    explores nothing and gets no gradient."""
    logit_penalty: float = 0.01
    """Weight of the squared excess over `logit_bound`, summed over layers."""
    targets: tuple[str, ...] = ()
    """Of the objective `paper`: share of SPARSE layers to reach, as task=share or group=share;
    others keep their family's own."""

    def __post_init__(self) -> None:
        _check(self.budget_nats > 0, "loss.budget_nats", "above 0", self.budget_nats)
        is_share = 0 < self.budget_share <= 1
        _check(is_share, "loss.budget_share", "above 0 and at most 1", self.budget_share)


@dataclass(frozen=True, slots=True, kw_only=True)
class CostSettings:
    """What SPARSE costs prompts (objective `budget`), measured once and kept in --out."""

    prompts: int = 0
    """Most prompts to measure; 0: all of the files, but for those of the test split; -1: none, to
    fit to what --out holds."""
    sampled_share: float = 0.5
    """Of the prompts, with sampled routes and slopes, which take as long as all the rest."""
    input_noise: float = 1.0
    """Noise on what the routers see, in deviations of it over prompts."""
    need_weight: float = 1.0
    """Weight of the guess, from the same view, of what all SPARSE would cost: a denser signal."""
    most_nats: float = 1.0
    """A prompt's divergence counts for at most this much: an answer is lost once."""
    length_power: float = 0.5
    """What a prompt's FULL layers count: its tokens beyond sinks and window, to this power. 0: all
    prompts alike, so that SPARSE goes to short ones, which lose least by it and gain nothing; 1: by
    the keys that SPARSE does not read, so that it goes to the longest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSettings:
    """How the routers are updated."""

    steps: int = 300
    """Training steps."""
    batch_size: int = 48
    """Prompts a step, over all processes."""
    learning_rate: float = 5e-4
    """AdamW's, at its peak."""
    warmup_fraction: float = 0.05
    """Share of the steps with a rising rate."""
    final_rate: float = 0.1
    """Rate at the end, as a share of the peak; a cosine leads there."""
    weight_decay: float = 0.01
    """AdamW's."""
    gradient_norm: float = 1.0
    """Gradients are clipped to this norm."""
    micro_batch_tokens: int = 32768
    """Tokens computed at once on one device, padding included."""
    time_limit_s: float = 0.0
    """End the schedule early so that training takes about this long; 0: no limit. A run with a
    limit is not reproducible step for step. With the objective `budget`: measure nothing more
    after this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemSettings:
    """Devices, logs, checkpoints."""

    device: str = "auto"
    """`auto`, `cpu` or `cuda`."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the frozen model."""
    sparse_kernel: Literal["auto", "flex", "sdpa"] = "auto"
    """How SPARSE attention is computed; auto: flex on a GPU, sdpa on the CPU."""
    compile_layers: bool = False
    """Compile the frozen model's norms and MLPs: fewer passes over memory, half a minute at the
    start; results change within rounding."""
    checkpoint_layers: bool = False
    """Recompute activations layer by layer: memory for a third more work."""
    shard_model: bool = False
    """Shard the frozen model over the processes (FSDP2)."""
    save_every: int = 50
    """Steps between training checkpoints; at most this much is lost to a kill."""
    resume: bool = True
    """Go on from the checkpoint in --out if there is one."""
    tensorboard: bool = False
    """Write TensorBoard events beside the JSON lines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One training run."""

    model: str
    """Folder or name of the language model, as transformers takes it."""
    out: str
    """Folder for the router, logs and checkpoints."""
    seed: int = 0
    """Of data, noise and initial weights."""
    router: RouterSettings = field(default_factory=RouterSettings)
    data: DataSettings = field(default_factory=DataSettings)
    relaxation: RelaxationSettings = field(default_factory=RelaxationSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    costs: CostSettings = field(default_factory=CostSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    system: SystemSettings = field(default_factory=SystemSettings)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for provenance."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """One evaluation."""

    model: str
    """Folder or name of the language model."""
    router: str
    """Router file or folder."""
    out: str
    """Folder for `quality.json`, per-prompt scores and plots."""
    scores: str = ""
    """Folder of stored scores: an interrupted evaluation goes on from there, and routers that
    share it share the static baselines; empty: `stored_scores` in --out."""
    seed: int = 1
    """Of the prompts."""
    data: DataSettings = field(default_factory=lambda: DataSettings(tasks=tuple(FAMILIES)))
    """Task families, text and wrappers."""
    lengths: tuple[int, ...] = (1536, 3072, 5120, 8000)
    """Length buckets, tokens."""
    prompts: int = 400
    """Prompts a task and length."""
    validation_prompts: int = 40
    """Prompts a task and length on which thresholds and static patterns are chosen; 0: neither, so
    that score_thresholds are scored alone."""
    validation_lengths: tuple[int, ...] = ()
    """Length buckets of those; empty: the test's."""
    thresholds: tuple[float, ...] = (
        0.001, 0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97, 0.99, 0.999,
    )  # fmt: skip
    """Values of `threshold` (FULL where P(FULL) reaches it) tried on validation prompts."""
    shares: tuple[float, ...] = (0.6, 0.75, 0.85)
    """Least shares of SPARSE layers; the lowest threshold that reaches each is scored on test
    prompts. Empty: none is tried."""
    score_thresholds: tuple[float, ...] = ()
    """Thresholds fixed beforehand, scored on test prompts too."""
    random_patterns: int = 30
    """Random static patterns beside the greedy one."""
    static_layers: tuple[int, ...] = ()
    """Layers of a static pattern of your own, SPARSE for every prompt, which is scored too."""
    variants: tuple[str, ...] = ()
    """Extra conditions at threshold 0.5: plain, begun (prompts end with the answer's first
    words), wording (paraphrased instructions), wrapper:NAME. `prompts` also knows cached: questions
    with a local one on the same context before each."""
    variant_prompts: int = 100
    """Prompts a task and length for each of these."""
    patterns: tuple[str, ...] = ()
    """Sparse patterns under which the router at threshold 0.5 and all SPARSE are compared;
    streaming, triangle or xattention; empty: the router's own, which all else is scored under."""
    system: SystemSettings = field(default_factory=SystemSettings)
    micro_batch_tokens: int = 65536
    """Tokens computed at once, padding included."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.patterns) - set(SPARSE_PATTERNS))
        _check(not unknown, "patterns", f"among {list(SPARSE_PATTERNS)}", unknown)
        outside = [value for value in self.score_thresholds if not 0 <= value <= 1]
        _check(not outside, "score_thresholds", "numbers from 0 to 1", outside)
        count = self.validation_prompts
        _check(count >= 0, "validation_prompts", "no less than 0", count)
        wanted = "at least 1 where --shares has thresholds chosen (leave its values out)"
        _check(count > 0 or not self.shares, "validation_prompts", wanted, count)


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderConfig:
    """The order in which a server frees layers, put into a router file that says none."""

    model: str = ""
    """Folder or name of the language model."""
    router: str = ""
    """Router file or folder."""
    out: str = ""
    """Folder for the router file with its order; everything else in it stays as it is."""
    seed: int = 0
    """Of the prompts' order."""
    data: DataSettings = field(default_factory=DataSettings)
    """Files of prompts, of which the training split is looked at."""
    prompts: int = 256
    """Prompts to look at."""
    system: SystemSettings = field(default_factory=SystemSettings)


@dataclass(frozen=True, slots=True, kw_only=True)
class DivergenceConfig:
    """One comparison of routers and static patterns with full attention, on prompts from files."""

    model: str = ""
    """Folder or name of the language model."""
    router: str = ""
    """Router file or folder; it also says what SPARSE means."""
    out: str = ""
    """Folder for `divergence.json` and, by prompt, `divergence.npz`."""
    seed: int = 0
    """Of random patterns."""
    data: DataSettings = field(default_factory=DataSettings)
    """Files of prompts."""
    prompts: int = 400
    """Prompts of the test split to measure on."""
    search_prompts: int = 48
    """Prompts of the training split on which static patterns are searched; 0: none is."""
    thresholds: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
    """Thresholds of the router."""
    shares: tuple[float, ...] = (0.5, 0.6, 0.75)
    """Shares of SPARSE layers to search static patterns for."""
    random_patterns: int = 12
    """Variations of the best pattern found that are tried for each share."""
    answer_tokens: int = 128
    """Most answer tokens of a prompt to look at, evenly spaced."""
    system: SystemSettings = field(default_factory=SystemSettings)
    micro_batch_tokens: int = 65536
    """Tokens computed at once, padding included."""

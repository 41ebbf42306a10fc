"""What a training job of stage 2 will need, before a GPU is paid for: memory, traffic, operations, the floor of a step.

All of it is counted from the shapes, for the job that ``dalle.train.sharding`` lays out (paper 2.4, 2.5, App. D and E):
each resblock's matrices sharded over the GPUs of a machine and gathered for use, embeddings and unembeddings sharded
in 32 bit, gains and biases whole, PowerSGD between machines. ``dalle.plan_check`` steps the real model under a fake
process group and compares.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from dalle.config import DALLEConfig
from dalle.errors import UserError
from dalle.train.collectives import sent_bytes
from dalle.transformer import mask_schedule
from dalle_kernels import AttentionPattern

GPU, MACHINE, WORLD = "gpu", "machine", "world"
"""The groups that collectives run in: a machine's GPUs, one ordinal's GPU of every machine, all processes."""

CODE_BYTES = 2
"""Of an element in 1-6-9 or 0-6-10."""

LOGITS_AT_ONCE = 1 << 21
"""Elements of a chunk of logits in ``linear_cross_entropy``'s definition, beside as many gradients."""


class Precision(NamedTuple):
    """Bytes of an element of a resblock's matrices: ``stored`` between updates, ``working`` when gathered, in its
    gradient and in activations, ``moments`` both of Adam's; and ``input`` of what a resblock keeps of its input for the
    backward. Everything else is in 32 bit."""

    stored: int
    working: int
    moments: int
    input: int


PRECISIONS = {
    "paper": Precision(2, 2, 2 * CODE_BYTES, 2),
    "mixed": Precision(4, 2, 8, 4),
    "float32": Precision(4, 4, 8, 4),
}
"""``paper``: parameters in 16 bit, moments in 1-6-9 and 0-6-10. ``mixed``: both in fp32, work in 16 bit by autocast."""


@dataclass(frozen=True)
class Hardware:
    """What a GPU can do, in decimal units. The defaults are the paper's V100 of 16 GiB by its data sheet (NVLink in one
    direction), and machines with 100 Gbit/s between them, which is an assumption: the paper does not say."""

    peak_tflops: float = 125.0
    memory: float = 17.18
    memory_bandwidth: float = 900.0
    link: float = 150.0
    network: float = 12.5

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not 0 < value < math.inf:
                raise UserError(f"{field.name}: expected a positive number, got {value!r}")


@dataclass(frozen=True)
class Job:
    """A training job: ``batch`` images an update over ``machines`` x ``gpus`` GPUs.

    ``rank`` is PowerSGD's, summed over a machine's GPUs, 0 for none; the default is the paper's for this width, none on
    one machine. ``checkpoint``: whether resblocks are computed again in the backward.
    """

    config: DALLEConfig
    machines: int = 1
    gpus: int = 1
    batch: int = 1
    rank: int | None = None
    precision: str = "paper"
    checkpoint: bool = True

    def __post_init__(self) -> None:
        for name in ("machines", "gpus", "batch"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{name}: expected a whole number of at least 1, got {value!r}")
        if self.precision not in PRECISIONS:
            raise UserError(f"precision: expected one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.batch % (self.machines * self.gpus):
            raise UserError(
                f"batch: expected a multiple of the {self.machines} x {self.gpus} GPUs, got {self.batch} images"
            )
        for matrix in (matrix for block in resblocks(self.config)[:2] for matrix in block.matrices):
            if matrix.rows % self.gpus or matrix.columns % self.gpus:
                raise UserError(
                    f"gpus: expected both sides of {matrix.name}, {matrix.rows} x {matrix.columns}, to be multiples of "
                    f"the GPUs of a machine, got {self.gpus}"
                )
        if self.rank is None:
            object.__setattr__(self, "rank", paper_rank(self.config.dim, self.gpus) if self.machines > 1 else 0)
        if not isinstance(self.rank, int) or self.rank < 0 or self.rank % self.gpus:
            raise UserError(f"rank: expected a multiple of the {self.gpus} GPUs of a machine, got {self.rank!r}")
        if self.rank and self.machines == 1:
            raise UserError("rank: expected 0 on one machine, for PowerSGD compresses what goes between machines")

    @property
    def images_per_gpu(self) -> int:
        return self.batch // (self.machines * self.gpus)

    def group_size(self, group: str) -> int:
        """Processes in a group that a :class:`Traffic` names."""
        return {GPU: self.gpus, MACHINE: self.machines, WORLD: self.machines * self.gpus}[group]

    @property
    def bytes(self) -> Precision:
        return PRECISIONS[self.precision]


def paper_rank(dim: int, gpus: int) -> int:
    """The paper's 896 at width 3968, in proportion, as a positive multiple of ``gpus``."""
    return gpus * max(1, round(896 / 3968 * dim / gpus))


class Matrix(NamedTuple):
    """A matrix [rows, columns] as ``nn.Linear`` holds it, sharded on ``axis``."""

    name: str
    rows: int
    columns: int
    axis: int

    @property
    def size(self) -> int:
        return self.rows * self.columns

    def shard(self, gpus: int) -> tuple[int, int]:
        """The sides of one GPU's shard, the shorter first, as PowerSGD turns it."""
        sides = [self.rows, self.columns]
        sides[self.axis] //= gpus
        return min(sides), max(sides)


class Resblock(NamedTuple):
    """``matrices`` [out, in], elements of the gains and biases in ``vectors``."""

    kind: str
    matrices: tuple[Matrix, ...]
    vectors: int

    @property
    def size(self) -> int:
        return sum(matrix.size for matrix in self.matrices)

    def factor_sizes(self, gpus: int, rank: int) -> tuple[int, int]:
        """Elements of P, and of Q, of one GPU's shards, at ``rank`` over all GPUs of a machine."""
        shards = [matrix.shard(gpus) for matrix in self.matrices]
        ranks = [min(rank // gpus, shorter) for shorter, _ in shards]
        return tuple(sum(side * rank for side, rank in zip(sides, ranks)) for sides in zip(*shards))


def resblocks(config: DALLEConfig) -> list[Resblock]:
    """The resblocks of the model in order. Query, key and value are matrices of their own, as PowerSGD sees them."""
    dim, inner = config.dim, config.heads * config.head_dim
    attention = Resblock(
        "attention",
        (*(Matrix(name, inner, dim, 0) for name in ("query", "key", "value")), Matrix("projection", dim, inner, 0)),
        2 * dim + 3 * inner + dim,
    )
    mlp = Resblock(
        "mlp", (Matrix("expansion", 4 * dim, dim, 0), Matrix("contraction", dim, 4 * dim, 1)), 2 * dim + 4 * dim + dim
    )
    return [attention, mlp] * config.layers


def outer_shapes(config: DALLEConfig) -> list[tuple[int, ...]]:
    """The parameters outside the resblocks: embeddings, the last norm, unembeddings."""
    height, width = config.grid
    text = config.text_vocab_size + config.text_len
    lengths = (text, config.text_len, config.image_vocab_size, height, width, text, config.image_vocab_size)
    return [(config.dim,)] * 3 + [(length, config.dim) for length in lengths]


def outer_size(config: DALLEConfig, gpus: int = 1) -> int:
    """Elements of :func:`outer_shapes`, the first axis of each padded to a multiple of ``gpus``."""
    return sum(math.ceil(first / gpus) * gpus * math.prod(rest) for first, *rest in outer_shapes(config))


def parameter_count(config: DALLEConfig) -> int:
    """Parameters of the whole model."""
    return sum(block.size + block.vectors for block in resblocks(config)) + outer_size(config)


def compression_rate(config: DALLEConfig, gpus: int, rank: int) -> float:
    """The share of a resblock's gradient elements that PowerSGD does not send: at 8 GPUs 1 - 5r/(8d) (paper App. E)."""
    blocks = resblocks(config)[:2]
    factors = sum(sum(block.factor_sizes(gpus, rank)) for block in blocks)
    return 1 - factors / (sum(block.size for block in blocks) // gpus)


class Traffic(NamedTuple):
    """What one GPU passes to collectives of one kind in an update.

    ``bytes`` counts the whole buffer of each call: what an all-gather yields, a reduce-scatter or an all-to-all takes,
    an all-reduce works on.
    """

    purpose: str
    kind: str
    group: str
    calls: int
    bytes: int

    def sent(self, size: int) -> float:
        """Bytes that each member of a group of ``size`` sends, by the ring algorithms, which send the fewest."""
        return sent_bytes(self.kind, self.bytes, size)


class Work(NamedTuple):
    """Of one GPU in one update: operations that the model needs, operations with what is computed twice and what
    PowerSGD takes, bytes between the GPU and its memory."""

    model_flops: int
    flops: int
    bytes: int


@dataclass(frozen=True)
class Plan:
    """What :func:`plan` found. ``memory`` is in bytes a GPU by part, ``seconds`` what each resource needs at least."""

    job: Job
    hardware: Hardware
    memory: dict[str, int]
    traffic: list[Traffic]
    work: Work
    seconds: dict[str, float]

    @property
    def compression_rate(self) -> float:
        return compression_rate(self.job.config, self.job.gpus, self.job.rank) if self.job.rank else 0.0

    @property
    def memory_at_once(self) -> int:
        """Bytes of a GPU's memory that are in use at any time, at most. A backward frees the resblocks' inputs while it
        makes their gradients, or the factors of these, so never are all of both there."""
        inputs, *made = (
            self.memory.get(part, 0)
            for part in ("inputs of resblocks", "gradients of resblocks", "factors of gradients")
        )
        return sum(self.memory.values()) - min(inputs, sum(made))

    @property
    def floor(self) -> float:
        """Seconds that an update takes at least, even if everything overlaps."""
        return max(self.seconds.values())

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "job": {**dataclasses.asdict(self.job), "config": self.job.config.to_dict()},
            "hardware": dataclasses.asdict(self.hardware),
            "parameters": parameter_count(self.job.config),
            "memory": self.memory,
            "memory_at_once": self.memory_at_once,
            "traffic": [traffic._asdict() for traffic in self.traffic],
            "work": self.work._asdict(),
            "seconds": self.seconds,
            "floor_seconds": self.floor,
            "compression_rate": self.compression_rate,
        }


def plan(job: Job, hardware: Hardware | None = None) -> Plan:
    """Count all of it for ``job``."""
    hardware = hardware or Hardware()
    traffic = plan_traffic(job)
    work = plan_work(job)
    seconds = {
        "operations": work.flops / (hardware.peak_tflops * 1e12),
        "memory traffic": work.bytes / (hardware.memory_bandwidth * 1e9),
        "links in a machine": link_bytes(job, traffic) / (hardware.link * 1e9),
        "network": network_bytes(job, traffic) / (hardware.network * 1e9),
    }
    return Plan(job, hardware, plan_memory(job), traffic, work, seconds)


def link_bytes(job: Job, traffic: list[Traffic]) -> float:
    """Bytes that a GPU sends to others of its machine in an update."""
    return sum(item.sent(job.gpus) for item in traffic if item.group != MACHINE)


def network_bytes(job: Job, traffic: list[Traffic]) -> float:
    """Bytes that a machine sends to others. What all processes share crosses over once a machine, summed there."""
    copies = {GPU: 0, MACHINE: job.gpus, WORLD: 1}
    return sum(copies[item.group] * item.sent(job.machines) for item in traffic)


def plan_memory(job: Job) -> dict[str, int]:
    """Bytes of a GPU's memory by part: together more than is ever there, see :attr:`Plan.memory_at_once`."""
    config, size = job.config, job.bytes
    blocks = resblocks(config)
    matrices = sum(block.size for block in blocks) // job.gpus
    vectors = sum(block.vectors for block in blocks)
    outer = outer_size(config, job.gpus)
    single = outer // job.gpus + vectors
    largest = max(block.size for block in blocks)
    rows = job.images_per_gpu * (config.text_len + config.image_len)
    activations = [block_activations(config, block.kind, size) * job.images_per_gpu for block in blocks]
    factors = [block.factor_sizes(job.gpus, job.rank) for block in blocks]
    # Of one resblock: its gradient as the GPUs have summed it, errors and what is subtracted from them in fp32, the
    # factors in fp32 and as codes.
    numbers = (2 * 4 + size.working) * largest // job.gpus
    compression = numbers + max(map(sum, factors)) * (4 + CODE_BYTES) if job.rank else 0
    memory = {
        "parameters of resblocks": matrices * size.stored,
        "parameters in 32 bit": single * 4,
        # Compressed they are kept as P, orthogonal, and the codes of Q.
        "gradients of resblocks": 0 if job.rank else matrices * size.stored,
        "factors of gradients": sum(4 * shorter + CODE_BYTES * longer for shorter, longer in factors),
        "gradients in 32 bit": single * 4,
        "moments of resblocks": matrices * size.moments,
        "moments in 32 bit": single * 8,
        "gathered resblocks, two": sum(block.size for block in blocks[:2]) * size.working,
        "gathered embeddings": outer * 4,
        "gradient of a resblock": largest * size.working,
        "gradients of embeddings": outer * 4,
        "error buffers": matrices * CODE_BYTES if job.rank else 0,
        "fixed Q": sum(longer for _, longer in factors) * CODE_BYTES,
        "compression of a resblock": compression,
        "inputs of resblocks": rows * config.dim * size.input * len(blocks),
        "activations of resblocks": max(activations) if job.checkpoint else sum(activations),
        "logits, a chunk": 2 * 4 * LOGITS_AT_ONCE,
    }
    return {part: count for part, count in memory.items() if count}


def block_activations(config: DALLEConfig, kind: str, size: Precision) -> int:
    """Bytes that a resblock keeps of one image for its backward, beside its input."""
    rows, dim, inner = config.text_len + config.image_len, config.dim, config.heads * config.head_dim
    # The norm's statistics and, where its input is kept in 16 bit, that in the 32 that it computes in.
    norm = 2 * 4 + (4 * dim if size.input < 4 else 0)
    if kind == "attention":  # the norm's result, query, key, value, what attention makes, its log-sum-exp
        return rows * (norm + (dim + 4 * inner) * size.working + 4 * config.heads)
    return rows * (norm + (dim + 8 * dim) * size.working)  # the norm's result, the hidden layer before and after GELU


def plan_traffic(job: Job) -> list[Traffic]:
    """The collectives of an update (paper 2.5), in the order in which they begin, without those of one process."""
    blocks = resblocks(job.config)
    whole, vectors = sum(block.size for block in blocks) * job.bytes.working, sum(block.vectors for block in blocks)
    outer = outer_size(job.config, job.gpus) * 4
    uncompressed = Traffic("gradients of resblocks", "all_reduce", MACHINE, len(blocks), whole // job.gpus)
    # In 16 bit each resblock has its own, of which the loss scales learn.
    norms = len(blocks) if job.bytes.stored < 4 else 1
    norm = [Traffic("norm of the gradients", "all_reduce", group, 1, 4 * norms) for group in (GPU, MACHINE)]
    traffic = [
        Traffic("embeddings", "all_gather", GPU, 1, outer),
        Traffic("parameters of resblocks, forward", "all_gather", GPU, len(blocks), whole),
        Traffic("parameters of resblocks, backward", "all_gather", GPU, len(blocks), whole),
        Traffic("gradients of resblocks", "reduce_scatter", GPU, len(blocks), whole),
        *(_factor_traffic(job) if job.rank else [uncompressed]),
        Traffic("gradients of embeddings", "reduce_scatter", GPU, 1, outer),
        Traffic("gradients of embeddings", "all_reduce", MACHINE, 1, outer // job.gpus),
        Traffic("gradients of gains and biases", "all_reduce", WORLD, 1, vectors * 4),
        *(norm if job.rank else []),
    ]
    return [item for item in traffic if job.group_size(item.group) > 1]


def _factor_traffic(job: Job) -> list[Traffic]:
    """The grouped all-reduces in 1-6-9 of P and of Q: codes to who sums them, an all-to-all, and the sums to all.

    Each matrix adds one code, whether it is finite; machines take equal parts.
    """
    calls: dict[str, list[int]] = {"P": [], "Q": []}
    for block in resblocks(job.config):
        for factor, size in zip(calls, block.factor_sizes(job.gpus, job.rank)):
            part = math.ceil((size + len(block.matrices)) / job.machines)
            calls[factor].append(part * job.machines * CODE_BYTES)
    return [
        Traffic(f"{factor} in 1-6-9", kind, MACHINE, len(sizes), sum(sizes))
        for factor, sizes in calls.items()
        for kind in ("all_to_all", "all_gather")
    ]


def forward_flops(config: DALLEConfig) -> tuple[int, int, int]:
    """Operations of the forward of one image: products with weights, attention, logits. A multiply-add counts two.

    Attention counts the (query, key) pairs that the patterns let see each other.
    """
    rows = config.text_len + config.image_len
    pairs = sum(
        AttentionPattern(kind, config.text_len + 1, config.grid, config.kernel_size).pairs(rows)
        for kind in mask_schedule(config.layers)
    )
    products = 2 * rows * sum(block.size for block in resblocks(config))
    text_classes = config.text_vocab_size + config.text_len
    logits = 2 * config.dim * (config.text_len * text_classes + config.image_len * config.image_vocab_size)
    return products, 4 * config.heads * config.head_dim * pairs, logits


def model_flops(config: DALLEConfig) -> int:
    """Operations that training on one image needs: three forwards' worth, nothing computed twice. The share of a GPU's
    peak is counted by these."""
    return 3 * sum(forward_flops(config))


def plan_work(job: Job) -> Work:
    """Operations and bytes of memory traffic of one GPU in one update."""
    products, attention, logits = forward_flops(job.config)
    again = int(job.checkpoint)
    # Attention's backward computes the scores anew: five products where the forward has two.
    flops = products * (3 + again) + attention * (7 + 2 * again) // 2 + logits * 3
    return Work(
        job.images_per_gpu * model_flops(job.config),
        job.images_per_gpu * flops + _compression_flops(job),
        _memory_traffic(job),
    )


def _compression_flops(job: Job) -> int:
    """E Q, E' P, P Q' for the error buffer and again for the step, and an orthonormal basis of P by Householder."""
    total = 0
    for matrix in (matrix for block in resblocks(job.config) for matrix in block.matrices):
        shorter, longer = matrix.shard(job.gpus)
        rank = min(job.rank // job.gpus, shorter)
        total += 8 * shorter * longer * rank + 4 * shorter * rank**2
    return total


def _memory_traffic(job: Job) -> int:
    """Bytes to and from a GPU's memory if every array is moved once for each use and stays in no cache."""
    config, size, again = job.config, job.bytes, int(job.checkpoint)
    blocks = resblocks(config)
    whole = sum(block.size for block in blocks)
    outer = outer_size(config, job.gpus)
    single = outer // job.gpus + sum(block.vectors for block in blocks)
    # Gathered twice; read by the forward, once more where it is computed again, and by the backward; a gradient
    # written and read.
    weights = whole * size.working * (6 + again) + outer * 4 * 4
    # Written and read by the forward, again likewise; in the backward read, their gradients written and read.
    inside = sum(block_activations(config, block.kind, size) for block in blocks) * (5 + 2 * again)
    stream = len(blocks) * (config.text_len + config.image_len) * config.dim * 4 * (4 + again)
    # Parameters, moments and gradients read and written. The error buffer: gradient added, two products, the result
    # subtracted, all but the products read and written.
    gradient = 2 * size.stored + (6 * CODE_BYTES if job.rank else 0)
    update = whole // job.gpus * (2 * (size.stored + size.moments) + gradient) + single * 4 * 8
    return weights + job.images_per_gpu * (inside + stream) + update

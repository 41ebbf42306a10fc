"""PowerSGD: orthogonalization against torch's decompositions, and the whole hook of DDP against torch's powerSGD_hook.

The hooks run in a world of one process, so that nothing is sent: what is timed is all that they do besides.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from harness import OURS, Candidate, Case, Goal, Unavailable
from torch import Tensor, nn

from dalle_kernels import PowerSGD, decode_fp169, orthogonalize
from dalle_kernels.powersgd.compression import fixed_gaussian
from dalle_kernels.powersgd.reference import Simulation
from dalle_kernels.testing import GradientBucket, assert_accurate

QR, GRAM_SCHMIDT = "torch.linalg.qr", "torch's PowerSGD, Gram-Schmidt"
TORCHS_HOOK, BATCHED = "torch's powerSGD_hook", "torch's powerSGD_hook, equal shapes batched"
GOALS = [Goal("speed", 5, QR), Goal("speed", 20, GRAM_SCHMIDT)]
"""On a GPU, from rank 512 on; on a CPU ours is LAPACK's as well."""


def with_positive_diagonal(Q: Tensor, R: Tensor) -> Tensor:
    return Q * torch.where(R.diagonal() < 0, -1.0, 1.0)


def gram_schmidt(P: Tensor) -> Candidate | Unavailable:
    try:
        from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
    except ImportError as error:
        return Unavailable(GRAM_SCHMIDT, str(error))
    matrices = P.unsqueeze(0).clone()
    return Candidate(
        GRAM_SCHMIDT,
        lambda: powerSGD_hook._orthogonalize_gram_schmidt(matrices, epsilon=1e-8),
        before=lambda: matrices.copy_(P),  # it works in place
        note="loses orthogonality by the condition",
    )


@pytest.mark.parametrize(
    ("rows", "rank"), [(3968, 112), (3968, 512), (3968, 896), (15872, 512), (15872, 896), (16384, 1024)]
)
def test_orthogonalize(side_by_side, device, rows, rank):
    P = torch.randn(rows, rank, device=device)

    def check() -> None:
        plain, exact = (with_positive_diagonal(*torch.linalg.qr(tensor)) for tensor in (P, P.double()))
        actual, identity = orthogonalize(P, eps=0.0), torch.eye(rank, dtype=torch.float64, device=device)
        assert_accurate(actual, plain, exact, f"Q of {rows} x {rank}")
        losses = [Q.double().mT @ Q.double() for Q in (actual, plain)]
        assert_accurate(*losses, identity, "its orthogonality")

    side_by_side(
        Case(
            family="powersgd",
            work="orthogonalize",
            dtype=torch.float32,
            settings={"rows": rows, "rank": rank},
            ours=Candidate(OURS, lambda: orthogonalize(P)),
            rivals=[Candidate(QR, lambda: torch.linalg.qr(P)), gram_schmidt(P)],
            check=check,
            goals=GOALS if device == "cuda" and rank >= 512 else [],
            operations=4 * rows * rank**2 - 4 * rank**3 / 3,
            memory=False,
            seconds=4,
        )
    )


def resblocks(dim: int, gpus: int, device: str) -> nn.ModuleDict:
    """The matrices of an attention and an MLP resblock, or what one of a machine's GPUs holds of each."""
    shapes = dict.fromkeys(("q", "k", "v", "proj"), (dim // gpus, dim))
    shapes |= {"up": (4 * dim // gpus, dim), "down": (dim, 4 * dim // gpus)}
    layers = {name: nn.Linear(*reversed(shape), bias=False, device=device) for name, shape in shapes.items()}
    return nn.ModuleDict(layers)


def torchs_hook(name: str, bucket: GradientBucket, own: Tensor, rank: int, **settings) -> Candidate | Unavailable:
    try:
        from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
    except ImportError as error:
        return Unavailable(name, str(error))
    state = powerSGD_hook.PowerSGDState(None, rank, start_powerSGD_iter=2, min_compression_rate=0.5, **settings)
    state.iter = 2
    return Candidate(
        name,
        lambda: powerSGD_hook.powerSGD_hook(state, bucket).wait(),
        before=lambda: bucket.buffer().copy_(own),
        same_function=False,
        note="warm start, all in the gradients' dtype, no norm and no check for nonfinite numbers; "
        "still calls the collectives of its one process, which ours leaves out",
    )


@pytest.fixture(scope="module")
def world_of_one(request, tmp_path_factory):
    backend = "nccl" if request.config.getoption("--device") == "cuda" else "gloo"
    store = dist.FileStore(str(tmp_path_factory.mktemp("world") / "store"), 1)
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("dim", "gpus", "rank"), [(512, 1, 64), (1024, 1, 128), (1920, 8, 512), (3968, 8, 896), (1920, 1, 512)]
)
def test_hook(side_by_side, device, world_of_one, dim, gpus, rank):
    model = resblocks(dim, gpus, device)
    parameters = list(model.parameters())
    own = 0.01 * torch.randn(sum(parameter.numel() for parameter in parameters), device=device)
    powersgd, bucket = PowerSGD(model, rank // gpus), GradientBucket(parameters, own.clone())

    def run() -> Tensor:
        return PowerSGD.ddp_hook(powersgd, bucket).wait()

    def check() -> None:
        names = [shard.name for shard in powersgd.shards]
        fixed = {s.name: decode_fp169(fixed_gaussian(s, rank // gpus, 0))[0] for s in powersgd.shards}
        plain, exact = Simulation(1, fixed, torch.float32, coded=True), Simulation(1, fixed)
        for _ in range(2):  # the second has errors fed back
            bucket.buffer().copy_(own)
            gradients = [dict(zip(names, map(Tensor.clone, bucket.gradients())))]
            expected, unrounded = (simulation.update(gradients, {})[0] for simulation in (plain, exact))
            run()
            found = dict(zip(names, bucket.gradients()))
            for name in names:
                assert_accurate(found[name], expected[name], unrounded[name], f"{name} of {dim} / {gpus}")

    side_by_side(
        Case(
            family="powersgd",
            work="hook",
            dtype=torch.float32,
            settings={"dim": dim, "gpus": gpus, "rank": rank},
            ours=Candidate(OURS, run, before=lambda: bucket.buffer().copy_(own)),
            rivals=[
                torchs_hook(TORCHS_HOOK, GradientBucket(parameters, own.clone()), own, rank // gpus),
                torchs_hook(
                    BATCHED,
                    GradientBucket(parameters, own.clone()),
                    own,
                    rank // gpus,
                    batch_tensors_with_same_shape=True,
                ),
            ],
            check=check,
            goals=[Goal("speed", 3, TORCHS_HOOK), Goal("speed", 3, BATCHED)] if device == "cuda" else [],
            seconds=4,
        )
    )

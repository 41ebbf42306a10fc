"""Arguments of wrong types: every public function names them in one sentence, and only once it has failed."""

from __future__ import annotations

import inspect
import pickle
from collections import defaultdict
from collections.abc import Iterable, Sequence

import pytest
import torch
from test_decode_layers import draw_layers

import dalle_kernels
from dalle_kernels import AttentionPattern, KVCache, LayerWeights
from dalle_kernels._arguments import names_wrong_types

PATTERN = AttentionPattern("row", 3, (4, 4), 3)
WRONG = (None, "a", 1.5, [1.5], {}, object())
CHECKED_WITHIN = {"AttentionPattern", "encode_fp0610", "encode_fp169", "use"}
"""They check every argument themselves, or are one call of another public function."""
BY_TORCH = ("optimizer can only optimize Tensors", "optimizer got an empty parameter list", "Expected one of cpu")
BY_MEANING = defaultdict(tuple)
"""What sentences say that name no argument."""
BY_MEANING |= {
    ("explain", "op"): ("an op among",),
    ("squared_norms", "blocks"): ("expected Tensor as element 0",),
    ("AdamW16", "params"): BY_TORCH,
}


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


def calls() -> dict[str, dict[str, object]]:
    """Arguments that serve, of every public function and module that takes any."""
    cache = KVCache(PATTERN, 2, 2, 8)
    layers = [LayerWeights(*layer) for layer in draw_layers(16, 2, 8, 32, torch.float32, 1)]
    block = torch.nn.Linear(4, 4, dtype=torch.float16)
    heads = {name: randn(1, 2, PATTERN.seq_len, 8) for name in ("q", "k", "v")}
    step = {name: randn(*cache.step_shape) for name in ("q", "k_new", "v_new")}
    codes, scale = torch.zeros(3, dtype=torch.int16), torch.tensor(2.0)
    gumbel = {"logits": randn(3, 5), "tau": 0.5, "hard": False, "dim": -1, "generator": torch.Generator()}
    return {
        "sparse_attention": {**heads, "pattern": PATTERN, "scale": 0.5},
        "decode_attention": {**step, "cache": cache, "scale": 0.5, "position": torch.tensor([3])},
        "decode_layers": {"x": randn(2, 16), "layers": layers, "caches": [KVCache(PATTERN, 2, 2, 8)]},
        "gumbel_softmax": gumbel,
        "gumbel_softmax_kl": gumbel,
        "gumbel_codebook": {name: gumbel[name] for name in ("logits", "tau", "dim", "generator")}
        | {"codebook": randn(5, 4)},
        "linear": {"x": randn(3, 5), "weight": randn(4, 5), "bias": randn(4), "dtype": torch.float32},
        "mlp": {
            "x": randn(3, 4),
            "expansion": randn(8, 4),
            "expansion_bias": randn(8),
            "contraction": randn(4, 8),
            "contraction_bias": randn(4),
        },
        "linear_cross_entropy": {
            "hidden": randn(3, 4),
            "weight": randn(5, 4),
            "target": torch.tensor([0, 1, 2]),
            "bias": randn(5),
            "ignore_index": -100,
            "reduction": "mean",
        },
        "logit_laplace_loss": {"x": torch.full((2, 3), 0.5), "mu": randn(2, 3), "log_b": randn(2, 3)},
        "map_pixels": {"images": torch.rand(2, 3), "epsilon": 0.1},
        "unmap_pixels": {"x": torch.rand(2, 3), "epsilon": 0.1},
        "encode_fp169": {"x": randn(4)},
        "encode_fp169_checked": {"x": randn(4)},
        "encode_fp0610": {"x": randn(4)},
        "encode_fp0610_checked": {"x": randn(4)},
        "decode_fp169": {"codes": codes, "dtype": torch.float32},
        "decode_fp0610": {"codes": codes, "dtype": torch.float32},
        "scale_cast_filter": {"tensors": [randn(4)], "scale": scale},
        "filter_cast_unscale": {"tensors": [randn(4).half()], "scale": scale},
        "squared_norms": {"blocks": [[randn(3)]]},
        "scaled_resblock": {"block": block, "x": randn(3, 4), "scale": scale, "dtype": torch.float16},
        "ScaledResBlock": {"block": block, "scale": scale},
        "GradScales": {"n_blocks": 3, "replicas": 2, "device": "cpu"},
        "orthogonalize": {"P": randn(5, 3), "eps": 1e-6},
        "KVCache": {"pattern": PATTERN, "batch": 2, "heads": 2, "head_dim": 8, "device": "cpu"},
        "SparseSelfAttention": {"dim": 16, "heads": 2, "pattern": PATTERN, "head_dim": 8, "device": "cpu"},
        "AttentionPattern": {"kind": "row", "text_len": 3, "grid": (4, 4), "kernel_size": 3},
        "AdamW16": {"params": [torch.nn.Parameter(randn(4))], "lr": 1e-3, "betas": (0.9, 0.96), "eps": 1e-8},
        "explain": {"op": "linear", "device_type": "cpu"},
        "shard_longer_axis": {"parameter": torch.nn.Parameter(randn(4, 6))},
    }


@pytest.mark.parametrize("name", calls())
def test_a_wrong_type_gets_one_sentence(name):
    function = getattr(dalle_kernels, name)
    for argument in calls()[name]:
        for value in WRONG:
            try:
                function(**{**calls()[name], argument: value})
            except Exception as error:
                message, told = str(error), (argument, value, str(error))
                assert argument in message or any(said in message for said in BY_MEANING[name, argument]), told
                assert "xpected" in message or any(said in message for said in BY_TORCH), told
                assert isinstance(error, (TypeError, ValueError)) or argument == "device", told
                assert "\n" not in message and "incompatible" not in message, told


def test_every_public_function_names_them():
    for name in calls().keys() - CHECKED_WITHIN:
        public = getattr(dalle_kernels, name)
        assert hasattr(public.__init__ if inspect.isclass(public) else public, "__wrapped__"), name
    functions = {name for name in dalle_kernels.__all__ if inspect.isfunction(getattr(dalle_kernels, name))}
    assert functions <= set(calls()) | {"ops", "use"}


@names_wrong_types
def typed(count: int, ratio: float = 1.0, names: Sequence[str] = (), pair: tuple[int, float] = (1, 1.0)):
    """Fails."""
    raise RuntimeError("it failed")


def test_the_first_argument_of_a_wrong_type_is_named():
    for arguments, sentence in (
        (("a",), "typed: expected count of type int, got str"),
        ((1.5,), "typed: expected count of type int, got float"),
        ((1, "a"), "typed: expected ratio of type float, got str"),
        ((1, 1, 3), "typed: expected names of type Sequence[str], got int"),
        ((1, 1, ["a", 3]), "typed: expected names of type Sequence[str], got list that holds int"),
        ((1, 1, [], (1, "a")), "typed: expected pair of type tuple[int, float], got tuple that holds str"),
    ):
        with pytest.raises(TypeError) as caught:
            typed(*arguments)
        assert str(caught.value) == sentence
        assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(TypeError, match="expected ratio of type float, got NoneType"):
        typed(1, ratio=None)


def test_other_errors_pass_as_they_are():
    for arguments in ((1,), (True, 2), (1, 1.5, ["a"]), (1, 1.0, "ab"), (1, 1.0, (), (1, 2))):
        with pytest.raises(RuntimeError, match="it failed"):
            typed(*arguments)
    typed.__wrapped__.__annotations__["pair"] = "NameOfNothing"
    with pytest.raises(RuntimeError, match="it failed"):
        typed(1, pair="whose type cannot be read")
    typed.__wrapped__.__annotations__["pair"] = "tuple[int, float]"
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        typed()

    @names_wrong_types
    def clear(values: Iterable[int]):
        raise ValueError("expected three values, got one")

    with pytest.raises(ValueError, match="expected three values, got one"):
        clear("a")


def test_errors_of_other_kinds_pass_beside_a_type_that_does():
    """What is no matter of types keeps its class and its words, whatever the arguments."""

    class Ours(RuntimeError):
        pass

    @names_wrong_types
    def raising(error: int):
        raise error

    for error in (Ours("it failed"), torch.OutOfMemoryError("no memory"), ValueError("no"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught:
            raising(error)
        assert caught.value is error
    for error in (RuntimeError("it failed"), AttributeError("no attribute"), TypeError("expected this,\nor that")):
        with pytest.raises(TypeError, match="raising: expected error of type int, got "):
            raising(error)
    for value in ([0.9, 0.96], (0.9, 0.96)):
        with pytest.raises(ValueError, match="empty parameter list"):
            dalle_kernels.AdamW16([], lr=1e-3, betas=value)


def test_of_calls_within_each_other_the_outermost_is_named():
    arguments = calls()["mlp"]
    for name in ("x", "expansion", "contraction"):
        with pytest.raises(TypeError, match=f"^mlp: expected {name} of type Tensor, got NoneType$"):
            dalle_kernels.mlp(**{**arguments, name: None})


def test_it_looks_like_the_function():
    assert typed.__name__ == "typed" and typed.__doc__ == "Fails."
    assert list(inspect.signature(typed).parameters) == ["count", "ratio", "names", "pair"]
    assert pickle.loads(pickle.dumps(typed)) is typed

"""Philox against its published answers, the noise against its definition, and the Gumbel draws against their law."""

from __future__ import annotations

import math

import numpy
import pytest
import torch

from dalle_kernels import philox

WORD = 2**32 - 1

# The known answers of the Random123 distribution for philox4x32, 10 rounds: counter, key, output.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def _words(text: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in text.split())


def _scalar_philox(counter, key):
    """Philox4x32-10 on Python's integers."""
    (x0, x1, x2, x3), (key0, key1) = counter, key
    for _ in range(10):
        product0, product1 = x0 * 0xD2511F53, x2 * 0xCD9E8D57
        x0, x1, x2, x3 = (product1 >> 32) ^ x1 ^ key0, product1 & WORD, (product0 >> 32) ^ x3 ^ key1, product0 & WORD
        key0, key1 = (key0 + 0x9E3779B9) & WORD, (key1 + 0xBB67AE85) & WORD
    return x0, x1, x2, x3


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_known_answers(counter, key, output):
    result = philox.philox4x32(tuple(map(torch.tensor, _words(counter))), tuple(map(torch.tensor, _words(key))))
    assert tuple(word.item() for word in result) == _words(output)
    assert _scalar_philox(_words(counter), _words(key)) == _words(output)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF])
def test_key_and_counter_are_laid_out_as_documented(seed):
    rows = torch.tensor([0, 5, 2**32 + 7, -3]).view(2, 1, 2)
    words = philox.random_bits(torch.tensor(seed), rows, columns=10)
    assert all(word.shape == (2, 3, 2) and word.min() >= 0 and word.max() <= WORD for word in words)
    for outer, inner, group in ((0, 0, 0), (0, 1, 2), (1, 0, 1), (1, 1, 2)):
        row = rows[outer, 0, inner].item() % 2**64
        expected = _scalar_philox((group, row & WORD, row >> 32, 0), (seed & WORD, (seed >> 32) & WORD))
        assert tuple(word[outer, group, inner].item() for word in words) == expected


def _given_bits(monkeypatch, bits: list[int]) -> torch.Tensor:
    words = tuple(torch.tensor(bits[index::4]).view(1, -1, 1) for index in range(4))
    monkeypatch.setattr(philox, "random_bits", lambda seed, rows, columns: tuple(word.clone() for word in words))
    return torch.zeros(1, 1, 1, dtype=torch.int64)


EDGE_BITS = [0, 1, 127, 128, 255, 2**24, 2**31 - 1, 2**31, 2**32 - 2**24 - 1, WORD - 128, WORD - 1, WORD]


def test_uniforms_follow_their_definition_bit_for_bit(monkeypatch):
    bits = EDGE_BITS + [int(word) for word in torch.randint(0, 2**32, (500,))]
    rows = _given_bits(monkeypatch, bits)
    result = philox.complement_uniform(torch.tensor(0), rows, len(bits)).flatten().numpy()
    complement = numpy.array([WORD - word for word in bits], dtype=numpy.uint32).astype(numpy.float32)
    expected = complement * numpy.float32(2.0**-32) + numpy.float32(2.0**-33)
    expected = numpy.minimum(expected, numpy.float32(1 - 2.0**-24))
    assert result.dtype == numpy.float32
    numpy.testing.assert_array_equal(result.view(numpy.int32), expected.view(numpy.int32))
    exact = 1 - (numpy.array(bits, dtype=numpy.float64) + 0.5) * 2.0**-32
    assert (numpy.abs(result - exact) <= 2.0**-23 * exact).all()  # two roundings


def test_no_draw_is_infinite(monkeypatch):
    rows = _given_bits(monkeypatch, EDGE_BITS)
    for dtype in (torch.float32, torch.float64):
        noise = philox.gumbel_noise(torch.tensor(0), rows, len(EDGE_BITS), dtype).flatten()
        assert noise.dtype == dtype
        assert torch.isfinite(noise).all() and noise.min() >= -2.82 and noise.max() <= 22.88
        assert (noise.diff() >= 0).all(), "a larger word gives a larger draw"
        exact = [-math.log(-math.log((word + 0.5) * 2.0**-32)) for word in EDGE_BITS]
        # The bound 1 - 2^-24 on v moves only the two smallest draws, whose words lie below 2^8.
        kept = [index for index, word in enumerate(EDGE_BITS) if word >= 2**24]
        torch.testing.assert_close(
            noise[kept].double(), torch.tensor(exact, dtype=torch.float64)[kept], rtol=2e-6, atol=2e-6
        )


def test_a_draw_depends_only_on_its_row_and_column():
    seed = torch.tensor(99)
    rows = torch.arange(12)
    whole = philox.gumbel_noise(seed, rows.view(3, 1, 4), 11)
    assert torch.equal(philox.gumbel_noise(seed, rows[8:].view(1, 1, 4), 11), whole[2:])
    assert torch.equal(philox.gumbel_noise(seed, rows.view(12, 1, 1), 11).view(3, 4, 11), whole.transpose(1, 2))
    assert torch.equal(philox.gumbel_noise(seed, rows.view(3, 1, 4), 7), whole[:, :7])
    assert not torch.equal(philox.gumbel_noise(seed + 1, rows.view(3, 1, 4), 11), whole)


def _kolmogorov_smirnov(draws: torch.Tensor) -> float:
    """sqrt(n) times the largest distance between the draws' distribution and Gumbel's."""
    ordered = draws.double().sort().values
    cumulative = torch.exp(-torch.exp(-ordered))
    count = len(ordered)
    above = torch.arange(1, count + 1) / count - cumulative
    return math.sqrt(count) * max(above.max().item(), (1 / count - above).max().item())


@pytest.mark.parametrize("seed", [0, 12345])
def test_draws_follow_the_gumbel_law(seed):
    noise = philox.gumbel_noise(torch.tensor(seed), torch.arange(200).view(200, 1, 1), 500).squeeze(2)
    assert _kolmogorov_smirnov(noise.flatten()) < 1.95  # passes with probability 0.999
    assert _kolmogorov_smirnov(noise.flatten() * 1.05) > 1.95, "the test sees a scale that is 5 % off"
    assert _kolmogorov_smirnov(noise[:, 0]) < 1.95 and _kolmogorov_smirnov(noise[0]) < 1.95
    standard = (noise - noise.mean()) / noise.std()
    neighbours = {
        "columns": (standard[:, 1:] * standard[:, :-1]).flatten(),
        "words of a counter": (standard[:, 0::4] * standard[:, 2::4]).flatten(),
        "counters": (standard[:, 4:] * standard[:, :-4]).flatten(),
        "rows": (standard[1:] * standard[:-1]).flatten(),
    }
    for name, products in neighbours.items():
        assert abs(products.mean().item()) * math.sqrt(len(products)) < 4, f"neighbouring {name} are correlated"


def test_seeds_come_from_the_generator():
    device = torch.device("cpu")
    seeds = [philox.new_seed(device, torch.Generator().manual_seed(3)).item() for _ in range(2)]
    assert seeds[0] == seeds[1] and seeds[0] >= 0
    torch.manual_seed(3)
    default = philox.new_seed(device)
    assert default.item() == seeds[0] and default.shape == () and default.dtype == torch.int64
    assert philox.new_seed(device).item() != seeds[0]


def test_a_generator_of_another_device_is_refused():
    with pytest.raises(ValueError, match="expected a generator on the logits' device meta"):
        philox.new_seed(torch.device("meta"), torch.Generator())

import pytest
import torch

from gradsub.linalg import range_finder

from ._samplers import generator, hmt_frobenius_bound, hmt_spectral_bound, with_spectrum

RANK, OVERSAMPLING, DRAWS = 6, 6, 20


def _errors(A, order, power_iterations):
    # A basis of rank + oversampling columns with none truncated is what the theorems speak of.
    for seed in range(DRAWS):
        Q = range_finder(
            A, RANK + OVERSAMPLING, oversampling=0, power_iterations=power_iterations, generator=generator(seed)
        )
        yield float(torch.linalg.matrix_norm(A - Q @ (Q.mT @ A), order))


SPECTRA = {
    "flat": torch.ones(40, dtype=torch.float64),
    "slow": torch.arange(1, 41, dtype=torch.float64) ** -0.3,
    "fast": 0.7 ** torch.arange(40, dtype=torch.float64),
    "gap": torch.cat([torch.ones(RANK), torch.full((34,), 1e-3)]).double(),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize(("m", "n"), [(40, 40), (40, 100), (100, 40)])
def test_frobenius_error_obeys_theorem_10_5(name, m, n):
    spectrum = SPECTRA[name]
    errors = list(_errors(with_spectrum(m, n, spectrum), "fro", 0))
    assert sum(errors) / DRAWS <= hmt_frobenius_bound(spectrum, RANK, OVERSAMPLING)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("power_iterations", [0, 1, 2, 3])
def test_spectral_error_obeys_corollary_10_10(name, power_iterations):
    spectrum = SPECTRA[name]
    errors = list(_errors(with_spectrum(40, 100, spectrum), 2, power_iterations))
    assert sum(errors) / DRAWS <= hmt_spectral_bound(spectrum, RANK, OVERSAMPLING, power_iterations)


def test_the_bounds_can_be_missed():
    # A basis that ignores A misses them: the tests above are no tautologies.
    spectrum = SPECTRA["gap"]
    A = with_spectrum(40, 100, spectrum)
    Q = torch.linalg.qr(torch.randn(40, RANK + OVERSAMPLING, generator=generator(0), dtype=torch.float64)).Q
    error = float(torch.linalg.matrix_norm(A - Q @ (Q.mT @ A), 2))
    assert error > hmt_spectral_bound(spectrum, RANK, OVERSAMPLING, 0)
    assert error > hmt_frobenius_bound(spectrum, RANK, OVERSAMPLING)

"""The compiled inner loops against the torch code, and both against automatic differentiation.

Shapes: N tokens, K probe steps, M sigmoids per token, P = 2M searched parameters.
"""

import numpy as np
import pytest
import torch
from correlated import correlated_noise
from planted import of_class

from megatron_tokscale.fit import FitStatus, TokenClass, fit_sigmoids, noise, varpro
from megatron_tokscale.fit.search import Box, Trajectories

BOX = Box((-0.1, 1.1), (-6.0, 0.0))


@pytest.fixture
def in_torch(monkeypatch):
    """A function that returns the result of `call` with the torch code of a GPU, on the CPU."""

    def run(call):
        with monkeypatch.context() as patch:
            patch.setattr(Trajectories, "on_cpu", property(lambda _: False))
            return call()

    return run


def problem(n_sigmoids, masked, n_tokens=40, n_probes=37, dtype=torch.float32):
    generator = torch.Generator().manual_seed(n_sigmoids)

    def uniform(rows, low, high):
        return low + (high - low) * torch.rand(rows, n_tokens, generator=generator, dtype=dtype)

    midpoints = [uniform(1, 0.1 + 0.5 * m, 0.4 + 0.5 * m) for m in range(n_sigmoids)]
    theta_PN = torch.cat([*midpoints, uniform(n_sigmoids, -3.5, -2.0)])
    linear_LN = uniform(1 + n_sigmoids, 0.5, 2.0)
    y_KN = torch.randn(n_probes, n_tokens, generator=generator, dtype=dtype)
    x_K = torch.linspace(0, 1, n_probes, dtype=dtype)
    x_K[0] = -1000
    weight_KN = None
    if masked:
        weight_KN = (torch.rand(n_probes, n_tokens, generator=generator) > 0.2).to(dtype)
        y_KN *= weight_KN
    data = Trajectories(y_KN, x_K, weight_KN).tokens(slice(None))
    return theta_PN, linear_LN, data


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n_sigmoids", [1, 2])
def test_compiled_products_equal_those_of_torch(in_torch, n_sigmoids, masked):
    theta_PN, linear_LN, data = problem(n_sigmoids, masked)
    anchor_MN = varpro.anchor(theta_PN, data.x_K)
    ours, theirs = (
        run(lambda: varpro.products(theta_PN, anchor_MN, linear_LN, data))
        for run in (lambda call: call(), in_torch)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n_sigmoids", [1, 2])
def test_compiled_residuals_equal_those_of_torch(in_torch, n_sigmoids, masked):
    theta_PN, linear_LN, data = problem(n_sigmoids, masked)
    search = varpro.evaluate(theta_PN, linear_LN, data)
    ours, theirs = (
        run(lambda: noise.Residuals.from_fit(search, data))
        for run in (lambda call: call(), in_torch)
    )
    for name in ("residual_KN", "s_KN", "tangent_JKN", "lag_one_JJN", "phi_N", "variance_N"):
        torch.testing.assert_close(
            getattr(ours, name), getattr(theirs, name), rtol=1e-2, atol=2e-3, msg=name
        )


def test_a_whole_fit_is_the_same_in_torch(in_torch):
    x_K = np.concatenate([[-np.inf], np.linspace(0, 8, 59)])
    rng = np.random.default_rng(0)
    clean_NK = np.concatenate([of_class(each, 60, x_K) for each in TokenClass if each >= 0])
    loss_NK = clean_NK + 0.3 * correlated_noise(rng, clean_NK.shape, 0.3)
    loss_NK[::7, 11] = np.nan
    ours, theirs = fit_sigmoids(x_K, loss_NK), in_torch(lambda: fit_sigmoids(x_K, loss_NK))
    np.testing.assert_allclose(ours.sse_N, theirs.sse_N, rtol=1e-4)
    same = ours.class_N == theirs.class_N
    assert same.mean() > 0.99
    sigmoid = same & ours.is_class(TokenClass.FALLING, TokenClass.RISING)
    for name, of_class_N in (
        ("midpoint", sigmoid & (ours.status_N == FitStatus.CONVERGED)),
        ("step1_midpoint", same & ours.is_class(TokenClass.TWO_STEP)),
        ("step2_midpoint", same & ours.is_class(TokenClass.TWO_STEP)),
    ):
        mine_N, other_N = (getattr(fits, f"{name}_N")[of_class_N] for fits in (ours, theirs))
        off_N = np.abs(mine_N - other_N) / getattr(ours, f"{name}_se_N")[of_class_N]
        assert len(off_N) > 40
        assert (off_N < 0.1).mean() > 0.95, name


@pytest.mark.parametrize("n_sigmoids", [1, 2])
def test_curvature_and_descent_are_those_of_a_projected_jacobian(n_sigmoids):
    """J comes from automatic differentiation; numpy projects floor and drops out of it."""
    theta_PN, linear_LN, data = problem(n_sigmoids, masked=False, n_tokens=5)
    search = varpro.evaluate(theta_PN, linear_LN, data)
    x_K, y_KN = data.x_K.double(), data.y_KN.double()
    for n in range(5):
        anchor_M = search.anchor_MN[:, n].double()
        theta_P, linear_L = search.theta_PN[:, n].double(), search.linear_LN[:, n].double()
        log_width_M = theta_P[n_sigmoids:]
        q_M = (theta_P[:n_sigmoids] - anchor_M) * (-log_width_M).exp()

        def model(steps_P, anchor_M=anchor_M, linear_L=linear_L):
            q_M, log_width_M = steps_P.chunk(2)
            u_KM = (anchor_M - x_K[:, None]) * (-log_width_M).exp() + q_M
            return linear_L[0] + torch.sigmoid(u_KM) @ linear_L[1:]

        at_P = torch.cat([q_M, log_width_M])
        jacobian_KP = torch.autograd.functional.jacobian(model, at_P).numpy()
        u_KM = (anchor_M - x_K[:, None]) * (-log_width_M).exp() + q_M
        linear_KL = np.concatenate([np.ones((len(x_K), 1)), torch.sigmoid(u_KM).numpy()], axis=1)
        best_L = np.linalg.lstsq(linear_KL, y_KN[:, n].numpy(), rcond=None)[0]
        np.testing.assert_allclose(linear_L.numpy(), best_L, rtol=2e-3, atol=2e-3)
        residual_K = y_KN[:, n].numpy() - linear_KL @ best_L
        np.testing.assert_allclose(search.sse_N[n], residual_K @ residual_K, rtol=1e-4)
        onto_KK = linear_KL @ np.linalg.pinv(linear_KL)
        projected_KP = jacobian_KP - onto_KK @ jacobian_KP
        np.testing.assert_allclose(
            search.curvature_PPN[..., n], projected_KP.T @ projected_KP, rtol=2e-2, atol=2e-3
        )
        np.testing.assert_allclose(
            search.descent_PN[:, n], projected_KP.T @ residual_K, rtol=2e-2, atol=2e-3
        )

"""Compare every number with NumPy in float64, which forms the full matrices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import Factors, Layout, LoraError, LoraSpec, Target, analysis
from tests.multi.test_combine import FORMS, MEMBERS, member

RANDOM = MEMBERS[0]  # a matrix, a stack, one with heads, and a convolution; rank 1
WIDE = member(5, 3, 8.0, "matrix", "stacked", "heads", "kernel")
OTHER = member(6, 5, 2.0, "matrix", "stacked", "heads", "kernel")


def dense(target: Target, factors: Factors) -> list[np.ndarray]:
    """Form the update of every slice as an [in, out] matrix."""
    a = np.asarray(factors.a, np.float64).reshape(-1, target.fan_in, target.rank)
    b = np.asarray(factors.b, np.float64).reshape(-1, target.rank, target.fan_out)
    return [target.scale * one @ two for one, two in zip(a, b, strict=True)]


def slices(target: Target, w: Any) -> list[np.ndarray]:
    """Return every slice of an array of W's shape as an [in, out] matrix."""
    order = (*target.stack, *target.inputs, *target.outputs)
    flat = np.asarray(w, np.float64).transpose(order)
    return list(flat.reshape(-1, target.fan_in, target.fan_out))


def basis(target: Target, factors: Factors, of: str) -> list[np.ndarray]:
    a = np.asarray(factors.a, np.float64).reshape(-1, target.fan_in, target.rank)
    b = np.asarray(factors.b, np.float64).reshape(-1, target.rank, target.fan_out)
    if of == "a":
        return [np.linalg.svd(x)[0][:, : target.rank] for x in a]
    if of == "b":
        return [np.linalg.svd(x)[2][: target.rank].T for x in b]
    full = [np.linalg.svd(x) for x in dense(target, factors)]
    if of == "input":
        return [u[:, : target.rank] for u, _, _ in full]
    return [vt[: target.rank].T for _, _, vt in full]


def phi_by_hand(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    out = np.zeros((one.shape[1], two.shape[1]))
    for i in range(1, one.shape[1] + 1):
        for j in range(1, two.shape[1] + 1):
            out[i - 1, j - 1] = np.linalg.norm(one[:, :i].T @ two[:, :j]) ** 2 / min(i, j)
    return out


def trained() -> tuple[Any, Any, list[Any]]:
    """A function, its base, and trained adapters of rank 2 and 4."""
    w = jax.random.normal(jax.random.key(0), (3, 12, 10)) / 3
    x = jax.random.normal(jax.random.key(1), (64, 12))
    y = jax.random.normal(jax.random.key(2), (64, 3, 10))

    def f(params: Any, x: jax.Array) -> jax.Array:
        return jnp.einsum("bi,sio->bso", x, params["w"])

    pairs = []
    for rank in (2, 4):
        layout = lora_jax.resolve(LoraSpec(rank, 2.0 * rank, "w"), f, {"w": w}, x)
        adapted = lora_jax.adapt(layout, f)

        @jax.jit
        def gradient(adapters: Any, adapted: Any = adapted) -> Any:
            return jax.grad(lambda a: ((adapted({"w": w}, a, x) - y) ** 2).mean())(adapters)

        adapters = lora_jax.init(jax.random.key(rank), layout)
        for _ in range(60):
            adapters = jax.tree.map(lambda p, g: p - 0.3 * g, adapters, gradient(adapters))
        pairs.append((layout, adapters))
    return f, {"w": w}, pairs


@pytest.mark.few(1)
@pytest.mark.parametrize("of", analysis.subspaces.SIDES)
def test_phi_is_what_full_matrices_give(of: Any) -> None:
    small, large = trained()[2]
    for one, two in ((WIDE, OTHER), (OTHER, WIDE), (small, large)):
        found = analysis.similarity(one, two, of)
        assert list(found) == [t.path for t in one[0].targets]
        for target in one[0].targets:
            path = target.path
            other = two[0][path]
            bases = basis(target, one[1][path], of), basis(other, two[1][path], of)
            want = np.array([phi_by_hand(*pair) for pair in zip(*bases, strict=True)])
            assert found[path].shape == (*target.sizes(target.stack), target.rank, other.rank)
            got = found[path].reshape(want.shape)
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
            assert (got >= 0).all() and (got <= 1 + 1e-12).all()


def test_an_adapter_is_all_of_itself() -> None:
    for of in analysis.subspaces.SIDES:
        for found in analysis.similarity(OTHER, OTHER, of).values():
            diagonal = np.diagonal(found, axis1=-2, axis2=-1)
            np.testing.assert_allclose(diagonal, 1, atol=1e-12)


def test_random_gaussians_share_max_over_d() -> None:
    """Random Gaussian factors share max(i, j) / d of their subspaces, as a mean over sixty layers.

    Red with min(i, j) / d.
    """
    pairs = []
    for seed, rank in enumerate((8, 24)):
        layout = Layout((Target("w", (60, 96, 32), (0,), (1,), (2,), rank=rank, alpha=1.0),))
        pairs.append((layout, lora_jax.init(jax.random.key(seed), layout)))
    found = analysis.similarity(*pairs)["w"].mean(axis=0)
    i, j = np.arange(1, 9)[:, None], np.arange(1, 25)
    np.testing.assert_allclose(found, np.maximum(i, j) / 96, rtol=0.35, atol=0.005)
    np.testing.assert_allclose(found[-1, -1], 24 / 96, rtol=0.03)


def test_a_direction_that_does_not_exist_is_nan() -> None:
    layout, adapters = WIDE
    path = "matrix"
    a = jnp.asarray(adapters[path].a).at[:, 2].set(0)
    short = {**adapters, path: Factors(a, adapters[path].b)}
    found = analysis.similarity((layout, short), OTHER)[path]
    assert np.isnan(found[2]).all() and not np.isnan(found[:2]).any()
    fresh = lora_jax.init(jax.random.key(0), layout)
    assert all(np.isnan(x).all() for x in analysis.similarity((layout, fresh), OTHER, "b").values())
    assert not any(np.isnan(x).any() for x in analysis.similarity((layout, fresh), OTHER).values())


def test_spectra_are_those_of_the_full_update() -> None:
    for layout, adapters in (WIDE, OTHER, *trained()[2]):
        found = analysis.spectrum(layout, adapters)
        for target in layout.targets:
            got = found[target.path]
            full = dense(target, adapters[target.path])
            values = np.array([np.linalg.svd(x)[1][: target.rank] for x in full])
            np.testing.assert_allclose(got.values.reshape(values.shape), values, rtol=1e-6)
            energy = [np.linalg.norm(x) ** 2 for x in full]
            np.testing.assert_allclose(got.energy.ravel(), energy, rtol=1e-6)
            share = values / values.sum(axis=-1, keepdims=True)
            rank = np.exp(-(share * np.log(share)).sum(axis=-1))
            np.testing.assert_allclose(got.effective_rank.ravel(), rank, rtol=1e-6)


def test_a_fresh_adapter_has_no_spectrum() -> None:
    fresh = lora_jax.init(jax.random.key(0), OTHER[0])
    for found in analysis.spectrum(OTHER[0], fresh).values():
        assert not found.values.any() and not found.energy.any() and not found.effective_rank.any()


def weights(layout: Layout, seed: int = 9) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(seed), len(layout.targets))
    return {
        t.path: jax.random.normal(k, t.shape) for t, k in zip(layout.targets, keys, strict=True)
    }


@pytest.mark.parametrize("rank", [None, 2])
def test_amplification_is_what_full_matrices_give(rank: int | None) -> None:
    base, pairs = trained()[1:]
    cases = [(WIDE, weights(WIDE[0])), (OTHER, weights(OTHER[0]))]
    cases += [(pair, base) for pair in pairs]
    for (layout, adapters), params in cases:
        found = analysis.amplification(layout, params, adapters, rank)
        for target in layout.targets:
            got, r = found[target.path], rank or target.rank
            rows = []
            for d, w in zip(
                dense(target, adapters[target.path]), slices(target, params[target.path]),
                strict=True,
            ):  # fmt: skip
                u, _, vt = np.linalg.svd(d)
                uw, _, vtw = np.linalg.svd(w)
                along = np.linalg.norm(u[:, :r].T @ w @ vt[:r].T)
                own = np.linalg.norm(uw[:, :r].T @ w @ vtw[:r].T)
                rows.append((np.linalg.norm(d), np.linalg.norm(w), along, own))
            want = np.array(rows).T
            for name, column in zip(
                ("update", "weight", "along_update", "along_weight"), want, strict=True
            ):
                np.testing.assert_allclose(getattr(got, name).ravel(), column, rtol=1e-6)
            np.testing.assert_allclose(got.factor.ravel(), want[0] / want[2], rtol=1e-6)


def test_the_random_row_is_the_mean_of_draws() -> None:
    target = Target("w", (12, 9), (), (0,), (1,), rank=3, alpha=1.0)
    layout, params = Layout((target,)), {"w": jax.random.normal(jax.random.key(0), (12, 9))}
    found = analysis.amplification(layout, params, lora_jax.init(jax.random.key(1), layout))["w"]
    rng, w = np.random.default_rng(0), np.asarray(params["w"], np.float64)
    draws = []
    for _ in range(4000):
        u = np.linalg.qr(rng.standard_normal((12, 3)))[0]
        v = np.linalg.qr(rng.standard_normal((9, 3)))[0]
        draws.append(np.linalg.norm(u.T @ w @ v) ** 2)
    np.testing.assert_allclose(found.along_random**2, np.mean(draws), rtol=0.03)
    assert np.isnan(found.factor) and found.update == 0  # b is zero, so no direction is amplified


def test_iterated_directions_are_those_of_lapack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analysis.matrices, "EXACT", 16)
    gaussian = np.random.default_rng(3).standard_normal((300, 200))
    falling = gaussian @ np.diag(0.9 ** np.arange(200))
    for matrix, rtol in ((gaussian, 3e-3), (gaussian.T, 3e-3), (falling, 1e-4)):
        exact, found = analysis.matrices.svd(matrix), analysis.matrices.top_svd(matrix, 6)
        norms = np.linalg.norm(found.values), np.linalg.norm(exact.values[:6])
        np.testing.assert_allclose(*norms, rtol=rtol)
        np.testing.assert_allclose(found.left.T @ found.left, np.eye(6), atol=1e-5)
        np.testing.assert_allclose(found.right.T @ found.right, np.eye(6), atol=1e-5)
        along = found.left.T @ matrix @ found.right
        np.testing.assert_allclose(along, np.diag(found.values), atol=2e-2 * found.values[0])
    np.testing.assert_allclose(found.values, exact.values[:6], rtol=1e-3)


def test_iterated_values_of_a_slow_spectrum() -> None:
    """The values of a spectrum without a gap, a Gaussian of 1536, are found to 4.2e-4."""
    matrix = np.random.default_rng(4).standard_normal((1536, 1536), np.float32)
    gram = matrix.astype(np.float64).T @ matrix.astype(np.float64)  # a third of the SVD's time
    exact = np.sqrt(np.linalg.eigvalsh(gram)[::-1])
    for rank in (64, 8):
        found = analysis.matrices.top_values(matrix, rank)
        error = 1 - np.linalg.norm(found) / np.linalg.norm(exact[:rank])
        assert 0 < error < 4.2e-4


def test_iterated_directions_where_the_space_is_used_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The iteration finds exact values where a block adds no new direction to the space."""
    monkeypatch.setattr(analysis.matrices, "EXACT", 16)
    rng = np.random.default_rng(5)
    q = np.linalg.qr(rng.standard_normal((300, 200)))[0]
    steep = q * 0.5 ** np.arange(200) @ np.linalg.qr(rng.standard_normal((200, 200)))[0]
    for matrix in (np.ones((300, 200)), np.eye(300, 200), q, steep, np.zeros((300, 200))):
        exact = np.linalg.svd(matrix, compute_uv=False)
        for rank in (6, 40):
            found = analysis.matrices.top_svd(matrix, rank)
            norms = np.linalg.norm(found.values), np.linalg.norm(exact[:rank])
            np.testing.assert_allclose(*norms, rtol=1e-5)
            np.testing.assert_allclose(found.values, exact[:rank], atol=2e-3 * exact[0])
            np.testing.assert_allclose(found.right.T @ found.right, np.eye(rank), atol=1e-5)
            np.testing.assert_allclose(found.values, analysis.matrices.top_values(matrix, rank))


@pytest.mark.parametrize("rank", [None, 1, 4])
def test_extract_is_as_near_as_any_adapter(rank: int | None) -> None:
    layout = OTHER[0]
    base, tuned = weights(layout, 1), weights(layout, 2)
    found = analysis.extract(layout, base, tuned, rank)
    merged = lora_jax.merge(found.adapter.layout, base, found.adapter.parameters)
    assert found.untargeted == {}
    for target in layout.targets:
        path, kept = target.path, rank or target.rank
        assert found.adapter.layout[path].rank == kept
        full = np.asarray(tuned[path], np.float64) - np.asarray(base[path], np.float64)
        values = [np.linalg.svd(x)[1] for x in slices(target, full)]
        lost = np.sqrt(sum((v[kept:] ** 2).sum() for v in values))
        left = np.linalg.norm(np.asarray(tuned[path], np.float64) - np.asarray(merged[path]))
        np.testing.assert_allclose(float(found.truncation[path].error), lost, rtol=1e-5)
        np.testing.assert_allclose(left, lost, rtol=1e-5)
        relative = lost / np.linalg.norm(full)
        np.testing.assert_allclose(float(found.truncation[path].relative), relative, rtol=1e-5)


def test_extract_gives_an_adapter_back() -> None:
    layout, adapters = WIDE
    base = weights(layout)
    merged = lora_jax.merge(layout, base, adapters)
    found = analysis.extract(layout, base, merged)
    for target in layout.targets:
        again = dense(found.adapter.layout[target.path], found.adapter.parameters[target.path])
        np.testing.assert_allclose(again, dense(target, adapters[target.path]), atol=1e-5)
        assert float(found.truncation[target.path].relative) < 1e-6


def test_extract_says_what_no_adapter_holds() -> None:
    layout = WIDE[0]
    base = {**weights(layout), "bias": jnp.zeros(3), "norm": jnp.ones(2)}
    tuned = {**base, "bias": jnp.array([3.0, 0.0, 4.0])}
    assert analysis.extract(layout, base, tuned).untargeted == {"bias": 5.0}


def test_sharded_and_bfloat16_arrays_are_read() -> None:
    layout, adapters = WIDE
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), adapters)
    same = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    mesh = jax.make_mesh((3,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    half["matrix"] = Factors(jax.device_put(half["matrix"].a, split), half["matrix"].b)
    for got, want in zip(
        jax.tree.leaves(analysis.spectrum(layout, half)),
        jax.tree.leaves(analysis.spectrum(layout, same)), strict=True,
    ):  # fmt: skip
        np.testing.assert_allclose(got, want)


def test_errors_name_the_cure() -> None:
    layout, adapters = WIDE
    base = weights(layout)
    one = (layout.subset("matrix"), {"matrix": adapters["matrix"]})
    with pytest.raises(LoraError, match=r"only one of the two adapters has 'stacked'.*\n.*matrix"):
        analysis.similarity(WIDE, one)
    form = Target("matrix", FORMS["matrix"][0][::-1], (), (0,), (1,), rank=3, alpha=1.0)
    turned = (Layout((form,)), lora_jax.init(jax.random.key(0), Layout((form,))))
    with pytest.raises(LoraError, match="not the same parameter in both"):
        analysis.similarity(one, turned)
    with pytest.raises(LoraError, match=r"of must be one of \['a', 'b', 'input', 'output'\]"):
        analysis.similarity(WIDE, WIDE, "left")  # type: ignore[arg-type]
    with pytest.raises(LoraError, match="rank from 1 to 3"):
        analysis.amplification(layout, base, adapters, 4)
    with pytest.raises(LoraError, match=r"only the base parameters have 'matrix'"):
        analysis.extract(layout, base, {k: v for k, v in base.items() if k != "matrix"})
    with pytest.raises(LoraError, match=r"shape \(9, 7\) in the base and \(7, 9\)"):
        analysis.extract(layout, base, {**base, "matrix": base["matrix"].T})
    broken = {**adapters, "matrix": Factors(adapters["matrix"].a * jnp.nan, adapters["matrix"].b)}
    with pytest.raises(LoraError, match="'matrix': the factors are not finite"):
        analysis.spectrum(layout, broken)

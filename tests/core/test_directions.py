"""Directions: what they are orthogonal to, what they span, and between which layers they lie."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from perpend.core.directions import ClusterFitter, Directions, auc, biproject, fit_directions, separation
from perpend.core.linear import orthonormalise
from perpend.core.residuals import ResidualFitter
from perpend.errors import RunFailed, UsageError

L, D = 4, 24


def stats(x, **options):
    fitter = ResidualFitter(x.shape[1], x.shape[2], **options)
    fitter.update(x)
    return fitter.stats()


def classes(seed=0, n=40):
    """Return target and baseline residuals with a common mean and a planted difference, and that difference."""
    generator = torch.Generator().manual_seed(seed)
    common, planted = torch.randn(2, L, D, generator=generator)
    noise = torch.randn(2, n, L, D, generator=generator)
    return noise[0] + 3 * common + 2 * planted, noise[1] + 3 * common, planted


def random_directions(seed=0, layers=L, k=1):
    generator = torch.Generator().manual_seed(seed)
    vectors = orthonormalise(torch.randn(layers, k, D, generator=generator)).float()
    means = torch.randn(2, layers, D, generator=generator)
    return Directions(vectors, torch.ones(layers), means[0], means[1])


def same_span(a, b):
    torch.testing.assert_close(a.mT.double() @ a.double(), b.mT.double() @ b.double(), rtol=0, atol=1e-5)


def orthonormal(rows):
    torch.testing.assert_close(
        rows @ rows.mT, torch.eye(rows.shape[-2]).expand(*rows.shape[:-1], -1), rtol=0, atol=1e-5
    )


def test_the_mean_direction_is_the_mean_difference():
    target, baseline, planted = classes()
    found = fit_directions(stats(target), stats(baseline), provenance={"position": -1})
    difference = target.double().mean(0) - baseline.double().mean(0)
    torch.testing.assert_close(
        found.vectors[:, 0].double(), difference / difference.norm(dim=-1, keepdim=True), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(found.raw_norm.double(), difference.norm(dim=-1), rtol=1e-6, atol=0)
    assert torch.cosine_similarity(found.vectors[:, 0], planted, dim=-1).min() > 0.9
    assert found.provenance == {"position": -1, "count": {"target": 40, "baseline": 40}}
    assert (found.n_layers, found.rank, found.hidden_size) == (L, 1, D)


@pytest.mark.parametrize("method", ["projected", "biprojected"])
@pytest.mark.parametrize("rank", [1, 2])
def test_projected_directions_are_orthogonal_to_the_baseline_mean(method, rank):
    target, baseline, _ = classes()
    clusters = torch.stack([target[:20].mean(0), target[20:].mean(0)], dim=1)
    found = fit_directions(stats(target), stats(baseline), method=method, rank=rank, clusters=clusters)
    orthonormal(found.vectors)
    unit = torch.nn.functional.normalize(found.baseline_mean, dim=-1)
    assert torch.einsum("lkd,ld->lk", found.vectors, unit).abs().max() < 1e-6
    assert torch.cosine_similarity(found.vectors[:, 0], found.target_mean - found.baseline_mean, dim=-1).min() > 0.5


def test_biprojected_directions_are_orthogonal_to_the_mean_of_the_layer_they_are_written_to():
    target, baseline, _ = classes()
    found = fit_directions(stats(target), stats(baseline), method="biprojected")
    for to in range(L):
        rows = found.written(1.5, to)
        orthonormal(rows)
        assert abs(float(rows[0] @ torch.nn.functional.normalize(found.baseline_mean[to], dim=0))) < 1e-6
    everywhere = biproject(found.at(2), found.baseline_mean)
    assert everywhere.shape == (L, 1, D)
    torch.testing.assert_close(everywhere[3], found.written(2, 3))
    torch.testing.assert_close(found.written(2, 2), found.at(2), rtol=0, atol=1e-6)


def test_only_biprojected_directions_depend_on_the_layer_written_to():
    target, baseline, _ = classes()
    plain = fit_directions(stats(target), stats(baseline))
    assert torch.equal(plain.written(1, 3), plain.at(1))
    bi = fit_directions(stats(target), stats(baseline), method="biprojected")
    assert not torch.allclose(bi.written(1, 3), bi.at(1), atol=1e-4)


def test_rank_k_spans_the_centroids_of_k_clusters_and_starts_with_the_mean_difference():
    torch.manual_seed(0)
    parts = [torch.randn(n, L, D) + 2 * torch.randn(L, D) for n in (10, 20, 30)]
    baseline = stats(torch.randn(40, L, D) + 1)
    centroids = torch.stack([part.mean(0) for part in parts], dim=1)
    found = fit_directions(stats(torch.cat(parts)), baseline, rank=3, clusters=centroids)
    orthonormal(found.vectors)
    torch.testing.assert_close(found.vectors[:, :1], fit_directions(stats(torch.cat(parts)), baseline).vectors)
    for layer in range(L):
        same_span(found.vectors[layer], orthonormalise(centroids[layer].double() - baseline.mean[layer]))
    fewer = fit_directions(stats(torch.cat(parts)), baseline, rank=2, clusters=centroids)
    torch.testing.assert_close(fewer.vectors, found.vectors[:, :2])
    for layer in range(L):  # second comes the centroid that lies farthest from the line of the first
        rest = centroids[layer].double() - baseline.mean[layer]
        first = found.vectors[layer, 0].double()
        rest -= (rest @ first)[:, None] * first
        expected = rest[rest.norm(dim=-1).argmax()]
        assert torch.cosine_similarity(expected, found.vectors[layer, 1].double(), dim=0) > 1 - 1e-6


def test_a_layer_that_does_not_tell_the_classes_apart_is_named():
    target, baseline, _ = classes()
    target[:, 2] = baseline[:, 2]
    with pytest.raises(RunFailed, match="layer 2: the mean residuals of target and baseline are equal"):
        fit_directions(stats(target), stats(baseline))
    target, baseline, _ = classes()
    target[:, 1] = 2 * baseline[:, 1]
    with pytest.raises(RunFailed, match="layer 1: no direction beyond the baseline mean"):
        fit_directions(stats(target), stats(baseline), method="projected")
    target, baseline, _ = classes()
    clusters = target.mean(0)[:, None].repeat(1, 2, 1)
    with pytest.raises(RunFailed, match="layer 0: only 1 directions of 2 asked"):
        fit_directions(stats(target), stats(baseline), rank=2, clusters=clusters)


def test_misuse_is_told():
    target, baseline, _ = classes()
    good = stats(target), stats(baseline)
    with pytest.raises(UsageError, match="shape"):
        fit_directions(stats(target[:, :3]), good[1])
    with pytest.raises(UsageError, match="mean, projected, biprojected"):
        fit_directions(*good, method="pca")
    with pytest.raises(UsageError, match="rank 0"):
        fit_directions(*good, rank=0)
    for clusters in (None, torch.zeros(L, 1, D), torch.zeros(L - 1, 2, D)):
        with pytest.raises(UsageError, match="for rank 2"):
            fit_directions(*good, rank=2, clusters=clusters)
    with pytest.raises(UsageError, match="directions of shape"):
        Directions(torch.zeros(L, D), torch.zeros(L), torch.zeros(L, D), torch.zeros(L, D))
    with pytest.raises(UsageError, match="mean residuals of shape"):
        Directions(torch.zeros(L, 1, D), torch.zeros(L), torch.zeros(D), torch.zeros(L, D))


def test_diagnostics_tell_a_real_difference_from_chance():
    target, baseline, _ = classes(n=200)
    real = fit_directions(stats(target), stats(baseline)).diagnostics
    chance = fit_directions(stats(baseline[::2]), stats(baseline[1::2])).diagnostics
    assert min(real["split_half_cosine"]) > 0.9
    assert max(chance["split_half_cosine"]) < 0.8
    assert all(0 < share < 1 for share in real["top4_share"])
    difference, mean = target.mean(0) - baseline.mean(0), baseline.mean(0)
    torch.testing.assert_close(torch.tensor(real["baseline_cosine"]), torch.cosine_similarity(difference, mean, dim=-1))
    for one in (stats(baseline), stats(baseline[:1])):
        assert fit_directions(stats(target[:1]), one).diagnostics["split_half_cosine"] == [0.0] * L


def test_a_winsorized_fit_finds_the_direction_beneath_massive_dimensions():
    target, baseline, planted = classes(n=60)
    torch.manual_seed(1)
    for x in (target, baseline):
        x[..., 3] = 3000 * (1 + 0.1 * torch.randn(len(x), L))
    planted[..., 3] = 0
    plain = fit_directions(stats(target), stats(baseline))
    clipped = fit_directions(stats(target, winsorize=0.95), stats(baseline, winsorize=0.95))
    assert torch.isfinite(clipped.vectors).all()
    assert torch.cosine_similarity(clipped.vectors[:, 0], planted, dim=-1).min() > 0.9
    assert torch.cosine_similarity(plain.vectors[:, 0], planted, dim=-1).abs().max() < 0.5


def test_whole_layers_are_as_stored_and_places_between_lie_between():
    found = random_directions()
    for layer in range(L):
        assert torch.equal(found.at(layer), found.vectors[layer])
    a, b = found.vectors[1, 0], found.vectors[2, 0]
    b = b * torch.sign(a @ b)
    middle = found.at(1.5)[0]
    torch.testing.assert_close(middle, torch.nn.functional.normalize(a + b, dim=0), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.at(1.25)[0], torch.nn.functional.normalize(3 * a + b, dim=0), rtol=0, atol=1e-6)


def test_a_flipped_sign_between_layers_does_not_cancel():
    found = random_directions()
    found.vectors[1] = -found.vectors[0]
    torch.testing.assert_close(found.at(0.5), found.vectors[0], rtol=0, atol=1e-6)


def test_a_turned_frame_between_layers_is_turned_back():
    found = random_directions(k=3)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(5))).Q
    found.vectors[1] = turn @ found.vectors[0]
    for place in (0.1, 0.5, 0.9):
        torch.testing.assert_close(found.at(place), found.vectors[0], rtol=0, atol=1e-5)


@given(seed=st.integers(0, 2**32), place=st.floats(0, L - 1), k=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_every_place_has_orthonormal_directions(seed, place, k):
    orthonormal(random_directions(seed, k=k).at(place))


@pytest.mark.parametrize("place", [-0.1, L - 0.9, L, float("nan")])
def test_a_place_outside_the_layers_is_refused(place):
    with pytest.raises(UsageError, match=f"0 to {L - 1}"):
        random_directions().at(place)
    with pytest.raises(UsageError, match=f"0 to {L - 1}"):
        random_directions().written(0, L)


def test_they_come_back_as_they_were_with_the_same_bytes(tmp_path):
    target, baseline, _ = classes()
    found = fit_directions(stats(target), stats(baseline), method="biprojected", provenance={"model": "pico", "n": [1]})
    found = found.with_diagnostics(auc=[0.5, 0.75, 1.0, 1.0])
    found.save(tmp_path / "a")
    back = Directions.load(tmp_path / "a")
    for name in ("vectors", "raw_norm", "baseline_mean", "target_mean"):
        assert torch.equal(getattr(back, name), getattr(found, name))
    assert (back.method, back.diagnostics, back.provenance) == (found.method, found.diagnostics, found.provenance)
    back.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_a_diagnostic_has_one_number_per_layer():
    with pytest.raises(UsageError, match="auc has 1 numbers"):
        random_directions().with_diagnostics(auc=[1.0])


def test_the_random_control_has_the_same_shape_and_nothing_else():
    found = random_directions(k=2)
    control = found.random_like(7)
    orthonormal(control.vectors)
    assert control.vectors.shape == found.vectors.shape
    assert torch.equal(control.vectors, found.random_like(7).vectors)
    assert not torch.equal(control.vectors, found.random_like(8).vectors)
    assert torch.einsum("lkd,lkd->lk", control.vectors, found.vectors).abs().max() < 0.8
    assert control.provenance["control"] == "random"


def test_coordinates_are_inner_products_with_the_layers_own_directions():
    found = random_directions(k=2)
    x = torch.randn(5, L, D, generator=torch.Generator().manual_seed(1))
    coordinates = found.coordinates(x)
    assert coordinates.shape == (5, L, 2)
    torch.testing.assert_close(coordinates[3, 2], found.vectors[2] @ x[3, 2])


@given(
    positive=st.lists(st.integers(-3, 3), min_size=1, max_size=12),
    negative=st.lists(st.integers(-3, 3), min_size=1, max_size=12),
)
@settings(max_examples=60, deadline=None)
def test_auc_is_mann_whitney(positive, negative):
    found = auc(torch.tensor(positive, dtype=torch.float32), torch.tensor(negative, dtype=torch.float32))
    assert found == pytest.approx(mannwhitneyu(positive, negative).statistic / len(positive) / len(negative), abs=1e-12)


def test_separation_is_one_where_the_classes_part_and_a_half_where_they_do_not():
    target = torch.tensor([[1.0, 5.0], [1.0, 6.0]])
    assert separation(target, torch.tensor([[1.0, 1.0], [1.0, 2.0]])) == [0.5, 1.0]
    with pytest.raises(UsageError):
        auc(torch.zeros(0), torch.zeros(1))


def planted_clusters(seed=0, n=60, c=3):
    generator = torch.Generator().manual_seed(seed)
    centres = 10 * torch.randn(c, L, D, generator=generator)
    member = torch.arange(n) % c
    return centres[member] + 0.1 * torch.randn(n, L, D, generator=generator), member


@pytest.mark.parametrize("size", [1, 7, 60])
def test_clusters_are_found_while_prompts_stream_by(size):
    x, member = planted_clusters()
    fitter = ClusterFitter(L, D, 3)
    moves = []
    for _ in range(3):
        for batch in x.split(size):
            fitter.update(batch)
        moves.append(fitter.step())
    assert moves[-1] < 1e-9
    expected = torch.stack([x[member == i].double().mean(0) for i in range(3)], dim=1)
    distance = torch.cdist(fitter.centroids(), expected)
    assert torch.equal(distance.argmin(-1).sort().values, torch.arange(3).expand(L, 3))
    assert distance.amin(-1).max() < 1e-9


def test_one_cluster_is_the_mean():
    x, _ = planted_clusters()
    fitter = ClusterFitter(L, D, 1)
    for batch in x.split(16):
        fitter.update(batch)
    fitter.step()
    torch.testing.assert_close(fitter.centroids()[:, 0], x.double().mean(0))


def test_a_cluster_without_prompts_stays_and_too_few_prompts_are_refused():
    fitter = ClusterFitter(L, D, 3)
    x, _ = planted_clusters()
    fitter.update(x[:1])
    fitter.update(x[1:2])
    with pytest.raises(UsageError, match="2 prompts for 3 clusters"):
        fitter.step()
    fitter.update(x[2:3])
    fitter.step()
    before = fitter.centroids().clone()
    assert fitter.step() == 0
    assert torch.equal(fitter.centroids(), before)
    with pytest.raises(UsageError, match="shape"):
        fitter.update(torch.zeros(2, L, D + 1))

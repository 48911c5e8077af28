from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from uvit.common.errors import InputError
from uvit.evaluation.metrics import (
    FeatureSample,
    Gaussian,
    ImageHash,
    InceptionScore,
    Moments,
    describe_statistics,
    frechet_distance,
    is_statistics,
    kernel_distance,
    load_statistics,
    save_statistics,
    shuffled_places,
)


def test_moments_equal_numpy_however_they_are_batched():
    features = torch.randn(50, 6, dtype=torch.float64) * 3 + 100
    moments = Moments(6)
    for part in features.split([1, 20, 29]):
        moments.update(part)
    np.testing.assert_allclose(moments.gaussian.mean, features.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(
        moments.gaussian.covariance, np.cov(features.numpy(), rowvar=False), rtol=1e-8, atol=1e-10
    )


def test_moments_of_one_process_are_those_of_all():
    moments = Moments(2).update(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert moments.reduce() is moments and moments.count == 2 and moments.gaussian.mean.tolist() == [2, 3]


def test_frechet_distance_of_commuting_gaussians():
    """For diagonal covariances it is |μ_a - μ_b|² + Σ (σ_a - σ_b)²."""
    base = torch.randn(5000, 3, dtype=torch.float64)
    base = (base - base.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(base.T))).T  # exactly N(0, 1)
    shift, scale = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([2.0, 3.0, 0.1])
    distance = frechet_distance(Moments(3).update(base).gaussian, Moments(3).update(base * scale + shift).gaussian)
    expected = shift.square().sum() + (scale - 1).square().sum()
    assert distance == pytest.approx(expected.item(), rel=1e-6)


def test_frechet_distance_equals_the_formula_with_scipys_root():
    a, b = torch.randn(40, 5, dtype=torch.float64), torch.randn(30, 5, dtype=torch.float64) * 2 + 1
    one, two = Moments(5).update(a).gaussian, Moments(5).update(b).gaussian
    cross = np.trace(sqrtm(one.covariance.numpy() @ two.covariance.numpy()).real)
    expected = (one.mean - two.mean).square().sum() + one.covariance.trace() + two.covariance.trace() - 2 * cross
    assert frechet_distance(one, two) == pytest.approx(expected.item(), rel=1e-9)
    assert frechet_distance(one, two) == pytest.approx(frechet_distance(two, one), rel=1e-9)


def test_frechet_distance_to_itself_is_zero_even_where_pixels_are_constant():
    features = torch.randn(30, 4, dtype=torch.float64)
    features[:, 2] = -1
    gaussian = Moments(4).update(features).gaussian
    assert frechet_distance(gaussian, gaussian) == pytest.approx(0, abs=1e-6)


def test_a_covariance_that_rounding_made_indefinite_has_the_root_of_its_positive_part():
    rounded = Gaussian(torch.zeros(2).double(), torch.diag(torch.tensor([1.0, -0.01])).double())
    whole = Gaussian(torch.zeros(2).double(), torch.eye(2).double())
    for a, b in ((rounded, whole), (whole, rounded)):
        assert frechet_distance(a, b) == pytest.approx(0.99 + 2 - 2)


def test_the_hash_of_a_gaussian_is_of_mean_and_covariance():
    mean, covariance = torch.randn(3).double(), torch.eye(3).double()
    hashes = {Gaussian(mean, covariance).hash, Gaussian(mean + 1, covariance).hash, Gaussian(mean, 2 * covariance).hash}
    assert len(hashes) == 3 and {len(each) for each in hashes} == {16}


class Identity(torch.nn.Module):
    num_features = 16

    def forward(self, x):
        return x


def test_frechet_distance_equals_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    a, b = torch.randn(200, 16) * 2, torch.randn(300, 16) + 0.5
    theirs = FrechetInceptionDistance(feature=Identity(), input_img_size=(16,)).set_dtype(torch.float64)
    theirs.update(a.double(), real=True)
    theirs.update(b.double(), real=False)
    ours = frechet_distance(Moments(16).update(a).gaussian, Moments(16).update(b).gaussian)
    assert ours == pytest.approx(theirs.compute().item(), rel=1e-3)


def test_a_distance_needs_two_images():
    with pytest.raises(InputError, match="a distance needs 2 images or more, got 1"):
        Moments(3).update(torch.zeros(1, 3)).gaussian  # noqa: B018


def test_kernel_distance():
    """Nothing between samples of one distribution, the known value between two."""
    a, b = torch.randn(3000, 4), torch.randn(3000, 4)
    mean, deviation, size = kernel_distance(a, b)
    assert abs(mean) < 0.02 and 0 < deviation < 0.1 and size == 1000
    assert kernel_distance(a[:2400], b)[2] == 1000
    few = kernel_distance(a[:600], b)
    assert few[1] > deviation and few[2] == 300  # subsets that leave images out have a spread
    with pytest.raises(InputError, match="a kernel distance needs 4 images or more, got 3"):
        kernel_distance(a, b[:3])
    assert kernel_distance(a[:4], b[:4])[2] == 2
    x, y = torch.ones(50, 4), torch.zeros(40, 4)  # k(x, x) = (1 + 1)³, k(x, y) = k(y, y) = 1
    assert kernel_distance(x, y)[0] == pytest.approx(8 + 1 - 2)


def test_kernel_distance_is_torch_fidelitys_with_the_subsets_of_the_paper():
    from torch_fidelity.metric_kid import kid_features_to_metric

    a, b = torch.randn(2000, 3), torch.randn(2001, 3) + 0.1
    theirs = kid_features_to_metric(a, b, kid_subsets=100, kid_subset_size=1000, verbose=False)
    expected = theirs["kernel_inception_distance_mean"], theirs["kernel_inception_distance_std"]
    assert kernel_distance(a, b) == (*expected, 1000)
    assert kernel_distance(a[1:], b)[2] == 999


def test_a_sample_keeps_ten_thousand_features_in_the_order_of_their_places():
    features, places = torch.arange(12_000.0)[:, None], shuffled_places(12_000)
    expected = features[places.argsort()][:10_000]
    for order in (1, -1):
        sample = FeatureSample(1)
        for part, its_places in [*zip(features.split(999), places.split(999))][::order]:
            sample.update(part, its_places)
        assert torch.equal(sample.gather(torch.device("cpu")), expected)
    assert FeatureSample(3).gather(torch.device("cpu")).shape == (0, 3)


def test_a_sample_of_features_is_bounded_and_fair():
    features, places = torch.arange(20_000.0)[:, None], shuffled_places(20_000)

    def sample(batch_size: int) -> torch.Tensor:
        sample = FeatureSample(1, capacity=1000)
        for part, its_places in zip(features.split(batch_size), places.split(batch_size)):
            sample.update(part, its_places)
        return sample.gather(torch.device("cpu"))

    kept = sample(300)
    assert kept.shape == (1000, 1) and len(kept.unique()) == 1000
    assert kept.mean().item() == pytest.approx(10_000, rel=0.06)
    assert torch.equal(kept, sample(20_000))  # whatever the batches
    few = FeatureSample(1, capacity=1000).update(torch.arange(5.0)[:, None], shuffled_places(5))
    assert sorted(few.gather(torch.device("cpu")).flatten().tolist()) == [0, 1, 2, 3, 4]


def test_the_hash_of_images_does_not_depend_on_their_order_and_tells_sets_apart():
    images = torch.randint(0, 256, (9, 3, 4, 4), dtype=torch.uint8)
    whole = ImageHash().update(images).compute(torch.device("cpu"))
    mixed = ImageHash()
    for part in images.flip(0).split(4):
        mixed.update(part)
    assert mixed.compute(torch.device("cpu")) == whole and len(whole) == 16
    others = images.clone()
    others[3, 0, 0, 0] += 1
    for other in (images[:8], others, images.reshape(9, 3, 2, 8), torch.cat([images, images[:1]])):
        assert ImageHash().update(other).compute(torch.device("cpu")) != whole


def test_inception_score_equals_torch_fidelitys_and_known_cases():
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits, places = torch.randn(503, 7) * 3, shuffled_places(503)
    score = InceptionScore(7, 503)
    for part, its_places in zip(logits.split([3, 97, 403]), places.split([3, 97, 403])):
        score.update(part, its_places)
    theirs = isc_features_to_metric(logits)  # shuffled with the same seed, then cut
    mean, deviation = score.compute()
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert deviation == pytest.approx(theirs["inception_score_std"], rel=1e-6)
    certain = torch.eye(5).repeat_interleave(40, dim=0) * 1000
    known = InceptionScore(5, 200).update(certain, torch.arange(200).reshape(40, 5).T.flatten())
    assert known.compute()[0] == pytest.approx(5, rel=1e-6)  # as many of each class in every split
    assert InceptionScore(5, 30).update(torch.zeros(30, 5), shuffled_places(30)).compute()[0] == pytest.approx(1)


def test_the_inception_score_of_images_in_periodic_order():
    """Labels that come round every ten images must not end up in a split each."""
    certain = (torch.eye(10) * 1000).repeat(300, 1)
    score = InceptionScore(10, 3000).update(certain, shuffled_places(3000)).compute()[0]
    assert score == pytest.approx(10, rel=0.02)


def test_statistics_round_trip(tmp_path):
    gaussian = Moments(4).update(torch.randn(20, 4)).gaussian
    save_statistics(tmp_path / "ref.npz", gaussian, features="pixels", image_size=(2, 2), num_images=20)
    loaded = load_statistics(tmp_path / "ref.npz", "pixels", 4, (2, 2))
    assert all(torch.equal(a, b) for a, b in zip(loaded, gaussian)) and loaded.hash == gaussian.hash
    assert is_statistics(tmp_path / "ref.npz")
    few = Moments(50).update(torch.randn(20, 50)).gaussian  # of lower rank, and rounded: semidefinite all the same
    np.savez(tmp_path / "low.npz", mu=few.mean.numpy(), sigma=few.covariance.numpy().astype(np.float32))
    assert load_statistics(tmp_path / "low.npz", "inception", 50, (2, 2)).mean.shape == (50,)
    np.savez(tmp_path / "black.npz", mu=np.zeros(4), sigma=np.zeros((4, 4)))
    assert not load_statistics(tmp_path / "black.npz", "inception", 4, (2, 2)).covariance.any()
    np.savez(tmp_path / "adm.npz", mu=gaussian.mean.numpy(), sigma=gaussian.covariance.numpy().astype(np.float32))
    assert load_statistics(tmp_path / "adm.npz", "inception", 4, (2, 2)).covariance.dtype == torch.float64


def test_what_an_npz_holds(tmp_path):
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    np.savez(tmp_path / "both.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8), mu=np.zeros(3), sigma=np.eye(3))
    assert not is_statistics(tmp_path / "images.npz") and is_statistics(tmp_path / "both.npz")
    np.savez(tmp_path / "neither.npz", sigma=np.eye(3))  # which is for load_statistics to say
    assert is_statistics(tmp_path / "neither.npz")
    np.savez(tmp_path / "counted.npz", num_images=7)
    described = [describe_statistics(tmp_path / name) for name in ("counted.npz", "both.npz")]
    assert described == ["statistics of 7 images", "statistics of others"]
    assert not is_statistics(tmp_path) and not is_statistics(tmp_path / "nowhere.npz")


def test_statistics_that_do_not_fit(tmp_path):
    path, gaussian = tmp_path / "ref.npz", Moments(4).update(torch.randn(20, 4)).gaussian
    save_statistics(path, gaussian, features="pixels", image_size=(2, 2))
    for features, width, size, message in (
        ("inception", 2048, (2, 2), r"holds statistics of 4 features of 'pixels', expected 2048 of 'inception'"),
        ("pixels", 4, (8, 8), r"holds statistics of images of size \(2, 2\), expected \(8, 8\)"),
    ):
        with pytest.raises(InputError, match=message):
            load_statistics(path, features, width, size)
    save_statistics(path, gaussian, features="inception", weights_hash="one")
    assert load_statistics(path, "inception", 4, (8, 8), "one").mean.shape == (4,)
    with pytest.raises(InputError, match="holds statistics of 'inception' with weights one, expected two"):
        load_statistics(path, "inception", 4, (8, 8), "two")
    np.savez(path, mu=np.zeros(3), sigma=np.zeros((3, 4)))
    with pytest.raises(InputError, match=r"must hold mu \(D,\) and sigma \(D, D\), got \(3,\) and \(3, 4\)"):
        load_statistics(path, "pixels", 3, (1, 1))
    for mu, sigma in ((np.full(2, np.nan), np.eye(2)), (np.zeros(2), np.array([[1.0, 0.5], [0.0, 1.0]]))):
        np.savez(path, mu=mu, sigma=sigma)
        with pytest.raises(InputError, match="must hold finite numbers and a symmetric sigma"):
            load_statistics(path, "pixels", 2, (1, 1))
    for sigma in (-np.eye(2), np.array([[1.0, 2.0], [2.0, 1.0]])):
        np.savez(path, mu=np.zeros(2), sigma=sigma)
        with pytest.raises(InputError, match="must hold a positive semidefinite sigma"):
            load_statistics(path, "pixels", 2, (1, 1))
    for sigma in (np.eye(2, dtype=complex), np.eye(2, dtype=int)):
        np.savez(path, mu=np.zeros(2), sigma=sigma)
        with pytest.raises(InputError, match=f"of real numbers, got float64 and {sigma.dtype}"):
            load_statistics(path, "pixels", 2, (1, 1))
    for content in (b"", b"garbage"):
        path.write_bytes(content)
        assert is_statistics(path)
        with pytest.raises(InputError, match=r"does not hold statistics \(mu, sigma\)"):
            load_statistics(path, "pixels", 3, (1, 1))
    np.savez(path, mu=np.array([{}], dtype=object), sigma=np.zeros((1, 1)))
    with pytest.raises(InputError, match=r"does not hold statistics \(mu, sigma\)"):
        load_statistics(path, "pixels", 1, (1, 1))

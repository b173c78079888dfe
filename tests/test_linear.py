"""The fast linear probe and the nearest neighbours, beside scikit-learn."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, log_loss
from sklearn.model_selection import LeaveOneGroupOut, LeaveOneOut
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from maehub.errors import DataError, DivergedError, UsageError
from maehub.train.evaluation import linear
from maehub.train.evaluation.linear import STRENGTHS, Trial, accuracy, best, fit_at, sweep
from maehub.train.evaluation.neighbours import choose_neighbours, leave_one_out, vote


def clusters(n, width, classes, spread=1.0, seed=0):
    """Classes that overlap, in directions of very different size, away from zero."""
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(width, width)) * np.exp(-4 * np.arange(width) / width)[:, None]
    centres, labels = generator.normal(size=(classes, width)), generator.integers(0, classes, n)
    labels[:classes] = np.arange(classes)
    features = (spread * centres[labels] + 2 * generator.normal(size=(n, width))) @ mixing + 3
    return torch.tensor(features, dtype=torch.float32), labels


def in_halves(n):
    places = np.arange(n)
    return [(places[places % 2 == 0], places[places % 2 == 1])]


@pytest.mark.parametrize(("n", "width", "classes"), [(200, 12, 3), (60, 90, 4), (400, 40, 10)])
@pytest.mark.parametrize("strength", [10, 0.1, 0.003, 1e-4])
def test_probabilities_are_those_of_scikit_learn(n, width, classes, strength):
    features, labels = clusters(n * 2, width, classes)
    features = torch.cat([features, features[:, :2], torch.ones(n * 2, 1)], dim=1)  # repeated and constant columns
    fit = fit_at(features[:n], labels[:n], classes, strength)
    scaler = StandardScaler().fit(features[:n].double().numpy())
    scaled = scaler.transform(features.double().numpy())
    peer = LogisticRegression(C=1 / (strength * n), tol=1e-8, max_iter=50_000).fit(scaled[:n], labels[:n])
    wrong = np.abs(fit.logits(features).softmax(dim=1).numpy() - peer.predict_proba(scaled))
    assert wrong[:n].max() < 1e-3
    if n > width or strength > 1e-3:  # else both end short of the last digits that tell other pictures
        assert wrong[n:].max() < 1e-3


def test_several_labels_are_as_many_classifiers():
    features, labels = clusters(300, 20, 3)
    truth = np.stack([labels == 0, labels != 1, features[:, 0].numpy() > 3], axis=1)
    fit = fit_at(features, truth, 3, 0.01)
    scaled = StandardScaler().fit_transform(features.double().numpy())
    for column in range(3):
        peer = LogisticRegression(C=1 / (0.01 * 300), tol=1e-8, max_iter=50_000).fit(scaled, truth[:, column])
        ours = torch.sigmoid(fit.logits(features))[:, column].numpy()
        assert np.abs(ours - peer.predict_proba(scaled)[:, 1]).max() < 1e-3
    expected = np.mean(
        [average_precision_score(truth[:, column], fit.logits(features)[:, column]) for column in range(3)]
    )
    assert accuracy(fit.logits(features), truth) == pytest.approx(100 * expected)


def test_the_strength_is_chosen_by_what_is_held_out_alone():
    features, labels = clusters(240, 100, 4, spread=0.6)
    inner = in_halves(240)
    trials = sweep(features, labels, 4, inner)
    assert [trial.strength for trial in trials] == list(STRENGTHS)
    most = max(trial.accuracy for trial in trials)
    chosen = min((trial for trial in trials if trial.accuracy >= most - 0.5), key=lambda trial: trial.loss)
    assert best(trials) == chosen
    # The weakest penalty fits the training half best and is not chosen: it does worse on the other half.
    assert trials[-1].loss > chosen.loss
    assert trials[-1].accuracy < chosen.accuracy
    held = inner[0][1]
    alone = fit_at(features[inner[0][0]], labels[inner[0][0]], 4, chosen.strength)
    logits = alone.logits(features[held])
    assert accuracy(logits, labels[held]) == pytest.approx(chosen.accuracy, abs=1)
    assert log_loss(labels[held], logits.double().softmax(1).numpy()) == pytest.approx(chosen.loss, rel=0.02)


def test_several_inner_splits_count_by_their_pictures():
    features, labels = clusters(90, 10, 3)
    places = np.arange(90)
    parts = [(places[30:], places[:30]), (places[:60], places[60:70])]
    both, first, second = (sweep(features, labels, 3, which) for which in (parts, parts[:1], parts[1:]))
    for trial, one, other in zip(both, first, second, strict=True):
        assert trial.accuracy == pytest.approx((30 * one.accuracy + 10 * other.accuracy) / 40)
        assert trial.loss == pytest.approx((30 * one.loss + 10 * other.loss) / 40)


def test_of_the_most_accurate_strengths_the_one_of_least_loss_is_taken_and_of_equal_ones_the_stronger():
    trials = [Trial(0.1, 70.4, 0.6), Trial(10.0, 70.0, 0.5), Trial(1.0, 70.0, 0.5), Trial(100.0, 60.0, 0.1)]
    assert best(trials) == trials[1]


@settings(max_examples=15, deadline=None)
@given(
    st.integers(6, 40),
    st.integers(1, 60),
    st.sampled_from([1e-3, 1.0, 1e4]),
    st.floats(-100, 100),
    st.integers(0, 1000),
)
def test_units_and_zero_points_of_features_do_not_matter(n, width, scale, shift, seed):
    features, labels = clusters(n, width, 3, seed=seed)
    features = (features - features.mean(0)) / (features.std(0) + 1e-3)
    one = fit_at(features, labels, 3, 0.1).logits(features)
    other = fit_at(features * scale + shift * scale, labels, 3, 0.1).logits(features * scale + shift * scale)
    assert torch.isfinite(one).all()
    assert torch.allclose(one, other, atol=1e-2)


def test_columns_that_say_nothing_change_nothing():
    features, labels = clusters(80, 8, 3)
    fit = fit_at(torch.cat([features, torch.full((80, 3), 7.0), torch.zeros(80, 1)], dim=1), labels, 3, 0.01)
    assert (fit.weight[:, 8:] == 0).all()
    assert torch.allclose(fit.weight[:, :8], fit_at(features, labels, 3, 0.01).weight, atol=1e-5)
    nothing = fit_at(torch.ones(80, 5), labels, 3, 0.01)
    share = np.bincount(labels, minlength=3) / 80
    assert nothing.logits(torch.ones(1, 5)).softmax(1).numpy()[0] == pytest.approx(share, abs=1e-4)


def test_the_same_twice_is_equal_bit_for_bit():
    features, labels = clusters(150, 64, 5)
    one, other = (sweep(features, labels, 5, in_halves(150)) for _ in range(2))
    assert one == other
    one, other = (fit_at(features, labels, 5, best(one).strength) for _ in range(2))
    assert torch.equal(one.weight, other.weight)


def test_what_cannot_be_fitted():
    features, labels = clusters(30, 4, 3)
    with pytest.raises(DataError, match="one class"):
        fit_at(features, np.zeros(30, int), 1, 1.0)
    with pytest.raises(UsageError, match="below 2"):
        fit_at(features, labels, 2, 1.0)
    with pytest.raises(UsageError, match="inner split"):
        sweep(features, labels, 3, [])
    with pytest.raises(UsageError, match="must be"):
        fit_at(features, labels[:-1], 3, 1.0)
    broken = features.clone()
    broken[4, 2] = torch.nan
    with pytest.raises(DivergedError, match="1 of 30"):
        fit_at(broken, labels, 3, 1.0)


def wu(distances):
    """The weights of Wu et al. 2018 from cosine distances."""
    return np.exp((1 - distances) / 0.07)


@pytest.mark.parametrize("k", [1, 7, 50])
def test_votes_are_those_of_scikit_learn(k):
    features, labels = clusters(150, 10, 4)
    peer = KNeighborsClassifier(k, weights=wu, metric="cosine", algorithm="brute").fit(features[:100], labels[:100])
    ours = vote(features[:100], labels[:100], features[100:], k, classes=4)
    assert np.abs(ours.numpy() - peer.predict_proba(features[100:])).max() < 1e-4


def test_a_neighbour_votes_for_each_of_its_labels():
    features, labels = clusters(60, 6, 3)
    truth = np.stack([labels == 0, labels <= 1, np.zeros(60, bool)], axis=1)
    ours = vote(features[:50], truth[:50], features[50:], 9)
    for column in (0, 1):
        single = vote(features[:50], truth[:50, column].astype(int), features[50:], 9, classes=2)
        assert torch.allclose(ours[:, column], single[:, 1], atol=1e-6)
    assert (ours[:, 2] == 0).all()


@pytest.mark.parametrize("grouped", [False, True])
def test_neighbours_are_chosen_leaving_one_out(grouped):
    features, labels = clusters(60, 10, 3)
    groups = np.arange(60) // 4 if grouped else None
    for trial in choose_neighbours(features, labels, groups, candidates=(1, 5, 20, 60, 200)):
        peer = KNeighborsClassifier(trial.neighbours, weights=wu, metric="cosine", algorithm="brute")
        parts = LeaveOneGroupOut().split(features, groups=groups) if grouped else LeaveOneOut().split(features)
        right = [peer.fit(features[fit], labels[fit]).predict(features[held]) == labels[held] for fit, held in parts]
        assert trial.accuracy == pytest.approx(100 * np.concatenate(right).mean())
    assert [trial.neighbours for trial in choose_neighbours(features, labels, candidates=(1, 60))] == [1]


def test_a_group_does_not_vote_for_its_own():
    """Each picture is there twice, with a random class: its twin tells it, and nothing else does."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(100, 16, generator=generator).repeat_interleave(2, dim=0)
    labels = torch.randint(0, 5, (100,), generator=generator).repeat_interleave(2).numpy()
    assert choose_neighbours(features, labels, candidates=[1])[0].accuracy == 100
    assert choose_neighbours(features, labels, np.arange(200) // 2, candidates=[1])[0].accuracy < 50
    assert leave_one_out(features, torch.from_numpy(labels), 1) == 100


def test_pictures_whose_neighbours_are_all_barred_get_no_vote():
    features = torch.eye(4)
    (trial,) = choose_neighbours(features, np.array([0, 1, 0, 1]), np.zeros(4, int), candidates=[3])
    assert trial.accuracy == 50  # of no votes the first class counts as the highest
    with pytest.raises(UsageError, match="no neighbours"):
        choose_neighbours(torch.eye(1), np.array([0]))


def test_directions_of_features_where_the_fast_way_does_not_converge(monkeypatch):
    """Hundreds of empty columns, as of a colour histogram of grey pictures; and a LAPACK that gives up."""
    features = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    features = torch.cat([features, torch.zeros(100, 500), features[:, :3]], dim=1)
    features -= features.mean(dim=0)
    values, directions = linear._spectrum(features)
    assert values.shape == (8,)
    assert torch.allclose(features @ directions @ directions.T, features, atol=1e-4)

    def gives_up(_):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", gives_up)
    others, _ = linear._spectrum(features)
    assert torch.allclose(values, others)


def test_a_probe_that_does_not_converge_is_told(monkeypatch, caplog):
    features, labels = torch.randn(60, 5, dtype=torch.float64), np.arange(60) % 3
    assert not caplog.text
    fit_at(features, labels, 3, 1e-3)
    assert not caplog.text
    monkeypatch.setitem(linear._STEPS, torch.float64, 2)
    fit_at(features, labels, 3, 1e-3)
    assert "the probe at a penalty of 0.001 has not converged within 2 steps" in caplog.text
    monkeypatch.setattr(linear, "_loss", lambda logits, truth: logits.sum() * torch.nan)
    with pytest.raises(DivergedError, match="does not converge"):
        fit_at(features, labels, 3, 1e-3)

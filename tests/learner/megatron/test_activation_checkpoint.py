"""What recomputation saves; that it computes the same is in test_learner.py's cases."""


def test_selective_drops_what_feed_forwards_keep_and_full_all_but_the_layers_inputs(results_of):
    held = results_of(1)["kept_activations"]
    assert held["full"] < 0.1 * held["none"]
    assert held["full"] < held["selective"] < 0.65 * held["none"]  # the feed-forward is 1.5 hidden sizes wide here

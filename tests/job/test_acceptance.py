"""Acceptance from raw counts, by generation, by context length, and beside the prediction of training."""

from __future__ import annotations

import pytest

from omr.job._acceptance import acceptance, by_generation, prediction, tables
from omr.server import SpecCounts, context_bucket
from omr.server._metrics import Metrics
from omr.server.native import Native


def counted() -> SpecCounts:
    """Steps at contexts of 10, 256, 257 and 5000 tokens, of 3 drafted tokens each."""
    counts = SpecCounts(accepted_per_pos=[0, 0, 0], drafted_per_pos=[0, 0, 0])
    for context, accepted in ((10, 3), (256, 1), (257, 0), (5000, 2)):
        counts.count(context, 3, accepted)
    return counts


def test_buckets_are_powers_of_two_and_hold_their_end() -> None:
    sizes = [context_bucket(n) for n in (1, 255, 256, 257, 512, 513, 1024, 1025, 32768)]
    assert sizes == [256, 256, 256, 512, 512, 1024, 1024, 2048, 32768]


def test_rates_of_positions_and_contexts() -> None:
    got = acceptance(counted())
    assert (got["accept/drafts"], got["accept/draft_tok"], got["accept/accepted_tok"]) == (4, 12, 6)
    assert got["accept/len_mean_tok"] == 2.5 and got["accept/rate"] == 0.5
    assert [got[f"accept/pos{i}_marginal"] for i in (1, 2, 3)] == [0.75, 0.5, 0.25]
    assert [got[f"accept/pos{i}_conditional"] for i in (1, 2, 3)] == [0.75, pytest.approx(2 / 3), 0.5]
    assert [got[f"accept/context{n}_drafts"] for n in (256, 512, 8192)] == [2, 1, 1]
    assert [got[f"accept/context{n}_len_mean_tok"] for n in (256, 512, 8192)] == [3, 1, 3]
    assert "accept/context1024_drafts" not in got
    assert acceptance(SpecCounts()) == {"accept/drafts": 0, "accept/draft_tok": 0, "accept/accepted_tok": 0}


def test_a_metrics_page_says_what_was_counted_and_differences_are_exact() -> None:
    counts = counted()
    page = Metrics("m").render(running=0, waiting=0, kv_usage=0.0, spec=counts)
    assert 'omr:spec_decode_num_drafts_by_context_total{model_name="m",context="256"} 2' in page
    before = Native().spec_counts(page)
    assert before == counts
    counts.count(300, 3, 3)
    assert counts - before == SpecCounts(
        drafts=1,
        draft_tokens=3,
        accepted_tokens=3,
        accepted_per_pos=[1, 1, 1],
        drafted_per_pos=[1, 1, 1],
        by_context={512: (1, 3, 3)},
    )


def test_shorter_drafts_lower_no_rate_and_the_prediction_is_of_drafts_that_long() -> None:
    """An adaptive drafter: 4 drafts of 3 tokens as above, then 4 of one token, 3 of them accepted."""
    counts = counted()
    for accepted in (1, 1, 1, 0):
        counts.count(10, 1, accepted)
    got = acceptance(counts)
    assert [got[f"accept/pos{i}_drafted"] for i in (1, 2, 3)] == [1.0, 0.5, 0.5]
    assert [got[f"accept/pos{i}_marginal"] for i in (1, 2, 3)] == [0.75, 0.5, 0.25]
    trained = {"redrafter0_prefix": 0.75, "redrafter1_prefix": 0.5, "redrafter2_prefix": 0.25}
    assert got["accept/len_mean_tok"] == 1 + 9 / 8
    assert prediction(trained, got)["accept/len_gap_tok"] == pytest.approx(0)
    assert Native().spec_counts(Metrics("m").render(running=0, waiting=0, kv_usage=0.0, spec=counts)) == counts


def test_generations_weigh_alike_or_by_their_tokens() -> None:
    rows = [
        {"num_drafts": 10, "num_draft_tokens": 30, "num_accepted_tokens": 20, "num_generated_tokens": 30},
        {"num_drafts": 10, "num_draft_tokens": 30, "num_accepted_tokens": 0, "num_generated_tokens": 10},
        {"num_drafts": 0, "num_draft_tokens": 0, "num_accepted_tokens": 0, "num_generated_tokens": 99},
        {"num_generated_tokens": 99},
    ]
    got = by_generation(rows)
    assert got["accept/generations"] == 2 and got["accept/len_request_mean_tok"] == 2.0
    assert got["accept/len_token_mean_tok"] == pytest.approx((3 * 30 + 1 * 10) / 40)
    assert got["accept/rate_request_mean"] == pytest.approx(1 / 3)
    assert by_generation(rows[2:]) == {}


def test_prediction_is_for_the_positions_that_were_served() -> None:
    served = acceptance(counted())
    trained = {"redrafter0_prefix": 0.8, "redrafter1_prefix": 0.6, "redrafter2_prefix": 0.3, "redrafter3_prefix": 0.2}
    got = prediction(trained, served)
    assert got["accept/len_predicted_tok"] == pytest.approx(2.7) and got["accept/len_gap_tok"] == pytest.approx(-0.2)
    assert got["accept/pos2_predicted"] == 0.6 and "accept/pos4_predicted" not in got
    replay = {f"redrafter{i}_replay": share for i, share in enumerate((0.7, 0.5, 0.25))}
    assert prediction(trained | replay, served)["accept/len_replay_gap_tok"] == pytest.approx(0.05)
    assert prediction({}, served) == {} == prediction({"redrafter0_prefix": 0.8}, served) == prediction(trained, {})


def test_the_report_shows_served_beside_predicted() -> None:
    served = acceptance(counted())
    lines = tables(served | prediction({f"redrafter{i}_prefix": 0.5 for i in range(3)}, served))
    assert "4 drafts, 12 tokens drafted, 6 accepted." in lines
    assert "| served minus predicted | 0.000 |" in lines and "| 2 | 0.500 | 0.500 | - | 0.667 |" in lines
    assert "| 1 to 256 | 2 | 3.000 | 0.667 |" in lines and "| 4097 to 8192 | 1 | 3.000 | 0.667 |" in lines
    assert tables({"accept/drafts": 0.0}) == []

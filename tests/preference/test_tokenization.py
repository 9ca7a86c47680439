import itertools

import pytest
import torch

from papertrl.losses.preference.scores import either_wrong
from papertrl.models.tokenization import stack_sequences


def test_sequences_are_cut_and_padded():
    rows = [[([5, 6, 7], [9, 2]), ([8], [3, 3, 3, 2])], [([4, 4], [])]]
    ids, attention, marks = stack_sequences(rows, 0, 4)
    assert ids.tolist() == [[[5, 6, 7, 9], [8, 3, 3, 3]], [[4, 4, 0, 0], [0, 0, 0, 0]]]
    assert attention.tolist() == [[[1, 1, 1, 1], [1, 1, 1, 1]], [[1, 1, 0, 0], [0, 0, 0, 0]]]
    assert marks.tolist() == [[[0, 0, 0, 1], [0, 1, 1, 1]], [[0, 0, 0, 0], [0, 0, 0, 0]]]
    assert stack_sequences([[([5], [6, 7])]], 0)[0].tolist() == [[[5, 6, 7]]]


def test_the_end_is_kept_and_marks_are_numbers():
    ids, attention, marks = stack_sequences(
        [[([5, 6], [7, 8, 9])], [([1], [2])]], 0, 4, "keep_end", [[[1, 0, 2]], [[3]]]
    )
    assert ids.tolist() == [[[6, 7, 8, 9]], [[1, 2, 0, 0]]]
    assert attention.tolist() == [[[1, 1, 1, 1]], [[1, 1, 0, 0]]]
    assert marks.tolist() == [[[0, 1, 0, 2]], [[0, 3, 0, 0]]]


@pytest.mark.parametrize(("p", "q"), [(0.2, 0.3), (0.0, 0.4), (1.0, 1.0), (0.5, 0.9)])
def test_a_label_is_wrong_for_one_of_two_reasons(p, q):
    # Every outcome of the two, where one of them alone turns the label around
    expected = sum(
        (p if first else 1 - p) * (q if second else 1 - q)
        for first, second in itertools.product((False, True), repeat=2)
        if first != second
    )
    first, second = torch.tensor([p]), torch.tensor([q])
    assert either_wrong(first, second).item() == pytest.approx(expected)
    assert either_wrong(None, second) is second

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from trl import SFTConfig, SFTTrainer

from papertrl import Dedup, SupervisedTrainer, compose
from papertrl.data.dedup import _jaccard

from ..harness.table import dataset, settings

WORDS = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=8).map(" ".join)


def kept_by_all_pairs(texts, similarity, n):
    """Every row against every row that is kept, without MinHash."""
    grams = []
    for text in texts:
        words = text.split()
        grams.append({tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))})
    kept = []
    for row, mine in enumerate(grams):
        if all(len(mine & grams[k]) / len(mine | grams[k]) < similarity for k in kept):
            kept.append(row)
    return kept


@given(st.lists(WORDS, min_size=1, max_size=12), st.sampled_from([1, 2]))
def test_rows_that_are_equal_or_nearly_so_are_found(texts, n):
    component = Dedup(dedup_similarity=0.9, dedup_ngram=n)
    found = component.rows(Dataset.from_dict({"text": texts}))["text"]
    assert list(found) == [texts[i] for i in kept_by_all_pairs(texts, 0.9, n)]


def test_the_similarity_is_that_of_sets():
    assert _jaccard(frozenset("abc"), frozenset("bcd")) == 0.5


def test_messages_are_compared_by_their_text():
    rows = [[{"role": "user", "content": "one two"}], [{"role": "user", "content": "one two"}]]
    assert len(Dedup().rows(Dataset.from_dict({"messages": rows}))) == 1


def test_a_bare_trl_trainer_takes_the_rows(tiny_path, tmp_path):
    rows = Dataset.from_dict({"text": ["1+1=2", "1+1=2", "2+2=4"]})
    trainer = SFTTrainer(tiny_path, SFTConfig(**settings("supervised", tmp_path)), train_dataset=Dedup().rows(rows))
    assert len(trainer.train_dataset) == 2


def test_what_it_cannot_compare_is_refused(tiny_path, tmp_path):
    trainer_class = compose(SupervisedTrainer, Dedup)
    streamed = dataset("supervised").to_iterable_dataset()
    args = trainer_class.config_class(**settings("supervised", tmp_path))
    with pytest.raises(ValueError, match="must be a map-style `Dataset` for 'dedup'"):
        trainer_class(tiny_path, args, train_dataset=streamed)
    with pytest.raises(ValueError, match=r"`dedup_column` must be one of the columns \['x'\]"):
        Dedup().rows(Dataset.from_dict({"x": [1]}))
    with pytest.raises(ValueError, match="`dedup_similarity` must be a number in"):
        Dedup(dedup_similarity=2)

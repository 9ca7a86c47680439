"""Corpus BLEU, through sacrebleu."""

import datasets
import evaluate


class Bleu(evaluate.Metric):
    """`compute(predictions, references)` → `bleu`, from 0 to 100, of lists of text; one reference each."""

    def _info(self):
        return evaluate.MetricInfo(
            description="Corpus BLEU with sacrebleu's standard tokenization and smoothing.",
            citation="Post (2018), A Call for Clarity in Reporting BLEU Scores, arXiv:1804.08771",
            inputs_description="predictions, references: text",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references):
        import sacrebleu

        return {"bleu": sacrebleu.corpus_bleu(list(predictions), [list(references)]).score}

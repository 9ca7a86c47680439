"""DRIFT: real rejected answers keep teaching where samples of the policy come to equal the chosen ones."""

from ..evidence import Arm, Claim, Comparison, Metric, greedy_accuracy, mean, sampled_accuracy

ACCURACY = Metric("sampled_accuracy")
GREEDY = Metric("accuracy")
GRADIENT = Metric("grad_norm", summary=mean)
SAMPLING = {
    "online_iterations": 3,
    "online_num_prompts": 1280,
    "online_reuse_prompts": True,
    "online_max_new_tokens": 5,
    "online_batch_size": 640,
    "online_reference": "previous",
}
DRIFT = {**SAMPLING, "drift_text_template": "{prompt}{rejected} {feedback}:"}


def fresh_negatives(trainer_class: type) -> type:
    """A new answer of the policy as the rejected one; the real one is only shown, with its feedback."""

    class FreshNegatives(trainer_class):
        def propose(self, groups):
            super().propose(groups)
            for group in groups:
                # The real one, which stands last
                group.candidates.pop()
            self.draw(groups, 1)

    return FreshNegatives


CLAIM = Claim(
    method="drift",
    statement="Answers sampled with a user's complaint in view, set against the real answer that was complained of, "
    "teach more than self-generated negatives: these approach the chosen answers, and the gradient degenerates.",
    figures="WildBench +7.61 and AlpacaEval 2 +12.29 points over the base (14B), above iterative DPO and SPIN",
    check="Sums with carries. The rejected answers forget them, as the start model often does; the feedback says too "
    "low or too high, after which the start model errs less. Three iterations, all on the same turns. The control "
    "takes a new sample of the policy as the rejected answer and is the same otherwise.",
    task="addition",
    task_kwargs={"feedback_share": 0.3},
    settings={"per_device_train_batch_size": 64, "max_steps": 60, "learning_rate": 5e-5, "beta": 0.1},
    arms={
        "DRIFT": Arm(methods=("drift",), settings=DRIFT),
        "fresh negatives": Arm(methods=("drift",), settings=DRIFT, control=fresh_negatives),
        "iterative DPO": Arm(settings={**SAMPLING, "online_num_samples": 2}, note="samples judged by the verifier"),
    },
    comparisons=(
        Comparison("DRIFT", "fresh negatives", ACCURACY, 0.02),
        Comparison("DRIFT", "fresh negatives", GRADIENT, 0.1),
        Comparison("DRIFT", "iterative DPO", ACCURACY, 0.02),
        Comparison("DRIFT", "iterative DPO", GRADIENT, 0.1),
    ),
    tune_on=ACCURACY,
    measures=(greedy_accuracy, sampled_accuracy),
    evaluations=6,
    findings="Measured with other turns in each iteration, so that no rejected answer returned, unlike in the paper; "
    "to be measured again. On seeds 0 to 4, at a rate of 3e-4, all arms lost accuracy, DRIFT most of it; the rate "
    "was lowered by development seeds, and seeds 5 to 9 measured. At this rate DRIFT ends ahead of fresh negatives "
    "on three of five seeds, by 0.28 to 0.37, where these break down, and level on the others. Its gradient "
    "does not vanish, but nor does that of fresh negatives, which is larger on every seed. Iterative DPO, "
    "whose samples a verifier judges, is ahead on every seed; DRIFT has no verifier.",
)

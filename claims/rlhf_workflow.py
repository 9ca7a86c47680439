"""RLHF Workflow: pairs of the current policy's own completions go further than pairs sampled once."""

from statistics import fmean

from ..evidence import Arm, Claim, Comparison, Metric, Probe, Start

TRUE = Metric("true_reward")
LENGTH = Metric("length", "lower")
# As much for each token as the proxy gives for each letter
PENALTY = {"rlhf_choose_type": "max_min_p", "rlhf_length_penalty": 0.1}


def rewards(probe: Probe) -> dict[str, float]:
    """`true_reward`, `proxy_reward` and `length` in tokens, of four samples per prompt."""
    return {
        "true_reward": fmean(probe.scores(samples=4, reward=probe.task.true_reward)),
        "proxy_reward": fmean(probe.scores(samples=4, reward=probe.task.proxy_reward)),
        "length": fmean(map(len, probe.completions(samples=4))),
    }


CLAIM = Claim(
    method="rlhf_workflow",
    statement="DPO on pairs that are sampled from the current policy and judged anew in each iteration goes further "
    "than DPO on pairs that were made once; a penalty on length in their selection keeps answers short.",
    figures="Length-controlled AlpacaEval 12.5 (SFT) to 30.9, against 22.9 of Llama-3-8B-Instruct; MATH 41.1, 43.0, "
    "43.8, 44.4 over three iterations (repository)",
    check="Words that must contain a marker; completions are judged by a proxy that overvalues length. Three "
    "iterations of best against worst of eight, against pairs sampled once from the start model, as many steps on as "
    "many prompts, both selected with a penalty on length; and three iterations without it. Measured are the true "
    "reward of samples and their length.",
    task="marker",
    task_kwargs={"train_on": "proxy", "letters": 4, "max_length": 8},
    start=Start(steps=1000, error_share=0.3),
    settings={
        "per_device_train_batch_size": 64,
        "max_steps": 90,
        "learning_rate": 2e-4,
        "beta": 0.3,
        "online_num_samples": 8,
        "online_max_new_tokens": 9,
        "online_batch_size": 512,
        "max_length": 32,
    },
    arms={
        "once": Arm(
            methods=("rlhf_workflow",), settings={**PENALTY, "online_iterations": 1, "online_num_prompts": 1200}
        ),
        "three iterations": Arm(
            methods=("rlhf_workflow",), settings={**PENALTY, "online_iterations": 3, "online_num_prompts": 400}
        ),
        "three iterations, no penalty": Arm(
            methods=("rlhf_workflow",), settings={"online_iterations": 3, "online_num_prompts": 400}
        ),
    },
    comparisons=(
        Comparison("three iterations", "once", TRUE, 0.03),
        Comparison("three iterations", "three iterations, no penalty", LENGTH, 0.5, guards={TRUE: 0.03}),
        Comparison("three iterations, no penalty", "once", TRUE, 0.03),
    ),
    tune_on=TRUE,
    measures=(rewards,),
    evaluations=6,
    findings="More true reward in three iterations than at once on every seed, by 0.04 to 0.31, which five seeds do "
    "not separate from the margin; the penalty keeps answers five tokens shorter. Seeds 0 to 4 had been "
    "used for a first design, without the penalty on length in its first comparison (-0.15 [-0.39, +0.09] "
    "in true reward, as the proxy pays for length, which fresh samples follow further; the same shows here "
    "without penalty), and then gave +0.13 [0.05, 0.21] with this one, which would have been called held; "
    "hence seeds 10 to 14.",
)

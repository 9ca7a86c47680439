"""Names of the files and folders that a run leaves in its output directory."""

CARD_FILE = "README.md"
RUN_FILE = "run.json"
RECIPE_FILE = "recipe.yaml"
METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "training_curves.png"
SAMPLES_FILE = "samples.md"
COMPLETIONS_FILE = "completions.jsonl"
# Folder of a start model that was made for the run, or unpacked
START_MODEL = "start_model"
# What `papertrl evaluate` leaves beside a run
EVALUATION_FILE, EVALUATION_REPORT, EVALUATION_PLOT = "evaluation.json", "evaluation.md", "evaluation.png"
EVALUATION_COMPLETIONS = "evaluation_completions"
# Folder of what the online loop sampled, and the file in each round's folder that says how it came about
ROUNDS = "rounds"
PROVENANCE = "provenance.json"

"""Pretrained models and preference data in, a chat model out: SFT, a reward model, PPO."""

from snakemake.utils import min_version

min_version("9.0")


include: "rules/common.smk"


# What `snakemake` makes where no target is given.
DEFAULT_RESULTS = [
    "results/tiny/rlhf/actor",
    "results/tiny/rlhf/critic",
    "results/tiny/rlhf/curves.png",
    "results/tiny/rlhf/eval",
]


for file in (*workflow.configfiles, "config.yaml"):
    refuse_unreadable(file)


configfile: "config.yaml"


CONFIG, PLAN = load_plan()
set_environment(CONFIG)
print_plan_last()


workdir: CONFIG.pvc


name_results()


wildcard_constraints:
    scenario="|".join(CONFIG.scenarios),
    stage="|".join(STAGES),
    result="|".join(sorted(result_names(PLAN))),


localrules:
    all,
    link,
    link_curves,


rule all:
    default_target: True
    input:
        DEFAULT_RESULTS,


include: "rules/sources.smk"
include: "rules/stages.smk"
include: "rules/results.smk"


onstart:
    refuse_missing_gpus()


onsuccess:
    sweep_states()
    name_results()


onerror:
    sweep_states()
    report_failures()

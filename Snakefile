"""Pretrained models and preference data in, a chat model out: SFT, a reward model, PPO."""

from snakemake.utils import min_version

min_version("9.0")


configfile: "config.yaml"


include: "rules/common.smk"


workdir: CONFIG.pvc


wildcard_constraints:
    scenario="|".join(CONFIG.scenarios),
    stage="sft|reward|rlhf",
    result="sft/actor|reward/model|rlhf/actor|rlhf/actor_ema|rlhf/critic|rlhf/eval",


localrules:
    all,
    link,
    link_curves,


rule all:
    default_target: True
    input:
        "results/tiny/rlhf/actor",
        "results/tiny/rlhf/critic",
        "results/tiny/rlhf/curves.png",
        "results/tiny/rlhf/eval",


include: "rules/sources.smk"
include: "rules/train.smk"
include: "rules/results.smk"


onstart:
    refuse_missing_gpus()


# A stage's state goes only once Snakemake knows that its artefact is there: were it to go earlier,
# a controller killed in between would train from the beginning.
onsuccess:
    sweep_states()


onerror:
    sweep_states()
